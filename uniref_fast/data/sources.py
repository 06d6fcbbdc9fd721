"""Sources of rows: the search of the given files and folders, and the choice of a reader for each file."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniref_fast.data.archives import TarReader, ZipReader
from uniref_fast.data.columns import Columns
from uniref_fast.data.formats import IMAGE_SUFFIXES
from uniref_fast.data.pairs import Pairs, PairsReader, configured, is_backend_list, pairs_of
from uniref_fast.data.readers import (
    BOM,
    BrokenFileError,
    CsvReader,
    JsonlReader,
    JsonReader,
    ParquetReader,
    Reader,
    RowGroupCache,
    from_json,
    present_keys,
    printable,
)

__all__ = ["ENDINGS", "SAMPLE", "Source", "find_sources", "open_reader"]

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".tar", ".tar.gz", ".tgz", ".zip")
CONFIGURATIONS = (".toml", ".yaml", ".yml")  # configuration files of other programs
# Files that may hold rows too, with advice. In a folder they are reported instead of skipped silently.
NEAREST = (
    ((".tsv", ".xlsx"), "save the table as .csv, in UTF-8"),
    ((".arrow", ".feather"), "write it as .parquet, for example datasets.load_from_disk(FOLDER).to_parquet(FILE)"),
    ((".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"), "unpack it; only .tar.gz, .tgz and .zip are read compressed"),
    ((".tfrecord", ".lmdb", ".mdb", ".h5", ".hdf5", ".npz", ".pkl", ".db", ".sqlite"),
     "write its rows as .jsonl with the images as files, or as .parquet with the images as bytes"),
)  # fmt: skip
DESCRIPTION = "made.json"  # description of a dataset that `uniref-fast data make` writes beside the rows
UNREAD = (*(ending for endings, _ in NEAREST for ending in endings), ".toml")
SAMPLE = 1000  # rows that are read to recognise a file's format: some must have its keys


@dataclass(frozen=True)
class Source:
    """A file or folder that holds rows.

    Attributes:
        path: Path of the file, or of the folder of targets for captioned images.
        name: Name in messages.
        named: True if the user named it, not a folder around it.
        pairs: Folders of captioned images, or None.
    """

    path: Path
    name: str
    named: bool
    pairs: Pairs | None = None
    given: int = 0


def find_sources(paths: Sequence[Path | Pairs]) -> tuple[list[Source], list[tuple[str, str]]]:
    """Return everything that holds rows, in order, and (name, reason) of what is left out.

    Raises:
        ValueError: A path does not exist or is of an unknown kind, or a file occurs twice.
        BrokenFileError: A configuration cannot be followed.
    """
    if not paths:
        raise ValueError("no paths given")
    found: list[tuple[Path, Path, bool, Pairs | None]] = []  # file, shortest name, named, pairs
    left_out: list[tuple[str, str]] = []
    given: list[int] = []  # number of the path, for each file found
    for number, path in enumerate(paths):
        if isinstance(path, Pairs):
            found.append(_of_pairs(path))
        elif path.is_dir():
            found += _in_folder(path, left_out)
        elif not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        elif path.is_file() and (_ends(path, CONFIGURATIONS) or (_ends(path, (".json",)) and _is_configuration(path))):
            found += _in_configuration(path, left_out)
        elif not path.is_file() or not _ends(path, ENDINGS):
            known = ", ".join((*ENDINGS, *CONFIGURATIONS))
            advice = next((f"; {advice}" for endings, advice in NEAREST if path.is_file() and _ends(path, endings)), "")
            raise ValueError(f"{path} is not a file of rows; known endings: {known}{advice}")
        else:
            found.append((path, Path(path.name), True, None))
        given += [number] * (len(found) - len(given))
    twice = [str(file) for file, count in Counter(file.resolve() for file, *_ in found).items() if count > 1]
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}; its rows would count twice")
    names = map(printable, _distinct_names([(file, short) for file, short, *_ in found]))
    sources = zip(found, names, given, strict=True)
    return [Source(file, name, asked, pairs, number) for (file, _, asked, pairs), name, number in sources], left_out


def _of_pairs(pairs: Pairs) -> tuple[Path, Path, bool, Pairs | None]:
    if pairs.jsonl is not None:
        return pairs.jsonl, Path(pairs.jsonl.name), True, None
    return pairs.targets, Path(pairs.targets.absolute().name), True, pairs


def _in_folder(folder: Path, left_out: list[tuple[str, str]]) -> list[tuple[Path, Path, bool, Pairs | None]]:
    inside, captioned = _files_in(folder)
    rows: list[Path] = []
    others: list[Path] = []
    for file in inside:
        if not _is_description(file):
            (rows if _ends(file, ENDINGS) and not _is_configuration(file) else others).append(file)
    left_out += [(printable(file.relative_to(folder)), _why_unread(file)) for file in others]
    if rows:
        why = "has captioned images, which are not read beside files of rows; name their folder to read them"
        left_out += [(printable(place.relative_to(folder)), why) for place in captioned]
        return [(file, file.relative_to(folder), False, None) for file in rows]
    try:
        return [_of_pairs(pairs_of(folder))]
    except ValueError as error:
        there = "".join(f"; {printable(file.name)} {_why_unread(file)}" for file in others[:3])
        raise ValueError(f"folder {folder} has no file of rows ({', '.join(ENDINGS)}){there}; {error}") from None


def _why_unread(file: Path) -> str:
    if _ends(file, (".json", *CONFIGURATIONS)):
        return "is a configuration of another program; name the file to read the folders in it"
    return f"is not read: {next(advice for endings, advice in NEAREST if _ends(file, endings))}"


def _in_configuration(path: Path, left_out: list[tuple[str, str]]) -> list[tuple[Path, Path, bool, Pairs | None]]:
    name = printable(path.name)
    try:
        found = configured(path, _parsed(path))
    except ValueError as error:
        raise BrokenFileError(name, error) from None
    left_out += [(name, note) for note in found.notes]
    return [_of_pairs(pairs) for pairs in found.pairs]


def _parsed(path: Path) -> Any:
    """Return the parsed content of a configuration file. Raises ValueError."""
    content = path.read_bytes()
    if _ends(path, (".json",)):
        return from_json(content)
    if _ends(path, (".toml",)):
        try:
            import tomllib
        except ImportError:
            raise ValueError("reading .toml needs Python 3.11 or newer") from None
        return tomllib.loads(content.decode("utf-8"))
    import yaml

    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None


def _is_configuration(path: Path) -> bool:
    """Return True if a .json file is a list of SimpleTuner's backends."""
    if not _ends(path, (".json",)) or path.stat().st_size > 1 << 20:
        return False
    with contextlib.suppress(ValueError):
        return is_backend_list(from_json(path.read_bytes()))
    return False


