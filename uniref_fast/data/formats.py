"""Names that public data sets give their keys: one table, and how their rows become instruction, references, target."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from uniref_fast.data.readers import ENCODED, from_json, printable

__all__ = [
    "FORMATS",
    "KEYS",
    "PICTURE_SUFFIXES",
    "TEXT_KEYS",
    "Format",
    "Parts",
    "explains",
    "is_picture_key",
    "nearest_key",
    "recognise",
]


@dataclass(frozen=True)
class Format:
    """Which key holds what.

    Attributes:
        name: data sets and programs that use it.
        text: key of the instruction.
        references: key of the references, a list or one; with `#` the keys `control_path_0`, `control_path_1`, ... too.
        target: key of the target; None: rows have none (reinforcement learning); the key of the references: the last of
            them is the target.
        needs: keys beside `text` that some row of the file must have for the file to be of this format.
        finer: key of a text that is taken instead where a row has it.
        task: key of the task where a row has no `task_type`.
        unread: keys that may hold pictures and are not read.
        language: key of the instruction's language.
        common: its keys are words that others use for other things: they mean something in files of this format only.
        more: keys of further references, one picture or a list each, which follow those of `references`.
        key: key of the row's own name; None takes the first of `KEYS` that the row has.
    """

    name: str
    text: str
    references: str
    target: str | None
    needs: tuple[str, ...] = ()
    finer: str | None = None
    task: str | None = None
    unread: tuple[str, ...] = ()
    common: bool = False
    language: str | None = None
    more: tuple[str, ...] = ()
    key: str | None = None

    def owns(self, key: str) -> bool:
        """Whether it is one of the format's keys other than the text."""
        return key in (self.target, self.finer, self.task, *self.needs) or self._holds_references(key)

    def _holds_references(self, key: str) -> bool:
        base = self.references.removesuffix("#")
        numbered = base != self.references and re.fullmatch(rf"{re.escape(base)}_\d+", key) is not None
        return key in (base, *self.more) or numbered

    def role(self, key: str) -> str | None:
        """What a key is read as: "instruction", "references", "target", ...; None for one that is not read."""
        if self.target == self.references and key == self.target:
            return "references, the last is the target"
        names = {self.text: "instruction", self.finer: "instruction", self.target: "target", "task_type": "task type",
                 self.task: "task type", self.language: "language", "scene": "scene"}  # fmt: skip
        names |= {key: "key" for key in ((self.key,) if self.key else KEYS)}
        return "references" if self._holds_references(key) else names.get(key)

    def __str__(self) -> str:
        references, end = self.references.removesuffix("#"), "_0.." if self.references.endswith("#") else ""
        target = {None: "no target", self.references: "the last is the target"}.get(
            self.target, f"target {self.target}"
        )
        needs = "".join(f", {key}" for key in self.needs if key not in (references, self.target))
        return f"{self.name} ({self.text}, references {references}{end}, {target}{needs})"


FORMATS = (
    Format("OmniGen2, UniPic-3, MICo, OmniContext", "instruction", "input_images", "output_image"),
    Format("DyRef, DiffSynth", "prompt", "edit_image", "image", needs=("edit_image",)),
    Format("Flow-Factory", "prompt", "images", None, needs=("images",)),
    Format("Edit-R1", "prompt", "image", None, needs=("image", "requirement")),
    Format("musubi", "caption", "control_path#", "image_path", needs=("image_path",)),
    Format("DanceGRPO, Pref-GRPO", "instruction", "source_image", "target_image", needs=("source_image",)),
    Format("Lumina", "prompt", "image_path", "edit_path", needs=("edit_path",)),
    Format("Echo-4o, Bagel", "instruction_list", "image_list", "image_list", needs=("image_list",)),
    Format("MICo for Bagel", "instruction", "image_list", "image_list", needs=("image_list",)),
    # `reference`, the picture of a bench that people judged right, is one of many right answers, so it is no target
    Format(
        "MICo-Bench",
        "prompt",
        "input",
        None,
        ("input", "human_indices"),
        "refined_prompt",
        "Task",
        unread=("reference",),
        common=True,
    ),
    Format(
        "GEdit-Bench",
        "instruction",
        "input_image_raw",
        None,
        needs=("input_image_raw",),
        unread=("input_image",),  # the same picture as the raw one, resized
        language="instruction_language",
    ),
)

KEYS = ("key", "case_id", "id", "idx")  # what data sets call a row's own name; the first that a row has
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")  # which Qwen's processors replace with a picture's tokens
TEXT_KEYS = ("instruction", "prompt", "caption")
PICTURE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".avif", ".jp2", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def is_picture_key(key: str) -> bool:
    """Whether a known format uses the key for something other than the text."""
    return any(form.owns(key) for form in FORMATS if not form.common)


def explains(form: Format, keys: Collection[str]) -> bool:
    """Whether rows with these keys are of the format: it has all that it needs, and no key of another format."""
    return form.text in keys and all(key in keys for key in form.needs) and all(
        form.owns(key) for key in keys if is_picture_key(key) and key not in form.unread
    )  # fmt: skip


