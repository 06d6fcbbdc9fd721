"""Latents of VAEs as tokens of 2 x 2 pixels, and the scale of a VAE, where several families have the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

__all__ = ["batch_statistics", "from_tokens", "to_tokens", "vae_statistics"]


def to_tokens(latents: Tensor) -> Tensor:
    """Return latents `[B, C, 2 H, 2 W]` as tokens `[B, H W, 4 C]`, whose channels are (channel, row, column)."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def from_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens `[B, H W, 4 C]` of a grid (H, W) as latents `[B, C, 2 H, 2 W]`; the reverse of `to_tokens`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)


def vae_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of a VAE of videos, `[1, C, 1, 1, 1]` each.

    Args:
        vae: The VAE, whose configuration has them.
        like: Tensor whose device and dtype they get.
    """
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like.device, like.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def batch_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of patches of 2 x 2 latents of a VAE with a batch norm, `[1, 4 C, 1, 1]` each.

    Args:
        vae: The VAE.
        like: Tensor whose device and dtype they get.
    """
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    mean, std = (values.view(1, -1, 1, 1).to(like.device, like.dtype) for values in (vae.bn.running_mean, std))
    return mean, std
