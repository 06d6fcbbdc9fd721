"""Samples of a run: edits by the model that is trained, and a grid of the user's own prompts and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.data.dataset import Dataset
from uniref_fast.edit import edit
from uniref_fast.encode import prompt_embeddings, prompt_text, to_rgb
from uniref_fast.evaluation.report import sampling_text
from uniref_fast.evaluation.requests import EvalRequest, eval_request
from uniref_fast.guidance import is_guided
from uniref_fast.models.families import family_of
from uniref_fast.request import EditRequest, EncodedRequest, request_geometry
from uniref_fast.sheets import contact_sheet
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.recipe import Recipe

__all__ = ["MOST_PROMPTS", "PromptSamples", "embedded", "generate", "prompt_rows", "sample_grid", "sampling_settings"]

MOST_PROMPTS = 32
"""Largest number of rows of `validate`: each is sampled at every validation."""


def sampling_settings(config: Recipe, pipe: Any) -> dict[str, Any]:
    """Return the settings of `eval_request` that all samples of a run have: those of its last stage.

    Args:
        config: Configuration of the run.
        pipe: Pipeline of its model. If that embeds a guidance scale and samples have none, they get that of training.
    """
    steps, scale = config.resolve_sampling()
    usual = family_of(pipe).training_guidance(pipe.transformer.config)
    if usual is not None and not is_guided(scale):
        scale = usual if config.embedded_guidance is None else config.embedded_guidance
    stage = config.validation_stage
    return {
        "num_inference_steps": steps,
        "true_cfg_scale": scale,
        "budget": stage.budget,
        "target_side": stage.target_side,
    }


def generate(
    model: TrainedModel, requests: Sequence[EditRequest], budget: int | None, pack_tokens: int
) -> list[Image.Image]:
    """Return the results of requests, RGB, with the weights of now. All ranks; each generates all of them.

    Args:
        model: Model of the run.
        requests: The requests.
        budget: Joint pixel budget of their references; None scales each as diffusers does.
        pack_tokens: Largest number of tokens in a pack; a larger sample has a pack of its own.
    """
    packed = model.packed
    parallel, packed.parallel = packed.parallel, None
    try:
        with model.encoders.present("vae"):
            images = edit(
                model.pipe, list(requests), budget=budget, model=packed, pack_tokens=pack_tokens, progress=False
            )
            return [to_rgb(image) for image in images]
    finally:
        packed.parallel = parallel


def embedded(
    pipe: Any, request: EditRequest, budget: int | None, encode: Callable[[str, Sequence[tuple[int, int]]], Tensor]
) -> EncodedRequest:
    """Return a request that does not need the text encoder.

    Args:
        pipe: Pipeline of the request.
        request: A checked request.
        budget: Joint pixel budget of its references; None scales each as diffusers does.
        encode: Function that returns the embeddings `[l, D]` of a text with the references of the request, whose
            (width, height) in pixels for the text encoder it is given too.
    """
    seen = request_geometry(pipe, request, budget).condition_sizes
    prompts = [text or "" for text, _, _ in request.texts]
    embeds = [encode(text, seen) for text in prompts]
    given = {**vars(request), "prompt": None, "prompt_embeds": embeds[0]}
    given |= {"negative_prompt": None, "negative_prompt_embeds": embeds[1] if len(embeds) > 1 else None}
    return EncodedRequest(**given, encoded_texts=tuple(prompt_text(pipe, text, seen) for text in prompts))


def sample_grid(settings: dict[str, Any], samples: Sequence[tuple[str, str, EvalRequest, Image.Image]]) -> Image.Image:
    """Draw result, target and references of each sample as a labelled image, with the settings above them.

    Args:
        settings: Result of `sampling_settings`.
        samples: Titles of the result and of the target, request and result of each sample. A request without a target
            is shown without one.
    """
    lines, texts = [], []
    for i, (title, target_title, request, image) in enumerate(samples, start=1):
        line = [(f"{i}. {title}", image)]
        if request.target is not None:
            line.append((target_title, request.target))
        lines.append(
            line + [(f"picture {j}", to_rgb(shown)) for j, shown in enumerate(request.request.images, start=1)]
        )
        texts.append(f"{i}. {request.row.instruction}")
    heading = sampling_text(settings, [image.size for *_, image in samples])
    return contact_sheet(lines, heading=heading, caption="\n".join(texts), cell=160)


def prompt_rows(config: Recipe) -> Dataset | None:
    """Open the rows of `validate`, and read their images; None if there are none.

    Raises:
        ValueError: A file cannot be read, a row is broken, or there are no rows or too many.
    """
    if not config.validate:
        return None
    try:
        dataset = Dataset(config.validate, config.image_folder, "optional", config.columns)
    except ValueError as error:
        raise ValueError(f"validate: {error}") from error
    files = ", ".join(config.validate)
    if not 0 < len(dataset) <= MOST_PROMPTS:
        raise ValueError(
            f"validate: {files} has {len(dataset):,} rows, and each is sampled at every validation; give from 1 to "
            f"{MOST_PROMPTS} rows"
        )
    for i in range(len(dataset)):
        try:
            dataset[i].sizes(decode=True)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; repair or remove this row of validate") from error
    return dataset


class PromptSamples:
    """Samples of the rows of `validate`, the user's own prompts and pictures, with the same noise at every step.

    Args:
        dataset: Result of `prompt_rows`.
        config: Configuration of the run.
        model: Model of the run.

    Raises:
        ValueError: A row cannot be edited.
    """

    def __init__(self, dataset: Dataset, config: Recipe, model: TrainedModel) -> None:
        self.model, self.settings = model, sampling_settings(config, model.pipe)
        self._requests = [
            eval_request(model.pipe, dataset[i], ("validate", i), seed=0, **self.settings) for i in range(len(dataset))
        ]

    def encode_texts(self) -> None:
        """Encode the texts of all rows, so that samples do not need the text encoder; the embeddings are kept."""
        pipe, encoders = self.model.pipe, self.model.encoders

        def encoded(request: EditRequest) -> EncodedRequest:
            def encode(text: str, seen: Sequence[tuple[int, int]]) -> Tensor:
                return prompt_embeddings(pipe, text, request.images, seen, encoders.device).cpu()

            return embedded(pipe, request, self.settings["budget"], encode)

        with encoders.present("text_encoder"), torch.no_grad():
            self._requests = [replace(one, request=encoded(one.request)) for one in self._requests]

    def grid(self, pack_tokens: int) -> Image.Image:
        """Generate a sample of each row, and draw them as a labelled image. All ranks.

        Args:
            pack_tokens: Largest number of tokens in a pack; a larger sample has a pack of its own.
        """
        requests = [one.request for one in self._requests]
        images = generate(self.model, requests, self.settings["budget"], pack_tokens)
        samples = zip(self._requests, images, strict=True)
        return sample_grid(self.settings, [("result", "target", one, image) for one, image in samples])
