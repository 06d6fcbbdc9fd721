"""Script that cuts the shipped artworks out of the Noto Color Emoji font: `python -m uniref_fast.scenes.make_emoji`.

An argument names another folder. The PNG files are part of the repository; this script documents how they were created
and can create others. The font is not shipped: run `apt-get install fonts-noto-color-emoji` on Debian and Ubuntu, or
set `NOTO_COLOR_EMOJI` to the path of a NotoColorEmoji.ttf with bitmap glyphs (CBDT; Pillow cannot draw the COLRv1
build).
"""

import sys
import unicodedata
from pathlib import Path

from uniref_fast.scenes.artworks import EMOJI_FOLDER, SHIPPED_SIDE, find_font, render_emoji

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


def main(folder: Path) -> None:
    font = find_font()
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        image = render_emoji(unicodedata.lookup(name.upper()), font, SHIPPED_SIDE)
        image.save(folder / f"{name.replace(' ', '_')}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else EMOJI_FOLDER)
