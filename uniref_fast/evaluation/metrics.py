"""Measures of a generated image: PSNR against the target, scores of a reward, and the bound set by the autoencoder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from uniref_fast.encode import decode_image, image_latents, to_rgb
from uniref_fast.evaluation.requests import EvalRequest
from uniref_fast.models.single_frame import single_frame
from uniref_fast.rewards.scene import SceneDetails, scene_details
from uniref_fast.rewards.types import AXES, Failure, Scores

__all__ = ["measure", "own_reward_record", "psnr", "reward_record", "through_vae"]

ROUNDING = 1 / 12  # mean squared error of rounding to 8 bits: the least error that is assumed


def psnr(image: Image.Image, target: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two RGB images of one size in dB; 58.9 for equal images."""
    error = np.asarray(image, np.float64) - np.asarray(target, np.float64)
    return 10 * math.log10(255**2 / max(float((error**2).mean()), ROUNDING))


@torch.no_grad()
def through_vae(pipe: Any, image: Image.Image) -> Image.Image:
    """Encode and decode an RGB image with the pipeline's autoencoder, at its own size (multiples of 16 pixels).

    Returns:
        An RGB image; an autoencoder with transparency gives one over white.
    """
    with single_frame(pipe.vae):
        return to_rgb(decode_image(pipe, image_latents(pipe, image, image.size)[None], image.size))


def measure(request: EvalRequest, image: Image.Image, bound: Image.Image | None, scene_reward: bool) -> dict[str, Any]:
    """Return the measures of an image that need no judge, as entries of its record.

    Args:
        request: The request that the image was generated for.
        image: The result, of the request's size.
        bound: The target through the autoencoder, or None without a target.
        scene_reward: Use the scene reward, if the row has a scene and a target.

    Returns:
        "psnr" and "bound": {"psnr"} with a target. With a scene also "scores" and "objects", both in "bound" too, or
        "failure" instead. Scores are 0 to 10 by axis, with their "mean".

    Raises:
        ValueError: The scene does not follow its schema.
    """
    record: dict[str, Any] = {}
    if request.target is None or bound is None:
        return record
    record["psnr"], record["bound"] = psnr(image, request.target), {"psnr": psnr(bound, request.target)}
    if not scene_reward or request.row.scene is None:
        return record
    details, best = (scene_details(request.row, one) for one in (image, bound))
    if isinstance(details, Failure) or isinstance(best, Failure):
        return record | reward_record(details if isinstance(details, Failure) else best)  # type: ignore[arg-type]
    record |= reward_record(Scores(details.axes))
    record["bound"] |= reward_record(Scores(best.axes))
    record["objects"], record["bound"]["objects"] = _objects(details), _objects(best)
    return record


def _objects(details: SceneDetails) -> list[dict[str, Any]]:
    return [
        {
            "artwork": one.artwork, "colour": one.colour, "kept": one.kept, "present": one.present,
            "distance": one.distance if one.present else None,  # an object that is not present has no place
            "likeness": one.likeness, "similarity": one.similarity,
        }
        for one in details.objects
    ]  # fmt: skip


def own_reward_record(result: Scores | Failure) -> dict[str, Any]:
    """Return the entries of a record for the result of your own reward, which may have any axes."""
    return reward_record(result) if isinstance(result, Failure) else {"scores": dict(result.axes)}


def reward_record(result: Scores | Failure) -> dict[str, Any]:
    """Return the entries of a record for the result of a reward: the scores with their mean, or the failure."""
    if isinstance(result, Failure):
        return {"failure": {"kind": result.kind, "reason": result.reason}}
    axes = {axis: float(result.axes[axis]) for axis in AXES}
    return {"scores": {**axes, "mean": math.fsum(axes.values()) / len(axes)}}
