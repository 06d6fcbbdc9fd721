"""Experimental: norm with modulation, and GELU, to 8 bits with one scale per row, the input of a row-scaled fp8 matmul.

    norm_modulate_fp8    out = n(x) * (1 + scale[r]) + shift[r]       as in `norm_modulate.py`
    gelu_fp8             out = GELU(x), its tanh approximation
    row_scale = max|out| / 448,   values = e4m3(out / row_scale),   dequantised: values * row_scale

Bytes: x [N, C] read once, values written once at one byte each; `out` is not rounded to 16 bits first. One
program holds one row in registers, so its maximum costs no second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.launch_metadata import moved_bytes
from uniref_fast.kernels.token_common import channel_block, check, new_like, normalise, row_stride

MAX_E4M3 = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # its inverse is still finite


@triton.jit
def _store_quantised(b_out, p_values, p_row_scale, i_n, m_c, C: tl.constexpr, BC: tl.constexpr):
    """Quantise and store one row: b_out is [BC] float32 and 0 outside m_c."""
    peak = tl.max(tl.abs(b_out), 0)
    row_scale = tl.where(peak == 0, 1.0, tl.maximum(tl.div_rn(peak, MAX_E4M3), SMALLEST_SCALE))
    # The product may exceed 448 by a rounding of float32, far less than the 16 that would leave the range of e4m3.
    b_values = (b_out * tl.div_rn(1.0, row_scale)).to(tl.float8e4nv)
    tl.store(p_values + i_n * C + tl.arange(0, BC), b_values, mask=m_c)
    tl.store(p_row_scale + i_n, row_scale)


@triton.jit(launch_metadata=moved_bytes)
def norm_modulate_fp8_kernel(
    p_x, s_xn,  # [N, C]
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


def norm_modulate_fp8(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `norm_modulate` (same arguments) as values float8_e4m3fn [N, C] and row_scale float32 [N].

    row_scale is 1 for a row of zeros and at least 2^-126.
    """
    num_tokens, channels = x.shape
    check(mod_index, num_tokens, channels, x=x, shift=shift, scale=scale)
    values, row_scale = _outputs(x)
    if x.numel() == 0:
        return values, row_scale
    block = channel_block(channels)
    with torch.cuda.device_of(x):
        norm_modulate_fp8_kernel[(num_tokens,)](
            x, x.stride(0), shift, row_stride(shift), scale, scale.stride(0), mod_index, values, row_scale, eps,
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
    if x.is_cuda:
        major, minor = capability = torch.cuda.get_device_capability(x.device)
        assert capability >= (8, 9), f"sm_{major}{minor} has no conversion to e4m3; compute capability 8.9 has"
    make = torch.empty if x.numel() else torch.ones
    return new_like(x, torch.float8_e4m3fn), make(x.shape[0], dtype=torch.float32, device=x.device)


def _warps(block: int) -> int:
    return min(max(block // 1024, 1), 32)  # 32 values a thread: four 128-bit loads and two 128-bit stores
