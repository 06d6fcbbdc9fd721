"""Supervised fine-tuning, the first stage of UniRef-Image-Edit (arXiv 2602.14186).

    torchrun --nproc-per-node 2 training/sft.py --recipe tiny --out runs/tiny
    torchrun --nproc-per-node 8 training/sft.py --recipe lora --data rows.jsonl --out runs/mine --resume auto

`--help` lists every field of a recipe; each is a flag. The resolved configuration, metrics, sample grids, checkpoints
and the trained weights are in the folder of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uniref_fast.training.core.launch import RunOptions, launch
from uniref_fast.training.core.processes import leave
from uniref_fast.training.supervised.recipes import SFT, SFT_RECIPES

if TYPE_CHECKING:
    from uniref_fast.training.core.distributed import Ranks
    from uniref_fast.training.supervised.trainer import SFTTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit status: 0 done, 143 or 130 stopped by a signal and saved, 1 or 2 for errors."""

    def build(config: SFT, ranks: Ranks, options: RunOptions, resume: int | None) -> SFTTrainer:
        from uniref_fast.training.supervised.trainer import SFTTrainer

        return SFTTrainer(config, ranks, options.out, resume)

    return launch("sft", SFT_RECIPES, RunOptions(Path("runs/sft")), build, sys.argv[1:] if argv is None else argv,
                  "Supervised fine-tuning on multi-reference editing rows.")  # fmt: skip


if __name__ == "__main__":
    leave(main())
