"""Formats of public datasets: the names of their keys, and the conversion of a row's values to its content."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

from uniref_fast.data.readers import ENCODED, from_json, printable

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "KEYS",
    "MASK_KEYS",
    "TEXT_KEYS",
    "Format",
    "RowContent",
    "is_image_key",
    "likely_roles",
    "matches",
    "nearest_key",
    "recognise_format",
]


@dataclass(frozen=True)
class Format:
    """The meaning of the keys of one format.

    Attributes:
        name: Datasets and programs that use the format.
        text: Key of the instruction.
        references: Key of the references, a list or one image; with `#` also the keys `control_path_0`,
            `control_path_1`, ...
        target: Key of the target; None if rows have no target (reinforcement learning). If it is the key of the
            references, the last of them is the target.
        required: Keys beside `text` that some row of a file must have for the file to be of this format.
        preferred_text: Key of an instruction that replaces the one under `text` in rows that have it.
        task: Key of the task for rows without `task_type`.
        unread: Keys that may hold images and are not read.
        ambiguous: True if other datasets use the keys for other things, so that another format has precedence.
        language: Key of the language of the instruction.
        more: Keys of further references, one image or a list each, which follow those of `references`.
        key: Key of the row's own name; None uses the first of `KEYS` that the row has.
        mask: Key of the mask of the target; None uses those of `MASK_KEYS`.
    """

    name: str
    text: str
    references: str
    target: str | None
    required: tuple[str, ...] = ()
    preferred_text: str | None = None
    task: str | None = None
    unread: tuple[str, ...] = ()
    ambiguous: bool = False
    language: str | None = None
    more: tuple[str, ...] = ()
    key: str | None = None
    mask: str | None = None

    @property
    def mask_keys(self) -> tuple[str, ...]:
        """Keys of the mask of the target; a row has at most one of them."""
        known = (key for key in MASK_KEYS if key != self.text and key not in self.unread and not self.owns(key))
        return (self.mask,) if self.mask else tuple(known)

    def owns(self, key: str) -> bool:
        """Return True if the key belongs to the format and is not the text."""
        return key in (self.target, self.preferred_text, self.task, *self.required) or self._holds_references(key)

    def _holds_references(self, key: str) -> bool:
        base = self.references.removesuffix("#")
        numbered = base != self.references and re.fullmatch(rf"{re.escape(base)}_\d+", key) is not None
        return key in (base, *self.more) or numbered

    def role(self, key: str) -> str | None:
        """Return the role of a key: "instruction", "references", "target", ...; None if it is not read."""
        if self.target == self.references and key == self.target:
            return "references, the last is the target"
        names = {self.text: "instruction", self.preferred_text: "instruction", self.target: "target",
                 "task_type": "task type", self.task: "task type", self.language: "language",
                 "scene": "scene"}  # fmt: skip
        names |= {key: "key" for key in ((self.key,) if self.key else KEYS)}
        names |= dict.fromkeys(self.mask_keys, "mask")
        return "references" if self._holds_references(key) else names.get(key)

    def __str__(self) -> str:
        references, end = self.references.removesuffix("#"), "_0.." if self.references.endswith("#") else ""
        target = {None: "no target", self.references: "the last is the target"}.get(
            self.target, f"target {self.target}"
        )
        required = "".join(f", {key}" for key in self.required if key not in (references, self.target))
        return f"{self.name} ({self.text}, references {references}{end}, {target}{required})"


FORMATS = (
    Format("OmniGen2, UniPic-3, MICo, OmniContext", "instruction", "input_images", "output_image"),
    Format("DyRef, DiffSynth", "prompt", "edit_image", "image", required=("edit_image",)),
    Format("Flow-Factory", "prompt", "images", None, required=("images",)),
    Format("Edit-R1", "prompt", "image", None, required=("image", "requirement")),
    Format("musubi", "caption", "control_path#", "image_path", required=("image_path",)),
    Format("DanceGRPO, Pref-GRPO", "instruction", "source_image", "target_image", required=("source_image",)),
    Format("Lumina", "prompt", "image_path", "edit_path", required=("edit_path",)),
    Format("Echo-4o, Bagel", "instruction_list", "image_list", "image_list", required=("image_list",)),
    Format("MICo for Bagel", "instruction", "image_list", "image_list", required=("image_list",)),
    # `reference` is an image that people judged correct, one of many possible results, and so not a target
    Format(
        "MICo-Bench",
        "prompt",
        "input",
        None,
        ("input", "human_indices"),
        "refined_prompt",
        "Task",
        unread=("reference",),
        ambiguous=True,
    ),
    Format(
        "GEdit-Bench",
        "instruction",
        "input_image_raw",
        None,
        required=("input_image_raw",),
        unread=("input_image",),  # the same image as the raw one, resized
        language="instruction_language",
    ),
)

KEYS = ("key", "case_id", "id", "idx")  # keys of a row's own name; the first that a row has counts
MASK_KEYS = ("mask", "mask_path", "loss_mask")  # keys of the mask of the target, in rows of every format
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")  # Qwen's processors replace them with the tokens of an image
TEXT_KEYS = ("instruction", "prompt", "caption")
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".avif", ".jp2", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def is_image_key(key: str) -> bool:
    """Return True if a known format uses the key for something other than the text."""
    return any(form.owns(key) for form in FORMATS if not form.ambiguous)


def matches(form: Format, keys: Collection[str]) -> bool:
    """Return True if rows with these keys can be of the format: its keys are present, and no other format's keys."""
    return form.text in keys and all(key in keys for key in form.required) and all(
        form.owns(key) for key in keys if is_image_key(key) and key not in (*form.unread, form.mask)
    )  # fmt: skip


