"""Files and output of the monitor; a resume, a kill or a full disk damages neither."""

import io
import json
import math
import signal
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image

from uniref_fast.files import read_records
from uniref_fast.training.core.monitor import GroupedMean, Monitor, peak_flops

COUNTS = {"tokens": 1000, "samples": 10, "flops": 4e12, "seconds": 2.0}


def monitor(folder, total=10, start=0, **options):
    return Monitor(folder, total, start, **{"tensorboard": False, **options})


def run(folder, steps, total=10, start=0, **options):
    with monitor(folder, total, start, **options) as m:
        for step in steps:
            m.step(step, {"loss": step / 10}, **COUNTS)


def steps_of(folder):
    return [record["step"] for record in read_records(folder / "metrics.jsonl")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ---- metrics ----


def test_a_step_is_a_line_with_its_rates(tmp_path):
    with monitor(tmp_path / "deep" / "run", flops_per_second=8e12) as m:
        m.step(0, {"loss": torch.tensor(0.5), "loss_by_k/3": 1}, **COUNTS)
        (record,) = read_records(m.folder / "metrics.jsonl")  # there already, before the end
    assert record == {
        "step": 0, "loss": 0.5, "loss_by_k/3": 1.0, "tokens_per_second": 500.0, "samples_per_second": 5.0,
        "mfu": 0.25, **COUNTS,
    }  # fmt: skip


def test_mfu_only_where_the_peak_is_known(tmp_path):
    run(tmp_path, [0])
    assert "mfu" not in read_records(tmp_path / "metrics.jsonl")[0]


def test_numbers_that_are_not_finite_are_text_in_strict_json(tmp_path):
    with monitor(tmp_path) as m:
        m.step(0, {"loss": math.nan, "grad_norm": math.inf}, **COUNTS)
        m.event(0, "skipped", loss=math.nan, shards=[1, -math.inf], path=tmp_path, nested={1: None})

    def refuse(name):
        raise AssertionError(name)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert math.isnan(float(record["loss"])) and float(record["grad_norm"]) == math.inf
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 0, "kind": "skipped", "loss": "nan", "shards": [1, "-inf"], "path": str(tmp_path),
        "nested": {"1": None},
    }  # fmt: skip


def test_log_has_no_turn(tmp_path):
    with monitor(tmp_path, start=2) as m:
        m.log(2, {"eval/heldout_objects": 0.25})
        m.step(2, {"loss": 1}, **COUNTS)
        m.log(2, {"eval/heldout_combinations": 0.5})
        with pytest.raises(ValueError, match="before start_step = 2"):
            m.log(1, {"eval/x": 1.0})
    first, _, last = read_records(tmp_path / "metrics.jsonl")
    assert first == {"step": 2, "eval/heldout_objects": 0.25} and last == {"step": 2, "eval/heldout_combinations": 0.5}


