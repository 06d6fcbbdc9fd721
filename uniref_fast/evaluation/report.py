"""Reports of an evaluation for people: a table of the aggregates, and a sheet of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from uniref_fast.evaluation.aggregate import Record
from uniref_fast.rewards.types import AXES
from uniref_fast.sheets import contact_sheet

__all__ = ["aggregates_table", "aligned", "sampling_text", "sheet"]

Cell = Callable[[Mapping[str, Any]], str]


def _measure(*path: str, digits: int = 2, errors: bool = False) -> Cell:
    def cell(found: Mapping[str, Any]) -> str:
        value: Any = found
        for key in path:
            value = value[key]
        if not isinstance(value, Mapping):
            return "" if value is None else f"{value:.{digits}f}"
        if value["mean"] is None:
            return ""
        error = f" ±{value['sem']:.{digits}f}" if errors and value["sem"] is not None else ""
        return f"{value['mean']:.{digits}f}{error}"

    return cell


def _percent(name: str) -> Cell:
    def cell(found: Mapping[str, Any]) -> str:
        share, error = found["objects"][name], found["objects"][f"{name}_sem"]
        return "" if share is None else f"{share:.0%}" + (f" ±{100 * error:.0f}" if error else "")

    return cell


def _own_cell(found: Mapping[str, Any], measure: str) -> str:
    value = found["own"].get(measure, {"mean": None})
    return "" if value["mean"] is None else _measure("own", measure, errors=True)(found)


COLUMNS: dict[str, Cell] = {
    "rows": lambda found: str(found["rows"]),
    "broken": lambda found: str(found["broken"] or ""),
    "unscored": lambda found: str(sum(found["failures"].values()) or ""),
    **{axis: _measure("scores", axis) for axis in AXES},
    "mean": _measure("scores", "mean", errors=True),
    "best": _measure("bound_scores", "mean"),
    "PSNR": _measure("psnr", digits=1, errors=True),
    "VAE": _measure("bound_psnr", digits=1),
    "gap": _measure("gap_psnr", digits=1, errors=True),
    "present": _percent("present"),
    "new": _percent("new_present"),
    "off": _measure("objects", "distance", digits=1),
    "similar": _measure("objects", "similarity"),
    "most": _measure("objects", "bound_similarity"),
}
LEGEND = {
    "unscored": "unscored: rows that the reward could not score",
    "mean": "mean: mean of the three axes, 0 to 10, ± standard error",
    "best": "best: the same mean for the target after encoding and decoding by the autoencoder",
    "VAE": "VAE: PSNR of that target in dB; gap: difference from the PSNR of the result",
    "present": "present: share of the target's objects that the result shows; new: the same for objects that no "
    "reference shows at their place",
    "off": "off: distance of the objects from their place, in pixels",
    "similar": "similar: similarity of the objects, 0 to 1; most: the same for that target",
}


def aggregates_table(found: Mapping[str, Any], overall: Mapping[str, Any] | None = None) -> str:
    """Return aggregates as a text table with a legend; columns without values are left out.

    Args:
        found: Aggregates by file, see `aggregate.aggregates`.
        overall: Aggregates of all files together, which follow if there are several files.
    """
    lines = []
    whole = {"all files": overall} if overall is not None and len(found) > 1 else {}
    for file, part in {**found, **whole}.items():
        lines.append((file, part["all"]))
        lines += [(f"  {k} reference{'' if k == '1' else 's'}", one) for k, one in part["references"].items()]
        lines += [(f"  {name}", one) for kind in ("tasks", "languages") for name, one in part[kind].items()]
    own = dict.fromkeys(measure for _, one in lines for measure in one["own"])
    columns = COLUMNS | {measure.partition(":")[2]: functools.partial(_own_cell, measure=measure) for measure in own}
    names = [name for name, cell in columns.items() if any(cell(one) for _, one in lines)]
    grid = [["", *names]] + [[label, *(columns[name](one) for name in names)] for label, one in lines]
    legend = [text for name, text in LEGEND.items() if name in names]
    return "\n".join([*aligned(grid), *(["", *legend] if legend else [])])


def aligned(grid: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of cells, with the first column aligned to the left and the others to the right."""
    widths = [max(len(cells[i]) for cells in grid) for i in range(len(grid[0]))]
    return [
        "  ".join(
            [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()
        for cells in grid
    ]


def sampling_text(settings: Mapping[str, Any], sizes: Iterable[Sequence[int]]) -> str:
    """Return the settings that images were generated with, in words.

    Args:
        settings: "num_inference_steps", "true_cfg_scale" and "budget" as in `EvalConfig`; steps of None stand for
            images that no model generated, and a budget of None for references scaled as diffusers does.
        sizes: Sizes (width, height) of the images.
    """
    steps, scale = settings["num_inference_steps"], settings["true_cfg_scale"]
    parts = [] if steps is None else [f"num_inference_steps {steps}", f"true_cfg_scale {scale:g}"]
    budget = settings["budget"]
    parts.append("budget none (references as in diffusers)" if budget is None else f"budget {budget}")
    ordered = sorted({(width * height, width, height) for width, height in sizes})
    shown = [f"{width}x{height}" for _, width, height in dict.fromkeys((*ordered[:1], *ordered[-1:]))]
    parts += [f"{'size' if len(shown) == 1 else 'sizes'} {' to '.join(shown)}"] * bool(shown)
    return ", ".join(parts)


def sheet(rows: Sequence[tuple[Record, list[tuple[str, Image.Image]]]], settings: Mapping[str, Any]) -> Image.Image:
    """Return a labelled grid with a line for each record: the result with its scores, then the other images.

    Args:
        rows: (record, labelled images) of each line.
        settings: Settings of the images, see `sampling_text`, which the heading shows.
    """
    lines, texts = [], []
    for number, (record, (result, *others)) in enumerate(rows, start=1):
        scores = " ".join(f"{axis[0]}{record['scores'][axis]:.1f}" for axis in AXES) if "scores" in record else ""
        lines.append([(f"{number}. {result[0]} {scores}".rstrip(), result[1]), *others])
        texts.append(f"{number}. {record['file']} {record['index']}: {record['instruction']}")
    heading = sampling_text(settings, [record["size"] for record, _ in rows])
    return contact_sheet(lines, heading=heading, caption="\n".join(texts), cell=160)