def recognise(keys: Collection[str]) -> Format:
    """The format whose keys these are; keys that no format knows do not matter.

    Raises:
        ValueError: when no format, or more than one, explains them; lists the keys and the formats.
    """
    if any(key.endswith(FILE_NAMES) for key in keys):
        return _imagefolder(keys)
    fits = [form for form in FORMATS if explains(form, keys)]
    if len(fits) > 1:  # words that mean something else in a file that another format explains
        fits = [form for form in fits if not form.common] or fits
    if len(fits) == 1:
        return fits[0]
    problem = "ambiguous keys" if fits else "the keys are those of no known format"
    known = "\n  ".join(map(str, fits or FORMATS))
    raise ValueError(
        f"{problem}: {sorted(keys)}; say what they hold with columns such as instruction=prompt,references=images,"
        f"target=image (--columns), or rename them; known formats (text, references, target):\n  {known}"
    )


def _imagefolder(keys: Collection[str]) -> Format:
    """The format of a Hugging Face imagefolder: columns of pictures are `file_name`, or end in `_file_name(s)`."""
    texts = [key for key in IMAGEFOLDER_TEXTS if key in keys]
    files = {key: _words(re.sub(r"_?file_names?$", "", key)) for key in keys if key.endswith(FILE_NAMES)}
    targets = [key for key, words in files.items() if words & TARGET_WORDS]
    references = [key for key, words in files.items() if words & REFERENCE_WORDS and key not in targets]
    plain = [key for key, words in files.items() if not words]
    targets = targets or plain
    references.sort(key=lambda key: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", key)])
    alike = {re.sub(r"\d+", "", key) for key in references}
    if len(texts) != 1 or len(targets) != 1 or len(alike) > 1 or len(targets + references) < len(files):
        raise ValueError(
            f"the columns {sorted(keys)} of this imagefolder do not tell which is which: one of "
            f"{', '.join(IMAGEFOLDER_TEXTS)} must be the instruction, and file_name or output_file_name the target, "
            "with references such as input_file_name; say it with columns such as instruction=text,"
            "references=input_file_name,target=file_name (--columns)"
        )
    first = references[0] if references else "input_file_name"
    return Format("imagefolder", texts[0], first, targets[0], more=tuple(references[1:]))


def _words(key: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", key).lower()))


FILE_NAMES = ("file_name", "file_names")
IMAGEFOLDER_TEXTS = ("instruction", "prompt", "text", "caption", "edit_prompt", "edit_instruction")
REFERENCE_WORDS = {"before", "condition", "conditioning", "control", "input", "inputs", "original", "ref", "reference",
                   "references", "source", "sources"}  # fmt: skip
TARGET_WORDS = {"after", "answer", "edited", "expected", "gt", "ground", "out", "output", "outputs", "result",
                "results", "target", "targets", "truth"}  # fmt: skip


def nearest_key(key: str, form: Format) -> tuple[str, str]:
    """(role, key of the format) that an unknown key of pictures most probably stands for."""
    words = _words(key)
    if form.target is not None and words & TARGET_WORDS:
        return "target", form.target
    return "references", form.references.removesuffix("#")


@dataclass(frozen=True)
class Parts:
    """A row's content; pictures are paths, bytes or {"bytes", "path"} mappings, not yet looked at; so is the scene."""

    instruction: str
    references: tuple[tuple[str, Any], ...]
    target: tuple[str, Any] | None
    task_type: str | None
    scene: Mapping[str, Any] | None = None
    key: str | None = None
    language: str | None = None

    @staticmethod
    def of(values: Mapping[str, Any], form: Format, names_file: Callable[[str], bool] = lambda path: False) -> Parts:
        """Take a row apart; pictures come with a name for messages.

        Args:
            values: the row by key.
            form: of its file.
            names_file: tells whether a text is the path of a file beside the row.

        Raises:
            ValueError: for what is missing or wrong, and for pictures under a key that is not read.
        """
        values = {key: value for key, value in values.items() if value is not None}
        _refuse_strays(values, form, names_file)
        references = _references(values, form)
        target = None
        if form.target == form.references:
            if not references:
                raise ValueError(f"{form.references} is empty; its last picture is the target")
            references, target = references[:-1], references[-1]
        elif form.target in values:
            target = form.target, values[form.target]
            if isinstance(target[1], list):
                raise ValueError(f"{form.target} must be one picture, got a list of {len(target[1])}")
        task_type = values.get("task_type", values.get(form.task or ""))
        if task_type is not None:
            name = "task_type" if "task_type" in values else str(form.task)
            if not isinstance(task_type, str):
                raise ValueError(f"{name} must be a text, got {task_type!r:.80}")
            _refuse_half_characters(name, task_type)
        instruction = _instruction(values, form, len(references))
        own_names = (form.key,) if form.key else KEYS
        key, language = next((values[key] for key in own_names if key in values), None), values.get(form.language or "")
        return Parts(
            instruction, references, target, task_type, _object(values.get("scene")), _word(key), _word(language)
        )


def _word(value: Any) -> str | None:
    """A label as a text; None for anything that is none."""
    return printable(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _object(value: Any) -> Mapping[str, Any] | None:
    """A JSON object, as one or as its text; None for anything else, which is another data set's own."""
    if isinstance(value, str):
        try:
            value = from_json(value.encode("utf-8"))
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _refuse_strays(values: Mapping[str, Any], form: Format, names_file: Callable[[str], bool]) -> None:
    """Pictures under a key that is not read would otherwise be left out in silence."""
    for key, value in values.items():
        if form.owns(key) or key in (form.text, form.key, form.language, "task_type", *form.unread, *KEYS):
            continue
        if key in TEXT_KEYS and isinstance(value, str):
            continue
        if key == "scene" and _object(value) is not None:  # it names the files of its objects
            continue
        if is_picture_key(key):
            raise ValueError(f"key {key!r} does not belong to the format of this file: {form}")
        if _holds_pictures(value, names_file):
            role, near = nearest_key(key, form)
            raise ValueError(
                f"key {key!r} holds pictures but is not known; did you mean {near!r}? Rename it, or say what it holds "
                f"with columns {role}={key}, or ignore={key} to leave it out (--columns)"
            )


NO_PICTURES = (".jsonl", ".json", ".parquet", ".tar", ".zip", ".gz", ".tgz", ".txt", ".csv", ".tsv", ".md", ".toml",
               ".yaml", ".yml", ".py", ".log")  # fmt: skip


def _holds_pictures(value: Any, names_file: Callable[[str], bool]) -> bool:
    """Whether a value has bytes, encoded pictures, names of picture files, or of files that exist, at any depth."""
    waiting = [value]  # not by recursion: a row may be nested deeper than that goes
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, bytes) or (isinstance(item, str) and _is_picture(item, names_file)):
            return True
    return False


def _is_picture(text: str, names_file: Callable[[str], bool]) -> bool:
    if text.startswith(ENCODED):
        return True
    if len(text) > 4096 or "\n" in text:
        return False
    suffix = PurePath(text).suffix.lower()
    return suffix in PICTURE_SUFFIXES or (suffix not in NO_PICTURES and names_file(text))


def _references(values: Mapping[str, Any], form: Format) -> tuple[tuple[str, Any], ...]:
    base = form.references.removesuffix("#")
    numbers = sorted(int(key[len(base) + 1 :]) for key in values if key != base and form.references != base
                     and re.fullmatch(rf"{re.escape(base)}_\d+", key))  # fmt: skip
    if numbers:
        keys = [f"{base}_{number}" for number in numbers]
        if base in values or numbers != list(range(len(numbers))) or any(key not in values for key in keys):
            given = sorted(key for key in values if key.startswith(base))
            raise ValueError(f"references must be {base}, or {base}_0, {base}_1, ... without gaps; got {given}")
        found: list[tuple[str, Any]] = [(key, values[key]) for key in keys]
    else:
        found = []
        for key in _without_gaps(values, (base, *form.more)):
            value = values[key]
            items = value if isinstance(value, list) else [value]
            found += [(f"{key}[{i}]", item) for i, item in enumerate(items)]
    for name, item in found:
        if item is None or isinstance(item, list):
            raise ValueError(f"{name} must be one picture, got {'null' if item is None else 'a list'}")
    return tuple(found)


def _without_gaps(values: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    """The keys that the row has; one that is missing before another would renumber the pictures."""
    there = [key for key in keys if key in values]
    if there != list(keys[: len(there)]):
        raise ValueError(f"references must fill {', '.join(keys)} in this order without gaps; the row has {there}")
    return there


def _instruction(values: Mapping[str, Any], form: Format, references: int) -> str:
    key = form.finer if form.finer and values.get(form.finer) else form.text
    if key not in values:
        raise ValueError(f"no {form.text!r}; keys found: {sorted(values)}")
    text = values[key]
    if key == "instruction_list":
        if isinstance(text, list) and len(text) == references > 1:
            raise ValueError(f"instruction_list has {len(text)} texts for {references + 1} pictures: a chain of edits; "
                             "write each edit as a row of its own")  # fmt: skip
        for _ in range(2):  # Bagel nests phrasings of one edit: the first is taken
            text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a text, got {text!r:.80}")
    if not text.strip():
        raise ValueError(f"{key} is empty")
    _refuse_half_characters(key, text)
    if tokens := [token for token in PLACEHOLDERS if token in text]:
        raise ValueError(
            f"{key} has {tokens[0]}, which stands for the tokens of a picture; the text encoder refuses it: "
            'write "picture 1" and so on'
        )
    return text


def _refuse_half_characters(key: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key} has half a surrogate pair, which is no text: {text!r:.80}") from None
