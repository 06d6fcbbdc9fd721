"""Random numbers keyed by seed, purpose and sample, so that they do not depend on the order of the draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

__all__ = ["draw", "uniform"]


def draw(seed: int, what: str, key: Sequence[int]) -> torch.Generator:
    """Return a CPU generator for one purpose and one sample.

    Args:
        seed: Seed of the run.
        what: Purpose of the draw.
        key: Numbers that identify the sample.
    """
    digest = hashlib.sha256(f"{seed} {what} {' '.join(map(str, key))}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def uniform(seed: int, what: str, key: Sequence[int]) -> float:
    """Draw a number in [0, 1); arguments as for `draw`."""
    return torch.rand((), generator=draw(seed, what, key), dtype=torch.float64).item()
