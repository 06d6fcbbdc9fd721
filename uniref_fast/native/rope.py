"""`qk_norm_rope` and its gradients."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from uniref_fast.native.library import DTYPES, check, int32, leading, pointers, raise_for, strides, use_level


def qk_norm_rope(
    txt_q: Tensor,
    txt_k: Tensor,
    txt_v: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    img_v: Tensor,
    txt_wq: Tensor | None,
    txt_wk: Tensor | None,
    img_wq: Tensor | None,
    img_wk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    txt_index: Tensor,
    img_index: Tensor,
    eps: float,
    eager_rounding: bool = False,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise (RMS) and rotate q and k per head, in interleaved pairs, and write them with v to the joint sequence.

    Streams [Nt, H, D] and [Ni, H, D]; weights [D] or None (no norm); cos and sin float32 [N, D / 2] by joint row;
    txt_index int32 [Nt] and img_index int32 [Ni]: each token's joint row, together a permutation. Returns q, k, v
    [N, H, D]. `x * rsqrt(mean(x^2) + eps) * w`, then `(x0, x1) -> (x0 c - x1 s, x0 s + x1 c)` on neighbouring pairs.
    eager_rounding rounds the normalised head before and after the weight, as PyTorch does in 16 bits.
    """
    lib, level_id = use_level(level)
    streams = (txt_q, img_q, txt_k, img_k, txt_v, img_v)
    dtype, (total, heads, dim) = _stream_shapes(streams, ("txt_q", "img_q", "txt_k", "img_k", "txt_v", "img_v"))
    tokens = (txt_q.shape[0], img_q.shape[0])
    cos, sin, index, weights = _rope_tables(
        cos, sin, txt_index, img_index, (txt_wq, img_wq, txt_wk, img_wk), tokens, dim
    )
    out = [torch.empty((total, heads, dim), dtype=dtype, device="cpu") for _ in range(3)]
    status = lib.uf_qk_norm_rope(
        level_id, torch.get_num_threads(), DTYPES[dtype], pointers(streams), strides(streams, 2),
        pointers(weights), pointers(index), (ctypes.c_int64 * 2)(*tokens),
        cos.data_ptr(), sin.data_ptr(), heads, dim, eps, eager_rounding, *(x.data_ptr() for x in out),
    )  # fmt: skip
    raise_for(status)
    return out[0], out[1], out[2]


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    txt_q: Tensor,
    txt_k: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    txt_wq: Tensor | None,
    txt_wk: Tensor | None,
    img_wq: Tensor | None,
    img_wk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    txt_index: Tensor,
    img_index: Tensor,
    eps: float,
    weight_grads: bool = True,
    *,
    level: str | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients for txt_q, txt_k, txt_v, img_q, img_k, img_v, txt_wq, txt_wk, img_wq, img_wk.

    dq, dk, dv [N, H, D] by joint row. The streams' gradients are contiguous; a weight's is [D] in its dtype, summed in
    float32 over tokens and heads, None without that weight or with weight_grads=False.
    """
    lib, level_id = use_level(level)
    inputs = (txt_q, img_q, txt_k, img_k)
    dtype, (total, heads, dim) = _stream_shapes(inputs, ("txt_q", "img_q", "txt_k", "img_k"))
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        check(name, x, (total, heads, dim), dtype)
    given = (txt_wq, img_wq, txt_wk, img_wk)
    tokens = (len(txt_q), len(img_q))
    cos, sin, index, weights = _rope_tables(cos, sin, txt_index, img_index, given, tokens, dim)
    grads = [torch.empty((n, heads, dim), dtype=dtype, device="cpu") for _ in range(3) for n in tokens]
    sums = [None if w is None or not weight_grads else torch.empty(dim, device="cpu") for w in weights]
    views = (dq, dk, dv, *inputs)
    status = lib.uf_qk_norm_rope_backward(
        level_id, torch.get_num_threads(), DTYPES[dtype], pointers(views), strides(views, 2),
        pointers(weights), pointers(index), (ctypes.c_int64 * 2)(*tokens),
        cos.data_ptr(), sin.data_ptr(), heads, dim, eps, pointers(grads), pointers(sums),
    )  # fmt: skip
    raise_for(status)
    d_weights = [None if x is None or w is None else x.to(w.dtype) for x, w in zip(sums, given, strict=True)]
    return (*grads[0::2], *grads[1::2], *d_weights[0::2], *d_weights[1::2])


def _stream_shapes(streams: Sequence[Tensor], names: Sequence[str]) -> tuple[torch.dtype, tuple[int, int, int]]:
    """Return dtype and [N, H, D] of the joint sequence of streams in the order text, image, text, image, ..."""
    dtype, (image, heads, dim) = leading(names[1], streams[1], "NHD")
    if dim % 2:
        raise ValueError(f"head dimension {dim} is odd; rotary embedding takes pairs")
    text = streams[0].shape[0]
    shapes = (text, heads, dim), (image, heads, dim)
    for i, (name, x) in enumerate(zip(names, streams, strict=True)):
        check(name, x, shapes[i % 2], dtype)
    return dtype, (text + image, heads, dim)


def _rope_tables(
    cos: Tensor,
    sin: Tensor,
    txt_index: Tensor,
    img_index: Tensor,
    weights: Sequence[Tensor | None],
    tokens: tuple[int, int],
    dim: int,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor | None]]:
    """Return cos, sin, the two indices and the float32 weights, checked and contiguous."""
    cos = check("cos", cos, (sum(tokens), dim // 2), torch.float32).contiguous()
    sin = check("sin", sin, (sum(tokens), dim // 2), torch.float32).contiguous()
    index = [int32("txt_index", txt_index, (tokens[0],)), int32("img_index", img_index, (tokens[1],))]
    names = ("txt_wq", "img_wq", "txt_wk", "img_wk")
    wide = [None if w is None else _weight(name, w, dim) for name, w in zip(names, weights, strict=True)]
    return cos, sin, index, wide


def _weight(name: str, w: Tensor, dim: int) -> Tensor:
    if w.dtype is torch.float32:
        return check(name, w, (dim,), torch.float32)
    dtype, _ = leading(name, w, "D")
    return check(name, w, (dim,), dtype).to(torch.float32)
