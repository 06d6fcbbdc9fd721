"""Helpers of the kernels over tokens: a norm and a rounding in registers, and assertions about layouts of tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

STREAMS = ("x", "y", "grad", "grad_x_out", "grad_normed", "x_out")  # [N, C]; everything else is a table [R, C]


@triton.jit
def normalise(b_x, m_c, eps, C: tl.constexpr, RMS: tl.constexpr):
    """Return the normalised row, [BC] in float32 with zeros outside m_c, and its factor 1 / std."""
    if not RMS:
        mean = tl.sum(b_x, 0) / C
        b_x = tl.where(m_c, b_x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps)
    return b_x * rstd, rstd


@triton.jit
def stored(b_x, dtype: tl.constexpr, EAGER: tl.constexpr):
    """Return b_x in float32, if EAGER rounded to `dtype`; the launch then needs `enable_fp_fusion=False`."""
    return b_x.to(dtype).to(tl.float32) if EAGER else b_x


def check(mod_index: torch.Tensor | None, num_tokens: int, channels: int, **tensors: torch.Tensor | None) -> None:
    """Assert the layout of tensors by name, and of mod_index: int32 [N] or None."""
    for name, x in tensors.items():
        if x is not None:
            assert x.ndim == 2 and x.shape[1] == channels, f"{name} {tuple(x.shape)}, C is {channels}"
            assert name not in STREAMS or x.shape[0] == num_tokens, f"{name} {tuple(x.shape)}, N is {num_tokens}"
            assert channels == 1 or x.numel() == 0 or x.stride(1) == 1, f"the channels of {name} must be contiguous"
    assert mod_index is None or (
        mod_index.dtype == torch.int32 and mod_index.shape == (num_tokens,) and mod_index.is_contiguous()
    )


def check_heads(
    txt: tuple[torch.Tensor, ...],
    img: tuple[torch.Tensor, ...],
    joint: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor | None, ...],
    tables: tuple[torch.Tensor, torch.Tensor],
    txt_index: torch.Tensor,
    img_index: torch.Tensor,
) -> tuple[int, int, int, int]:
    """Assert the layout of q, k, v of two streams and of the joint sequence; return Nt, N, H and the head dimension.

    Args:
        txt, img, joint: [Nt, H, D], [Ni, H, D], [N, H, D], one dtype, last dimension contiguous; N = Nt + Ni.
        weights: [D] each, or None.
        tables: The tables cos and sin, float32 [N, D/2].
        txt_index, img_index: Joint row of each token, int32 [Nt] and [Ni].
    """
    num_txt, heads, head_dim = txt[0].shape
    num_img = len(img[0])
    total = num_txt + num_img
    assert head_dim >= 16 and head_dim & (head_dim - 1) == 0, f"head_dim {head_dim}: a power of two from 16 is needed"
    for tensors, count in ((txt, num_txt), (img, num_img), (joint, total)):
        for x in tensors:
            assert x.shape == (count, heads, head_dim), f"{tuple(x.shape)} instead of {(count, heads, head_dim)}"
            assert x.dtype == txt[0].dtype, f"{x.dtype} beside {txt[0].dtype}"
            assert x.numel() == 0 or x.stride(2) == 1, "the head dimension must be contiguous"
            assert x.stride(1) * heads < 2**30, "head stride too big for the offsets within a token"
    for weight in weights:
        assert weight is None or (weight.shape == (head_dim,) and weight.is_contiguous())
    cos, sin = tables
    assert cos.shape == sin.shape == (total, head_dim // 2), f"cos {tuple(cos.shape)} for {total} joint rows"
    assert cos.dtype == sin.dtype == torch.float32 and cos.stride() == sin.stride() and cos.stride(1) == 1
    for index, count in ((txt_index, num_txt), (img_index, num_img)):
        assert index.dtype == torch.int32 and index.shape == (count,) and index.is_contiguous()
    return num_txt, total, heads, head_dim


def channel_block(channels: int) -> int:
    """Return the smallest power of two that holds a row."""
    block = triton.next_power_of_2(channels)
    assert block <= 65536, f"{channels} channels do not fit the registers of one program"
    return block


def new_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return new contiguous memory of x's shape."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def row_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
