"""Parts of a block that may compute in 8 bits: inputs of its Linears, feed-forwards and attention.

The op that computes the input of a Linear in 8 bits also quantises it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.models.onednn_linear import CallLinear, call_linear, forward_by_parts, runs_by_parts
from uniref_fast.models.tanh_gelu import has_tanh_gelu, runs_native_gelu
from uniref_fast.quantised_linear import QuantisedActivation, is_quantised, quantised_input, record_error
from uniref_fast.visibility import AttentionPlan

__all__ = ["attend", "feed_forward", "first_linear", "gated_input", "modulated_input", "shared_input"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, impl: str | None, for_training: bool, eight_bit: str
) -> Tensor:
    """Compute attention of q, k, v, `[N, H, D]`.

    Args:
        q, k, v: Queries, keys and values.
        plan: Plan of the queries and keys.
        impl: Implementation forced on every op, or None.
        for_training: Choose the implementation by the cost of forward and backward.
        eight_bit: Name under which the error of attention in 8 bits is recorded; empty for attention in 16 bits.
    """
    if not eight_bit:
        return ops.segment_attention(q, k, v, plan, impl=impl, backward=for_training or None)
    out = ops.attention_fp8(q, k, v, plan, impl=impl)
    record_error(eight_bit, out, lambda: ops.segment_attention(q, k, v, plan, impl=impl))
    return out


def modulated_input(
    linear: nn.Module | None,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    eps: float,
    impl: str | None,
) -> Tensor:
    """Compute `ops.norm_modulate` as the input of a Linear, and of others that share it.

    Args:
        linear: The Linear; None for a module that is called as a whole.
        x, shift, scale, rows, eps, impl: Arguments of `ops.norm_modulate`.

    Returns:
        `[n, C]`, a `QuantisedActivation` if the Linear has a weight in 8 bits.
    """

    def exact() -> Tensor:
        return ops.norm_modulate(x, shift, scale, rows, eps, impl=impl)

    if not is_quantised(linear):
        return exact()
    return QuantisedActivation(*ops.norm_modulate_fp8(x, shift, scale, rows, eps, impl=impl), x.dtype, exact)


def gated_input(
    linear: nn.Module | None,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    eps: float,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Compute `ops.gate_residual_norm_modulate`, whose second result is the input of a Linear (`modulated_input`)."""
    if not is_quantised(linear):
        return ops.gate_residual_norm_modulate(x, branch, gate, shift, scale, rows, eps, impl=impl)
    out, values, row_scale = ops.gate_residual_norm_modulate_fp8(x, branch, gate, shift, scale, rows, eps, impl=impl)

    def exact() -> Tensor:
        return ops.norm_modulate(out, shift, scale, rows, eps, impl=impl)

    return out, QuantisedActivation(values, row_scale, out.dtype, exact)


def shared_input(linear: nn.Module | None, x: Tensor, impl: str | None) -> Tensor:
    """Return the input of Linears that share it, quantised once for all of them if they are in 8 bits.

    Args:
        linear: One of the Linears.
        x: Their input, `[..., C]`.
        impl: Implementation forced on every op, or None.
    """
    return quantised_input(x, impl) if is_quantised(linear) else x


def first_linear(mlp: Any) -> nn.Module | None:
    """Return the Linear in 8 bits that the input of a feed-forward goes to, if only Linears read that input.

    This holds for the feed-forwards of diffusers without hooks; None stands for any other module.
    """
    return mlp.net[0].proj if _is_eight_bit(mlp) else _first_of_gated(mlp)


def feed_forward(mlp: Any, x: Tensor, impl: str | None, linear: CallLinear = call_linear) -> Tensor:
    """Run a feed-forward, `[..., C]` to `[..., C]`, with GELU and the quantisation after it in one pass.

    Args:
        mlp: Feed-forward of a block. One that is not diffusers' own is called as a whole; so is one with SwiGLU, whose
            last Linear quantises its input itself. If the second Linear is not in 8 bits, GELU is that of
            `runs_native_gelu`.
        x: Input, quantised or not.
        impl: Implementation forced on every op, or None.
        linear: Function that calls a Linear that is not in 8 bits, `ForwardContext.linear`.
    """
    if not _is_eight_bit(mlp):
        if isinstance(x, Tensor) and runs_native_gelu(mlp, x, impl):
            return linear(mlp.net[2], ops.gelu(linear(mlp.net[0].proj, x)))
        if _first_of_gated(mlp) is not None and not isinstance(x, QuantisedActivation):
            x = quantised_input(x, impl)
        elif linear is not call_linear and runs_by_parts(mlp, x):
            return forward_by_parts(
                mlp, lambda _, each: functools.partial(linear, each) if type(each) is nn.Linear else each, x
            )
        return mlp(x)
    hidden = mlp.net[0].proj(x)

    def exact() -> Tensor:
        return F.gelu(hidden, approximate="tanh")

    quantised = ops.gelu_fp8(hidden.flatten(0, -2), impl=impl)
    return mlp.net[2](QuantisedActivation(*quantised, hidden.dtype, exact, hidden.shape))


_GATED = {
    "Flux2FeedForward": ("linear_in",),
    "Flux3FeedForward": ("linear_in",),
    "QwenImage21SwiGLUFeedForward": ("gate_layer", "proj"),
    "FeedForward": ("w1", "w3"),  # of Z-Image and Fibo 2
}
"""Linears that read the input, by the class of a feed-forward with SwiGLU in diffusers."""


def _first_of_gated(mlp: Any) -> nn.Module | None:
    """Return a Linear that reads the input of a feed-forward with SwiGLU if all of these are in 8 bits, else None."""
    kind, own = type(mlp), vars(mlp)
    names = _GATED.get(kind.__name__, ()) if kind.__module__.startswith("diffusers.") else ()
    linears = [getattr(mlp, name) for name in names if hasattr(mlp, name)]
    if not linears or not all(map(is_quantised, linears)):
        return None
    return None if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own else linears[0]


def _is_eight_bit(mlp: Any) -> bool:
    """Return True if the second Linear is in 8 bits, and the parts of the feed-forward can be called one by one."""
    net: Any = getattr(mlp, "net", ())
    return len(net) == 3 and is_quantised(net[2]) and has_tanh_gelu(mlp)
