"""JoyImage-Edit-Plus over a packed, ragged sequence.

`PackedJoyImage` runs the parameters of a live diffusers `JoyImageEditPlusTransformer3DModel`, whose blocks have two
streams as those of Qwen-Image. A token is a patch of 2 x 2 latent pixels. Images are numbered on the first rotary axis
and begin at 0 on the other two; text is not rotated. All blocks add a table of their own to one modulation.

diffusers pads the samples of a batch to the longest one and hides the padding from attention. A pack has no padding.

Shapes: S samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uniref_fast.layout import SelfLayout
from uniref_fast.models.compiled_block import TracedContext
from uniref_fast.models.flux1 import FLUX1
from uniref_fast.models.kept_references import Kept
from uniref_fast.models.onednn_linear import CallLinear
from uniref_fast.models.packed import ModelSizes, PackedModel, angle_dtype
from uniref_fast.models.qwen_image import QKV, DoubleStreamBlock, Modulation

__all__ = ["JOYIMAGE", "PackedJoyImage"]


JOYIMAGE = FLUX1
"""Scheme of `JoyImageEditPlusPipeline`, whose images have one frame: image i begins at (i, 0, 0), as in FLUX.1."""


class JoyImageBlock(DoubleStreamBlock):
    """A block with two streams, which adds a table of its own to the modulation that all blocks share."""

    finite = staticmethod(lambda x: x)

    def first_linears(self) -> tuple[nn.Module, nn.Module]:
        return self.block.attn.img_attn_qkv, self.block.attn.txt_attn_qkv

    def projections(self, x: Tensor, stream: str, linear: CallLinear) -> QKV:
        attn = self.block.attn
        fused = attn.img_attn_qkv if stream == "image" else attn.txt_attn_qkv
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in linear(fused, x).chunk(3, dim=-1))
        return q, k, v

    def output(self, stream: str) -> nn.Module:
        attn = self.block.attn
        return attn.img_attn_proj if stream == "image" else attn.txt_attn_proj

    def modulation(self, temb: Tensor, layout: SelfLayout | TracedContext) -> tuple[Modulation, Modulation]:
        """Return the modulation of both streams, of the shared one, `[S, 6 C]`."""
        shared = temb.unflatten(1, (6, -1))
        return Modulation(*self.block.img_mod(shared)), Modulation(*self.block.txt_mod(shared))


class PackedJoyImage(PackedModel):
    """A `JoyImageEditPlusTransformer3DModel` that runs packs of samples of different sizes.

    The arguments are those of `PackedModel`. The channels of a token are those of a patch, `(channel, row, column)`.
    """

    block_classes: ClassVar = {"double_blocks": JoyImageBlock}
    ends = ("img_in", "condition_embedder", "norm_out", "proj_out")
    text_channels = "text_dim"
    scheme = JOYIMAGE
    row_kinds = (("text_embedder", "text"), ("condition_embedder", "table"), (".txt_", "text"), ("", "image"))

    @classmethod
    def sizes(cls, config: Any) -> ModelSizes:
        heads = config.num_attention_heads
        channels = config.in_channels * math.prod(config.patch_size)
        return ModelSizes(channels, heads, config.hidden_size // heads, config.num_layers)

    def times(self, timesteps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return times from which `forward` gets the timesteps without rounding, as the pipeline passes them."""
        return torch.stack([t.to(angle_dtype(t.device)) / 1000 for t in timesteps])

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model, config = self.transformer, self.transformer.config
        rotary = layout.rotary(config.rope_dim_list, image.device, config.theta)
        context = self._step(layout, kept, rotary, image.dtype)
        layout, image = context.layout, context.computed("image", image)
        modulation = self._modulation((timestep * 1000).float(), text)
        text = self._text_stream(text, layout, model.condition_embedder.text_embedder)
        patches = image.unflatten(1, (config.in_channels, *config.patch_size))
        streams = [model.img_in(patches).flatten(1), text]  # [n, C] each
        del image, text, patches
        out = model.proj_out(model.norm_out(self._run_blocks(streams, modulation, context)))
        # The channels come last in the output and first in the latents.
        return out.unflatten(1, (math.prod(config.patch_size), -1)).transpose(1, 2).flatten(1)

    def _modulation(self, timestep: Tensor, like: Tensor) -> Tensor:
        """Return the modulation that all blocks share, `[S, 6 C]`, with the dtype of another tensor."""
        embedder = self.transformer.condition_embedder
        embedding = embedder.timesteps_proj(timestep)
        dtype = next(embedder.time_embedder.parameters()).dtype  # float32 in a model of 16 bits
        if dtype != torch.int8:
            embedding = embedding.to(dtype)
        return embedder.time_proj(embedder.act_fn(embedder.time_embedder(embedding).type_as(like)))
