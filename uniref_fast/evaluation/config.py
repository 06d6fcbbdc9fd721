"""Configuration of an evaluation. Imports no PyTorch, so that `uniref-fast eval --help` is quick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from uniref_fast.adapters import Adapter, adapter_sizes, adapter_visibility
from uniref_fast.budget import check_budget
from uniref_fast.flags import parse_keep_references
from uniref_fast.loading import defaults
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.runs import trained_sizes, trained_visibility

__all__ = ["EvalConfig", "current_names"]

RENAMED = {"steps": "num_inference_steps", "guidance": "true_cfg_scale"}


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation.

    Attributes: Data
        data: Files or folders of dataset rows; targets are optional.
        image_folder: Folder that relative image paths of the rows refer to; none uses the folder of the row's file.
        columns: Roles of columns whose names are not known, as ROLE=COLUMN pairs, such as
            instruction=prompt,references=refs.
        language: Language of the rows to evaluate, where a benchmark has several, such as "en" and "cn" of GEdit-Bench;
            none evaluates all rows.
        limit: Number of rows of each file, from its beginning; none evaluates all rows.

    Attributes: Model
        model: Model to evaluate: "builtin", a diffusers folder, or a model id of the Hugging Face hub.
        initial: Folder of a training run whose `transformer/` or `lora/` is loaded into the model; several are loaded
            in order.
        lora: LoRA adapter, as PATH or PATH:SCALE, that is loaded after the runs of `initial`; several are loaded in
            order.
        baseline: Images to evaluate instead of the model's: "input", the reference that holds the background of the
            answer, else the first reference, at the size of the result (grey without references); "vae", the target
            through the autoencoder; "untrained", the built-in model before training.
        visibility: Attention policy of the model; none takes that of the last adapter or run, else "full".
        dtype: Data type of the model; none takes float32 on a CPU and bfloat16 on a GPU.
        mode: Arithmetic of the model: "exact", or "fast" for Linears of the blocks and attention in 8 bits.
        impl: Implementation forced on every operation, such as "reference", which emulates the mode "fast" on a CPU;
            none takes the fastest.
        quantisation: Format in which text encoder and transformer are stored: "int8" or "fp8" (torchao), or "nf4"
            (bitsandbytes, on a GPU); none takes `dtype`, or the format of the model's files.
        device: Device of the model, such as cpu or cuda:0; none takes a GPU if there is one.

    Attributes: Sampling
        num_inference_steps: Number of denoising steps; none takes that of the model, as `uniref-fast edit` does.
        true_cfg_scale: True CFG scale, 1 turns guidance off; none takes that of the model.
        seed: Seed of the noise, which also depends on the row.
        budget: Joint pixel budget of the references of a row: budget x budget pixels for all of them together, or 0 to
            scale each reference as diffusers does; none takes that of the last adapter or run, else 0.
        target_side: Results have target_side x target_side pixels, or the area of the row's target if that is smaller;
            none takes that of the last adapter or run, else the area that the pipeline uses.
        width: Width of all results in pixels, whatever the targets and references are; give it together with height.
        height: Height of all results in pixels, likewise.
        batch: Number of rows that are edited together.
        pack_tokens: Largest number of tokens in a pack.
        keep_references: Steps that compute the references: a number n for every n-th one, "auto" as often as `drift`
            requires, "true" the first one only (for models where this is exact); none computes them in every step.
        drift: Tolerance of "auto": the largest relative change of the references' keys and values between two steps
            that compute them; none takes the default of `edit`.
        keep_dtype: Data type of kept keys and values; none takes that of the model.

    Attributes: Rewards
        reward: Reward that scores the results: "scene" for generated data, "judge" (a vision-language model), or
            "none"; none takes "scene" if the first row of a file has a scene.
        rewards: Reward functions of your own, as package.module:function, that score every image as well.
        judge: Endpoint of the reward "judge", and how it is asked.

    Attributes: Results
        out: Folder of the results: new, empty, or with the results of the same evaluation, which is then continued.
        grid: Number of rows of each file on the contact sheet `grid.png`; 0 draws none.
        against: Folder of an earlier evaluation to compare with, row by row.
    """

    data: tuple[Path, ...]
    out: Path
    model: str = "builtin"
    initial: tuple[Path, ...] = ()
    lora: tuple[str, ...] = ()
    baseline: Literal["input", "vae", "untrained"] | None = None
    reward: Literal["scene", "judge", "none"] | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    rewards: tuple[str, ...] = ()
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    budget: int | None = None
    target_side: int | None = None
    width: int | None = None
    height: int | None = None
    language: str | None = None
    seed: int = 0
    limit: int | None = None
    image_folder: Path | None = None
    columns: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    quantisation: Literal["int8", "fp8", "nf4"] | None = None
    mode: Literal["exact", "fast"] = "exact"
    impl: Literal["reference", "native", "triton", "dense", "flash", "cudnn_flex"] | None = None
    batch: int = 8
    pack_tokens: int = 32768
    keep_references: str | None = None
    drift: float | None = None
    keep_dtype: Literal["int8"] | None = None
    visibility: Literal["full", "reference_causal", "reference_isolated"] | None = None
    grid: int = 4
    against: Path | None = None

    def __post_init__(self) -> None:
        least = {"num_inference_steps": 1, "target_side": 16, "width": 16, "height": 16, "limit": 1, "batch": 1,
                 "pack_tokens": 1, "grid": 0}  # fmt: skip
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"{name} must be at least {value}, got {given}")
        if self.budget:
            check_budget(self.budget)
        if (self.width is None) != (self.height is None):
            raise ValueError(f"give width and height together, got width = {self.width} and height = {self.height}")
        if self.true_cfg_scale is not None and not math.isfinite(self.true_cfg_scale):
            raise ValueError(f"true_cfg_scale must be a finite number, got {self.true_cfg_scale}")
        if self.baseline == "untrained" and self.model != "builtin":
            raise ValueError(f"baseline untrained is for the built-in model only, got model = {self.model}")
        if self.baseline is not None and (self.initial or self.lora):
            raise ValueError(f"baseline {self.baseline} runs no trained transformer; leave out initial and lora")
        if self.quantisation is not None and self.baseline is not None:
            raise ValueError(f"baseline {self.baseline} runs no quantised transformer; leave out quantisation")
        if self.mode == "fast" and not self.runs_model:
            raise ValueError(f"baseline {self.baseline} runs no transformer, so mode fast has no effect; leave it out")
        if self.drift is not None and self.keep != "auto":
            raise ValueError(f'drift is the tolerance of keep_references = "auto", got {self.keep_references}')
        for name in self.rewards:
            if ":" not in name or self.rewards.count(name) > 1:
                raise ValueError(
                    f'rewards must be functions of your own as "package.module:function", each once, got {name!r}; '
                    "scene and judge are values of reward"
                )

    @property
    def keep(self) -> bool | int | Literal["auto"]:
        """Value of `keep_references` as `edit` takes it."""
        return False if self.keep_references is None else parse_keep_references(self.keep_references)

    @property
    def runs_model(self) -> bool:
        return self.baseline in (None, "untrained")

    def resolve_visibility(self) -> str:
        """Return `visibility`, or the visibility of the last adapter or run; reads their folders."""
        trained = adapter_visibility(self.adapters) or trained_visibility(self.initial[-1] if self.initial else None)
        return self.visibility or trained or "full"

    def resolve_sizes(self) -> tuple[int | None, int | None]:
        """Return `budget` and `target_side`, or those of the last adapter or run where they are None; reads its folder.

        A budget of None stands for references scaled as diffusers does, and a target side of None for the area of the
        pipeline.
        """
        run = self.initial[-1] if self.initial else None
        budget, side = adapter_sizes(self.adapters) or trained_sizes(run) or (None, None)
        return (budget if self.budget is None else self.budget or None, self.target_side or side)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Adapters of `lora`. Raises ValueError for a path that holds no adapter."""
        return tuple(Adapter.parse(text) for text in self.lora)

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of all results, or None if each has its own."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    def resolve_sampling(self) -> tuple[int, float]:
        """Return `num_inference_steps` and `true_cfg_scale`, or the model's defaults where they are None."""
        steps, scale = defaults(self.model)
        return (
            steps if self.num_inference_steps is None else self.num_inference_steps,
            scale if self.true_cfg_scale is None else self.true_cfg_scale,
        )


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings of an evaluation under their names of today, as older versions used others."""
    found = {RENAMED.get(name, name): value for name, value in settings.items()}
    if "size" in found:
        found["width"], found["height"] = found.pop("size") or (None, None)
    return found
