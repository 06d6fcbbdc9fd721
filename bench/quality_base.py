"""Measure how far a LoRA adapter lowers the held-out loss on frozen bases of fewer bits, with the recipe `tiny`.

    python bench/quality_base.py [--seeds 3] [--nproc 2] [--steps 300] [--results bench/results]

The rows are those of `bench/quality_lora.py`: 24 drawn images of a fixed layout that the built-in model does not know,
and 24 that are not trained on. For each seed they are drawn again, and `training/sft.py --recipe tiny --lora-rank 8
--base BASE` trains on them once for each base, with the same rows and noise. The held-out loss is that of the
base's own weights before the first step, and of the averaged adapter after the last one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from conftest import machine, results_path, write_results
from quality_lora import ROOT, ROWS, SETS, SPLITS, run, write_rows

BASES = ("none", "bf16", "int8", "fp8", "nf4")
RANK = 8


def measured(base: str, seed: int, rows: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train on one base, and return the held-out loss before and after."""
    files = {split: rows / f"{split}.jsonl" for split in SPLITS}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        seconds = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.nproc, "training/sft.py",
                      "--recipe", "tiny", "--lora-rank", RANK, "--base", base, "--data", files["train"],
                      "--heldout", files["heldout"], "--seed", seed, "--steps", args.steps, "--eval-every", args.steps,
                      "--eval-samples", ROWS, "--sample-count", 0, "--sample-every", 0, "--out", out)  # fmt: skip
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval/heldout"] for record in records if "eval/heldout" in record}
    before, after = losses[0], losses[args.steps]
    return {"seed": seed, "cpu_seconds": round(seconds, 1), "before": before, "after": after, "drop": before - after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds, each with its own rows.")
    parser.add_argument("--nproc", type=int, default=2, help="Number of ranks.")
    parser.add_argument("--steps", type=int, default=300, help="Number of optimizer steps.")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["bf16", "int8", "fp8", "nf4"], help="Bases.")
    parser.add_argument("--set", choices=SETS, default="postcard", help="Kind of the drawn images.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="Folder of the results.")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {base: [] for base in args.bases}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder), args.set, seed)
            for base in args.bases:
                found[base].append(measured(base, seed, Path(folder), args))
                print(base, json.dumps(found[base][-1]), flush=True)
    summary = {
        base: {key: statistics.mean(row[key] for row in rows) for key in ("before", "after", "drop")}
        for base, rows in found.items()
    }
    command = f"python bench/quality_base.py --set {args.set} --seeds {args.seeds} --nproc {args.nproc} "
    command += f"--steps {args.steps} --bases {' '.join(args.bases)}"
    result = machine() | {"threads": 1, "command": command, "set": args.set, "rows": ROWS, "steps": args.steps}
    path = results_path(args.results, f"base-{args.set}")
    write_results(path, result | {"heldout_loss": summary, "seeds": found})
    print(path)


if __name__ == "__main__":
    main()
