"""Files of a synthetic dataset: complete, reproducible, resumable, never overwritten by accident."""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from uniref_fast.scenes.artworks import artworks, shipped_artwork
from uniref_fast.scenes.card import dataset_card
from uniref_fast.scenes.config import MakeConfig
from uniref_fast.scenes.dataset import DATASET_FILES, GenerationSummary, write_dataset
from uniref_fast.scenes.make import sample
from uniref_fast.scenes.splits import SPLITS

SMALL = MakeConfig(artworks("shipped"), size=64, references=(0, 1, 3))
COUNTS = {"train": 70, "heldout_objects": 5, "heldout_combinations": 3}


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def generated(out: Path, counts=COUNTS, config=SMALL, workers=1, force=False, generate=sample) -> GenerationSummary:
    return write_dataset(out, config, counts, workers, force, generate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "data"
    generated(out)
    return out


def rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_rows_are_canonical_and_equal_the_samples_in_memory(folder):
    for split, count in COUNTS.items():
        read = rows(folder, split)
        assert len(read) == count
        for index, row in enumerate(read[:6]):
            result = sample(split, index, SMALL)
            assert (row["instruction"], row["task_type"]) == (result.instruction, result.task_type)
            assert row["scene"] == json.loads(json.dumps(result.scene))
            names = [f"images/{split}/{index:06d}_{i}.png" for i in range(len(result.references))]
            assert row["input_images"] == names and row["output_image"] == f"images/{split}/{index:06d}_out.png"
            for name, image in zip([*names, row["output_image"]], [*result.references, result.target], strict=True):
                with Image.open(folder / name) as read_image:
                    assert read_image.mode == "RGB" and read_image.tobytes() == image.tobytes()


def test_a_dataset_has_all_its_files(folder):
    assert {path.name for path in folder.iterdir()} == DATASET_FILES
    everything = [row for split in SPLITS for row in rows(folder, split)]
    objects = [t for row in everything for s in (row["scene"], *row["scene"]["references"]) for t in s["objects"]]
    files = {f"artworks/{path.name}" for path in (folder / "artworks").glob("*.png")}
    assert files == {placed["artwork"] for placed in objects}
    for name in ("owl", "crown"):
        if (path := folder / f"artworks/{name}.png").exists():
            assert Image.open(path).tobytes() == shipped_artwork(name).tobytes()
    assert "SIL OPEN FONT LICENSE" in (folder / "artworks/OFL.txt").read_text()
    assert "Noto Color Emoji" in (folder / "artworks/NOTICE.md").read_text()
    facts = json.loads((folder / "made.json").read_text())
    assert facts["made_by"] == "uniref-fast data make" and facts["arguments"]["seed"] == 0
    assert {split: facts["counts"][split]["rows"] for split in SPLITS} == COUNTS
    assert (
        sum(facts["counts"]["train"]["by_task"].values())
        == 70
        == sum(facts["counts"]["train"]["by_references"].values())
    )
    assert facts["heldout_objects"] == list(SMALL.objects("heldout_objects")) and "blake2b" in facts["split_rule"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "path: heldout_objects.jsonl" in card and "| train | 70 |" in card
    assert "--train 70 --heldout 5 --size 64" in card and "--tasks" not in card
    chosen = {**facts, "arguments": {**facts["arguments"], "tasks": ["move", "move", "recolour"]}}
    assert "--tasks move,move,recolour\n" in dataset_card(chosen)
    siblings = {path.name for path in folder.parent.iterdir()}
    assert siblings == {folder.name}  # no temporary file remains


def test_a_larger_dataset_begins_with_the_smaller_one(folder, tmp_path):
    generated(tmp_path / "more", {"train": 100, "heldout_objects": 0, "heldout_combinations": 0})
    text = (folder / "train.jsonl").read_text()
    assert (tmp_path / "more/train.jsonl").read_text().startswith(text)
    fewer, more = tree(folder / "images/train"), tree(tmp_path / "more/images/train")
    assert fewer.items() <= more.items() and len(more) > len(fewer)
    assert not (tmp_path / "more/heldout_objects.jsonl").exists()
    assert not (tmp_path / "more/images/heldout_objects").exists()


def test_any_number_of_processes_gives_the_same_bytes(folder, tmp_path):
    generated(tmp_path / "data", workers=3)
    assert tree(tmp_path / "data") == tree(folder)


class StoppedError(Exception):
    pass


def stops_at(index: int):
    def generate(split, i, config):
        if (split, i) == ("train", index):
            raise StoppedError
        return sample(split, i, config)

    return generate


def test_an_interrupted_run_is_continued(folder, tmp_path):
    out, partial = tmp_path / "data", tmp_path / ".data.making"
    with pytest.raises(StoppedError):
        generated(out, generate=stops_at(66))
    assert not out.exists() and partial.exists()
    drawn = []

    def generate(split, index, config):
        drawn.append((split, index))
        return sample(split, index, config)

    # one finished part is damaged since: it is result again, the other is not
    damaged = partial / "images/train/000033_out.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    result = generated(out, generate=generate)
    assert result.resumed == 32 and sorted(i for split, i in drawn if split == "train") == list(range(32, 70))
    assert tree(out) == tree(folder) and {path.name for path in tmp_path.iterdir()} == {"data"}


def test_an_interrupted_run_with_other_arguments_is_discarded(folder, tmp_path):
    with pytest.raises(StoppedError):
        generated(tmp_path / "data", config=MakeConfig(SMALL.artworks, 64, 9, SMALL.references), generate=stops_at(66))
    result = generated(tmp_path / "data")
    assert result.resumed == 0 and tree(tmp_path / "data") == tree(folder)


def test_existing_files_are_not_overwritten(tmp_path):
    few = {"train": 2, "heldout_objects": 0, "heldout_combinations": 0}
    out = tmp_path / "data"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        generated(tmp_path / "file", few)
    out.mkdir()
    generated(out, few)  # an empty folder is allowed
    before = tree(out)
    with pytest.raises(FileExistsError, match="--force"):
        generated(out, few)
    other = MakeConfig(SMALL.artworks, 64, 3, SMALL.references)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        generated(out, few, other, force=True)
    (out / "notes.txt").unlink()
    with pytest.raises(StoppedError):
        generated(out, few, other, force=True, generate=stops_at(1))
    assert tree(out) == before  # the old dataset stays until the new one is complete
    generated(out, few, other, force=True)
    assert tree(out) != before and {path.name for path in tmp_path.iterdir()} == {"data", "file"}
    (out / "made.json").write_text('{"made_by": "me"}')
    with pytest.raises(FileExistsError, match="was not written by"):
        generated(out, few, force=True)


def test_a_run_stopped_between_the_two_renames_loses_nothing(tmp_path):
    few = {"train": 1, "heldout_objects": 0, "heldout_combinations": 0}
    generated(tmp_path / "data", few)
    (tmp_path / "data").rename(tmp_path / ".data.old")
    with pytest.raises(FileExistsError, match="--force"):
        generated(tmp_path / "data", few)
    assert (tmp_path / "data/train.jsonl").exists() and not (tmp_path / ".data.old").exists()


def test_two_runs_do_not_write_one_folder(tmp_path):
    with (tmp_path / ".data.making.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run"):
            generated(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def dies(split, index, config):
    os._exit(9)


def test_a_process_that_dies_is_an_error_with_advice(tmp_path):
    with pytest.raises(RuntimeError, match="same command again"):
        generated(tmp_path / "data", workers=2, generate=dies)
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    """Worker processes end after kill -9, and the same command completes the same bytes."""
    code = (
        "import sys, argparse; from uniref_fast.scenes import make as m\n"
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
    assert re.search(r"^\d+ samples had been written", again.stderr, re.MULTILINE)
    whole = MakeConfig(artworks("shipped"), 64, 0, (0, 1))
    generated(tmp_path / "other", {"train": 320, "heldout_objects": 0, "heldout_combinations": 0}, whole)
    assert tree(tmp_path / "data") == tree(tmp_path / "other")


@pytest.mark.parametrize("place", ["x", "folder/x"])
def test_a_folder_that_cannot_be_created_is_named(tmp_path, monkeypatch, place):
    def refuse(*args, **options):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path if "/" in place else os, "mkdir" if "/" in place else "open", refuse)
    with pytest.raises(OSError, match=rf"the folder cannot be created .*name another: .*{place}"):
        generated(tmp_path / place)
