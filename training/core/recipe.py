"""Configuration that every kind of training run shares: model, data, stages, optimizer, validation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from uniref_fast.budget import check_budget
from uniref_fast.data.columns import Columns
from uniref_fast.loading import defaults, local_index

__all__ = ["BudgetStage", "Checkpointing", "Recipe", "stage_at"]

Checkpointing = Literal[False, True, "inputs", "host"]
"""Recomputation of the transformer blocks in the backward pass, see `BudgetStage.checkpointing`."""

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                "net.0.proj", "net.2")  # fmt: skip
"""Names of the Linear layers of Qwen-Image-Edit that get an adapter unless a run names others."""


@dataclass(frozen=True)
class BudgetStage:
    """One stage of the budget curriculum.

    Attributes:
        budget: Joint pixel budget of the references of a sample: budget x budget pixels for all of them together; none
            scales each reference as diffusers does, which is also what `uniref-fast edit` does by default.
        steps: Number of optimizer steps of this stage.
        lr: Peak learning rate of this stage.
        target_side: Targets with more than target_side x target_side pixels are scaled down to that area.
        pack_tokens: Largest number of tokens in a pack; none plans what fits the memory, up to four of the largest
            samples.
        sequence_parallel: Number of ranks that share a pack; none plans the smallest number that fits the memory.
        checkpointing: Recomputation of the transformer blocks in the backward pass: "false" keeps all activations,
            "true" the inputs and the attention of blocks, "inputs" the inputs alone, and "host" keeps the inputs in
            host memory; none plans the first of these that fits the memory. The last three give the same bits.
    """

    budget: int | None
    steps: int
    lr: float
    target_side: int = 1024
    pack_tokens: int | None = None
    sequence_parallel: int | None = None
    checkpointing: Checkpointing | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_budget(self.budget, "a stage's budget")
        for name in ("steps", "target_side"):
            least = 1 if name == "steps" else 16
            if getattr(self, name) < least:
                raise ValueError(f"a stage's {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("pack_tokens", "sequence_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"a stage's {name} must be at least 1, or none to plan it; got {value}")
        if not self.lr > 0:
            raise ValueError(f"a stage's lr must be above 0, got {self.lr}")


@dataclass(frozen=True)
class Recipe:
    """Settings that every kind of training run has.

    Attributes: Model
        model: Model to train: "builtin" (the small model that comes with uniref_fast), a diffusers folder, or a model
            id of the Hugging Face hub.
        initial: Folder of an earlier run whose `transformer/` or `lora/` this run continues; none starts from `model`.
            An adapter keeps its kind, rank, alpha and targets: other values on the command line are refused.
        adapter: Kind of the adapter: lora; rslora, whose update is multiplied by lora_alpha / sqrt(lora_rank); dora,
            which also trains the norms of the rows of each weight; or lokr, a Kronecker product.
        lora_rank: Rank of the adapter; none trains all weights of the transformer.
        lora_alpha: Alpha of the adapter, whose update is multiplied by lora_alpha / lora_rank; none takes the
            rank, so that this factor is 1, and sqrt(lora_rank) for rslora.
        lora_targets: Names of the Linear layers that get an adapter; if none are given, those of attention and MLPs in
            the blocks of the model.
        embedded_guidance: Guidance scale that a model with guidance embeddings, such as FLUX.2-dev, gets in training;
            none takes 3.5. Other models ignore it.

    Attributes: Data
        data: Files or folders of dataset rows; "builtin" generates a small dataset with the shipped emoji.
        weights: Number of times that a row of each path of `data` is used per epoch, such as 0.5 for every other epoch;
            empty uses each row once.
        heldout: Files of rows that are never trained on, for the validation loss, the PSNR of samples and the
            sample grids; each file is reported under its name.
        validate: Files or folders of rows with your own prompts and pictures, which need no targets: a grid of their
            results is drawn before the first step and every `sample_every` steps, always with the same noise.
        image_folder: Folder that relative image paths of the rows refer to; none uses the folder of the row's file.
        columns: Roles of columns whose names are not known, as ROLE=COLUMN pairs, such as
            instruction=prompt,references=refs.
        cache: Folder in which encoded images and prompts are kept for later epochs and runs; none encodes them every
            time.
        workers: Number of threads that read images ahead.
        max_broken: Number of broken rows that are skipped; one more ends the run.

    Attributes: Stages
        steps: Number of optimizer steps of the whole run, to which the lengths of the stages are scaled; none takes the
            sum of their lengths.
        packs: Number of packs per optimizer step over all ranks; a multiple of the number of groups of ranks that share
            a pack.
        stages: Stages of the curriculum, in order.

    Attributes: Optimizer
        optimizer: Optimizer of the trained weights: adamw, or adamw8bit (bitsandbytes), whose moments take 2 bytes per
            weight instead of 8, on one rank.
        betas: Decay rates of the two moving averages of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup: Number of steps over which the learning rate rises linearly to its peak.
        schedule: Learning rate after the warm-up: a cosine that falls to 0 at the end of the run, or constant.
        max_grad_norm: Largest norm of the gradients; larger gradients are scaled down to it. 0 turns clipping off.
        ema: Decay of the moving average of the weights that is validated and exported; none keeps no average.
        seed: Seed of all random numbers: data order, noise, dropped conditions and new weights.
        max_skipped: Number of consecutive steps with a NaN or infinite loss or gradient after which the run ends.

    Attributes: Memory and precision
        dtype: Data type of the computation.
        weight_dtype: Data type in which the trained weights are kept and updated.
        base: Data type in which the frozen weights of the Linear layers of all blocks are kept under an adapter: bf16,
            int8 or fp8 (torchao), or nf4 (bitsandbytes); none keeps them in `dtype`.
        offload_blocks: Number of blocks whose frozen weights are kept on the host under an adapter, and are fetched one
            block ahead of their use; 0 keeps all of them on the device.
        memory_gib: Memory of a rank in GiB that packs are planned for; none uses what the device has.
        encoders: Place of the text encoder and the VAE during training: "resident" keeps them on the device; "free"
            encodes all that the run needs into `cache` before the first step (without `cache`, into the folder of the
            run) and then frees them; none frees them if `cache` is set.
        compile: Compile the MLPs of all blocks, and the attention projections that have an adapter, with torch.compile;
            the operators between them are fused in any case.

    Attributes: Validation
        eval_every: Number of steps between validations on the held-out rows; 0 turns them off.
        eval_samples: Number of held-out rows of each file that a validation uses.
        sample_every: Number of steps between sample grids, the first of which is drawn before training; 0 turns them
            off.
        sample_count: Number of held-out rows of each file that samples are generated for, for their PSNR at each
            validation and for the sample grids.
        sample_num_inference_steps: Number of denoising steps of a sample; none takes that of `uniref-fast eval`: 8 for
            the built-in model and 50 for Qwen-Image-Edit (docs/families.md).
        sample_true_cfg_scale: True CFG scale of a sample, 1 turns guidance off; none takes that of `uniref-fast eval`:
            1 for the built-in model and 4 for Qwen-Image-Edit (docs/families.md). A model with guidance embeddings
            gets this scale if it is above 1, else `embedded_guidance`.

    Attributes: Checkpoints
        save_every: Number of steps between checkpoints.
        keep: Number of checkpoints that are kept; older ones are deleted.

    Attributes: Logging
        tensorboard: Write TensorBoard files into the folder of the run.
        wandb: Log to Weights & Biases as well.
    """

    kind: ClassVar[str] = "sft"  # of `uniref_fast.models.family.CAPABILITIES`
    stages: tuple[BudgetStage, ...]
    model: str = "Qwen/Qwen-Image-Edit-2511"
    initial: Path | None = None
    data: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    heldout: tuple[str, ...] = ()
    validate: tuple[str, ...] = ()
    image_folder: Path | None = None
    columns: tuple[str, ...] = ()
    steps: int | None = None
    packs: int = 8
    adapter: Literal["lora", "rslora", "dora", "lokr"] = "lora"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    embedded_guidance: float | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    base: Literal["bf16", "int8", "fp8", "nf4"] | None = None
    offload_blocks: int = 0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
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
    sample_num_inference_steps: int | None = None
    sample_true_cfg_scale: float | None = None
    max_skipped: int = 10
    max_broken: int = 100
    memory_gib: float | None = None
    encoders: Literal["resident", "free"] | None = None
    compile: bool = False
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a run needs at least one stage")
        least = {"packs": 1, "save_every": 1, "keep": 1, "eval_every": 0, "sample_every": 0, "eval_samples": 1,
                 "sample_count": 0, "sample_num_inference_steps": 2, "max_skipped": 1, "max_broken": 0,
                 "workers": 1, "embedded_guidance": 0, "offload_blocks": 0, "warmup": 0, "max_grad_norm": 0,
                 "weight_decay": 0}  # fmt: skip
        self._at_least(least)
        Columns.of(self.columns)
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(f"weights: one number for each of {len(self.data)} paths of data, got {len(self.weights)}")
        if self.steps is not None and self.steps < len(self.stages):
            raise ValueError(f"{len(self.stages)} stages need at least as many steps, got steps = {self.steps}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, or none to train all weights; got {self.lora_rank}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, or none; got {self.ema}")

    def _at_least(self, least: Mapping[str, float]) -> None:
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:  # true for NaN too
                raise ValueError(f"{name} must be at least {smallest}, got {value}")

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
        """Number of sequences that a sample takes in a pack: 2 with guidance, else 1."""
        return 1

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else sum(stage.steps for stage in self.stages)

    @property
    def validation_stage(self) -> BudgetStage:
        """Stage whose sizes all validations of the run use, so that their figures can be compared: the last one."""
        return self.stages[-1]

    def resolve_alpha(self) -> float | None:
        """Return `lora_alpha`, or the rank of the adapter where it is None."""
        return float(self.lora_rank) if self.lora_alpha is None and self.lora_rank is not None else self.lora_alpha

    def resolve_encoders(self) -> Literal["resident", "free"]:
        """Return where the encoders are during training: "free" if they are freed before the first step."""
        return self.encoders or ("resident" if self.cache is None else "free")

    @property
    def has_cache(self) -> bool:
        """True if the run keeps its encoded images and prompts: in `cache`, or in a folder of the run."""
        return self.cache is not None or self.resolve_encoders() == "free"

    def resolve_sampling(self) -> tuple[int, float]:
        """Return the denoising steps and the true CFG scale of samples; defaults are those of `uniref-fast eval`."""
        from uniref_fast.training.core.known_models import KNOWN  # which imports this module

        known = KNOWN.get(self.model)  # nothing is downloaded
        index = local_index(self.model) if known is None else known.index
        index = index or {"_class_name": "QwenImageEditPlusPipeline"}
        steps, scale = defaults(self.model, index)
        return (
            steps if self.sample_num_inference_steps is None else self.sample_num_inference_steps,
            scale if self.sample_true_cfg_scale is None else self.sample_true_cfg_scale,
        )

    def ends(self) -> list[int]:
        """Return the first step after each stage. Their lengths are scaled to `steps`; each has at least one step."""
        whole, total, at, ends = sum(stage.steps for stage in self.stages), self.total_steps, 0, [0]
        for i, stage in enumerate(self.stages, start=1):
            at += stage.steps
            ends.append(min(max(round(at * total / whole), ends[-1] + 1), total - (len(self.stages) - i)))
        return ends[1:]

    def lr(self, step: int) -> float:
        """Return the learning rate of a step: that of its stage, with the warm-up and the schedule of the whole run."""
        rate = stage_at(self, step)[1].lr
        if step < self.warmup:
            return rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return rate
        done = (step - self.warmup) / max(self.total_steps - self.warmup, 1)
        return rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def stage_at(config: Recipe, step: int) -> tuple[int, BudgetStage]:
    """Return (number, stage) of the stage that a step belongs to."""
    number = next((i for i, end in enumerate(config.ends()) if step < end), len(config.stages) - 1)
    return number, config.stages[number]
