"""Datasets of several files: order, errors of rows, what is left out, random access."""

import base64
import io
import json
import os
import pickle
import random
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from data_rows import BLUE, GREEN, ONE, RED, TWO, color_of, encoded, meaning, row, write_jsonl, write_parquet
from PIL import Image

from uniref_fast.cli import main
from uniref_fast.data.dataset import Dataset, RowError, left_out
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"output_image": "b.png"}, "no 'instruction'; keys found: ['output_image']"),
        (row(text=""), "instruction is empty"),
        (row(text=" \n\t"), "instruction is empty"),
        (row(text=["do it"]), "instruction must be a text"),
        (row(text="\ud800 half"), "surrogate"),
        (row(target=None), "no target image: no 'output_image'"),
        (row(target=["b.png"]), "output_image must be one image, got a list of 1"),
        (row(target=7), "output_image must be a path"),
        (row(references=["r.png", None]), "input_images[1] must be one image, got null"),
        (row(references=["r.png", ["g.png"]]), "input_images[1] must be one image, got a list"),
        (row(references=["r.png", 3]), "input_images[1] must be a path"),
        (row(references=["r.png", "none.png"]), "no image file 'none.png'"),
        (row(references=[""]), "the path of an image is empty"),
        (row(references=["."]), "no image file '.'"),
        (row(references=["../other/r.png"]), "leaves its folder"),
        (row(references=["a/../../r.png"]), "leaves its folder"),
        (row(task_type=3), "task_type must be a text"),
        (row(image_list=["r.png"]), "'image_list' does not belong to the format of this file"),
        ({"input_image": ["r.png"], "output_image": "b.png", "instruction": "x"}, "did you mean 'input_images'?"),
        ("text", "a row must be a JSON object"),
        (None, "a row must be a JSON object"),
        ([row()], "a row must be a JSON object"),
    ],
)
def test_a_broken_row_has_a_place_and_a_reason_and_the_others_are_read(folder, values, reason):
    dataset = Dataset(write_jsonl(folder / "rows.jsonl", [row(), values, row()]))
    with pytest.raises(RowError) as error:
        dataset[1]
    assert str(error.value).startswith("rows.jsonl:2: ") and reason in str(error.value)
    assert error.value.where == dataset.where(1) == "rows.jsonl:2" and reason in error.value.reason
    assert meaning(dataset[0]) == meaning(dataset[2]) == TWO
    again = pickle.loads(pickle.dumps(error.value))  # as from a worker
    assert str(again) == str(error.value) and isinstance(again, RowError)


def refused_paths(folder):
    """Paths that the file system refuses, or that are no file, with a part of the reason."""
    (folder / "sub").mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    picture = base64.b64encode(encoded(RED)).decode()
    return {
        picture * 40: "characters: it is an encoded image, not a path",
        "data:image/png;base64," + picture * 40: "it is an encoded image, not a path",
        picture[16:] * 40: "File name too long",
        "x" * 256 + ".png": "File name too long",
        "a/" * 3000 + "x.png": "File name too long",
        "a\0b.png": "the system refuses that path (",
        "\ud800.png": "the system refuses that path (",
        "loop.png": "Too many levels of symbolic links",
        "dangling.png": "no image file 'dangling.png' (expected at ",
        "r.png/x.png": "Not a directory",
        "sub": "is a folder",
        "pipe.png": "is not a plain file",
    }


def test_a_path_that_the_file_system_refuses_is_a_broken_row(folder, capsys):
    paths = refused_paths(folder)
    lines = [row(), *(row([path]) for path in paths), *(row(target=path) for path in paths), row()]
    write_jsonl(folder / "rows.jsonl", lines)
    dataset = Dataset(folder / "rows.jsonl")
    assert meaning(dataset[0]) == meaning(dataset[-1]) == TWO
    for index, reason in enumerate([*paths.values()] * 2, start=1):
        with pytest.raises(RowError) as error:
            dataset[index]
        assert str(error.value).startswith(f"rows.jsonl:{index + 1}: ") and reason in str(error.value)
        assert len(str(error.value)) < 600
    assert main(["data", "check", str(folder / "rows.jsonl"), "--show", "100"]) == 1
    assert f"{len(lines)} in 1 file(s), {len(lines) - 2} broken" in capsys.readouterr().out


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_path_without_permission_is_a_broken_row(folder, monkeypatch, error):
    dataset = Dataset(write_jsonl(folder / "rows.jsonl", [row()]))

    def refuse(self, **options):
        raise error

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(RowError, match=rf"^rows.jsonl:1: no image file 'r.png': .*{error.strerror}"):
        dataset[0]


