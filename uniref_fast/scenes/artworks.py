"""Artworks of the synthetic data: the available emoji, their names and their pixels.

    pool = artworks("auto")
    pool.names, pool.image("owl")

There are two sources. "font": every artwork of an installed Noto Color Emoji font that stands for a single code point,
under its Unicode name, except those that `usable` excludes. "shipped": the sixteen PNG files of
`uniref_fast/assets/emoji` (cut from the same font, SIL Open Font License 1.1, see NOTICE.md there).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "EMOJI_FOLDER",
    "SHIPPED_SIDE",
    "SOURCES",
    "Artworks",
    "artworks",
    "find_font",
    "render_emoji",
    "shipped_artwork",
    "shipped_artworks",
    "unicode_name",
    "usable",
]

SOURCES = ("auto", "font", "shipped")
SIDE = 128  # pixels: side of artworks drawn from the font, the height of its bitmaps
SHIPPED_SIDE = 96  # pixels: side of the shipped artworks
EMOJI_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "emoji"
NATIVE_SIZE = 109  # the only size of the font's bitmaps
FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)

# Ranges of pictographs, without private use and the digits of keycaps.
BLOCKS = (range(0x2000, 0x3300), range(0x1F000, 0x1FB00))

# Words that instructions use for places, sizes, counts and pictures. "black" and "white" mean filled and outlined in
# older names ("black telephone" is drawn red), so they would be wrong as colours.
INSTRUCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """left right up down above below top bottom upper lower between under north south leftwards rightwards upwards
        downwards small medium large one two three four five six seven eight nine ten eleven twelve first second third
        black white picture background put""",
    )
)
# Signs with writing in a box: their names describe the encoding, not the appearance.
WRITING = ("squared", "ideograph", "katakana", "keycap", "capital letter", "input symbol")
PREFIXES = ("regional indicator", "emoji modifier", "emoji component", "combining", "zero width", "clock face")
RUDE = 0x1F595  # the middle finger

# Python 3.10 knows Unicode 13; later characters are named here, so that the names do not depend on the Python version.
LATER_NAMES = {
    int(code, 16): name
    for code, _, name in (
        line.strip().partition(" ")
        for line in """
        1f6dc wireless; 1f6dd playground slide; 1f6de wheel; 1f6df ring buoy; 1f7f0 heavy equals sign
        1f979 face holding back tears; 1f9cc troll; 1fa75 light blue heart; 1fa76 grey heart; 1fa77 pink heart
        1fa7b x-ray; 1fa7c crutch; 1fa87 maracas; 1fa88 flute; 1fa89 harp; 1fa8f shovel; 1faa9 mirror ball
        1faaa identification card; 1faab low battery; 1faac hamsa; 1faad folding hand fan; 1faae hair pick
        1faaf khanda; 1fab7 lotus; 1fab8 coral; 1fab9 empty nest; 1faba nest with eggs; 1fabb hyacinth
        1fabc jellyfish; 1fabd wing; 1fabe leafless tree; 1fabf goose; 1fac3 pregnant man; 1fac4 pregnant person
        1fac5 person with crown; 1fac6 fingerprint; 1face moose; 1facf donkey; 1fad7 pouring liquid; 1fad8 beans
        1fad9 jar; 1fada ginger root; 1fadb pea pod; 1fadc root vegetable; 1fadf splatter; 1fae0 melting face
        1fae1 saluting face; 1fae2 face with open eyes and hand over mouth; 1fae3 face with peeking eye
        1fae4 face with diagonal mouth; 1fae5 dotted line face; 1fae6 biting lip; 1fae7 bubbles; 1fae8 shaking face
        1fae9 face with bags under eyes; 1faf0 hand with index finger and thumb crossed; 1faf1 rightwards hand
        1faf2 leftwards hand; 1faf3 palm down hand; 1faf4 palm up hand; 1faf5 index pointing at the viewer
        1faf6 heart hands; 1faf7 leftwards pushing hand; 1faf8 rightwards pushing hand
        """.replace(";", "\n").splitlines()
        if line.strip()
    )
}
# Code points that Unicode 13 had assigned in blocks that still grow.
GROWING = (range(0x1F6D8, 0x1F6E0), range(0x1F7F0, 0x1F800), range(0x1FA70, 0x1FB00))
ASSIGNED_13 = tuple(
    range(first, last + 1)
    for first, last in (
        (0x1FA70, 0x1FA74),
        (0x1FA78, 0x1FA7A),
        (0x1FA80, 0x1FA86),
        (0x1FA90, 0x1FAA8),
        (0x1FAB0, 0x1FAB6),
        (0x1FAC0, 0x1FAC2),
        (0x1FAD0, 0x1FAD6),
    )
)


def unicode_name(code: int) -> str | None:
    """Return the lower-case Unicode name up to Unicode 16, the same for every Python version; None without a name."""
    if code in LATER_NAMES:
        return LATER_NAMES[code]
    if any(code in block for block in GROWING) and not any(code in block for block in ASSIGNED_13):
        return None
    name = unicodedata.name(chr(code), "")
    return name.lower() or None


def usable(code: int) -> bool:
    """Return True if an artwork's name can be used in an instruction. Excluded are only:

    - code points that are not images of their own: regional indicators (halves of flags), skin-tone and hair modifiers,
      combining marks, joiners and selectors, and characters without a name;
    - names with a word that instructions use for places, sizes, counts and pictures, or with "black" or "white"
      (`INSTRUCTION_WORDS`): "put the back of left-pointing magnifying glass left of" is unreadable;
    - writing in a box (`WRITING`), such as "squared cool";
    - the 24 clock faces, which differ only in their hands, and the middle finger.
    """
    name = unicode_name(code)
    if name is None or name.startswith(PREFIXES) or code == RUDE:
        return False
    return not any(part in name for part in WRITING) and not INSTRUCTION_WORDS & set(re.split(r"[ -]", name))


@dataclass(frozen=True)
class Artworks:
    """A pool of named RGBA artworks. It is cheap to send to another process; images are read or drawn when requested.

    Attributes:
        source: "font" or "shipped".
        codes: Code points by name, in alphabetical order of the names.
        font: File name, version and SHA-256 of the font, or None.
        font_path: Path of the font; pools with different paths may be equal.
    """

    source: str
    codes: Mapping[str, int]
    font: Mapping[str, str] | None = None
    font_path: str | None = field(default=None, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.codes)

    def image(self, name: str) -> Image.Image:
        """Return the square RGBA artwork, which is shared: do not modify it. Raises KeyError for unknown names."""
        if name not in self.codes:
            raise KeyError(f"no artwork {name!r} among the {len(self.codes)} artworks of source {self.source!r}")
        if self.font_path is None:
            return shipped_artwork(name)
        return _drawn(self.font_path, self.codes[name])


def shipped_artworks() -> dict[str, Path]:
    """Return the shipped PNG files (RGBA, 96 x 96) by lower-case Unicode name, in alphabetical order."""
    return {path.stem.replace("_", " "): path for path in sorted(EMOJI_FOLDER.glob("*.png"))}


@functools.cache
def shipped_artwork(name: str) -> Image.Image:
    """Return the shipped RGBA artwork of that name. Raises KeyError that lists the names."""
    paths = shipped_artworks()
    if name not in paths:
        raise KeyError(f"no artwork {name!r}; the shipped artworks are: {', '.join(paths)}")
    with Image.open(paths[name]) as image:
        return image.convert("RGBA")


def artworks(source: str = "auto") -> Artworks:
    """Return the pool of a source; "auto" uses the font if it is installed, otherwise the shipped artworks.

    Raises:
        ValueError: The source is unknown, or the font has no colour bitmaps.
        FileNotFoundError: The source is "font" and the font is missing; the message says how to install it.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown artworks {source!r}; sources are: {', '.join(SOURCES)}")
    if source != "shipped":
        try:
            return _font_pool(find_font().path)
        except FileNotFoundError:
            if source == "font":
                raise
    return Artworks("shipped", {name: ord(unicodedata.lookup(name.upper())) for name in shipped_artworks()})


