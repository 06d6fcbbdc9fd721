"""Comparison of two evaluations: matching files and rows, paired differences, refusals."""

import math

import pytest
from eval_records import broken, placed, record

from uniref_fast.evaluation import compare


def test_files_match_by_label_by_content_or_by_a_unique_name():
    def settings(**contents):
        return {"data": {label.replace("__", "/"): content for label, content in contents.items()}}

    same = compare.matching_files
    assert same(settings(d__x="1", e__x="2"), settings(d__x="1", e__x="3")) == {"d/x": "d/x", "e/x": "e/x"}
    assert same(settings(x="1"), settings(d__x="2", e__x="1")) == {"x": "e/x"}, "by content"
    assert same(settings(d__x="1", e__x="1"), settings(x="1")) == {"d/x": "x", "e/x": "x"}
    assert same(settings(d__x="1", e__x="2"), settings(x="3")) == {}, "ambiguous"
    assert same(settings(a__x="1", y="2"), settings(b__x="3", z="2")) == {"a/x": "b/x"}
    assert same({"files": {"x": 3}, "data": "old"}, settings(d__x="2")) == {"x": "d/x"}


def test_differing_settings_are_listed():
    settings = {"true_cfg_scale": 1.0, "budget": 32, "visibility": "full", "dtype": "float32", "device": "cpu"}
    other = {**settings, "true_cfg_scale": 4.0, "budget": None, "seed": 3, "model": "x"}
    assert compare.differing_settings(settings, other) == [
        "true_cfg_scale: 4.0 there, 1.0 here",
        "budget: None there, 32 here",
    ]
    no_model = {**settings, "true_cfg_scale": None, "visibility": None, "budget": 16}
    assert compare.differing_settings(settings, no_model) == ["budget: 16 there, 32 here"]
    rows = [record(index=i) for i in range(2)]
    found = compare.compare(rows, rows, "old") | {"settings": compare.differing_settings(settings, other)}
    assert "settings that differ: true_cfg_scale: 4.0 there" in compare.comparison_table(found)


def test_rows_with_equal_instructions_are_matched_by_their_index():
    here = [record(index=i, instruction="the same", psnr=10.0 * (i + 1)) for i in range(2)]
    there = [record(index=i, instruction="the same", psnr=1.0 * (i + 1)) for i in range(2)]
    found = compare.compare(here, there[::-1], "old")["files"]["a"]["psnr"]
    assert found["n"] == 2 and found["mean"] == pytest.approx((9 + 18) / 2) and found["sem"] == pytest.approx(4.5)


def test_differences_are_those_of_the_same_rows():
    here = [record(index=i, score=5.0 + i, psnr=20.0) for i in range(3)] + [record("b"), broken(index=5)]
    there = [record(index=i, score=4.0, psnr=22.0) for i in range(3)]
    there.append({**record("b"), "instruction": "another"})
    found = compare.compare(here, there, "old")
    assert found["against"] == "old" and found["unmatched"] == 2 and list(found["files"]) == ["a"]
    part = found["files"]["a"]
    assert part["rows"] == 3 and part["mean"] == {"n": 3, "mean": 2.0, "sem": pytest.approx(math.sqrt(1 / 3))}
    assert part["psnr"] == {"n": 3, "mean": -2.0, "sem": 0.0} and "present" not in part
    text = compare.comparison_table(found)
    assert "+2.00 ±0.58" in text and "-2.00 ±0.00" in text and "rows that only this evaluation has: 2" in text
    here[0]["objects"], there[0]["objects"] = [placed(True, 0.0), placed(True, 0.0)], [placed(True, 0.0), placed(False)]
    assert compare.compare(here, there, "old")["files"]["a"]["present"] == {"n": 1, "mean": 0.5, "sem": None}
    del there[1]["scores"]
    assert compare.compare(here, there, "old")["files"]["a"]["mean"]["n"] == 2


def test_evaluations_that_cannot_be_compared():
    rows = [record()]
    with pytest.raises(ValueError, match="no row of old is the same"):
        compare.compare(rows, [record("b")], "old")
    with pytest.raises(ValueError, match="no row of old is the same"):
        compare.compare(rows, [{**record(), "error": "broken"}], "old")
    with pytest.raises(ValueError, match=r"a 0 is 64x48 pixels here and 32x32 in old.*--target-side"):
        compare.compare(rows, [record(size=[32, 32])], "old")
    settings = {"seed": 1, "num_inference_steps": 8, "reward": "scene"}
    compare.check_comparable(settings, {**settings, "model": "another"})
    baseline = {**settings, "seed": None, "num_inference_steps": None}  # it runs no model
    compare.check_comparable(settings, baseline)
    with pytest.raises(ValueError, match="judge is"):
        compare.check_comparable({**settings, "judge": {"model": "a"}}, {**settings, "judge": {"model": "b"}})
    with pytest.raises(ValueError, match="seed is 1 here and 2 there; num_inference_steps is 8 here and 50 there"):
        compare.check_comparable(settings, {**settings, "seed": 2, "num_inference_steps": 50})
    with pytest.raises(ValueError, match="reward is 'scene' here and 'judge' there"):
        compare.check_comparable(settings, {**settings, "reward": "judge"})


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "holds no results.json"),
        ("{", "the results cannot be compared with"),
        ("[]", "the results cannot be compared with"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "settings": {}}', "the results cannot be compared with"),
    ],
)
def test_results_that_cannot_be_read(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        compare.read_results(tmp_path)
