"""Archives of samples in the layout of webdataset (.tar, .tar.gz, .tgz, .zip).

Members whose names are equal up to the first dot are one sample. A sample is a row if it has `KEY.json`, `KEY.txt`,
`KEY.input_N.*` or `KEY.output.*`. Its JSON either names members (of any sample, relative to it or to the top of the
archive) under the keys of a known format, or has no images. In the second case the images are `KEY.input_0.png`,
`KEY.input_1.jpg`, ... and `KEY.output.png`, a mask of the target is `KEY.mask.png`, and the instruction is in the JSON
or in `KEY.txt`. Keys may have dots:
`v1.5_002.output.png` belongs to the sample `v1.5_002`.

Nothing is extracted: a member is a range of bytes in the archive, or is decompressed in memory when it is read. A
compressed tar is decompressed once, into a temporary file that is removed at the end of the process. Links, devices and
sparse members are never followed. Hidden members (`._name`) are skipped; other members that no sample uses are counted
(`unused`).
"""

from __future__ import annotations

import atexit
import functools
import gzip
import os
import posixpath
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from uniref_fast.data.formats import IMAGE_SUFFIXES, MASK_KEYS, TEXT_KEYS, is_image_key
from uniref_fast.data.images import ImageSource
from uniref_fast.data.readers import BOM, BrokenFileError, RawRow, Reader, from_json, printable

__all__ = ["TarReader", "ZipReader"]

LARGEST = 1 << 30  # bytes of the largest member of a zip, which is decompressed in memory

NUMBERED = re.compile(r"input_(\d+)\.\w+")
OUTPUT = re.compile(r"output\.\w+")
MASK = re.compile(r"mask\.\w+")
DOTTED = re.compile(r"(.+?)\.(json|txt|input_\d+\.\w+|output\.\w+)")  # rest of a name whose key contains a dot


class _Member(NamedTuple):
    offset: int
    length: int
    problem: str | None  # reason why it must not be read


class TarReader(Reader):
    """Reader of the samples of a tar, in the order of their first members; indexed in one pass over the headers."""

    def __init__(self, path: Path, name: str, folder: Path) -> None:
        super().__init__(path, name, folder)
        self._file = path  # file whose ranges the members are
        self._members: dict[str, _Member] = {}
        parts: dict[str, list[str]] = {}
        for member_name, member in self._index():
            if member_name in self._members:
                member = member._replace(problem="occurs twice in the archive")
            self._members[member_name] = member
        for key, end in _keys_and_ends(self._members):
            parts.setdefault(key, []).append(end)
        self._parts = {key: ends for key, ends in parts.items() if any(map(_is_row_part, ends))}
        self._samples = list(self._parts)
        if self._members and not self._samples:
            tables = [member for member in self._members if member.lower().endswith((".jsonl", ".csv", ".parquet"))]
            advice = f"; unpack it and give the folder, so that {printable(tables[0])} is read" if tables else ""
            raise BrokenFileError(
                name, f"has {len(self._members)} members but no sample (.json, .txt, .input_N.* or .output.*){advice}"
            )
        self._others = Counter(
            _kind(f"{key}.{end}" if end else key)
            for key, ends in parts.items()
            for end in ends
            if key not in self._parts or not _is_row_part(end)
        )
        self._named: set[str] = set()  # kinds of members that the JSON of some sample names

    def __len__(self) -> int:
        return len(self._samples)

    def unused(self) -> tuple[str, ...]:
        """Return a sentence about members of kinds that no JSON names, in the samples read so far."""
        others = Counter({kind: count for kind, count in self._others.items() if kind not in self._named})
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(6))
        return (f"{others.total():,} members are read only if a JSON file names them: {kinds}",) if others else ()

    def place(self, number: int) -> str:
        return f"{self.name}:{printable(self._samples[number])}"

    def read(self, number: int) -> RawRow:
        key = self._samples[number]
        ends = self._parts[key]
        for end in ends:
            self._member(
                f"{key}.{end}" if end else key
            )  # raises for links and similar members, also if the JSON does not name them
        values = from_json(self._source(f"{key}.json").read()) if "json" in ends else {}
        if not isinstance(values, dict):
            raise ValueError(f"{key}.json must hold a JSON object, got {type(values).__name__}")
        if "txt" in ends:
            values = _with_text(values, self._source(f"{key}.txt").read())
        if any(is_image_key(name) and value is not None for name, value in values.items()):
            self._check_all_named(key, values)
            return RawRow(values, functools.partial(self._find_beside, posixpath.dirname(key)))
        row = _with_members(values, key, ends)
        self._named |= {_kind(f"{key}.{end}") for end in ends if MASK.fullmatch(end)}
        return RawRow(row, self._source)  # members by their full names

    def _check_all_named(self, key: str, values: Mapping[str, Any]) -> None:
        """Raise ValueError if the JSON leaves out an image of its sample, which would be dropped silently."""
        named, folder = set(), posixpath.dirname(key)
        for name, value in values.items():
            items = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
            if is_image_key(name) or name in MASK_KEYS:
                named |= {self._member_named(folder, item) for item in items}
            else:  # the options of the user may say that the key holds an image
                paths = [item.replace("\\", "/") for item in items]
                named |= {posixpath.normpath(path) for item in paths for path in (item, posixpath.join(folder, item))}
        named &= self._members.keys()
        self._named |= set(map(_kind, named))
        for end in self._parts[key]:
            if any(part.fullmatch(end) for part in (NUMBERED, OUTPUT, MASK)) and f"{key}.{end}" not in named:
                raise ValueError(f"member {key}.{end} is not named by {key}.json, which names other members")

    def _member_named(self, folder: str, path: str) -> str:
        if path not in self._members:
            path = path.replace("\\", "/")
        inside = posixpath.normpath(path)
        if not path or posixpath.isabs(path) or inside.split("/")[0] == "..":
            raise ValueError(f"path {path!r} is not inside the archive; name a member")
        beside = posixpath.join(folder, inside)
        return beside if beside in self._members else inside

    def _find_beside(self, folder: str, path: str) -> ImageSource:
        return self._source(self._member_named(folder, path))

    def _member(self, name: str) -> _Member:
        member = self._members.get(name)
        if member is None:
            raise ValueError(f"no member {name!r} in the archive")
        if member.problem:
            raise ValueError(f"member {name!r} {member.problem}")
        return member

    def _source(self, name: str) -> ImageSource:
        member = self._member(name)
        return ImageSource(printable(name), self._file, member.offset, member.length)

    def _index(self) -> list[tuple[str, _Member]]:
        """Return name and place of every member in order, without folders and hidden files."""
        if self.path.suffix.lower() in (".gz", ".tgz"):
            self._file = _decompressed(self.path, self.name)
        try:
            return _tar_index(self._file, self.name)
        except BrokenFileError:
            if self._file != self.path:
                self._file.unlink()
            raise


