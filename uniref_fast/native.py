"""CPU kernels (`csrc/`), called through ctypes: torch tensors in, torch tensors out, forward only.

The library is plain C++ behind a C ABI, built by `setup.py` without torch headers, so one build serves any torch. It
carries the same kernels for several instruction sets and picks the best one that this CPU runs; `level=` forces one.
float32 and bfloat16 storage, float32 arithmetic, one rounding (to nearest even) when a result is stored.

Without a compiler at install time there is no library: `available()` is then False and `reason()` says why.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch  # before the library is loaded: its OpenMP runtime then serves both, with one thread pool
from torch import Tensor

_ABI_VERSION = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Best first. avx512_on_avx2 runs the 16-lane code in AVX2 instructions: slow, it tests AVX-512 logic on any machine.
_LEVELS = {"avx512": 2, "avx2": 1, "generic": 0, "avx512_on_avx2": 3}
_STATUS = {
    1: (MemoryError, "no memory for the kernel's work buffers"),
    3: (ValueError, "q_ranges must be disjoint [start, end) rows within q"),
    4: (ValueError, "kv_ptr must rise from 0 to len(kv_ranges), a range's kv_ranges be sorted, disjoint and within k"),
    5: (ValueError, "rows must lie within the rows of shift, scale and gate"),
    6: (ValueError, "txt_index and img_index together must be a permutation of the joint rows"),
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
    library.uf_qk_norm_rope.argtypes = [i, i, i, p, p, p, p, p, p, p, n, n, f, p, p, p]
    library.uf_token_rows.argtypes = [i, i, i] + [p, n] * 5 + [p, n, n, n, f, p, p]
    library.uf_copy_patches.argtypes = [i, i, i, p, n, n, p]
    library.uf_copy_patches.restype = None


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
    dtype, (queries, heads, dim) = _leading("q", q, "NHD")
    if dim % 8 or dim == 0:
        raise ValueError(f"head dimension {dim} is not a multiple of 8")
    keys = len(k)
    _check("k", k, (keys, heads, dim), dtype)
    _check("v", v, (keys, heads, dim), dtype)
    q_ranges = _int32("q_ranges", q_ranges, (len(q_ranges), 2))
    kv_ptr = _int32("kv_ptr", kv_ptr, (len(q_ranges) + 1,))
    kv_ranges = _int32("kv_ranges", kv_ranges, (len(kv_ranges), 2))
    out = torch.empty((queries, heads, dim), dtype=dtype)
    lse = torch.empty((heads, queries), dtype=torch.float32)
    status = library.uf_segment_attention(
        level_id, torch.get_num_threads(), _DTYPES[dtype],
        q.data_ptr(), q.stride(0), q.stride(1),
        k.data_ptr(), k.stride(0), k.stride(1),
        v.data_ptr(), v.stride(0), v.stride(1),
        queries, keys, heads, dim,
        q_ranges.data_ptr(), len(q_ranges), kv_ptr.data_ptr(), kv_ranges.data_ptr(), len(kv_ranges),
        scale, out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    _raise_for(status)
    return out, lse


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
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm per head and interleaved rotary embedding of q and k, written with v into the joint sequence.

    Streams [Nt, H, D] and [Ni, H, D]; weights [D] or None (no norm); cos and sin float32 [N, D / 2] by joint row;
    txt_index int32 [Nt] and img_index int32 [Ni]: each token's joint row, together a permutation. Returns q, k, v
    [N, H, D]. `x * rsqrt(mean(x^2) + eps) * w`, then `(x0, x1) -> (x0 c - x1 s, x0 s + x1 c)` on neighbouring pairs.
    """
    library, level_id = _library(level)
    dtype, (images, heads, dim) = _leading("img_q", img_q, "NHD")
    if dim % 2:
        raise ValueError(f"head dimension {dim} is odd; rotary embedding takes pairs")
    texts, total = len(txt_q), len(txt_q) + images
    for name, x in (("txt_q", txt_q), ("txt_k", txt_k), ("txt_v", txt_v)):
        _check(name, x, (texts, heads, dim), dtype)
    for name, x in (("img_k", img_k), ("img_v", img_v)):
        _check(name, x, (images, heads, dim), dtype)
    cos = _check("cos", cos, (total, dim // 2), torch.float32).contiguous()
    sin = _check("sin", sin, (total, dim // 2), torch.float32).contiguous()
    index = [_int32("txt_index", txt_index, (texts,)), _int32("img_index", img_index, (images,))]
    named = (("txt_wq", txt_wq), ("img_wq", img_wq), ("txt_wk", txt_wk), ("img_wk", img_wk))
    weights = [None if w is None else _weight(name, w, dim) for name, w in named]
    streams = (txt_q, img_q, txt_k, img_k, txt_v, img_v)
    strides = [stride for x in streams for stride in x.stride()[:2]]
    out = [torch.empty((total, heads, dim), dtype=dtype) for _ in range(3)]
    status = library.uf_qk_norm_rope(
        level_id, torch.get_num_threads(), _DTYPES[dtype],
        (ctypes.c_void_p * 6)(*(x.data_ptr() for x in streams)),
        (ctypes.c_int64 * 12)(*strides),
        (ctypes.c_void_p * 4)(*(None if w is None else w.data_ptr() for w in weights)),
        (ctypes.c_void_p * 2)(*(x.data_ptr() for x in index)),
        (ctypes.c_int64 * 2)(texts, images),
        cos.data_ptr(), sin.data_ptr(), heads, dim, eps, *(x.data_ptr() for x in out),
    )  # fmt: skip
    _raise_for(status)
    return out[0], out[1], out[2]


def _weight(name: str, w: Tensor, dim: int) -> Tensor:
    dtype, _ = _leading(name, w, "D")
    return _check(name, w, (dim,), dtype).to(torch.float32)


def _token_rows(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    eps: float,
    level: str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """x_out (with a gate) and normed (with a scale)."""
    library, level_id = _library(level)
    dtype, (tokens, channels) = _leading("x", x, "NC")
    if y is not None:
        _check("y", y, (tokens, channels), dtype)
    modulation = [(name, m) for name, m in (("gate", gate), ("shift", shift), ("scale", scale)) if m is not None]
    n_rows = len(modulation[0][1])
    for name, m in modulation:
        _check(name, m, (n_rows, channels), dtype)
    if rows is not None:
        rows = _int32("rows", rows, (tokens,))
    x_out = None if gate is None else torch.empty((tokens, channels), dtype=dtype)
    normed = None if scale is None else torch.empty((tokens, channels), dtype=dtype)
    views = [v for t in (x, y, gate, shift, scale) for v in ((None, 0) if t is None else (t.data_ptr(), t.stride(0)))]
    status = library.uf_token_rows(
        level_id, torch.get_num_threads(), _DTYPES[dtype], *views,
        None if rows is None else rows.data_ptr(), n_rows, tokens, channels, eps,
        None if x_out is None else x_out.data_ptr(), None if normed is None else normed.data_ptr(),
    )  # fmt: skip
    _raise_for(status)
    return x_out, normed


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, *, level: str | None = None
) -> Tensor:
    """`LayerNorm(x) * (1 + scale[row]) + shift[row]`: x [N, C]; shift, scale [R, C]; rows int32 [N], None: row 0."""
    normed = _token_rows(x, None, None, shift, scale, rows, eps, level)[1]
    assert normed is not None
    return normed


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`x_out = x + gate[row] * y`, rounded to x's dtype, and `norm_modulate` of that: x, y [N, C]; the rest [R, C]."""
    x_out, normed = _token_rows(x, y, gate, shift, scale, rows, eps, level)
    assert x_out is not None and normed is not None
    return x_out, normed


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None, *, level: str | None = None) -> Tensor:
    """`x + gate[row] * y`: x, y [N, C]; gate [R, C]; rows int32 [N], None: row 0."""
    x_out = _token_rows(x, y, gate, None, None, rows, 0.0, level)[0]
    assert x_out is not None
    return x_out


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
