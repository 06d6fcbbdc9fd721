"""Check that a pipeline is of a kind that `edit`, `estimate`, training and evaluation support."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands import this module, and start without torch
    from uniref_fast.models.family import Family

__all__ = [
    "check_configuration",
    "check_pipeline",
    "check_processor",
    "check_trainable",
    "check_transformer",
    "supported_family",
    "transformer_class",
]

TORCHVISION_PROCESSORS = ("Qwen3VLProcessor", "PixtralProcessor")
"""Classes of transformers that need torchvision and have no replacement here."""

BUILTIN = "SmallQwenImageEditPlusPipeline"
"""Class of the built-in pipeline, which is one of Qwen-Image-Edit."""


def transformer_class(index: Mapping[str, Any]) -> Any:
    """Return the class of the transformer of a pipeline.

    Args:
        index: Content of its `model_index.json`, which `check_configuration` has accepted.
    """
    family = _family(index)
    assert family is not None
    return family.transformer_class()


def supported_family(given: str, index: Mapping[str, Any]) -> Family:
    """Return the family of a pipeline.

    Args:
        given: Name of the pipeline in messages.
        index: Content of its `model_index.json`.

    Raises:
        ValueError: If the pipeline is not supported.
    """
    family = _family(index)
    if family is None:
        raise ValueError(_message(given, str(index.get("_class_name"))))
    return family


def _family(index: Mapping[str, Any]) -> Family | None:
    """Return the family of the pipeline of a `model_index.json`, or None if it has none."""
    from uniref_fast.models.families import family_of_class

    kind = str(index.get("_class_name"))
    return family_of_class("QwenImageEditPlusPipeline" if kind == BUILTIN else kind)


def check_configuration(given: str, index: Mapping[str, Any], transformer: Mapping[str, Any] | None = None) -> None:
    """Check the configuration files of a pipeline.

    Args:
        given: Name of the pipeline in messages, such as "--model NAME".
        index: Content of `model_index.json`.
        transformer: Content of `transformer/config.json`; None checks the index only.

    Raises:
        ValueError: If the pipeline is of another kind; the message says what is supported and what to use instead.
    """
    kind, family = str(index.get("_class_name")), _family(index)
    if family is None or kind not in (*family.pipelines, BUILTIN):
        raise ValueError(_message(given, kind))
    if family.transformer_class() is None:
        import diffusers

        raise ValueError(
            f"{given} is a {kind}: the installed diffusers {diffusers.__version__} has no {family.transformer}; "
            "install a newer version of diffusers"
        )
    part = (index.get("transformer") or (None, None))[1]
    check_transformer(given, {"_class_name": part}, family)
    if transformer is not None:
        check_transformer(given, transformer, family)


def check_processor(given: str, index: Mapping[str, Any]) -> None:
    """Raise ValueError if the processor of a pipeline needs torchvision, which is not installed.

    Without it, a Qwen2VLProcessor is replaced by the one of the built-in model; there is none for other processors.

    Args:
        given: Name of the pipeline in the message.
        index: Content of its `model_index.json`.
    """
    kinds = [part[1] for part in index.values() if isinstance(part, list | tuple) and len(part) == 2]
    kind = next((kind for kind in kinds if kind in TORCHVISION_PROCESSORS), None)
    if kind is not None and importlib.util.find_spec("torchvision") is None:
        raise ValueError(
            f"{given} has a {kind}, which needs torchvision; install it with the extra processor: "
            "pip install 'uniref_fast[processor]'"
        )


def check_transformer(given: str, config: Mapping[str, Any], family: Family | None = None) -> None:
    """Check the configuration of a transformer, the content of its `config.json`.

    Args:
        given: Name of the pipeline in messages.
        config: Content of the file.
        family: Family that it must belong to; None takes the first one, Qwen-Image-Edit.

    Raises:
        ValueError: If it has another class, or options that are not supported.
    """
    from uniref_fast.models.families import families

    family = family or families()[0]
    found = config.get("_class_name", family.transformer)
    if found != family.transformer:
        raise ValueError(
            f"{given} has a transformer of the class {found}, not {family.transformer}; {_instead(family)}"
        )
    family.check_config(given, config, _instead(family))


def check_trainable(given: str, index: Mapping[str, Any], kind: str = "sft") -> None:
    """Raise ValueError with the reason if training does not support the pipeline of a `model_index.json`.

    Args:
        given: Name of the pipeline in the message.
        index: Content of the file, which `check_configuration` has accepted.
        kind: Kind of the training, "sft" or "msgrpo".
    """
    name, family = str(index.get("_class_name")), _family(index)
    assert family is not None
    reason = family.untrained.get(name) or family.reason_against("sft")
    if reason is not None:
        raise ValueError(f"{given} is a {name}, which training does not support: {reason}")
    if (reason := family.reason_against(kind)) is not None:
        raise ValueError(f"{given} is a {name}, which training/{kind}.py does not support: {reason}")


def check_pipeline(pipe: Any, given: str | None = None) -> None:
    """Check a loaded pipeline.

    Args:
        pipe: The pipeline.
        given: Name of the pipeline in messages; None uses its class.

    Raises:
        TypeError: If it is of another class.
        ValueError: If its transformer has options that are not supported, or its parts belong to different models.
    """
    from uniref_fast.models.families import families, find_transformer

    kind = type(pipe).__name__
    family = next((each for each in families() if each.has_pipeline(pipe)), None)
    if family is None:
        raise TypeError(_message(given or kind, kind, pipe))
    named, parts = given or f"the {kind}", pipe.components
    for part in ("vae", "scheduler"):
        if parts.get(part) is None:
            raise ValueError(
                f"{named} has no {part}; load the whole pipeline, of which only the text encoder may be None"
            )
    family.check_config(named, find_transformer(pipe).config, _instead(family))
    family.check_parts(pipe, named)


def _message(given: str, kind: str, pipe: Any = None) -> str:
    from uniref_fast.models.families import families, family_of, family_of_class

    family = family_of_class(kind)
    what = patch = ""
    if family is None and pipe is not None:  # of another class with the transformer of a family
        with contextlib.suppress(TypeError):
            family = family_of(pipe)
            patch = "; uniref_fast.patch(pipe) accelerates this one in diffusers"
    if family is None:
        names = [name for each in families() for name in each.pipelines]
        near = get_close_matches(kind, names, n=1, cutoff=0.6)
        what = f"; the nearest class that is supported is {near[0]}" if near else ""
    elif kind in family.other_pipelines:
        what = f": {family.other_pipelines[kind]}"
        if family.reason_against("patch") is None:
            patch = "; uniref_fast.patch(pipe) accelerates this one in diffusers"
    named = kind if given == kind else f"{given} is a {kind}, which"
    return f"{named} is not supported{what}; {_instead(family)}{patch}"


def _uses(family: Family) -> str:
    """Return what the pipelines of a family can be used for, training only if it supports one of them."""
    trained = family.reason_against("sft") is None
    return "editing, estimates, training and evaluation" if trained else "editing, estimates and evaluation"


def _instead(family: Family | None) -> str:
    """Return the end of a message: which pipelines are supported."""
    from uniref_fast.models.families import families

    family = family or families()[0]
    models = f"{', '.join(family.models)}, or another model" if family.models else "a model"
    return f"{_uses(family)} take a {' or '.join(family.pipelines)}: use {models} of that class"
