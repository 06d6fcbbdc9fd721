"""Joint pixel budget: one number of pixels for all references of a sample together."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["MAX_ASPECT_RATIO", "SIDE_MULTIPLE", "fit_to_budget"]

SIDE_MULTIPLE = 16
"""Sides in pixels are multiples of this: 8x VAE times 2x2 patches."""

MAX_ASPECT_RATIO = 200
"""Largest ratio of the sides of an image that the text encoder accepts."""


def fit_to_budget(sizes: Sequence[tuple[int, int]], budget: int, *, upscale: bool = False) -> list[tuple[int, int]]:
    """Resize images jointly so that the sum of their areas fits a pixel budget.

    All images are scaled by one factor, the largest that fits, so that their relative sizes do not change. Each side
    is then rounded to the nearest multiple of 16, so it differs from exact scaling by less than one step of 16 pixels.
    No side is smaller than 16: an image that is tiny, or more elongated than the budget allows, gets a short side of 16
    and another aspect ratio.

    Args:
        sizes: Width and height of each image in pixels; may be empty.
        budget: Pixels for all images together, such as ``1024**2``.
        upscale: Also enlarge images until the budget is used. By default images are only made smaller, apart from
            rounding to a multiple of 16.

    Returns:
        Width and height of each image, in order.

    Raises:
        ValueError: If a side is below 1, or the budget is under 256 pixels (16 x 16) per image.
    """
    for i, (width, height) in enumerate(sizes):
        if not (width >= 1 and height >= 1):
            raise ValueError(f"image {i + 1} has size {width} x {height}; sides must be at least 1 pixel")
    smallest = SIDE_MULTIPLE**2 * len(sizes)
    if not budget >= smallest:
        raise ValueError(
            f"{len(sizes)} images cannot fit a budget of {budget} pixels: each needs at least "
            f"{SIDE_MULTIPLE} x {SIDE_MULTIPLE}, together {smallest}"
        )
    if not sizes:
        return []
    high = math.sqrt(budget / min(w * h for w, h in sizes)) * 2 if upscale else 1.0
    if _area(_scaled(sizes, high)) <= budget:
        return _scaled(sizes, high)
    low = 0.0
    for _ in range(64):  # the area is a monotone step function of the scale
        middle = (low + high) / 2
        if _area(_scaled(sizes, middle)) <= budget:
            low = middle
        else:
            high = middle
    return _scaled(sizes, low)


def _scaled(sizes: Sequence[tuple[int, int]], scale: float) -> list[tuple[int, int]]:
    return [(_side(width * scale), _side(height * scale)) for width, height in sizes]


def _side(length: float) -> int:
    return max(math.floor(length / SIDE_MULTIPLE + 0.5), 1) * SIDE_MULTIPLE


def _area(sizes: Sequence[tuple[int, int]]) -> int:
    return sum(width * height for width, height in sizes)
