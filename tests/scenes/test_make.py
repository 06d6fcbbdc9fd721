"""Made training data: exact answers, instructions that say what is shown, splits that hold, files that are whole."""

import argparse
import colorsys
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniref_fast.scenes import dataset as made_files
from uniref_fast.scenes import make as make_data
from uniref_fast.scenes import textures as scenes
from uniref_fast.scenes.artworks import Artworks, artworks, unicode_name, usable
from uniref_fast.scenes.backgrounds import COLOURS, KINDS, NAMED, PHOTOS, background, named_background
from uniref_fast.scenes.card import card as card_of
from uniref_fast.scenes.make import MakeConfig, sample
from uniref_fast.scenes.render import crop_box, recolour, recolours_visibly
from uniref_fast.scenes.specs import SPLITS, STEP, Thing, combinations, held_out, overlapping, rounded_size
from uniref_fast.scenes.tasks import plan_sample, tasks_of
from uniref_fast.scenes.words import PLACES, Draw, a, described, place, plural

CONFIG = MakeConfig(artworks("shipped"))
SMALL = MakeConfig(artworks("shipped"), size=64, references=(0, 1, 3))
COUNTS = {"train": 70, "heldout_objects": 5, "heldout_combinations": 3}


@pytest.fixture(scope="module")
def plans():
    return {split: [plan_sample(split, i, CONFIG) for i in range(700 if split == "train" else 400)] for split in SPLITS}


@pytest.fixture(scope="module")
def samples():
    return [sample("train", i, CONFIG) for i in range(150)]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- artworks ---------------------------------------------------------------------------------------------------------


def test_usable_names_what_instructions_can_say():
    for code in (0x1F989, 0x1F451, 0x1F335, 0x2615, 0x1FABC, 0x1F600, 0x1F34E):
        assert usable(code), hex(code)
    left_out = {
        "regional indicator": 0x1F1E6, "skin tone": 0x1F3FB, "hair": 0x1F9B0, "joiner": 0x200D, "keycap": 0x20E3,
        "clock face": 0x1F550, "direction": 0x2B05, "size": 0x1F534, "number": 0x1F495, "writing": 0x1F192,
        "ideograph": 0x3299, "black": 0x260E, "position": 0x1F58A, "rude": 0x1F595, "nameless": 0x1FAFF,
    }  # fmt: skip
    for why, code in left_out.items():
        assert not usable(code), why
    assert unicode_name(0x1FABC) == "jellyfish" and unicode_name(0x1F989) == "owl"
    assert unicode_name(0x1FACD) is None  # Unicode 17: not named by every Python that is supported


def test_later_names_are_those_of_unicode():
    from uniref_fast.scenes.artworks import LATER_NAMES

    known = {code: unicodedata.name(chr(code), "").lower() for code in LATER_NAMES}
    assert all(name in ("", LATER_NAMES[code]) for code, name in known.items())
    assert len(LATER_NAMES) > 60 and len(set(LATER_NAMES.values())) == len(LATER_NAMES)


def test_shipped_pool():
    pool = artworks("shipped")
    assert pool.names == tuple(scenes.artworks()) and pool.font is None
    assert pool.image("owl").tobytes() == scenes.artwork("owl").tobytes()
    with pytest.raises(KeyError, match="unicorn"):
        pool.image("unicorn")
    with pytest.raises(ValueError, match="shipped"):
        artworks("drawn")


def test_without_a_font(monkeypatch):
    def missing():
        raise FileNotFoundError("apt-get install fonts-noto-color-emoji")

    monkeypatch.setattr("uniref_fast.scenes.artworks.find_font", missing)
    assert artworks("auto") == artworks("shipped")
    with pytest.raises(FileNotFoundError, match="apt-get install"):
        artworks("font")


def test_font_pool():
    pytest.importorskip("fontTools")
    try:
        pool = artworks("font")
    except FileNotFoundError:
        pytest.skip("the font is not installed")
    assert 1100 < len(pool.names) < 1400 and list(pool.names) == sorted(pool.names)
    assert pool.font and re.fullmatch(r"[\d.]+", pool.font["version"]) and len(pool.font["sha256"]) == 64
    assert set(scenes.artworks()) <= set(pool.names) and artworks("auto") == pool
    for name in pool.names[::60]:
        image = pool.image(name)
        assert (image.mode, image.size) == ("RGBA", (128, 128)) and np.asarray(image)[..., 3].max() > 200
    made = sample("train", 0, MakeConfig(pool))
    assert made.target.mode == "RGB" and all(thing["name"] in pool.codes for thing in made.scene["objects"])


