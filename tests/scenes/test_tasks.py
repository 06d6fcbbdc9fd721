"""Tasks: the instructions describe what the scenes show."""

import re
from collections import Counter

import numpy as np
import pytest

from uniref_fast.scenes.artworks import artworks
from uniref_fast.scenes.config import STEP, MakeConfig
from uniref_fast.scenes.placement import overlapping
from uniref_fast.scenes.splits import SPLITS
from uniref_fast.scenes.tasks import scene_spec, tasks_of
from uniref_fast.scenes.words import PLACES, plural

CONFIG = MakeConfig(artworks("shipped"))


@pytest.fixture(scope="module")
def specs():
    return {split: [scene_spec(split, i, CONFIG) for i in range(700 if split == "train" else 400)] for split in SPLITS}


def test_tasks_of_the_configuration():
    config = MakeConfig(artworks("shipped"), 64, references=(1, 2), tasks=("move", "move", "compose", "recolour"))
    tasks = Counter(
        (len(spec.scene.references), spec.task_type) for spec in (scene_spec("train", i, config) for i in range(300))
    )
    assert set(tasks) == {(1, "move"), (1, "recolour"), (2, "compose")}
    assert 1.4 < tasks[1, "move"] / tasks[1, "recolour"] < 2.8
    wrong = (("move", "with 2 pictures the tasks are compose, add, replace_background; got move"), ("moove", "'moove'"))
    for name, message in wrong:
        with pytest.raises(ValueError, match=message):
            scene_spec("train", 3, MakeConfig(artworks("shipped"), 64, references=(2,), tasks=(name,)))
    with pytest.raises(ValueError, match="got none"):
        tasks_of(1, MakeConfig(artworks("shipped"), 64, tasks=()))
    with pytest.raises(ValueError, match="simple ones"):
        tasks_of(1, MakeConfig(artworks("shipped"), 64, pictures="simple", tasks=("add",)))


