"""The forward of `segment_attention` for Hopper: keys and values through TMA, in a warp-specialised loop.

One warp group copies tiles of k and v into shared memory, two compute 64 query rows each (12 warps, setmaxnreg, no
spills). On an H100 its results are right, although ptxas 12.8, which comes with Triton 3.6, is reported to miscompile
some such kernels. It is at best 3 % slower than the portable kernel there, so nothing picks it; `bench/autotune.py`
tries it on every Hopper GPU.

What Triton 3.6 specialises decides the shape of the kernel: four warps, all operands through device descriptors made
outside of the loop, one loop, and no matmul beside it (with one the loop is silently not specialised, or fails to
compile). TMA cannot mask rows, and a row of another sample must not be multiplied even by 0, as 0 * inf is NaN. So the
last tile of an interval is moved back to end with it: it overlaps the tile before, whose keys score -inf in it. That
needs intervals of at least a tile; query ranges with a shorter one are left to the portable kernel.
"""

from __future__ import annotations

import contextvars
import math

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.segment_attention_config import AttentionConfig

NUM_WARPS = 4  # with any other number the loop is silently not specialised
NUM_STAGES = 2


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def hopper_kernel(
    p_q, s_qn, s_qh, num_queries,  # [Nq, H, D]
    p_k, s_kn, s_kh,  # [Nk, H, D]
    p_v, s_vn, s_vh, num_keys,  # [Nk, H, D]
    p_out, s_on, s_oh,  # [Nq, H, D]
    p_lse,  # [H, Nq]
    p_q_ranges,  # [R, 2]
    p_key_ptr,  # [R + 1]
    p_key_tiles,  # [F, 2]
    p_tiles,  # [T, 2]
    qk_scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_r = tl.load(p_tiles + 2 * i_tile)
    first_row = tl.load(p_tiles + 2 * i_tile + 1)
    rows_left = tl.load(p_q_ranges + 2 * i_r + 1) - first_row
    d_q = tl.make_tensor_descriptor(p_q + i_h * s_qh, [num_queries, D], [s_qn, 1], [BM, D])
    d_k = tl.make_tensor_descriptor(p_k + i_h * s_kh, [num_keys, D], [s_kn, 1], [BN, D])
    d_v = tl.make_tensor_descriptor(p_v + i_h * s_vh, [num_keys, D], [s_vn, 1], [BN, D])

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    # Rows past the range belong to others. They meet nothing but their own row of the result, which is not stored.
    b_q = d_q.load([first_row, 0])  # [BM, D]
    b_acc = tl.zeros([BM, D], dtype=tl.float32)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    for i in tl.range(tl.load(p_key_ptr + i_r), tl.load(p_key_ptr + i_r + 1), warp_specialize=True):
        start = tl.load(p_key_tiles + 2 * i)
        seen = tl.load(p_key_tiles + 2 * i + 1)
        b_k = d_k.load([start, 0])  # [BN, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
        b_s = tl.where(o_n[None, :] >= seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)  # [BM], finite: a tile has at least one new key
        b_p = tl.exp2(b_s * qk_scale - b_new[:, None])  # [BM, BN]
        b_alpha = tl.exp2(b_max - b_new)  # [BM], 0 at the first tile
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_v = d_v.load([start, 0])  # [BN, D]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")  # [BM, D]
        b_max = b_new

    m_m = o_m < rows_left
    row = first_row.to(tl.int64)
    b_lse = b_max * 0.6931471805599453 + tl.log(b_sum)  # [BM], from base 2 to natural
    p_out += row * s_on + i_h * s_oh
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)  # [BM, D]
    tl.store(p_out + o_m[:, None] * s_on + o_d[None, :], b_out, mask=m_m[:, None])
    tl.store(p_lse + i_h * num_queries + row + o_m, b_lse, mask=m_m)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors that a launch makes on the device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_ranges: torch.Tensor,
    tiles: torch.Tensor,
    key_ptr: torch.Tensor,
    key_tiles: torch.Tensor,
    scale: float,
    config: AttentionConfig,
) -> None:
    """Write the rows of `out` and `lse` that `tiles` name; the tables come from `AttentionPlan.whole_tiles`."""
    assert q.element_size() == 2 or q.device.type == "cpu", f"{q.dtype} is not specialised; interpreted it runs"
    for name, x in (("q", q), ("k", k), ("v", v)):
        aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2]) and x.data_ptr() % 16 == 0
        assert aligned, f"TMA needs {name} aligned to 16 bytes, rows and heads too; strides {x.stride()} of {x.dtype}"
    arguments = (
        q, q.stride(0), q.stride(1), q.shape[0],
        k, k.stride(0), k.stride(1),
        v, v.stride(0), v.stride(1), k.shape[0],
        out, out.stride(0), out.stride(1),
        lse, q_ranges, key_ptr, key_tiles, tiles, scale * math.log2(math.e),
    )  # fmt: skip

    def run() -> None:
        triton.set_allocator(_allocate)
        hopper_kernel[(tiles.shape[0], q.shape[1])](
            *arguments, D=q.shape[2], BM=config.BLOCK_M, BN=config.hopper_keys,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip

    # The allocator is a context variable: a copy of the context leaves the caller's as it is.
    contextvars.copy_context().run(run)
