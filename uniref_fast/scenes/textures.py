"""Procedural textures: two-coloured backgrounds that follow from a kind, a size and a seed.

    texture("wood", (128, 96), seed=3)

NumPy and Pillow only. Sizes are (width, height) in pixels, images are RGB.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

__all__ = ["TEXTURES", "texture"]

Size = tuple[int, int]


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Return two muted colours [2, 3] in 0..255 of different lightness, from which artworks stand out."""
    hue = rng.uniform(0, 1)
    hues = np.array([hue, hue + rng.uniform(-0.12, 0.12)])
    lightness = rng.permutation([rng.uniform(0.42, 0.55), rng.uniform(0.72, 0.86)])
    saturation = rng.uniform(0.25, 0.5)
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hues[:, None] + np.array([0, 1 / 3, 2 / 3])))
    return 255 * np.clip(lightness[:, None] + saturation * (wheel - 0.5), 0, 1)


def _grid(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates x, y of the pixel centres in units of the shorter side, [H, W] each."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] + 0.5
    return x / min(size), y / min(size)


def _noise(rng: np.random.Generator, size: Size, cells: tuple[int, int], octaves: int = 4) -> np.ndarray:
    """Return fractal value noise in 0..1, [H, W]; `cells` are the coarsest cells along width and height."""
    total = np.zeros((size[1], size[0]))
    for octave in range(octaves):
        shape = (cells[1] * 2**octave + 1, cells[0] * 2**octave + 1)
        coarse = Image.fromarray(rng.random(shape).astype(np.float32))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / 2**octave
    low, high = total.min(), total.max()
    return (total - low) / max(high - low, 1e-6)


def _gradient(rng, size):
    x, y = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    t = x * np.cos(angle) + y * np.sin(angle)
    return (t - t.min()) / max(np.ptp(t), 1e-6)


def _checker(rng, size):
    x, y = _grid(size)
    n = rng.integers(4, 8)
    return (np.floor(x * n) + np.floor(y * n)) % 2


def _stripes(rng, size):
    x, y = _grid(size)
    angle, n = rng.uniform(0, np.pi), rng.integers(5, 10)
    wave = np.sin(2 * np.pi * n * (x * np.cos(angle) + y * np.sin(angle)))
    return np.clip(wave * 4 + 0.5, 0, 1)  # soft edges


def _dots(rng, size):
    x, y = _grid(size)
    n = rng.integers(5, 8)
    row = np.floor(y * n)
    distance = np.hypot((x * n + 0.5 * (row % 2)) % 1 - 0.5, (y * n) % 1 - 0.5)
    return np.clip((0.32 - distance) * 12 + 0.5, 0, 1)


def _bricks(rng, size):
    x, y = _grid(size)
    n = int(rng.integers(5, 9))
    row = np.floor(y * n)
    across = x * n / 2 + 0.5 * (row % 2)
    shade = rng.random((64, 64))[row.astype(int) % 64, np.floor(across).astype(int) % 64]
    mortar = ((y * n) % 1 < 0.14) | (across % 1 < 0.07)
    return np.where(mortar, 1.0, 0.35 * shade)


def _wood(rng, size):
    _, y = _grid(size)
    bend = _noise(rng, size, (1, 4), octaves=3)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (y * rng.uniform(4, 7) + 2.2 * bend))
    return 0.75 * rings**2 + 0.25 * _noise(rng, size, (2, 48), octaves=2)


def _clouds(rng, size):
    return np.clip(_noise(rng, size, (3, 3), octaves=5) * 1.5 - 0.25, 0, 1)


TEXTURES: dict[str, Callable[[np.random.Generator, Size], np.ndarray]] = {
    "gradient": _gradient,
    "checker": _checker,
    "stripes": _stripes,
    "dots": _dots,
    "bricks": _bricks,
    "wood": _wood,
    "clouds": _clouds,
}


def texture(kind: str, size: Size, seed: int) -> Image.Image:
    """Return a texture of a kind and size. Raises ValueError for an unknown kind or an empty size."""
    if kind not in TEXTURES:
        raise ValueError(f"unknown texture {kind!r}; kinds are: {', '.join(TEXTURES)}")
    if min(size) < 1:
        raise ValueError(f"a texture's width and height must be at least 1, got {size}")
    rng = np.random.default_rng([seed, list(TEXTURES).index(kind)])
    colours = _palette(rng)
    t = TEXTURES[kind](rng, size)
    rest = 1 - t
    pixels = np.empty((*t.shape, 3), np.uint8)
    for channel, (first, second) in enumerate(colours.T):  # several times faster than three channels at once
        pixels[..., channel] = np.round(first * rest + second * t)
    return Image.fromarray(pixels)
