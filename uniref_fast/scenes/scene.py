"""The description of a synthetic sample: what its target and its references show, as dataclasses and as JSON.

    Scene                     the target image, and what the sample was made from
      size, background, objects: [PlacedObject, ...]
      combinations            object pairs or single-object edits, by which samples are assigned to splits
      references: [SceneImage, ...]
        size, background, objects: [PlacedObject, ...]

The generator draws a `Scene` (`render.py`) and stores it with the sample (`Scene.to_json`); the scene reward reads it
back (`Scene.from_json`). The dataset card lists the keys from the field descriptions below (`schema_table`).
Sizes are (width, height) in pixels; numbers of pictures start at 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_type_hints

from uniref_fast.scenes.backgrounds import COLOURS

__all__ = [
    "Background",
    "PlacedObject",
    "Scene",
    "SceneError",
    "SceneImage",
    "artwork_path",
    "crop_box",
    "schema_table",
]

Size = tuple[int, int]
Box = tuple[float, float, float, float]


class SceneError(ValueError):
    """A scene that does not follow the schema, or that names an artwork that is missing."""


class _Json:
    """Base of the dataclasses: conversion to JSON values in the order of the fields."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object; keys without a value are left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {key: _plain(value) for key, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, _Json):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Background(_Json):
    """The background of an image: a generated one, or the background of a reference.

    The descriptions of the fields are in the dataset card.
    """

    kind: Annotated[str | None, "Kind of a generated background, such as `checker` or `landscape`."] = None
    seed: Annotated[int | None, "Seed of a generated background that the instruction does not describe."] = None
    colour: Annotated[str | None, "Colour of a generated background that the instruction describes."] = None
    picture: Annotated[int | None, "Number of the reference whose background the target shows."] = None
    crop: Annotated[
        Box | None, "Box [left, top, right, bottom] of that background, in pixels, which was resized to the target."
    ] = None

    @classmethod
    def of_picture(cls, number: int, size: Size, target: Size) -> Background:
        """Return the background of picture `number`, which has the given size, cropped for a target."""
        return cls(picture=number, crop=crop_box(size, target))


@dataclass(frozen=True)
class PlacedObject(_Json):
    """An artwork at a place in an image. The descriptions of the fields are in the dataset card."""

    name: Annotated[str, "Name of the object, as in the instruction."]
    artwork: Annotated[str, "Path of the object's PNG file."]
    centre: Annotated[tuple[float, float], "Centre [x, y] of the object's square, in pixels."]
    side: Annotated[float, "Side of the object's square, in pixels."]
    picture: Annotated[int | None, "Number of the reference that the object comes from, if any."] = None
    colour: Annotated[str | None, "Colour that the object was recoloured to, if any."] = None

    @classmethod
    def at(cls, name: str, corner: tuple[int, int], side: int, picture: int | None = None) -> PlacedObject:
        """Place an artwork of the dataset by the upper left corner and the side of its square, in pixels."""
        return cls(name, artwork_path(name), (corner[0] + side / 2, corner[1] + side / 2), side, picture)

    @property
    def corner(self) -> tuple[int, int]:
        """Upper left corner of the square, in whole pixels."""
        return round(self.centre[0] - self.side / 2), round(self.centre[1] - self.side / 2)

    @property
    def appearance(self) -> tuple[str, str | None]:
        """Artwork and colour: equal for objects that look the same."""
        return self.artwork, self.colour

    def moved(self, corner: tuple[int, int], side: int | None = None) -> PlacedObject:
        """Return the object at another upper left corner, with another side if given."""
        side = int(self.side) if side is None else side
        return replace(self, centre=(corner[0] + side / 2, corner[1] + side / 2), side=side)

    def resized(self, box: Box, size: Size) -> PlacedObject:
        """Return the object after that box (left, top, right, bottom) of its image was resized to a size."""
        left, top, right, bottom = box
        across, down = size[0] / (right - left), size[1] / (bottom - top)
        centre = (self.centre[0] - left) * across, (self.centre[1] - top) * down
        return replace(self, centre=centre, side=self.side * math.sqrt(across * down))

    def coincides(self, other: PlacedObject) -> bool:
        """Return True if the other object looks the same and is at the same place, to a pixel."""
        apart = [abs(a - b) for a, b in zip((*self.centre, self.side), (*other.centre, other.side), strict=True)]
        return self.appearance == other.appearance and max(apart) <= 1

    def inside(self, size: Size) -> bool:
        """Return True if the square lies in an image of that size, to a pixel."""
        return all(self.side / 2 - 1 <= at <= extent + 1 - self.side / 2
                   for at, extent in zip(self.centre, size, strict=True))  # fmt: skip


@dataclass(frozen=True)
class SceneImage(_Json):
    """The content of one image. The descriptions of the fields are in the dataset card."""

    size: Annotated[Size, "[width, height] of the image, in pixels."]
    background: Annotated[Background | None, "Background of the image."]
    objects: Annotated[tuple[PlacedObject, ...], "Objects of the image; later ones are drawn over earlier ones."]


