"""Conversion of any readable data to rows with the canonical keys: `uniref-fast data convert`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from uniref_fast.data.dataset import Dataset, Row, RowError
from uniref_fast.data.images import ImageSource
from uniref_fast.files import created_folders, write_whole

__all__ = ["convert"]


class _NoRowsError(Exception):
    """All rows are broken, so that no file is written."""


def convert(dataset: Dataset, out: Path) -> tuple[int, list[RowError]]:
    """Write the rows of a dataset to a .jsonl file; images in archives or columns become files beside it.

    Images that are files stay in place; paths inside the folder of `out` are written relative to it.

    Args:
        dataset: The dataset to convert.
        out: The file to write. It appears when it is complete, unless all rows are broken; its images go to the folder
            `<name>_images` beside it.

    Returns:
        The number of rows written, and the errors of the rows that are left out because they cannot be used.

    Raises:
        FileExistsError: The file or its folder of images exists already.
        OSError: A file cannot be written; everything written so far is removed.
    """
    images = out.with_name(f"{out.stem}_images")
    for path in (out, images):
        if path.exists():
            raise FileExistsError(f"{path} exists already; name another file or move it away")
    broken: list[RowError] = []
    written = 0

    def lines() -> Iterator[bytes]:
        nonlocal written
        for index in range(len(dataset)):
            try:
                row = dataset[index]
                row.sizes()
                line = json.dumps(_values(row, index, out.parent, images), ensure_ascii=False)
            except RowError as error:
                broken.append(error)
                continue
            written += 1
            yield line.encode("utf-8") + b"\n"

    def write(file: BinaryIO) -> None:
        file.writelines(lines())
        if broken and not written:
            raise _NoRowsError

    with contextlib.suppress(_NoRowsError), created_folders(out.parent):
        try:
            write_whole(out, write)
        except BaseException:
            shutil.rmtree(images, ignore_errors=True)
            raise
    return written, broken


def _values(row: Row, index: int, folder: Path, images: Path) -> dict[str, Any]:
    def path_of(source: ImageSource, number: str) -> str:
        if source.path is None or source.length is not None:
            images.mkdir(parents=True, exist_ok=True)
            path = images / f"{index:08}_{number}{source.suffix()}"
            path.write_bytes(source.read())
        else:
            path = Path(os.path.abspath(source.path))
        inside = path.absolute().is_relative_to(folder.absolute())
        text = os.path.relpath(path, folder) if inside else str(path)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(row.where, f"the path {text!r} is not UTF-8; rename the file") from None
        return text

    values: dict[str, Any] = {
        "input_images": [path_of(source, str(number)) for number, source in enumerate(row.references)],
        "output_image": None if row.target is None else path_of(row.target, "out"),
        "instruction": row.instruction,
    }
    if row.mask is not None:
        values["mask"] = path_of(row.mask, "mask")
    values |= {name: getattr(row, name) for name in ("task_type", "key", "scene") if getattr(row, name) is not None}
    return values
