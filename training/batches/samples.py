"""From a row to what a pack is made of: its sizes before anything is encoded, its tensors afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.data.dataset import Row, RowError
from uniref_fast.encode import image_latents, prompt_embeddings, prompt_tokens
from uniref_fast.fingerprint import content_key, fingerprint
from uniref_fast.guidance import EMPTY_PROMPT
from uniref_fast.keyed_random import uniform
from uniref_fast.layout import Sample
from uniref_fast.request import Geometry, geometry, target_size
from uniref_fast.training.batches.latent_cache import TensorCache

__all__ = ["Encoded", "Encoder", "Prepared"]


@dataclass(frozen=True)
class Prepared:
    """A row with its sizes, not yet read.

    Attributes:
        row: where the images are.
        instruction: the row's, or the empty one.
        dropped: whether the references are left out.
        geometry: sizes in pixels and tokens.
        sample: for the layout.
    """

    row: Row
    instruction: str
    dropped: bool
    geometry: Geometry
    sample: Sample

    @property
    def task(self) -> str:
        return self.row.task_type or "none"

    def load(self) -> tuple[Image.Image, list[Image.Image]]:
        """Target and references, decoded; RGB."""
        assert self.row.target is not None  # `Encoder.prepare` refuses rows without
        return self.row.target.load(), self.load_references()

    def load_references(self) -> list[Image.Image]:
        """References, decoded; RGB."""
        return [] if self.dropped else [image.load() for image in self.row.references]


@dataclass(frozen=True)
class Encoded:
    """A sample's tensors on the device: clean target `[n, C]`, references `[m, C]`, prompt embeddings `[l, D]`."""

    target: Tensor
    references: Tensor
    text: Tensor


class Encoder:
    """Sizes, latents and embeddings by a pipeline's own tokenizer, processor, VAE and text encoder.

    Args:
        pipe: a `QwenImageEditPlusPipeline`.
        cache: what was encoded once is read from it.
        seed: of what is dropped.
        drop_text, drop_references: shares of samples without instruction, and without references.
    """

    def __init__(
        self, pipe: Any, cache: TensorCache, seed: int = 0, drop_text: float = 0.0, drop_references: float = 0.0
    ) -> None:
        self.pipe, self.cache, self.seed = pipe, cache, seed
        self.device, self._dtype = pipe._execution_device, pipe.vae.dtype  # asked for once: they look through modules
        self.drop_text, self.drop_references = drop_text, drop_references
        self._vae = fingerprint(pipe.vae) if cache.folder else ""
        self._text = content_key(fingerprint(pipe.text_encoder), pipe.prompt_template_encode) if cache.folder else ""

    def prepare(self, row: Row, key: Sequence[int], side: int, target_side: int, rollout: bool = False) -> Prepared:
        """Sizes and tokens of a row; reads the images' headers only.

        Args:
            row: from a `Dataset`.
            key: (epoch, index), which decides what is dropped.
            side: joint pixel budget of the references, side x side.
            target_side: largest target, target_side x target_side pixels.
            rollout: the row needs no target; without one the result gets the last reference's aspect ratio (a square
                without references) at target_side x target_side pixels.

        Raises:
            RowError: for a row that cannot be trained on; with its place.
        """
        if row.target is None and not rollout:
            raise RowError(row.where, "no target image to train on")
        dropped = uniform(self.seed, "drop references", key) < self.drop_references
        instruction = EMPTY_PROMPT if uniform(self.seed, "drop text", key) < self.drop_text else row.instruction
        try:
            own, sizes = row.sizes()
            sizes = [] if dropped else sizes
            width, height = target_size(own, sizes, target_side)
            made = geometry(self.pipe, sizes, width=width, height=height, budget=side**2)
            text = prompt_tokens(self.pipe, instruction, made.condition_sizes)
        except ValueError as error:
            raise error if isinstance(error, RowError) else RowError(row.where, error) from error
        return Prepared(row, instruction, dropped, made, made.sample(text))

    @torch.no_grad()
    def encode(self, prepared: Prepared, images: tuple[Image.Image, list[Image.Image]]) -> Encoded:
        """The tensors of a prepared row, whose `load()` gave the images."""
        row, (target, references) = prepared.row, images
        assert row.target is not None
        latents = self._latents(row.where, row.target, target, prepared.geometry.size)
        clean, text = self.encode_conditions(prepared, references)
        return Encoded(latents, clean, text)

    @torch.no_grad()
    def encode_conditions(
        self, prepared: Prepared, references: list[Image.Image], instruction: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """References `[m, C]` and prompt embeddings `[l, D]` of a prepared row; `load_references()` gave the images.

        `instruction` stands in for the row's, such as the empty one that guidance needs.

        Raises:
            RowError: for a row that the text encoder refuses; with its place.
        """
        made, device = prepared.geometry, self.device
        sources = [] if prepared.dropped else list(prepared.row.references)
        where = prepared.row.where
        parts = [self._latents(where, *each) for each in zip(sources, references, made.reference_sizes, strict=True)]
        none = torch.zeros(0, self.pipe.transformer.config.in_channels, device=device, dtype=self._dtype)
        digests = [source.digest() for source in sources] if self.cache.folder else []
        words = prepared.instruction if instruction is None else instruction
        key = content_key(self._text, words, digests, made.condition_sizes)
        seen = made.condition_sizes
        try:
            tokens = prompt_tokens(self.pipe, words, seen) if self.cache.folder else 0
            shape = tokens, self.pipe.transformer.config.joint_attention_dim
            text = self.cache.get(
                key, lambda: prompt_embeddings(self.pipe, words, references, seen, device), shape, where
            )
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise RowError(prepared.row.where, f"the text encoder refuses it: {error}") from error
        if instruction is None and len(text) != prepared.sample.text:
            raise RuntimeError(f"{prepared.row.where}: {len(text)} text tokens, {prepared.sample.text} were planned")
        return torch.cat([none, *parts]), text.to(device)

    def _latents(self, where: str, source: Any, image: Image.Image, size: tuple[int, int]) -> Tensor:
        key = content_key(self._vae, source.digest(), size) if self.cache.folder else ""
        patch = self.pipe.vae_scale_factor * 2
        shape = size[0] // patch * (size[1] // patch), self.pipe.transformer.config.in_channels
        made = self.cache.get(key, lambda: image_latents(self.pipe, image, size, self.device), shape, where)
        return made.to(self.device)
