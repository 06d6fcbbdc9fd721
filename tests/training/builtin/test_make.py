"""The built-in model's making, in miniature; and the model that is shipped."""

import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uniref_fast import builtin
from uniref_fast.builtin import components, store
from uniref_fast.demo import heldout_scenes
from uniref_fast.edit import edit
from uniref_fast.evaluation.metrics import psnr
from uniref_fast.request import EditRequest
from uniref_fast.training.builtin import make as builtin_model
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT_RECIPES

ROOT = Path(__file__).resolve().parents[3]
SMALL = ("--artworks", "shipped", "--samples", "16", "--heldout", "3", "--vae_steps", "2", "--scale", "1e-6",
         "--ranks", "1", "--dtype", "float32", "--seeds", "1")  # fmt: skip


def test_parts_are_in_order_and_leave_out_nothing(tmp_path):
    parts = builtin_model.parts(builtin_model.BuiltinModel(out=tmp_path))
    assert [part.name for part in parts] == [
        "data", "data of more pictures", "data of one picture", "vae", "sft", "sft-more", "msgrpo", "msgrpo-1",
        "msgrpo-2", "model", "eval nothing", "eval autoencoder", "eval untrained", "eval sft", "eval sft-more",
        "eval msgrpo", "eval msgrpo-1", "eval msgrpo-2", "eval shipped", "curves", "report",
    ]  # fmt: skip
    assert len({part.done for part in parts}) == len(parts)
    fewer = builtin_model.parts(builtin_model.BuiltinModel(out=tmp_path, more=False))
    left_out = {"data of one picture", "sft-more", "eval sft-more"}
    assert [part.name for part in fewer] == [part.name for part in parts if part.name not in left_out]
    assert not any("sft-more" in str(part.work) for part in fewer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples", "0"), "samples must be at least 1"),
        (("--scale", "0"), "scale must be above 0"),
        (("--dtype", "float64"), "dtype"),
        (("--artworks", "none"), "artworks"),
        (("--steps", "3"), "unknown flag --steps"),
    ],
)
def test_wrong_settings(tmp_path, capsys, flags, message):
    assert builtin_model.main(["--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_begun_with_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(builtin_model, "_run", lambda part, out: done.append(part.name) or 0)
    assert builtin_model.main(["--out", str(tmp_path), "--seeds", "1"]) == 0 and len(done) == 17
    assert builtin_model.main(["--out", str(tmp_path), "--seeds", "1", "--seed", "1"]) == 2
    assert "seed 0 -> 1" in capsys.readouterr().err and len(done) == 17


def test_a_part_that_fails_ends_it(tmp_path, monkeypatch, capsys):
    fails = builtin_model.Part("fails", tmp_path / "done", (sys.executable, "-c", "raise SystemExit(7)"))
    writes_nothing = builtin_model.Part("idle", tmp_path / "done", (sys.executable, "-c", ""))
    for part, status, message in ((fails, 7, "fails ended with status 7"), (writes_nothing, 2, "did not write")):
        monkeypatch.setattr(builtin_model, "parts", lambda config, part=part: [part])
        assert builtin_model.main(["--out", str(tmp_path / "out")]) == status
        assert message in capsys.readouterr().err


def shorten(monkeypatch):
    """Give the model that is trained fewer layers and heads, and the recipes fewer rollouts and samples."""
    for name in ("num_layers", "num_attention_heads"):
        monkeypatch.setitem(components.TRANSFORMER, name, 2)
    rl = dataclasses.replace(
        MSGRPO_RECIPES["tiny"](),
        prompts=2,
        group=2,
        rollout_num_inference_steps=2,
        eval_samples=2,
        sample_num_inference_steps=2,
    )
    monkeypatch.setitem(MSGRPO_RECIPES, "tiny", lambda: rl)
    for name in ("builtin", "builtin_more"):
        recipe = SFT_RECIPES[name]()
        stages = tuple(dataclasses.replace(stage, pack_tokens=512) for stage in recipe.stages)
        short = dataclasses.replace(recipe, stages=stages, eval_samples=2, sample_count=1, sample_num_inference_steps=2)
        monkeypatch.setitem(SFT_RECIPES, name, lambda short=short: short)


def run_here(command):
    """Run the command of a part in this process, with one rank; importing PyTorch for each would take most of the time.

    Evaluations take two denoising steps.

    Returns:
        The exit status.
    """
    assert command[0] == sys.executable
    words = list(command[1:])
    if words[:2] == ["-m", "torch.distributed.run"]:
        assert words[2:5] == ["--standalone", "--nproc-per-node", "1"]
        words = words[5:]
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
    else:
        script = Path(words[0])
        assert script.is_file() and script.parent == ROOT / "training"
        name, arguments = f"uniref_fast.training.{script.stem}", words[1:]
    if "--num-inference-steps" in arguments:
        arguments[arguments.index("--num-inference-steps") + 1] = "2"
    module = importlib.import_module("uniref_fast.cli" if name == "uniref_fast" else name)
    return module.main(arguments) or 0


@pytest.mark.slow
def test_from_nothing_to_the_evaluated_model(tmp_path, monkeypatch, capfd):
    """Every part runs with its real command line; a second start does nothing."""
    out = tmp_path / "run"
    shorten(monkeypatch)
    monkeypatch.setattr(builtin_model, "run_command", run_here)
    given = ["--out", str(out), *SMALL]
    assert builtin_model.main(given) == 0, capfd.readouterr().err[-2000:]
    status = json.loads((out / "model" / store.STATUS_FILE).read_text())
    assert status["weights"] == "trained" and status["made"]["settings"]["samples"] == 16
    assert not [path for path in (out / "model").rglob("config.json") if str(tmp_path) in path.read_text()]
    assert sum(path.stat().st_size for path in (out / "model").rglob("*") if path.is_file()) < 24e6
    report = json.loads((out / "report.json").read_text())
    assert list(report["evaluations"]) == [
        "nothing", "autoencoder", "untrained", "sft", "sft-more", "msgrpo", "shipped",
    ]  # fmt: skip
    assert all(len(one["aggregates"]) == 4 for one in report["evaluations"].values())
    assert report["evaluations"]["msgrpo"]["comparison"]["files"] and (out / "curves.png").is_file()
    names = {part.name for part in builtin_model.parts(builtin_model.BuiltinModel(out=out, seeds=1))}
    assert set(report["made"]["parts"]) == names - {"report"}
    assert all(part["commits"] and part["minutes"] >= 0 for part in report["made"]["parts"].values())

    monkeypatch.setattr(builtin_model, "run_command", lambda command: pytest.fail(f"ran again: {command}"))
    capfd.readouterr()
    assert builtin_model.main(given) == 0
    assert capfd.readouterr().out.count(": done, ") == 17


STOPPED = """
import signal, sys, time
from pathlib import Path

from uniref_fast.training.builtin import make

folder = Path(sys.argv[2])
waiting = f'''
import signal, sys, time
from pathlib import Path
folder = Path({str(folder)!r})
def stop(number, frame):
    (folder / "stopped").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "started").touch()
while not (folder / "finish").exists():
    time.sleep(0.02)
(folder / "done").touch()
'''
make.parts = lambda config: [
    make.Part("first", folder / "first", (sys.executable, "-c", f"open({str(folder / 'first')!r}, 'x')")),
    make.Part("waits", folder / "done", (sys.executable, "-c", waiting)),
]
sys.exit(make.main())
"""


def test_stopped_in_a_part_and_continued(tmp_path):
    """The signal reaches the part that runs; the next start leaves alone what is done, and runs that part again."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", STOPPED, "--out", str(out), "--ranks", "1", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (out / "started").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        assert "waits" in json.loads((out / "made.json").read_text())["parts"], "recorded before it ends"
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=30)[0]
    finally:
        (out / "finish").touch()
        process.kill()
    assert process.returncode == 143 and (out / "stopped").exists(), text
    assert "waits ended with status 143; the same command continues" in text
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first: done" in done.stdout and "waits: done" not in done.stdout and (out / "done").exists()
    assert set(json.loads((out / "made.json").read_text())["parts"]) == {"first", "waits"}


# ---- what is shipped ----


shipped = pytest.mark.skipif(store.shipped_folder() is None, reason="no trained weights in this checkout")


@shipped
def test_the_shipped_folder(tmp_path):
    folder = store.shipped_folder()
    status = json.loads((folder / store.STATUS_FILE).read_text())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert status["weights"] == "trained" and status["made"]["settings"]
    texts = [path.read_text() for path in files if path.name == "config.json"]
    assert len(texts) >= 3 and not any("_name_or_path" in text for text in texts), (
        "no place of the machine it was made on"
    )
    assert store._complete(folder)
    assert builtin.weights_status() == "trained"


@shipped
@pytest.mark.slow
def test_the_shipped_model_composes_objects_it_never_saw():
    """A floor, far below what docs/builtin-model.md reports, but above the bare background that they are put on."""
    pipe = builtin.load()
    scenes = [scene for references in (2, 3) for scene in heldout_scenes(3, references, 6)]
    scenes = [scene for scene in scenes if scene.scene["background"].get("picture")]
    sizes = {"width": 64, "height": 64, "num_inference_steps": 12, "true_cfg_scale": 1.0}
    requests = [EditRequest(s.instruction, s.references, seed=i, **sizes) for i, s in enumerate(scenes)]
    made = edit(pipe, requests, budget=128)
    ours = [psnr(image, scene.target) for image, scene in zip(made, scenes, strict=True)]
    bare = [psnr(scene.references[scene.scene["background"]["picture"] - 1], scene.target) for scene in scenes]
    assert len(scenes) >= 10 and sum(ours) / len(ours) > sum(bare) / len(bare) + 1.5, (ours, bare)
