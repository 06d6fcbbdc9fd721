"""What a sample of the training data shows, before any pixel is drawn; and which samples are held out.

A `Plan` lists its pictures and its target as backgrounds and `Thing`s at pixel positions. Sizes are (width, height).

Held out are *objects* (`MakeConfig.objects`) and *combinations* (`combinations`, `held_out`): of every two different
objects in a target, their names and how one stands to the other; for a task on a single object, its name, the task and
the place or colour. A combination is held out by a hash of the seed and of itself, so whether it is can be checked
without the data: `held_out(seed, "crown|left of|owl")`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from uniref_fast.scenes import textures as scenes
from uniref_fast.scenes.artworks import Artworks

__all__ = [
    "SPLITS",
    "SPLIT_RULE",
    "TARGET_RATIOS",
    "Ground",
    "MakeConfig",
    "Picture",
    "Plan",
    "Thing",
    "combinations",
    "held_out",
    "overlapping",
    "rounded_size",
]

Size = tuple[int, int]

SPLITS = ("train", "heldout_objects", "heldout_combinations")
SPLIT_RULE = (
    "heldout_objects: every object is one of `heldout_objects`, which train and heldout_combinations never show: "
    "a tenth of the artworks, at least six: six of the sixteen that come with uniref_fast, the rest of the others, "
    "both those with the lowest first 8 bytes of blake2b(`seed|object|name`). "
    "heldout_combinations: objects of train; at least one combination of the sample's scene is held out, and no "
    "scene of train has one. A combination is `A|left of|B` or `A|above|B` for two different objects in the "
    "target whose centres are apart on that axis by at least half their mean side, or `object|task|place or "
    "colour` for a task on a single object; it is held out when the first 8 bytes of blake2b(`seed|combination`), "
    "big-endian, are divisible by 10."
)
PICTURES = ("any", "simple")
STEP = 8  # pixels of a token of the built-in model
SHARE = 10  # one combination in so many is held out, and one object
MIN_HELD_OUT = 6  # objects: what a sample of six pictures may show

TARGET_RATIOS = ((1, 1), (4, 3), (3, 4), (16, 9))
REFERENCE_RATIOS = (*TARGET_RATIOS, (9, 16), (3, 2), (2, 3))
MULTIPLE = 16  # of every side, pixels


@dataclass(frozen=True)
class Ground:
    """A background: a kind and a seed, or a kind and a colour when it is asked for in words."""

    kind: str
    seed: int = 0
    colour: str | None = None


@dataclass(frozen=True)
class Thing:
    """An artwork somewhere: its square's upper left corner and side in pixels.

    Attributes:
        picture: number of the picture it comes from, 1, 2, ..., or None when it is only named.
        colour: it is recoloured to.
    """

    name: str
    corner: tuple[int, int]
    side: int
    picture: int | None = None
    colour: str | None = None

    @property
    def centre(self) -> tuple[float, float]:
        return self.corner[0] + self.side / 2, self.corner[1] + self.side / 2


@dataclass(frozen=True)
class Picture:
    """A background with things on it; `ground` is a `Ground` or the number of the picture whose ground is used."""

    size: Size
    ground: Ground | int
    things: tuple[Thing, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A sample: what the pictures show, what is asked, what the answer shows."""

    task_type: str
    instruction: str
    pictures: tuple[Picture, ...]
    target: Picture
    combinations: tuple[str, ...]


@dataclass(frozen=True)
class MakeConfig:
    """What the samples follow from; equal configurations give equal samples.

    Attributes:
        size: longer side of the targets, pixels; a multiple of 16, at least 64.
        seed: of everything.
        references: the numbers of pictures that samples have, 0..6.
        pictures: "any" for pictures of many sizes and aspect ratios; "simple" for what a very small model can learn in
            an hour: all pictures of a sample are squares of one size, an object is as large in its picture as in the
            answer and comes there once, by whole steps of STEP pixels, pictures are mentioned in their order, all of
            them, and no name has to be known: a picture that an object is taken from shows it alone, in its middle.
        tasks: what samples may ask, by their names in `tasks.py`; one that is given twice is drawn twice as often.
            None: all that the number of pictures allows.
        artworks: the pool of objects.
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
        names, shipped = self.artworks.names, scenes.artworks()
        by_hash = sorted(names, key=lambda name: (_hash(self.seed, f"object|{name}"), name))
        # Of the shipped ones the same are held out with a font as without: a model trained on a font can be shown them.
        held = [name for name in by_hash if name in shipped][:MIN_HELD_OUT]
        others = [name for name in by_hash if name not in shipped]
        held += others[: max(MIN_HELD_OUT, len(names) // SHARE) - len(held)]
        return tuple(n for n in names if n not in held), tuple(n for n in names if n in held)

    def objects(self, split: str) -> tuple[str, ...]:
        """Names that may occur in a split, in alphabetical order."""
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
        """What the pictures beside a target of that size may measure; those of a sample are drawn without repeats."""
        return self._reference_sizes if self.pictures == "any" else (target,) * max(self.references)


def rounded_size(ratio: tuple[int, int], longer: int) -> Size:
    """The size of about that aspect ratio whose sides are multiples of 16 and the longer one nearest to `longer`."""
    longer = max(MULTIPLE, round(longer / MULTIPLE) * MULTIPLE)
    exact = longer * min(ratio) / max(ratio)
    lower = max(MULTIPLE, int(exact // MULTIPLE) * MULTIPLE)
    shorter = lower if exact * exact <= lower * (lower + MULTIPLE) else lower + MULTIPLE  # nearest as a ratio
    return (longer, shorter) if ratio[0] >= ratio[1] else (shorter, longer)


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}|{text}".encode()).digest()[:8], "big")


def held_out(seed: int, combination: str) -> bool:
    """Whether a combination is kept out of train."""
    return _hash(seed, combination) % SHARE == 0


def combinations(things: Sequence[Thing]) -> tuple[str, ...]:
    """How different objects stand to each other, sorted: "A|left of|B" and "A|above|B", never their mirror images."""
    found = set()
    for i, first in enumerate(things):
        for second in things[:i]:
            if first.name == second.name:
                continue
            for axis, relation in enumerate(("left of", "above")):
                apart = first.centre[axis] - second.centre[axis]
                if 4 * abs(apart) >= first.side + second.side:
                    a, b = (first, second) if apart < 0 else (second, first)
                    found.add(f"{a.name}|{relation}|{b.name}")
    return tuple(sorted(found))


def overlapping(things: Sequence[Thing]) -> bool:
    """Whether the squares of two things share a pixel."""
    for i, a in enumerate(things):
        for b in things[:i]:
            if all(a.corner[k] < b.corner[k] + b.side and b.corner[k] < a.corner[k] + a.side for k in (0, 1)):
                return True
    return False