# --- backgrounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_backgrounds(kind):
    image = background(kind, (70, 41), 3)
    assert (image.mode, image.size) == ("RGB", (70, 41)) and pixels(image).std() > 5
    assert image.tobytes() == background(kind, (70, 41), 3).tobytes() != background(kind, (70, 41), 4).tobytes()
    assert background(kind, (1, 1), 0).size == (1, 1) and background(kind, (3, 200), 0).size == (3, 200)


def test_photos_have_more_than_two_colours():
    for kind in PHOTOS:
        values = pixels(background(kind, (96, 64), 1)).reshape(-1, 3).astype(float)
        spread = np.linalg.svd(values - values.mean(0), compute_uv=False)
        assert spread[1] > 0.05 * spread[0], kind  # not on a line between two colours, as textures are


@pytest.mark.parametrize("kind", NAMED)
def test_named_backgrounds_have_their_colour(kind):
    for colour, rgb in COLOURS.items():
        image = named_background(kind, colour, (64, 48))
        assert image.tobytes() == named_background(kind, colour, (64, 48)).tobytes()
        mean = pixels(image).reshape(-1, 3).mean(0) / 255
        off = abs(colorsys.rgb_to_hsv(*mean)[0] - colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0])
        assert min(off, 1 - off) < 0.03, colour
    assert (pixels(named_background(kind, "blue", (64, 48))).std((0, 1)).max() > 5) == (kind != "plain")


def test_background_errors():
    with pytest.raises(ValueError, match="landscape"):
        background("cave", (8, 8), 0)
    with pytest.raises(ValueError, match="at least 1"):
        background("sea", (8, 0), 0)
    with pytest.raises(ValueError, match="checker"):
        named_background("clouds", "blue", (8, 8))
    with pytest.raises(ValueError, match="purple"):
        named_background("checker", "teal", (8, 8))
    with pytest.raises(ValueError, match="at least 1"):
        named_background("plain", "red", (0, 8))


# --- words ------------------------------------------------------------------------------------------------------------


def test_articles_and_plurals():
    for phrase in (
        "an owl", "a unicorn face", "an hourglass", "a european castle", "a rocket", "an umbrella", "an x-ray",
        "cherries", "fork and knife", "an octopus", "cooked rice", "a bus", "a face with tears of joy", "a fish",
    ):  # fmt: skip
        assert a(re.sub("^an? ", "", phrase)) == phrase
    wanted = {
        "owl": "owls", "cactus": "cacti", "cherry blossom": "cherry blossoms", "strawberry": "strawberries",
        "monkey": "monkeys", "face with tears of joy": "faces with tears of joy", "snowman": "snowmen", "bus": "buses",
        "peach": "peaches", "mouse trap": "mouse traps", "fork and knife": None, "cherries": None, "sheep": None,
        "cooked rice": None, "game die": "game dice", "baby": "babies", "ear of maize": "ears of maize",
    }  # fmt: skip
    assert {name: plural(name) for name in wanted} == wanted


def test_phrases():
    draw = Draw(0)
    assert described(draw, "owl", None) == "an owl" and described(draw, "owl", None, "large") == "a large owl"
    assert re.fullmatch("the owl (of|from) picture 2", described(draw, "owl", 2))
    assert re.fullmatch("three small owls (of|from) picture 1", described(draw, "owl", 1, "small", 3))
    said = {place(draw, "at the top left", movement=True) for _ in range(40)}
    assert said == {"to the top left", "to the top left corner"}
    assert {place(draw, "in the centre") for _ in range(40)} == {"in the centre", "in the middle"}
    assert draw.some(range(5), 5) != draw.some(range(5), 5) and sorted(draw.some(range(5), 5)) == list(range(5))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_sizes():
    assert CONFIG.target_sizes == ((128, 128), (128, 96), (96, 128), (128, 80))
    assert rounded_size((9, 16), 256) == (144, 256) and rounded_size((16, 9), 64) == (64, 32)
    sizes = CONFIG.reference_sizes((128, 96))
    assert len(sizes) > 20 and all(side % 16 == 0 and 32 <= side <= 192 for size in sizes for side in size)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 100}, {"size": 48}, {"seed": -1}, {"references": ()}, {"references": (7,)}, {"pictures": "all"}],
    ids=str,
)
def test_config_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))[:4]):
        MakeConfig(artworks("shipped"), **wrong)
    with pytest.raises(ValueError, match="at least 12 artworks"):
        MakeConfig(Artworks("shipped", {"owl": 0x1F989}))
    with pytest.raises(ValueError, match="heldout_objects"):
        sample("test", 0, CONFIG)
    with pytest.raises(ValueError, match="-1"):
        sample("train", -1, CONFIG)


