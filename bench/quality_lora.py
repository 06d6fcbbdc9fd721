"""Measure what a LoRA adapter of the built-in model learns from 24 own images, with the defaults of the recipe `tiny`.

    python bench/quality_lora.py [--seeds 3] [--set postcard] [--results bench/results]

The images are drawn with Pillow in a fixed layout or style that the model does not know. For each seed the rows are
drawn again, `training/sft.py --recipe tiny --lora-rank 8` trains on them, and `uniref-fast eval` compares the model
with and without the adapter, on the trained rows and on 24 rows that were not trained on. Times are CPU seconds of the
processes, so that other work on the machine counts little. The defaults were chosen on other drawn images than these.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import machine, results_path, write_results
from PIL import Image, ImageDraw, ImageOps

from uniref_fast.scenes.artworks import artworks
from uniref_fast.scenes.backgrounds import PHOTOS, background

ROOT = Path(__file__).parent.parent
ROWS, SIDE = 24, 96
SPLITS = ("train", "heldout")
SAMPLING = ("num_inference_steps", "true_cfg_scale", "budget")
Drawn = tuple[list[Image.Image], Image.Image, str]  # references, target, instruction


def photo(rng: random.Random) -> Image.Image:
    return background(rng.choice(list(PHOTOS)), (SIDE, SIDE), rng.randrange(10**6))


def postcard(rng: random.Random) -> Drawn:
    """Draw a postcard: a photo on the left, a stamp with an object at the top right, and four lines of an address."""
    pool, scene = artworks("shipped"), photo(rng)
    name = rng.choice(pool.names)
    art = pool.image(name).convert("RGBA")
    alone = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(180, 240) for _ in range(3)))
    large, small = (art.resize((side, side), Image.Resampling.LANCZOS) for side in (SIDE * 6 // 10, SIDE * 5 // 16))
    alone.paste(large, (SIDE // 5, SIDE // 5), large)
    card = Image.new("RGB", (SIDE, SIDE), (250, 236, 205))
    card.paste(scene.resize((SIDE * 5 // 8, SIDE * 7 // 8), Image.Resampling.LANCZOS), (SIDE // 16, SIDE // 16))
    card.paste(small, (SIDE * 11 // 16, SIDE // 16), small)
    pen = ImageDraw.Draw(card)
    for line in range(4):
        height = SIDE * (8 + 2 * line) // 16
        pen.line((SIDE * 23 // 32, height, SIDE * 15 // 16, height), fill=(40, 70, 130), width=SIDE // 32)
    return [scene, alone], card, f"write a postcard with the {name} of picture 2 and picture 1"


def duotone(rng: random.Random) -> Drawn:
    """Draw a photo with an object, and its print in two colours."""
    pool, scene = artworks("shipped"), photo(rng)
    art = pool.image(rng.choice(pool.names)).convert("RGBA").resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS)
    scene.paste(art, (rng.randrange(SIDE // 2), rng.randrange(SIDE // 2)), art)
    grey = ImageOps.autocontrast(scene.convert("L"))
    return [scene], ImageOps.colorize(grey, (24, 20, 80), (255, 190, 110)), "print picture 1 in two colours"


SETS: dict[str, Callable[[random.Random], Drawn]] = {"postcard": postcard, "duotone": duotone}


def write_rows(folder: Path, name: str, seed: int) -> None:
    """Draw the rows of both splits into a folder."""
    for split in SPLITS:
        lines = []
        for i in range(ROWS):
            references, target, instruction = SETS[name](random.Random(f"{seed} {split} {i}"))
            files = [f"{split}-{i}-{j}.png" for j in range(len(references) + 1)]
            for file, image in zip(files, [*references, target], strict=True):
                image.save(folder / file)
            row = {"input_images": files[:-1], "output_image": files[-1], "instruction": instruction}
            lines.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def run(*command: object) -> float:
    """Run a Python command in the repository with one thread, and return its CPU seconds."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, environment = spent(), {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    return spent() - before


def measured(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one seed."""
    write_rows(folder, name, seed)
    files = [folder / f"{split}.jsonl" for split in SPLITS]
    trained = folder / "run"
    seconds = run("training/sft.py", "--recipe", "tiny", "--lora-rank", 8, "--data", files[0], "--heldout", files[1],
                  "--seed", seed, "--out", trained)  # fmt: skip
    common = ("-m", "uniref_fast", "eval", *files, "--grid", 0, "--reward", "none")
    run(*common, "--out", folder / "before")
    run(*common, "--lora", trained, "--out", folder / "after", "--against", folder / "before")
    found = {when: json.loads((folder / when / "results.json").read_text()) for when in ("before", "after")}
    config = json.loads((trained / "config.json").read_text())
    return {
        "seed": seed,
        "cpu_seconds": round(seconds, 1),
        "steps": json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["step"],
        "lr": config["stages"][0]["lr"],
        "lora_alpha": config["lora_alpha"],
        "settings": {key: found["after"]["settings"][key] for key in SAMPLING},
        "psnr": {
            split: {when: found[when]["aggregates"][split]["all"]["psnr"] for when in found} for split in SPLITS
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds, each with its own rows.")
    parser.add_argument("--set", choices=SETS, default="postcard", help="Kind of the drawn images.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="Folder of the results.")
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(args.set, seed, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    gains = {
        split: [row["psnr"][split]["after"]["mean"] - row["psnr"][split]["before"]["mean"] for row in rows]
        for split in SPLITS
    }
    head = machine() | {"threads": 1, "command": f"python bench/quality_lora.py --set {args.set} --seeds {args.seeds}"}
    summary = {split: {"mean": statistics.mean(found), "each": found} for split, found in gains.items()}
    result = head | {"set": args.set, "rows": ROWS, "gain_psnr": summary, "seeds": rows}
    path = results_path(args.results, f"lora-{args.set}")
    write_results(path, result)
    print(path)


if __name__ == "__main__":
    main()
