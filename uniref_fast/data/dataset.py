"""Datasets for training and evaluation: rows with an instruction, references in order, and a target.

The canonical row is {"input_images": [paths], "output_image": path, "instruction": text, "task_type": text}, with any
number of references, also none, and possibly a "mask" of the target, whose white part is trained; `formats` lists the
other names of keys that are recognised. Files are .jsonl
(.ndjson), .json, .csv, .parquet, .tar, .tar.gz and .zip, or folders of these; folders of images with captions are read
too (`pairs`).

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from uniref_fast.budget import MAX_ASPECT_RATIO
from uniref_fast.data.columns import Columns
from uniref_fast.data.formats import Format, RowContent
from uniref_fast.data.images import MAX_PIXELS, ImageSource
from uniref_fast.data.pairs import Pairs
from uniref_fast.data.readers import (
    BrokenFileError,
    ParquetReader,
    RawRow,
    Reader,
    RowGroupCache,
    escape_controls,
    local_path,
    present_keys,
    printable,
)
from uniref_fast.data.sources import SAMPLE, find_sources, open_reader

__all__ = ["MAX_PIXELS", "BrokenFileError", "BrokenRowsError", "Dataset", "ImageSource", "Row", "RowError", "left_out"]

Size = tuple[int, int]  # (width, height) in pixels


class BrokenRowsError(RuntimeError):
    """Too many rows of a dataset cannot be used."""


class RowError(ValueError):
    """A row that cannot be used; the message begins with its place, `where`."""

    def __init__(self, where: str, reason: object) -> None:
        where = escape_controls(where).replace("\n", "\\n")
        super().__init__(
            where, escape_controls(reason)
        )  # both arguments, so that a worker can send the error to its parent

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
    """Content of a row; its images have not been read yet.

    `mask` weighs the pixels of the target in the loss of supervised fine-tuning: white counts, black does not.
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
    mask: ImageSource | None = None

    def sizes(self, decode: bool = False) -> tuple[Size | None, list[Size]]:
        """Return the sizes (width, height) in pixels of the target, None without one, and of the references.

        Sizes are those of the upright images. Every command calls this before it uses a row, so that all of them refuse
        the same rows.

        Args:
            decode: Decode all pixels of these images instead of reading the headers only. The mask is decoded by
                `load_mask`.

        Raises:
            RowError: An image cannot be read, or is too elongated for the text encoder, or the mask does not have the
                shape of the target.
        """

        def size(source: ImageSource) -> Size:
            width, height = source.load().size if decode else source.size()
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(
                    f"{source.name}: {width} x {height} pixels are too elongated: the text encoder accepts aspect "
                    f"ratios up to {MAX_ASPECT_RATIO}"
                )
            return width, height

        try:
            target = None if self.target is None else size(self.target)
            if self.mask is not None and target is not None:
                check_mask_size(self.mask.name, self.mask.size(), target)
            return target, [size(source) for source in self.references]
        except ValueError as error:
            raise RowError(self.where, error) from error

    def load_mask(self) -> np.ndarray | None:
        """Return the mask as weights of pixels, float32 `[height, width]` from 0 to 1; None if the row has none.

        Raises:
            ValueError: The mask cannot be read, or leaves out the whole target.
        """
        if self.mask is None:
            return None
        weights = self.mask.load_mask()
        if not weights.any():
            raise ValueError(
                f"{self.mask.name}: the mask is black everywhere, so that nothing of the target counts; paint white "
                "what is trained, or leave the mask of this row out"
            )
        return weights


