"""Qwen-Image-2.1's single-stream transformer over a packed, ragged sequence.

Text and images of a sample are one causal sequence: its references stand between the text tokens, in the places of the
vision slots of the prompt, and the target comes last. A text token attends to what precedes it, an image also to all of
itself. Text and references are modulated with t = 0, so nothing before the target changes over the steps: its keys and
values can be kept exactly (`models.kept_references`).

    joint   [a a r r r r a a a T T T T | b b b T T]     a, b text, r a reference, T targets of two samples

Shapes as in `models.packed`: the joint sequence has N rows of C channels, of which a rank computes all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import REFERENCE_PLACE, Grid, Kind, Sample, Segment, SelfLayout
from uniref_fast.models.eight_bit import attend, feed_forward, first_linear, gated_input, modulated_input
from uniref_fast.models.kept_references import Kept
from uniref_fast.models.packed import (
    DeferredResidual,
    ForwardContext,
    PackedBlock,
    PackedModel,
    clipped,
    joint_sources,
    skip,
)
from uniref_fast.models.qwen_image import joint_qkv, project_output
from uniref_fast.visibility import Rule, block_causal

__all__ = ["PackedQwenImage21", "interleaved_layout"]


def interleaved_layout(
    samples: Sequence[Sample], *, causal_condition: bool = True, shared_references: bool = False
) -> SelfLayout:
    """Return the layout of a pack whose samples are text, references and target in one causal sequence.

    Rotary scheme (diffusers `QwenImage21Rope`): text tokens advance a position on all three axes; an image stays at
    this position on the frame axis, is centred on 0 on the other two, and moves the position on by its longer side.

    Args:
        samples: Samples of the pack, in order. References without a place in the text follow it.
        causal_condition: Modulate text and references with t = 0, in rows after those of the sampled t.
        shared_references: Hold text and references of the samples of one `group` once. These samples must have the same
            text and references.

    Raises:
        ValueError: If there are no samples, a text has more places than there are references, an image has more than
            one frame, or samples of a group differ.
    """
    return _layout(tuple(samples), causal_condition, shared_references)


@functools.lru_cache(maxsize=8)  # few, because device tensors are kept with a layout
def _layout(samples: tuple[Sample, ...], causal_condition: bool, shared_references: bool) -> SelfLayout:
    if not samples:
        raise ValueError("a layout needs at least one sample")
    owners = _owners(samples) if shared_references else range(len(samples))
    segments: list[Segment] = []
    text_at, joint_at, image_at = 0, 0, 0
    for i, (sample, owner) in enumerate(zip(samples, owners, strict=True)):
        # In the image stream the target comes first, in the joint sequence last.
        image_starts, target_start = image_at + sample.target[1] * sample.target[2], image_at
        for kind, index, grid, origin in _pieces(sample):
            if kind is not Kind.TARGET and owner != i:
                continue
            start = text_at if kind.is_text else target_start if kind is Kind.TARGET else image_starts
            mod_row = i + (len(samples) if causal_condition and kind is not Kind.TARGET else 0)
            segment = Segment(kind, i, owner, index, grid, start, joint_at, mod_row, origin)
            segments.append(segment)
            joint_at += segment.length
            text_at += segment.length if kind.is_text else 0
            image_starts += segment.length if kind is Kind.REFERENCE else 0
        image_at = image_starts
    return SelfLayout(tuple(segments), len(samples), causal_condition, causal_prefix=True)


def _owners(samples: tuple[Sample, ...]) -> list[int]:
    """Return for each sample the first sample of its group, which holds text and references of the group."""
    first: dict[int, int] = {}
    owners = [i if sample.group is None else first.setdefault(sample.group, i) for i, sample in enumerate(samples)]
    for i, owner in enumerate(owners):
        prefixes = [(samples[n].text_runs, samples[n].references) for n in (owner, i)]
        if prefixes[0] != prefixes[1]:
            raise ValueError(
                f"samples {owner} and {i} of group {samples[i].group} share text and references but list different "
                f"ones: {prefixes[0]} and {prefixes[1]}"
            )
    return owners


def _pieces(sample: Sample) -> Iterator[tuple[Kind, int, Grid, Grid]]:
    """Yield (kind, index, grid, rotary origin) of the segments of a sample, in joint order."""
    references = list(enumerate(sample.references, 1))
    at, runs = 0, 0  # rotary position, runs of text so far
    parts: list[tuple[int, bool]] = [*sample.text_runs]
    if (surplus := parts.count(REFERENCE_PLACE) - len(references)) > 0:
        raise ValueError(f"the text of a sample has {surplus} places more than the sample has references: {sample}")
    parts += [REFERENCE_PLACE] * -surplus
    for length, valid in parts:
        if length:
            yield Kind.TEXT if valid else Kind.PADDING, runs, (length, 1, 1), (at,) * 3
            at, runs = at + length, runs + 1
        elif not valid:
            index, grid = references.pop(0)
            yield Kind.REFERENCE, index, grid, _origin(grid, at)
            at += max(grid)
    yield Kind.TARGET, 0, sample.target, _origin(sample.target, at)


def _origin(grid: Grid, position: int) -> Grid:
    """Return the rotary position of the first token of an image."""
    frames, height, width = grid
    if frames != 1:
        raise ValueError(f"an image of this model has one frame, got the grid {grid}")
    return position, height // 2 - height, width // 2 - width


class SingleStreamBlock(PackedBlock):
    """A block whose one stream is the joint sequence; `temb` is the modulation table that all blocks share.

    The table has the columns scale, tanh(gate), scale, tanh(gate) for attention and feed-forward, `[R, 4 C]`.
    """

    mlps = ("img_mlp",)

    def _run(
        self, streams: list[Tensor], residuals: list[DeferredResidual], temb: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        block, impl, rows = self.block, context.impl, context.modulation_rows("joint")
        scale1, gate1, scale2, gate2 = temb.chunk(4, dim=-1)
        x, eps = streams.pop(0), block.img_norm1.eps
        if residuals:
            branch, gate = residuals.pop(0)
            x, normed = gated_input(block.attn.to_q, x, branch, gate, None, scale1, rows, eps, impl)
            del branch
        else:
            normed = modulated_input(block.attn.to_q, x, None, scale1, rows, eps, impl)
        q, k, v = _projected(block.attn, normed, context)
        del normed
        plan = context.plan
        if self.last:  # only the targets' rows of its output are used
            targets = context.layout.joint_index("image", x.device)[context.layout.target_rows(x.device)]
            q, x, rows, plan = q[targets], x[targets], rows[targets], context.target_plan
        out = attend(q, k, v, plan, impl, context.for_training, self.attention_8bit)
        del q, k, v
        branch = project_output(block.attn.to_out, out.flatten(1), context.linear)
        del out
        first, eps = first_linear(block.img_mlp), block.img_norm2.eps
        x, hidden = gated_input(first, x, branch, gate1, None, scale2, rows, eps, impl)
        del branch
        hidden = feed_forward(block.img_mlp, hidden, impl, context.linear)
        if context.fuse_residual and not self.last:
            return [x], [DeferredResidual(hidden, gate2)]
        return [clipped(ops.gate_residual(x, hidden, gate2, rows, impl=impl))], []


def _projected(attn: Any, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
    """Project, normalise and rotate the joint sequence `[N, C]` into q, k, v, `[N, H, D]` each."""
    head_dim = attn.inner_dim // attn.heads
    q, k, v = (context.linear(each, x).unflatten(-1, (-1, head_dim)) for each in (attn.to_q, attn.to_k, attn.to_v))
    return joint_qkv(attn, (q, k, v), None, context)


class PackedQwenImage21(PackedModel):
    """A `QwenImage21Transformer2DModel` that runs packs of samples of different sizes; arguments as in `PackedModel`.

    The visibility "full" is the one of the model in diffusers, `visibility.block_causal`; no other policy is possible.
    """

    block_classes: ClassVar = {"transformer_blocks": SingleStreamBlock}
    ends = ("img_in", "txt_in", "time_text_embed", "modulation", "norm_out", "proj_out")
    text_channels = "context_in_dim"
    row_kinds = (
        ("time_text_embed", "table"), ("modulation", "table"), ("norm_out", "table"), ("txt_in", "text"),
        ("img_in", "image"), ("proj_out", "image"), ("", "joint"),
    )  # fmt: skip

    def __init__(self, transformer: Any, *, visibility: str | Rule = "full", **options: Any) -> None:
        if isinstance(visibility, str) and visibility != "full":
            raise ValueError(
                f"visibility {visibility!r} is for models whose references come after the target; "
                f'{type(transformer).__name__} has one causal sequence: use "full", which is its own visibility'
            )
        super().__init__(transformer, visibility=block_causal if visibility == "full" else visibility, **options)

    def layout(self, samples: Sequence[Sample], *, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for this model (`interleaved_layout`).

        Args:
            samples: Samples of the pack, in order. References without a place in the text follow it.
            shared_references: Hold text and references of the samples of one group once.
        """
        causal_condition = bool(self.transformer.config.causal_condition)
        return interleaved_layout(samples, causal_condition=causal_condition, shared_references=shared_references)

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model = self.transformer
        rotary = layout.rotary(model.config.axes_dims_rope, image.device)
        context = self._step(layout, kept, rotary, image.dtype)
        layout, image, text = context.layout, context.computed("image", image), context.computed("text", text)
        joint = model.img_in(image)
        if len(text):
            joint = torch.cat([self._text_stream(text, layout, model.txt_in), joint])
        else:
            skip(model.txt_in)
        joint = joint.index_select(0, joint_sources(layout, image.device))
        timestep = timestep.to(joint.dtype)
        if layout.clean_references:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
        temb = model.time_text_embed(timestep, joint)  # [R, C]
        scale1, gate1, scale2, gate2 = model.modulation(temb).chunk(4, dim=-1)
        streams = [joint]
        del joint, image, text
        out = self._run_blocks(streams, torch.cat([scale1, gate1.tanh(), scale2, gate2.tanh()], dim=-1), context)
        scale = model.norm_out.linear(model.norm_out.silu(temb).to(out.dtype))
        rows = layout.modulation_rows("image", out.device)[layout.target_rows(out.device)]
        return model.proj_out(ops.norm_modulate(out, None, scale, rows, model.norm_out.norm.eps, impl=self.impl))

    def _check(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> None:
        super()._check(image, text, timestep, layout)
        causal_condition = bool(self.transformer.config.causal_condition)
        if not layout.causal_prefix or layout.clean_references != causal_condition:
            raise ValueError("the layout is one of another model; build it with the model's own `layout(samples)`")
