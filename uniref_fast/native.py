"""CPU kernels (`csrc/`), called through ctypes: torch tensors in, torch tensors out; forward and backward.

The library is plain C++ behind a C ABI, built by `setup.py` without torch headers, so one build serves any torch. It
carries the same kernels for several instruction sets and picks the best one that this CPU runs; `level=` forces one.
float32 and bfloat16 storage, float32 arithmetic, one rounding (to nearest even) when a result is stored; where the CPU
multiplies bfloat16 itself (level avx512bf16), attention's probabilities are rounded too. No result depends on the
number of threads.

Without a compiler at install time there is no library: `available()` is then False and `reason()` says why.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch  # before the library is loaded: its OpenMP runtime then serves both, with one thread pool
from torch import Tensor

_ABI_VERSION = 2
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Best first. Those on AVX2 run 16-lane code in AVX2 instructions: slow, they test the AVX-512 levels on any machine.
_LEVELS = {"avx512bf16": 4, "avx512": 2, "avx2": 1, "generic": 0, "avx512_on_avx2": 3, "avx512bf16_on_avx2": 5}
_STATUS = {
    1: (MemoryError, "no memory for the kernel's work buffers"),
    3: (ValueError, "q_ranges must be disjoint [start, end) rows within q"),
    4: (ValueError, "kv_ptr must rise from 0 to len(kv_ranges), a range's kv_ranges be sorted, disjoint and within k"),
    5: (ValueError, "rows must lie within the rows of shift, scale and gate"),
    6: (ValueError, "txt_index and img_index together must be a permutation of the joint rows"),
    7: (ValueError, "k_ranges, q_ptr and q_spans must be the transpose of q_ranges, kv_ptr and kv_ranges, ascending"),
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None, "not built: the installation found no working C++17 compiler (reinstall with `pip install -v`)"
    try:
        library = ctypes.CDLL(str(found[0]))
        version = library.uf_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{found[0].name} does not load: {error}"
    if version != _ABI_VERSION:
        return None, f"{found[0].name} is of another version ({version}, not {_ABI_VERSION}): reinstall"
    _declare(library)
    return library, ""


def _declare(library: ctypes.CDLL) -> None:
    p: Any = ctypes.c_void_p
    n, i, f = ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.uf_level_supported.argtypes = [i]
    library.uf_segment_attention.argtypes = [i, i, i] + [p, n, n] * 3 + [n, n, n, n] + [p, n, p, p, n] + [f, p, p]
    library.uf_segment_attention_backward.argtypes = [i, i, i, p, p, p, n, n, n, n] + [p, n, p, p, n] * 2 + [f, p, p, p]
    library.uf_qk_norm_rope.argtypes = [i, i, i, p, p, p, p, p, p, p, n, n, f, i, p, p, p]
    library.uf_qk_norm_rope_backward.argtypes = [i, i, i, p, p, p, p, p, p, p, n, n, f, p, p]
    library.uf_token_rows.argtypes = [i, i, i] + [p, n] * 5 + [p, n, n, n, f, i, i, p, p]
    library.uf_token_rows_backward.argtypes = [i, i, i, p, p, p, n, n, n, f, i, p]
    library.uf_copy_patches.argtypes = [i, i, i, p, n, n, p]
    library.uf_copy_patches.restype = None


@torch.compiler.assume_constant_result  # torch.compile would otherwise trace the search for the library
def available() -> bool:
    """Whether the kernels can be used."""
    return _load()[0] is not None


def reason() -> str:
    """Why the kernels cannot be used, or which instruction set is in use and which are possible."""
    library, why = _load()
    return why if library is None else f"level {levels()[0]} in use, supported: {', '.join(levels())}"


@cache
def levels() -> list[str]:
    """Instruction-set levels that this build has and this CPU runs, best first; empty if not available."""
    library, _ = _load()
    return [] if library is None else [name for name, i in _LEVELS.items() if library.uf_level_supported(i)]


def _library(level: str | None) -> tuple[ctypes.CDLL, int]:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"native kernels: {why}")
    if level is None:
        return library, _LEVELS[levels()[0]]
    if level not in levels():
        raise ValueError(f"level {level!r} is not supported here; supported: {', '.join(levels())}")
    return library, _LEVELS[level]


def _raise_for(status: int) -> None:
    if status:
        kind, message = _STATUS.get(status, (RuntimeError, f"native kernel status {status}"))
        raise kind(message)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU, of this shape and dtype, last dimension contiguous."""
    if x.is_cpu and x.dtype is dtype and x.shape == shape and (shape[-1] < 2 or x.stride(-1) == 1):
        return x
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}; native kernels take CPU tensors")
    if x.dtype is not dtype:
        raise ValueError(f"{name} is {x.dtype}, expected {dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")
    raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension, which must be contiguous")


