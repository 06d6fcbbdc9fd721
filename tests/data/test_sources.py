"""The layouts in which people keep data: imagefolders, tables, captioned images, archives, configurations."""

import gzip
import io
import json
import os
import pickle
import stat
import tarfile
import zipfile

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from uniref_fast.cli import main
from uniref_fast.data import archives as tars
from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError
from uniref_fast.data.pairs import Pairs
from uniref_fast.data.sources import find_sources

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLORS = {"r": RED, "g": GREEN, "b": BLUE, "w": WHITE}


def encoded(color, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, form)
    return file.getvalue()


@pytest.fixture
def put(tmp_path):
    """Writes files below a folder: pictures by the letter of their colour, other content as text."""

    def write(files, folder=tmp_path):
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(COLORS[content]) if content in COLORS else content.encode())
        return folder

    return write


def meaning(found):
    """Instruction, letters of the references, letter of the target."""
    letters = {color: letter for letter, color in COLORS.items()}
    references = "".join(letters[source.load().getpixel((0, 0))] for source in found.references)
    return found.instruction, references, letters[found.target.load().getpixel((0, 0))] if found.target else None


def meanings(dataset):
    return [meaning(found) for found in pickle.loads(pickle.dumps(dataset))]


# ---- imagefolder ----


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"file_name": "b.png", "text": "do it"}, ("do it", "", "b")),
        ({"file_name": "b.png", "input_file_name": "r.png", "prompt": "do it"}, ("do it", "r", "b")),
        ({"source_file_name": "r.png", "target_file_name": "b.png", "caption": "do it"}, ("do it", "r", "b")),
        ({"input_image_file_name": "r.png", "edited_image_file_name": "b.png", "edit_prompt": "do it"},
         ("do it", "r", "b")),
        ({"input_file_names": ["r.png", "g.png"], "output_file_name": "b.png", "instruction": "do it"},
         ("do it", "rg", "b")),
        ({"file_name": "b.png", "control_2_file_name": "g.png", "control_1_file_name": "r.png", "text": "do it"},
         ("do it", "rg", "b")),
        ({"file_name": "b.png", **{f"reference_{i}_file_name": "r.png" for i in (10, 9)}, "text": "do it"},
         ("do it", "rr", "b")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_imagefolders(tmp_path, put, columns, expected, ending):
    folder = put({"r.png": "r", "g.png": "g", "b.png": "b"})
    values = columns | {"seed": 3, "label": "x"}
    if ending == "jsonl":
        (folder / "metadata.jsonl").write_text(json.dumps(values))
    elif ending == "parquet":
        parquet.write_table(pa.table({key: [value] for key, value in values.items()}), folder / "metadata.parquet")
    else:
        cells = [str(value).replace("'", '""').replace("[", '"[').replace("]", ']"') for value in values.values()]
        (folder / "metadata.csv").write_text(",".join(values) + "\n" + ",".join(cells) + "\n")
    dataset = Dataset(folder)
    assert meanings(dataset) == [expected] and dataset.left_out == ()
    roles = dataset.roles(0)
    assert roles["label"] is None and "target" in roles.values()
    assert sum(role == "references" for role in roles.values()) == sum("_file_name" in key for key in columns) - (
        "file_name" not in columns
    )


@pytest.mark.parametrize(
    "columns",
    [
        {"file_name": "b.png"},
        {"file_name": "b.png", "text": "x", "prompt": "y"},
        {"file_name": "b.png", "depth_file_name": "r.png", "text": "x"},
        {"file_name": "r.png", "edited_file_name": "b.png", "text": "x"},  # what is the first?
        {
            "control_file_name": "r.png",
            "input_file_name": "g.png",
            "file_name": "b.png",
            "text": "x",
        },  # which is first?
        {"images_file_names": ["r.png"], "text": "x"},
    ],
)
def test_ambiguous_imagefolders(put, columns):
    folder = put({"r.png": "r", "g.png": "g", "b.png": "b", "metadata.jsonl": json.dumps(columns)})
    with pytest.raises(BrokenFileError, match=r"^metadata.jsonl: the columns .* are ambiguous.*--columns"):
        Dataset(folder)


def test_columns_tell_what_an_imagefolder_leaves_open(put):
    folder = put({"r.png": "r", "b.png": "b"})
    put({"metadata.csv": "file_name,edited_file_name,text\nr.png,b.png,do it\n"})
    columns = ["instruction=text", "references=file_name", "target=edited_file_name"]
    assert meanings(Dataset(folder, columns=columns)) == [("do it", "r", "b")]


# ---- tables ----


def test_tables(put):
    text = """\ufeffinput_images,output_image,instruction,seed
"[""r.png"", ""g.png""]",b.png,"two\nlines",1

"['r.png']",b.png,x,
,b.png,none,3
short
"""
    folder = put({"r.png": "r", "g.png": "g", "b.png": "b", "a.csv": text})
    dataset = Dataset(folder / "a.csv")
    assert [dataset.where(i) for i in range(4)] == ["a.csv:2", "a.csv:5", "a.csv:6", "a.csv:7"]
    assert [meaning(dataset[i]) for i in range(3)] == [("two\nlines", "rg", "b"), ("x", "r", "b"), ("none", "", "b")]
    with pytest.raises(RowError, match=r"^a.csv:7: the row has 1 cells, the header 4"):
        dataset[3]


@pytest.mark.parametrize("content", ["a,a\n1,2\n", 'instruction,output_image\n"x,b.png\n', "a\n\xff"])
def test_damaged_tables(put, content):
    folder = put({})
    (folder / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(BrokenFileError, match=r"^a.csv: "):
        Dataset(folder / "a.csv")


def test_a_table_of_other_things_in_a_folder_is_left_out(put):
    folder = put({"b.png": "b", "scores.csv": "name,score\na,3\n"})
    put({"a.jsonl": json.dumps({"instruction": "x", "output_image": "b.png"})})
    dataset = Dataset(folder)
    assert len(dataset) == 1 and dataset.left_out[0][0] == "scores.csv"
    with pytest.raises(BrokenFileError, match="known format"):
        Dataset(folder / "scores.csv")


# ---- captioned images ----

TARGETS = {"target/1.png": "b", "target/1.txt": " first\n", "target/2.jpg": "w", "target/2.txt": "\ufeffsecond"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"1.png": "b", "1.txt": "first"}, [("first", "", "b")]),
        (TARGETS, [("first", "", "b"), ("second", "", "w")]),
        (TARGETS | {"control/1.png": "r", "control/2.png": "g"}, [("first", "r", "b"), ("second", "g", "w")]),
        (TARGETS | {"control_2/1.png": "g", "control_1/1.jpg": "r", "control_1/2.png": "r"},
         [("first", "rg", "b"), ("second", "r", "w")]),
        (TARGETS | {"control/1.png": "r", "control/1.txt": "a copy of the caption"},
         [("first", "r", "b"), ("second", "", "w")]),
        (TARGETS | {"Reference Images/1_0.png": "r", "Reference Images/1_1.png": "g", "Reference Images/2.png": "g"},
         [("first", "rg", "b"), ("second", "g", "w")]),
        (TARGETS | {"control/1_0001.png": "r", "control/1_0002.png": "g"}, [("first", "rg", "b"), ("second", "", "w")]),
        ({"1.png": "b", "1.txt": "first", "source/1.png": "r"}, [("first", "r", "b")]),
    ],
)  # fmt: skip
def test_captioned_images_and_their_folders_of_references(put, files, expected):
    dataset = Dataset(put(files))
    assert [(text, refs, target) for text, refs, target in meanings(dataset)] == expected
    assert dataset.where(0).endswith(":1.png") and dataset.left_out == ()
    before = dataset.fingerprint
    put({next(name for name in files if name.endswith("1.txt")): "another"})
    assert Dataset(put({})).fingerprint != before


