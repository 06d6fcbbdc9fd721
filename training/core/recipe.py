"""The configuration that every kind of run shares: its model, data, stages, optimizer and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uniref_fast.data.columns import Columns

__all__ = ["BudgetStage", "Recipe", "stage_at"]


@dataclass(frozen=True)
class BudgetStage:
    """One part of the budget curriculum.

    Attributes:
        side: joint pixel budget of a sample's references: side x side pixels for all of them together.
        steps: optimizer steps.
        lr: peak learning rate.
        target_side: a target of more pixels than target_side x target_side is made smaller.
        pack_tokens: most tokens of a pack; none: what fits the memory, up to four of the largest samples.
        sequence_parallel: ranks that share a pack; none: the least that fits the memory.
        checkpointing: recompute blocks in the backward; none: only where memory needs it.
    """

    side: int
    steps: int
    lr: float
    target_side: int = 1024
    pack_tokens: int | None = None
    sequence_parallel: int | None = None
    checkpointing: bool | None = None

    def __post_init__(self) -> None:
        for name in ("side", "steps", "target_side"):
            least = 1 if name == "steps" else 16
            if getattr(self, name) < least:
                raise ValueError(f"a stage's {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("pack_tokens", "sequence_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"a stage's {name} must be at least 1, or none to have it planned; got {value}")
        if not self.lr > 0:
            raise ValueError(f"a stage's lr must be above 0, got {self.lr}")


@dataclass(frozen=True)
class Recipe:
    """What every kind of run has.

    Attributes:
        model: "builtin", a diffusers folder, or a hub id.
        initial: folder of a run whose `lora/` or `transformer/` is gone on with; none starts at the model.
        data: files or folders of rows; "builtin" makes small ones with the shipped artworks.
        weights: how often a row of each path of `data` comes per epoch, 0.5 is every other epoch; empty: once each.
        heldout: files of rows that are never trained on, for held-out figures and the sample grids; each is reported
            by its file name.
        image_folder: where relative image paths of the rows are looked up; none: beside their file.
        columns: what the columns of `data` and `heldout` hold where their names are not known, as role=column pairs,
            such as instruction=prompt,references=refs (`columns.Columns`).
        stages: the curriculum, in order.
        steps: optimizer steps of the whole run; none: as the stages say, else their lengths are scaled to it.
        packs: packs of a step over all ranks; the ranks that share packs must divide it.
        lora_rank: rank of the adapter; none trains all weights.
        lora_alpha: the adapter's scale is lora_alpha / lora_rank.
        lora_targets: names of the Linears that get an adapter.
        dtype: of the computation.
        weight_dtype: dtype that trained weights are kept and updated in.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        schedule: of the learning rate after the warm-up.
        max_grad_norm: gradients of a larger norm are scaled down to it; 0 leaves them.
        ema: decay of the averaged weights that are evaluated and exported; none keeps no average.
        seed: of everything that is random.
        cache: folder of encoded images and prompts; none encodes them anew each time.
        workers: threads that read images ahead.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
        eval_every: steps between held-out figures; 0 for none.
        eval_samples: held-out rows of each file that they are taken over.
        sample_every: steps between sample grids; 0 for none.
        sample_count: rows of a grid; held-out ones of each file.
        sample_steps: denoising steps of a sample.
        sample_guidance: true CFG scale of a sample; 1 turns guidance off.
        max_skipped: consecutive steps with a NaN or infinite loss or gradient that end the run.
        max_broken: the run ends with more broken rows than this.
        memory_gib: memory of a rank to plan packs for; none: what the device has.
        compile: torch.compile the MLPs of all blocks, and attention projections that have an adapter; what lies between
            them is fused operators in any case.
        tensorboard: write TensorBoard files.
        wandb: log to Weights & Biases.
    """

    stages: tuple[BudgetStage, ...]
    model: str = "Qwen/Qwen-Image-Edit-2511"
    initial: Path | None = None
    data: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    heldout: tuple[str, ...] = ()
    image_folder: Path | None = None
    columns: tuple[str, ...] = ()
    steps: int | None = None
    packs: int = 8
    lora_rank: int | None = None
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                                     "to_add_out", "net.0.proj", "net.2")  # fmt: skip
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: int = 500
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    ema: float | None = 0.999
    seed: int = 0
    cache: Path | None = None
    workers: int = 4
    save_every: int = 500
    keep: int = 3
    eval_every: int = 500
    eval_samples: int = 64
    sample_every: int = 1000
    sample_count: int = 4
    sample_steps: int = 25
    sample_guidance: float = 4.0
    max_skipped: int = 10
    max_broken: int = 100
    memory_gib: float | None = None
    compile: bool = False
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a run needs at least one stage")
        least = {"packs": 1, "save_every": 1, "keep": 1, "eval_every": 0, "sample_every": 0, "eval_samples": 1,
                 "sample_count": 1, "sample_steps": 2, "max_skipped": 1, "max_broken": 0, "workers": 1, "warmup": 0,
                 "max_grad_norm": 0, "weight_decay": 0}  # fmt: skip
        self._at_least(least)
        Columns.of(self.columns)
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(f"weights: one for each path of data, {len(self.data)}; got {len(self.weights)}")
        if self.steps is not None and self.steps < len(self.stages):
            raise ValueError(f"{len(self.stages)} stages need at least as many steps, got steps = {self.steps}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, or none to train all weights; got {self.lora_rank}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is a decay between 0 and 1, or none; got {self.ema}")

    def _at_least(self, least: Mapping[str, float]) -> None:
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:  # nor NaN
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")

    @property
    def visibility(self) -> str | None:
        """Name of the visibility that the model is trained with; None until the launcher resolves it.

        Each kind of run has a field of this name.
        """
        raise NotImplementedError

    def check_initial(self, trained: str | None) -> None:
        """Check that the run that `initial` names fits; a kind of run that has conditions overrides this.

        The launcher calls it once, before anything is loaded. It may read the folder, which `__post_init__` may not.

        Args:
            trained: Visibility that the run of `initial` was trained with; None if no run states it.

        Raises:
            ValueError: The run does not fit.
        """

    @property
    def sequences(self) -> int:
        """That a sample takes in a pack; two where it is run with guidance."""
        return 1

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else sum(stage.steps for stage in self.stages)

    def ends(self) -> list[int]:
        """First step after each stage, with the stages' lengths scaled to `steps`; each has at least one step."""
        whole, total, at, ends = sum(stage.steps for stage in self.stages), self.total_steps, 0, [0]
        for i, stage in enumerate(self.stages, start=1):
            at += stage.steps
            ends.append(min(max(round(at * total / whole), ends[-1] + 1), total - (len(self.stages) - i)))
        return ends[1:]

    def lr(self, step: int) -> float:
        """Learning rate of a step: the stage's, warmed up, then along one cosine over the whole run."""
        rate = stage_at(self, step)[1].lr
        if step < self.warmup:
            return rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return rate
        done = (step - self.warmup) / max(self.total_steps - self.warmup, 1)
        return rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def stage_at(config: Recipe, step: int) -> tuple[int, BudgetStage]:
    """(number, stage) that a step belongs to."""
    number = next((i for i, end in enumerate(config.ends()) if step < end), len(config.stages) - 1)
    return number, config.stages[number]
