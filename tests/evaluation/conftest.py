"""Data and results that several tests of evaluations share."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from uniref_fast.evaluation.evaluate import EvalConfig, evaluate
from uniref_fast.scenes.dataset import write_dataset
from uniref_fast.scenes.make import MakeConfig, artworks, sample


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """3 and 2 held-out rows of 64 pixels."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    config = MakeConfig(artworks("shipped"), size=64, references=(0, 1, 2))
    counts = {"train": 0, "heldout_objects": 3, "heldout_combinations": 2}
    write_dataset(folder, config, counts, 1, force=False, generate=sample)
    return folder


@pytest.fixture(scope="session")
def config(data):
    """Configuration of an evaluation of 5 rows in batches of 2."""
    files = (data / "heldout_objects.jsonl", data / "heldout_combinations.jsonl")
    return EvalConfig(
        files, Path(), num_inference_steps=2, true_cfg_scale=1.0, budget=32, target_side=32, batch=2, grid=1
    )


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory):
    """Results of an evaluation without interruption."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "deep" / "results"
    evaluate(replace(config, out=out))
    torch.set_num_threads(before)
    return out


@pytest.fixture
def benchmark_rows(tmp_path):
    """Rows of a public benchmark, without target and scene."""
    for name, color in (("r", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{name}.png")
    lines = [
        {"idx": i, "input": ["r.png", "b.png"][: 1 + i % 2], "prompt": f"do {i}", "Task": "HOI", "human_indices": []}
        for i in range(3)
    ]
    (tmp_path / "mico_bench_hoi.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "mico_bench_hoi.jsonl"
