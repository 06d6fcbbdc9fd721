"""Checkpoints that are complete or absent: sharded safetensors files, and a JSON file with the state of the run.

A checkpoint is the folder `checkpoints/step-000100`. It is written under another name, synced to the disk and
then renamed, so that a folder with the name of a checkpoint was complete when it was written. PyTorch's
distributed checkpointing writes the tensors into safetensors files (no pickle): each rank writes its shards, and any
number of ranks can read them back.

`state.json` holds the size of every tensor file and its CRC-32 for each 256 MiB, and a CRC-32 of its own content; they
are verified before anything is loaded. CRC-32 finds every flipped bit and every damaged stretch of up to 32 bits, and
misses other accidental damage once in four billion times. zlib computes it several times faster than hashlib computes
SHA-256, and without Python's lock, so that threads and ranks share the work. Protection against deliberate changes is
not needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from uniref_fast.training.core.distributed import Ranks

__all__ = ["CheckpointError", "Checkpoints", "Newest", "read_state"]

STATE_FILE = "state.json"
TENSOR_SUFFIX = ".safetensors"
NAME = re.compile(r"step-(\d{6,})")
PART = 256 * 2**20  # bytes of a tensor file per checksum
READ = 8 * 2**20  # bytes per read
THREADS = 4  # threads of a rank that compute checksums


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; earlier ones are untouched.

    Attributes:
        reason: Part of the message that states the problem.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


@dataclass(frozen=True)
class Newest:
    """The newest whole checkpoint of a run.

    Attributes:
        step: Number of steps done; None if the run has no checkpoint.
        state: State of the run, as it was given to `Checkpoints.save`.
        damaged: (name, reason) of each newer checkpoint, which cannot be used.
        unverified: The checkpoint was written without checksums, so that only the sizes of its files were verified.
    """

    step: int | None
    state: dict[str, Any]
    damaged: list[tuple[str, str]]
    unverified: bool = False


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: Folder that holds the checkpoints.
        ranks: Ranks of the run; all of them must make the same calls.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep

    def steps(self) -> list[int]:
        """Return the steps of all folders with the name of a checkpoint, ascending, complete or damaged."""
        return self.steps_in(self.folder)

    @staticmethod
    def steps_in(folder: Path) -> list[int]:
        """Return the steps of the checkpoints in a folder, as `steps` does."""
        if not folder.is_dir():
            return []
        found = [NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then delete the oldest ones over `keep`.

        A checkpoint of the same step is replaced.

        Args:
            step: Number of steps done.
            tensors: Tensors by name; each rank writes its parts of the sharded ones.
            state: State of the run, for JSON.

        Returns:
            Folder of the checkpoint.

        Raises:
            CheckpointError: A rank failed; all ranks raise it, and nothing is left behind.
        """
        final = self.path(step)
        partial = final.with_name(f".{final.name}.partial")
        self._together("prepare", lambda: _fresh(partial), first_only=True)
        try:
            self._together("write", lambda: _write(partial, tensors))
            sums = self._checksums(partial)
            self._together("finish", lambda: _finish(partial, final, sorted(tensors), state, sums), first_only=True)
        except CheckpointError:
            if self.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.ranks.rank == 0:
            for old in self.steps()[: -self.keep]:
                _remove(self.path(old))
        return final

    def newest(self) -> Newest:
        """Find the newest checkpoint whose files are all as they were written. All ranks; reads the checkpoint once.

        Raises:
            CheckpointError: There are checkpoints, and all of them are damaged.
        """
        damaged: list[tuple[str, str]] = []
        for step in reversed(self.ranks.broadcast(self.steps())):
            path = self.path(step)
            try:
                found = self._verified(path)
            except CheckpointError as error:
                damaged.append((path.name, error.reason))
                continue
            return Newest(step, found["state"], damaged, not _has_checksums(found))
        if damaged:
            reasons = "; ".join(reason for _, reason in damaged)
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be used: {reasons}. Put a copy of one back, remove "
                f"{self.folder} to train from the beginning, or give another --out"
            )
        return Newest(None, {}, [])

    def set_aside(self, names: list[str]) -> None:
        """Rename damaged checkpoints to `<name>.damaged`, so that they no longer count as checkpoints."""

        def rename() -> None:
            for name in names:
                aside = self.folder / f"{name}.damaged"
                if aside.exists():
                    shutil.rmtree(aside)
                os.rename(self.folder / name, aside)

        self._together("set aside", rename, first_only=True)

    def load(self, step: int, tensors: Mapping[str, Tensor], verify: bool = True) -> dict[str, Any]:
        """Fill tensors in place, however they are sharded now, and return the state of the run.

        Args:
            step: Step of the checkpoint.
            tensors: Tensors by name.
            verify: Verify the files first; False if `newest` has just done it.

        Raises:
            CheckpointError: The checkpoint is damaged, or has other tensors.
        """
        path = self.path(step)
        found: dict[str, Any] = self._verified(path) if verify else {}

        def read() -> None:
            stated = found or read_state(path)
            _same_tensors(path, stated, sorted(tensors))
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)))
            found.update(stated)

        self._together("read", read)
        return found["state"]

    def verified(self, step: int) -> dict[str, Any]:
        """Verify the files of the checkpoint of a step, and return the state of the run. All ranks.

        Raises:
            CheckpointError: The checkpoint is damaged.
        """
        state: dict[str, Any] = self._verified(self.path(step))["state"]
        return state

    def read(self, step: int, part: str) -> dict[str, Tensor]:
        """Read the whole tensors of one part of a verified checkpoint. All ranks.

        Args:
            step: Step of the checkpoint.
            part: Beginning of the tensors' names, such as "model" or "average".

        Returns:
            Tensors on the CPU, by their names without the beginning; empty if the checkpoint has no such part.
        """
        tensors: dict[str, Tensor] = {}

        def read() -> None:
            reader = HuggingFaceStorageReader(str(self.path(step)))
            for name, stored in reader.read_metadata().state_dict_metadata.items():
                if name.startswith(f"{part}.") and isinstance(stored, TensorStorageMetadata):
                    tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
            if tensors:
                dcp.load(tensors, storage_reader=reader)

        self._together("read", read)
        return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}

    def _verified(self, path: Path) -> dict[str, Any]:
        """Verify all files of a checkpoint, and return the content of its state file."""
        found: dict[str, Any] = {}

        def files() -> None:
            found.update(read_state(path))
            _right_sizes(path, found)

        self._together("read", files)
        if _has_checksums(found):
            expected = {name: file["crc32"] for name, file in found["files"].items()}
            differing = [name for name, sums in self._checksums(path).items() if sums != expected[name]]

            def compare() -> None:
                if differing:
                    raise ValueError(
                        f"{path.name}/{differing[0]} has changed since it was written (its checksum differs)"
                    )

            self._together("read", compare)
        return found

    def _checksums(self, folder: Path) -> dict[str, list[int]]:
        """Return the CRC-32 of each part of each tensor file, by file name; the ranks share the work."""
        parts: list[tuple[str, int]] = []
        mine: dict[tuple[str, int], int] = {}

        def split() -> None:
            for path in sorted(folder.glob(f"*{TENSOR_SUFFIX}")):
                parts.extend((path.name, start) for start in range(0, max(path.stat().st_size, 1), PART))

        def compute() -> None:
            own = parts[self.ranks.rank :: self.ranks.size]
            with ThreadPoolExecutor(THREADS) as pool:
                mine.update(zip(own, pool.map(lambda part: _crc32(folder / part[0], part[1]), own), strict=True))

        self._together("read", split, first_only=True)
        parts = self.ranks.broadcast(parts)  # one list: a network file system may show the ranks different folders
        self._together("read", compute)
        whole = {key: crc for part in self.ranks.gather(mine) for key, crc in part.items()}
        files: dict[str, list[int]] = {}
        for name, start in sorted(whole):
            files.setdefault(name, []).append(whole[name, start])
        return files

    def _together(self, what: str, action: Any, first_only: bool = False) -> None:
        """Run an action on every rank, or on rank 0 only; if it fails on one rank, raise CheckpointError on all."""
        problem = None
        if not first_only or self.ranks.rank == 0:
            try:
                action()
            except CheckpointException as error:  # derives from BaseException
                problem = "; ".join(sorted({_reason(e[0]) for e in error.failures.values()}))
            except Exception as error:  # the disk and the libraries between raise errors of many classes
                problem = _reason(error)
        problems = sorted({p for p in self.ranks.gather(problem) if p})
        if problems:
            reason = "; ".join(problems)
            raise CheckpointError(f"could not {what} a checkpoint in {self.folder}: {reason}", reason)


