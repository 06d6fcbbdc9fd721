"""Configuration of multi-source GRPO, and the recipes: functions that return complete configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from uniref_fast.guidance import texts_of
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.training.core.recipe import BudgetStage, Recipe

__all__ = ["MSGRPO", "MSGRPO_RECIPES", "RLStage", "Sampler"]


@dataclass(frozen=True)
class Sampler:
    """Settings of the steps that add noise; `sde.py` has the formulas.

    Attributes:
        kind: Sampler: "sde" (stochastic differential equation) or "cps" (coefficient-preserving sampling).
        noise: Noise level, a in the formulas of `sde.py`: above 0, and at most 1 for "cps".
    """

    kind: Literal["sde", "cps"] = "sde"
    noise: float = 0.7

    def __post_init__(self) -> None:
        most = math.inf if self.kind == "sde" else 1.0
        if self.kind not in ("sde", "cps") or not 0 < self.noise <= most or math.isinf(self.noise):
            raise ValueError(
                f'a sampler is "sde" with noise above 0, or "cps" with noise above 0 and up to 1; got "{self.kind}" '
                f"with {self.noise}"
            )


@dataclass(frozen=True)
class RLStage(BudgetStage):
    """One stage of the curriculum of MSGRPO.

    Attributes:
        target_side: Generated images have about target_side x target_side pixels, but no more than the target of a row
            that has one.
        references: Rows that are used: "multi" with two or more references, "single" with one reference, or "any".
    """

    references: Literal["multi", "single", "any"] = "any"

    def uses(self, count: int) -> bool:
        """Return True if the stage uses rows with that number of references."""
        return {"multi": count >= 2, "single": count == 1, "any": True}[self.references]


@dataclass(frozen=True)
class MSGRPO(Recipe):
    """Settings of multi-source GRPO. A step consists of the rollouts of all groups, their rewards and the updates.

    Attributes: Model
        visibility: Attention policy that the model was trained with; none takes that of the run in `initial`, else
            "full". "group_shared" is for models trained with "reference_causal": the rollouts of a group then share one
            copy of their references.

    Attributes: Rollout
        prompts: Number of rows per step; each row has one group of rollouts.
        group: Number of rollouts per row.
        rollout_num_inference_steps: Number of denoising steps of a rollout.
        window: Number of consecutive steps of a rollout that add noise, at a random position for each group; none adds
            noise in all steps but the last, which never has any.
        window_end: First step that no window reaches; none takes the middle of the rollout.
        rollout_true_cfg_scale: True CFG scale of rollouts and updates; 1 turns guidance off.
        keep_references: Compute the references once per rollout instead of in every step. It needs references that
            depend on nothing that changes between steps: a visibility other than "full" and a model with zero_cond_t,
            FLUX.2 klein-KV, or Qwen-Image-2.1, of which it also keeps the text.
            The replay computes them again, so the check that ratios are 1 fails where a matrix product depends on its
            number of rows; leave it off then. Ranks that share a pack compute the references in every step.

    Attributes: Sampler
        sampler: Sampler of the steps that add noise: "sde" (the stochastic differential equation of the flow) or "cps"
            (coefficient-preserving sampling).
        noise: Noise level of the sampler. The first step of "sde" adds noise of this standard deviation; above 0.9 the
            latents become noisier than those that the model was trained on. From 0 to 1 for "cps".

    Attributes: Rewards
        rewards: Rewards to sum: "scene" (computed from the scene of generated data), "judge" (a vision-language model),
            or "package.module:function" for a function of your own.
        reward_weights: Weight of each reward; empty weighs each with 1.
        axis_weights: Weights of the axes integration, consistency and quality; other axes weigh 1. A reward that scores
            only axes with the weight 0 is refused.
        min_members: Smallest number of scored rollouts of a group; smaller groups are not trained on.
        max_failures: Share of the rollouts of a step, from 0 to 1, that may fail to get a score; more end the run.
        alarm: Number of steps over which a falling quality with a rising reward is reported as reward hacking: at least
            4, or 0 to turn the check off.
        judge: Endpoint of the reward "judge", and how it is asked.

    Attributes: Advantages
        advantage: Advantage of a rollout: from the weighted sum of the axes ("sum"), or the weighted sum of the
            advantages of each axis ("per_axis", GDPO).
        advantage_std: Standard deviation that advantages are divided by: that of the group, or that of the whole batch.
        advantage_clip: Largest absolute value of an advantage.

    Attributes: Update
        timesteps: Share of the noisy steps, above 0 and up to 1, that are trained on, drawn again in every step; at
            least one is drawn.
        updates: Number of optimizer steps among which the trained timesteps are divided.
        inner_epochs: Number of passes over the rollouts of a step.
        clip: Distance below 1 at which the probability ratio is clipped.
        clip_high: Distance above 1 at which the probability ratio is clipped; none takes the value of `clip`.
        ratio_guard: Normalize the ratios and weights of the timesteps by their noise (GRPO-Guard).
        kl: Weight of the KL divergence from the model without its adapter; 0 leaves it out.

    Attributes: Validation
        sample_num_inference_steps: Number of denoising steps of a sample of held-out rows; none takes that of
            `uniref-fast eval`: 8 for the built-in model and 50 for Qwen-Image-Edit (docs/families.md).
        sample_true_cfg_scale: True CFG scale of samples of held-out rows: 1, as in training, turns guidance off; none
            takes that of `uniref-fast eval`: 1 for the built-in model and 4 for Qwen-Image-Edit (docs/families.md).
    """

    kind: ClassVar[str] = "msgrpo"
    stages: tuple[RLStage, ...]  # type: ignore[assignment]
    prompts: int = 12
    group: int = 16
    rollout_num_inference_steps: int = 25
    sampler: Literal["sde", "cps"] = "sde"
    noise: float = 0.7
    window: int | None = None
    window_end: int | None = None
    rollout_true_cfg_scale: float = 1.0
    keep_references: bool = False
    timesteps: float = 1.0
    updates: int = 1
    inner_epochs: int = 1
    clip: float = 1e-4
    clip_high: float | None = None
    advantage_clip: float = 5.0
    advantage: Literal["sum", "per_axis"] = "sum"
    advantage_std: Literal["group", "batch"] = "group"
    ratio_guard: bool = False
    kl: float = 0.0
    rewards: tuple[str, ...] = ("judge",)
    reward_weights: tuple[float, ...] = ()
    axis_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    min_members: int = 2
    max_failures: float = 0.5
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    visibility: Literal["full", "reference_causal", "reference_isolated", "group_shared"] | None = None
    sample_num_inference_steps: int | None = 25
    sample_true_cfg_scale: float | None = 1.0
    alarm: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampler(self.sampler, self.noise)
        self._at_least({"prompts": 1, "group": 2, "rollout_num_inference_steps": 2, "updates": 1, "inner_epochs": 1,
                        "clip": 0, "kl": 0, "min_members": 2, "rollout_true_cfg_scale": 1, "alarm": 0,
                        "sample_count": 1})  # fmt: skip
        for sound, problem in self._conditions():
            if not sound:
                raise ValueError(problem)

    def _conditions(self) -> Iterator[tuple[bool, str]]:
        """Yield (condition that must hold, message of the error), in the order in which they are checked."""
        yield (
            self.alarm == 0 or self.alarm >= 4,
            f"alarm compares two halves of at least 4 steps, or is 0; got {self.alarm}",
        )
        yield (
            not (self.ratio_guard and self.sampler == "cps"),
            'ratio_guard weighs steps by the noise of sampler = "sde"; leave it out with "cps"',
        )
        yield (
            self.min_members <= self.group,
            f"min_members = {self.min_members} is more than a group has, {self.group}",
        )
        yield 0 < self.timesteps <= 1, f"timesteps must be above 0 and at most 1, got {self.timesteps}"
        yield self.advantage_clip > 0, f"advantage_clip must be above 0, got {self.advantage_clip}"
        yield 0 <= self.max_failures <= 1, f"max_failures must be a share from 0 to 1, got {self.max_failures}"
        yield (
            self.window is None or 1 <= self.window <= self.window_stop,
            f"a window of {self.window} noisy steps does not fit before step {self.window_stop} (window_end) of "
            f"{self.rollout_num_inference_steps}",
        )
        yield (
            self.window_end is None or 1 <= self.window_end < self.rollout_num_inference_steps,
            f"window_end must be 1 to rollout_num_inference_steps - 1, got {self.window_end}",
        )
        yield (
            self.clip_high is None or self.clip_high >= 0,
            f"clip_high must be at least 0, or none; got {self.clip_high}",
        )
        yield bool(self.rewards), "a run needs at least one reward"
        yield (
            len(self.reward_weights) in (0, len(self.rewards)),
            f"reward_weights: one for each of {len(self.rewards)} rewards, got {self.reward_weights}",
        )
        yield (
            not self.kl or self.lora_rank is not None,
            "kl compares with the model without its adapter; set lora_rank, or kl to 0",
        )
        yield (
            self.updates <= self.trained_steps,
            f"{self.trained_steps} trained timesteps cannot be divided among {self.updates} updates",
        )

    def check_initial(self, trained: str | None) -> None:
        possible = {trained, "group_shared"} if trained == "reference_causal" else {trained}
        if trained and self.visibility and self.visibility not in possible:
            raise ValueError(
                f'visibility = "{self.visibility}" is not how {self.initial} was trained: "{trained}"; leave '
                "visibility out to use that one"
            )
        if self.kl and self.initial is not None and (self.initial / "lora").is_dir():
            raise ValueError(
                f"kl compares with the model without its adapter, but {self.initial} holds an adapter that training "
                "would continue: fuse it into the model first, or set kl to 0"
            )

    @property
    def sequences(self) -> int:
        return len(texts_of("", self.rollout_true_cfg_scale))

    @property
    def window_stop(self) -> int:
        """First step that no window of noisy steps reaches."""
        return self.window_end if self.window_end is not None else max(self.rollout_num_inference_steps // 2, 1)

    @property
    def noisy_steps(self) -> int:
        """Number of noisy steps of a rollout."""
        return self.rollout_num_inference_steps - 1 if self.window is None else self.window

    @property
    def trained_steps(self) -> int:
        """Number of noisy steps that are trained on."""
        return max(round(self.timesteps * self.noisy_steps), 1)


def tiny() -> MSGRPO:
    """Train the built-in model on generated data with rewards that are computed from the scenes, on a CPU: a first
    trial that takes some minutes and needs no judge.
    """
    return MSGRPO(
        model="builtin",
        data=("builtin",),
        # On the built-in model after SFT, a constant 1e-3 gains for 20 steps and then wanders; 2e-3 loses at once.
        stages=(RLStage(budget=128, steps=24, lr=1e-3, target_side=64, pack_tokens=6144, references="multi"),
                RLStage(budget=128, steps=12, lr=1e-3, target_side=64, pack_tokens=6144, references="single")),
        prompts=8,
        group=12,
        rollout_num_inference_steps=8,
        timesteps=0.6,
        noise=0.7,
        clip=1e-3,
        rewards=("scene",),
        packs=2,
        lora_rank=16,
        lora_alpha=32.0,
        dtype="float32",
        betas=(0.9, 0.99),
        weight_decay=0.0,
        warmup=2,
        schedule="cosine",
        ema=0.9,
        workers=2,
        save_every=10,
        eval_every=18,
        eval_samples=64,
        sample_every=36,
        sample_num_inference_steps=12,
        alarm=20,
    )  # fmt: skip


def lora() -> MSGRPO:
    """Train a LoRA adapter of Qwen-Image-Edit with a judge on a few GPUs: short rollouts with three noisy steps,
    without guidance.
    """
    return MSGRPO(
        stages=(RLStage(512, 200, 1e-4, target_side=512, references="multi"),
                RLStage(512, 100, 1e-4, target_side=512, references="single")),
        rollout_num_inference_steps=10,
        noise=0.7,
        window=3,
        packs=8,
        lora_rank=64,
        lora_alpha=128.0,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        warmup=0,
        schedule="constant",
        ema=None,
        save_every=10,
        eval_every=20,
        eval_samples=32,
        sample_every=20,
    )  # fmt: skip


def paper() -> MSGRPO:
    """Train with the settings that UniRef-Image-Edit (arXiv 2602.14186) reports: 200 steps of 12 prompts with 16
    rollouts of 25 SDE steps with noise 1.5, for a cluster of GPUs.

    With that noise, latents have 1.62 times the standard deviation that the model was trained on after the second step
    (0.99 times at the end), and the run says so; `--noise 0.9` stays within 1.15 times at every step.
    """
    return MSGRPO(
        stages=(RLStage(512, 100, 3e-4, target_side=512, references="multi"),
                RLStage(512, 100, 3e-4, target_side=512, references="single")),
        noise=1.5,
        packs=48,
        lora_rank=64,
        lora_alpha=128.0,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        warmup=0,
        schedule="constant",
        ema=None,
        save_every=10,
        eval_every=20,
        eval_samples=32,
        sample_every=20,
    )  # fmt: skip


MSGRPO_RECIPES: dict[str, Callable[[], MSGRPO]] = {recipe.__name__: recipe for recipe in (tiny, lora, paper)}