def test_simple_pictures():
    """A reference shows its object alone in the middle; the target shows it at the same size, moved by whole steps."""
    simple = MakeConfig(artworks("shipped"), size=64, references=(1, 2, 3, 4, 5, 6), pictures="simple")
    specs = [scene_spec("train", index, simple) for index in range(300)]
    tasks = {(len(spec.scene.references), spec.task_type) for spec in specs}
    assert {task for k, task in tasks if k == 1} == {"recolour", "remove", "move", "replace_background"}
    assert {task for k, task in tasks if k == 2} == {"compose", "add", "replace_background"}
    moved = 0
    for spec in specs:
        mentioned = [int(n) for n in re.findall(r"picture (\d)", spec.instruction)]
        count = len(spec.scene.references)
        assert count < 3 or mentioned in (list(range(1, count + 1)), [count, *range(1, count)])
        assert len({placed.name for placed in spec.scene.objects}) == len(spec.scene.objects)
        assert {image.size for image in spec.scene.references} == {spec.scene.size} == {(64, 64)}
        for placed in spec.scene.objects:
            source = spec.scene.references[placed.picture - 1].objects
            if any((placed.name, placed.corner) == (other.name, other.corner) for other in source):
                continue
            (whole,) = source
            assert whole.side == placed.side and whole.name == placed.name
            assert all((a - b) % STEP == 0 for a, b in zip(whole.corner, placed.corner, strict=True))
            if spec.task_type != "move":
                assert whole.corner == ((64 - whole.side) // 2,) * 2
            moved += 1
        assert count != 1 or len(spec.scene.references[0].objects) == 1 or spec.task_type == "replace_background"
    assert moved > 200


def test_every_task_and_number_of_pictures_occurs(specs):
    wanted = {("generate", 0)} | {("compose", k) for k in range(2, 7)}
    wanted |= {(task, 1) for task in ("recolour", "remove", "move", "add", "replace_background")}
    wanted |= {("add", 2), ("replace_background", 2)}
    for split in SPLITS:
        seen = Counter((spec.task_type, len(spec.scene.references)) for spec in specs[split])
        assert set(seen) == wanted and min(seen.values()) >= 3
        pictures = Counter(len(spec.scene.references) for spec in specs[split])
        mean = len(specs[split]) / 7
        assert all(0.6 * mean < pictures[count] < 1.6 * mean for count in range(7))
    seeds = [
        reference.background.seed for split in SPLITS for spec in specs[split] for reference in spec.scene.references
    ]
    assert len(set(seeds)) == len(seeds)  # no two samples, of any splits, draw the same
    for index in range(20):
        assert len(scene_spec("train", index, MakeConfig(CONFIG.artworks, references=(2,))).scene.references) == 2


def test_instructions_name_the_pictures_and_vary(specs):
    for spec in specs["train"]:
        numbers = {int(number) for number in re.findall(r"picture (\d)", spec.instruction)}
        assert numbers <= set(range(1, len(spec.scene.references) + 1))
        if spec.task_type == "compose":
            used = {placed.picture for placed in spec.scene.objects}
            assert numbers == used | {len(spec.scene.references)} and spec.scene.background.picture == len(
                spec.scene.references
            )
            for placed in spec.scene.objects:
                assert placed.name in {t.name for t in spec.scene.references[placed.picture - 1].objects}
                words = f"({placed.name}|{plural(placed.name)}) (of|from) picture {placed.picture}"
                assert re.search(words, spec.instruction)
    assert len({spec.instruction for spec in specs["train"]}) > 600


def test_objects_are_inside_and_apart(specs):
    for spec in (spec for split in SPLITS for spec in specs[split]):
        for image in (*spec.scene.references, spec.scene):
            assert not overlapping(image.objects)
            assert all(0 <= t.corner[k] <= image.size[k] - t.side for t in image.objects for k in (0, 1))
            assert all(side % 16 == 0 for side in image.size)
            assert all(placed.side >= 12 for placed in image.objects)
        if spec.task_type == "compose":
            assert len({image.size for image in spec.scene.references}) == len(spec.scene.references)


def test_places_sizes_and_counts_follow_the_instruction(specs):
    numbers = {"two": 2, "three": 3, "four": 4}
    checked = Counter()
    for spec in specs["train"]:
        objects, (width, height) = spec.scene.objects, spec.scene.size
        for number, size in re.findall(r"\b(two|three|four)( small)? \w", spec.instruction):
            most = max(Counter(placed.name for placed in objects).values())
            assert most == numbers[number], spec.instruction
            checked[f"count{size}"] += 1
        (key,) = [k for k in spec.scene.combinations if f"|{spec.task_type}|" in k] or [""]
        name, _, where = key.rpartition("|")
        if where in PLACES and spec.task_type in ("compose", "generate", "add", "move"):
            these = [placed for placed in objects if placed.name == name.split("|")[0]]
            x = np.mean([placed.centre[0] for placed in these]) / width
            y = np.mean([placed.centre[1] for placed in these]) / height
            nearest = min(PLACES, key=lambda p: np.hypot(PLACES[p][0] - x, PLACES[p][1] - y))
            assert nearest == where, (spec.instruction, x, y)
            side = where.split(" the ")[1]
            middle = side == "centre" and ("middle" in spec.instruction or spec.task_type == "generate")
            assert side in spec.instruction or middle
            checked["place"] += 1
        if re.search(r"\b(a|an) large ", spec.instruction) and "small" not in spec.instruction:
            assert max(placed.side for placed in objects) > 0.4 * min(width, height)
            checked["large"] += 1
    assert min(checked[k] for k in ("count", "count small", "place", "large")) >= 8, checked


def test_relations_follow_the_instruction(specs):
    axes = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "over": (1, -1), "below": (1, 1), "under": (1, 1)}
    pattern = re.compile(
        r"the ([a-z ]+?) (?:of|from) picture \d (?:to the )?(left of|right of|above|over|below|under)"
        r" the ([a-z ]+?) (?:of|from)"
    )
    seen = Counter()
    for spec in specs["train"]:
        at = {placed.name: placed.centre for placed in spec.scene.objects}
        for first, relation, second in pattern.findall(spec.instruction):
            axis, sign = axes[relation]
            assert sign * (at[first][axis] - at[second][axis]) > 10, spec.instruction
            seen[relation] += 1
        row = re.search(r"(row from left to right|column from top to bottom)", spec.instruction)
        if row and spec.task_type == "compose":
            said = re.findall(r"the ([a-z ]+?) (?:of|from) picture \d(?:,| and| in a)", spec.instruction)
            centres = [at[name][row[0].startswith("column")] for name in said if name != "background"]
            assert len(said) >= 3 and centres == sorted(centres), spec.instruction
            seen[row[0]] += 1
        between = re.search(
            r"the ([a-z ]+?) (?:of|from) picture \d between the ([a-z ]+?) (?:of|from)", spec.instruction
        )
        if between:
            axis = "at the top" in spec.instruction
            third = next(name for name in at if name not in between.groups())
            assert at[between[2]][axis] < at[between[1]][axis] < at[third][axis]
            seen["between"] += 1
    assert len(seen) == 9 and min(seen.values()) >= 3, seen
