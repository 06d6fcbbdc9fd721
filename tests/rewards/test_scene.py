"""Scores of made data: the answer has them all, what is worse has less, by degrees, and tricks do not pay."""

import collections
import copy
import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from pyarrow import parquet

from uniref_fast.data.dataset import Dataset, Row, RowError
from uniref_fast.data.images import ImageSource
from uniref_fast.rewards import scene as module
from uniref_fast.rewards.scene import scene_details, scene_reward
from uniref_fast.rewards.types import AXES, Candidate, Failure, Scores
from uniref_fast.scenes.artworks import artworks
from uniref_fast.scenes.changes import scene_changes
from uniref_fast.scenes.config import MakeConfig
from uniref_fast.scenes.locate import Canvas, find
from uniref_fast.scenes.placement import overlapping
from uniref_fast.scenes.render import render
from uniref_fast.scenes.scene import Background, Scene
from uniref_fast.scenes.similarity import softened
from uniref_fast.scenes.splits import SPLITS
from uniref_fast.scenes.tasks import scene_spec

POOL = artworks("shipped")
CONFIG = MakeConfig(POOL, size=64, seed=0)
TASKS = ("generate", "recolour", "remove", "move", "add", "replace_background", "compose")


def encoded(image):
    """Return an image source with the lossless bytes of an image."""
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return ImageSource("image", data=content.getvalue())


def scene_scores(image, target, scene, artworks):
    """Return the scores of an image for a row with that target, scene and artworks."""
    sources = {path: encoded(artwork) for path, artwork in artworks.items()}
    details = scene_details(Row("", (), encoded(target), None, "row", scene, sources), image)
    return dict(details.axes)


class Case:
    """A synthetic sample with its scene, so that other targets can be drawn."""

    def __init__(self, index, split="train", config=CONFIG):
        self.spec = scene_spec(split, index, config)
        self.sample = render(self.spec, POOL)
        self.target, self.scene, self.objects = self.sample.target, self.sample.scene, self.spec.scene.objects
        pictures = (self.scene, *self.scene["references"])
        self.artworks = {o["artwork"]: POOL.image(o["name"]) for picture in pictures for o in picture["objects"]}

    def scores(self, image):
        return scene_scores(image, self.target, self.scene, self.artworks)

    def drawn(self, objects, background=None):
        """Return the target with other objects, or on another background."""
        scene = self.spec.scene
        scene = replace(scene, objects=tuple(objects), background=background or scene.background)
        return render(replace(self.spec, scene=scene), POOL).target

    def shifted(self, pixels):
        """Return the objects moved to the right, or to the left if there is more room."""
        width = self.target.width
        signs = [1 if placed.centre[0] < width / 2 else -1 for placed in self.objects]
        return [
            placed.moved((placed.corner[0] + sign * pixels, placed.corner[1]))
            for placed, sign in zip(self.objects, signs, strict=True)
        ]


def blurred(image, radius):
    return image.filter(ImageFilter.GaussianBlur(radius))


def noisy(image, deviation, seed=0):
    noise = np.random.default_rng(seed).normal(0, 1, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + deviation * noise, 0, 255).astype(np.uint8))


def tiled(image, grid, amount):
    """Tiles that are lighter and darker by turns."""
    y, x = np.mgrid[: image.height, : image.width] // grid
    shade = amount * (1 - 2 * ((x + y) % 2))[..., None]
    return Image.fromarray(np.clip(np.asarray(image) + shade, 0, 255).astype(np.uint8))


def flat(size, colour=(128, 128, 128)):
    return Image.new("RGB", size, colour)


def mean_colour(image):
    return tuple(round(v) for v in np.asarray(image).mean((0, 1)))


def own_colour(artwork):
    pixels = np.asarray(artwork).astype(float)
    return tuple(round(v) for v in np.average(pixels[..., :3], (0, 1), np.repeat(pixels[..., 3:], 3, -1)))


def mediocre(image):
    """Image of a model halfway through its training: everything about right, soft and a little noisy."""
    return noisy(blurred(image, 1.3), 8)


def some_of(task, count, first=0):
    found = (index for index in range(first, 1000) if scene_spec("train", index, CONFIG).task_type == task)
    return [Case(next(found)) for _ in range(count)]


