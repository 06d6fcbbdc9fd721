"""Folders of images with a caption file each, and folders of references whose files have the same names.

ai-toolkit, SimpleTuner and musubi-tuner store their data like this: `target/0001.jpg` with `target/0001.txt`, and
references `control_1/0001.png`, `control_2/0001.png`, ..., or `control/0001_0.png`, `control/0001_1.png`, ...
A mask of a target has its name in a folder `mask`, or is `0001-masklabel.png` beside it, as OneTrainer keeps it.
`pairs_of` recognises such folders by their names; `configured` reads the folders that configuration files name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniref_fast.data.formats import IMAGE_SUFFIXES
from uniref_fast.data.images import ImageSource
from uniref_fast.data.readers import BOM, BrokenFileError, RawRow, Reader, local_path, printable, resolve_path

__all__ = ["Pairs", "PairsReader", "configured", "is_backend_list", "pairs_of"]

CONTROL = re.compile(r"(?:control|conditioning|condition|cond|reference|ref|source|src|input)s?"
                     r"(?:[ _-]?(?:images?|imgs?))?[ _-]?(\d*)", re.IGNORECASE)  # fmt: skip
MASKS = re.compile(r"(?:loss[ _-]?)?masks?(?:[ _-]?(?:images?|imgs?))?", re.IGNORECASE)
MASK_LABEL = "-masklabel"  # end of the name of a mask beside its target


@dataclass(frozen=True)
class Pairs:
    """A folder of targets with captions, and its folders of references.

    Attributes:
        targets: Folder of the target images and their captions.
        controls: Folders of references, in the order of the references.
        ending: Suffix of the caption files, with its dot.
        default: Caption of images without a caption file; if it is None, these are broken rows.
        jsonl: File of rows that replaces all of the above.
        masks: Folder of the masks of the targets, or None; a target without a mask counts as a whole.
    """

    targets: Path
    controls: tuple[Path, ...] = ()
    ending: str = ".txt"
    default: str | None = None
    jsonl: Path | None = None
    masks: Path | None = None


@dataclass
class ConfiguredFolders:
    """Content of a configuration file.

    Attributes:
        pairs: Folders that it names.
        notes: Sentences about settings that are not followed.
    """

    pairs: list[Pairs] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class PairsReader(Reader):
    """Reader of one folder of targets; the rows are in the order of the names."""

    def __init__(self, pairs: Pairs, name: str) -> None:
        super().__init__(pairs.targets, name, pairs.targets)
        self._pairs = pairs
        targets = _images(pairs.targets, name)
        self._masks = {stem: path for stem in targets if (path := targets.get(stem + MASK_LABEL)) is not None}
        beside = set(self._masks.values())
        targets = {stem: path for stem, path in targets.items() if path not in beside}
        if pairs.masks is not None:
            named = _masks(pairs.masks, targets.keys(), name)
            if twice := sorted(self._masks[stem].name for stem in self._masks.keys() & named.keys()):
                raise BrokenFileError(
                    name,
                    f"{len(twice):,} targets have two masks: one in {pairs.masks}, and one beside the target "
                    f"({_shown(twice)}); remove one of them",
                )
            self._masks |= named
        self._stems = sorted(targets)
        self._targets = [targets[stem] for stem in self._stems]
        found = [_references(folder, targets.keys(), name) for folder in pairs.controls]
        self._references = [[one.get(stem, []) for one in found] for stem in self._stems]
        self._unused: tuple[str, ...] = ()
        captions = {path.stem for path in _files(pairs.targets) if path.suffix.lower() == pairs.ending}
        if lonely := sorted(captions - targets.keys()):
            self._unused = (f"{len(lonely):,} captions have no image of their name: {_shown(lonely)}",)

    def __len__(self) -> int:
        return len(self._stems)

    def unused(self) -> tuple[str, ...]:
        return self._unused

    def place(self, number: int) -> str:
        return f"{self.name}:{printable(self._targets[number].name)}"

    def read(self, number: int) -> RawRow:
        given = [bool(paths) for paths in self._references[number]]
        if given != sorted(given, reverse=True):
            without = self._pairs.controls[given.index(False)]
            raise ValueError(f"no reference of that name in {printable(without)}, although a later folder has one")
        caption = self._caption(number)
        if not caption:
            name = self._targets[number].with_suffix(self._pairs.ending).name
            raise ValueError(f"caption file {printable(name)} is empty")
        values = {
            "instruction": caption,
            "input_images": [str(path.absolute()) for paths in self._references[number] for path in paths],
            "output_image": str(self._targets[number].absolute()),
        }
        mask = self._masks.get(self._stems[number])
        return RawRow(values if mask is None else {**values, "mask": str(mask.absolute())}, _absolute)

    def content(self) -> str:
        digest = hashlib.sha256()
        for number, target in enumerate(self._targets):
            names = [target.name, *(path.name for paths in self._references[number] for path in paths)]
            if (mask := self._masks.get(self._stems[number])) is not None:
                names.append(f"mask {mask.name}")
            digest.update("\0".join(map(printable, names)).encode() + b"\n")
            try:
                digest.update(self._caption(number).encode("utf-8", "backslashreplace"))
            except ValueError:
                digest.update(b"broken")
        return digest.hexdigest()

    def _caption(self, number: int) -> str:
        path = self._targets[number].with_suffix(self._pairs.ending)
        try:
            return path.read_bytes().removeprefix(BOM).decode("utf-8").strip()
        except FileNotFoundError:
            if self._pairs.default is not None:
                return self._pairs.default
            raise ValueError(f"no caption file {printable(path.name)} beside the image") from None
        except UnicodeDecodeError:
            raise ValueError(f"caption file {printable(path.name)} is not UTF-8") from None
        except OSError as error:
            raise ValueError(f"caption file {printable(path.name)} cannot be read: {error.strerror}") from None


def pairs_of(folder: Path) -> Pairs:
    """Return the folders of targets and references inside a folder, recognised by their names.

    Targets are in the folder itself or in its only folder of captioned images that is not named like references.
    References are in folders such as `control`, `control_1`, `reference_2`, masks of the targets in one such as `mask`.

    Raises:
        ValueError: There are no captioned images, or the meaning of a folder is ambiguous.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    with_images = [path for path in (folder, *inside) if any(map(_is_image, _files(path)))]
    controls = [path for path in with_images if path != folder and CONTROL.fullmatch(path.name)]
    masks = [path for path in with_images if path != folder and MASKS.fullmatch(path.name)]
    targets = [path for path in with_images if path not in (*controls, *masks) and _has_captions(path)]
    others = [path for path in with_images if path not in (*controls, *masks, *targets)]
    if not targets:
        raise ValueError("no image has a caption file (0001.jpg with 0001.txt), and there is no file of rows")
    numbers = [_number(path) for path in controls]
    if len(targets) > 1 or others or len(set(numbers)) < len(numbers) or len(masks) > 1:
        names = ", ".join("." if path == folder else path.name for path in with_images)
        raise ValueError(
            f"images lie in several folders ({names}), and their names do not distinguish targets from references; "
            f"name them target, control_1, control_2, ... and mask, or convert them: {_command(folder)}"
        )
    controls = [path for _, path in sorted(zip(numbers, controls, strict=True))]
    return Pairs(targets[0], tuple(controls), masks=next(iter(masks), None))


