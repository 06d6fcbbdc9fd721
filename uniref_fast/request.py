"""Edit requests, and their sizes in pixels and tokens."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from uniref_fast.budget import MAX_ASPECT_RATIO, MAX_SIDE, SIDE_MULTIPLE, fit_to_budget
from uniref_fast.guidance import is_guided
from uniref_fast.layout import Grid, Sample
from uniref_fast.models.families import family_of
from uniref_fast.models.family import Family, Text
from uniref_fast.step_callback import TENSOR_INPUTS

__all__ = [
    "EditRequest",
    "EncodedRequest",
    "Geometry",
    "as_list",
    "check_size",
    "check_steps",
    "geometry",
    "image_areas",
    "parse_size",
    "request_geometry",
    "target_size",
    "validated",
    "validated_one",
]

MAX_STEPS = 10000
MAX_IMAGES = 10000
FIELD_KINDS: dict[str, tuple[type, str]] = {
    "true_cfg_scale": (numbers.Real, "a number"),
    "latents": (torch.Tensor, "a tensor"),
    "prompt_embeds_mask": (torch.Tensor, "a tensor"),
    "negative_prompt_embeds_mask": (torch.Tensor, "a tensor"),
}
"""Class of the values of optional fields, and its name in messages."""


@dataclass(frozen=True)
class EditRequest:
    """A prompt and any number of reference images of any sizes, which give one image or several.

    The defaults are those of a call of the pipeline (docs/editing.md).

    Attributes:
        prompt: The instruction. It names the references "picture 1", "picture 2", and so on. None with
            `prompt_embeds`.
        images: The references, in order; may be empty. Transparent pixels become white.
        negative_prompt: Negative prompt. None takes that of the pipeline; those of Qwen-Image models have none, and
            then no guidance. Commands use " " for these.
        true_cfg_scale: Scale of classifier-free guidance, which needs a value over 1 and a negative prompt, or the
            scale that the transformer embeds (FLUX.2 dev, FLUX.1 Kontext). None takes the default of the pipeline, 4.0
            for Qwen-Image-Edit.
        height: Height of the result in pixels, rounded down to a multiple of 16 (32 for Qwen-Image-2.1, 8 for the
            built-in model). None takes the size that the pipeline chooses. For Qwen-Image-Edit that is its output area
            (1024 x 1024 pixels) with the aspect ratio of the last image, or a square if there are no images.
        width: Width of the result in pixels, likewise.
        num_inference_steps: Number of denoising steps. None takes the default of the pipeline, 50 for Qwen-Image-Edit.
        num_images: Number of images, which differ in their noise. They share the embeddings of the prompts and the
            latents of the references. The result of more than one is a list of images.
        seed: Seed of the starting noise and of the noise that a stochastic scheduler draws in its steps, both drawn on
            the CPU: one seed for all images, or a list with a seed for each of them. None uses PyTorch's global
            generator.
        generator: Generator to use instead of a seed, or a list with a generator for each image.
        latents: Packed starting noise, `[num_images, height/16 * width/16, channels]` (8 for the built-in model). It is
            moved to the pipeline's device and dtype. Seed and generator are then used for the scheduler's noise only.
        prompt_embeds: Embeddings of prompt and references instead of the prompt, `[L, joint_attention_dim]` or with a
            batch dimension of 1, as `pipe.encode_prompt` returns them. The pipeline then needs no text encoder.
        prompt_embeds_mask: Valid rows of `prompt_embeds`, `[L]` or `[1, L]`; None for all.
        negative_prompt_embeds: Embeddings instead of the negative prompt.
        negative_prompt_embeds_mask: Valid rows of `negative_prompt_embeds`.
        lora: Scales of the LoRA adapters of this request, such as `{"style": 0.8}`. The adapters were loaded by
            `pipe.load_lora_weights(..., adapter_name="style")`. `{}` uses no adapter; None uses the active adapters of
            the pipeline with their scales.
        callback_on_step_end: Function that is called after each step of this edit, `callback(pipe, step, timestep,
            callback_kwargs)`, as in diffusers (docs/editing.md). The dict that it returns replaces tensors, and
            `pipe._interrupt = True` ends the edit.
        callback_on_step_end_tensor_inputs: Tensors in `callback_kwargs`: "latents" `[num_images, n, channels]`,
            "prompt_embeds" `[1, L, C]`, as wide as `prompt_embeds`, or both.
    """

    prompt: str | None = None
    images: Sequence[Image.Image] = ()
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    num_images: int = 1
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_embeds_mask: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds_mask: torch.Tensor | None = None
    lora: Mapping[str, float] | None = None
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    @property
    def generators(self) -> list[torch.Generator]:
        """Generators that the request was given."""
        given = self.generator
        return [] if given is None else [given] if isinstance(given, torch.Generator) else [*given]

    @property
    def guided(self) -> bool:
        """True if classifier-free guidance runs, with two predictions per step; of a checked request."""
        return self.true_cfg_scale is not None and is_guided(self.true_cfg_scale) and self.has_negative_prompt

    @property
    def has_negative_prompt(self) -> bool:
        """True if the request has a negative prompt or embeddings of one."""
        return self.negative_prompt is not None or self.negative_prompt_embeds is not None

    @property
    def texts(self) -> list[tuple[str | None, torch.Tensor | None, torch.Tensor | None]]:
        """(text, embeddings, mask) of the prompt and, with guidance, of the negative prompt."""
        negative = (self.negative_prompt, self.negative_prompt_embeds, self.negative_prompt_embeds_mask)
        return [(self.prompt, self.prompt_embeds, self.prompt_embeds_mask), *[negative] * self.guided]


@dataclass(frozen=True)
class EncodedRequest(EditRequest):
    """A request with embeddings, and with the text of each of them, which may have places of references.

    Attributes:
        encoded_texts: Text of the embeddings of the prompt and, with guidance, of the negative prompt, as
            `Family.encode_prompt` returns it.
    """

    encoded_texts: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Geometry:
    """Sizes of a request for a pipeline: (width, height) in pixels, grids in tokens.

    Attributes:
        size: Size of the result before it is cropped.
        condition_sizes: Sizes of the references for the text encoder.
        reference_sizes: Sizes of the references for the VAE.
        patch: Side of a token in pixels.
        guidance: Guidance scale that the transformer embeds, or None (`Family.embedded_guidance`).
        crop: Part (left, top, right, bottom) of the decoded image that is the result; None for the whole image.
    """

    size: tuple[int, int]
    condition_sizes: tuple[tuple[int, int], ...]
    reference_sizes: tuple[tuple[int, int], ...]
    patch: int
    guidance: float | None = None
    crop: tuple[int, int, int, int] | None = None

    @property
    def result_size(self) -> tuple[int, int]:
        """Width and height of the result, which is a part of the decoded image if there is a `crop`."""
        return self.size if self.crop is None else (self.crop[2] - self.crop[0], self.crop[3] - self.crop[1])

    @property
    def target_tokens(self) -> int:
        """Number of tokens of the result."""
        return math.prod(self.grid(self.size))

    def grid(self, size: tuple[int, int]) -> Grid:
        """Return the token grid of an image of (width, height) pixels."""
        return 1, size[1] // self.patch, size[0] // self.patch

    def seen(self, family: Family) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Return the sizes of the references that the prompt is encoded with, and the negative prompt."""
        return self.condition_sizes, self.condition_sizes if family.negative_images else ()

    def sample(self, text: int | tuple[tuple[int, bool], ...]) -> Sample:
        """Return the sample of a layout for this request with `text` text tokens, or (length, valid) runs of them."""
        references = tuple(self.grid(size) for size in self.reference_sizes)
        return Sample(text, self.grid(self.size), references, guidance=self.guidance)