@pytest.fixture(scope="module")
def cases():
    """Cases of every task and every number of references, the tasks in turn."""
    by_task = [some_of(task, 8 if task == "compose" else 3) for task in TASKS]
    return [case for row in itertools.zip_longest(*by_task) for case in row if case is not None]


@pytest.fixture(scope="module")
def with_objects(cases):
    """Return the cases that ask for an object that reference 1 does not show already."""
    return [case for case in cases if not all(scene_changes(Scene.from_json(case.scene)).kept)][:12]


def mean_scores(cases, degrade):
    return {axis: float(np.mean([case.scores(degrade(case))[axis] for case in cases])) for axis in AXES}


def assert_falls(cases, degrade, amounts, slack=0.25, **least):
    """The mean of each axis falls with every amount, by at least so much in all; no case rises more than the slack."""
    table = [[case.scores(degrade(case, amount)) for amount in amounts] for case in cases]
    for axis, fall in least.items():
        rows = np.array([[scores[axis] for scores in row] for row in table])
        assert (np.diff(rows.mean(0)) < 0).all(), (axis, rows.mean(0))
        assert (np.diff(rows, axis=1) < slack).all(), (axis, rows[(np.diff(rows, axis=1) >= slack).any(1)])
        assert rows[:, 0].mean() - rows[:, -1].mean() > fall, (axis, rows.mean(0))


# ---- the answer ----


def test_the_target_has_the_best_scores(cases):
    more = [Case(i, split) for split in SPLITS[1:] for i in range(12)] + [
        Case(i, config=MakeConfig(POOL, size=128, seed=3)) for i in range(12)
    ]
    assert {case.sample.task_type for case in (*cases, *more)} == set(TASKS)
    assert {len(case.sample.references) for case in (*cases, *more)} == set(range(7))
    for case in (*cases, *more):
        scores = case.scores(case.target)
        assert tuple(scores) == AXES and all(9.8 <= score <= 10 for score in scores.values()), (scores, case.scene)


def test_images_without_the_objects_have_little_integration(cases):
    sums = collections.Counter()
    for case in cases:
        size = case.target.size
        for image in (noisy(flat(size), 90), flat(size)):
            scores = case.scores(image)
            assert scores["integration"] < 2.5, case.sample.instruction
            sums.update(scores)
        if case.sample.references:
            first = case.sample.references[0].resize(size)
            assert case.scores(first)["integration"] < 5, case.sample.instruction
        # where nothing is to be shown, the mean colour hides what was there
        bound = 3.5 if case.objects else 6
        assert case.scores(flat(size, mean_colour(case.target)))["integration"] < bound, case.sample.instruction
        if case.objects:
            assert case.scores(case.drawn([]))["integration"] < 5, case.sample.instruction
    assert all(total / (2 * len(cases)) < 2 for total in sums.values()), sums


def test_the_untouched_picture_is_no_edit(cases):
    for case in cases:
        if case.sample.task_type in ("recolour", "remove", "move", "add", "replace_background"):
            untouched = case.scores(case.sample.references[0].resize(case.target.size))
            honest = case.scores(mediocre(case.target))
            assert untouched["integration"] < honest["integration"] - 1, case.sample.instruction


def test_a_colour_that_was_not_changed_is_not_half_right():
    untouched = [case.scores(case.sample.references[0].resize(case.target.size)) for case in some_of("recolour", 10)]
    assert np.mean([scores["integration"] for scores in untouched]) < 1.65


# ---- degrees ----


def test_scores_fall_with_blur(cases):
    def degrade(case, radius):
        return blurred(case.target, radius)

    assert_falls(cases[:14], degrade, (0, 0.7, 1.5, 3, 6), integration=3, consistency=6, quality=5)


def test_scores_fall_with_noise(cases):
    def degrade(case, deviation):
        return noisy(case.target, deviation)

    assert_falls(cases[:14], degrade, (0, 5, 12, 30, 70), integration=1, consistency=5, quality=7)


def test_scores_fall_when_objects_fade(with_objects):
    def degrade(case, share):
        return Image.blend(case.target, case.drawn([]), share)

    assert_falls(with_objects, degrade, (0, 0.25, 0.5, 0.75, 1), integration=5, consistency=4)


