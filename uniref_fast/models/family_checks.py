"""Checks and conversions of a pipeline's parts that several families share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from uniref_fast.guidance import is_guided
from uniref_fast.models.image_sizes import ImageOfSize
from uniref_fast.quantised import compute_dtype

if TYPE_CHECKING:
    from uniref_fast.request import EditRequest

__all__ = [
    "check_options",
    "check_rotary_axes",
    "check_widths",
    "given_embeddings",
    "refuse_embeddings_of_references",
    "refuse_masks",
    "refuse_negative_prompt",
    "refused_image",
    "with_negative_prompt",
]

NUMBERS = {3: "three", 4: "four"}


def check_options(given: str, config: Mapping[str, Any], wanted: Mapping[str, Any], instead: str) -> None:
    """Raise ValueError for a transformer with other options than the packed model supports (`Family.check_config`).

    Args:
        given: Name of the pipeline in the message.
        config: Configuration of the transformer; an option that it does not have has the wanted value.
        wanted: Value of each option.
        instead: End of the message: what is supported.
    """
    for name, value in wanted.items():
        found = config.get(name, value)
        if ([*found] if isinstance(found, tuple) else found) != value:
            raise ValueError(
                f"{given} has a transformer with {name} = {config[name]!r}, which is not supported (it must be "
                f"{value!r}); {instead}"
            )


def check_rotary_axes(given: str, config: Mapping[str, Any], usual: tuple[int, ...], instead: str) -> None:
    """Raise ValueError if the rotary axes of a transformer do not fill a head (`Family.check_config`).

    Args:
        given: Name of the pipeline in the message.
        config: Configuration of the transformer.
        usual: Axes of a configuration that names none; their number is the number that is needed.
        instead: End of the message: what is supported.
    """
    axes, width = config.get("axes_dims_rope", usual), config.get("attention_head_dim", 128)
    if len(axes) != len(usual) or sum(axes) != width:
        raise ValueError(
            f"{given} has a transformer with rotary axes {tuple(axes)}, which must be {NUMBERS[len(usual)]} that add "
            f"up to the width of a head, {width}; {instead}"
        )


def check_widths(given: str, config: Any, widths: Iterable[tuple[str, str, int]]) -> None:
    """Raise ValueError if parts of a pipeline give other widths than its transformer takes (`Family.check_parts`).

    Args:
        given: Name of the pipeline in the message.
        config: Configuration of the transformer.
        widths: Option of the configuration, name of the part, and number of channels that the part gives.
    """
    for option, part, theirs in widths:
        if config[option] != theirs:
            raise ValueError(
                f"{given} has a transformer with {option} = {config[option]}, but its {part} gives {theirs} channels; "
                "the two belong to different models"
            )


def given_embeddings(
    pipe: Any, embeds: Tensor, mask: Tensor | None, device: Any, cast: bool
) -> tuple[Tensor, Tensor | None]:
    """Return given prompt embeddings `[1, L, C]` and their mask `[1, L]` as a pipeline's `encode_prompt` takes them.

    Args:
        pipe: The pipeline.
        embeds: Embeddings `[L, C]` or `[1, L, C]`.
        mask: Valid rows, `[L]` or `[1, L]`, or None.
        device: Device of the result.
        cast: Cast the embeddings to the dtype of the transformer.
    """
    embeds = embeds.reshape(1, *embeds.shape[-2:]).to(device, compute_dtype(pipe.transformer) if cast else None)
    return embeds, None if mask is None else mask.reshape(1, -1).to(device)


def refuse_masks(request: EditRequest, where: str) -> None:
    """Raise ValueError if a request masks text tokens, for a model that attends to all of them (`check_request`)."""
    for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask"):
        mask = getattr(request, name)
        if mask is not None and not mask.bool().all():
            raise ValueError(f"{where}: {name} masks tokens, and this model attends to all of them; leave it out")


def refuse_negative_prompt(pipe: Any, request: EditRequest, where: str, reason: str) -> None:
    """Raise ValueError with the reason if a request has a negative prompt that says something (`check_request`)."""
    if (request.negative_prompt or "").strip() or request.negative_prompt_embeds is not None:
        raise ValueError(f"{where}: {type(pipe).__name__} takes no negative prompt: {reason}")


def refuse_embeddings_of_references(request: EditRequest, where: str) -> None:
    """Raise ValueError if a request has embeddings of a prompt and references, whose places these do not record."""
    if request.images and any(embeds is not None for _, embeds, _ in request.texts):
        raise ValueError(
            f"{where}: embeddings of a prompt do not record where its references are in this model; give the "
            "prompt itself, or no images"
        )


def refused_image(pipe: Any, sizes: Sequence[tuple[int, int]]) -> str | None:
    """Return why the image processor of FLUX.2 refuses references of (width, height) in pixels (`image_refusal`)."""
    for i, size in enumerate(sizes, start=1):
        try:
            pipe.image_processor.check_image_input(ImageOfSize(size))
        except ValueError as error:
            return f"image {i}: {error}"
    return None


def with_negative_prompt(pipe: Any, request: EditRequest, where: str, text: str | None) -> EditRequest:
    """Return a request, with the negative prompt of its pipeline if it is guided and has none (`check_request`).

    Args:
        pipe: The pipeline.
        request: The request, with a scale.
        where: Name of the request in the message.
        text: Negative prompt of the pipeline.

    Raises:
        ValueError: If the pipeline cannot encode the negative prompt.
    """
    scale = request.true_cfg_scale
    if scale is None or not is_guided(scale) or request.has_negative_prompt:
        return request
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"{where}: the pipeline has no text encoder; guidance needs negative_prompt_embeds")
    return replace(request, negative_prompt=text)
