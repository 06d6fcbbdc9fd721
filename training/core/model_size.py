"""Sizes of a model and of its trained part, from configurations and headers of files, without loading anything."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from uniref_fast.budget import fit_to_budget
from uniref_fast.builtin.store import model_folder, recorded_areas
from uniref_fast.lora.names import LINEARS
from uniref_fast.training.core.adapter import layer_parameters
from uniref_fast.training.core.recipe import LORA_TARGETS

__all__ = ["BYTES", "SIZES", "BlockSize", "ModelSize", "QwenImage21Size", "model_size"]

VISION_TOKEN = 28  # side in pixels of a token of the text encoder's vision tower
OUTPUT_AREA = 1024 * 1024  # pixels of the images of the released models
CONDITION_AREA = 384 * 384  # pixels of a reference for the text encoder, as diffusers scales it
CHARACTERS = 4  # bytes of an instruction that count as one token
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class BlockSize:
    """Sizes of one block of a transformer.

    Attributes:
        name: Name of the block in the transformer.
        linears: Rows and columns of the weights of its Linear layers, by their names in the block.
        parameters: Number of its parameters.
    """

    name: str
    linears: Mapping[str, tuple[int, int]]
    parameters: int

    @property
    def numbers(self) -> int:
        """Number of the parameters that are weights of Linear layers."""
        return sum(rows * columns for rows, columns in self.linears.values())


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a pipeline; the names are those of diffusers' configuration of the transformer.

    This class is for Qwen-Image-Edit; a subclass for another family is named in `SIZES`.

    Attributes:
        transformer_class: Class of the transformer in diffusers.
        lora_targets: Names of the Linear layers that get an adapter if a run names none.
        visibilities: Visibilities that the model can be trained with.
        shares_packs: Ranks can share a pack.
        keeps_prefix: References depend on nothing that changes between steps, under the visibility "full".
        clean_pipelines: Classes of pipelines of whose models this is true if `keeps_prefix` is False.
        kept: Widths per token that a block keeps for the backward (`memory.activation_bytes`).
        recomputing: Widths per token of the block that is recomputed, gradients of activations included.
        coding: Numbers per pixel that the VAE holds at its peak while it encodes, and while it decodes, in widths of
            its first layer.
        num_layers: Number of blocks.
        num_attention_heads: Number of attention heads.
        attention_head_dim: Width of a head.
        in_channels: Channels of a token.
        out_channels: Channels of a latent pixel.
        patch_size: Side of a token in latent pixels.
        joint_attention_dim: Width of the prompt embeddings.
        encoders: Number of parameters of the text encoder and the VAE.
        vae_width: Channels of the first layer of the VAE.
        token_side: Side of a token in pixels.
        condition_area: Pixels of a reference for the text encoder.
        reference_area: Pixels of a reference for the VAE where a stage has no joint budget.
        output_side: Side in pixels of the images that the model was made for.
        small: The model has image areas of its own, as the built-in model, and runs on a CPU.
    """

    transformer_class: ClassVar[str] = "QwenImageTransformer2DModel"
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    visibilities: ClassVar[tuple[str, ...]] = ("full", "reference_causal", "reference_isolated", "group_shared")
    shares_packs: ClassVar[bool] = True
    keeps_prefix: ClassVar[bool] = False
    clean_pipelines: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[int] = 21
    recomputing: ClassVar[int] = 24
    coding: ClassVar[tuple[float, float]] = (9.1, 17.1)

    num_layers: int = 60
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 64
    out_channels: int = 16
    patch_size: int = 2
    joint_attention_dim: int = 3584
    encoders: int = 8_292_166_656 + 126_892_531  # Qwen2.5-VL-7B and the VAE of Qwen-Image
    vae_width: int = 96
    token_side: int = 16
    condition_area: int = CONDITION_AREA
    reference_area: int = 1024**2
    output_side: int = 1024
    small: bool = False

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_channels(self) -> int:
        """Width of the prompt embeddings."""
        return self.joint_attention_dim

    @property
    def kept_widths(self) -> int:
        """Widths per token that all blocks together keep for the backward."""
        return self.kept * self.num_layers

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all kinds."""
        return self.num_layers

    @property
    def blocks(self) -> list[BlockSize]:
        """Sizes of all blocks, in the order in which they run."""
        linears = self.block_linears()
        return [BlockSize(f"transformer_blocks.{i}", linears, self.block) for i in range(self.num_layers)]

    @property
    def transformer(self) -> int:
        """Number of parameters of the transformer."""
        width = self.width
        outside = (256 + 1) * width + (width + 1) * width + self.joint_attention_dim
        outside += (self.in_channels + 1) * width + (self.joint_attention_dim + 1) * width + (width + 1) * 2 * width
        outside += (width + 1) * self.patch_size**2 * self.out_channels
        return self.num_layers * self.block + outside

    @property
    def picture_tokens(self) -> int:
        """Approximate number of text tokens of a reference: its picture, and the words that announce it."""
        return self.condition_area // VISION_TOKEN**2 + 7

    def adapter(self, rank: int, targets: Sequence[str], kind: str = "lora") -> int:
        """Return the number of parameters of an adapter; arguments and errors as for `adapter_layers`."""
        return sum(self.adapter_layers(rank, targets, kind).values())

    def adapter_layers(self, rank: int, targets: Sequence[str], kind: str = "lora") -> dict[str, int]:
        """Return the numbers of parameters of an adapter by the name of the layer.

        Args:
            rank: Rank of the adapter.
            targets: Names of the Linear layers that get an adapter; a layer's name ends with one of them.
            kind: Kind of the adapter.

        Raises:
            ValueError: No layer has one of the names, or the rank is larger than the width of a layer.
        """
        linears = self._linears()
        chosen: dict[str, tuple[int, int]] = {}
        for target in targets:
            fitting = {name: sides for name, sides in linears.items() if f".{name}".endswith(f".{target}")}
            if not fitting:
                kinds = sorted({kind for name in linears if not (kind := name.rpartition(".")[2]).isdecimal()})
                more = ", and net.0.proj and net.2 of the MLPs" if any(".net." in name for name in linears) else ""
                raise ValueError(
                    f"lora_targets: no Linear layer of the transformer has the name {target!r}; there are "
                    f"{', '.join(kinds)}{more}"
                )
            narrowest = min(map(min, fitting.values()))
            if rank > narrowest and kind != "lokr":
                raise ValueError(
                    f"lora_rank = {rank} is more than the width {narrowest} of the layers {target!r}; give at most that"
                )
            chosen |= fitting
        return {name: layer_parameters(kind, rank, rows, columns) for name, (rows, columns) in chosen.items()}

    @property
    def block(self) -> int:
        """Number of parameters of a block."""
        matrices = sum(rows * columns + rows for rows, columns in self.block_linears().values())
        return matrices + 4 * self.attention_head_dim

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """Return (rows, columns) of the weights of the Linear layers of one block, by their names in it."""
        width = self.width
        return {name: (rows * width, columns * width) for name, (rows, columns) in LINEARS.items()}

    def _linears(self) -> dict[str, tuple[int, int]]:
        """Return (rows, columns) of the weights of all Linear layers, by name."""
        blocks = {f"{block.name}.{name}": sides for block in self.blocks for name, sides in block.linears.items()}
        return blocks | self._outer_linears()

    def _outer_linears(self) -> dict[str, tuple[int, int]]:
        width = self.width
        return {
            "img_in": (width, self.in_channels),
            "txt_in": (width, self.joint_attention_dim),
            "time_text_embed.timestep_embedder.linear_1": (width, 256),
            "time_text_embed.timestep_embedder.linear_2": (width, width),
            "norm_out.linear": (2 * width, width),
            "proj_out": (self.patch_size**2 * self.out_channels, width),
        }

    def text_tokens(self, instruction: str, references: int) -> int:
        """Return roughly the number of text tokens of an instruction with a number of references."""
        return references * self.picture_tokens + len(instruction.encode()) // CHARACTERS + 6

    @classmethod
    def of(cls, transformer: Mapping[str, Any], areas: Mapping[str, int]) -> ModelSize:
        """Return the sizes that the configuration of a transformer and the image areas of its model tell.

        Args:
            transformer: Configuration of the transformer; a value that it lacks is diffusers' default.
            areas: Image areas that the model records, as the built-in model does; empty for others.
        """
        kind = _class_for(transformer) or cls
        known: dict[str, Any] = {field.name: type(field.default) for field in fields(kind)}
        return kind(
            **{name: number(transformer[name]) for name, number in known.items() if transformer.get(name) is not None},
            condition_area=areas.get("condition_image_area", CONDITION_AREA),
            reference_area=areas.get("vae_image_area", OUTPUT_AREA),
            output_side=math.isqrt(areas.get("output_area", OUTPUT_AREA)),
            small=bool(areas),
        )

    def with_vae(self, vae: Mapping[str, Any]) -> ModelSize:
        """Return the sizes with those that the configuration of the VAE tells."""
        return replace(self, vae_width=int(vae["base_dim"]), token_side=2 * 2 ** len(vae["temperal_downsample"]))

    def transformer_config(self) -> dict[str, Any]:
        """Return a configuration of a transformer of these sizes, whose references are at t = 0."""
        names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size",
                 "joint_attention_dim")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"zero_cond_t": True}

    def reference_sizes(self, references: Sequence[tuple[int, int]], budget: int | None) -> Sequence[tuple[int, int]]:
        """Return the (width, height) in pixels that references are scaled to.

        Args:
            references: Sizes of the images.
            budget: Joint pixel budget; None scales each reference as diffusers does.
        """
        if budget is not None:
            return fit_to_budget(references, budget)
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

        from uniref_fast.builtin.pipeline import small_dimensions

        dimensions = small_dimensions if self.small else calculate_dimensions
        return [dimensions(self.reference_area, width / height) for width, height in references]


@dataclass(frozen=True)
class QwenImage21Size(ModelSize):
    """Sizes of a Qwen-Image-2.1 pipeline; attributes as in `ModelSize`.

    A block keeps, in widths per token: its input and the normed input (2), q and k before norm and rotary (2) and q, k,
    v after (3), attention's result (1), the branch, the stream after it and its normed form (3), four hidden layers of
    the feed-forward (12), the second branch (1).

    Attributes:
        mlp_ratio: Width of the feed-forward's hidden layer, in widths of the model.
        context_in_dim: Width of the prompt embeddings.
    """

    transformer_class: ClassVar[str] = "QwenImage21Transformer2DModel"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out",
    )  # fmt: skip
    visibilities: ClassVar[tuple[str, ...]] = ("full",)
    shares_packs: ClassVar[bool] = False
    keeps_prefix: ClassVar[bool] = True
    kept: ClassVar[int] = 24
    recomputing: ClassVar[int] = 28
    coding: ClassVar[tuple[float, float]] = (11.2, 33.5)

    num_layers: int = 32
    num_attention_heads: int = 32
    out_channels: int = 64
    patch_size: int = 1
    mlp_ratio: int = 3
    context_in_dim: int = 4096
    condition_area: int = OUTPUT_AREA

    @property
    def text_channels(self) -> int:
        return self.context_in_dim

    @property
    def transformer(self) -> int:
        outer = sum(rows * columns for rows, columns in self._outer_linears().values())
        return self.num_layers * self.block + outer + self.context_in_dim  # the last is the norm of the text

    @property
    def picture_tokens(self) -> int:
        """Approximate number of words that announce a reference; the picture itself takes no text tokens."""
        return 7

    @property
    def block(self) -> int:
        return sum(rows * columns for rows, columns in self.block_linears().values()) + 2 * self.attention_head_dim

    def block_linears(self) -> dict[str, tuple[int, int]]:
        width, hidden = self.width, self.width * self.mlp_ratio
        attention = {f"attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")}
        mlp = {"proj": (hidden, width), "gate_layer": (hidden, width), "out": (width, hidden)}
        return attention | {f"img_mlp.{name}": sides for name, sides in mlp.items()}

    def _outer_linears(self) -> dict[str, tuple[int, int]]:
        width = self.width
        return {
            "img_in": (width, self.in_channels),
            "txt_in.in_layer": (width, self.context_in_dim),
            "txt_in.out_layer": (width, width),
            "time_text_embed.timestep_embedder.linear_1": (width, 256),
            "time_text_embed.timestep_embedder.linear_2": (width, width),
            "modulation.1": (4 * width, width),
            "norm_out.linear": (width, width),
            "proj_out": (self.out_channels, width),
        }

    def with_vae(self, vae: Mapping[str, Any]) -> ModelSize:
        return replace(self, vae_width=int(vae["base_dim"]), token_side=2 ** len(vae["temperal_downsample"]))

    def transformer_config(self) -> dict[str, Any]:
        names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size",
                 "mlp_ratio", "context_in_dim")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def reference_sizes(self, references: Sequence[tuple[int, int]], budget: int | None) -> Sequence[tuple[int, int]]:
        from uniref_fast.models.qwen_image_21_family import reference_sizes

        return reference_sizes(references, self.reference_area, budget)


SIZES = {
    "QwenImageTransformer2DModel": "uniref_fast.training.core.model_size:ModelSize",
    "QwenImage21Transformer2DModel": "uniref_fast.training.core.model_size:QwenImage21Size",
    "Flux2Transformer2DModel": "uniref_fast.training.core.flux2_size:Flux2Size",
}
"""Class of the sizes, as "module:name", by the class of the transformer in diffusers."""


def _class_for(transformer: Mapping[str, Any]) -> type[ModelSize] | None:
    """Return the class of the sizes for the configuration of a transformer; None if it names no class.

    Raises:
        ValueError: Training does not support the class of the transformer.
    """
    kind = transformer.get("_class_name")
    if kind is None:
        return None
    if kind not in SIZES:
        raise ValueError(f"its transformer is a {kind}, which training does not support")
    module, _, name = SIZES[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def model_size(name: str) -> ModelSize:
    """Return the sizes of a model.

    Args:
        name: "builtin", a diffusers folder, one of `known_models.KNOWN`, or another hub id whose files are in the local
            cache.

    Raises:
        ValueError: The model is not on this machine and its sizes are not known, or its files cannot be read.
    """
    from uniref_fast.training.core.known_models import KNOWN  # which imports this module

    if name in KNOWN:
        return KNOWN[name].size
    folder = model_folder() if name == "builtin" else _folder(name, KNOWN)
    try:
        transformer = _config(folder / "transformer")
        areas = recorded_areas(_config(folder, "model_index.json"), transformer)
        size = ModelSize.of(transformer, areas).with_vae(_config(folder / "vae"))
        encoders = sum(_parameters(folder / part) for part in ("text_encoder", "vae"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model {name}: the sizes of the model cannot be read: {error}") from None
    return replace(size, encoders=encoders)


def _folder(name: str, known: Iterable[str]) -> Path:
    """Return the local folder of a model.

    Args:
        name: Name of the model.
        known: Names of models whose sizes are known without a folder.
    """
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub

    cached: Any = None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        cached = huggingface_hub.try_to_load_from_cache(name, "transformer/config.json")
    if isinstance(cached, str):
        return Path(cached).parent.parent
    raise ValueError(
        f"--model {name}: no such folder, and no model of the hub that was downloaded to this machine. Without a "
        f"download these are known: builtin, {', '.join(known)}"
    )


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _parameters(folder: Path) -> int:
    """Return the number of parameters in the safetensors files of a folder, from their headers."""
    from safetensors import SafetensorError, safe_open

    files, count = sorted(folder.glob("*.safetensors")), 0
    if not files:
        raise ValueError(f"{folder} has no .safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118
                    size = 1
                    for side in opened.get_slice(key).get_shape():
                        size *= side
                    count += size
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
    return count
