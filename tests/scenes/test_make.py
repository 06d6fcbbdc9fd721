"""The command `uniref-fast data make`."""

import argparse
import json
import re

import pytest
from PIL import Image

from uniref_fast.scenes import make


def command(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    make.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_command(tmp_path, capsys):
    out, sheet = tmp_path / "deep/data", tmp_path / "sheets/preview.png"
    words = [out, "--train", 6, "--heldout", 2, "--size", 64, "--artworks", "shipped", "--references", "2,0"]
    assert make.run(command(*words, "--workers", 1, "--preview", sheet)) == 0
    captured = capsys.readouterr()
    assert str(out) in captured.out and "heldout_combinations" in captured.out and "compose" in captured.out
    assert re.search(r"^all +6 +2 +2$", captured.out, re.MULTILINE)
    with Image.open(sheet) as image:
        assert image.size[0] == 24 + 3 * 184 and image.size[1] > 2500
    assert {
        len(row["input_images"])
        for row in [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    } <= {0, 2}
    assert command(out).references == (0, 1, 2, 3, 4, 5, 6)


def test_command_errors(tmp_path, capsys):
    for words in (["--references", "0,7"], ["--references", ""], ["--workers", "0"], ["--train", "-1"]):
        with pytest.raises(SystemExit):
            command(tmp_path / "data", *words)
    capsys.readouterr()
    with pytest.raises(ValueError, match="both 0"):
        make.run(command(tmp_path / "data", "--train", 0, "--heldout", 0))
    with pytest.raises(ValueError, match=r"\.png"):
        make.run(command(tmp_path / "data", "--preview", tmp_path / "sheet.jpg"))
    with pytest.raises(ValueError, match="multiple of 16"):
        make.run(command(tmp_path / "data", "--size", 100, "--artworks", "shipped"))
    assert not (tmp_path / "data").exists()
