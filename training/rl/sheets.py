"""Contact sheets of rollouts: the best and the worst member of a group, and results for held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from uniref_fast.rewards.types import Failure
from uniref_fast.sheets import contact_sheet
from uniref_fast.training.batches.samples import Prepared
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.rl.generator import Batch
from uniref_fast.training.rl.rollout import Group, MemberKey

__all__ = ["GroupSheet", "best_and_worst", "first_members", "group_sheet", "heldout_sheet"]


@dataclass(frozen=True)
class GroupSheet:
    """Images of one group.

    Attributes:
        prepared: Row of the group.
        images: (image, scores by axis) by label; the scores are empty for an image without scores.
    """

    prepared: Prepared
    images: Mapping[str, tuple[Image.Image, Mapping[str, float]]]


def best_and_worst(
    batch: Batch,
    scores: Mapping[MemberKey, Mapping[str, float]],
    total: Callable[[Mapping[str, float]], float],
    count: int,
    ranks: Ranks,
) -> list[GroupSheet]:
    """Return the best and the worst member of the first `count` groups with two scored members. All ranks must call."""
    chosen: list[tuple[Group, MemberKey, MemberKey]] = []
    for group, keys in zip(batch.groups, batch.keys, strict=True):
        scored = sorted((key for key in keys if key in scores), key=lambda key: total(scores[key]))
        if len(scored) > 1 and len(chosen) < count:
            chosen.append((group, scored[-1], scored[0]))
    images = _gathered(batch, {key for _, *keys in chosen for key in keys}, ranks)
    return [
        GroupSheet(group.prepared, {"best": (images[best], scores[best]), "worst": (images[worst], scores[worst])})
        for group, best, worst in chosen
    ]


def first_members(
    batch: Batch, results: Mapping[MemberKey, Mapping[str, float] | Failure], count: int, ranks: Ranks
) -> list[GroupSheet]:
    """Return the first member of the first `count` groups. All ranks must call."""
    chosen = [(group, keys[0]) for group, keys in zip(batch.groups, batch.keys, strict=True)][:count]
    images = _gathered(batch, {key for _, key in chosen}, ranks)
    scores = {key: {} if isinstance(result, Failure) else result for key, result in results.items()}
    return [GroupSheet(group.prepared, {"result": (images[key], scores[key])}) for group, key in chosen]


def _gathered(batch: Batch, wanted: set[MemberKey], ranks: Ranks) -> dict[MemberKey, Image.Image]:
    """Return the images of members, whichever rank has them."""
    mine = {key: image for key, image in batch.images.items() if key in wanted}
    return {key: image for part in ranks.gather(mine) for key, image in part.items()}


def group_sheet(groups: Sequence[GroupSheet]) -> Image.Image:
    """Return a contact sheet with a row for each group: its images with their scores, and the references."""
    return _sheet(groups, with_target=False)


def heldout_sheet(groups: Sequence[GroupSheet]) -> Image.Image:
    """Return a contact sheet with a row for each group: its images with their scores, the target, the references."""
    return _sheet(groups, with_target=True)


def _sheet(groups: Sequence[GroupSheet], with_target: bool) -> Image.Image:
    rows = []
    for number, group in enumerate(groups, start=1):
        cells = [(f"{number}. {label} {_scored(axes)}", image) for label, (image, axes) in group.images.items()]
        row = group.prepared.row
        if with_target and row.target is not None:
            cells.append(("target", row.target.load()))
        cells += [(f"picture {i}", image) for i, image in enumerate(group.prepared.load_references(), start=1)]
        rows.append(cells)
    texts = "\n".join(f"{number}. {group.prepared.instruction}" for number, group in enumerate(groups, start=1))
    return contact_sheet(rows, caption=texts, cell=160)


def _scored(axes: Mapping[str, float]) -> str:
    """Return the scores as a short label: the first letter of each axis, and its score."""
    return " ".join(f"{axis[0]}{score:.1f}" for axis, score in axes.items()) if axes else "(no scores)"
