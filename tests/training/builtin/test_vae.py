"""Tests of the training of the built-in autoencoder: crops, PSNR, and runs that learn, are killed, and resume."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from uniref_fast.loading import load_pipeline
from uniref_fast.scenes.dataset import write_dataset
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.training.builtin import vae, vae_trainer
from uniref_fast.training.builtin.vae import VAE
from uniref_fast.training.builtin.vae_trainer import crops, psnr

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]
SMALL = VAE(data=Path("pictures"), steps=3, batch=2, side=16, lr=1e-2, save_every=2)


@pytest.fixture(scope="module", autouse=True)
def pictures(tmp_path_factory):
    """Pictures to train on, at the relative path that `SMALL` names."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("vae"))
    config = MakeConfig(artworks("shipped"), size=64, references=(1, 2))
    counts = {"train": 16, "heldout_objects": 8, "heldout_combinations": 0}
    write_dataset(SMALL.data, config, counts, workers=1, force=False, generate=sample)
    yield
    os.chdir(before)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """A run joins a group of one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- crops ----


@pytest.mark.parametrize(("batch", "side"), [(1, 16), (5, 48), (2, 112)])
def test_crops_are_pictures_in_range(batch, side):
    """The last side is larger than any picture, which then is enlarged."""
    made = crops(dataclasses.replace(SMALL, batch=batch, side=side), 3)
    assert made.shape == (batch, 3, 1, side, side) and made.dtype == torch.float32
    assert made.min() >= -1 and made.max() <= 1
    assert made.amax() - made.amin() > 0.2, "something is seen"
    levels = (made + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4, msg="whole levels of 0..255")


def test_crops_span_the_range():
    made = torch.cat([crops(dataclasses.replace(SMALL, batch=8), step) for step in range(8)])
    assert made.min() < -0.7 and made.max() > 0.7


def test_crops_are_keyed_by_seed_step_and_split():
    """Crops are drawn ahead in threads, and again by a resumed run, so they depend on seed, step and split alone."""
    keys = [(SMALL, 0, "train"), (SMALL, 1, "train"), (SMALL, 7, "train"), (SMALL, -1, "train"), (SMALL, -7, "train"),
            (SMALL, 1, "heldout_objects"), (SMALL, -1, "heldout_objects"),
            (dataclasses.replace(SMALL, seed=1), 1, "train")]  # fmt: skip
    first = [crops(*key) for key in keys]
    again = [crops(*key) for key in reversed(keys)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    same = [(i, j) for i in range(len(keys)) for j in range(i) if torch.equal(first[i], first[j])]
    assert same == []
    assert torch.equal(crops(SMALL, 7), first[2]), "of training, unless said otherwise"


def test_crops_are_of_different_pictures_of_the_split(tmp_path):
    for split, levels in (("train", range(0, 120, 10)), ("heldout_objects", range(130, 250, 10))):
        (tmp_path / "images" / split).mkdir(parents=True)
        for level in levels:
            Image.new("RGB", (32, 40), (level,) * 3).save(tmp_path / "images" / split / f"{level}.png")
        made = crops(dataclasses.replace(SMALL, data=tmp_path, batch=12), 0, split)
        found = ((made[:, 0, 0, 0, 0] + 1) * 127.5).round().tolist()
        assert sorted(found) == list(levels)


def test_too_few_pictures(tmp_path):
    with pytest.raises(ValueError, match="0 images of train, fewer than the 2"):
        crops(dataclasses.replace(SMALL, data=tmp_path), 0)


def test_crops_leave_the_global_generators_alone():
    state = torch.get_rng_state()
    crops(SMALL, 0)
    assert torch.equal(torch.get_rng_state(), state)


# ---- psnr ----


def test_psnr():
    """Check values for a peak of 2: an error of 0.2 everywhere is 20 log10(2 / 0.2) = 20 dB, of 0.02 it is 40 dB."""
    wanted = torch.zeros(3, 3, 1, 4, 4)
    made = wanted + torch.tensor([0.2, -0.02, 0.0]).view(3, 1, 1, 1, 1)
    found = psnr(made, wanted)
    assert found.shape == (3,) and found[:2].tolist() == pytest.approx([20, 40], abs=1e-4)
    assert math.isfinite(found[2]) and found[2] > 90, "no error at all is still a number"


def test_psnr_is_of_the_mean_square():
    wanted = torch.zeros(1, 1, 1, 2, 2)
    made = torch.tensor([0.1, 0.3, -0.5, 0.0]).view(1, 1, 1, 2, 2)
    assert psnr(made, wanted).item() == pytest.approx(10 * math.log10(4 / ((0.01 + 0.09 + 0.25) / 4)), abs=1e-4)


def test_psnr_clamps_what_was_made():
    wanted = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    assert torch.equal(psnr(wanted * 5, wanted), psnr(wanted, wanted))
    assert torch.equal(psnr(wanted.bfloat16(), wanted), psnr(wanted, wanted))


# ---- a run ----


def metrics(out, name="loss"):
    """(step, value), in the order of the file."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(out):
    return load_file(out / "model" / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of a few steps without any interruption."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    vae_trainer.run(dataclasses.replace(SMALL, out=out))
    torch.set_num_threads(before)
    return out


def test_what_a_run_writes(whole):
    assert [step for step, _ in metrics(whole)] == [0, 1, 2]
    assert [step for step, _ in metrics(whole, "eval/psnr")] == [2, 3], "every save_every steps, and at the end"
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]
    assert len(list(whole.rglob("heldout*.png"))) == 2


