"""What the records of an evaluation come to: means with standard errors, a table, differences to another evaluation."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from uniref_fast.rewards.types import AXES
from uniref_fast.sheets import contact_sheet

__all__ = [
    "aggregates",
    "check_comparable",
    "compare",
    "comparison_table",
    "file_name",
    "identity",
    "parts",
    "read_results",
    "same_files",
    "sheet",
    "table",
    "unlike",
]

Record = Mapping[str, Any]
MEASURES = (*AXES, "mean")
FORMAT = 1  # of results.json


def aggregates(rows: Sequence[Record]) -> dict[str, Any]:
    """By file, see `parts`."""
    return {file: parts(_with(rows, "file", file)) for file in dict.fromkeys(row["file"] for row in rows)}


def parts(rows: Sequence[Record]) -> dict[str, Any]:
    """Of "all" rows, by number of "references", by "tasks", and by "languages" where a bench has them; see `group`."""
    return {
        "all": group(rows),
        "references": {str(k): group(_with(rows, "references", k)) for k in _values(rows, "references")},
        "tasks": {task: group(_with(rows, "task", task)) for task in _values(rows, "task")},
        "languages": {language: group(_with(rows, "language", language)) for language in _values(rows, "language")},
    }


def group(rows: Sequence[Record]) -> dict[str, Any]:
    """What some rows come to.

    Returns:
        "rows", "broken" of them, "failures" to score by kind; "scores", "bound_scores" (of the target through the
        autoencoder) and "gap_scores" (the bound less the image made) by axis; "psnr", "bound_psnr" and "gap_psnr" in
        dB; "own" the scores of rewards of your own by "module:function.axis", and "own_failures" of them by kind;
        each as {"n", "mean", "sem"}, None where nothing is known. "objects": {"n", "present" share of them and
        "present_sem" its standard error, objects of a row counting as one draw, "new", "new_present" and
        "new_present_sem" the same of those that no picture shows at their place, "distance" mean of those
        present in pixels, "similarity" mean of all, "bound_present" and "bound_similarity" the same of the targets
        through the autoencoder}.
    """
    made = [row for row in rows if "error" not in row]
    scores = {axis: [_score(row, axis) for row in made] for axis in MEASURES}
    bounds = {axis: [_score(row.get("bound", {}), axis) for row in made] for axis in MEASURES}
    psnrs, most = [row.get("psnr") for row in made], [row.get("bound", {}).get("psnr") for row in made]
    objects = [one for row in made for one in row.get("objects", ())]
    best = [one for row in made for one in row.get("bound", {}).get("objects", ())]
    new = [one for one in objects if not one["kept"]]
    return {
        "rows": len(rows),
        "broken": len(rows) - len(made),
        "failures": dict(sorted(Counter(row["failure"]["kind"] for row in made if "failure" in row).items())),
        "scores": {axis: statistic(values) for axis, values in scores.items()},
        "bound_scores": {axis: statistic(values) for axis, values in bounds.items()},
        "gap_scores": {axis: statistic(_less(bounds[axis], values)) for axis, values in scores.items()},
        "own": {measure: statistic([own_scores(row).get(measure) for row in made]) for measure in own_measures(made)},
        "own_failures": dict(
            sorted(
                Counter(
                    f"{name}: {result['failure']['kind']}"
                    for row in made
                    for name, result in row.get("own", {}).items()
                    if "failure" in result
                ).items()
            )
        ),
        "psnr": statistic(psnrs),
        "bound_psnr": statistic(most),
        "gap_psnr": statistic(_less(most, psnrs)),
        "objects": {
            "n": len(objects),
            "present": _share(objects),
            "present_sem": _share_error([row.get("objects", ()) for row in made]),
            "new": len(new),
            "new_present": _share(new),
            "new_present_sem": _share_error([[o for o in row.get("objects", ()) if not o["kept"]] for row in made]),
            "distance": statistic([one["distance"] for one in objects])["mean"],
            "similarity": statistic([one["similarity"] for one in objects])["mean"],
            "bound_present": _share(best),
            "bound_similarity": statistic([one["similarity"] for one in best])["mean"],
        },
    }


def own_scores(row: Record) -> dict[str, float]:
    """Scores of a row by rewards of the user's own, by "module:function.axis"."""
    results = row.get("own", {}).items()
    return {f"{name}.{axis}": score for name, result in results for axis, score in result.get("scores", {}).items()}


