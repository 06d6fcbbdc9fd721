"""Picture sources: sizes from headers, upright RGB pixels, and an error for every kind of damage."""

import io
import subprocess
import sys
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from data_rows import RED, encoded
from PIL import Image, ImageFile, PngImagePlugin

from uniref_fast import cli
from uniref_fast.data import images
from uniref_fast.data.images import ImageSource
from uniref_fast.encode import to_rgb

WHITE = (255, 255, 255)


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
    with pytest.raises(ValueError, match=r"^x: 13378 x 13378 pixels are more than the limit of 178,956,970"):
        source(bomb(13_378, 13_378)).size()


def test_the_pixel_limit_can_be_set(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 47)
    with pytest.raises(ValueError, match="8 x 6 pixels"):
        source(encoded(RED)).size()


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a"]
)
def test_other_bytes_are_no_picture(content):
    for action in (source(content).size, source(content).load):
        with pytest.raises(ValueError, match=r"^x: "):
            action()


# ---- damaged files ----


def pictures_of_every_kind():
    """Small files of every format and of the layouts that are decoded differently, by name."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (12, 16), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [noise, noise]}
    kinds = {
        "jpeg": (noise, "JPEG", {"exif": exif}), "cmyk": (noise.convert("CMYK"), "JPEG", {}),
        "mpo": (noise, "MPO", more),
        "png": (noise, "PNG", {"exif": exif}), "palette": (noise.convert("P"), "PNG", {"transparency": 3}),
        "16 bit": (deep, "PNG", {}), "apng": (noise, "PNG", more), "webp": (noise, "WEBP", {"exif": exif}),
        "animated webp": (noise, "WEBP", more), "lossless": (noise.convert("RGBA"), "WEBP", {"lossless": True}),
        "tiff": (noise, "TIFF", {"exif": exif}), "deflate": (noise, "TIFF", {"compression": "tiff_deflate"}),
        "gif": (noise, "GIF", {}), "animated gif": (noise, "GIF", more), "bmp": (noise, "BMP", {}),
        "ppm": (noise, "PPM", {}), "jpeg 2000": (noise, "JPEG2000", {}),
    }  # fmt: skip
    files = {}
    for name, (image, form, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, form, **options)
        files[name] = file.getvalue()
    return files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", pictures_of_every_kind().values(), ids=pictures_of_every_kind().keys())
def test_an_altered_file_opens_or_is_one_error_that_names_it(content):
    random = Random(0)
    assert sorted(source(content).load().size) == [12, 16]
    opened = 0
    for _ in range(400):
        altered = bytearray(content)
        for _ in range(random.choice((1, 1, 2, 8))):
            altered[random.randrange(len(altered))] = random.randrange(256)
        found = source(bytes(altered), "the name")
        try:
            size = found.size()
            image = found.load()
        except ValueError as error:
            assert str(error).startswith("the name: ")
        else:
            opened += 1
            assert image.mode == "RGB" and image.size == size, "the header and the pixels agree"
    assert opened, "some bytes do not matter"


def altered_exif(count):
    """EXIF blocks with changed bytes, most of which no parser takes."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "text", (300, 1)
    exif[0x8769], exif[0x8825] = {0x829A: (1, 60)}, {1: "N", 2: (1.0, 2.0, 3.0)}
    whole, random = exif.tobytes(), Random(1)
    for _ in range(count):
        block = bytearray(whole)
        for _ in range(random.choice((1, 2, 4, 16))):
            block[random.randrange(6, len(block))] = random.randrange(256)
        yield bytes(block[: random.randrange(6, len(block))] if random.random() < 0.1 else block)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_keeps_no_picture_from_being_read(form, tmp_path):
    turned = 0
    for number, block in enumerate(altered_exif(700)):
        file = tmp_path / f"{number}.img"
        file.write_bytes(encoded(RED, (16, 12), form, exif=block))
        for found in (ImageSource("x", file), cli._image(str(file))):
            assert found.size() == found.load().size and sorted(found.size()) == [12, 16]
        turned += found.size() == (12, 16)
    assert 100 < turned < 700, "those whose orientation is whole are turned, the others are as they are stored"


def chunks(png):
    """(kind, first byte, end) of the contents of a PNG's chunks."""
    at = 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8], at + 8, at + 8 + length
        at += 12 + length


