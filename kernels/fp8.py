"""Quantisation to 8 bits with one scale per row, the input of a row-scaled fp8 matmul, fused into the op before it.

    quantize_fp8                      out = x
    norm_modulate_fp8                 out = n(x) * (1 + scale[r]) + shift[r]       as in `norm_modulate.py`
    gate_residual_norm_modulate_fp8   x' = x + gate[r] * y, then out as above from x'
    gelu_fp8                          out = GELU(x), its tanh approximation
    row_scale = max|out| / 448,   values = e4m3(out / row_scale),   dequantised: values * row_scale

Bytes: each input [N, C] read once, values written once at one byte each; `out` is not rounded to 16 bits first. A
program holds whole rows in registers, so their maximum costs no second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.launch_metadata import moved_bytes
from uniref_fast.kernels.token_common import channel_block, check, new_like, normalise, row_stride

MAX_E4M3 = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-100)  # of a row of zeros; its inverse is finite


@triton.jit
def _store_quantised(b_out, p_values, p_row_scale, i_n, m_c, C: tl.constexpr, BC: tl.constexpr):
    """Quantise and store one row: b_out is [BC] float32 and 0 outside m_c."""
    row_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(b_out), 0), MAX_E4M3), SMALLEST_SCALE)
    # The product may exceed 448 by a rounding of float32, far less than the 16 that would leave the range of e4m3.
    b_values = (b_out * tl.div_rn(1.0, row_scale)).to(tl.float8e4nv)
    tl.store(p_values + i_n * C + tl.arange(0, BC), b_values, mask=m_c)
    tl.store(p_row_scale + i_n, row_scale)


@triton.jit(launch_metadata=moved_bytes)
def quantize_fp8_kernel(
    p_x, s_xn, s_xh,  # [N, H, C]
    p_values,  # [N, H, C] contiguous, float8
    p_row_scale,  # [H, N] float32
    num_tokens,
    H: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Quantise BR rows; row i is head i % H of token i // H."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    o_n, o_h = o_r // H, o_r % H
    m_r = o_n < num_tokens
    mask = m_r[:, None] & (o_c < C)[None, :]
    p_x += o_n[:, None] * s_xn + o_h[:, None] * s_xh
    b_x = tl.load(p_x + o_c[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BR, BC]
    b_row_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(b_x), 1), MAX_E4M3), SMALLEST_SCALE)  # [BR]
    b_values = (b_x * tl.div_rn(1.0, b_row_scale)[:, None]).to(tl.float8e4nv)
    tl.store(p_values + o_r[:, None] * C + o_c[None, :], b_values, mask=mask)
    tl.store(p_row_scale + o_h * num_tokens + o_n, b_row_scale, mask=m_r)


@triton.jit(launch_metadata=moved_bytes)
def norm_modulate_fp8_kernel(
    p_x, s_xn,  # [N, C]
    p_y, s_yn,  # [N, C] or None
    p_gate, s_gate,  # [R, C], with y
    p_x_out,  # [N, C] contiguous, with y
    p_shift, s_shift,  # [R, C] or None
    p_scale, s_scale,  # [R, C]
    p_mod_index,  # [N] or None
    p_values,  # [N, C] contiguous, float8
    p_row_scale,  # [N] float32
    eps,
    RMS: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    i_r = tl.zeros([], tl.int64)
    if p_mod_index is not None:
        i_r = tl.load(p_mod_index + i_n).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_x = tl.load(p_x + i_n * s_xn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BC]
    if p_y is not None:
        b_y = tl.load(p_y + i_n * s_yn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_gate = tl.load(p_gate + i_r * s_gate + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
        b_x = (b_x + b_gate.to(tl.float32) * b_y).to(p_x_out.dtype.element_ty)
        tl.store(p_x_out + i_n * C + o_c, b_x, mask=m_c)
        b_x = b_x.to(tl.float32)
    b_scale = tl.load(p_scale + i_r * s_scale + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
    b_out, _ = normalise(b_x, m_c, eps, C, RMS)
    b_out = b_out * (1.0 + b_scale.to(tl.float32))
    if p_shift is not None:
        b_shift = tl.load(p_shift + i_r * s_shift + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
        b_out += b_shift.to(tl.float32)
    _store_quantised(b_out, p_values, p_row_scale, i_n, m_c, C, BC)


@triton.jit(launch_metadata=moved_bytes)
def gelu_fp8_kernel(
    p_x, s_xn,  # [N, C]
    p_values,  # [N, C] contiguous, float8
    p_row_scale,  # [N] float32
    C: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_x = tl.load(p_x + i_n * s_xn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BC]
    # (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
    b_out = b_x * tl.sigmoid(1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x))
    _store_quantised(b_out, p_values, p_row_scale, i_n, m_c, C, BC)


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x [N, C], channels contiguous, to float8_e4m3fn [N, C] and row_scale float32 [N]."""
    values, row_scale = quantize_heads_fp8(x[:, None])
    return values[:, 0], row_scale[0]