def _is_description(path: Path) -> bool:
    """Return True if a file is the description that `uniref-fast data make` writes beside its rows."""
    if path.name != DESCRIPTION:
        return False
    with contextlib.suppress(ValueError):
        values = from_json(path.read_bytes())
        return isinstance(values, dict) and "made_by" in values
    return False


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


# ---- readers ----


def open_reader(source: Source, folder: Path, cache: RowGroupCache, columns: Columns) -> Reader | str:
    """Return the reader of a source, or the reason why it holds no rows."""
    path, name = source.path, source.name
    if source.pairs is not None:
        return PairsReader(source.pairs, name)
    if _ends(path, (".json",)):
        return json_reader(path, name, folder, columns)
    if _ends(path, (".csv",)):
        table = CsvReader(path, name, folder)
        if not source.named and not _are_rows([dict.fromkeys(table.columns, "")], columns):
            return f"is a table whose columns match no known format: {', '.join(table.columns[:8])}"
        return table
    if _ends(path, (".parquet",)):
        return ParquetReader(path, name, folder, cache)
    if _ends(path, (".zip",)):
        return ZipReader(path, name, folder)
    return (
        TarReader(path, name, folder) if _ends(path, (".tar", ".tar.gz", ".tgz")) else JsonlReader(path, name, folder)
    )


def json_reader(path: Path, name: str, folder: Path, columns: Columns) -> Reader | str:
    """Return the reader of a .json file: a list of rows, an object with such a list, one row, or a row per line."""
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
            return "holds a JSON list without objects; each row must be an object"
        return JsonReader(path, name, folder, content=parsed)
    if not isinstance(parsed, dict):
        return f"must hold a JSON list of rows, got {type(parsed).__name__}"
    if _are_rows([parsed], columns):
        return JsonReader(path, name, folder, content=parsed)
    keys = [key for key, value in parsed.items() if isinstance(value, list) and _are_rows(value, columns)]
    if len(keys) > 1:
        raise BrokenFileError(name, f"has rows under several keys, {', '.join(keys)}; write each list as its own file")
    if keys:
        return JsonReader(path, name, folder, keys[0], parsed)
    shown = ", ".join(map(repr, list(parsed)[:6])) or "empty"
    return f"holds a JSON object ({shown}) that is not a row of a known format, and none of its keys has a list of rows"


def _are_rows(values: Sequence[Any], columns: Columns) -> bool:
    """Return True if the objects among the values have keys of a known format, at least one of them for images."""
    keys = frozenset[str]().union(*(present_keys(value) for value in values[:SAMPLE] if isinstance(value, dict)))
    try:
        form = columns.format(keys)
    except ValueError:
        return False
    return any(form.owns(key) for key in keys)


# ---- files ----


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return files that hold rows or may do so, and folders of images with captions, at any depth."""

    def stop(error: OSError) -> None:
        raise error

    found, captioned, seen = [], [], set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = [name for name in files if not name.startswith(".")]
        found += [Path(place, name) for name in visible if name.lower().endswith(ENDINGS + UNREAD)]
        texts = {name[:-4] for name in visible if name.lower().endswith(".txt")}
        if any(Path(name).stem in texts for name in visible if name.lower().endswith(IMAGE_SUFFIXES)):
            captioned.append(Path(place))
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix()), captioned


def _distinct_names(found: Sequence[tuple[Path, Path]]) -> list[str]:
    """Return the shortest ends of the paths that distinguish all files, so that names do not depend on the location."""
    parts = [file.absolute().parts for file, _ in found]
    least = [len(short.parts) for _, short in found]
    for more in itertools.count():
        names = ["/".join(whole[-(short + more) :]) for whole, short in zip(parts, least, strict=True)]
        if len(set(names)) == len(names) or more > max(map(len, parts)):
            return names
    raise AssertionError("unreachable")
