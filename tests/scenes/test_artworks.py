"""Names and pixels of the artworks, from the shipped files and from the font."""

import re
import unicodedata

import numpy as np
import pytest

from uniref_fast.scenes.artworks import LATER_NAMES, artworks, shipped_artwork, shipped_artworks, unicode_name, usable
from uniref_fast.scenes.make import MakeConfig, sample


def test_shipped_artworks_are_small_rgba_with_unicode_names():
    paths = shipped_artworks()
    assert 12 <= len(paths) <= 16 and list(paths) == sorted(paths)
    for name, path in paths.items():
        assert unicodedata.lookup(name.upper())  # KeyError for a name that Unicode does not have
        image = shipped_artwork(name)
        assert (image.mode, image.size) == ("RGBA", (96, 96))
        assert path.stat().st_size < 20_000
        alpha = np.asarray(image)[..., 3]
        assert alpha.min() == 0 and alpha.max() > 250
    assert (next(iter(paths.values())).parent / "OFL.txt").read_text().count("SIL OPEN FONT LICENSE") == 1
    with pytest.raises(KeyError, match="octopus"):
        shipped_artwork("unicorn of steel")


def test_usable_names_are_unambiguous_in_instructions():
    for code in (0x1F989, 0x1F451, 0x1F335, 0x2615, 0x1FABC, 0x1F600, 0x1F34E):
        assert usable(code), hex(code)
    left_out = {
        "regional indicator": 0x1F1E6, "skin tone": 0x1F3FB, "hair": 0x1F9B0, "joiner": 0x200D, "keycap": 0x20E3,
        "clock face": 0x1F550, "direction": 0x2B05, "size": 0x1F534, "number": 0x1F495, "writing": 0x1F192,
        "ideograph": 0x3299, "black": 0x260E, "position": 0x1F58A, "rude": 0x1F595, "nameless": 0x1FAFF,
    }  # fmt: skip
    for why, code in left_out.items():
        assert not usable(code), why
    assert unicode_name(0x1FABC) == "jellyfish" and unicode_name(0x1F989) == "owl"
    assert unicode_name(0x1FACD) is None  # Unicode 17: not named by every Python that is supported


def test_names_of_later_characters_follow_unicode():
    known = {code: unicodedata.name(chr(code), "").lower() for code in LATER_NAMES}
    assert all(name in ("", LATER_NAMES[code]) for code, name in known.items())
    assert len(LATER_NAMES) > 60 and len(set(LATER_NAMES.values())) == len(LATER_NAMES)


def test_shipped_pool():
    pool = artworks("shipped")
    assert pool.names == tuple(shipped_artworks()) and pool.font is None
    assert pool.image("owl").tobytes() == shipped_artwork("owl").tobytes()
    with pytest.raises(KeyError, match="unicorn"):
        pool.image("unicorn")
    with pytest.raises(ValueError, match="shipped"):
        artworks("drawn")


def test_without_a_font(monkeypatch):
    def missing():
        raise FileNotFoundError("apt-get install fonts-noto-color-emoji")

    monkeypatch.setattr("uniref_fast.scenes.artworks.find_font", missing)
    assert artworks("auto") == artworks("shipped")
    with pytest.raises(FileNotFoundError, match="apt-get install"):
        artworks("font")


def test_font_pool():
    pytest.importorskip("fontTools")
    try:
        pool = artworks("font")
    except FileNotFoundError:
        pytest.skip("the font is not installed")
    assert 1100 < len(pool.names) < 1400 and list(pool.names) == sorted(pool.names)
    assert pool.font and re.fullmatch(r"[\d.]+", pool.font["version"]) and len(pool.font["sha256"]) == 64
    assert set(shipped_artworks()) <= set(pool.names) and artworks("auto") == pool
    for name in pool.names[::60]:
        image = pool.image(name)
        assert (image.mode, image.size) == ("RGBA", (128, 128)) and np.asarray(image)[..., 3].max() > 200
    generated = sample("train", 0, MakeConfig(pool))
    assert generated.target.mode == "RGB"
    assert all(placed["name"] in pool.codes for placed in generated.scene["objects"])
