"""Supervised fine-tuning end to end, on a small model: what it writes, and what it survives."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import small_pipeline
import torch
import warm
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from synthetic import synthetic_sample
from torch.multiprocessing.reductions import StorageWeakRef

from uniref_fast import cli, runs
from uniref_fast import flags as configs
from uniref_fast.adapters import Adapter
from uniref_fast.evaluation.model import check_runs
from uniref_fast.training import sft
from uniref_fast.training.core import checkpoint, export, launch, model
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.encoders import Encoders
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.supervised import trainer, validation
from uniref_fast.training.supervised.recipes import SFT, SFT_RECIPES

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """40 rows to train on and 4 held out, with 0 to 3 references."""
    folder = tmp_path_factory.mktemp("data")
    for name, first, count in (("train", 0, 40), ("heldout", 1000, 4)):
        rows = []
        for i in range(first, first + count):
            scene = synthetic_sample(i, size=64, references=1 + i % 3)
            files = [f"{i}-{j}.png" for j in range(len(scene.references) + 1)]
            for file, image in zip(files, [*scene.references, scene.target], strict=True):
                image.save(folder / file)
            references = files[:-1] if i % 8 else []
            rows.append({"input_images": references, "output_image": files[-1], "instruction": scene.instruction,
                         "task_type": f"task {len(references)}"})  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(data, out, *more, steps=4):
    given = {
        "recipe": "tiny",
        "model": small_pipeline.folder(),
        "data": data / "train.jsonl",
        "out": out,
        "steps": steps,
        "save-every": 2,
        "warmup": 2,
        "eval-every": 0,
        "sample-every": 0,
        "tensorboard": "false",
        "cache": data / "cache",  # all runs of a worker share the encodings
        "encoders": "resident",
        "stages.0.lr": "1e-3",
        "stages.1.lr": "1e-3",
    }
    for i, side in enumerate((64, 96)):
        given |= {f"stages.{i}.budget": side, f"stages.{i}.target-side": 64, f"stages.{i}.pack-tokens": 320}
    given |= {name.removeprefix("--"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def unchanged(data, out):
    """Return the arguments that resume a run with its own settings."""
    given = {"recipe": "tiny", "model": small_pipeline.folder(), "data": data / "train.jsonl", "out": out}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))] + ["--resume", "auto"]


def records(out, name="metrics"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def losses(out):
    return {record["step"]: record["loss"] for record in records(out) if "loss" in record}


def events(out, kind):
    return [record for record in records(out, "events") if record["kind"] == kind]


def weights(out):
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of four steps, two stages, without any interruption."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    assert sft.main(flags(data, out)) == 0
    torch.set_num_threads(before)
    return out


@pytest.fixture
def half(whole, tmp_path):
    """The folder as it was after two steps."""
    out = tmp_path / "half"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    shutil.rmtree(out / "transformer")
    return out


def own_lines(capsys):
    """Return the lines of stderr that begin with the name of the command, without the one that announces the run."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("sft: ") and not line.startswith("sft: recipe ")]


def equal_to(whole, out):
    assert losses(out) == losses(whole), "bit for bit"
    expected = weights(whole)
    assert [name for name, tensor in weights(out).items() if not torch.equal(tensor, expected[name])] == []


def test_a_run(whole):
    assert sorted(losses(whole)) == [0, 1, 2, 3] and all(loss > 0 for loss in losses(whole).values())
    record = records(whole)[0]
    assert {"lr", "grad_norm", "utilisation", "imbalance", "tokens_per_second"} <= set(record)
    assert any(key.startswith("loss_by_k/") for key in record) and any(
        key.startswith("loss_by_task/") for key in record
    )
    assert [event["number"] for event in events(whole, "stage")] == [0, 1]
    assert json.loads((whole / "config.json").read_text())["steps"] == 4
    initial = dict(small_pipeline.load().transformer.named_parameters())
    moved = [name for name, tensor in weights(whole).items() if not torch.equal(tensor, initial[name])]
    assert len(moved) > len(initial) / 2


def test_resume_is_exact(data, whole, half):
    assert sft.main(flags(data, half, "--resume", "auto")) == 0
    equal_to(whole, half)


def test_resume_without_flags_keeps_the_settings_of_the_run(data, whole, half):
    assert sft.main(unchanged(data, half)) == 0
    equal_to(whole, half)


two_ranks = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")


@two_ranks
def test_resume_with_twice_the_ranks_is_exact(data, whole, half):
    warm.run_ranks(2, "training/sft.py", *flags(data, half, "--resume", "auto"))
    equal_to(whole, half)
    shutil.rmtree(half / "transformer")
    assert cli.main(["export", str(half)]) == 0, "the checkpoint of two ranks"
    assert identical(weights(half), weights(whole))


