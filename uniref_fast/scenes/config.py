"""Configuration of a synthetic dataset: the settings that determine every sample."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from uniref_fast.scenes.artworks import Artworks, shipped_artworks
from uniref_fast.scenes.splits import HELD_OUT_SHARE, split_hash

__all__ = ["PICTURES", "TARGET_RATIOS", "MakeConfig", "rounded_size"]

Size = tuple[int, int]  # (width, height) in pixels

PICTURES = ("any", "simple")
STEP = 8  # pixels of a token of the built-in model
MIN_HELD_OUT = 6  # objects: a sample of six references may show as many

TARGET_RATIOS = ((1, 1), (4, 3), (3, 4), (16, 9))
REFERENCE_RATIOS = (*TARGET_RATIOS, (9, 16), (3, 2), (2, 3))
MULTIPLE = 16  # pixels: every side is a multiple


@dataclass(frozen=True)
class MakeConfig:
    """Settings of generated samples; equal configurations give equal samples.

    Attributes:
        artworks: Pool of objects.
        size: Longer side of the targets in pixels; a multiple of 16, at least 64.
        seed: Seed of all random choices.
        references: Numbers of references that samples have, each from 0 to 6.
        pictures: "any" for references of many sizes and aspect ratios; "simple" for scenes that a very small model can
            learn in an hour: all references of a sample are squares of one size; an object is as large in its
            reference as in the answer, occurs there once, and moves by whole multiples of STEP pixels; all references
            are mentioned, in their order; and no name has to be known, since a reference from which an object is taken
            shows that object alone, in its middle.
        tasks: Tasks that samples may ask for, by their names in `tasks.py`; a task that is given twice is drawn twice
            as often. None allows all tasks that the number of references permits.
    """

    artworks: Artworks
    size: int = 128
    seed: int = 0
    references: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    pictures: Literal["any", "simple"] = "any"
    tasks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % MULTIPLE:
            raise ValueError(f"the size is a multiple of {MULTIPLE} and at least 64, got {self.size}")
        if self.seed < 0:
            raise ValueError(f"the seed is not negative, got {self.seed}")
        if not self.references or not set(self.references) <= set(range(7)):
            raise ValueError(
                f"references are numbers of pictures from 0 to 6, for example 0,1,2, got {self.references}"
            )
        if self.pictures not in PICTURES:
            raise ValueError(f"pictures are one of {', '.join(PICTURES)}, got {self.pictures!r}")
        if len(self.artworks.names) < 2 * MIN_HELD_OUT:
            raise ValueError(f"at least {2 * MIN_HELD_OUT} artworks are needed, got {len(self.artworks.names)}")
        object.__setattr__(self, "references", tuple(sorted(set(self.references))))

    @functools.cached_property
    def _objects(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        names, shipped = self.artworks.names, shipped_artworks()
        by_hash = sorted(names, key=lambda name: (split_hash(self.seed, f"object|{name}"), name))
        # The same shipped artworks are held out with and without a font, so that a model trained with a font has not
        # seen them.
        held = [name for name in by_hash if name in shipped][:MIN_HELD_OUT]
        others = [name for name in by_hash if name not in shipped]
        held += others[: max(MIN_HELD_OUT, len(names) // HELD_OUT_SHARE) - len(held)]
        return tuple(n for n in names if n not in held), tuple(n for n in names if n in held)

    def objects(self, split: str) -> tuple[str, ...]:
        """Return the names of the objects that may occur in a split, in alphabetical order."""
        return self._objects[split == "heldout_objects"]

    @functools.cached_property
    def target_sizes(self) -> tuple[Size, ...]:
        if self.pictures == "simple":
            return ((self.size, self.size),)
        return tuple(rounded_size(ratio, self.size) for ratio in TARGET_RATIOS)

    @functools.cached_property
    def _reference_sizes(self) -> tuple[Size, ...]:
        longer = [self.size * quarters // 4 for quarters in (3, 4, 5, 6)]
        return tuple(sorted({rounded_size(ratio, side) for ratio in REFERENCE_RATIOS for side in longer}))

    def reference_sizes(self, target: Size) -> tuple[Size, ...]:
        """Return the sizes that the references of a sample with that target may have; each is used at most once."""
        return self._reference_sizes if self.pictures == "any" else (target,) * max(self.references)


def rounded_size(ratio: tuple[int, int], longer: int) -> Size:
    """Return the size nearest to an aspect ratio, with sides that are multiples of 16 and the longer near `longer`."""
    longer = max(MULTIPLE, round(longer / MULTIPLE) * MULTIPLE)
    exact = longer * min(ratio) / max(ratio)
    lower = max(MULTIPLE, int(exact // MULTIPLE) * MULTIPLE)
    shorter = lower if exact * exact <= lower * (lower + MULTIPLE) else lower + MULTIPLE  # nearest as a ratio
    return (longer, shorter) if ratio[0] >= ratio[1] else (shorter, longer)