@pytest.mark.parametrize("checked", [False, True])
def test_damaged_metadata_of_a_png_keep_it_from_nothing(checked):
    """The checksum of the damaged chunk does not matter; the orientation is not damaged."""
    info, exif, random = PngImagePlugin.PngInfo(), Image.Exif(), Random(2)
    info.add_text("a", "b" * 50)
    info.add_text("c", "d" * 500, zip=True)
    info.add_itxt("e", "f" * 50)
    exif[0x0112] = 6
    content = encoded(RED, (16, 12), pnginfo=info, exif=exif, icc_profile=b"no profile", dpi=(72, 72))
    spare = [part for part in chunks(content) if part[0] in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"pHYs")]
    assert len(spare) == 5
    for _ in range(500):
        altered = bytearray(content)
        for _ in range(random.choice((1, 2, 16))):
            kind, start, end = random.choice(spare)
            altered[random.randrange(start, end)] = random.randrange(256)
            if checked:
                altered[end : end + 4] = zlib.crc32(kind + altered[start:end]).to_bytes(4, "big")
        found = source(bytes(altered))
        assert found.size() == found.load().size == (12, 16) and found.load().getpixel((0, 0)) == RED
        assert found.suffix() == ".png"


def test_a_png_with_a_large_text_can_be_read():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    file = io.BytesIO()
    palette.save(file, "PNG", pnginfo=info, transparency=1)
    loaded = source(file.getvalue()).load()
    assert loaded.getpixel((0, 0)) == RED and loaded.getpixel((1, 0)) == WHITE, "transparency is not metadata"


def test_a_png_with_damaged_pixels_keeps_its_first_error():
    content = encoded(RED, (60, 60), compress_level=0)
    with pytest.raises(ValueError, match=r"^x: image file is truncated"):
        source(content[:5000]).load()
    end = next(end for kind, _, end in chunks(content) if kind == b"IDAT")
    damaged = content[: end - 50] + b"?" + content[end - 49 :]
    with pytest.raises(ValueError, match=r"^x: broken data stream when reading image file"):
        source(damaged).load()


def test_a_damaged_exif_directory_of_a_tiff_is_ignored():
    directories = {0x8769: 0xFFFFFF, 0x8825: 3}  # behind the file's end, and inside its header
    file = io.BytesIO()
    Image.new("RGB", (16, 12), RED).save(file, "TIFF", tiffinfo={0x0112: 6, **directories})
    found = source(file.getvalue())
    assert found.size() == found.load().size == (12, 16)


def test_transparency_can_be_kept():
    content = io.BytesIO()
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(content, "PNG")
    assert source(content.getvalue()).load("RGBA").getpixel((0, 0)) == (255, 0, 0, 0)
    assert source(content.getvalue()).load().getpixel((0, 0)) == WHITE


def test_the_original_mode_keeps_transparency_where_it_is():
    """Families without transparency get the pixels that they got from `load()`."""
    clear = Image.effect_noise((7, 5), 90)
    clear = Image.merge("RGBA", (*Image.merge("RGB", (clear, clear.rotate(90), clear.rotate(180))).split(), clear))
    palette, exif = Image.new("P", (7, 5), 3), Image.Exif()
    exif[0x0112] = 6
    for image, more, mode in (
        (clear, {"exif": exif}, "RGBA"), (clear.convert("LA"), {}, "RGBA"), (palette, {"transparency": 3}, "RGBA"),
        (clear.convert("RGB"), {}, "RGB"), (clear.convert("L"), {}, "RGB"),
        (Image.fromarray(np.full((5, 7), 40000, np.uint16)), {}, "RGB"),
    ):  # fmt: skip
        content = io.BytesIO()
        image.save(content, "PNG", **more)
        found = source(content.getvalue())
        loaded = found.load("original")
        assert loaded.mode == mode and np.array_equal(np.asarray(to_rgb(loaded)), np.asarray(found.load()))


def test_an_image_that_edit_is_given_and_cannot_decode_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(RED, (300, 300), compress_level=0)[:5000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match=r"cut.png cannot be decoded: "):
        to_rgb(image)


def test_nothing_else_opens_images():
    """Pillow's own open gives errors without the file's name, and fails on damaged metadata."""
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "training").rglob("*.py"), *(root / "uniref_fast").rglob("*.py")]
    found = {path.name for path in files if "Image.open(" in path.read_text()}
    # artworks.py opens those of the package; serve/pictures.py reads the headers of three formats, before any decoding.
    assert found == {"images.py", "artworks.py", "pictures.py"}


def test_damaged_metadata_is_no_reason_for_a_warning(tmp_path):
    """Run in a process of its own, since pytest sets the filters of warnings itself."""
    whole = Image.Exif()
    whole[0x0112], whole[0x010E], whole[0x8825] = 6, "a text", {1: "N", 2: (1.0, 2.0, 3.0)}
    (tmp_path / "a.jpg").write_bytes(encoded(RED, (8, 6), form="JPEG", exif=whole.tobytes()[:26]))
    code = "import sys; from uniref_fast.data.images import ImageSource; from pathlib import Path\n"
    code += "print(ImageSource('a', Path(sys.argv[1])).load().size)"
    command = [sys.executable, "-W", "always", "-c", code, str(tmp_path / "a.jpg")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() in ("(8, 6)", "(6, 8)") and not shown.stderr, shown.stderr
