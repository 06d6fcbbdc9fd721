"""Joint attention of a block as torch.compile traces it: all tables are computed from sizes, inside the graph.

An uncompiled call reads its tables from a layout that is kept on the host. A graph cannot, and one that did would be
compiled again for every layout. Here the samples of a batch have equal lengths and no padding, and each token sees its
own sample, so that a few `arange` give the tables for all sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uniref_fast.models.eight_bit import attend
from uniref_fast.models.qwen_image import joint_qkv, project_image, qk_norm_eps, qk_norm_weights, stream_rows
from uniref_fast.ops.segment_attention import launch_numbers

__all__ = ["traced_attention", "traced_attention_with_references"]

Tables = list[Tensor]


def traced_attention(
    attn: Any, image: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor], impl: str, forced: bool
) -> tuple[Tensor, Tensor]:
    """Return the attention of both streams, output projections included.

    Args:
        attn: The diffusers `Attention`.
        image: Image stream, `[B, N_image, C]`.
        text: Text stream, `[B, N_text, C]`.
        rotary: Complex rotary tables of image and text, `[N_image, D / 2]` and `[N_text, D / 2]`.
        impl: "native" or "triton".
        forced: Use that implementation for attention as well. Without it, a GPU runs PyTorch's fused attention, which
            is fastest for one sample and needs no tables.
    """
    batch, text_length, length = text.shape[0], text.shape[1], text.shape[1] + image.shape[1]
    head_dim = attn.inner_dim // attn.heads

    def heads(linear: Any, x: Tensor) -> Tensor:
        return linear(x).flatten(0, 1).unflatten(-1, (-1, head_dim))  # [B * n, H, D]

    image_qkv = heads(attn.to_q, image), heads(attn.to_k, image), heads(attn.to_v, image)
    text_qkv = heads(attn.add_q_proj, text), heads(attn.add_k_proj, text), heads(attn.add_v_proj, text)
    rows = torch.arange(batch * length, dtype=torch.int32, device=image.device).view(batch, length)
    turns = torch.cat([torch.view_as_real(freqs) for freqs in (rotary[1], rotary[0])]).repeat(batch, 1, 1)
    q, k, v = torch.ops.uniref_fast.qk_norm_rope(
        *text_qkv, *image_qkv, *qk_norm_weights(attn, "text"), *qk_norm_weights(attn, "image"),
        turns[..., 0].contiguous(), turns[..., 1].contiguous(),
        rows[:, :text_length].reshape(-1), rows[:, text_length:].reshape(-1), qk_norm_eps(attn), True, impl,
    )  # fmt: skip
    if impl == "triton" and not forced:
        out = _fused_by_pytorch(q, k, v, batch)
    else:
        out = _within_samples(q, k, v, batch, impl)
    out = out.view(batch, length, -1)
    return project_image(attn, out[:, text_length:].contiguous()), attn.to_add_out(out[:, :text_length].contiguous())


def traced_attention_with_references(
    attn: Any, image: Tensor, text: Tensor, context: Any, by_pytorch: bool
) -> tuple[Tensor, Tensor]:
    """Return the attention of both streams in a step with kept references, output projections included.

    Args:
        attn: The diffusers `Attention`.
        image: Image stream, `[B, N_image, C]`, without the references that are kept.
        text: Text stream, `[B, N_text, C]`.
        context: `TracedContext` of the step, with buffers of keys and values.
        by_pytorch: A GPU may run PyTorch's fused attention, because each query sees all keys of its sample.
    """
    head_dim = attn.inner_dim // attn.heads

    def heads(linear: Any, x: Tensor) -> Tensor:
        return linear(x).flatten(0, 1).unflatten(-1, (-1, head_dim))  # [B * n, H, D]

    image_qkv = heads(attn.to_q, image), heads(attn.to_k, image), heads(attn.to_v, image)
    text_qkv = heads(attn.add_q_proj, text), heads(attn.add_k_proj, text), heads(attn.add_v_proj, text)
    q, k, v = joint_qkv(attn, image_qkv, text_qkv, context)
    if context.impl == "triton" and by_pytorch:
        out = _fused_by_pytorch(q, k, v, image.shape[0])
    else:
        out = attend(q, k, v, context.plan, context.impl, context.for_training, "")
    image_out, text_out = (
        stream_rows(out, context, name).flatten(1).view(stream.shape[0], stream.shape[1], -1)
        for name, stream in (("image", image), ("text", text))
    )
    return project_image(attn, image_out), attn.to_add_out(text_out)


def _fused_by_pytorch(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    """Return `[B * N, H, D]`."""
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def _within_samples(q: Tensor, k: Tensor, v: Tensor, batch: int, impl: str) -> Tensor:
    """Run our kernels under the plan in which each token sees its own sample; `[B * N, H, D]`."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    plan = _plan_tensors(batch, q.shape[0] // batch, q.device)
    tables = [plan] + [plan, plan] * needs_grad  # queries and keys see each other, so the transpose is the same
    launches: list[int] = []
    if impl == "triton":
        blocks, launches = launch_numbers(str(q.dtype), q.shape[-1], str(q.device), needs_grad)
        tables = [[*t, _tiles(batch, q.shape[0] // batch, n, q.device)] for t, n in zip(tables, blocks, strict=True)]
    tables += [[]] * (3 - len(tables))
    return torch.ops.uniref_fast.segment_attention(q, k, v, *tables, launches, q.shape[-1] ** -0.5, impl)[0]


def _plan_tensors(batch: int, length: int, device: torch.device) -> Tables:
    """Return what `AttentionPlan.tensors` gives for samples of equal length that each see themselves."""
    edges = torch.arange(batch + 1, dtype=torch.int32, device=device)
    spans = torch.stack([edges[:-1] * length, edges[1:] * length], dim=1)
    return [spans, edges, spans]


def _tiles(batch: int, length: int, block: int, device: torch.device) -> Tensor:
    """Return what `AttentionPlan.tiles` gives for them."""
    first = torch.arange(0, length, block, dtype=torch.int32, device=device)
    samples = torch.arange(batch, dtype=torch.int32, device=device)[:, None].expand(batch, first.shape[0])
    return torch.stack([samples, samples * length + first], dim=-1).flatten(0, 1)
