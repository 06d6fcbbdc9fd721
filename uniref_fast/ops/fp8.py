"""8-bit linear layers: quantisation fused into the op before them, one scale per row; forward only.

    quantize_fp8        values, row_scale = quantise(x)                                             1 read, half a write
    norm_modulate_fp8   values, row_scale = quantise(norm(x) * (1 + scale[row]) + shift[row])      1 read, half a write
    gelu_fp8            values, row_scale = quantise(gelu(x))                                       1 read, half a write
    scaled_linear       out = row_scale * weight_scale * (values @ weight^T) + bias                 torch._scaled_mm

The format is e4m3 with `row_scale = max|row| / 448`, without calibration. It is lossy: a value keeps 4 significant
bits, and a linear layer of random rows is wrong by some percent. One row never costs another row precision. For
inference only; `mode="fast"` of `patch` and `edit` uses these ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uniref_fast.ops._dispatch import ATTENTION_LIBRARIES, choose, define_op, inside_transform, observed, one_of
from uniref_fast.ops.norm_modulate import Norm, _check, gate_residual_reference, norm_modulate_reference

__all__ = ["gate_residual_norm_modulate_fp8", "gelu_fp8", "norm_modulate_fp8", "quantize_fp8", "scaled_linear"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_CAPABILITY = (8, 9)
SMALLEST_SCALE = 2.0**-100
"""Smallest scale of a row. A row of zeros has this scale, so that no scale is 0 and no value is 0 / 0."""

Quantized = tuple[Tensor, Tensor]


def quantize_fp8(x: Tensor, *, impl: str | None = None) -> Quantized:
    """Quantise by row: the specification of the fused ops, and the way to quantise the weight `[out, in]` of a Linear.

    Args:
        x: `[N, C]`, any floating dtype; contiguous rows for the Triton kernel.
        impl: "reference" (any device) or "triton" (compute capability 8.9 and up). None picks by device.

    Returns:
        The values, float8_e4m3fn `[N, C]`, and row_scale, float32 `[N]` (`SMALLEST_SCALE` for a row of zeros), with
        `x ~ values * row_scale[:, None]`. Neither carries a gradient.

    Raises:
        ValueError: A transform of `torch.func` or forward-mode differentiation is active, or `impl` is not possible.
    """
    _refuse_transforms()
    x = x.detach()
    if x.dtype == torch.float64 or _choose(impl, x) == "reference":
        return _quantize(x)
    return (torch.ops.uniref_fast.quantize_fp8 if observed(x) else _quantize_fp8)(x)


def _quantize(x: Tensor) -> Quantized:
    wide = x.to(torch.float32)
    row_scale = (wide.abs().amax(-1) / FP8_MAX).clamp(min=SMALLEST_SCALE)
    return (wide / row_scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), row_scale


def norm_modulate_fp8(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: Norm = "layer",
    impl: str | None = None,
) -> Quantized:
    """Compute `norm_modulate` (same arguments) in float32 and quantise it by row.

    `impl` is "reference" (any device) or "triton" (compute capability 8.9 and up); None picks by device.
    Returns values and row_scale like `quantize_fp8`.
    """
    _check(x, mod_index, shift=shift, scale=scale)
    rms = one_of("norm", norm, "layer", "rms")
    if _choose(impl, x, shift, scale) == "reference":
        wide = None if shift is None else shift.to(torch.float32)
        out = norm_modulate_reference(x.to(torch.float32), wide, scale.to(torch.float32), mod_index, eps, rms)
        return _quantize(out)
    run = torch.ops.uniref_fast.norm_modulate_fp8 if observed(x, shift, scale) else _norm_modulate_fp8
    return run(x, shift, scale, mod_index, eps, rms)


def gate_residual_norm_modulate_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: Norm = "layer",
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `x' = x + gate[r] * y`, rounded to x's dtype, and `norm_modulate_fp8(x')` in one pass.

    The arguments are those of `gate_residual_norm_modulate` and `norm_modulate_fp8`. Returns x' `[N, C]`, the values
    and row_scale.
    """
    _check(x, mod_index, y=y, gate=gate, shift=shift, scale=scale)
    rms = one_of("norm", norm, "layer", "rms")
    if _choose(impl, x, y, gate, shift, scale) == "reference":
        wide, branch, factor = (t.to(torch.float32) for t in (x, y, gate))
        x = gate_residual_reference(wide, branch, factor, mod_index).to(x.dtype)
        return x, *norm_modulate_fp8(x, shift, scale, mod_index, eps, norm=norm, impl="reference")
    watched = observed(x, y, gate, shift, scale)
    run = torch.ops.uniref_fast.gate_residual_norm_modulate_fp8 if watched else _gate_residual_norm_modulate_fp8
    return run(x, y, gate, shift, scale, mod_index, eps, rms)


