"""Train the autoencoder of the built-in model on the images of generated data; the first part of that model.

    uniref-fast data make runs/data --size 64
    torchrun --nproc-per-node 2 -m uniref_fast.training.builtin.vae --data runs/data --out runs/vae

The folder `runs/vae/model` is the whole built-in pipeline with this autoencoder and an untrained transformer, which
`training/sft.py --model runs/vae/model` trains. The same command continues a run that was stopped.
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
    """Settings of the training of the autoencoder.

    Attributes: Folders
        out: Folder of the run; an unfinished run in it is continued.
        data: Folder that `uniref-fast data make` wrote, whose images are cropped.

    Attributes: Training
        steps: Number of optimizer steps.
        batch: Number of crops per step, over all ranks.
        side: Side of a crop in pixels, a multiple of 16.
        lr: Peak learning rate of AdamW, which then falls along a cosine.
        kl: Weight of the KL divergence of the latents from a standard normal distribution, per pixel value.
        seed: Seed of crops and noise.
        save_every: Number of steps between checkpoints and previews.
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
    """Return the settings that the shipped autoencoder was trained with."""
    return VAE()


def main(argv: Sequence[str] | None = None) -> int:
    """Train the autoencoder and return the exit status."""
    try:
        config = configs.parse(
            {"default": default},
            sys.argv[1:] if argv is None else argv,
            prog="python -m uniref_fast.training.builtin.vae",
            description="Train the autoencoder of the built-in model.",
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
