"""The plan of a training run: its memory by part, packs, steps, time and disk, from configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from uniref_fast import gpu_memory, speeds
from uniref_fast.loading import local_index
from uniref_fast.model_kind import check_configuration, check_trainable
from uniref_fast.packing import next_fit
from uniref_fast.training.core import memory
from uniref_fast.training.core.adapter import check_adapter
from uniref_fast.training.core.base import QUANTISED, base_bytes, check_base, offloaded_blocks
from uniref_fast.training.core.known_models import KNOWN
from uniref_fast.training.core.model_size import BYTES, ModelSize, model_size
from uniref_fast.training.core.optimizer import check_optimizer, moment_bytes, update_bytes
from uniref_fast.training.core.recipe import BudgetStage, Recipe
from uniref_fast.training.core.suitability import (
    check_guidance,
    check_kept_references,
    check_sizes,
    check_steps,
    check_visibility,
    with_targets,
)
from uniref_fast.training.rl.recipes import MSGRPO

__all__ = ["PlanOptions", "RunPlan", "StagePlan", "make_plan"]

RANKS = (1, 2, 4, 8, 16, 32, 64)  # numbers of ranks that are tried if a run does not fit


@dataclass(frozen=True)
class PlanOptions:
    """Options of `uniref-fast plan` that are not part of the configuration of the run.

    Attributes: Plan
        gpu_memory: Memory of each GPU in GB, of which nine tenths are planned for; none takes the smallest GPU that the
            run fits, or half of this machine's memory for a small model.
        nproc: Number of processes, one for each GPU.
        tokens_per_second: Measured speed of all processes together, as a run records it in `metrics.jsonl`; none takes
            that of `device` if it was measured.
        device: Device whose measured speed is used, such as cpu, cuda or h100-80gb-hbm3; none takes cpu for a small
            model.
        json: Print one JSON object instead of text.
    """

    gpu_memory: float | None = None
    nproc: int = 1
    tokens_per_second: float | None = None
    device: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "nproc", "tokens_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage.

    Attributes:
        stage: The stage.
        steps: Number of steps of the stage in this run.
        fits: The stage fits the memory.
        plan: Plan of its memory; None if it does not fit.
        problem: Reason why it does not fit; empty if it fits.
        activations: Bytes that the backward of a pack keeps on a rank; 0 if it does not fit.
        row_tokens: Mean number of tokens of a row in a pack; None without data.
        rows_per_step: Number of rows that a step uses; None without data.
        steps_per_epoch: Number of steps that use each row of the stage once; None without data.
        tokens_per_step: Number of tokens of a step on all ranks; None if it is not known.
        seconds: Time of the stage; None if its speed is not known.
    """

    stage: BudgetStage
    steps: int
    fits: bool
    plan: memory.MemoryPlan | None
    problem: str
    activations: int
    row_tokens: float | None
    rows_per_step: float | None
    steps_per_epoch: float | None
    tokens_per_step: float | None
    seconds: float | None


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run; `plan.text` prints it.

    Attributes:
        kind: Kind of the run, "sft" or "msgrpo".
        recipe: Name of the recipe.
        config: Configuration of the run.
        size: Sizes of the model.
        trained: Number of trained parameters.
        ranks: Number of ranks.
        memory: Bytes of each rank that are planned for.
        memory_source: Description of this memory.
        held: Bytes of a rank by part, without activations.
        stages: Plans of the stages.
        rows: Number of rows of an epoch; None without data.
        broken: Number of rows that cannot be used.
        speed: Tokens per second, or the reason why they are not known.
        disk: Bytes by part that the run writes.
        advice: Changes with which the run fits; empty if it fits.
        command: Command that starts the run.
    """

    kind: str
    recipe: str
    config: Recipe
    size: ModelSize
    trained: int
    ranks: int
    memory: int
    memory_source: str
    held: dict[str, int]
    stages: tuple[StagePlan, ...]
    rows: int | None
    broken: int
    speed: speeds.MeasuredTime
    disk: dict[str, int]
    advice: tuple[str, ...]
    command: str

    @property
    def fits(self) -> bool:
        """True if every stage fits the memory."""
        return all(stage.fits for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Time of all steps in seconds, without validation; None if it is not known."""
        parts = [stage.seconds for stage in self.stages]
        return sum(part for part in parts if part is not None) if None not in parts else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        stages = [
            {
                "budget": s.stage.budget, "target_side": s.stage.target_side, "steps": s.steps, "lr": s.stage.lr,
                "fits": s.fits, "problem": s.problem or None,
                "pack_tokens": s.plan and s.plan.pack_tokens, "sequence_parallel": s.plan and s.plan.sequence_parallel,
                "checkpointing": s.plan and s.plan.checkpointing, "activation_bytes": s.activations,
                "bytes_needed": s.plan and s.plan.bytes_needed, "tokens_per_row": s.row_tokens,
                "rows_per_step": s.rows_per_step, "tokens_per_step": s.tokens_per_step,
                "steps_per_epoch": s.steps_per_epoch,
                "seconds": s.seconds,
            }
            for s in self.stages
        ]  # fmt: skip
        return {
            "kind": self.kind, "recipe": self.recipe, "model": self.config.model, "ranks": self.ranks,
            "parameters": {"transformer": self.size.transformer, "encoders": self.size.encoders,
                           "trained": self.trained},
            "memory": self.memory, "memory_source": self.memory_source, "held_bytes": self.held, "fits": self.fits,
            "advice": list(self.advice), "stages": stages, "rows": self.rows, "broken_rows": self.broken,
            "tokens_per_second": self.speed.value, "tokens_per_second_source": self.speed.source,
            "seconds": self.seconds, "disk_bytes": self.disk, "command": self.command,
        }  # fmt: skip


