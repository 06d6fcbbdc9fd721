"""Synthetic training data for multi-reference editing, with exact targets: `uniref-fast data make OUT`.

    config = MakeConfig(artworks("auto"), size=128, seed=0)
    sample("train", 0, config)  # references, target, instruction, task_type, scene

The configuration alone determines sample i of a split; the number of samples and of processes does not matter. The same
arguments, font and Pillow give the same bytes. The tasks are in `tasks.py`, the rule of the splits in `splits.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from uniref_fast.data.readers import local_path
from uniref_fast.files import write_whole
from uniref_fast.scenes.artworks import SOURCES, artworks
from uniref_fast.scenes.config import PICTURES, MakeConfig
from uniref_fast.scenes.dataset import GenerationSummary, writable_file, write_dataset
from uniref_fast.scenes.render import SyntheticSample, render
from uniref_fast.scenes.splits import SPLITS
from uniref_fast.scenes.tasks import NAMES, scene_spec, tasks_of
from uniref_fast.sheets import contact_sheet

__all__ = ["MakeConfig", "SyntheticSample", "add_arguments", "artworks", "preview", "run", "sample"]

PREVIEWED = 12  # samples of a preview


def sample(split: str, index: int, config: MakeConfig) -> SyntheticSample:
    """Generate sample `index` of a split ("train", "heldout_objects" or "heldout_combinations") in memory.

    Raises:
        ValueError: The split is unknown, or the index is negative.
    """
    return render(scene_spec(split, index, config), config.artworks)


def preview(config: MakeConfig, count: int = PREVIEWED) -> Image.Image:
    """Return a sheet of training samples sorted by number of references: the first of each task, then others."""
    specs = [scene_spec("train", index, config) for index in range(20 * count)]
    kinds = [(len(spec.scene.references), spec.task_type) for spec in specs]
    first: dict[tuple[int, str], int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
    chosen = list(first.values())[:count]
    chosen += [index for index in range(len(specs)) if index not in chosen][: count - len(chosen)]
    sheets = []
    for index in sorted(chosen, key=lambda index: kinds[index]):
        drawn = render(specs[index], config.artworks)
        images = [(f"picture {i + 1}", image) for i, image in enumerate(drawn.references)]
        sheets.append(contact_sheet([[*images, (drawn.task_type, drawn.target)]], heading=drawn.instruction, cell=160))
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), sheets[0].getpixel((0, 0)))
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `uniref-fast data make`."""
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="Folder to write; it must be new or empty.")
    add("--train", type=_count, default=2000, metavar="N", help="Number of training samples. (default: %(default)s)")
    add("--heldout", type=_count, default=200, metavar="N",
        help="Number of samples in each held-out split. (default: %(default)s)")  # fmt: skip
    add("--size", type=int, default=128, metavar="SIDE",
        help="Longer side of the targets in pixels, a multiple of 16, at least 64. (default: %(default)s)")  # fmt: skip
    add("--references", type=_references, default="0,1,2,3,4,5,6", metavar="K,K,...",
        help="Numbers of references that samples may have, each from 0 to 6. (default: %(default)s)")  # fmt: skip
    add("--tasks", type=lambda text: tuple(text.split(",")), metavar="TASK,TASK,...",
        help=f"Tasks of the samples: {', '.join(NAMES)}. A task that is listed twice is drawn twice as often. "
        "(default: all tasks that the number of references allows)")  # fmt: skip
    add("--pictures", choices=PICTURES, default="any",
        help="Kind of references: any has many sizes and arrangements; simple has what a very small model can learn. "
        "(default: %(default)s)")  # fmt: skip
    add("--artworks", choices=SOURCES, default="auto",
        help="Objects of the scenes: font takes the emoji of an installed Noto Color Emoji font, shipped the 16 emoji "
        "of this package, auto the font if it is installed. (default: %(default)s)")  # fmt: skip
    add("--seed", type=_count, default=0, metavar="N",
        help="Seed of the samples and of the splits. (default: %(default)s)")  # fmt: skip
    add("--workers", type=_positive, default=2, metavar="N", help="Number of processes. (default: %(default)s)")
    add("--preview", type=Path, metavar="FILE.png", help=f"Contact sheet to write with {PREVIEWED} samples.")
    add("--force", action="store_true", help="Replace a folder that this command wrote.")


def run(args: argparse.Namespace) -> int:
    """Write the dataset; return the exit status.

    Raises:
        ValueError, OSError, RuntimeError: The message says what to do.
    """
    if args.train + args.heldout == 0:
        raise ValueError("--train and --heldout are both 0: no samples would be written; give a number above 0")
    if args.preview is not None:
        writable_file(args.preview, ".png")
    config = MakeConfig(artworks(args.artworks), args.size, args.seed, args.references, args.pictures, args.tasks)
    for number in config.references:
        tasks_of(number, config)  # raises if a number of references has no task
    counts = {split: args.train if split == "train" else args.heldout for split in SPLITS}
    out = local_path(args.out)
    summary = write_dataset(out, config, counts, args.workers, args.force, generate=sample)
    if summary.resumed:
        print(f"{summary.resumed} samples had been written by an interrupted run", file=sys.stderr)
    if args.preview is not None:
        write_whole(args.preview, lambda file: preview(config).save(file, "PNG"))
        print(f"preview    {args.preview}")
    print(_summary(out, summary, config))
    return 0


def _summary(out: Path, summary: GenerationSummary, config: MakeConfig) -> str:
    """Return the counts by task and by number of references as a text with a column for each split."""
    source = config.artworks.source + (f", {config.artworks.font['version']}" if config.artworks.font else "")
    lines = [
        f"data       {out}: {summary.bytes / 1e6:.1f} MB",
        f"objects    {len(config.objects('train'))} in train, {len(config.objects('heldout_objects'))} held out"
        f" (artworks: {source})",
    ]
    splits = [split for split in SPLITS if summary.counts[split]]
    width = max(map(len, splits)) + 2
    for title, part in (("task", 0), ("references", 1)):
        totals = {split: Counter[object]() for split in splits}
        for split in splits:
            for key, number in summary.counts[split].items():
                totals[split][key[part]] += number
        lines += ["", f"{title:<20}" + "".join(f"{split:>{width}}" for split in splits)]
        for value in sorted({value for total in totals.values() for value in total}, key=str):
            lines.append(f"{value!s:<20}" + "".join(f"{totals[split][value]:>{width}}" for split in splits))
        lines.append(f"{'all':<20}" + "".join(f"{totals[split].total():>{width}}" for split in splits))
    return "\n".join(lines)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _references(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip() in ("0", "1", "2", "3", "4", "5", "6") for part in parts):
        raise argparse.ArgumentTypeError(
            f"must be numbers from 0 to 6 with commas between, for example 0,1,3; got {text!r}"
        )
    return tuple(sorted({int(part) for part in parts}))
