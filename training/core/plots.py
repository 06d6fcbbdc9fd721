"""Plots of the metrics and events that `Monitor` recorded, of one or several runs in one figure.

    uniref-fast plot RUN [RUN ...] [--out plots.png] [--smooth 0.9] [--keys loss grad_norm ...]

A panel shows one metric or a group of metrics: "loss_by_k" stands for "loss_by_k/1", "loss_by_k/2", ... Several runs
are overlaid; a run has the same line style in all panels. Losses are drawn as a smoothed curve over the faint raw
values, held-out losses and PSNRs as points. Dashed vertical lines mark stage changes, ticks at the bottom skipped
steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uniref_fast.files import read_records, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Run", "draw", "load", "plot", "smoothed"]

TITLES = {
    "loss": "Training loss",
    "eval": "Held out",
    "psnr": "PSNR of held-out samples, dB",
    "loss_by_k": "Loss by number of references",
    "loss_by_task": "Loss by task",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
}
"""Titles of the panels that are drawn by default, as far as the runs have their metrics."""
FORMATS: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Endings of the file, with the metadata to leave out, so that the same runs give the same bytes."""
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))  # one for each run
COLORS = ("#1f6fb4", "#d95f02", "#1b9e77", "#c2378b", "#7a5195", "#8c6d1f", "#d62728", "#3f4b5a")
INK, FAINT = "#333333", "#777777"
STYLE: Any = {
    "axes.edgecolor": "#999999",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "uniref_fast",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}


@dataclass(frozen=True)
class Run:
    """Metrics and events of a run.

    Attributes:
        name: Name in the legend.
        curves: Arrays (steps, values) of each metric, `[n]` each, float64, in the order in which they were recorded.
        stages: Pairs (step, label) of the stage changes.
        skips: Steps that were skipped.
    """

    name: str
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    stages: tuple[tuple[int, str], ...] = ()
    skips: tuple[int, ...] = ()


def load(folder: Path, name: str | None = None) -> Run:
    """Read a run's metrics and events.

    Raises:
        FileNotFoundError: If the folder or its metrics.jsonl does not exist.
        ValueError: If a file is damaged or empty.
    """
    metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
    if not metrics.is_file():
        what = "has no metrics.jsonl" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"{folder} {what}; give the folder of a training run")
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(metrics):
        for key, value in record.items():
            if key == "step":
                continue
            try:
                points.setdefault(key, []).append((record["step"], float(value)))
            except (TypeError, ValueError):
                raise ValueError(f"{metrics}: {key!r} of step {record['step']} is not a number: {value!r}") from None
    if not points:
        raise ValueError(f"{metrics} is empty: the run has finished no step yet")
    curves = {}
    for key, pairs in points.items():
        steps, values = np.array(pairs, dtype=np.float64).T
        curves[key] = steps, values
    stages, skips = _marks(read_records(events) if events.is_file() else [])
    return Run(name or folder.resolve().name, curves, stages, skips)


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Return the exponential moving average, without bias to the first value; values that are not finite leave a gap.

    Args:
        values: Array `[n]`.
        weight: Weight of the earlier values, from 0 (no smoothing) up to but not including 1.
    """
    result = np.full(len(values), np.nan)
    total = norm = 0.0
    for i, value in enumerate(values):
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
            result[i] = total / norm
    return result


def draw(runs: Sequence[Run], panels: Sequence[str] | None = None, smooth: float = 0.9) -> Figure:
    """Return the figure.

    Args:
        runs: One or more runs.
        panels: Metrics or groups of metrics, one for each panel; None draws those of `TITLES` that the runs have.
        smooth: Weight as in `smoothed`; held-out losses and learning rates are never smoothed.

    Raises:
        ValueError: If no run has the metric of a panel; the message lists the metrics that the runs have.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not 0 <= smooth < 1:
        raise ValueError(f"smooth must be at least 0 and less than 1, got {smooth}")
    panels = _panels(runs, panels)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(6.2 * columns + 0.6, 3.0 * rows + 0.7), dpi=130, layout=layout)
        grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes, panel in zip(grid, panels, strict=False):
            _panel(axes, runs, panel, smooth)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        _run_legend(figure, runs)
        if notes := _notes(runs, smooth):
            figure.supxlabel(notes, fontsize=8, color=FAINT)
    return figure


