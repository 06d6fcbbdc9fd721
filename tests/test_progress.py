"""The display of work that takes long, and every phase of the commands that shows itself in it."""

import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import small_pipeline
from PIL import Image

from uniref_fast import progress
from uniref_fast.cli import main
from uniref_fast.progress import running, tracked
from uniref_fast.training import msgrpo, sft


@pytest.fixture
def soon(monkeypatch):
    """Show work that takes any time at all."""
    monkeypatch.setattr(progress, "AFTER", 0.0)


def wait_for(capsys, text):
    """Return what is on stderr once it has a text, which a thread prints."""
    seen, end = "", time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < end, seen
        time.sleep(0.01)
        seen += capsys.readouterr().err
    return seen


def test_short_work_shows_nothing(capsys):
    with running("loading", 3, "row") as bar:
        bar.update()
    assert list(tracked([1, 2], "encoding", "row")) == [1, 2]
    assert capsys.readouterr().err == "" and "progress" not in [thread.name for thread in threading.enumerate()]


def test_long_work_shows_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    bar = running("encoding", 96, "row")
    bar.after = 0.0
    with bar:
        assert wait_for(capsys, "\n").startswith("encoding: 0 of 96 rows")
        bar.update(24)
        wait_for(capsys, "encoding: 24 of 96 rows, 0 s so far\n")
        bar.phase("writing")
        wait_for(capsys, "writing, 0 s so far\n")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "the lines end with the work"


def test_the_display_ends_with_an_error(capsys):
    with pytest.raises(ValueError, match="wrong"), running("loading").of("reading", 0.0):
        wait_for(capsys, "reading\n")
        raise ValueError("wrong")
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_ranks_other_than_0_show_nothing(capsys, soon):
    with running("loading", shown=False):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    bar = running("encoding", 4, "row")
    bar.after = 0.0

    def wait(text):
        end = time.monotonic() + 60
        while text not in stream.getvalue():
            assert time.monotonic() < end, stream.getvalue()
            time.sleep(0.01)

    with bar:
        bar.update(3)
        wait("encoding:  75%")
        bar.phase("writing", 2, "file")
        wait("writing:   0%")
        bar.phase("waiting")
        wait("waiting: ")
    assert "0/2" in stream.getvalue() and "waiting:   0%" not in stream.getvalue()


# ---- commands ----

MADE = ["--heldout", "1", "--size", "64", "--artworks", "shipped"]


@pytest.fixture
def shown(monkeypatch):
    """Record the descriptions of all work that a command would show, without threads."""
    found = []

    class Recorded(running):
        def __enter__(self):
            if self.shown:
                found.append(self.what)
            return self

        def __exit__(self, *exception):
            pass

        def phase(self, what, total=None, unit=""):
            super().phase(what, total, unit)
            found.append(what)

        def of(self, what, after=0.0):
            self.what = what
            return self

    for name, module in list(sys.modules.items()):
        if name.startswith("uniref_fast") and getattr(module, "running", None) is running:
            monkeypatch.setattr(module, "running", Recorded)
    monkeypatch.setattr(progress, "running", Recorded)
    return found


@pytest.fixture
def rows(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    row = {"instruction": "x", "input_images": ["a.png"], "output_image": "b.png"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return tmp_path / "rows.jsonl"


def test_every_phase_of_the_commands_is_shown(shown, rows, tmp_path):
    steps = ["--num-inference-steps", "2"]
    image = str(tmp_path / "a.png")
    assert main(["edit", "--prompt", "x", "--image", image, "--out", str(tmp_path / "out.png"), *steps]) == 0
    assert shown == ["loading the model builtin", "encoding", "decoding"]
    shown.clear()
    assert main(["eval", str(rows), "--out", str(tmp_path / "results"), *steps]) == 0
    assert shown == ["reading the rows", "loading the model builtin", "hashing the weights", "evaluating"]
    shown.clear()
    assert main(["data", "check", str(rows)]) == 0 and shown == ["reading the files", "checking"]
    shown.clear()
    assert main(["data", "convert", str(rows), "--out", str(tmp_path / "new.jsonl")]) == 0
    assert shown == ["reading the files", f"writing {tmp_path / 'new.jsonl'}"]
    shown.clear()
    assert main(["data", "make", str(tmp_path / "made"), *MADE, "--train", "1"]) == 0 and shown == ["generating"]


@pytest.mark.slow
def test_every_phase_of_training_is_shown(shown, rows, tmp_path):
    model, run = str(small_pipeline.folder()), tmp_path / "run"
    more = ["--model", model, "--tensorboard", "false", "--packs", "1", "--sample-every", "0"]
    args = ["--recipe", "tiny", "--data", rows, "--heldout", rows, "--steps", 2, "--lora-rank", 2, "--out", run]
    assert sft.main(list(map(str, [*args, "--cost", "measured", *more]))) == 0
    first = ["verifying the newest checkpoint", f"loading the model {model}", "reading the rows"]
    assert shown[:5] == [*first, "preparing the weights", "measuring the cost of packs"]
    phases = ["step 1: reading rows and planning packs", "step 1: encoding", "step 1: forward and backward"]
    for name in (*phases, "writing the checkpoint of step 2", "validating at step 2", "writing the trained weights"):
        assert name in shown, name
    shown.clear()
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    assert main(["fuse", model, "--lora", str(run), "--out", str(tmp_path / "fused")]) == 0
    fusing = [f"loading the model {model}", "fusing the adapters", f"writing {tmp_path / 'fused'}"]
    assert shown == [f"verifying and writing the weights of {run}", *fusing]
    shown.clear()
    made = tmp_path / "made"
    assert main(["data", "make", str(made), *MADE, "--train", "3", "--references", "2"]) == 0
    args = ["--recipe", "tiny", "--data", made / "train.jsonl", "--steps", 2, "--prompts", 2, "--group", 2,
            "--eval-every", 0, "--initial", run, "--out", tmp_path / "rl"]  # fmt: skip
    short = ["--rollout-num-inference-steps", 3, "--stages.1.references", "any"]
    assert msgrpo.main(list(map(str, [*args, *more, *short]))) == 0
    phases = (
        "encoding",
        "denoising rollouts",
        "step 1: replaying the rollouts",
        "waiting for scores",
        "step 1: update",
    )
    assert [name for name in shown if name in phases][:5] == list(phases)


SLOW = """
import time
from uniref_fast import builtin, progress
progress.AFTER = 0.05

def load(*args, **options):
    time.sleep(1)
    raise ValueError("the slow model cannot be loaded")

builtin.load = load
from uniref_fast.cli import main
from uniref_fast.training import sft
import sys
sys.exit(main(sys.argv[2:]) if sys.argv[1] == "uniref-fast" else sft.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["uniref-fast", "edit", "--prompt", "x", "--image", "a.png", "--out", "out.png", "--num-inference-steps", "2"],
        ["sft", "--recipe", "tiny", "--data", "rows.jsonl", "--out", "run"],
    ],
)  # fmt: skip
def test_a_process_with_a_slow_model_says_what_it_does(rows, tmp_path, args):
    """The lines are in a pipe, that is without a terminal."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SLOW, *args]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and "the slow model cannot be loaded" in lines[-2], result.stderr
    assert "loading PyTorch" in lines[:2] and "loading the model builtin" in lines[1:-2]
