"""Tests of the paths that users write: `~`, paths of Windows, URLs, empty files and control characters."""

import json
import os
import tarfile

import pytest
from data_rows import BLUE, GREEN, RED, encoded, meaning, row, write_jsonl

from uniref_fast.cli import main
from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError
from uniref_fast.data.readers import escape_controls


def test_backslashes_separate_folders(folder, capsys):
    (folder / "pics").mkdir()
    (folder / "pics" / "r.png").write_bytes(encoded(RED))
    path = write_jsonl(folder / "a.jsonl", [row(("pics\\r.png", "g.png"), ".\\b.png")])
    assert meaning(Dataset(path)[0]) == ("do it", [RED, GREEN], BLUE)
    (folder / "pics\\r.png").write_bytes(encoded(BLUE))
    assert meaning(Dataset(path)[0]) == ("do it", [BLUE, GREEN], BLUE), "the path as it is written has precedence"
    assert main(["data", "convert", str(path), "--out", str(folder / "out.jsonl")]) == 0

    (folder / "rows").mkdir()
    for name in ("..\\r.png", "pics\\..\\..\\r.png"):
        with pytest.raises(RowError, match=r"leaves its folder"):
            Dataset(write_jsonl(folder / "rows" / "b.jsonl", [row((name,))]))[0]
    for name in ("C:\\data\\r.png", "d:/data/r.png", "\\\\server\\data\\r.png"):
        with pytest.raises(RowError, match=r"is an absolute path of Windows; give a path relative to the file of rows"):
            Dataset(write_jsonl(folder / "b.jsonl", [row((name,))]))[0]


def test_backslashes_separate_folders_in_an_archive(folder):
    (folder / "s.json").write_text(json.dumps(row(("pics\\r.png",), "b.png")))
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, file in (("s.json", "s.json"), ("pics/r.png", "r.png"), ("b.png", "b.png")):
            archive.add(folder / file, name)
    assert meaning(Dataset(folder / "a.tar")[0]) == ("do it", [RED], BLUE)


def test_a_tilde_is_the_home_folder(folder, monkeypatch, capsys):
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "r.png").write_bytes(encoded(RED))
    write_jsonl(home / "a.jsonl", [row(("~/r.png",), "r.png")])
    assert meaning(Dataset("~/a.jsonl")[0]) == ("do it", [RED], RED)
    assert len(Dataset("~/a.jsonl", image_folder="~")) == 1
    assert main(["data", "check", "~/a.jsonl"]) == 0
    assert main(["data", "convert", "~/a.jsonl", "--out", "~/new/out.jsonl"]) == 0
    assert (home / "new" / "out.jsonl").exists()
    (home / "caps").mkdir()
    (home / "caps" / "1.png").write_bytes(encoded(RED))
    (home / "caps" / "1.txt").write_text("do it")
    assert main(["data", "convert", "--target-folder", "~/caps", "--out", "~/caps.jsonl"]) == 0
    small = ["--train", "1", "--heldout", "0", "--size", "64", "--artworks", "shipped", "--workers", "1"]
    assert main(["data", "make", "~/made", *small]) == 0 and (home / "made" / "train.jsonl").exists()
    capsys.readouterr()
    assert main(["data", "check", "~/none.jsonl"]) == 2
    assert f"no such file or folder: {home / 'none.jsonl'}" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["https://example.com/a.png", "s3://bucket/a.png", "file:///tmp/a.png"])
def test_urls_are_named_as_such(folder, url, capsys):
    with pytest.raises(RowError, match=r"is a URL; URLs are not read: download the image first"):
        Dataset(write_jsonl(folder / "a.jsonl", [row((url,))]))[0]
    for command in (["check"], ["convert", "--out", str(folder / "out.jsonl")]):
        assert main(["data", *command, url.replace(".png", ".jsonl")]) == 2
        assert "is a URL; URLs are not read: download it first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a URL"):
        Dataset(folder / "a.jsonl", image_folder=url)


def test_an_encoded_image_is_named_as_such(folder):
    with pytest.raises(RowError, match="it is an encoded image, not a path"):
        Dataset(write_jsonl(folder / "a.jsonl", [row(("data:image/png;base64,AAAA",))]))[0]


def test_empty_files_are_named_as_such(folder):
    (folder / "empty.png").touch()
    with pytest.raises(RowError, match=r"empty.png: not an image: the file is empty \(0 bytes\)"):
        Dataset(write_jsonl(folder / "a.jsonl", [row(("empty.png",))]))[0].sizes()
    for name in ("e.json", "e.zip", "e.tar", "e.parquet"):
        (folder / name).touch()
        with pytest.raises(BrokenFileError, match=r"empty|0 bytes"):
            Dataset(folder / name)
    (folder / "pairs").mkdir()
    (folder / "pairs" / "1.png").write_bytes(encoded(RED))
    (folder / "pairs" / "1.txt").touch()
    with pytest.raises(RowError, match=r"caption file 1\.txt is empty"):
        Dataset(folder / "pairs")[0]


