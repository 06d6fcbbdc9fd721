"""Pipelines by name: the built-in one, a diffusers folder, or a hub id; safetensors only."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["defaults", "load_pipeline", "model_errors"]


def defaults(name: str) -> tuple[int, float]:
    """Denoising steps and true CFG scale that commands use where none are given. 1 is no guidance: the built-in model
    makes better pictures without."""
    return (8, 1.0) if name == "builtin" else (50, 4.0)


def load_pipeline(name: str, dtype: Any, device: str) -> Any:
    """The built-in pipeline, a diffusers folder, or a hub id, on a device.

    Raises:
        ValueError: for a name that is no model, or one that cannot be had; in one line.
        TypeError: for a model of another kind.
    """
    from uniref_fast import builtin

    if name == "builtin":
        return builtin.load(dtype, device)
    from diffusers import DiffusionPipeline

    with model_errors(name):
        pipe = _from_pretrained(DiffusionPipeline, name, dtype)
    from uniref_fast.models import find_transformer

    find_transformer(pipe)  # a clear error now rather than after moving it to the device
    return pipe.to(device)


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Refuse names that can be no model; say in one line why a model could not be had."""
    folder = Path(name)
    if name != "builtin":
        if not folder.is_dir() and (folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise ValueError(f"--model {name}: no such folder, and not a hub id like Qwen/Qwen-Image-Edit-2511")
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(f"--model {name} has no model_index.json: it must be a whole diffusers pipeline folder")
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:  # the latter two of damaged files
        if folder.is_dir() or name == "builtin":
            raise ValueError(f"--model {name} could not be loaded: {error}") from None
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {name} could not be had from the hub: {first}") from None


def _from_pretrained(pipeline_class: Any, name: str, dtype: Any) -> Any:
    """safetensors only: weights of a stranger are never unpickled."""
    from uniref_fast.builtin import BuiltinProcessor, SmallQwenImageEditPlusPipeline

    if (Path(name) / "uniref_fast.json").is_file():  # a folder of the built-in model
        pipeline_class = SmallQwenImageEditPlusPipeline
    pipeline_class.load_config(name)  # first, so that a name that cannot be had is an error about the whole model
    options = {}
    if importlib.util.find_spec("torchvision") is None:  # which transformers' own processor needs, for its videos
        options["processor"] = BuiltinProcessor.from_pretrained(name, subfolder="processor")
    return pipeline_class.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
