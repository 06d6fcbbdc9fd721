"""The shared library: loading it, its instruction-set levels, and checks that its callers share."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch  # before the library is loaded: its OpenMP runtime then serves both, with one thread pool
from torch import Tensor

FOLDER = Path(__file__).parent.parent
_ABI_VERSION = 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Best first. The levels "on_avx2" run 16-lane code in AVX2 instructions: slow, but they test AVX-512 code anywhere.
_LEVELS = {"avx512bf16": 4, "avx512": 2, "avx2": 1, "generic": 0, "avx512_on_avx2": 3, "avx512bf16_on_avx2": 5}
_ADDED = {"uf_gelu": "gelu", "uf_token_rows_of": "norms with add_one=False or branch_eps"}
"""Functions that a library of an older version may lack, and what needs them."""
_STATUS = {
    1: (MemoryError, "no memory for the kernel's work buffers"),
    3: (ValueError, "q_ranges must be disjoint [start, end) rows within q"),
    4: (ValueError, "kv_ptr must rise from 0 to len(kv_ranges), a range's kv_ranges be sorted, disjoint and within k"),
    5: (ValueError, "mod_index must lie within the rows of shift, scale and gate"),
    6: (ValueError, "txt_index and img_index together must be a permutation of the joint rows"),
    7: (ValueError, "k_ranges, q_ptr and q_spans must be the transpose of q_ranges, kv_ptr and kv_ranges, ascending"),
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason."""
    found = sorted(FOLDER.glob("_native*.so"))
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
    if hasattr(library, "uf_gelu"):  # a library that was built before has the others alone
        library.uf_gelu.argtypes = [i, i, i, p, p, n, p]
    if hasattr(library, "uf_token_rows_of"):
        library.uf_token_rows_of.argtypes = [*library.uf_token_rows.argtypes, f, f]


@torch.compiler.assume_constant_result  # torch.compile would otherwise trace the search for the library
def available() -> bool:
    """Return True if the kernels can be used."""
    return _load()[0] is not None


@torch.compiler.assume_constant_result
def has_gelu() -> bool:
    """Return True if the library has GELU; one that was built by an older version does not."""
    return hasattr(_load()[0], "uf_gelu")


@torch.compiler.assume_constant_result
def has_branch_norm() -> bool:
    """Return True if the library takes `add_one` and `branch_eps`; one that was built by an older version does not."""
    return hasattr(_load()[0], "uf_token_rows_of")


def missing() -> list[str]:
    """Return what a library that was built by an older version does not have; PyTorch computes it instead."""
    library, _ = _load()
    return [] if library is None else [what for name, what in _ADDED.items() if not hasattr(library, name)]


def reason() -> str:
    """Return why the kernels cannot be used, or the instruction set in use and the possible ones."""
    library, why = _load()
    return why if library is None else f"level {levels()[0]} in use, supported: {', '.join(levels())}"


@cache
def levels() -> list[str]:
    """Return the instruction-set levels that this build has and this CPU runs, best first."""
    library, _ = _load()
    return [] if library is None else [name for name, i in _LEVELS.items() if library.uf_level_supported(i)]


def use_level(level: str | None) -> tuple[ctypes.CDLL, int]:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"native kernels: {why}")
    if level is None:
        return library, _LEVELS[levels()[0]]
    if level not in levels():
        raise ValueError(f"level {level!r} is not supported here; supported: {', '.join(levels())}")
    return library, _LEVELS[level]


def raise_for(status: int) -> None:
    if status:
        kind, message = _STATUS.get(status, (RuntimeError, f"native kernel status {status}"))
        raise kind(message)


def check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return x after checking its shape and dtype, that it is on the CPU, and that its last dimension is contiguous."""
    good = x.is_cpu and x.dtype is dtype and x.shape == shape
    if good and (x.is_contiguous() or x.stride(-1) == 1 or x.numel() == 0 or shape[-1] < 2):  # the quickest first
        return x
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}; native kernels take CPU tensors")
    if x.dtype is not dtype:
        raise ValueError(f"{name} is {x.dtype}, expected {dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")
    raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension, which must be contiguous")


def leading(name: str, x: Tensor, letters: Sequence[str]) -> tuple[torch.dtype, torch.Size]:
    """Return dtype and shape of the tensor that the others must agree with."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}; native kernels take float32 and bfloat16")
    if x.ndim != len(letters):
        raise ValueError(f"{name} has shape {list(x.shape)}, expected [{', '.join(letters)}]")
    check(name, x, x.shape, x.dtype)
    return x.dtype, x.shape


def int32(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return check(name, x, shape, torch.int32).contiguous()


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])


def strides(tensors: Sequence[Tensor | None], dims: int) -> ctypes.Array[ctypes.c_int64]:
    """Return the first `dims` strides of each tensor, zeros for None."""
    missing = (0,) * dims
    flat: list[int] = []
    for x in tensors:
        flat += missing if x is None else x.stride()[:dims]
    return (ctypes.c_int64 * len(flat))(*flat)