def recognise_format(keys: Collection[str]) -> Format:
    """Return the format with these keys; keys that no format knows are ignored.

    Raises:
        ValueError: No format, or more than one, matches; the message lists the keys and the formats.
    """
    if any(key.endswith(FILE_NAMES) for key in keys):
        return _imagefolder(keys)
    fits = [form for form in FORMATS if matches(form, keys)]
    if len(fits) > 1:  # prefer formats whose keys are unambiguous
        fits = [form for form in fits if not form.ambiguous] or fits
    if len(fits) == 1:
        return fits[0]
    problem = "ambiguous keys" if fits else "these keys match no known format"
    known = "\n  ".join(map(str, fits or FORMATS))
    raise ValueError(
        f"{problem}: {sorted(keys)}; give their roles with columns such as instruction=prompt,references=images,"
        f"target=image (--columns), or rename them; known formats (text, references, target):\n  {known}"
    )


def _imagefolder(keys: Collection[str]) -> Format:
    """Return the format of a Hugging Face imagefolder: columns of images are `file_name`, or end in `_file_name(s)`."""
    texts = [key for key in IMAGEFOLDER_TEXTS if key in keys]
    files = {key: _words(re.sub(r"_?file_names?$", "", key)) for key in keys if key.endswith(FILE_NAMES)}
    targets = [key for key, words in files.items() if words & TARGET_WORDS]
    references = [key for key, words in files.items() if words & REFERENCE_WORDS and key not in targets]
    plain = [key for key, words in files.items() if not words]
    masks = [key for key, words in files.items() if words & MASK_WORDS and key not in (*targets, *references)]
    targets = targets or plain
    references.sort(key=lambda key: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", key)])
    alike = {re.sub(r"\d+", "", key) for key in references}
    if (
        len(texts) != 1
        or len(targets) != 1
        or len(alike) > 1
        or len(masks) > 1
        or len(targets + references + masks) < len(files)
    ):
        raise ValueError(
            f"the columns {sorted(keys)} of this imagefolder are ambiguous: one of "
            f"{', '.join(IMAGEFOLDER_TEXTS)} must be the instruction, and file_name or output_file_name the target, "
            "with references such as input_file_name and a mask such as mask_file_name; give the roles with columns "
            "such as instruction=text,references=input_file_name,target=file_name (--columns)"
        )
    first = references[0] if references else "input_file_name"
    return Format("imagefolder", texts[0], first, targets[0], more=tuple(references[1:]),
                  mask=next(iter(masks), None))  # fmt: skip


def likely_roles(keys: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Return the most probable roles of keys that match no format, as "role=key" pairs; none if they are ambiguous.

    The only image of a row may be its target or its reference, which gives two possibilities.
    """
    if any(key.endswith(FILE_NAMES) for key in keys) or any(matches(form, keys) for form in FORMATS):
        return ()
    text = next((key for key in IMAGEFOLDER_TEXTS if key in keys), None)
    if text is None:
        text = next((key for key in sorted(keys) if get_close_matches(key.lower(), IMAGEFOLDER_TEXTS, 1, 0.8)), None)
    images = {key: _words(key) for key in sorted(keys) if key != text and _words(key) & _IMAGE_KEYS}
    targets = [key for key, words in images.items() if words & TARGET_WORDS]
    references = [key for key in images if key not in targets]
    if len(references) > 1:  # keys such as "source" may hold metadata
        references = [key for key in references if is_image_key(key)]
    if text is None or len(targets) > 1 or len(references) > 1:
        return ()
    instruction = f"instruction={text}"
    if not targets:
        return tuple((instruction, f"{role}={key}") for key in references for role in ("target", "references"))
    return ((instruction, *(f"references={key}" for key in references), f"target={targets[0]}"),)


def _words(key: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", key).lower()))


FILE_NAMES = ("file_name", "file_names")
IMAGEFOLDER_TEXTS = ("instruction", "prompt", "text", "caption", "edit_prompt", "edit_instruction")
REFERENCE_WORDS = {"before", "condition", "conditioning", "control", "input", "inputs", "original", "ref", "reference",
                   "references", "source", "sources"}  # fmt: skip
TARGET_WORDS = {"after", "answer", "edited", "expected", "gt", "ground", "out", "output", "outputs", "result",
                "results", "target", "targets", "truth"}  # fmt: skip

MASK_WORDS = {"mask", "masks"}

_IMAGE_KEYS = (
    REFERENCE_WORDS | TARGET_WORDS | {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"}
)


def nearest_key(key: str, form: Format) -> tuple[str, str]:
    """Return (role, key of the format) that an unknown key of images most probably stands for."""
    words = _words(key)
    if words & MASK_WORDS:
        return "mask", form.mask or MASK_KEYS[0]
    if form.target is not None and words & TARGET_WORDS:
        return "target", form.target
    return "references", form.references.removesuffix("#")


@dataclass(frozen=True)
class RowContent:
    """Content of a row: images are paths, bytes or {"bytes", "path"} mappings that have not been checked.

    Attributes:
        instruction: The instruction.
        references: (name for messages, value) of each reference.
        target: (name for messages, value) of the target, or None.
        task_type: Task label, or None.
        scene: Description of the scene, not checked, or None.
        key: Name of the row in the dataset, or None.
        language: Language of the instruction, or None.
        mask: (name for messages, value) of the mask of the target, or None.
    """

    instruction: str
    references: tuple[tuple[str, Any], ...]
    target: tuple[str, Any] | None
    task_type: str | None
    scene: Mapping[str, Any] | None = None
    key: str | None = None
    language: str | None = None
    mask: tuple[str, Any] | None = None

    @staticmethod
    def parse(
        values: Mapping[str, Any], form: Format, names_file: Callable[[str], bool] = lambda path: False
    ) -> RowContent:
        """Convert the values of a row to its content.

        Args:
            values: Values of the row by key.
            form: Format of its file.
            names_file: Function that returns True if a text is the path of a file beside the row.

        Raises:
            ValueError: A value is missing or wrong, or there are images under a key that is not read.
        """
        values = {key: value for key, value in values.items() if value is not None}
        _refuse_unread_images(values, form, names_file)
        references = _references(values, form)
        target = None
        if form.target == form.references:
            if not references:
                raise ValueError(f"{form.references} is empty; its last image is the target")
            references, target = references[:-1], references[-1]
        elif form.target in values:
            target = form.target, values[form.target]
            if isinstance(target[1], list):
                raise ValueError(f"{form.target} must be one image, got a list of {len(target[1])}")
        task_type = values.get("task_type", values.get(form.task or ""))
        if task_type is not None:
            name = "task_type" if "task_type" in values else str(form.task)
            if not isinstance(task_type, str):
                raise ValueError(f"{name} must be a text, got {task_type!r:.80}")
            _check_unicode(name, task_type)
        instruction = _instruction(values, form, len(references))
        own_names = (form.key,) if form.key else KEYS
        key, language = next((values[key] for key in own_names if key in values), None), values.get(form.language or "")
        return RowContent(instruction, references, target, task_type, _object(values.get("scene")), _label(key),
                          _label(language), _mask(values, form))  # fmt: skip


def _mask(values: Mapping[str, Any], form: Format) -> tuple[str, Any] | None:
    """Return (name for messages, value) of the mask of a row, or None."""
    given = [key for key in form.mask_keys if key in values]
    if len(given) > 1:
        raise ValueError(f"a row has one mask, got {' and '.join(given)}")
    if given and not isinstance(values[given[0]], (str, bytes, dict)):
        raise ValueError(
            f"{given[0]} must be one image that weighs the target in the loss, got {values[given[0]]!r:.80}; leave a "
            f"key of another meaning out with --columns ignore={given[0]}"
        )
    return (given[0], values[given[0]]) if given else None


def _label(value: Any) -> str | None:
    """Return a label as a text; None if the value is not a text or a whole number."""
    return printable(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _object(value: Any) -> Mapping[str, Any] | None:
    """Return a JSON object, given as an object or as text; None for any other value, which has another meaning."""
    if isinstance(value, str):
        try:
            value = from_json(value.encode("utf-8"))
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _refuse_unread_images(values: Mapping[str, Any], form: Format, names_file: Callable[[str], bool]) -> None:
    """Raise ValueError if a key that is not read holds images, which would be left out silently."""
    for key, value in values.items():
        others = (form.text, form.key, form.language, "task_type", *form.mask_keys, *form.unread, *KEYS)
        if form.owns(key) or key in others:
            continue
        if key in TEXT_KEYS and isinstance(value, str):
            continue
        if key == "scene" and _object(value) is not None:  # a scene contains the paths of its objects' files
            continue
        if is_image_key(key):
            raise ValueError(f"key {key!r} does not belong to the format of this file: {form}")
        if _holds_images(value, names_file):
            role, near = nearest_key(key, form)
            raise ValueError(
                f"key {key!r} holds images but is not known; did you mean {near!r}? Rename it, or give its role "
                f"with columns {role}={key}, or ignore={key} to leave it out (--columns)"
            )


OTHER_SUFFIXES = (".jsonl", ".json", ".parquet", ".tar", ".zip", ".gz", ".tgz", ".txt", ".csv", ".tsv", ".md", ".toml",
               ".yaml", ".yml", ".py", ".log")  # fmt: skip


def _holds_images(value: Any, names_file: Callable[[str], bool]) -> bool:
    """Return True if a value contains, at any depth, bytes, encoded images, or names of images or existing files."""
    waiting = [value]  # no recursion: a row may be nested more deeply than Python's limit
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, bytes) or (isinstance(item, str) and _is_image(item, names_file)):
            return True
    return False


def _is_image(text: str, names_file: Callable[[str], bool]) -> bool:
    if text.startswith(ENCODED):
        return True
    if len(text) > 4096 or "\n" in text:
        return False
    suffix = PurePath(text).suffix.lower()
    return suffix in IMAGE_SUFFIXES or (suffix not in OTHER_SUFFIXES and names_file(text))


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
            raise ValueError(f"{name} must be one image, got {'null' if item is None else 'a list'}")
    return tuple(found)


def _without_gaps(values: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Return the keys that the row has; a missing one before another would change the numbers of the references."""
    present = [key for key in keys if key in values]
    if present != list(keys[: len(present)]):
        raise ValueError(f"references must fill {', '.join(keys)} in this order without gaps; the row has {present}")
    return present


def _instruction(values: Mapping[str, Any], form: Format, references: int) -> str:
    key = form.preferred_text if form.preferred_text and values.get(form.preferred_text) else form.text
    if key not in values:
        raise ValueError(f"no {form.text!r}; keys found: {sorted(values)}")
    text = values[key]
    if key == "instruction_list":
        if isinstance(text, list) and len(text) == references > 1:
            raise ValueError(f"instruction_list has {len(text)} texts for {references + 1} images: a chain of edits; "
                             "write each edit as a row of its own")  # fmt: skip
        for _ in range(2):  # Bagel nests several phrasings of one edit; take the first
            text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a text, got {text!r:.80}")
    if not text.strip():
        raise ValueError(f"{key} is empty")
    _check_unicode(key, text)
    if tokens := [token for token in PLACEHOLDERS if token in text]:
        raise ValueError(
            f"{key} has {tokens[0]}, which stands for the tokens of an image; the text encoder refuses it: "
            'write "picture 1" and so on'
        )
    return text


def _check_unicode(key: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key} has half of a surrogate pair, which is not valid text: {text!r:.80}") from None