def test_names_that_are_not_utf_8_can_be_read_and_printed(folder, capsys):
    """Python gives the bytes of such a name as half surrogate pairs, which no terminal takes."""
    odd = os.fsdecode(b"\xff.png")
    (folder / odd).write_bytes(encoded(RED))
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"no picture")
    lines = [row([odd]), row([os.fsdecode(b"\xfe.png")]), row(id="\ud800"), row(task_type="\ud800")]
    path = write_jsonl(folder / os.fsdecode(b"\xfd.jsonl"), lines)
    dataset = Dataset(path)
    assert meaning(dataset[0]) == ONE and dataset[2].key == "\\ud800"
    with pytest.raises(RowError, match="task_type has half of a surrogate pair"):
        dataset[3]
    assert main(["data", "check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "\\udcfd.jsonl:2: \\udcfe.png: not an image" in out and "2 broken" in out


def test_a_row_has_all_values_of_the_file(folder):
    found = Dataset(write_jsonl(folder / "a.jsonl", [row(text=" Ünï\u2028code ", task_type="edit", scene={"a": 1})]))[0]
    assert (found.instruction, found.task_type, found.where) == (" Ünï\u2028code ", "edit", "a.jsonl:1")


SCENE = {
    "size": [8, 6],
    "objects": [{"artwork": "art/one.png"}, {"artwork": "art/none.png"}],
    "references": [{"objects": [{"artwork": "art/two.png"}, {"artwork": "art/one.png"}]}],
}


def test_the_scene_of_a_row_comes_with_its_artworks(folder):
    (folder / "art").mkdir()
    for name, color in (("one", RED), ("two", GREEN)):
        (folder / "art" / f"{name}.png").write_bytes(encoded(color))
    lines = [row(scene=SCENE), row(scene=json.dumps(SCENE)), row()]
    jsonl = Dataset(write_jsonl(folder / "a.jsonl", lines))
    columns = {key: [line[key] for line in lines[:2]] for key in row()}
    structs = Dataset(write_parquet(folder / "s.parquet", columns | {"scene": [SCENE] * 2}))
    texts = Dataset(write_parquet(folder / "t.parquet", columns | {"scene": [json.dumps(SCENE)] * 2}))
    for found in (jsonl[0], jsonl[1], structs[1], texts[0]):
        assert found.scene == SCENE
        assert {path: color_of(source) for path, source in found.artworks.items()} == {
            "art/one.png": RED,
            "art/two.png": GREEN,
        }, "what is there, of the references too"
    assert jsonl[2].scene is None and jsonl[2].artworks == {}
    bare = replace(jsonl[0], scene=None, artworks={})
    assert jsonl[0] != bare and hash(jsonl[0]) == hash(bare), "rows with a scene can be keys too"
    (folder / "meta").mkdir()
    beside = Dataset(write_jsonl(folder / "meta" / "b.jsonl", lines), image_folder=folder)
    assert set(beside[0].artworks) == {"art/one.png", "art/two.png"}
    members = {"1.json": json.dumps({"instruction": "do it", "scene": SCENE}).encode(), "1.output.png": encoded(BLUE),
               "art/one.png": encoded(RED)}  # fmt: skip
    with tarfile.open(folder / "c.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (found,) = Dataset(folder / "c.tar")
    assert found.scene == SCENE and {path: color_of(s) for path, s in found.artworks.items()} == {"art/one.png": RED}


@pytest.mark.parametrize("scene", ["a beach", "[1, 2]", "{broken", "\ud800", 3, None, [{"a": 1}], True])
def test_other_values_under_scene_are_ignored(folder, scene):
    found = Dataset(write_jsonl(folder / "a.jsonl", [row(scene=scene)]))[0]
    assert found.scene is None and found.artworks == {} and meaning(found) == TWO


@pytest.mark.parametrize(
    "scene",
    [
        {},
        {"objects": 3},
        {"objects": [None, 3, {}, {"artwork": 5}, {"artwork": ""}, {"artwork": "x" * 5000}, {"artwork": "a\0b"}]},
        {"objects": [{"artwork": "../r.png"}], "references": [None, {"objects": None}, 7]},
        {"objects": [], "references": "none"},
    ],
)
def test_a_scene_with_wrong_values_does_not_break_its_row(folder, scene):
    found = Dataset(write_jsonl(folder / "a.jsonl", [row(scene=scene)]))[0]
    assert found.scene == scene and found.artworks == {} and meaning(found) == TWO


def test_files_that_are_not_read_are_reported(folder):
    write_jsonl(folder / "a.jsonl", [row()])
    for name in ("b.tsv", "c.jsonl.gz", "d.arrow"):
        (folder / name).write_text("x")
    assert [name for name, _ in Dataset(folder).left_out] == ["b.tsv", "c.jsonl.gz", "d.arrow"]
    (folder / "a.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"has no file of rows .*; b.tsv is not read: save .* as .csv.*; c.jsonl.gz is"
    ):
        Dataset(folder)
    for name, advice in (("b.tsv", "as .csv"), ("c.jsonl.gz", "unpack it"), ("d.arrow", "to_parquet")):
        with pytest.raises(ValueError, match=f"{name} is not a file of rows; known endings: .*; .*{advice}"):
            Dataset(folder / name)


def test_a_run_reports_the_first_of_many_that_are_left_out(folder):
    write_jsonl(folder / "a.jsonl", [row()])
    for number in range(30):
        (folder / f"{number:02}.tsv").write_text("x")
    reported = left_out([Dataset(folder)])
    assert len(reported) == 21 and reported[0][0] == "00.tsv" and reported[-1][0] == "10 more"


def test_the_same_rows_are_refused_by_check_and_by_training(folder, builtin_pipe):
    (folder / "cut.png").write_bytes(encoded(RED)[:20])
    Image.new("RGB", (402, 2)).save(folder / "long.png")
    lines = [row(), row(["cut.png"]), row(["long.png"]), row(target="long.png"), row(text=""), row(["none.png"]), row()]
    dataset = Dataset(write_jsonl(folder / "a.jsonl", lines))
    encoder = Encoder(builtin_pipe, TensorCache(None), drop_references=1.0)
    checked, trained = {}, {}
    for index in range(len(dataset)):
        for refused, use in (
            (checked, lambda row: row.sizes()),
            (trained, lambda row: encoder.prepare(row, (0, 0), 64, 64)),
        ):
            try:
                use(dataset[index])
            except RowError as error:
                refused[error.where] = error.reason
    assert checked == trained and list(checked) == [f"a.jsonl:{line}" for line in (2, 3, 4, 5, 6)]


def test_the_folder_of_relative_paths(folder):
    (folder / "meta").mkdir()
    beside, absolute = row(), row(references=[str(folder / "r.png"), str(folder / "meta" / ".." / "g.png")])
    path = write_jsonl(folder / "meta" / "a.jsonl", [beside, absolute])
    assert meaning(Dataset(path, image_folder=folder)[0]) == TWO
    assert meaning(Dataset(path, image_folder=folder)[1]) == TWO
    with pytest.raises(RowError, match="expected at"):
        Dataset(path)[0]
    with pytest.raises(ValueError, match=r"image folder .*none does not exist"):
        Dataset(path, image_folder=folder / "none")


@pytest.fixture
def many(folder):
    """One file of each kind, in a folder of folders."""
    (folder / "deep" / ".hidden").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", [row(text="b1"), row(text="b2")])
    write_jsonl(folder / "deep" / ".hidden" / "a.jsonl", [row(text="hidden")])
    (folder / "a.json").write_text(json.dumps([row(text="a1")]))
    (folder / "made.json").write_text('{"seed": 0}')
    (folder / "README.md").write_text("x")
    bytes_ = encoded(BLUE)
    write_parquet(folder / "deep" / "c.parquet", {"output_image": [bytes_] * 3, "instruction": ["c1", "c2", "c3"]})
    with tarfile.open(folder / "deep" / "d.TAR", "w") as archive:
        for name, content in (("1.txt", b"d1"), ("1.output.png", bytes_)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder


def test_a_folder_is_read_in_the_order_of_relative_paths(many):
    dataset = Dataset(many)
    assert [found.instruction for found in dataset] == ["a1", "b1", "b2", "c1", "c2", "c3", "d1"]
    assert dataset.files == ("a.json", "b.jsonl", "deep/c.parquet", "deep/d.TAR")
    assert [name for name, _ in dataset.left_out] == ["made.json"]
    assert dataset[-1].where == "deep/d.TAR:1" and dataset[5].where == "deep/c.parquet:3"
    several = Dataset([many / "deep", many / "b.jsonl"])
    assert [found.instruction for found in several] == ["c1", "c2", "c3", "d1", "b1", "b2"]


def test_files_of_one_name_have_distinct_names(folder):
    for name in ("x", "y"):
        (folder / name).mkdir()
        write_jsonl(folder / name / "a.jsonl", [row()])
    dataset = Dataset([folder / "x" / "a.jsonl", folder / "y" / "a.jsonl"], image_folder=folder)
    assert dataset.files == ("x/a.jsonl", "y/a.jsonl") and dataset[1].where == "y/a.jsonl:1"


def test_paths_that_are_refused(many, tmp_path):
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([], "no paths"),
        ([many / "none.jsonl"], "no such file or folder: .*none.jsonl"),
        ([many / "README.md"], "not a file of rows; known endings: .jsonl"),
        ([tmp_path / "empty"], "has no file of rows"),
        ([many, many / "b.jsonl"], "given twice: .*b.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset(paths)
    with pytest.raises(ValueError, match="targets must be"):
        Dataset(many, targets="some")


def test_a_folder_that_links_to_itself_ends(folder):
    write_jsonl(folder / "a.jsonl", [row()])
    (folder / "again").symlink_to(folder)
    assert len(Dataset(folder)) == 1


def test_the_fingerprint_changes_with_the_data(folder, tmp_path):
    path = write_jsonl(folder / "a.jsonl", [row(), row()])
    before = Dataset(path).fingerprint
    assert before == Dataset([path], targets="optional").fingerprint
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert Dataset(write_jsonl(elsewhere / "a.jsonl", [row(), row()])).fingerprint == before, "a moved folder"
    prints = {before}
    for change in (lambda: path.write_text(path.read_text() + "\n"), lambda: write_jsonl(path, [row()]),
                   lambda: path.rename(folder / "c.jsonl")):  # fmt: skip
        change()
        prints.add(Dataset(next(folder.glob("*.jsonl"))).fingerprint)
    assert len(prints) == 4
    line = json.dumps(row())
    path.write_text(f"{line}\n{line}\n")
    two = Dataset(path).fingerprint
    path.write_text(f"{line}\n{' ' * len(line)}\n")
    assert Dataset(path).fingerprint != two, "as many bytes, fewer rows"


def test_a_replaced_image_has_another_digest_in_a_row_that_is_read_anew(folder):
    image = Dataset(write_jsonl(folder / "a.jsonl", [row()]))
    first = image[0].target
    before = first.digest
    assert pickle.loads(pickle.dumps(first)) == first and pickle.loads(pickle.dumps(first)).digest == before
    first.path.write_bytes(first.read() + b"more")
    assert first.digest == before != image[0].target.digest


def _texts(dataset, indices):
    return [(dataset[i].instruction, dataset[i].target.digest) for i in indices]


def test_random_access_from_threads_and_after_pickling(many):
    dataset = Dataset(many)
    order = [random.Random(0).randrange(len(dataset)) for _ in range(60)]
    expected = _texts(dataset, order)
    assert expected[0][0] in ("a1", "b1", "b2", "c1", "c2", "c3", "d1")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: _texts(dataset, [i])[0], order)) == expected
    state = pickle.dumps(dataset)
    assert len(state) < 6000, "no rows and no pictures travel with it"
    assert _texts(pickle.loads(state), order) == expected


@pytest.mark.slow  # the new process imports torch
def test_a_dataset_works_in_a_new_process(many):
    dataset = Dataset(many)
    dataset[3]  # fills what must not travel
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for i in (6, 3, 0):
            assert meaning(pool.submit(dataset.__getitem__, i).result()) == meaning(dataset[i])


def test_a_deleted_file(folder):
    found = Dataset(write_jsonl(folder / "a.jsonl", [row()]))[0]
    (folder / "r.png").unlink()
    for action in (found.references[0].read, found.references[0].size, found.references[0].load):
        with pytest.raises(ValueError, match=r"^r.png: "):
            action()


def test_the_description_of_a_generated_dataset_is_not_reported_as_left_out(tmp_path):
    """`uniref-fast data make` writes made.json beside its rows; another file of that name is reported."""
    line = {"instruction": "x", "input_images": [], "output_image": None}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "made.json").write_text(json.dumps({"made_by": "uniref-fast data make", "format": 1}))
    assert Dataset(tmp_path, targets="optional").left_out == ()
    (tmp_path / "made.json").write_text(json.dumps({"seed": 1}))
    ((name, _),) = Dataset(tmp_path, targets="optional").left_out
    assert name == "made.json"


def test_lists_without_objects_in_a_folder_are_left_out(tmp_path):
    """Benchmarks store captions beside the images."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "x", "input_images": []}) + "\n")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "captions.json").write_text('["a cat", "a mat"]')
    dataset = Dataset(tmp_path, targets="optional")
    assert dataset.files == ("rows.jsonl",) and dataset.left_out[0][0] == "0/captions.json"
