"""The schema of a scene: its JSON form is complete, stable and read back as it was written."""

import hashlib
import json

import pytest

from uniref_fast.scenes.changes import scene_changes
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.scenes.scene import Background, PlacedObject, Scene, SceneError, SceneImage, crop_box, schema_table
from uniref_fast.scenes.splits import SPLITS
from uniref_fast.scenes.tasks import scene_spec


@pytest.mark.parametrize(
    "pictures, digest",
    [
        ("any", "b9086fee7321a5965376953f28d364db78054f82f27857d94591c44b728c0598"),
        ("simple", "3669e0ea6feb12ac835b0ca8bb69f6a84220c6065b15328d05161ca73d6970a1"),
    ],
)
def test_rows_have_the_same_bytes_as_in_earlier_versions(pictures, digest):
    """The digests were taken before the scene had a schema of its own; datasets with this seed must not change."""
    counts = (0, 1, 2, 3, 4, 5, 6) if pictures == "any" else (1, 2, 3)
    config = MakeConfig(artworks("shipped"), size=64, seed=3, references=counts, pictures=pictures)
    specs = [scene_spec(split, index, config) for split in SPLITS for index in range(40)]
    text = "".join(json.dumps([spec.instruction, spec.task_type, spec.scene.to_json()]) + "\n" for spec in specs)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_scenes_are_read_back_as_they_were_written():
    config = MakeConfig(artworks("shipped"), size=64)
    for split in SPLITS:
        for index in range(60):
            scene = scene_spec(split, index, config).scene
            values = json.loads(json.dumps(scene.to_json()))
            read = Scene.from_json(values)
            assert json.loads(json.dumps(read.to_json())) == values
            assert scene_changes(read) == scene_changes(scene)


def test_the_table_of_the_card_has_every_key():
    table = schema_table()

    def keys(value):
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    config = MakeConfig(artworks("shipped"), size=64)
    found = set().union(*(keys(sample("train", index, config).scene) for index in range(60)))
    assert len(found) == 14 and all(f"| `{key}` |" in table for key in found)


def test_scenes_of_other_programs_may_lack_what_scoring_does_not_need():
    placed = {"artwork": "a.png", "centre": [32, 32], "side": 16, "colour": None, "picture": None}
    values = {"size": [64.0, 64], "background": {"kind": None, "picture": None, "crop": None}, "objects": [placed]}
    scene = Scene.from_json(values)
    assert scene.size == (64, 64) and scene.references == () and scene.objects[0].name == ""
    assert scene.to_json()["objects"][0] == {"name": "", "artwork": "a.png", "centre": [32, 32], "side": 16}
    for wrong in ({"name": 3}, {"picture": "first"}, {"picture": 1.5}):
        with pytest.raises(SceneError, match=f"scene.objects.0..{next(iter(wrong))}"):
            Scene.from_json(values | {"objects": [placed | wrong]})
    with pytest.raises(SceneError, match="whole pixels"):
        Scene.from_json(values | {"size": [64.5, 64]})


def test_changes_of_an_edit():
    owl, cat = PlacedObject.at("owl", (0, 0), 16), PlacedObject.at("cat", (40, 40), 16)
    dog = PlacedObject.at("dog", (20, 40), 16)
    first = SceneImage((64, 64), Background("sea", 1), (owl, cat))
    second = SceneImage((32, 32), Background("sea", 2), (dog.moved((0, 0)),))
    ground = Background.of_picture(1, (64, 64), (64, 64))
    changes = scene_changes(Scene((64, 64), ground, (owl,), (), (first, second)))
    assert changes.kept == (True,) and changes.removed == (cat,) and not changes.new_background
    assert [placed.name for placed in changes.unused] == ["dog"] and changes.unused[0].centre == (32, 32)
    moved = scene_changes(Scene((64, 64), Background("sea", 3), (owl, dog), (), (first, second)))
    assert moved.kept == (True, False) and moved.removed == () and moved.new_background


def test_crop_box_keeps_the_aspect_ratio():
    assert crop_box((128, 128), (128, 80)) == (0, 24, 128, 104)
    assert crop_box((160, 96), (96, 128)) == (44, 0, 116, 96)
    assert crop_box((96, 64), (96, 64)) == (0, 0, 96, 64)