def test_integration_falls_with_the_distance_from_the_place(with_objects):
    amounts = (0, 3, 6, 10, 15)
    apart = [case for case in with_objects if not any(overlapping(case.shifted(pixels)) for pixels in amounts)]
    assert len(apart) >= 6

    def degrade(case, pixels):
        return case.drawn(case.shifted(pixels))

    assert_falls(apart, degrade, amounts, slack=0.3, integration=3)


def test_integration_falls_with_the_size_being_wrong(with_objects):
    def degrade(case, scale):
        return case.drawn(
            t.moved(tuple(int(c + (t.side - side) / 2) for c in t.corner), side)
            for t in case.objects
            for side in [max(4, int(t.side * scale))]
        )

    assert_falls(with_objects, degrade, (1, 0.85, 0.7, 0.5), slack=0.6, integration=4)
    assert mean_scores(with_objects, lambda case: degrade(case, 0.8))["integration"] < 8


@pytest.mark.parametrize("grid", [8, 16])
def test_quality_falls_with_seams_on_the_grid_of_the_tokens(cases, grid):
    def degrade(case, amount):
        return tiled(case.target, grid, amount)

    assert_falls(cases[:10], degrade, (0, 2, 5, 12, 25), quality=4)
    off = [case.scores(tiled(case.target, 11, 12))["quality"] for case in cases[:10]]
    on = [case.scores(tiled(case.target, grid, 12))["quality"] for case in cases[:10]]
    assert np.mean(on) < np.mean(off) - 1, "seams elsewhere are edges like others"


def test_blending_with_another_image_lowers_every_axis(cases):
    other = Case(2, "heldout_objects").target  # objects that none of the cases shows

    def degrade(case, share):
        return Image.blend(case.target, other.resize(case.target.size), share)

    amounts = (0, 0.1, 0.25, 0.5, 0.75, 1)
    assert_falls(cases[:14], degrade, amounts, slack=0.5, integration=7, consistency=7, quality=2)


def test_each_mistake_lowers_its_axis(with_objects):
    names = [name for name in CONFIG.objects("train")]

    def wrong(case):
        used = {thing.name for thing in case.objects}
        free = [name for name in names if name not in used]
        return case.drawn(replace(t, name=free[i], colour=None) for i, t in enumerate(case.objects))

    def recoloured(case):
        return case.drawn(replace(t, colour="purple" if t.colour != "purple" else "green") for t in case.objects)

    def mirrored(case):
        width, height = case.target.size
        return case.drawn(t.moved((width - t.side - t.corner[0], height - t.side - t.corner[1])) for t in case.objects)

    exact = mean_scores(with_objects, lambda case: case.target)
    missing = mean_scores(with_objects, lambda case: case.drawn([]))
    assert missing["consistency"] < 3, "what is missing is not consistent; the background is"
    for degrade in (wrong, recoloured):
        scores = mean_scores(with_objects, degrade)
        assert scores["integration"] < exact["integration"] - 5 and scores["consistency"] < exact["consistency"] - 4
    elsewhere = mean_scores(with_objects, mirrored)
    assert missing["integration"] + 0.5 < elsewhere["integration"] < exact["integration"] - 3
    assert elsewhere["consistency"] > missing["consistency"] + 2, "the right object at a wrong place"


def test_each_missing_object_and_each_swap_counts(cases):
    several = [case for case in some_of("compose", 16) if len({t.name for t in case.objects}) >= 2]
    assert len(several) >= 4
    for case in several[:6]:
        whole = [case.scores(case.drawn(case.objects[:count])) for count in range(len(case.objects) + 1)]
        steps = [np.diff([scores[axis] for scores in whole]) for axis in ("integration", "consistency")]
        assert all((step > 0).all() for step in steps), steps
        first, second = case.objects[0], next(t for t in case.objects if t.name != case.objects[0].name)
        names = {first: second.name, second: first.name}
        swapped = case.scores(case.drawn(replace(t, name=names.get(t, t.name)) for t in case.objects))
        assert whole[0]["integration"] < swapped["integration"] < whole[-1]["integration"] - 1