def configured(path: Path, data: Any) -> ConfiguredFolders:
    """Return the folders that a parsed configuration file of musubi-tuner, SimpleTuner or ai-toolkit names.

    Raises:
        ValueError: A setting's data cannot be read as rows; the message names it.
    """
    if isinstance(data, dict) and isinstance(data.get("datasets"), list):
        return _musubi(path, data)
    if is_backend_list(data):
        return _simpletuner(path, data)
    if isinstance(data, dict) and isinstance(data.get("config"), dict):
        return _ai_toolkit(path, data["config"])
    raise ValueError(
        "is not a known configuration of data: musubi-tuner (.toml with [[datasets]]), SimpleTuner "
        "(multidatabackend.json) or ai-toolkit (.yaml with config.process[].datasets)"
    )


def is_backend_list(data: Any) -> bool:
    """Return True if the data is a parsed multidatabackend.json of SimpleTuner."""
    return isinstance(data, list) and bool(data) and all(
        isinstance(one, dict) and "id" in one and {"type", "dataset_type", "instance_data_dir"} & one.keys()
        for one in data
    )  # fmt: skip


def _musubi(path: Path, data: Mapping[str, Any]) -> ConfiguredFolders:
    found, general = ConfiguredFolders(), data.get("general") or {}
    for number, entry in enumerate(data["datasets"], start=1):
        where = f"datasets entry {number}"
        _refuse(entry, where, ("video_directory", "video_jsonl_file", "multiple_target", "subsets"))
        _refuse_alpha_masks(entry, where)
        _note_repeats(found, entry, where, ("num_repeats",))
        if "image_jsonl_file" in entry:
            file = _resolved(entry["image_jsonl_file"], path, where)
            found.pairs.append(Pairs(file.parent, jsonl=file))
            continue
        if "image_directory" not in entry:
            raise ValueError(f"{where} has neither image_directory nor image_jsonl_file")
        ending = entry.get("caption_extension", general.get("caption_extension", ".txt"))
        controls = [_resolved(entry["control_directory"], path, where)] if entry.get("control_directory") else []
        targets = _resolved(entry["image_directory"], path, where)
        masks = _resolved(entry["mask_directory"], path, where) if entry.get("mask_directory") else None
        found.pairs.append(Pairs(targets, tuple(controls), _ending(ending), masks=masks))
    return found


