"""Checkpoints that are whole or not there: sharded safetensors and a JSON of the run's state.

A checkpoint is the folder `checkpoints/step-000100`. It is written beside its name, synced to the disk and then
renamed; so whatever happens while saving, what has the name of a checkpoint is one. Tensors go through torch's
distributed checkpointing in safetensors files (no pickle), each rank its shards, and are read back at any number of
ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from uniref_fast.training.parallel import Ranks
from uniref_fast.training.records import write_whole

__all__ = ["CheckpointError", "Checkpoints"]

STATE_FILE = "state.json"
NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: that holds them.
        ranks: of the run; all must make the same calls.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending."""
        if not self.folder.is_dir():
            return []
        found = [NAME.fullmatch(path.name) for path in self.folder.iterdir() if (path / STATE_FILE).is_file()]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then delete the oldest over `keep`. One that is there gets the state alone.

        Args:
            step: number of steps done.
            tensors: by name; sharded ones are written in parts by the ranks that hold them.
            state: for JSON.

        Raises:
            CheckpointError: on all ranks, when any of them failed; nothing is left behind.
        """
        final = self.path(step)
        if self.ranks.broadcast(step in self.steps()):  # of a run that was stopped before its next step
            self._together("finish", lambda: _restate(final, state), first_only=True)
            return final
        partial = final.with_name(f".{final.name}.partial")
        self._together("prepare", lambda: _fresh(partial), first_only=True)
        try:
            self._together("write", lambda: _write(partial, tensors))
            self._together("finish", lambda: _finish(partial, final, sorted(tensors), state), first_only=True)
        except CheckpointError:
            if self.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.ranks.rank == 0:
            for old in self.steps()[: -self.keep]:
                _remove(self.path(old))
        return final

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill the tensors in place, sharded as they are now; returns the state.

        Raises:
            CheckpointError: for a checkpoint that is damaged, or of other tensors.
        """
        path = self.path(step)
        found: dict[str, Any] = {}

        def read() -> None:
            found.update(json.loads((path / STATE_FILE).read_text()))
            _check(path, found, sorted(tensors))
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)))

        self._together("read", read)
        return found["state"]

    def _together(self, what: str, action: Any, first_only: bool = False) -> None:
        """Run on every rank, or on rank 0; when it fails on one, it fails on all."""
        problem = None
        if not first_only or self.ranks.rank == 0:
            try:
                action()
            except CheckpointException as error:  # derives from BaseException
                problem = "; ".join(sorted({_reason(e[0]) for e in error.failures.values()}))
            except Exception as error:  # whatever the disk and the libraries between come up with
                problem = _reason(error)
        problems = sorted({p for p in self.ranks.gather(problem) if p})
        if problems:
            raise CheckpointError(f"could not {what} a checkpoint in {self.folder}: {'; '.join(problems)}")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _fresh(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".step-*.partial"):  # of a run that was killed while saving
        shutil.rmtree(left)
    folder.mkdir()


def _remove(folder: Path) -> None:
    """Rename first: what has the name of a checkpoint is one, also when this is interrupted."""
    doomed = folder.with_name(f".{folder.name}.partial")
    with contextlib.suppress(OSError):
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*consolidat.*")
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _finish(partial: Path, final: Path, names: list[str], state: Mapping[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / STATE_FILE).write_text(_stated(files, names, state))
    for path in (*partial.iterdir(), partial):
        _sync(path)
    os.rename(partial, final)
    _sync(final.parent)


def _restate(folder: Path, state: Mapping[str, Any]) -> None:
    found = json.loads((folder / STATE_FILE).read_text())
    text = _stated(found["files"], found["tensors"], state)
    write_whole(folder / STATE_FILE, lambda file: file.write(text.encode()))


def _stated(files: Mapping[str, int], names: list[str], state: Mapping[str, Any]) -> str:
    return json.dumps({"files": files, "tensors": names, "state": dict(state)}) + "\n"


def _check(path: Path, found: Mapping[str, Any], names: list[str]) -> None:
    for name, size in found["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise ValueError(
                f"{path.name}/{name} is missing or not {size} bytes long; remove {path} to resume before it"
            )
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
