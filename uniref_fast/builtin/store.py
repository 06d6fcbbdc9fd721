"""Where the built-in pipeline lives on disk: built once, found again, loaded with `from_pretrained`."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from uniref_fast.files import whole_folder

STATUS_FILE = "uniref_fast.json"
FORMAT = 1  # of the folder; a change makes old caches unused
AREAS = ("condition_image_area", "vae_image_area", "output_area")
AREAS_KEY = "_image_areas"
"""Where the transformer's configuration holds the three areas. diffusers keeps entries with an underscore that it does
not know, through every `from_pretrained` and `save_pretrained` of a model or of any pipeline that holds it."""

WEIGHTS_KEY = "_weights"  # of `model_index.json`: what `weights_status` says, where `uniref_fast.json` is not beside it


def recorded_areas(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> dict[str, Any]:
    """The image areas that a pipeline was saved with; empty for a model at the sizes of stock diffusers.

    Args:
        index: content of `model_index.json`, or {}.
        transformer_config: content of `transformer/config.json`, or {}.
    """
    areas = transformer_config.get(AREAS_KEY)
    found = dict(areas) if isinstance(areas, Mapping) else {}
    return {name: index.get(name, found.get(name)) for name in AREAS if name in index or name in found}


def is_builtin_folder(folder: str | os.PathLike) -> bool:
    """Whether a local folder holds a pipeline with image areas of its own, whoever saved it."""
    contents = []
    for name in ("model_index.json", "transformer/config.json"):
        try:
            content = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        contents.append(content if isinstance(content, dict) else {})
    return bool(recorded_areas(*contents))


def build(folder: str | os.PathLike, seed: int = 0) -> Path:
    """Write the complete diffusers folder of the untrained built-in pipeline (safetensors, bfloat16, below 24 MB).

    The same seed gives the same bytes. Raises as `write` does.
    """
    import torch

    from . import components

    return write(components.pipeline(seed, torch.bfloat16), folder, weights="untrained", seed=seed)


def write(pipe, folder: str | os.PathLike, weights: str, **details) -> Path:
    """Write a built-in pipeline's folder with its status; it appears complete or not at all.

    It is written beside `folder` and renamed. Raises FileExistsError when `folder` exists and is not empty; OSError
    when it cannot be written.
    """
    folder = Path(folder)
    with whole_folder(folder) as unfinished:
        with _no_progress_bars():
            pipe.save_pretrained(unfinished)
        for path in unfinished.rglob("config.json"):  # the place that parts were loaded from is not recorded
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        index = json.loads((unfinished / "model_index.json").read_text(encoding="utf-8")) | {WEIGHTS_KEY: weights}
        (unfinished / "model_index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        write_status(unfinished, weights=weights, **details)
    return folder


def load(dtype=None, device: str = "cpu"):
    """The built-in pipeline (a SmallQwenImageEditPlusPipeline), without any network access.

    Trained weights that came with the package (`assets/model`) are used where present. Otherwise the untrained folder
    is built once into the user's cache (`$XDG_CACHE_HOME` or `~/.cache`, then `uniref_fast/`), or into the temporary
    directory when the cache cannot be written. `dtype` is a torch dtype, float32 unless given.
    """
    import torch

    from .pipeline import SmallQwenImageEditPlusPipeline

    folder = str(model_folder())
    with _no_progress_bars():
        pipe = SmallQwenImageEditPlusPipeline.from_pretrained(
            folder, dtype=dtype or torch.float32, local_files_only=True
        )
    return pipe.to(device)


def write_status(folder: Path, weights: str, **details) -> None:
    """Write a finished model folder's `uniref_fast.json`: "untrained" or "trained", and the size of each file."""
    if weights not in ("untrained", "trained"):
        raise ValueError(f'weights are "untrained" or "trained", not {weights!r}')
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATUS_FILE)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    status = {"format": FORMAT, "weights": weights, **details, "files": sizes}
    (folder / STATUS_FILE).write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")


def weights_status(pipe=None) -> str:
    """`"untrained"` or `"trained"`: of the folder that `pipe` came from, or of what `load()` would give.

    A pipeline that this package did not write is somebody's own model and counts as trained.
    """
    if pipe is None:
        shipped = shipped_folder()
        return _status(shipped) if shipped else "untrained"
    return _status(Path(getattr(pipe, "name_or_path", None) or ""))


def shipped_folder() -> Path | None:
    """The folder of trained weights inside the package, if they are there."""
    folder = Path(__file__).resolve().parent.parent / "assets" / "model"
    return folder if (folder / "model_index.json").is_file() else None


def model_folder() -> Path:
    """The folder that `load` reads, built first if need be. Any number of processes may ask at once."""
    if folder := shipped_folder():
        return folder
    name = f"builtin-{fingerprint()}"
    problem: OSError | None = None
    for parent in (_user_cache(), _temporary_cache()):
        folder = parent / name
        if _complete(folder):
            return folder
        try:
            if folder.exists():  # damaged from outside: a folder is renamed into place only when it is complete
                _remove(folder)
            return build(folder)
        except OSError as error:
            if _complete(folder):  # another process was faster
                return folder
            problem = error
    raise OSError(
        f"the built-in pipeline could be written neither to {_user_cache()} nor to a temporary directory"
    ) from problem


def fingerprint() -> str:
    """16 hex digits over all that decides the folder's content: configurations, tokenizer, code, library versions."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for library in ("diffusers", "transformers", "tokenizers"):
        digest.update(f"{library} {metadata.version(library)}".encode())
    here = Path(__file__).resolve().parent
    tokens = here.parent / "assets" / "tokenizer"
    files = (here / "components.py", here / "pipeline.py", here / "processor.py", here / "store.py")
    for path in (*files, tokens / "vocab.json", tokens / "merges.txt"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _complete(folder: Path) -> bool:
    """Whether all files that the status file lists are there in their full size."""
    try:
        files = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove(folder: Path) -> None:
    """Take the folder away in one step, then delete it."""
    grave = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        os.rename(folder, grave / folder.name)
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def _status(folder: Path) -> str:
    for name, key in ((STATUS_FILE, "weights"), ("model_index.json", WEIGHTS_KEY)):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # somebody's own file of that name, perhaps
            continue
        if isinstance(content, dict) and content.get(key) in ("untrained", "trained"):
            return content[key]
    return "trained"


@contextlib.contextmanager
def _no_progress_bars():
    """Half a second of work needs no bars from diffusers and transformers; their settings come back afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in modules:
            module.enable_progress_bar()


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # the XDG specification: a relative path is invalid and ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "uniref_fast"


def _temporary_cache() -> Path:
    """A folder of ours in the temporary directory that nobody else can have prepared."""
    if not hasattr(os, "getuid"):
        return Path(tempfile.gettempdir()) / "uniref_fast"
    folder = Path(tempfile.gettempdir()) / f"uniref_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="uniref_fast-"))
    return folder
