"""Measures of a made image: against the exact answer, by a reward, and what the autoencoder alone would allow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from uniref_fast.encode import decode_image, image_latents
from uniref_fast.evaluation.requests import Planned
from uniref_fast.models.single_frame import single_frame
from uniref_fast.rewards.scene import SceneDetails, scene_details
from uniref_fast.rewards.types import AXES, Failure, Scores

__all__ = ["judged", "measured", "psnr", "scored", "through_vae"]

ROUNDING = 1 / 12  # mean squared error of rounding to 8 bits: what two equal images are taken to differ by


def psnr(made: Image.Image, wanted: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images of one size, dB; at most 58.9, as for equal ones."""
    error = np.asarray(made, np.float64) - np.asarray(wanted, np.float64)
    return 10 * math.log10(255**2 / max(float((error**2).mean()), ROUNDING))


@torch.no_grad()
def through_vae(pipe: Any, image: Image.Image) -> Image.Image:
    """An RGB image encoded and decoded by the pipeline's autoencoder, at its own size (multiples of 16 pixels)."""
    with single_frame(pipe.vae):
        return decode_image(pipe, image_latents(pipe, image, image.size)[None], image.size)


def measured(planned: Planned, made: Image.Image, bound: Image.Image | None, scene: bool) -> dict[str, Any]:
    """What there is to say about an image without a judge.

    Args:
        made: of the planned size.
        bound: the target through the autoencoder, where there is a target.
        scene: use the scene reward, where the row has a scene and a target.

    Returns:
        "psnr" and "bound": {"psnr"} with a target; with a scene also "scores", "objects", and both in "bound", or
        "failure" instead. Scores are 0..10 by axis and their "mean".

    Raises:
        ValueError: for a scene that is not what the data set's card says.
    """
    record: dict[str, Any] = {}
    if planned.target is None or bound is None:
        return record
    record["psnr"], record["bound"] = psnr(made, planned.target), {"psnr": psnr(bound, planned.target)}
    if not scene or planned.row.scene is None:
        return record
    details, best = (scene_details(planned.row, image) for image in (made, bound))
    if isinstance(details, Failure) or isinstance(best, Failure):
        return record | judged(details if isinstance(details, Failure) else best)  # type: ignore[arg-type]
    record |= judged(Scores(details.axes))
    record["bound"] |= judged(Scores(best.axes))
    record["objects"], record["bound"]["objects"] = _objects(details), _objects(best)
    return record


def _objects(details: SceneDetails) -> list[dict[str, Any]]:
    return [
        {
            "artwork": one.artwork, "colour": one.colour, "kept": one.kept, "present": one.present,
            "distance": one.distance if one.present else None,  # what is not there is nowhere
            "likeness": one.likeness, "similarity": one.similarity,
        }
        for one in details.objects
    ]  # fmt: skip


def scored(result: Scores | Failure) -> dict[str, Any]:
    """Scores by whatever axes a reward of the user's own has, or the failure, as a record has them."""
    return judged(result) if isinstance(result, Failure) else {"scores": dict(result.axes)}


def judged(result: Scores | Failure) -> dict[str, Any]:
    """Scores with their mean, or the failure, as a record has them."""
    if isinstance(result, Failure):
        return {"failure": {"kind": result.kind, "reason": result.reason}}
    axes = {axis: float(result.axes[axis]) for axis in AXES}
    return {"scores": {**axes, "mean": math.fsum(axes.values()) / len(axes)}}
