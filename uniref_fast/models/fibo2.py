"""Fibo 2 (`BriaFibo2Pipeline`) over a packed, ragged sequence.

The perceiver of the model turns the prompt embeddings of a sample into gist tokens, which are the text of its sequence.
Target and references pass refiner blocks before the blocks of the whole sequence. Some of these also read the prompt
embeddings, by cross-attention, which is called as it is, sample by sample.

    joint   [g g g T T T T r r r r | g g T T]     g gist, T target, r reference

Gist and references are modulated with t = 0. Every token attends to every token, so nothing but the gist is equal in
all steps.

Prompt embeddings have one row for each token of the text encoder, with the bundles of its layers side by side: that of
the perceiver, then one for each block that reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from uniref_fast.layout import Kind, Sample, Segment, SelfLayout
from uniref_fast.memo import memo
from uniref_fast.models.kept_references import Kept
from uniref_fast.models.packed import ForwardContext, joint_sources
from uniref_fast.models.sandwich import Branch, SandwichBlock, SandwichModel, add_and_normalise, branch_of
from uniref_fast.models.z_image import grid_positions

__all__ = ["PackedFibo2", "fibo2_layout", "text_rows", "text_width"]


def fibo2_layout(samples: Sequence[Sample], config: Any) -> SelfLayout:
    """Return the layout of a pack; the text of a sample is the number of its tokens in the text encoder.

    Args:
        samples: Samples of the pack, in order.
        config: Configuration of the transformer, which decides the number of gist tokens.

    Raises:
        ValueError: If there are no samples.
    """
    gist = (
        config.min_num_gist_tokens, config.max_num_gist_tokens, config.gist_step, config.gist_min_text_len,
        config.gist_max_text_len,
    )  # fmt: skip
    return _layout(tuple(samples), gist)


@functools.lru_cache(maxsize=8)  # few, because device tensors are kept with a layout
def _layout(samples: tuple[Sample, ...], gist: tuple[int, ...]) -> SelfLayout:
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    if not samples:
        raise ValueError("a layout needs at least one sample")
    texts = [sum(length for length, _ in sample.text_runs) for sample in samples]
    counts = compute_gist_count(texts, *gist)
    segments: list[Segment] = []
    joint_at, stream_at = 0, {True: 0, False: 0}  # by whether the segment is text
    for i, (sample, text, count) in enumerate(zip(samples, texts, counts, strict=True)):
        clean, plane = i + len(samples), gist[1] + 1
        pieces = [(Kind.TEXT, text, (count, 1, 1), clean, (1, 0, 0)), (Kind.TARGET, 0, sample.target, i, (plane, 0, 0))]
        pieces += [(Kind.REFERENCE, k, grid, clean, (plane + k, 0, 0)) for k, grid in enumerate(sample.references, 1)]
        for kind, index, grid, row, origin in pieces:
            # The index of a gist is the number of text tokens that it stands for.
            segment = Segment(kind, i, i, index, grid, stream_at[kind.is_text], joint_at, row, origin)
            segments.append(segment)
            joint_at += segment.length
            stream_at[kind.is_text] += segment.length
    return SelfLayout(tuple(segments), len(samples), clean_references=True)


def text_rows(layout: SelfLayout) -> int:
    """Return the rows of the prompt embeddings of a pack."""
    return sum(segment.index for segment in layout.text_segments)


def text_width(config: Any) -> int:
    """Return the columns of the prompt embeddings: the bundles side by side."""
    return (1 + len(config.injection_layer_ids)) * config.cap_feat_dim


def _is_image(segment: Segment) -> bool:
    return not segment.kind.is_text


@dataclass(frozen=True, kw_only=True)
class _Context(ForwardContext):
    """Context of the blocks of the whole sequence.

    Attributes:
        model: The packed model.
        states: Prompt embeddings of each sample, `[1, L, bundles * D]`.
    """

    model: Any
    states: tuple[Tensor, ...]


class Fibo2Block(SandwichBlock):
    """A block that may read the prompt embeddings; `bundle` is the number of those that it reads."""

    bundle: int = 0

    def between(
        self, x: Tensor, branch: Branch, scale: Tensor | None, rows: Tensor | None, context: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the attention and the cross-attention to the prompt embeddings; arguments as in `SandwichBlock`."""
        block, impl = self.block, context.impl
        x, hidden = add_and_normalise(x, branch, block.cross_attn_norm1, None, rows, impl)
        segments = context.layout.targets if self.last else context.layout.segments
        lengths = [sum(s.length for s in segments if s.sample == i) for i in range(context.layout.num_samples)]
        width = block.cross_attention.to_k.in_features
        columns = slice(self.bundle * width, (self.bundle + 1) * width)
        out = []
        for i, (part, states) in enumerate(zip(hidden.split(lengths), context.states, strict=True)):
            context.model.adapt_to_sample(i)
            out.append(block.cross_attention(part[None], encoder_hidden_states=states[..., columns])[0])
        context.model._adapt(context.layout)
        branch = branch_of(torch.cat(out), block.cross_attn_norm2, block.cross_attn_gate.tanh()[None])
        return add_and_normalise(x, branch, block.ffn_norm1, scale, rows, impl)


