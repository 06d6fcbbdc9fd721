"""Check from a model's configuration files that a recipe suits it, before data is read and weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from uniref_fast.builtin import recorded_areas
from uniref_fast.training.core.recipe import Recipe

__all__ = ["check_sizes", "check_suitability"]

OUTPUT_AREA = 1024 * 1024  # pixels of the images of the released models
SMALLEST, LARGEST = 1 / 8, 4  # side of a stage's images, relative to those of the model; a budget may be twice as much
HEADS = 24  # of a configuration that does not state them, as in diffusers


def check_suitability(config: Recipe, ranks: int) -> None:
    """Check that a recipe suits its model.

    Args:
        config: Configuration of the run, with the settings of the adapter that it continues.
        ranks: Number of ranks of the run.

    Raises:
        ValueError: The model does not exist or is of another kind, the images of a stage are far larger or smaller than
            those of the model, the ranks cannot share a pack as a stage says, or the adapter does not fit the layers.
    """
    from uniref_fast.loading import configuration

    index, transformer = configuration(config.model)
    areas = recorded_areas(index, transformer)
    check_sizes(config, math.isqrt(areas.get("output_area", OUTPUT_AREA)))
    _check_sharing(config, transformer, ranks)
    if config.lora_rank is not None and (config.initial is None or not (config.initial / "lora").is_dir()):
        _check_adapter(config, config.lora_rank, transformer)


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


def _check_sharing(config: Recipe, transformer: Mapping[str, Any], ranks: int) -> None:
    if any(stage.sequence_parallel is not None for stage in config.stages):
        from uniref_fast.training.core.memory import sharing_degrees

        heads = SimpleNamespace(num_attention_heads=transformer.get("num_attention_heads", HEADS))
        for stage in config.stages:
            sharing_degrees(stage, ranks, heads)


def _check_adapter(config: Recipe, rank: int, transformer: Mapping[str, Any]) -> None:
    import torch
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model: Any = QwenImageTransformer2DModel.from_config(dict(transformer))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for target in config.lora_targets:
        chosen = [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
        if not chosen:
            kinds = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdecimal()})
            raise ValueError(
                f"lora_targets: no Linear layer of model = {config.model} has the name {target!r}; there are "
                f"{', '.join(kinds)}, and net.0.proj and net.2 of the MLPs"
            )
        narrowest = min(min(layer.in_features, layer.out_features) for layer in chosen)
        if rank > narrowest:
            raise ValueError(
                f"lora_rank = {rank} is more than the width {narrowest} of the layers {target!r} of model = "
                f"{config.model}; give at most that"
            )