@two_ranks
def test_encoders_are_gone_while_a_run_trains_and_an_encoding_pass_that_was_killed_goes_on(
    data, whole, tmp_path, monkeypatch
):
    """Two ranks begin to encode and are killed; one rank encodes the rest and trains to the same bits."""
    out = tmp_path / "run"
    begun = warm.start_ranks(2, "training/sft.py", *flags(data, out, "--encoders", "free", "--cache", "none"))
    while len(list((out / "cache").rglob("*.safetensors"))) < 24:  # more than two unfinished rows can have
        assert all(rank.poll() is None for rank in begun), begun[0].stderr[-4000:]
        time.sleep(0.01)
    for rank in begun:
        rank.kill()

    storages, live = [], []
    free, step = Encoders.free, trainer.SFTTrainer.train_step

    def freed(encoders):
        parts = encoders.pipe.vae, encoders.pipe.text_encoder
        storages.extend(StorageWeakRef(p.untyped_storage()) for part in parts for p in part.parameters())
        free(encoders)

    def stepped(run):
        live.append(sum(not storage.expired() for storage in storages))
        return step(run)

    monkeypatch.setattr(Encoders, "free", freed)
    monkeypatch.setattr(trainer.SFTTrainer, "train_step", stepped)
    assert sft.main(flags(data, out, "--encoders", "free", "--cache", "none", "--resume", "auto")) == 0
    equal_to(whole, out)
    assert len(storages) > 50 and live == [0] * 4
    (event,) = events(out, "encoded")
    assert 0 < event["now"] < event["rows"] and event["broken"] == 0
    assert events(out, "cache")[0]["hits"] > 0
    shutil.rmtree(out / "checkpoints" / "step-000004")
    shutil.rmtree(out / "transformer")
    assert sft.main(flags(data, out, "--encoders", "free", "--cache", "none", "--resume", "auto")) == 0
    equal_to(whole, out)
    assert [one["now"] for one in events(out, "encoded")][1:] == [0], "the rows of the last two steps are there"


@two_ranks
def test_ranks_that_share_packs_from_the_second_stage_on(data, whole, tmp_path):
    """Two replicas, then two ranks with half of each pack: the same losses but for rounding."""
    warm.run_ranks(2, "training/sft.py", *flags(data, tmp_path / "run", "--stages.1.sequence-parallel", 2))
    found = losses(tmp_path / "run")
    assert {step: found[step] for step in (0, 1)} == {step: losses(whole)[step] for step in (0, 1)}
    assert found == pytest.approx(losses(whole), rel=1e-5)


KILLED_WHILE_SAVING = """
import os, signal, sys
from uniref_fast.training import sft
from uniref_fast.training.core import checkpoint
import torch
torch.set_num_threads(1)
finish, calls = checkpoint._finish, []
def dying(*args):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(*args)
checkpoint._finish = dying
sft.main(sys.argv[1:])
"""


def test_kill_while_saving(data, whole, tmp_path):
    out = tmp_path / "run"
    done = warm.run("-c", KILLED_WHILE_SAVING, *flags(data, out))
    assert done.returncode == -signal.SIGKILL
    kept = out / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == [".step-000004.partial", "step-000002"]
    assert sft.main(flags(data, out, "--resume", "auto")) == 0
    equal_to(whole, out)
    assert not list(kept.glob(".*"))


def test_sigterm_saves_and_exits_and_the_evaluation_of_that_step_comes_later(data, whole, tmp_path, monkeypatch):
    out, step = tmp_path / "run", trainer.SFTTrainer.train_step
    every = ("--eval-every", 1, "--eval-samples", 2, "--heldout", data / "heldout.jsonl")

    def interrupted(self):
        if self.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(trainer.SFTTrainer, "train_step", interrupted)
    assert sft.main(flags(data, out, *every)) == 143
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"] and sorted(losses(out)) == [0]
    assert validated(out) == [0]
    monkeypatch.undo()
    assert sft.main(flags(data, out, *every, "--resume", "auto")) == 0
    equal_to(whole, out)
    assert validated(out) == [0, 1, 2, 3, 4]


def adapter(out):
    return load_file(out / "lora" / "pytorch_lora_weights.safetensors")