class PackedFibo2(SandwichModel):
    """A `BriaFibo2Transformer2DModel` that runs packs of samples of all sizes; arguments as in `SandwichModel`."""

    block_classes: ClassVar = dict.fromkeys(("noise_refiner", "layers"), Fibo2Block)
    ends = ("x_embedder", "t_embedder", "perceiver", "final_layer")

    def __init__(self, transformer: Any, **options: Any) -> None:
        super().__init__(transformer, **options)
        for bundle, number in enumerate(transformer.config.injection_layer_ids, 1):
            self._stages["layers"][number].bundle = bundle

    def _layout(self, samples: Sequence[Sample]) -> SelfLayout:
        return fibo2_layout(samples, self.transformer.config)

    def _text_shape(self, layout: SelfLayout) -> tuple[int, int]:
        return text_rows(layout), text_width(self.transformer.config)

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model = self.transformer
        image, device, dtype = image.to(text.dtype), image.device, text.dtype
        rotary = memo(layout, _rotary, model.rope_embedder, device)
        states = text.split([segment.index for segment in layout.text_segments])
        gist = self._gist(text, [each[None] for each in states], layout)
        self._adapt(layout)
        t = torch.cat([timestep * model.config.t_scale, torch.zeros_like(timestep)])
        temb = model.t_embedder(t)  # [2 S, 256]
        step = self._step(layout, kept, rotary, dtype)
        whole, layout, image = layout, step.layout, step.computed("image", image)
        images = model.x_embedder(image)
        part = whole, _is_image, rotary, step.references, dtype
        images = self._run_stage("noise_refiner", images, temb, self._part(*part))
        joint = torch.cat([gist, images]).index_select(0, joint_sources(layout, device))
        del images, gist, image
        context = _Context(**vars(step), model=self, states=tuple(each[None] for each in states))
        out = self._run_stage("layers", joint, temb, context)
        if step.references is not None:
            step.references.finish()
        return self._final(out, temb, layout, model.final_layer).float()

    def _gist(self, text: Tensor, states: Sequence[Tensor], layout: SelfLayout) -> Tensor:
        """Return the gist tokens of all samples, `[N, C]`; once for all steps of a pack."""
        model = self.transformer
        width = model.config.cap_feat_dim

        def compute() -> Tensor:
            found = []
            for segment, each in zip(layout.text_segments, states, strict=True):
                self.adapt_to_sample(segment.sample)
                found.append(model.perceiver(each[..., :width], segment.length)[0])
            return torch.cat(found)

        return compute() if self._constants is None else self._constants.text_stream(text, (model.perceiver,), compute)

    def adapt_to_sample(self, sample: int) -> None:
        """Tell the adapters of single samples that the next modules get all tokens of a sample as one, `[1, n, C]`."""
        self._adapt(_one_row(sample))


@functools.lru_cache(maxsize=64)
def _one_row(sample: int) -> SelfLayout:
    return SelfLayout((Segment(Kind.TARGET, sample, sample, 0, (1, 1, 1), 0, 0, sample, (0, 0, 0)),), 1, True)


def _rotary(layout: SelfLayout, embedder: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin in joint order, float32 `[N, D / 2]` each, from the model's own tables."""
    with torch.device("cpu"):
        ids = torch.cat([grid_positions(segment.origin, segment.grid) for segment in layout.segments])
    turn = embedder(ids.to(device))
    return turn.real.contiguous(), turn.imag.contiguous()