@pytest.mark.parametrize(
    "files, reason",
    [
        ({"1.png": "b"}, "no image has a caption file"),
        ({"a/1.png": "b", "a/1.txt": "x", "b/1.png": "r", "b/1.txt": "x"}, r"several folders \(a, b\)"),
        (TARGETS | {"edges/1.png": "r"}, r"several folders \(edges, target\)"),
        (TARGETS | {"control/1.png": "r", "source/1.png": "g"}, "do not distinguish targets from references"),
        (TARGETS | {"control/3.png": "r"}, "1 images of .*control have no target of their name: 3.png"),
        (TARGETS | {"control/1.png": "r", "control/1_1.png": "r"}, "references of 1 in .* must be 1_0, 1_1"),
        (TARGETS | {"control/1_0.png": "r", "control/1_2.png": "r"}, "references of 1 in .* must be 1_0, 1_1"),
        (TARGETS | {"control/1.png": "r", "control/1.jpg": "r"}, "two images of one name: 1.jpg and 1.png"),
    ],
)
def test_ambiguous_folders_are_refused(put, files, reason):
    with pytest.raises(ValueError, match=reason):
        Dataset(put(files))


def test_broken_rows_of_captioned_images(put):
    files = TARGETS | {"target/3.png": "b", "target/4.png": "b", "target/4.txt": "", "target/5.txt": "x"}
    folder = put(files | {"control_1/1.png": "r", "control_2/2.png": "r"})
    (folder / "target" / "6.png").write_bytes(encoded(RED))
    (folder / "target" / "6.txt").write_bytes(b"\xff")
    dataset = Dataset(folder)
    reasons = {}
    for index in range(len(dataset)):
        try:
            dataset[index]
        except RowError as error:
            reasons[error.where] = error.reason
    assert list(reasons) == [f"target:{name}" for name in ("2.jpg", "3.png", "4.png", "6.png")]
    parts = ("control_1, although", "no caption file 3.txt", "empty", "not UTF-8")
    assert all(part in reason for reason, part in zip(reasons.values(), parts, strict=True))
    assert dataset.left_out == (("target", "1 captions have no image of their name: 5"),)


