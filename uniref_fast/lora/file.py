"""Read LoRA files of any of the formats that circulate, and write them in one of `FORMATS`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from uniref_fast.files import write_whole
from uniref_fast.lora.layers import Layer, as_lora, folded
from uniref_fast.lora.names import FORMATS, Format, Key, split_key

__all__ = ["LoraFile", "read_lora", "to_format", "write_lora"]

PEFT = "lora_adapter_metadata"  # entry of the metadata with the configuration of peft, as diffusers writes it
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of a folder that peft itself writes
SHOWN = 3  # keys that an error lists
UNKNOWN = (
    "Known are the formats {formats} and their variants, with the layers of Qwen-Image's transformer. Remove these "
    "tensors if they belong to another model, such as a text encoder"
)


@dataclass(frozen=True)
class LoraFile:
    """The contents of a LoRA file.

    Attributes:
        path: The file.
        format: Name of the format in `FORMATS`; None for a mixture, or a variant of several.
        layers: Changes by the name of the layer in diffusers' transformer.
        metadata: Metadata of the file.
        example: One key of the file.
    """

    path: Path
    format: str | None
    layers: dict[str, Layer]
    metadata: dict[str, str]
    example: str

    @property
    def kinds(self) -> set[str]:
        """Kinds of the changes of all layers."""
        return set().union(*(layer.kinds for layer in self.layers.values()))

    @property
    def dora(self) -> bool:
        """True if a layer has a magnitude, which makes it a DoRA."""
        return any("magnitude" in layer.tensors for layer in self.layers.values())


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file of any known format.

    Args:
        path: A safetensors file. Beside an `adapter_model.safetensors` without a configuration of peft, that of
            `adapter_config.json` is read too.

    Raises:
        ValueError: The file is damaged, or some of its tensors are of no known format or layer, are incomplete, or
            occur twice. No tensor is ever left out.
    """
    try:
        with safe_open(path, "pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error
    parts = {key: split_key(key) for key in tensors}
    if unknown := [key for key, part in parts.items() if part is None]:
        formats = ", ".join(FORMATS)
        raise ValueError(
            f"{path.name}: {len(unknown)} of {len(tensors)} tensors are not known: {_some(unknown)}. "
            f"{UNKNOWN.format(formats=formats)}"
        )
    known = {key: part for key, part in parts.items() if part is not None}
    if not known:
        raise ValueError(f"{path.name} holds no tensors")
    config, beside = _peft_config(metadata), path.with_name(PEFT_CONFIG)
    separate = not config and path.name == PEFT_FILE and beside.is_file()
    if separate:
        config = _config_file(beside)
    layers = _layers(path, known, tensors, config)
    # a reader of the file alone would not know the factors of a separate configuration, whatever the keys are
    form = None if separate else _format_of(known, set().union(*(layer.kinds for layer in layers.values())))
    return LoraFile(path, form, layers, metadata, next(iter(known)))


def _layers(
    path: Path, keys: Mapping[str, Key], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Layer]:
    grouped: dict[str, dict[str, str]] = defaultdict(dict)
    for key, part in keys.items():
        if part.tensor in grouped[part.layer]:
            raise ValueError(f"{path.name} holds two tensors for one: {grouped[part.layer][part.tensor]} and {key}")
        grouped[part.layer][part.tensor] = key
    layers = {}
    for name, found in grouped.items():
        alpha = float(tensors[found["alpha"]].float()) if "alpha" in found else None
        layer = Layer({part: tensors[key] for part, key in found.items() if part != "alpha"}, alpha)
        _check(path, name, layer)
        layers[name] = _with_bias(path, name, layer if alpha is not None else _with_config(name, layer, config))
    return layers


def _check(path: Path, name: str, layer: Layer) -> None:
    """Raise ValueError for the change of a layer that is incomplete, or whose scale or shapes have no meaning."""
    kinds, magnitude = layer.kinds, layer.tensors.get("magnitude")
    problem = None
    if not kinds or (missing := layer.missing()):
        problem = f"{' and '.join(missing) if kinds else 'all matrices'} of {name} are missing"
    elif layer.alpha is not None and not math.isfinite(layer.alpha):
        problem = f"alpha of {name} is {layer.alpha}, not a finite number"
    elif "full" not in kinds and any(t.ndim != 2 for part, t in layer.tensors.items() if part != "magnitude"):
        problem = f"a tensor of {name} is not a matrix; all layers of Qwen-Image are linear"
    elif magnitude is not None and "lora" not in kinds:
        problem = f"{name} has a magnitude beside a {kinds.pop()}; only that of a LoRA, a DoRA, is supported"
    elif magnitude is not None and magnitude.shape[0] != magnitude.numel():
        problem = (
            f"the magnitude of {name} has the shape {list(magnitude.shape)}: it holds the norms of the columns, and "
            "peft and diffusers know norms of the rows only"
        )
    if problem is not None:
        raise ValueError(f"{path.name}: {problem}")


def _peft_scale(name: str, layer: Layer, config: Mapping[str, Any]) -> float:
    """Return the factor that peft's configuration gives a layer; 1 without a configuration."""
    alpha = "lora_alpha" if "lora" in layer.kinds else "alpha"
    if config.get("r") is None or config.get(alpha) is None or layer.kinds == {"full"}:
        return 1.0
    rank = _pattern(config.get("rank_pattern"), name, config["r"])
    scale = _pattern(config.get("alpha_pattern"), name, config[alpha])
    return scale / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _with_config(name: str, layer: Layer, config: Mapping[str, Any]) -> Layer:
    """Return a layer without a tensor alpha, with the factor of peft's configuration.

    A LoKr of two whole matrices has no scale, except in peft, which then is multiplied into the first of them.
    """
    scale = _peft_scale(name, layer, config)
    if scale == 1:
        return layer
    if layer.rank is not None:
        return Layer(layer.tensors, scale * layer.rank)
    first = layer.tensors["lokr_w1"]
    return Layer({**layer.tensors, "lokr_w1": (first.float() * scale).to(first.dtype)}, None)


def _with_bias(path: Path, name: str, layer: Layer) -> Layer:
    """Return a layer whose bias of the second matrix (`lora_bias` of peft) is a scaled difference of the bias."""
    if "up_bias" not in layer.tensors:
        return layer
    if "diff_b" in layer.tensors:
        raise ValueError(f"{path.name} holds two changes of the bias of {name}: diff_b, and a bias of the LoRA")
    tensors = dict(layer.tensors)
    bias = tensors.pop("up_bias")
    return Layer({**tensors, "diff_b": (bias.float() * layer.scale).to(bias.dtype)}, layer.alpha)


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), name), default)