def own_measures(rows: Sequence[Record]) -> list[str]:
    """What rewards of the user's own score in any of the rows."""
    return list(dict.fromkeys(measure for row in rows for measure in own_scores(row)))


def statistic(values: Sequence[float | None]) -> dict[str, Any]:
    """Number, mean and standard error of the mean of the values that are there."""
    known = [value for value in values if value is not None]
    n = len(known)
    mean = math.fsum(known) / n if n else None
    spread = math.fsum((value - mean) ** 2 for value in known) / (n - 1) if mean is not None and n > 1 else None
    return {"n": n, "mean": mean, "sem": None if spread is None else math.sqrt(spread / n)}


def _share(objects: Sequence[Record]) -> float | None:
    return statistic([float(one["present"]) for one in objects])["mean"]


def _share_error(rows: Sequence[Sequence[Record]]) -> float | None:
    """Standard error of the share over all objects, from how its rows differ; None for fewer than two rows."""
    counts = [(sum(bool(one["present"]) for one in row), len(row)) for row in rows if row]
    if len(counts) < 2:
        return None
    n = sum(own for _, own in counts)
    share = sum(there for there, _ in counts) / n
    squares = math.fsum((there - share * own) ** 2 for there, own in counts)
    return math.sqrt(squares * len(counts) / (len(counts) - 1)) / n


def _less(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]


def _score(record: Record, axis: str) -> float | None:
    return record.get("scores", {}).get(axis)


def _with(rows: Sequence[Record], key: str, value: Any) -> list[Record]:
    return [row for row in rows if row.get(key) == value]


def _values(rows: Sequence[Record], key: str) -> list[Any]:
    """In order; broken rows may have none."""
    return sorted({row[key] for row in rows if key in row})


# ---- a table ----

Cell = Callable[[Mapping[str, Any]], str]


def _measure(*path: str, digits: int = 2, errors: bool = False) -> Cell:
    def cell(found: Mapping[str, Any]) -> str:
        value: Any = found
        for key in path:
            value = value[key]
        if not isinstance(value, Mapping):
            return "" if value is None else f"{value:.{digits}f}"
        if value["mean"] is None:
            return ""
        error = f" ±{value['sem']:.{digits}f}" if errors and value["sem"] is not None else ""
        return f"{value['mean']:.{digits}f}{error}"

    return cell


def _percent(name: str) -> Cell:
    def cell(found: Mapping[str, Any]) -> str:
        share, error = found["objects"][name], found["objects"][f"{name}_sem"]
        return "" if share is None else f"{share:.0%}" + (f" ±{100 * error:.0f}" if error else "")

    return cell


def _own_cell(found: Mapping[str, Any], measure: str) -> str:
    value = found["own"].get(measure, {"mean": None})
    return "" if value["mean"] is None else _measure("own", measure, errors=True)(found)


COLUMNS: dict[str, Cell] = {
    "rows": lambda found: str(found["rows"]),
    "broken": lambda found: str(found["broken"] or ""),
    "unscored": lambda found: str(sum(found["failures"].values()) or ""),
    **{axis: _measure("scores", axis) for axis in AXES},
    "mean": _measure("scores", "mean", errors=True),
    "best": _measure("bound_scores", "mean"),
    "PSNR": _measure("psnr", digits=1, errors=True),
    "VAE": _measure("bound_psnr", digits=1),
    "gap": _measure("gap_psnr", digits=1, errors=True),
    "present": _percent("present"),
    "new": _percent("new_present"),
    "off": _measure("objects", "distance", digits=1),
    "similar": _measure("objects", "similarity"),
    "most": _measure("objects", "bound_similarity"),
}
LEGEND = {
    "unscored": "unscored: the reward failed",
    "mean": "mean: of the three axes, 0 to 10, ± standard error",
    "best": "best: that mean for the target through the autoencoder",
    "VAE": "VAE: PSNR of the target through the autoencoder; gap: what is left to it, dB",
    "present": "present: share of the objects asked for; new: of those that no picture shows at their place",
    "off": "off: pixels from where they belong",
    "similar": "similar: how alike they are, 0 to 1; most: that of the target through the autoencoder",
}


