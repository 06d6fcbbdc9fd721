"""Procedural textures."""

import numpy as np
import pytest
from PIL import Image

from uniref_fast.scenes.textures import TEXTURES, texture


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", TEXTURES)
def test_textures(kind):
    image = texture(kind, (70, 41), seed=3)
    assert (image.mode, image.size) == ("RGB", (70, 41))
    assert same(image, texture(kind, (70, 41), seed=3))
    assert not same(image, texture(kind, (70, 41), seed=4))
    assert np.asarray(image).std() > 5
    assert texture(kind, (1, 1), seed=0).size == (1, 1)  # one pixel: no range to normalise


def test_texture_errors():
    with pytest.raises(ValueError, match="wood"):
        texture("marble", (8, 8), 0)
    with pytest.raises(ValueError, match="at least 1"):
        texture("wood", (8, 0), 0)
