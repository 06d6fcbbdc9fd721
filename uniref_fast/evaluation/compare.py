"""Comparison of two evaluations, row by row: checks that they can be compared, paired differences, and their table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from uniref_fast.evaluation.aggregate import (
    MEASURES,
    Record,
    difference,
    own_measures,
    own_scores,
    present_share,
    score,
    statistic,
)
from uniref_fast.evaluation.config import current_names
from uniref_fast.evaluation.report import aligned

__all__ = [
    "FORMAT",
    "check_common_rows",
    "check_comparable",
    "compare",
    "comparison_table",
    "differing_settings",
    "file_name",
    "matching_files",
    "read_results",
]  # fmt: skip

FORMAT = 1  # version of results.json
PAIRED = (*MEASURES, "psnr", "present")


def read_results(folder: Path) -> dict[str, Any]:
    """Return the settings and records in the results.json of an evaluation's folder.

    Raises:
        ValueError: The file is missing or cannot be read.
    """
    path = folder / "results.json"
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError(f"it has format {found['format']!r}, this version reads {FORMAT}")
        return {"settings": current_names(found["settings"]), "rows": [dict(row) for row in found["rows"]]}
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no results.json: it is not a finished evaluation") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the results cannot be compared with {path}: {error or type(error).__name__}") from error


def check_comparable(settings: Record, other: Record) -> None:
    """Check that two evaluations have equal settings where a difference would make a comparison meaningless.

    Raises:
        ValueError: The message names the settings that differ.
    """
    changed = []
    for name in ("seed", "num_inference_steps", "reward", "judge"):
        before, after = other.get(name), settings.get(name)
        no_noise = name in ("seed", "num_inference_steps") and None in (before, after)  # one of the two runs no model
        if before != after and not no_noise:
            changed.append(f"{name} is {after!r} here and {before!r} there")
    if changed:
        raise ValueError(f"these evaluations cannot be compared: {'; '.join(changed)}")


def differing_settings(settings: Record, other: Record) -> list[str]:
    """Return the other settings that differ and may explain a difference, as "true_cfg_scale: 4.0 there, 1.0 here"."""
    names = ("true_cfg_scale", "budget", "target_side", "width", "height", "visibility", "dtype", "device",
             "quantisation", "mode", "impl", "keep_references")  # fmt: skip
    pairs = {name: (other.get(name), settings.get(name)) for name in names}
    both_run = None not in (other.get("true_cfg_scale"), settings.get("true_cfg_scale"))  # otherwise one runs no model
    of_a_run = ("true_cfg_scale", "visibility", "dtype", "device", "quantisation", "mode", "impl", "keep_references")
    skipped = () if both_run else of_a_run
    return [
        f"{n}: {there} there, {here} here" for n, (there, here) in pairs.items() if there != here and n not in skipped
    ]


def matching_files(settings: Record, other: Record) -> dict[str, str]:
    """Return the label that the other evaluation has for each file, by the label of this one.

    Labels are parts of paths, as long as needed to distinguish the files of one evaluation, so one file may have two
    labels. A file matches the same label; otherwise a label with the same file name whose content is equal, or that is
    the only one with this name in both evaluations.
    """
    here, there = (_contents(each) for each in (settings, other))
    names_here, names_there = (Counter(map(file_name, each)) for each in (here, there))
    matches = {}
    for label, content in here.items():
        name = file_name(label)
        candidates = [one for one in there if file_name(one) == name]
        equal = [one for one in candidates if content is not None and there[one] == content]
        if label in there:
            matches[label] = label
        elif equal or (names_here[name] == names_there[name] == 1):
            matches[label] = (equal or candidates)[0]
    return matches


def file_name(label: str) -> str:
    """Return the part of a file's label that does not depend on the files evaluated with it."""
    return PurePosixPath(label).name


def check_common_rows(rows: Iterable[Record], others: Sequence[Record], files: Mapping[str, str], name: str) -> None:
    """Check that two evaluations have a row in common.

    Args:
        rows: Rows of this evaluation with "file", "index" and "instruction".
        others: Records of the other evaluation.
        files: Labels of this evaluation's files in the other one, see `matching_files`.
        name: Name of the other evaluation.

    Raises:
        ValueError: No row is the same in both.
    """
    known = {_identity(one) for one in others}
    if not any(_identity(row, files) in known for row in rows):
        raise ValueError(_no_common_rows(name))


