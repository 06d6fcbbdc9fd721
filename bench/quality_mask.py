"""Measure that a LoRA adapter with masks learns what is inside the masks, and keeps the model as it is outside of them.

    python bench/quality_mask.py [--seeds 3] [--steps 300] [--results bench/results]

The rows are scenes with one reference that the built-in model can edit, and targets with an orange square in a
corner, which the model does not know. Every third target is right. The others are wrong in their right half, where
red and blue are swapped; their masks are white on the left half. For each seed the rows are drawn again, and the
recipe `tiny` trains one adapter with the masks and one with `--mask-weight-outside 1`, which counts all targets as a
whole. The PSNR of held-out rows is measured against right targets, inside and outside of the mask. Times are CPU
seconds of the processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from conftest import machine, results_path, write_results
from PIL import Image
from quality_lora import ROOT, run

from uniref_fast.evaluation.metrics import psnr
from uniref_fast.scenes.make import sample
from uniref_fast.training.core.launch import builtin_rows

ROWS, SIDE, CORNER, ORANGE = 24, 64, 24, (250, 140, 30)
HALVES = {"inside": (0, 0, SIDE // 2, SIDE), "outside": (SIDE // 2, 0, SIDE, SIDE)}  # of the mask
PACK = 400  # tokens of a pack: two rows
SPLITS = {"train": "train", "heldout": "heldout_objects"}  # name of a file -> split of the scenes
VARIANTS = {"masked": 0, "unmasked": 1}  # name -> mask_weight_outside


def write_rows(folder: Path, seed: int) -> None:
    """Draw the rows to train on, and the held-out rows with their wanted targets."""
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, HALVES["inside"])
    mask.save(folder / "mask.png")
    for name, split in SPLITS.items():
        lines, made, index = [], builtin_rows(seed), 0
        while len(lines) < ROWS:
            scene, index = sample(split, index, made), index + 1
            if scene.target.size != (SIDE, SIDE) or len(scene.references) != 1:
                continue
            wanted = scene.target.convert("RGB")
            wanted.paste(ORANGE, (0, 0, CORNER, CORNER))
            wrong = name == "train" and len(lines) % 3 > 0
            given = wanted.copy()
            if wrong:
                red, green, blue = wanted.crop(HALVES["outside"]).split()
                given.paste(Image.merge("RGB", (blue, green, red)), HALVES["outside"])
            stem = f"{name}-{len(lines)}"
            references = [f"{stem}-{i}.png" for i in range(len(scene.references))]
            for file, image in zip(references, scene.references, strict=True):
                image.save(folder / file)
            given.save(folder / f"{stem}.png")
            row = {"input_images": references, "output_image": f"{stem}.png", "instruction": scene.instruction}
            lines.append(json.dumps(row | ({"mask": "mask.png"} if wrong else {})) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def psnrs(folder: Path, out: Path) -> dict[str, float]:
    """Return the mean PSNR of the held-out rows of an evaluation, inside and outside of the mask."""
    found: dict[str, list[float]] = {"inside": [], "outside": []}
    for i in range(ROWS):
        wanted, result = (
            Image.open(path).convert("RGB")
            for path in (folder / f"heldout-{i}.png", out / "images" / "heldout" / f"{i}.png")
        )
        for where, box in HALVES.items():
            found[where].append(psnr(result.crop(box), wanted.crop(box)))
    return {where: statistics.mean(values) for where, values in found.items()}


def measured(seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one seed."""
    write_rows(folder, seed)
    evaluate = ("-m", "uniref_fast", "eval", folder / "heldout.jsonl", "--grid", 0, "--reward", "none")
    seconds = run(*evaluate, "--out", folder / "before")
    found = {"before": psnrs(folder, folder / "before")}
    for name, outside in VARIANTS.items():
        seconds += run("training/sft.py", "--recipe", "tiny", "--lora-rank", 8, "--data", folder / "train.jsonl",
                       "--mask-weight-outside", outside, "--seed", seed, "--steps", steps, "--packs", 1,
                       "--stages.0.pack-tokens", PACK, "--stages.1.pack-tokens", PACK,
                       "--eval-every", 0, "--sample-every", 0, "--out", folder / name)  # fmt: skip
        seconds += run(*evaluate, "--lora", folder / name, "--out", folder / f"{name}-eval")
        found[name] = psnrs(folder, folder / f"{name}-eval")
    return {"seed": seed, "cpu_seconds": round(seconds, 1), "psnr": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds, each with its own rows.")
    parser.add_argument("--steps", type=int, default=300, help="Number of steps of each run.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="Folder of the results.")
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(seed, args.steps, Path(folder)))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    means = {
        name: {where: statistics.mean(row["psnr"][name][where] for row in rows) for where in ("inside", "outside")}
        for name in ("before", *VARIANTS)
    }
    command = f"python bench/quality_mask.py --seeds {args.seeds} --steps {args.steps}"
    result = machine() | {"threads": 1, "command": command, "rows": ROWS, "steps": args.steps, "psnr": means}
    path = results_path(args.results, "masked-loss")
    write_results(path, result | {"share": 0.5, "seeds": rows})
    print(path)


if __name__ == "__main__":
    main()