def _reason(error: BaseException) -> str:
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # own ones are sentences
    return f"{kind}{error}".splitlines()[0]


def _fresh(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".step-*.partial"):  # left by a run that was killed while saving
        shutil.rmtree(left)
    folder.mkdir()


def _remove(folder: Path) -> None:
    """Delete a checkpoint; rename it first, so that an interruption leaves no incomplete folder under its name."""
    doomed = folder.with_name(f".{folder.name}.removed.partial")
    if doomed.exists():
        shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.rename(folder, doomed)
    except OSError as error:
        print(f"the old checkpoint {folder} cannot be removed: {error.strerror}", file=sys.stderr)
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*consolidat.*")
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _finish(
    partial: Path, final: Path, names: list[str], state: Mapping[str, Any], sums: Mapping[str, list[int]]
) -> None:
    files = {name: {"bytes": (partial / name).stat().st_size, "crc32": crcs} for name, crcs in sums.items()}
    content = {"files": files, "tensors": names, "state": dict(state)}
    (partial / STATE_FILE).write_text(json.dumps({**content, "crc32": _content_crc32(content)}) + "\n")
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if final.exists():
        _remove(final)
    os.rename(partial, final)
    _sync(final.parent)


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of the state file of a checkpoint: "files", "tensors" and "state".

    Raises:
        ValueError: The file is missing or damaged.
    """
    file = path / STATE_FILE
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.name} has no {STATE_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}/{STATE_FILE} cannot be read ({_reason(error)})") from None
    kinds = {"files": dict, "tensors": list, "state": dict}
    if not isinstance(found, dict) or any(not isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path.name}/{STATE_FILE} is damaged: it lacks {', '.join(kinds)}")
    crc = found.pop("crc32", None)
    if (crc is None and _has_checksums(found)) or (crc is not None and crc != _content_crc32(found)):
        raise ValueError(f"{path.name}/{STATE_FILE} has changed since it was written (its checksum differs)")
    return found


def _content_crc32(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _has_checksums(found: Mapping[str, Any]) -> bool:
    """Return True if a state file has checksums; those of older versions have only sizes."""
    return any(isinstance(file, dict) for file in found["files"].values())


def _crc32(path: Path, start: int) -> int:
    """Return the CRC-32 of a part of a file, reading it in blocks."""
    crc, end = 0, start + PART
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while block := file.read(min(READ, end - file.tell())):
            crc = zlib.crc32(block, crc)
    return crc


def _right_sizes(path: Path, found: Mapping[str, Any]) -> None:
    for name, file in found["files"].items():
        size = file["bytes"] if isinstance(file, dict) else file
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise ValueError(f"{path.name}/{name} is missing or not {size} bytes long")
    if others := sorted({file.name for file in path.glob(f"*{TENSOR_SUFFIX}")} - set(found["files"])):
        raise ValueError(f"{path.name}/{others[0]} does not belong to the checkpoint; move it away")


def _same_tensors(path: Path, found: Mapping[str, Any], names: list[str]) -> None:
    if names != found["tensors"]:
        odd = sorted(set(names) ^ set(found["tensors"]))
        raise ValueError(
            f"{path.name} holds the state of another model or optimizer: {len(odd)} tensors differ, such as {odd[0]}"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
