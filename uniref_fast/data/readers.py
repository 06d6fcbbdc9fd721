"""Readers of files of rows: .jsonl, .json, .csv and .parquet, with random access to rows of plain values.

A reader knows the number of rows of its file and where each begins, but not the meaning of the keys, which is in
`formats`. It holds no open files, so it can be pickled into workers and used by several threads. If a file is damaged
as a whole, its constructor raises `BrokenFileError`; if a row is damaged, reading this row raises ValueError.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import json
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uniref_fast.data.images import ImageSource

__all__ = [
    "BOM",
    "ENCODED",
    "BrokenFileError",
    "CsvReader",
    "JsonReader",
    "JsonlReader",
    "ParquetReader",
    "RawRow",
    "Reader",
    "RowGroupCache",
    "escape_controls",
    "from_json",
    "local_path",
    "present_keys",
    "printable",
]

ENCODED = ("data:image/", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # data URIs; base64 of PNG, JPEG, GIF and WebP
BOM = b"\xef\xbb\xbf"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")  # a drive of Windows has one letter
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # absolute paths of Windows
# characters that a terminal obeys, or that change the order of a line; not tab and newline
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class BrokenFileError(ValueError):
    """A file that cannot be read as rows; the message begins with its name."""

    def __init__(self, name: str, reason: object) -> None:
        super().__init__(name, reason)

    def __str__(self) -> str:
        return escape_controls(f"{self.args[0]}: {self.args[1]}")


@dataclass(frozen=True)
class RawRow:
    """A row as stored in the file.

    Attributes:
        values: Values by key.
        find: Function that returns the image that a path in the row names; raises ValueError.
    """

    values: Mapping[str, Any]
    find: Callable[[str], ImageSource]


class Reader:
    """Base class of the readers: rows 0 to `len - 1` of one file.

    Attributes:
        path: Path of the file.
        name: Name of the file in messages.
        folder: Folder of relative paths in its rows.
        unread: Columns that are never read.
    """

    def __init__(self, path: Path, name: str, folder: Path) -> None:
        self.path, self.name, self.folder = path, name, folder
        self.unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def place(self, number: int) -> str:
        """Return the place of a row for messages: file and line or number, counted from 1."""
        return f"{self.name}:{number + 1}"

    def read(self, number: int) -> RawRow:
        """Return a row. Raises ValueError if it is broken."""
        raise NotImplementedError

    def unused(self) -> tuple[str, ...]:
        """Return sentences about the parts of the file that no row uses; call `keys` before."""
        return ()

    def keys(self, sample: int) -> set[frozenset[str]]:
        """Return the sets of keys with a value that occur in the first `sample` rows; broken rows are skipped."""
        found = set()
        for number in range(min(sample, len(self))):
            with contextlib.suppress(ValueError):  # a broken row raises its error when it is indexed
                found.add(present_keys(self.read(number).values))
        return found

    def content(self) -> str:
        """Return a text that changes when the file does; files that hold images are not read for this."""
        return f"{self.path.stat().st_size} bytes, {len(self)} rows"

    def find(self, path: str) -> ImageSource:
        """Return the image file that a path in a row names: absolute, or relative to `folder`."""
        return ImageSource(printable(path), resolve_path(path, self.folder))


def printable(text: object) -> str:
    """Return a text that any stream can print: bytes of a file name that are not UTF-8 become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def escape_controls(text: object) -> str:
    """Return a text that is safe to print on a terminal: control characters become escapes, except tab and newline."""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], printable(text))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with `~` expanded to the home folder. Raises ValueError if it is a URL."""
    text = os.fspath(path)
    if URL.match(text) and not os.path.lexists(text):
        raise ValueError(f"{text} is a URL; URLs are not read: download it first, and give the path of the file")
    return Path(os.path.expanduser(text))


def present_keys(values: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys with a value; null is the same as a missing key."""
    return frozenset(key for key, value in values.items() if value is not None)


def resolve_path(path: str, folder: Path) -> Path:
    """Return the file at a path; relative paths are below the folder.

    If there is no such file, backslashes are read as separators of folders, and `~` as the home folder.

    Raises:
        ValueError: The path names no plain file, is a URL, is refused by the file system, or leaves the folder.
    """
    if not path:
        raise ValueError("the path of an image is empty")
    if URL.match(path) and "://" in path:
        raise ValueError(
            f"{path!r:.200} is a URL; URLs are not read: download the image first, and give the path of its file"
        )
    other = os.path.expanduser(path.replace("\\", "/"))
    try:
        return _image_file(path, path, folder)
    except ValueError:
        if WINDOWS.match(path):
            raise ValueError(
                f"no image file {path!r:.200}: it is an absolute path of Windows; give a path relative to the file of "
                "rows, or an absolute path of this system"
            ) from None
        if other == path or path.startswith(ENCODED):
            raise
    return _image_file(other, path, folder)