def identical(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_export_writes_the_tensors_that_the_run_exports_at_that_step(data, whole, half, tmp_path, capsys):
    """The run exports at step 2 when it is resumed with two steps in all."""
    assert cli.main(["export", str(half)]) == 0
    assert "averaged weights of step 2" in capsys.readouterr().out
    exported = weights(half)
    shutil.rmtree(half / "transformer")
    assert sft.main(flags(data, half, "--resume", "auto", steps=2)) == 0
    assert (
        f"uniref-fast edit --model {small_pipeline.folder()} --initial {half} --image"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert identical(exported, weights(half))
    assert not identical(exported, weights(whole))
    for name, step in (("second", 2), ("fourth", 4)):
        assert cli.main(["export", str(whole), "--step", str(step), "--out", str(tmp_path / name)]) == 0
    assert identical(exported, weights(tmp_path / "second")) and identical(weights(whole), weights(tmp_path / "fourth"))
    assert runs.trained_visibility(tmp_path / "fourth") == "full"
    QwenImageTransformer2DModel.from_pretrained(tmp_path / "fourth" / "transformer", use_safetensors=True)


def test_export_refuses_wrong_folders_and_steps_and_names_damaged_checkpoints(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([tmp_path / "none"], "no such folder"),
        ([empty], "has no checkpoints; give the folder of a training run"),
        ([out, "--step", 3], "has no checkpoint of step 3; it has those of 2, 4"),
        ([out, "--step", 2], "is not the newest checkpoint; write it elsewhere with --out DIR"),
        ([out, "--out", whole], "exists and is not an empty folder"),
    ):
        assert cli.main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.splitlines()[1:] == ["Try 'uniref-fast export --help'."]
    shard = next((out / "checkpoints" / "step-000004").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert cli.main(["export", str(out), "--step", "4", "--out", str(tmp_path / "a")]) == 1
    error = capsys.readouterr().err
    assert "has changed since it was written" in error and error.count("\n") == 1 and not (tmp_path / "a").exists()
    assert cli.main(["export", str(out), "--out", str(tmp_path / "b")]) == 0
    captured = capsys.readouterr()
    assert "step-000004 cannot be used" in captured.err and "of step 2" in captured.out
    assert cli.main(["export", str(out)]) == 2, "the complete export of the run is not replaced by an older step"
    assert identical(weights(out), weights(whole))


def test_ctrl_c_saves_and_the_adapter_can_be_exported_used_and_continued(data, tmp_path, monkeypatch, capsys):
    out, step, lora = tmp_path / "run", trainer.SFTTrainer.train_step, ("--lora-rank", 2, "--lora-alpha", 3)

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(trainer.SFTTrainer, "train_step", interrupted)
    assert sft.main(flags(data, out, *lora)) == 130
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "stopped at step 3; continue with --resume auto" in error.splitlines()[-1] and "Traceback" not in error
    named = f"it has checkpoints only: uniref-fast export {out} writes the weights"
    assert sft.main(flags(data, tmp_path / "next", *lora, "--initial", out)) == 2
    assert named in capsys.readouterr().err
    with pytest.raises(ValueError, match=named):
        Adapter.parse(str(out))
    with pytest.raises(ValueError, match=named):
        check_runs((out,), str(small_pipeline.folder()))

    assert cli.main(["export", str(out)]) == 0
    assert f"uniref-fast edit --model {small_pipeline.folder()} --lora {out}" in capsys.readouterr().out
    exported = adapter(out)
    assert sft.main(flags(data, out, *lora, "--resume", "auto", steps=3)) == 0
    assert (
        f"uniref-fast edit --model {small_pipeline.folder()} --lora {out} --image"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert identical(exported, adapter(out))

    # the scale of a continued adapter is the one of the run that it started from
    after = tmp_path / "after"
    assert sft.main(flags(data, after, "--initial", out, steps=2)) == 0
    assert cli.main(["export", str(after), "--out", str(tmp_path / "copy")]) == 0
    assert identical(adapter(after), adapter(tmp_path / "copy"))
    scales = []
    for folder in (after, tmp_path / "copy"):
        pipe = small_pipeline.load()
        pipe.load_lora_weights(str(folder / "lora"), adapter_name="default", use_safetensors=True)
        scales.append(pipe.transformer.peft_config["default"].lora_alpha)
    assert scales == [3, 3]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run catches it."""


@pytest.mark.parametrize("name", ["losses", "grid"])
def test_figures_of_an_evaluation_that_was_killed_come_later(data, tmp_path, monkeypatch, name):
    """The evaluation ends after the checkpoint of its step, before or after the figures were recorded; never twice."""
    out, real = tmp_path / "run", getattr(validation.Validation, name)
    more = ("--heldout", data / "heldout.jsonl", "--eval-every", 2, "--eval-samples", 2, "--sample-every", 2)
    given = flags(data, out, *more, "--sample-count", 1, "--sample-num-inference-steps", 2)

    def dying(self, *arguments):
        if (out / "checkpoints" / "step-000002").exists():
            raise Killed
        return real(self, *arguments)

    monkeypatch.setattr(validation.Validation, name, dying)
    with pytest.raises(Killed):
        sft.main(given)
    monkeypatch.undo()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    grid = out / "samples" / "heldout-000002.png"
    assert validated(out) == ([0] if name == "losses" else [0, 2]) and not grid.exists()
    assert sft.main([*given, "--resume", "auto"]) == 0
    assert validated(out) == [0, 2, 4] and grid.exists()
    assert sft.main([*given, "--resume", "auto"]) == 0
    assert validated(out) == [0, 2, 4], "nothing is missing"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(data, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (file,) = (out / "checkpoints" / "step-000004").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 // 4 * 4 + 3] ^= 1 << 6  # an exponent
    file.write_bytes(content)
    shutil.rmtree(out / "transformer")
    assert sft.main(flags(data, out, "--resume", "auto")) == 0
    equal_to(whole, out)
    (event,) = events(out, "damaged checkpoint")
    assert event["step"] == 2 and event["name"] == "step-000004" and file.name in event["reason"]
    assert "step-000004" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-000002", "step-000004", "step-000004.damaged"
    ]  # fmt: skip


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_run_whose_only_checkpoint_is_damaged_says_what_to_do(data, half, content, capsys):
    state = half / "checkpoints" / "step-000002" / "state.json"
    state.unlink() if content is None else state.write_text(content)
    before = contents(half)
    assert sft.main(flags(data, half, "--resume", "auto")) == 1
    message = capsys.readouterr().err
    assert "step-000002" in message and "state.json" in message and "give another --out" in message
    assert contents(half) == before


def contents(folder):
    """Return the content of all files except the lock, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def test_another_visibility_is_trained(data, whole, tmp_path):
    """References see themselves alone: other losses, and the run says so for those who load it."""
    out = tmp_path / "run"
    assert sft.main(flags(data, out, "--visibility", "reference_causal", steps=2)) == 0
    assert losses(out)[0] != losses(whole)[0], "the same packs"
    assert json.loads((out / "config.json").read_text())["visibility"] == "reference_causal"
    after = launch.with_visibility(SFT((BudgetStage(64, 1, 1.0),), initial=out))
    assert after.visibility == "reference_causal", "a run that starts from it"


def validated(out):
    return sorted(record["step"] for record in records(out) if any(name.startswith("eval/") for name in record))


def test_a_resumed_run_keeps_its_packs_whatever_memory_there_is(data, tmp_path):
    """If pack_tokens is planned, more memory makes larger packs; a resumed run keeps its own."""

    def packs(out, gib, *more, resume=None):
        """Return the planned tokens of the packs of both stages; write a checkpoint of step 0 if there is none."""
        planned = [text for i in (0, 1) for text in (f"--stages.{i}.pack-tokens", "none")]
        given = flags(data, out, *planned, "--memory-gib", gib, *more)
        config = launch.with_visibility(configs.parse(SFT_RECIPES, given, extra=launch.RunOptions(out)).config)
        run = trainer.SFTTrainer(config, ranks, out, resume)
        try:
            with run.monitor:
                run.save()
        finally:
            run.close()
        return [plan.pack_tokens for plan in run.plans]

    ranks, out = Ranks.start(), tmp_path / "run"
    try:
        few, many = packs(out, 0.15), packs(tmp_path / "other", 8)
        assert few[0] < many[0] and few[1] < many[1]
        assert packs(out, 8, resume=0) == few
        other_side = packs(out, 8, "--stages.1.budget", 112, resume=0)
        assert other_side[0] == few[0] and other_side[1] > few[1], "a stage of other sizes is planned for the memory"
    finally:
        torch.distributed.destroy_process_group()


def not_finite(monkeypatch, steps):
    real = trainer.partial_errors
    calls = []

    def errors(packed, batch):
        calls.append(batch)
        result = real(packed, batch)
        return result * float("nan") if (len(calls) - 1) // 2 in steps else result

    monkeypatch.setattr(trainer, "partial_errors", errors)


def test_a_loss_that_is_not_finite_is_skipped(data, tmp_path, monkeypatch, capsys):
    not_finite(monkeypatch, {1})
    assert sft.main(flags(data, tmp_path / "run", steps=2)) == 0
    (event,) = events(tmp_path / "run", "skipped")
    assert event["step"] == 1 and all("train.jsonl:" in row for row in event["rows"])
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_many_in_a_row_end_the_run(data, tmp_path, monkeypatch, capsys):
    not_finite(monkeypatch, range(10))
    assert sft.main(flags(data, tmp_path / "run", "--max-skipped", 2)) == 1
    message = capsys.readouterr().err
    assert "2 steps in a row" in message and "train.jsonl:" in message


def test_disk_full(data, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "run", checkpoint._write

    def full(folder, tensors):
        if "step-000002" in folder.name:
            raise OSError(28, "No space left on device")
        write(folder, tensors)

    monkeypatch.setattr(checkpoint, "_write", full)
    assert sft.main(flags(data, out, "--save-every", 1, steps=2)) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"], (
        "the last good one, and nothing else"
    )


def test_disk_full_at_the_export(data, half, whole, monkeypatch, capsys):
    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for module in (model, export):
        monkeypatch.setattr(module, "write_weights", full)
    assert cli.main(["export", str(half)]) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("uniref-fast export: "))
    assert "No space left" in error and not (half / "transformer").exists()
    assert sft.main(flags(data, half, "--resume", "auto")) == 1
    (line,) = own_lines(capsys)
    assert "No space left" in line and "step-000004 holds them: make room" in line and "--resume auto" in line
    monkeypatch.undo()
    assert sft.main(flags(data, half, "--resume", "auto")) == 0
    equal_to(whole, half)


def test_broken_rows_are_named_and_passed_over(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    lines = (folder / "train.jsonl").read_text().splitlines()[:12]
    (folder / "1-0.png").write_bytes((folder / "1-0.png").read_bytes()[:300])  # the header is whole
    lines[2] = "{"
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "heldout.jsonl").unlink()
    (folder / "about.json").write_text('{"version": 1}')
    assert sft.main(flags(folder, tmp_path / "run", "--data", folder, "--packs", 1)) == 0
    assert [event["where"] for event in events(tmp_path / "run", "left out")] == ["about.json"]
    found = {event["where"].rsplit("/")[-1] for event in events(tmp_path / "run", "broken row")}
    assert {"train.jsonl:3"} <= found <= {"train.jsonl:2", "train.jsonl:3"}, "line 2 is named when its images are read"


def with_masks(data, folder, mask_of):
    """A copy of the data whose rows have the masks that `mask_of(number, size)` returns; None for no mask."""
    shutil.copytree(data, folder)
    for name in ("train", "heldout"):
        rows = list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()))
        for i, row in enumerate(rows):
            if (mask := mask_of(i, Image.open(folder / row["output_image"]).size)) is not None:
                row["mask"] = f"{name}-{i}-mask.png"
                mask.save(folder / row["mask"])
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_white_masks_change_nothing(data, whole, tmp_path):
    folder = with_masks(data, tmp_path / "data", lambda i, size: Image.new("L", size, 255) if i % 3 else None)
    assert sft.main(flags(folder, tmp_path / "run", "--mask-weight-outside", 0.2)) == 0
    equal_to(whole, tmp_path / "run")


def test_masks_weigh_the_loss_and_broken_ones_are_broken_rows(data, tmp_path):
    def mask_of(i, size):
        if i == 7:
            return Image.new("L", (500, 20), 255)
        mask = Image.new("L", size)
        mask.paste(0 if i == 5 else 255, (0, 0, 20, 64))
        return mask if i % 2 else None

    folder, out = with_masks(data, tmp_path / "data", mask_of), tmp_path / "run"
    for name, rows in (("train", slice(12)), ("heldout", slice(1, 2))):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()[rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    more = ("--heldout", folder / "heldout.jsonl", "--eval-every", 4)
    assert sft.main(flags(folder, out, *more)) == 0
    broken = {event["where"].rsplit(":")[-1]: event["reason"] for event in events(out, "broken row")}
    assert set(broken) == {"6", "8"}
    assert "train-5-mask.png: the mask is black everywhere" in broken["6"]
    assert "train-7-mask.png: the mask is 500 x 20 pixels, and the target " in broken["8"]

    before, final = losses(out), weights(out)
    shutil.rmtree(out / "checkpoints/step-000004")
    shutil.rmtree(out / "transformer")
    assert sft.main(flags(folder, out, *more, "--resume", "auto")) == 0
    assert losses(out) == before and all(torch.equal(tensor, final[name]) for name, tensor in weights(out).items())

    assert sft.main(flags(folder, tmp_path / "unmasked", *more, "--mask-weight-outside", 1, steps=2)) == 0
    masked, unmasked = (next(r["eval/heldout"] for r in records(run) if "eval/heldout" in r)
                        for run in (out, tmp_path / "unmasked"))  # fmt: skip
    assert masked != unmasked, "the held-out loss is masked as the loss of training is"
    assert losses(tmp_path / "unmasked")[0] != before[0]


def test_heldout_loss_and_samples(data, tmp_path):
    more = ("--heldout", data / "heldout.jsonl", "--eval-every", 6, "--sample-every", 6, "--eval-samples", 4)
    more += ("--sample-count", 2, "--sample-num-inference-steps", 2, "--cache", tmp_path / "cache")
    prompts = {"input_images": [str(data / "1-0.png")], "instruction": "my own prompt"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompts) + "\n" + json.dumps(prompts | {"input_images": []}))
    more += ("--validate", tmp_path / "prompts.jsonl")
    assert sft.main(flags(data, tmp_path / "run", *more, steps=6)) == 0
    first, last = [record for record in records(tmp_path / "run") if "eval/heldout" in record]
    assert (first["step"], last["step"]) == (0, 6) and last["eval/heldout"] < first["eval/heldout"]
    settings = {"num_inference_steps": 2.0, "true_cfg_scale": 1.0, "budget": 96.0, "target_side": 64.0}
    for record in (first, last):
        assert (
            record["psnr/heldout"] > 5
            and settings.items() <= {name.removeprefix("sampling/"): value for name, value in record.items()}.items()
        ), "the sizes are those of the last stage, also in the first one"
    evaluated = ["eval", data / "heldout.jsonl", "--initial", tmp_path / "run", "--out", tmp_path / "eval",
                 "--model", small_pipeline.folder(), "--limit", 2, "--num-inference-steps", 2]  # fmt: skip
    assert cli.main(list(map(str, evaluated))) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert found["settings"]["budget"] == 96 and found["settings"]["target_side"] == 64
    assert found["overall"]["all"]["psnr"]["mean"] == pytest.approx(last["psnr/heldout"], abs=1e-3)
    grids = {path.stem: path for path in (tmp_path / "run" / "samples").iterdir()}
    assert set(grids) == {f"{name}-00000{step}" for name in ("heldout", "prompts") for step in (0, 6)}
    assert all(path.stat().st_size > 1000 for path in grids.values())
    drawn = {name: path.read_bytes() for name, path in grids.items()}
    assert drawn["prompts-000000"] != drawn["prompts-000006"]
    grids["prompts-000006"].unlink()
    kept = grids["heldout-000006"].stat().st_mtime_ns
    assert sft.main(flags(data, tmp_path / "run", *more, "--resume", "auto", steps=6)) == 0
    assert grids["prompts-000006"].read_bytes() == drawn["prompts-000006"], "the noise is always the same"
    assert grids["heldout-000006"].stat().st_mtime_ns == kept, "only what the folder lacks is drawn again"
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    event, *_ = events(tmp_path / "run", "cache")
    assert event["misses"] > 0


def test_lora_with_measured_costs_and_recomputed_blocks(data, tmp_path):
    more = ("--lora-rank", 4, "--cost", "measured", "--dtype", "bfloat16")  # the adapter itself stays in float32
    more += ("--stages.0.checkpointing", "true", "--stages.1.checkpointing", "true")
    assert sft.main(flags(data, tmp_path / "run", *more, steps=2)) == 0
    assert [path.name for path in (tmp_path / "run" / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_an_adapter_of_another_kind_resumes_exactly_and_is_used_everywhere(data, tmp_path, capsys, kind):
    out, half, more = tmp_path / "run", tmp_path / "half", ("--lora-rank", 4, "--adapter", kind)
    more += ("--eval-every", 2, "--eval-samples", 2, "--heldout", data / "heldout.jsonl", "--lora-alpha", 6)
    assert sft.main(flags(data, out, *more)) == 0
    shutil.copytree(out, half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "lora")
    assert sft.main(flags(data, half, "--lora-rank", 4, "--adapter", "lora", "--resume", "auto")) == 2
    assert f"the kind of the adapter is fixed: adapter is {kind}, not lora" in capsys.readouterr().err
    assert sft.main(unchanged(data, half)) == 0
    assert losses(half) == losses(out), "bit for bit"
    assert identical(adapter(half), adapter(out))
    assert cli.main(["export", str(out), "--out", str(tmp_path / "copy")]) == 0
    assert identical(adapter(tmp_path / "copy"), adapter(out))
    images = []
    for number, given in enumerate(("--initial", "--lora")):
        image = tmp_path / f"{number}.png"
        command = ["edit", "--model", str(small_pipeline.folder()), given, str(tmp_path / "copy"), "--prompt", "x"]
        assert cli.main([*command, "--num-inference-steps", "2", "--out", str(image)]) == 0
        images.append(image.read_bytes())
    assert images[0] == images[1]
    if kind == "lokr":  # an adapter of any kind is continued in the same way
        return
    assert sft.main(flags(data, tmp_path / "after", "--initial", tmp_path / "copy", steps=2)) == 0
    assert adapter(tmp_path / "after").keys() == adapter(out).keys()
    assert cli.main(["export", str(tmp_path / "after"), "--out", str(tmp_path / "next")]) == 0
    assert identical(adapter(tmp_path / "next"), adapter(tmp_path / "after"))


def test_an_adapter_on_a_quantised_base_resumes_exactly_and_is_exported_like_any_other(data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    out, half, more = tmp_path / "run", tmp_path / "half", ("--lora-rank", 2, "--base", "nf4")
    more += ("--eval-every", 2, "--eval-samples", 2, "--sample-count", 0, "--heldout", data / "heldout.jsonl")
    assert sft.main(flags(data, out, *more)) == 0
    shutil.copytree(out, half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "lora")
    assert sft.main(flags(data, half, *more[:2], "--base", "int8", "--resume", "auto")) == 2
    assert (
        "the dtype of the frozen weights under the adapter is fixed: base is nf4, not int8" in capsys.readouterr().err
    )
    assert sft.main([*unchanged(data, half), "--offload-blocks", "1"]) == 0
    assert losses(half) == losses(out), "bit for bit, also with blocks on the host"
    assert identical(adapter(half), adapter(out))
    assert cli.main(["export", str(out), "--out", str(tmp_path / "copy")]) == 0
    assert identical(adapter(tmp_path / "copy"), adapter(out))
    small_pipeline.load().load_lora_weights(str(out / "lora"), use_safetensors=True)  # a plain base
    assert sft.main(flags(data, tmp_path / "after", "--initial", out, "--base", "nf4", steps=2)) == 0
    assert adapter(tmp_path / "after").keys() == adapter(out).keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--base", "nf4"), "this run trains all weights; give --lora-rank"),
        (("--lora-rank", "4", "--offload-blocks", "5"), "more than the 2 blocks of the model"),
        (("--pack-tokens", "5"), "did you mean --stages.0.pack-tokens"),
        (("--stpes", "5"), "did you mean --steps"),
        (("--stages.0.sequence-parallel", "2"), "these do: 1"),
        (("--memory-gib", "0.01"), "GiB"),
        (("--data", "nothing.jsonl"), "no such file"),
        (("--validate", "nothing.jsonl"), "validate: no such file or folder: nothing.jsonl"),
        (("--lora-rank", "4", "--lora-targets", "nowhere"), "lora_targets"),
        (("--model", "no/such/folder"), "no such folder"),
        (("--steps", "1"), "2 stages"),
    ],
)
def test_wrong_input(data, tmp_path, more, message, capsys):
    assert sft.main(flags(data, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_holds_a_run(data, whole, capsys):
    assert sft.main(flags(data, whole)) == 2
    assert "--resume auto" in capsys.readouterr().err


def test_weights_without_a_checkpoint_are_not_replaced(data, half, whole, capsys):
    """Training would start from the beginning."""
    shutil.rmtree(half / "checkpoints")
    shutil.copytree(whole / "transformer", half / "transformer")
    before = contents(half)
    assert sft.main(flags(data, half, "--resume", "auto")) == 2
    assert "holds trained weights (transformer/) and no checkpoint" in capsys.readouterr().err
    assert contents(half) == before


@pytest.mark.parametrize("name", ["initial", "model"])
def test_a_damaged_file_of_weights_is_one_line(data, whole, tmp_path, name, capsys):
    folder = tmp_path / "start"
    shutil.copytree(whole / "transformer" if name == "initial" else small_pipeline.folder(),
                    folder / "transformer" if name == "initial" else folder)  # fmt: skip
    (file,) = (folder / "transformer").glob("*.safetensors")
    os.truncate(file, 5000)
    out = tmp_path / "run"
    assert sft.main(flags(data, out, f"--{name}", folder)) in (1, 2)
    (line,) = own_lines(capsys)
    assert str(folder) in line and not out.exists()


def test_other_data(data, half, tmp_path, capsys):
    """A refused command changes nothing, even with another setting that may change."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "train.jsonl").write_text("".join((other / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    before = contents(half)
    assert sft.main(flags(other, half, "--resume", "auto", "--warmup", 3)) == 2
    assert "this run was trained on other data" in capsys.readouterr().err
    assert contents(half) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--visibility", "reference_causal"), "the attention of the model is fixed: visibility is full, not"),
        (("--lora-rank", 4), "the rank of the adapter is fixed: lora_rank is none, not 4"),
        (("--lora-alpha", 3), "the scale of the adapter is fixed: lora_alpha is none, not 3.0"),
        (("--steps", 1, "--stages.1.steps", 1), "2 stages need at least as many steps"),
        (("--steps", 2, "--heldout", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_a_refused_resume_changes_nothing(data, half, more, message, capsys):
    before = contents(half)
    assert sft.main(flags(data, half, "--resume", "auto", *more)) == 2
    assert message in capsys.readouterr().err
    assert contents(half) == before
    assert launch.with_visibility(SFT((BudgetStage(64, 1, 1.0),), initial=half)).visibility == "full"


def test_settings_that_change_are_recorded(data, whole, half):
    assert sft.main(flags(data, half, "--resume", "auto", "--weight-decay", 0.3, "--workers", 1)) == 0
    changed = [(event["step"], event["setting"], event["before"], event["now"]) for event in events(half, "changed")]
    assert changed == [(2, "weight_decay", 0.0, 0.3), (2, "workers", 2, 1)]
    assert losses(half)[2] == losses(whole)[2] and losses(half)[3] != losses(whole)[3]
    assert json.loads((half / "config.json").read_text())["weight_decay"] == 0.3


def test_a_checkpoint_of_an_older_version_is_exported_and_resumed(data, whole, half, tmp_path, capsys):
    """Such a checkpoint has neither checksums nor settings; the settings in `config.json` are fixed instead."""
    path = half / "checkpoints" / "step-000002" / "state.json"
    content = json.loads(path.read_text())
    files = {name: file["bytes"] for name, file in content["files"].items()}
    new = ("config", "visibility", "frozen")
    state = {name: value for name, value in content["state"].items() if name not in new}
    path.write_text(json.dumps({"files": files, "tensors": content["tensors"], "state": {**state, "looked": True}}))
    for run, out in ((half, tmp_path / "old"), (whole, tmp_path / "new")):
        assert cli.main(["export", str(run), "--step", "2", "--out", str(out)]) == 0
    assert identical(weights(tmp_path / "old"), weights(tmp_path / "new"))
    capsys.readouterr()
    assert sft.main(flags(data, half, "--resume", "auto", "--lora-alpha", 3)) == 2
    assert "the scale of the adapter is fixed: lora_alpha is none, not 3.0" in capsys.readouterr().err
    assert sft.main(flags(data, half, "--resume", "auto")) == 0
    equal_to(whole, half)
    assert [event["step"] for event in events(half, "unverified checkpoint")] == [2]
    assert json.loads((half / "checkpoints" / "step-000004" / "state.json").read_text())["state"]["config"]


def test_another_place_of_the_same_model_is_accepted_and_another_model_is_refused(data, whole, half, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(small_pipeline.folder(), folder)
    out = tmp_path / "again"
    shutil.copytree(half, out)
    assert sft.main(flags(data, out, "--resume", "auto", "--model", folder)) == 0
    equal_to(whole, out)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor + 1 if number == 0 else tensor for number, (name, tensor) in enumerate(tensors.items())}
    save_file(tensors, file, {"format": "pt"})
    before = contents(half)
    assert sft.main(flags(data, half, "--resume", "auto", "--model", folder)) == 2
    assert "was trained on top of other weights than those of model" in capsys.readouterr().err
    assert contents(half) == before


def test_what_a_run_was_trained_as_is_what_its_checkpoint_says(half):
    """Whatever has become of `config.json`, which older versions wrote for refused commands too."""
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "visibility": "reference_causal"}))
    assert runs.trained_visibility(half) == "full"
    shutil.rmtree(half / "checkpoints")
    assert runs.trained_visibility(half) == "reference_causal"


def test_every_rank_says_what_ended_it(monkeypatch, capsys):
    """Rank 0 at once, the others where it has not ended them meanwhile: what only they met must not be lost."""
    waited = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    for rank, expected in (("0", "sft: no"), ("3", "sft, rank 3: no")):
        monkeypatch.setenv("RANK", rank)
        assert launch._failed("sft", ValueError("no"), 2) == 2
        hint = "Try 'training/sft.py --help'.\n" if rank == "0" else ""
        assert capsys.readouterr().err == f"{expected}\n{hint}"
    assert len(waited) == 1


def test_moments_in_8_bits_resume_exactly(data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    out, half, more = tmp_path / "run", tmp_path / "half", ("--lora-rank", 16, "--optimizer", "adamw8bit")
    assert sft.main(flags(data, out, *more)) == 0
    shutil.copytree(out, half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "lora")
    assert sft.main(flags(data, half, "--lora-rank", 16, "--optimizer", "adamw", "--resume", "auto")) == 2
    assert "the format of the moments of the optimizer is fixed: optimizer is adamw8bit" in capsys.readouterr().err
    assert sft.main(flags(data, half, *more, "--resume", "auto")) == 0
    assert losses(half) == losses(out), "bit for bit"
    assert identical(adapter(half), adapter(out))