def validated(requests: Sequence[EditRequest | Mapping[str, Any]], pipe: Any = None) -> list[EditRequest]:
    """Check requests and return them as `EditRequest`s.

    Args:
        requests: `EditRequest`s, or mappings of its fields.
        pipe: Pipeline of the requests, which gives numbers of steps and scales that are None, and whose embeddings and
            scheduler are checked too. None checks the requests only.

    Raises:
        ValueError: If a request has an impossible value; the message names the request and the problem.
        TypeError: If a request or a field has the wrong type, likewise.
    """
    return [validated_one(request, f"request {i}", pipe) for i, request in enumerate(as_list(requests), start=1)]


def as_list(requests: Any) -> list[Any]:
    """Return requests as a list, which has one item if a request is given alone, or raise ValueError for none."""
    requests = [requests] if isinstance(requests, (EditRequest, Mapping)) else list(requests)
    if not requests:
        raise ValueError("no requests given")
    return requests


def validated_one(request: Any, where: str, pipe: Any = None) -> EditRequest:
    """Check a request and return it as an `EditRequest`.

    Args:
        request: An `EditRequest`, or a mapping of its fields.
        where: Name of the request in messages.
        pipe: Pipeline of the request, as for `validated`.

    Raises:
        ValueError: If the request has an impossible value.
        TypeError: If the request or a field has the wrong type.
    """
    if isinstance(request, Mapping):
        unknown = set(request) - set(EditRequest.__dataclass_fields__)
        if unknown:
            known = ", ".join(EditRequest.__dataclass_fields__)
            raise ValueError(f"{where} has unknown fields {sorted(unknown)}; known: {known}")
        request = EditRequest(**request)
    if not isinstance(request, EditRequest):
        raise TypeError(f"{where} must be an EditRequest or a mapping, got {type(request).__name__}")
    _check(request, where)
    if pipe is None:
        return request
    request = _completed(request, pipe)
    _check_embeddings(request, where, pipe)
    check_steps(pipe, request.num_inference_steps, where)
    return family_of(pipe).checked(pipe, request, where)