def make_plan(
    kind: str, recipe: str, config: Recipe, options: PlanOptions, command: str = "", given: Collection[str] = ()
) -> RunPlan:
    """Plan a run.

    Args:
        kind: Kind of the run, "sft" or "msgrpo".
        recipe: Name of its recipe.
        config: Configuration of the run, with the settings of the adapter that it continues.
        options: Options of the plan.
        command: Command that starts the run.
        given: Names of the settings that were given on the command line.

    Raises:
        ValueError: The recipe does not suit the model, or the model or the data cannot be read.
    """
    size = model_size(config.model)
    known = KNOWN.get(config.model)
    index = local_index(config.model) if known is None else known.index
    if index:
        if known is None:
            check_configuration(f"--model {config.model}", index)
        check_trainable(f"--model {config.model}", index, kind)
        check_steps(config, index)
        check_guidance(config, index)
    config = with_targets(config, given, size.lora_targets)
    check_base(config)
    check_sizes(config, size.output_side)
    check_visibility(config, size)
    check_kept_references(config, size, index or {})
    offloaded_blocks(size.num_blocks, config.offload_blocks)
    check_adapter(config)
    trained = (
        size.transformer
        if config.lora_rank is None
        else size.adapter(config.lora_rank, config.lora_targets, config.adapter)
    )
    shared, fixed = _shared(config, size, trained), _fixed(config, size)

    def planned(ranks: int, available: int, other: Recipe = config) -> list[memory.MemoryPlan | str]:
        held = sum(_fixed(other, size).values()), sum(_shared(other, size, trained).values())
        return [_memory_plan(other, size, trained, stage, ranks, available, *held) for stage in other.stages]

    def fits(ranks: int, available: int, other: Recipe = config) -> bool:
        return all(isinstance(plan, memory.MemoryPlan) for plan in planned(ranks, available, other))

    ranks = options.nproc
    check_optimizer(config, ranks)
    available, source = _memory(config, options, size, [n for n in gpu_memory.SIZES if fits(ranks, _usable(n))])
    plans = planned(ranks, available)
    memory.check_packs(config.packs, ranks, [plan for plan in plans if isinstance(plan, memory.MemoryPlan)])
    tokens = None
    if config.data:
        from uniref_fast.training.batches.row_tokens import row_tokens

        tokens = row_tokens(config, size, kind == "sft", BYTES[config.dtype])
    speed = _speed(kind, config, options, size, [p for p in plans if isinstance(p, memory.MemoryPlan)])
    held = {name: count // ranks for name, count in shared.items()} | fixed
    stages, ends = [], [0, *config.ends()]
    for number, (stage, plan) in enumerate(zip(config.stages, plans, strict=True)):
        lengths = [] if tokens is None else _used(config, stage, tokens.lengths[number], tokens.references)
        rows = tokens.rows * len(lengths) / len(tokens.references) if tokens else None
        steps = ends[number + 1] - ends[number]
        stages.append(_stage(config, stage, steps, plan, sum(held.values()), lengths, rows, speed.value))
    advice: list[str] = []
    if any(isinstance(plan, str) for plan in plans):
        smaller = memory.smaller_stages(config.stages, [isinstance(plan, memory.MemoryPlan) for plan in plans])
        settings = _settings(config, size, ranks, lambda other: fits(ranks, available, other))
        advice = [*filter(None, (smaller, settings)), *_advice(config, options, fits)]
    disk = _disk(config, trained) | ({"cache": tokens.cache_bytes} if tokens and config.has_cache else {})
    whole, broken = (None, 0) if tokens is None else (tokens.rows, tokens.broken)
    return RunPlan(kind, recipe, config, size, trained, ranks, available, source, held, tuple(stages), whole, broken,
                   speed, disk, tuple(advice), command)  # fmt: skip


def _shared(config: Recipe, size: ModelSize, trained: int) -> dict[str, int]:
    """Return the bytes that the ranks share, by part; the sum is `TrainedModel.sharded_bytes`."""
    element, master = BYTES[config.dtype], BYTES[config.weight_dtype]
    frozen = 0
    if config.lora_rank is not None:  # the weights of blocks are shared if they are neither quantised nor on the host
        frozen = (size.transformer - sum(block.numbers for block in size.blocks)) * element
        frozen += 0 if config.base in QUANTISED else sum(_base_bytes(config, size)[0])
    more = 4 if config.ema is None else 8
    state = trained * more + moment_bytes(config, trained)
    return {"weights": frozen + trained * master, "gradients and optimizer": state}


def _fixed(config: Recipe, size: ModelSize) -> dict[str, int]:
    """Return the bytes that every rank holds, by part; the sum is `TrainedModel.fixed_bytes`."""
    found: dict[str, int] = {}
    resident, away = _base_bytes(config, size)
    fetched = sum(sorted(away)[-2:])  # the block that is computed, and the next one
    if config.base in QUANTISED:
        found[f"{config.base} base"] = sum(resident) + fetched
    elif away:
        found["fetched blocks"] = fetched
    if config.resolve_encoders() == "resident":
        found["encoders"] = size.encoders * BYTES[config.dtype]
    return found


def _base_bytes(config: Recipe, size: ModelSize) -> tuple[list[int], list[int]]:
    """Return the bytes of the frozen weights of the Linear layers of each block: of those on the device, and others."""
    host = offloaded_blocks(size.num_blocks, config.offload_blocks)
    found: tuple[list[int], list[int]] = [], []
    for number, block in enumerate(size.blocks):
        sides = block.linears.values()
        found[number in host].append(sum(base_bytes(config.base, *each, BYTES[config.dtype]) for each in sides))
    return found


def _memory(config: Recipe, options: PlanOptions, size: ModelSize, sizes: Sequence[int]) -> tuple[int, str]:
    """Return the bytes of a rank to plan for, and their description; `sizes` are those of GPUs that the run fits."""
    if config.memory_gib is not None:
        return int(config.memory_gib * 2**30), "memory_gib"
    if options.gpu_memory is None and size.small:
        return memory.machine_memory() // options.nproc, "half of this machine's memory, shared by the processes"
    given = options.gpu_memory or (sizes[0] if sizes else gpu_memory.SIZES[-1])
    chosen = "" if options.gpu_memory else ", the smallest that the run fits" if sizes else ", the largest known"
    return _usable(given), f"nine tenths of a GPU of {given:g} GB{chosen}"


def _usable(gigabytes: float) -> int:
    """Return the bytes to plan for on a GPU."""
    return int(gigabytes * 2**30 * gpu_memory.USABLE)


def _memory_plan(
    config: Recipe,
    size: ModelSize,
    trained: int,
    stage: BudgetStage,
    ranks: int,
    available: int,
    fixed: int,
    sharded: int,
) -> memory.MemoryPlan | str:
    """Return the plan of a stage, or the reason why it does not fit."""
    memory.sharing_degrees(stage, ranks, size)  # raises ValueError for a number of ranks that cannot work
    element = BYTES[config.dtype]
    freed = size.encoders * element if config.resolve_encoders() == "free" else 0
    try:
        return memory.plan_memory(
            stage, size, ranks=ranks, memory=available, fixed=fixed, sharded=sharded, element=element,
            gathered=_gathered_bytes(config, size, ranks),
            update=update_bytes(config, trained), freed=freed, patch=size.token_side,
            sequences=config.sequences, reference_area=size.reference_area,
        )  # fmt: skip
    except ValueError as error:
        return str(error)


def _gathered_bytes(config: Recipe, size: ModelSize, ranks: int) -> int:
    """Return the bytes of the blocks that are gathered at a time, as `TrainedModel.gathered_bytes`."""
    element, blocks, layers, quantised = BYTES[config.dtype], size.blocks, {}, 0
    if config.lora_rank is not None:
        layers = size.adapter_layers(config.lora_rank, config.lora_targets, config.adapter)
    if config.base in QUANTISED:
        quantised = max(rows * columns for block in blocks for rows, columns in block.linears.values())
    host, found = offloaded_blocks(len(blocks), config.offload_blocks), set()
    for number, block in enumerate(blocks):
        numbers = trained = block.parameters
        if config.lora_rank is not None:
            trained = sum(count for name, count in layers.items() if name.startswith(f"{block.name}."))
            away = config.base in QUANTISED or number in host  # its frozen weights are not sharded
            numbers += trained - away * block.numbers
        found.add((numbers, trained))
    return max(memory.gathered_bytes(*each, element, ranks, quantised) for each in found)


def _used(config: Recipe, stage: Any, lengths: Sequence[int], references: Sequence[int]) -> list[int]:
    """Return the tokens that each row of a stage takes in a pack, without rows that the stage does not use."""
    if not isinstance(config, MSGRPO):
        return list(lengths)
    pairs = zip(lengths, references, strict=True)
    found = [config.sequences * length for length, k in pairs if stage.uses(k)]
    if not found:
        raise ValueError(f'the data has no row for a stage of references = "{stage.references}"')
    return found


def _stage(
    config: Recipe,
    stage: BudgetStage,
    steps: int,
    plan: memory.MemoryPlan | str,
    held: int,
    lengths: Sequence[int],
    rows: float | None,
    speed: float | None,
) -> StagePlan:
    if isinstance(plan, str):
        return StagePlan(stage, steps, False, None, plan, 0, None, None, None, None, None)
    mean = sum(lengths) / len(lengths) if lengths else None
    tokens: float | None = None
    if isinstance(config, MSGRPO):
        used: float | None = config.prompts
        if mean:  # a rollout runs all denoising steps, and its trained steps once more for each pass
            runs = config.rollout_num_inference_steps + config.trained_steps * config.inner_epochs
            tokens = config.prompts * config.group * runs * mean
    else:
        packs = next_fit(lengths, plan.pack_tokens)
        used = config.packs * len(lengths) / len(packs) if packs else None
        tokens = used * mean if used and mean else config.packs * plan.pack_tokens
    epoch = rows / used if rows and used else None
    seconds = None if speed is None or tokens is None else steps * tokens / speed
    return StagePlan(
        stage, steps, True, plan, "", plan.bytes_needed - held, mean, used if rows else None, epoch, tokens, seconds
    )


def _speed(
    kind: str, config: Recipe, options: PlanOptions, size: ModelSize, plans: Sequence[memory.MemoryPlan]
) -> speeds.MeasuredTime:
    """Return the tokens per second of the run: as given, else as measured for the packs of every stage."""
    if options.tokens_per_second is not None:
        return speeds.MeasuredTime(options.tokens_per_second, f"at the given {options.tokens_per_second:g} tokens/s")
    if kind != "sft" or not plans:
        return speeds.MeasuredTime(None, "not measured" if plans else "not known: the run does not fit")
    device = options.device or ("cpu" if size.small else None)
    if device is None:
        return speeds.MeasuredTime(None, "not known: no --device is given")
    key, lora = speeds.model_key(size), config.lora_rank is not None
    if device in ("cpu", "cuda") or device.startswith("cuda:"):
        if not speeds.measured_devices("training", key):
            return speeds.MeasuredTime(None, "not measured for this model on any device")
        from uniref_fast.tuning import named_device

        device = named_device(device)
    found = [speeds.training_speed(key, config.dtype, lora, p.pack_tokens, options.nproc, device) for p in plans]
    slowest = min(found, key=lambda one: -1.0 if one.value is None else one.value)
    text = slowest.source if slowest.value is None else f"at {slowest.value:.4g} tokens/s {slowest.source}"
    return speeds.MeasuredTime(slowest.value, text)


def _advice(config: Recipe, options: PlanOptions, fits: Callable[[int, int], bool]) -> list[str]:
    """Return changes with which a run fits: more GPUs of the same size, or larger GPUs.

    Args:
        config: Configuration of the run.
        options: Options of the plan.
        fits: Function that takes a number of ranks and the memory of each, and returns whether the run fits.
    """
    found = []
    given = options.gpu_memory or gpu_memory.SIZES[-1]
    more = next((n for n in RANKS if n > options.nproc and _works(config, n, _usable(given), fits)), None)
    if more:
        found.append(f"it fits {more} GPUs of {given:g} GB (--nproc {more})")
    larger = next((n for n in gpu_memory.SIZES if n > given and fits(options.nproc, _usable(n))), None)
    if larger:
        found.append(f"it fits {options.nproc} GPU(s) of {larger} GB (--gpu-memory {larger})")
    return found or ["train a LoRA (--lora-rank 16), or lower budget, target_side or pack_tokens of the stages"]


def _settings(config: Recipe, size: ModelSize, ranks: int, fits: Callable[[Recipe], bool]) -> str:
    """Return the settings that need less memory with which a run fits, those that cost the least time first.

    Args:
        config: Configuration of the run.
        size: Sizes of the model.
        ranks: Number of ranks.
        fits: Function that returns whether a run with another configuration fits.
    """
    changes: dict[str, Any] = {}
    order: tuple[tuple[str, Any], ...] = (("encoders", "free"),)
    if config.lora_rank is not None:
        order += (("base", "int8"), ("base", "nf4")) if config.base in (None, "bf16") else ()
        order += (("optimizer", "adamw8bit"),) if ranks == 1 else ()
        blocks = (size.num_blocks * part // 3 for part in (1, 2, 3))
        order += tuple(("offload_blocks", count) for count in blocks if count > config.offload_blocks)
    for name, value in order:
        if getattr(config, name) == value:
            continue
        tried = replace(config, **(changes | {name: value}))
        try:
            check_adapter(tried)
            check_optimizer(tried, ranks)
        except ValueError:  # the base does not suit the kind of adapter, or the optimizer the trained weights
            continue
        changes[name] = value
        if fits(tried):
            for one in list(changes)[:-1]:  # earlier ones may not be needed any more
                fewer = {key: each for key, each in changes.items() if key != one}
                changes = fewer if fits(replace(config, **fewer)) else changes
            flags = (f"--{key.replace('_', '-')} {each}" for key, each in changes.items())
            return f"it fits with {' '.join(flags)}"
    return ""


def _works(config: Recipe, ranks: int, available: int, fits: Callable[[int, int], bool]) -> bool:
    try:
        check_optimizer(config, ranks)
        return fits(ranks, available)
    except ValueError:  # the optimizer is for one rank, or this number cannot share a pack as a stage says
        return False


def _disk(config: Recipe, trained: int) -> dict[str, int]:
    """Return the bytes that a run writes: its checkpoints, one more while it saves, and the trained weights."""
    master = BYTES[config.weight_dtype]
    checkpoint = trained * (master if config.ema is None else master + 4) + moment_bytes(config, trained)
    name, element = ("transformer/", BYTES[config.dtype]) if config.lora_rank is None else ("lora/", master)
    return {f"{config.keep + 1} checkpoints": (config.keep + 1) * checkpoint, name: trained * element}