def test_control_characters_are_escaped_in_messages(folder, capsys):
    name = "a\x1b[31m\x07\u202e.png"
    rows = [
        row((name,)),
        row(("r.png",), **{"k\x1b]0;x\x07": 1}),
        row(("r.png",), text="picture 3", task_type="\x1b[2J"),
    ]
    bad = folder / "b\x1b[1m\n.jsonl"
    write_jsonl(bad, rows)
    (folder / "c\x1b[1m.tsv").touch()
    (folder / "x\x1b[1m.tar").write_bytes(b"x")
    statuses = [main(["data", "check", str(bad)]), main(["data", "check", str(folder / "x\x1b[1m.tar")])]
    (folder / "x\x1b[1m.tar").unlink()
    statuses += [main(["data", "check", str(folder)]), main(["data", "check", str(folder / "n\x1b.jsonl")])]
    statuses.append(main(["data", "convert", str(folder), "--out", str(folder / "o\x1b.jsonl")]))
    captured = capsys.readouterr()
    assert statuses == [1, 1, 1, 2, 1] and not set(captured.out + captured.err) & set("\x1b\x07\u202e")
    assert "b\\x1b[1m\\n.jsonl:1: " in captured.out and "a\\x1b[31m\\x07\\u202e.png" in captured.out
    with pytest.raises(RowError) as error:
        Dataset(bad)[0]
    assert "\x1b" not in str(error.value) and "\n" not in error.value.where
    assert escape_controls("a\tb\nc é 图 😀") == "a\tb\nc é 图 😀"
    assert escape_controls(os.fsdecode(b"\xff\x9b")) == "\\udcff\\udc9b"


@pytest.mark.parametrize(
    "values, columns",
    [
        ({"prompt": "do it", "image": "r.png", "target": "b.png"}, "instruction=prompt,references=image,target=target"),
        (
            {"prompt": "do it", "input_images": ["r.png"], "output_image": "b.png", "source": "web"},
            "instruction=prompt,references=input_images,target=output_image",
        ),
        (
            {"instruction": "do it", "image": "r.png", "output_image": "b.png"},
            "instruction=instruction,references=image,target=output_image",
        ),
        (
            {"instructions": "do it", "images": ["r.png"], "output": "b.png"},
            "instruction=instructions,references=images,target=output",
        ),
    ],
)
def test_near_names_of_known_columns_are_suggested(folder, values, columns, capsys):
    path = write_jsonl(folder / "a.jsonl", [values])
    assert main(["data", "check", str(path)]) == 1
    err = capsys.readouterr().err
    assert f"--columns {columns} " in err and err.count("\n") == 1
    assert meaning(Dataset(path, columns=columns.split(","))[0]) == ("do it", [RED], BLUE)


@pytest.mark.parametrize("text, image", [("prompt", "image"), ("text", "picture")])
def test_the_only_image_of_a_row_may_be_its_target_or_its_reference(folder, text, image):
    path = write_jsonl(folder / "a.jsonl", [{text: "do it", image: "r.png"}])
    with pytest.raises(BrokenFileError) as error:
        Dataset(path, targets="optional")
    likely = [f"instruction={text},target={image}", f"instruction={text},references={image}"]
    assert f"{sorted([text, image])}" in str(error.value)
    assert f"--columns {' or --columns '.join(likely)} " in str(error.value)
    assert meaning(Dataset(path, columns=likely[0].split(","))[0]) == ("do it", [], RED)
    assert meaning(Dataset(path, targets="optional", columns=likely[1].split(","))[0]) == ("do it", [RED], None)


def test_a_configuration_of_windows_is_followed(folder):
    pytest.importorskip("tomllib")
    (folder / "pics").mkdir()
    (folder / "pics" / "1.png").write_bytes(encoded(RED))
    (folder / "pics" / "1.txt").write_text("do it")
    config = folder / "config.toml"
    config.write_text("[[datasets]]\nimage_directory = '.\\pics'\n")
    assert meaning(Dataset(config)[0]) == ("do it", [], RED)
    config.write_text("[[datasets]]\nimage_directory = 'https://example.com/pics'\n")
    with pytest.raises(BrokenFileError, match="is a URL"):
        Dataset(config)


@pytest.mark.parametrize("keys", [("prompt", "image", "input_images", "target"), ("image", "target")])
def test_ambiguous_names_get_the_list_of_formats(folder, keys):
    with pytest.raises(BrokenFileError, match="known formats"):
        Dataset(write_jsonl(folder / "a.jsonl", [dict.fromkeys(keys, "r.png")]))


def test_an_error_points_to_the_help_of_its_command(folder, capsys):
    wrong = {
        "check": [str(folder / "none.jsonl")],
        "convert": [str(folder / "none.jsonl"), "--out", str(folder / "o.jsonl")],
        "make": [str(folder / "m"), "--size", "3"],
    }
    for command, arguments in wrong.items():
        for more in ([], ["--no-such-flag"]):
            try:
                status = main(["data", command, *arguments, *more])
            except SystemExit as error:
                status = error.code
            err = capsys.readouterr().err
            assert status == 2 and err.startswith(f"uniref-fast data {command}: error: ")
            assert err.endswith(f"\nTry 'uniref-fast data {command} --help'.\n")


def test_a_failed_start_leaves_no_folder(folder, monkeypatch, capsys):
    rows = write_jsonl(folder / "a.jsonl", [row(text="")])
    new = folder / "new"
    assert main(["data", "convert", str(rows), "--out", str(new / "x" / "out.jsonl")]) == 1
    assert "all 1 rows are broken" in capsys.readouterr().err and not new.exists()
    small = ["--train", "2", "--heldout", "0", "--size", "64", "--artworks", "shipped", "--workers", "1"]
    assert main(["data", "make", str(new / "x" / ("n" * 300)), *small]) == 1 and not new.exists()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("uniref_fast.scenes.make.sample", stopped)
    assert main(["data", "make", str(new / "made"), *small]) == 130 and not new.exists()
    write_jsonl(rows, [row()])
    monkeypatch.setattr("uniref_fast.data.convert._values", stopped)
    assert main(["data", "convert", str(rows), "--out", str(new / "x" / "out.jsonl")]) == 130 and not new.exists()
    new.mkdir()
    assert main(["data", "convert", str(rows), "--out", str(new / "x" / "out.jsonl")]) == 130
    assert new.exists() and not list(new.iterdir()), "a folder of the user stays"
