"""Journal of an evaluation: `rows.jsonl`, with a line for the settings and then a line for each evaluated row.

Each line is on the disk before the next row is evaluated, so that an interrupted evaluation can continue.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uniref_fast.evaluation.config import current_names
from uniref_fast.files import append_line

__all__ = ["Journal", "differing"]


class Journal:
    """The journal of a folder, opened or begun; an incomplete last line, left by a kill, is removed.

    Attributes:
        rows: Records by (file, index); the last one if a row has several.

    Raises:
        ValueError: The folder holds other files or an evaluation with other settings, or a line is damaged.
        OSError: The journal cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "rows.jsonl"
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        self._weights: str | None = None
        if not self.path.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no evaluation; name a new or an empty folder")
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self._begin(folder, settings)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another evaluation is writing {folder}; wait for it, or name another folder") from None
        lines = self._lines()
        begun = bool(lines) and (any("row" in line for line in lines) or (folder / "images").exists())
        if begun:
            changed = differing(current_names(lines[0]["settings"]), settings)
            if changed:
                raise ValueError(
                    f"{folder} holds an evaluation with other settings: {'; '.join(changed)}; give the same "
                    "settings to continue it, or name another folder"
                )
            for line in lines[1:]:
                self._weights = line.get("weights", self._weights)
                if "row" in line:
                    self._take(line["row"])
        if not begun:  # no row was evaluated, for example after a wrong --model
            self._file.truncate(0)
            self._append({"settings": settings}, "the settings of the evaluation")

    def check_weights(self, digest: str) -> None:
        """Raise ValueError if the evaluation was begun with other weights."""
        if self._weights not in (None, digest):
            raise ValueError(
                f"the weights of the model have changed since {self.path.parent} was begun; name another folder"
            )
        if self._weights is None:
            self._append({"weights": digest}, "the digest of the weights")
            self._weights = digest

    def add(self, record: dict[str, Any]) -> None:
        """Append a row's record; it is on the disk when this returns."""
        self._append({"row": record}, "the record of a row")
        self._take(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Close the journal; after an error before the first row, remove it, as nothing was evaluated."""
        if kind is not None and not self.rows and not (self.path.parent / "images").exists():
            self.path.unlink(missing_ok=True)
        self.close()

    def _take(self, record: dict[str, Any]) -> None:
        self.rows[record["file"], record["index"]] = record

    def _append(self, line: Mapping[str, Any], name: str) -> None:
        append_line(self._file, line, name, sync=True)

    def _lines(self) -> list[dict[str, Any]]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        found = []
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            keys = ("settings",) if number == 1 else ("row", "weights")
            if not isinstance(line, dict) or not any(key in line for key in keys):
                raise ValueError(
                    f"{self.path}, line {number} is damaged: {text[:60]!r}; remove the line, or the whole folder"
                )
            found.append(line)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return found


def differing(before: Any, after: Any, name: str = "") -> list[str]:
    """Return the differences between two JSON values, as "judge.model: 'a' -> 'b'"."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = dict.fromkeys((*before, *after))
        return [line for key in keys for line in differing(before.get(key), after.get(key), f"{name}.{key}".strip("."))]
    before, after = (list(value) if isinstance(value, tuple) else value for value in (before, after))
    return [] if before == after else [f"{name or 'settings'}: {before!r} -> {after!r}"]
