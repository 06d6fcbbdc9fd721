"""`pack` and `unpack`."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from uniref_fast.native.library import DTYPES, check, leading, use_level


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
    lib, _ = use_level(None)
    if not latents:
        raise ValueError("pack needs at least one latent")
    if len(starts) != len(latents):
        raise ValueError(f"{len(latents)} latents but {len(starts)} starts")
    dtype, channels = latents[0].dtype, len(latents[0])
    if dtype not in DTYPES:
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
    lib.uf_copy_patches(
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
    lib, _ = use_level(None)
    dtype, (total, _) = leading("stream", stream, ["N", "4 C"])
    stream = check("stream", stream, (total, 4 * channels), dtype).contiguous()
    if len(starts) != len(grids):
        raise ValueError(f"{len(grids)} grids but {len(starts)} starts")
    for start, (f, gh, gw) in zip(starts, grids, strict=True):
        if min(start, f, gh, gw) < 0 or start + f * gh * gw > total:
            raise ValueError(f"rows [{start}, {start + f * gh * gw}) leave the stream's {total} rows")
    latents = [torch.empty((channels, f, 2 * gh, 2 * gw), dtype=dtype, device="cpu") for f, gh, gw in grids]
    lib.uf_copy_patches(
        torch.get_num_threads(), dtype.itemsize, 1, _latent_table(latents, starts), len(latents), channels,
        stream.data_ptr(),
    )  # fmt: skip
    return latents
