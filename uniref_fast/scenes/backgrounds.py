"""Backgrounds of the synthetic data: textures, generated landscapes, and textures that words can describe.

    background("landscape", (160, 128), seed=3)
    named_background("checker", "blue", (128, 128))

`background` follows from a seed; its kinds are those of `TEXTURES`, and `PHOTOS`, which have the colours and the depth
of photographs. `named_background` follows from its words alone, so that an instruction with these words has exactly one
correct result. Sizes are (width, height) in pixels; images are RGB. Transcendental functions are computed in float64,
because their last bits differ between processors and must not reach a pixel; the rest is float32 and exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from uniref_fast.scenes.textures import TEXTURES, texture

__all__ = ["COLOURS", "KINDS", "NAMED", "PHOTOS", "background", "named_background"]

Size = tuple[int, int]

# Colours that instructions name, RGB.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (245, 210, 40),
    "green": (50, 160, 70),
    "blue": (45, 95, 215),
    "purple": (130, 60, 180),
    "pink": (240, 120, 175),
    "brown": (130, 80, 45),
}
# Textures that instructions can describe, with their adjectives. Words cannot determine a pattern of noise.
NAMED: dict[str, str] = {
    "plain": "plain",
    "checker": "checker",
    "stripes": "striped",
    "dots": "dotted",
    "bricks": "brick",
}


def _mix(a: np.ndarray, b: np.ndarray, t: np.ndarray | np.floating) -> np.ndarray:
    """Mix colours `[3, 1, 1]` or images `[3, H, W]` by t (`[H, W]`, `[H, 1]` or a number) in 0..1: `a` where t is 0."""
    return a + (b - a) * t


def _noise(rng: np.random.Generator, size: Size, cells: tuple[int, int], octaves: int = 4) -> np.ndarray:
    """Return fractal value noise in 0..1, float32 [H, W]; `cells` are the coarsest cells along width and height."""
    total = np.zeros((size[1], size[0]), np.float32)
    for octave in range(octaves):
        coarse = rng.random((cells[1] * 2**octave + 1, cells[0] * 2**octave + 1), np.float32)
        total += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)) / np.float32(2**octave)
    low, high = total.min(), total.max()
    return (total - low) / max(high - low, np.float32(1e-6))


def _axes(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Return x `[1, W]` and y `[H, 1]` of the pixel centres, float32 in 0..1."""
    x, y = ((np.arange(n, dtype=np.float32) + np.float32(0.5)) / np.float32(n) for n in size)
    return x[None], y[:, None]


def _colour(*rgb: float) -> np.ndarray:
    return np.array(rgb, np.float32)[:, None, None]


def _jitter(rng: np.random.Generator, rgb: tuple[float, float, float], amount: float = 14) -> np.ndarray:
    return _colour(*(np.array(rgb) + rng.uniform(-amount, amount, 3)))


def _one_of(rng: np.random.Generator, *colours: tuple[float, float, float]) -> tuple[float, float, float]:
    return colours[int(rng.integers(len(colours)))]


def _sky(size: Size, zenith: np.ndarray, horizon: np.ndarray, at: float) -> np.ndarray:
    """Return a vertical gradient [3, H, 1] that reaches the horizon's colour at height `at` (0 top, 1 bottom)."""
    t = np.clip(_axes(size)[1] / np.float32(at), 0, 1)
    return _mix(zenith, horizon, t * np.sqrt(t))


