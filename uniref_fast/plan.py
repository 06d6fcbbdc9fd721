"""The command `uniref-fast plan`: what a training command needs, before anything is downloaded or trained.

    uniref-fast plan --recipe lora --data rows.jsonl --gpu-memory 80 --nproc 2
    uniref-fast plan msgrpo --recipe tiny

It takes the flags of `training/sft.py` or `training/msgrpo.py`, and plans with the planner of the trainers. PyTorch is
imported only to read the sizes of rows.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uniref_fast import flags
from uniref_fast.gpu_memory import size_text
from uniref_fast.run_plan import PlanOptions, RunPlan, StagePlan, make_plan
from uniref_fast.training.core import resume
from uniref_fast.training.core.adapter import NAMES
from uniref_fast.training.core.launch import with_adapter, with_visibility
from uniref_fast.training.core.memory import RECOMPUTATION
from uniref_fast.training.core.model_size import BYTES
from uniref_fast.training.rl.recipes import MSGRPO, MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT_RECIPES

__all__ = ["KINDS", "run", "split_kind", "text"]

KINDS: dict[str, Any] = {"sft": SFT_RECIPES, "msgrpo": MSGRPO_RECIPES}
"""Recipes of each kind of run."""
DESCRIPTION = (
    "Plan a training run without starting it: memory, packs, steps, time and disk. `plan sft` (the default) takes the "
    "flags of training/sft.py, `plan msgrpo` those of training/msgrpo.py."
)


def run(argv: Sequence[str]) -> int:
    """Print the plan of a run; return 0 if it fits the memory, else 1.

    Args:
        argv: Arguments after `uniref-fast plan`.
    """
    kind, words = split_kind(argv)
    for i, word in enumerate(words):  # a plain --json, as of other commands
        if word == "--json" and (i + 1 == len(words) or words[i + 1].startswith("--")):
            words[i] = "--json=true"
    parsed = flags.parse(KINDS[kind], words, extra=PlanOptions(), prog=f"uniref-fast plan {kind}",
                         description=DESCRIPTION, renamed=resume.RENAMED)  # fmt: skip
    config = with_adapter(with_visibility(parsed.config), parsed.given)
    plan = make_plan(kind, parsed.recipe, config, parsed.extra, _command(kind, words, parsed), parsed.given)
    print(json.dumps(plan.as_dict()) if parsed.extra.json else text(plan))
    return 0 if plan.fits else 1


def split_kind(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the kind of run that the first argument names, "sft" by default, and the other arguments.

    Raises:
        ValueError: The first argument names no kind of run.
    """
    words = list(argv)
    kind = words.pop(0) if words and not words[0].startswith("-") else "sft"
    if kind not in KINDS:
        raise ValueError(f"unknown kind of run {kind!r}; give sft or msgrpo, or flags only for sft")
    return kind, words


def _command(kind: str, words: Sequence[str], parsed: flags.Parsed[Any, PlanOptions]) -> str:
    """Return the command that starts the run: the words of the plan without those of the plan itself."""
    own = {field.name for field in dataclasses.fields(PlanOptions)}
    kept, skip = [], False
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--"):
            skip = name in own
        if not skip:
            kept.append(word)
    data = parsed.config.data
    out = f"runs/{Path(data[0]).stem if data and data[0] != 'builtin' else parsed.recipe}"
    more = [] if data else ["--data", "PATH"]
    kept = [*kept, *more, "--out", out]
    return f"torchrun --nproc-per-node {parsed.extra.nproc} training/{kind}.py {shlex.join(kept)}"


def text(plan: RunPlan) -> str:
    """Return the plan of a run as text."""
    config, size = plan.config, plan.size
    whole = (size.transformer + size.encoders) * BYTES[config.dtype]
    share = plan.trained / size.transformer
    what = "all weights"
    if config.lora_rank is not None:
        what = f"{NAMES[config.adapter]} of rank {config.lora_rank}, alpha {config.resolve_alpha():g}"
        what += f", {share:.2%} of the transformer"
    lines = [
        f"model       {config.model}: {_count(size.transformer)} parameters of the transformer, "
        f"{_count(size.encoders)} of the encoders; {size_text(whole)} in {config.dtype}",
        f"trained     {_count(plan.trained)} parameters: {what}",
        f"data        {_data(plan)}",
    ]
    for number, stage in enumerate(plan.stages):
        lines += _stage_lines(plan, number, stage)
    held = ", ".join(f"{name} {size_text(count)}" for name, count in plan.held.items())
    lines += [
        f"memory      {size_text(plan.memory)} of each of {plan.ranks} process(es): {plan.memory_source}",
        f"            {held}; activations as above",
        "fits        yes" if plan.fits else f"fits        no; {'; '.join(plan.advice)}",
        f"time        {_time(plan)}",
        f"disk        {', '.join(f'{name} {size_text(count)}' for name, count in plan.disk.items())}",
        f"start       {plan.command}",
    ]
    return "\n".join(lines)


def _data(plan: RunPlan) -> str:
    if plan.rows is None:
        return "none given; figures are those of full packs. Give --data PATH for those of your rows"
    broken = (
        f"; {plan.broken} of those that were read cannot be used (see uniref-fast data check)" if plan.broken else ""
    )
    return f"{plan.rows} rows{broken}"


def _stage_lines(run_plan: RunPlan, number: int, stage: StagePlan) -> list[str]:
    given, name = stage.stage, f"stage {number}"
    joint = "sized as in diffusers" if given.budget is None else f"of {given.budget} x {given.budget} pixels together"
    sides = f"references {joint}, targets up to {given.target_side} x "
    lines = [f"{name:<12}{stage.steps} steps, lr {given.lr:g}, {sides}{given.target_side}"]
    if stage.plan is None:
        return [*lines, f"            does not fit: {stage.problem}"]
    plan = stage.plan
    blocks = RECOMPUTATION[plan.checkpointing]
    lines.append(
        f"            packs of up to {plan.pack_tokens} tokens, {_packs(run_plan)}, {plan.sequence_parallel} "
        f"process(es) a pack, {blocks}; activations {size_text(stage.activations)}, together "
        f"{size_text(plan.bytes_needed)}{plan.rejected}"
    )
    if stage.row_tokens is not None and stage.steps_per_epoch is not None:
        epoch = stage.steps_per_epoch
        lines.append(
            f"            about {stage.row_tokens:.0f} tokens a row, {stage.rows_per_step:.1f} rows a step, "
            f"{epoch:.1f} steps an epoch, {stage.steps / epoch:.1f} epochs"
        )
        if epoch < 1:
            lines.append(
                f"            a step uses each row {1 / epoch:.1f} times; a smaller --packs or "
                f"--stages.{number}.pack-tokens uses fewer rows a step"
            )
    return lines


def _packs(plan: RunPlan) -> str:
    if isinstance(plan.config, MSGRPO):
        return f"{plan.config.prompts} rows x {plan.config.group} rollouts a step"
    return f"{plan.config.packs} packs a step"


def _time(plan: RunPlan) -> str:
    if plan.seconds is None:
        if plan.speed.value is not None:
            return "not known without --data PATH"
        return f"{plan.speed.source}; give --tokens-per-second of a run of yours"
    tokens = sum(stage.steps * (stage.tokens_per_step or 0) for stage in plan.stages)
    return f"{_duration(plan.seconds)} for {_count(tokens)} tokens without validation, {plan.speed.source}"


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
