"""Where things go: arrangements of objects on a canvas, with the words that say them.

Every function places squares inside the canvas; whether they overlap is asked of `fits` afterwards. Scales are a
square's side as a fraction of the canvas's shorter side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from uniref_fast.scenes.specs import STEP, Ground, Picture, Thing, overlapping
from uniref_fast.scenes.words import PLACES, Draw, described, listed, place, plural

__all__ = ["SOLO", "arrange", "fits", "middle", "portrait", "seat", "source", "stepped"]

Size = tuple[int, int]

# What "small", "large" and neither mean: for one object, for one of two, and for one of more.
SOLO = {"small": 0.26, "": 0.44, "large": 0.6}
PAIR = {"small": 0.2, "": 0.36, "large": 0.48}
TOGETHER = {"small": 0.2, "": 0.27, "large": 0.42}
BANDS = (
    "at the top",
    "on the left",
    "in the centre",
    "on the right",
    "at the bottom",
)  # where copies stand side by side


def seat(canvas: Size, name: str, centre: tuple[float, float], side: int) -> Thing:
    """A thing of `side` pixels as near to a centre, in fractions of the canvas, as it fits with a small margin."""
    margin = round(0.03 * min(canvas))
    left, top = (
        max(margin, min(extent - side - margin, round(at * extent - side / 2)))
        for at, extent in zip(centre, canvas, strict=True)
    )
    return Thing(name, (left, top), side)


def fits(things: Sequence[Thing], canvas: Size) -> bool:
    """Whether all are inside the canvas and no two overlap."""
    inside = all(
        corner >= 0 and corner + thing.side <= extent
        for thing in things
        for corner, extent in zip(thing.corner, canvas, strict=True)
    )
    return inside and not overlapping(things)


def middle(size: Size, side: int) -> tuple[int, int]:
    """The corner of a square of that side in the middle of a canvas."""
    return (size[0] - side) // 2, (size[1] - side) // 2


def stepped(thing: Thing, start: tuple[int, int], canvas: Size) -> Thing:
    """A thing as near to where it is as whole steps from a corner `start` of its square lead, inside the canvas."""
    corner = []
    for at, begin, extent in zip(thing.corner, start, canvas, strict=True):
        places = range(begin % STEP, extent - thing.side + 1, STEP)
        corner.append(min(places, key=lambda place: abs(place - at)) if places else at)
    return replace(thing, corner=(corner[0], corner[1]))


def portrait(draw: Draw, size: Size, names: Sequence[str], ground: Ground, side: int | None = None) -> Picture:
    """A picture that shows one object large, or two side by side along its longer side; one of a given side in the
    middle."""
    if side is not None:
        return Picture(size, ground, (Thing(names[0], middle(size, side), side),))
    if len(names) == 1:
        side = round(draw.uniform(0.62, 0.86) * min(size))
        centre = draw.uniform(0.42, 0.58), draw.uniform(0.42, 0.58)
        return Picture(size, ground, (seat(size, names[0], centre, side),))
    side = round(min(0.44 * max(size), 0.8 * min(size)))
    centres = ((0.26, 0.5), (0.74, 0.5)) if size[0] >= size[1] else ((0.5, 0.26), (0.5, 0.74))
    order = draw.some(names, 2)
    return Picture(size, ground, tuple(seat(size, n, c, side) for n, c in zip(order, centres, strict=True)))


def source(draw: Draw, canvas: Size, names: Sequence[str]) -> tuple[list[Thing], list[str]]:
    """Objects at different places of picture 1, each of its own size, and the places; they may overlap."""
    places = draw.some(tuple(PLACES), len(names))
    low, high = (0.34, 0.5) if len(names) == 1 else (0.26, 0.38)
    things = [
        replace(seat(canvas, name, PLACES[key], round(draw.uniform(low, high) * min(canvas))), picture=1)
        for name, key in zip(names, places, strict=True)
    ]
    return things, places


def arrange(
    draw: Draw,
    canvas: Size,
    names: Sequence[str],
    pictures: Sequence[int | None],
    pool: Sequence[str],
    copies: bool = True,
) -> tuple[list[Thing], str, str] | None:
    """Things on a canvas and the words for it, in a way drawn among those for so many objects.

    Args:
        names: of one to five different objects.
        pictures: where each comes from, or None.
        pool: all names, so that a plural is not the name of something else.
        copies: some objects may come several times.

    Returns:
        The things, the words, and the place of a single object ("" for several); None when things would overlap.
    """
    ways = WAYS[len(names) - 1]
    things, words, where = draw.of(ways)(draw, canvas, list(zip(names, pictures, strict=True)), pool)
    if not things or not fits(things, canvas) or (len(things) > len(names) and not copies):
        return None
    return things, words, where


# --- ways: (draw, canvas, objects, pool) -> things, words, place; no things where it cannot be said -------------------

Objects = list[tuple[str, "int | None"]]
Made = tuple[list[Thing], str, str]


def _put(canvas: Size, thing: tuple[str, int | None], centre: tuple[float, float], side: float) -> Thing:
    return replace(seat(canvas, thing[0], centre, int(side)), picture=thing[1])


def _copies(canvas: Size, thing: tuple[str, int | None], key: str, scale: float, count: int) -> list[Thing]:
    """Copies side by side around a place of `BANDS`: one above the other on the left and right."""
    axis = 1 if key in ("on the left", "on the right") else 0
    side = int(min(scale * min(canvas), 0.88 * canvas[axis] / count))
    step = min(1.15 * side, 0.94 * canvas[axis] / count) / canvas[axis]
    centres = []
    for i in range(count):
        centre = list(PLACES[key])
        centre[axis] = 0.5 + (i - (count - 1) / 2) * step
        centres.append((centre[0], centre[1]))
    return [_put(canvas, thing, centre, side) for centre in centres]


def _place(draw: Draw, canvas: Size, objects: Objects, pool: Sequence[str]) -> Made:
    ((name, picture),) = objects
    size, key = draw.of(("", "", "small", "large")), draw.of(tuple(PLACES))
    unsaid = picture is None and draw.chance(0.4)
    if unsaid:
        key = "in the centre"
    words = described(draw, name, picture, size) + ("" if unsaid else f" {place(draw, key)}")
    return [_put(canvas, objects[0], PLACES[key], SOLO[size] * min(canvas))], words, key


def _count(draw: Draw, canvas: Size, objects: Objects, pool: Sequence[str]) -> Made:
    ((name, picture),) = objects
    count, key, size = draw.integer(2, 4), draw.of(BANDS), draw.of(("", "", "small"))
    if plural(name) is None or plural(name) in pool:
        return [], "", ""
    words = f"{described(draw, name, picture, size, count)} {place(draw, key)}"
    return _copies(canvas, objects[0], key, TOGETHER[size], count), words, key


def _relation(draw: Draw, canvas: Size, objects: Objects, pool: Sequence[str]) -> Made:
    first, second = objects
    words, axis, sign = draw.of(
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
    things = [_put(canvas, o, (x, y), 0.42 * min(canvas)) for o, (x, y) in zip(objects, centres, strict=True)]
    return things, f"{described(draw, *first)} {words} {described(draw, *second)}", ""


def _places(draw: Draw, canvas: Size, objects: Objects, pool: Sequence[str]) -> Made:
    """Each at a place of its own, some small or large, one perhaps several times."""
    keys = draw.some(tuple(PLACES), len(objects))
    several = draw.integer(0, len(objects) - 1) if len(objects) < 4 and draw.chance(0.4) else -1
    scales = PAIR if len(objects) == 2 else TOGETHER
    things: list[Thing] = []
    words = []
    for i, (thing, key) in enumerate(zip(objects, keys, strict=True)):
        size = draw.of(("", "", "small", "large")) if len(objects) < 4 else ""
        count = 1
        if i == several:
            if key not in BANDS or plural(thing[0]) is None or plural(thing[0]) in pool:
                return [], "", ""
            size, count = "small", draw.integer(2, 3)
            things += _copies(canvas, thing, key, scales[size], count)
        else:
            things.append(_put(canvas, thing, PLACES[key], scales[size] * min(canvas)))
        words.append(f"{described(draw, *thing, size, count)} {place(draw, key)}")
    return things, listed(words), ""


def _between(draw: Draw, canvas: Size, objects: Objects, pool: Sequence[str]) -> Made:
    axis = draw.integer(0, 1)
    said = (("on the left", "on the right"), ("at the top", "at the bottom"))[axis]
    things = []
    for thing, at in zip(objects, (0.5, 0.18, 0.82), strict=True):
        centre = (at, 0.5) if axis == 0 else (0.5, at)
        things.append(_put(canvas, thing, centre, TOGETHER[""] * min(canvas)))
    first, second, third = (described(draw, *thing) for thing in objects)
    return things, f"{first} between {second} {said[0]} and {third} {said[1]}", ""


def _corner(draw: Draw, canvas: Size, objects: Objects, pool: Sequence[str]) -> Made:
    """The first beside the second and above or below the third."""
    across, down = draw.of((("left of", 0.28), ("right of", 0.72))), draw.of((("above", 0.28), ("below", 0.72)))
    x, y = across[1], down[1]
    centres = ((x, y), (1 - x, y), (x, 1 - y))
    things = [_put(canvas, t, c, 0.34 * min(canvas)) for t, c in zip(objects, centres, strict=True)]
    first, second, third = (described(draw, *thing) for thing in objects)
    return things, f"{first} {across[0]} {second} and {down[0]} {third}", ""


def _line(draw: Draw, canvas: Size, objects: Objects, pool: Sequence[str]) -> Made:
    """A row or a column."""
    axis, count = draw.integer(0, 1), len(objects)
    side = min(0.36 * min(canvas), 0.86 * canvas[axis] / count)
    things = []
    for i, thing in enumerate(objects):
        at = (i + 0.5) / count
        things.append(_put(canvas, thing, (at, 0.5) if axis == 0 else (0.5, at), side))
    names = listed([described(draw, *thing) for thing in objects])
    return things, f"{names} in a {('row from left to right', 'column from top to bottom')[axis]}", ""


Way = Callable[[Draw, Size, Objects, Sequence[str]], Made]
# By number of objects.
WAYS: tuple[tuple[Way, ...], ...] = (
    (_place, _place, _count),
    (_relation, _relation, _places),
    (_between, _corner, _line, _places),
    (_line, _places),
    (_line, _places),
)
