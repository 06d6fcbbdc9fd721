"""Pixels of the training data: a plan's pictures and its answer, drawn with the same few operations.

What an edit leaves alone is the same pixels in picture 1 and in the answer when both have one size; a background that
is another picture's is cropped to the answer's aspect ratio and resized.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from uniref_fast.scenes.artworks import Artworks
from uniref_fast.scenes.backgrounds import COLOURS, background, named_background
from uniref_fast.scenes.specs import Ground, Picture, Plan, Thing

__all__ = ["MadeSample", "crop_box", "draw_plan", "recolour", "recolours_visibly"]

Size = tuple[int, int]
VISIBLE = 70.0  # how far a recoloured artwork's mean is at least from what it was, RGB distance in 0..255
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class MadeSample:
    """One training sample; images are RGB.

    Attributes:
        references: pictures 1 .. K, in order.
        target: what is to come out.
        instruction: what is asked.
        task_type: "generate", "recolour", "remove", "move", "add", "replace_background" or "compose".
        scene: what the target shows, as JSON values; keys as in the data set's card.
    """

    references: list[Image.Image]
    target: Image.Image
    instruction: str
    task_type: str
    scene: dict[str, Any] = field(repr=False)


def draw_plan(plan: Plan, artworks: Artworks) -> MadeSample:
    """Draw every picture and the target of a plan."""
    grounds = [_ground(picture) for picture in plan.pictures]
    references = [
        _with_things(clean.copy(), picture.things, artworks)
        for clean, picture in zip(grounds, plan.pictures, strict=True)
    ]
    target = plan.target
    ground = target.ground
    base = _ground(target) if isinstance(ground, Ground) else _fitted(grounds[ground - 1], target.size)
    drawn = _with_things(base, target.things, artworks)
    return MadeSample(references, drawn, plan.instruction, plan.task_type, _scene(plan, artworks))


def recolour(artwork: Image.Image, colour: str) -> Image.Image:
    """An RGBA artwork in shades of one of `COLOURS`: its mean brightness becomes the colour, darker parts its dark
    shades and lighter parts its tints; the outline stays."""
    pixels = np.asarray(artwork).astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    brightness = (rgb * LUMA).sum(-1, keepdims=True) / np.float32(255)
    weight = max(float(alpha.sum(dtype=np.float64)), 1.0)
    mean = np.float32(np.clip((brightness * alpha).sum(dtype=np.float64) / weight, 0.15, 0.85))
    pure = np.array(COLOURS[colour], np.float32)
    dark, light = pure * np.float32(0.2), pure + (np.float32(255) - pure) * np.float32(0.75)
    low = np.clip(brightness / mean, 0, 1)
    high = np.clip((brightness - mean) / (1 - mean), 0, 1)
    shaded = dark + (pure - dark) * low + (light - pure) * high
    return Image.fromarray(np.rint(np.concatenate([shaded, alpha], -1)).astype(np.uint8))


def recolours_visibly(artwork: Image.Image, colour: str) -> bool:
    """Whether recolouring changes an artwork so much that anyone sees it: not a carrot to orange."""
    small = artwork.resize((16, 16), Image.Resampling.BOX)
    before, after = (np.asarray(image).astype(np.float64) for image in (small, recolour(small, colour)))
    alpha = before[..., 3:]
    change = ((after - before)[..., :3] * alpha).sum((0, 1)) / max(alpha.sum(), 1.0)
    return bool((change**2).sum() >= VISIBLE**2)


def crop_box(size: Size, target: Size) -> tuple[int, int, int, int]:
    """The largest centred box (left, top, right, bottom) of an image of `size` with the aspect ratio of `target`."""
    width = min(size[0], round(size[1] * target[0] / target[1]))
    height = min(size[1], round(size[0] * target[1] / target[0]))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def _ground(picture: Picture) -> Image.Image:
    ground = picture.ground
    if not isinstance(ground, Ground):
        raise TypeError(f"the background is that of picture {ground}; only a target's may be")
    if ground.colour is not None:
        return named_background(ground.kind, ground.colour, picture.size)
    return background(ground.kind, picture.size, ground.seed)


def _fitted(image: Image.Image, size: Size) -> Image.Image:
    """A new image of that size."""
    box = crop_box(image.size, size)
    if box == (0, 0, *size):
        return image.copy()
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _with_things(image: Image.Image, things: tuple[Thing, ...], artworks: Artworks) -> Image.Image:
    for thing in things:
        artwork = artworks.image(thing.name)
        if thing.colour is not None:
            artwork = recolour(artwork, thing.colour)
        artwork = artwork.resize((thing.side, thing.side), Image.Resampling.LANCZOS)
        image.paste(artwork, thing.corner, artwork)
    return image


# --- the scene as JSON ------------------------------------------------------------------------------------------------


def _scene(plan: Plan, artworks: Artworks) -> dict[str, Any]:
    target = plan.target
    if isinstance(target.ground, Ground):
        ground = _ground_values(target.ground)
    else:
        size = plan.pictures[target.ground - 1].size
        ground = {"picture": target.ground, "crop": list(crop_box(size, target.size))}
    return {
        "size": list(target.size),
        "background": ground,
        "objects": [_thing_values(thing, artworks) for thing in target.things],
        "combinations": list(plan.combinations),
        "references": [
            {
                "size": list(picture.size),
                "background": _ground_values(picture.ground) if isinstance(picture.ground, Ground) else None,
                "objects": [_thing_values(thing, artworks) for thing in picture.things],
            }
            for picture in plan.pictures
        ],
    }


def _ground_values(ground: Ground) -> dict[str, Any]:
    return {"kind": ground.kind} | ({"seed": ground.seed} if ground.colour is None else {"colour": ground.colour})


def _thing_values(thing: Thing, artworks: Artworks) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": thing.name,
        "artwork": f"artworks/{artworks.slug(thing.name)}.png",
        "centre": list(thing.centre),
        "side": thing.side,
    }
    if thing.picture is not None:
        values["picture"] = thing.picture
    if thing.colour is not None:
        values["colour"] = thing.colour
    return values