def plot(folders: Sequence[Path], out: Path, panels: Sequence[str] | None = None, smooth: float = 0.9) -> None:
    """Draw the metrics of runs and write the figure to a file; arguments as in `draw`.

    Raises:
        ValueError: If the ending of the file is not one of `FORMATS`, or a run has no usable metrics.
    """
    if out.suffix not in FORMATS:
        raise ValueError(
            f"--out {out}: the ending of the name decides the format and must be one of {', '.join(FORMATS)}"
        )
    same = len({folder.resolve().name for folder in folders}) < len(folders)
    runs = [load(folder, str(folder) if same else None) for folder in folders]
    _save(draw(runs, panels, smooth), out)


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"format": path.suffix[1:], "metadata": FORMATS[path.suffix]}
    with matplotlib.rc_context(STYLE):  # it seeds the names inside an SVG
        write_whole(path, lambda file: figure.savefig(file, **options))


# ---- selection ----


def _marks(events: list[dict[str, Any]]) -> tuple[tuple[tuple[int, str], ...], tuple[int, ...]]:
    """Return stage changes and skipped steps; a resume removes those at or after its step."""
    stages: list[tuple[int, str]] = []
    skips: list[int] = []
    for event in events:
        step, kind = event["step"], event.get("kind")
        if kind == "resume":
            stages = [stage for stage in stages if stage[0] < step]
            skips = [skip for skip in skips if skip < step]
        elif kind == "stage":
            budget = event.get("budget", event.get("side"))  # "side" in logs of older versions
            label = f"stage {event.get('number', '?')}" + (f", {budget}²" if budget else "")
            if not stages or stages[-1][1] != label:  # a resumed run records its stage again
                stages.append((step, label))
        elif kind == "skipped":
            skips.append(step)
    return tuple(stages), tuple(skips)


def _members(runs: Sequence[Run], panel: str) -> list[str]:
    """Return the metrics of a panel: the metric of that name, or the members of the group, numbers in numeric order."""
    names = {key for run in runs for key in run.curves if key == panel or key.startswith(f"{panel}/")}

    def order(key: str) -> tuple[bool, int, str]:
        tail = key.removeprefix(f"{panel}/")
        return not tail.isdecimal(), int(tail) if tail.isdecimal() else 0, tail

    return sorted(names, key=order)


def _panels(runs: Sequence[Run], panels: Sequence[str] | None) -> list[str]:
    if not runs:
        raise ValueError("no runs given")
    known = sorted({key for run in runs for key in run.curves})
    chosen = list(panels or (panel for panel in TITLES if _members(runs, panel)))
    unknown = [panel for panel in chosen if not _members(runs, panel)]
    if unknown or not chosen:
        problem = f"no run has {', '.join(unknown)}" if unknown else f"the runs have none of {', '.join(TITLES)}"
        raise ValueError(f"{problem}; possible --keys: {', '.join(known)}")
    return chosen


def _notes(runs: Sequence[Run], smooth: float) -> str:
    notes = [f"smoothed {smooth:g}"] if smooth else []
    if any(run.stages for run in runs):
        notes.append("dashed: stage change")
    if any(run.skips for run in runs):
        notes.append("ticks at the bottom: skipped steps")
    return "    ".join(notes)


# ---- drawing ----


