"""A folder of tensors keyed by what they were made from: latents of images, embeddings of prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from uniref_fast.files import write_whole

__all__ = ["TensorCache"]


class TensorCache:
    """Makes a tensor once and reads it afterwards. Any number of processes may share the folder.

    Args:
        folder: of safetensors files; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = self.misses = 0

    def get(
        self, key: str, make: Callable[[], Tensor], shape: tuple[int, ...] | None = None, where: str = ""
    ) -> Tensor:
        """The tensor of that key; `make()` is called, and its result kept, when there is none that can be read.

        Args:
            key: from `content_key`.
            make: computes the tensor.
            shape: that the tensor must have, where it is known; a kept one of another shape is computed anew.
            where: the place of the row that it is for, for warnings.

        A damaged file, or a folder that cannot be written, is a warning: what is wanted is made in any case.
        """
        if self.folder is None:
            return make()
        path = self.folder / key[:2] / f"{key}.safetensors"
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
            warnings.warn(f"{row}the cached {path} cannot be used ({error}); it is computed anew", stacklevel=2)
        self.misses += 1
        tensor = make()
        try:
            content = save({"tensor": tensor.detach().cpu().contiguous()})
            write_whole(path, lambda file: file.write(content), cache=True)
        except OSError as error:
            warnings.warn(
                f"the cache {self.folder} cannot be written ({error.strerror or error}); what it lacks is made each "
                "time",
                stacklevel=2,
            )
        return tensor
