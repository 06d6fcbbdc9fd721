"""LayerNorm and modulation with a row per token, alone or behind a gated residual.

    norm_modulate                 out = LN(x) * (1 + scale[row]) + shift[row]
    gate_residual                 x'  = x + gate[row] * y
    gate_residual_norm_modulate   x'  = x + gate[row] * y,  out = norm_modulate(x')

`row` is the modulation row of a token (`SelfLayout.modulation_rows`): the sampled timestep of its sample, or the clean
t = 0 that Qwen-Image-Edit-2511 gives to references. Each op reads its inputs once and writes its outputs once: 2, 3
and 4 passes over `[N, C]`, where eager PyTorch makes 5 to 12.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uniref_fast import native
from uniref_fast.ops._dispatch import choose

__all__ = [
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_reference",
    "gate_residual_reference",
    "norm_modulate",
    "norm_modulate_reference",
]


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6, *, impl: str | None = None
) -> Tensor:
    """LayerNorm without affine, then `* (1 + scale[row]) + shift[row]`; adaLN of DiT (arXiv 2212.09748).

    Args:
        x: `[N, C]`, float32, bfloat16, float16 (float64 with the reference).
        shift, scale: `[R, C]`, same dtype; rows may be strided (chunks of a wider table).
        rows: int32 `[N]`, values in 0..R-1; None means row 0 for all.
        eps: added to the variance.
        impl: "reference", "native", "triton"; None picks by device.

    Returns:
        `[N, C]`, dtype of x.
    """
    _check(x, rows, shift=shift, scale=scale)
    return torch.ops.uniref_fast.norm_modulate(x, shift, scale, rows, eps, choose(impl, x))


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """`x + gate[row] * y`: x, y `[N, C]`, gate `[R, C]`, rows int32 `[N]` or None; returns `[N, C]`."""
    _check(x, rows, y=y, gate=gate)
    return torch.ops.uniref_fast.gate_residual(x, y, gate, rows, choose(impl, x))


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`x' = x + gate[row] * y` rounded to x's dtype, and `norm_modulate(x')`, in one pass.

    Args as in `norm_modulate` and `gate_residual`. Returns `(x', normed)`, both `[N, C]`.
    """
    _check(x, rows, y=y, gate=gate, shift=shift, scale=scale)
    op = torch.ops.uniref_fast.gate_residual_norm_modulate
    return op(x, y, gate, shift, scale, rows, eps, choose(impl, x))


# ---- reference: the specification, the oracle (in float64) and the baseline ----


def norm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + _select(scale, rows)) + _select(shift, rows)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    return x + _select(gate, rows) * y


def gate_residual_norm_modulate_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    x = gate_residual_reference(x, y, gate, rows)
    return x, norm_modulate_reference(x, shift, scale, rows, eps)


def _select(table: Tensor, rows: Tensor | None) -> Tensor:
    return table[:1] if rows is None else table[rows.long()]


def _check(x: Tensor, rows: Tensor | None, **others: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [N, C], got {list(x.shape)}")
    tables = {name: other for name, other in others.items() if name != "y"}
    count = next(iter(tables.values())).shape[0]
    for name, other in others.items():
        expected = x.shape if name == "y" else (count, x.shape[1])
        if other.shape != expected or not (count or name == "y"):
            raise ValueError(
                f"{name} has shape {list(other.shape)}, expected {'[N, C]' if name == 'y' else '[R, C], one R >= 1'} "
                f"for x of {list(x.shape)}"
            )
        if other.dtype != x.dtype or other.device != x.device:
            raise ValueError(f"{name} is {other.dtype} on {other.device}, x is {x.dtype} on {x.device}")
    for name, other in {"x": x, **others}.items():
        if other.numel() and other.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, its strides are {other.stride()}")
    if rows is not None and (rows.shape != x.shape[:1] or rows.dtype != torch.int32 or not rows.is_contiguous()):
        raise ValueError(f"rows must be contiguous int32 [{x.shape[0]}], got {rows.dtype} {list(rows.shape)}")


# ---- torch.library ops ----


@torch.library.custom_op("uniref_fast::norm_modulate", mutates_args=())
def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, impl: str) -> Tensor:
    if impl == "triton":
        from uniref_fast.kernels import norm_modulate as kernels

        return kernels.norm_modulate(x, shift, scale, rows, eps)
    if impl == "native":
        return native.norm_modulate(x, shift, scale, rows, eps)
    return norm_modulate_reference(x, shift, scale, rows, eps)


@torch.library.custom_op("uniref_fast::gate_residual", mutates_args=())
def _gate_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None, impl: str) -> Tensor:
    if impl == "triton":
        from uniref_fast.kernels import norm_modulate as kernels

        return kernels.gate_residual(x, y, gate, rows)
    if impl == "native":
        return native.gate_residual(x, y, gate, rows)
    return gate_residual_reference(x, y, gate, rows)


@torch.library.custom_op("uniref_fast::gate_residual_norm_modulate", mutates_args=())
def _gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from uniref_fast.kernels import norm_modulate as kernels

        return kernels.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, eps)
    if impl == "native":
        return native.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, eps)
    return gate_residual_norm_modulate_reference(x, y, gate, shift, scale, rows, eps)


@_norm_modulate.register_fake
def _(x, shift, scale, rows, eps, impl):
    return x.new_empty(x.shape)


@_gate_residual.register_fake
def _(x, y, gate, rows, impl):
    return x.new_empty(x.shape)


@_gate_residual_norm_modulate.register_fake
def _(x, y, gate, shift, scale, rows, eps, impl):
    return x.new_empty(x.shape), x.new_empty(x.shape)
