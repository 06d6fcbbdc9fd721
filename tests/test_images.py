"""Picture sources: sizes from headers, upright RGB pixels, and an error for every kind of damage."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from uniref_fast.training import images
from uniref_fast.training.images import ImageSource

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(color, size=(8, 6), form="PNG", **options):
    """Bytes of a one-coloured picture."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form, **options)
    return file.getvalue()


def source(content, name="x"):
    return ImageSource(name, data=content)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_counts_in_size_and_pixels(form, orientation):
    stored = Image.new("RGB", (48, 32), "black")
    stored.paste((255, 255, 255), (0, 0, 16, 16))  # top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    found = source(file.getvalue())
    size = (48, 32) if orientation < 5 else (32, 48)
    assert found.size() == size == found.load().size
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    pixels = np.asarray(found.load().convert("L"), dtype=int)
    for x in (0, 1):
        for y in (0, 1):
            value = pixels[-8 if y else 8, -8 if x else 8]
            assert (value > 200) == ((x, y) == corner), (x, y)


def png_chunk(kind, content):
    file = io.BytesIO()
    PngImagePlugin.putchunk(file, kind, content)
    return file.getvalue()


def test_orientation_behind_the_pixels_of_a_png_and_junk_in_its_place():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(RED, (8, 6))
    end = plain.index(b"IEND") - 4
    late = plain[:end] + png_chunk(b"eXIf", exif.tobytes()[6:]) + plain[end:]
    assert source(late).size() == source(late).load().size == (6, 8)
    junk = encoded(RED, (8, 6), form="JPEG", exif=b"Exif\0\0junk junk junk")
    assert source(junk).size() == source(junk).load().size == (8, 6)


def test_the_size_needs_the_header_only(tmp_path):
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = encoded(RED, (640, 400), form=form)
        if form != "WEBP":  # whose decoder wants all of it
            assert source(whole[: len(whole) // 2 + 30]).size() == (640, 400), form
        path = tmp_path / "x"
        path.write_bytes(b"junk" + whole + b"more")
        inside = ImageSource("x", path, 4, len(whole))
        assert inside.size() == (640, 400) and inside.read() == whole
        assert inside.load().tobytes() == source(whole).load().tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9])
def test_a_truncated_picture_is_an_error(form, part):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, form)
    content = file.getvalue()
    assert source(content).load().size == (80, 60)
    with pytest.raises(ValueError, match=r"^x: "):
        source(content[: int(len(content) * part)]).load()


def test_tolerance_for_truncated_pictures_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # some training code sets it for good
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES"):
        source(encoded(RED)).load()


def test_16_bit_grey_is_scaled_and_alpha_becomes_white(tmp_path):
    grey = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    for form in ("PNG", "TIFF", "PPM"):
        file = io.BytesIO()
        grey.save(file, form)
        values = np.asarray(source(file.getvalue()).load())
        assert values.shape == (1, 4, 3) and (values == np.array([0, 1, 128, 255])[None, :, None]).all(), form
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for image, options in ((clear, {}), (palette, {"transparency": 1}), (clear.convert("LA"), {})):
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        loaded = source(file.getvalue()).load()
        assert loaded.mode == "RGB" and loaded.getpixel((1, 0)) == WHITE != loaded.getpixel((0, 0))
    for mode in ("L", "1", "CMYK", "YCbCr"):
        file = io.BytesIO()
        Image.new(mode, (3, 2)).save(file, "TIFF")
        assert source(file.getvalue()).load().mode == "RGB"
    file = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(file, "TIFF")
    with pytest.raises(ValueError, match=r"^x: mode 'F' has no defined range"):
        source(file.getvalue()).load()


def bomb(width, height):
    """A PNG whose header promises more than it holds."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for side in (13_378, 60_000):
        for action in (source(bomb(side, side)).size, source(bomb(side, side)).load):
            with pytest.raises(ValueError, match=r"^x: .*pixels"):
                action()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some training code lifts Pillow's limit
    with pytest.raises(ValueError, match=r"^x: 13378 x 13378 pixels are more than the 178,956,970 allowed"):
        source(bomb(13_378, 13_378)).size()


def test_the_pixel_limit_can_be_set(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 47)
    with pytest.raises(ValueError, match="8 x 6 pixels"):
        source(encoded(RED)).size()


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a"]
)
def test_other_bytes_are_no_picture(content):
    for action in (source(content).size, source(content).load):
        with pytest.raises(ValueError, match=r"^x: "):
            action()
