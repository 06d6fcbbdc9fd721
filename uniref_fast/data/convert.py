"""What `uniref-fast data convert` does: any data that can be read, written as rows under the canonical names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniref_fast.data.dataset import Dataset, Row, RowError
from uniref_fast.data.images import ImageSource
from uniref_fast.files import write_whole

__all__ = ["convert"]


def convert(dataset: Dataset, out: Path) -> tuple[int, list[RowError]]:
    """Write the rows of a data set to a .jsonl file; pictures that lie in archives or columns become files beside it.

    Pictures that are files already stay where they are; paths inside the folder of `out` are written relative to it.

    Args:
        dataset: what is converted.
        out: the file, which appears when all is written; its pictures go to the folder `<name>_images` beside it.

    Returns:
        The number of rows written, and the rows that cannot be used, which are left out.

    Raises:
        FileExistsError: for a file or a folder of pictures that exists already.
        OSError: when something cannot be written; nothing is left then.
    """
    pictures = out.with_name(f"{out.stem}_images")
    for path in (out, pictures):
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
                line = json.dumps(_values(row, index, out.parent, pictures), ensure_ascii=False)
            except RowError as error:
                broken.append(error)
                continue
            written += 1
            yield line.encode("utf-8") + b"\n"

    try:
        write_whole(out, lambda file: file.writelines(lines()))
    except BaseException:
        shutil.rmtree(pictures, ignore_errors=True)
        raise
    return written, broken


def _values(row: Row, index: int, folder: Path, pictures: Path) -> dict[str, Any]:
    def path_of(source: ImageSource, number: str) -> str:
        if source.path is None or source.length is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            path = pictures / f"{index:08}_{number}{source.suffix()}"
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
    values |= {name: getattr(row, name) for name in ("task_type", "key", "scene") if getattr(row, name) is not None}
    return values