def quantize_heads_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each head of each token of x [N, H, C], channels contiguous.

    Returns:
        The values, float8_e4m3fn [N, H, C] contiguous, and their scales, float32 [H, N].
    """
    num_tokens, heads, channels = x.shape
    assert x.numel() == 0 or x.stride(2) == 1, "the channels of x must be contiguous"
    _check_capability(x)
    values = new_like(x, torch.float8_e4m3fn)
    row_scale = torch.empty(heads, num_tokens, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return values, row_scale
    block = channel_block(channels)
    rows = max(1, 2048 // block)  # short rows share a program, so that each thread has enough to do
    with torch.cuda.device_of(x):
        quantize_fp8_kernel[(triton.cdiv(num_tokens * heads, rows),)](
            x, x.stride(0), x.stride(1), values, row_scale, num_tokens,
            H=heads, C=channels, BR=rows, BC=block, num_warps=_warps(rows * block),
        )  # fmt: skip
    return values, row_scale


def norm_modulate_fp8(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `norm_modulate` (same arguments) as values float8_e4m3fn [N, C] and row_scale float32 [N].

    row_scale is at least 2^-100, also for a row of zeros.
    """
    check(mod_index, *x.shape, x=x, shift=shift, scale=scale)
    return _norm_modulate(x, None, None, None, shift, scale, mod_index, eps, rms)


def gate_residual_norm_modulate_fp8(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute x' = x + gate[r] * y in x's dtype [N, C], and `norm_modulate_fp8` of x'.

    Returns x', values and row_scale.
    """
    check(mod_index, *x.shape, x=x, y=y, gate=gate, shift=shift, scale=scale)
    x_out = new_like(x)
    return x_out, *_norm_modulate(x, y, gate, x_out, shift, scale, mod_index, eps, rms)


def _norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    x_out: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, channels = x.shape
    values, row_scale = _outputs(x)
    if x.numel() == 0:
        return values, row_scale
    block = channel_block(channels)
    with torch.cuda.device_of(x):
        norm_modulate_fp8_kernel[(num_tokens,)](
            x, x.stride(0), y, row_stride(y), gate, row_stride(gate), x_out,
            shift, row_stride(shift), scale, scale.stride(0), mod_index, values, row_scale, eps,
            RMS=rms, C=channels, BC=block, num_warps=_warps(block),
        )  # fmt: skip
    return values, row_scale


def gelu_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute GELU (tanh) of x [N, C], channels contiguous, as float8_e4m3fn [N, C] and row_scale float32 [N]."""
    num_tokens, channels = x.shape
    check(None, num_tokens, channels, x=x)
    values, row_scale = _outputs(x)
    if x.numel() == 0:
        return values, row_scale
    block = channel_block(channels)
    with torch.cuda.device_of(x):
        gelu_fp8_kernel[(num_tokens,)](x, x.stride(0), values, row_scale, C=channels, BC=block, num_warps=_warps(block))
    return values, row_scale


def _outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_capability(x)
    make = torch.empty if x.numel() else torch.ones
    return new_like(x, torch.float8_e4m3fn), make(x.shape[0], dtype=torch.float32, device=x.device)


def _check_capability(x: torch.Tensor) -> None:
    if x.is_cuda:
        major, minor = capability = torch.cuda.get_device_capability(x.device)
        assert capability >= (8, 9), f"sm_{major}{minor} has no conversion to e4m3; compute capability 8.9 has"


def _warps(block: int) -> int:
    return min(max(block // 1024, 1), 32)  # 32 values a thread: four 128-bit loads and two 128-bit stores
