"""Pipelines without weights, for estimates: configurations, tokenizer and processor only."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from uniref_fast import builtin
from uniref_fast.model_kind import check_configuration, check_processor, transformer_class
from uniref_fast.quantisation import check_unquantised, planned_configs

__all__ = ["skeleton"]


def skeleton(name: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, quantisation: str | None = None) -> Any:
    """Return a pipeline without weights: models on the meta device; tokenizer, processor and scheduler loaded.

    Args:
        name: A diffusers pipeline folder or hub id.
        dtype: Dtype of the parameters on the meta device.
        quantisation: Format that text encoder and transformer will be quantised to (`uniref_fast.quantisation.NAMES`);
            None for the one that their configurations name, if any.

    Raises:
        OSError: If a configuration is missing or cannot be loaded.
        ValueError: If the model is of another kind.
    """
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(name)
    check_configuration(str(name), index)
    transformer = transformer_class(index).load_config(name, subfolder="transformer")
    check_configuration(str(name), index, transformer)
    check_processor(str(name), index)
    parts: dict[str, Any] = {}
    planned = {}
    if quantisation is not None:
        check_unquantised(str(name), transformer)
        planned = planned_configs(quantisation)
    for part, spec in index.items():
        if not (isinstance(spec, (list, tuple)) and len(spec) == 2):
            continue
        own = spec[1] == "BuiltinProcessor" or (
            spec[1] == "Qwen2VLProcessor" and importlib.util.find_spec("torchvision") is None
        )  # transformers' own needs torchvision, for its videos
        if not own and spec[0] not in ("diffusers", "transformers"):
            continue
        part_class = builtin.BuiltinProcessor if own else getattr(importlib.import_module(spec[0]), spec[1])
        if not issubclass(part_class, torch.nn.Module):
            parts[part] = part_class.from_pretrained(name, subfolder=part)
            continue
        with torch.device("meta"):
            if spec[0] == "diffusers":
                model = part_class.from_config(part_class.load_config(name, subfolder=part))
            else:
                model = part_class(part_class.config_class.from_pretrained(name, subfolder=part))
            for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as they are
                parameter.data = parameter.data.to(dtype)
            if part in planned:
                _register(model, planned[part])
            parts[part] = model
    if areas := builtin.recorded_areas(index, getattr(parts.get("transformer"), "config", {})):
        return builtin.SmallQwenImageEditPlusPipeline(**parts, **areas)
    pipeline_class = getattr(diffusers, index["_class_name"])
    settings = {name: index[name] for name in pipeline_class._get_signature_keys(pipeline_class)[1] if name in index}
    return pipeline_class(**parts, **{name: value for name, value in settings.items() if name not in parts})


def _register(model: Any, config: dict[str, Any]) -> None:
    """Add the configuration of a quantisation to that of a model."""
    if hasattr(model, "register_to_config"):
        model.register_to_config(quantization_config=config)
    else:
        model.config.quantization_config = config