def test_an_object_that_must_go_is_seen_when_it_stays():
    for case in some_of("remove", 4):
        base = case.spec.scene.references[0]
        scale = case.target.width / base.size[0]
        still = [t.moved(tuple(round(c * scale) for c in t.corner), round(t.side * scale)) for t in base.objects]
        assert case.scores(case.drawn(still))["integration"] < 5
        half = Image.blend(case.target, case.drawn(still), 0.5)
        assert case.scores(case.drawn(still))["integration"] + 1 < case.scores(half)["integration"] < 8
    for case in some_of("move", 4):
        base = case.spec.scene.references[0]
        scale = case.target.width / base.size[0]
        (old, *_) = base.objects
        old = old.moved(tuple(round(c * scale) for c in old.corner), round(old.side * scale))
        both = case.scores(case.drawn([old, *case.objects]))
        assert both["integration"] < 7.5, "it was copied, not moved"


def test_a_recoloured_object_that_must_go_is_known_by_its_colour():
    case = some_of("remove", 1)[0]
    base = case.spec.scene.references[0]
    scale = case.target.width / base.size[0]
    (*_, old) = [t for t in base.objects if t.name not in {thing.name for thing in case.objects}]
    still = old.moved(tuple(round(c * scale) for c in old.corner), round(old.side * scale))
    scene = copy.deepcopy(case.scene)
    for thing in scene["references"][0]["objects"]:
        if thing["name"] == old.name:
            thing["colour"] = "yellow"
    yellow = Image.blend(case.target, case.drawn([*case.objects, replace(still, colour="yellow")]), 0.5)
    known = scene_scores(yellow, case.target, scene, case.artworks)["integration"]
    assert 4 < known < 8 and abs(known - case.scores(yellow)["integration"]) > 0.3, "half of it is still there"


def test_the_members_of_a_group_are_told_apart(with_objects):
    for case in with_objects[:4]:
        attempts = [noisy(blurred(case.target, 1 + seed / 4), 6, seed) for seed in range(8)]
        attempts += [noisy(blurred(case.target, 5), 20, seed) for seed in range(8)]  # of a model that hardly knows
        scores = [case.scores(attempt) for attempt in attempts]
        for axis in AXES:
            values = [each[axis] for each in scores]
            assert len(set(values)) == len(values) and np.std(values[:8]) > 0.2, (axis, values)


# ---- tricks ----


def tricks(case):
    width, height = case.target.size
    thing = case.objects[0]
    everywhere = [
        thing.moved((x, y))
        for y in range(0, height - thing.side + 1, thing.side)
        for x in range(0, width - thing.side + 1, thing.side)
    ]
    large = thing.moved((0, 0), min(width, height))
    yield "object everywhere", case.drawn([*everywhere, *case.objects])
    yield "object everywhere, alone", case.drawn(everywhere)
    yield "object as large as can be", case.drawn([large])
    yield "its colour only", flat(case.target.size, own_colour(POOL.image(thing.name)))
    yield "flat", flat(case.target.size, mean_colour(case.target))
    yield "black and white", case.target.convert("L").point(lambda v: 255 * (v > 128)).convert("RGB")
    yield "extreme contrast", ImageEnhance.Contrast(case.target).enhance(8)
    yield "background alone", case.drawn([])
    yield "another background", case.drawn(case.objects, Background("bokeh", 5))
    yield "noise", noisy(flat(case.target.size), 80)
    if case.sample.references:
        yield "picture 1", case.sample.references[0].resize(case.target.size)


def test_no_trick_beats_an_honest_attempt(with_objects):
    sums = collections.defaultdict(list)
    for case in with_objects:
        honest = case.scores(mediocre(case.target))
        for name, image in tricks(case):
            scores = case.scores(image)
            assert scores["integration"] < honest["integration"], (name, scores, honest, case.sample.instruction)
            sums[name].append(sum(scores.values()) - sum(honest.values()))
    assert len(sums) == 11 and all(np.mean(more) < 0.5 for more in sums.values()), sums


def test_quality_cannot_be_raised_by_more_contrast_noise_or_sharpening(cases):
    for case in cases[:12]:
        exact = case.scores(case.target)["quality"]
        for image in (
            case.target.filter(ImageFilter.UnsharpMask(2, 150, 0)),
            case.target.filter(ImageFilter.SHARPEN),
            ImageEnhance.Contrast(case.target).enhance(1.5),
        ):
            assert case.scores(image)["quality"] < exact - 0.5
        for radius in (2, 5):
            soft = blurred(case.target, radius)
            noise = [case.scores(noisy(soft, level))["quality"] for level in (0, 8, 16, 32)]
            assert max(noise[1:]) < noise[0] + 0.3, "noise in place of details"


