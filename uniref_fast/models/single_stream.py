"""A block with one stream of all tokens in joint order, whose attention and feed-forward run in parallel.

Shapes: a stream has N rows of C channels, in H heads of D channels; the modulation table has R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.models.compiled_block import TracedContext
from uniref_fast.models.eight_bit import attend, gated_input, modulated_input
from uniref_fast.models.onednn_linear import CallLinear
from uniref_fast.models.packed import DeferredResidual, ForwardContext, PackedBlock, clipped, joint_sources
from uniref_fast.models.qwen_image import QKV, joint_qkv

__all__ = ["SingleStreamBlock"]


class SingleStreamBlock(PackedBlock):
    """Parallel attention and feed-forward with one norm and one output Linear; a family defines the parts."""

    @property
    def norm(self) -> Any:
        """LayerNorm of the block."""
        raise NotImplementedError

    @property
    def first_linear(self) -> Any:
        """Linear that gets the output of the norm; others may share it."""
        raise NotImplementedError

    @property
    def last_linear(self) -> Any:
        """Linear that gets the results of attention and feed-forward side by side."""
        raise NotImplementedError

    def modulation(self, temb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return shift, scale and gate, `[R, C]` each, from the input `temb` of the block."""
        raise NotImplementedError

    def project(self, y: Tensor, rows: Tensor | None, linear: CallLinear) -> tuple[QKV, Tensor]:
        """Return the projections q, k, v, `[N, H, D]` each, and the input of the activation of the feed-forward.

        Args:
            y: Output of the norm, `[N, C]`.
            rows: Rows of the feed-forward that are used; None for all.
            linear: Function that calls a Linear, `ForwardContext.linear`.
        """
        raise NotImplementedError

    def activate(self, mlp: Tensor, impl: str | None) -> Tensor:
        """Return the activation of the feed-forward.

        Args:
            mlp: Input of the activation.
            impl: Implementation forced on every op, or None.
        """
        raise NotImplementedError

    def _run(
        self, streams: list[Tensor], residuals: list[DeferredResidual], temb: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        attn, impl = self.block.attn, context.impl
        shift, scale, gate = self.modulation(temb)
        rows = context.modulation_rows("joint")
        if len(streams) == 2:  # the first of these blocks
            streams = [_joined(streams, residuals, context)]
            residuals = []
        x, eps = streams.pop(), self.norm.eps
        if residuals:
            x, y = gated_input(self.first_linear, x, *residuals.pop(), shift, scale, rows, eps, impl)
        else:
            y = modulated_input(self.first_linear, x, shift, scale, rows, eps, impl)
        plan, targets = context.plan, None
        if self.last:  # no other rows of its output are used
            targets = context.target_rows()
            rows = context.modulation_rows("image")[targets]
            targets = context.layout.joint_index("image", x.device)[targets]
        qkv, mlp = self.project(y, targets, context.linear)
        del y
        q, k, v = joint_qkv(attn, qkv, None, context)
        del qkv
        if targets is not None:
            plan, q, x = context.target_plan, q[targets], x[targets]
        mlp = self.activate(mlp, impl)
        out = attend(q, k, v, plan, impl, context.for_training, self.attention_8bit)
        del q, k, v
        y = context.linear(self.last_linear, torch.cat([out.flatten(1), mlp], dim=-1))
        del out, mlp
        if context.fuse_residual and not self.last:
            return [x], [DeferredResidual(y, gate)]
        return [clipped(ops.gate_residual(x, y, gate, rows, impl=impl))], []


def _joined(streams: list[Tensor], residuals: list[DeferredResidual], context: ForwardContext) -> Tensor:
    """Return the image and the text stream as one in joint order, `[N, C]`, with their last residuals added."""
    layout, device = context.layout, streams[0].device
    for i, (branch, gate) in enumerate(residuals):
        rows = context.modulation_rows(("image", "text")[i])
        streams[i] = ops.gate_residual(streams[i], branch, gate, rows, impl=context.impl)
    image, text = streams
    both = torch.cat([text, image])
    if isinstance(layout, TracedContext):
        index = torch.cat([layout.joint_index("text"), layout.joint_index("image")])
        return torch.empty_like(both).index_copy(0, index.long(), both)
    if layout.num_samples == 1:
        return both
    return both.index_select(0, joint_sources(layout, device))