def _simpletuner(path: Path, data: list[dict[str, Any]]) -> ConfiguredFolders:
    found, by_id = ConfiguredFolders(), {entry["id"]: entry for entry in data}
    for entry in data:
        where = f"the backend {entry['id']!r}"
        if entry.get("dataset_type", "image") != "image" or entry.get("disabled"):
            continue
        if entry.get("type", "local") != "local":
            raise ValueError(f"{where} is of type {entry['type']!r}; only local folders can be read")
        if entry.get("caption_strategy") != "textfile":
            raise ValueError(f"{where} has caption_strategy {entry.get('caption_strategy')!r}; only textfile is read")
        _note_repeats(found, entry, where, ("repeats",), least=0)
        names = entry.get("conditioning_data") or []
        names = [names] if isinstance(names, str) else names
        if missing := [name for name in names if name not in by_id]:
            raise ValueError(f"{where} names conditioning_data {missing[0]!r}, which is not in the file")
        folders = {
            name: _resolved(by_id[name].get("instance_data_dir"), path, f"the backend {name!r}") for name in names
        }
        masks = [name for name in names if by_id[name].get("conditioning_type") == "mask"]
        if len(masks) > 1:
            raise ValueError(f"{where} names several backends of masks, {', '.join(masks)}; a target has one mask")
        targets = _resolved(entry.get("instance_data_dir"), path, where)
        controls = tuple(folder for name, folder in folders.items() if name not in masks)
        found.pairs.append(Pairs(targets, controls, masks=folders[masks[0]] if masks else None))
    if not found.pairs:
        raise ValueError("has no backend of images")
    return found


def _ai_toolkit(path: Path, config: Mapping[str, Any]) -> ConfiguredFolders:
    found = ConfiguredFolders()
    process = config.get("process")
    for job in process if isinstance(process, list) else []:
        for number, entry in enumerate(job.get("datasets") or [], start=1):
            where = f"datasets entry {number}"
            _refuse(entry, where, ("unconditional_path", "inpaint_path", "clip_image_path"))
            _refuse_alpha_masks(entry, where)
            _note_repeats(found, entry, where, ("num_repeats",))
            if entry.get("trigger_word") or job.get("trigger_word"):
                found.notes.append(f"{where}: trigger_word is not added to the captions")
            several = [entry[f"control_path_{i}"] for i in (1, 2, 3) if entry.get(f"control_path_{i}")]
            given = entry.get("control_path") or several
            controls = [_resolved(one, path, where) for one in (given if isinstance(given, list) else [given])]
            default = entry.get("default_caption")
            targets = _resolved(entry.get("folder_path"), path, where)
            masks = _resolved(entry["mask_path"], path, where) if entry.get("mask_path") else None
            if masks and entry.get("mask_min_value"):
                least = entry["mask_min_value"]
                found.notes.append(f"{where}: mask_min_value = {least} is not followed; train with "
                                   f"--mask-weight-outside {least}")  # fmt: skip
            ending = _ending(entry.get("caption_ext", "txt"))
            found.pairs.append(Pairs(targets, tuple(controls), ending, default, masks=masks))
    if not found.pairs:
        raise ValueError("has no datasets under config.process[].datasets")
    return found


