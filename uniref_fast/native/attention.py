"""`segment_attention` and its gradients."""

import torch
from torch import Tensor

from uniref_fast.native.library import DTYPES, check, int32, leading, pointers, raise_for, strides, use_level


def _table(names: tuple[str, str, str], ranges: Tensor, ptr: Tensor, intervals: Tensor) -> tuple[Tensor, ...]:
    """Return the three tensors of a plan, or of its transpose, after checks."""
    count = ranges.shape[0]
    return (
        int32(names[0], ranges, (count, 2)),
        int32(names[1], ptr, (count + 1,)),
        int32(names[2], intervals, (intervals.shape[0], 2)),
    )


def _table_arguments(table: tuple[Tensor, ...]) -> tuple[int, ...]:
    ranges, ptr, intervals = table
    return ranges.data_ptr(), ranges.shape[0], ptr.data_ptr(), intervals.data_ptr(), intervals.shape[0]


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    kv_ptr: Tensor,
    kv_ranges: Tensor,
    scale: float,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `softmax(scale * q k^T) v`; queries of range r see the key rows of `kv_ranges[kv_ptr[r]:kv_ptr[r + 1]]`.

    q [Nq, H, D], k and v [Nk, H, D], D a multiple of 8; q_ranges int32 [R, 2], kv_ptr int32 [R + 1], kv_ranges int32
    [M, 2], half-open. An interval with a start of -1 - s is causal: it starts at s, is as long as its range, and query
    i of the range sees its keys up to i. Returns out [Nq, H, D] and lse float32 [H, Nq] (natural logarithm). Queries
    without keys give 0 and -inf. A query's bits depend on its own row and its own keys only: not on the rest of the
    pack, nor on threads.
    """
    lib, level_id = use_level(level)
    dtype, (queries, heads, dim), keys = _attention_shapes(q, k, v)
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    plan = _table(("q_ranges", "kv_ptr", "kv_ranges"), q_ranges, kv_ptr, kv_ranges)
    out = torch.empty((queries, heads, dim), dtype=dtype, device="cpu")
    lse = torch.empty((heads, queries), dtype=torch.float32, device="cpu")
    status = lib.uf_segment_attention(
        level_id, torch.get_num_threads(), DTYPES[dtype],
        q.data_ptr(), q.stride(0), q.stride(1),
        k.data_ptr(), k.stride(0), k.stride(1),
        v.data_ptr(), v.stride(0), v.stride(1),
        queries, keys, heads, dim, *_table_arguments(plan),
        scale, out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    raise_for(status)
    return out, lse


def segment_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_ranges: Tensor,
    kv_ptr: Tensor,
    kv_ranges: Tensor,
    k_ranges: Tensor,
    q_ptr: Tensor,
    q_spans: Tensor,
    scale: float,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `segment_attention` for its q, k, v, from its `out` and `lse`.

    grad_out [Nq, H, D] in q's dtype; k_ranges int32 [Rk, 2], q_ptr int32 [Rk + 1], q_spans int32 [Ms, 2]: the plan's
    transpose, for each range of key rows the query ranges that see it, ascending. Returns dq [Nq, H, D], dk and dv
    [Nk, H, D], contiguous, 0 for queries without keys and for keys that no query sees. A row's bits depend only on the
    rows that are, directly or through others, visible to each other: not on the rest of the pack, nor on threads. Needs
    `Nq * H * (D + 1)` floats of memory.
    """
    lib, level_id = use_level(level)
    dtype, (queries, heads, dim), keys = _attention_shapes(q, k, v)
    check("grad_out", grad_out, (queries, heads, dim), dtype)
    check("out", out, (queries, heads, dim), dtype)
    lse = check("lse", lse, (heads, queries), torch.float32).contiguous()
    plan = _table(("q_ranges", "kv_ptr", "kv_ranges"), q_ranges, kv_ptr, kv_ranges)
    transpose = _table(("k_ranges", "q_ptr", "q_spans"), k_ranges, q_ptr, q_spans)
    grads = [torch.empty((n, heads, dim), dtype=dtype, device="cpu") for n in (queries, keys, keys)]
    views = (grad_out, q, k, v, out)
    status = lib.uf_segment_attention_backward(
        level_id, torch.get_num_threads(), DTYPES[dtype], pointers(views), strides(views, 2), lse.data_ptr(),
        queries, keys, heads, dim, *_table_arguments(plan), *_table_arguments(transpose),
        scale, *(x.data_ptr() for x in grads),
    )  # fmt: skip
    raise_for(status)
    return grads[0], grads[1], grads[2]


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.dtype, torch.Size, int]:
    """Return the dtype, the shape of q and the number of keys."""
    dtype, shape = leading("q", q, "NHD")
    _, heads, dim = shape
    if dim % 8 or dim == 0:
        raise ValueError(f"head dimension {dim} is not a multiple of 8")
    keys = k.shape[0]
    check("k", k, (keys, heads, dim), dtype)
    check("v", v, (keys, heads, dim), dtype)
    return dtype, shape, keys
