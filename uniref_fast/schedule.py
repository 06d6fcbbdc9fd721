"""Timesteps of a denoising run and the shift of time that depends on the size of the result.

Time t runs from 1 (noise) to 0 (image). For large images the scheduler moves its times towards noise,
`t -> s t / (1 + (s - 1) t)`, with a shift `s = exp(mu)` that grows with the number of target tokens
(arXiv 2403.03206). Training draws its times with the same shift.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["denoising_schedule", "resolution_shift", "shift_time"]


def denoising_schedule(
    scheduler: Any,
    tokens: int,
    steps: int,
    device: torch.device | str,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    own_sigmas: bool = False,
) -> Any:
    """Return a copy of a scheduler, its state included, with its timesteps set as the pipeline sets them.

    Args:
        scheduler: Scheduler of the pipeline; it is not changed.
        tokens: Number of target tokens, which the dynamic shift depends on.
        steps: Number of denoising steps.
        device: Device of the timesteps.
        sigmas: Noise levels of the steps before the shift; None spaces them evenly.
        mu: Logarithm of the dynamic shift; None computes it from the scheduler's configuration.
        own_sigmas: Let the scheduler choose its noise levels by the number of steps.

    Raises:
        ValueError: If the scheduler does not accept the pipeline's `sigmas`.
    """
    scheduler = copy.deepcopy(scheduler)
    # an array, as the pipeline passes, whatever the annotation says
    levels: Any = np.linspace(1.0, 1 / steps, steps) if sigmas is None and not own_sigmas else sigmas
    mu = _mu(scheduler.config, tokens) if mu is None else mu
    _stock().retrieve_timesteps(scheduler, steps, device, sigmas=levels, mu=mu)
    scheduler.set_begin_index(0)
    return scheduler


def resolution_shift(config: Any, tokens: int, mu: float | None = None) -> float:
    """Return the shift s of a scheduler for a target of `tokens` tokens; 1 leaves times as they are.

    Args:
        config: Configuration of the scheduler.
        tokens: Number of target tokens.
        mu: Logarithm of the dynamic shift; None computes it from the scheduler's configuration.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    mu = _mu(config, tokens) if mu is None else mu
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def shift_time(t: float, shift: float) -> float:
    """Move a time t in [0, 1] towards noise by a shift over 1; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def _mu(config: Any, tokens: int) -> float:
    return _stock().calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def _stock() -> Any:
    """Return diffusers' module of the pipeline, imported when first needed."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    return pipeline_qwenimage_edit_plus