def test_tasks_that_are_asked_for():
    config = MakeConfig(artworks("shipped"), 64, references=(1, 2), tasks=("move", "move", "compose", "recolour"))
    tasks = Counter(
        (len(plan.pictures), plan.task_type) for plan in (plan_sample("train", i, config) for i in range(300))
    )
    assert set(tasks) == {(1, "move"), (1, "recolour"), (2, "compose")}
    assert 1.4 < tasks[1, "move"] / tasks[1, "recolour"] < 2.8
    wrong = (("move", "with 2 pictures the tasks are compose, add, replace_background; got move"), ("moove", "'moove'"))
    for name, message in wrong:
        with pytest.raises(ValueError, match=message):
            plan_sample("train", 3, MakeConfig(artworks("shipped"), 64, references=(2,), tasks=(name,)))
    with pytest.raises(ValueError, match="got none"):
        tasks_of(1, MakeConfig(artworks("shipped"), 64, tasks=()))
    with pytest.raises(ValueError, match="simple ones"):
        tasks_of(1, MakeConfig(artworks("shipped"), 64, pictures="simple", tasks=("add",)))


def test_combinations_have_one_name_for_both_directions():
    owl, cat = Thing("owl", (0, 0), 40), Thing("cat", (60, 10), 40)
    assert combinations([owl, cat]) == combinations([cat, owl]) == ("owl|left of|cat",)
    assert combinations([owl, Thing("cat", (60, 60), 40)]) == ("owl|above|cat", "owl|left of|cat")
    assert combinations([owl, Thing("owl", (60, 60), 40)]) == ()
    assert overlapping([owl, Thing("cat", (39, 39), 10)]) and not overlapping([owl, Thing("cat", (40, 0), 10)])


