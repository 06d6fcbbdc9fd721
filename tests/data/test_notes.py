"""Tests of the notes of `uniref-fast data check`: rows that can be used but will probably disappoint."""

import json

import pytest
from data_rows import RED, encoded, row, write_jsonl, write_parquet

from uniref_fast.cli import main
from uniref_fast.data.notes import KINDS, pictures_named


@pytest.fixture
def pictures(tmp_path):
    """Return a folder with a.png and b.png of 64 x 64 pixels, and small.png of 40 x 15."""
    for name, size in (("a", (64, 64)), ("b", (64, 64)), ("small", (40, 15))):
        (tmp_path / f"{name}.png").write_bytes(encoded(RED, size))
    return tmp_path


def check(capsys, *arguments):
    """Return the exit status, the notes by kind, and the report as text."""
    paths = list(map(str, arguments))
    status = main(["data", "check", *paths, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert main(["data", "check", *paths]) == status
    return status, {note["kind"]: note for note in facts["notes"]}, capsys.readouterr().out


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("put the cup of picture 1 on Picture 3", {1, 3}),
        ("swap image 2 and the third image", {2, 3}),
        ("use the 4th reference image", {4}),
        ("merge pictures 1, 2 and 12", {1, 2, 12}),
        ("the hat of <image_3>, the coat of image#2", {2, 3}),
        ("picture 1 and 3 apples", {1}),
        ("把图3的杯子放到图片 2 上", {2, 3}),
        ("第三张图的人站在第2张图片里", {2, 3}),
        ("图一和图二", {1, 2}),
        ("把image 3中的猫移到图1", {1, 3}),
        ("make an image 1024 pixels wide, 2x the picture 3.5 times", set()),
        ("an image 3x larger, a picture 50% brighter", set()),
        ("a pilgrimage 3, scenic 2", set()),
        ("地图3 截图2 画图三个人", set()),
        ("make it night", set()),
    ],
)
def test_pictures_that_an_instruction_names(text, numbers):
    assert pictures_named(text) == numbers


def test_a_picture_that_the_row_does_not_have(pictures, capsys):
    texts = ["put picture 1 on picture 3", "把图3放到图1", "the third picture", "picture 1 beside image 2", "picture 0"]
    path = write_jsonl(pictures / "a.jsonl", [row(("a.png", "b.png"), text=text) for text in texts])
    status, notes, out = check(capsys, path)
    assert status == 0 and notes.keys() == {"picture_number"}
    note = notes["picture_number"]
    assert note["count"] == 4
    assert [example["where"] for example in note["examples"]] == [f"a.jsonl:{line}" for line in (1, 2, 3, 5)]
    assert note["examples"][0]["note"] == "the instruction names picture 3; the row has 2 references"
    assert "    a.jsonl:2: the instruction names picture 3; the row has 2 references" in out
    assert "4 row(s) name a picture that they do not have" in out


def test_more_references_than_the_models_were_trained_with(pictures, capsys):
    path = write_jsonl(pictures / "a.jsonl", [row(["a.png"] * count) for count in (3, 4, 6)])
    status, notes, out = check(capsys, path)
    assert status == 0 and notes["many_references"]["count"] == 2 and "Qwen-Image-Edit-2509 and 2511" in out
    assert [example["where"] for example in notes["many_references"]["examples"]] == ["a.jsonl:2", "a.jsonl:3"]


def test_keys_that_no_command_reads(pictures, capsys):
    more = {"task_type": "edit", "id": 3, "scene": {}, "nothing": None}
    path = write_jsonl(pictures / "a.jsonl", [row(("a.png",), **more, task="x", seed=1), row(("a.png",), seed=2)])
    status, _, out = check(capsys, path)
    assert status == 0 and "  2 row(s) have a key that no command reads: 'seed'\n" in out
    assert "  1 row(s) have a key that no command reads: 'task'; did you mean 'task_type'?" in out
    assert out.count("no command reads") == 2
    main(["data", "check", str(path), "--columns", "ignore=seed,ignore=task"])
    assert "no command reads" not in capsys.readouterr().out

    columns = {"output_image": [encoded(RED, (64, 64))], "instruction": ["do it"], "embedding": [[0.5]]}
    _, notes, _ = check(capsys, write_parquet(pictures / "a.parquet", columns))
    assert notes["unread_key"]["count"] == 1 and "'embedding'" in notes["unread_key"]["note"]


def test_images_under_16_pixels(pictures, capsys):
    path = write_jsonl(pictures / "a.jsonl", [row(("a.png",)), row(("small.png",)), row((), "small.png")])
    status, notes, _ = check(capsys, path)
    examples = notes["small_image"]["examples"]
    assert status == 0 and [example["where"] for example in examples] == ["a.jsonl:2", "a.jsonl:3"]
    assert examples[0]["note"] == "small.png is 40 x 15 pixels"


def test_files_without_rows(pictures, capsys):
    write_jsonl(pictures / "a.jsonl", [row(("a.png",))])
    (pictures / "b.jsonl").write_text("\n")
    status, notes, _ = check(capsys, pictures)
    assert status == 0 and notes["empty_file"]["examples"] == [{"where": "b.jsonl", "note": "has no rows"}]


def test_a_broken_row_is_reported_once(pictures, capsys):
    broken = [row(["none.png"] * 5, text="picture 9", seed=1), row(("a.png",), depth="small.png")]
    status, notes, out = check(capsys, write_jsonl(pictures / "a.jsonl", broken))
    assert status == 1 and not notes and out.count("a.jsonl:1:") == out.count("a.jsonl:2:") == 1
    assert "none.png" in out and "key 'depth' holds images" in out


def test_notes_beyond_the_number_to_show_are_counted(pictures, capsys):
    path = write_jsonl(pictures / "a.jsonl", [row(["a.png"] * 4)] * 5)
    assert main(["data", "check", str(path), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "  5 row(s) have more references" in out and out.count("    a.jsonl:") == 2 and "    and 3 more" in out


def test_data_without_notes_has_no_such_section(pictures, capsys):
    status, notes, out = check(capsys, write_jsonl(pictures / "a.jsonl", [row(("a.png", "b.png"), text="picture 2")]))
    assert status == 0 and notes == {} and "notes" not in out and len(KINDS) == 6
