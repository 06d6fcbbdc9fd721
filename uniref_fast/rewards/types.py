"""What rewards are given and what they give back: a candidate, its scores on three axes, or a failure.

A failure is no score: whoever turns scores into advantages leaves the candidate out of its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from uniref_fast.data.dataset import Row

__all__ = ["AXES", "Candidate", "Failure", "Scores"]

AXES = ("integration", "consistency", "quality")  # scores are 0..10 on every axis


@dataclass(frozen=True)
class Candidate:
    """A made image that waits for its scores.

    Attributes:
        key: (epoch, row index, member of the group): unique in a step.
        instruction: what was asked for.
        references: the pictures given, RGB, in order: pictures 1 .. K; K may be 0.
        image: what the model made, RGB.
        row: where it comes from, with the exact target and, for made data, the scene.
    """

    key: tuple[int, ...]
    instruction: str
    references: tuple[Image.Image, ...]
    image: Image.Image
    row: Row


@dataclass(frozen=True)
class Scores:
    """Scores of a candidate.

    Attributes:
        axes: axis -> score, 0 (worst) to 10 (best); every axis of `AXES`.
    """

    axes: Mapping[str, float]


@dataclass(frozen=True)
class Failure:
    """A candidate that got no scores: it leaves its group's statistics.

    Attributes:
        kind: one word to count by: "timeout", "connection", "status", "empty", "malformed", "schema", ...
        reason: one line: what happened, with the HTTP status or the start of the reply.
    """

    kind: str
    reason: str
