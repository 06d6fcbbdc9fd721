"""Qwen-Image's video autoencoder on single frames, in a third of the operations.

A causal 3D convolution pads its first frame with two frames of zeros before it. So an image meets only the last of the
three temporal taps, and a 2D convolution with that tap gives the same numbers within rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["single_frame"]


@contextlib.contextmanager
def single_frame(vae: Any) -> Iterator[None]:
    """Run an `AutoencoderKLQwenImage` on one frame at a time within the block; more frames raise ValueError."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    def bound(conv: Any) -> Any:
        left, right, top, bottom, *_ = conv._padding
        assert left == right and top == bottom

        def forward(x: Tensor, cache_x: Tensor | None = None) -> Tensor:
            if x.shape[2] != 1:
                raise ValueError(f"an autoencoder set to single frames was given {x.shape[2]}")
            out = F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left))
            return out.unsqueeze(2)

        return forward

    found = [module for module in vae.modules() if type(module) is QwenImageCausalConv3d]
    before = [vars(module).get("forward") for module in found]  # of hooks, or of a block around this one
    for module in found:
        module.forward = bound(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(found, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward  # type: ignore[method-assign]
