"""Splits of a synthetic dataset: objects and combinations of objects that only held-out samples show.

Held out are objects (`MakeConfig.objects`) and combinations (`combinations`, `held_out`). A combination is the relation
of two different objects in a target, or, for a task on a single object, the object's name, the task, and the place or
colour. A hash of the seed and of the combination decides whether it is held out, so this can be checked without the
data: `held_out(seed, "crown|left of|owl")`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from uniref_fast.scenes.scene import PlacedObject

__all__ = ["HELD_OUT_SHARE", "SPLITS", "SPLIT_RULE", "combinations", "held_out", "split_hash"]

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
HELD_OUT_SHARE = 10  # one combination in ten is held out, and one object


def split_hash(seed: int, text: str) -> int:
    """Return the first 8 bytes of blake2b of `seed|text`, big-endian."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{text}".encode()).digest()[:8], "big")


def held_out(seed: int, combination: str) -> bool:
    """Return True if a combination is kept out of train."""
    return split_hash(seed, combination) % HELD_OUT_SHARE == 0


def combinations(objects: Sequence[PlacedObject]) -> tuple[str, ...]:
    """Return the relations of different objects, sorted: "A|left of|B" and "A|above|B", never their mirror images."""
    found = set()
    for i, first in enumerate(objects):
        for second in objects[:i]:
            if first.name == second.name:
                continue
            for axis, relation in enumerate(("left of", "above")):
                apart = first.centre[axis] - second.centre[axis]
                if 4 * abs(apart) >= first.side + second.side:
                    a, b = (first, second) if apart < 0 else (second, first)
                    found.add(f"{a.name}|{relation}|{b.name}")
    return tuple(sorted(found))