def test_captioned_images_beside_files_of_rows_are_named(put):
    folder = put(TARGETS | {"rows.jsonl": json.dumps({"instruction": "x", "output_image": "target/1.png"})})
    dataset = Dataset(folder)
    assert len(dataset) == 1 and dataset.left_out[0][0] == "target" and "captioned images" in dataset.left_out[0][1]


# ---- configurations of other programs ----

FOLDERS = {
    "data/t/1.png": "b", "data/t/1.txt": "first", "data/c1/1.png": "r", "data/c2/1.jpg": "g",
}  # fmt: skip


def configurations():
    musubi = """
[general]
caption_extension = ".txt"
[[datasets]]
image_directory = "data/t"
control_directory = "data/c1"
"""
    simpletuner = [
        {"id": "t", "type": "local", "instance_data_dir": "data/t", "caption_strategy": "textfile",
         "conditioning_data": ["a", "b"]},
        {"id": "a", "type": "local", "dataset_type": "conditioning", "instance_data_dir": "data/c1"},
        {"id": "b", "type": "local", "dataset_type": "conditioning", "instance_data_dir": "data/c2"},
        {"id": "e", "dataset_type": "text_embeds", "type": "local", "cache_dir": "x"},
    ]  # fmt: skip
    toolkit = """
job: extension
config:
  process:
    - type: diffusion_trainer
      datasets:
        - folder_path: data/t
          control_path: [data/c1, data/c2]
          caption_ext: txt
"""
    return {
        "dataset.toml": (musubi, "r"),
        "multidatabackend.json": (json.dumps(simpletuner), "rg"),
        "train.yaml": (toolkit, "rg"),
    }


@pytest.mark.parametrize("name", configurations())
def test_configurations_of_other_programs_stand_for_their_folders(put, name, monkeypatch):
    content, references = configurations()[name]
    folder = put(FOLDERS | {name: content})
    assert meanings(Dataset(folder / name)) == [("first", references, "b")], "paths beside the file"
    (folder / "elsewhere").mkdir()
    (folder / name).rename(folder / "elsewhere" / name)
    monkeypatch.chdir(folder)
    assert meanings(Dataset(folder / "elsewhere" / name)) == [("first", references, "b")], "from the working directory"


