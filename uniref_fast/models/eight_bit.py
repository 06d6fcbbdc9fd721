"""Inputs of the Linears of a packed block: quantised by the op that computes them where the Linear is in 8 bits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.quantised_linear import QuantisedActivation, is_quantised

__all__ = ["feed_forward", "first_linear", "gated_input", "modulated_input"]


def modulated_input(
    linear: nn.Module | None,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor,
    eps: float,
    impl: str | None,
) -> Tensor:
    """Compute `ops.norm_modulate` as the input of a Linear, and of others that share it.

    Args:
        linear: The Linear; None for a module that is called as a whole.
        x, shift, scale, rows, eps, impl: As for `ops.norm_modulate`.

    Returns:
        `[n, C]`, a `QuantisedActivation` if the Linear has a weight in 8 bits.
    """

    def exact() -> Tensor:
        return ops.norm_modulate(x, shift, scale, rows, eps, impl=impl)

    if linear is None or not is_quantised(linear):
        return exact()
    return QuantisedActivation(*ops.norm_modulate_fp8(x, shift, scale, rows, eps, impl=impl), x.dtype, exact)


def gated_input(
    linear: nn.Module | None,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor,
    eps: float,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Compute `ops.gate_residual_norm_modulate`, whose second result is the input of a Linear (`modulated_input`)."""
    if linear is None or not is_quantised(linear):
        return ops.gate_residual_norm_modulate(x, branch, gate, shift, scale, rows, eps, impl=impl)
    out, *quantised = ops.gate_residual_norm_modulate_fp8(x, branch, gate, shift, scale, rows, eps, impl=impl)

    def exact() -> Tensor:
        return ops.norm_modulate(out, shift, scale, rows, eps, impl=impl)

    return out, QuantisedActivation(quantised[0], quantised[1], out.dtype, exact)


def first_linear(mlp: Any) -> nn.Module | None:
    """Return the Linear that the input of a feed-forward of diffusers goes to, or None for another module."""
    return mlp.net[0].proj if _fusable(mlp) else None


def feed_forward(mlp: Any, x: Tensor, impl: str | None) -> Tensor:
    """Run a feed-forward, `[n, C]` to `[n, C]`, with GELU and the quantisation after it in one pass.

    Args:
        mlp: Feed-forward of a block. One that is not diffusers' own, or whose second Linear is not in 8 bits, is called
            as a whole.
        x: Input, quantised or not.
        impl: Implementation forced on every op, or None.
    """
    if not (_fusable(mlp) and is_quantised(mlp.net[2])):
        return mlp(x)
    hidden = mlp.net[0].proj(x)

    def exact() -> Tensor:
        return F.gelu(hidden, approximate="tanh")

    return mlp.net[2](QuantisedActivation(*ops.gelu_fp8(hidden, impl=impl), hidden.dtype, exact))


def _fusable(mlp: Any) -> bool:
    """Return True for Linear, GELU, dropout without effect and Linear, without hooks or forwards of their own."""
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward

    if type(mlp) is not FeedForward or len(mlp.net) != 3 or type(mlp.net[0]) is not GELU:
        return False
    activation, dropout, _ = mlp.net
    if activation.approximate != "tanh" or (dropout.training and dropout.p):
        return False
    own = [vars(module) for module in (mlp, activation, dropout)]
    return not any(each["_forward_hooks"] or each["_forward_pre_hooks"] or "forward" in each for each in own)