def check_steps(pipe: Any, steps: int | None, where: str) -> None:
    """Raise ValueError if the scheduler of a pipeline cannot make a number of steps; `where` names the request."""
    if steps == 1 and pipe.scheduler.config.get("shift_terminal"):
        raise ValueError(
            f"{where}: num_inference_steps=1 gives this scheduler no finite step (its shift_terminal stretches the "
            "steps between the first and the last); use at least 2"
        )


def _completed(request: EditRequest, pipe: Any) -> EditRequest:
    """Return a request with the number of steps and the scale that a call of the pipeline has by default."""
    if request.num_inference_steps is not None and request.true_cfg_scale is not None:
        return request
    steps, scale = family_of(pipe).call_defaults(pipe)
    if request.num_inference_steps is not None:
        steps = request.num_inference_steps
    if request.true_cfg_scale is not None:
        scale = request.true_cfg_scale
    return replace(request, num_inference_steps=steps, true_cfg_scale=scale)


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height of a text such as "768x1024", or raise ValueError."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"--image-size is WIDTHxHEIGHT in pixels, for example 768x1024; got {text!r}")
    return int(width), int(height)


def _check(request: EditRequest, where: str) -> None:
    text = request.prompt
    if request.prompt_embeds is not None and text is not None:
        raise ValueError(f"{where}: give prompt or prompt_embeds, not both")
    if request.negative_prompt_embeds is not None and request.negative_prompt is not None:
        raise ValueError(f"{where}: give negative_prompt or negative_prompt_embeds, not both")
    if request.prompt_embeds is None and (not isinstance(text, str) or not text.strip()):
        raise ValueError(f"{where} has no prompt: it must be a text that is not empty, got {text!r}")
    if isinstance(request.images, Image.Image) or not isinstance(request.images, Sequence):
        raise TypeError(f"{where}: images must be a list of PIL images, got {type(request.images).__name__}")
    if request.negative_prompt is not None and not isinstance(request.negative_prompt, str):
        raise TypeError(
            f"{where}: negative_prompt must be a text or None, got {type(request.negative_prompt).__name__}"
        )
    for name, (kind, words) in FIELD_KINDS.items():
        value = getattr(request, name)
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{where}: {name} must be {words}, got {value!r:.80}")
    if request.true_cfg_scale is not None and not math.isfinite(request.true_cfg_scale):
        raise ValueError(f"{where}: true_cfg_scale must be a finite number, got {request.true_cfg_scale}")
    for j, image in enumerate(request.images):
        _check_image(image, f"{where}: image {j + 1}")
    for name, least, most in (("height", SIDE_MULTIPLE, MAX_SIDE), ("width", SIDE_MULTIPLE, MAX_SIDE),
                              ("num_inference_steps", 1, MAX_STEPS), ("num_images", 1, MAX_IMAGES)):  # fmt: skip
        value = getattr(request, name)
        if value is None and name != "num_images":
            continue
        if not isinstance(value, int):
            raise TypeError(f"{where}: {name} must be an int, got {value!r}")
        if not least <= value <= most:
            raise ValueError(f"{where}: {name} must be at least {least} and at most {most}, got {value}")
    _check_seeds(request, where)
    _check_callback(request, where)