def _font_pool(path: Any) -> Artworks:
    try:
        from fontTools.ttLib import TTFont
    except ImportError:
        raise ImportError(
            'artworks from the font need fontTools: pip install "uniref_fast[train]", or use --artworks shipped'
        ) from None

    with TTFont(path, lazy=True) as font:
        if "CBDT" not in font:
            raise ValueError(f"{path} has no colour bitmaps (CBDT); use the bitmap build of Noto Color Emoji")
        covered = font.getBestCmap()
        version = str(font["name"].getDebugName(5)).split(";")[0].removeprefix("Version ")
    codes = [code for block in BLOCKS for code in block if code in covered and usable(code)]
    named = {str(unicode_name(code)): code for code in codes}
    facts = {
        "file": Path(path).name,
        "version": version,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    }
    return Artworks("font", dict(sorted(named.items())), facts, str(path))


@functools.lru_cache(maxsize=4)
def _open_font(path: str) -> ImageFont.FreeTypeFont:
    # The basic layout is always available; the other depends on how Pillow was built.
    return ImageFont.truetype(path, NATIVE_SIZE, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=2048)
def _drawn(path: str, code: int) -> Image.Image:
    return render_emoji(chr(code), _open_font(path), SIDE)


# --- the font ---------------------------------------------------------------------------------------------------------


def find_font() -> ImageFont.FreeTypeFont:
    """Return the font at its native size. Raises FileNotFoundError with advice if it is not installed."""
    for path in filter(None, (os.environ.get("NOTO_COLOR_EMOJI"), *FONT_PATHS)):
        if Path(path).is_file():
            return ImageFont.truetype(path, NATIVE_SIZE)
    raise FileNotFoundError(
        "NotoColorEmoji.ttf was not found. Install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji), or set"
        f" NOTO_COLOR_EMOJI to its path. Paths that were searched: {', '.join(FONT_PATHS)}"
    )


def render_emoji(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """Return an emoji as RGBA, `size` x `size` pixels, cropped to its ink and centred, with its aspect ratio kept."""
    canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for U+{ord(character):04X} {unicodedata.name(character, '?')}")
    ink = canvas.crop(box)
    scale = size / max(ink.size)
    fitted = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    ink = ink.resize(fitted, Image.Resampling.LANCZOS)
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste(ink, ((size - ink.width) // 2, (size - ink.height) // 2))
    return image