def _leading(name: str, x: Tensor, letters: Sequence[str]) -> tuple[torch.dtype, torch.Size]:
    """dtype and shape of the tensor that the others must agree with."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} is {x.dtype}; native kernels take float32 and bfloat16")
    if x.ndim != len(letters):
        raise ValueError(f"{name} has shape {list(x.shape)}, expected [{', '.join(letters)}]")
    _check(name, x, x.shape, x.dtype)
    return x.dtype, x.shape


def _int32(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return _check(name, x, shape, torch.int32).contiguous()


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def _strides(tensors: Sequence[Tensor | None], dims: int) -> ctypes.Array[ctypes.c_int64]:
    """The first `dims` strides of each, zeros for None."""
    strides = [stride for x in tensors for stride in ((0,) * dims if x is None else x.stride()[:dims])]
    return (ctypes.c_int64 * len(strides))(*strides)


def _table(names: tuple[str, str, str], ranges: Tensor, ptr: Tensor, intervals: Tensor) -> tuple[Tensor, ...]:
    """The three tensors of a plan, or of its transpose."""
    return (
        _int32(names[0], ranges, (len(ranges), 2)),
        _int32(names[1], ptr, (len(ranges) + 1,)),
        _int32(names[2], intervals, (len(intervals), 2)),
    )


def _table_arguments(table: tuple[Tensor, ...]) -> tuple[int, ...]:
    ranges, ptr, intervals = table
    return ranges.data_ptr(), len(ranges), ptr.data_ptr(), intervals.data_ptr(), len(intervals)


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
    """`softmax(scale * q k^T) v`, range r's queries seeing the key rows of `kv_ranges[kv_ptr[r]:kv_ptr[r + 1]]`.

    q [Nq, H, D], k and v [Nk, H, D], D a multiple of 8; q_ranges int32 [R, 2], kv_ptr int32 [R + 1], kv_ranges int32
    [M, 2], half-open. Returns out [Nq, H, D] and lse float32 [H, Nq] (natural logarithm). Queries without keys give
    0 and -inf. A query's bits depend on its own row and its own keys only: not on what else is packed, nor on threads.
    """
    library, level_id = _library(level)
    dtype, (queries, heads, dim), keys = _attention_shapes(q, k, v)
    plan = _table(("q_ranges", "kv_ptr", "kv_ranges"), q_ranges, kv_ptr, kv_ranges)
    out = torch.empty((queries, heads, dim), dtype=dtype)
    lse = torch.empty((heads, queries), dtype=torch.float32)
    status = library.uf_segment_attention(
        level_id, torch.get_num_threads(), _DTYPES[dtype],
        q.data_ptr(), q.stride(0), q.stride(1),
        k.data_ptr(), k.stride(0), k.stride(1),
        v.data_ptr(), v.stride(0), v.stride(1),
        queries, keys, heads, dim, *_table_arguments(plan),
        scale, out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    _raise_for(status)
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
    """Gradients of `segment_attention` for its q, k, v, from its `out` and `lse`.

    grad_out [Nq, H, D] in q's dtype; k_ranges int32 [Rk, 2], q_ptr int32 [Rk + 1], q_spans int32 [Ms, 2]: the plan's
    transpose, for each range of key rows the query ranges that see it, ascending. Returns dq [Nq, H, D], dk and dv
    [Nk, H, D], contiguous, 0 for queries without keys and for keys that nobody sees. A row's bits depend only on the
    rows that are, directly or through others, visible to each other: not on what else is packed, nor on threads. Needs
    `Nq * H * (D + 1)` floats of memory.
    """
    library, level_id = _library(level)
    dtype, (queries, heads, dim), keys = _attention_shapes(q, k, v)
    _check("grad_out", grad_out, (queries, heads, dim), dtype)
    _check("out", out, (queries, heads, dim), dtype)
    lse = _check("lse", lse, (heads, queries), torch.float32).contiguous()
    plan = _table(("q_ranges", "kv_ptr", "kv_ranges"), q_ranges, kv_ptr, kv_ranges)
    transpose = _table(("k_ranges", "q_ptr", "q_spans"), k_ranges, q_ptr, q_spans)
    grads = [torch.empty((n, heads, dim), dtype=dtype) for n in (queries, keys, keys)]
    views = (grad_out, q, k, v, out)
    status = library.uf_segment_attention_backward(
        level_id, torch.get_num_threads(), _DTYPES[dtype], _pointers(views), _strides(views, 2), lse.data_ptr(),
        queries, keys, heads, dim, *_table_arguments(plan), *_table_arguments(transpose),
        scale, *(x.data_ptr() for x in grads),
    )  # fmt: skip
    _raise_for(status)
    return grads[0], grads[1], grads[2]


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.dtype, torch.Size, int]:
    """dtype, shape of q, number of keys."""
    dtype, shape = _leading("q", q, "NHD")
    _, heads, dim = shape
    if dim % 8 or dim == 0:
        raise ValueError(f"head dimension {dim} is not a multiple of 8")
    _check("k", k, (len(k), heads, dim), dtype)
    _check("v", v, (len(k), heads, dim), dtype)
    return dtype, shape, len(k)


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
    """RMSNorm per head and interleaved rotary embedding of q and k, written with v into the joint sequence.

    Streams [Nt, H, D] and [Ni, H, D]; weights [D] or None (no norm); cos and sin float32 [N, D / 2] by joint row;
    txt_index int32 [Nt] and img_index int32 [Ni]: each token's joint row, together a permutation. Returns q, k, v
    [N, H, D]. `x * rsqrt(mean(x^2) + eps) * w`, then `(x0, x1) -> (x0 c - x1 s, x0 s + x1 c)` on neighbouring pairs.
    eager_rounding rounds the normalised head before and after the weight, as PyTorch does in 16 bits.
    """
    library, level_id = _library(level)
    streams = (txt_q, img_q, txt_k, img_k, txt_v, img_v)
    dtype, (total, heads, dim) = _stream_shapes(streams, ("txt_q", "img_q", "txt_k", "img_k", "txt_v", "img_v"))
    cos, sin, index, weights = _rope_tables(
        cos, sin, txt_index, img_index, (txt_wq, img_wq, txt_wk, img_wk), (len(txt_q), len(img_q)), dim
    )
    out = [torch.empty((total, heads, dim), dtype=dtype) for _ in range(3)]
    status = library.uf_qk_norm_rope(
        level_id, torch.get_num_threads(), _DTYPES[dtype], _pointers(streams), _strides(streams, 2),
        _pointers(weights), _pointers(index), (ctypes.c_int64 * 2)(len(txt_q), len(img_q)),
        cos.data_ptr(), sin.data_ptr(), heads, dim, eps, eager_rounding, *(x.data_ptr() for x in out),
    )  # fmt: skip
    _raise_for(status)
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
    """Gradients of `qk_norm_rope`: of txt_q, txt_k, txt_v, img_q, img_k, img_v, txt_wq, txt_wk, img_wq, img_wk.

    dq, dk, dv [N, H, D] by joint row. The streams' gradients are contiguous; a weight's is [D] in its dtype, summed in
    float32 over tokens and heads, None without that weight or with weight_grads=False.
    """
    library, level_id = _library(level)
    inputs = (txt_q, img_q, txt_k, img_k)
    dtype, (total, heads, dim) = _stream_shapes(inputs, ("txt_q", "img_q", "txt_k", "img_k"))
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        _check(name, x, (total, heads, dim), dtype)
    given = (txt_wq, img_wq, txt_wk, img_wk)
    tokens = (len(txt_q), len(img_q))
    cos, sin, index, weights = _rope_tables(cos, sin, txt_index, img_index, given, tokens, dim)
    grads = [torch.empty((n, heads, dim), dtype=dtype) for _ in range(3) for n in tokens]
    sums = [None if w is None or not weight_grads else torch.empty(dim) for w in weights]
    views = (dq, dk, dv, *inputs)
    status = library.uf_qk_norm_rope_backward(
        level_id, torch.get_num_threads(), _DTYPES[dtype], _pointers(views), _strides(views, 2),
        _pointers(weights), _pointers(index), (ctypes.c_int64 * 2)(*tokens),
        cos.data_ptr(), sin.data_ptr(), heads, dim, eps, _pointers(grads), _pointers(sums),
    )  # fmt: skip
    _raise_for(status)
    d_weights = [None if x is None or w is None else x.to(w.dtype) for x, w in zip(sums, given, strict=True)]
    return (*grads[0::2], *grads[1::2], *d_weights[0::2], *d_weights[1::2])


def _stream_shapes(streams: Sequence[Tensor], names: Sequence[str]) -> tuple[torch.dtype, tuple[int, int, int]]:
    """dtype and [N, H, D] of the joint sequence, of streams in the order text, image, text, image, .."""
    dtype, (_, heads, dim) = _leading(names[1], streams[1], "NHD")
    if dim % 2:
        raise ValueError(f"head dimension {dim} is odd; rotary embedding takes pairs")
    for i, (name, x) in enumerate(zip(names, streams, strict=True)):
        _check(name, x, (len(streams[i % 2]), heads, dim), dtype)
    return dtype, (len(streams[0]) + len(streams[1]), heads, dim)


def _rope_tables(
    cos: Tensor,
    sin: Tensor,
    txt_index: Tensor,
    img_index: Tensor,
    weights: Sequence[Tensor | None],
    tokens: tuple[int, int],
    dim: int,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor | None]]:
    """Checked and contiguous: cos, sin, the two indices, the weights in float32."""
    cos = _check("cos", cos, (sum(tokens), dim // 2), torch.float32).contiguous()
    sin = _check("sin", sin, (sum(tokens), dim // 2), torch.float32).contiguous()
    index = [_int32("txt_index", txt_index, (tokens[0],)), _int32("img_index", img_index, (tokens[1],))]
    names = ("txt_wq", "img_wq", "txt_wk", "img_wk")
    wide = [None if w is None else _weight(name, w, dim) for name, w in zip(names, weights, strict=True)]
    return cos, sin, index, wide


def _weight(name: str, w: Tensor, dim: int) -> Tensor:
    dtype, _ = _leading(name, w, "D")
    return _check(name, w, (dim,), dtype).to(torch.float32)


def _modulation_rows(modulation: dict[str, Tensor | None], dtype: torch.dtype, channels: int) -> int:
    """The number of rows that gate, shift and scale have."""
    given = [(name, m) for name, m in modulation.items() if m is not None]
    for name, m in given:
        _check(name, m, (len(given[0][1]), channels), dtype)
    return len(given[0][1])


def _token_rows(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    eps: float,
    rms: bool,
    eager_rounding: bool,
    level: str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """x_out (with a gate) and normed (with a scale)."""
    library, level_id = _library(level)
    dtype, (tokens, channels) = _leading("x", x, "NC")
    if y is not None:
        _check("y", y, (tokens, channels), dtype)
    n_rows = _modulation_rows({"gate": gate, "shift": shift, "scale": scale}, dtype, channels)
    if rows is not None:
        rows = _int32("rows", rows, (tokens,))
    x_out = None if gate is None else torch.empty((tokens, channels), dtype=dtype)
    normed = None if scale is None else torch.empty((tokens, channels), dtype=dtype)
    views = [v for t in (x, y, gate, shift, scale) for v in ((None, 0) if t is None else (t.data_ptr(), t.stride(0)))]
    status = library.uf_token_rows(
        level_id, torch.get_num_threads(), _DTYPES[dtype], *views,
        None if rows is None else rows.data_ptr(), n_rows, tokens, channels, eps, rms, eager_rounding,
        None if x_out is None else x_out.data_ptr(), None if normed is None else normed.data_ptr(),
    )  # fmt: skip
    _raise_for(status)
    return x_out, normed


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    rms: bool = False,
    eager_rounding: bool = False,
    *,
    level: str | None = None,
) -> Tensor:
    """`norm(x) * (1 + scale[row]) + shift[row]`: x [N, C]; shift, scale [R, C]; rows int32 [N], None: row 0.

    The norm is LayerNorm, or with `rms` division by the root of the mean square; shift=None adds nothing.
    eager_rounding rounds norm, 1 + scale and product to x's dtype, as PyTorch does one operation at a time.
    """
    normed = _token_rows(x, None, None, shift, scale, rows, eps, rms, eager_rounding, level)[1]
    assert normed is not None
    return normed


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    rms: bool = False,
    eager_rounding: bool = False,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`x_out = x + gate[row] * y`, rounded to x's dtype, and `norm_modulate` of that: x, y [N, C]; the rest [R, C]."""
    x_out, normed = _token_rows(x, y, gate, shift, scale, rows, eps, rms, eager_rounding, level)
    assert x_out is not None and normed is not None
    return x_out, normed


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    rows: Tensor | None,
    eager_rounding: bool = False,
    *,
    level: str | None = None,
) -> Tensor:
    """`x + gate[row] * y`: x, y [N, C]; gate [R, C]; rows int32 [N], None: row 0. eager_rounding rounds the product."""
    x_out = _token_rows(x, y, gate, None, None, rows, 0.0, False, eager_rounding, level)[0]
    assert x_out is not None
    return x_out


