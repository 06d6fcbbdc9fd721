"""Types of rewards: a candidate, its scores by axis, or a failure.

A failure is no score: the candidate is left out of the mean and the standard deviation of its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from uniref_fast.data.dataset import Row

__all__ = ["AXES", "Candidate", "Failure", "Scores", "UnscoredError"]

AXES = ("integration", "consistency", "quality")  # scores are 0..10 on every axis


@dataclass(frozen=True)
class Candidate:
    """An edited image to score.

    Attributes:
        key: (epoch, row index, member of the group), unique in a step.
        instruction: Instruction of the edit.
        references: Reference images in order, RGB; there may be none.
        image: Result of the edit, RGB.
        row: Dataset row of the candidate, with the exact target and, for generated data, the scene.
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
        axes: Score of each axis, 0 (worst) to 10 (best).
    """

    axes: Mapping[str, float]


@dataclass(frozen=True)
class Failure:
    """Reason why a candidate has no scores.

    Attributes:
        kind: One word to count by: "timeout", "connection", "status", "empty", "malformed", "schema", ...
        reason: Description on one line, with the HTTP status or the start of the reply.
    """

    kind: str
    reason: str


class UnscoredError(Exception):
    """A reward of your own raises it for a candidate that it cannot score."""