def test_simple_pictures():
    """What is taken from a picture stands alone in its middle, has its size in the answer and comes by whole steps."""
    simple = MakeConfig(artworks("shipped"), size=64, references=(1, 2, 3, 4, 5, 6), pictures="simple")
    plans = [plan_sample("train", index, simple) for index in range(300)]
    tasks = {(len(plan.pictures), plan.task_type) for plan in plans}
    assert {task for k, task in tasks if k == 1} == {"recolour", "remove", "move", "replace_background"}
    assert {task for k, task in tasks if k == 2} == {"compose", "add", "replace_background"}
    moved = 0
    for plan in plans:
        mentioned = [int(n) for n in re.findall(r"picture (\d)", plan.instruction)]
        assert len(plan.pictures) < 3 or mentioned in (list(range(1, len(plan.pictures) + 1)),
                                                       [len(plan.pictures), *range(1, len(plan.pictures))])  # fmt: skip
        assert len({thing.name for thing in plan.target.things}) == len(plan.target.things)
        assert {picture.size for picture in plan.pictures} == {plan.target.size} == {(64, 64)}
        for thing in plan.target.things:
            source = plan.pictures[thing.picture - 1].things
            if any((thing.name, thing.corner) == (other.name, other.corner) for other in source):
                continue
            (whole,) = source
            assert whole.side == thing.side and whole.name == thing.name
            assert all((a - b) % STEP == 0 for a, b in zip(whole.corner, thing.corner, strict=True))
            if plan.task_type != "move":
                assert whole.corner == ((64 - whole.side) // 2,) * 2
            moved += 1
        assert len(plan.pictures) != 1 or len(plan.pictures[0].things) == 1 or plan.task_type == "replace_background"
    assert moved > 200


def shown(plan) -> set[str]:
    return {thing.name for picture in (*plan.pictures, plan.target) for thing in picture.things}


def test_held_out_objects_never_occur_in_train(plans):
    names = {split: set().union(*map(shown, plans[split])) for split in SPLITS}
    assert names["heldout_objects"] == set(CONFIG.objects("heldout_objects")) and len(names["heldout_objects"]) == 6
    assert names["train"] == set(CONFIG.objects("train")) == set(CONFIG.artworks.names) - names["heldout_objects"]
    assert names["heldout_combinations"] <= names["train"]
    other = MakeConfig(artworks("shipped"), seed=1)
    assert other.objects("heldout_objects") != CONFIG.objects("heldout_objects")


def test_shipped_objects_are_held_out_of_larger_pools_too():
    """So that a model trained with a font can be shown shipped artworks that it never saw."""
    shipped = CONFIG.artworks
    larger = MakeConfig(Artworks("shipped", dict(shipped.codes) | {f"thing {i}": 0x1F300 + i for i in range(200)}))
    held = set(larger.objects("heldout_objects"))
    assert len(held) == 21 and held & set(shipped.names) == set(CONFIG.objects("heldout_objects"))
    assert not held & set(larger.objects("train"))


def test_held_out_combinations_never_occur_in_train(plans):
    """Told from the scenes and the documented rule alone."""

    def found(plan) -> set[str]:
        keys = set()
        for first in plan.target.things:
            for second in plan.target.things:
                size = (first.side + second.side) / 4
                if first.name != second.name and second.centre[0] - first.centre[0] >= size:
                    keys.add(f"{first.name}|left of|{second.name}")
                if first.name != second.name and second.centre[1] - first.centre[1] >= size:
                    keys.add(f"{first.name}|above|{second.name}")
        return keys | {key for key in plan.combinations if f"|{plan.task_type}|" in key}

    def held(key: str) -> bool:
        return int.from_bytes(hashlib.blake2b(f"{CONFIG.seed}|{key}".encode()).digest()[:8], "big") % 10 == 0

    train = set().union(*map(found, plans["train"]))
    unseen = [found(plan) for plan in plans["heldout_combinations"]]
    assert not any(map(held, train)) and all(any(map(held, keys)) for keys in unseen)
    assert not train & {key for keys in unseen for key in keys if held(key)}
    for plan in (plan for split in SPLITS for plan in plans[split]):
        assert found(plan) == set(plan.combinations)
    assert held_out(0, "owl|left of|crown") == held("owl|left of|crown")
    # edits and compositions of a single object are held out too, by place or colour
    kinds = Counter(key.split("|")[1] for keys in unseen for key in keys if held(key))
    assert {"left of", "above", "compose", "generate", "recolour", "remove", "move", "add"} <= set(kinds)


def test_every_task_and_number_of_pictures_occurs(plans):
    wanted = {("generate", 0)} | {("compose", k) for k in range(2, 7)}
    wanted |= {(task, 1) for task in ("recolour", "remove", "move", "add", "replace_background")}
    wanted |= {("add", 2), ("replace_background", 2)}
    for split in SPLITS:
        seen = Counter((plan.task_type, len(plan.pictures)) for plan in plans[split])
        assert set(seen) == wanted and min(seen.values()) >= 3
        pictures = Counter(len(plan.pictures) for plan in plans[split])
        mean = len(plans[split]) / 7
        assert all(0.6 * mean < pictures[count] < 1.6 * mean for count in range(7))
    seeds = [p.ground.seed for split in SPLITS for plan in plans[split] for p in plan.pictures]
    assert len(set(seeds)) == len(seeds)  # no two samples, of any splits, draw the same
    for index in range(20):
        assert len(plan_sample("train", index, MakeConfig(CONFIG.artworks, references=(2,))).pictures) == 2


def test_instructions_name_the_pictures_and_vary(plans):
    for plan in plans["train"]:
        numbers = {int(number) for number in re.findall(r"picture (\d)", plan.instruction)}
        assert numbers <= set(range(1, len(plan.pictures) + 1))
        if plan.task_type == "compose":
            used = {thing.picture for thing in plan.target.things}
            assert numbers == used | {len(plan.pictures)} and plan.target.ground == len(plan.pictures)
            for thing in plan.target.things:
                assert thing.name in {t.name for t in plan.pictures[thing.picture - 1].things}
                words = f"({thing.name}|{plural(thing.name)}) (of|from) picture {thing.picture}"
                assert re.search(words, plan.instruction)
    assert len({plan.instruction for plan in plans["train"]}) > 600


def test_things_are_inside_and_apart(plans):
    for plan in (plan for split in SPLITS for plan in plans[split]):
        for picture in (*plan.pictures, plan.target):
            assert not overlapping(picture.things)
            assert all(0 <= t.corner[k] <= picture.size[k] - t.side for t in picture.things for k in (0, 1))
            assert all(side % 16 == 0 for side in picture.size)
            assert all(thing.side >= 12 for thing in picture.things)
        if plan.task_type == "compose":
            assert len({picture.size for picture in plan.pictures}) == len(plan.pictures)


def test_places_sizes_and_counts_are_those_said(plans):
    numbers = {"two": 2, "three": 3, "four": 4}
    checked = Counter()
    for plan in plans["train"]:
        things, (width, height) = plan.target.things, plan.target.size
        for number, size in re.findall(r"\b(two|three|four)( small)? \w", plan.instruction):
            most = max(Counter(thing.name for thing in things).values())
            assert most == numbers[number], plan.instruction
            checked[f"count{size}"] += 1
        (key,) = [k for k in plan.combinations if f"|{plan.task_type}|" in k] or [""]
        name, _, where = key.rpartition("|")
        if where in PLACES and plan.task_type in ("compose", "generate", "add", "move"):
            these = [thing for thing in things if thing.name == name.split("|")[0]]
            x = np.mean([thing.centre[0] for thing in these]) / width
            y = np.mean([thing.centre[1] for thing in these]) / height
            nearest = min(PLACES, key=lambda p: np.hypot(PLACES[p][0] - x, PLACES[p][1] - y))
            assert nearest == where, (plan.instruction, x, y)
            side = where.split(" the ")[1]
            middle = side == "centre" and ("middle" in plan.instruction or plan.task_type == "generate")
            assert side in plan.instruction or middle
            checked["place"] += 1
        if re.search(r"\b(a|an) large ", plan.instruction) and "small" not in plan.instruction:
            assert max(thing.side for thing in things) > 0.4 * min(width, height)
            checked["large"] += 1
    assert min(checked[k] for k in ("count", "count small", "place", "large")) >= 8, checked


def test_relations_are_those_said(plans):
    axes = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "over": (1, -1), "below": (1, 1), "under": (1, 1)}
    pattern = re.compile(
        r"the ([a-z ]+?) (?:of|from) picture \d (?:to the )?(left of|right of|above|over|below|under)"
        r" the ([a-z ]+?) (?:of|from)"
    )
    seen = Counter()
    for plan in plans["train"]:
        at = {thing.name: thing.centre for thing in plan.target.things}
        for first, relation, second in pattern.findall(plan.instruction):
            axis, sign = axes[relation]
            assert sign * (at[first][axis] - at[second][axis]) > 10, plan.instruction
            seen[relation] += 1
        row = re.search(r"(row from left to right|column from top to bottom)", plan.instruction)
        if row and plan.task_type == "compose":
            said = re.findall(r"the ([a-z ]+?) (?:of|from) picture \d(?:,| and| in a)", plan.instruction)
            centres = [at[name][row[0].startswith("column")] for name in said if name != "background"]
            assert len(said) >= 3 and centres == sorted(centres), plan.instruction
            seen[row[0]] += 1
        between = re.search(
            r"the ([a-z ]+?) (?:of|from) picture \d between the ([a-z ]+?) (?:of|from)", plan.instruction
        )
        if between:
            axis = "at the top" in plan.instruction
            third = next(name for name in at if name not in between.groups())
            assert at[between[2]][axis] < at[between[1]][axis] < at[third][axis]
            seen["between"] += 1
    assert len(seen) == 9 and min(seen.values()) >= 3, seen


