"""Latents to tokens and back: every 2x2 patch of a latent is one row of the image stream.

    stream[start + (f * gh + row) * gw + col, (c * 2 + dy) * 2 + dx] = latent[c, f, 2 row + dy, 2 col + dx]

for f frames and a grid of gh x gw = (h/2) x (w/2) tokens. Bytes: every latent read once, every token written once (and
the reverse). Images have different sizes, so there is one launch an image: latents are small, and a table of
pointers would have to be copied to the device first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

TOKENS = 32  # tokens of a tile, along one row of the grid


@triton.jit
def patchify_kernel(
    p_latent, s_c, s_f, s_h, s_w,  # [C, F, 2 gh, 2 gw]
    p_stream, s_n,  # [F * gh * gw, 4 C]
    grid_height, grid_width,
    UNPACK: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    i_line = tl.program_id(0)  # frame * grid_height + row
    i_col = tl.program_id(1) * BT
    i_f = (i_line // grid_height).to(tl.int64)
    i_row = (i_line % grid_height).to(tl.int64)

    # The latent's side of the tile: lines (c, dy) of 2 BT pixels (col, dx).
    o_line = tl.arange(0, 2 * BC)
    o_x = tl.arange(0, 2 * BT)
    m_latent = (o_line[:, None] < 2 * C) & (i_col * 2 + o_x[None, :] < 2 * grid_width)
    p_latent += i_f * s_f + 2 * i_row * s_h + i_col.to(tl.int64) * 2 * s_w
    p_line = p_latent + (o_line // 2).to(tl.int64) * s_c + (o_line % 2).to(tl.int64) * s_h
    p_latent = p_line[:, None] + o_x[None, :] * s_w  # [2 BC, 2 BT]

    # The stream's side: tokens of 4 C channels.
    o_t = tl.arange(0, BT)
    o_c = tl.arange(0, 4 * BC)
    m_stream = (i_col + o_t[:, None] < grid_width) & (o_c[None, :] < 4 * C)
    p_stream += (i_line.to(tl.int64) * grid_width + i_col) * s_n
    p_stream = p_stream + o_t[:, None] * s_n + o_c[None, :]  # [BT, 4 BC]

    if UNPACK:
        b_tokens = tl.load(p_stream, mask=m_stream)
        b_pixels = tl.permute(tl.reshape(b_tokens, [BT, 2 * BC, 2]), (1, 0, 2))
        tl.store(p_latent, tl.reshape(b_pixels, [2 * BC, 2 * BT]), mask=m_latent)
    else:
        b_pixels = tl.load(p_latent, mask=m_latent)
        b_tokens = tl.permute(tl.reshape(b_pixels, [2 * BC, BT, 2]), (1, 0, 2))
        tl.store(p_stream, tl.reshape(b_tokens, [BT, 4 * BC]), mask=m_stream)


def pack(latents: Sequence[torch.Tensor], starts: Sequence[int], total: int) -> torch.Tensor:
    """Stream [total, 4 C] of latents [C, F, h, w] (any strides, h and w even); latent i begins at row `starts[i]`.

    Together the latents cover every row once.
    """
    assert len(latents) == len(starts) > 0
    channels, dtype, device = latents[0].shape[0], latents[0].dtype, latents[0].device
    assert sum(x[0].numel() // 4 for x in latents) == total, "the latents must fill the stream"
    stream = torch.empty(total, 4 * channels, dtype=dtype, device=device)
    for latent, start in zip(latents, starts, strict=True):
        assert latent.shape[0] == channels and latent.dtype == dtype
        assert latent.shape[2] % 2 == latent.shape[3] % 2 == 0, f"odd latent {tuple(latent.shape)}"
        _launch(latent, stream[start:], unpack=False)
    return stream


def unpack(
    stream: torch.Tensor, starts: Sequence[int], grids: Sequence[tuple[int, int, int]], channels: int
) -> list[torch.Tensor]:
    """Latents [channels, F, 2 gh, 2 gw] of a stream [N, 4 channels]; image i has grid (F, gh, gw) from `starts[i]`."""
    assert stream.shape[1] == 4 * channels and stream.stride(1) == 1
    latents = []
    for start, (frames, height, width) in zip(starts, grids, strict=True):
        assert start + frames * height * width <= stream.shape[0], "image past the end of the stream"
        latent = torch.empty(channels, frames, 2 * height, 2 * width, dtype=stream.dtype, device=stream.device)
        _launch(latent, stream[start:], unpack=True)
        latents.append(latent)
    return latents


def _launch(latent: torch.Tensor, stream: torch.Tensor, unpack: bool) -> None:
    if latent.numel() == 0:
        return
    channels, frames, height, width = latent.shape
    with torch.cuda.device_of(latent):
        patchify_kernel[(frames * height // 2, triton.cdiv(width // 2, TOKENS))](
            latent, *latent.stride(),
            stream, stream.stride(0),
            height // 2, width // 2,
            UNPACK=unpack, C=channels, BC=triton.next_power_of_2(channels), BT=TOKENS,
            num_warps=4,
        )  # fmt: skip
