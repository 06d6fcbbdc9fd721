"""Rendering of synthetic samples: the references and the target of a scene, drawn with the same operations.

Where an edit changes nothing, picture 1 and the target have the same pixels if they have one size. A background that
comes from a reference is cropped to the target's aspect ratio and resized.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from uniref_fast.scenes.artworks import Artworks
from uniref_fast.scenes.backgrounds import COLOURS, background, named_background
from uniref_fast.scenes.scene import Background, PlacedObject, Scene, crop_box

__all__ = ["SceneSpec", "SyntheticSample", "recolour", "recolours_visibly", "render"]

Size = tuple[int, int]  # (width, height) in pixels
VISIBLE = 70.0  # RGB distance in 0..255: a recoloured artwork's mean differs by at least this
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class SceneSpec:
    """A sample before its pixels are drawn.

    Attributes:
        task_type: "generate", "recolour", "remove", "move", "add", "replace_background" or "compose".
        instruction: The text that asks for the target.
        scene: Content of the target and of the references.
    """

    task_type: str
    instruction: str
    scene: Scene


@dataclass(frozen=True)
class SyntheticSample:
    """A training sample in memory; images are RGB.

    Attributes:
        references: Pictures 1 to K, in order.
        target: The exact result of the instruction.
        instruction: The text that asks for the target.
        task_type: The task, see `SceneSpec`.
        scene: Content of the target and of the references as JSON values (`Scene.to_json`).
    """

    references: list[Image.Image]
    target: Image.Image
    instruction: str
    task_type: str
    scene: dict[str, Any] = field(repr=False)


def render(spec: SceneSpec, artworks: Artworks) -> SyntheticSample:
    """Draw the references and the target of a sample."""
    scene = spec.scene
    backgrounds = [_generated(reference.background, reference.size) for reference in scene.references]
    references = [
        _with_objects(clean.copy(), reference.objects, artworks)
        for clean, reference in zip(backgrounds, scene.references, strict=True)
    ]
    ground = scene.background
    if ground is not None and ground.picture is not None:
        base = _fitted(backgrounds[ground.picture - 1], scene.size)
    else:
        base = _generated(ground, scene.size)
    target = _with_objects(base, scene.objects, artworks)
    return SyntheticSample(references, target, spec.instruction, spec.task_type, scene.to_json())


def recolour(artwork: Image.Image, colour: str) -> Image.Image:
    """Return an RGBA artwork in shades of one of `COLOURS`, with the same outline.

    The artwork's mean brightness becomes the colour; darker parts become shades, lighter parts become tints.
    """
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
    """Return True if recolouring changes an artwork visibly; a carrot to orange is not visible."""
    small = artwork.resize((16, 16), Image.Resampling.BOX)
    before, after = (np.asarray(image).astype(np.float64) for image in (small, recolour(small, colour)))
    alpha = before[..., 3:]
    change = ((after - before)[..., :3] * alpha).sum((0, 1)) / max(alpha.sum(), 1.0)
    return bool((change**2).sum() >= VISIBLE**2)


def _generated(ground: Background | None, size: Size) -> Image.Image:
    if ground is None or ground.kind is None:
        raise ValueError(f"only the background of a target may be that of a picture, got {ground}")
    if ground.colour is not None:
        return named_background(ground.kind, ground.colour, size)
    return background(ground.kind, size, ground.seed or 0)


def _fitted(image: Image.Image, size: Size) -> Image.Image:
    """Return a new image of that size, cropped to its aspect ratio."""
    box = crop_box(image.size, size)
    if box == (0, 0, *size):
        return image.copy()
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _with_objects(image: Image.Image, objects: tuple[PlacedObject, ...], artworks: Artworks) -> Image.Image:
    for placed in objects:
        artwork = artworks.image(placed.name)
        if placed.colour is not None:
            artwork = recolour(artwork, placed.colour)
        side = int(placed.side)
        artwork = artwork.resize((side, side), Image.Resampling.LANCZOS)
        image.paste(artwork, placed.corner, artwork)
    return image
