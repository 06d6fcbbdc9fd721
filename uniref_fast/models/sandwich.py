"""Blocks with a norm before and after each branch, as in Z-Image and Fibo 2, over a packed, ragged sequence.

    x' = x + gate[r] * norm_2(branch(norm_1(x) * scale[r]))

The norms are RMSNorms with weights, which are multiplied into the tables: `w_1 * scale` and `w_2 * gate`, `[R, C]`.
Blocks without modulation have the weights alone, one row for all tokens. The norm of a branch, its residual and the
norm before the next branch are one fused operator, which multiplies by the tables without adding 1.

A model of this kind runs some blocks over a part of the sequence before the others run over all of it.

Shapes: N tokens of C channels, S samples, tables of R rows: S for the sampled t, then S for clean tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import Sample, Segment, SelfLayout
from uniref_fast.memo import memo
from uniref_fast.models.eight_bit import attend, feed_forward, shared_input
from uniref_fast.models.kept_references import ReferenceRows
from uniref_fast.models.module_hooks import onloaded
from uniref_fast.models.packed import ForwardContext, ModelSizes, PackedBlock, PackedModel
from uniref_fast.models.qwen_image import joint_qkv, project_output
from uniref_fast.visibility import Rule

__all__ = [
    "Branch",
    "SandwichBlock",
    "SandwichModel",
    "add",
    "add_and_normalise",
    "branch_of",
    "factor",
    "normalise",
    "part_layout",
    "part_rows",
    "rows_of",
]

Rounding = ops.Rounding


class Branch(NamedTuple):
    """A branch y that is added as `x + gate[row] * norm(y)`, possibly by the next block."""

    y: Tensor  # [N, C]
    gate: Tensor  # weight of its norm times gate, [R, C]
    eps: float  # of its norm


# ---- operators ----


def factor(norm: Any, table: Tensor | None) -> Tensor:
    """Return the weight of a norm multiplied by a table, `[R, C]`; `[1, C]` for the weight alone."""
    with onloaded(norm):  # its weight is read
        return norm.weight[None] if table is None else norm.weight * table


def branch_of(y: Tensor, norm: Any, table: Tensor | None) -> Branch:
    """Return a branch y, `[N, C]`, with the norm after it and the table of its gate."""
    return Branch(y, factor(norm, table), norm.eps)


def normalise(
    x: Tensor, norm: Any, table: Tensor | None, rows: Tensor | None, impl: str | None, rounding: Rounding = "once"
) -> Tensor:
    """Return `norm(x) * table[r]` for rows x, `[N, C]`."""
    options: Any = {"norm": "rms", "add_one": False, "rounding": rounding, "impl": impl}
    return ops.norm_modulate(x, None, factor(norm, table), rows, norm.eps, **options)


def add(x: Tensor, branch: Branch, rows: Tensor | None, impl: str | None, rounding: Rounding = "once") -> Tensor:
    """Return `x + table[r] * norm(y)`, where the branch is y with its norm and table."""
    y, gate, eps = branch
    return ops.gate_residual(x, y, gate, rows, branch_eps=eps, rounding=rounding, impl=impl)


def add_and_normalise(
    x: Tensor,
    branch: Branch,
    norm: Any,
    table: Tensor | None,
    rows: Tensor | None,
    impl: str | None,
    rounding: Rounding = "once",
) -> tuple[Tensor, Tensor]:
    """Return `x' = add(x, branch)` and `normalise(x', norm, table)`.

    The tables of both may have one row for all tokens, or one for each number in `rows`.
    """
    y, gate, eps = branch
    scale = factor(norm, table)
    if len(gate) != len(scale):
        count = max(len(gate), len(scale))
        gate, scale = gate.expand(count, -1), scale.expand(count, -1)
    options: Any = {"norm": "rms", "add_one": False, "branch_eps": eps, "rounding": rounding, "impl": impl}
    return ops.gate_residual_norm_modulate(x, y, gate, None, scale, rows, norm.eps, **options)


# ---- block ----


class SandwichBlock(PackedBlock):
    """A block with one stream; `temb` are the embeddings of the times of all rows of the table, `[R, 256]`."""

    def tables(self, temb: Tensor) -> tuple[Tensor | None, ...]:
        """Return scale, gate, scale and gate, `[R, C]` each; None each for a block without modulation."""
        if not getattr(self.block, "modulation", True):
            return (None,) * 4
        scale1, gate1, scale2, gate2 = self.block.adaLN_modulation(temb).chunk(4, dim=1)
        return 1.0 + scale1, gate1.tanh(), 1.0 + scale2, gate2.tanh()

    def between(
        self, x: Tensor, branch: Branch, scale: Tensor | None, rows: Tensor | None, context: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the attention and what a block computes between attention and feed-forward.

        Args:
            x: Stream, `[N, C]`, or the targets' rows.
            branch: Attention with its norm and gate.
            scale: Scale of the norm before the feed-forward.
            rows: Row of the tables of every token.
            context: Context of the forward.

        Returns:
            The stream and the input of the feed-forward.
        """
        raise NotImplementedError

    def _run(
        self, streams: list[Tensor], residuals: list[Any], temb: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[Any]]:
        """Run the block as `PackedBlock.forward` describes; the residuals are `Branch`es."""
        block, attn, impl = self.block, self.block.attention, context.impl
        scale1, gate1, scale2, gate2 = self.tables(temb)
        rows = None if scale1 is None else context.modulation_rows("joint")
        x, norm = streams.pop(0), block.attention_norm1
        if residuals:
            x, hidden = add_and_normalise(x, residuals.pop(0), norm, scale1, rows, impl)
        else:
            hidden = normalise(x, norm, scale1, rows, impl)
        hidden = shared_input(attn.to_q, hidden, impl)
        projections = attn.to_q, attn.to_k, attn.to_v
        q, k, v = (context.linear(each, hidden).unflatten(-1, (attn.heads, -1)) for each in projections)
        del hidden
        q, k, v = joint_qkv(attn, (q, k, v), None, context)
        plan = context.plan
        if self.last:  # only the targets' rows of its output are used
            targets = context.layout.joint_index("image", x.device)[context.layout.target_rows(x.device)]
            q, x, plan = q[targets], x[targets], context.target_plan
            rows = None if rows is None else rows[targets]
        out = attend(q, k, v, plan, impl, context.for_training, self.attention_8bit)
        del q, k, v
        branch = branch_of(project_output(attn.to_out, out.flatten(1), context.linear), block.attention_norm2, gate1)
        del out
        if getattr(block, "cross_attention", None) is None:
            x, hidden = add_and_normalise(x, branch, block.ffn_norm1, scale2, rows, impl)
        else:
            x, hidden = self.between(x, branch, scale2, rows, context)
        del branch
        branch = branch_of(feed_forward(block.feed_forward, hidden, impl, context.linear), block.ffn_norm2, gate2)
        if context.fuse_residual and not self.last:
            return [x], [branch]
        return [add(x, branch, rows, impl)], []


