"""Requests of an evaluation: the rows of each file, and a row with its images, its size and its edit request."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from PIL import Image

from uniref_fast.data.dataset import Dataset, Row, RowError
from uniref_fast.encode import prompt_embeddings, to_rgb
from uniref_fast.guidance import negative_prompt_for
from uniref_fast.keyed_random import draw
from uniref_fast.models.families import family_of
from uniref_fast.request import EditRequest, request_geometry, target_size, validated
from uniref_fast.scenes.scene import crop_box

__all__ = ["EvalRequest", "encoder_refusal", "eval_request", "guidance_texts", "input_baseline", "rows_by_file"]

GREY = (128, 128, 128)


@dataclass(frozen=True)
class EvalRequest:
    """A row that can be evaluated, with its images in memory.

    Attributes:
        row: The dataset row.
        target: The exact result at the size of the generated image, or None.
        request: The edit request; its prompt and its images, the references, have the forms of the pipeline's family.
        size: (width, height) of the result in pixels.
    """

    row: Row
    target: Image.Image | None
    request: EditRequest
    size: tuple[int, int]


def rows_by_file(dataset: Dataset, limit: int | None, language: str | None = None) -> dict[str, list[int]]:
    """Return the numbers of the rows to evaluate by file; a file's label is its name without the suffix.

    Args:
        dataset: The rows.
        limit: Largest number of rows of each file, or None.
        language: If given, take only rows of this language, and rows that cannot be read.

    Raises:
        ValueError: A file has no rows to evaluate.
    """
    numbers: dict[str, list[int]] = {name: [] for name in dataset.files}
    names = iter(dataset.files)
    name, found = next(names), set[str]()
    for number in range(len(dataset)):
        while not dataset.where(number).startswith(f"{name}:"):  # the rows of one file are consecutive
            name = next(names)
        if limit is None or len(numbers[name]) < limit:
            row_language = None
            if language is not None:
                with contextlib.suppress(RowError):
                    row_language = dataset[number].language or "none"
                    found.add(row_language)
            if row_language in (None, language):
                numbers[name].append(number)
    if language is not None and language not in found:
        raise ValueError(f'no row has the language "{language}"; languages are: {", ".join(sorted(found)) or "none"}')
    if empty := [name for name, found in numbers.items() if not found]:
        raise ValueError(f"no rows in {', '.join(empty)}; leave these files out")
    return dict(zip(_labels(dataset.files), numbers.values(), strict=True))


def _labels(names: Iterable[str]) -> list[str]:
    """Return labels that are also valid paths below any folder."""
    paths = [PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", ".."))) for name in names]
    count = Counter(path.with_suffix("") for path in paths)
    return [str(path.with_suffix("") if count[path.with_suffix("")] == 1 else path) for path in paths]


def eval_request(
    pipe: Any, row: Row, key: tuple[str, int], *, target_side: int, budget: int | None, seed: int,
    num_inference_steps: int, true_cfg_scale: float, size: tuple[int, int] | None = None,
) -> EvalRequest:  # fmt: skip
    """Read a row's images and build its edit request.

    Args:
        pipe: The pipeline, which determines possible sizes.
        row: The dataset row.
        key: (name of the file, index of the row in it); together with the seed it determines the noise.
        target_side: Limit of the result's area, target_side x target_side pixels. The result has the target's size if
            it is within the limit. Without a target it has this area and the aspect ratio of the last reference, or is
            square without references.
        budget: Joint pixel budget of the references, the side of a square in pixels; None uses the sizes of diffusers.
        seed: Seed of the evaluation.
        num_inference_steps: Number of denoising steps.
        true_cfg_scale: True CFG scale.
        size: (width, height) of the result; overrides the size that follows from the row.

    Raises:
        ValueError: The row cannot be edited.
    """
    family = family_of(pipe)
    references = [source.load(family.image_mode) for source in row.references]
    target = None if row.target is None else row.target.load()
    sizes = [image.size for image in references]
    width, height = size or target_size(target.size if target else None, sizes, target_side)
    request = EditRequest(
        family.written(row.instruction),
        references,
        negative_prompt=negative_prompt_for(true_cfg_scale, family.usual_negative_prompt()),
        true_cfg_scale=true_cfg_scale,
        width=width,
        height=height,
        num_inference_steps=num_inference_steps,
        seed=draw(seed, "evaluation", key).initial_seed(),  # type: ignore[arg-type]  # keys may be texts
    )
    try:
        request = _checked(pipe, request)
    except TypeError as error:
        raise ValueError(str(error)) from error
    result_size = request_geometry(pipe, request, budget).result_size
    if target is not None and target.size != result_size:
        target = target.resize(result_size, Image.Resampling.LANCZOS)
    return EvalRequest(row, target, request, result_size)


def _checked(pipe: Any, request: EditRequest) -> EditRequest:
    """Return a checked request. The text encoder may be absent: training frees it, and encodes prompts itself."""
    if pipe.text_encoder is not None:
        (request,) = validated([request], pipe)
        return request
    (request,) = validated([request])
    return family_of(pipe).checked(pipe, request, "request 1")


def guidance_texts(pipe: Any, true_cfg_scale: float) -> tuple[str, ...]:
    """Return the texts that a request of `eval_request` runs besides its instruction: none, or the negative prompt.

    Args:
        pipe: The pipeline.
        true_cfg_scale: True CFG scale of the request.
    """
    negative = negative_prompt_for(true_cfg_scale)
    request = _checked(pipe, EditRequest("text", negative_prompt=negative, true_cfg_scale=true_cfg_scale))
    return tuple(text or "" for text, _, _ in request.texts[1:])


def input_baseline(request: EvalRequest) -> Image.Image:
    """Return the input without any edit: the reference that gives the background, cropped to the size of the result.

    Without a scene it is the first reference; without references a grey image.
    """
    images = request.request.images
    if not images:
        return Image.new("RGB", request.size, GREY)
    ground = (request.row.scene or {}).get("background")
    number = ground.get("picture") if isinstance(ground, Mapping) else None
    image = to_rgb(images[number - 1 if isinstance(number, int) and 0 < number <= len(images) else 0])
    return image.resize(request.size, Image.Resampling.LANCZOS, box=crop_box(image.size, request.size))


@torch.no_grad()
def encoder_refusal(pipe: Any, request: EvalRequest, budget: int | None) -> str | None:
    """Return why the pipeline's text encoder refuses a row's instruction or images; None if it accepts them.

    Args:
        pipe: The pipeline.
        request: The row.
        budget: Joint pixel budget of its references, as for `eval_request`.
    """
    one = request.request
    try:
        prompt_embeddings(pipe, one.prompt or "", one.images, request_geometry(pipe, one, budget).condition_sizes)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return f"the text encoder refuses it: {error}"
    return None