# --- pixels -----------------------------------------------------------------------------------------------------------


def boxes(scene: dict, scale: float = 1) -> list[tuple[int, int, int, int]]:
    return [
        tuple(int(scale * v) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2))
        for (x, y), side in ((thing["centre"], thing["side"]) for thing in scene["objects"])
    ]


def test_targets_follow_from_the_scene_alone(samples):
    """The answer is recomputed from what a row has: its scene, its pictures' sizes and the artworks' files."""
    for made in samples:
        scene, ground = made.scene, made.scene["background"]
        size = tuple(scene["size"])
        if "colour" in ground:
            base = named_background(ground["kind"], ground["colour"], size)
        else:
            picture = scene["references"][ground["picture"] - 1]
            whole = background(picture["background"]["kind"], tuple(picture["size"]), picture["background"]["seed"])
            base = whole.crop(ground["crop"])
            base = base if base.size == size else whole.resize(size, Image.Resampling.LANCZOS, box=ground["crop"])
        for thing in scene["objects"]:
            artwork = scenes.artwork(Path(thing["artwork"]).stem.replace("_", " "))
            artwork = recolour(artwork, thing["colour"]) if "colour" in thing else artwork
            artwork = artwork.resize((thing["side"],) * 2, Image.Resampling.LANCZOS)
            base.paste(artwork, tuple(int(c - thing["side"] / 2) for c in thing["centre"]), artwork)
        assert base.tobytes() == made.target.tobytes(), made.instruction
        assert [list(image.size) for image in made.references] == [r["size"] for r in scene["references"]]
        assert all(image.mode == "RGB" for image in (*made.references, made.target))
        json.dumps(scene)


