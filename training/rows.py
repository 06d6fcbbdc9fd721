"""Training rows from files: an instruction, references in order, a target. `Dataset` reads them at random.

The canonical row is {"input_images": [paths], "output_image": path, "instruction": text, "task_type": text}, with any
number of references, none included; `formats` lists the other names that are understood. Files are .jsonl (.ndjson),
.json, .parquet and .tar, or folders of those.

    dataset = Dataset(["data/edits.jsonl", "data/shards"])
    row = dataset[17]
    references = [source.load() for source in row.references]
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uniref_fast.budget import MAX_ASPECT_RATIO
from uniref_fast.training.columns import Columns
from uniref_fast.training.formats import Format, Parts
from uniref_fast.training.images import MAX_PIXELS, ImageSource
from uniref_fast.training.readers import (
    BOM,
    BrokenFileError,
    JsonlReader,
    JsonReader,
    ParquetReader,
    Reader,
    Record,
    RowGroupCache,
    filled,
    from_json,
    printable,
)
from uniref_fast.training.tars import TarReader

__all__ = ["MAX_PIXELS", "BrokenFileError", "Dataset", "ImageSource", "Row", "RowError", "left_out"]

Size = tuple[int, int]  # (width, height) in pixels
ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".tar")
# Files that may hold rows too: in a folder they are named instead of passed over in silence.
UNREAD = (".csv", ".tsv", ".arrow", ".feather", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tfrecord",
          ".lmdb", ".xlsx", ".toml")  # fmt: skip
SAMPLE = 1000  # rows that are looked at to tell a file's format: some must have the key that tells it


class RowError(ValueError):
    """A row that cannot be used; the message starts with its place, `where`."""

    def __init__(self, where: str, reason: object) -> None:
        super().__init__(where, str(reason))  # both, so that it can be pickled back from a worker

    @property
    def where(self) -> str:
        return self.args[0]

    @property
    def reason(self) -> str:
        return self.args[1]

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        instruction: what to do, as it was written.
        references: the pictures given, in order; may be empty.
        target: the picture wanted; None in rows for reinforcement learning.
        task_type: a label of the data set's own.
        where: its place: "file.jsonl:12" (line), "part-0.parquet:7" (row, from 1), "shard-3.tar:000017" (sample).
        scene: what the target shows, as data made by `uniref-fast data make` says it; None without. It is as it stands
            in the file: whoever uses it checks it.
        artworks: the pictures of the scene's objects, those of its references too, by their paths as the scene has
            them; not those that are not there.
        key: what the data set calls it; None without a name.
        language: of the instruction, where a bench says it.
    """

    instruction: str
    references: tuple[ImageSource, ...]
    target: ImageSource | None
    task_type: str | None
    where: str
    scene: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)
    artworks: Mapping[str, ImageSource] = field(default_factory=dict, repr=False, hash=False)
    key: str | None = None
    language: str | None = None

    def sizes(self, decode: bool = False) -> tuple[Size | None, list[Size]]:
        """(width, height) in pixels of the target, None without, and of each reference; of the upright pictures.

        Every command asks this of a row before it uses it, so that all of them refuse the same rows.

        Args:
            decode: read all pixels, not the headers only.

        Raises:
            RowError: when a picture cannot be read or is too elongated for the text encoder.
        """

        def size(source: ImageSource) -> Size:
            width, height = source.load().size if decode else source.size()
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(
                    f"{source.name}: {width} x {height} pixels are too elongated: the text encoder takes aspect ratios "
                    f"up to {MAX_ASPECT_RATIO}"
                )
            return width, height

        try:
            return None if self.target is None else size(self.target), [size(source) for source in self.references]
        except ValueError as error:
            raise RowError(self.where, error) from error


