"""Feed-forwards and activations of diffusers whose GELU can be computed by `ops.gelu`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniref_fast import native, ops
from uniref_fast.models.module_hooks import code_module, has_global_hooks, runs_class_forward

__all__ = ["has_tanh_gelu", "runs_native_activation", "runs_native_gelu"]


def runs_native_gelu(mlp: Any, x: Tensor, impl: str | None) -> bool:
    """Return True if a feed-forward is computed by its Linears and `ops.gelu` instead of by calling it.

    That is so on a CPU, outside torch.compile, which fuses PyTorch's own GELU with what is around it.

    Args:
        mlp: Feed-forward of a block.
        x: Its input.
        impl: Implementation forced on every op, or None.
    """
    return _is_native(x, impl) and has_tanh_gelu(mlp)


def runs_native_activation(activation: Any, x: Tensor, impl: str | None) -> bool:
    """Return True if an activation is computed by `ops.gelu` instead of by calling it; see `runs_native_gelu`.

    It must be PyTorch's GELU with the tanh approximation, such as that of blocks with one stream of FLUX.1.

    Args:
        activation: Activation of a block.
        x: Its input.
        impl: Implementation forced on every op, or None.
    """
    if not _is_native(x, impl) or type(activation) is not nn.GELU or activation.approximate != "tanh":
        return False
    replaced = F.gelu is not torch._C._nn.gelu or code_module(nn.GELU.forward) != nn.GELU.__module__
    return not (replaced or has_global_hooks()) and runs_class_forward(activation)


def _is_native(x: Tensor, impl: str | None) -> bool:
    if ops.is_traced() or not x.is_cpu or impl in ("reference", "triton") or not native.has_gelu():
        return False
    return ops.unavailable("native", x) is None


def has_tanh_gelu(mlp: Any) -> bool:
    """Return True if a module is diffusers' `FeedForward` with the tanh GELU, and its parts can be called one by one.

    They can if no hook and no replaced code would be passed over, and the dropout has no effect.
    """
    feed_forward, gelu = _classes()
    if type(mlp) is not feed_forward or len(mlp.net) != 3:
        return False
    activation, dropout, _ = mlp.net
    if type(activation) is not gelu or activation.approximate != "tanh" or "gelu" in vars(activation):
        return False
    if type(dropout) is not nn.Dropout or (dropout.training and dropout.p):
        return False
    return not (_replaced() or has_global_hooks()) and all(map(runs_class_forward, (mlp, activation, dropout)))


@functools.cache
def _classes() -> tuple[Any, Any]:
    """Return the classes `FeedForward` and `GELU` of diffusers."""
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward

    return FeedForward, GELU


def _replaced() -> bool:
    """Return True if code that a feed-forward runs was replaced in this process."""
    feed_forward, gelu = _classes()
    own = (feed_forward.forward, feed_forward), (gelu.forward, gelu), (gelu.gelu, gelu)
    return F.gelu is not torch._C._nn.gelu or any(code_module(function) != kind.__module__ for function, kind in own)
