"""Sizes and checks of the configuration of a synthetic dataset."""

import pytest

from uniref_fast.scenes.artworks import Artworks, artworks
from uniref_fast.scenes.config import MakeConfig, rounded_size
from uniref_fast.scenes.make import sample

CONFIG = MakeConfig(artworks("shipped"))


def test_sizes():
    assert CONFIG.target_sizes == ((128, 128), (128, 96), (96, 128), (128, 80))
    assert rounded_size((9, 16), 256) == (144, 256) and rounded_size((16, 9), 64) == (64, 32)
    sizes = CONFIG.reference_sizes((128, 96))
    assert len(sizes) > 20 and all(side % 16 == 0 and 32 <= side <= 192 for size in sizes for side in size)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 100}, {"size": 48}, {"seed": -1}, {"references": ()}, {"references": (7,)}, {"pictures": "all"}],
    ids=str,
)
def test_config_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))[:4]):
        MakeConfig(artworks("shipped"), **wrong)
    with pytest.raises(ValueError, match="at least 12 artworks"):
        MakeConfig(Artworks("shipped", {"owl": 0x1F989}))
    with pytest.raises(ValueError, match="heldout_objects"):
        sample("test", 0, CONFIG)
    with pytest.raises(ValueError, match="-1"):
        sample("train", -1, CONFIG)
