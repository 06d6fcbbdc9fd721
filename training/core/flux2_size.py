"""Sizes of a FLUX.2 model and of its trained part, without loading it (`model_size.ModelSize`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from uniref_fast.budget import fit_to_budget
from uniref_fast.training.core.model_size import BlockSize, ModelSize

__all__ = ["Flux2Size"]

TEXT_LENGTH = 512  # tokens to which the pipelines pad every text
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Flux2Size(ModelSize):
    """Sizes of a FLUX.2 pipeline; the defaults are those of `Flux2Transformer2DModel`, which is FLUX.2-dev.

    Attributes:
        kept_single: Widths per token that a block with one stream keeps for the backward.
        num_single_layers: Number of blocks with one stream; `num_layers` is that of blocks with two.
        mlp_ratio: Width of the feed-forwards, in widths of the model.
        timestep_guidance_channels: Channels of the embedding of the time and of the guidance scale.
        guidance_embeds: The model embeds a guidance scale.
    """

    transformer_class: ClassVar[str] = "Flux2Transformer2DModel"
    lora_targets: ClassVar[tuple[str, ...]] = (*PROJECTIONS, "linear_in", "linear_out", "to_qkv_mlp_proj", "to_out")
    shares_packs: ClassVar[bool] = False
    clean_pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinKVPipeline",)
    kept: ClassVar[int] = 26
    kept_single: ClassVar[int] = 23
    recomputing: ClassVar[int] = 36
    coding: ClassVar[tuple[float, float]] = (5.1, 6.1)

    num_layers: int = 8
    num_single_layers: int = 48
    num_attention_heads: int = 48
    in_channels: int = 128
    out_channels: int = 0  # as many as in_channels
    patch_size: int = 1
    joint_attention_dim: int = 15360
    mlp_ratio: float = 3.0
    timestep_guidance_channels: int = 256
    guidance_embeds: bool = True
    vae_width: int = 128

    @property
    def kept_widths(self) -> int:
        return self.kept * self.num_layers + self.kept_single * self.num_single_layers

    @property
    def num_blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def blocks(self) -> list[BlockSize]:
        width, mlp = self.width, int(self.mlp_ratio * self.width)
        double = {f"attn.{name}": (width, width) for name in PROJECTIONS}
        double |= {f"{name}.linear_in": (2 * mlp, width) for name in ("ff", "ff_context")}
        double |= {f"{name}.linear_out": (width, mlp) for name in ("ff", "ff_context")}
        single = {"attn.to_qkv_mlp_proj": (3 * width + 2 * mlp, width), "attn.to_out": (width, width + mlp)}
        groups = (("transformer_blocks", self.num_layers, double, 4),
                  ("single_transformer_blocks", self.num_single_layers, single, 2))  # fmt: skip
        return [
            BlockSize(f"{group}.{i}", linears, _numbers(linears) + norms * self.attention_head_dim)
            for group, count, linears, norms in groups
            for i in range(count)
        ]

    @property
    def transformer(self) -> int:
        return sum(block.parameters for block in self.blocks) + _numbers(self._outer_linears())

    def _outer_linears(self) -> dict[str, tuple[int, int]]:
        width, embedders = self.width, ("timestep_embedder", "guidance_embedder")[: 1 + self.guidance_embeds]
        found = {
            "x_embedder": (width, self.in_channels),
            "context_embedder": (width, self.joint_attention_dim),
            "double_stream_modulation_img.linear": (6 * width, width),
            "double_stream_modulation_txt.linear": (6 * width, width),
            "single_stream_modulation.linear": (3 * width, width),
            "norm_out.linear": (2 * width, width),
            "proj_out": (self.out_channels or self.in_channels, width),
        }
        for name in embedders:
            found[f"time_guidance_embed.{name}.linear_1"] = width, self.timestep_guidance_channels
            found[f"time_guidance_embed.{name}.linear_2"] = width, width
        return found

    def text_tokens(self, instruction: str, references: int) -> int:
        return TEXT_LENGTH

    def with_vae(self, vae: Mapping[str, Any]) -> ModelSize:
        channels = vae["block_out_channels"]
        return replace(self, vae_width=int(channels[0]), token_side=2 ** len(channels))

    def transformer_config(self) -> dict[str, Any]:
        names = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels",
                 "joint_attention_dim", "mlp_ratio", "timestep_guidance_channels", "guidance_embeds")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"out_channels": self.out_channels or None}

    def reference_sizes(self, references: Sequence[tuple[int, int]], budget: int | None) -> Sequence[tuple[int, int]]:
        if budget is not None:
            return fit_to_budget(references, budget)
        from uniref_fast.models.flux2_family import AREA
        from uniref_fast.models.image_sizes import at_most

        return [at_most(size, AREA, self.token_side) for size in references]


def _numbers(linears: Mapping[str, tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in linears.values())
