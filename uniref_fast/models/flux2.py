"""FLUX.2 over a packed, ragged sequence: dev, klein and klein-KV.

`PackedFlux2` runs the parameters of a live diffusers `Flux2Transformer2DModel`. Blocks with two streams come first,
then blocks with one stream of all tokens in joint order, in which attention and feed-forward share their two Linears.
All blocks of a kind share one modulation.

klein-KV differs by its training: its references see only each other and are modulated with t = 0. So their keys and
values are the same in every step, and `kept_references` computes them once.

Shapes: S samples, R rows of the modulation table (S, or 2 S with clean references), C channels, N tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from uniref_fast.layout import Grid, Position, RotaryScheme, Sample, SelfLayout
from uniref_fast.models.compiled_block import TracedContext
from uniref_fast.models.kept_references import Kept
from uniref_fast.models.onednn_linear import CallLinear
from uniref_fast.models.packed import PackedModel, angle_dtype
from uniref_fast.models.qwen_image import QKV, DoubleStreamBlock, Modulation
from uniref_fast.models.single_stream import SingleStreamBlock
from uniref_fast.visibility import Rule

__all__ = ["FLUX2", "PackedFlux2", "has_clean_references", "split_projection"]

REFERENCE_STEP = 10
"""Distance of two references on the first rotary axis."""


def _text(sample: Sample, n: int) -> Position:
    return 0, 0, 0, n


def _image(index: int, grid: Grid) -> Position:
    return REFERENCE_STEP * index, 0, 0, 0


FLUX2 = RotaryScheme(_text, _image, text_axes=(3,))
"""Scheme of `Flux2Pipeline`: the target at 0 of the first axis, reference i at 10 i, text on the last axis."""


def has_clean_references(transformer: Any) -> bool:
    """Return True for the transformer of a `Flux2KleinKVPipeline`, which its attention processors distinguish."""
    processor = transformer.transformer_blocks[0].attn.processor
    return type(getattr(processor, "stock", processor)).__name__ == "Flux2KVAttnProcessor"


class Flux2DoubleStreamBlock(DoubleStreamBlock):
    """A block with two streams; the tables of its modulation are the first two parts of the shared one."""

    norms: ClassVar = (("norm1", "norm2"), ("norm1_context", "norm2_context"))
    mlps = ("ff", "ff_context")

    def modulation(self, temb: Tensor, layout: SelfLayout | TracedContext) -> tuple[Modulation, Modulation]:
        """Return the modulation of both streams out of the shared table, `[R, 15 C]`."""
        parts = temb.chunk(15, dim=-1)
        return Modulation(*parts[:6]), Modulation(*parts[6:12])


class Flux2SingleStreamBlock(SingleStreamBlock):
    """A block with one stream, whose attention and feed-forward share their two Linears."""

    @property
    def norm(self) -> Any:
        return self.block.norm

    @property
    def first_linear(self) -> Any:
        return self.block.attn.to_qkv_mlp_proj

    def modulation(self, temb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, gate = temb.chunk(15, dim=-1)[12:]
        return shift, scale, gate

    def project(self, y: Tensor, rows: Tensor | None, linear: CallLinear) -> tuple[QKV, Tensor]:
        attn = self.block.attn
        qkv, mlp = split_projection(attn, linear(attn.to_qkv_mlp_proj, y))
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in qkv.chunk(3, dim=-1))
        return (q, k, v), mlp if rows is None else mlp[rows]

    def activate(self, mlp: Tensor, impl: str | None) -> Tensor:
        return self.block.attn.mlp_act_fn(mlp)

    @property
    def last_linear(self) -> Any:
        return self.block.attn.to_out


def split_projection(attn: Any, fused: Tensor) -> tuple[Tensor, Tensor]:
    """Split the output of `to_qkv_mlp_proj`, `[N, ...]`, into those of attention and feed-forward.

    It is split by the ratio of their widths, which stays the same where tensor parallelism shards the heads.
    """
    of_attention, of_mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
    width = fused.shape[-1] * of_attention // (of_attention + of_mlp)
    return fused[:, :width], fused[:, width:]


class PackedFlux2(PackedModel):
    """A `Flux2Transformer2DModel` that runs packs of samples of different sizes; other arguments as in `PackedModel`.

    Args:
        transformer: The diffusers model whose parameters are used.
        visibility: Policy name or rule. "full" is the visibility of the model in diffusers, which for klein-KV is
            "reference_causal".
        options: Further arguments of `PackedModel`.
    """

    block_classes: ClassVar = {
        "transformer_blocks": Flux2DoubleStreamBlock,
        "single_transformer_blocks": Flux2SingleStreamBlock,
    }
    ends = (
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "x_embedder",
        "context_embedder",
        "norm_out",
        "proj_out",
    )
    row_kinds = (
        ("time_guidance_embed", "table"), ("modulation", "table"), ("norm_out", "table"), ("context_embedder", "text"),
        ("single_transformer_blocks", "joint"), ("to_added_qkv", "text"), (".add_", "text"), ("to_add_out", "text"),
        ("ff_context", "text"), ("", "image"),
    )  # fmt: skip
    scheme = FLUX2

    def __init__(self, transformer: Any, *, visibility: str | Rule = "full", **options: Any) -> None:
        self.clean_references = has_clean_references(transformer)
        if self.clean_references and visibility == "full":
            visibility = "reference_causal"
        super().__init__(transformer, visibility=visibility, **options)

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model = self.transformer
        angles = angle_dtype(image.device)
        rotary = layout.rotary(model.config.axes_dims_rope, image.device, model.config.rope_theta, angles)
        context = self._step(layout, kept, rotary, image.dtype)
        layout, image = context.layout, context.computed("image", image)
        temb = self._time_embedding(timestep.to(image.dtype), layout)
        modulation = (
            model.double_stream_modulation_img(temb),
            model.double_stream_modulation_txt(temb),
            model.single_stream_modulation(temb),
        )
        streams = [model.x_embedder(image), self._text_stream(text, layout, model.context_embedder)]  # [n, C] each
        out = self._run_blocks(streams, torch.cat(modulation, dim=-1), context)
        return self._head(out, temb, context)

    def _time_embedding(self, timestep: Tensor, layout: SelfLayout) -> Tensor:
        """Return the embedding of the time and the guidance scale of each row of the modulation table, `[R, C]`."""
        guidance = None
        if layout.guidance:
            guidance = layout.guidance_scales(timestep.device).to(timestep.dtype) * 1000
        if layout.clean_references:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
            guidance = None if guidance is None else torch.cat([guidance, guidance])
        return self.transformer.time_guidance_embed(timestep * 1000, guidance)

    def _check(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> None:
        super()._check(image, text, timestep, layout)
        if layout.clean_references != self.clean_references and any(s.index for s in layout.image_segments):
            raise ValueError(
                f"the layout was built with clean_references={layout.clean_references}, the model has "
                f"{self.clean_references}; build it with the model's own `layout(samples)`"
            )
        self._check_guidance(layout)
