"""Joint attention of patched blocks as torch.compile traces it: all tables are computed from sizes, inside the graph.

An uncompiled call reads its tables from a layout that is kept on the host. A graph cannot, and one that did would be
compiled again for every layout. Here the samples of a batch have equal lengths and no padding, and each token sees its
own sample, so that a few `arange` give the tables for all sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uniref_fast import ops
from uniref_fast.models.compiled_block import TracedLayout
from uniref_fast.ops.segment_attention import launch_numbers

__all__ = ["TracedPlan", "TracedStreams"]

Tables = list[Tensor]


class TracedPlan:
    """A plan in which each query sees all keys of its sample.

    Args:
        batch: Number of samples.
        impl: "native" or "triton".
        forced: Use that implementation for attention as well. Without it, a GPU runs PyTorch's fused attention, which
            is fastest for one sample and needs no tables.
    """

    def __init__(self, batch: int, impl: str, forced: bool) -> None:
        self.batch, self.impl, self.forced = batch, impl, forced

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of `q`, `[B * N, H, D]`."""
        if self.impl == "triton" and not self.forced:
            return _fused_by_pytorch(q, k, v, self.batch)
        return _within_samples(q, k, v, self.batch, self.impl)


class TracedStreams(TracedLayout):
    """A `ForwardContext` of one call inside a graph, which is its own layout.

    Args:
        batch: Number of samples.
        text: Text tokens of each sample; 0 for a stream of all tokens.
        image: Image tokens of each sample, or all tokens.
        rotary: Tables cos and sin of all tokens of a sample, text first, or of all samples, float32 `[N, D / 2]` each.
        impl: Implementation that the patch forces on every op, or None.
        like: Tensor `[..., D]` with the device, dtype and head dimension of the queries.
        rounding: Rounding of QK norm and rotary embedding, see `ops.qk_norm_rope`.
    """

    references = None

    def __init__(
        self,
        batch: int,
        text: int,
        image: int,
        rotary: tuple[Tensor, Tensor],
        impl: str | None,
        like: Tensor,
        rounding: ops.Rounding = "eager",
    ) -> None:
        self.batch, self.text = batch, text
        self.text_length, self.image_length, self.joint_length = batch * text, batch * image, batch * (text + image)
        self.impl, self.rounding = impl or ops.choose(None, like, like.shape[-1]), rounding
        self.plan = TracedPlan(batch, self.impl, impl is not None)
        tables = (table if len(table) == self.joint_length else table.repeat(batch, 1) for table in rotary)
        cos, sin = (table.contiguous() for table in tables)
        self.rotary = cos, sin
        self.all_rows = torch.arange(self.joint_length, dtype=torch.int32, device=like.device).view(batch, text + image)

    @property
    def layout(self) -> TracedStreams:
        """The context, which has the methods of a layout that attention calls."""
        return self

    def joint_index(self, stream: str, device: Any = None) -> Tensor:
        """Return the joint row of every row of a stream, int32 `[N_stream]`."""
        return self.all_rows.reshape(-1) if stream == "joint" else self._part(self.all_rows, stream).reshape(-1)

    def rows(self, joint: Tensor, stream: str) -> Tensor:
        """Return the rows of a stream out of values in joint order, `[N_stream, ...]`."""
        return self._part(joint.unflatten(0, (self.batch, -1)), stream).flatten(0, 1)

    def _part(self, x: Tensor, stream: str) -> Tensor:
        return x[:, : self.text] if stream == "text" else x[:, self.text :]


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