class ZipReader(TarReader):
    """Reader of the samples of a zip. A member is decompressed in memory when it is read; its checksum is compared."""

    def _index(self) -> list[tuple[str, _Member]]:
        self._packed: dict[str, tuple[int, int]] = {}  # stored size and checksum of each member
        found: list[tuple[str, _Member]] = []
        if not self.path.stat().st_size:
            raise BrokenFileError(self.name, "cannot be read as a zip: the file is empty")
        try:
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    name = posixpath.normpath(info.filename)
                    if info.is_dir() or posixpath.basename(name).startswith("."):
                        continue
                    self._packed[name] = info.compress_size, info.CRC
                    found.append((name, _Member(info.header_offset, info.file_size, _zip_problem(info))))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
            raise BrokenFileError(self.name, f"cannot be read as a zip: {error}") from error
        return found

    def _source(self, name: str) -> ImageSource:
        member = self._member(name)
        packed, checksum = self._packed[name]
        with open(self.path, "rb") as file:
            file.seek(member.offset)
            header = file.read(30)  # its end has the lengths of the name and of the extra field, which follow
            if len(header) < 30 or header[:4] != b"PK\3\4":
                raise ValueError(f"member {name!r} is not at the place that the directory of the zip states")
            file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
            content = file.read(packed)
        if header[8:10] != b"\0\0":  # the method: stored or deflated, see `_zip_problem`
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.length + 1)
            except zlib.error as error:
                raise ValueError(f"member {name!r} is damaged: {error}") from None
        if len(content) != member.length or zlib.crc32(content) != checksum:
            raise ValueError(f"member {name!r} is damaged: its size or checksum differs from the directory of the zip")
        return ImageSource(printable(name), data=content)


