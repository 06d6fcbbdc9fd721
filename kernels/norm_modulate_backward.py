"""Gradients of the gated residual, the norm and the modulation, for tokens and for modulation rows, in one pass.

    dn = grad_normed * (1 + scale[r])
    g = grad_x_out + rstd * (dn - mean(dn) - n * mean(dn * n))        (RMS norm: without mean(dn))
    dx = g,  dy = gate[r] * g
    dgate[r] = sum g * y,  dshift[r] = sum grad_normed,  dscale[r] = sum grad_normed * n     over the tokens of row r

with n and rstd recomputed from the norm's input. Bytes: every [N, C] input read once, every [N, C] output written once.

Row gradients without atomics, so deterministic. The tokens of a row, in their order, are cut into tiles of TOKENS; a
program goes through the tokens of one tile and keeps its sums in registers; a second kernel adds the tiles of a row.
Both orders depend on the row's own tokens only: a sample's gradients are the same bits alone and in any pack. The table
of tiles is computed on the device, without a synchronisation, and kept with the `mod_index` tensor that it was computed
from: a layout gives the same one to every block of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from uniref_fast.kernels.launch_metadata import moved_bytes
from uniref_fast.kernels.token_common import channel_block, check, new_like, row_stride

# The sums of a tile cost 4 bytes a channel twice, written and read, for each of up to three quantities: at 16 tokens
# and 16 bits 1/8 of the traffic of the fused backward. On an H100 17408 x 3072 tokens take as long with 32 a tile in
# the fused backward and 8 % longer in the norm's, probably because the programs of the last round have more to do.
TOKENS = 16
BLOCK_TILES, BLOCK_CHANNELS = 128, 32  # of the second kernel: 128 bytes of a tile's sums at once


@triton.jit
def mean_of_both(b_a, b_b, C: tl.constexpr):
    """Return the means of two rows [BC] over their C channels, from one reduction taken in parts."""
    PART: tl.constexpr = 32 if b_a.shape[0] >= 32 else b_a.shape[0]
    b_both = tl.reshape(tl.join(b_a, b_b), (b_a.shape[0] // PART, PART, 2))
    a, b = tl.split(tl.sum(tl.sum(b_both, 1), 0))
    return a / C, b / C


@triton.jit
def _norm_and_means(b_x, b_dn, m_c, eps, RMS: tl.constexpr, C: tl.constexpr):
    """Return the norm of a row b_x [BC] and its rstd, and for its gradient b_dn the means of b_dn and of b_dn * x."""
    # A sum over channels is a barrier of all warps, and the loop waits for these sums: two are taken at a time.
    mean_dn = 0.0
    if not RMS:
        mean, mean_dn = mean_of_both(b_x, b_dn, C)
        b_x = tl.where(m_c, b_x - mean, 0.0)
    var, mean_dn_x = mean_of_both(b_x * b_x, b_dn * b_x, C)
    rstd = tl.rsqrt(var + eps)
    return b_x * rstd, rstd, mean_dn, mean_dn_x


@triton.jit(do_not_specialize=["num_tokens"], launch_metadata=moved_bytes)
def norm_modulate_backward_kernel(
    p_grad_x_out, s_gxn,  # [N, C] or None
    p_grad_normed, s_gnn,  # [N, C], or None without a norm
    p_x, s_xn,  # [N, C], input of the norm, or None without one
    p_y, s_yn,  # [N, C] or None
    p_gate, s_gate,  # [R, C] or None
    p_scale, s_scale,  # [R, C] or None
    p_dx,  # [N, C] contiguous, or None
    p_dy,  # [N, C] contiguous, or None
    p_mod_index,  # [N] or None; not read where tiles are given
    p_order,  # [N] tokens by row, or None
    p_tiles,  # [tiles, 3] (first in order, tokens, row), or None: one row
    p_sums,  # [tiles, Q, C] float32, or None: one token a program and no row gradients
    num_tokens,
    eps,
    RMS: tl.constexpr,
    BT: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = p_y is not None
    NORM: tl.constexpr = p_x is not None
    i_tile = tl.program_id(0)
    i_r = tl.zeros([], tl.int64)
    if p_sums is None:
        first = i_tile
        count: tl.constexpr = 1
        if p_mod_index is not None:
            i_r = tl.load(p_mod_index + i_tile).to(tl.int64)
    elif p_tiles is None:
        first = i_tile * BT
        count = tl.minimum(num_tokens - first, BT)
    else:
        first = tl.load(p_tiles + 3 * i_tile)
        count = tl.load(p_tiles + 3 * i_tile + 1)
        i_r = tl.load(p_tiles + 3 * i_tile + 2).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    if GATED:
        b_gate = tl.load(p_gate + i_r * s_gate + o_c, mask=m_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
        b_dgate = tl.zeros([BC], tl.float32)
    if NORM:
        b_scale = tl.load(p_scale + i_r * s_scale + o_c, mask=m_c, other=0.0, eviction_policy="evict_last")
        b_scale = 1.0 + b_scale.to(tl.float32)
        b_dshift = tl.zeros([BC], tl.float32)
        b_dscale = tl.zeros([BC], tl.float32)

    for i in tl.range(0, count, num_stages=STAGES):
        i_n = (first + i).to(tl.int64)
        if p_order is not None:
            i_n = tl.load(p_order + first + i).to(tl.int64)
        b_g = tl.zeros([BC], tl.float32)
        if p_grad_x_out is not None:
            b_g = tl.load(p_grad_x_out + i_n * s_gxn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first")
        if GATED:
            b_y = tl.load(p_y + i_n * s_yn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first")
        if NORM:
            b_x = tl.load(p_x + i_n * s_xn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first")
            b_grad = tl.load(p_grad_normed + i_n * s_gnn + o_c, mask=m_c, other=0.0, eviction_policy="evict_first")
            b_grad = b_grad.to(tl.float32)
            b_x = b_x.to(tl.float32)
            b_dn = b_grad * b_scale
            b_n, rstd, mean_dn, mean_dn_x = _norm_and_means(b_x, b_dn, m_c, eps, RMS, C)
            b_dshift += b_grad
            b_dscale += b_grad * b_n
            b_dx = b_dn - b_n * (rstd * mean_dn_x)
            if not RMS:
                b_dx -= mean_dn
            b_g = b_g.to(tl.float32) + rstd * b_dx
            tl.store(p_dx + i_n * C + o_c, b_g.to(p_dx.dtype.element_ty), mask=m_c)
        if GATED:
            b_g = b_g.to(tl.float32)
            b_dgate += b_g * b_y.to(tl.float32)
            tl.store(p_dy + i_n * C + o_c, (b_g * b_gate).to(p_dy.dtype.element_ty), mask=m_c)

    if p_sums is not None:
        p_sums += i_tile.to(tl.int64) * (GATED + 2 * NORM) * C
        m_c = o_c < tl.where(count > 0, C, 0)
        if GATED:
            tl.store(p_sums + o_c, b_dgate, mask=m_c)
        if NORM:
            tl.store(p_sums + GATED * C + o_c, b_dshift, mask=m_c)
            tl.store(p_sums + (GATED + 1) * C + o_c, b_dscale, mask=m_c)


@triton.jit(do_not_specialize=["num_tiles"], launch_metadata=moved_bytes)
def sum_tiles_kernel(
    p_sums,  # [tiles, Q, C] float32
    p_ptr,  # [R + 1] first tile of each row, or None: row 0 has all tiles
    num_tiles,
    p_out_0, p_out_1, p_out_2,  # [R, C] contiguous; Q of them
    Q: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(1)
    i_q = tl.program_id(2)
    if p_ptr is None:
        first = 0
        end = tl.where(i_r == 0, num_tiles, 0)
    else:
        first = tl.load(p_ptr + i_r)
        end = tl.load(p_ptr + i_r + 1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_sum = tl.zeros([BC], tl.float32)
    for i_tile in range(first, end, BT):
        o_t = i_tile + tl.arange(0, BT)
        p_tile = p_sums + (o_t.to(tl.int64) * Q + i_q)[:, None] * C + o_c[None, :]  # [BT, BC]
        b_sum += tl.sum(tl.load(p_tile, mask=(o_t < end)[:, None] & m_c[None, :], other=0.0), 0)
    o_out = i_r.to(tl.int64) * C + o_c
    if i_q == 0:
        tl.store(p_out_0 + o_out, b_sum.to(p_out_0.dtype.element_ty), mask=m_c)
    if Q > 1 and i_q == 1:
        tl.store(p_out_1 + o_out, b_sum.to(p_out_1.dtype.element_ty), mask=m_c)
    if Q > 2 and i_q == 2:
        tl.store(p_out_2 + o_out, b_sum.to(p_out_2.dtype.element_ty), mask=m_c)


def launch_parameters(block: int, quantities: int, row_grads: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Return the number of warps and of pipeline stages.

    Without row gradients 32 values of a stream a thread, as in the forward. With them the sums of the tile fill the
    registers. In 16 bits, 8 warps hold three sums of 4096 channels, the next tokens are on their way to shared memory
    while one is computed, and two programs of two sums fit a multiprocessor of sm_90, where one computes while the
    other waits for its reductions: on an H100 (bfloat16, 3072 channels) 4 to 31 % faster than 16 warps, and 3 stages
    1 to 30 % faster than 2. The rest is chosen from the compiler's report, not timed: 16 warps have room for two sums
    of 8192 channels, 8 warps for three with nothing in flight.
    """
    if not row_grads or block > 8192 or (block > 4096 and quantities == 3):
        return min(max(block // 1024, 1), 32), 1
    if dtype.itemsize == 2 and block <= 4096:
        return max(block // 512, 1), 3
    return min(max(block // 256, 1), 16), 2


@dataclass(frozen=True)
class RowTiles:
    """Tokens sorted by modulation row and cut into tiles; int32 tensors on the device of mod_index."""

    order: torch.Tensor  # [N] tokens by row, ascending within a row
    # [tiles, 3]: first in order, tokens, row. The number of tiles is an upper bound; the last ones may have no tokens.
    tiles: torch.Tensor
    ptr: torch.Tensor  # [R + 1] first tile of each row


_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mod_index -> (its version, R), RowTiles


def row_tiles(mod_index: torch.Tensor, num_rows: int) -> RowTiles:
    """Return the tiles of mod_index, int32 [N] with values below num_rows; kept as long as that tensor lives."""
    key = (mod_index._version, num_rows)
    kept, tiles = _tables.get(mod_index, (None, None))
    if kept != key:
        tiles = _row_tiles(mod_index, num_rows)
        # Tensors computed during a graph capture have no values before a replay.
        if not (mod_index.is_cuda and torch.cuda.is_current_stream_capturing()):
            _tables[mod_index] = key, tiles
    return tiles


def _row_tiles(mod_index: torch.Tensor, num_rows: int) -> RowTiles:
    num_tokens = len(mod_index)
    by_row, order = torch.sort(mod_index, stable=True)
    numbers = torch.arange(num_rows + 1, dtype=torch.int32, device=mod_index.device)
    starts = torch.searchsorted(by_row, numbers, out_int32=True)  # [R + 1], in order
    counts = starts.diff()
    ptr = torch.zeros_like(starts)
    torch.cumsum((counts + (TOKENS - 1)) // TOKENS, 0, dtype=torch.int32, out=ptr[1:])
    # At most TOKENS - 1 places are left empty in each row that has tokens.
    bound = (num_tokens + min(num_rows, num_tokens) * (TOKENS - 1)) // TOKENS
    i_tile = torch.arange(bound, dtype=torch.int32, device=mod_index.device)
    row = torch.searchsorted(ptr[1:], i_tile, right=True).clamp_(max=num_rows - 1)
    first = starts[row] + (i_tile - ptr[row]) * TOKENS
    count = (starts[row + 1] - first).clamp_(0, TOKENS)
    return RowTiles(order.int(), torch.stack([first, count, row.int()], 1), ptr)


def norm_modulate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    row_grads: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients dx [N, C] and dshift, dscale [R, C] of `norm_modulate`, contiguous, in x's dtype.

    Args:
        grad: Gradient of the output [N, C]; its channels, those of x and those of scale are contiguous.
        x, scale, mod_index, eps, rms: Arguments of the forward.
        row_grads: Compute dshift and dscale; otherwise they are None.
    """
    dx = new_like(x)
    dshift, dscale = _launch(None, grad, x, None, None, scale, mod_index, dx, None, eps, rms, row_grads)
    return dx, dshift, dscale


def gate_residual_backward(
    grad: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, mod_index: torch.Tensor | None, row_grads: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients dy [N, C] and dgate [R, C] of `gate_residual`; the gradient of x is `grad` itself."""
    dy = new_like(y)
    (dgate,) = _launch(grad, None, None, y, gate, None, mod_index, None, dy, 0.0, False, row_grads)
    return dy, dgate


def gate_residual_norm_modulate_backward(
    grad_x_out: torch.Tensor,
    grad_normed: torch.Tensor,
    x_out: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    mod_index: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    row_grads: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients dx, dy [N, C] and dgate, dshift, dscale [R, C] of `gate_residual_norm_modulate`."""
    dx, dy = new_like(x_out), new_like(y)
    row = _launch(grad_x_out, grad_normed, x_out, y, gate, scale, mod_index, dx, dy, eps, rms, row_grads)
    return dx, dy, *row


def _launch(grad_x_out, grad_normed, x, y, gate, scale, mod_index, dx, dy, eps, rms, row_grads):
    """Fill dx and dy; return [dgate,] [dshift, dscale], or as many None."""
    stream, table = (y, gate) if x is None else (x, scale)
    num_tokens, channels = stream.shape
    num_rows = table.shape[0]
    check(
        mod_index, num_tokens, channels,
        grad_x_out=grad_x_out, grad_normed=grad_normed, x=x, y=y, gate=gate, scale=scale,
    )  # fmt: skip
    quantities = (y is not None) + 2 * (x is not None)
    sums = tiles = None
    programs, outputs = num_tokens, [None] * quantities
    if row_grads:
        make = torch.zeros if stream.numel() == 0 else torch.empty
        outputs = [make(num_rows, channels, dtype=stream.dtype, device=stream.device) for _ in range(quantities)]
    if stream.numel() == 0:
        return outputs
    if row_grads:
        tiles = None if mod_index is None else row_tiles(mod_index, num_rows)
        programs = triton.cdiv(num_tokens, TOKENS) if tiles is None else len(tiles.tiles)
        sums = torch.empty(programs, quantities, channels, dtype=torch.float32, device=stream.device)
    block = channel_block(channels)
    num_warps, num_stages = launch_parameters(block, quantities, row_grads, stream.dtype)
    with torch.cuda.device_of(stream):
        norm_modulate_backward_kernel[(programs,)](
            grad_x_out, row_stride(grad_x_out),
            grad_normed, row_stride(grad_normed),
            x, row_stride(x),
            y, row_stride(y),
            gate, row_stride(gate),
            scale, row_stride(scale),
            dx, dy, mod_index,
            None if tiles is None else tiles.order,
            None if tiles is None else tiles.tiles,
            sums, num_tokens, eps,
            RMS=rms, BT=TOKENS, C=channels, BC=block, STAGES=num_stages,
            num_warps=num_warps,
        )  # fmt: skip
        if row_grads:
            sum_tiles_kernel[(triton.cdiv(channels, BLOCK_CHANNELS), num_rows, quantities)](
                sums, None if tiles is None else tiles.ptr, programs, *[*outputs, None, None][:3],
                Q=quantities, C=channels, BT=BLOCK_TILES, BC=BLOCK_CHANNELS,
                num_warps=4,
            )  # fmt: skip
    return outputs
