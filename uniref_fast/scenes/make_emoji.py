"""Cut the demo's artworks out of the Noto Color Emoji font: `python -m uniref_fast.scenes.make_emoji [folder]`.

The PNG files are part of the repository; this script is how they were made and how to make others. The font is not
shipped: `apt-get install fonts-noto-color-emoji` on Debian and Ubuntu, or set `NOTO_COLOR_EMOJI` to the path of a
NotoColorEmoji.ttf with bitmap glyphs (CBDT; the COLRv1 build cannot be drawn by Pillow).
"""

import os
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 96  # side of the square PNGs, pixels
NATIVE_SIZE = 109  # the only size of the font's bitmaps
FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)
NAMES = (
    "alarm clock",
    "automobile",
    "bicycle",
    "cactus",
    "cat face",
    "crown",
    "guitar",
    "hot beverage",
    "octopus",
    "owl",
    "red apple",
    "rocket",
    "sailboat",
    "soccer ball",
    "sunflower",
    "teddy bear",
)


def find_font() -> ImageFont.FreeTypeFont:
    """The font at its native size. Raises FileNotFoundError that says how to get it."""
    for path in filter(None, (os.environ.get("NOTO_COLOR_EMOJI"), *FONT_PATHS)):
        if Path(path).is_file():
            return ImageFont.truetype(path, NATIVE_SIZE)
    raise FileNotFoundError(
        "NotoColorEmoji.ttf was not found. Install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji), or set"
        f" NOTO_COLOR_EMOJI to its path. Looked at: {', '.join(FONT_PATHS)}"
    )


def render(character: str, font: ImageFont.FreeTypeFont, size: int = SIZE) -> Image.Image:
    """One emoji as RGBA `size` x `size`, cropped to its ink and centred with its aspect ratio kept."""
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


def main(folder: Path) -> None:
    font = find_font()
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        image = render(unicodedata.lookup(name.upper()), font)
        image.save(folder / f"{name.replace(' ', '_')}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "assets" / "emoji")
