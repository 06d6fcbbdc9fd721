"""Generated backgrounds: reproducible, of every size, with the colours that words name."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from uniref_fast.scenes.backgrounds import COLOURS, KINDS, NAMED, PHOTOS, background, named_background


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_backgrounds(kind):
    image = background(kind, (70, 41), 3)
    assert (image.mode, image.size) == ("RGB", (70, 41)) and pixels(image).std() > 5
    assert image.tobytes() == background(kind, (70, 41), 3).tobytes() != background(kind, (70, 41), 4).tobytes()
    assert background(kind, (1, 1), 0).size == (1, 1) and background(kind, (3, 200), 0).size == (3, 200)


def test_photos_have_more_than_two_colours():
    for kind in PHOTOS:
        values = pixels(background(kind, (96, 64), 1)).reshape(-1, 3).astype(float)
        spread = np.linalg.svd(values - values.mean(0), compute_uv=False)
        assert spread[1] > 0.05 * spread[0], kind  # not on a line between two colours, as textures are


@pytest.mark.parametrize("kind", NAMED)
def test_named_backgrounds_have_their_colour(kind):
    for colour, rgb in COLOURS.items():
        image = named_background(kind, colour, (64, 48))
        assert image.tobytes() == named_background(kind, colour, (64, 48)).tobytes()
        mean = pixels(image).reshape(-1, 3).mean(0) / 255
        off = abs(colorsys.rgb_to_hsv(*mean)[0] - colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0])
        assert min(off, 1 - off) < 0.03, colour
    assert (pixels(named_background(kind, "blue", (64, 48))).std((0, 1)).max() > 5) == (kind != "plain")


def test_background_errors():
    with pytest.raises(ValueError, match="landscape"):
        background("cave", (8, 8), 0)
    with pytest.raises(ValueError, match="at least 1"):
        background("sea", (8, 0), 0)
    with pytest.raises(ValueError, match="checker"):
        named_background("clouds", "blue", (8, 8))
    with pytest.raises(ValueError, match="purple"):
        named_background("checker", "teal", (8, 8))
    with pytest.raises(ValueError, match="at least 1"):
        named_background("plain", "red", (0, 8))