# ---- model ----


class SandwichModel(PackedModel):
    """A model whose blocks are `SandwichBlock`s; arguments as in `PackedModel`.

    The visibility is "full", that of the models in diffusers, or a rule of your own.
    """

    row_kinds = (("adaLN_modulation", "table"), ("t_embedder", "table"), ("x_embedder", "image"), ("", "joint"))
    block_classes: ClassVar = {}
    attention = "attention"
    modulations = ("adaLN_modulation",)

    def __init__(self, transformer: Any, *, visibility: str | Rule = "full", **options: Any) -> None:
        if isinstance(visibility, str) and visibility != "full":
            raise ValueError(
                f"visibility {visibility!r} is for models that were trained with it; {type(transformer).__name__} has "
                'tokens beside text and images: use "full", which is its own visibility'
            )
        super().__init__(transformer, visibility=visibility, **options)
        of_block: dict[Any, Any] = {packed.block: packed for packed in self.blocks}
        self._stages = {name: [of_block[block] for block in getattr(transformer, name)] for name in self.block_classes}

    @classmethod
    def sizes(cls, config: Any) -> ModelSizes:
        """Return the sizes of a transformer with a configuration."""
        patch = config.get("patch_size", 2)
        layers = config.n_layers + config.n_refiner_layers  # those that compute images
        return ModelSizes(patch**2 * config.in_channels, config.n_heads, config.dim // config.n_heads, layers)

    def layout(self, samples: Sequence[Sample], *, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for this model.

        Args:
            samples: Samples of the pack, in order.
            shared_references: Not supported.
        """
        if shared_references:
            raise ValueError("samples of this model cannot share references, which attend to their target")
        return self._layout(samples)

    def _layout(self, samples: Sequence[Sample]) -> SelfLayout:
        """Return the layout of a pack; a family defines it."""
        raise NotImplementedError

    def _part(
        self,
        whole: SelfLayout,
        chosen: Callable[[Segment], bool],
        rotary: tuple[Tensor, Tensor],
        kept: ReferenceRows | None,
        dtype: torch.dtype,
    ) -> ForwardContext:
        """Return the context of blocks that run over a part of the sequence.

        Args:
            whole: Layout of the pack.
            chosen: Function that tells whether a segment is in the part.
            rotary: Rotary tables of the pack.
            kept: Kept references of the forward over the whole sequence, which counts the step; or None.
            dtype: Dtype of the streams.
        """
        layout = memo(whole, part_layout, chosen)
        rows = memo(whole, part_rows, chosen, rotary[0].device)
        rotary = rotary[0].index_select(0, rows), rotary[1].index_select(0, rows)
        references = None if kept is None else ReferenceRows(layout, kept.stores)
        if references is not None:
            layout, rotary = references.layout, references.rotary(rotary)
        return self._context(layout, rotary, references, dtype)

    def _adapt(self, layout: SelfLayout) -> None:
        """Tell the adapters of single samples the layout of the rows that the next modules get."""
        if self._adapters is not None:
            self._adapters.layout = layout

    def _run_stage(self, name: str, x: Tensor, temb: Tensor, context: ForwardContext) -> Tensor:
        """Run the blocks of one list, and return the stream `[N, C]`; of the model's last block the targets' rows."""
        self._adapt(context.layout)
        if any(packed.compiled is not None for packed in self._stages[name]):
            warnings.warn(
                "the packed forward ran its blocks uncompiled: those of this model are not traced", stacklevel=6
            )
        streams, residuals = [x], list[Any]()
        del x
        for packed in self._stages[name]:
            streams, residuals = packed(streams, residuals, temb, context)
        (x,) = streams
        if residuals:
            (branch,) = residuals
            rows = context.modulation_rows("joint") if len(branch.gate) > 1 else None
            x = add(x, branch, rows, context.impl)
        return x

    def _final(self, x: Tensor, temb: Tensor, layout: SelfLayout, final: Any) -> Tensor:
        """Return the output of the final layer for the targets' rows, `[N_target, channels]`."""
        rows = layout.modulation_rows("image", x.device)[layout.target_rows(x.device)]
        scale = final.adaLN_modulation(temb[: layout.num_samples])
        return final.linear(ops.norm_modulate(x, None, scale, rows, final.norm_final.eps, impl=self.impl))


# ---- parts of a sequence ----


def part_layout(whole: SelfLayout, chosen: Callable[[Segment], bool]) -> SelfLayout:
    """Return the layout of some segments, in the order of the whole sequence."""
    found = [segment for segment in whole.segments if chosen(segment)]
    starts: dict[Segment, int] = {}
    stream_at = {True: 0, False: 0}  # by whether the segment is text
    for segment in sorted(found, key=lambda each: each.stream_start):
        starts[segment] = stream_at[segment.kind.is_text]
        stream_at[segment.kind.is_text] += segment.length
    segments, joint_at = [], 0
    for segment in found:
        segments.append(replace(segment, joint_start=joint_at, stream_start=starts[segment]))
        joint_at += segment.length
    return SelfLayout(tuple(segments), whole.num_samples, clean_references=True)


def part_rows(whole: SelfLayout, chosen: Callable[[Segment], bool], device: torch.device) -> Tensor:
    """Return the rows of some segments in the joint sequence, int64 `[n]`."""
    spans = [(s.joint_start, s.joint_end) for s in whole.segments if chosen(s)]
    return rows_of(spans, device)


def rows_of(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return the numbers of the rows of half-open ranges one after the other, int64 `[n]`."""
    none = torch.arange(0, device=device)
    return torch.cat([none, *(torch.arange(start, end, device=device) for start, end in spans)])
