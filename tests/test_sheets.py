"""Contact sheets of a known size, and difference images."""

import numpy as np
import pytest
from PIL import Image

from uniref_fast.scenes.artworks import shipped_artwork
from uniref_fast.sheets import contact_sheet, difference


def test_difference():
    a, b = Image.new("RGB", (4, 3), (10, 20, 30)), Image.new("RGB", (4, 3), (12, 20, 130))
    assert difference(a, b, gain=8).getpixel((0, 0)) == (16, 0, 255)
    assert not difference(a, a).getbbox()
    with pytest.raises(ValueError, match="different sizes"):
        difference(a, b.resize((3, 3)))


def test_contact_sheet_size_and_pixels():
    tiny = Image.new("RGB", (8, 4), "red")
    sheet = contact_sheet(
        [[("one", tiny), ("two", tiny), ("three", tiny)], [("four", shipped_artwork("owl"))]], cell=64
    )
    assert sheet.mode == "RGB" and sheet.size == (24 + 3 * 88, 24 + 2 * (24 + 64 + 24))
    pixels = np.asarray(sheet.crop((24, 48, 88, 112)))
    assert (pixels == (255, 0, 0)).all(-1).sum() == 64 * 32  # eight times, sharp edges
    titled = contact_sheet([[("one", tiny)]], heading="put the owl\non the left", caption="a caption", cell=64)
    assert titled.height > contact_sheet([[("one", tiny)]], cell=64).height
    assert titled.width == 24 + 88
    # long words and titles neither overflow nor loop
    assert contact_sheet([[("x" * 500, tiny)]], heading="y" * 500, caption="z " * 200, cell=64).width == 24 + 88
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([[]])
