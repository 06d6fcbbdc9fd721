"""Tests of the command `uniref-fast data check`."""

import json

import pytest
from data_rows import RED, encoded, row, write_jsonl

from uniref_fast.cli import main
from uniref_fast.data.dataset import Dataset


def check(capsys, *args):
    status = main(["data", "check", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def measured(tmp_path):
    """Four good rows with K = 0, 1, 2, 2 and sizes that can be distinguished."""
    for name, size in (("s", (64, 64)), ("w", (160, 90)), ("t", (30, 40))):
        (tmp_path / f"{name}.png").write_bytes(encoded(RED, size))
    good = [
        row((), "s.png", task_type="t2i"), row(("w.png",), "t.png", task_type="edit"),
        row(("s.png", "w.png"), "s.png", task_type="edit"), row(("t.png", "t.png"), "w.png"),
    ]  # fmt: skip
    return write_jsonl(tmp_path / "a.jsonl", good)


def test_check_measures_good_data(measured, capsys):
    status, out, _ = check(capsys, measured, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["rows"] == 4 and facts["broken"] == 0 and facts["errors"] == []
    assert facts["references"] == {"0": 1, "1": 1, "2": 2}
    assert facts["task_types"] == {"edit": 2, "t2i": 1, "": 1}
    assert facts["target_sizes"]["pixels"] == {"min": 1200, "median": 4096, "max": 14400}
    assert facts["target_sizes"]["ratios"] == {"1:1": 2, "3:4": 1, "16:9": 1}
    assert facts["reference_sizes"]["pictures"] == 5
    areas = facts["joint_reference_area"]
    assert areas["p50"] == 14400 and areas["p100"] == 4096 + 14400 and areas["p5"] == int(2400 + 0.1 * 12000)
    assert facts["fingerprint"] == Dataset(measured).fingerprint

    status, out, _ = check(capsys, measured.parent, "--decode")
    assert status == 0
    assert "rows              4 in 1 file(s), 0 broken" in out and "0: 1, 1: 1, 2: 2" in out
    assert "edit: 2, t2i: 1, (none): 1" in out and "1,200 / 4,096 / 14,400" in out and "1:1 50%" in out


def test_check_lists_every_broken_row_and_fails(measured, capsys):
    (measured.parent / "cut.png").write_bytes(encoded(RED, (300, 300), compress_level=0)[:5000])
    (measured.parent / "bad.png").write_bytes(b"bad")
    broken = [row(("cut.png",), "s.png"), row(("bad.png",), "s.png")]
    broken += [row(text="")] * 30
    write_jsonl(measured.parent / "b.jsonl", broken)
    status, out, _ = check(capsys, measured.parent)
    assert status == 1 and "36 in 2 file(s), 31 broken" in out
    assert "  b.jsonl:2: bad.png: not an image" in out and "b.jsonl:3: instruction is empty" in out
    assert "b.jsonl:1:" not in out, "its header is whole"
    assert out.count("b.jsonl:") == 20 and out.rstrip().endswith("and 11 more")
    status, out, _ = check(capsys, measured.parent, "--decode", "--json", "--show", 2)
    facts = json.loads(out)
    assert status == 1 and facts["broken"] == 32 and facts["rows"] == 36
    assert [error["where"] for error in facts["errors"]] == ["b.jsonl:1", "b.jsonl:2"]
    assert "truncated" in facts["errors"][0]["reason"]


def test_check_of_rows_without_targets(measured, capsys):
    folder = measured.parent
    path = write_jsonl(folder / "b.jsonl", [{"prompt": "do it", "images": ["s.png"]}])
    assert check(capsys, path)[0] == 1
    status, out, _ = check(capsys, path, "--targets", "optional")
    assert status == 0 and "targets           none" in out


def test_check_lists_the_files_left_out(measured, capsys):
    folder = measured.parent
    (folder / "about.json").write_text('{"seed": 0}')
    (folder / "more.tsv").write_text("x")
    status, out, _ = check(capsys, folder)
    assert status == 0 and "left out          2" in out and "  about.json: holds a JSON object ('seed')" in out
    status, out, _ = check(capsys, folder, "--json")
    assert [one["file"] for one in json.loads(out)["left_out"]] == ["more.tsv", "about.json"]


def test_check_of_no_rows(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("")
    status, out, _ = check(capsys, tmp_path / "a.jsonl")
    assert status == 0 and "rows              0" in out
    assert json.loads(check(capsys, tmp_path / "a.jsonl", "--json")[1])["joint_reference_area"] == {}


def test_check_distinguishes_wrong_commands_from_wrong_data(measured, capsys):
    folder = measured.parent
    status, _, err = check(capsys, folder / "none.jsonl")
    assert status == 2 and "no such file or folder" in err
    assert check(capsys, folder / "s.png")[0] == 2
    (folder / "a.tar").write_bytes(b"not a tar")
    status, _, err = check(capsys, folder / "a.tar")
    assert status == 1 and "broken file a.tar: cannot be read as a tar" in err
    path = measured
    assert check(capsys, path, "--show", -1)[0] == 2
    assert check(capsys, path, "--image-folder", folder / "none")[0] == 2
    with pytest.raises(SystemExit, match="2"):
        main(["data", "check"])
    with pytest.raises(SystemExit, match="2"):
        main(["data"])
