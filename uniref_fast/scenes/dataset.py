"""Writing of a synthetic dataset: atomic, resumable, with the same bytes for any number of processes.

    OUT/train.jsonl, heldout_objects.jsonl, heldout_combinations.jsonl    rows
    OUT/images/SPLIT/000000_0.png, _1.png, ..., _out.png                   references and target of a sample
    OUT/artworks/NAME.png, OFL.txt, NOTICE.md                              artworks of the objects that occur, RGBA
    OUT/README.md, made.json                                               dataset card; arguments, counts, versions

Everything is first written into the folder `.OUT.making` beside OUT, which is renamed when it is complete. Samples are
generated in parts. A part is listed under `parts/` after its images are written, so that a later run with the same
arguments continues with the first part that is missing.
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

from uniref_fast import __version__
from uniref_fast.data.images import ImageSource
from uniref_fast.files import created_folders, write_whole
from uniref_fast.progress import running
from uniref_fast.scenes.artworks import EMOJI_FOLDER
from uniref_fast.scenes.card import dataset_card, licence_notice
from uniref_fast.scenes.config import MakeConfig
from uniref_fast.scenes.render import SyntheticSample
from uniref_fast.scenes.scene import artwork_path
from uniref_fast.scenes.splits import SPLIT_RULE, SPLITS

__all__ = ["DATASET_FILES", "GenerationSummary", "writable_file", "write_dataset"]

COMMAND = "uniref-fast data make"  # `made_by` in made.json, by which a generated folder is recognised
FORMAT = 1
PART = 32  # samples of a part
DATASET_FILES = {"README.md", "made.json", "images", "artworks", *(f"{split}.jsonl" for split in SPLITS)}
Generator = Callable[[str, int, MakeConfig], SyntheticSample]


@dataclass
class GenerationSummary:
    """Result of writing a dataset.

    Attributes:
        counts: Number of samples by split and (task, number of references).
        artworks: Names of the objects that occur.
        bytes: Size of the dataset in bytes.
        resumed: Number of samples that an interrupted run had already written.
    """

    counts: dict[str, Counter[tuple[str, int]]] = field(default_factory=dict)
    artworks: set[str] = field(default_factory=set)
    bytes: int = 0
    resumed: int = 0


def write_dataset(
    out: Path, config: MakeConfig, counts: Mapping[str, int], workers: int, force: bool, generate: Generator
) -> GenerationSummary:
    """Write the dataset into the folder `out`.

    Args:
        out: Folder of the dataset; new or empty, unless `force` is given.
        config: Configuration of the samples.
        counts: Number of samples by split.
        workers: Number of processes.
        force: Replace `out` if it is a folder that this function wrote.
        generate: Function (split, index, config) that generates a sample, called in any process.

    Raises:
        FileExistsError: `out` is not empty and may not be replaced, or another run is writing it.
        OSError: A file cannot be written, for example because the disk is full.
        RuntimeError: A process died. As after any error, the next run continues with the parts that are complete.
    """
    out = out.resolve()
    partial, old = out.with_name(f".{out.name}.making"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)  # an earlier run was stopped between its last two steps
    _check_replaceable(out, force)
    arguments = {
        "size": config.size,
        "seed": config.seed,
        "references": list(config.references),
        "pictures": config.pictures,
        "tasks": config.tasks and list(config.tasks),
        "artworks": config.artworks.source,
        **{split: counts[split] for split in SPLITS},
    }
    with _creating_parent(out), _locked(out, partial, arguments, config) as lock:
        summary = _write_parts(partial, config, counts, workers, generate, lock)
        _join_parts(partial, config, counts, summary, arguments)
        os.sync()  # the images must be on the disk before the folder gets its name
        if old.exists():
            shutil.rmtree(old)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    return summary


def writable_file(path: Path, suffix: str) -> None:
    """Check before the work that a file can be written after it.

    Raises:
        ValueError: The name does not end in `suffix`, or the file cannot be written there.
    """
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: the file name must end in {suffix}")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{path} cannot be written: it is a folder, or {nearest} is not a writable folder")


# --- the folder -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _creating(out: Path) -> Iterator[None]:
    """Add the name of the dataset's folder and advice to an error of the file system."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"the folder cannot be created ({error.strerror}); name another", str(out)
        ) from error