def gelu_fp8(x: Tensor, *, impl: str | None = None) -> Quantized:
    """Compute the tanh-approximated GELU of x `[N, C]` in float32 and quantise it by row; see `norm_modulate_fp8`."""
    if x.ndim != 2 or (x.numel() and x.stride(-1) != 1):
        raise ValueError(f"x must be [N, C] with contiguous rows, got {list(x.shape)}, strides {x.stride()}")
    if _choose(impl, x) == "reference":
        return _quantize(F.gelu(x.to(torch.float32), approximate="tanh"))
    return (torch.ops.uniref_fast.gelu_fp8 if observed(x) else _gelu_fp8)(x)


def scaled_linear(
    values: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    impl: str | None = None,
) -> Tensor:
    """Compute `row_scale[:, None] * weight_scale * (values @ weight^T) + bias`.

    Args:
        values, row_scale: Results of `norm_modulate_fp8` or `gelu_fp8`, float8_e4m3fn `[N, I]` and float32 `[N]`.
        weight, weight_scale: Results of `quantize_fp8`, float8_e4m3fn `[O, I]` and float32 `[O]`. I and O must be
            multiples of 16.
        bias: `[O]` or None.
        dtype: Dtype of the result. The product of a GPU is rounded to bfloat16 first.
        impl: "reference" emulates the product on any device: the sum of all products is exact, and rounded once to
            float32. It therefore does not depend on the other rows of the call. None uses `torch._scaled_mm` on a GPU.

    Returns:
        `[N, O]`.
    """
    if values.dtype != FP8 or weight.dtype != FP8:
        raise ValueError(f"values and weight must be {FP8}, got {values.dtype} and {weight.dtype}")
    if values.shape[1] != weight.shape[1] or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(
            f"values [N, I] and weight [O, I] with I and O multiples of 16 are needed, got {list(values.shape)} and "
            f"{list(weight.shape)}"
        )
    if row_scale.shape != values.shape[:1] or weight_scale.shape != weight.shape[:1]:
        raise ValueError(
            f"scales must be [{values.shape[0]}] and [{weight.shape[0]}], got {list(row_scale.shape)} and "
            f"{list(weight_scale.shape)}"
        )
    if impl not in (None, "reference"):
        raise ValueError(f'impl must be "reference" or None, got {impl!r}')
    if impl == "reference" or not values.is_cuda:
        # Products of two values are multiples of 2^-18 below 2^18: in float64 their sum is exact in any order.
        out = (values.to(torch.float64) @ weight.to(torch.float64).T).to(torch.float32)
        out = out * row_scale[:, None] * weight_scale
        return out.to(dtype) if bias is None else (out + bias.to(torch.float32)).to(dtype)
    if not len(values):
        return values.new_empty(0, weight.shape[0], dtype=dtype)
    wide = torch.bfloat16  # the only dtype of a product with scales by row
    out = torch._scaled_mm(
        values, weight.t(), row_scale[:, None], weight_scale[None],
        bias=None if bias is None else bias.to(wide), out_dtype=wide, use_fast_accum=True,
    )  # fmt: skip
    return out.to(dtype)


def _refuse_transforms() -> None:
    if inside_transform():
        raise ValueError("8-bit ops have no derivatives: call them outside of torch.func transforms and forward mode")


def _choose(impl: str | None, x: Tensor, *others: Tensor | None, head_dim: int | None = None) -> str:
    _refuse_transforms()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        raise ValueError("8-bit ops have no gradient; use them under torch.no_grad()")
    if impl == "native" or impl in ATTENTION_LIBRARIES:
        raise ValueError(f"impl={impl!r} is not possible here: 8-bit ops have a reference and a Triton kernel")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < FP8_CAPABILITY:
        if impl == "triton":
            raise ValueError("impl='triton' is not possible here: e4m3 needs compute capability 8.9 or newer")
        return "reference"
    return choose("reference" if impl is None and not x.is_cuda else impl, x, head_dim)


# ---- torch.library ops ----


@define_op
def _norm_modulate_fp8(
    x: Tensor, shift: Tensor | None, scale: Tensor, mod_index: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    from uniref_fast.kernels import fp8 as kernels

    return kernels.norm_modulate_fp8(x, shift, scale, mod_index, eps, rms)


@define_op
def _gate_residual_norm_modulate_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from uniref_fast.kernels import fp8 as kernels

    return kernels.gate_residual_norm_modulate_fp8(x, y, gate, shift, scale, mod_index, eps, rms)


@define_op
def _quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    from uniref_fast.kernels import fp8 as kernels

    return kernels.quantize_fp8(x)


@define_op
def _gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    from uniref_fast.kernels import fp8 as kernels

    return kernels.gelu_fp8(x)


@torch.library.register_fake("uniref_fast::norm_modulate_fp8")
def _(x, shift, scale, mod_index, eps, rms):
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("uniref_fast::gate_residual_norm_modulate_fp8")
def _(x, y, gate, shift, scale, mod_index, eps, rms):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("uniref_fast::quantize_fp8")
@torch.library.register_fake("uniref_fast::gelu_fp8")
def _(x):
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
