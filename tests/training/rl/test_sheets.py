"""Tests of the contact sheets: which members are shown, with which scores."""

import io
from types import SimpleNamespace

from PIL import Image
from rollouts import FakeRanks, source

from uniref_fast.data.dataset import Row
from uniref_fast.rewards.types import Failure
from uniref_fast.training.rl.generator import Batch
from uniref_fast.training.rl.sheets import best_and_worst, first_members, group_sheet, heldout_sheet


def prepared(number):
    row = Row(f"instruction {number}", (source(1),), source(2), None, f"rows.jsonl:{number}")
    return SimpleNamespace(
        row=row, instruction=row.instruction, load_references=lambda: [s.load() for s in row.references]
    )


def batch_of(groups, members):
    """A batch whose images have the number of the group and the member as their colour."""
    keys = [[(0, group, member) for member in range(members)] for group in range(groups)]
    images = {key: Image.new("RGB", (8, 8), (key[1], key[2], 0)) for group in keys for key in group}
    return Batch([SimpleNamespace(prepared=prepared(group)) for group in range(groups)], [], keys, images=images)


def colour(image):
    return image.getpixel((0, 0))[:2]


def test_the_best_and_the_worst_member_of_each_group():
    batch = batch_of(3, 3)
    scores = {(0, 0, 0): {"quality": 1.0}, (0, 0, 1): {"quality": 9.0}, (0, 0, 2): {"quality": 5.0},
              (0, 1, 1): {"quality": 3.0},  # alone: there is nothing to compare
              (0, 2, 0): {"quality": 4.0}, (0, 2, 2): {"quality": 2.0}}  # fmt: skip
    groups = best_and_worst(batch, scores, lambda axes: axes["quality"], 5, FakeRanks())
    shown = [{label: (colour(image), axes["quality"]) for label, (image, axes) in one.images.items()} for one in groups]
    assert shown == [
        {"best": ((0, 1), 9.0), "worst": ((0, 0), 1.0)},
        {"best": ((2, 0), 4.0), "worst": ((2, 2), 2.0)},
    ]
    assert [one.prepared.instruction for one in groups] == ["instruction 0", "instruction 2"]
    assert len(best_and_worst(batch, scores, lambda axes: axes["quality"], 1, FakeRanks())) == 1


def test_images_of_other_ranks_are_shown():
    batch = batch_of(2, 2)
    theirs = {key: batch.images.pop(key) for key in [(0, 1, 0), (0, 1, 1)]}
    scores = {key: {"quality": float(key[2])} for group in batch.keys for key in group}
    ranks = FakeRanks(0, 2, others=lambda value: [theirs])
    groups = best_and_worst(batch, scores, lambda axes: axes["quality"], 2, ranks)
    assert [colour(image) for one in groups for image, _ in one.images.values()] == [(0, 1), (0, 0), (1, 1), (1, 0)]


def test_the_first_member_of_held_out_rows_with_or_without_scores():
    batch = batch_of(3, 1)
    results = {(0, 0, 0): {"quality": 6.0}, (0, 1, 0): Failure("timeout", "late"), (0, 2, 0): {"quality": 1.0}}
    groups = first_members(batch, results, 2, FakeRanks())
    assert [one.images["result"][1] for one in groups] == [{"quality": 6.0}, {}]


def test_sheets_are_pictures_with_the_target_for_held_out_rows():
    batch = batch_of(2, 1)
    groups = first_members(batch, {keys[0]: {"quality": 6.0} for keys in batch.keys}, 2, FakeRanks())
    plain, heldout = group_sheet(groups), heldout_sheet(groups)
    assert heldout.width > plain.width, "one more column, the target"
    for sheet in (plain, heldout):
        sheet.save(io.BytesIO(), "PNG")
