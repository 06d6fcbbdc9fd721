"""Scenes to edit: emoji artworks on procedural textures, with an instruction and the image it asks for.

    scene = demo_scene(seed=0)
    scene.references, scene.instruction, scene.expected

Everything follows from the seed; NumPy and Pillow only. Sizes are (width, height) in pixels, images are RGB unless said
otherwise. The artworks are cut from Noto Color Emoji (SIL Open Font License 1.1, `assets/emoji/NOTICE.md`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

EMOJI_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "emoji"

# centres of the artworks as fractions of width and height, and the artworks' side as a fraction of the shorter side
PLACES: dict[str, tuple[tuple[float, float], ...]] = {
    "in the centre": ((0.5, 0.5),),
    "on the left": ((0.25, 0.5),),
    "on the right": ((0.75, 0.5),),
    "at the top": ((0.5, 0.25),),
    "at the bottom": ((0.5, 0.75),),
}
RELATIONS: dict[str, tuple[tuple[float, float], ...]] = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}
ARTWORK_SCALE = 0.46


@dataclass(frozen=True)
class Scene:
    """One editing task: `references` of various sizes, what to do with them, and the `expected` image."""

    references: list[Image.Image]
    instruction: str
    expected: Image.Image


def artworks() -> dict[str, Path]:
    """PNG files (RGBA, 96 x 96) by lower-case Unicode name, in alphabetical order."""
    return {path.stem.replace("_", " "): path for path in sorted(EMOJI_FOLDER.glob("*.png"))}


def artwork(name: str) -> Image.Image:
    """The RGBA artwork of that name. Raises KeyError that lists the names there are."""
    paths = artworks()
    if name not in paths:
        raise KeyError(f"no artwork {name!r}; there are: {', '.join(paths)}")
    with Image.open(paths[name]) as image:
        return image.convert("RGBA")


# --- textures ---------------------------------------------------------------------------------------------------------


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Two muted colours that differ in lightness, [2, 3] in 0..255: backgrounds that artworks stand out from."""
    hue = rng.uniform(0, 1)
    hues = np.array([hue, hue + rng.uniform(-0.12, 0.12)])
    lightness = rng.permutation([rng.uniform(0.42, 0.55), rng.uniform(0.72, 0.86)])
    saturation = rng.uniform(0.25, 0.5)
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hues[:, None] + np.array([0, 1 / 3, 2 / 3])))
    return 255 * np.clip(lightness[:, None] + saturation * (wheel - 0.5), 0, 1)


def _grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x, y of the pixel centres in units of the shorter side, [H, W] each."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] + 0.5
    return x / min(size), y / min(size)


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int], octaves: int = 4) -> np.ndarray:
    """Fractal value noise in 0..1, [H, W]; `cells` are the coarsest octave's cells along width and height."""
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


TEXTURES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "gradient": _gradient,
    "checker": _checker,
    "stripes": _stripes,
    "dots": _dots,
    "bricks": _bricks,
    "wood": _wood,
    "clouds": _clouds,
}


def texture(kind: str, size: tuple[int, int], seed: int) -> Image.Image:
    """A background of that kind, `size` = (width, height). Raises ValueError for an unknown kind or an empty size."""
    if kind not in TEXTURES:
        raise ValueError(f"unknown texture {kind!r}; there are: {', '.join(TEXTURES)}")
    if min(size) < 1:
        raise ValueError(f"a texture's width and height are at least 1, got {size}")
    rng = np.random.default_rng([seed, list(TEXTURES).index(kind)])
    colours = _palette(rng)
    t = TEXTURES[kind](rng, size)
    rest = 1 - t
    pixels = np.empty((*t.shape, 3), np.uint8)
    for channel, (first, second) in enumerate(colours.T):  # several times faster than three channels at once
        pixels[..., channel] = np.round(first * rest + second * t)
    return Image.fromarray(pixels)


# --- scenes -----------------------------------------------------------------------------------------------------------


def compose(
    background: Image.Image, artworks: Sequence[Image.Image], place: str, scale: float = ARTWORK_SCALE
) -> Image.Image:
    """A copy of `background` (RGB) with one RGBA artwork at a place, or two in a relation.

    `place` is one of PLACES for one artwork ("in the centre", "on the left", ...) or of RELATIONS for two ("left of":
    the first is left of the second, "right of", "above", "below"). `scale` is an artwork's side as a fraction of the
    background's shorter side. Raises ValueError when the place does not fit the number of artworks.
    """
    known = {1: PLACES, 2: RELATIONS}.get(len(artworks), {})
    if place not in known:
        raise ValueError(
            f"{len(artworks)} artworks cannot be placed {place!r}: one goes {', '.join(PLACES)};"
            f" two go {', '.join(RELATIONS)}"
        )
    result = background.convert("RGB")
    side = max(1, round(scale * min(result.size)))
    for image, (x, y) in zip(artworks, known[place], strict=True):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
        corner = (round(x * result.width - side / 2), round(y * result.height - side / 2))
        result.paste(image, corner, image)
    return result


def demo_scene(seed: int, size: int | tuple[int, int] = 128, references: int = 3) -> Scene:
    """The scene of that seed; `size` is the expected image's (a side or (width, height)), `references` is 1, 2 or 3.

    Three: two artworks in a relation on the third's background. Two: an artwork at a place on the second's background.
    One: an artwork moved to another place. The references' sizes and aspect ratios always differ.
    """
    if references not in (1, 2, 3):
        raise ValueError(f"a scene has 1, 2 or 3 references, not {references}")
    size = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng([seed, references])
    names = [str(name) for name in rng.choice(list(artworks()), 2, replace=False)]
    kinds = [str(kind) for kind in rng.choice(list(TEXTURES), 3, replace=False)]
    seeds = [int(value) for value in rng.integers(0, 2**31, 3)]
    # portrait, landscape and wide, in any order; around the size of the result
    unit = max(size) / 128
    order = rng.permutation([(96, 128), (144, 112), (192, 108)])[:references]
    shapes = [(int(width * unit), int(height * unit)) for width, height in order]

    if references == 1:
        place, target = (str(value) for value in rng.choice(list(PLACES), 2, replace=False))
        background = texture(kinds[0], shapes[0], seeds[0])
        picture = compose(background, [artwork(names[0])], place)
        expected = compose(background.resize(size, Image.Resampling.LANCZOS), [artwork(names[0])], target)
        return Scene([picture], f"move the {names[0]} of picture 1 so that it is {target}", expected)

    *portraits, background = [texture(*values) for values in zip(kinds, shapes, seeds, strict=False)]
    pictures = [
        compose(image, [artwork(name)], "in the centre", scale=0.8)
        for image, name in zip(portraits, names, strict=False)
    ]
    if references == 2:
        place = str(rng.choice(list(PLACES)))
        instruction = f"put the {names[0]} of picture 1 {place} on the background of picture 2"
        used = [artwork(names[0])]
    else:
        place = str(rng.choice(list(RELATIONS)))
        instruction = (
            f"put the {names[0]} of picture 1 {place} the {names[1]} of picture 2 on the background of picture 3"
        )
        used = [artwork(name) for name in names]
    expected = compose(background.resize(size, Image.Resampling.LANCZOS), used, place)
    return Scene([*pictures, background], instruction, expected)


# --- pictures for people ----------------------------------------------------------------------------------------------
