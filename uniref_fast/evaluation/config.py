"""Configuration of an evaluation. Imports no PyTorch, so that `uniref-fast eval --help` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from uniref_fast.adapters import Adapter, adapter_visibility
from uniref_fast.loading import defaults
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.runs import trained_visibility

__all__ = ["EvalConfig"]


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
        device: Device of the model, such as cpu or cuda:0; none takes a GPU if there is one.

    Attributes: Sampling
        steps: Number of denoising steps; none takes 8 for the built-in model and 50 for others.
        guidance: True CFG scale, 1 turns guidance off; none takes 1 for the built-in model and 4 for others.
        seed: Seed of the noise, which also depends on the row.
        budget: Joint pixel budget of the references of a row: budget x budget pixels for all of them together; none
            scales each reference as diffusers does.
        target_side: Results have target_side x target_side pixels, or the area of the row's target if that is smaller;
            none takes the area that the pipeline uses.
        size: Size (width, height) of all results in pixels, whatever the targets and references are.
        batch: Number of rows that are edited together.
        pack_tokens: Largest number of tokens in a pack.

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
    steps: int | None = None
    guidance: float | None = None
    budget: int | None = None
    target_side: int | None = None
    size: tuple[int, int] | None = None
    language: str | None = None
    seed: int = 0
    limit: int | None = None
    image_folder: Path | None = None
    columns: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    batch: int = 8
    pack_tokens: int = 32768
    visibility: Literal["full", "reference_causal", "reference_isolated"] | None = None
    grid: int = 4
    against: Path | None = None

    def __post_init__(self) -> None:
        least = {"steps": 1, "budget": 16, "target_side": 16, "limit": 1, "batch": 1, "pack_tokens": 1, "grid": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"{name} must be at least {value}, got {given}")
        if self.size is not None and min(self.size) < 16:
            raise ValueError(f"size must be at least 16 pixels wide and high, got {self.size[0]}x{self.size[1]}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if self.baseline == "untrained" and self.model != "builtin":
            raise ValueError(f"baseline untrained is for the built-in model only, got model = {self.model}")
        if self.baseline is not None and (self.initial or self.lora):
            raise ValueError(f"baseline {self.baseline} runs no trained transformer; leave out initial and lora")
        for name in self.rewards:
            if ":" not in name or self.rewards.count(name) > 1:
                raise ValueError(
                    f'rewards must be functions of your own as "package.module:function", each once, got {name!r}; '
                    "scene and judge are values of reward"
                )

    @property
    def runs_model(self) -> bool:
        return self.baseline in (None, "untrained")

    def resolve_visibility(self) -> str:
        """Return `visibility`, or the visibility of the last adapter or run; reads their folders."""
        trained = adapter_visibility(self.adapters) or trained_visibility(self.initial[-1] if self.initial else None)
        return self.visibility or trained or "full"

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Adapters of `lora`. Raises ValueError for a path that holds no adapter."""
        return tuple(Adapter.parse(text) for text in self.lora)

    @property
    def all_steps(self) -> int:
        return defaults(self.model)[0] if self.steps is None else self.steps

    @property
    def scale(self) -> float:
        return defaults(self.model)[1] if self.guidance is None else self.guidance
