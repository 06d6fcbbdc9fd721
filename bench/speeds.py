"""Measure whole edits and whole steps of supervised fine-tuning on this device, and write their table.

    python bench/speeds.py [--model builtin] [--out uniref_fast/assets/speeds] [--only edits training]

`uniref-fast estimate` and `uniref-fast plan` read the table; they interpolate between its rows and never extrapolate.
An edit is measured with two numbers of denoising steps, in turns; the difference gives the time of a step, and the rest
is the time to encode and decode. Figures are medians. A training step is one of `training/sft.py`, with its encoding of
rows, on generated data; the median leaves out the first steps. Rows of other models in the table are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import CUDA, machine, stopwatch
from PIL import Image

import uniref_fast
from uniref_fast import EditRequest, speeds, tuning
from uniref_fast.builtin import is_builtin_folder
from uniref_fast.guidance import negative_prompt_for
from uniref_fast.loading import load_pipeline

DEVICE = "cuda" if CUDA else "cpu"
ROOT = Path(__file__).parent.parent
FEW, MANY = 2, 8  # denoising steps
REFERENCES = (0, 1, 2, 3, 6)
SMALL_PACKS, LARGE_PACKS = (512, 1024, 1536, 2560), (8192, 16384, 24576)


def edits(name: str, rounds: int) -> list[dict[str, Any]]:
    """Measure edits with several numbers of references, with and without guidance."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    pipe = load_pipeline(name, dtype, DEVICE)
    side = 64 if is_small(name) else 1024
    rows = []
    for guided in (False, True):
        for count in REFERENCES:
            images = [Image.effect_noise((side, side), 80).convert("RGB") for _ in range(count)]
            fields = {
                "prompt": "put picture 1 on the left",
                "images": images,
                "seed": 0,
                "true_cfg_scale": 4.0 if guided else 1.0,
            }
            rows.append(edit_row(pipe, fields, rounds) | {"guided": guided})
    shared = {"model": speeds.model_key(pipe.transformer.config), "dtype": str(dtype).removeprefix("torch.")}
    return [shared | row for row in sorted(rows, key=lambda row: (row["guided"], row["tokens"]))]


def edit_row(pipe: Any, fields: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Measure one request with `FEW` and with `MANY` steps."""
    negative = negative_prompt_for(fields["true_cfg_scale"])
    requests = {n: EditRequest(negative_prompt=negative, num_inference_steps=n, **fields) for n in (FEW, MANY)}
    calls = {steps: stopwatch(lambda r=r: uniref_fast.edit(pipe, [r], progress=False)) for steps, r in requests.items()}
    for call in calls.values():
        call()  # compiles and fills tables
    taken = [{steps: call() for steps, call in calls.items()} for _ in range(rounds)]
    few, many = (statistics.median(one[steps] for one in taken) for steps in (FEW, MANY))
    step = (many - few) / (MANY - FEW)
    tokens = uniref_fast.estimate(pipe, [requests[FEW]]).tokens["together"]
    return {"tokens": tokens, "seconds_per_step": rounded(step), "seconds_fixed": rounded(max(few - FEW * step, 0.0))}


def training(name: str, steps: int) -> list[dict[str, Any]]:
    """Measure steps of supervised fine-tuning, with and without an adapter, on one rank."""
    recipe, packs = ("tiny", SMALL_PACKS) if is_small(name) else ("lora", LARGE_PACKS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        make = ["data", "make", str(data), "--train", "400", "--heldout", "8", "--artworks", "shipped"]
        make += ["--size", "64", "--pictures", "simple"] if is_small(name) else ["--size", "1024"]
        subprocess.run([sys.executable, "-m", "uniref_fast", *make], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        for rank in ("8", "none") if is_small(name) else ("64",):
            for tokens in packs:
                run = Path(folder, f"{rank}-{tokens}")
                rows.append(training_row(name, recipe, data / "train.jsonl", run, rank, tokens, steps))
    return rows


def training_row(name: str, recipe: str, data: Path, run: Path, rank: str, tokens: int, steps: int) -> dict[str, Any]:
    """Train some steps of the first stage, and return the tokens per second."""
    given = {"recipe": recipe, "model": name, "data": data, "out": run, "lora-rank": rank, "steps": 2 * steps,
             "stages.0.steps": 10**6, "stages.0.pack-tokens": tokens, "packs": 2, "eval-every": 0, "sample-every": 0,
             "save-every": 10**6, "tensorboard": "false", "cost": "flops"}  # fmt: skip
    flags = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "training/sft.py", *flags]
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(line["tokens_per_second"] for line in found[steps:])
    config = json.loads((run / "config.json").read_text())
    return {"model": shape_of(name), "dtype": config["dtype"], "lora": rank != "none", "ranks": 1,
            "pack_tokens": tokens, "tokens_per_second": rounded(speed)}  # fmt: skip


def shape_of(name: str) -> str:
    """Return the key of a model's shape."""
    return speeds.model_key(load_pipeline(name, torch.bfloat16, "cpu").transformer.config)


def is_small(name: str) -> bool:
    """Return True for the built-in model and its copies."""
    return name == "builtin" or is_builtin_folder(name)


def rounded(value: float) -> float:
    """Return a figure with four digits."""
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--out", type=Path, default=speeds.FOLDER)
    parser.add_argument("--only", nargs="+", choices=("edits", "training"), default=("edits", "training"))
    parser.add_argument("--rounds", type=int, default=7, help="Number of timed edits of each kind.")
    parser.add_argument("--steps", type=int, default=10, help="Number of timed training steps of each kind.")
    args = parser.parse_args()
    path = args.out / f"{tuning.device_name(DEVICE)}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    measured = {
        "edits": edits(args.model, args.rounds) if "edits" in args.only else [],
        "training": training(args.model, args.steps) if "training" in args.only else [],
    }
    head = machine() | {"command": "python bench/speeds.py"}
    origin = {name: head.pop(name) for name in ("date", "torch", "threads", "commit", "command")}
    result: dict[str, Any] = {**head}
    for kind, rows in measured.items():
        models = {row["model"] for row in rows}
        kept = [row for row in before.get(kind, ()) if row["model"] not in models]
        result[kind] = kept + [row | origin for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