def compare(
    records: Sequence[Record], others: Sequence[Record], name: str, files: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the differences, this evaluation minus the other, of rows with equal file, index and instruction.

    Args:
        records: Records of this evaluation.
        others: Records of the other evaluation.
        name: Name of the other evaluation.
        files: Labels of this evaluation's files in the other one, see `matching_files`; None if they are equal.

    Returns:
        "against": `name`.
        "unmatched": Number of records of this evaluation that the other one lacks.
        "files": For each file the number of "rows" that match, and by measure {"n", "mean", "sem"} of the differences.
            Measures are the axes, "mean", "psnr", "present" (share of a row's objects) and those of your own rewards;
            measures that no row has in both evaluations are left out.

    Raises:
        ValueError: No rows match, or the sizes of the results differ.
    """
    known = {_identity(one): one for one in others if "error" not in one}
    pairs = []
    for record in records:
        place = _identity(record, files)
        if "error" not in record and place in known:
            pairs.append((record, known[place]))
    if not pairs:
        raise ValueError(_no_common_rows(name))
    for record, other in pairs:
        if record["size"] != other["size"]:
            here, there = ("x".join(map(str, each["size"])) for each in (record, other))
            raise ValueError(
                f"{record['file']} {record['index']} is {here} pixels here and {there} in {name}; evaluate both with "
                "one --target-side"
            )
    by_file: dict[str, Any] = {}
    for file in dict.fromkeys(record["file"] for record, _ in pairs):
        own = [pair for pair in pairs if pair[0]["file"] == file]
        measures = (*PAIRED, *own_measures([record for record, _ in own]))
        found = {measure: _paired_statistic(own, measure) for measure in measures}
        by_file[file] = {"rows": len(own), **{measure: one for measure, one in found.items() if one["n"]}}
    return {"against": name, "unmatched": len(records) - len(pairs), "files": by_file}


def comparison_table(found: Mapping[str, Any]) -> str:
    """Return a comparison as a text table."""
    own = dict.fromkeys(name for one in found["files"].values() for name in one if ":" in name)
    names = [name for name in (*PAIRED, *own) if any(name in one for one in found["files"].values())]
    titles = ["PSNR" if name == "psnr" else name.rpartition(":")[2] for name in names]
    grid = [[f"minus {found['against']}", "rows", *titles]]
    for file, one in found["files"].items():
        grid.append([file, str(one["rows"]), *(_cell(one.get(name)) for name in names)])
    lines = aligned(grid)
    lines.append("differences of paired rows, mean ± standard error; present: share of a row's objects")
    if found.get("settings"):
        lines.append(f"settings that differ: {'; '.join(found['settings'])}")
    if found["unmatched"]:
        lines.append(f"rows that only this evaluation has: {found['unmatched']}")
    return "\n".join(lines)


def _identity(record: Record, files: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    """Return what identifies a row in both evaluations, with the file's label in the other one."""
    file = record.get("file")
    return file if files is None else files.get(str(file)), record.get("index"), record.get("instruction")


def _no_common_rows(name: str) -> str:
    return f"no row of {name} is the same as a row here (file, index and instruction)"


def _contents(settings: Record) -> Mapping[str, str | None]:
    """Return the content digest of each file by its label; None for results of versions that did not store it."""
    found = settings.get("data")
    return found if isinstance(found, Mapping) else dict.fromkeys(settings.get("files", ()))


def _paired_statistic(pairs: Sequence[tuple[Record, Record]], measure: str) -> dict[str, Any]:
    here, there = ([_value(pair[i], measure) for pair in pairs] for i in (0, 1))
    return statistic(difference(here, there))


def _value(record: Record, measure: str) -> float | None:
    if measure == "present":
        return present_share(record.get("objects", ()))
    if ":" in measure:
        return own_scores(record).get(measure)
    return record.get("psnr") if measure == "psnr" else score(record, measure)


def _cell(one: Record | None) -> str:
    if one is None:
        return ""
    return f"{one['mean']:+.2f}" + ("" if one["sem"] is None else f" ±{one['sem']:.2f}")