def test_quality_asks_little_about_what_is_shown(with_objects):
    """A clean image of something else is far above one that is blurred or noisy."""
    clean = mean_scores(with_objects, lambda case: case.drawn(case.shifted(8)))["quality"]
    assert clean > mean_scores(with_objects, lambda case: blurred(case.target, 2))["quality"] + 2
    assert clean > mean_scores(with_objects, lambda case: noisy(case.target, 25))["quality"] + 2


# ---- sizes and other input ----


def test_images_of_other_sizes(cases):
    for case in cases[:12]:
        for scale in (0.5, 1.5, 2):
            size = tuple(round(side * scale) for side in case.target.size)
            if min(size) < 24:
                continue
            same = case.scores(case.target.resize(size, Image.Resampling.LANCZOS))
            assert all(score >= 9.8 for score in same.values()), (scale, same)
            if case.objects:
                assert case.scores(case.drawn([]).resize(size))["integration"] < 5.5, scale
    case = cases[0]
    stretched = case.target.resize((case.target.width + 16, case.target.height), Image.Resampling.LANCZOS)
    assert min(case.scores(stretched).values()) >= 9.8


def test_small_and_odd_images(cases):
    for size in ((16, 16), (17, 31), (64, 16), (33, 47)):
        for case in cases[:6]:
            scores = case.scores(case.target.resize(size, Image.Resampling.LANCZOS))
            assert all(9.8 <= score <= 10 for score in scores.values()), size
            assert all(0 <= score <= 10 for score in case.scores(noisy(flat(size), 90)).values())
    with pytest.raises(RowError, match=r"at least 16 pixels a side, got 15 x 64"):
        cases[0].scores(flat((15, 64)))


def test_the_same_image_has_the_same_scores(cases):
    for case in cases[:4]:
        image = mediocre(case.target)
        before = image.tobytes(), case.target.tobytes(), copy.deepcopy(case.scene)
        first = case.scores(image)
        assert first == case.scores(image.copy())
        assert (image.tobytes(), case.target.tobytes(), case.scene) == before
        assert case.scores(image.convert("RGBA")) == first, "an alpha channel that hides nothing"
        assert all(type(score) is float for score in first.values())


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("size",), None, "scene.size must be 2 numbers, got None"),
        (("size",), [64], "scene.size must be 2 numbers"),
        (("size",), [0, 64], "at least 1"),
        (("objects",), None, "scene.objects must be a list"),
        (("objects",), {"name": "x"}, "scene.objects must be a list"),
        (("objects", 0), "crown", r"scene.objects\[0\] must be an object, got 'crown'"),
        (("objects", 0, "artwork"), 3, r"scene.objects\[0\].artwork must be a path, got 3"),
        (("objects", 0, "artwork"), "artworks/none.png", "no artwork 'artworks/none.png'"),
        (("objects", 0, "centre"), [1, "2"], r"scene.objects\[0\].centre must be 2 numbers"),
        (("objects", 0, "centre"), [float("nan"), 2], "centre must be 2 numbers"),
        (("objects", 0, "centre"), [-40, 20], r"scene.objects\[0\] is not inside the image"),
        (("objects", 0, "side"), True, "side must be a number, got True"),
        (("objects", 0, "side"), -3, "side must be positive"),
        (("objects", 0, "colour"), "mauve", "colour must be one of red, orange"),
        (("objects", 0, "colour"), ["red"], "colour must be one of red, orange"),
        (("background",), None, "scene.background must be an object"),
        (("background", "picture"), 9, "must be one of the 3 pictures, got 9"),
        (("background", "crop"), [1, 2, 3], "scene.background.crop must be 4 numbers"),
        (("background", "crop"), [5, 0, 5, 9], "crop must be .left, top, right, bottom."),
        (("references",), 3, "scene.references must be a list"),
        (("references", 1), None, r"scene.references\[1\] must be an object"),
        (("references", 0, "size"), "big", r"scene.references\[0\].size must be 2 numbers"),
        (("references", 0, "objects", 0, "side"), None, r"references\[0\].objects\[0\].side must be a number"),
    ],
)
def test_a_broken_scene_says_what_is_wrong(path, value, message):
    case = next(case for case in some_of("compose", 20) if len(case.sample.references) == 3)
    scene = copy.deepcopy(case.scene)
    part = scene
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(RowError, match=message):
        scene_scores(case.target, case.target, scene, case.artworks)


