"""Supervised fine-tuning, the first stage of UniRef-Image-Edit (arXiv 2602.14186).

    torchrun --nproc-per-node 2 training/sft.py --recipe tiny --out runs/tiny
    torchrun --nproc-per-node 8 training/sft.py --recipe lora --data rows.jsonl --out runs/mine --resume auto

`--help` lists every field of a recipe; each is a flag. The resolved configuration, metrics, sample grids, checkpoints
and the trained weights are in the folder of the run.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from uniref_fast.training import config as configs
from uniref_fast.training.checkpoint import CheckpointError, Checkpoints
from uniref_fast.training.feeder import BrokenRowsError
from uniref_fast.training.parallel import Ranks
from uniref_fast.training.recipes import RECIPES, SFT
from uniref_fast.training.records import write_whole
from uniref_fast.training.trainer import DivergedError, Trainer

CONFIG_FILE = "config.json"
BUILTIN_ROWS = {"train": 1000, "heldout_objects": 64, "heldout_combinations": 64}


@dataclass(frozen=True)
class Place:
    """Where a run lives.

    Attributes:
        out: folder of the run.
        resume: "auto" goes on from the newest checkpoint in the folder, or starts when there is none.
    """

    out: Path = Path("runs/sft")
    resume: Literal["never", "auto"] = "never"


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status: 0 done, 143 stopped by a signal and saved, 1 or 2 for errors."""
    try:
        parsed = configs.parse(RECIPES, sys.argv[1:] if argv is None else argv, extra=Place(), prog="training/sft.py",
                               description="Supervised fine-tuning on multi-reference editing rows.")  # fmt: skip
        ranks = Ranks.start()
        torch.manual_seed(parsed.config.seed)
        config = with_data(parsed.config, parsed.extra.out, ranks)
        resume = prepare(config, parsed.extra, ranks)
        finished = Trainer(config, ranks, parsed.extra.out, resume).run()
    except (ValueError, FileNotFoundError) as error:  # what the user can put right
        return _failed(error, 2)
    except (BrokenRowsError, CheckpointError, DivergedError, OSError, ImportError) as error:
        return _failed(error, 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if finished else 143


def with_data(config: SFT, out: Path, ranks: Ranks) -> SFT:
    """The configuration with "builtin" data made and named. All ranks."""
    if not config.data:
        raise ValueError("no training data: give --data FILE_OR_FOLDER, or --data builtin for small made-up scenes")
    if "builtin" not in config.data:
        return config
    from uniref_fast.training.made_files import make
    from uniref_fast.training.make_data import MakeConfig, artworks, sample

    folder = out / "data"
    problem = None
    if ranks.rank == 0 and not (folder / "train.jsonl").exists():
        try:
            made = MakeConfig(artworks("shipped"), seed=config.seed)
            make(folder, made, BUILTIN_ROWS, config.workers, force=False, draw=sample)
        except (OSError, ValueError, RuntimeError) as error:
            problem = str(error)
    if problem := ranks.broadcast(problem):
        raise ValueError(f"the built-in data could not be made: {problem}")
    data = tuple(str(folder / "train.jsonl") if path == "builtin" else path for path in config.data)
    heldout = config.heldout or tuple(str(path) for path in sorted(folder.glob("heldout_*.jsonl")))
    return dataclasses.replace(config, data=data, heldout=heldout)


def prepare(config: SFT, place: Place, ranks: Ranks) -> int | None:
    """Look at what the folder holds and keep the configuration; returns the step to go on from. All ranks."""
    steps = Checkpoints(place.out / "checkpoints", ranks, config.keep).steps()
    kept = place.out / CONFIG_FILE
    steps, exists = ranks.broadcast((steps, kept.exists()))
    if place.resume == "never" and (steps or exists):
        raise ValueError(f"{place.out} holds a run; go on with --resume auto, or give another --out")
    if ranks.rank == 0:
        if exists:
            for line in configs.differences(configs.from_json(SFT, kept.read_text()), config):
                print(f"changed since the run began: {line}", file=sys.stderr)
        write_whole(kept, lambda file: file.write(configs.to_json(config).encode()))
    return steps[-1] if steps else None


def _failed(error: BaseException, status: int) -> int:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"sft: {type(error).__name__ + ': ' if status == 1 else ''}{error}", file=sys.stderr)
    else:
        time.sleep(2)  # torchrun ends all ranks with the first: let the message out
    return status


if __name__ == "__main__":
    sys.exit(main())
