"""The tasks of the training data: what is asked, and what the answer shows.

    plan_sample("train", 0, config) -> Plan

By number of pictures K: "generate" for 0; "recolour", "remove", "move", "add", "replace_background" for 1; "compose",
"add", "replace_background" for 2; "compose" for 3 to 6, whose last picture gives the background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from uniref_fast.scenes.backgrounds import COLOURS, KINDS, NAMED
from uniref_fast.scenes.placement import SOLO, arrange, fits, middle, portrait, seat, source, stepped
from uniref_fast.scenes.render import recolours_visibly
from uniref_fast.scenes.specs import (
    MULTIPLE,
    SPLITS,
    STEP,
    Ground,
    MakeConfig,
    Picture,
    Plan,
    Thing,
    combinations,
    held_out,
)
from uniref_fast.scenes.words import PLACES, Draw, a, described, place

__all__ = ["NAMES", "TASKS", "plan_sample", "tasks_of"]

Size = tuple[int, int]
ATTEMPTS = 20_000  # one combination in ten is held out, so a few dozen are what it takes


def plan_sample(split: str, index: int, config: MakeConfig) -> Plan:
    """The plan of sample `index` of a split; it follows from the arguments alone.

    Raises ValueError for an unknown split or a negative index.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(f"no sample {index} of {split!r}; splits are {', '.join(SPLITS)}, indices 0, 1, ...")
    seeds = config.seed, SPLITS.index(split), index
    count = Draw(*seeds).of(config.references)
    names = config.objects(split)
    for attempt in range(ATTEMPTS):
        # The task stays for long: otherwise those that fit more easily would be more frequent.
        task = Draw(*seeds, 0, attempt // 1000).of(tasks_of(count, config))
        draw = Draw(*seeds, 1, attempt)
        plan = task(draw, config, names, count)
        if plan is None:
            continue
        held = any(held_out(config.seed, key) for key in plan.combinations)
        if split == "heldout_objects" or held == (split == "heldout_combinations"):
            return plan
    raise RuntimeError(f"no plan for sample {index} of {split} in {ATTEMPTS} attempts; try another seed")


def tasks_of(count: int, config: MakeConfig) -> tuple[Task, ...]:
    """The tasks that a sample of `count` pictures may have, as often as they are drawn.

    Raises ValueError where `config.tasks` leaves none.
    """
    tasks = TASKS[min(count, 3)]
    if config.pictures == "simple" and count == 1:  # what is only named must be known
        tasks = tuple(task for task in tasks if task is not _add)
    if config.tasks is None:
        return tasks
    by_name = {_name(task): task for task in tasks}
    chosen = tuple(by_name[name] for name in config.tasks if name in by_name)
    if unknown := [name for name in config.tasks if name not in NAMES]:
        raise ValueError(f"no task {', '.join(map(repr, unknown))}; there are: {', '.join(NAMES)}")
    if not chosen:
        raise ValueError(
            f"with {count} pictures{' (simple ones)' if config.pictures == 'simple' else ''} the tasks are "
            f"{', '.join(by_name)}; got {', '.join(config.tasks) or 'none'}"
        )
    return chosen


def _name(task: Task) -> str:
    return task.__name__.removeprefix("_")


# --- parts ------------------------------------------------------------------------------------------------------------


def _names(draw: Draw, pool: Sequence[str], count: int) -> list[str]:
    """Different names, none of which is made of words of another ("mouse" and "mouse face")."""
    names: list[str] = []
    while len(names) < count:
        name = draw.of(pool)
        words = set(name.split())
        if not any(words <= set(other.split()) or words >= set(other.split()) for other in names):
            names.append(name)
    return names


def _ground(draw: Draw) -> Ground:
    return Ground(draw.of(KINDS), draw.integer(0, 2**31 - 1))


def _named_ground(draw: Draw) -> tuple[Ground, str]:
    """A background that words ask for, and the words: "blue checker", "plain blue"."""
    kind, colour = draw.of(tuple(NAMED)), draw.of(tuple(COLOURS))
    words = f"plain {colour}" if kind == "plain" else f"{colour} {NAMED[kind]}"
    return Ground(kind, colour=colour), words


def _first_picture(draw: Draw, target: Size, things: Sequence[Thing], equal: bool) -> Picture:
    """The picture an edit starts from: as large as the target, or half as large again where the sides allow it."""
    if draw.chance(0.25) and not equal and all(side % (2 * MULTIPLE) == 0 for side in target):
        size = target[0] * 3 // 2, target[1] * 3 // 2
        scaled = [
            replace(thing, corner=(thing.corner[0] * 3 // 2, thing.corner[1] * 3 // 2), side=thing.side * 3 // 2)
            for thing in things
        ]
        return Picture(size, _ground(draw), tuple(scaled))
    return Picture(target, _ground(draw), tuple(things))


def _edit(
    draw: Draw, config: MakeConfig, task: str, text: str, source: Sequence[Thing], target: Picture, key: str, more=()
) -> Plan | None:
    """The plan of an edit of picture 1, or None when things would overlap; `key` is its single-object combination."""
    if not fits(source, target.size) or not fits(target.things, target.size):
        return None
    before = [replace(thing, picture=None) for thing in source]
    pictures = (_first_picture(draw, target.size, before, config.pictures == "simple"), *more)
    return Plan(task, text, pictures, target, (*combinations(target.things), key))


def _several(draw: Draw, config: MakeConfig, counts: tuple[int, ...]) -> int:
    """Objects of picture 1, of which the first is meant: with others beside it, its name must be known."""
    count = draw.of(counts)
    return 1 if config.pictures == "simple" else count


def _of_picture(draw: Draw) -> str:
    return draw.of(("", "", " of picture 1", " in picture 1"))


# --- K = 0 ------------------------------------------------------------------------------------------------------------


def _generate(draw: Draw, config: MakeConfig, pool: Sequence[str], count: int) -> Plan | None:
    size = draw.of(config.target_sizes)
    names = _names(draw, pool, draw.of((1, 1, 1, 2, 2, 3)))
    ground, words = _named_ground(draw)
    made = arrange(draw, size, names, [None] * len(names), pool)
    if made is None:
        return None
    things, body, where = made
    background = f"{a(words)} background"
    text = draw.of(
        (
            f"{body} on {background}",
            f"draw {body} on {background}",
            f"a picture of {body} on {background}",
            f"{background} with {body}",
        )
    )
    keys = combinations(things) if len(names) > 1 else (f"{names[0]}|generate|{where}",)
    return Plan("generate", text, (), Picture(size, ground, tuple(things)), keys)


# --- K = 1 ------------------------------------------------------------------------------------------------------------


def _recolour(draw: Draw, config: MakeConfig, pool: Sequence[str], count: int) -> Plan | None:
    size = draw.of(config.target_sizes)
    things, _ = source(draw, size, _names(draw, pool, _several(draw, config, (1, 1, 2))))
    name, colour = things[0].name, draw.of(tuple(COLOURS))
    if set(name.split()) & set(COLOURS):
        return None  # what is a "blue heart" after it?
    if not recolours_visibly(config.artworks.image(name), colour):
        return None
    where = _of_picture(draw)
    text = draw.of(
        (
            f"make the {name}{where} {colour}",
            f"turn the {name}{where} {colour}",
            f"recolour the {name}{where} {colour}",
            f"change the colour of the {name}{where} to {colour}",
        )
    )
    after = replace(things[0], colour=colour), *things[1:]
    return _edit(draw, config, "recolour", text, things, Picture(size, 1, after), f"{name}|recolour|{colour}")


def _remove(draw: Draw, config: MakeConfig, pool: Sequence[str], count: int) -> Plan | None:
    size = draw.of(config.target_sizes)
    things, places = source(draw, size, _names(draw, pool, _several(draw, config, (1, 2, 2, 3))))
    name, where = things[0].name, _of_picture(draw)
    text = draw.of(
        (
            f"remove the {name}{where}",
            f"erase the {name}{where}",
            f"take away the {name}{where}",
            f"delete the {name}{where} and keep everything else",
        )
    )
    key = f"{name}|remove|{places[0]}"
    return _edit(draw, config, "remove", text, things, Picture(size, 1, tuple(things[1:])), key)


def _move(draw: Draw, config: MakeConfig, pool: Sequence[str], count: int) -> Plan | None:
    size = draw.of(config.target_sizes)
    things, places = source(draw, size, _names(draw, pool, _several(draw, config, (1, 1, 2))))
    name, to = things[0].name, draw.of([key for key in PLACES if key != places[0]])
    where = _of_picture(draw)
    text = draw.of(
        (
            f"move the {name}{where} {place(draw, to, movement=True)}",
            f"move the {name}{where} so that it is {place(draw, to)}",
            f"shift the {name}{where} {place(draw, to, movement=True)}",
            f"put the {name}{where} {place(draw, to)} instead",
        )
    )
    moved = replace(seat(size, name, PLACES[to], things[0].side), picture=1)
    if config.pictures == "simple":
        moved = stepped(moved, things[0].corner, size)
    after = moved, *things[1:]
    return _edit(draw, config, "move", text, things, Picture(size, 1, after), f"{name}|move|{to}")


def _add(draw: Draw, config: MakeConfig, pool: Sequence[str], count: int) -> Plan | None:
    """An object that is only named (one picture), or that picture 2 shows."""
    size = draw.of(config.target_sizes)
    new, *names = _names(draw, pool, draw.of((2, 2, 3)))
    things, places = source(draw, size, names)
    to = draw.of([key for key in PLACES if key not in places])
    big = draw.of(("", "", "small", "large"))
    at = place(draw, to)
    picture = None if count == 1 else 2
    what = described(draw, new, picture, big)
    side = round(SOLO[big] * 0.8 * min(size))  # beside others
    added = replace(seat(size, new, PLACES[to], side), picture=picture)
    if config.pictures == "simple":
        added = stepped(added, middle(size, side), size)
    if count == 1:
        text = draw.of((f"add {what} {at}", f"put {what} {at} of picture 1", f"add {what} {at} of picture 1"))
        more: tuple[Picture, ...] = ()
    else:
        text = draw.of(
            (f"add {what} to picture 1, {at}", f"put {what} {at} of picture 1", f"place {what} into picture 1, {at}")
        )
        shown = side if config.pictures == "simple" else None
        more = (portrait(draw, draw.of(config.reference_sizes(size)), [new], _ground(draw), shown),)
    after = *things, added
    return _edit(draw, config, "add", text, things, Picture(size, 1, after), f"{new}|add|{to}", more)


def _replace_background(draw: Draw, config: MakeConfig, pool: Sequence[str], count: int) -> Plan | None:
    size = draw.of(config.target_sizes)
    things, places = source(draw, size, _names(draw, pool, draw.of((1, 1, 2))))
    name = things[0].name
    if count == 1:
        ground, words = _named_ground(draw)
        text = draw.of(
            (
                f"replace the background with {a(words)} background",
                f"change the background of picture 1 to {words}",
                f"put {'everything' if len(things) > 1 else f'the {name}'} of picture 1 on {a(words)} background",
                f"give picture 1 {a(words)} background",
            )
        )
        target, key = Picture(size, ground, tuple(things)), f"{name}|replace_background|{ground.colour}"
        return _edit(draw, config, "replace_background", text, things, target, key)
    text = draw.of(
        (
            "replace the background of picture 1 with the background of picture 2",
            "give picture 1 the background of picture 2",
            "use picture 2 as the background of picture 1",
            "keep everything of picture 1 where it is and change its background to that of picture 2",
        )
    )
    more = (Picture(draw.of(config.reference_sizes(size)), _ground(draw)),)
    key = f"{name}|replace_background|{places[0]}"
    return _edit(draw, config, "replace_background", text, things, Picture(size, 2, tuple(things)), key, more)


# --- K = 2 .. 6 -------------------------------------------------------------------------------------------------------


def _compose(draw: Draw, config: MakeConfig, pool: Sequence[str], count: int) -> Plan | None:
    size = draw.of(config.target_sizes)
    shown = count - 1
    simple = config.pictures == "simple"
    spare = draw.chance(0.25) and not simple  # one more object beside that of a picture, so that names must be read
    names = _names(draw, pool, shown + spare)
    beside = draw.integer(0, shown - 1) if spare else -1
    used = list(range(shown))
    if shown > 1 and draw.chance(0.2) and not simple:  # a picture that the instruction does not mention
        used.remove(draw.of(used))
    used = used if simple else draw.some(used, len(used))

    made = arrange(draw, size, [names[i] for i in used], [i + 1 for i in used], pool, copies=not simple)
    if made is None:
        return None
    things, body, where = made
    if simple:
        whole = (thing.side - thing.side % (STEP // 2) for thing in things)  # so that neighbours fit side by side
        things = [
            stepped(replace(thing, side=side), middle(size, side), size)
            for thing, side in zip(things, whole, strict=True)
        ]
        if not fits(things, size):
            return None
    sides = {thing.picture: thing.side for thing in things} if simple else {}
    background = f"{draw.of(('the background of', 'the background from'))} picture {count}"
    text = draw.of(
        (
            f"put {body} on {background}",
            f"place {body} on {background}",
            f"on {background}, put {body}",
            f"with {background}, show {body}",
            f"combine the pictures: {body} on {background}",
        )
    )
    keys = combinations(things) if len(used) > 1 else (f"{names[used[0]]}|compose|{where}",)
    sizes = draw.some(config.reference_sizes(size), count)
    if draw.chance(0.5) and size not in sizes:
        sizes[-1] = size  # else it is cropped to the target's aspect ratio
    pictures = [
        portrait(
            draw, sizes[i], [names[i], *names[shown:]] if i == beside else [names[i]], _ground(draw), sides.get(i + 1)
        )
        for i in range(shown)
    ]
    return Plan(
        "compose", text, (*pictures, Picture(sizes[-1], _ground(draw))), Picture(size, count, tuple(things)), keys
    )


Task = Callable[[Draw, MakeConfig, Sequence[str], int], "Plan | None"]
# By number of pictures; the last entry serves 3 to 6. A task that stands there twice is drawn twice as often.
TASKS: tuple[tuple[Task, ...], ...] = (
    (_generate,),
    (_recolour, _remove, _move, _add, _replace_background),
    (_compose, _compose, _add, _replace_background),
    (_compose,),
)
NAMES = tuple(dict.fromkeys(_name(task) for tasks in TASKS for task in tasks))