def _check_seeds(request: EditRequest, where: str) -> None:
    kinds: list[tuple[str, Any, str]] = [
        ("seed", numbers.Integral, "an int"),
        ("generator", torch.Generator, "a torch.Generator"),
    ]
    for name, kind, words in kinds:
        value: Any = getattr(request, name)
        if value is None:
            continue
        several = isinstance(value, Sequence) and not isinstance(value, str)
        for each in value if several else [value]:
            if not isinstance(each, kind):
                wanted = f"{words}, or a list with one for each image"
                raise TypeError(f"{where}: {name} must be {wanted}, got {value!r:.80}")
            if name == "seed" and not -(2**63) <= each < 2**64:
                raise ValueError(f"{where}: seed must fit 64 bits, got {each}")
        if several and len(value) != request.num_images:
            raise ValueError(f"{where}: {name} has {len(value)} items for num_images={request.num_images}")
    if request.seed is not None and request.generator is not None:
        raise ValueError(f"{where}: give at most one of seed and generator")


def _check_callback(request: EditRequest, where: str) -> None:
    callback, names = request.callback_on_step_end, request.callback_on_step_end_tensor_inputs
    if callback is not None and not callable(callback):
        raise TypeError(f"{where}: callback_on_step_end must be a function, got {callback!r:.80}")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{where}: callback_on_step_end_tensor_inputs must be a list of names, got {names!r:.80}")
    if unknown := [name for name in names if name not in TENSOR_INPUTS]:
        raise ValueError(
            f"{where}: callback_on_step_end_tensor_inputs can be {' and '.join(TENSOR_INPUTS)}, got {unknown}"
        )


def _check_embeddings(request: EditRequest, where: str, pipe: Any) -> None:
    width = family_of(pipe).text_channels(pipe.transformer.config)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds, mask = getattr(request, name), getattr(request, f"{name}_mask")
        if embeds is None:
            if mask is not None:
                raise ValueError(f"{where}: {name}_mask is given without {name}")
            continue
        if not isinstance(embeds, torch.Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(embeds).__name__}")
        shape = tuple(embeds.shape)
        if shape[-1:] != (width,) or len(shape) not in (2, 3) or shape[:-2] not in ((), (1,)):
            raise ValueError(
                f"{where}: {name} must be [L, {width}] or [1, L, {width}] for this model, got {list(shape)}"
            )
        if mask is not None and (tuple(mask.shape) not in (shape[-2:-1], (1, shape[-2])) or not mask.any()):
            raise ValueError(
                f"{where}: {name}_mask must be [{shape[-2]}] or [1, {shape[-2]}] with at least one valid row, got "
                f"{list(mask.shape)}"
            )
    if pipe.components.get("text_encoder") is None and any(embeds is None for _, embeds, _ in request.texts):
        raise ValueError(
            f"{where}: the pipeline has no text encoder; give prompt_embeds (and for guidance negative_prompt_embeds)"
        )


