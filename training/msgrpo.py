"""Multi-source GRPO, the second stage of UniRef-Image-Edit (arXiv 2602.14186).

    torchrun --nproc-per-node 2 training/msgrpo.py --recipe tiny --initial runs/tiny --out runs/tiny-rl
    torchrun --nproc-per-node 8 training/msgrpo.py --recipe lora --data rows.jsonl --initial runs/mine --out runs/rl \\
        --judge.url http://localhost:8000/v1 --judge.model Qwen/Qwen3-VL-32B-Instruct

`--help` lists every field of a recipe; each is a flag. `--check-ratio true` rolls out one step, replays it, prints how
far its ratios are from 1 at every timestep, and trains nothing. The folder of the run holds what `training/sft.py`
writes there, and the judge's log in `judge/`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uniref_fast.training.core.launch import RunOptions, launch
from uniref_fast.training.core.processes import leave
from uniref_fast.training.rl.recipes import MSGRPO, MSGRPO_RECIPES

if TYPE_CHECKING:
    from uniref_fast.training.core.distributed import Ranks
    from uniref_fast.training.rl.trainer import RLTrainer


@dataclass(frozen=True)
class RLRunOptions(RunOptions):
    """Options of `training/msgrpo.py` that are not part of the configuration of the run.

    Attributes: Folder
        check_ratio: Check that rollouts are on-policy instead of training: generate the rollouts of one step, replay
            them, and print the probability ratios at every timestep.
    """

    check_ratio: bool = False

    @property
    def read_only(self) -> bool:
        return self.check_ratio


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 done, 143 or 130 stopped by a signal and saved, 1 or 2."""

    def build(config: MSGRPO, ranks: Ranks, options: RLRunOptions, resume: int | None) -> RLTrainer:
        from uniref_fast.training.rl.trainer import RLTrainer

        return RLTrainer(config, ranks, options.out, resume, check=options.check_ratio)

    def failures() -> tuple[type[Exception], ...]:
        from uniref_fast.training.rl.on_policy import OffPolicyError
        from uniref_fast.training.rl.trainer import RewardError

        return OffPolicyError, RewardError

    options, arguments = RLRunOptions(Path("runs/msgrpo")), sys.argv[1:] if argv is None else argv
    description = "Multi-source GRPO on multi-reference editing rows."
    return launch("msgrpo", MSGRPO_RECIPES, options, build, arguments, description, failures)


if __name__ == "__main__":
    leave(main())