def _token_rows_backward(
    grad_x: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    eps: float,
    rms: bool,
    row_grads: bool,
    level: str | None,
) -> tuple[Tensor | None, ...]:
    """dx, dy, dgate, dshift, dscale: the first and the last two with a scale, the others with a gate."""
    library, level_id = _library(level)
    tensors = {"grad_x_out": grad_x, "grad_normed": grad_normed, "x": x, "y": y}
    present = [(name, t) for name, t in tensors.items() if t is not None]
    dtype, (tokens, channels) = _leading(*present[0], "NC")
    for name, t in present:
        _check(name, t, (tokens, channels), dtype)
    n_rows = _modulation_rows({"gate": gate, "scale": scale}, dtype, channels)
    if rows is not None:
        rows = _int32("rows", rows, (tokens,))
    shapes = ((tokens, channels), (n_rows, channels))
    wanted = (scale is not None, gate is not None)
    dx, dy = (torch.empty(shapes[0], dtype=dtype) if part else None for part in wanted)
    dgate, dshift, dscale = (
        torch.empty(shapes[1], dtype=dtype) if row_grads and wanted[part] else None for part in (1, 0, 0)
    )
    inputs = (grad_x, grad_normed, x, y, gate, scale)
    outs = (dx, dy, dgate, dshift, dscale)
    status = library.uf_token_rows_backward(
        level_id, torch.get_num_threads(), _DTYPES[dtype], _pointers(inputs), _strides(inputs, 1),
        None if rows is None else rows.data_ptr(), n_rows, tokens, channels, eps, rms, _pointers(outs),
    )  # fmt: skip
    _raise_for(status)
    return outs


