"""What an evaluation is. Needs no PyTorch, so that the help of `uniref-fast eval` does not load it."""

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
    """An evaluation.

    Attributes:
        data: files and folders of rows, as `rows.Dataset` reads them; targets are optional.
        out: folder of the results: new, empty, or of the same evaluation, which then goes on.
        model: "builtin", a diffusers folder or a hub id.
        initial: folders of training runs whose `transformer/` or `lora/` is put on top, in order.
        lora: adapters that are put on top of those, as "PATH[:SCALE]" (`adapters.Adapter`), in order.
        baseline: instead of the model's results: "input", the picture whose background the answer has, where a scene
            says so, else picture 1, at the size of the result (grey without pictures);
            "vae", the target through the model's autoencoder; "untrained", those of the built-in model with its
            transformer before training.
        reward: "scene" for made data, "judge", or "none"; None takes "scene" where a file's first row has a scene.
        judge: how the judge is asked.
        rewards: rewards of your own, as "package.module:function" (`reward_set`), which score every image beside that.
        steps: denoising steps; None for 8 with the built-in model, else 50.
        guidance: true CFG scale, 1 turns guidance off; None for 1 with the built-in model, else 4.
        budget: joint pixel budget of a row's references, budget x budget; None sizes each as diffusers does.
        target_side: area of the results, target_side x target_side, at most where a row has a target; None for the
            pipeline's own.
        size: (width, height) of all results, in pixels, instead of what the targets and references say.
        language: only rows of this language, where a bench has several, such as GEdit-Bench's "en" and "cn".
        seed: of the noise, with the row.
        limit: rows of each file, the first ones; None for all.
        image_folder: of relative paths in rows; None for beside their file.
        columns: what columns whose names are not known hold, as "role=column" pairs (`columns.Columns`).
        dtype, device: of the model; None for float32 on a CPU and bfloat16 on a GPU, and for a GPU where there is one.
        batch: rows that are edited together.
        pack_tokens: most tokens of a pack.
        visibility: policy that the model attends under; None: the one that the last run of `initial` was trained with.
        grid: rows of each file on `grid.png`; 0 for none.
        against: folder of an earlier evaluation to take differences to.
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
            raise ValueError(f"size is width and height of at least 16 pixels, got {self.size[0]}x{self.size[1]}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if self.baseline == "untrained" and self.model != "builtin":
            raise ValueError(f"baseline untrained is there for the built-in model only, not for {self.model}")
        if self.baseline is not None and (self.initial or self.lora):
            raise ValueError(f"baseline {self.baseline} runs no trained transformer; leave out initial and lora")
        for name in self.rewards:
            if ":" not in name or self.rewards.count(name) > 1:
                raise ValueError(
                    f'rewards are functions of your own as "package.module:function", each once, got {name!r}; reward '
                    "takes scene or judge"
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
        """Raises ValueError for a path of `lora` that holds no adapter."""
        return tuple(Adapter.parse(text) for text in self.lora)

    @property
    def all_steps(self) -> int:
        return defaults(self.model)[0] if self.steps is None else self.steps

    @property
    def scale(self) -> float:
        return defaults(self.model)[1] if self.guidance is None else self.guidance
