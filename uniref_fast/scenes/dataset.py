"""The folder that `uniref-fast data make` writes: atomic, resumable, the same bytes for any number of processes.

    OUT/train.jsonl, heldout_objects.jsonl, heldout_combinations.jsonl    rows
    OUT/images/SPLIT/000000_0.png, _1.png, ..., _out.png                   pictures and target of a sample
    OUT/artworks/NAME.png, OFL.txt, NOTICE.md                              the objects that occur, RGBA
    OUT/README.md, made.json                                               data set card; arguments, counts, versions

Everything is first written into `.OUT.making` beside it and renamed when complete. Samples are made in parts; a part is
listed under `parts/` once its images are written, and a later run with the same arguments goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from uniref_fast import __version__
from uniref_fast.data.images import ImageSource
from uniref_fast.files import write_whole
from uniref_fast.scenes import textures as scenes
from uniref_fast.scenes.card import card, notice
from uniref_fast.scenes.render import MadeSample
from uniref_fast.scenes.specs import SPLIT_RULE, SPLITS, MakeConfig

__all__ = ["Made", "make", "writable_file"]

MADE_BY = "uniref-fast data make"
FORMAT = 1
PART = 32  # samples of a part
OURS = {"README.md", "made.json", "images", "artworks", *(f"{split}.jsonl" for split in SPLITS)}
Drawer = Callable[[str, int, MakeConfig], MadeSample]


@dataclass
class Made:
    """What was made: samples by split and (task, number of pictures), bytes in all, samples an earlier run had made."""

    counts: dict[str, Counter[tuple[str, int]]] = field(default_factory=dict)
    artworks: set[str] = field(default_factory=set)
    bytes: int = 0
    resumed: int = 0


def make(out: Path, config: MakeConfig, counts: Mapping[str, int], workers: int, force: bool, draw: Drawer) -> Made:
    """Write the data set into the folder `out`.

    Args:
        counts: samples by split.
        force: replace `out` when it is a folder that this function made.
        draw: makes a sample, in any process.

    Raises:
        FileExistsError: `out` is not empty and may not be replaced, or another run is writing it.
        OSError, RuntimeError: the disk is full, a process died; what was made stays for the next run.
    """
    out = out.resolve()
    making, old = out.with_name(f".{out.name}.making"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)  # a run was stopped between its last two steps
    _check_replaceable(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = {
        "size": config.size,
        "seed": config.seed,
        "references": list(config.references),
        "pictures": config.pictures,
        "tasks": config.tasks and list(config.tasks),
        "artworks": config.artworks.source,
        **{split: counts[split] for split in SPLITS},
    }
    with _locked(making, arguments, config) as lock:
        made = _make_parts(making, config, counts, workers, draw, lock)
        _gather(making, config, counts, made, arguments)
        os.sync()  # the images too, before the folder gets its name
        if old.exists():
            shutil.rmtree(old)
        if out.exists():
            out.rename(old)
        making.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    return made


def writable_file(path: Path, suffix: str) -> None:
    """Raise ValueError before the work when a file could not be written after it."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: the name of that file ends in {suffix}")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{path} cannot be written: it is a folder, or {nearest} is no folder that can be written to")


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_replaceable(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    entries = {path.name for path in out.iterdir()}
    if not entries:
        return
    try:
        ours = json.loads((out / "made.json").read_text())["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(f"{out} is not empty and was not made by {MADE_BY}; name another folder")
    if not force:
        raise FileExistsError(f"{out} is there already; give --force to replace it, or name another folder")
    if entries - OURS:
        raise FileExistsError(
            f"{out} also has files that {MADE_BY} did not make ({', '.join(sorted(entries - OURS)[:5])}); "
            "move them away before it is replaced"
        )


@contextlib.contextmanager
def _locked(making: Path, arguments: dict[str, Any], config: MakeConfig) -> Iterator[int]:
    """The folder that is written, for this run alone; emptied when an earlier run had other arguments."""
    wanted = {**_versions(config), "arguments": arguments}
    lock_path = making.with_name(f"{making.name}.lock")
    lock = os.open(lock_path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another run is writing {making}; wait for it, or name another folder") from None
        stated = making / "arguments.json"
        if making.exists():
            try:
                same = json.loads(stated.read_text()) == wanted
            except (OSError, ValueError):
                same = False
            if not same:
                shutil.rmtree(making)
        if not making.exists():
            making.mkdir()
            write_whole(stated, lambda file: file.write(json.dumps(wanted).encode()))
        yield lock
        lock_path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _versions(config: MakeConfig) -> dict[str, Any]:
    return {
        "made_by": MADE_BY,
        "format": FORMAT,
        "uniref_fast": __version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "font": dict(config.artworks.font) if config.artworks.font else None,
    }


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    split: str
    start: int
    stop: int

    def listing(self, folder: Path) -> Path:
        return folder / "parts" / f"{self.split}-{self.start:08d}.jsonl"


def _parts(counts: Mapping[str, int]) -> list[_Part]:
    return [
        _Part(split, start, min(start + PART, counts[split]))
        for split in SPLITS
        for start in range(0, counts[split], PART)
    ]


def _make_parts(
    making: Path, config: MakeConfig, counts: Mapping[str, int], workers: int, draw: Drawer, lock: int
) -> Made:
    for split in SPLITS:
        (making / "images" / split).mkdir(parents=True, exist_ok=True)
    (making / "parts").mkdir(exist_ok=True)
    parts = _parts(counts)
    missing = [part for part in parts if not _whole(making, part)]
    made = Made(resumed=sum(part.stop - part.start for part in parts if part not in missing))
    jobs = [(making, part, config, draw) for part in missing]
    with tqdm(total=sum(counts.values()), initial=made.resumed, unit="sample", disable=None) as bar:
        for finished in _in_processes(jobs, min(workers, len(jobs)), lock):
            bar.update(finished)
    return made


def _in_processes(jobs: list[Any], workers: int, lock: int) -> Iterator[int]:
    if workers <= 1:
        yield from map(_write_part, jobs)
        return
    # Forked: the processes only use NumPy and Pillow, and need not import PyTorch again.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_process, (os.getpid(), lock))
    try:
        yield from pool.map(_write_part, jobs)
    except BrokenProcessPool:
        raise RuntimeError("a process died (out of memory?); run the same command again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process(parent: int, lock: int) -> None:
    os.close(lock)  # else a process that outlives its parent would hold the lock
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops everything

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_part(job: tuple[Path, _Part, MakeConfig, Drawer]) -> int:
    """Images of a part, then its listing; returns the number of samples."""
    making, part, config, draw = job
    lines = []
    for index in range(part.start, part.stop):
        made = draw(part.split, index, config)
        stem = f"images/{part.split}/{index:06d}_"
        names = [f"{stem}{i}.png" for i in range(len(made.references))]
        for name, image in zip([*names, f"{stem}out.png"], [*made.references, made.target], strict=True):
            png = io.BytesIO()  # and one write: much faster than Pillow's many on network and overlay file systems
            image.save(png, "PNG", compress_level=1)
            (making / name).write_bytes(png.getbuffer())
        row = {
            "input_images": names,
            "output_image": f"{stem}out.png",
            "instruction": made.instruction,
            "task_type": made.task_type,
            "scene": made.scene,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(part.listing(making), lambda file: file.write("".join(lines).encode()))
    return part.stop - part.start


def _whole(making: Path, part: _Part) -> bool:
    """Whether an earlier run made a part: it is listed, and its images can be decoded."""
    try:
        rows = [json.loads(line) for line in part.listing(making).read_text(encoding="utf-8").splitlines()]
        for row in rows:
            for name in (*row["input_images"], row["output_image"]):
                ImageSource(name, making / name).load()
    except (OSError, ValueError, KeyError):
        return False
    return len(rows) == part.stop - part.start


def _gather(making: Path, config: MakeConfig, counts: Mapping[str, int], made: Made, arguments: dict[str, Any]) -> None:
    """Join the parts, add the artworks, the card and what was made, remove what only served the making."""
    for split in SPLITS:
        made.counts[split] = Counter()
        parts = [part for part in _parts(counts) if part.split == split]
        if not parts:
            (making / "images" / split).rmdir()
            continue
        with (making / f"{split}.jsonl").open("w", encoding="utf-8") as whole:
            for part in parts:
                text = part.listing(making).read_text(encoding="utf-8")
                whole.write(text)
                for line in text.splitlines():
                    row = json.loads(line)
                    made.counts[split][row["task_type"], len(row["input_images"])] += 1
                    pictures = [row["scene"], *row["scene"]["references"]]
                    made.artworks.update(thing["name"] for picture in pictures for thing in picture["objects"])
    _write_artworks(making / "artworks", config, made)
    facts = {
        **_versions(config),
        "arguments": arguments,
        "counts": {
            split: {
                "rows": total.total(),
                "by_task": _sums(total, 0),
                "by_references": _sums(total, 1),
            }
            for split, total in made.counts.items()
        },
        "artworks": {"available": len(config.artworks.names), "used": len(made.artworks)},
        "heldout_objects": list(config.objects("heldout_objects")),
        "split_rule": SPLIT_RULE,
    }
    write_whole(making / "README.md", lambda file: file.write(card(facts).encode()))
    write_whole(making / "made.json", lambda file: file.write((json.dumps(facts, indent=2) + "\n").encode()))
    shutil.rmtree(making / "parts")
    (making / "arguments.json").unlink()
    made.bytes = sum(path.stat().st_size for path in making.rglob("*") if path.is_file())


def _sums(total: Counter[tuple[str, int]], part: int) -> dict[str, int]:
    values = sorted({key[part] for key in total}, key=str)
    return {str(value): sum(n for key, n in total.items() if key[part] == value) for value in values}


def _write_artworks(folder: Path, config: MakeConfig, made: Made) -> None:
    folder.mkdir(exist_ok=True)
    for name in sorted(made.artworks):
        config.artworks.image(name).save(folder / f"{config.artworks.slug(name)}.png")
    shutil.copyfile(scenes.EMOJI_FOLDER / "OFL.txt", folder / "OFL.txt")
    (folder / "NOTICE.md").write_text(notice(config.artworks.font), encoding="utf-8")
