"""Lookup of families, and of the supported transformer in an object that a user gives.

family = family_of(pipe)                    # of a pipeline or of a transformer
transformer = find_transformer(pipe)
"""

from __future__ import annotations

import functools
import importlib
from difflib import get_close_matches
from typing import Any

from torch import nn

from uniref_fast.models.family import Family

__all__ = ["families", "family_of", "family_of_class", "find_transformer", "unsupported_class"]

_INSTANCES = {
    "qwen-image-edit": "uniref_fast.models.qwen_image_edit:QWEN_IMAGE_EDIT",
    "qwen-image-2.1": "uniref_fast.models.qwen_image_21_family:QWEN_IMAGE_21",
    "flux2": "uniref_fast.models.flux2_family:FLUX_2",
    "flux3": "uniref_fast.models.flux3_family:FLUX_3",
    "flux1": "uniref_fast.models.flux1_family:FLUX_1",
    "longcat-image-edit": "uniref_fast.models.longcat_family:LONGCAT_IMAGE_EDIT",
    "fibo-edit": "uniref_fast.models.fibo_family:FIBO_EDIT",
    "fibo-2": "uniref_fast.models.fibo2_family:FIBO_2",
    "z-image": "uniref_fast.models.z_image_family:Z_IMAGE",
    "joyimage-edit-plus": "uniref_fast.models.joyimage_family:JOYIMAGE_EDIT_PLUS",
}
"""Instance of every family, as "module:name", by its name, in the order of the tables.

A module is imported when a family is first looked up.
"""


@functools.cache
def families() -> tuple[Family, ...]:
    """Return all families."""
    found = []
    for place in _INSTANCES.values():
        module, _, name = place.partition(":")
        found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


def family_of_class(name: str) -> Family | None:
    """Return the family that a class of pipeline or transformer belongs to, by its name; None if there is none."""
    for family in families():
        if name in (family.transformer, *family.pipelines, *family.other_pipelines):
            return family
    return None


def family_of(target: Any) -> Family:
    """Return the family of a pipeline or of a transformer, which may be of a subclass.

    Raises:
        TypeError: If it belongs to no family; the message names the nearest supported class.
    """
    for part in (target, getattr(target, "transformer", None)):
        for base in type(part).__mro__:
            if base.__module__.startswith("diffusers.") and (family := family_of_class(base.__name__)):
                return family
    raise TypeError(unsupported_class(type(target).__name__))


def unsupported_class(given: str) -> str:
    """Return the message for a class of pipeline or transformer that no family has."""
    transformers = [family.transformer for family in families()]
    pipelines = [name for family in families() for name in (*family.pipelines, *family.other_pipelines)]
    near = get_close_matches(given, [*transformers, *pipelines], n=1, cutoff=0.5)
    return (
        f"{given} is not supported. It must be a transformer of exactly one of these classes: "
        f"{', '.join(transformers)}; or a pipeline with such a transformer, such as {families()[0].pipelines[0]}"
        + (f"; nearest: {near[0]}" if near else "")
        + "; `uniref-fast families` shows what is supported"
    )


def find_transformer(target: Any, *, sharded: bool = False, compiled: bool = False) -> Any:
    """Return the transformer of a pipeline, or the model itself, if its class is that of a family.

    Args:
        target: The pipeline or model.
        sharded: Accept a model that `fully_shard` was applied to.
        compiled: Return the model inside a wrapper of torch.compile.

    Raises:
        TypeError: If the object is anything else; the message says what is supported.
    """
    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    if compiled:
        model = getattr(model, "_orig_mod", model)
    stock = tuple(kind for family in families() if (kind := family.transformer_class()) is not None)
    if type(model) in stock:
        return model
    if model is None and hasattr(target, "transformer"):
        raise TypeError(f"{type(target).__name__} has no transformer loaded yet; load it first")
    given = type(target if model is None else model).__name__
    bases = type(model).__bases__
    if isinstance(model, stock) and len(bases) == 2 and bases[0].__name__ == "FSDPModule" and bases[1] in stock:
        if sharded:
            return model
        raise TypeError(f"the transformer is sharded by fully_shard ({given}), and a whole one is needed here")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "the transformer is wrapped by torch.compile; use the model inside, `pipe.transformer = "
            "pipe.transformer._orig_mod`, and compile it afterwards"
        )
    inside = getattr(model, "module", None)
    if isinstance(inside, stock):
        raise TypeError(f"{given} is not supported: it wraps a {type(inside).__name__}; use its attribute `module`")
    if given.startswith("Nunchaku"):
        raise TypeError(
            f"{given} is not supported: its blocks call kernels that compute several Linears and the operations "
            "between them at once. Load a checkpoint of diffusers' NunchakuLiteQuantizationConfig as a "
            f"{families()[0].transformer}"
        )
    raise TypeError(unsupported_class(given))
