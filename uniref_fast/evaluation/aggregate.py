"""Aggregates of an evaluation's records: means with standard errors, by file, number of references, task and language.

A record is the JSON object of one evaluated row, see `journal`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uniref_fast.rewards.types import AXES

__all__ = [
    "MEASURES", "Record", "aggregates", "breakdown", "difference", "own_measures", "own_scores", "present_share",
    "score", "statistic", "summary",
]  # fmt: skip

Record = Mapping[str, Any]
MEASURES = (*AXES, "mean")


def aggregates(records: Sequence[Record]) -> dict[str, Any]:
    """Return the breakdown of each file's records, by file, see `breakdown`."""
    return {file: breakdown(_where(records, "file", file)) for file in dict.fromkeys(one["file"] for one in records)}


def breakdown(records: Sequence[Record]) -> dict[str, Any]:
    """Return summaries of all records and of their groups, see `summary`.

    Returns:
        "all": Summary of all records.
        "references", "tasks", "languages": Summaries by number of references, task, and language of the instruction.
    """
    return {
        "all": summary(records),
        "references": {str(k): summary(_where(records, "references", k)) for k in _values(records, "references")},
        "tasks": {task: summary(_where(records, "task", task)) for task in _values(records, "task")},
        "languages": {name: summary(_where(records, "language", name)) for name in _values(records, "language")},
    }


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers and means of some records. Means are {"n", "mean", "sem"}, see `statistic`.

    Returns:
        "rows", "broken": Number of records, and of those that could not be evaluated.
        "failures": Number of rows that the reward could not score, by kind of failure.
        "scores", "bound_scores", "gap_scores": Means by axis: of the results, of the targets through the autoencoder,
            and of the difference of the two.
        "psnr", "bound_psnr", "gap_psnr": The same for the PSNR, in dB.
        "own", "own_failures": Means of your own rewards by "module:function.axis", and their failures by kind.
        "objects": See `_objects_summary`.
    """
    whole = [one for one in records if "error" not in one]
    scores = {axis: [score(one, axis) for one in whole] for axis in MEASURES}
    bounds = {axis: [score(one.get("bound", {}), axis) for one in whole] for axis in MEASURES}
    psnrs, bound_psnrs = [one.get("psnr") for one in whole], [one.get("bound", {}).get("psnr") for one in whole]
    return {
        "rows": len(records),
        "broken": len(records) - len(whole),
        "failures": _counts(one["failure"]["kind"] for one in whole if "failure" in one),
        "scores": {axis: statistic(values) for axis, values in scores.items()},
        "bound_scores": {axis: statistic(values) for axis, values in bounds.items()},
        "gap_scores": {axis: statistic(difference(bounds[axis], values)) for axis, values in scores.items()},
        "own": {measure: statistic([own_scores(one).get(measure) for one in whole]) for measure in own_measures(whole)},
        "own_failures": _counts(
            f"{name}: {result['failure']['kind']}"
            for one in whole
            for name, result in one.get("own", {}).items()
            if "failure" in result
        ),
        "psnr": statistic(psnrs),
        "bound_psnr": statistic(bound_psnrs),
        "gap_psnr": statistic(difference(bound_psnrs, psnrs)),
        "objects": _objects_summary(whole),
    }


def _objects_summary(records: Sequence[Record]) -> dict[str, Any]:
    """Return figures of the objects that the scenes of some records contain.

    Returns:
        "n", "present", "present_sem": Number of objects, the share that the results show, and its standard error, for
            which the objects of one row count as one sample.
        "new", "new_present", "new_present_sem": The same for objects that no reference shows at their place.
        "distance", "similarity": Means of the distance of present objects from their place in pixels, and of the
            similarity of all objects.
        "bound_present", "bound_similarity": The same for the targets through the autoencoder.
    """
    by_record = [one.get("objects", ()) for one in records]
    new_by_record = [[placed for placed in objects if not placed["kept"]] for objects in by_record]
    objects = [placed for objects in by_record for placed in objects]
    new = [placed for objects in new_by_record for placed in objects]
    bounds = [placed for one in records for placed in one.get("bound", {}).get("objects", ())]
    return {
        "n": len(objects),
        "present": present_share(objects),
        "present_sem": _share_error(by_record),
        "new": len(new),
        "new_present": present_share(new),
        "new_present_sem": _share_error(new_by_record),
        "distance": statistic([placed["distance"] for placed in objects])["mean"],
        "similarity": statistic([placed["similarity"] for placed in objects])["mean"],
        "bound_present": present_share(bounds),
        "bound_similarity": statistic([placed["similarity"] for placed in bounds])["mean"],
    }


def own_scores(record: Record) -> dict[str, float]:
    """Return the scores of your own rewards for a row, by "module:function.axis"."""
    results = record.get("own", {}).items()
    return {f"{name}.{axis}": value for name, result in results for axis, value in result.get("scores", {}).items()}


def own_measures(records: Sequence[Record]) -> list[str]:
    """Return the names of the scores that your own rewards gave to any of the records."""
    return list(dict.fromkeys(measure for one in records for measure in own_scores(one)))


def statistic(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the number, the mean and the standard error of the mean of the values that are not None."""
    known = [value for value in values if value is not None]
    n = len(known)
    mean = math.fsum(known) / n if n else None
    variance = math.fsum((value - mean) ** 2 for value in known) / (n - 1) if mean is not None and n > 1 else None
    return {"n": n, "mean": mean, "sem": None if variance is None else math.sqrt(variance / n)}


def difference(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    """Return first - second, element by element; None if either is None."""
    return [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]


def score(record: Record, axis: str) -> float | None:
    """Return the reward's score of a record on an axis, or None."""
    return record.get("scores", {}).get(axis)


def present_share(objects: Sequence[Record]) -> float | None:
    """Return the share of objects that are present; None without objects."""
    return statistic([float(placed["present"]) for placed in objects])["mean"]


def _share_error(groups: Sequence[Sequence[Record]]) -> float | None:
    """Return the standard error of the share over all objects, from the differences of their rows.

    None for fewer than two rows with objects.
    """
    counts = [(sum(bool(placed["present"]) for placed in objects), len(objects)) for objects in groups if objects]
    if len(counts) < 2:
        return None
    n = sum(total for _, total in counts)
    share = sum(present for present, _ in counts) / n
    squares = math.fsum((present - share * total) ** 2 for present, total in counts)
    return math.sqrt(squares * len(counts) / (len(counts) - 1)) / n


def _counts(kinds: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))


def _where(records: Sequence[Record], key: str, value: Any) -> list[Record]:
    return [one for one in records if one.get(key) == value]


def _values(records: Sequence[Record], key: str) -> list[Any]:
    """Return the values of a key in order; records of broken rows may lack the key."""
    return sorted({one[key] for one in records if key in one})
