"""Scenes: deterministic, of various sizes, and saying what they show; contact sheets of a known size."""

import numpy as np
import pytest
from PIL import Image

from uniref_fast.scenes.textures import PLACES, RELATIONS, TEXTURES, artwork, artworks, compose, demo_scene, texture
from uniref_fast.sheets import contact_sheet, difference


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def test_artworks_are_small_rgba_with_unicode_names():
    import unicodedata

    paths = artworks()
    assert 12 <= len(paths) <= 16 and list(paths) == sorted(paths)
    for name, path in paths.items():
        assert unicodedata.lookup(name.upper())  # KeyError for a name that Unicode does not have
        image = artwork(name)
        assert (image.mode, image.size) == ("RGBA", (96, 96))
        assert path.stat().st_size < 20_000
        alpha = np.asarray(image)[..., 3]
        assert alpha.min() == 0 and alpha.max() > 250
    assert (next(iter(paths.values())).parent / "OFL.txt").read_text().count("SIL OPEN FONT LICENSE") == 1
    with pytest.raises(KeyError, match="octopus"):
        artwork("unicorn of steel")


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


@pytest.mark.parametrize("place", RELATIONS)
def test_relations_mean_what_they_say(place):
    grey = Image.new("RGB", (120, 120), (128, 128, 128))
    red, blue = (Image.new("RGBA", (10, 10), colour) for colour in ("red", "blue"))
    pixels = np.asarray(compose(grey, [red, blue], place)).astype(int)
    y, x = np.mgrid[0:120, 0:120]
    is_red, is_blue = pixels[..., 0] > 200, pixels[..., 2] > 200
    offset = (x[is_red].mean() - x[is_blue].mean(), y[is_red].mean() - y[is_blue].mean())
    direction = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[place]
    assert np.sign(np.round(offset)).astype(int).tolist() == list(direction)
    assert is_red.sum() == is_blue.sum()  # neither hides the other
    assert grey.getpixel((60, 60)) == (128, 128, 128) and set(grey.getdata()) == {(128, 128, 128)}  # not drawn on


def test_compose_errors():
    background = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="left of"):
        compose(background, [artwork("owl")] * 2, "in the centre")
    with pytest.raises(ValueError, match="3 artworks"):
        compose(background, [artwork("owl")] * 3, "above")


@pytest.mark.parametrize("references", [1, 2, 3])
def test_demo_scenes(references):
    instructions = set()
    for seed in range(12):
        scene, again = demo_scene(seed, 128, references), demo_scene(seed, 128, references)
        assert scene.instruction == again.instruction and same(scene.expected, again.expected)
        assert all(same(a, b) for a, b in zip(scene.references, again.references, strict=True))
        assert len(scene.references) == references and scene.expected.size == (128, 128)
        ratios = {image.width / image.height for image in scene.references}
        assert len(ratios) == references  # different aspect ratios
        assert all(f"picture {i + 1}" in scene.instruction for i in range(references))
        assert sum(name in scene.instruction for name in artworks()) >= min(references, 2) - (references == 2)
        assert any(place in scene.instruction for place in (PLACES if references < 3 else RELATIONS))
        instructions.add(scene.instruction)
    assert len(instructions) > 8


def test_demo_scene_sizes():
    assert demo_scene(0, (96, 64)).expected.size == (96, 64)
    assert demo_scene(0, 256).references[0].width == 2 * demo_scene(0, 128).references[0].width
    with pytest.raises(ValueError, match="1, 2 or 3"):
        demo_scene(0, 128, references=4)


def test_difference():
    a, b = Image.new("RGB", (4, 3), (10, 20, 30)), Image.new("RGB", (4, 3), (12, 20, 130))
    assert difference(a, b, gain=8).getpixel((0, 0)) == (16, 0, 255)
    assert not difference(a, a).getbbox()
    with pytest.raises(ValueError, match="different sizes"):
        difference(a, b.resize((3, 3)))


def test_contact_sheet_size_and_pixels():
    tiny = Image.new("RGB", (8, 4), "red")
    sheet = contact_sheet([[("one", tiny), ("two", tiny), ("three", tiny)], [("four", artwork("owl"))]], cell=64)
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