def test_edits_leave_the_rest_of_picture_1_alone(samples):
    seen = Counter()
    for made in samples:
        first = made.references[0] if made.references else None
        if made.task_type not in ("recolour", "remove", "move", "add") or first.size != made.target.size:
            continue
        mask = np.ones(made.target.size[::-1], bool)
        before, after = made.scene["references"][0]["objects"], made.scene["objects"]
        same = [b for b in before for t in after if {**t, "picture": 0} == {**b, "picture": 0}]
        changed = [t for t in (*before, *after) if {**t, "picture": 0} not in [{**s, "picture": 0} for s in same]]
        for left, top, right, bottom in boxes({"objects": changed}):
            mask[top:bottom, left:right] = False
        difference = np.abs(pixels(first) - pixels(made.target)).sum(-1)
        assert not difference[mask].any() and difference[~mask].any() and mask.mean() > 0.3
        seen[made.task_type] += 1
    assert len(seen) == 4, seen


def test_backgrounds_come_from_the_picture_that_is_named(samples):
    seen = 0
    for made in samples:
        if made.task_type != "compose":
            continue
        picture, box = made.references[-1], made.scene["background"]["crop"]
        assert tuple(box) == crop_box(picture.size, made.target.size)
        resized = picture.resize(made.target.size, Image.Resampling.LANCZOS, box=box)
        mask = np.ones(made.target.size[::-1], bool)
        for left, top, right, bottom in boxes(made.scene):
            mask[top:bottom, left:right] = False
        assert (pixels(resized) == pixels(made.target))[mask].all()
        seen += 1
    assert seen > 40


def test_crop_box_keeps_the_aspect_ratio():
    assert crop_box((128, 128), (128, 80)) == (0, 24, 128, 104)
    assert crop_box((160, 96), (96, 128)) == (44, 0, 116, 96)
    assert crop_box((96, 64), (96, 64)) == (0, 0, 96, 64)


@pytest.mark.parametrize("colour", COLOURS)
def test_recolouring(colour):
    for name in ("owl", "red apple", "soccer ball"):
        artwork = scenes.artwork(name)
        painted = recolour(artwork, colour)
        before, after = pixels(artwork), pixels(painted)
        assert (before[..., 3] == after[..., 3]).all() and painted.mode == "RGBA"
        solid = after[before[..., 3] > 250][:, :3]
        mean = solid.mean(0) / 255
        off = abs(colorsys.rgb_to_hsv(*mean)[0] - colorsys.rgb_to_hsv(*(v / 255 for v in COLOURS[colour]))[0])
        assert min(off, 1 - off) < 0.04 and colorsys.rgb_to_hsv(*mean)[1] > 0.2
        assert solid.std() > 10  # still shaded
    assert recolour(Image.new("RGBA", (4, 4)), colour).getpixel((0, 0))[3] == 0  # nothing to see, nothing to divide by
    assert recolours_visibly(scenes.artwork("owl"), "blue") and not recolours_visibly(
        scenes.artwork("red apple"), "red"
    )


# --- files ------------------------------------------------------------------------------------------------------------


def make(out: Path, counts=COUNTS, config=SMALL, workers=1, force=False, draw=sample) -> made_files.Made:
    return made_files.make(out, config, counts, workers, force, draw)


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "data"
    make(out)
    return out


def rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_rows_are_canonical_and_equal_the_samples_in_memory(made_folder):
    for split, count in COUNTS.items():
        read = rows(made_folder, split)
        assert len(read) == count
        for index, row in enumerate(read[:6]):
            made = sample(split, index, SMALL)
            assert (row["instruction"], row["task_type"]) == (made.instruction, made.task_type)
            assert row["scene"] == json.loads(json.dumps(made.scene))
            names = [f"images/{split}/{index:06d}_{i}.png" for i in range(len(made.references))]
            assert row["input_images"] == names and row["output_image"] == f"images/{split}/{index:06d}_out.png"
            for name, image in zip([*names, row["output_image"]], [*made.references, made.target], strict=True):
                with Image.open(made_folder / name) as read_image:
                    assert read_image.mode == "RGB" and read_image.tobytes() == image.tobytes()


