"""What is looked at while a policy is trained by rewards: pictures of its best and worst, and an alarm for hacking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from uniref_fast.sheets import contact_sheet
from uniref_fast.training.batches.samples import Prepared

__all__ = ["Alarm", "Shown", "group_sheet", "heldout_sheet"]

SURE = 3.0  # standard errors that quality must have fallen by


class Alarm:
    """Tells when the sum of the axes rises while their quality falls: the policy has found what the rewards overlook.

    Args:
        steps: that are looked back on; 0 never tells.
        state: of `state()`.
    """

    def __init__(self, steps: int, state: Sequence[Sequence[float]] | None = None) -> None:
        self.steps = steps
        self._past: list[tuple[float, float, float]] = [(s, total, quality) for s, total, quality in state or ()]

    def state(self) -> list[list[float]]:
        return [list(one) for one in self._past]

    def add(self, stage: int, total: float, quality: float) -> str:
        """Take in a step's means; returns what there is to tell, or nothing. The second half of the steps looked back
        on is compared with the first; another stage has other prompts, and begins anew."""
        past = [one for one in self._past if one[0] == stage]
        self._past = [*past, (stage, total, quality)][-self.steps :] if self.steps else []
        if len(self._past) < self.steps or self.steps < 4:
            return ""
        half = self.steps // 2
        before, after = self._past[:half], self._past[-half:]
        rise, _ = _change([one[1] for one in before], [one[1] for one in after])
        fall, error = _change([one[2] for one in before], [one[2] for one in after])
        if rise <= 0 or fall >= -SURE * error:
            return ""
        self._past = []  # tell once, then look at later steps
        return (
            f"over {self.steps} steps the reward rose by {rise:.2f} while its quality axis fell by {-fall:.2f}: look "
            "at the sample grids; a lower lr, a kl weight or more weight on quality hold it back"
        )


def _change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Difference of the means, and its standard error."""

    def moments(values: Sequence[float]) -> tuple[float, float]:
        mean = math.fsum(values) / len(values)
        return mean, math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values)

    (first, error1), (second, error2) = moments(before), moments(after)
    return second - first, math.sqrt(error1 + error2)


@dataclass(frozen=True)
class Shown:
    """A prompt with made images: label -> (image, its scores by axis; none where it has none)."""

    prepared: Prepared
    made: Mapping[str, tuple[Image.Image, Mapping[str, float]]]


def group_sheet(shown: Sequence[Shown]) -> Image.Image:
    """Rows of the best and the worst member of a group with their scores, and the references."""
    return _sheet(shown, with_target=False)


def heldout_sheet(shown: Sequence[Shown]) -> Image.Image:
    """Rows of a result with its scores, the target where the row has one, and the references."""
    return _sheet(shown, with_target=True)


def _sheet(shown: Sequence[Shown], with_target: bool) -> Image.Image:
    rows = []
    for number, one in enumerate(shown, start=1):
        cells = [(f"{number}. {label} {_scored(axes)}", image) for label, (image, axes) in one.made.items()]
        row = one.prepared.row
        if with_target and row.target is not None:
            cells.append(("target", row.target.load()))
        cells += [(f"picture {i}", image) for i, image in enumerate(one.prepared.load_references(), start=1)]
        rows.append(cells)
    texts = "\n".join(f"{number}. {one.prepared.instruction}" for number, one in enumerate(shown, start=1))
    return contact_sheet(rows, caption=texts, cell=160)


def _scored(axes: Mapping[str, float]) -> str:
    """Scores short enough for a label: first letters of the axes."""
    return " ".join(f"{axis[0]}{score:.1f}" for axis, score in axes.items()) if axes else "(no scores)"
