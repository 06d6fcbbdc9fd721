"""Files and folders that appear whole or not at all, and files of records with one JSON object per line.

A record has an integer "step". Lines are appended whole, so that a kill damages at most the last line, which then lacks
its end and is skipped by every reader. JSON has no numbers that are not finite: they are stored as the strings "nan",
"inf" and "-inf".
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "RecordFile",
    "append_line",
    "check_new_folder",
    "created_folders",
    "keep_records",
    "read_records",
    "whole_folder",
    "write_whole",
]


class RecordFile:
    """File to which records are appended; a record is passed to the operating system before `append` returns.

    Raises:
        OSError: A record cannot be written, for example because the disk is full; no part of it stays in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def append(self, record: Mapping[str, Any]) -> None:
        append_line(self._file, _plain(record), f"step {record['step']}")

    def close(self) -> None:
        self._file.close()


def append_line(file: FileIO, value: Any, name: str, *, sync: bool = False) -> None:
    """Append a JSON value as one line.

    Args:
        file: Unbuffered file, opened for appending.
        value: The JSON value.
        name: Name of the value in an error.
        sync: Wait until the line is on the disk.

    Raises:
        OSError: The line cannot be written, for example because the disk is full; no part of it stays in the file.
    """
    line = json.dumps(value, allow_nan=False).encode() + b"\n"
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise OSError(error.errno, f"{name} could not be written: {error.strerror}", str(file.name)) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return all records; a last line without its end, left by a kill, is skipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A complete line is not a JSON object with an integer "step"; the message names file and line.
    """
    return [record for _, record in _lines(path)]


def keep_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Remove the records for which `keep` returns False, and an incomplete last line; return the number removed.

    The file is replaced in one step; a file that needs no change, or does not exist, is not touched. Raises the errors
    of `read_records`.
    """
    if not path.exists():
        return 0
    lines = _lines(path)
    kept = [line for line, record in lines if keep(record)]
    if sum(map(len, kept)) != path.stat().st_size:
        write_whole(path, lambda file: file.write(b"".join(kept)))
    return len(lines) - len(kept)


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, cache: bool = False) -> None:
    """Write a file that appears whole or not at all: it is written beside `path`, synced to the disk, and renamed.

    Args:
        path: The file; one that exists is replaced.
        write: Function that is called with the open file and writes the content.
        cache: The file holds what can be computed again. Any number of processes may then write it at the same time,
            and nothing waits for the disk, which could take longer than computing the content.
    """
    with contextlib.nullcontext() if cache else created_folders(path.parent):
        _write_whole(path, write, cache)


def _write_whole(path: Path, write: Callable[[BinaryIO], object], cache: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex + '.' if cache else ''}partial")
    try:
        with open(partial, "w+b") as file:  # some image formats read what they have written
            write(file)
            if not cache:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def created_folders(folder: Path) -> Iterator[None]:
    """Create a folder and its parents; if the block raises, remove those that did not exist before and are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def check_new_folder(folder: Path, flag: str) -> None:
    """Raise ValueError, which names the flag, unless a folder is empty or does not exist."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{flag} {folder} exists and is not an empty folder; give a new one")


@contextlib.contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder that appears whole or not at all.

    Args:
        folder: The folder; its parents are created.
        replace: Replace a folder of that name, instead of refusing to.

    Yields:
        A new empty folder beside `folder`. When the block ends its files are synced to the disk, and it is renamed to
        `folder`; when the block raises it is removed.

    Raises:
        FileExistsError: `folder` exists, is not empty, and is not to be replaced.
    """

    def refuse(problem: str) -> None:
        if not replace and folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} {problem}")

    refuse("is not empty: choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # mkdtemp and safetensors create private files
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        partial.chmod(0o755)
        if replace and folder.exists():
            shutil.rmtree(folder)
        try:
            os.rename(partial, folder)
        except OSError:
            refuse("was written by another process meanwhile")
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or nested too deeply
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(
                f'{path}, line {number} is damaged: expected a JSON object with a "step", got {line[:60]!r}; '
                "repair or remove that line"
            )
        found.append((line + b"\n", record))
    return found


def _plain(value: Any) -> Any:
    """Convert a value to JSON values; numbers that are not finite and values of other types become texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
