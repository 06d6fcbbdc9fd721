"""Classifier-free guidance: when it is on, which texts it needs, and how two predictions become one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # recipes and commands import this module, and start without torch
    from torch import Tensor

__all__ = ["EMPTY_PROMPT", "guide", "is_guided", "negative_prompt_for", "texts_of"]

EMPTY_PROMPT = " "
"""The prompt that says nothing: the usual negative prompt, and the instruction of a training sample without text."""


def is_guided(scale: float) -> bool:
    """Return True if a guidance scale needs the prediction for the negative prompt as well."""
    return scale > 1


def negative_prompt_for(scale: float, text: str | None = EMPTY_PROMPT) -> str | None:
    """Return the negative prompt of a request that names none: None without guidance.

    Args:
        scale: Scale of classifier-free guidance.
        text: Negative prompt with guidance (`Family.usual_negative_prompt`).
    """
    return text if is_guided(scale) else None


def texts_of(prompt: str, scale: float, empty: str = EMPTY_PROMPT) -> tuple[str, ...]:
    """Return the texts that a denoising step runs: the prompt and, with guidance, the empty prompt.

    Args:
        prompt: The instruction.
        scale: Scale of classifier-free guidance.
        empty: The empty prompt of the model (`Encoder.empty_prompt`).
    """
    return (prompt, empty) if is_guided(scale) else (prompt,)


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Combine two velocities and keep the norm of the positive one for each token, as the pipeline does.

    Args:
        positive: Velocity for the prompt, `[N, C]`.
        negative: Velocity for the negative prompt, `[N, C]`.
        scale: Scale of classifier-free guidance.

    Returns:
        `[N, C]`.
    """
    combined = negative + scale * (positive - negative)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