def test_the_model_is_a_pipeline_with_latents_of_unit_size(whole):
    pipe = load_pipeline(str(whole / "model"), torch.float32, "cpu")
    stats = pipe.vae.config
    mean, std = torch.tensor(stats.latents_mean), torch.tensor(stats.latents_std)
    assert len(mean) == len(std) == stats.z_dim and (std > 0).all() and torch.isfinite(mean).all()
    seen = torch.cat([crops(SMALL, step) for step in range(40)])  # others than the statistics are of
    with torch.no_grad():
        latents = pipe.vae.encode(seen).latent_dist.mode().transpose(0, 1).flatten(1)
    normal = (latents - mean[:, None]) / std[:, None]
    assert normal.mean(1).abs().max() < 0.5 and normal.std(1).min() > 0.5 and normal.std(1).max() < 2
    untrained = load_pipeline("builtin", torch.float32, "cpu").vae.config
    assert list(untrained.latents_mean) != mean.tolist() and list(untrained.latents_std) != std.tolist()
    assert all(torch.isfinite(value).all() for value in weights(whole).values())


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from uniref_fast.training.core import monitor
from uniref_fast.training.builtin import vae
step = monitor.Monitor.step
def dying(self, number, *rest, **more):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, number, *rest, **more)
monitor.Monitor.step = dying
sys.exit(vae.main(sys.argv[1:]))
"""


def flags(config):
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def test_a_killed_run_resumes_to_the_same_weights(whole, tmp_path):
    config = dataclasses.replace(SMALL, out=tmp_path / "run")
    done = warm.run("-c", KILLED, *flags(config), cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-000002"]
    assert not (config.out / "model").exists()
    assert vae.main(flags(config)) == 0
    assert contents(config.out / "model") == contents(whole / "model"), "to the bit"
    assert metrics(config.out) == metrics(whole) and metrics(config.out, "eval/psnr") == metrics(whole, "eval/psnr")


def test_weights_move_and_a_finished_model_is_never_half_replaced(whole, capsys):
    initial = load_pipeline("builtin", torch.bfloat16, "cpu").vae.state_dict()
    moved = [name for name, value in weights(whole).items() if not torch.equal(value, initial[name])]
    assert len(moved) > len(initial) / 2
    before = contents(whole / "model")
    assert vae.main(flags(dataclasses.replace(SMALL, out=whole))) == 0
    assert contents(whole / "model") == before and "exists; nothing to do" in capsys.readouterr().out
    assert vae.main(flags(dataclasses.replace(SMALL, out=whole, lr=0.1))) == 2
    assert "the peak learning rate is fixed: lr is " in capsys.readouterr().err


def test_a_folder_that_holds_no_model(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert vae.main(["--out", str(tmp_path)]) == 2
    assert "holds no model; remove it" in capsys.readouterr().err


def test_the_loss_falls(tmp_path):
    """The loss falls by more than batches differ: means over a third of the steps, all of the first scenes."""
    config = dataclasses.replace(SMALL, out=tmp_path / "run", steps=30, batch=4, lr=2e-2, save_every=100)
    vae_trainer.run(config)
    losses = [loss for _, loss in metrics(config.out)]
    assert len(losses) == 30 and sum(losses[-10:]) < 0.85 * sum(losses[:10])


# ---- wrong input ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--side", "24"], "side must be a multiple of 16"),
        (["--side", "0"], "side must be a multiple of 16"),
        (["--lr", "0"], "lr above 0"),
        (["--lr", "nan"], "lr"),
        (["--kl", "-1"], "kl at least 0"),
        (["--steps", "many"], "many"),
        (["--data", "nowhere"], "nowhere has 0 images"),
        (["--stepps", "3"], "steps"),
        (["--steps"], "steps"),
        (["--recipe", "large"], "large"),
    ],
    ids=str,
)
def test_wrong_flags(given, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert vae.main(["--out", str(out), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vae: ") and message in said and not out.exists()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    given = dataclasses.replace(SMALL, out=tmp_path / "file" / "run")
    assert vae.main(flags(given)) == 2
    assert capsys.readouterr().err.startswith("vae: ") and (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_at_the_end_says_what_was_kept(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")

    def full(*arguments, **more):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(vae_trainer.builtin, "write", full)
        assert vae.main(flags(dataclasses.replace(SMALL, out=out))) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vae: ")]
    assert "No space left" in line and "step-000003: free some space" in line
    assert vae.main(flags(dataclasses.replace(SMALL, out=out, save_every=1))) == 0
    assert contents(out / "model") == contents(whole / "model")
    changed = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert (
        {"save_every"} <= {event["setting"] for event in changed if event["kind"] == "changed"} <= {"save_every", "out"}
    )


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    for step in (3, 2):
        largest = max((out / "checkpoints" / f"step-{step:06d}").iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        if step == 3:
            assert vae.main(flags(dataclasses.replace(SMALL, out=out))) == 0
            assert contents(out / "model") == contents(whole / "model"), "to the bit"
            assert "step-000003.damaged" in capsys.readouterr().err
            shutil.rmtree(out / "checkpoints" / "step-000003")
            shutil.rmtree(out / "model")
    assert vae.main(flags(dataclasses.replace(SMALL, out=out))) == 2
    assert "step-000002" in capsys.readouterr().err and not (out / "model").exists()
