"""Short MSGRPO runs of a small model: their flags, and the files that they leave."""

import json

import small_pipeline
import torch
from safetensors.torch import load_file


def flags(data, out, *more, steps=3):
    """Return the arguments of a run of two stages that takes a few seconds; `more` replaces or adds flags."""
    given = {
        "recipe": "tiny",
        "model": small_pipeline.folder(),
        "data": data / "train.jsonl",
        "heldout": data / "heldout_objects.jsonl",
        "out": out,
        "steps": steps,
        "prompts": 2,
        "group": 3,
        "rollout-num-inference-steps": 4,
        "sample-num-inference-steps": 3,
        "lora-rank": 2,
        "save-every": 1,
        "eval-every": 0,
        "eval-samples": 3,
        "sample-every": 0,
        "tensorboard": "false",
    }
    for i in range(2):
        given |= {f"stages.{i}.budget": 48, f"stages.{i}.target-side": 32, f"stages.{i}.pack-tokens": 512}
    given |= {name.removeprefix("--"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def records(out, name="metrics"):
    """Return the records of a JSONL file of a run."""
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def steps_of(out):
    """Return the figures of each step, without those that depend on the clock."""
    timed = ("seconds", "per_second")
    return [{k: v for k, v in r.items() if not any(t in k for t in timed)} for r in records(out) if "loss" in r]


def events(out, kind):
    """Return the events of one kind."""
    return [record for record in records(out, "events") if record["kind"] == kind]


def weights(out):
    """Return the exported adapter."""
    return load_file(next((out / "lora").glob("*.safetensors")))


def assert_same_run(out, expected):
    """Check that two runs have the same figures and the same weights, bit for bit."""
    assert steps_of(out) == steps_of(expected)
    wanted = weights(expected)
    assert [name for name, tensor in weights(out).items() if not torch.equal(tensor, wanted[name])] == []