def table(found: Mapping[str, Any], overall: Mapping[str, Any] | None = None) -> str:
    """Aggregates as text, those of all files last where there are several; columns that say nothing are left out."""
    lines = []
    whole = {"all files": overall} if overall is not None and len(found) > 1 else {}
    for file, part in {**found, **whole}.items():
        lines.append((file, part["all"]))
        lines += [(f"  {k} picture{'' if k == '1' else 's'}", one) for k, one in part["references"].items()]
        lines += [(f"  {name}", one) for kind in ("tasks", "languages") for name, one in part[kind].items()]
    own = dict.fromkeys(measure for _, one in lines for measure in one["own"])
    columns = COLUMNS | {measure.partition(":")[2]: functools.partial(_own_cell, measure=measure) for measure in own}
    names = [name for name, cell in columns.items() if any(cell(one) for _, one in lines)]
    grid = [["", *names]] + [[label, *(columns[name](one) for name in names)] for label, one in lines]
    legend = [text for name, text in LEGEND.items() if name in names]
    return "\n".join([*_aligned(grid), *(["", *legend] if legend else [])])


def _aligned(grid: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in grid
    ]


def sheet(rows: Sequence[tuple[Record, list[tuple[str, Image.Image]]]]) -> Image.Image:
    """A labelled grid of records with their pictures: what was made with its scores, then the others."""
    lines, texts = [], []
    for number, (record, (made, *others)) in enumerate(rows, start=1):
        scores = " ".join(f"{axis[0]}{record['scores'][axis]:.1f}" for axis in AXES) if "scores" in record else ""
        lines.append([(f"{number}. {made[0]} {scores}".rstrip(), made[1]), *others])
        texts.append(f"{number}. {record['file']} {record['index']}: {record['instruction']}")
    return contact_sheet(lines, caption="\n".join(texts), cell=160)