@contextlib.contextmanager
def _creating_parent(out: Path) -> Iterator[None]:
    """Create the parent of the dataset's folder; remove what was created if the run ends before any part exists."""
    with contextlib.ExitStack() as stack:
        with _creating(out):
            stack.enter_context(created_folders(out.parent))
        yield


def _check_replaceable(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    entries = {path.name for path in out.iterdir()}
    if not entries:
        return
    try:
        generated = json.loads((out / "made.json").read_text())["made_by"] == COMMAND
    except (OSError, ValueError, KeyError, TypeError):
        generated = False
    if not generated:
        raise FileExistsError(f"{out} is not empty and was not written by `{COMMAND}`; name another folder")
    if not force:
        raise FileExistsError(f"{out} exists already; give --force to replace it, or name another folder")
    if others := entries - DATASET_FILES:
        raise FileExistsError(
            f"{out} has files that `{COMMAND}` did not write ({', '.join(sorted(others)[:5])}); move them to another "
            "folder before you replace it"
        )


@contextlib.contextmanager
def _locked(out: Path, partial: Path, arguments: dict[str, Any], config: MakeConfig) -> Iterator[int]:
    """Reserve the partial folder for this run; empty it if an earlier run had other arguments."""
    wanted = {**_versions(config), "arguments": arguments}
    lock_path = partial.with_name(f"{partial.name}.lock")
    with _creating(out):
        lock = os.open(lock_path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another run is writing {partial}; wait for it, or name another folder") from None
        recorded = partial / "arguments.json"
        if partial.exists():
            try:
                same = json.loads(recorded.read_text()) == wanted
            except (OSError, ValueError):
                same = False
            if not same:
                shutil.rmtree(partial)
        if not partial.exists():
            partial.mkdir()
            write_whole(recorded, lambda file: file.write(json.dumps(wanted).encode()))
        try:
            yield lock
        except BaseException:
            parts = partial / "parts"
            if partial.exists() and not (parts.exists() and any(parts.glob("*.jsonl"))):  # nothing to continue with
                shutil.rmtree(partial, ignore_errors=True)
                lock_path.unlink(missing_ok=True)
            raise
        lock_path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _versions(config: MakeConfig) -> dict[str, Any]:
    return {
        "made_by": COMMAND,
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


def _write_parts(
    partial: Path, config: MakeConfig, counts: Mapping[str, int], workers: int, generate: Generator, lock: int
) -> GenerationSummary:
    for split in SPLITS:
        (partial / "images" / split).mkdir(parents=True, exist_ok=True)
    (partial / "parts").mkdir(exist_ok=True)
    parts = _parts(counts)
    missing = [part for part in parts if not _complete(partial, part)]
    summary = GenerationSummary(resumed=sum(part.stop - part.start for part in parts if part not in missing))
    jobs = [(partial, part, config, generate) for part in missing]
    finished_parts = _in_processes(jobs, min(workers, len(jobs)), lock)
    next(finished_parts)
    with running("generating", sum(counts.values()), "sample") as bar:
        bar.update(summary.resumed)
        for finished in finished_parts:
            bar.update(finished)
    return summary


def _in_processes(jobs: list[Any], workers: int, lock: int) -> Iterator[int]:
    """Yield 0 once the processes run, so that the caller starts its threads after the forks; then sizes of parts."""
    if workers <= 1:
        yield 0
        yield from map(_write_part, jobs)
        return
    # Forked: the processes only use NumPy and Pillow, and need not import PyTorch again.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_process, (os.getpid(), lock))
    try:
        # Ctrl-C in a handler of the fork itself would be ignored; it is delivered when the processes run.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            sizes = pool.map(_write_part, jobs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield 0
        yield from sizes
    except BrokenProcessPool:
        raise RuntimeError(
            "a process died, perhaps for lack of memory; run the same command again to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process(parent: int, lock: int) -> None:
    os.close(lock)  # a process that outlives its parent must not hold the lock
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops everything

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_part(job: tuple[Path, _Part, MakeConfig, Generator]) -> int:
    """Write the images of a part, then its listing; return the number of samples."""
    partial, part, config, generate = job
    lines = []
    for index in range(part.start, part.stop):
        sample = generate(part.split, index, config)
        stem = f"images/{part.split}/{index:06d}_"
        names = [f"{stem}{i}.png" for i in range(len(sample.references))]
        for name, image in zip([*names, f"{stem}out.png"], [*sample.references, sample.target], strict=True):
            png = io.BytesIO()  # one write is much faster than Pillow's many on network and overlay file systems
            image.save(png, "PNG", compress_level=1)
            (partial / name).write_bytes(png.getbuffer())
        row = {
            "input_images": names,
            "output_image": f"{stem}out.png",
            "instruction": sample.instruction,
            "task_type": sample.task_type,
            "scene": sample.scene,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(part.listing(partial), lambda file: file.write("".join(lines).encode()))
    return part.stop - part.start


def _complete(partial: Path, part: _Part) -> bool:
    """Return True if an earlier run wrote a part: it is listed, and its images can be decoded."""
    try:
        rows = [json.loads(line) for line in part.listing(partial).read_text(encoding="utf-8").splitlines()]
        for row in rows:
            for name in (*row["input_images"], row["output_image"]):
                ImageSource(name, partial / name).load()
    except (OSError, ValueError, KeyError):
        return False
    return len(rows) == part.stop - part.start


def _join_parts(
    partial: Path, config: MakeConfig, counts: Mapping[str, int], summary: GenerationSummary, arguments: dict[str, Any]
) -> None:
    """Join the parts, add the artworks, the dataset card and made.json, and remove the temporary files."""
    for split in SPLITS:
        summary.counts[split] = Counter()
        parts = [part for part in _parts(counts) if part.split == split]
        if not parts:
            (partial / "images" / split).rmdir()
            continue
        with (partial / f"{split}.jsonl").open("w", encoding="utf-8") as whole:
            for part in parts:
                text = part.listing(partial).read_text(encoding="utf-8")
                whole.write(text)
                for line in text.splitlines():
                    row = json.loads(line)
                    summary.counts[split][row["task_type"], len(row["input_images"])] += 1
                    images = [row["scene"], *row["scene"]["references"]]
                    summary.artworks.update(placed["name"] for image in images for placed in image["objects"])
    _write_artworks(partial, config, summary)
    facts = {
        **_versions(config),
        "arguments": arguments,
        "counts": {
            split: {
                "rows": total.total(),
                "by_task": _sums(total, 0),
                "by_references": _sums(total, 1),
            }
            for split, total in summary.counts.items()
        },
        "artworks": {"available": len(config.artworks.names), "used": len(summary.artworks)},
        "heldout_objects": list(config.objects("heldout_objects")),
        "split_rule": SPLIT_RULE,
    }
    write_whole(partial / "README.md", lambda file: file.write(dataset_card(facts).encode()))
    write_whole(partial / "made.json", lambda file: file.write((json.dumps(facts, indent=2) + "\n").encode()))
    shutil.rmtree(partial / "parts")
    (partial / "arguments.json").unlink()
    summary.bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def _sums(total: Counter[tuple[str, int]], part: int) -> dict[str, int]:
    values = sorted({key[part] for key in total}, key=str)
    return {str(value): sum(n for key, n in total.items() if key[part] == value) for value in values}


def _write_artworks(partial: Path, config: MakeConfig, summary: GenerationSummary) -> None:
    folder = partial / "artworks"
    folder.mkdir(exist_ok=True)
    for name in sorted(summary.artworks):
        config.artworks.image(name).save(partial / artwork_path(name))
    shutil.copyfile(EMOJI_FOLDER / "OFL.txt", folder / "OFL.txt")
    (folder / "NOTICE.md").write_text(licence_notice(config.artworks.font), encoding="utf-8")
