"""Names of the layers that adapters change, and the key names of the formats of LoRA files.

A key is a prefix, the name of a layer, and an ending that says which tensor of the layer's change it is. Formats differ
in the prefix, in the endings, and in whether the parts of a layer's name are joined by dots or by underscores. The
table `FORMATS` holds what `uniref-fast lora convert` writes; `split_key` reads these and their common variants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["FORMATS", "LINEARS", "Format", "Key", "split_key", "weight_shape"]

LINEARS = {  # Linear layers of a block: rows and columns of the weight, in widths of the model
    **{f"attn.{name}": (1, 1) for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj")},
    **{f"attn.{name}": (1, 1) for name in ("to_out.0", "to_add_out")},
    **{f"{stream}_mod.1": (6, 1) for stream in ("img", "txt")},
    **{f"{stream}_mlp.net.0.proj": (4, 1) for stream in ("img", "txt")},
    **{f"{stream}_mlp.net.2": (1, 4) for stream in ("img", "txt")},
}
NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
OUTER = ("img_in", "txt_in", "txt_norm", "time_text_embed.timestep_embedder.linear_1",
         "time_text_embed.timestep_embedder.linear_2", "norm_out.linear", "proj_out")  # fmt: skip
IN_BLOCK = {name.replace(".", "_"): name for name in (*LINEARS, *NORMS)}
OUTSIDE = {name.replace(".", "_"): name for name in OUTER}

PREFIX = re.compile(r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|transformer\.|(?:pipe\.)?dit\.)")
FLAT_PREFIX = re.compile(r"(?:lora_unet_|lora_transformer_|lycoris_)")
ADAPTER = r"(?:\.(?!weight$|bias$)\w+)?"  # name of the adapter that peft writes between, such as "default"
ENDINGS = (  # tensor of a layer's change, by the ending of its key
    ("down", re.compile(rf"(?:\.lora_(?:A|down){ADAPTER}(?:\.weight)?|[._]lora(?:_linear_layer)?\.down\.weight)$")),
    ("up", re.compile(rf"(?:\.lora_(?:B|up){ADAPTER}(?:\.weight)?|[._]lora(?:_linear_layer)?\.up\.weight)$")),
    ("up_bias", re.compile(rf"\.lora_(?:B|up){ADAPTER}\.bias$")),
    ("magnitude", re.compile(rf"\.(?:lora_magnitude_vector{ADAPTER}(?:\.weight)?|dora_scale|magnitude)$")),
    (None, re.compile(rf"\.(lokr_w[12](?:_[ab])?|hada_w[12]_[ab]){ADAPTER}$")),  # named by the tensor itself
    (None, re.compile(r"\.(alpha|diff|diff_b)$")),
)


@dataclass(frozen=True)
class Key:
    """The parts of a key.

    Attributes:
        layer: Name of the layer in diffusers' transformer.
        tensor: Tensor of the layer's change: down, up, magnitude, alpha, lokr_w1, hada_w1_a, diff and so on.
    """

    layer: str
    tensor: str


@dataclass(frozen=True)
class Format:
    """Key names of one format.

    Attributes:
        name: Name of the format, as `--to` takes it.
        programs: Programs that write or read the format.
        prefix: Text before the name of a layer.
        joiner: Text between the parts of a layer's name.
        down: Ending of the first matrix of a LoRA, `[rank, in]`.
        up: Ending of its second matrix, `[out, rank]`.
        alpha: Rule for tensors `alpha`: written always, only where alpha differs from the rank, or never; without
            them the factor alpha / rank is multiplied into the matrices.
        magnitude: Ending of the magnitude of a DoRA; None if the format has none, or computes another one.
        kinds: Kinds of changes that the format can hold: lora, lokr, loha, or full (whole differences of weights and
            biases).
    """

    name: str
    programs: str
    prefix: str
    joiner: Literal[".", "_"]
    down: str
    up: str
    alpha: Literal["always", "where it differs", "never"]
    magnitude: str | None
    kinds: frozenset[str]

    def key(self, layer: str, tensor: str) -> str:
        """Return the key of a tensor of a layer."""
        endings = {"down": self.down, "up": self.up, "magnitude": self.magnitude}
        return self.prefix + layer.replace(".", self.joiner) + (endings.get(tensor) or f".{tensor}")

    def has(self, key: str, part: Key) -> bool:
        """Return True if a key has the names of this format; DiffSynth-Studio also writes keys without "default"."""
        own = self.key(part.layer, part.tensor)
        return key in (own, own.replace(".default", "")) and (part.tensor != "alpha" or self.alpha != "never")


FORMATS = {
    found.name: found
    for found in (
        Format("diffusers", "diffusers, peft, and the runs of this library", "transformer.", ".", ".lora_A.weight",
               ".lora_B.weight", "never", ".lora_magnitude_vector", frozenset({"lora", "lokr"})),
        Format("comfyui", "ComfyUI; files of ai-toolkit have these names too", "diffusion_model.", ".",
               ".lora_A.weight", ".lora_B.weight", "where it differs", None,
               frozenset({"lora", "lokr", "loha", "full"})),
        Format("ai-toolkit", "ai-toolkit, which reads no alpha", "diffusion_model.", ".", ".lora_A.weight",
               ".lora_B.weight", "never", None, frozenset({"lora"})),
        Format("kohya", "musubi-tuner and other trainers of kohya, LyCORIS; ComfyUI reads it", "lora_unet_", "_",
               ".lora_down.weight", ".lora_up.weight", "always", ".dora_scale", frozenset({"lora", "lokr", "loha"})),
        Format("diffsynth", "DiffSynth-Studio", "", ".", ".lora_A.default.weight", ".lora_B.default.weight", "never",
               None, frozenset({"lora"})),
        Format("lightning", "Qwen-Image-Lightning of lightx2v", "", ".", ".lora_down.weight", ".lora_up.weight",
               "always", None, frozenset({"lora"})),
    )
}  # fmt: skip
"""Formats by name, in the order in which `uniref-fast lora info` compares a file with them."""


def split_key(key: str) -> Key | None:
    """Return the parts of a key; None if it is of no known format, or of a layer that Qwen-Image does not have."""
    for tensor, pattern in ENDINGS:
        if (match := pattern.search(key)) is not None:
            name = bare = key[: match.start()]
            if flat := FLAT_PREFIX.match(name):
                layer = _layer(name[flat.end() :])
            else:
                while prefix := PREFIX.match(bare):
                    bare = bare[prefix.end() :]
                layer = _layer(bare.replace(".", "_"))
                layer = layer if layer == bare else None
            if layer is None:
                return None
            return Key(layer, tensor or match[1])
    return None


def _layer(flat: str) -> str | None:
    """Return the name of the layer whose parts, joined by underscores, are `flat`; None if there is no such layer."""
    if flat in OUTSIDE:
        return OUTSIDE[flat]
    match = re.fullmatch(r"transformer_blocks_(\d+)_(\w+)", flat)
    if match is None or match[2] not in IN_BLOCK:
        return None
    return f"transformer_blocks.{match[1]}.{IN_BLOCK[match[2]]}"


def weight_shape(layer: str, width: int) -> tuple[int, int] | None:
    """Return rows and columns of the weight of a block's Linear layer; None for other layers.

    Args:
        layer: Name of the layer.
        width: Width of the model.
    """
    sides = LINEARS.get(re.sub(r"^transformer_blocks\.\d+\.", "", layer))
    return None if sides is None else (sides[0] * width, sides[1] * width)