def test_everything_that_belongs_to_the_data_is_there(made_folder):
    assert {path.name for path in made_folder.iterdir()} == made_files.OURS
    everything = [row for split in SPLITS for row in rows(made_folder, split)]
    things = [t for row in everything for s in (row["scene"], *row["scene"]["references"]) for t in s["objects"]]
    files = {f"artworks/{path.name}" for path in (made_folder / "artworks").glob("*.png")}
    assert files == {thing["artwork"] for thing in things}
    for name in ("owl", "crown"):
        if (path := made_folder / f"artworks/{name}.png").exists():
            assert Image.open(path).tobytes() == scenes.artwork(name).tobytes()
    assert "SIL OPEN FONT LICENSE" in (made_folder / "artworks/OFL.txt").read_text()
    assert "Noto Color Emoji" in (made_folder / "artworks/NOTICE.md").read_text()
    facts = json.loads((made_folder / "made.json").read_text())
    assert facts["made_by"] == "uniref-fast data make" and facts["arguments"]["seed"] == 0
    assert {split: facts["counts"][split]["rows"] for split in SPLITS} == COUNTS
    assert (
        sum(facts["counts"]["train"]["by_task"].values())
        == 70
        == sum(facts["counts"]["train"]["by_references"].values())
    )
    assert facts["heldout_objects"] == list(SMALL.objects("heldout_objects")) and "blake2b" in facts["split_rule"]
    card = (made_folder / "README.md").read_text()
    assert card.startswith("---\n") and "path: heldout_objects.jsonl" in card and "| train | 70 |" in card
    assert "--train 70 --heldout 5 --size 64" in card and "--tasks" not in card
    chosen = {**facts, "arguments": {**facts["arguments"], "tasks": ["move", "move", "recolour"]}}
    assert "--tasks move,move,recolour\n" in card_of(chosen)
    siblings = {path.name for path in made_folder.parent.iterdir()}
    assert siblings == {made_folder.name}  # nothing temporary stays


def test_more_samples_have_the_fewer_as_their_beginning(made_folder, tmp_path):
    make(tmp_path / "more", {"train": 100, "heldout_objects": 0, "heldout_combinations": 0})
    text = (made_folder / "train.jsonl").read_text()
    assert (tmp_path / "more/train.jsonl").read_text().startswith(text)
    fewer, more = tree(made_folder / "images/train"), tree(tmp_path / "more/images/train")
    assert fewer.items() <= more.items() and len(more) > len(fewer)
    assert not (tmp_path / "more/heldout_objects.jsonl").exists()
    assert not (tmp_path / "more/images/heldout_objects").exists()


def test_any_number_of_processes_gives_the_same_bytes(made_folder, tmp_path):
    make(tmp_path / "data", workers=3)
    assert tree(tmp_path / "data") == tree(made_folder)


class StoppedError(Exception):
    pass


def stops_at(index: int):
    def draw(split, i, config):
        if (split, i) == ("train", index):
            raise StoppedError
        return sample(split, i, config)

    return draw


def test_an_interrupted_run_is_gone_on_with(made_folder, tmp_path):
    out, making = tmp_path / "data", tmp_path / ".data.making"
    with pytest.raises(StoppedError):
        make(out, draw=stops_at(66))
    assert not out.exists() and making.exists()
    drawn = []

    def draw(split, index, config):
        drawn.append((split, index))
        return sample(split, index, config)

    # one finished part is damaged since: it is made again, the other is not
    damaged = making / "images/train/000033_out.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    made = make(out, draw=draw)
    assert made.resumed == 32 and sorted(i for split, i in drawn if split == "train") == list(range(32, 70))
    assert tree(out) == tree(made_folder) and {path.name for path in tmp_path.iterdir()} == {"data"}


def test_an_interrupted_run_with_other_arguments_is_not(made_folder, tmp_path):
    with pytest.raises(StoppedError):
        make(tmp_path / "data", config=MakeConfig(SMALL.artworks, 64, 9, SMALL.references), draw=stops_at(66))
    made = make(tmp_path / "data")
    assert made.resumed == 0 and tree(tmp_path / "data") == tree(made_folder)


