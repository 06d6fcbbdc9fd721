"""Tests of the plots of runs: reading, drawing, and errors if there is nothing to draw."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniref_fast import cli
from uniref_fast.training.core import plots
from uniref_fast.training.core.monitor import Monitor

pytest.importorskip("matplotlib")


def write(folder, records, events=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if events:
        (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def records(count=60, offset=0.0):
    return [
        {"step": s, "loss": 0.5 + offset + 0.01 * (-1) ** s, "lr": 1e-4, "tokens_per_second": 2e4}
        | {f"loss_by_k/{k}": 0.1 * k for k in (10, 2, 1)}
        | {f"loss_by_task/{t}": 0.3 for t in ("move", "compose", "add")}
        | ({"eval/heldout_objects": 0.4} if s % 20 == 0 else {})
        for s in range(count)
    ]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}


def call(capsys, *args):
    status = cli.main(["plot", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


# ---- the picture ----


def test_a_panel_for_each_thing_that_the_run_has(tmp_path):
    run = plots.load(write(tmp_path / "run", records()))
    shown = panels(plots.draw([run]))
    assert list(shown) == [
        "Training loss", "Held out", "Loss by number of references", "Loss by task", "Learning rate",
        "Tokens per second",
    ]  # fmt: skip
    assert [t.get_text() for t in shown["Loss by number of references"].get_legend().get_texts()] == ["1", "2", "10"]
    assert [t.get_text() for t in shown["Loss by task"].get_legend().get_texts()] == ["add", "compose", "move"]
    raw, smooth = shown["Training loss"].lines
    assert np.array_equal(raw.get_ydata(), run.curves["loss"][1]) and raw.get_alpha() < 0.5
    assert np.ptp(smooth.get_ydata()[20:]) < 0.2 * np.ptp(raw.get_ydata())
    (held_out,) = shown["Held out"].lines
    assert list(held_out.get_xdata()) == [0, 20, 40] and held_out.get_marker() == "o"
    assert shown["Learning rate"].get_ylim()[0] == 0 < shown["Learning rate"].get_ylim()[1] - 1e-4
    low = write(tmp_path / "low", [{"step": 0, "loss": 1.0, "seconds": 2.0}])
    assert list(panels(plots.draw([plots.load(low)]))) == ["Training loss"], "one point, one panel"


def test_runs_are_overlaid_with_one_style_each(tmp_path):
    runs = [
        plots.load(write(tmp_path / "a", records())),
        plots.load(write(tmp_path / "b", records(30, 0.2))),
    ]
    runs[1].curves["loss_by_k/7"] = runs[1].curves.pop("loss_by_k/2")
    figure = plots.draw(runs)
    shown = panels(figure)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]
    lines = [line for line in shown["Training loss"].lines if line.get_alpha() is None]
    assert [len(line.get_xdata()) for line in lines] == [60, 30]
    assert len({line.get_linestyle() for line in lines}) == len({line.get_color() for line in lines}) == 2
    by_k = shown["Loss by number of references"]
    assert sorted(t.get_text() for t in by_k.get_legend().get_texts()) == ["1", "10", "2", "7"]
    assert {line.get_linestyle() for line in by_k.lines} == {line.get_linestyle() for line in lines}
    assert all(axes.get_xlim() == by_k.get_xlim() for axes in shown.values())


def test_more_runs_than_styles(tmp_path):
    run = plots.load(write(tmp_path / "a", records(3)))
    many = [plots.Run(f"run {i}", run.curves) for i in range(11)]
    assert len(plots.draw(many).legends[0].get_texts()) == 11


def test_stages_and_skips_are_marked(tmp_path):
    events = [
        {"step": 0, "kind": "stage", "number": 0, "side": 512},  # as older versions wrote it
        {"step": 12, "kind": "skipped", "loss": "nan"},
        {"step": 30, "kind": "stage", "number": 1, "side": 768},
        {"step": 33, "kind": "skipped"},
        {"step": 20, "kind": "resume"},  # the last two belong to what was thrown away
        {"step": 20, "kind": "stage", "number": 0, "side": 512},  # still, not a change
        {"step": 25, "kind": "checkpoint", "path": "x"},
        {"step": 40, "kind": "stage", "number": 1, "budget": 1024},
        {"step": 41, "kind": "stage", "number": 2},  # no room for its label
    ]
    run = plots.load(write(tmp_path / "run", records(), events))
    assert run.stages == ((0, "stage 0, 512²"), (40, "stage 1, 1024²"), (41, "stage 2")) and run.skips == (12,)
    figure = plots.draw([run])
    for axes in panels(figure).values():
        dashed = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
        assert dashed == [40, 41] and [text.get_text() for text in axes.texts] == ["stage 0, 512²", "stage 1, 1024²"]
        assert [path.vertices[0][0] for path in axes.collections[0].get_paths()] == [12]
    assert "skipped steps" in figure._supxlabel.get_text()
    assert "skipped" not in plots.draw([plots.load(write(tmp_path / "none", records()))])._supxlabel.get_text()


def test_what_monitor_writes_is_what_is_drawn(tmp_path, capsys):
    with Monitor(tmp_path / "run", 20, tensorboard=False) as monitor:
        for step in range(12):
            monitor.step(step, {"loss": math.nan if step == 5 else 1.0}, tokens=9, samples=1, flops=1.0, seconds=1.0)
        monitor.event(5, "skipped", loss=math.nan)
    with Monitor(tmp_path / "run", 20, start_step=5, tensorboard=False) as monitor:
        monitor.step(5, {"loss": 2.0}, tokens=9, samples=1, flops=1.0, seconds=1.0)
    run = plots.load(tmp_path / "run")
    assert list(run.curves["loss"][0]) == list(range(6)) and run.curves["loss"][1][5] == 2.0 and run.skips == ()
    out = tmp_path / "deep" / "picture.png"
    status, text, _ = call(capsys, tmp_path / "run", "--out", out)
    assert status == 0 and text.strip() == str(out)
    pixels = np.asarray(Image.open(out).convert("L"))
    assert min(pixels.shape) > 300 and pixels.std() > 5 and [p.name for p in out.parent.iterdir()] == [out.name]


def test_losses_over_decades_are_logarithmic_unless_one_is_not_positive(tmp_path):
    def scale(last):
        values = [10.0] * 10 + [0.1] * 200 + [last] * 200
        folder = write(tmp_path / str(last), [{"step": s, "loss": v} for s, v in enumerate(values)])
        return panels(plots.draw([plots.load(folder)]))["Training loss"].get_yscale()

    assert scale(0.1) == "log" and scale(0.0) == scale(-1.0) == "linear"


def test_a_spike_is_cut_off_by_the_smoothed_curve_not_without_it(tmp_path):
    values = [300.0 if s == 100 else 1.0 + s / 500 for s in range(500)]
    run = plots.load(write(tmp_path / "run", [{"step": s, "grad_norm": v} for s, v in enumerate(values)]))
    tops = [panels(plots.draw([run], ["grad_norm"], smooth))["grad_norm"].get_ylim()[1] for smooth in (0.9, 0.0)]
    assert 30 < tops[0] < 40 and tops[1] > 300


@pytest.mark.parametrize("values", [[math.nan] * 3, [0.0] * 3, [math.inf, -math.inf, 1.0]])
def test_odd_values_are_drawn(tmp_path, values, capsys):
    lines = [{"step": s, "loss": str(v), "lr": 0.0} for s, v in enumerate(values)]
    assert call(capsys, write(tmp_path / "run", lines), "--out", tmp_path / "x.png")[0] == 0


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_run_gives_the_same_bytes(tmp_path, capsys, ending):
    folder = write(tmp_path / "run", records())
    for name in ("one", "two"):
        assert call(capsys, folder, "--keys", "loss", "--out", tmp_path / f"{name}.{ending}")[0] == 0
    assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()


# ---- smoothing ----


def test_smoothing():
    values = np.array([1.0, np.nan, 3.0, np.inf, 3.0])
    assert np.array_equal(plots.smoothed(values, 0.0), [1, np.nan, 3, np.nan, 3], equal_nan=True)
    # weights 0.25, 0.5 of the finite values, normalised
    assert plots.smoothed(values, 0.5)[2] == pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75)
    assert plots.smoothed(values, 0.99)[0] == 1.0, "no bias to the start"
    assert plots.smoothed(np.array([]), 0.5).shape == (0,)
    assert np.allclose(plots.smoothed(np.full(50, 7.0), 0.9), 7.0)


# ---- reading ----


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path):
    folder = write(tmp_path / "run", records(4), [{"step": 1, "kind": "skipped"}])
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 9, "lo')
    run = plots.load(folder)
    assert list(run.curves["loss"][0]) == [0, 1, 2, 3] and run.skips == (1,)


def test_names_of_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "x" / "run", records(2)))
    assert plots.load(tmp_path / "x" / ".." / "x" / "run").name == "run"
    seen = []
    monkeypatch.setattr(plots, "draw", lambda runs, *rest: seen.extend(run.name for run in runs) or 1 / 0)
    other = write(tmp_path / "y" / "run", records(2))
    with pytest.raises(ZeroDivisionError):
        plots.plot([Path("."), other], tmp_path / "x.png")
    assert seen == [".", str(other)], "runs with equal names are shown with their paths"


@pytest.mark.parametrize(
    "args, message",
    [
        (["missing"], "missing is not a folder; give the folder of a training run"),
        (["full/metrics.jsonl"], "is not a folder"),
        (["nothing"], "nothing has no metrics.jsonl"),
        (["empty"], "is empty: the run has finished no step yet"),
        (["cut"], "is empty"),
        (["damaged"], r"line 2 is damaged"),
        (["words"], "'loss' of step 0 is not a number: 'high'"),
        (["full", "--keys", "los", "lr"], "no run has los; possible --keys: eval/heldout_objects, loss, loss_by_k/1"),
        (["odd"], "none of loss, eval, psnr, loss_by_k, .*possible --keys: reward"),
        (["full", "--smooth", "1"], "smooth must be at least 0 and less than 1, got 1.0"),
        (["full", "--out", "x.bmp"], "must be one of .png, .svg, .pdf"),
        (["full", "--out", "full/metrics.jsonl/x.png"], "metrics.jsonl"),
    ],
)
def test_errors_say_what_to_do(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "full", records(3))
    write(tmp_path / "empty", [])
    write(tmp_path / "odd", [{"step": 0, "reward": 1.0}])
    write(tmp_path / "words", [{"step": 0, "loss": "high"}])
    (tmp_path / "nothing").mkdir()
    (write(tmp_path / "cut", []) / "metrics.jsonl").write_text('{"step": 0, "loss"')
    (write(tmp_path / "damaged", []) / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"st\n{"step": 2}\n')
    status, out, err = call(capsys, *args)
    assert status == 2 and not out and not (tmp_path / "plots.png").exists()
    assert err.startswith("uniref-fast plot: error: ") and err.endswith("\nTry 'uniref-fast plot --help'.\n")
    assert re.search(message, err), err


def test_a_failed_write_leaves_the_old_picture(tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    folder, out = write(tmp_path / "run", records(2)), tmp_path / "x.png"
    out.write_bytes(b"old")

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    status, _, err = call(capsys, folder, "--out", out)
    assert status == 2 and "no space left" in err and out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "x.png"]


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = call(capsys, write(tmp_path / "run", records(2)), "--out", tmp_path / "x.png")
    assert status == 1 and "matplotlib" in err and "[train]" in err
