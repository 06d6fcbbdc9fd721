"""Check from a model's configuration files that a recipe suits it, before data is read and weights are loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from uniref_fast.builtin import recorded_areas
from uniref_fast.guidance import is_guided
from uniref_fast.model_kind import check_trainable, supported_family
from uniref_fast.training.core.adapter import check_adapter
from uniref_fast.training.core.base import LIBRARIES, check_base, offloaded_blocks
from uniref_fast.training.core.known_models import KNOWN
from uniref_fast.training.core.model_size import ModelSize
from uniref_fast.training.core.optimizer import check_optimizer
from uniref_fast.training.core.recipe import LORA_TARGETS, Recipe

__all__ = [
    "check_guidance",
    "check_kept_references",
    "check_model",
    "check_sizes",
    "check_steps",
    "check_suitability",
    "check_visibility",
    "with_targets",
]

C = TypeVar("C", bound=Recipe)
SMALLEST, LARGEST = 1 / 8, 4  # side of a stage's images, relative to those of the model; a budget may be twice as much


def check_suitability(config: Recipe, ranks: int) -> None:
    """Check that a recipe suits its model.

    Args:
        config: Configuration of the run, with the settings of the adapter that it continues.
        ranks: Number of ranks of the run.

    Raises:
        ValueError: The model does not exist or is of another kind, the images of a stage are far larger or smaller than
            those of the model, the ranks cannot share a pack as a stage says, the model cannot have the visibility or
            the number of steps of rollouts, the adapter does not fit the layers, the frozen base needs an adapter, or
            has fewer blocks than are offloaded, or a library is missing.
    """
    check_base(config)
    check_optimizer(config, ranks)
    _check_libraries(config)
    check_adapter(config)
    index, size = _model(config)
    check_steps(config, index)
    check_guidance(config, index)
    check_visibility(config, size)
    check_kept_references(config, size, index)
    offloaded_blocks(size.num_blocks, config.offload_blocks)
    if any(stage.sequence_parallel is not None for stage in config.stages):
        from uniref_fast.training.core.memory import sharing_degrees

        for stage in config.stages:
            sharing_degrees(stage, ranks, size)
    if config.lora_rank is not None and (config.initial is None or not (config.initial / "lora").is_dir()):
        size.adapter(config.lora_rank, config.lora_targets, config.adapter)


def with_targets(config: C, given: Collection[str], own: Sequence[str] | None = None) -> C:
    """Return the configuration with the Linear layers that get a new adapter in its model, if it names none.

    Args:
        config: Configuration of the run, with the settings of the adapter that it continues.
        given: Names of the settings that were given on the command line.
        own: `lora_targets` of the model; None reads the files of the model.

    Raises:
        ValueError: The model does not exist or is of another kind.
    """
    if config.lora_rank is None or "lora_targets" in given or config.lora_targets != LORA_TARGETS:
        return config
    if own is None:
        from uniref_fast.loading import configuration

        if config.model in KNOWN:
            size = KNOWN[config.model].size
        else:
            size = ModelSize() if config.model == "builtin" else ModelSize.of(configuration(config.model)[1], {})
        own = size.lora_targets
    return dataclasses.replace(config, lora_targets=tuple(own))


def check_model(config: Recipe) -> ModelSize:
    """Check that the model exists and that the images of all stages suit it, and return its sizes.

    Args:
        config: Configuration of the run.

    Raises:
        ValueError: The model does not exist or is of another kind, or the images of a stage are far larger or smaller
            than those of the model.
    """
    return _model(config)[1]


def _model(config: Recipe) -> tuple[dict[str, Any], ModelSize]:
    """Return the content of the `model_index.json` of the model and its sizes; errors as for `check_model`."""
    from uniref_fast.loading import configuration

    index, transformer = configuration(config.model)
    check_trainable(f"--model {config.model}", index, config.kind)
    size = ModelSize.of(transformer, recorded_areas(index, transformer))
    check_sizes(config, size.output_side)
    return index, size


def _check_libraries(config: Recipe) -> None:
    """Raise ValueError for a setting that needs a library which is not installed."""
    needed = {
        "base": LIBRARIES.get(config.base or ""),
        "optimizer": "bitsandbytes" if config.optimizer == "adamw8bit" else None,
    }
    for name, library in needed.items():
        if library is not None and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"{name} = {getattr(config, name)} needs the library {library}, which is not installed: pip install "
                f"{library}, or give another --{name}"
            )


def check_steps(config: Recipe, index: Mapping[str, Any]) -> None:
    """Raise ValueError if rollouts have another number of steps than a pipeline with noise levels of its own.

    Args:
        config: Configuration of the run.
        index: Content of the `model_index.json` of the model.
    """
    levels, steps = index.get("sample_sigmas"), getattr(config, "rollout_num_inference_steps", None)  # of MSGRPO
    if levels and steps not in (None, len(levels)):
        raise ValueError(
            f"rollout_num_inference_steps = {steps}, but the pipeline of model = {config.model} has its own noise "
            f"levels, for exactly {len(levels)} steps; give --rollout-num-inference-steps {len(levels)}"
        )


def check_guidance(config: Recipe, index: Mapping[str, Any]) -> None:
    """Raise ValueError if rollouts have classifier-free guidance, and the model predicts for one prompt only.

    Args:
        config: Configuration of the run.
        index: Content of the `model_index.json` of the model.
    """
    scale = getattr(config, "rollout_true_cfg_scale", 1.0)  # of MSGRPO
    if not is_guided(scale):
        return
    name = str(index.get("_class_name"))
    if reason := supported_family(f"model = {config.model}", index).unguided(index):
        raise ValueError(
            f"rollout_true_cfg_scale = {scale:g} is not possible for model = {config.model}, a {name}: {reason}; leave "
            "--rollout-true-cfg-scale at 1. --embedded-guidance sets the scale that a transformer embeds"
        )


def check_visibility(config: Recipe, size: ModelSize) -> None:
    """Raise ValueError if the model cannot be trained with the visibility of a recipe."""
    if config.visibility is not None and config.visibility not in size.visibilities:
        raise ValueError(
            f'visibility = "{config.visibility}" is not possible for model = {config.model}, a '
            f"{size.transformer_class}: it can have {' or '.join(size.visibilities)}; leave --visibility out"
        )


def check_kept_references(config: Recipe, size: ModelSize, index: Mapping[str, Any]) -> None:
    """Raise ValueError if rollouts are to keep references that depend on the step.

    Args:
        config: Configuration of the run.
        size: Sizes of the model.
        index: Content of the `model_index.json` of the model.
    """
    kept = getattr(config, "keep_references", False)  # of MSGRPO
    is_clean = size.keeps_prefix or index.get("_class_name") in size.clean_pipelines
    if kept and config.visibility == "full" and not is_clean:
        raise ValueError(
            f'keep_references is not possible for model = {config.model}: under visibility = "full" its references '
            "depend on the time of each step; leave --keep-references out"
        )


def check_sizes(config: Recipe, own: int) -> None:
    """Raise ValueError for a stage with images that the model was not made for; `own` is the side of its images."""
    for number, stage in enumerate(config.stages):
        for name, most in (("target_side", LARGEST), ("budget", 2 * LARGEST)):
            side = getattr(stage, name)
            if side is not None and not SMALLEST * own <= side <= most * own:
                better = "tiny" if side > own else "lora"
                raise ValueError(
                    f"the recipe does not suit model = {config.model}: stage {number} has {name} = {side}, and the "
                    f"images of this model have about {own} x {own} pixels; use --recipe {better}, or set "
                    f"--stages.{number}.{name.replace('_', '-')} to between {math.ceil(SMALLEST * own)} and "
                    f"{most * own}"
                )
