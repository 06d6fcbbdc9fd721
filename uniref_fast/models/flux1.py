"""FLUX.1, LongCat-Image and FIBO over a packed, ragged sequence.

The packed models run the parameters of live transformers of diffusers, whose blocks are the same: blocks with two
streams come first, then blocks with one stream of all tokens in joint order, in which attention and feed-forward run in
parallel. Every block computes its modulation of the timestep embedding in its adaptive norms. The models differ in what
they embed beside the time, and in their positions:

- FLUX.1 embeds a guidance scale and a vector of the whole prompt, which comes in the last columns of the prompt
  embeddings, the same in every row of a prompt;
- LongCat-Image embeds the time alone, and its images have positions after the text;
- FIBO replaces, before every block, one half of the channels of the text stream by a projection of a layer of the text
  encoder. The layers of all blocks come in the last columns of the prompt embeddings.

Shapes: S samples, R rows of the modulation table, C channels, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import Grid, Position, RotaryScheme, Sample, SelfLayout
from uniref_fast.memo import memo
from uniref_fast.models.compiled_block import TracedContext
from uniref_fast.models.kept_references import Kept, ReferenceRows
from uniref_fast.models.onednn_linear import CallLinear
from uniref_fast.models.packed import ForwardContext, PackedModel, angle_dtype
from uniref_fast.models.qwen_image import QKV, DoubleStreamBlock, Modulation, project_qkv
from uniref_fast.models.single_stream import SingleStreamBlock
from uniref_fast.models.tanh_gelu import runs_native_activation

__all__ = ["FLUX1", "LONGCAT", "PackedFibo", "PackedFlux1", "PackedLongCat"]


def _text(sample: Sample, n: int) -> Position:
    return 0, 0, 0


def _image(index: int, grid: Grid) -> Position:
    return index, 0, 0


FLUX1 = RotaryScheme(_text, _image, text_axes=())
"""Scheme of `FluxKontextPipeline` and `BriaFiboEditPipeline`: image i has i on the first axis, all text is at 0."""


def _text_after(sample: Sample, n: int) -> Position:
    return 0, n, n


def _image_after(index: int, grid: Grid) -> Position:
    return 1 + index, 0, 0


LONGCAT = RotaryScheme(_text_after, _image_after, text_axes=(1, 2), after_text=(1, 2))
"""Scheme of `LongCatImageEditPipeline`: text on the diagonal of height and width, images after it."""


class Flux1DoubleStreamBlock(DoubleStreamBlock):
    """A block with two streams and adaptive norms."""

    mlps: ClassVar = ("ff", "ff_context")

    def layer_norms(self) -> list[list[Any]]:
        block = self.block
        return [[block.norm1.norm, block.norm2], [block.norm1_context.norm, block.norm2_context]]

    def modulation(self, temb: Tensor, layout: SelfLayout | TracedContext) -> tuple[Modulation, Modulation]:
        """Return the modulation of both streams, from the timestep embedding, `[R, C]`."""
        norms = self.block.norm1, self.block.norm1_context
        image, text = (Modulation(*norm.linear(norm.silu(temb)).chunk(6, dim=-1)) for norm in norms)
        return image, text


class Flux1SingleStreamBlock(SingleStreamBlock):
    """A block with one stream and an adaptive norm."""

    @property
    def norm(self) -> Any:
        return self.block.norm.norm

    @property
    def first_linear(self) -> Any:
        return self.block.proj_mlp

    def modulation(self, temb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norm = self.block.norm
        shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=-1)
        return shift, scale, gate

    def project(self, y: Tensor, rows: Tensor | None, linear: CallLinear) -> tuple[QKV, Tensor]:
        mlp = linear(self.block.proj_mlp, y if rows is None else y[rows])  # first, as in diffusers
        return project_qkv(self.block.attn, y, linear), mlp

    def activate(self, mlp: Tensor, impl: str | None) -> Tensor:
        activation = self.block.act_mlp
        return ops.gelu(mlp) if runs_native_activation(activation, mlp, impl) else activation(mlp)

    @property
    def last_linear(self) -> Any:
        return self.block.proj_out


class PackedFlux1(PackedModel):
    """A `FluxTransformer2DModel` that runs packs of samples of different sizes; arguments as in `PackedModel`."""

    block_classes: ClassVar = {
        "transformer_blocks": Flux1DoubleStreamBlock,
        "single_transformer_blocks": Flux1SingleStreamBlock,
    }
    modulations = ("norm", "norm1", "norm1_context")
    ends: ClassVar[tuple[str, ...]] = ("time_text_embed", "x_embedder", "context_embedder", "norm_out", "proj_out")
    row_kinds = (
        ("time_", "table"), ("norm", "table"), ("context_embedder", "text"), ("caption_projection", "text"),
        ("single_transformer_blocks", "joint"), ("to_added_qkv", "text"), (".add_", "text"), ("to_add_out", "text"),
        ("ff_context", "text"), ("", "image"),
    )  # fmt: skip
    scheme = FLUX1

    @classmethod
    def prompt_channels(cls, config: Any) -> int:
        return config["joint_attention_dim"] + config["pooled_projection_dim"]

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model, config = self.transformer, self.transformer.config
        angles = angle_dtype(image.device)
        rotary = layout.rotary(config.axes_dims_rope, image.device, config.get("rope_theta", 10000), angles)
        context, whole = self._step(layout, kept, rotary, image.dtype), layout
        layout, image = context.layout, context.computed("image", image)
        temb = self._time_embedding(timestep, text, whole)
        stream = self._text_stream(text, layout, model.context_embedder, columns=config.joint_attention_dim)
        streams = [model.x_embedder(image), stream]  # [n, C] each
        out = self._run_blocks(streams, temb, context, before=self._before_blocks(text, layout))
        return self._head(out, temb, context)

    def _time_embedding(self, timestep: Tensor, text: Tensor, layout: SelfLayout) -> Tensor:
        """Return the embedding of the time and of what else the model embeds, `[S, C]`.

        Args:
            timestep: Time of each sample in [0, 1], `[S]`.
            text: Prompt embeddings of the pack, `[N_text, text_channels]`.
            layout: Layout of the pack.
        """
        first = text.index_select(0, memo(layout, _first_text_rows, text.device))
        embedded = [timestep.to(text.dtype) * 1000]
        if layout.guidance:
            embedded.append(layout.guidance_scales(timestep.device).to(text.dtype) * 1000)
        return self.transformer.time_text_embed(*embedded, first[:, self.transformer.config.joint_attention_dim :])

    def _before_blocks(self, text: Tensor, layout: SelfLayout) -> Callable[[int, list[Tensor]], None] | None:
        """Return what the model does to the streams before each block, as `_run_blocks` takes it.

        Args:
            text: Prompt embeddings of the pack, `[N_text, text_channels]`.
            layout: Layout of the rows that are computed.
        """
        return None

    def _check(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> None:
        super()._check(image, text, timestep, layout)
        if {s.sample for s in layout.text_segments} != set(range(layout.num_samples)):
            raise ValueError("every sample needs at least one text token")
        self._check_guidance(layout)


class PackedLongCat(PackedFlux1):
    """A `LongCatImageTransformer2DModel` that runs packs of samples; arguments as in `PackedModel`."""

    ends: ClassVar[tuple[str, ...]] = ("time_embed", "x_embedder", "context_embedder", "norm_out", "proj_out")
    scheme = LONGCAT

    @classmethod
    def prompt_channels(cls, config: Any) -> int:
        return config["joint_attention_dim"]

    def _time_embedding(self, timestep: Tensor, text: Tensor, layout: SelfLayout) -> Tensor:
        return self.transformer.time_embed(timestep.to(text.dtype) * 1000, text.dtype)

    def _check_guidance(self, layout: SelfLayout) -> None:
        if layout.guidance:
            raise ValueError("the samples have guidance scales, but the model has no guidance embeddings")


class PackedFibo(PackedLongCat):
    """A `BriaFiboTransformer2DModel` that runs packs of samples; arguments as in `PackedModel`."""

    ends = ("time_embed", "x_embedder", "context_embedder", "norm_out", "proj_out", "caption_projection")
    scheme = FLUX1

    @classmethod
    def prompt_channels(cls, config: Any) -> int:
        blocks = config["num_layers"] + config["num_single_layers"]
        return config["joint_attention_dim"] + blocks * config["text_encoder_dim"]

    def times(self, timesteps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        # In float32, because the pipeline rounds the timestep to the dtype of the latents, and not the time.
        return torch.stack([t.to(dtype).float() / 1000 for t in timesteps])

    def _time_embedding(self, timestep: Tensor, text: Tensor, layout: SelfLayout) -> Tensor:
        return self.transformer.time_embed((timestep.float() * 1000).to(text.dtype), dtype=text.dtype)

    def _context(
        self, layout: SelfLayout, rotary: tuple[Tensor, Tensor], references: ReferenceRows | None, dtype: torch.dtype
    ) -> ForwardContext:
        # The text stream changes between two blocks, so no block can leave its last residual to the next one.
        return replace(super()._context(layout, rotary, references, dtype), fuse_residual=False)

    def _before_blocks(self, text: Tensor, layout: SelfLayout) -> Callable[[int, list[Tensor]], None]:
        config, projections = self.transformer.config, self.transformer.caption_projection
        width, first = config.text_encoder_dim, config.joint_attention_dim
        joint = layout.joint_index("text", text.device).long()

        def replace_half(block: int, streams: list[Tensor]) -> None:
            """Replace the second half of the channels of the text."""
            start = first + block * width
            caption = projections[block](text[:, start : start + width])
            x = streams[-1]
            half = x.shape[1] - caption.shape[1]
            if len(streams) == 2:
                streams[-1] = torch.cat([x[:, :half], caption], dim=-1)
            else:
                rows = torch.cat([x.index_select(0, joint)[:, :half], caption], dim=-1)
                streams[-1] = x.index_copy(0, joint, rows) if x.requires_grad else x.index_copy_(0, joint, rows)

        return replace_half


def _first_text_rows(layout: SelfLayout, device: torch.device) -> Tensor:
    """Return the first row of the text stream of each sample, int64 `[S]`."""
    first = {s.sample: s.stream_start for s in reversed(layout.text_segments)}
    return torch.tensor([first[sample] for sample in range(layout.num_samples)], dtype=torch.int64, device=device)