def _refuse(entry: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
    if given := [key for key in keys if entry.get(key)]:
        raise ValueError(
            f"{where} has {given[0]}, which rows for image editing cannot express; remove it to read the rest"
        )


def _refuse_alpha_masks(entry: Mapping[str, Any], where: str) -> None:
    if given := [key for key in ("alpha_mask", "invert_mask") if entry.get(key)]:
        raise ValueError(
            f"{where} has {given[0]}, which is not followed; write the masks as images of their own, white where the "
            "target is trained, and give their folder"
        )


def _note_repeats(
    found: ConfiguredFolders, entry: Mapping[str, Any], where: str, keys: Iterable[str], least: int = 1
) -> None:
    for key in keys:
        if entry.get(key, least) != least:
            found.notes.append(
                f"{where}: {key} = {entry[key]} is not followed; give each folder on its own, with --weights"
            )


def _resolved(given: Any, config: Path, where: str) -> Path:
    """Return a folder or file that a configuration names: absolute, or relative to the working folder or the file."""
    if not isinstance(given, str) or not given:
        raise ValueError(f"{where} names no folder: {given!r}")
    names = dict.fromkeys((given, os.path.expanduser(given.replace("\\", "/"))))
    candidates = [path for name in map(local_path, names) for path in (name, config.parent / name)]
    found = list({os.path.realpath(path): path for path in candidates if path.exists()}.values())
    if len(found) != 1:
        problem = "which does not exist" if not found else f"which exists twice: {', '.join(map(str, found))}"
        raise ValueError(f"{where} names {given}, {problem}")
    return found[0].absolute()


def _ending(given: Any) -> str:
    return "." + str(given).lower().lstrip(".")


# ---- files ----


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _has_captions(folder: Path) -> bool:
    files = _files(folder)
    texts = {path.stem for path in files if path.suffix.lower() == ".txt"}
    return any(path.stem in texts for path in files if _is_image(path))


def _images(folder: Path, name: str) -> dict[str, Path]:
    """Return the images of a folder by their names without the suffix."""
    if not folder.is_dir():
        raise BrokenFileError(name, f"{folder} is not a folder of images")
    found: dict[str, Path] = {}
    for path in filter(_is_image, _files(folder)):
        if path.stem in found:
            raise BrokenFileError(name, f"{folder} has two images of one name: {found[path.stem].name} and {path.name}")
        found[path.stem] = path
    return found


def _references(folder: Path, stems: Iterable[str], name: str) -> dict[str, list[Path]]:
    """Return the references of each target: the image with its name, or with its name and _0, _1, ... or _1, _2, ..."""
    wanted, lonely = set(stems), []
    numbered: dict[str, dict[int | None, Path]] = {}
    for stem, path in _images(folder, name).items():
        match = re.fullmatch(r"(.+)_(\d+)", stem)
        if stem in wanted:
            numbered.setdefault(stem, {})[None] = path
        elif match and match[1] in wanted and int(match[2]) not in numbered.get(match[1], {}):
            numbered.setdefault(match[1], {})[int(match[2])] = path
        else:
            lonely.append(path.name)
    if lonely:
        raise BrokenFileError(
            name, f"{len(lonely):,} images of {folder} have no target of their name: {_shown(sorted(lonely))}"
        )
    for stem, paths in numbered.items():
        numbers = sorted(number for number in paths if number is not None)
        first = numbers[0] if numbers else 0
        if numbers and (None in paths or first > 1 or numbers != list(range(first, first + len(numbers)))):
            names = _shown(sorted(path.name for path in paths.values()))
            raise BrokenFileError(name, f"references of {stem} in {folder} must be {stem}_0, {stem}_1, ... got {names}")
    return {stem: [paths[number] for number in sorted(paths, key=lambda n: n or 0)] for stem, paths in numbered.items()}


def _masks(folder: Path, stems: Collection[str], name: str) -> dict[str, Path]:
    """Return the mask of each target that has one: the image with its name."""
    found = _images(folder, name)
    if lonely := sorted(path.name for stem, path in found.items() if stem not in stems):
        raise BrokenFileError(name, f"{len(lonely):,} masks of {folder} have no target of their name: {_shown(lonely)}")
    return found


def _number(folder: Path) -> int:
    match = CONTROL.fullmatch(folder.name)
    assert match is not None
    return int(match[1] or 0)


def _absolute(path: str) -> ImageSource:
    return ImageSource(printable(Path(path).name), resolve_path(path, Path(path).parent))


def _shown(names: list[str]) -> str:
    more = f", and {len(names) - 5:,} more" if len(names) > 5 else ""
    return printable(", ".join(names[:5]) + more)


def _command(folder: Path) -> str:
    return f"uniref-fast data convert --target-folder {printable(folder)}/... --control-folder DIR --out rows.jsonl"
