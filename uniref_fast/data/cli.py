"""Commands `uniref-fast data check` and `uniref-fast data convert`: validate a dataset, or rewrite it as one file."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniref_fast.data.notes import Note, Notes, mask_notes, row_notes
from uniref_fast.progress import running, tracked

if TYPE_CHECKING:
    from uniref_fast.data.dataset import Dataset

__all__ = ["add_data_commands"]

Size = tuple[int, int]  # (width, height) in pixels

COLUMNS_HELP = (
    "Roles of columns whose names are not known, as ROLE=COLUMN pairs with commas between them, such as "
    "instruction=prompt,references=refs. The roles are instruction, references, target, mask, task_type, key, language "
    "and ignore; references and ignore may have several columns."
)
FOLDER_HELP = "Folder that relative image paths of the rows refer to. (default: the folder of the row's file)"
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2), (3, 1), (1, 3))
PERCENTILES = (5, 25, 50, 75, 95, 100)


def add_data_commands(commands: Any) -> Any:
    """Add `data` with its commands to the commands of `uniref-fast`; return its group, for further commands."""
    summary = "Check, convert or generate training data."
    data = commands.add_parser("data", help=summary, description=summary)
    group = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND", title="Commands")

    summary = "Count and measure the rows of a dataset and list the broken ones."
    check = group.add_parser(
        "check",
        help=summary,
        description=f"{summary} The exit status is 1 if there are any. "
        "Notes list what can be read but will probably disappoint; they do not change the exit status.",
    )
    check.add_argument("paths", nargs="+", metavar="PATH", help="File or folder of dataset rows.")
    check.add_argument("--columns", type=_pairs, default=(), metavar="PAIRS", help=COLUMNS_HELP)
    check.add_argument("--image-folder", metavar="DIR", help=FOLDER_HELP)
    check.add_argument(
        "--targets", choices=("required", "optional"), default="required",
        help="Rows without a target are valid if targets are optional. (default: %(default)s)",
    )  # fmt: skip
    check.add_argument(
        "--decode",
        action="store_true",
        help="Decode every image instead of reading only its header. Masks are decoded in any case.",
    )
    check.add_argument(
        "--show",
        type=int,
        default=20,
        metavar="N",
        help="Number of broken rows, of files, and of notes of each kind to list. (default: %(default)s)",
    )
    check.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")
    check.set_defaults(run=_check)

    summary = "Write any dataset that can be read, or folders of images, as rows of one .jsonl file."
    convert = group.add_parser("convert", help=summary, description=summary)
    convert.add_argument(
        "paths", nargs="*", metavar="PATH", help="File or folder of dataset rows; leave it out with --target-folder."
    )
    convert.add_argument("--out", type=Path, required=True, metavar="FILE", help="The .jsonl file to write.")
    convert.add_argument(
        "--target-folder", type=Path, metavar="DIR", help="Folder of target images with caption files beside them."
    )
    convert.add_argument(
        "--control-folder", type=Path, action="append", default=[], metavar="DIR",
        help="Folder of references that have the names of the targets; repeat the flag for more references, in order.",
    )  # fmt: skip
    convert.add_argument(
        "--mask-folder", type=Path, metavar="DIR",
        help="Folder of masks that have the names of the targets: white is trained, black is not.",
    )  # fmt: skip
    convert.add_argument(
        "--caption-ending", default=".txt", metavar="ENDING", help="Ending of the caption files. (default: %(default)s)"
    )
    convert.add_argument("--columns", type=_pairs, default=(), metavar="PAIRS", help=COLUMNS_HELP)
    convert.add_argument("--image-folder", metavar="DIR", help=FOLDER_HELP)
    convert.add_argument(
        "--show", type=int, default=20, metavar="N", help="Number of broken rows to list. (default: %(default)s)"
    )
    convert.set_defaults(run=_convert)
    return group


# ---- check ----


@dataclass
class _Found:
    """Counts and sizes of the rows; sizes are those of the images in upright orientation."""

    counts: Counter[int] = field(default_factory=Counter)  # rows by number of references
    columns: Counter[tuple[str, str | None]] = field(default_factory=Counter)  # rows by (column, role)
    task_types: Counter[str | None] = field(default_factory=Counter)
    targets: list[Size] = field(default_factory=list)
    references: list[Size] = field(default_factory=list)
    joint_areas: list[int] = field(default_factory=list)  # pixels of all references of a row that has any
    masks: list[float] = field(default_factory=list)  # share of its target that each mask covers
    broken: list[dict[str, str]] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


def _check(args: argparse.Namespace) -> int:
    from uniref_fast.data.dataset import BrokenFileError, Dataset
    from uniref_fast.data.readers import escape_controls

    if args.show < 0:
        raise ValueError(f"--show must not be negative, got {args.show}")
    try:
        with running("reading the files"):
            dataset = Dataset(args.paths, args.image_folder, args.targets, args.columns)
    except BrokenFileError as error:  # status 1: the data is wrong, not the command
        print(f"uniref-fast data check: error: broken file {error}", file=sys.stderr)
        return 1
    ignored = {pair.partition("=")[2] for pair in args.columns if pair.startswith("ignore=")}
    found = _measure(dataset, args.decode, ignored)
    if args.json:
        print(json.dumps(_facts(dataset, found, args.show)))
    else:
        print("\n".join(map(escape_controls, _report(dataset, found, args.show))))
    return 1 if found.broken else 0


def _convert(args: argparse.Namespace) -> int:
    from uniref_fast.data.convert import convert
    from uniref_fast.data.dataset import Dataset
    from uniref_fast.data.pairs import Pairs
    from uniref_fast.data.readers import BrokenFileError, escape_controls, local_path

    if (args.target_folder is None) == (not args.paths):
        raise ValueError(
            "give either paths, or --target-folder and --control-folder; paths and --target-folder exclude each other"
        )
    for flag, given in (("--control-folder", args.control_folder), ("--mask-folder", args.mask_folder)):
        if given and args.target_folder is None:
            raise ValueError(f"{flag} needs --target-folder, the folder of the target images")
    if args.out.suffix.lower() != ".jsonl":
        raise ValueError(f"--out must be a .jsonl file, got {args.out}")
    out = local_path(args.out)
    paths: list[Any] = list(args.paths)
    if args.target_folder is not None:
        ending = "." + args.caption_ending.lower().lstrip(".")
        controls = tuple(map(local_path, args.control_folder))
        masks = None if args.mask_folder is None else local_path(args.mask_folder)
        paths = [Pairs(local_path(args.target_folder), controls, ending, masks=masks)]
    try:
        with running("reading the files"):
            dataset = Dataset(paths, args.image_folder, "optional", args.columns)
    except BrokenFileError as error:
        print(f"uniref-fast data convert: error: broken file {error}", file=sys.stderr)
        return 1
    with running(f"writing {out}"):
        written, broken = convert(dataset, out)
    for row in broken[: args.show]:
        print(f"left out: {row}", file=sys.stderr)
    for name, reason in dataset.left_out[: args.show]:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    shown = escape_controls(out)
    if broken and not written:
        print(
            f"uniref-fast data convert: error: all {len(broken):,} rows are broken; {shown} was not written",
            file=sys.stderr,
        )
        return 1
    print(f"{shown}: {written:,} row(s); {len(broken):,} broken row(s) left out")
    return 1 if broken else 0


def _measure(dataset: Dataset, decode: bool, ignored: Collection[str]) -> _Found:
    """Inspect all rows; keys in `ignored` are left out on purpose, and so need no note."""
    from uniref_fast.data.dataset import RowError
    from uniref_fast.data.prefetch import prefetch

    found = _Found(columns=Counter({(name, None): rows for name, rows in dataset.unread_columns.items()}))
    found.notes.add(Note("empty_file", name, "has no rows") for name in dataset.empty_files)
    for name, rows in dataset.unread_columns.items():
        found.notes.add_keys({name} - {*ignored}, rows)
    workers = min(os.cpu_count() or 1, 8)
    inspected = prefetch(functools.partial(_inspect, dataset, decode), range(len(dataset)), workers, ahead=4 * workers)
    for index, outcome in tracked(inspected, "checking", "row", len(dataset)):
        roles: dict[str, str | None] = {}
        with contextlib.suppress(ValueError):  # a row that cannot be read at all has no roles
            roles = dataset.roles(index)
        found.columns.update(roles.items())
        if isinstance(outcome, RowError):
            found.broken.append({"where": outcome.where, "reason": outcome.reason})
            continue
        if isinstance(outcome, Exception):
            raise outcome
        target, references, covered, task_type, notes = outcome
        found.notes.add(notes)
        found.notes.add_keys(name for name, role in roles.items() if role is None and name not in ignored)
        found.counts[len(references)] += 1
        found.task_types[task_type] += 1
        found.references += references
        if covered is not None:
            found.masks.append(covered)
        if target is not None:
            found.targets.append(target)
        if references:
            found.joint_areas.append(sum(map(math.prod, references)))
    return found


def _inspect(
    dataset: Dataset, decode: bool, index: int
) -> tuple[Size | None, list[Size], float | None, str | None, list[Note]]:
    """Return what a row holds; raise RowError if it is broken.

    Returns:
        Sizes of the target and of the references, the share of the target that its mask covers, the task type, and
        notes.
    """
    from uniref_fast.data.dataset import RowError

    row = dataset[index]
    target, references = row.sizes(decode)
    notes = row_notes(row, target, references)
    try:
        mask = row.load_mask()
    except ValueError as error:
        raise RowError(row.where, error) from error
    if mask is None:
        return target, references, None, row.task_type, notes
    notes += mask_notes(row, float(mask.max()))
    return target, references, float(mask.mean(dtype="float64")), row.task_type, notes


def _facts(dataset: Dataset, found: _Found, show: int) -> dict[str, Any]:
    import numpy as np

    def measured(sizes: Sequence[Size]) -> dict[str, Any]:
        pixels = [math.prod(size) for size in sizes]
        spread = [min(pixels), int(np.median(pixels)), max(pixels)] if pixels else [None] * 3
        return {
            "pictures": len(sizes),
            "pixels": dict(zip(("min", "median", "max"), spread, strict=True)),
            "ratios": dict(Counter(map(_ratio, sizes)).most_common()),
        }

    areas = np.percentile(found.joint_areas, PERCENTILES).astype(int).tolist() if found.joint_areas else []
    return {
        "files": list(dataset.files),
        "left_out": [{"file": name, "reason": reason} for name, reason in dataset.left_out],
        "fingerprint": dataset.fingerprint,
        "rows": len(dataset),
        "broken": len(found.broken),
        "columns": [
            {"column": name, "read_as": role, "rows": count} for (name, role), count in _by_role(found.columns)
        ],
        "references": {str(k): found.counts[k] for k in sorted(found.counts)},
        "task_types": {kind or "": count for kind, count in found.task_types.most_common()},
        "target_sizes": measured(found.targets),
        "reference_sizes": measured(found.references),
        "masks": {
            "rows": len(found.masks),
            "covered": dict(zip(("min", "median", "max"), np.percentile(found.masks, (0, 50, 100)), strict=True))
            if found.masks
            else {},
        },
        "joint_reference_area": dict(zip((f"p{p}" for p in PERCENTILES), areas, strict=False)),
        "errors": found.broken[:show],
        "notes": found.notes.facts(show),
    }


def _report(dataset: Dataset, found: _Found, show: int) -> list[str]:
    facts = _facts(dataset, found, show)
    lines = [f"rows              {len(dataset):,} in {len(dataset.files):,} file(s), {len(found.broken):,} broken"]
    if dataset.left_out:
        lines.append(f"left out          {len(dataset.left_out):,}")
        lines += [f"  {left['file']}: {left['reason']}" for left in facts["left_out"][:show]]
        if len(dataset.left_out) > show:
            lines.append(f"  and {len(dataset.left_out) - show:,} more")
    lines.append("columns")
    for column in facts["columns"]:
        lines.append(f"  {column['column']:<16}{column['read_as'] or 'not read':<16} {column['rows']:,} row(s)")
    counts = (f"{k}: {count:,}" for k, count in facts["references"].items())
    lines.append(f"by references     {', '.join(counts) or 'none'}")
    kinds = (f"{kind or '(none)'}: {count:,}" for kind, count in facts["task_types"].items())
    lines.append(f"by task type      {', '.join(kinds) or 'none'}")
    for label, key in (("targets", "target_sizes"), ("references", "reference_sizes")):
        sizes = facts[key]
        if not sizes["pictures"]:
            lines.append(f"{label:<18}none")
            continue
        spread = " / ".join(f"{value:,}" for value in sizes["pixels"].values())
        lines.append(f"{label:<18}{sizes['pictures']:,}, pixels min / median / max {spread}")
        shares = (f"{name} {count / sizes['pictures']:.0%}" for name, count in list(sizes["ratios"].items())[:6])
        lines.append(f"{'  aspect ratios':<18}{', '.join(shares)}")
    if covered := facts["masks"]["covered"]:
        spread = " / ".join(f"{value:.1%}" for value in covered.values())
        lines.append(f"masks             {len(found.masks):,}, share of the target min / median / max {spread}")
        if whole := len(dataset) - len(found.broken) - len(found.masks):
            lines.append(f"  {whole:,} row(s) without a mask train on the whole target")
    if facts["joint_reference_area"]:
        areas = (f"{name} {area:,} ({math.isqrt(area)}^2)" for name, area in facts["joint_reference_area"].items())
        lines.append(f"joint area        {', '.join(areas)}")
    if found.broken:
        lines.append("broken rows")
        lines += [f"  {error['where']}: {error['reason']}" for error in facts["errors"]]
        if len(found.broken) > show:
            lines.append(f"  and {len(found.broken) - show:,} more")
    if facts["notes"]:
        lines.append("notes             these rows can be used, but may disappoint")
    for note in facts["notes"]:
        lines.append(f"  {note['count']:,} {note['note']}")
        lines += [f"    {example['where']}: {example['note']}" for example in note["examples"]]
        if note["examples"] and len(found.notes.found[note["kind"]]) > show:
            lines.append(f"    and {len(found.notes.found[note['kind']]) - show:,} more")
    return lines


def _by_role(columns: Counter[tuple[str, str | None]]) -> list[tuple[tuple[str, str | None], int]]:
    """Return the columns by role: instruction, references, target, others, and those that are not read."""
    order = ("instruction", "references", "references, the last is the target", "target", "mask")

    def rank(item: tuple[tuple[str, str | None], int]) -> tuple[int, str, str]:
        (name, role), _ = item
        return (order.index(role) if role in order else len(order) + (role is None), role or "", name)

    return sorted(columns.items(), key=rank)


def _pairs(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _ratio(size: Size) -> str:
    """Return the nearest common aspect ratio as width:height."""
    wanted = math.log(size[0] / size[1])
    width, height = min(RATIOS, key=lambda ratio: abs(math.log(ratio[0] / ratio[1]) - wanted))
    return f"{width}:{height}"