class Dataset:
    """Rows of many files as one sequence: in the order of the paths, in folders by relative path, in files by row.

    The constructor reads the files once to find where each row begins; a row is read when it is indexed. A dataset
    holds no open files: it may be sent to worker processes and used by several threads.

    Attributes:
        files: Names of the files in messages.
        empty_files: Names of the files that have no rows.
        left_out: (file, reason) of everything in the given folders and archives that is not read although it may have
            been meant as data: descriptions in .json, files of other kinds, members of archives that no sample uses.
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
            paths: Files and folders, or one of them. Folders are searched at any depth; hidden files are skipped. A
                folder without files of rows may hold images with captions (`pairs`). A configuration file of
                musubi-tuner, SimpleTuner or ai-toolkit stands for the folders that it names.
            image_folder: Folder of relative paths in rows; the folder of their file by default. Paths in archives name
                members.
            targets: "optional" also accepts rows without a target.
            columns: Meaning of columns whose names are not recognised, as "role=column" pairs, see `columns.Columns`.

        Raises:
            ValueError: A path does not exist or is of an unknown kind, or a file occurs twice.
            BrokenFileError: A file cannot be read as a whole, or its keys are those of no known format.
        """
        if targets not in ("required", "optional"):
            raise ValueError(f'targets must be "required" or "optional", got {targets!r}')
        if isinstance(paths, (str, os.PathLike, Pairs)):
            paths = [paths]
        image_folder = None if image_folder is None else local_path(image_folder)
        if image_folder is not None and not image_folder.is_dir():
            raise ValueError(f"image folder {image_folder} does not exist")
        sources, left_out = find_sources([path if isinstance(path, Pairs) else local_path(path) for path in paths])
        self._targets, self._columns = targets, Columns.of(columns)
        cache = RowGroupCache()
        self._readers: list[Reader] = []
        self._formats: list[Format | None] = []
        lengths = [0] * len(paths)
        for source in sources:
            folder = image_folder if image_folder is not None else source.path.parent
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
            reasons = "; ".join(f"{name} {reason}" for name, reason in left_out[:5])
            raise ValueError(f"no rows in {', '.join(map(str, paths))}: {reasons}")
        left_out += self._missing_columns()
        self.left_out = tuple((escape_controls(name), escape_controls(reason)) for name, reason in left_out)
        self.path_lengths = tuple(lengths)
        self.files = tuple(reader.name for reader in self._readers)
        self.empty_files = tuple(reader.name for reader in self._readers if not len(reader))
        self._ends = np.cumsum([len(reader) for reader in self._readers], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """Return a row. Raises RowError if the row is broken, IndexError if the index is out of range."""
        reader, number, form = self._locate(index)
        where = reader.place(number)
        try:
            raw = reader.read(number)
            return self._row(raw, form or self._columns.format(present_keys(raw.values)), where)
        except (ValueError, OSError) as error:
            raise RowError(where, error) from error
        except RecursionError:
            raise RowError(where, "a value is nested too deeply") from None

    @property
    def has_masks(self) -> bool:
        """True if one of the first rows of a file has a mask."""
        return any(
            form is not None and any(not keys.isdisjoint(form.mask_keys) for keys in reader.keys(SAMPLE))
            for reader, form in zip(self._readers, self._formats, strict=True)
        )

    def roles(self, index: int) -> dict[str, str | None]:
        """Return the role of each key of a row, such as "references"; None for a key that is not read.

        Keys without a value are left out. Raises ValueError if the row cannot be read at all.
        """
        reader, number, form = self._locate(index)
        keys = present_keys(reader.read(number).values)
        form = form or self._columns.format(keys)
        return {key: form.role(key) for key in sorted(keys)}

    @property
    def unread_columns(self) -> dict[str, int]:
        """Number of rows by column, for parquet columns that are never read: they hold neither text nor images."""
        found: Counter[str] = Counter()
        for reader in self._readers:
            found.update(dict.fromkeys(reader.unread, len(reader)))
        return dict(found)

    def where(self, index: int) -> str:
        """Return the place of a row, which may be broken."""
        reader, number, _ = self._locate(index)
        return reader.place(number)

    @functools.cached_property
    def contents(self) -> tuple[str, ...]:
        """Text for each file that changes when its rows or the given columns do.

        It is a digest for .jsonl, .json and .csv, otherwise size and row count. Images beside the files are not read.
        """
        read_as = f", columns {self._columns}" if self._columns else ""
        return tuple(reader.content() + read_as for reader in self._readers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the names and contents of all files; it changes when the data changes."""
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
        """Return the given columns that no row has, most probably misspelt, as entries of `left_out`."""
        names = {column for _, column in self._columns.roles}
        found: set[str] = set()
        for count in (SAMPLE, sys.maxsize):  # all rows are read only if the first rows lack a column
            for reader in self._readers:
                if names - found:
                    found |= {*reader.unread}.union(*reader.keys(count))
        return [("columns", f"no row has {name!r}; columns are {sorted(found)}") for name in sorted(names - found)]

    def _row(self, raw: RawRow, form: Format, where: str) -> Row:
        content = RowContent.parse(raw.values, form, functools.partial(_names_file, raw))
        references = tuple(_source(name, value, raw) for name, value in content.references)
        target = None if content.target is None else _source(*content.target, raw)
        if target is None and self._targets == "required":
            hint = f"no {form.target!r}" if form.target else f"rows of {form} have no target"
            raise ValueError(
                f'no target image: {hint}; only targets="optional" (reinforcement learning) accepts such rows'
            )
        artworks = _artworks(content.scene, raw)
        mask = None if content.mask is None else _source(*content.mask, raw)
        return Row(content.instruction, references, target, content.task_type, where, content.scene, artworks,
                   content.key, content.language, mask)  # fmt: skip


def check_mask_size(name: str, mask: Size, target: Size) -> None:
    """Check that a mask has the size of its target, or is its scaled version up to the rounding of a side.

    Raises:
        ValueError: The aspect ratios differ.
    """
    (width, height), (mask_width, mask_height) = target, mask
    if abs(mask_width * height - mask_height * width) > max(*target, *mask):
        raise ValueError(
            f"{name}: the mask is {mask_width} x {mask_height} pixels, and the target {width} x {height}; a mask needs "
            "the size of its target, or another size of the same aspect ratio"
        )


def left_out(datasets: Iterable[Dataset], most: int = 20) -> list[tuple[str, str]]:
    """Return what datasets leave out, as (file, reason), for the report of a run; beyond `most` only the number."""
    found = list(dict.fromkeys(one for dataset in datasets for one in dataset.left_out))
    more = [(f"{len(found) - most:,} more", "`uniref-fast data check` lists all")] if len(found) > most else []
    return [*found[:most], *more]


def _format_of(reader: Reader, columns: Columns) -> Format | None:
    """Return the format of a file; None if no row can be read."""
    rows = reader.keys(SAMPLE)
    if not rows:
        return None
    try:
        form = columns.format(frozenset().union(*rows))
    except ValueError as error:
        alone = set()  # formats of single rows, so that one row with a stray key does not spoil the file
        for keys in rows:
            with contextlib.suppress(ValueError):
                alone.add(columns.format(keys))
        if len(alone) != 1:
            several = f"rows of several formats ({', '.join(sorted(map(str, alone)))}); " if alone else ""
            raise BrokenFileError(reader.name, f"{several}{error}") from None
        (form,) = alone
    if isinstance(reader, ParquetReader):
        # also unknown columns that may hold images: their rows are refused, not read without these images
        reader.select(lambda key, images: form.role(key) is not None or (images and key not in form.unread))
    return form


def _names_file(raw: RawRow, path: str) -> bool:
    """Return True if a text in a row is the path of a file."""
    try:
        raw.find(path)
    except (ValueError, OSError):
        return False
    return True


def _source(name: str, value: Any, raw: RawRow) -> ImageSource:
    """Return the image of a value: a path, bytes, or {"bytes": ..., "path": ...}, where bytes are preferred."""
    path, data = value, None
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
        name = f"{name} ({printable(path)})" if path else name
    elif isinstance(value, bytes):
        data = value
    if isinstance(data, bytes):
        return ImageSource(name, data=data)
    if isinstance(path, str) and data is None:
        return raw.find(path)
    raise ValueError(f'{name} must be a path or, in parquet, bytes or {{"bytes", "path"}}; got {value!r:.80}')


def _artworks(scene: Mapping[str, Any] | None, raw: RawRow) -> dict[str, ImageSource]:
    """Return the existing images of a scene's objects by path. The scene is checked where it is used, not here."""
    if scene is None:
        return {}
    others = scene.get("references")
    found: dict[str, ImageSource] = {}
    for image in (scene, *(others if isinstance(others, list) else ())):
        objects = image.get("objects") if isinstance(image, dict) else None
        for placed in objects if isinstance(objects, list) else ():
            path = placed.get("artwork") if isinstance(placed, dict) else None
            if isinstance(path, str) and path not in found:
                with contextlib.suppress(ValueError, OSError):
                    found[path] = raw.find(path)
    return found