class Dataset:
    """Rows of many files in one sequence: in the order of the paths, folders by relative path, files by row.

    Making it reads the files once for an index (where each row begins); rows are read when asked for. It holds no open
    files: it may be sent to worker processes and used by several threads.

    Attributes:
        files: names of the files, as messages call them.
        left_out: (file, reason) of everything in the given folders and archives that is not read as a row, or a part of
            one, although it may have been meant so: descriptions in .json, files of other kinds, members of no sample.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        image_folder: str | os.PathLike[str] | None = None,
        targets: Literal["required", "optional"] = "required",
        columns: Iterable[str] = (),
    ) -> None:
        """Index the files.

        Args:
            paths: files and folders, or one; folders are searched to any depth, hidden files left out.
            image_folder: where relative paths in rows are looked up; beside their file by default. Tars name members.
            targets: "optional" also takes rows without a target.
            columns: what the files' own columns hold, as "role=column" pairs; see `columns.Columns`.

        Raises:
            ValueError: for a path that is not there or not known, or a file that occurs twice.
            BrokenFileError: for a file that cannot be read as a whole, or whose keys are those of no known format.
        """
        if targets not in ("required", "optional"):
            raise ValueError(f'targets must be "required" or "optional", got {targets!r}')
        if isinstance(paths, (str, os.PathLike)):
            paths = [paths]
        if image_folder is not None and not Path(image_folder).is_dir():
            raise ValueError(f"image folder {image_folder} is not there")
        found, named, left_out = _find_files([Path(path) for path in paths])
        self._targets, self._columns = targets, Columns.of(columns)
        cache = RowGroupCache()
        self._readers: list[Reader] = []
        self._formats: list[Format | None] = []
        for path, name in found:
            folder = Path(image_folder) if image_folder is not None else path.parent
            reader = _reader(path, name, folder, cache, self._columns)
            if isinstance(reader, str):
                if path in named:
                    raise BrokenFileError(name, reader)
                left_out.append((name, reader))
                continue
            left_out += [(name, reason) for reason in reader.left_out]
            self._readers.append(reader)
            self._formats.append(_format_of(reader, self._columns))
        if not self._readers:
            told = "; ".join(f"{name} {reason}" for name, reason in left_out[:5])
            raise ValueError(f"no rows in {', '.join(map(str, paths))}: {told}")
        self.left_out = tuple(left_out)
        self.files = tuple(reader.name for reader in self._readers)
        self._ends = np.cumsum([len(reader) for reader in self._readers], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[Row]:
        """All rows in order; stops with a RowError at the first that is broken. To go on after one, use indices."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Row:
        """The row; raises RowError when it is broken, IndexError when there is none."""
        reader, row, form = self._locate(index)
        where = reader.place(row)
        try:
            record = reader.record(row)
            return self._row(record, form or self._columns.format(filled(record.values)), where)
        except (ValueError, OSError) as error:
            raise RowError(where, error) from error

    def roles(self, index: int) -> dict[str, str | None]:
        """What each key of a row is read as, such as "references"; None for one that is not read.

        Keys without a value are left out. Raises ValueError for a row that cannot be read at all.
        """
        reader, row, form = self._locate(index)
        keys = filled(reader.record(row).values)
        form = form or self._columns.format(keys)
        return {key: form.role(key) for key in sorted(keys)}

    @property
    def unread_columns(self) -> dict[str, int]:
        """Columns of parquet files that are never read, since they can hold neither text nor pictures; with rows."""
        found: Counter[str] = Counter()
        for reader in self._readers:
            found.update(dict.fromkeys(reader.unread, len(reader)))
        return dict(found)

    def where(self, index: int) -> str:
        """The place of a row, broken or not."""
        reader, row, _ = self._locate(index)
        return reader.place(row)

    @functools.cached_property
    def contents(self) -> tuple[str, ...]:
        """Of each file what changes when it does, and the columns given: a digest of .jsonl and .json, else size and
        row count.

        Pictures beside the files are not looked at.
        """
        read_as = f", columns {self._columns}" if self._columns else ""
        return tuple(_content(reader.path, len(reader)) + read_as for reader in self._readers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the files' names and contents: another one means that the data changed."""
        return hashlib.sha256(json.dumps([*zip(self.files, self.contents, strict=True)]).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[Reader, int, Format | None]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        file = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[file - 1]) if file else 0
        return self._readers[file], index - first, self._formats[file]

    def _row(self, record: Record, form: Format, where: str) -> Row:
        parts = Parts.of(record.values, form, functools.partial(_names_file, record))
        references = tuple(_source(name, value, record) for name, value in parts.references)
        target = None if parts.target is None else _source(*parts.target, record)
        if target is None and self._targets == "required":
            hint = f"no {form.target!r}" if form.target else f"rows of {form} have none"
            raise ValueError(
                f'no target picture: {hint}; only targets="optional" (reinforcement learning) takes such rows'
            )
        artworks = _artworks(parts.scene, record)
        return Row(parts.instruction, references, target, parts.task_type, where, parts.scene, artworks, parts.key,
                   parts.language)  # fmt: skip


def left_out(datasets: Iterable[Dataset], most: int = 20) -> list[tuple[str, str]]:
    """What data sets leave out, as (file, reason), for a run to report; after `most` of them only their number."""
    found = list(dict.fromkeys(one for dataset in datasets for one in dataset.left_out))
    more = [(f"{len(found) - most:,} more", "`uniref-fast data check` lists all")] if len(found) > most else []
    return [*found[:most], *more]


def _reader(path: Path, name: str, folder: Path, cache: RowGroupCache, columns: Columns) -> Reader | str:
    """The reader of a file, or the reason why it holds no rows."""
    ending = path.suffix.lower()
    if ending == ".json":
        return _json_reader(path, name, folder, columns)
    if ending == ".parquet":
        return ParquetReader(path, name, folder, cache)
    return TarReader(path, name, folder) if ending == ".tar" else JsonlReader(path, name, folder)


def _json_reader(path: Path, name: str, folder: Path, columns: Columns) -> Reader | str:
    """The reader of a .json file: a list of rows, an object with one list of rows, one row, or a row a line."""
    content = path.read_bytes()
    try:
        parsed = from_json(content)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            if isinstance(from_json(content.removeprefix(BOM).lstrip().partition(b"\n")[0]), dict):
                return JsonlReader(path, name, folder)
        raise BrokenFileError(name, error) from None
    if isinstance(parsed, list):
        if parsed and not any(isinstance(item, dict) for item in parsed):
            return "holds a JSON list without objects; a row is an object"
        return JsonReader(path, name, folder)
    if not isinstance(parsed, dict):
        return f"must hold a JSON list of rows, got {type(parsed).__name__}"
    if _are_rows([parsed], columns):
        return JsonReader(path, name, folder)
    keys = [key for key, value in parsed.items() if isinstance(value, list) and _are_rows(value, columns)]
    if len(keys) > 1:
        raise BrokenFileError(name, f"has rows under several keys, {', '.join(keys)}; write each list as its own file")
    if keys:
        return JsonReader(path, name, folder, keys[0])
    shown = ", ".join(map(repr, list(parsed)[:6])) or "empty"
    return f"holds a JSON object ({shown}) that is no row of a known format, and none of its keys has a list of rows"


def _are_rows(values: Sequence[Any], columns: Columns) -> bool:
    """Whether the objects among the values have keys of a known format, one of pictures included."""
    keys = frozenset[str]().union(*(filled(value) for value in values[:SAMPLE] if isinstance(value, dict)))
    try:
        form = columns.format(keys)
    except ValueError:
        return False
    return any(form.owns(key) for key in keys)


def _format_of(reader: Reader, columns: Columns) -> Format | None:
    """The format of a file; None when it has no row that can be read."""
    rows = reader.keys(SAMPLE)
    if not rows:
        return None
    try:
        form = columns.format(frozenset().union(*rows))
    except ValueError as error:
        alone = set()  # formats of the rows that tell theirs by themselves: one with a stray key spoils no others
        for keys in rows:
            with contextlib.suppress(ValueError):
                alone.add(columns.format(keys))
        if len(alone) != 1:
            several = f"rows of several formats ({', '.join(sorted(map(str, alone)))}); " if alone else ""
            raise BrokenFileError(reader.name, f"{several}{error}") from None
        (form,) = alone
    if isinstance(reader, ParquetReader):
        # also columns that are not read, when they may hold pictures: their rows are refused, not taken without them
        reader.select(lambda key, pictures: form.role(key) is not None or (pictures and key not in form.unread))
    return form


def _names_file(record: Record, path: str) -> bool:
    """Whether a text in a row is the path of a file."""
    try:
        record.find(path)
    except (ValueError, OSError):
        return False
    return True


def _source(name: str, value: Any, record: Record) -> ImageSource:
    """The picture in a cell: a path, bytes, or {"bytes": ..., "path": ...} of which bytes come first."""
    path, data = value, None
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
        name = f"{name} ({printable(path)})" if path else name
    elif isinstance(value, bytes):
        data = value
    if isinstance(data, bytes):
        return ImageSource(name, data=data)
    if isinstance(path, str) and data is None:
        return record.find(path)
    raise ValueError(f'{name} must be a path or, in parquet, bytes or {{"bytes", "path"}}; got {value!r:.80}')


def _artworks(scene: Mapping[str, Any] | None, record: Record) -> dict[str, ImageSource]:
    """The pictures of a scene's objects that are there; what is wrong with a scene is for those to say who use it."""
    if scene is None:
        return {}
    others = scene.get("references")
    found: dict[str, ImageSource] = {}
    for picture in (scene, *(others if isinstance(others, list) else ())):
        things = picture.get("objects") if isinstance(picture, dict) else None
        for thing in things if isinstance(things, list) else ():
            path = thing.get("artwork") if isinstance(thing, dict) else None
            if isinstance(path, str) and path not in found:
                with contextlib.suppress(ValueError, OSError):
                    found[path] = record.find(path)
    return found


# ---- files ----


def _find_files(paths: Sequence[Path]) -> tuple[list[tuple[Path, str]], set[Path], list[tuple[str, str]]]:
    """Files with the names that messages use, in order; which of them were named; (name, reason) of those left out."""
    if not paths:
        raise ValueError("no paths given")
    found: list[tuple[Path, Path]] = []  # file, shortest name
    named: set[Path] = set()
    left_out: list[tuple[str, str]] = []
    for path in paths:
        if path.is_dir():
            inside = _files_in(path)
            rows = [file for file in inside if file.suffix.lower() in ENDINGS]
            others = [file.relative_to(path).as_posix() for file in inside if file.suffix.lower() not in ENDINGS]
            left_out += [(name, f"is not read: files of rows end in {', '.join(ENDINGS)}") for name in others]
            if not rows:
                there = f"; it has {', '.join(others[:5])}" if others else ""
                raise ValueError(f"folder {path} has no file of rows ({', '.join(ENDINGS)}){there}")
            found += [(file, file.relative_to(path)) for file in rows]
        elif not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        elif not path.is_file() or path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path} is not a file of rows; known endings: {', '.join(ENDINGS)}")
        else:
            found.append((path, Path(path.name)))
            named.add(path)
    twice = [str(file) for file, count in Counter(file.resolve() for file, _ in found).items() if count > 1]
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}; its rows would count double")
    names = list(map(printable, _distinct_names(found)))
    return list(zip([file for file, _ in found], names, strict=True)), named, left_out


def _files_in(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [name for name in files if not name.startswith(".")]
        found += [Path(place, name) for name in visible if name.lower().endswith(ENDINGS + UNREAD)]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _content(path: Path, rows: int) -> str:
    """Tars and parquet hold pictures and are large: they are not read for it."""
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        return f"{path.stat().st_size} bytes, {rows} rows"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _distinct_names(found: Sequence[tuple[Path, Path]]) -> list[str]:
    """The shortest ends of the paths that tell all files apart, so that names do not depend on where the data lies."""
    parts = [file.absolute().parts for file, _ in found]
    least = [len(short.parts) for _, short in found]
    for more in itertools.count():
        names = ["/".join(whole[-(short + more) :]) for whole, short in zip(parts, least, strict=True)]
        if len(set(names)) == len(names) or more > max(map(len, parts)):
            return names
    raise AssertionError("unreachable")