def test_nulls_are_as_good_as_missing(cases):
    """Parquet writes nulls for objects that do not all have the same keys."""
    for case in cases[:8]:
        scene = copy.deepcopy(case.scene)
        for picture in (scene, *scene["references"]):
            for thing in picture["objects"]:
                thing |= {key: None for key in ("colour", "picture") if key not in thing}
        scene["background"] = {"kind": None, "picture": None, "crop": None} | scene["background"]
        image = mediocre(case.target)
        assert scene_scores(image, case.target, scene, case.artworks) == case.scores(image)


# ---- as a reward ----


@pytest.fixture
def folder(tmp_path):
    """Rows as the data command writes them, one a task, and what they are of."""
    chosen = [some_of(task, 1)[0] for task in TASKS]
    lines = []
    (tmp_path / "artworks").mkdir()
    for i, case in enumerate(chosen):
        for path, image in case.artworks.items():
            image.save(tmp_path / path)
        names = [f"{i}_{k}.png" for k in range(len(case.sample.references))]
        for name, image in zip([*names, f"{i}.png"], [*case.sample.references, case.target], strict=True):
            image.save(tmp_path / name)
        lines.append({"input_images": names, "output_image": f"{i}.png", "instruction": case.sample.instruction,
                      "scene": case.scene})  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path, chosen, lines


def candidate(row, image):
    return Candidate((0, 0, 0), row.instruction, tuple(source.load() for source in row.references), image, row)


def test_the_reward_of_rows_read_from_files(folder):
    path, cases, lines = folder
    table = {key: [line[key] for line in lines] for key in lines[0]}
    parquet.write_table(pa.table(table), path / "structs.parquet")
    parquet.write_table(pa.table(table | {"scene": list(map(json.dumps, table["scene"]))}), path / "texts.parquet")
    for name in ("rows.jsonl", "structs.parquet", "texts.parquet"):
        for case, row in zip(cases, Dataset(path / name), strict=True):
            image = mediocre(case.target)
            scores = scene_reward(candidate(row, image))
            assert isinstance(scores, Scores) and scores.axes == case.scores(image), (name, row.where)
            assert min(scene_reward(candidate(row, case.target)).axes.values()) >= 9.8


def test_rows_that_the_reward_cannot_use(folder):
    path, cases, _ = folder
    row, image = Dataset(path / "rows.jsonl")[0], cases[0].target
    with pytest.raises(RowError, match=r"^rows.jsonl:1: has no scene; .*uniref-fast data make"):
        scene_reward(candidate(replace(row, scene=None), image))
    with pytest.raises(RowError, match=r"^rows.jsonl:1: has no target image"):
        scene_reward(candidate(replace(row, target=None), image))
    with pytest.raises(RowError, match=r"^rows.jsonl:1: scene.objects must be a list"):
        scene_reward(candidate(replace(row, scene={**row.scene, "objects": 3}), image))
    gone = next(iter(row.artworks))
    (path / gone).unlink()
    row = Dataset(path / "rows.jsonl")[0]  # it is still good for everything else
    assert gone not in row.artworks
    with pytest.raises(RowError, match=rf"^rows.jsonl:1: no artwork '{gone}'"):
        scene_reward(candidate(row, image))


