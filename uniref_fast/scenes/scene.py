"""The `scene` of a row of made data, checked: what the target shows, and what else a made image may wrongly show.

    scene = read_scene(row.scene)
    scene.asked, scene.gone, scene.spare

The keys are those of the data set's card (`card.py`); nulls, as parquet gives them, are as good as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from uniref_fast.scenes.backgrounds import COLOURS

__all__ = ["Scene", "SceneError", "Thing", "read_scene"]

Size = tuple[float, float]
Box = tuple[float, float, float, float]


class SceneError(ValueError):
    """A scene that is not what the data set's card says, or whose artworks are not there."""


@dataclass(frozen=True)
class Thing:
    """An artwork at a place; centre and side of its square in pixels of the target.

    Attributes:
        artwork: the path of its file.
        colour: it is recoloured to, one of `COLOURS`, or None.
    """

    artwork: str
    colour: str | None
    x: float
    y: float
    side: float

    @property
    def look(self) -> tuple[str, str | None]:
        return self.artwork, self.colour

    def mapped(self, box: Box, size: Size) -> Thing:
        """Where it comes to lie when that box (left, top, right, bottom) of its picture is resized to a size."""
        left, top, right, bottom = box
        across, down = size[0] / (right - left), size[1] / (bottom - top)
        x, y = (self.x - left) * across, (self.y - top) * down
        return replace(self, x=x, y=y, side=self.side * math.sqrt(across * down))

    def same(self, other: Thing) -> bool:
        """Whether it is the same at the same place, to a pixel."""
        apart = abs(self.x - other.x), abs(self.y - other.y), abs(self.side - other.side)
        return self.look == other.look and max(apart) <= 1

    def inside(self, size: Size) -> bool:
        """Whether its square lies in a picture of that size, to a pixel."""
        return all(self.side / 2 - 1 <= at <= extent + 1 - self.side / 2
                   for at, extent in zip((self.x, self.y), size, strict=True))  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What the target shows, and what it does not.

    Attributes:
        size: (width, height) of the target, pixels.
        asked: its objects, later ones over earlier ones.
        kept: for each of them whether a picture shows it at that very place.
        gone: objects of the background's picture that the target does not show where that picture does.
        spare: objects of the pictures that are nowhere in the target; at the mean side of those that are.
        new_ground: whether objects are kept, but not the background of their picture.
    """

    size: Size
    asked: tuple[Thing, ...]
    kept: tuple[bool, ...]
    gone: tuple[Thing, ...]
    spare: tuple[Thing, ...]
    new_ground: bool


def read_scene(values: Mapping[str, Any]) -> Scene:
    """Take a scene apart. Raises SceneError that names the key whose value is wrong."""
    size = _size(values, "scene")
    asked = _things(values, "scene")
    for i, thing in enumerate(asked):
        if not thing.inside(size):
            raise SceneError(f"scene.objects[{i}] does not lie in the picture of {size[0]:g} x {size[1]:g} pixels: "
                             f"centre {thing.x:g}, {thing.y:g}, side {thing.side:g}")  # fmt: skip
    pictures = []
    for i, picture in enumerate(_list(values.get("references"), "scene.references", missing=[])):
        what = f"scene.references[{i}]"
        pictures.append((_size(_mapping(picture, what), what), _things(picture, what)))
    ground, crop = _ground(values, len(pictures))

    kept: set[int] = set()
    bases: set[int] = set()  # pictures that the kept objects are from
    gone: list[Thing] = []
    for number, (picture_size, things) in enumerate(pictures, start=1):
        shown = [thing.mapped(crop if number == ground else (0, 0, *picture_size), size) for thing in things]
        again = {i for i, thing in enumerate(asked) if any(map(thing.same, shown))}
        kept |= again
        bases |= {number} if again else set()
        if number == ground:
            gone = [thing for thing in shown if thing.inside(size) and not any(map(thing.same, asked))]
    known = {thing.look for thing in (*asked, *gone)}
    side = sum(thing.side for thing in asked) / len(asked) if asked else 0.4 * min(size)
    spare = {
        thing.look: replace(thing, x=size[0] / 2, y=size[1] / 2, side=min(side, *size))
        for _, things in pictures
        for thing in things
        if thing.look not in known
    }
    is_kept = tuple(i in kept for i in range(len(asked)))
    return Scene(size, tuple(asked), is_kept, tuple(gone), tuple(spare.values()), bool(bases) and ground not in bases)


# --- values -----------------------------------------------------------------------------------------------------------


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SceneError(f"{what} must be an object, got {value!r:.80}")
    return value


def _list(value: Any, what: str, missing: list[Any] | None = None) -> list[Any]:
    if value is None and missing is not None:
        return missing
    if not isinstance(value, (list, tuple)):
        raise SceneError(f"{what} must be a list, got {value!r:.80}")
    return list(value)


def _numbers(value: Any, count: int, what: str) -> list[float]:
    given = value if isinstance(value, (list, tuple)) else [value] if count == 1 else []
    if len(given) != count or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) for number in given
    ):
        raise SceneError(f"{what} must be {f'{count} numbers' if count > 1 else 'a number'}, got {value!r:.80}")
    return [float(number) for number in given]


def _size(values: Mapping[str, Any], what: str) -> Size:
    width, height = _numbers(values.get("size"), 2, f"{what}.size")
    if min(width, height) < 1:
        raise SceneError(f"{what}.size must be [width, height] of at least 1 pixel, got {values['size']!r}")
    return width, height


def _things(values: Mapping[str, Any], what: str) -> list[Thing]:
    objects = _list(values.get("objects"), f"{what}.objects")
    return [_thing(thing, f"{what}.objects[{i}]") for i, thing in enumerate(objects)]


def _thing(value: Any, what: str) -> Thing:
    values = _mapping(value, what)
    artwork, colour = values.get("artwork"), values.get("colour")
    if not isinstance(artwork, str):
        raise SceneError(f"{what}.artwork must be a path, got {artwork!r:.80}")
    if not (colour is None or (isinstance(colour, str) and colour in COLOURS)):
        raise SceneError(f"{what}.colour must be one of {', '.join(COLOURS)}; got {colour!r:.80}")
    x, y = _numbers(values.get("centre"), 2, f"{what}.centre")
    (side,) = _numbers(values.get("side"), 1, f"{what}.side")
    if side <= 0:
        raise SceneError(f"{what}.side must be positive, got {side:g}")
    return Thing(artwork, colour, x, y, side)


def _ground(values: Mapping[str, Any], pictures: int) -> tuple[int | None, Box]:
    """The picture that gives the background, from 1, and the box of it; None and no box when none does."""
    ground = _mapping(values.get("background"), "scene.background")
    number = ground.get("picture")
    if number is None:
        return None, (0, 0, 1, 1)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= pictures:
        raise SceneError(f"scene.background.picture must be one of the {pictures} pictures, got {number!r:.80}")
    left, top, right, bottom = _numbers(ground.get("crop"), 4, "scene.background.crop")
    if right <= left or bottom <= top:
        raise SceneError(f"scene.background.crop must be [left, top, right, bottom], got {ground['crop']!r}")
    return number, (left, top, right, bottom)