def norm_modulate_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    rms: bool = False,
    row_grads: bool = True,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `norm_modulate`: dx [N, C], dshift and dscale [R, C], all in x's dtype.

    The gradients of shift and scale are summed in float32, a row's over its own tokens in their order, and 0 for a row
    that no token has; row_grads=False leaves them out.
    """
    outs = _token_rows_backward(None, grad, x, None, None, scale, rows, eps, rms, row_grads, level)
    assert outs[0] is not None
    return outs[0], outs[3], outs[4]


def gate_residual_backward(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    rows: Tensor | None,
    row_grads: bool = True,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gate_residual` for y [N, C] and gate [R, C] (as in `norm_modulate_backward`); x's is `grad`."""
    outs = _token_rows_backward(grad, None, None, y, gate, None, rows, 0.0, False, row_grads, level)
    assert outs[1] is not None
    return outs[1], outs[2]


def gate_residual_norm_modulate_backward(
    grad_x_out: Tensor,
    grad_normed: Tensor,
    x_out: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    rms: bool = False,
    row_grads: bool = True,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `gate_residual_norm_modulate`: dx, dy [N, C], dgate, dshift, dscale [R, C], as in its parts."""
    outs = _token_rows_backward(grad_x_out, grad_normed, x_out, y, gate, scale, rows, eps, rms, row_grads, level)
    dx, dy, dgate, dshift, dscale = outs
    assert dx is not None and dy is not None
    return dx, dy, dgate, dshift, dscale


def _latent_table(latents: Sequence[Tensor], starts: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Nine integers each, `struct Latent` of csrc/patches.cpp."""
    table = [
        entry
        for x, start in zip(latents, starts, strict=True)
        for entry in (x.data_ptr(), start, x.shape[1], x.shape[2] // 2, x.shape[3] // 2, *x.stride())
    ]
    return (ctypes.c_int64 * len(table))(*table)


def _check_starts(starts: Sequence[int], lengths: Sequence[int], total: int) -> None:
    """Disjoint and within the stream."""
    end = 0
    for start, length in sorted(zip(starts, lengths, strict=True)):
        if start < end or start + length > total:
            raise ValueError(f"rows [{start}, {start + length}) overlap another latent or leave the {total} rows")
        end = start + length


def pack(latents: Sequence[Tensor], starts: Sequence[int], total: int) -> Tensor:
    """Latents [C, F, h, w] (h, w even, any strides) -> stream [total, 4 C] of 2x2 patches, channel order (c, dy, dx).

    Latent i fills rows starts[i] onwards with its F (h/2) (w/2) tokens, ordered frame, row, column; other rows are 0.
    """
    library, _ = _library(None)
    if not latents:
        raise ValueError("pack needs at least one latent")
    if len(starts) != len(latents):
        raise ValueError(f"{len(latents)} latents but {len(starts)} starts")
    dtype, channels = latents[0].dtype, len(latents[0])
    if dtype not in _DTYPES:
        raise ValueError(f"latents[0] is {dtype}; native kernels take float32 and bfloat16")
    for i, x in enumerate(latents):
        if x.ndim != 4 or x.shape[0] != channels or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"latents[{i}] has shape {list(x.shape)}, expected [{channels}, F, even, even]")
        if x.dtype is not dtype or not x.is_cpu:
            raise ValueError(f"latents[{i}] is {x.dtype} on {x.device}, expected {dtype} on cpu")
    lengths = [x.shape[1] * x.shape[2] * x.shape[3] // 4 for x in latents]
    _check_starts(starts, lengths, total)
    new = torch.empty if sum(lengths) == total else torch.zeros
    stream = new((total, 4 * channels), dtype=dtype)
    library.uf_copy_patches(
        torch.get_num_threads(), dtype.itemsize, 0, _latent_table(latents, starts), len(latents), channels,
        stream.data_ptr(),
    )  # fmt: skip
    return stream


def unpack(
    stream: Tensor,
    starts: Sequence[int],
    grids: Sequence[tuple[int, int, int]],
    channels: int,
) -> list[Tensor]:
    """The inverse of `pack`: stream [total, 4 C] and token grids (F, gh, gw) -> latents [C, F, 2 gh, 2 gw]."""
    library, _ = _library(None)
    dtype, (total, _) = _leading("stream", stream, ["N", "4 C"])
    stream = _check("stream", stream, (total, 4 * channels), dtype).contiguous()
    if len(starts) != len(grids):
        raise ValueError(f"{len(grids)} grids but {len(starts)} starts")
    for start, (f, gh, gw) in zip(starts, grids, strict=True):
        if min(start, f, gh, gw) < 0 or start + f * gh * gw > total:
            raise ValueError(f"rows [{start}, {start + f * gh * gw}) leave the stream's {total} rows")
    latents = [torch.empty((channels, f, 2 * gh, 2 * gw), dtype=dtype) for f, gh, gw in grids]
    library.uf_copy_patches(
        torch.get_num_threads(), dtype.itemsize, 1, _latent_table(latents, starts), len(latents), channels,
        stream.data_ptr(),
    )  # fmt: skip
    return latents
