"""Rows of an evaluation: noise, sizes, labels of files, and the input baseline."""

import json

import pytest
from PIL import Image

from uniref_fast.data.dataset import Dataset
from uniref_fast.evaluation.requests import eval_request, rows_by_file

pytestmark = pytest.mark.usefixtures("threads")


def test_noise_follows_from_the_seed_and_the_row(builtin_pipe, data):
    rows = Dataset(data / "heldout_objects.jsonl")
    sizes = dict(target_side=32, budget=32, num_inference_steps=2, true_cfg_scale=1.0)

    def seed(number, **given):
        key = (given.pop("file", "a"), number)
        return eval_request(builtin_pipe, rows[0], key, **{**sizes, "seed": 0, **given}).request.seed

    assert seed(0) == seed(0) == seed(0, num_inference_steps=9, target_side=64)
    assert len({seed(0), seed(1), seed(0, seed=1), seed(0, file="b")}) == 4


def test_sizes_of_rows_with_and_without_target(builtin_pipe, tmp_path):
    for name, size in (("w", (160, 80)), ("s", (40, 40))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    lines = [
        {"instruction": "x", "input_images": ["s.png"], "output_image": "w.png"},  # scaled down to the area
        {"instruction": "x", "input_images": ["w.png"], "output_image": "s.png"},  # never scaled up
        {"instruction": "x", "input_images": ["s.png", "w.png"]},  # the last picture's ratio, the whole area
        {"instruction": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = Dataset(tmp_path / "rows.jsonl", targets="optional")
    sizes = dict(target_side=64, budget=None, seed=0, num_inference_steps=2, true_cfg_scale=1.0)
    plans = [eval_request(builtin_pipe, row, ("a", 0), **sizes) for row in rows]
    assert [one.size for one in plans] == [(80, 48), (48, 48), (80, 48), (64, 64)]
    assert [one.target and one.target.size for one in plans] == [(80, 48), (48, 48), None, None]


def test_labels_of_files_and_the_limit(tmp_path):
    line = json.dumps({"instruction": "x"}) + "\n"
    for name, count in (("a/x.jsonl", 3), ("b/x.jsonl", 1), ("y.jsonl", 2), ("y.tar.jsonl", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line * count)
    (tmp_path / "y.json").write_text(f"[{line.strip()}]")
    dataset = Dataset(tmp_path, targets="optional")
    assert rows_by_file(dataset, 2) == {
        "a/x": [0, 1], "b/x": [3], "y.json": [4], "y.jsonl": [5, 6], "y.tar": [7],
    }  # fmt: skip
    (tmp_path / "b" / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no rows in b/x\.jsonl"):
        rows_by_file(Dataset(tmp_path, targets="optional"), None)
