"""Evaluations: means and errors, tables, paired differences, the journal; on records made by hand."""

import json
import math

import pytest
from PIL import Image

from uniref_fast.evaluation import aggregate, compare, report
from uniref_fast.evaluation.journal import Journal, differing
from uniref_fast.rewards.types import AXES


def record(file="a", index=0, score=5.0, references=1, task="add", **more):
    made = {"file": file, "index": index, "where": f"{file}.jsonl:{index + 1}", "instruction": f"do {file} {index}"}
    made |= {"task": task, "references": references, "size": [64, 48], "psnr": 20.0 + index, "bound": {"psnr": 30.0}}
    if score is not None:
        made |= {"scores": scores(score), "bound": {"psnr": 30.0, "scores": scores(9.0)}}
    return made | more


def scores(value):
    return {"integration": value, "consistency": value + 1, "quality": value - 1, "mean": value}


def placed(present, distance=None, kept=False, similarity=0.5):
    return {"present": present, "distance": distance, "kept": kept, "similarity": similarity}


def broken(file="a", index=9):
    return {"file": file, "index": index, "where": f"{file}.jsonl:{index + 1}", "error": "cut short"}


def test_statistic():
    assert aggregate.statistic([]) == {"n": 0, "mean": None, "sem": None}
    assert aggregate.statistic([None, 3.0]) == {"n": 1, "mean": 3.0, "sem": None}
    found = aggregate.statistic([1.0, 2.0, None, 6.0])
    assert found["n"] == 3 and found["mean"] == 3.0
    assert found["sem"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


ROWS = [
    record(index=0, score=2.0, objects=[placed(True, 4.0), placed(False, kept=True, similarity=0.1)]),
    record(index=1, score=4.0, references=2, task="move", objects=[placed(True, 1.0, kept=True)]),
    record(index=2, score=None, failure={"kind": "timeout", "reason": "60 s"}),
    broken(index=3),
    record("b", 0, references=10),
    record("b", 1, references=2),
]


def test_aggregates():
    found = aggregate.aggregates(ROWS)
    assert list(found) == ["a", "b"] and list(found["b"]["references"]) == ["2", "10"], "by number, not by letters"
    whole = found["a"]["all"]
    assert (whole["rows"], whole["broken"], whole["failures"]) == (4, 1, {"timeout": 1})
    assert whole["scores"]["mean"] == {"n": 2, "mean": 3.0, "sem": pytest.approx(1.0)}
    assert whole["scores"]["quality"]["mean"] == 2.0 and whole["bound_scores"]["mean"]["mean"] == 9.0
    assert whole["gap_scores"]["consistency"]["mean"] == pytest.approx(6.0)
    assert whole["psnr"]["n"] == 3 and whole["psnr"]["mean"] == 21.0, "a row without scores has its PSNR all the same"
    assert whole["gap_psnr"]["mean"] == 9.0 and whole["bound_psnr"]["sem"] == 0.0
    assert whole["objects"] == {
        "n": 3, "present": pytest.approx(2 / 3), "present_sem": pytest.approx(2 / 9), "new": 1, "new_present": 1.0,
        "new_present_sem": None, "distance": 2.5,
        "similarity": pytest.approx(1.1 / 3), "bound_present": None, "bound_similarity": None,
    }  # fmt: skip
    assert set(found["a"]["tasks"]) == {"add", "move"} and found["a"]["tasks"]["add"]["rows"] == 2
    assert found["a"]["references"]["1"]["scores"]["mean"]["n"] == 1
    empty = aggregate.aggregates([broken()])["a"]
    assert empty["all"]["psnr"]["mean"] is None and empty["tasks"] == {} and empty["all"]["broken"] == 1
    json.dumps(found, allow_nan=False)


def test_every_group_has_its_own_rows():
    """By number of references, task and language, and of all files as one."""
    rows = [record(index=i, score=float(i), references=1 + i % 3, task=("add", "move")[i % 2],
                   **({"language": ("en", "cn")[i // 6]} if i < 12 else {})) for i in range(13)]  # fmt: skip
    found = aggregate.aggregates(rows)["a"]
    for kind, value in (("references", lambda i: str(1 + i % 3)), ("tasks", lambda i: ("add", "move")[i % 2]),
                        ("languages", lambda i: ("en", "cn")[i // 6] if i < 12 else None)):  # fmt: skip
        wanted = {}
        for i in range(13):
            if value(i) is not None:
                wanted.setdefault(value(i), []).append(float(i))
        means = {name: one["scores"]["mean"]["mean"] for name, one in found[kind].items()}
        assert means == {name: pytest.approx(sum(values) / len(values)) for name, values in wanted.items()}
    both = [*rows, *({**row, "file": "b", "scores": scores(50.0)} for row in rows[:1])]
    whole = aggregate.breakdown(both)
    assert whole["all"]["scores"]["mean"]["mean"] == pytest.approx((78 + 50) / 14) and whole["all"]["rows"] == 14
    text = report.aggregates_table(aggregate.aggregates(both), whole)
    assert "all files" in text and "  cn" in text and "all files" not in report.aggregates_table({"a": found}, whole)


def test_the_error_of_a_share_is_that_of_rows():
    """Objects of a row stand or fall together: four of one row are no more than one draw each."""
    rows = [record(index=i, objects=[placed(i % 2 == 0, 1.0 if i % 2 == 0 else None)] * 4) for i in range(16)]
    one = [record(index=i, objects=[placed(i % 2 == 0, None)]) for i in range(16)]
    both = [aggregate.summary(each)["objects"] for each in (rows, one)]
    assert [each["present"] for each in both] == [0.5, 0.5]
    assert [each["present_sem"] for each in both] == [pytest.approx(math.sqrt(0.25 / 15))] * 2
    assert "50% ±13" in report.aggregates_table(aggregate.aggregates(rows))
    assert both[0]["distance"] == 1.0 and aggregate.summary(one[:1])["objects"]["present_sem"] is None


def test_files_are_the_same_by_label_content_or_a_name_there_is_once():
    def settings(**contents):
        return {"data": {label.replace("__", "/"): content for label, content in contents.items()}}

    same = compare.matching_files
    assert same(settings(d__x="1", e__x="2"), settings(d__x="1", e__x="3")) == {"d/x": "d/x", "e/x": "e/x"}
    assert same(settings(x="1"), settings(d__x="2", e__x="1")) == {"x": "e/x"}, "by what is in it"
    assert same(settings(d__x="1", e__x="1"), settings(x="1")) == {"d/x": "x", "e/x": "x"}
    assert same(settings(d__x="1", e__x="2"), settings(x="3")) == {}, "which of them it is nobody knows"
    assert same(settings(a__x="1", y="2"), settings(b__x="3", z="2")) == {"a/x": "b/x"}
    assert same({"files": {"x": 3}, "data": "old"}, settings(d__x="2")) == {"x": "d/x"}


def test_settings_that_differ_are_told():
    settings = {"guidance": 1.0, "budget": 32, "visibility": "full", "dtype": "float32", "device": "cpu"}
    other = {**settings, "guidance": 4.0, "budget": None, "seed": 3, "model": "x"}
    assert compare.differing_settings(settings, other) == [
        "guidance: 4.0 there, 1.0 here",
        "budget: None there, 32 here",
    ]
    no_model = {**settings, "guidance": None, "visibility": None, "budget": 16}
    assert compare.differing_settings(settings, no_model) == ["budget: 16 there, 32 here"]
    rows = [record(index=i) for i in range(2)]
    found = compare.compare(rows, rows, "old") | {"settings": compare.differing_settings(settings, other)}
    assert "settings that differ: guidance: 4.0 there" in compare.comparison_table(found)


def test_one_instruction_at_two_places_is_two_rows():
    here = [record(index=i, instruction="the same", psnr=10.0 * (i + 1)) for i in range(2)]
    there = [record(index=i, instruction="the same", psnr=1.0 * (i + 1)) for i in range(2)]
    found = compare.compare(here, there[::-1], "old")["files"]["a"]["psnr"]
    assert found["n"] == 2 and found["mean"] == pytest.approx((9 + 18) / 2) and found["sem"] == pytest.approx(4.5)


def test_the_table_shows_what_there_is_and_explains_it():
    text = report.aggregates_table(aggregate.aggregates(ROWS))
    lines = text.splitlines()
    head = lines[0].split()
    assert head == ["rows", "broken", "unscored", *AXES, "mean", "best", "PSNR", "VAE", "gap", "present", "new", "off",
                    "similar"]  # fmt: skip
    first = lines[1].split()
    assert first[:4] == ["a", "4", "1", "1"] and "±1.00" in lines[1] and "67%" in lines[1]
    assert len({len(line) for line in lines if line.startswith(("a", "b"))} | {len(lines[0])}) <= 3
    assert "  10 pictures" in text and "  1 picture " in text and "  move" in text
    assert "unscored: rows that the reward could not score" in text and "best:" in text
    bare = report.aggregates_table(
        aggregate.aggregates([{k: v for k, v in record(score=None).items() if k not in ("psnr", "bound")}])
    )
    assert bare.splitlines()[0].split() == ["rows"], "nothing is known but how many"
    failed = report.aggregates_table(aggregate.aggregates([broken()]))
    assert failed.splitlines()[0].split() == ["rows", "broken"]


def test_paired_differences_take_the_same_rows():
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


def test_what_cannot_be_compared():
    rows = [record()]
    with pytest.raises(ValueError, match="no row of old is the same"):
        compare.compare(rows, [record("b")], "old")
    with pytest.raises(ValueError, match="no row of old is the same"):
        compare.compare(rows, [{**record(), "error": "broken"}], "old")
    with pytest.raises(ValueError, match=r"a 0 is 64x48 pixels here and 32x32 in old.*--target-side"):
        compare.compare(rows, [record(size=[32, 32])], "old")
    settings = {"seed": 1, "steps": 8, "reward": "scene"}
    compare.check_comparable(settings, {**settings, "model": "another"})
    compare.check_comparable(settings, {**settings, "seed": None, "steps": None})  # a baseline that runs no model
    with pytest.raises(ValueError, match="judge is"):
        compare.check_comparable({**settings, "judge": {"model": "a"}}, {**settings, "judge": {"model": "b"}})
    with pytest.raises(ValueError, match="seed is 1 here and 2 there; steps is 8 here and 50 there"):
        compare.check_comparable(settings, {**settings, "seed": 2, "steps": 50})
    with pytest.raises(ValueError, match="reward is 'scene' here and 'judge' there"):
        compare.check_comparable(settings, {**settings, "reward": "judge"})


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "holds no results.json"),
        ("{", "cannot be compared with"),
        ("[]", "cannot be compared with"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "settings": {}}', "cannot be compared with"),
    ],
)
def test_results_that_cannot_be_read(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        compare.read_results(tmp_path)


def test_the_sheet_has_a_line_a_row():
    picture = Image.new("RGB", (32, 32), "red")
    rows = [(record(), [("made", picture), ("target", picture)]), (record(score=None), [("made", picture)])]
    assert report.sheet(rows).size[0] == 24 + 2 * (160 + 24)


# ---- the journal ----

SETTINGS = {"model": "m", "seed": 0, "judge": {"model": "j", "samples": 1}, "initial": []}


def begun(folder, rows=2, weights="w"):
    journal = Journal(folder, SETTINGS)
    journal.check_weights(weights)
    for i in range(rows):
        journal.add(record(index=i))
    journal.close()
    return folder / "rows.jsonl"


def test_a_journal_goes_on_and_leaves_out_a_line_that_a_kill_has_cut(tmp_path):
    path = begun(tmp_path)
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        journal = Journal(tmp_path, dict(SETTINGS))
        assert list(journal.rows) == [("a", 0)]
        journal.check_weights("w")
        journal.add(record(index=1))
        journal.close()
        assert path.read_bytes() == whole
    journal = Journal(tmp_path, SETTINGS)
    journal.add(record(index=0, score=9.0))
    journal.close()
    again = Journal(tmp_path, SETTINGS)
    assert again.rows["a", 0]["scores"]["mean"] == 9.0, "the last record of a row counts"
    again.close()


def test_a_journal_refuses_other_settings_weights_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    begun(tmp_path / "a")
    with pytest.raises(ValueError, match=r"other settings: seed: 0 -> 1; judge.samples: 1 -> 2; give the same"):
        Journal(tmp_path / "a", {**SETTINGS, "seed": 1, "judge": {"model": "j", "samples": 2}})
    journal = Journal(tmp_path / "a", SETTINGS)
    with pytest.raises(ValueError, match="weights of the model have changed"):
        journal.check_weights("other")
    journal.close()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no evaluation"):
        Journal(tmp_path / "b", SETTINGS)
    assert differing({"a": (1,)}, {"a": [1]}) == [] and differing({}, {"a": None}) == []


def test_one_at_a_time(tmp_path):
    """Also before anything is made: what another has begun is not begun anew under its hands."""
    first = Journal(tmp_path, SETTINGS)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another evaluation is writing"):
        Journal(tmp_path, {**SETTINGS, "seed": 5})
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    first.check_weights("w")
    first.close()
    Journal(tmp_path, SETTINGS).close()


def test_nothing_made_nothing_binds(tmp_path):
    """A wrong --model must not make the folder useless; an image of other settings must."""
    begun(tmp_path, rows=0)
    journal = Journal(tmp_path, {**SETTINGS, "model": "other"})
    journal.check_weights("v")
    journal.close()
    assert b'"other"' in (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="other settings"):
        Journal(tmp_path, SETTINGS)


@pytest.mark.parametrize("line", [b"[1]", b"{", b'{"settings": {}}', b"\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = begun(tmp_path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3 is damaged"):
        Journal(tmp_path, SETTINGS)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = begun(tmp_path)
    before = path.read_bytes()
    journal = Journal(tmp_path, SETTINGS)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        journal.add(record(index=7))
    journal.close()
    assert path.read_bytes() == before and ("a", 7) not in journal.rows
