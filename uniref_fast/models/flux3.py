"""FLUX.3 over a packed, ragged sequence.

`PackedFlux3` runs the parameters of a live diffusers `Flux3Transformer2DModel`. Its tokens have three modes: text, the
noisy target, and references. Blocks of one mode come first, which see the tokens of their mode alone, then blocks of
all tokens. In every block attention and feed-forward share one input.

Text and references are modulated with t = 0. Before the blocks of all tokens they see nothing that changes between the
steps of an edit, so their blocks run once for all steps of a pack. A flow map is an exception: it embeds the time to
which a step jumps, also for text and references.

Shapes: S samples, C channels, N tokens. The modulation table of the blocks of all tokens has 3 S rows: targets,
references, text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.layout import Grid, Kind, Position, RotaryScheme, Sample, Segment, SelfLayout
from uniref_fast.memo import memo, version_of
from uniref_fast.models.eight_bit import attend, feed_forward, first_linear, gated_input, modulated_input
from uniref_fast.models.kept_references import Kept
from uniref_fast.models.module_hooks import may_have_hooks
from uniref_fast.models.packed import (
    DeferredResidual,
    ForwardContext,
    ModelSizes,
    PackedBlock,
    PackedModel,
    angle_dtype,
    skip,
)
from uniref_fast.models.qwen_image import joint_qkv, project_output, project_qkv
from uniref_fast.models.step_constants import StepConstants

__all__ = ["FLUX3", "MODES", "PackedFlux3", "flux3_layout", "mode_layout"]

SCALES = (1.0, 0.5, 0.5, 1.0)
"""Factor of the positions of each rotary axis, with which the model was trained."""

MODES = {
    Kind.TEXT: ("txt", "txt_mode_blocks"),
    Kind.TARGET: ("image", "mode_blocks.image"),
    Kind.REFERENCE: ("image_cond", "mode_blocks.image_cond"),
}
"""Name of the parameters of each mode in the transformer, and of the list of its blocks."""


def _text(sample: Sample, n: int) -> Position:
    return 0, 0, 0, n


def _image(index: int, grid: Grid) -> Position:
    return 0, 0, 0, -index


FLUX3 = RotaryScheme(_text, _image, text_axes=(3,))
"""Scheme of the modular pipeline: the target at 0 of the last axis, reference i at -i, text from 0 upwards."""


@functools.lru_cache(maxsize=8)
def flux3_layout(samples: tuple[Sample, ...], shared_references: bool = False) -> SelfLayout:
    """Return the layout of a pack for FLUX.3; text has modulation rows of its own.

    Args:
        samples: Samples of the pack, in order.
        shared_references: Hold the references of samples of one group once, see `SelfLayout.pack`.
    """
    layout = SelfLayout.pack(samples, FLUX3, clean_references=True, shared_references=shared_references)
    first = 2 * len(samples)
    return replace(
        layout,
        segments=tuple(replace(s, mod_row=first + s.sample) if s.kind.is_text else s for s in layout.segments),
    )


class Flux3Block(PackedBlock):
    """A block with one stream of its tokens, in joint order, whose attention and feed-forward share their input."""

    def _run(
        self, streams: list[Tensor], residuals: list[DeferredResidual], temb: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        attn, impl, linear = self.block.attn, context.impl, context.linear
        shift, scale, gate = temb.chunk(3, dim=-1)
        rows = context.modulation_rows("joint")
        x, eps = streams.pop(), self.block.norm.eps
        first = None if first_linear(self.block.ff) is None else attn.to_q
        if residuals:
            x, y = gated_input(first, x, *residuals.pop(), shift, scale, rows, eps, impl)
        else:
            y = modulated_input(first, x, shift, scale, rows, eps, impl)
        plan = context.plan
        q, k, v = joint_qkv(attn, project_qkv(attn, y, linear), None, context)
        if self.last:  # no other rows of its output are used
            targets = context.target_rows()
            rows = context.modulation_rows("image")[targets]
            targets = context.layout.joint_index("image", x.device)[targets]
            plan, q, y, x = context.target_plan, q[targets], y[targets], x[targets]
        out = attend(q, k, v, plan, impl, context.for_training, self.attention_8bit)
        del q, k, v
        branch = project_output(attn.to_out, out.flatten(1), linear) + feed_forward(self.block.ff, y, impl, linear)
        del out, y
        if context.fuse_residual and not self.last:
            return [x], [DeferredResidual(branch, gate)]
        return [ops.gate_residual(x, branch, gate, rows, impl=impl)], []


@dataclass(eq=False)
class Flux3Constants(StepConstants):
    """Text and references of one pack behind the blocks of their modes, as the first step has computed them."""

    references: StepConstants = field(default_factory=StepConstants)

    def stores(self) -> tuple[StepConstants, ...]:
        return self, self.references

    def pack_sources(self, image: Tensor) -> tuple[Tensor, ...]:
        return (image,)


class PackedFlux3(PackedModel):
    """A `Flux3Transformer2DModel` that runs packs of samples of different sizes; arguments as in `PackedModel`.

    `forward` takes the time of each sample, `[S]`; for a flow map `[S, 2]`, with the time to which the step jumps.
    """

    block_classes: ClassVar = dict.fromkeys(
        (*(blocks for _, blocks in MODES.values()), "single_transformer_blocks"), Flux3Block
    )
    first_lists = tuple(blocks for _, blocks in MODES.values())
    ends = (
        "timestep_embedder",
        "early_stream_modulations",
        "single_stream_modulations",
        "x_embedders",
        "context_embedder",
        "norm_out",
        "proj_out",
    )
    row_kinds = (
        ("timestep_embedder", "table"), ("modulations", "table"), ("norm_out", "table"), ("context_embedder", "text"),
        ("txt_mode_blocks", "text"), ("image_cond", "references"), ("single_transformer_blocks", "joint"),
        ("", "image"),
    )  # fmt: skip

    def __init__(self, transformer: Any, **options: Any) -> None:
        super().__init__(transformer, **options)
        self.jumps = bool(transformer.config.flow_map)
        blocks: Any = iter(self.blocks)
        self._mode_blocks: dict[Kind, list[PackedBlock]] = {
            kind: [next(blocks) for _ in transformer.get_submodule(path)] for kind, (_, path) in MODES.items()
        }
        self._joint_blocks: list[PackedBlock] = [*blocks]

    def layout(self, samples: Sequence[Sample], *, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for this model (`flux3_layout`).

        Args:
            samples: Samples of the pack, in order.
            shared_references: Hold the references of samples of one group once, see `SelfLayout.pack`.
        """
        return flux3_layout(tuple(samples), shared_references)

    @classmethod
    def sizes(cls, config: Any) -> ModelSizes:
        """Return the sizes; the blocks are those of all tokens, whose keys and values of references can be kept."""
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        return ModelSizes(config.in_channels, heads, head_dim, config.num_single_layers)

    def constant_rows(self, layout: SelfLayout) -> int:
        targets = sum(segment.length for segment in layout.targets)
        return 0 if self.jumps else layout.joint_length - targets

    def times(self, timesteps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack([t / 1000 for t in timesteps]).to(dtype)

    def step_constants(self) -> StepConstants:
        return Flux3Constants()

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model, stream, whole = self.transformer, image, layout
        references = None if kept is None else self._references(layout, kept)
        if references is not None:
            layout, stream = references.layout, references.stream("image", image)
        context = self._context(layout, self._rotary(layout, image.device), references, image.dtype)
        times = self._time_embeddings(timestep.to(image.dtype))
        modes = [
            self._kept_stream(Kind.TEXT, text, text, whole, times, context),
            self._mode_stream(Kind.TARGET, stream, layout, times, context),
            self._kept_stream(Kind.REFERENCE, image, stream, whole, times, context),
        ]
        heads = {kind: model.single_stream_modulations[name](times[kind]) for kind, (name, _) in MODES.items()}
        table = torch.cat([heads[Kind.TARGET], heads[Kind.REFERENCE], heads[Kind.TEXT]])  # [3 S, 3 C]
        joint = _joined(modes, layout)
        del modes, stream
        out = self._run_blocks([joint], table, context, self._joint_blocks)
        scale, shift = model.norm_out.linear(times[Kind.TARGET]).chunk(2, dim=1)
        rows = memo(layout, _target_samples, image.device)
        return model.proj_out(ops.norm_modulate(out, shift, scale, rows, model.norm_out.norm.eps, impl=self.impl))

    def _rotary(self, layout: SelfLayout, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.transformer.config
        return layout.rotary(config.axes_dims_rope, device, config.rope_theta, angle_dtype(device), SCALES)

    def _time_embeddings(self, timestep: Tensor) -> dict[Kind, Tensor]:
        """Return the activated embedding of the time of each sample for the tokens of each mode, `[S, C]`."""
        model, jump = self.transformer, None
        if self.jumps:
            timestep, jump = timestep.unbind(1)

        def embedded(embedder: nn.Module, t: Tensor) -> Tensor:
            return embedder(model.time_proj(t * 1000).to(t.dtype))

        target = embedded(model.timestep_embedder, timestep)
        clean = embedded(model.timestep_embedder, torch.zeros_like(timestep))
        if jump is not None:
            after = embedded(model.target_timestep_embedder, jump)
            target, clean = target + after, clean + after
        target, clean = torch.nn.functional.silu(target), torch.nn.functional.silu(clean)
        return {Kind.TARGET: target, Kind.REFERENCE: clean, Kind.TEXT: clean}

    def _kept_stream(
        self,
        kind: Kind,
        source: Tensor,
        stream: Tensor,
        whole: SelfLayout,
        times: dict[Kind, Tensor],
        context: ForwardContext,
    ) -> Tensor:
        """Return the computed tokens of text or references behind their blocks; they run once for all steps of a pack.

        The tokens of the whole pack are kept, so that steps that compute only some of the references share them.

        Args:
            kind: Mode.
            source: Prompt embeddings or image stream of the whole pack, `[N, channels]`.
            stream: Rows of the source that this forward computes.
            whole: Layout of the pack.
            times: Embeddings of the time, from `_time_embeddings`.
            context: Context of the forward.
        """
        (name, _), blocks, constants = MODES[kind], self._mode_blocks[kind], self._constants
        rows = None if context.references is None or kind is Kind.TEXT else context.references
        if (
            constants is None
            or self.jumps
            or not memo(context.layout, mode_layout, kind).segments
            or (rows is not None and rows.reused and self._adapters is not None)  # they know the computed rows alone
            or any(may_have_hooks(packed.block) for packed in blocks)
        ):
            return self._mode_stream(kind, stream, context.layout, times, context)
        embed = self._embedder(kind)
        called = [child for packed in blocks for child in (*packed.block.attn.children(), packed.block.ff)]
        modulations = self.transformer.early_stream_modulations[name]
        modules = (embed, self.transformer.timestep_embedder, modulations, *called)
        if kind is Kind.TEXT:
            store, state = constants, version_of(source)
            given = source
        else:  # the rows of the targets in the image stream change with the steps, those of the references do not
            store, state = constants.references, 0  # type: ignore[attr-defined]
            given = constants.image_source(source)
        kept = store.stream(
            (given, whole), state, modules, lambda: self._mode_stream(kind, source, whole, times, context)
        )
        if rows is None or not rows.reused:
            return kept
        return kept.index_select(0, memo(whole, _computed_references, rows.reused, kept.device))

    def _embedder(self, kind: Kind) -> nn.Module:
        model = self.transformer
        return model.context_embedder if kind is Kind.TEXT else model.x_embedders[MODES[kind][0]]

    def _mode_stream(
        self, kind: Kind, stream: Tensor, whole: SelfLayout, times: dict[Kind, Tensor], context: ForwardContext
    ) -> Tensor:
        """Return the tokens of a mode behind its blocks, `[n, C]`.

        Args:
            kind: Mode.
            stream: Text stream or image stream, `[N, channels]`.
            whole: Layout of the stream.
            times: Embeddings of the time, from `_time_embeddings`.
            context: Context of the forward.
        """
        layout, blocks = memo(whole, mode_layout, kind), self._mode_blocks[kind]
        if not layout.segments:
            for packed in blocks:
                skip(packed.block)
            return stream.new_empty(0, times[kind].shape[1])
        x = stream if kind is Kind.TEXT else stream[memo(whole, _mode_rows, kind, stream.device)]
        own = replace(context, layout=layout, rotary=self._rotary(layout, stream.device), references=None)
        table = self.transformer.early_stream_modulations[MODES[kind][0]](times[kind])  # [S, 3 C]
        streams: list[Tensor] = [self._embedder(kind)(x)]
        residuals: list[DeferredResidual] = []
        for packed in blocks:
            streams, residuals = packed(streams, residuals, table, own)
        if not residuals:
            return streams[0]
        return ops.gate_residual(streams.pop(), *residuals.pop(), own.modulation_rows("joint"), impl=self.impl)

    def _check(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> None:
        if self.jumps:
            if timestep.ndim != 2 or timestep.shape[1] != 2:
                raise ValueError(
                    f"timestep has shape {list(timestep.shape)}, a flow map takes the time of each sample and the time "
                    "to which its step jumps, [S, 2]"
                )
            timestep = timestep[:, 0]
        super()._check(image, text, timestep, layout)
        first = 2 * layout.num_samples
        if not layout.clean_references or any(s.mod_row != first + s.sample for s in layout.text_segments):
            raise ValueError("the layout is that of another model; build it with the model's own `layout(samples)`")


def _mode(segment: Segment) -> Kind:
    return Kind.TEXT if segment.kind.is_text else segment.kind


def mode_layout(layout: SelfLayout, kind: Kind) -> SelfLayout:
    """Return the layout of the tokens of one mode, whose modulation table has one row for each sample."""
    segments: list[Segment] = []
    at = 0
    for segment in layout.segments:
        if _mode(segment) is kind:
            segments.append(replace(segment, stream_start=at, joint_start=at, mod_row=segment.sample))
            at += segment.length
    return replace(layout, segments=tuple(segments), clean_references=False)


def _mode_rows(layout: SelfLayout, kind: Kind, device: torch.device) -> Tensor:
    """Return the rows of a mode in the image stream, int64 in joint order."""
    starts = [(s.stream_start, s.length) for s in layout.segments if s.kind is kind]
    return torch.cat([torch.arange(start, start + length, device=device) for start, length in starts])


def _computed_references(layout: SelfLayout, reused: frozenset[int], device: torch.device) -> Tensor:
    """Return the rows among all references of a pack that a forward computes, int64, without those of some samples."""
    samples = [s.sample for s in layout.segments if s.kind is Kind.REFERENCE for _ in range(s.length)]
    rows = [row for row, sample in enumerate(samples) if sample not in reused]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _joined(modes: list[Tensor], layout: SelfLayout) -> Tensor:
    """Return text, targets and references, `[n, C]` each, as one stream in joint order, `[N, C]`."""
    both = torch.cat(modes)
    return both if layout.num_samples == 1 else both.index_select(0, memo(layout, _sources, both.device))


def _sources(layout: SelfLayout, device: torch.device) -> Tensor:
    """Return for each joint row its row in the streams of the modes one after the other, int64 `[N]`."""
    joint: list[Tensor] = []
    for kind in MODES:
        spans = [(s.joint_start, s.joint_end) for s in layout.segments if _mode(s) is kind]
        joint += [torch.arange(start, end, device=device) for start, end in spans]
    return torch.argsort(torch.cat(joint))


def _target_samples(layout: SelfLayout, device: torch.device) -> Tensor:
    """Return the sample of every row of the targets, int32 `[N_target]`."""
    lengths = torch.tensor([segment.length for segment in layout.targets], device=device)
    samples = torch.arange(layout.num_samples, dtype=torch.int32, device=device)
    return samples.repeat_interleave(lengths, output_size=sum(segment.length for segment in layout.targets))
