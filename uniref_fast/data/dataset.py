"""Training rows from files: an instruction, references in order, a target. `Dataset` reads them at random.

The canonical row is {"input_images": [paths], "output_image": path, "instruction": text, "task_type": text}, with any
number of references, none included; `formats` lists the other names that are understood. Files are .jsonl (.ndjson),
.json, .csv, .parquet, .tar, .tar.gz and .zip, or folders of those; folders of captioned images are read too (`pairs`).

    dataset = Dataset(["data/edits.jsonl", "data/shards"])
    row = dataset[17]
    references = [source.load() for source in row.references]
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uniref_fast.budget import MAX_ASPECT_RATIO
from uniref_fast.data.columns import Columns
from uniref_fast.data.formats import Format, Parts
from uniref_fast.data.images import MAX_PIXELS, ImageSource
from uniref_fast.data.pairs import Pairs
from uniref_fast.data.readers import (
    BrokenFileError,
    ParquetReader,
    Reader,
    Record,
    RowGroupCache,
    filled,
    printable,
)
from uniref_fast.data.sources import SAMPLE, find_sources, open_reader

__all__ = ["MAX_PIXELS", "BrokenFileError", "BrokenRowsError", "Dataset", "ImageSource", "Row", "RowError", "left_out"]

Size = tuple[int, int]  # (width, height) in pixels


class BrokenRowsError(RuntimeError):
    """Too many rows could not be used."""


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
        path_lengths: Number of rows of each given path.
        left_out: (file, reason) of everything in the given folders and archives that is not read as a row, or a part of
            one, although it may have been meant so: descriptions in .json, files of other kinds, members of no sample.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Pairs | Sequence[str | os.PathLike[str] | Pairs],
        image_folder: str | os.PathLike[str] | None = None,
        targets: Literal["required", "optional"] = "required",
        columns: Iterable[str] = (),
    ) -> None:
        """Index the files.

        Args:
            paths: files and folders, or one; folders are searched to any depth, hidden files left out. A folder without
                files of rows may hold captioned images (`pairs`); the configuration files of musubi-tuner, SimpleTuner
                and ai-toolkit stand for the folders that they name.
            image_folder: where relative paths in rows are looked up; beside their file by default. Tars name members.
            targets: "optional" also takes rows without a target.
            columns: what the files' own columns hold, as "role=column" pairs; see `columns.Columns`.

        Raises:
            ValueError: for a path that is not there or not known, or a file that occurs twice.
            BrokenFileError: for a file that cannot be read as a whole, or whose keys are those of no known format.
        """
        if targets not in ("required", "optional"):
            raise ValueError(f'targets must be "required" or "optional", got {targets!r}')
        if isinstance(paths, (str, os.PathLike, Pairs)):
            paths = [paths]
        if image_folder is not None and not Path(image_folder).is_dir():
            raise ValueError(f"image folder {image_folder} is not there")
        sources, left_out = find_sources([path if isinstance(path, Pairs) else Path(path) for path in paths])
        self._targets, self._columns = targets, Columns.of(columns)
        cache = RowGroupCache()
        self._readers: list[Reader] = []
        self._formats: list[Format | None] = []
        lengths = [0] * len(paths)
        for source in sources:
            folder = Path(image_folder) if image_folder is not None else source.path.parent
            reader = open_reader(source, folder, cache, self._columns)
            if isinstance(reader, str):
                if source.named:
                    raise BrokenFileError(source.name, reader)
                left_out.append((source.name, reader))
                continue
            self._readers.append(reader)
            lengths[source.given] += len(reader)
            self._formats.append(_format_of(reader, self._columns))
            left_out += [(source.name, reason) for reason in reader.unused()]
        if not self._readers:
            told = "; ".join(f"{name} {reason}" for name, reason in left_out[:5])
            raise ValueError(f"no rows in {', '.join(map(str, paths))}: {told}")
        self.left_out = (*left_out, *self._missing_columns())
        self.path_lengths = tuple(lengths)
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
        except RecursionError:
            raise RowError(where, "a value is nested too deeply") from None

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
        return tuple(reader.content() + read_as for reader in self._readers)

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

    def _missing_columns(self) -> list[tuple[str, str]]:
        """Columns that no row has, most probably slips of the pen, as for `left_out`."""
        names = {column for _, column in self._columns.own}
        found: set[str] = set()
        for most in (SAMPLE, sys.maxsize):  # all rows are read only where the first lack a column
            for reader in self._readers:
                if names - found:
                    found |= {*reader.unread}.union(*reader.keys(most))
        return [("columns", f"no row has {name!r}; there are {sorted(found)}") for name in sorted(names - found)]

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
