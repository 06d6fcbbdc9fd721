"""Joint pixel budget: the side of a square whose area all references of a sample share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

__all__ = ["MAX_ASPECT_RATIO", "MAX_SIDE", "SIDE_MULTIPLE", "check_budget", "fit_to_budget"]

SIDE_MULTIPLE = 16
"""Sides in pixels are multiples of this: 8x VAE times 2x2 patches."""

MAX_SIDE = 16384
"""Largest side of an image in pixels: far above the sizes of training, far below an overflow."""

MAX_ASPECT_RATIO = 200
"""Largest ratio of the sides of an image that the text encoder accepts."""


def check_budget(budget: float, name: str = "budget") -> None:
    """Check the value of a joint pixel budget.

    Args:
        budget: Side of a square in pixels.
        name: Name of the value in messages.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If the value cannot be a side, for example because it is an area.
    """
    if not isinstance(budget, numbers.Real):
        raise TypeError(f"{name} must be a number, got {budget!r}")
    if not SIDE_MULTIPLE <= budget < math.inf:  # true for NaN too
        raise ValueError(f"{name} is the side of a square in pixels, at least {SIDE_MULTIPLE}; got {budget}")
    if budget > MAX_SIDE:
        raise ValueError(f"{name} is the side of a square in pixels; for {budget} pixels give {math.sqrt(budget):.0f}")


def fit_to_budget(sizes: Sequence[tuple[int, int]], budget: int, *, upscale: bool = False) -> list[tuple[int, int]]:
    """Resize images jointly so that the sum of their areas fits a budget x budget square.

    All images are scaled by one factor, the largest that fits, so that their relative sizes do not change. Each side
    is then rounded to the nearest multiple of 16, so it differs from exact scaling by less than one step of 16 pixels.
    No side is smaller than 16: an image that is tiny, or more elongated than the budget allows, gets a short side of 16
    and another aspect ratio.

    Args:
        sizes: Width and height of each image in pixels; may be empty.
        budget: Joint pixel budget, the side of a square in pixels: 1024 stands for 1024 x 1024 pixels for all images
            together.
        upscale: Also enlarge images until the budget is used. By default images are only made smaller, apart from
            rounding to a multiple of 16.

    Returns:
        Width and height of each image, in order.

    Raises:
        ValueError: If a side of an image is below 1, the budget is not a side from 16 to 16384 pixels, or its square
            has less than 256 pixels (16 x 16) per image.
    """
    for i, (width, height) in enumerate(sizes):
        if not (width >= 1 and height >= 1):
            raise ValueError(f"image {i + 1} has size {width} x {height}; sides must be at least 1 pixel")
    check_budget(budget)
    area, smallest = budget**2, SIDE_MULTIPLE**2 * len(sizes)
    if area < smallest:
        raise ValueError(
            f"{len(sizes)} images cannot fit a budget of {budget} x {budget} pixels: each needs at least "
            f"{SIDE_MULTIPLE} x {SIDE_MULTIPLE}, together {smallest}"
        )
    if not sizes:
        return []
    high = math.sqrt(area / min(w * h for w, h in sizes)) * 2 if upscale else 1.0
    if _area(_scaled(sizes, high)) <= area:
        return _scaled(sizes, high)
    low = 0.0
    for _ in range(64):  # the area is a monotone step function of the scale
        middle = (low + high) / 2
        if _area(_scaled(sizes, middle)) <= area:
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
