"""Denoising steps with a probability, and how far their latents are from those that the model was trained on.

The time convention is that of diffusers: `x_t = (1 - t) x0 + t e`, noise at t = 1, velocity `v = e - x0`, dt < 0.

    sde  std = a sqrt(t / (1 - t))                    mean = x + [v + std^2 / (2 t) (x + (1 - t) v)] dt    std sqrt(-dt)
    cps  s = t' sin(a pi / 2)      mean = (1 - t') (x - t v) + sqrt(t'^2 - s^2) (x + (1 - t) v)            s
    ode                                               mean = x + v dt                                       0

The last column is the standard deviation of the Gaussian that the next latents are drawn from. "sde" is the
reverse-time equation with the marginals of the flow (Flow-GRPO, arXiv 2505.05470): `x + (1 - t) v` is the model's
estimate of the noise, so the bracket adds a multiple of the score to v. A sign that belongs to the other time
convention makes the variance explode; `deviations` and its test detect that. "cps" keeps the coefficients of data and
noise, not the marginals (arXiv 2509.05952).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uniref_fast.training.rl.recipes import Sampler

__all__ = [
    "FINAL_LIMIT", "STEP_LIMIT", "NoiseCheck", "Sampler", "Transition", "check_noise", "deviations", "divergence",
    "largest_noise", "log_density", "transition", "worst",
]  # fmt: skip

STEP_LIMIT = 1.15  # sound value of `deviations` after any step; noise = 0.7 stays within it from 8 steps on
FINAL_LIMIT = 1.03  # sound value of `deviations` after the last step


@dataclass(frozen=True)
class Transition:
    """Gaussian of the next latents.

    Attributes:
        mean: Mean, `[N, C]` as the latents.
        std: Standard deviation of every dimension; 0 for a step without noise.
    """

    mean: Tensor
    std: float


def transition(sampler: Sampler | None, x: Tensor, v: Tensor, t: float, t_next: float) -> Transition:
    """Return the transition of one step, for rollouts and their replay alike.

    Args:
        sampler: Sampler of the step; None takes the step without noise.
        x: Latents at t, `[N, C]`, float32 or float64.
        v: Velocity at t, `[N, C]`; used in the dtype of `x`.
        t: Time at which the step starts, at most 1.
        t_next: Time at which the step ends, below t and at least 0.
    """
    if not 1 >= t > t_next >= 0:
        raise ValueError(f"a step goes down from t <= 1 to at least 0, got {t} to {t_next}")
    v, dt = v.to(x.dtype), t_next - t
    if sampler is None:
        return Transition(x + v * dt, 0.0)
    if sampler.kind == "cps":
        std = t_next * math.sin(sampler.noise * math.pi / 2)
        rest = math.sqrt(max(t_next**2 - std**2, 0.0))
        return Transition((1 - t_next) * (x - t * v) + rest * (x + (1 - t) * v), std)
    # at t = 1 the variance has no bound: the next grid point stands in
    std = sampler.noise * math.sqrt(t / (1 - (t_next if t == 1 else t)))
    drift = v + std**2 / (2 * t) * (x + (1 - t) * v)
    return Transition(x + drift * dt, std * math.sqrt(-dt))


def log_density(x_next: Tensor, step: Transition) -> Tensor:
    """Return the log-density of the next latents `[N, C]` under a noisy step, mean over dimensions; a scalar."""
    squares = (x_next - step.mean).square().mean()
    return -squares / (2 * step.std**2) - math.log(step.std) - 0.5 * math.log(2 * math.pi)


def divergence(step: Transition, reference: Transition) -> Tensor:
    """Return the KL divergence of two Gaussians with the standard deviation of `step`, mean over dimensions; a scalar.

    For "sde" this is `|dt| / 2 (std (1 - t) / (2 t) + 1 / std)^2 mean((v - v_ref)^2)`.
    """
    return (step.mean - reference.mean).square().mean() / (2 * step.std**2)


# ---- noise that leaves the model's latents as they were in its training ----


def deviations(
    sampler: Sampler | None, grid: Sequence[float], noisy: Collection[int] | None = None, data_std: float = 0.8
) -> list[float]:
    """Return the standard deviation of the latents after each step, divided by its correct value.

    The data are Gaussian, so that the exact velocity is known. Above 1 the model gets noisier latents than those it was
    trained on, and the result keeps the noise that later steps do not remove.

    Args:
        sampler: Sampler of the noisy steps.
        grid: Times, from 1 down to 0.
        noisy: Numbers of the noisy steps, from 0; None means all but the last. The other steps add no noise.
        data_std: Standard deviation of the data.
    """
    steps = len(grid) - 1
    noisy = range(steps - 1) if noisy is None else noisy

    def expected(t: float) -> float:
        return (1 - t) ** 2 * data_std**2 + t**2

    variance, ratios = expected(grid[0]), []
    one = torch.ones((), dtype=torch.float64)
    for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
        slope = (t - (1 - t) * data_std**2) / expected(t)  # v = slope x
        step = transition(sampler if i in noisy else None, one, slope * one, t, t_next)
        variance = step.mean.item() ** 2 * variance + step.std**2
        ratios.append(math.sqrt(variance / expected(t_next)))
    return ratios


@dataclass(frozen=True)
class NoiseCheck:
    """Standard deviation of the latents of a rollout, divided by its correct value, at the worst place of the window.

    Attributes:
        largest: Largest value after any step.
        after_step: Number of that step, from 1.
        final: Largest value after the last step.
        without_noise: Value after the last step of a rollout without noise.
        warning: Text that says what to change; empty if the noise is sound.
    """

    largest: float
    after_step: int
    final: float
    without_noise: float
    warning: str


def check_noise(sampler: Sampler, grid: Sequence[float], window: int | None = None, stop: int = 0) -> NoiseCheck:
    """Check that the latents of noisy rollouts resemble those that the model was trained on.

    Args:
        sampler: Sampler of the noisy steps.
        grid: Times, from 1 down to 0.
        window: Number of consecutive noisy steps; None means that all steps but the last are noisy.
        stop: First step that no window reaches.
    """
    places = [None] if window is None else [range(first, first + window) for first in range(stop - window + 1)]
    plain, (largest, step, final) = deviations(None, grid)[-1], worst(sampler, grid, places)
    if largest <= STEP_LIMIT and final <= FINAL_LIMIT:
        return NoiseCheck(largest, step, final, plain, "")
    sound = largest_noise(sampler, grid, places)
    if sound is not None:
        advice = f"set noise to {sound:g} or less"
    elif window is not None:
        advice = "let all steps be noisy (window = none), or take more rollout_num_inference_steps"
    else:
        advice = "take more rollout_num_inference_steps"
    warning = (
        f"noise = {sampler.noise:g} is too large: for Gaussian data with the exact velocity, latents have "
        f"{largest:.2f} times the standard deviation that the model was trained on after step {step} of "
        f"{len(grid) - 1} (up to {STEP_LIMIT:g} is sound) and {final:.2f} times at the end (up to {FINAL_LIMIT:g}; "
        f"{plain:.2f} without noise); {advice}"
    )
    return NoiseCheck(largest, step, final, plain, warning)


def worst(
    sampler: Sampler | None, grid: Sequence[float], places: Sequence[Collection[int] | None]
) -> tuple[float, int, float]:
    """Return the largest of the `deviations`, the number of its step from 1, and the largest after the last step.

    Args:
        sampler: Sampler of the noisy steps.
        grid: Times, from 1 down to 0.
        places: Possible sets of noisy steps, each as for `deviations`.
    """
    found = [deviations(sampler, grid, noisy) for noisy in places]
    largest, step = max((ratio, -i) for ratios in found for i, ratio in enumerate(ratios, start=1))
    return largest, -step, max(ratios[-1] for ratios in found)


def largest_noise(sampler: Sampler, grid: Sequence[float], places: Sequence[Collection[int] | None]) -> float | None:
    """Return the largest sound noise below the sampler's, a multiple of 0.05; None if there is none.

    Args:
        sampler: Sampler of the noisy steps.
        grid: Times, from 1 down to 0.
        places: Possible sets of noisy steps, each as for `deviations`.
    """
    for twentieths in range(math.ceil(sampler.noise * 20) - 1, 0, -1):
        largest, _, final = worst(Sampler(sampler.kind, twentieths / 20), grid, places)
        if largest <= STEP_LIMIT and final <= FINAL_LIMIT:
            return twentieths / 20
    return None
