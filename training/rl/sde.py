"""Steps from noise to image that have a probability, and how far they are from what they should be.

Time as everywhere here: `x_t = (1 - t) x0 + t e`, noise at t = 1, velocity `v = e - x0`, steps go down, dt < 0.

    sde  std = a sqrt(t / (1 - t))                    mean = x + [v + std^2 / (2 t) (x + (1 - t) v)] dt    std sqrt(-dt)
    cps  s = t' sin(a pi / 2)      mean = (1 - t') (x - t v) + sqrt(t'^2 - s^2) (x + (1 - t) v)            s
    ode                                               mean = x + v dt                                       0

The last column is the standard deviation of the Gaussian that the next latents are drawn from. "sde" is the
reverse-time equation with the marginals of the flow (Flow-GRPO, arXiv 2505.05470): `x + (1 - t) v` is the model's
estimate of the noise, so the bracket adds a multiple of the score to v. A sign that belongs to the other time
convention makes the variance explode; `deviations` and its test are there to see it. "cps" keeps the coefficients of
data and noise, not the marginals (arXiv 2509.05952).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uniref_fast.training.rl.sampler import Sampler

__all__ = [
    "FINAL_LIMIT", "STEP_LIMIT", "Sampler", "Transition", "deviations", "divergence", "largest_noise", "log_density",
    "transition", "worst",
]  # fmt: skip

STEP_LIMIT = 1.15  # of `deviations` after any step; noise = 0.7 stays within it from 8 steps on
FINAL_LIMIT = 1.03  # of `deviations` after the last step


@dataclass(frozen=True)
class Transition:
    """The Gaussian of the next latents: `mean`, as the latents, and one standard deviation; 0 is no noise."""

    mean: Tensor
    std: float


def transition(sampler: Sampler | None, x: Tensor, v: Tensor, t: float, t_next: float) -> Transition:
    """One step; both rollouts and their replay take it here.

    Args:
        sampler: None takes the step without noise.
        x: latents at t, float32 or float64.
        v: velocity there; computed in the dtype of `x`.
        t, t_next: where the step starts and ends, 1 >= t > t_next >= 0.
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
    """Logarithm of the density at the next latents, mean over dimensions, of a step with noise; a scalar."""
    squares = (x_next - step.mean).square().mean()
    return -squares / (2 * step.std**2) - math.log(step.std) - 0.5 * math.log(2 * math.pi)


def divergence(step: Transition, reference: Transition) -> Tensor:
    """KL divergence of a step's Gaussian from another of the same standard deviation, mean over dimensions; a scalar.

    For "sde" this is `|dt| / 2 (std (1 - t) / (2 t) + 1 / std)^2 mean((v - v_ref)^2)`.
    """
    return (step.mean - reference.mean).square().mean() / (2 * step.std**2)


def deviations(
    sampler: Sampler | None, grid: Sequence[float], noisy: Collection[int] | None = None, data_std: float = 0.8
) -> list[float]:
    """Standard deviation after each step over what it should be, for Gaussian data whose velocity is known exactly.

    Above 1 the model sees latents noisier than those it was trained on, and the result keeps what is not made up for.

    Args:
        sampler: of the noisy steps.
        grid: of times, from 1 down to 0.
        noisy: numbers of the noisy steps, from 0; None: all but the last. The others are taken without noise.
        data_std: of the data.
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


def worst(
    sampler: Sampler | None, grid: Sequence[float], places: Sequence[Collection[int] | None]
) -> tuple[float, int, float]:
    """Largest of the `deviations` after any step, the number of that step from 1, and the largest after the last step.

    Args:
        sampler, grid: as for `deviations`.
        places: sets of noisy steps that occur, each as for `deviations`.
    """
    found = [deviations(sampler, grid, noisy) for noisy in places]
    largest, step = max((ratio, -i) for ratios in found for i, ratio in enumerate(ratios, start=1))
    return largest, -step, max(ratios[-1] for ratios in found)


def largest_noise(sampler: Sampler, grid: Sequence[float], places: Sequence[Collection[int] | None]) -> float | None:
    """The largest noise below the sampler's, a multiple of 0.05, that stays within both limits; None where none does.

    Arguments as for `worst`.
    """
    for twentieths in range(math.ceil(sampler.noise * 20) - 1, 0, -1):
        largest, _, final = worst(Sampler(sampler.kind, twentieths / 20), grid, places)
        if largest <= STEP_LIMIT and final <= FINAL_LIMIT:
            return twentieths / 20
    return None
