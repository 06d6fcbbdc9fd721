"""The settings of a run that may change when it is resumed; changes of all others are refused.

The state of a checkpoint holds the settings that it was written with. A setting is *fixed* if another value would give
the trained weights, the order of rows or the packs another meaning; it *may change* if it only affects later steps.
`model`, `initial` and `data` may name other places with the same content, which is compared where it is read
(`TrainedModel.frozen`, `Dataset.fingerprint`). A setting that no flag gives keeps the value of the run, whatever the
default of its recipe is now, except places and the use of the machine (`OF_THE_COMMAND`). Each change that makes a
difference to later steps is recorded as an event of the run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniref_fast.flags import current_name
from uniref_fast.training.core.recipe import Recipe, stage_at

__all__ = ["FIXED", "MAY_CHANGE", "RENAMED", "Fixed", "changes", "effective", "kept", "refuse", "shown"]


@dataclass(frozen=True)
class Fixed:
    """A setting that cannot change.

    Attributes:
        words: Description for messages.
        part: Function that returns the fixed part of a value.
    """

    words: str
    part: Callable[[Any], Any] = lambda value: value


FIXED = {
    # the trained tensors and their meaning
    "adapter": Fixed("the kind of the adapter"),
    "lora_rank": Fixed("the rank of the adapter"),
    "lora_alpha": Fixed("the scale of the adapter"),
    "lora_targets": Fixed("the choice of layers that have an adapter"),
    "dtype": Fixed("the dtype of the computation"),
    "weight_dtype": Fixed("the dtype of the trained weights"),
    "optimizer": Fixed("the format of the moments of the optimizer"),
    "base": Fixed("the dtype of the frozen weights under the adapter"),
    "ema": Fixed("whether averaged weights are kept", lambda value: value is not None),
    "visibility": Fixed("the attention of the model", lambda v: "reference_causal" if v == "group_shared" else v),
    # the order of rows and the packs
    "seed": Fixed("the seed of rows, times and noise"),
    "weights": Fixed("the share of the rows of each path of data"),
    "columns": Fixed("the reading of the columns of rows"),
    "cost": Fixed("the way in which packs are priced"),
    # the autoencoder of the built-in model: the random numbers of all its steps depend on these
    "vae.seed": Fixed("the seed of crops and noise"),
    "vae.steps": Fixed("the number of steps"),
    "vae.batch": Fixed("the number of crops of a step"),
    "vae.side": Fixed("the size of the crops"),
    "vae.lr": Fixed("the peak learning rate"),
    "vae.kl": Fixed("the weight of the divergence"),
}

MAY_CHANGE = frozenset({
    # other places with the same content
    "model", "initial", "data", "image_folder", "vae.out", "vae.data",
    # the curriculum and the optimizer from the next step on
    "stages.budget", "stages.steps", "stages.lr", "stages.target_side", "stages.pack_tokens",
    "stages.sequence_parallel", "stages.checkpointing", "stages.references", "steps", "packs", "betas", "weight_decay",
    "warmup", "schedule", "max_grad_norm", "t_mean", "t_std", "drop_text", "drop_references",
    "mask_weight_outside", "embedded_guidance",
    # evaluation, checkpoints and logs
    "heldout", "validate", "save_every", "keep", "eval_every", "eval_samples", "sample_every", "sample_count",
    "sample_num_inference_steps", "sample_true_cfg_scale", "tensorboard", "wandb", "alarm", "vae.save_every",
    # the use of the machine
    "cache", "workers", "memory_gib", "encoders", "compile", "offload_blocks",
    # the limits at which the run ends
    "max_skipped", "max_broken", "max_failures",
    # a step of MSGRPO: its rollouts and updates use the same settings, and no later step uses its results
    "prompts", "group", "rollout_num_inference_steps", "sampler", "noise", "window", "window_end",
    "rollout_true_cfg_scale", "keep_references", "timesteps", "updates", "inner_epochs", "clip", "clip_high",
    "advantage_clip", "advantage", "advantage_std", "ratio_guard", "kl", "min_members", "rewards", "reward_weights",
    "axis_weights",
    # answers of the judge are reused by the content of the call, the model's name and the sampling included
    "judge.url", "judge.model", "judge.concurrency", "judge.timeout", "judge.attempts", "judge.backoff",
    "judge.backoff_limit", "judge.patience", "judge.temperature", "judge.seed", "judge.max_tokens", "judge.token_field",
    "judge.samples", "judge.max_side", "judge.json_mode", "judge.key_variable", "judge.replay",
})  # fmt: skip

# settings that a resumed run takes from its command, also where no flag gives them
OF_THE_COMMAND = frozenset({
    "model", "initial", "data", "heldout", "validate", "image_folder",
    "cache", "workers", "memory_gib", "encoders", "compile", "offload_blocks", "tensorboard", "wandb",
    "judge.url", "judge.key_variable", "judge.replay", "judge.concurrency", "judge.timeout", "judge.attempts",
    "judge.backoff", "judge.backoff_limit", "judge.patience",
})  # fmt: skip

RENAMED = {  # former names of settings, which old runs have recorded
    "guard": "ratio_guard",
    "spread": "advantage_std",
    "stages.N.side": "stages.N.budget",
    "sample_steps": "sample_num_inference_steps",
    "sample_guidance": "sample_true_cfg_scale",
    "rollout_steps": "rollout_num_inference_steps",
    "guidance": "rollout_true_cfg_scale",
}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings with other values, as name -> (before, now); None stands for a stage that does not exist.

    A setting that one of the configurations lacks, because another version wrote it, counts as unchanged.

    Args:
        before: Earlier configuration, as JSON data.
        now: New configuration, as JSON data.
    """
    old, new = {current_name(name, RENAMED): value for name, value in _leaves(before).items()}, _leaves(now)
    names = [name for name in dict.fromkeys((*new, *old)) if (name in old and name in new) or name != _setting(name)]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def kept(before: Mapping[str, Any], now: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the settings that a resumed run keeps in place of the recipe's, as name -> value before.

    They are those that no flag has set, except places and the use of the machine, which belong to the command. If the
    number of stages differs, the stages belong to the command too.

    Args:
        before: Earlier configuration, as JSON data.
        now: Configuration of the command line, as JSON data.
        given: Names of the settings that flags have set.
    """
    same_stages = len(before.get("stages", ())) == len(now.get("stages", ()))
    return {
        name: old
        for name, (old, _) in changes(before, now).items()
        if name not in given
        and _setting(name) not in OF_THE_COMMAND
        and (same_stages or not name.startswith("stages."))
    }


def effective(changed: Mapping[str, tuple[Any, Any]], now: Recipe, step: int) -> dict[str, tuple[Any, Any]]:
    """Return the changes that make a difference to the steps that are not done yet.

    A setting of the curriculum makes none if the remaining steps would have the same stages and learning rates with its
    old value, as that of a stage which has ended.

    Args:
        changed: Result of `changes`.
        now: New configuration.
        step: Number of steps that are done.
    """
    course, found = _course(now, step), {}
    for name, (old, new) in changed.items():
        before = _with(now, name, old)
        try:
            same = before is not None and _course(before(), step) == course
        except ValueError:  # the old value does not fit the other settings
            same = False
        if not same:
            found[name] = old, new
    return found


def _course(config: Recipe, step: int) -> list[Any]:
    """Return the stage, without its length and peak rate, and the learning rate of each step from `step` on."""
    stages = [dataclasses.replace(stage, steps=1, lr=1.0) for stage in config.stages]
    numbers = [(stage_at(config, i)[0], config.lr(i)) for i in range(step, config.total_steps)]
    return [*((stages[number], rate) for number, rate in numbers), stages[-1]]  # the last one is validated in the end


def _with(now: Recipe, name: str, old: Any) -> Callable[[], Recipe] | None:
    """Return a function that returns a configuration with an old value of its curriculum; None for other settings."""
    if name in ("steps", "warmup", "schedule"):
        return lambda: dataclasses.replace(now, **{name: old})
    match = re.fullmatch(r"stages\.(\d+)\.(\w+)", name)
    if match is None or int(match[1]) >= len(now.stages):
        return None
    number, stages = int(match[1]), list(now.stages)
    if old is None and match[2] in ("steps", "lr", "target_side"):  # the stage is new
        return None

    def before() -> Recipe:
        stages[number] = dataclasses.replace(stages[number], **{match[2]: old})
        return dataclasses.replace(now, stages=tuple(stages))

    return before


def refuse(changed: Mapping[str, tuple[Any, Any]], out: Path, prefix: str = "") -> None:
    """Raise ValueError if a fixed setting has changed.

    Args:
        changed: Result of `changes`.
        out: Folder of the run, for the message.
        prefix: Prefix of the names in the table.
    """
    found = []
    for name, (old, new) in changed.items():
        fixed = FIXED.get(prefix + _setting(name))
        if fixed is not None and fixed.part(old) != fixed.part(new):
            found.append(f"{fixed.words} is fixed: {name} is {shown(old)}, not {shown(new)}")
    if found:
        raise ValueError(
            f"the run in {out} cannot be resumed with these settings: {'; '.join(found)}. Give the same values, or "
            "start another run with another --out"
        )


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return plain values by dotted name; the items of a list of objects are named by their indices."""
    if isinstance(value, Mapping):
        parts = [_leaves(item, f"{name}.{key}".lstrip(".")) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        parts = [_leaves(item, f"{name}.{i}") for i, item in enumerate(value)]
    else:
        return {name: value}
    return {key: item for part in parts for key, item in part.items()}


def _setting(name: str) -> str:
    """Return the name of a setting in the tables: without the numbers of stages."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def shown(value: Any) -> str:
    """Return a value of a setting for messages."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