def _glow(size: Size, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Return a glow [H, W], float32: 1 at its centre, decreasing over `radius` in units of the shorter side."""
    # a product of two profiles needs the exponential of one row and one column only
    profiles = [
        np.exp(-((((np.arange(n) + 0.5) / n - c) * n / (radius * min(size))) ** 2)).astype(np.float32)
        for n, c in zip(size, centre, strict=True)
    ]
    return profiles[0][None] * profiles[1][:, None]


def _landscape(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Draw ridges under a sky, hazier with distance."""
    _, y = _axes(size)
    zenith, haze = _jitter(rng, (92, 140, 200)), _jitter(rng, (226, 222, 210))
    near = _jitter(rng, _one_of(rng, (44, 84, 48), (70, 62, 52), (38, 66, 96)))
    sun = _glow(size, (float(rng.uniform(0.15, 0.85)), 0.3), 0.3) * np.float32(0.7)
    image = _mix(_sky(size, zenith, haze, 0.65), _colour(255, 244, 214), sun)
    ground = _noise(rng, size, (8, 8), 3)
    layers = int(rng.integers(3, 6))
    for layer in range(layers):
        depth = (layer + 1) / layers
        profile = _noise(rng, (size[0], 1), (2 + layer, 1), 4)
        ridge = 0.32 + 0.5 * layer / layers + 0.2 * (0.5 - profile)
        inside = np.clip((y - ridge) * size[1], 0, 1)
        shade = _mix(haze, near, np.float32(depth**1.3)) * (0.82 + np.float32(0.36 * depth) * ground)
        image = _mix(image, shade, inside)
    return image


def _sunset(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Draw a sky with a low sun behind streaks of cloud."""
    sun = float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.35, 0.75))
    zenith = _jitter(rng, _one_of(rng, (58, 52, 110), (70, 110, 180), (96, 60, 110)))
    horizon = _jitter(rng, _one_of(rng, (250, 150, 84), (252, 196, 120), (244, 130, 120)))
    clouds = np.clip(_noise(rng, size, (2, 8), 4) * np.float32(1.9) - np.float32(0.8), 0, 1) * np.float32(0.75)
    image = _mix(_sky(size, zenith, horizon, 0.95), _colour(255, 226, 160), _glow(size, sun, 0.35) * np.float32(0.75))
    image = _mix(image, _colour(255, 248, 222), np.clip(_glow(size, sun, 0.1) * 3 - 1, 0, 1))
    lit = _mix(zenith * np.float32(0.7) + 20, horizon * np.float32(0.6) + 100, _glow(size, sun, 0.7))
    return _mix(image, lit, clouds)


def _bokeh(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Draw discs of light, out of focus, on a dark blurred ground."""
    dark, less = _jitter(rng, (28, 30, 44)), _jitter(rng, (70, 58, 66), 24)
    image = _mix(dark, less, _axes(size)[1]) * (np.float32(0.8) + np.float32(0.5) * _noise(rng, size, (2, 2), 2))
    unit = min(size)
    for _ in range(int(rng.integers(18, 34))):
        rgb = _one_of(rng, (255, 190, 110), (255, 120, 90), (130, 190, 255), (255, 226, 170), (150, 230, 170))
        x, y, radius, strength = rng.random(4)
        x, y, radius, strength = x * size[0], y * size[1], (0.04 + 0.09 * radius) * unit, 0.15 + 0.4 * strength
        left, top = max(0, int(x - radius - 2)), max(0, int(y - radius - 2))
        box = image[
            :, top : int(y + radius + 3), left : int(x + radius + 3)
        ]  # a view: discs are drawn in place, and slicing clips them
        rows, columns = (np.arange(n) + 0.5 + start for n, start in zip(box.shape[1:], (top, left), strict=True))
        distance = np.sqrt((columns - x)[None] ** 2 + (rows - y)[:, None] ** 2)
        inside = np.clip(distance / radius, 0, 1)
        cover = np.clip((radius - distance) / 1.5 + 0.5, 0, 1) * (0.75 + 0.25 * inside * inside * inside)
        box += (_colour(*rgb) - np.float32(0.35) * box) * (strength * cover).astype(np.float32)
    return image


def _sea(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Draw water up to a horizon, with waves that become finer with distance and reflect a sun."""
    x, y = _axes(size)
    at, sun = float(rng.uniform(0.3, 0.55)), float(rng.uniform(0.2, 0.8))
    zenith, horizon = _jitter(rng, (110, 165, 220)), _jitter(rng, (232, 230, 220))
    clouds = np.clip(_noise(rng, size, (3, 6), 4) * np.float32(1.8) - np.float32(0.9), 0, 1) * np.float32(0.8)
    image = _mix(_sky(size, zenith, horizon, at), _colour(255, 255, 255), clouds)
    deep, light = _jitter(rng, (18, 74, 112)), _jitter(rng, (120, 180, 196))
    below = np.clip(y - np.float32(at), 1e-3, 1)
    waves = _noise(rng, size, (5, 24), 3)
    phase = 1.6 / (below.astype(np.float64) + 0.08) + 1.2 * waves + 0.6 * x
    crest = (0.5 + 0.5 * np.sin(2 * np.pi * phase)).astype(np.float32) * waves
    water = _mix(deep, light, np.clip(0.25 + 0.5 * crest + np.float32(0.35) * (np.float32(0.3) - below), 0, 1))
    beam = np.exp(-(((x.astype(np.float64) - sun) / (0.05 + 0.25 * below)) ** 2)).astype(np.float32)
    water = _mix(water, _colour(255, 250, 228), beam * np.clip(crest * np.float32(2.2) - np.float32(0.5), 0, 1))
    return _mix(image, water, np.clip((y - np.float32(at)) * size[1], 0, 1))


PHOTOS: dict[str, Callable[[np.random.Generator, Size], np.ndarray]] = {
    "landscape": _landscape,
    "sunset": _sunset,
    "bokeh": _bokeh,
    "sea": _sea,
}
KINDS: tuple[str, ...] = (*TEXTURES, *PHOTOS)


def background(kind: str, size: Size, seed: int) -> Image.Image:
    """Return a background of one of `KINDS`. Raises ValueError for an unknown kind or an empty size."""
    if kind in TEXTURES:
        return texture(kind, size, seed)
    if kind not in PHOTOS:
        raise ValueError(f"unknown background {kind!r}; kinds are: {', '.join(KINDS)}")
    if min(size) < 1:
        raise ValueError(f"a background's width and height must be at least 1, got {size}")
    rng = np.random.default_rng([seed, len(TEXTURES) + list(PHOTOS).index(kind)])
    return _to_image(PHOTOS[kind](rng, size))


def named_background(kind: str, colour: str, size: Size) -> Image.Image:
    """Return the background of a kind of `NAMED` in one of `COLOURS`; equal kinds and colours give equal images.

    Raises ValueError for an unknown kind or colour, or an empty size.
    """
    if kind not in NAMED or colour not in COLOURS:
        raise ValueError(
            f"no {colour!r} {kind!r} background; kinds are: {', '.join(NAMED)}; colours are: {', '.join(COLOURS)}"
        )
    if min(size) < 1:
        raise ValueError(f"a background's width and height must be at least 1, got {size}")
    pure = _colour(*COLOURS[colour])
    deep, pale = (
        _mix(pure, _colour(255, 255, 255), np.float32(0.2)),
        _mix(pure, _colour(255, 255, 255), np.float32(0.6)),
    )
    if kind == "plain":
        return _to_image(np.broadcast_to((deep + pale) / 2, (3, size[1], size[0])))
    pattern = TEXTURES[kind](np.random.default_rng(list(NAMED).index(kind)), size)
    return _to_image(_mix(pale, deep, pattern))


def _to_image(values: np.ndarray) -> Image.Image:
    """Convert `[3, H, W]` in 0..255 to an RGB image."""
    return Image.fromarray(np.ascontiguousarray(np.clip(np.rint(values), 0, 255).astype(np.uint8).transpose(1, 2, 0)))
