"""Aggregates: means, standard errors and groups of records."""

import json
import math

import pytest
from eval_records import broken, placed, record, scores

from uniref_fast.evaluation import aggregate, report


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
    assert list(found) == ["a", "b"] and list(found["b"]["references"]) == ["2", "10"], "sorted as numbers"
    whole = found["a"]["all"]
    assert (whole["rows"], whole["broken"], whole["failures"]) == (4, 1, {"timeout": 1})
    assert whole["scores"]["mean"] == {"n": 2, "mean": 3.0, "sem": pytest.approx(1.0)}
    assert whole["scores"]["quality"]["mean"] == 2.0 and whole["bound_scores"]["mean"]["mean"] == 9.0
    assert whole["gap_scores"]["consistency"]["mean"] == pytest.approx(6.0)
    assert whole["psnr"]["n"] == 3 and whole["psnr"]["mean"] == 21.0, "a row without scores still has its PSNR"
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


def test_each_group_has_its_own_rows():
    """Groups are by number of references, task and language, for each file and for all files together."""
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
    """Objects of one row are correlated, so that they count as one sample."""
    rows = [record(index=i, objects=[placed(i % 2 == 0, 1.0 if i % 2 == 0 else None)] * 4) for i in range(16)]
    one = [record(index=i, objects=[placed(i % 2 == 0, None)]) for i in range(16)]
    both = [aggregate.summary(each)["objects"] for each in (rows, one)]
    assert [each["present"] for each in both] == [0.5, 0.5]
    assert [each["present_sem"] for each in both] == [pytest.approx(math.sqrt(0.25 / 15))] * 2
    assert "50% ±13" in report.aggregates_table(aggregate.aggregates(rows))
    assert both[0]["distance"] == 1.0 and aggregate.summary(one[:1])["objects"]["present_sem"] is None