def _check_image(image: Any, where: str) -> None:
    if not isinstance(image, Image.Image):
        raise TypeError(f"{where} must be a PIL image, got {type(image).__name__}")
    if image.mode in ("I", "F"):
        raise ValueError(f"{where} has mode {image.mode!r}, whose range is not defined; convert it to 8 or 16 bits")
    check_size(image.size, where)


def check_size(size: tuple[int, int], where: str) -> None:
    """Raise ValueError for an image size that no model can take; `where` names the image in the message."""
    if min(size) < 1:
        raise ValueError(f"{where} has size {size[0]} x {size[1]}; sides must be at least 1 pixel")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(
            f"{where} of {size[0]} x {size[1]} pixels is too elongated: the text encoder takes aspect ratios up to "
            f"{MAX_ASPECT_RATIO}"
        )


def image_areas(pipe: Any) -> tuple[int, int, int]:
    """Return three areas in pixels: of a reference for the text encoder, of one for the VAE, and of the result.

    They come from the pipeline's attributes (`condition_image_area`, `vae_image_area`, `output_area`), else from its
    transformer's configuration, else from diffusers' constants.
    """
    return family_of(pipe).image_areas(pipe)


def geometry(
    pipe: Any,
    sizes: Sequence[tuple[int, int]],
    *,
    width: int | None = None,
    height: int | None = None,
    budget: int | None = None,
) -> Geometry:
    """Compute the sizes that a pipeline gives the references and the result of a request.

    Args:
        pipe: A pipeline of a supported family.
        sizes: (width, height) of each reference in pixels.
        width: Requested width of the result in pixels; None computes it as `EditRequest` describes.
        height: Requested height of the result, likewise.
        budget: Joint pixel budget of all references (`fit_to_budget`), the side of a square in pixels; None sizes each
            reference alone, as diffusers does.

    Raises:
        ValueError: If an image would be smaller than one token.
    """
    result = family_of(pipe).geometry(pipe, sizes, width, height, budget)
    references, patch = result.reference_sizes, result.patch
    for what, size in [("the result", result.size), *((f"image {i + 1}", s) for i, s in enumerate(references))]:
        if min(size) < patch:
            raise ValueError(
                f"{what} would be {size[0]} x {size[1]} pixels, under one {patch}-pixel token; "
                "the image is too elongated or the size too small"
            )
    return result


def request_geometry(pipe: Any, request: EditRequest, budget: int | None = None) -> Geometry:
    """Compute the sizes of a request; `pipe` and `budget` as for `geometry`."""
    sizes = [image.size for image in request.images]
    result = geometry(pipe, sizes, width=request.width, height=request.height, budget=budget)
    return replace(result, guidance=family_of(pipe).embedded_guidance(pipe, request))


def target_size(target: tuple[int, int] | None, references: Sequence[tuple[int, int]], side: int) -> tuple[int, int]:
    """Return (width, height) of the result for a dataset row, an area of at most side x side pixels.

    Args:
        target: Size of the row's target image: the result has it, made smaller where it is over the area. None for a
            row without a target: the result has the aspect ratio of the last reference (a square without references)
            and the whole area.
        references: Sizes of the references.
        side: Side of a square in pixels.
    """
    wanted = target or (references[-1] if references else (1, 1))
    (size,) = fit_to_budget([wanted], side, upscale=target is None)
    return size