def test_what_is_there_is_not_overwritten(tmp_path):
    few = {"train": 2, "heldout_objects": 0, "heldout_combinations": 0}
    out = tmp_path / "data"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        make(tmp_path / "file", few)
    out.mkdir()
    make(out, few)  # empty: fine
    before = tree(out)
    with pytest.raises(FileExistsError, match="--force"):
        make(out, few)
    other = MakeConfig(SMALL.artworks, 64, 3, SMALL.references)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        make(out, few, other, force=True)
    (out / "notes.txt").unlink()
    with pytest.raises(StoppedError):
        make(out, few, other, force=True, draw=stops_at(1))
    assert tree(out) == before  # the old one stays until the new one is whole
    make(out, few, other, force=True)
    assert tree(out) != before and {path.name for path in tmp_path.iterdir()} == {"data", "file"}
    (out / "made.json").write_text('{"made_by": "me"}')
    with pytest.raises(FileExistsError, match="was not made by"):
        make(out, few, force=True)


def test_a_folder_caught_between_two_names_is_found_again(tmp_path):
    few = {"train": 1, "heldout_objects": 0, "heldout_combinations": 0}
    make(tmp_path / "data", few)
    (tmp_path / "data").rename(tmp_path / ".data.old")
    with pytest.raises(FileExistsError, match="--force"):
        make(tmp_path / "data", few)
    assert (tmp_path / "data/train.jsonl").exists() and not (tmp_path / ".data.old").exists()


def test_two_runs_do_not_write_one_folder(tmp_path):
    with (tmp_path / ".data.making.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run"):
            make(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def dies(split, index, config):
    os._exit(9)


def test_a_process_that_dies_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="same command again"):
        make(tmp_path / "data", workers=2, draw=dies)
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    """Kill -9 in the middle; its processes end too, and the same command completes the same bytes."""
    code = (
        "import sys, argparse; from uniref_fast.training import make_data as m\n"
        "p = argparse.ArgumentParser(); m.add_arguments(p); sys.exit(m.run(p.parse_args()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data"), "--artworks", "shipped", "--heldout", "0"]
    command += ["--train", "320", "--size", "64", "--references", "0,1", "--workers", "2"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    listed = tmp_path / ".data.making/parts"
    deadline = time.monotonic() + 120
    while not list(listed.glob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "data").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert re.search(r"^\d+ samples were there already", again.stderr, re.MULTILINE)
    whole = MakeConfig(artworks("shipped"), 64, 0, (0, 1))
    make(tmp_path / "other", {"train": 320, "heldout_objects": 0, "heldout_combinations": 0}, whole)
    assert tree(tmp_path / "data") == tree(tmp_path / "other")


# --- the command ------------------------------------------------------------------------------------------------------


def command(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    make_data.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_command(tmp_path, capsys):
    out, sheet = tmp_path / "deep/data", tmp_path / "sheets/preview.png"
    words = [out, "--train", 6, "--heldout", 2, "--size", 64, "--artworks", "shipped", "--references", "2,0"]
    assert make_data.run(command(*words, "--workers", 1, "--preview", sheet)) == 0
    said = capsys.readouterr()
    assert str(out) in said.out and "heldout_combinations" in said.out and "compose" in said.out
    assert re.search(r"^all +6 +2 +2$", said.out, re.MULTILINE)
    with Image.open(sheet) as image:
        assert image.size[0] == 24 + 3 * 184 and image.size[1] > 2500
    assert {len(row["input_images"]) for row in rows(out, "train")} <= {0, 2}
    assert command(out).references == (0, 1, 2, 3, 4, 5, 6)


def test_command_errors(tmp_path, capsys):
    for words in (["--references", "0,7"], ["--references", ""], ["--workers", "0"], ["--train", "-1"]):
        with pytest.raises(SystemExit):
            command(tmp_path / "data", *words)
    capsys.readouterr()
    with pytest.raises(ValueError, match="nothing to make"):
        make_data.run(command(tmp_path / "data", "--train", 0, "--heldout", 0))
    with pytest.raises(ValueError, match=r"\.png"):
        make_data.run(command(tmp_path / "data", "--preview", tmp_path / "sheet.jpg"))
    with pytest.raises(ValueError, match="multiple of 16"):
        make_data.run(command(tmp_path / "data", "--size", 100, "--artworks", "shipped"))
    assert not (tmp_path / "data").exists()
