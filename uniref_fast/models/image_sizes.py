"""Sizes in pixels that pipelines give references and results, where several families have the same rule.

A size is (width, height).
"""

from __future__ import annotations

import math

from PIL import Image

__all__ = ["ImageOfSize", "at_most", "result_size", "scaled_to", "whole_tokens"]

Size = tuple[int, int]


def whole_tokens(size: Size, token: int) -> Size:
    """Return a size whose sides are rounded down to multiples of a token of `token` pixels."""
    return size[0] // token * token, size[1] // token * token


def scaled_to(size: Size, area: int) -> Size:
    """Return a size that is scaled to an area, with sides rounded down."""
    scale = math.sqrt(area / (size[0] * size[1]))
    return int(size[0] * scale), int(size[1] * scale)


def at_most(size: Size, area: int, token: int) -> Size:
    """Return a size that is scaled down to an area if it has more, and cut to whole tokens."""
    return whole_tokens(scaled_to(size, area) if size[0] * size[1] > area else size, token)


def result_size(width: int | None, height: int | None, usual: Size, token: int) -> Size:
    """Return the size of a result in whole tokens.

    Args:
        width: Requested width, or None for the usual one.
        height: Requested height, likewise.
        usual: Size of a result that a request does not fix.
        token: Multiple in pixels to which the sides are rounded down.
    """
    return whole_tokens((width or usual[0], height or usual[1]), token)


class ImageOfSize(Image.Image):
    """An image without pixels, for checks and computations that need a size alone.

    Args:
        size: Width and height in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._given = size

    @property
    def size(self) -> tuple[int, int]:
        return self._given