def test_pictures_that_cannot_be_read_are_a_failure_not_a_score(folder):
    path, cases, _ = folder
    row, image = Dataset(path / "rows.jsonl")[0], cases[0].target
    whole = row.target.read()
    cut = replace(row, target=ImageSource("0.png", data=whole[: len(whole) // 2]))
    failure = scene_reward(candidate(cut, image))
    assert isinstance(failure, Failure) and failure.kind == "unreadable" and failure.reason.startswith("0.png: ")
    broken = replace(row, artworks={key: ImageSource(key, data=b"no picture") for key in row.artworks})
    failure = scene_reward(candidate(broken, image))
    assert isinstance(failure, Failure) and "artworks/" in failure.reason and "\n" not in failure.reason


def test_a_group_shares_what_its_row_gives(folder, monkeypatch):
    path, cases, _ = folder
    row = Dataset(path / "rows.jsonl")[1]
    module._target.cache_clear()
    loads, original = [], ImageSource.load
    monkeypatch.setattr(
        ImageSource, "load", lambda self, *mode: loads.append((self.name, *mode)) or original(self, *mode)
    )
    group = [noisy(cases[1].target, 5, seed) for seed in range(6)]
    found = [scene_reward(Candidate((0, 1, i), "", (), image, row)) for i, image in enumerate(group)]
    assert [name for name, *mode in loads if not mode] == [row.target.name] and found[0] != found[1]
    other = replace(row, scene={**row.scene, "objects": []})
    assert scene_reward(Candidate((0, 1, 0), "", (), group[0], other)) != found[0], "another scene is another row"


def test_an_artwork_without_transparency_is_a_square():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "PNG")
    target = Image.new("RGB", (64, 64), (40, 90, 60))
    target.paste((200, 30, 30), (20, 20, 40, 40))
    scene = {"size": [64, 64], "background": {"kind": "plain", "colour": "green"},
             "objects": [{"artwork": "a.png", "centre": [30, 30], "side": 20}]}  # fmt: skip
    png = io.BytesIO()
    target.save(png, "PNG")
    row = Row("x", (), ImageSource("t", data=png.getvalue()), None, "a.jsonl:1", scene,
              {"a.png": ImageSource("a.png", data=file.getvalue())})  # fmt: skip
    assert min(scene_reward(Candidate((0,), "x", (), target, row)).axes.values()) > 9.99
    scores = scene_reward(Candidate((0,), "x", (), flat((64, 64), (40, 90, 60)), row)).axes
    assert scores["integration"] < 2 and scores["consistency"] < 3.2, "the background is right, and only that"

    answer = module._target(row, (64, 64))

    def found(image):
        pixels = softened(np.asarray(image).astype(np.float32), answer.window)
        return find(Canvas(pixels), answer.objects[0], answer.objects[0].centre)

    assert found(target).score == found(target).likeness == pytest.approx(1)
    assert found(flat((64, 64), (200, 30, 30))).likeness < 0.1, "its own colour everywhere: nothing stands out"
    smaller = flat((64, 64), (40, 90, 60))
    smaller.paste((200, 30, 30), (22, 22, 38, 38))
    assert found(smaller).likeness > 0.9 and found(smaller).piece.alpha.shape == (16, 16)
    assert 0.7 < found(smaller).score < 0.9, "found, but not as large as asked for"


def test_details_of_an_answer_and_of_objects_that_are_elsewhere_or_not_there(folder):
    path, cases, _ = folder
    dataset, moved = Dataset(path / "rows.jsonl"), 0
    for number, case in enumerate(cases):
        row = dataset[number]
        exact = scene_details(row, case.target)
        assert exact.axes == scene_reward(Candidate((0,), "", (), case.target, row)).axes
        changes = scene_changes(Scene.from_json(row.scene))
        assert [(one.artwork, one.colour) for one in exact.objects] == [placed.appearance for placed in changes.objects]
        assert [one.kept for one in exact.objects] == list(changes.kept)
        for one in exact.objects:
            assert one.present and one.distance == 0 and one.likeness > 0.99 and one.similarity > 0.97
        bare = scene_details(row, case.drawn([]))
        assert sum(one.present for one in bare.objects) <= 0.3 * len(bare.objects)
        if len(case.objects) == 1:
            (one,) = scene_details(row, case.drawn(case.shifted(6))).objects
            moved += one.present and 5 <= one.distance <= 7
            assert one.similarity > bare.objects[0].similarity
    assert moved >= 3, "found where they are"


def test_the_distance_is_in_pixels_of_the_image(folder):
    path, cases, _ = folder
    number = next(i for i, case in enumerate(cases) if len(case.objects) == 1)
    row, image = Dataset(path / "rows.jsonl")[number], cases[number].drawn(cases[number].shifted(6))
    (one,) = scene_details(row, image).objects
    (larger,) = scene_details(row, image.resize((2 * image.width, 2 * image.height), Image.BICUBIC)).objects
    assert larger.distance == pytest.approx(2 * one.distance, abs=2) and larger.present == one.present
