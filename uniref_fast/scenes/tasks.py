"""Tasks of synthetic samples: instructions, and the scenes of their references and targets.

    scene_spec("train", 0, config) -> SceneSpec

By number of references K: "generate" for 0; "recolour", "remove", "move", "add", "replace_background" for 1; "compose",
"add", "replace_background" for 2; "compose" for 3 to 6, where the last reference gives the background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from uniref_fast.scenes.backgrounds import COLOURS, KINDS, NAMED
from uniref_fast.scenes.config import MULTIPLE, STEP, MakeConfig
from uniref_fast.scenes.placement import SOLO, arrange, edit_source, fits, middle, object_at, portrait, stepped
from uniref_fast.scenes.render import SceneSpec, recolours_visibly
from uniref_fast.scenes.scene import Background, PlacedObject, Scene, SceneImage
from uniref_fast.scenes.splits import SPLITS, combinations, held_out
from uniref_fast.scenes.words import PLACES, SeededRandom, a, described, place

__all__ = ["NAMES", "TASKS", "scene_spec", "tasks_of"]

Size = tuple[int, int]  # (width, height) in pixels
ATTEMPTS = 20_000  # one combination in ten is held out, so that a few dozen attempts are usual


def scene_spec(split: str, index: int, config: MakeConfig) -> SceneSpec:
    """Return the description of sample `index` of a split; equal arguments give an equal result.

    Raises:
        ValueError: The split is unknown, or the index is negative.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(
            f"there is no sample {index} of split {split!r}: splits are {', '.join(SPLITS)}, indices are 0, 1, ..."
        )
    seeds = config.seed, SPLITS.index(split), index
    count = SeededRandom(*seeds).choice(config.references)
    names = config.objects(split)
    for attempt in range(ATTEMPTS):
        # The task is kept for 1000 attempts: otherwise tasks that succeed more easily would be more frequent.
        task = SeededRandom(*seeds, 0, attempt // 1000).choice(tasks_of(count, config))
        spec = task(SeededRandom(*seeds, 1, attempt), config, names, count)
        if spec is None:
            continue
        held = any(held_out(config.seed, key) for key in spec.scene.combinations)
        if split == "heldout_objects" or held == (split == "heldout_combinations"):
            return spec
    raise RuntimeError(f"no scene was found for sample {index} of {split} in {ATTEMPTS} attempts; use another seed")


def tasks_of(count: int, config: MakeConfig) -> tuple[Task, ...]:
    """Return the tasks that a sample with `count` references may have, each as often as it is drawn.

    Raises:
        ValueError: `config.tasks` has an unknown task, or none for this number of references.
    """
    tasks = TASKS[min(count, 3)]
    if config.pictures == "simple" and count == 1:  # the model would have to know the name of the added object
        tasks = tuple(task for task in tasks if task is not _add)
    if config.tasks is None:
        return tasks
    by_name = {_name(task): task for task in tasks}
    chosen = tuple(by_name[name] for name in config.tasks if name in by_name)
    if unknown := [name for name in config.tasks if name not in NAMES]:
        raise ValueError(f"unknown task {', '.join(map(repr, unknown))}; tasks are: {', '.join(NAMES)}")
    if not chosen:
        raise ValueError(
            f"with {count} pictures{' (simple ones)' if config.pictures == 'simple' else ''} the tasks are "
            f"{', '.join(by_name)}; got {', '.join(config.tasks) or 'none'}"
        )
    return chosen


def _name(task: Task) -> str:
    return task.__name__.removeprefix("_")


# --- parts ------------------------------------------------------------------------------------------------------------


def _names(rng: SeededRandom, pool: Sequence[str], count: int) -> list[str]:
    """Draw different names, none of which consists of words of another ("mouse" and "mouse face")."""
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(pool)
        words = set(name.split())
        if not any(words <= set(other.split()) or words >= set(other.split()) for other in names):
            names.append(name)
    return names


def _ground(rng: SeededRandom) -> Background:
    return Background(rng.choice(KINDS), rng.integer(0, 2**31 - 1))


def _named_ground(rng: SeededRandom) -> tuple[Background, str]:
    """Draw a background that words can describe, and the words, such as "blue checker" or "plain blue"."""
    kind, colour = rng.choice(tuple(NAMED)), rng.choice(tuple(COLOURS))
    words = f"plain {colour}" if kind == "plain" else f"{colour} {NAMED[kind]}"
    return Background(kind, colour=colour), words


def _first_picture(rng: SeededRandom, target: Size, objects: Sequence[PlacedObject], equal: bool) -> SceneImage:
    """Return the reference that an edit starts from: as large as the target, or 1.5 times if its sides allow it."""
    if rng.chance(0.25) and not equal and all(side % (2 * MULTIPLE) == 0 for side in target):
        size = target[0] * 3 // 2, target[1] * 3 // 2
        objects = [
            placed.moved((placed.corner[0] * 3 // 2, placed.corner[1] * 3 // 2), int(placed.side) * 3 // 2)
            for placed in objects
        ]
        return SceneImage(size, _ground(rng), tuple(objects))
    return SceneImage(target, _ground(rng), tuple(objects))


def _edit(
    rng: SeededRandom,
    config: MakeConfig,
    task: str,
    instruction: str,
    size: Size,
    before: Sequence[PlacedObject],
    after: Sequence[PlacedObject],
    key: str,
    ground: Background | int = 1,
    more: tuple[SceneImage, ...] = (),
) -> SceneSpec | None:
    """Return the sample of an edit of picture 1, or None if objects would overlap.

    Args:
        size: Size of the target.
        before: Objects of picture 1, at the size of the target.
        after: Objects of the target.
        key: Combination of the edited object alone, see `splits`.
        ground: Background of the target, or the number of the reference that gives it.
        more: References that follow picture 1.
    """
    if not fits(before, size) or not fits(after, size):
        return None
    shown = [replace(placed, picture=None) for placed in before]
    references = (_first_picture(rng, size, shown, config.pictures == "simple"), *more)
    if isinstance(ground, int):
        ground = Background.of_picture(ground, references[ground - 1].size, size)
    scene = Scene(size, ground, tuple(after), (*combinations(after), key), references)
    return SceneSpec(task, instruction, scene)


def _several(rng: SeededRandom, config: MakeConfig, counts: tuple[int, ...]) -> int:
    """Draw the number of objects of picture 1; simple pictures have one, so that no name has to be known."""
    count = rng.choice(counts)
    return 1 if config.pictures == "simple" else count


def _of_picture(rng: SeededRandom) -> str:
    return rng.choice(("", "", " of picture 1", " in picture 1"))


# --- K = 0 ------------------------------------------------------------------------------------------------------------


def _generate(rng: SeededRandom, config: MakeConfig, pool: Sequence[str], count: int) -> SceneSpec | None:
    size = rng.choice(config.target_sizes)
    names = _names(rng, pool, rng.choice((1, 1, 1, 2, 2, 3)))
    ground, words = _named_ground(rng)
    arrangement = arrange(rng, size, names, [None] * len(names), pool)
    if arrangement is None:
        return None
    objects, body, where = arrangement
    background = f"{a(words)} background"
    text = rng.choice(
        (
            f"{body} on {background}",
            f"draw {body} on {background}",
            f"a picture of {body} on {background}",
            f"{background} with {body}",
        )
    )
    keys = combinations(objects) if len(names) > 1 else (f"{names[0]}|generate|{where}",)
    return SceneSpec("generate", text, Scene(size, ground, tuple(objects), keys, ()))


# --- K = 1 ------------------------------------------------------------------------------------------------------------


def _recolour(rng: SeededRandom, config: MakeConfig, pool: Sequence[str], count: int) -> SceneSpec | None:
    size = rng.choice(config.target_sizes)
    objects, _ = edit_source(rng, size, _names(rng, pool, _several(rng, config, (1, 1, 2))))
    name, colour = objects[0].name, rng.choice(tuple(COLOURS))
    if set(name.split()) & set(COLOURS):
        return None  # a recoloured "blue heart" would have a wrong name
    if not recolours_visibly(config.artworks.image(name), colour):
        return None
    where = _of_picture(rng)
    text = rng.choice(
        (
            f"make the {name}{where} {colour}",
            f"turn the {name}{where} {colour}",
            f"recolour the {name}{where} {colour}",
            f"change the colour of the {name}{where} to {colour}",
        )
    )
    after = replace(objects[0], colour=colour), *objects[1:]
    return _edit(rng, config, "recolour", text, size, objects, after, f"{name}|recolour|{colour}")


def _remove(rng: SeededRandom, config: MakeConfig, pool: Sequence[str], count: int) -> SceneSpec | None:
    size = rng.choice(config.target_sizes)
    objects, places = edit_source(rng, size, _names(rng, pool, _several(rng, config, (1, 2, 2, 3))))
    name, where = objects[0].name, _of_picture(rng)
    text = rng.choice(
        (
            f"remove the {name}{where}",
            f"erase the {name}{where}",
            f"take away the {name}{where}",
            f"delete the {name}{where} and keep everything else",
        )
    )
    key = f"{name}|remove|{places[0]}"
    return _edit(rng, config, "remove", text, size, objects, objects[1:], key)


def _move(rng: SeededRandom, config: MakeConfig, pool: Sequence[str], count: int) -> SceneSpec | None:
    size = rng.choice(config.target_sizes)
    objects, places = edit_source(rng, size, _names(rng, pool, _several(rng, config, (1, 1, 2))))
    name, to = objects[0].name, rng.choice([key for key in PLACES if key != places[0]])
    where = _of_picture(rng)
    text = rng.choice(
        (
            f"move the {name}{where} {place(rng, to, movement=True)}",
            f"move the {name}{where} so that it is {place(rng, to)}",
            f"shift the {name}{where} {place(rng, to, movement=True)}",
            f"put the {name}{where} {place(rng, to)} instead",
        )
    )
    moved = replace(object_at(size, name, PLACES[to], int(objects[0].side)), picture=1)
    if config.pictures == "simple":
        moved = stepped(moved, objects[0].corner, size)
    after = moved, *objects[1:]
    return _edit(rng, config, "move", text, size, objects, after, f"{name}|move|{to}")


def _add(rng: SeededRandom, config: MakeConfig, pool: Sequence[str], count: int) -> SceneSpec | None:
    """Add an object that is only named (one reference), or that picture 2 shows."""
    size = rng.choice(config.target_sizes)
    new, *names = _names(rng, pool, rng.choice((2, 2, 3)))
    objects, places = edit_source(rng, size, names)
    to = rng.choice([key for key in PLACES if key not in places])
    big = rng.choice(("", "", "small", "large"))
    at = place(rng, to)
    picture = None if count == 1 else 2
    what = described(rng, new, picture, big)
    side = round(SOLO[big] * 0.8 * min(size))  # smaller, since other objects are beside it
    added = replace(object_at(size, new, PLACES[to], side), picture=picture)
    if config.pictures == "simple":
        added = stepped(added, middle(size, side), size)
    if count == 1:
        text = rng.choice((f"add {what} {at}", f"put {what} {at} of picture 1", f"add {what} {at} of picture 1"))
        more: tuple[SceneImage, ...] = ()
    else:
        text = rng.choice(
            (f"add {what} to picture 1, {at}", f"put {what} {at} of picture 1", f"place {what} into picture 1, {at}")
        )
        shown = side if config.pictures == "simple" else None
        more = (portrait(rng, rng.choice(config.reference_sizes(size)), [new], _ground(rng), shown),)
    after = *objects, added
    return _edit(rng, config, "add", text, size, objects, after, f"{new}|add|{to}", more=more)


def _replace_background(rng: SeededRandom, config: MakeConfig, pool: Sequence[str], count: int) -> SceneSpec | None:
    size = rng.choice(config.target_sizes)
    objects, places = edit_source(rng, size, _names(rng, pool, rng.choice((1, 1, 2))))
    name = objects[0].name
    if count == 1:
        ground, words = _named_ground(rng)
        text = rng.choice(
            (
                f"replace the background with {a(words)} background",
                f"change the background of picture 1 to {words}",
                f"put {'everything' if len(objects) > 1 else f'the {name}'} of picture 1 on {a(words)} background",
                f"give picture 1 {a(words)} background",
            )
        )
        key = f"{name}|replace_background|{ground.colour}"
        return _edit(rng, config, "replace_background", text, size, objects, objects, key, ground)
    text = rng.choice(
        (
            "replace the background of picture 1 with the background of picture 2",
            "give picture 1 the background of picture 2",
            "use picture 2 as the background of picture 1",
            "keep everything of picture 1 where it is and change its background to that of picture 2",
        )
    )
    more = (SceneImage(rng.choice(config.reference_sizes(size)), _ground(rng), ()),)
    key = f"{name}|replace_background|{places[0]}"
    return _edit(rng, config, "replace_background", text, size, objects, objects, key, 2, more)


# --- K = 2 .. 6 -------------------------------------------------------------------------------------------------------


def _compose(rng: SeededRandom, config: MakeConfig, pool: Sequence[str], count: int) -> SceneSpec | None:
    size = rng.choice(config.target_sizes)
    shown = count - 1
    simple = config.pictures == "simple"
    spare = rng.chance(0.25) and not simple  # a second object in one reference, so that the name matters
    names = _names(rng, pool, shown + spare)
    beside = rng.integer(0, shown - 1) if spare else -1
    used = list(range(shown))
    if shown > 1 and rng.chance(0.2) and not simple:  # one reference that the instruction does not mention
        used.remove(rng.choice(used))
    used = used if simple else rng.sample(used, len(used))

    arrangement = arrange(rng, size, [names[i] for i in used], [i + 1 for i in used], pool, copies=not simple)
    if arrangement is None:
        return None
    objects, body, where = arrangement
    if simple:
        whole = (int(placed.side) - int(placed.side) % (STEP // 2) for placed in objects)  # neighbours fit side by side
        objects = [
            stepped(placed.moved(placed.corner, side), middle(size, side), size)
            for placed, side in zip(objects, whole, strict=True)
        ]
        if not fits(objects, size):
            return None
    sides = {placed.picture: int(placed.side) for placed in objects} if simple else {}
    background = f"{rng.choice(('the background of', 'the background from'))} picture {count}"
    text = rng.choice(
        (
            f"put {body} on {background}",
            f"place {body} on {background}",
            f"on {background}, put {body}",
            f"with {background}, show {body}",
            f"combine the pictures: {body} on {background}",
        )
    )
    keys = combinations(objects) if len(used) > 1 else (f"{names[used[0]]}|compose|{where}",)
    sizes = rng.sample(config.reference_sizes(size), count)
    if rng.chance(0.5) and size not in sizes:
        sizes[-1] = size  # otherwise it is cropped to the target's aspect ratio
    pictures = [
        portrait(
            rng, sizes[i], [names[i], *names[shown:]] if i == beside else [names[i]], _ground(rng), sides.get(i + 1)
        )
        for i in range(shown)
    ]
    ground = SceneImage(sizes[-1], _ground(rng), ())
    shown_ground = Background.of_picture(count, ground.size, size)
    return SceneSpec("compose", text, Scene(size, shown_ground, tuple(objects), keys, (*pictures, ground)))


Task = Callable[[SeededRandom, MakeConfig, Sequence[str], int], "SceneSpec | None"]
# Tasks by number of references; the last entry is for 3 to 6. A task that is listed twice is drawn twice as often.
TASKS: tuple[tuple[Task, ...], ...] = (
    (_generate,),
    (_recolour, _remove, _move, _add, _replace_background),
    (_compose, _compose, _add, _replace_background),
    (_compose,),
)
NAMES = tuple(dict.fromkeys(_name(task) for tasks in TASKS for task in tasks))