def _panel(axes: Axes, runs: Sequence[Run], panel: str, smooth: float) -> None:
    members = _members(runs, panel)
    pointwise = panel.split("/")[0] in ("eval", "psnr")
    smooth = 0.0 if pointwise or panel == "lr" else smooth
    grouped = members != [panel]
    colors = _group_colors(panel, members)
    width = 1.0 if grouped and len(runs) > 1 else 1.5
    shown, raw = [], []
    for i, run in enumerate(runs):
        for member in members:
            if member not in run.curves:
                continue
            steps, values = run.curves[member]
            color = colors[member] if grouped else COLORS[i % len(COLORS)]
            line = smoothed(values, smooth)
            if smooth and not grouped:
                axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
                raw.append(values)
            marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if pointwise or len(steps) == 1 else {}
            label = member.removeprefix(f"{panel}/") if grouped and i == _first_with(runs, member) else None
            style = STYLES[i % len(STYLES)]
            axes.plot(steps, line, color=color, linestyle=style, linewidth=width, label=label, **marker)
            shown.append(line)
    _scales(axes, runs, shown, raw, panel)
    _draw_marks(axes, runs)
    axes.set_title(TITLES.get(panel, panel), loc="left", pad=16 if any(run.stages for run in runs) else 6)
    if grouped:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(members) // 15)


def _first_with(runs: Sequence[Run], member: str) -> int:
    return next(i for i, run in enumerate(runs) if member in run.curves)


def _group_colors(panel: str, members: Sequence[str]) -> dict[str, Any]:
    """Return the colours of the members of a group: from light to dark for numbers, distinct for names."""
    if all(member.removeprefix(f"{panel}/").isdecimal() for member in members):
        import matplotlib

        shades = np.linspace(0.88, 0.05, len(members)) if len(members) > 1 else [0.3]
        return {member: matplotlib.colormaps["viridis"](shade) for member, shade in zip(members, shades, strict=True)}
    return {member: COLORS[i % len(COLORS)] for i, member in enumerate(members)}


def _scales(axes: Axes, runs: Sequence[Run], shown: list[np.ndarray], raw: list[np.ndarray], panel: str) -> None:
    """Set the limits: the same steps in all panels, heights that hold the lines, a logarithmic scale over decades."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    first, last = _extent(runs)
    margin = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("step", loc="right", labelpad=0, color=FAINT, fontsize=8)
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    bulk = np.concatenate([r[np.isfinite(r)] for r in raw]) if raw else values
    low, high = min(values.min(), np.quantile(bulk, 0.01)), max(values.max(), np.quantile(bulk, 0.99))
    if panel.split("/")[0] in ("loss", "eval", "loss_by_k", "loss_by_task") and low > 0 and high / low > 10:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    if panel in ("lr", "tokens_per_second"):
        low = min(low, 0.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low if low == 0 else low - room, high + room)
    if panel == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif panel == "lr":
        axes.yaxis.set_major_formatter("{x:.3g}")


def _extent(runs: Sequence[Run]) -> tuple[float, float]:
    steps = [steps for run in runs for steps, _ in run.curves.values()]
    return min(s.min() for s in steps), max(s.max() for s in steps)


def _draw_marks(axes: Axes, runs: Sequence[Run]) -> None:
    """Mark stage changes, with labels above the panel where they fit, and skipped steps as ticks at the bottom."""
    first, last = _extent(runs)
    to_axes = axes.get_xaxis_transform()
    labelled = -math.inf
    for i, run in enumerate(runs):
        color, skip_color = (COLORS[i % len(COLORS)],) * 2 if len(runs) > 1 else (FAINT, "#c0392b")
        for step, label in run.stages:
            if step > first:
                axes.axvline(step, color=color, linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.8, zorder=1.5)
            if i == 0 and step - labelled > 0.16 * (last - first):
                axes.text(step, 1.015, label, transform=to_axes, fontsize=7, color=FAINT, ha="left", va="bottom")
                labelled = step
        if run.skips:
            axes.vlines(run.skips, 0, 0.05, transform=to_axes, color=skip_color, linewidth=1.0, zorder=3)


def _run_legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Draw the legend above all panels: the line style of each run, and its colour where a panel has one metric."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(runs[0].name, fontsize=12, x=0.01, ha="left")
        return
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], linestyle=STYLES[i % len(STYLES)], linewidth=1.5, label=run.name)
        for i, run in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(runs), 4), fontsize=9)
