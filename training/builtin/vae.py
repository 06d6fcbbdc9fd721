"""The autoencoder of the built-in model, trained on the pictures of made data; the first step towards that model.

    uniref-fast data make runs/data --size 64
    torchrun --nproc-per-node 2 -m uniref_fast.training.builtin.vae --data runs/data --out runs/vae

Writes `runs/vae/model`: the whole built-in pipeline with this autoencoder and everything else untrained, which
`training/sft.py --model runs/vae/model` goes on from. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniref_fast import flags as configs
from uniref_fast.training.core.processes import end_with_launcher, leave

__all__ = ["VAE", "default", "main"]


@dataclass(frozen=True)
class VAE:
    """A run.

    Attributes:
        out: folder of the run; one that holds an unfinished run is gone on with.
        data: folder that `uniref-fast data make` wrote, whose pictures are cropped.
        steps: optimizer steps.
        batch: crops a step, of all ranks.
        side: of a crop, pixels; a multiple of 16.
        lr: peak learning rate of AdamW, along a cosine.
        kl: weight of the divergence of the latents from a standard normal, per pixel value.
        seed: of crops and noise.
        save_every: steps between checkpoints and previews.
    """

    out: Path = Path("runs/vae")
    data: Path = Path("runs/data")
    steps: int = 10_000
    batch: int = 8
    side: int = 48
    lr: float = 2e-3
    kl: float = 1e-3
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.side < 16 or self.side % 16 or not self.lr > 0 or not self.kl >= 0:
            got = f"{self.side}, {self.lr}, {self.kl}"
            raise ValueError(f"side must be a multiple of 16, lr above 0 and kl at least 0, got {got}")


def default() -> VAE:
    """What the shipped autoencoder was trained with."""
    return VAE()


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    try:
        config = configs.parse(
            {"default": default},
            sys.argv[1:] if argv is None else argv,
            prog="python -m uniref_fast.training.builtin.vae",
            description="Train the built-in model's autoencoder.",
        ).config
    except ValueError as error:
        print(f"vae: {error}", file=sys.stderr)
        return 2
    import torch.distributed as dist  # after the flags, so that help and errors of flags come at once

    from uniref_fast.training.builtin.vae_trainer import run
    from uniref_fast.training.core.checkpoint import CheckpointError

    try:
        end_with_launcher()
        run(config)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"vae: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main())
