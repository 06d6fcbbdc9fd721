"""Ragged latents to one image stream and back: 2x2 patches, the packing of Flux and Qwen-Image.

A token holds a 2 x 2 patch of all channels in the order (channel, row, column); tokens follow (frame, row, column).
One read and one write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from uniref_fast.layout import Grid
from uniref_fast.ops._dispatch import choose, module, not_batched, upstream

__all__ = ["pack", "pack_reference", "unpack", "unpack_reference"]


def pack(latents: Sequence[Tensor], *, impl: str | None = None) -> Tensor:
    """Images one after another as one stream.

    Args:
        latents: each `[C, h, w]` or `[C, F, h, w]`, h and w even, one C, one dtype; at least one.
        impl: "reference", "native", "triton"; None picks by device.

    Returns:
        `[N, 4 C]`, N = sum of `F * h/2 * w/2`, in the order of the list (= the layout's image stream).
    """
    if not latents:
        raise ValueError("pack needs at least one latent")
    images = [x.unsqueeze(1) if x.ndim == 3 else x for x in latents]
    first = images[0]
    for i, x in enumerate(images):
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2 or 0 in x.shape:
            raise ValueError(
                f"latent {i} must be [C, h, w] or [C, F, h, w] with h, w even, got {list(latents[i].shape)}"
            )
        if x.shape[0] != first.shape[0] or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"latent {i} has {x.shape[0]} channels, {x.dtype}, {x.device}; latent 0 has {first.shape[0]}, "
                f"{first.dtype}, {first.device}"
            )
    impl = choose(impl, first)
    return pack_reference(images) if impl == "reference" else torch.ops.uniref_fast.pack(images, impl)


def unpack(stream: Tensor, grids: Sequence[Grid], *, impl: str | None = None) -> list[Tensor]:
    """Inverse of `pack`.

    Args:
        stream: `[N, 4 C]`.
        grids: (F, h/2, w/2) of each image, in tokens; their products sum to N.

    Returns:
        one `[C, F, h, w]` tensor an image.
    """
    total = sum(math.prod(grid) for grid in grids)
    if stream.ndim != 2 or stream.shape[0] != total or stream.shape[1] % 4:
        raise ValueError(f"stream must be [{total}, 4 C] for grids {list(grids)}, got {list(stream.shape)}")
    impl = choose(impl, stream)
    if impl == "reference":
        return unpack_reference(stream, grids)
    return torch.ops.uniref_fast.unpack(stream, [side for grid in grids for side in grid], impl)


def pack_reference(latents: Sequence[Tensor]) -> Tensor:
    """The specification."""
    return torch.cat(
        [
            x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(0, 2)
            for x in latents
        ]
    )


def unpack_reference(stream: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """The specification."""
    pieces = stream.split([math.prod(grid) for grid in grids])
    return [
        piece.reshape(f, h, w, -1, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(-1, f, 2 * h, 2 * w)
        for piece, (f, h, w) in zip(pieces, grids, strict=True)
    ]


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _grids(flat: Sequence[int]) -> list[Grid]:
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


@torch.library.custom_op("uniref_fast::pack", mutates_args=())
def _pack(latents: Sequence[Tensor], impl: str) -> Tensor:
    *starts, total = _starts([x[0].numel() // 4 for x in latents])
    return module(impl, "patchify").pack(list(latents), starts, total)


@torch.library.custom_op("uniref_fast::unpack", mutates_args=())
def _unpack(stream: Tensor, grids: Sequence[int], impl: str) -> list[Tensor]:
    images = _grids(grids)
    *starts, _ = _starts([math.prod(grid) for grid in images])
    return module(impl, "patchify").unpack(stream, starts, images, stream.shape[1] // 4)


@_pack.register_fake
def _(latents, impl):
    first = latents[0]
    return first.new_empty((sum(x[0].numel() // 4 for x in latents), 4 * first.shape[0]))


@_unpack.register_fake
def _(stream, grids, impl):
    return [stream.new_empty((stream.shape[1] // 4, f, 2 * h, 2 * w)) for f, h, w in _grids(grids)]


# ---- autograd: each is the other's transpose ----


def _save_pack(ctx, inputs, output) -> None:
    latents, ctx.impl = inputs
    ctx.grids = [side for x in latents for side in (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)]


def _save_unpack(ctx, inputs, output) -> None:
    _, _, ctx.impl = inputs


def _differentiate_pack(ctx, grad):
    return torch.ops.uniref_fast.unpack(upstream(grad), ctx.grids, ctx.impl), None


def _differentiate_unpack(ctx, grads):
    return torch.ops.uniref_fast.pack([upstream(grad) for grad in grads], ctx.impl), None, None


_pack.register_autograd(_differentiate_pack, setup_context=_save_pack)
_unpack.register_autograd(_differentiate_unpack, setup_context=_save_unpack)
not_batched("pack", "unpack")
