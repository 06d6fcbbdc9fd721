"""What an evaluation is made on: the rows of files by label and index, read, sized, and as edit requests."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from PIL import Image

from uniref_fast.data.dataset import Dataset, Row, RowError
from uniref_fast.encode import prompt_embeddings
from uniref_fast.guidance import negative_prompt_for
from uniref_fast.keyed_random import draw
from uniref_fast.request import EditRequest, request_geometry, target_size, validated

__all__ = ["Planned", "files_of", "plan", "refusal"]


@dataclass(frozen=True)
class Planned:
    """A row that can be evaluated, with its pictures in memory.

    Attributes:
        row: as it was read.
        target: the exact answer at the size of the result, or None.
        request: of the edit; its images are the references, RGB.
        size: (width, height) of the result in pixels.
    """

    row: Row
    target: Image.Image | None
    request: EditRequest
    size: tuple[int, int]


def files_of(dataset: Dataset, limit: int | None, language: str | None = None) -> dict[str, list[int]]:
    """Numbers of the rows of each file, at most `limit`; files are called by their names without the ending.

    With a language only the rows of that, and those that cannot be read.

    Raises:
        ValueError: for a file without rows.
    """
    numbers: dict[str, list[int]] = {name: [] for name in dataset.files}
    names = iter(dataset.files)
    name, found = next(names), set[str]()
    for number in range(len(dataset)):
        while not dataset.where(number).startswith(f"{name}:"):  # the rows of a file follow one another
            name = next(names)
        if limit is None or len(numbers[name]) < limit:
            spoken = None
            if language is not None:
                with contextlib.suppress(RowError):
                    spoken = dataset[number].language or "none"
                    found.add(spoken)
            if spoken in (None, language):
                numbers[name].append(number)
    if language is not None and language not in found:
        raise ValueError(f'no rows are in language "{language}"; there are: {", ".join(sorted(found)) or "none"}')
    if empty := [name for name, found in numbers.items() if not found]:
        raise ValueError(f"no rows in {', '.join(empty)}; leave out what is empty")
    return dict(zip(_labels(dataset.files), numbers.values(), strict=True))


def _labels(names: Iterable[str]) -> list[str]:
    """Names that are also paths below any folder."""
    paths = [PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", ".."))) for name in names]
    count = Counter(path.with_suffix("") for path in paths)
    return [str(path.with_suffix("") if count[path.with_suffix("")] == 1 else path) for path in paths]


def plan(
    pipe: Any, row: Row, key: tuple[str, int], *, target_side: int, budget: int | None, seed: int, steps: int,
    guidance: float, size: tuple[int, int] | None = None,
) -> Planned:  # fmt: skip
    """Read a row's pictures and say what is asked of the model.

    Args:
        pipe: the pipeline, for its sizes.
        key: (name of the file, index of the row in it); with the seed it decides the noise.
        target_side: the result has the target's size, at most target_side x target_side pixels; without a target the
            last reference's aspect ratio (a square without references) at so many.
        budget: joint pixels of the references; None sizes each as diffusers does.
        size: (width, height) of the result instead of all that.

    Raises:
        ValueError: for a row that cannot be edited.
    """
    references = [source.load() for source in row.references]
    target = None if row.target is None else row.target.load()
    sizes = [image.size for image in references]
    width, height = size or target_size(target.size if target else None, sizes, target_side)
    request = EditRequest(
        row.instruction,
        references,
        negative_prompt=negative_prompt_for(guidance),
        true_cfg_scale=guidance,
        width=width,
        height=height,
        num_inference_steps=steps,
        seed=draw(seed, "evaluation", key).initial_seed(),  # type: ignore[arg-type]  # texts do as well
    )
    try:
        (request,) = validated([request])
    except TypeError as error:
        raise ValueError(str(error)) from error
    made = request_geometry(pipe, request, budget).size
    if target is not None and target.size != made:
        target = target.resize(made, Image.Resampling.LANCZOS)
    return Planned(row, target, request, made)


@torch.no_grad()
def refusal(pipe: Any, planned: Planned) -> str | None:
    """Why the pipeline's text encoder refuses a row's instruction or pictures; None where it takes them."""
    request = planned.request
    try:
        prompt_embeddings(pipe, request.prompt or "", request.images, request_geometry(pipe, request).condition_sizes)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return f"the text encoder refuses it: {error}"
    return None
