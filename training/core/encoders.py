"""The text encoder and the VAE of a run: on the device, or freed and loaded again for as long as they are used."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from uniref_fast.fingerprint import weights_fingerprint
from uniref_fast.loading import load_part
from uniref_fast.models.single_frame import single_frame

__all__ = ["EncoderError", "Encoders"]

PARTS = ("vae", "text_encoder")


class EncoderError(RuntimeError):
    """A freed encoder could not be loaded again, or has changed; no row is the reason, and the run ends."""


class Encoders:
    """The frozen encoders of a pipeline.

    Args:
        pipe: A pipeline in host memory.
        model: Name of the model that the pipeline was loaded from: "builtin", a folder, or a hub id.
        dtype: Dtype of the weights.
        device: Device to encode and decode on.

    Attributes:
        bytes: Bytes of all weights.
        freed: The encoders have been freed.
        vae_config: Configuration of the VAE.
    """

    def __init__(self, pipe: Any, model: str, dtype: torch.dtype, device: torch.device) -> None:
        self.pipe, self.model, self.dtype, self.device = pipe, model, dtype, device
        self.freed = False
        parts = {name: getattr(pipe, name).requires_grad_(False) for name in PARTS}
        self.vae_config = pipe.vae.config
        self._kinds = {name: type(part) for name, part in parts.items()}
        self._weights = {name: weights_fingerprint(part) for name, part in parts.items()}
        self.bytes = sum(p.numel() * p.element_size() for part in parts.values() for p in part.parameters())
        self._frames = contextlib.ExitStack()  # images, never videos, as long as the VAE is there
        self._frames.enter_context(single_frame(pipe.vae))

    def to_device(self) -> None:
        """Move both to the device."""
        for name in PARTS:
            self._move(name)

    def _move(self, name: str) -> None:
        """Move an encoder to the device; if it is there, `to` would only visit all its modules."""
        part = getattr(self.pipe, name)
        if next(part.parameters()).device != self.device:
            part.to(self.device)

    def free(self) -> None:
        """Free both; `present` loads them again."""
        self._frames.close()
        self.pipe.register_modules(**dict.fromkeys(PARTS))
        self.freed = True
        self._collect()

    @contextlib.contextmanager
    def present(self, *names: str) -> Iterator[None]:
        """Have encoders on the device within the block; those that are freed are loaded for it and freed again.

        Args:
            *names: Components of the pipeline: "vae", "text_encoder" or both.

        Raises:
            EncoderError: An encoder cannot be loaded, or has other weights than when the run was started.
        """
        absent = [name for name in names if getattr(self.pipe, name) is None]
        try:
            with contextlib.ExitStack() as stack:
                for name in absent:
                    self.pipe.register_modules(**{name: self._loaded(name)})
                if "vae" in absent:
                    stack.enter_context(single_frame(self.pipe.vae))
                for name in names:
                    self._move(name)
                yield
        finally:
            if absent:
                self.pipe.register_modules(**dict.fromkeys(absent))
                self._collect()

    def _loaded(self, name: str) -> Any:
        try:
            part = load_part(self.model, name, self._kinds[name], self.dtype).requires_grad_(False)
        except (ValueError, OSError) as error:
            raise EncoderError(f"the {name} of model = {self.model} cannot be loaded again: {error}") from error
        if weights_fingerprint(part) != self._weights[name]:
            raise EncoderError(f"the {name} of model = {self.model} has changed since the run was started")
        return part

    def _collect(self) -> None:
        gc.collect()  # modules may refer to themselves
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