@pytest.mark.parametrize(
    "metrics, counts, kind, message",
    [
        ({"loss": [1, 2]}, {}, TypeError, "'loss' of step 5 must be one number, got list"),
        ({"loss": torch.zeros(2)}, {}, TypeError, "must be one number, got Tensor"),
        ({"mfu": 1, "step": 2, "loss": 3}, {}, ValueError, "names mfu, step"),
        ({}, {"seconds": 0.0}, ValueError, "must be positive, got 0.0"),
        ({}, {"seconds": math.nan}, ValueError, "must be positive, got nan"),
    ],
)
def test_bad_steps_write_nothing(tmp_path, metrics, counts, kind, message):
    with monitor(tmp_path) as m:
        with pytest.raises(kind, match=message):
            m.step(5, metrics, **{**COUNTS, **counts})
        m.step(5, {}, **COUNTS)  # still its turn
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step {step} is out of turn: the next one is 6"):
                m.step(step, {}, **COUNTS)
    assert steps_of(tmp_path) == [5]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 11}, "start_step must be 0 to total_steps = 10, got 11"),
        ({"start": -1}, "got -1"),
        ({"print_every": 0}, "at least 1"),
        ({"flops_per_second": 0.0}, "must be positive, or None"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        monitor(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_it_must_be_open(tmp_path):
    m = monitor(tmp_path)
    image = Image.new("RGB", (2, 2))
    for call in (lambda: m.step(0, {}, **COUNTS), lambda: m.event(0, "x"), lambda: m.image(0, "x", image)):
        with pytest.raises(RuntimeError, match="with Monitor"):
            call()
    with m:
        m.step(0, {}, **COUNTS)
    with pytest.raises(RuntimeError, match="with Monitor"):
        m.step(1, {}, **COUNTS)


def test_other_ranks_do_nothing(tmp_path, capfd):
    folder = tmp_path / "run"
    with Monitor(folder, 10, enabled=False, wandb=True) as m:
        m.step(-1, {"mfu": "x"}, tokens=0, samples=0, flops=0, seconds=0)
        m.log(0, {"a": 1})
        m.event(0, "skipped")
        m.image(0, "a/b", Image.new("RGB", (2, 2)))
    assert not folder.exists() and capfd.readouterr() == ("", "")


# ---- resume and faults ----


def test_resume_cuts_what_lies_after_the_checkpoint(tmp_path, capsys):
    run(tmp_path, range(6))
    with monitor(tmp_path) as m:
        assert steps_of(tmp_path) == [], "a start from 0 begins a new curve"
        for step in range(6):
            m.step(step, {}, **COUNTS)
        m.event(5, "skipped")
    run(tmp_path, range(4, 8), start=4)
    assert steps_of(tmp_path) == list(range(8))
    assert [(e["step"], e["kind"], e.get("metrics_cut")) for e in read_records(tmp_path / "events.jsonl")] == [
        (0, "resume", 6), (5, "skipped", None), (4, "resume", 2),
    ]  # fmt: skip
    assert "step 4  resume  metrics_cut=2" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_resume_at_the_end_of_the_curve_keeps_its_bytes(tmp_path):
    run(tmp_path, range(6))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(tmp_path, [], start=6)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert read_records(tmp_path / "events.jsonl") == [{"step": 6, "kind": "resume", "metrics_cut": 0}]


@pytest.mark.parametrize("cut", [1, 2, 30])  # the line's end only, its brace, most of it
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    run(tmp_path, range(5))
    with monitor(tmp_path, start=5) as m:
        m.event(5, "checkpoint", path="somewhere" * 5)
    for name in ("metrics.jsonl", "events.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    run(tmp_path, range(4, 6), start=4)
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert [e["kind"] for e in read_records(tmp_path / "events.jsonl")] == ["resume", "resume"]


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    """Kill the process at a random moment: every complete record can be read, and the run continues."""
    script = (
        "import sys, itertools; from pathlib import Path; from uniref_fast.training.core.monitor import Monitor\n"
        "with Monitor(Path(sys.argv[1]), 10**9, tensorboard=False) as m:\n"
        "    for step in itertools.count():\n"
        "        m.step(step, {'loss': 1.5}, tokens=1, samples=1, flops=1, seconds=1)\n"
        "        if step == 50: print('ready', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = steps_of(tmp_path)
    assert there == list(range(len(there))) and len(there) > 50
    run(tmp_path, range(40, 45), total=100, start=40)
    assert steps_of(tmp_path) == list(range(45))


def test_what_was_logged_of_the_resumed_state_stays(tmp_path):
    """A trainer evaluates after it has saved: that is no part of what a resume takes back."""
    pytest.importorskip("tensorboard")
    with monitor(tmp_path, tensorboard=True) as m:
        for step in range(5):
            m.log(step, {"eval/x": 10.0 + step})
            m.step(step, {"loss": 1.0}, **COUNTS)
    with monitor(tmp_path, start=3, tensorboard=True) as m:
        m.step(3, {"loss": 2.0}, **COUNTS)
    kept = [(r["step"], r["eval/x"]) for r in read_records(tmp_path / "metrics.jsonl") if "eval/x" in r]
    assert kept == scalars(tmp_path, "eval/x")[0] == [(step, 10.0 + step) for step in range(4)]
    assert scalars(tmp_path, "loss")[0] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]
    run(tmp_path, [])
    assert steps_of(tmp_path) == [], "a start from 0 evaluates again"


def test_images_of_later_steps_go_with_the_metrics(tmp_path):
    image = Image.new("RGB", (4, 4))
    with monitor(tmp_path) as m:
        assert not m.has_image(4, "heldout")
        for step in (2, 4, 6):
            m.image(step, "heldout", image)
        m.log(4, {"eval/x": 1.0})
        assert (
            m.has_image(4, "heldout") and m.logged(4, "eval/") and not m.logged(4, "loss") and not m.logged(2, "eval/")
        )
    (tmp_path / "samples" / "mine.png").write_text("")
    with monitor(tmp_path, start=4) as m:
        assert [m.has_image(step, "heldout") for step in (2, 4, 6)] == [True, True, False]
    assert (tmp_path / "samples" / "mine.png").exists()


@pytest.mark.parametrize("name", ["metrics", "events"])
def test_with_a_damaged_file_no_other_is_touched(tmp_path, name):
    run(tmp_path, [0, 1, 2])
    with open(tmp_path / f"{name}.jsonl", "ab") as file:
        file.write(b"damaged\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, line \d+ is damaged"), monitor(tmp_path, start=1):
        pass
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_damaged_file_is_named_and_nothing_is_touched(tmp_path):
    run(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("\n", "\n{broken\n", 1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
        run(tmp_path, [1], start=1)
    assert path.read_bytes() == before


def test_long_details_are_shortened_on_the_screen_only(tmp_path, capsys):
    rows = [f"train.jsonl:{i}" for i in range(100)]
    with monitor(tmp_path) as m:
        m.event(1, "skipped", rows=rows)
    assert len(capsys.readouterr().err) < 200 and read_records(tmp_path / "events.jsonl")[0]["rows"] == rows


def test_an_event_is_printed_as_its_text_and_recorded_with_its_details(tmp_path, capsys):
    with monitor(tmp_path) as m:
        m.event(1, "nothing to learn", "all 2 rewards of a group are equal", zero_spread=1)
    assert capsys.readouterr().err == "step 1  nothing to learn: all 2 rewards of a group are equal\n"
    assert read_records(tmp_path / "events.jsonl") == [{"step": 1, "kind": "nothing to learn", "zero_spread": 1}]


# ---- what is shown ----


def test_lines_where_stderr_is_no_terminal(tmp_path, capsys):
    run(tmp_path, range(7), total=7, print_every=3, flops_per_second=4e12)
    out, err = capsys.readouterr()
    assert not out and [line.split()[1] for line in err.splitlines()] == ["1/7", "3/7", "6/7", "7/7"]
    assert err.splitlines()[1] == "step 3/7  loss 0.2, 500 tokens/s, 5 samples/s, MFU 50.0%"


def test_a_bar_on_a_terminal_with_events_above_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with monitor(tmp_path, total=8, start=3) as m:
        for step in (3, 4, 6):
            m.step(step, {"loss": 0.25, "lr": 1e-4, "loss_by_k/1": 3.0}, **{**COUNTS, "tokens": 2_000_000})
        m.event(7, "skipped", loss=math.nan)
    shown = sys.stderr.getvalue()
    last = shown.split("\r")[-1]
    assert "7/8" in last and "loss 0.25, lr 0.0001, 1.00M tokens/s, 5 samples/s" in last and "by_k" not in last
    assert "\rstep 7  skipped  loss=nan\n" in shown, "on a line of its own, the bar cleared before it"


# ---- images ----


def test_images_are_whole_files(tmp_path, monkeypatch):
    picture = Image.new("RGBA", (5, 4), (255, 0, 0, 128))
    with monitor(tmp_path) as m:
        m.image(12, "heldout-3", picture)
        path = tmp_path / "samples" / "heldout-3-000012.png"
        first = path.read_bytes()
        assert Image.open(path).mode == "RGBA" and Image.open(path).size == (5, 4)
        for name in ("a/b", "", "../x", ".x", "a b"):
            with pytest.raises(ValueError, match="part of a file's"):
                m.image(12, name, picture)

        def fail(self, file, format):
            file.write(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="no space"):
            m.image(12, "heldout-3", picture)
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.read_bytes() == first


# ---- TensorBoard and Weights & Biases ----


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)], events.Tags()["images"]


def test_tensorboard_has_one_curve_across_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, range(5), tensorboard=True)
    with monitor(tmp_path, start=3, tensorboard=True) as m:
        m.step(3, {"loss": 7.0}, **COUNTS)
        m.image(3, "heldout", Image.new("P", (4, 6)))
    points, images = scalars(tmp_path, "loss")
    assert [step for step, _ in points] == [0, 1, 2, 3]
    assert points[3][1] == 7.0 and points[2][1] == pytest.approx(0.2)
    assert images == ["samples/heldout"] and len(scalars(tmp_path, "tokens_per_second")[0]) == 4


def test_without_tensorboard_a_line_says_so_and_training_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(tmp_path, range(2), tensorboard=True)
    err = capsys.readouterr().err
    assert err.count("TensorBoard is off") == 1 and "pip install tensorboard" in err
    assert steps_of(tmp_path) == [0, 1] and not (tmp_path / "tensorboard").exists()


def fake_wandb(log):
    module = types.ModuleType("wandb")

    class Run:
        def __init__(self, id):
            self.id = id or "fresh"

        def log(self, values):
            log.append(values)

        def define_metric(self, name, step_metric):
            log.append((name, step_metric))

        def finish(self, exit_code):
            log.append(exit_code)

    def init(**options):
        log.append(options)
        return Run(options["id"])

    module.init, module.Image = init, lambda image: ("image", image.size)
    return module


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    log = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log))
    with monitor(tmp_path / "run", wandb=True) as m:
        m.step(0, {"loss": 0.5}, **COUNTS)
        m.image(0, "x", Image.new("RGB", (4, 6)))
    options, steps, values, image, code = log
    assert options["id"] is None and options["resume"] == "allow" and options["name"] == "run"
    assert steps == ("*", "step") and values["step"] == 0 and values["loss"] == 0.5 and code == 0
    assert image == {"step": 0, "samples/x": ("image", (4, 6))}
    log.clear()
    with pytest.raises(KeyboardInterrupt), monitor(tmp_path / "run", wandb=True):
        raise KeyboardInterrupt
    assert log[0]["id"] == "fresh" and log[-1] == 1


def test_wandb_asked_for_but_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        monitor(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


# ---- means by group ----


def test_grouped_mean_by_weight_and_again_after_reduce():
    means = GroupedMean("loss_by_k")
    means.add(3, 1.0)
    means.add(3, 4.0, weight=2)
    means.add("1", torch.tensor(5.0))
    result = means.reduce()
    assert result == {"loss_by_k/1": 5.0, "loss_by_k/3": 3.0} and list(result) == ["loss_by_k/1", "loss_by_k/3"]
    assert means.reduce() == {}
    means.add(3, 7.0)
    assert means.reduce() == {"loss_by_k/3": 7.0}
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            means.add(3, 1.0, weight=weight)
    means.add(3, math.nan)
    assert math.isnan(means.reduce()["loss_by_k/3"]), "a loss that is no number is not hidden"


# ---- peaks ----


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 836e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("Some GPU", None),
    ],
)
def test_peak_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda", torch.bfloat16) == peak_flops(torch.device("cuda", 1), torch.float16) == peak
    assert peak_flops("cuda", torch.float32) is None


def test_no_peak_on_a_cpu():
    assert peak_flops("cpu", torch.bfloat16) is None
