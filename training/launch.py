"""What the training commands do before and after their loop: flags, ranks, built-in data, the run's folder, errors."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from uniref_fast.training import config as configs
from uniref_fast.training.checkpoint import CheckpointError, Checkpoints
from uniref_fast.training.feeder import BrokenRowsError
from uniref_fast.training.parallel import Ranks
from uniref_fast.training.recipes import Recipe
from uniref_fast.training.records import write_whole
from uniref_fast.training.run import DivergedError, Run

__all__ = ["Place", "launch"]

C = TypeVar("C", bound=Recipe)
CONFIG_FILE = "config.json"
BUILTIN_ROWS = {"train": 1000, "heldout_objects": 64, "heldout_combinations": 64}
BUILTIN_SIZE = 64


@dataclass(frozen=True)
class Place:
    """Where a run lives.

    Attributes:
        out: folder of the run.
        resume: "auto" goes on from the newest checkpoint in the folder, or starts when there is none.
    """

    out: Path
    resume: Literal["never", "auto"] = "never"

    @property
    def only_looks(self) -> bool:
        """Whether nothing is written into the folder, but data that the command makes."""
        return False


def launch(
    name: str,
    recipes: Mapping[str, Callable[[], C]],
    place: Any,
    make: Callable[[C, Ranks, Any, int | None], Run],
    argv: Sequence[str],
    description: str,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Run a training command; returns the exit status: 0 done, 143 stopped by a signal and saved, 1 or 2 for errors.

    Args:
        name: of the command, `training/<name>.py`.
        recipes: by name.
        place: a `Place`, with the defaults of its flags.
        make: makes the run of a configuration, the ranks, the place, and the step to go on from.
        argv: arguments of the command.
        description: for its help.
        failures: errors of the run, beside those that every run has; exit status 1.
    """
    try:
        parsed = configs.parse(recipes, argv, extra=place, prog=f"training/{name}.py", description=description)
        ranks = Ranks.start()
        torch.manual_seed(parsed.config.seed)
        config = with_data(parsed.config, parsed.extra.out, ranks)
        resume = prepare(config, parsed.extra, ranks)
        finished = make(config, ranks, parsed.extra, resume).run()
    except (ValueError, FileNotFoundError) as error:  # what the user can put right
        return _failed(name, error, 2)
    except (BrokenRowsError, CheckpointError, DivergedError, OSError, ImportError) as error:
        return _failed(name, error, 1)
    except failures as error:
        return _failed(name, error, 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if finished else 143


def with_data(config: C, out: Path, ranks: Ranks) -> C:
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
            made = MakeConfig(
                artworks("shipped"), size=BUILTIN_SIZE, seed=config.seed, references=(1, 2, 3), pictures="simple"
            )
            make(folder, made, BUILTIN_ROWS, config.workers, force=False, draw=sample)
        except (OSError, ValueError, RuntimeError) as error:
            problem = str(error)
    if problem := ranks.broadcast(problem):
        raise ValueError(f"the built-in data could not be made: {problem}")
    data = tuple(str(folder / "train.jsonl") if path == "builtin" else path for path in config.data)
    heldout = config.heldout or tuple(str(path) for path in sorted(folder.glob("heldout_*.jsonl")))
    return dataclasses.replace(config, data=data, heldout=heldout)


def prepare(config: Recipe, place: Place, ranks: Ranks) -> int | None:
    """Look at what the folder holds and keep the configuration; returns the step to go on from. All ranks."""
    steps = Checkpoints(place.out / "checkpoints", ranks, config.keep).steps()
    kept = place.out / CONFIG_FILE
    begun = (place.out / "metrics.jsonl").exists() and kept.exists()  # not where it failed before its first record
    steps, begun = ranks.broadcast((steps, begun))
    if place.only_looks:
        return steps[-1] if steps and place.resume == "auto" else None
    if place.resume == "never" and (steps or begun):
        raise ValueError(f"{place.out} holds a run; go on with --resume auto, or give another --out")
    if ranks.rank == 0:
        if begun:
            for line in configs.differences(configs.from_json(type(config), kept.read_text()), config):
                print(f"changed since the run began: {line}", file=sys.stderr)
        write_whole(kept, lambda file: file.write(configs.to_json(config).encode()))
    return steps[-1] if steps else None


def _failed(name: str, error: BaseException, status: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(3)  # where rank 0 says the same, torchrun ends the others meanwhile
        name = f"{name}, rank {rank}"
    print(f"{name}: {type(error).__name__ + ': ' if status == 1 else ''}{error}", file=sys.stderr)
    return status