def _peft_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(PEFT, "{}"))
    except ValueError:
        return {}
    return {name.removeprefix("transformer."): value for name, value in found.items()}


def _config_file(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} holds the factor of the adapter beside it and cannot be read ({error}); copy or download it again"
        ) from error


def _format_of(keys: Mapping[str, Key], kinds: Collection[str]) -> str | None:
    """Return the name of the format that has all keys and can hold all kinds of changes, and needs no others."""
    fitting = (form for form in FORMATS.values() if form.kinds.issuperset(kinds))
    return next((form.name for form in fitting if all(form.has(*item) for item in keys.items())), None)


def write_lora(file: LoraFile, out: Path, form: Format, note: str) -> list[str]:
    """Write a LoRA file in one format, whole or not at all.

    Args:
        file: Contents to write.
        out: File to write.
        form: Format of the keys.
        note: Text that is added to the metadata as "converted".

    Returns:
        Remarks about layers that were written as another kind of change.

    Raises:
        ValueError: The format cannot hold the changes of some layers.
        OSError: The file cannot be written.
    """
    tensors, remarks = to_format(file, form)
    config = _peft_config(file.metadata)
    metadata = {name: value for name, value in file.metadata.items() if name != PEFT}
    if config and all(
        layer.scale == 1 == _peft_scale(name, layer, config) for name, layer in file.layers.items()
    ):  # another factor is in the tensors now, and a reader of the configuration would apply it twice
        metadata[PEFT] = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    metadata |= {"format": "pt", "converted": note}
    content = save(tensors, metadata)
    write_whole(out, lambda opened: opened.write(content))
    return remarks


def to_format(file: LoraFile, form: Format) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file by their keys in a format, and remarks; errors as for `write_lora`."""
    if file.dora and form.magnitude is None:
        raise ValueError(
            f"{file.path.name} is a DoRA, and {form.name} has no magnitude of that meaning (ComfyUI divides by the "
            "norms of the unchanged weights); add it to the weights of the model with uniref-fast fuse"
        )
    tensors, expanded = {}, 0
    for name, layer in file.layers.items():
        if "loha" in layer.kinds and "loha" not in form.kinds:
            layer, expanded = as_lora(layer), expanded + 1
        if refused := layer.kinds - form.kinds:
            kind = next(iter(refused))
            words = {"full": "a whole difference of a weight or a bias", "lokr": "a LoKr"}.get(kind, kind)
            able = [one.name for one in FORMATS.values() if file.kinds <= one.kinds]
            raise ValueError(
                f"{file.path.name}: {name} is changed by {words}, which {form.name} cannot hold; "
                + (f"formats that can hold this file: {', '.join(able)}" if able else "no format can hold all of it")
            )
        alpha = layer.alpha if layer.rank is not None else None
        if form.alpha == "never":
            layer, alpha = folded(layer), None
        elif form.alpha == "always" and alpha is None and layer.rank is not None:
            alpha = float(layer.rank)
        elif form.alpha == "where it differs" and layer.scale == 1:
            alpha = None
        for part, tensor in layer.tensors.items():
            if part == "magnitude":
                tensor = tensor.reshape(-1) if form.name == "diffusers" else tensor.reshape(-1, 1)
            tensors[form.key(name, part)] = tensor.contiguous()
        if alpha is not None:
            tensors[form.key(name, "alpha")] = torch.tensor(alpha)
    many = f"{expanded} layers with a LoHa of rank r were written as a LoRA of rank r * r, in float32"
    return tensors, [many] * bool(expanded)


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
