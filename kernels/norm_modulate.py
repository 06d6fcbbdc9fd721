"""Gated residual, LayerNorm without parameters, and modulation of a row by its segment's vectors, in one pass.

    gate_residual                  x' = x + gate[r] * y                              2 reads, 1 write of [N, C]
    norm_modulate                  out = LN(x) * (1 + scale[r]) + shift[r]           1 read,  1 write
    gate_residual_norm_modulate    both, LN taken of x' as it was rounded            2 reads, 2 writes

with r = rows[n] and LN(x) = (x - mean(x)) / sqrt(var(x) + eps) over C, in float32. The modulation vectors [R, C] are
few and stay in L1 and L2. Use them wherever a transformer block adds a branch back and normalises for the next one.

One kernel: a residual when it is given y, a norm when it is given shift and scale. One program holds one row in
registers, so nothing is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def norm_modulate_kernel(
    p_x, s_xn,  # [N, C]
    p_y, s_yn,  # [N, C] or None
    p_gate, s_gate,  # [R, C] or None
    p_shift, s_shift,  # [R, C] or None
    p_scale, s_scale,  # [R, C] or None
    p_rows,  # [N] or None
    p_x_out,  # [N, C] contiguous, or None
    p_normed,  # [N, C] contiguous, or None
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    i_r = tl.zeros([], tl.int64)
    if p_rows is not None:
        i_r = tl.load(p_rows + i_n).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    # Streams pass through once; the modulation vectors are what the caches should keep. All loads come before the first
    # store: the compiler may not move a load over a store that could alias it.
    b_x = tl.load(p_x + i_n * s_xn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BC]
    if p_y is not None:
        b_y = tl.load(p_y + i_n * s_yn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_gate = tl.load(p_gate + i_r * s_gate + o_c, mask=m_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if p_shift is not None:
        b_shift = tl.load(p_shift + i_r * s_shift + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
        b_scale = tl.load(p_scale + i_r * s_scale + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
    if p_y is not None:
        b_rounded = (b_x + b_gate * b_y).to(p_x_out.dtype.element_ty)  # [BC]
        tl.store(p_x_out + i_n * C + o_c, b_rounded, mask=m_c)
        b_x = b_rounded.to(tl.float32)
    if p_shift is not None:
        mean = tl.sum(b_x, 0) / C
        b_x = tl.where(m_c, b_x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps)
        b_normed = b_x * rstd * (1.0 + b_scale.to(tl.float32)) + b_shift.to(tl.float32)  # [BC]
        tl.store(p_normed + i_n * C + o_c, b_normed.to(p_normed.dtype.element_ty), mask=m_c)


def norm_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`LN(x) * (1 + scale[rows]) + shift[rows]` for x [N, C], shift and scale [R, C], rows int32 [N] (None: row 0)."""
    normed = _new_like(x)
    _launch(x, None, None, shift, scale, rows, None, normed, eps)
    return normed


def gate_residual_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x_out = x + gate[rows] * y`, rounded to x's dtype, and `norm_modulate(x_out, shift, scale, rows, eps)`."""
    x_out, normed = _new_like(x), _new_like(x)
    _launch(x, y, gate, shift, scale, rows, x_out, normed, eps)
    return x_out, normed


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """`x + gate[rows] * y` for x, y [N, C] and gate [R, C], rounded once, to x's dtype."""
    x_out = _new_like(x)
    _launch(x, y, gate, None, None, rows, x_out, None, 0.0)
    return x_out


def _new_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(x, y, gate, shift, scale, rows, x_out, normed, eps) -> None:
    num_rows, channels = x.shape
    for name, tensor in (("x", x), ("y", y), ("gate", gate), ("shift", shift), ("scale", scale)):
        if tensor is not None:
            assert tensor.ndim == 2 and tensor.shape[1] == channels, f"{name} {tuple(tensor.shape)}, C is {channels}"
            assert channels == 1 or tensor.stride(1) == 1, f"the channels of {name} must be contiguous"
    assert y is None or y.shape == x.shape
    assert rows is None or (rows.dtype == torch.int32 and rows.shape == (num_rows,) and rows.is_contiguous())
    if x.numel() == 0:
        return
    block = triton.next_power_of_2(channels)
    assert block <= 65536, f"{channels} channels do not fit the registers of one program"
    with torch.cuda.device_of(x):
        norm_modulate_kernel[(num_rows,)](
            x, x.stride(0),
            y, _stride(y),
            gate, _stride(gate),
            shift, _stride(shift),
            scale, _stride(scale),
            rows, x_out, normed, eps,
            C=channels, BC=block,
            # 32 values a thread: in a 16-bit dtype four 128-bit loads of each stream are in flight.
            num_warps=min(max(block // 1024, 1), 32),
        )  # fmt: skip


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
