"""The samples of packs: sizes of a row before anything is encoded, and tensors afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from uniref_fast.data.dataset import Row, RowError
from uniref_fast.data.images import ImageSource
from uniref_fast.encode import image_latents, prompt_embeddings, prompt_text, text_length
from uniref_fast.fingerprint import content_key, fingerprint
from uniref_fast.keyed_random import uniform
from uniref_fast.layout import Sample
from uniref_fast.models.families import family_of
from uniref_fast.request import Geometry, geometry, target_size
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.core.encoders import EncoderError, Encoders

__all__ = ["Encoded", "Encoder", "Form", "Prepared"]


@dataclass(frozen=True)
class Form:
    """Sizes and conditions that a row is encoded with.

    Attributes:
        budget: Joint pixel budget of the references: budget x budget pixels for all of them together; None scales each
            reference as diffusers does.
        target_side: Largest area of the target: target_side x target_side pixels.
        no_text: The instruction is replaced by the empty prompt.
        no_references: The references are left out.
    """

    budget: int | None
    target_side: int
    no_text: bool = False
    no_references: bool = False


@dataclass(frozen=True)
class Prepared:
    """A row and its sizes; its images are not read yet.

    Attributes:
        row: Row with the images.
        instruction: Instruction of the row, or the empty prompt if it is dropped.
        dropped: The references are left out.
        geometry: Sizes in pixels and tokens.
        sample: Sizes for the layout.
        mode: Mode in which its images are loaded (`Family.image_mode`).
    """

    row: Row
    instruction: str
    dropped: bool
    geometry: Geometry
    sample: Sample
    mode: Literal["RGB", "RGBA"] = "RGB"

    @property
    def task(self) -> str:
        """Task type of the row, for metrics."""
        return self.row.task_type or "none"

    @property
    def text_tokens(self) -> int:
        """Number of tokens of the instruction."""
        return text_length(self.sample.text)

    def load(self) -> tuple[Image.Image, list[Image.Image], Tensor | None]:
        """Return target and references, decoded, in `mode`, and `load_mask()`."""
        assert self.row.target is not None  # `Encoder.prepare` refuses rows without a target
        return self.row.target.load(self.mode), self.load_references(), self.load_mask()

    def load_mask(self) -> Tensor | None:
        """Return the mean of the mask over each token of the target, float32 `[n]`; None if the row has no mask."""
        pixels = self.row.load_mask()
        if pixels is None:
            return None
        _, height, width = self.sample.target
        return adaptive_avg_pool2d(torch.tensor(pixels)[None], (height, width)).flatten()

    def load_references(self) -> list[Image.Image]:
        """Return the references, decoded, in `mode`."""
        return [] if self.dropped else [image.load(self.mode) for image in self.row.references]


@dataclass(frozen=True)
class Encoded:
    """Tensors of a sample, on the device.

    Attributes:
        target: Latents of the clean target, `[n, C]`.
        references: Latents of all references, `[m, C]`; m may be 0.
        text: Prompt embeddings, `[l, D]`.
        mask: Mean of the mask over each token of the target, float32 `[n]`; None if the row has no mask.
    """

    target: Tensor
    references: Tensor
    text: Tensor
    mask: Tensor | None = None


class Encoder:
    """An encoder of rows that uses the tokenizer, processor, VAE and text encoder of a pipeline.

    Args:
        pipe: A pipeline of a family that training supports.
        cache: Cache of latents and embeddings.
        seed: Seed of the choice of dropped texts and references.
        drop_text: Share of samples whose instruction is replaced by the empty prompt.
        drop_references: Share of samples whose references are left out.
        encoders: Encoders of the pipeline, which may be freed later; None uses those that the pipeline has.
        guidance: Guidance scale that a transformer with guidance embeddings gets; None takes that of its family.

    Attributes:
        empty_prompt: Instruction of a sample whose instruction is dropped: the negative prompt of guidance.
    """

    def __init__(
        self,
        pipe: Any,
        cache: TensorCache,
        seed: int = 0,
        drop_text: float = 0.0,
        drop_references: float = 0.0,
        encoders: Encoders | None = None,
        guidance: float | None = None,
    ) -> None:
        self.pipe, self.cache, self.seed, self.encoders = pipe, cache, seed, encoders
        self.family = family_of(pipe)
        self.empty_prompt = self.family.usual_negative_prompt() or ""
        self.token_side = self.family.token_side(pipe)
        usual = self.family.training_guidance(pipe.transformer.config)
        self.guidance = usual if usual is None or guidance is None else guidance
        self.device = encoders.device if encoders else pipe._execution_device  # a property that searches all modules
        self._dtype = pipe.vae.dtype
        self.drop_text, self.drop_references = drop_text, drop_references
        self._vae = fingerprint(pipe.vae) if cache.folder else ""
        self._text = ""
        if cache.folder:
            self._text = content_key(fingerprint(pipe.text_encoder), self.family.prompt_template(pipe))

    def prepare(
        self, row: Row, key: Sequence[int], budget: int | None, target_side: int, rollout: bool = False
    ) -> Prepared:
        """Return a row with its sizes and numbers of tokens; only the headers of its images are read.

        Args:
            row: Row of a `Dataset`.
            key: (epoch, index), which decides whether text and references are dropped.
            budget: Joint pixel budget of the references: budget x budget pixels for all of them together; None scales
                each reference as diffusers does.
            target_side: Largest area of the target: target_side x target_side pixels.
            rollout: The row needs no target. Without a target the result has the last reference's aspect ratio, or is a
                square without references, and target_side x target_side pixels.

        Raises:
            RowError: The row cannot be trained on; the message names its place.
        """
        return self.prepare_form(row, self.form(key, budget, target_side), rollout)

    def form(self, key: Sequence[int], budget: int | None, target_side: int) -> Form:
        """Return the form that the sample of a key has; arguments as for `prepare`."""
        no_text = uniform(self.seed, "drop text", key) < self.drop_text
        no_references = uniform(self.seed, "drop references", key) < self.drop_references
        return Form(budget, target_side, no_text, no_references)

    def prepare_form(self, row: Row, form: Form, rollout: bool = False) -> Prepared:
        """Return a row with its sizes in a form; arguments and errors as for `prepare`."""
        if row.target is None and not rollout:
            raise RowError(row.where, "no target image to train on")
        instruction = self.empty_prompt if form.no_text else row.instruction
        try:
            own, sizes = row.sizes()
            sizes = [] if form.no_references else sizes
            if reason := self.family.image_refusal(self.pipe, sizes):
                raise RowError(row.where, reason)
            width, height = target_size(own, sizes, form.target_side)
            made = geometry(self.pipe, sizes, width=width, height=height, budget=form.budget)
            made = replace(made, guidance=self.guidance)
            text = prompt_text(self.pipe, instruction, made.condition_sizes)
        except ValueError as error:
            raise error if isinstance(error, RowError) else RowError(row.where, error) from error
        return Prepared(row, instruction, form.no_references, made, made.sample(text), self.family.image_mode)

    @torch.no_grad()
    def encode(self, prepared: Prepared, images: tuple[Image.Image, list[Image.Image], Tensor | None]) -> Encoded:
        """Return the tensors of a prepared row.

        Args:
            prepared: Row with its sizes.
            images: Result of `prepared.load()`.
        """
        row, (target, references, mask) = prepared.row, images
        assert row.target is not None
        latents = self._latents(row.where, row.target, target, prepared.geometry.size)
        clean, text = self.encode_conditions(prepared, references)
        return Encoded(latents, clean, text, None if mask is None else mask.to(self.device))

    @torch.no_grad()
    def encode_conditions(self, prepared: Prepared, references: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Return the latents of the references, `[m, C]`, and the prompt embeddings, `[l, D]`, of a prepared row.

        Args:
            prepared: Row with its sizes.
            references: Result of `prepared.load_references()`.

        Raises:
            RowError: The text encoder cannot process the row; the message names its place.
            EncoderError: A freed encoder cannot be loaded again, or has changed.
        """
        sources = [] if prepared.dropped else list(prepared.row.references)
        sizes, where = prepared.geometry.reference_sizes, prepared.row.where
        parts = [self._latents(where, *each) for each in zip(sources, references, sizes, strict=True)]
        none = torch.zeros(0, self.pipe.transformer.config.in_channels, device=self.device, dtype=self._dtype)
        return torch.cat([none, *parts]), self.encode_text(prepared, references)

    @torch.no_grad()
    def encode_text(self, prepared: Prepared, references: list[Image.Image], instruction: str | None = None) -> Tensor:
        """Return the prompt embeddings of a prepared row, `[l, D]`; errors as for `encode_conditions`.

        Args:
            prepared: Row with its sizes.
            references: Result of `prepared.load_references()`.
            instruction: Text that replaces the instruction of the row, such as the empty prompt for guidance.
        """
        sources = [] if prepared.dropped else prepared.row.references
        words = prepared.instruction if instruction is None else instruction
        seen, where = prepared.geometry.condition_sizes, prepared.row.where
        digests = [source.digest for source in sources] if self.cache.folder else []
        try:
            tokens = prepared.text_tokens if instruction is None else None
            key, shape = self._text_entry(words, digests, seen, tokens) if self.cache.folder else ("", (0, 0))
            text = self.cache.get(key, lambda: self._embeddings(words, references, seen), shape, where)
        except (torch.OutOfMemoryError, EncoderError):
            raise
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise RowError(where, f"the text encoder refuses it: {error}") from error
        if instruction is None and len(text) != prepared.text_tokens:
            raise RuntimeError(f"{where}: {len(text)} text tokens, {prepared.text_tokens} were planned")
        return text.to(self.device)

    def missing(self, prepared: Prepared, target: bool, texts: Sequence[str]) -> dict[str, int]:
        """Return the bytes of the tensors of a prepared row that the cache lacks, by their keys.

        Args:
            prepared: Row with its sizes.
            target: The latents of the target are needed too.
            texts: Texts besides the instruction that are encoded with the references.
        """
        sources = [] if prepared.dropped else prepared.row.references
        sized = list(zip(sources, prepared.geometry.reference_sizes, strict=True))
        if target and prepared.row.target is not None:
            sized.append((prepared.row.target, prepared.geometry.size))
        entries = [self._latents_entry(source.digest, size) for source, size in sized]
        digests, seen = [source.digest for source in sources], prepared.geometry.condition_sizes
        entries.append(self._text_entry(prepared.instruction, digests, seen, prepared.text_tokens))
        entries += [self._text_entry(words, digests, seen) for words in texts]
        return {
            key: math.prod(shape) * self._dtype.itemsize for key, shape in entries if not self.cache.holds(key, shape)
        }

    def _latents(self, where: str, source: ImageSource, image: Image.Image, size: tuple[int, int]) -> Tensor:
        key, shape = self._latents_entry(source.digest, size) if self.cache.folder else ("", (0, 0))
        return self.cache.get(key, lambda: self._image_latents(image, size), shape, where).to(self.device)

    def _latents_entry(self, digest: str, size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """Return the key and the shape of the latents of an image."""
        patch = self.token_side
        shape = size[0] // patch * (size[1] // patch), self.pipe.transformer.config.in_channels
        return content_key(self._vae, digest, size), shape

    def _text_entry(
        self, words: str, digests: list[str], sizes: Sequence[tuple[int, int]], tokens: int | None = None
    ) -> tuple[str, tuple[int, int]]:
        """Return the key and the shape of the embeddings of a text with references of (width, height) pixels.

        If the number of its tokens is not given, the text is tokenized.
        """
        length = text_length(prompt_text(self.pipe, words, sizes)) if tokens is None else tokens
        shape = length, self.family.text_channels(self.pipe.transformer.config)
        seen = digests if sizes else []  # without sizes, the text encoder sees no references
        return content_key(self._text, words, seen, sizes), shape

    def _image_latents(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        with self.encoders.present("vae") if self.encoders else contextlib.nullcontext():
            return image_latents(self.pipe, image, size, self.device)

    def _embeddings(self, words: str, references: list[Image.Image], sizes: Sequence[tuple[int, int]]) -> Tensor:
        with self.encoders.present("text_encoder") if self.encoders else contextlib.nullcontext():
            return prompt_embeddings(self.pipe, words, references, sizes, self.device)