@dataclass(frozen=True)
class Scene(SceneImage):
    """The content of the target, and of the references. The descriptions of the fields are in the dataset card."""

    combinations: Annotated[tuple[str, ...], "Combinations by which the sample is assigned to a split."]
    references: Annotated[tuple[SceneImage, ...], "Content of each reference, in order."]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scene:
        """Check and convert the JSON form of a scene.

        Null is the same as a missing key, since parquet fills missing keys with nulls. `references` and `combinations`
        may be missing.

        Raises:
            SceneError: A value is missing or wrong; the message names its key.
        """
        size, objects = _size(values, "scene"), _objects(values, "scene")
        for i, placed in enumerate(objects):
            if not placed.inside(size):
                raise SceneError(
                    f"scene.objects[{i}] is not inside the image of {size[0]} x {size[1]} pixels: "
                    f"centre {placed.centre[0]:g}, {placed.centre[1]:g}, side {placed.side:g}"
                )
        references = []
        for i, reference in enumerate(_list(values.get("references"), "scene.references", missing=[])):
            where = f"scene.references[{i}]"
            inner = _mapping(reference, where)
            ground = inner.get("background")
            background = None if ground is None else _background(ground, f"{where}.background")
            references.append(SceneImage(_size(inner, where), background, _objects(inner, where)))
        background = _background(values.get("background"), "scene.background", len(references))
        combinations = _list(values.get("combinations"), "scene.combinations", missing=[])
        return cls(size, background, objects, tuple(map(str, combinations)), tuple(references))


def artwork_path(name: str) -> str:
    """Return the path of an object's PNG file, relative to the folder of the dataset."""
    return f"artworks/{name.replace(' ', '_')}.png"


def crop_box(size: Size, target: Size) -> tuple[int, int, int, int]:
    """Return the largest centred box (left, top, right, bottom) of an image that has the target's aspect ratio."""
    width = min(size[0], round(size[1] * target[0] / target[1]))
    height = min(size[1], round(size[0] * target[1] / target[0]))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def schema_table() -> str:
    """Return a Markdown table of all keys of a scene's JSON form with their descriptions."""
    parts = {"`scene`": Scene, "`background`": Background, "each of `objects`": PlacedObject,
             "each of `references`": SceneImage}  # fmt: skip
    rows = [
        f"| {part} | `{key}` | {hint.__metadata__[0]} |"
        for part, kind in parts.items()
        for key, hint in get_type_hints(kind, include_extras=True).items()
    ]
    return "\n".join(["| in | key | content |", "|---|---|---|", *rows])


# --- values of the JSON form ------------------------------------------------------------------------------------------


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SceneError(f"{where} must be an object, got {value!r:.80}")
    return value


def _list(value: Any, where: str, missing: list[Any] | None = None) -> list[Any]:
    if value is None and missing is not None:
        return missing
    if not isinstance(value, (list, tuple)):
        raise SceneError(f"{where} must be a list, got {value!r:.80}")
    return list(value)


def _numbers(value: Any, count: int, where: str) -> list[float]:
    given = value if isinstance(value, (list, tuple)) else [value] if count == 1 else []
    if len(given) != count or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) for number in given
    ):
        raise SceneError(f"{where} must be {f'{count} numbers' if count > 1 else 'a number'}, got {value!r:.80}")
    return [float(number) for number in given]


def _size(values: Mapping[str, Any], where: str) -> Size:
    numbers = _numbers(values.get("size"), 2, f"{where}.size")
    if min(numbers) < 1 or any(number % 1 for number in numbers):
        raise SceneError(
            f"{where}.size must be [width, height] in whole pixels, at least 1, got {values['size']!r:.80}"
        )
    return int(numbers[0]), int(numbers[1])


def _text(values: Mapping[str, Any], key: str, where: str) -> str | None:
    value = values.get(key)
    if not (value is None or isinstance(value, str)):
        raise SceneError(f"{where}.{key} must be a text, got {value!r:.80}")
    return value


def _whole(values: Mapping[str, Any], key: str, where: str) -> int | None:
    if values.get(key) is None:
        return None
    (number,) = _numbers(values[key], 1, f"{where}.{key}")
    if number % 1:
        raise SceneError(f"{where}.{key} must be a whole number, got {number:g}")
    return int(values[key])


def _objects(values: Mapping[str, Any], where: str) -> tuple[PlacedObject, ...]:
    objects = _list(values.get("objects"), f"{where}.objects")
    return tuple(_object(value, f"{where}.objects[{i}]") for i, value in enumerate(objects))


def _object(value: Any, where: str) -> PlacedObject:
    values = _mapping(value, where)
    artwork, colour = values.get("artwork"), values.get("colour")
    if not isinstance(artwork, str):
        raise SceneError(f"{where}.artwork must be a path, got {artwork!r:.80}")
    if not (colour is None or (isinstance(colour, str) and colour in COLOURS)):
        raise SceneError(f"{where}.colour must be one of {', '.join(COLOURS)}; got {colour!r:.80}")
    x, y = _numbers(values.get("centre"), 2, f"{where}.centre")
    (side,) = _numbers(values.get("side"), 1, f"{where}.side")
    if side <= 0:
        raise SceneError(f"{where}.side must be positive, got {side:g}")
    return PlacedObject(
        _text(values, "name", where) or "", artwork, (x, y), side, _whole(values, "picture", where), colour
    )


def _background(value: Any, where: str, pictures: int | None = None) -> Background:
    """Convert a background; `pictures` is the number of references, of which the target's background may name one."""
    values = _mapping(value, where)
    if pictures is None or values.get("picture") is None:
        kind, colour = _text(values, "kind", where), _text(values, "colour", where)
        return Background(kind, _whole(values, "seed", where), colour)
    number = values["picture"]
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= pictures:
        raise SceneError(f"{where}.picture must be one of the {pictures} pictures, got {number!r:.80}")
    left, top, right, bottom = _numbers(values.get("crop"), 4, f"{where}.crop")
    if right <= left or bottom <= top:
        raise SceneError(f"{where}.crop must be [left, top, right, bottom], got {values['crop']!r}")
    return Background(picture=number, crop=(left, top, right, bottom))
