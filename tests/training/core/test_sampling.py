"""Rows of `validate`, the user's own prompts and pictures: what is refused before a run starts."""

import json
from dataclasses import replace

import pytest
from data_rows import RED, encoded

from uniref_fast.training.core.sampling import MOST_PROMPTS, prompt_rows
from uniref_fast.training.supervised.recipes import tiny


@pytest.fixture
def config_of(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RED, (32, 32)))
    noise = encoded(RED, (300, 300), compress_level=0)
    (tmp_path / "cut.png").write_bytes(noise[: len(noise) // 2])

    def make(*rows):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return replace(tiny(), validate=(str(tmp_path / "prompts.jsonl"),))

    return make


def test_rows_need_no_target(config_of):
    rows = prompt_rows(config_of({"instruction": "a", "input_images": ["a.png"]}, {"instruction": "b"}))
    assert [len(row.references) for row in rows] == [1, 0] and prompt_rows(tiny()) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "prompts.jsonl has 0 rows.*give from 1 to 32 rows"),
        ([{"instruction": "a"}] * (MOST_PROMPTS + 1), "has 33 rows, and each is sampled at every validation"),
        ([{"instruction": "a", "input_images": ["none.png"]}], "^prompts.jsonl:1: no image file 'none.png'.*repair"),
        (
            [{"instruction": "a"}, {"instruction": "a", "input_images": ["cut.png"]}],
            "^prompts.jsonl:2: cut.png: .*trunc",
        ),
        ([{"instruction": " "}], "^prompts.jsonl:1: instruction is empty; repair or remove this row of validate"),
        ([{"words": "a", "input_images": ["a.png"]}], "^validate: prompts.jsonl: these keys match no known format"),
    ],
)
def test_wrong_rows_are_refused(config_of, rows, message):
    with pytest.raises(ValueError, match=message):
        prompt_rows(config_of(*rows))