def _image_file(name: str, path: str, folder: Path) -> Path:
    """Return the image file of a name, which is one reading of the path in a row. Raises ValueError."""
    full = Path(name)
    if not full.is_absolute():
        inside = os.path.normpath(name)
        if inside.split(os.sep)[0] == "..":
            raise ValueError(f"path {path!r:.80} leaves its folder {folder}; use a path inside it, or an absolute one")
        full = folder / inside
    shown = repr(path) if len(path) <= 200 else f"{path[:60]!r}... of {len(path):,} characters"
    if path.startswith("data:") or (len(path) > 200 and path.startswith(ENCODED)):
        raise ValueError(
            f"no image file {shown}: it is an encoded image, not a path; store it as a file, or as bytes in parquet"
        )
    try:
        mode = full.stat().st_mode
    except FileNotFoundError:
        where = printable(full) if len(path) <= 200 else f"it in {printable(folder)}"
        raise ValueError(f"no image file {shown} (expected at {where})") from None
    except (OSError, ValueError) as error:  # long names, no permission, circular links, NUL bytes, half surrogates
        reason = error.strerror if isinstance(error, OSError) else printable(error)
        raise ValueError(f"no image file {shown}: the system refuses that path ({reason})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise ValueError(f"no image file {shown}: {printable(full)} is {kind}")
    return full


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def from_json(text: bytes) -> Any:
    """Parse a JSON value in UTF-8, with or without BOM. Raises ValueError if it is malformed."""
    if not text.strip():
        raise ValueError("not JSON: it is empty")
    try:
        return json.loads(text.removeprefix(BOM).decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not a row: nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"a key occurs twice: {sorted({key for key in keys if keys.count(key) > 1})}")
    return found


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'a row must be a JSON object like {{"instruction": ...}}, got {type(value).__name__}')
    return value


