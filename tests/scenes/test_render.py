"""Pixels of the synthetic samples: exact targets, unchanged surroundings, recoloured artworks."""

import colorsys
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniref_fast.scenes.artworks import artworks, shipped_artwork
from uniref_fast.scenes.backgrounds import COLOURS, background, named_background
from uniref_fast.scenes.config import MakeConfig
from uniref_fast.scenes.make import sample as generate
from uniref_fast.scenes.render import recolour, recolours_visibly
from uniref_fast.scenes.scene import crop_box

CONFIG = MakeConfig(artworks("shipped"))


@pytest.fixture(scope="module")
def samples():
    return [generate("train", i, CONFIG) for i in range(150)]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def boxes(scene: dict, scale: float = 1) -> list[tuple[int, int, int, int]]:
    return [
        tuple(int(scale * v) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2))
        for (x, y), side in ((placed["centre"], placed["side"]) for placed in scene["objects"])
    ]


def test_targets_follow_from_the_scene_alone(samples):
    """The target is computed again from the values of a row: its scene, sizes of images, and files of artworks."""
    for sample in samples:
        scene, ground = sample.scene, sample.scene["background"]
        size = tuple(scene["size"])
        if "colour" in ground:
            base = named_background(ground["kind"], ground["colour"], size)
        else:
            picture = scene["references"][ground["picture"] - 1]
            whole = background(picture["background"]["kind"], tuple(picture["size"]), picture["background"]["seed"])
            base = whole.crop(ground["crop"])
            base = base if base.size == size else whole.resize(size, Image.Resampling.LANCZOS, box=ground["crop"])
        for placed in scene["objects"]:
            artwork = shipped_artwork(Path(placed["artwork"]).stem.replace("_", " "))
            artwork = recolour(artwork, placed["colour"]) if "colour" in placed else artwork
            artwork = artwork.resize((placed["side"],) * 2, Image.Resampling.LANCZOS)
            base.paste(artwork, tuple(int(c - placed["side"] / 2) for c in placed["centre"]), artwork)
        assert base.tobytes() == sample.target.tobytes(), sample.instruction
        assert [list(image.size) for image in sample.references] == [r["size"] for r in scene["references"]]
        assert all(image.mode == "RGB" for image in (*sample.references, sample.target))
        json.dumps(scene)


def test_edits_do_not_change_the_rest_of_picture_1(samples):
    seen = Counter()
    for sample in samples:
        first = sample.references[0] if sample.references else None
        if sample.task_type not in ("recolour", "remove", "move", "add") or first.size != sample.target.size:
            continue
        mask = np.ones(sample.target.size[::-1], bool)
        before, after = sample.scene["references"][0]["objects"], sample.scene["objects"]
        same = [b for b in before for t in after if {**t, "picture": 0} == {**b, "picture": 0}]
        changed = [t for t in (*before, *after) if {**t, "picture": 0} not in [{**s, "picture": 0} for s in same]]
        for left, top, right, bottom in boxes({"objects": changed}):
            mask[top:bottom, left:right] = False
        difference = np.abs(pixels(first) - pixels(sample.target)).sum(-1)
        assert not difference[mask].any() and difference[~mask].any() and mask.mean() > 0.3
        seen[sample.task_type] += 1
    assert len(seen) == 4, seen


def test_backgrounds_come_from_the_named_picture(samples):
    seen = 0
    for sample in samples:
        if sample.task_type != "compose":
            continue
        picture, box = sample.references[-1], sample.scene["background"]["crop"]
        assert tuple(box) == crop_box(picture.size, sample.target.size)
        resized = picture.resize(sample.target.size, Image.Resampling.LANCZOS, box=box)
        mask = np.ones(sample.target.size[::-1], bool)
        for left, top, right, bottom in boxes(sample.scene):
            mask[top:bottom, left:right] = False
        assert (pixels(resized) == pixels(sample.target))[mask].all()
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("colour", COLOURS)
def test_recolouring(colour):
    for name in ("owl", "red apple", "soccer ball"):
        artwork = shipped_artwork(name)
        painted = recolour(artwork, colour)
        before, after = pixels(artwork), pixels(painted)
        assert (before[..., 3] == after[..., 3]).all() and painted.mode == "RGBA"
        solid = after[before[..., 3] > 250][:, :3]
        mean = solid.mean(0) / 255
        off = abs(colorsys.rgb_to_hsv(*mean)[0] - colorsys.rgb_to_hsv(*(v / 255 for v in COLOURS[colour]))[0])
        assert min(off, 1 - off) < 0.04 and colorsys.rgb_to_hsv(*mean)[1] > 0.2
        assert solid.std() > 10  # still shaded
    assert recolour(Image.new("RGBA", (4, 4)), colour).getpixel((0, 0))[3] == 0  # nothing to see, nothing to divide by
    assert recolours_visibly(shipped_artwork("owl"), "blue") and not recolours_visibly(
        shipped_artwork("red apple"), "red"
    )