# ---- against another evaluation ----


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a folder. Raises ValueError when there is none that can be read."""
    path = folder / "results.json"
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError(f"it has format {found['format']!r}, this version reads {FORMAT}")
        return {"settings": dict(found["settings"]), "rows": [dict(row) for row in found["rows"]]}
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no results.json: it is no finished evaluation") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be compared with: {error or type(error).__name__}") from error


def check_comparable(settings: Record, other: Record) -> None:
    """Raises ValueError that names the settings in which two evaluations must not differ."""
    changed = []
    for name in ("seed", "steps", "reward", "judge"):
        before, after = other.get(name), settings.get(name)
        no_noise = name in ("seed", "steps") and None in (before, after)  # where no model is run
        if before != after and not no_noise:
            changed.append(f"{name} is {after!r} here and {before!r} there")
    if changed:
        raise ValueError(f"these evaluations cannot be compared: {'; '.join(changed)}")


def unlike(settings: Record, other: Record) -> list[str]:
    """Settings that differ though the model is the same or another, as "guidance: 4.0 there, 1.0 here"."""
    names = ("guidance", "budget", "target_side", "size", "visibility", "dtype", "device")
    pairs = {name: (other.get(name), settings.get(name)) for name in names}
    runs = None not in (other.get("guidance"), settings.get("guidance"))  # else one runs no model
    skipped = () if runs else ("guidance", "visibility", "dtype", "device")
    return [
        f"{n}: {there} there, {here} here" for n, (there, here) in pairs.items() if there != here and n not in skipped
    ]


def same_files(settings: Record, other: Record) -> dict[str, str]:
    """The other evaluation's label of each file: the same; else one that ends alike, as labels have as much of a path
    as tells files from those beside them, and has the same content or is the only one of that name in both."""
    here, there = (_contents(each) for each in (settings, other))
    names_here, names_there = (Counter(map(file_name, each)) for each in (here, there))
    same = {}
    for label, content in here.items():
        name = file_name(label)
        alike = [one for one in there if file_name(one) == name]
        equal = [one for one in alike if content is not None and there[one] == content]
        if label in there:
            same[label] = label
        elif equal or (names_here[name] == names_there[name] == 1):
            same[label] = (equal or alike)[0]
    return same


def _contents(settings: Record) -> Mapping[str, str | None]:
    """Of each file by its label."""
    found = settings.get("data")
    return found if isinstance(found, Mapping) else dict.fromkeys(settings.get("files", ()))


def compare(
    rows: Sequence[Record], others: Sequence[Record], name: str, files_there: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Differences of rows that are the same in both (file, index and instruction), this evaluation less the other.

    Args:
        rows, others: records of the two.
        name: of the other.
        files_there: what the other calls the files of this one, see `same_files`; None: the same.

    Returns:
        "against" the name, "unmatched" rows of this one, and "files": by file "rows" matched, and by measure (the axes,
        "mean", "psnr", "present" share of a row's objects, those of own rewards) {"n", "mean", "sem"}; measures that no
        row has in both are left out.

    Raises:
        ValueError: when no rows are the same, or the images made of them differ in size.
    """
    known = {identity(row): row for row in others if "error" not in row}
    pairs = []
    for row in rows:
        place = identity(row if files_there is None else {**row, "file": files_there.get(row["file"])})
        if "error" not in row and place in known:
            pairs.append((row, known[place]))
    if not pairs:
        raise ValueError(f"no rows of {name} are the same as here (file, index and instruction)")
    for row, other in pairs:
        if row["size"] != other["size"]:
            here, there = ("x".join(map(str, each["size"])) for each in (row, other))
            raise ValueError(
                f"{row['file']} {row['index']} is {here} pixels here and {there} in {name}; evaluate both with one "
                "--target-side"
            )
    files: dict[str, Any] = {}
    for file in dict.fromkeys(row["file"] for row, _ in pairs):
        own = [pair for pair in pairs if pair[0]["file"] == file]
        measures = (*PAIRED, *own_measures([row for row, _ in own]))
        values = {measure: _less(*zip(*(_both(pair, measure) for pair in own), strict=True)) for measure in measures}
        found = {measure: statistic(differences) for measure, differences in values.items()}
        files[file] = {"rows": len(own), **{measure: one for measure, one in found.items() if one["n"]}}
    return {"against": name, "unmatched": len(rows) - len(pairs), "files": files}


PAIRED = (*MEASURES, "psnr", "present")


def _both(pair: tuple[Record, Record], measure: str) -> tuple[float | None, float | None]:
    return _value(pair[0], measure), _value(pair[1], measure)


def identity(row: Record) -> tuple[Any, ...]:
    """Of a row in an evaluation."""
    return row.get("file"), row.get("index"), row.get("instruction")


def file_name(label: str) -> str:
    """What stays the same of a file's label whatever it is evaluated with."""
    return PurePosixPath(label).name


def _value(row: Record, measure: str) -> float | None:
    if measure == "present":
        return _share(row.get("objects", ()))
    if ":" in measure:
        return own_scores(row).get(measure)
    return row.get("psnr") if measure == "psnr" else _score(row, measure)


def comparison_table(found: Mapping[str, Any]) -> str:
    """Differences as text."""
    own = dict.fromkeys(name for one in found["files"].values() for name in one if ":" in name)
    names = [name for name in (*PAIRED, *own) if any(name in one for one in found["files"].values())]
    titles = ["PSNR" if name == "psnr" else name.rpartition(":")[2] for name in names]
    grid = [[f"less {found['against']}", "rows", *titles]]
    for file, one in found["files"].items():
        grid.append([file, str(one["rows"]), *(_difference(one.get(name)) for name in names)])
    more = f"{found['unmatched']} rows are in this evaluation alone" if found["unmatched"] else ""
    text = "differences row by row, mean ± standard error; present: of the share of a row's objects"
    unlike = [f"settings that differ: {'; '.join(found['settings'])}"] if found.get("settings") else []
    return "\n".join([*_aligned(grid), text, *unlike, *([more] if more else [])])


def _difference(one: Record | None) -> str:
    if one is None:
        return ""
    return f"{one['mean']:+.2f}" + ("" if one["sem"] is None else f" ±{one['sem']:.2f}")
