"""Splits: held-out objects and combinations never occur in train."""

import hashlib
from collections import Counter

import pytest

from uniref_fast.scenes.artworks import Artworks, artworks
from uniref_fast.scenes.config import MakeConfig
from uniref_fast.scenes.placement import overlapping
from uniref_fast.scenes.scene import PlacedObject
from uniref_fast.scenes.splits import SPLITS, combinations, held_out
from uniref_fast.scenes.tasks import scene_spec

CONFIG = MakeConfig(artworks("shipped"))


@pytest.fixture(scope="module")
def specs():
    return {split: [scene_spec(split, i, CONFIG) for i in range(700 if split == "train" else 400)] for split in SPLITS}


def test_combinations_have_one_name_for_both_directions():
    owl, cat = PlacedObject.at("owl", (0, 0), 40), PlacedObject.at("cat", (60, 10), 40)
    assert combinations([owl, cat]) == combinations([cat, owl]) == ("owl|left of|cat",)
    assert combinations([owl, PlacedObject.at("cat", (60, 60), 40)]) == ("owl|above|cat", "owl|left of|cat")
    assert combinations([owl, PlacedObject.at("owl", (60, 60), 40)]) == ()
    assert overlapping([owl, PlacedObject.at("cat", (39, 39), 10)]) and not overlapping(
        [owl, PlacedObject.at("cat", (40, 0), 10)]
    )


def shown(spec) -> set[str]:
    return {placed.name for image in (*spec.scene.references, spec.scene) for placed in image.objects}


def test_held_out_objects_never_occur_in_train(specs):
    names = {split: set().union(*map(shown, specs[split])) for split in SPLITS}
    assert names["heldout_objects"] == set(CONFIG.objects("heldout_objects")) and len(names["heldout_objects"]) == 6
    assert names["train"] == set(CONFIG.objects("train")) == set(CONFIG.artworks.names) - names["heldout_objects"]
    assert names["heldout_combinations"] <= names["train"]
    other = MakeConfig(artworks("shipped"), seed=1)
    assert other.objects("heldout_objects") != CONFIG.objects("heldout_objects")


def test_shipped_objects_are_held_out_of_larger_pools_too():
    """A model trained with a font can then be tested on shipped artworks that it never saw."""
    shipped = CONFIG.artworks
    larger = MakeConfig(Artworks("shipped", dict(shipped.codes) | {f"placed {i}": 0x1F300 + i for i in range(200)}))
    held = set(larger.objects("heldout_objects"))
    assert len(held) == 21 and held & set(shipped.names) == set(CONFIG.objects("heldout_objects"))
    assert not held & set(larger.objects("train"))


def test_held_out_combinations_never_occur_in_train(specs):
    """Check the scenes with the documented rule alone."""

    def found(spec) -> set[str]:
        keys = set()
        for first in spec.scene.objects:
            for second in spec.scene.objects:
                size = (first.side + second.side) / 4
                if first.name != second.name and second.centre[0] - first.centre[0] >= size:
                    keys.add(f"{first.name}|left of|{second.name}")
                if first.name != second.name and second.centre[1] - first.centre[1] >= size:
                    keys.add(f"{first.name}|above|{second.name}")
        return keys | {key for key in spec.scene.combinations if f"|{spec.task_type}|" in key}

    def held(key: str) -> bool:
        return int.from_bytes(hashlib.blake2b(f"{CONFIG.seed}|{key}".encode()).digest()[:8], "big") % 10 == 0

    train = set().union(*map(found, specs["train"]))
    unseen = [found(spec) for spec in specs["heldout_combinations"]]
    assert not any(map(held, train)) and all(any(map(held, keys)) for keys in unseen)
    assert not train & {key for keys in unseen for key in keys if held(key)}
    for spec in (spec for split in SPLITS for spec in specs[split]):
        assert found(spec) == set(spec.scene.combinations)
    assert held_out(0, "owl|left of|crown") == held("owl|left of|crown")
    # edits and compositions of a single object are held out too, by place or colour
    kinds = Counter(key.split("|")[1] for keys in unseen for key in keys if held(key))
    assert {"left of", "above", "compose", "generate", "recolour", "remove", "move", "add"} <= set(kinds)