def test_a_configuration_may_name_a_file_of_rows_and_several_folders(put):
    rows = json.dumps({"image_path": "data/t/1.png", "control_path": "data/c2/1.jpg", "caption": "row"})
    toml = '[[datasets]]\nimage_jsonl_file = "m.jsonl"\nnum_repeats = 3\n[[datasets]]\nimage_directory = "data/t"\n'
    dataset = Dataset(put(FOLDERS | {"m.jsonl": rows, "d.toml": toml}) / "d.toml")
    assert meanings(dataset) == [("row", "g", "b"), ("first", "", "b")]
    ((name, reason),) = dataset.left_out
    assert name == "d.toml" and reason.startswith("datasets entry 1: num_repeats = 3 is not followed")


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("d.toml", "[[datasets]]\nvideo_directory = 'data/t'\n", "entry 1 has video_directory, which rows"),
        ("d.toml", "[[datasets]]\nimage_directory = 'none'\n", "entry 1 names none, which does not exist"),
        ("d.toml", "[[datasets]]\nresolution = 3\n", "neither image_directory nor image_jsonl_file"),
        ("d.toml", "x = [", "d.toml: "),
        ("d.toml", "x = 1", "not a known configuration of data"),
        ("d.yaml", "a: [", "not YAML"),
        ("d.yaml", "config: {process: [{datasets: [{folder_path: data/t, alpha_mask: true}]}]}", "has alpha_mask"),
        ("d.yaml", "config: {process: []}", "no datasets"),
        ("d.json", '[{"id": "a", "type": "aws", "instance_data_dir": "x"}]', "type 'aws'"),
        ("d.json", '[{"id": "a", "type": "local", "instance_data_dir": "data/t"}]', "caption_strategy None"),
        ("d.json", '[{"id": "a", "type": "local", "instance_data_dir": "data/t", "caption_strategy": "textfile",'
                   ' "conditioning_data": "z"}]', "names conditioning_data 'z', which is not in the file"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_followed(put, name, content, reason):
    with pytest.raises(BrokenFileError, match=reason):
        Dataset(put(FOLDERS | {name: content}) / name)


def test_a_configuration_inside_a_folder_is_named(put):
    folder = put({"1.png": "b", "1.txt": "first", "d.toml": "", "b.json": configurations()["multidatabackend.json"][0]})
    dataset = Dataset(folder)
    assert meanings(dataset) == [("first", "", "b")]
    assert [name for name, _ in dataset.left_out] == ["b.json", "d.toml"]


# ---- archives ----

SAMPLES = {
    "1.txt": b"first", "1.input_0.png": encoded(RED), "1.output.png": encoded(BLUE),
    "v1.5_2.json": b'{"instruction": "second"}', "v1.5_2.output.webp": encoded(WHITE, "WEBP"),
}  # fmt: skip
MEANT = [("first", "r", "b"), ("second", "", "w")]


def write_zip(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_zips(tmp_path, method):
    members = {f"set/{name}": content for name, content in SAMPLES.items()}
    path = write_zip(tmp_path / "a.zip", members | {"__MACOSX/set/._1.txt": b"x", "set/": b""}, method)
    dataset = Dataset(path)
    assert meanings(dataset) == MEANT and dataset.where(1) == "a.zip:set/v1.5_2" and dataset.left_out == ()
    assert os.listdir(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("ending", ["tar.gz", "tgz"])
def test_compressed_tars(tmp_path, ending, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = tmp_path / f"a.{ending}"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in SAMPLES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    dataset = Dataset(tmp_path)
    assert meanings(dataset) == MEANT and dataset.where(1) == f"a.{ending}:v1.5_2"
    assert [p.parent.name for p in (tmp_path / "temporary").iterdir()] == ["temporary"], "one, which goes at exit"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"no gzip", gzip.compress(b"no tar")):
        path.write_bytes(damaged)
        with pytest.raises(BrokenFileError, match=rf"^a.{ending}: "):
            Dataset(path)
    assert len(list((tmp_path / "temporary").iterdir())) == 1, "damaged ones leave nothing"


def test_members_of_zips_that_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    link = zipfile.ZipInfo("2.output.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("1.txt", "2.txt", "3.txt", "../4.txt", "5.txt"):
            archive.writestr(name, b"do it")
        archive.writestr(link, "/etc/passwd")
        archive.writestr("3.output.png", encoded(BLUE), zipfile.ZIP_BZIP2)
        archive.writestr("1.output.png", encoded(BLUE))
        archive.writestr("5.output.png", encoded(BLUE, "BMP"))
    content = bytearray(path.read_bytes())
    content[content.index(b"BM") + 60] ^= 1
    path.write_bytes(content)
    dataset = Dataset(path)
    assert meaning(dataset[0]) == ("do it", "", "b")
    for index, reason in enumerate(("is a link", "method 12", "leaves the archive", "size or checksum"), start=1):
        with pytest.raises(RowError, match=reason):
            dataset[index]


def test_an_archive_of_a_folder_with_rows_says_to_unpack_it(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"data/metadata.jsonl": b"{}", "data/1.png": encoded(BLUE)})
    with pytest.raises(BrokenFileError, match=r"no sample.*unpack it and give the folder, so that data/metadata.jsonl"):
        Dataset(path)


def test_damaged_zips(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", SAMPLES)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-30], whole[: len(whole) // 2], b"PK\3\4" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(BrokenFileError, match=r"^a.zip: cannot be read as a zip"):
            Dataset(path)
    path.write_bytes(whole)
    dataset = Dataset(path)
    path.write_bytes(b"x" * len(whole))
    with pytest.raises(RowError, match="not at the place that the directory of the zip states"):
        dataset[0]
    path.write_bytes(whole)
    monkeypatch.setattr(tars, "LARGEST", 5)
    with pytest.raises(RowError, match="is larger than 5 bytes"):
        Dataset(path)[0]


# ---- convert ----


def test_convert_writes_rows_that_mean_the_same(put, tmp_path, capsys):
    folder = put(TARGETS | {"control/1.png": "r"}, tmp_path / "pairs")
    write_zip(tmp_path / "a.zip", SAMPLES)
    out = tmp_path / "made" / "rows.jsonl"
    assert main(["data", "convert", str(folder), str(tmp_path / "a.zip"), "--out", str(out)]) == 0
    assert "4 row(s); 0 broken" in capsys.readouterr().out
    assert meanings(Dataset(out)) == [("first", "r", "b"), ("second", "", "w"), *MEANT]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["output_image"] == str(folder / "target" / "1.png"), "files stay where they are"
    assert rows[2]["output_image"] == "rows_images/00000002_out.png"
    assert rows[3]["output_image"] == "rows_images/00000003_out.webp"
    assert main(["data", "convert", str(folder), "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_convert_takes_folders_by_name(put, tmp_path, capsys):
    folder = put({"a/1.png": "b", "a/1.cap": "x", "z/1.png": "r", "k/1_0.png": "g", "k/1_1.png": "w"})
    out = folder / "rows.jsonl"
    arguments = ["--target-folder", folder / "a", "--control-folder", folder / "z", "--control-folder", folder / "k"]
    assert main(["data", "convert", *map(str, arguments), "--caption-ending", "cap", "--out", str(out)]) == 0
    assert meanings(Dataset(out)) == [("x", "rgw", "b")]
    assert json.loads(out.read_text())["input_images"] == ["z/1.png", "k/1_0.png", "k/1_1.png"]
    assert meanings(Dataset(Pairs(folder / "a", ending=".cap"))) == [("x", "", "b")]


def test_convert_names_what_it_leaves_out(put, tmp_path, capsys):
    folder = put({"b.png": "b", "a.jsonl": '{"instruction": "x", "output_image": "b.png"}\n{"broken\n', "t.tsv": "x"})
    assert main(["data", "convert", str(folder), "--out", str(tmp_path / "out.jsonl")]) == 1
    captured = capsys.readouterr()
    assert "left out: a.jsonl:2: not JSON" in captured.err and "left out: t.tsv: " in captured.err
    assert "1 row(s); 1 broken" in captured.out and len(Dataset(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--out", "x.jsonl"], ["x", "--out", "x.csv"], ["x", "--control-folder", "y", "--out", "x.jsonl"],
     ["x", "--target-folder", "y", "--out", "x.jsonl"]],
)  # fmt: skip
def test_wrong_commands_to_convert(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "convert", *arguments]) == 2


def test_convert_leaves_nothing_when_it_cannot_write(put, tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip", SAMPLES)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uniref_fast.data.convert._values", full)
    assert main(["data", "convert", str(tmp_path / "a.zip"), "--out", str(tmp_path / "o" / "rows.jsonl")]) == 1
    assert not (tmp_path / "o").exists()


def test_each_source_names_the_given_path_that_it_was_found_in(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "a.jsonl", folder / "b.jsonl", folder / "c.jsonl", tmp_path / "d.jsonl"):
        path.write_text('{"instruction": "x", "output_image": "x.png"}\n')
    found, _ = find_sources([tmp_path / "a.jsonl", folder, tmp_path / "d.jsonl"])
    assert [(source.name, source.given) for source in found] == [
        ("a.jsonl", 0), ("b.jsonl", 1), ("c.jsonl", 1), ("d.jsonl", 2),
    ]  # fmt: skip
    assert Dataset([tmp_path / "a.jsonl", folder, tmp_path / "d.jsonl"]).path_lengths == (1, 2, 1)
