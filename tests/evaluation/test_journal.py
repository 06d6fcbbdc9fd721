"""The journal of an evaluation: interruptions, other settings, damaged lines, a full disk."""

import pytest
from eval_records import record

from uniref_fast.evaluation.journal import Journal, differing

SETTINGS = {"model": "m", "seed": 0, "judge": {"model": "j", "samples": 1}, "initial": []}


def begun(folder, rows=2, weights="w"):
    journal = Journal(folder, SETTINGS)
    journal.check_weights(weights)
    for i in range(rows):
        journal.add(record(index=i))
    journal.close()
    return folder / "rows.jsonl"


def test_a_journal_continues_after_a_truncated_last_line(tmp_path):
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


def test_only_one_evaluation_writes_a_journal(tmp_path):
    """The lock also holds before the first row is evaluated."""
    first = Journal(tmp_path, SETTINGS)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another evaluation is writing"):
        Journal(tmp_path, {**SETTINGS, "seed": 5})
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    first.check_weights("w")
    first.close()
    Journal(tmp_path, SETTINGS).close()


def test_settings_may_change_before_the_first_row(tmp_path):
    """A wrong --model leaves the folder usable; an image that was generated with other settings does not."""
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


def test_a_full_disk_leaves_no_partial_line(tmp_path, monkeypatch):
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