def _decompressed(path: Path, name: str) -> Path:
    """Decompress a tar into a temporary file, which is removed when the process ends."""
    handle, temporary = tempfile.mkstemp(prefix="uniref-fast-", suffix=".tar")
    atexit.register(Path(temporary).unlink, missing_ok=True)
    try:
        with os.fdopen(handle, "wb") as temporary_file, gzip.open(path) as file:
            shutil.copyfileobj(file, temporary_file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        Path(temporary).unlink()
        raise BrokenFileError(name, f"cannot be decompressed: {error}") from error
    except OSError as error:
        Path(temporary).unlink()
        raise OSError(error.errno, f"{name} cannot be decompressed into {tempfile.gettempdir()}: {error.strerror}"
                      ) from error  # fmt: skip
    return Path(temporary)


def _zip_problem(info: zipfile.ZipInfo) -> str | None:
    if posixpath.isabs(info.filename) or ".." in info.filename.split("/"):
        return "has a name that leaves the archive"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link, which is not followed; store the file itself"
    if info.flag_bits & 1:
        return "is encrypted; store it without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed with method {info.compress_type}; compress it with deflate"
    return f"is larger than {LARGEST:,} bytes" if info.file_size > LARGEST else None


def _tar_index(path: Path, name: str) -> list[tuple[str, _Member]]:
    """Return name and place of every member in order, without folders and hidden files."""
    found = []
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                member_name = posixpath.normpath(info.name)
                if info.isdir() or posixpath.basename(member_name).startswith("."):
                    continue
                found.append((member_name, _Member(info.offset_data, info.size, _problem(info))))
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise BrokenFileError(name, f"cannot be read as a tar without compression: {error}") from error
    with open(path, "rb") as file:
        # tarfile treats a damaged header as the end
        file.seek(end)
        if file.read(512) != bytes(512):
            raise BrokenFileError(name, f"is damaged or truncated: no end mark and no member header at byte {end}")
        while block := file.read(2**20):
            if block.strip(b"\0"):
                raise BrokenFileError(
                    name,
                    f"has data after its end mark at byte {end}; if several tars were concatenated, pack them as one",
                )
    size = os.path.getsize(path)
    if any(member.offset + member.length > size for _, member in found):
        raise BrokenFileError(name, "is truncated")
    return found


def _problem(info: tarfile.TarInfo) -> str | None:
    if posixpath.isabs(info.name) or ".." in info.name.split("/"):
        return "has a name that leaves the archive"
    if info.issym() or info.islnk():
        return f"is a link (to {info.linkname!r}), which is not followed; store the file itself"
    if not info.isreg() or info.issparse():
        return "is not a plain file; store plain files only"
    return None


def _split(name: str) -> tuple[str, str]:
    """Split the name of a member into the sample's key and the rest after the first dot of the base name."""
    folder, base = posixpath.split(name)
    stem, _, end = base.partition(".")
    return posixpath.join(folder, stem), end


def _keys_and_ends(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the sample's key and the rest of each name.

    The key ends at the first dot, unless the part before a later dot is a sample itself: one with images, or one whose
    name up to the first dot is not a sample.
    """
    split = [(name, *_split(name)) for name in names]
    plain = {key for _, key, end in split if _is_row_part(end)}
    dotted = set()
    for _, key, end in split:
        if (match := DOTTED.fullmatch(end)) and (key not in plain or match[2] not in ("json", "txt")):
            dotted.add(f"{key}.{match[1]}")
    found = []
    for name, key, end in split:
        at = len(name)
        while (at := name.rfind(".", len(key) + 1, at)) > 0:  # the longest key first
            if name[:at] in dotted:
                key, end = name[:at], name[at + 1 :]
                break
        found.append((key, end))
    return found


def _kind(name: str) -> str:
    """Return the kind under which a member is counted: up to two last parts of its suffix, such as ".mask.png"."""
    parts = posixpath.basename(name).split(".")[1:][-2:]
    return f".{'.'.join(parts)}" if parts else "without a suffix"


def _is_row_part(end: str) -> bool:
    return end in ("json", "txt") or bool(NUMBERED.fullmatch(end) or OUTPUT.fullmatch(end))


def _with_text(values: dict[str, Any], content: bytes) -> dict[str, Any]:
    """Return the row with the text of its .txt; a text in the JSON must be equal."""
    try:
        text = content.removeprefix(BOM).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("its .txt is not UTF-8") from None
    given = [values[key] for key in TEXT_KEYS if values.get(key) is not None]
    if any(isinstance(other, str) and other.strip() != text for other in given):
        raise ValueError("its .json and its .txt have different instructions")
    return values if given else {**values, "instruction": text}


def _with_members(values: Mapping[str, Any], key: str, ends: list[str]) -> dict[str, Any]:
    """Return a canonical row whose images are the sample's own members."""
    numbered = sorted((int(match[1]), end) for end in ends if (match := NUMBERED.fullmatch(end)))
    outputs = [end for end in ends if OUTPUT.fullmatch(end)]
    masks = [end for end in ends if MASK.fullmatch(end)]
    used = {*(end for _, end in numbered), *outputs, *masks}
    others = [f".{end}" for end in ends if end not in used and f".{end}".lower().endswith(IMAGE_SUFFIXES)]
    if others:
        raise ValueError(
            f"members {others} are neither .input_0, .input_1, ... nor .output or .mask, and no JSON states their role"
        )
    if [number for number, _ in numbered] != list(range(len(numbered))):
        raise ValueError(f"inputs must be .input_0, .input_1, ... once each, got {[f'.{end}' for _, end in numbered]}")
    for several, what in ((outputs, "outputs"), (masks, "masks")):
        if len(several) > 1:
            raise ValueError(f"several {what}: {several}")
    texts = [values[name] for name in TEXT_KEYS if values.get(name) is not None]
    if len(texts) > 1:
        raise ValueError(f"several instructions: {[name for name in TEXT_KEYS if values.get(name) is not None]}")
    row = {name: value for name, value in values.items() if name not in TEXT_KEYS}
    row["input_images"] = [f"{key}.{end}" for _, end in numbered]
    row["output_image"] = f"{key}.{outputs[0]}" if outputs else None
    row["instruction"] = texts[0] if texts else None
    return {**row, "mask": f"{key}.{masks[0]}"} if masks else row
