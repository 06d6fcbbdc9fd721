"""Notes about rows that can be used, but will probably disappoint; `uniref-fast data check` lists them.

A note is not an error: every command reads such a row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniref_fast.data.dataset import Row

__all__ = ["KINDS", "TRAINED_REFERENCES", "Note", "Notes", "mask_notes", "pictures_named", "row_notes"]

TRAINED_REFERENCES = 3
"""Largest number of references that Qwen-Image-Edit-2509 and 2511 were trained with."""

DIM = 0.5  # weight that the largest one of a mask should reach; masks of labels 0 and 1 are nearly black
SMALLEST = 16  # pixels; a token of the transformer covers 16 x 16 of them
KINDS = {
    "picture_number": "row(s) name a picture that they do not have",
    "many_references": f"row(s) have more references than the {TRAINED_REFERENCES} that Qwen-Image-Edit-2509 and 2511 "
    "were trained with; train on such rows before you edit with them",
    "small_image": f"row(s) have an image with a side under {SMALLEST} pixels, too small to show anything",
    "dim_mask": "row(s) have a mask that is nowhere white",
    "unread_key": "row(s) have a key that no command reads",
    "empty_file": "file(s) have no rows",
}
"""Description of each kind of note; the number of rows or files precedes it."""

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
CHINESE = "一二三四五六七八九十"
WORD = r"(?:picture|image|photo|photograph|figure|img|pic)"
NUMBER = r"\d{1,2}(?![0-9A-Za-z_%]|\.\d)"
SINGULAR = re.compile(rf"(?<![a-z]){WORD}(?:\s+(?:no\.?|number))?[\s_#-]*({NUMBER})", re.IGNORECASE)
PLURAL = re.compile(rf"(?<![a-z]){WORD}s\s+({NUMBER}(?:[\s,]*(?:,|and|or|&|to|-)\s*{NUMBER})*)", re.IGNORECASE)
ORDINAL = re.compile(
    rf"(?<![a-z])({'|'.join(ORDINALS)}|\d{{1,2}}(?:st|nd|rd|th))[\s-]+(?:(?:reference|input|source|given)\s+)?{WORD}"
    "(?![a-z])",
    re.IGNORECASE,
)
# not a map, a screenshot, an intention, ...; a numeral before a measure word counts things: 图三个
CHINESE_NUMBER = re.compile(
    r"(?<![地截意企拼插草蓝版力])图(?:片|像)?\s*(\d{1,2}(?!\d)|[一二三四五六七八九](?![个张只条种次点样些份层分]))"
)
CHINESE_ORDINAL = re.compile(r"第\s*(\d{1,2}|[一二三四五六七八九十])\s*[张幅个]?\s*(?:参考|输入|原)?(?:图|照片|相片)")


@dataclass(frozen=True)
class Note:
    """Note about a row or a file.

    Attributes:
        kind: Key of `KINDS`.
        where: Place of the row, or name of the file.
        text: Description of what was found there.
    """

    kind: str
    where: str
    text: str


@dataclass
class Notes:
    """Notes of a dataset, by kind."""

    found: dict[str, list[Note]] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)  # number of rows by key that is not read

    def add(self, notes: Iterable[Note]) -> None:
        """Add notes about rows or files."""
        for note in notes:
            self.found.setdefault(note.kind, []).append(note)

    def add_keys(self, keys: Iterable[str], rows: int = 1) -> None:
        """Add the keys of a row that no command reads."""
        for key in keys:
            self.keys[key] = self.keys.get(key, 0) + rows

    def facts(self, show: int) -> list[dict[str, Any]]:
        """Return kind, count, description and the first `show` places of each kind, as JSON values.

        A key that is not read is an entry of its own.
        """
        facts: list[dict[str, Any]] = []
        for kind, text in KINDS.items():
            notes = self.found.get(kind, [])
            if notes:
                examples = [{"where": note.where, "note": note.text} for note in notes[:show]]
                count = len({note.where for note in notes})
                facts.append({"kind": kind, "count": count, "note": text, "examples": examples})
        for key, count in sorted(self.keys.items()):
            text = f"{KINDS['unread_key']}: {key!r}{_advice(key)}"
            facts.append({"kind": "unread_key", "count": count, "note": text, "examples": []})
        return facts


def row_notes(row: Row, target: tuple[int, int] | None, references: Sequence[tuple[int, int]]) -> list[Note]:
    """Return the notes about a row.

    Args:
        row: The row.
        target: Width and height of its target in pixels; None if it has no target.
        references: Widths and heights of its references in pixels.
    """
    notes = []
    count = len(references)
    has = f"the row has {count or 'no'} reference{'' if count == 1 else 's'}"
    for number in sorted(pictures_named(row.instruction)):
        if number == 0:
            notes.append(
                Note("picture_number", row.where, "the instruction names picture 0; the first one is picture 1")
            )
        elif number > count:
            notes.append(Note("picture_number", row.where, f"the instruction names picture {number}; {has}"))
    if count > TRAINED_REFERENCES:
        notes.append(Note("many_references", row.where, has))
    images = [*zip(row.references, references, strict=True)]
    if row.target is not None and target is not None:
        images.append((row.target, target))
    for source, (width, height) in images:
        if min(width, height) < SMALLEST:
            notes.append(Note("small_image", row.where, f"{source.name} is {width} x {height} pixels"))
    return notes


def mask_notes(row: Row, brightest: float) -> list[Note]:
    """Return the notes about the mask of a row, from the largest weight of its pixels."""
    if brightest >= DIM:
        return []
    text = f"its brightest pixel is {round(brightest * 255)} of 255; store 255 for what is trained in full"
    return [Note("dim_mask", row.where, text)]


def pictures_named(text: str) -> set[int]:
    """Return the numbers of pictures that an instruction in English or Chinese names, such as "picture 3" or "图3"."""
    found = {int(match) for match in SINGULAR.findall(text)}
    for match in PLURAL.findall(text):
        found |= set(map(int, re.findall(r"\d+", match)))
    for match in ORDINAL.findall(text):
        found.add(int(match[:-2]) if match[0].isdigit() else ORDINALS.index(match.lower()) + 1)
    for match in (*CHINESE_NUMBER.findall(text), *CHINESE_ORDINAL.findall(text)):
        found.add(CHINESE.index(match) + 1 if match in CHINESE else int(match))
    return found


def _advice(key: str, known: Collection[str] = ("task_type", "key", "language", "scene")) -> str:
    """Return a suggestion for a key that is not read and resembles a known one."""
    near = [name for name in known if name.startswith(f"{key.lower()}_")]
    near = near or get_close_matches(key.lower(), known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}? Rename it, or give its role with --columns {near[0]}={key}" if near else ""
