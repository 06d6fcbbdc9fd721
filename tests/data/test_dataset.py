"""Readers of training data: every file kind and naming, references in order, and an error for every kind of damage."""

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

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from uniref_fast.cli import main
from uniref_fast.data import readers
from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError, left_out
from uniref_fast.encode import prompt_embeddings
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder


def encoded(color, size=(8, 6), form="PNG", **options):
    """Bytes of a one-coloured picture."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form, **options)
    return file.getvalue()


def color_of(source):
    return source.load().getpixel((0, 0))


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def folder(tmp_path):
    """r.png, g.png and b.png of one colour each."""
    for name, color in (("r", RED), ("g", GREEN), ("b", BLUE)):
        (tmp_path / f"{name}.png").write_bytes(encoded(color))
    return tmp_path


def write_jsonl(path, values, newline="\n"):
    path.write_text("".join(json.dumps(value) + newline for value in values), encoding="utf-8")
    return path


def row(references=("r.png", "g.png"), target="b.png", text="do it", **more):
    return {"input_images": list(references), "output_image": target, "instruction": text, **more}


def meaning(found):
    """What a row says, with colours for pictures."""
    return found.instruction, [color_of(s) for s in found.references], found.target and color_of(found.target)


# ---- names of keys ----

TWO = ("do it", [RED, GREEN], BLUE)
ONE = ("do it", [RED], BLUE)


@pytest.mark.parametrize(
    "values, expected",
    [
        (row(), TWO),
        ({**row(), "input_images": "r.png"}, ONE),
        (row(references=()), ("do it", [], BLUE)),
        ({"output_image": "b.png", "instruction": "do it", "input_images": None}, ("do it", [], BLUE)),
        ({"output_image": "b.png", "instruction": "do it"}, ("do it", [], BLUE)),
        ({"prompt": "do it", "image": "b.png", "edit_image": ["r.png", "g.png"]}, TWO),
        ({"prompt": "do it", "image": "b.png", "edit_image": "r.png"}, ONE),
        ({"prompt": "do it", "images": ["r.png", "g.png"]}, ("do it", [RED, GREEN], None)),
        ({"prompt": "do it", "image": "r.png", "requirement": "red"}, ("do it", [RED], None)),
        ({"image_path": "b.png", "control_path": "r.png", "caption": "do it"}, ONE),
        ({"image_path": "b.png", "control_path_1": "g.png", "control_path_0": "r.png", "caption": "do it"}, TWO),
        ({"image_path": "b.png", "caption": "do it"}, ("do it", [], BLUE)),
        ({"source_image": "r.png", "target_image": "b.png", "instruction": "do it", "instruction_cn": "x"}, ONE),
        ({"image_path": ["r.png", "g.png"], "edit_path": "b.png", "prompt": "do it"}, TWO),
        ({"image_list": ["r.png", "g.png", "b.png"], "instruction_list": ["do it"]}, TWO),
        ({"image_list": ["r.png", "g.png", "b.png"], "instruction_list": [["do it", "make it"]]}, TWO),
        ({"image_list": ["r.png", "g.png", "b.png"], "instruction": "do it"}, TWO),
    ],
)
def test_every_naming_is_understood(folder, values, expected):
    path = write_jsonl(folder / "rows.jsonl", [values])
    assert meaning(Dataset(path, targets="optional")[0]) == expected
    if expected[2] is None:
        with pytest.raises(RowError, match=r"^rows.jsonl:1: no target image"):
            Dataset(path)[0]
    else:
        assert meaning(Dataset(path)[0]) == expected


MICO = {
    "idx": 3, "input": ["r.png", "g.png"], "reference": "b.png", "Task": "HOI", "editing_type": "1 Human + 1 Object",
    "prompt": "do it", "human_indices": [0],
}  # fmt: skip


def test_mico_bench(folder):
    """Its `reference` is one of many right answers: no target. De&Re has better prompts under another name."""
    dere = {**{k: v for k, v in MICO.items() if k not in ("idx", "editing_type")}, "ed_idx": 9, "Task": "DeRe"}
    lines = [MICO, {**dere, "refined_prompt": "do it well"}, {**dere, "refined_prompt": ""}, {**MICO, "task_type": "x"}]
    dataset = Dataset(write_jsonl(folder / "mico_bench_hoi.jsonl", lines), targets="optional")
    assert [meaning(found) for found in dataset] == [
        ("do it", [RED, GREEN], None),
        ("do it well", [RED, GREEN], None),
        ("do it", [RED, GREEN], None),
        ("do it", [RED, GREEN], None),
    ]
    assert [found.task_type for found in dataset] == ["HOI", "DeRe", "DeRe", "x"]
    columns = {key: [MICO[key]] for key in MICO} | {"refined_prompt": ["do it well"]}
    (found,) = Dataset(write_parquet(folder / "m.parquet", columns), targets="optional")
    assert (found.instruction, found.task_type) == ("do it well", "HOI")
    with pytest.raises(RowError, match="Task must be a text, got 3"):
        Dataset(write_jsonl(folder / "a.jsonl", [{**MICO, "Task": 3}]), targets="optional")[0]
    with pytest.raises(RowError, match="did you mean 'input'"):
        Dataset(write_jsonl(folder / "a.jsonl", [MICO, {**MICO, "input": None, "inputs": ["r.png"]}]),
                targets="optional")[1]  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        row(input="a text", human_indices=[0], Task=3, refined_prompt=7, reference="a text"),
        row(input=["a text"], prompt="another", human_indices=[]),
        {"prompt": "do it", "edit_image": ["r.png", "g.png"], "image": "b.png", "input": "x", "human_indices": [1]},
    ],
)
def test_the_common_words_of_mico_bench_mean_nothing_in_other_formats(folder, values):
    found = Dataset(write_jsonl(folder / "a.jsonl", [values]))[0]
    assert meaning(found) == TWO and found.task_type is None


@pytest.mark.parametrize("key, value", [("reference", "b.png"), ("input", ["r.png"])])
def test_pictures_under_those_words_are_refused_in_other_formats(folder, key, value):
    with pytest.raises(RowError, match=f"^a.jsonl:1: key '{key}' holds images .* did you mean 'input_images'"):
        Dataset(write_jsonl(folder / "a.jsonl", [row(**{key: value})]))[0]


def test_a_text_alone_with_those_words_is_still_a_text_alone(folder):
    values = {"instruction": "do it", "prompt": "x", "input": "y", "human_indices": []}
    found = Dataset(write_jsonl(folder / "a.jsonl", [values]), targets="optional")[0]
    assert meaning(found) == ("do it", [], None)


def test_gedit_bench(folder):
    """Both pictures are structs of bytes; the raw one is what is edited, the other is the same, resized."""
    pictures = [{"bytes": encoded(color), "path": None} for color in (RED, BLUE)]
    columns = {
        "task_type": ["background_change"], "key": ["0a"], "instruction": ["do it"], "instruction_language": ["en"],
        "input_image": pictures[1:], "input_image_raw": pictures[:1], "Intersection_exist": [True],
    }  # fmt: skip
    (found,) = Dataset(write_parquet(folder / "train-0.parquet", columns), targets="optional")
    assert meaning(found) == ("do it", [RED], None) and found.task_type == "background_change"
    lines = [{"instruction": "do it", "input_image": "b.png", "input_image_raw": "r.png"}]
    assert meaning(Dataset(write_jsonl(folder / "g.jsonl", lines), targets="optional")[0]) == ("do it", [RED], None)


def test_omnicontext(folder):
    """As on the hub: lists of structs of bytes, no target; and as lines with paths."""
    facts = {"key": "a", "task_type": "multi_object", "instruction": "do it", "instruction_language": "en"}
    pictures = [{"bytes": encoded(color), "path": "x.png"} for color in (RED, GREEN)]
    write_parquet(folder / "OmniContext.parquet", {**{k: [v] for k, v in facts.items()}, "input_images": [pictures]})
    (folder / "OmniContext.json").write_text(json.dumps([{**facts, "input_images": ["r.png", "g.png"]}]))
    for name in ("OmniContext.parquet", "OmniContext.json"):
        (found,) = Dataset(folder / name, targets="optional")
        assert meaning(found) == ("do it", [RED, GREEN], None) and found.task_type == "multi_object"


def test_more_than_ten_numbered_references_stay_in_order(folder):
    shades = [(20 * i, 0, 0) for i in range(12)]
    for i, shade in enumerate(shades):
        (folder / f"{i}.png").write_bytes(encoded(shade))
    values = {f"control_path_{i}": f"{i}.png" for i in reversed(range(12))}
    found = Dataset(write_jsonl(folder / "a.jsonl", [{"caption": "x", "image_path": "b.png", **values}]))[0]
    assert [color_of(s) for s in found.references] == shades


@pytest.mark.parametrize(
    "values",
    [
        {"text": "do it", "picture": "b.png"},
        {"prompt": "do it"},
        {"prompt": "do it", "image": "b.png"},  # a target, or a source?
        {"prompt": "do it", "image": "b.png", "edit_image": "r.png", "requirement": "x"},
        {"prompt": "do it", "images": ["r.png"], "image": "b.png"},
        {"instruction": "do it", "input_images": [], "output_image": "b.png", "image": "r.png"},
    ],
)
def test_unknown_and_ambiguous_keys_are_an_error_that_lists_keys_and_formats(folder, values):
    with pytest.raises(BrokenFileError) as error:
        Dataset(write_jsonl(folder / "rows.jsonl", [values]), targets="optional")
    message = str(error.value)
    assert message.startswith("rows.jsonl: ") and str(sorted(values)) in message
    for name in ("OmniGen2", "DyRef", "Flow-Factory", "Edit-R1", "musubi", "DanceGRPO", "Lumina", "Echo-4o"):
        assert name in message


def test_rows_of_two_formats_in_one_file_are_an_error(folder):
    path = write_jsonl(folder / "a.jsonl", [row(), {"prompt": "a", "image": "b.png", "edit_image": ["r.png"]}])
    with pytest.raises(BrokenFileError, match=r"^a.jsonl: rows of several formats \(DyRef.*OmniGen2"):
        Dataset(path)


def test_the_format_is_told_by_all_rows_of_a_file_not_by_the_first(folder):
    plain, edit = {"prompt": "a", "image": "b.png"}, {"prompt": "b", "image": "b.png", "edit_image": ["r.png"]}
    dataset = Dataset(write_jsonl(folder / "rows.jsonl", [plain, edit, plain]))
    assert [len(found.references) for found in dataset] == [0, 1, 0]


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
def test_a_broken_row_says_where_and_why_and_the_others_are_read(folder, values, reason):
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
def test_a_path_that_may_not_be_looked_at_is_a_broken_row(folder, monkeypatch, error):
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


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_an_instruction_with_a_placeholder_of_pictures_is_a_broken_row(folder, builtin_pipe, token):
    dataset = Dataset(write_jsonl(folder / "a.jsonl", [row(text=f"put {token} here"), row(text="<|im_end|> is fine")]))
    with pytest.raises(
        RowError, match=r"^a.jsonl:1: instruction has <\|.*_pad\|>, which stands for the tokens of an image"
    ):
        dataset[0]
    assert dataset[1].instruction == "<|im_end|> is fine"
    with pytest.raises(ValueError, match="_pad"):  # the reason
        prompt_embeddings(builtin_pipe, token, [], [])


@pytest.mark.parametrize("numbers", [(1, 2), (0, 2), ("", 0), ("00",)])
def test_gaps_in_numbered_references_are_an_error(folder, numbers):
    values = {"control_path" + (f"_{n}" if n != "" else ""): "r.png" for n in numbers}
    path = write_jsonl(folder / "a.jsonl", [{"caption": "x", "image_path": "b.png", **values}])
    with pytest.raises(RowError, match="without gaps"):
        Dataset(path)[0]


def test_a_chain_of_edits_is_no_row(folder):
    values = {"image_list": ["r.png", "g.png", "b.png"], "instruction_list": ["first", "then"]}
    with pytest.raises(RowError, match="chain of edits"):
        Dataset(write_jsonl(folder / "a.jsonl", [values]))[0]
    with pytest.raises(RowError, match="last image is the target"):
        Dataset(write_jsonl(folder / "b.jsonl", [{"image_list": [], "instruction_list": ["x"]}]))[0]


def test_a_row_keeps_what_it_says(folder):
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
def test_what_is_no_scene_is_none_and_no_error(folder, scene):
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
def test_a_scene_with_wrong_values_is_no_reason_to_refuse_a_row(folder, scene):
    found = Dataset(write_jsonl(folder / "a.jsonl", [row(scene=scene)]))[0]
    assert found.scene == scene and found.artworks == {} and meaning(found) == TWO


# ---- jsonl and json ----


def test_lines_are_counted_with_blank_ones_and_a_bom_is_no_text(folder):
    lines = ["\ufeff" + json.dumps(row(text="one")), "", "  \t", json.dumps(row(text="four")), '{"broken', "", ""]
    path = folder / "a.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    dataset = Dataset(path)
    assert len(dataset) == 3 and [dataset.where(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    assert [dataset[i].instruction for i in (1, 0, -2, -3, np.int64(1))] == ["four", "one", "four", "one", "four"]
    with pytest.raises(RowError, match=r"^a.jsonl:5: not JSON"):
        dataset[2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(TypeError):
        dataset[0:1]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"instruction": "\xff"}', "not UTF-8"),
        (b'{"input_images": ["r.png"], "input_images": ["g.png"], "instruction": "x"}', "occurs twice"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"instruction": "x"} {"instruction": "y"}', "not JSON"),
    ],
)
def test_damaged_lines(folder, line, reason):
    path = folder / "a.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(row()).encode())  # and no newline at the end
    dataset = Dataset(path)
    with pytest.raises(RowError, match=reason):
        dataset[0]
    assert meaning(dataset[1]) == TWO


def test_an_empty_file_has_no_rows(tmp_path):
    for content in ("", "\n\n", "\ufeff"):
        (tmp_path / "a.jsonl").write_text(content)
        dataset = Dataset(tmp_path / "a.jsonl")
        assert len(dataset) == 0 and list(dataset) == []
        with pytest.raises(IndexError):
            dataset[0]
    (tmp_path / "a.json").write_text("[]")
    assert len(Dataset(tmp_path / "a.json")) == 0


def test_a_json_list(folder):
    path = folder / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([row(), 3, row(text="third")]).encode())
    dataset = pickle.loads(pickle.dumps(Dataset(path)))
    assert b"third" not in pickle.dumps(Dataset(path)), "the rows do not travel"
    assert len(dataset) == 3 and dataset[2].instruction == "third" and dataset[2].where == "a.json:3"
    with pytest.raises(RowError, match=r"^a.json:2: a row must be"):
        dataset[1]


@pytest.mark.parametrize(
    "content, reason", [("[{]", "not JSON"), ('{"a": 1}', "not a row of a known format"), ("", "not JSON")]
)
def test_a_json_file_that_is_no_list_of_rows(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BrokenFileError, match=f"^a.json: .*{reason}"):
        Dataset(tmp_path / "a.json")


ROWS_OF_JSON = {
    "lines": "\n".join(json.dumps(row(text=text)) for text in ("one", "two")) + "\n",
    "lines with a BOM and blanks": "\ufeff\n" + "\n\n".join(json.dumps(row(text=text)) for text in ("one", "two")),
    "a list under a key": json.dumps(
        {"version": 1, "tags": ["a"], "data": [row(text="one"), row(text="two")]}, indent=1
    ),
    "a list": json.dumps([row(text="one"), row(text="two")]),
}


@pytest.mark.parametrize("content", ROWS_OF_JSON.values(), ids=ROWS_OF_JSON.keys())
@pytest.mark.parametrize("inside", [True, False])
def test_every_layout_of_json_is_read_named_and_in_a_folder(folder, content, inside):
    (folder / "a.json").write_text(content)
    dataset = pickle.loads(pickle.dumps(Dataset(folder if inside else folder / "a.json")))
    assert [found.instruction for found in dataset] == ["one", "two"] and dataset.left_out == ()


def test_a_json_file_of_one_row(folder):
    for name in ("one", "two"):
        (folder / f"{name}.json").write_text(json.dumps(row(text=name), indent=2))
    assert [found.instruction for found in Dataset(folder)] == ["one", "two"]
    line = json.dumps(row(text="three")) + '\n{"broken\n'
    (folder / "two.json").write_text(line)
    dataset = Dataset(folder)
    assert dataset[1].instruction == "three" and len(dataset) == 3
    with pytest.raises(RowError, match=r"^two.json:2: not JSON"):
        dataset[2]


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"seed": 0}', "holds a JSON object ('seed') that is not a row"),
        ('{"data": [{"text": "x", "picture": "y"}]}', "not a row of a known format"),
        ("[1, 2]", "list without objects"),
        ("3", "must hold a JSON list of rows, got int"),
    ],
)
def test_a_json_file_without_rows_is_left_out_of_a_folder_and_said(folder, capsys, content, reason):
    write_jsonl(folder / "a.jsonl", [row()])
    (folder / "b.json").write_text(content)
    dataset = Dataset(folder)
    ((name, told),) = dataset.left_out
    assert len(dataset) == 1 and name == "b.json" and reason in told
    assert left_out([dataset, dataset]) == [(name, told)]
    with pytest.raises(BrokenFileError, match=r"^b.json: "):
        Dataset(folder / "b.json")


@pytest.mark.parametrize("content", ['{"data": [{"instruction": "x"', "[{]", "{]\n"])
def test_a_damaged_json_file_in_a_folder_is_an_error(folder, content):
    write_jsonl(folder / "a.jsonl", [row()])
    (folder / "b.json").write_text(content)
    with pytest.raises(BrokenFileError, match=r"^b.json: not JSON"):
        Dataset(folder)


def test_rows_under_several_keys_are_an_error(folder):
    (folder / "a.json").write_text(json.dumps({"train": [row()], "test": [row()]}))
    with pytest.raises(BrokenFileError, match="rows under several keys, train, test"):
        Dataset(folder)


def test_files_that_may_hold_rows_are_named_when_they_are_not_read(folder):
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
    told = left_out([Dataset(folder)])
    assert len(told) == 21 and told[0][0] == "00.tsv" and told[-1][0] == "10 more"


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


def test_where_relative_paths_are_looked_up(folder):
    (folder / "meta").mkdir()
    beside, absolute = row(), row(references=[str(folder / "r.png"), str(folder / "meta" / ".." / "g.png")])
    path = write_jsonl(folder / "meta" / "a.jsonl", [beside, absolute])
    assert meaning(Dataset(path, image_folder=folder)[0]) == TWO
    assert meaning(Dataset(path, image_folder=folder)[1]) == TWO
    with pytest.raises(RowError, match="expected at"):
        Dataset(path)[0]
    with pytest.raises(ValueError, match=r"image folder .*none does not exist"):
        Dataset(path, image_folder=folder / "none")


# ---- parquet ----


def write_parquet(path, columns, **options):
    parquet.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_with_bytes_structs_and_paths(folder):
    r, g, b = encoded(RED), encoded(GREEN), encoded(BLUE)
    texts = ["do it"] * 2
    bagel = {"image_list": [[r, g, b], [r, b]], "instruction_list": [["do it"]] * 2}
    mico = {
        "input_images": [
            [{"bytes": r, "path": "x.png"}, {"bytes": g, "path": None}],
            [{"bytes": None, "path": "r.png"}],
        ],
        "output_image": [{"bytes": b, "path": "y.png"}, {"bytes": b, "path": None}],
        "instruction": texts,
    }
    plain = {"input_images": [["r.png", "g.png"], ["r.png"]], "output_image": ["b.png"] * 2, "instruction": texts}
    ragged = {
        "image_path": ["b.png"] * 2, "control_path_0": ["r.png"] * 2, "control_path_1": ["g.png", None],
        "caption": texts,
    }  # fmt: skip
    for columns in (bagel, mico, plain, ragged):
        dataset = Dataset(write_parquet(folder / "p.parquet", columns))
        assert [meaning(found) for found in dataset] == [TWO, ONE]
        assert dataset[1].where == "p.parquet:2"


def test_only_the_row_group_and_the_columns_needed_are_read(folder, monkeypatch):
    count = 20
    columns = {
        "input_images": [[encoded((i, 0, 0))] for i in range(count)],
        "output_image": [encoded(BLUE)] * count,
        "instruction": [f"row {i}" for i in range(count)],
        "embedding": [[0.5] * 100] * count,
    }
    path = write_parquet(folder / "p.parquet", columns, row_group_size=3)
    read, original = [], parquet.ParquetFile.read_row_group

    def counted(self, group, columns):
        read.append((group, tuple(columns)))
        return original(self, group, columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    dataset = Dataset(path)
    assert not read
    assert color_of(dataset[19].references[0]) == (19, 0, 0)
    assert read == [(6, ("input_images", "output_image", "instruction"))]
    assert [found.instruction for found in dataset] == [f"row {i}" for i in range(count)]
    assert len(read) == 8, "each group once, in a pass"  # group 6 had left the cache
    assert [dataset[i].instruction for i in (18, 12, 19)] == ["row 18", "row 12", "row 19"] and len(read) == 8


def test_parquet_rows_that_are_broken(folder):
    columns = {"input_images": [[b""], None, [encoded(RED)]], "output_image": [encoded(BLUE), encoded(BLUE), None],
               "instruction": ["a", None, "c"]}  # fmt: skip
    dataset = Dataset(write_parquet(folder / "p.parquet", columns))
    with pytest.raises(ValueError, match=r"input_images\[0\]"):
        dataset[0].references[0].size()
    with pytest.raises(RowError, match=r"^p.parquet:2: no 'instruction'"):
        dataset[1]
    with pytest.raises(RowError, match=r"^p.parquet:3: no target"):
        dataset[2]
    both_none = {
        "output_image": [{"bytes": None, "path": None}, {"bytes": b"x", "path": "p"}],
        "instruction": ["a", "b"],
    }
    dataset = Dataset(write_parquet(folder / "q.parquet", both_none))
    with pytest.raises(RowError, match=r"^q.parquet:1: output_image must be"):
        dataset[0]
    numbers = {"output_image": [1], "instruction": ["a"]}
    with pytest.raises(RowError, match=r"output_image must be a path or, in parquet, bytes"):
        Dataset(write_parquet(folder / "n.parquet", numbers))[0]
    empty = write_parquet(
        folder / "e.parquet", {"output_image": pa.array([], pa.binary()), "instruction": pa.array([], pa.string())}
    )
    assert len(Dataset(empty)) == 0


def test_a_misspelt_column_of_pictures_is_not_left_out_in_silence(folder):
    columns = {"input_image": [[encoded(RED)]], "output_image": [encoded(BLUE)], "instruction": ["do it"]}
    with pytest.raises(RowError, match=r"^p.parquet:1: key 'input_image' holds images .*'input_images'"):
        Dataset(write_parquet(folder / "p.parquet", columns))[0]


def test_the_cache_of_row_groups_drops_what_was_used_longest_ago():
    cache, read = readers.RowGroupCache(2), []
    for key in "abacab":
        assert cache.get(key, lambda key=key: read.append(key) or key) == key
    assert read == ["a", "b", "c", "b"]


def test_damaged_parquet(folder):
    path = folder / "p.parquet"
    columns = {"output_image": [encoded(BLUE)] * 4, "instruction": ["do it"] * 4}
    whole = write_parquet(path, columns, compression="none", use_dictionary=False).read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2], b"x" * 200):
        path.write_bytes(damaged)
        with pytest.raises(BrokenFileError, match=r"^p.parquet: damaged parquet"):
            Dataset(path)
    path.write_bytes(b"PAR1" + b"\xff" * 100 + whole[104:])  # the first page's header, under a good footer
    with pytest.raises(RowError, match=r"^p.parquet:1: damaged parquet"):
        Dataset(path)[0]


# ---- several files ----


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


def test_files_of_one_name_are_told_apart(folder):
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


def test_the_fingerprint_tells_changed_data(folder, tmp_path):
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


def _texts(dataset, indices):
    return [(dataset[i].instruction, dataset[i].target.digest()) for i in indices]


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


def test_a_file_that_is_gone(folder):
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
