"""Gated residual, a norm without parameters, and modulation of a row by its segment's vectors, in one pass.

    gate_residual                  x' = x + gate[r] * y                              2 reads, 1 write of [N, C]
    norm_modulate                  out = n(x) * (1 + scale[r]) + shift[r]            1 read,  1 write
    gate_residual_norm_modulate    both, n taken of x' as it was rounded             2 reads, 2 writes

with r = mod_index[i] the modulation row of token i and, over C in float32,

    n(x) = (x - mean(x)) / sqrt(var(x) + eps),  or with `rms`  n(x) = x / sqrt(mean(x^2) + eps)

Without `add_one` the factor is scale[r]. With `branch_eps`, y / sqrt(mean(y^2) + branch_eps) takes the place of y.

The modulation vectors [R, C] are few and stay in L1 and L2. Use these kernels wherever a transformer block adds a
branch and normalises for the next one. The gradients are in `norm_modulate_backward.py`.

There is one kernel: it computes a residual if it gets y and a norm if it gets scale. One program holds one row in
registers, so nothing is read twice.

`eager_rounding` rounds to x's dtype wherever eager PyTorch would store a tensor, so that a patched model repeats the
unpatched one. Contraction of a product and a sum into one FMA would undo that, in float32 and, because the compiler
narrows the arithmetic between two casts, in 16 bits too; the launch turns it off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.launch_metadata import moved_bytes
from uniref_fast.kernels.token_common import channel_block, check, new_like, normalise, row_stride, stored

__all__ = ["gate_residual", "gate_residual_norm_modulate", "norm_modulate"]


@triton.jit(launch_metadata=moved_bytes)
def norm_modulate_kernel(
    p_x, s_xn,  # [N, C]
    p_y, s_yn,  # [N, C] or None
    p_gate, s_gate,  # [R, C] or None
    p_shift, s_shift,  # [R, C] or None
    p_scale, s_scale,  # [R, C] or None
    p_mod_index,  # [N] or None
    p_x_out,  # [N, C] contiguous, or None
    p_normed,  # [N, C] contiguous, or None
    eps,
    branch_eps,
    RMS: tl.constexpr,
    EAGER: tl.constexpr,
    ONE: tl.constexpr,  # add 1 to scale
    BRANCH: tl.constexpr,  # normalise y
    C: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    i_r = tl.zeros([], tl.int64)
    if p_mod_index is not None:
        i_r = tl.load(p_mod_index + i_n).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    dtype: tl.constexpr = p_x.dtype.element_ty
    # Streams are read once; the caches should keep the modulation vectors. All loads come before the first store: the
    # compiler may not move a load over a store that could alias it.
    b_x = tl.load(p_x + i_n * s_xn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BC]
    if p_y is not None:
        b_y = tl.load(p_y + i_n * s_yn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_gate = tl.load(p_gate + i_r * s_gate + o_c, mask=m_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if p_scale is not None:
        b_scale = tl.load(p_scale + i_r * s_scale + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
    if p_shift is not None:
        b_shift = tl.load(p_shift + i_r * s_shift + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
    if p_y is not None:
        if BRANCH:
            b_y, _ = normalise(b_y, m_c, branch_eps, C, True)
            b_y = stored(b_y, dtype, EAGER)
        b_rounded = (b_x + stored(b_gate * b_y, dtype, EAGER)).to(dtype)  # [BC]
        tl.store(p_x_out + i_n * C + o_c, b_rounded, mask=m_c)
        b_x = b_rounded.to(tl.float32)
    if p_scale is not None:
        b_n, _ = normalise(b_x, m_c, eps, C, RMS)
        b_factor = b_scale.to(tl.float32)
        if ONE:
            b_factor = stored(1.0 + b_factor, dtype, EAGER)
        b_out = stored(b_n, dtype, EAGER) * b_factor  # [BC]
        if p_shift is not None:
            b_out = stored(b_out, dtype, EAGER) + b_shift.to(tl.float32)
        tl.store(p_normed + i_n * C + o_c, b_out.to(dtype), mask=m_c)


def norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    eager_rounding: bool = False,
    add_one: bool = True,
) -> torch.Tensor:
    """Compute `n(x) * (1 + scale[r]) + shift[r]` in x's dtype.

    Args:
        x: [N, C], channels contiguous.
        shift, scale: [R, C], channels contiguous. No shift is added if it is None.
        mod_index: Modulation row of each token, int32 [N]. None means row 0.
        rms: Compute the RMS norm instead of LayerNorm.
        eager_rounding: Round where eager PyTorch does: n, 1 + scale, their product, the sum.
        add_one: Multiply by 1 + scale[r]; False multiplies by scale[r].
    """
    normed = new_like(x)
    _launch(x, None, None, shift, scale, mod_index, None, normed, eps, rms, eager_rounding, add_one)
    return normed


def gate_residual_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    eager_rounding: bool = False,
    add_one: bool = True,
    branch_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `x_out = x + gate[r] * y`, rounded to x's dtype, and its `norm_modulate`; y as in `gate_residual`."""
    x_out, normed = new_like(x), new_like(x)
    _launch(x, y, gate, shift, scale, mod_index, x_out, normed, eps, rms, eager_rounding, add_one, branch_eps)
    return x_out, normed


def gate_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    mod_index: torch.Tensor | None,
    eager_rounding: bool = False,
    branch_eps: float | None = None,
) -> torch.Tensor:
    """Compute `x + gate[r] * y` for x, y [N, C] and gate [R, C] in x's dtype; eager_rounding rounds the product.

    A branch_eps divides y by the root of its mean square before, with this number added to the mean square.
    """
    x_out = new_like(x)
    _launch(x, y, gate, None, None, mod_index, x_out, None, 0.0, False, eager_rounding, True, branch_eps)
    return x_out


def _launch(
    x, y, gate, shift, scale, mod_index, x_out, normed, eps, rms, eager_rounding, add_one, branch_eps=None
) -> None:
    num_tokens, channels = x.shape
    check(mod_index, num_tokens, channels, x=x, y=y, gate=gate, shift=shift, scale=scale)
    if x.numel() == 0:
        return
    block = channel_block(channels)
    with torch.cuda.device_of(x):
        norm_modulate_kernel[(num_tokens,)](
            x, x.stride(0),
            y, row_stride(y),
            gate, row_stride(gate),
            shift, row_stride(shift),
            scale, row_stride(scale),
            mod_index, x_out, normed, eps, branch_eps or 0.0,
            RMS=rms, EAGER=eager_rounding, ONE=add_one, BRANCH=branch_eps is not None, C=channels, BC=block,
            # 32 values a thread: in a 16-bit dtype four 128-bit loads of each stream are in flight.
            num_warps=min(max(block // 1024, 1), 32),
            enable_fp_fusion=not eager_rounding,
        )  # fmt: skip
