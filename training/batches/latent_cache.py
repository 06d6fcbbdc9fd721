"""A folder of tensors keyed by the content that they are computed from: latents of images, embeddings of prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from uniref_fast.files import write_whole

__all__ = ["CacheError", "TensorCache"]


class CacheError(OSError):
    """A tensor that must be kept could not be written into the cache."""


class TensorCache:
    """A cache that computes a tensor once and reads it afterwards. Any number of processes may share the folder.

    Args:
        folder: Folder of the safetensors files; None keeps nothing.

    Attributes:
        required: Raise CacheError if a tensor cannot be written; otherwise this is a warning.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.required = folder, False
        self.hits = self.misses = 0

    def get(
        self, key: str, make: Callable[[], Tensor], shape: tuple[int, ...] | None = None, where: str = ""
    ) -> Tensor:
        """Return the tensor of a key; if it cannot be read, compute it and keep it.

        A damaged file and a folder that cannot be written are warnings: the tensor is computed in either case.

        Args:
            key: Key from `content_key`.
            make: Function that computes the tensor.
            shape: Shape that the tensor must have, if it is known; a file with another shape is replaced.
            where: Place of the row that the tensor belongs to, for warnings.
        """
        if self.folder is None:
            return make()
        path = self._path(key)
        try:
            tensor = load_file(path)["tensor"]
            if shape is not None and tensor.shape != shape:
                raise ValueError(f"its shape is {list(tensor.shape)}, not {list(shape)}")
            self.hits += 1
            return tensor
        except FileNotFoundError:
            pass
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            row = f"{where}: " if where else ""
            warnings.warn(f"{row}the cached {path} cannot be used ({error}); it is computed again", stacklevel=2)
        self.misses += 1
        tensor = make()
        try:
            content = save({"tensor": tensor.detach().cpu().contiguous()})
            write_whole(path, lambda file: file.write(content), cache=True)
        except OSError as error:
            if self.required:
                reason = error.strerror or error
                raise CacheError(error.errno, f"the cache cannot be written: {reason}", str(self.folder)) from error
            warnings.warn(
                f"the cache {self.folder} cannot be written ({error.strerror or error}); tensors that it lacks are "
                "computed each time",
                stacklevel=2,
            )
        return tensor

    def holds(self, key: str, shape: tuple[int, ...]) -> bool:
        """Return True if a file holds the tensor of a key whole; only its header is read."""
        try:
            with safe_open(self._path(key), "pt") as file:  # compares the length of the file with the header
                return tuple(file.get_slice("tensor").get_shape()) == tuple(shape)
        except (SafetensorError, OSError):
            return False

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"
