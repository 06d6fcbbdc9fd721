"""Labelled sheets of images, and the difference of two images."""

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

__all__ = ["contact_sheet", "difference"]


def difference(a: Image.Image, b: Image.Image, gain: float = 8.0) -> Image.Image:
    """Return `gain * |a - b|` per channel, clipped to 0..255; it is black where the images agree.

    Raises:
        ValueError: The images have different sizes.
    """
    if a.size != b.size:
        raise ValueError(f"the images have different sizes: {a.size} and {b.size}")
    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).point(lambda value: min(255, round(value * gain)))


def contact_sheet(
    rows: Sequence[Sequence[tuple[str, Image.Image]]],
    heading: str = "",
    caption: str = "",
    cell: int = 224,
) -> Image.Image:
    """Return a labelled grid of images with a wrapped heading above and a wrapped caption below.

    Args:
        rows: Lines of the grid, which may have different lengths, with (title, image) for each cell.
        heading: Text above the grid, such as the instruction.
        caption: Text below the grid.
        cell: Side of a cell in pixels. Images are fitted into it with their aspect ratio; small images are enlarged by
            a whole number without smoothing. RGBA images are shown on white.

    Returns:
        An RGB image that is `24 + columns * (cell + 24)` pixels wide.

    Raises:
        ValueError: There is no image.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("a contact sheet needs at least one image")
    margin, title_height = 24, 24
    width = margin + columns * (cell + margin)
    heading_font, title_font, caption_font = (ImageFont.load_default(size) for size in (19, 15, 14))
    heading_lines = _wrap(heading, heading_font, width - 2 * margin)
    caption_lines = _wrap(caption, caption_font, width - 2 * margin)
    heading_height = len(heading_lines) * 26 + (12 if heading_lines else 0)
    caption_height = len(caption_lines) * 20 + (4 if caption_lines else 0)
    height = margin + heading_height + len(rows) * (title_height + cell + margin) + caption_height
    height += margin if caption_lines else 0

    sheet = Image.new("RGB", (width, height), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    y = margin
    for line in heading_lines:
        draw.text((margin, y), line, font=heading_font, fill=(20, 20, 24))
        y += 26
    y = margin + heading_height
    for row in rows:
        for column, (title, image) in enumerate(row):
            x = margin + column * (cell + margin)
            draw.text((x, y), _shorten(title, title_font, cell), font=title_font, fill=(70, 72, 80))
            box = (x, y + title_height, x + cell, y + title_height + cell)
            draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), fill=(236, 236, 232), outline=(214, 214, 208))
            fitted = _fit(image, cell)
            sheet.paste(fitted, (x + (cell - fitted.width) // 2, box[1] + (cell - fitted.height) // 2))
        y += title_height + cell + margin
    for line in caption_lines:
        draw.text((margin, y), line, font=caption_font, fill=(90, 92, 100))
        y += 20
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA"):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    longest = max(image.size)
    if 2 * longest <= cell:
        factor = cell // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = cell / longest
    # between 1x and 2x, a whole-number factor would leave half of the cell empty
    filter_ = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), filter_)


def _wrap(text: str, font, width: int) -> list[str]:
    """Return lines of at most `width` pixels; words that are longer than a line are split."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            candidate = f"{line} {word}".strip()
            if line and font.getlength(candidate) > width:
                lines.append(line)
                candidate = word
            while font.getlength(candidate) > width and len(candidate) > 1:
                keep = max(1, int(len(candidate) * width / font.getlength(candidate)) - 1)
                lines.append(candidate[:keep])
                candidate = candidate[keep:]
            line = candidate
        lines.append(line)
    return lines


def _shorten(text: str, font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
