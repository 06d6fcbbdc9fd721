"""Training data for multi-reference editing, with exact answers: `uniref-fast data make OUT`.

    config = MakeConfig(artworks("auto"), size=128, seed=0)
    sample("train", 0, config)  # references, target, instruction, task_type, scene

Sample i of a split follows from the configuration alone, not from how many are made or by how many processes. The same
arguments, font and Pillow give the same bytes. What may be asked is in `tasks.py`, what is held out in `plans.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from uniref_fast.files import write_whole
from uniref_fast.scenes.artworks import SOURCES, artworks
from uniref_fast.scenes.dataset import Made, make, writable_file
from uniref_fast.scenes.render import MadeSample, draw_plan
from uniref_fast.scenes.specs import PICTURES, SPLITS, MakeConfig
from uniref_fast.scenes.tasks import NAMES, plan_sample, tasks_of
from uniref_fast.sheets import contact_sheet

__all__ = ["MadeSample", "MakeConfig", "add_arguments", "artworks", "preview", "run", "sample"]

PREVIEWED = 12


def sample(split: str, index: int, config: MakeConfig) -> MadeSample:
    """Sample `index` of a split ("train", "heldout_objects", "heldout_combinations"), in memory.

    Raises ValueError for an unknown split or a negative index.
    """
    return draw_plan(plan_sample(split, index, config), config.artworks)


def preview(config: MakeConfig, count: int = PREVIEWED) -> Image.Image:
    """A sheet of samples of train, by number of pictures: the first of each task, then whatever comes first."""
    plans = [plan_sample("train", index, config) for index in range(20 * count)]
    first: dict[tuple[int, str], int] = {}
    for index, plan in enumerate(plans):
        first.setdefault((len(plan.pictures), plan.task_type), index)
    chosen = list(first.values())[:count]
    chosen += [index for index in range(len(plans)) if index not in chosen][: count - len(chosen)]
    sheets = []
    for plan in sorted((plans[index] for index in chosen), key=lambda plan: (len(plan.pictures), plan.task_type)):
        made = draw_plan(plan, config.artworks)
        row = [(f"picture {i + 1}", image) for i, image in enumerate(made.references)]
        sheets.append(contact_sheet([[*row, (made.task_type, made.target)]], heading=made.instruction, cell=160))
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), sheets[0].getpixel((0, 0)))
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `uniref-fast data make`."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must be new or empty")
    parser.add_argument("--train", type=_count, default=2000, metavar="N", help="training samples (%(default)s)")
    parser.add_argument("--heldout", type=_count, default=200, metavar="N", help="of each held-out split (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="longer side of the targets in pixels (%(default)s)")
    parser.add_argument("--seed", type=_count, default=0, help="of everything, the splits included (%(default)s)")
    parser.add_argument(
        "--artworks", choices=SOURCES, default="auto",
        help="objects: all of an installed Noto Color Emoji font, the 16 shipped ones, or the font where there is one"
        " (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (%(default)s)")
    parser.add_argument(
        "--references", type=_references, default="0,1,2,3,4,5,6", metavar="K,K,...",
        help="numbers of pictures that samples have (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", choices=PICTURES, default="any",
        help="of many sizes and arrangements, or as simple as a very small model needs them (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", type=lambda text: tuple(text.split(",")), metavar="TASK,TASK,...",
        help=f"what samples may ask, twice as often what stands twice: {', '.join(NAMES)}"
        " (all that their numbers of pictures allow)",
    )  # fmt: skip
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help=f"also draw {PREVIEWED} samples on a sheet")
    parser.add_argument("--force", action="store_true", help="replace a folder that this command made")


def run(args: argparse.Namespace) -> int:
    """Make the data; returns the exit status. Raises ValueError, OSError or RuntimeError that say what to do."""
    if args.train + args.heldout == 0:
        raise ValueError("--train and --heldout are both 0: there is nothing to make")
    if args.preview is not None:
        writable_file(args.preview, ".png")
    config = MakeConfig(artworks(args.artworks), args.size, args.seed, args.references, args.pictures, args.tasks)
    for number in config.references:
        tasks_of(number, config)  # or it says what is wrong
    counts = {split: args.train if split == "train" else args.heldout for split in SPLITS}
    made = make(args.out, config, counts, args.workers, args.force, draw=sample)
    if made.resumed:
        print(f"{made.resumed} samples were there already from an interrupted run", file=sys.stderr)
    if args.preview is not None:
        write_whole(args.preview, lambda file: preview(config).save(file, "PNG"))
        print(f"preview    {args.preview}")
    print(_summary(args.out, made, config))
    return 0


def _summary(out: Path, made: Made, config: MakeConfig) -> str:
    """Counts by task and by number of pictures, a column for each split."""
    source = config.artworks.source + (f", {config.artworks.font['version']}" if config.artworks.font else "")
    lines = [
        f"data       {out}: {made.bytes / 1e6:.1f} MB",
        f"objects    {len(config.objects('train'))} in train, {len(config.objects('heldout_objects'))} held out"
        f" (artworks: {source})",
    ]
    splits = [split for split in SPLITS if made.counts[split]]
    width = max(map(len, splits)) + 2
    for title, part in (("task", 0), ("pictures", 1)):
        totals = {split: Counter[object]() for split in splits}
        for split in splits:
            for key, number in made.counts[split].items():
                totals[split][key[part]] += number
        lines += ["", f"{title:<20}" + "".join(f"{split:>{width}}" for split in splits)]
        for value in sorted({value for total in totals.values() for value in total}, key=str):
            lines.append(f"{value!s:<20}" + "".join(f"{totals[split][value]:>{width}}" for split in splits))
        lines.append(f"{'all':<20}" + "".join(f"{totals[split].total():>{width}}" for split in splits))
    return "\n".join(lines)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number of at least 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, got {text!r}")
    return int(text)


def _references(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip() in ("0", "1", "2", "3", "4", "5", "6") for part in parts):
        raise argparse.ArgumentTypeError(f"numbers from 0 to 6 with commas between, for example 0,1,3; got {text!r}")
    return tuple(sorted({int(part) for part in parts}))
