"""Packs of consecutive samples under a limit of tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["next_fit"]


def next_fit(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Put consecutive samples together while they fit, so that samples keep their order.

    Args:
        lengths: Tokens of each sample.
        limit: Largest number of tokens in a pack; a sample over it is alone in its pack. None puts all samples
            into one pack.

    Returns:
        Indices of the samples of each pack.
    """
    packs: list[list[int]] = []
    filled = 0
    for i, tokens in enumerate(lengths):
        if not packs or (limit is not None and filled + tokens > limit):
            packs.append([])
            filled = 0
        packs[-1].append(i)
        filled += tokens
    return packs