class JsonlReader(Reader):
    """Reader of a file with one JSON object per line; blank lines are skipped, but count as lines.

    Rows are found by their byte offsets.
    """

    def __init__(self, path: Path, name: str, folder: Path) -> None:
        super().__init__(path, name, folder)
        starts, lines, at = [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.removeprefix(BOM).strip():
                    starts.append(at)
                    lines.append(number)
                at += len(line)
        self._starts = np.array(starts, dtype=np.int64)
        self._lines = np.array(lines, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, number: int) -> str:
        return f"{self.name}:{self._lines[number]}"

    def content(self) -> str:
        return _digest(self.path)

    def read(self, number: int) -> RawRow:
        with open(self.path, "rb") as file:
            file.seek(int(self._starts[number]))
            return RawRow(_mapping(from_json(file.readline())), self.find)


class JsonReader(Reader):
    """Reader of the objects of one JSON file: a list, the list under a key of an object, or one object.

    A process keeps the parsed rows after the first access; pickles do not contain them.
    """

    def __init__(self, path: Path, name: str, folder: Path, key: str | None = None, content: Any = None) -> None:
        """Index the file; `content` is its parsed content, if known."""
        super().__init__(path, name, folder)
        self._key = key
        self._parsed: list[Any] | None = None if content is None else self._rows_of(content)
        self._length = len(self._rows())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parsed": None}

    def __len__(self) -> int:
        return self._length

    def read(self, number: int) -> RawRow:
        return RawRow(_mapping(self._rows()[number]), self.find)

    def content(self) -> str:
        return _digest(self.path)

    def _rows(self) -> list[Any]:
        if self._parsed is None:
            try:
                self._parsed = self._rows_of(from_json(self.path.read_bytes()))
            except ValueError as error:
                raise BrokenFileError(self.name, error) from None
        return self._parsed

    def _rows_of(self, content: Any) -> list[Any]:
        rows = content if self._key is None else _mapping(content).get(self._key)
        return rows if isinstance(rows, list) else [rows]


class CsvReader(Reader):
    """Reader of a table with a header line. Empty cells are missing values; a cell with a list of texts is a list.

    A process keeps the rows after the first access; pickles do not contain them.
    """

    def __init__(self, path: Path, name: str, folder: Path) -> None:
        super().__init__(path, name, folder)
        self._held: tuple[list[str], list[tuple[int, list[str]]]] | None = None
        self.columns = tuple(self._table()[0])
        self._lines = np.array([line for line, _ in self._table()[1]], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, number: int) -> str:
        return f"{self.name}:{self._lines[number]}"

    def content(self) -> str:
        return _digest(self.path)

    def read(self, number: int) -> RawRow:
        header, rows = self._table()
        cells = rows[number][1]
        if len(cells) != len(header):
            raise ValueError(f"the row has {len(cells)} cells, the header {len(header)}")
        return RawRow({key: _cell(cell) for key, cell in zip(header, cells, strict=True)}, self.find)

    def _table(self) -> tuple[list[str], list[tuple[int, list[str]]]]:
        """Return the header, and for each row the line where it begins and its cells."""
        if self._held is None:
            rows, before = [], 0
            try:
                with open(self.path, newline="", encoding="utf-8-sig") as file:
                    table = csv.reader(file, strict=True)
                    for cells in table:
                        if cells:
                            rows.append((before + 1, cells))
                        before = table.line_num
            except (csv.Error, UnicodeDecodeError) as error:
                raise BrokenFileError(self.name, f"not CSV in UTF-8, after line {before}: {error}") from None
            header = rows[0][1] if rows else []
            if len(set(header)) < len(header):
                raise BrokenFileError(self.name, f"a column occurs twice: {header}")
            self._held = header, rows[1:]
        return self._held


def _cell(text: str) -> Any:
    if text[:1] == "[" and text[-1:] == "]":
        with contextlib.suppress(ValueError, SyntaxError):
            found = ast.literal_eval(text)  # also lists of texts in JSON
            if all(isinstance(item, str) for item in found):
                return found
    return text or None


class RowGroupCache:
    """Row groups that were read last, shared by the parquet files of a dataset; empty in a new process."""

    def __init__(self, groups: int = 4) -> None:
        self._groups = groups
        self._held: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroupCache, (self._groups,)

    def get(self, key: Any, read: Callable[[], Any]) -> Any:
        """Return the cached value of the key, or read it; other threads wait instead of reading it again."""
        with self._lock:
            if key not in self._held:
                while len(self._held) >= self._groups:
                    self._held.popitem(last=False)
                self._held[key] = read()
            self._held.move_to_end(key)
            return self._held[key]


class ParquetReader(Reader):
    """Reader of a parquet file; reads the row group of a row, and only the columns that `select` chose."""

    def __init__(self, path: Path, name: str, folder: Path, cache: RowGroupCache) -> None:
        super().__init__(path, name, folder)
        self._cache = cache
        with _parquet_errors(lambda reason: BrokenFileError(name, reason)), self._open() as file:
            self._columns = {field.name: _may_hold_images(field.type) for field in file.schema_arrow}
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def keys(self, sample: int) -> set[frozenset[str]]:
        return {frozenset(self._columns)}

    def select(self, wanted: Callable[[str, bool], bool]) -> None:
        """Read only the columns for which `wanted(name, may_hold_images)` is True."""
        self.unread = tuple(name for name, images in self._columns.items() if not wanted(name, images))
        self._columns = {name: held for name, held in self._columns.items() if name not in self.unread}

    def read(self, number: int) -> RawRow:
        group = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        with _parquet_errors(ValueError):
            table = self._cache.get((self.path, group), lambda: self._read(group))
            return RawRow(table.slice(number - first, 1).to_pylist()[0], self.find)

    def _read(self, group: int) -> Any:
        with self._open() as file:
            return file.read_row_group(group, columns=list(self._columns))

    def _open(self) -> Any:
        try:
            from pyarrow import parquet
        except ImportError:
            raise ImportError(f"{self.name}: reading parquet needs pyarrow; pip install 'uniref_fast[train]'") from None
        return parquet.ParquetFile(self.path)


def _may_hold_images(kind: Any) -> bool:
    """Return True if values of an Arrow type may contain texts or bytes at any depth."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _may_hold_images(kind.value_type)
    if types.is_nested(kind):
        return any(_may_hold_images(kind.field(i).type) for i in range(kind.num_fields))
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_string_view,
             types.is_binary_view, types.is_fixed_size_binary)  # fmt: skip
    return any(test(kind) for test in tests)


@contextlib.contextmanager
def _parquet_errors(make: Callable[[str], Exception]) -> Iterator[None]:
    """Convert the errors that pyarrow raises for damaged files to one type."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # ArrowException, OSError, UnicodeDecodeError, NotImplementedError, ...
        raise make(f"damaged parquet: {error or type(error).__name__}") from error
