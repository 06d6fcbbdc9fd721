"""Placement of objects on a canvas, together with the words that describe it.

Every function places squares inside the canvas; `fits` checks afterwards that they do not overlap. A scale is the side
of a square as a fraction of the canvas's shorter side. A canvas is given by its size, (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from uniref_fast.scenes.config import STEP
from uniref_fast.scenes.scene import Background, PlacedObject, SceneImage
from uniref_fast.scenes.words import PLACES, SeededRandom, described, listed, place, plural

__all__ = ["SOLO", "arrange", "edit_source", "fits", "middle", "object_at", "overlapping", "portrait", "stepped"]

Size = tuple[int, int]

# Scales of an object that the instruction calls small, large or neither: alone, one of two, one of more.
SOLO = {"small": 0.26, "": 0.44, "large": 0.6}
PAIR = {"small": 0.2, "": 0.36, "large": 0.48}
TOGETHER = {"small": 0.2, "": 0.27, "large": 0.42}
# Places at which several copies of an object stand side by side.
BANDS = ("at the top", "on the left", "in the centre", "on the right", "at the bottom")


def object_at(canvas: Size, name: str, centre: tuple[float, float], side: int) -> PlacedObject:
    """Place an object of `side` pixels as near to a centre, in fractions of the canvas, as a small margin allows."""
    margin = round(0.03 * min(canvas))
    left, top = (
        max(margin, min(extent - side - margin, round(at * extent - side / 2)))
        for at, extent in zip(centre, canvas, strict=True)
    )
    return PlacedObject.at(name, (left, top), side)


def fits(objects: Sequence[PlacedObject], canvas: Size) -> bool:
    """Return True if all objects are inside the canvas and no two overlap."""
    inside = all(
        corner >= 0 and corner + placed.side <= extent
        for placed in objects
        for corner, extent in zip(placed.corner, canvas, strict=True)
    )
    return inside and not overlapping(objects)


def overlapping(objects: Sequence[PlacedObject]) -> bool:
    """Return True if the squares of two objects share a pixel."""
    for i, a in enumerate(objects):
        for b in objects[:i]:
            if all(a.corner[k] < b.corner[k] + b.side and b.corner[k] < a.corner[k] + a.side for k in (0, 1)):
                return True
    return False


def middle(size: Size, side: int) -> tuple[int, int]:
    """Return the corner of a square of that side in the middle of a canvas."""
    return (size[0] - side) // 2, (size[1] - side) // 2


def stepped(placed: PlacedObject, start: tuple[int, int], canvas: Size) -> PlacedObject:
    """Move an object to the nearest place inside the canvas that is whole steps of STEP pixels from `start`.

    Args:
        start: A corner of its square, in pixels.
    """
    corner = []
    for at, begin, extent in zip(placed.corner, start, canvas, strict=True):
        places = range(begin % STEP, extent - int(placed.side) + 1, STEP)
        corner.append(min(places, key=lambda place: abs(place - at)) if places else at)
    return placed.moved((corner[0], corner[1]))


def portrait(
    rng: SeededRandom, size: Size, names: Sequence[str], ground: Background, side: int | None = None
) -> SceneImage:
    """Return a reference that shows one object large, or two side by side along its longer side.

    Args:
        side: If given, show one object of this side in the middle.
    """
    if side is not None:
        return SceneImage(size, ground, (PlacedObject.at(names[0], middle(size, side), side),))
    if len(names) == 1:
        side = round(rng.uniform(0.62, 0.86) * min(size))
        centre = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58)
        return SceneImage(size, ground, (object_at(size, names[0], centre, side),))
    side = round(min(0.44 * max(size), 0.8 * min(size)))
    centres = ((0.26, 0.5), (0.74, 0.5)) if size[0] >= size[1] else ((0.5, 0.26), (0.5, 0.74))
    order = rng.sample(names, 2)
    return SceneImage(size, ground, tuple(object_at(size, n, c, side) for n, c in zip(order, centres, strict=True)))


def edit_source(rng: SeededRandom, canvas: Size, names: Sequence[str]) -> tuple[list[PlacedObject], list[str]]:
    """Place objects at different places of picture 1, each with its own size; return them and the places.

    The objects may overlap.
    """
    places = rng.sample(tuple(PLACES), len(names))
    low, high = (0.34, 0.5) if len(names) == 1 else (0.26, 0.38)
    objects = [
        replace(object_at(canvas, name, PLACES[key], round(rng.uniform(low, high) * min(canvas))), picture=1)
        for name, key in zip(names, places, strict=True)
    ]
    return objects, places


def arrange(
    rng: SeededRandom,
    canvas: Size,
    names: Sequence[str],
    pictures: Sequence[int | None],
    pool: Sequence[str],
    copies: bool = True,
) -> Arrangement | None:
    """Place objects on a canvas and describe it, in a random arrangement among those for this number of objects.

    Args:
        names: Names of one to five different objects.
        pictures: Number of the reference that each object comes from, or None.
        pool: All names, so that a plural is not the name of something else.
        copies: Allow some objects to occur several times.

    Returns:
        The objects, the words, and the place of a single object ("" for several); None if objects would overlap.
    """
    arrangements = ARRANGEMENTS[len(names) - 1]
    objects, words, where = rng.choice(arrangements)(rng, canvas, list(zip(names, pictures, strict=True)), pool)
    if not objects or not fits(objects, canvas) or (len(objects) > len(names) and not copies):
        return None
    return objects, words, where


# --- arrangements -----------------------------------------------------------------------------------------------------
# Each function takes (rng, canvas, named, pool) and returns the objects, the words and the place; no objects if the
# words would be wrong. `named` has the name of each object and the number of the reference it comes from.

Named = tuple[str, "int | None"]
Arrangement = tuple[list[PlacedObject], str, str]


def _put(canvas: Size, named: Named, centre: tuple[float, float], side: float) -> PlacedObject:
    return replace(object_at(canvas, named[0], centre, int(side)), picture=named[1])


def _copies(canvas: Size, named: Named, key: str, scale: float, count: int) -> list[PlacedObject]:
    """Place copies side by side around a place of `BANDS`; on the left and right, one above the other."""
    axis = 1 if key in ("on the left", "on the right") else 0
    side = int(min(scale * min(canvas), 0.88 * canvas[axis] / count))
    step = min(1.15 * side, 0.94 * canvas[axis] / count) / canvas[axis]
    centres = []
    for i in range(count):
        centre = list(PLACES[key])
        centre[axis] = 0.5 + (i - (count - 1) / 2) * step
        centres.append((centre[0], centre[1]))
    return [_put(canvas, named, centre, side) for centre in centres]


def _place(rng: SeededRandom, canvas: Size, named: list[Named], pool: Sequence[str]) -> Arrangement:
    ((name, picture),) = named
    size, key = rng.choice(("", "", "small", "large")), rng.choice(tuple(PLACES))
    unnamed_place = picture is None and rng.chance(0.4)
    if unnamed_place:
        key = "in the centre"
    words = described(rng, name, picture, size) + ("" if unnamed_place else f" {place(rng, key)}")
    return [_put(canvas, named[0], PLACES[key], SOLO[size] * min(canvas))], words, key


def _count(rng: SeededRandom, canvas: Size, named: list[Named], pool: Sequence[str]) -> Arrangement:
    ((name, picture),) = named
    count, key, size = rng.integer(2, 4), rng.choice(BANDS), rng.choice(("", "", "small"))
    if plural(name) is None or plural(name) in pool:
        return [], "", ""
    words = f"{described(rng, name, picture, size, count)} {place(rng, key)}"
    return _copies(canvas, named[0], key, TOGETHER[size], count), words, key


def _relation(rng: SeededRandom, canvas: Size, named: list[Named], pool: Sequence[str]) -> Arrangement:
    first, second = named
    words, axis, sign = rng.choice(
        (
            ("left of", 0, -1),
            ("to the left of", 0, -1),
            ("right of", 0, 1),
            ("to the right of", 0, 1),
            ("above", 1, -1),
            ("over", 1, -1),
            ("below", 1, 1),
            ("under", 1, 1),
        )
    )
    centres = [[0.5, 0.5], [0.5, 0.5]]
    centres[0][axis] += 0.24 * sign
    centres[1][axis] -= 0.24 * sign
    objects = [_put(canvas, o, (x, y), 0.42 * min(canvas)) for o, (x, y) in zip(named, centres, strict=True)]
    return objects, f"{described(rng, *first)} {words} {described(rng, *second)}", ""


def _places(rng: SeededRandom, canvas: Size, named: list[Named], pool: Sequence[str]) -> Arrangement:
    """Place each object at another place, some small or large, one perhaps several times."""
    keys = rng.sample(tuple(PLACES), len(named))
    several = rng.integer(0, len(named) - 1) if len(named) < 4 and rng.chance(0.4) else -1
    scales = PAIR if len(named) == 2 else TOGETHER
    objects: list[PlacedObject] = []
    words = []
    for i, (item, key) in enumerate(zip(named, keys, strict=True)):
        size = rng.choice(("", "", "small", "large")) if len(named) < 4 else ""
        count = 1
        if i == several:
            if key not in BANDS or plural(item[0]) is None or plural(item[0]) in pool:
                return [], "", ""
            size, count = "small", rng.integer(2, 3)
            objects += _copies(canvas, item, key, scales[size], count)
        else:
            objects.append(_put(canvas, item, PLACES[key], scales[size] * min(canvas)))
        words.append(f"{described(rng, *item, size, count)} {place(rng, key)}")
    return objects, listed(words), ""


def _between(rng: SeededRandom, canvas: Size, named: list[Named], pool: Sequence[str]) -> Arrangement:
    axis = rng.integer(0, 1)
    sides = (("on the left", "on the right"), ("at the top", "at the bottom"))[axis]
    objects = []
    for item, at in zip(named, (0.5, 0.18, 0.82), strict=True):
        centre = (at, 0.5) if axis == 0 else (0.5, at)
        objects.append(_put(canvas, item, centre, TOGETHER[""] * min(canvas)))
    first, second, third = (described(rng, *item) for item in named)
    return objects, f"{first} between {second} {sides[0]} and {third} {sides[1]}", ""


def _corner(rng: SeededRandom, canvas: Size, named: list[Named], pool: Sequence[str]) -> Arrangement:
    """Place the first object beside the second and above or below the third."""
    across, down = rng.choice((("left of", 0.28), ("right of", 0.72))), rng.choice((("above", 0.28), ("below", 0.72)))
    x, y = across[1], down[1]
    centres = ((x, y), (1 - x, y), (x, 1 - y))
    objects = [_put(canvas, t, c, 0.34 * min(canvas)) for t, c in zip(named, centres, strict=True)]
    first, second, third = (described(rng, *item) for item in named)
    return objects, f"{first} {across[0]} {second} and {down[0]} {third}", ""


def _line(rng: SeededRandom, canvas: Size, named: list[Named], pool: Sequence[str]) -> Arrangement:
    """Place the objects in a row or a column."""
    axis, count = rng.integer(0, 1), len(named)
    side = min(0.36 * min(canvas), 0.86 * canvas[axis] / count)
    objects = []
    for i, item in enumerate(named):
        at = (i + 0.5) / count
        objects.append(_put(canvas, item, (at, 0.5) if axis == 0 else (0.5, at), side))
    names = listed([described(rng, *item) for item in named])
    return objects, f"{names} in a {('row from left to right', 'column from top to bottom')[axis]}", ""


Arrange = Callable[[SeededRandom, Size, list[Named], Sequence[str]], Arrangement]
# Arrangements by number of objects; one that is listed twice is drawn twice as often.
ARRANGEMENTS: tuple[tuple[Arrange, ...], ...] = (
    (_place, _place, _count),
    (_relation, _relation, _places),
    (_between, _corner, _line, _places),
    (_line, _places),
    (_line, _places),
)
