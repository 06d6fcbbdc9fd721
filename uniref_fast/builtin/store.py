"""Folders of the built-in pipeline: build one, find it again, load it with `from_pretrained`."""

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
FORMAT = 1  # of the folder; with another number old caches are not used
AREAS = ("condition_image_area", "vae_image_area", "output_area")
AREAS_KEY = "_image_areas"
"""Entry of the transformer's configuration that holds the three areas. diffusers keeps unknown entries that begin with
an underscore through every `from_pretrained` and `save_pretrained` of a model or of any pipeline that holds it."""

WEIGHTS_KEY = "_weights"  # entry of `model_index.json`: the status of the weights if there is no `uniref_fast.json`


def recorded_areas(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image areas that a pipeline was saved with; none for a model with the sizes of stock diffusers.

    Args:
        index: Content of `model_index.json`, or {}.
        transformer_config: Content of `transformer/config.json`, or {}.
    """
    areas = transformer_config.get(AREAS_KEY)
    found = dict(areas) if isinstance(areas, Mapping) else {}
    return {name: index.get(name, found.get(name)) for name in AREAS if name in index or name in found}


def is_builtin_folder(folder: str | os.PathLike) -> bool:
    """Return True if a local folder holds a pipeline with its own image areas."""
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

    The same seed gives the same bytes. It raises the errors of `write`.
    """
    import torch

    from . import components

    return write(components.pipeline(seed, torch.bfloat16), folder, weights="untrained", seed=seed)


def write(pipe, folder: str | os.PathLike, weights: str, **details) -> Path:
    """Write a built-in pipeline's folder with its status, completely or not at all.

    The files are written to another folder, which is then renamed.

    Raises:
        FileExistsError: If `folder` exists and is not empty.
        OSError: If it cannot be written.
    """
    folder = Path(folder)
    with whole_folder(folder) as unfinished:
        with no_progress_bars():
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


def load(dtype=None, device: str = "cpu", **options):
    """Load the built-in pipeline (a SmallQwenImageEditPlusPipeline) without any network access.

    It uses the trained weights of the package (`assets/model`) if they are present. Otherwise it builds the untrained
    folder once in the user's cache (`$XDG_CACHE_HOME` or `~/.cache`, then `uniref_fast/`), or in the temporary
    directory if the cache cannot be written.

    Args:
        dtype: Dtype of the weights; None for float32.
        device: Device of the pipeline.
        **options: Further arguments of `from_pretrained`, such as `quantization_config`.
    """
    import torch

    from .pipeline import SmallQwenImageEditPlusPipeline

    folder = str(model_folder())
    with no_progress_bars():
        pipe = SmallQwenImageEditPlusPipeline.from_pretrained(
            folder, dtype=dtype or torch.float32, local_files_only=True, **options
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
    """Return "untrained" or "trained" for the folder of `pipe`, or for the weights that `load()` would use.

    A pipeline that this package did not write counts as trained.
    """
    if pipe is None:
        shipped = shipped_folder()
        return _status(shipped) if shipped else "untrained"
    return _status(Path(getattr(pipe, "name_or_path", None) or ""))


def shipped_folder() -> Path | None:
    """Return the folder of trained weights inside the package, or None."""
    folder = Path(__file__).resolve().parent.parent / "assets" / "model"
    return folder if (folder / "model_index.json").is_file() else None


def model_folder() -> Path:
    """Return the folder that `load` reads; build it if it does not exist. Several processes may call it at once."""
    if folder := shipped_folder():
        return folder
    name = f"builtin-{fingerprint()}"
    problem: OSError | None = None
    for parent in (_user_cache(), _temporary_cache()):
        folder = parent / name
        if _complete(folder):
            return folder
        try:
            if folder.exists():  # damaged by others: a folder is renamed to this name only when it is complete
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
    """Return 16 hex digits over everything that decides the folder's content.

    These are configurations, tokenizer, code and versions of libraries.
    """
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
    """Return True if all files that the status file lists exist in their full size."""
    try:
        files = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove(folder: Path) -> None:
    """Move the folder away in one step, then delete it."""
    grave = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        os.rename(folder, grave / folder.name)
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def _status(folder: Path) -> str:
    for name, key in ((STATUS_FILE, "weights"), ("model_index.json", WEIGHTS_KEY)):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # perhaps another program's file of that name
            continue
        if isinstance(content, dict) and content.get(key) in ("untrained", "trained"):
            return content[key]
    return "trained"


@contextlib.contextmanager
def no_progress_bars():
    """Turn the progress bars of diffusers and transformers off within the block."""
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
    """Return a folder in the temporary directory that no other user can have prepared."""
    if not hasattr(os, "getuid"):
        return Path(tempfile.gettempdir()) / "uniref_fast"
    folder = Path(tempfile.gettempdir()) / f"uniref_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="uniref_fast-"))
    return folder
