"""Rows, images and files that the tests of datasets share."""

import io
import json

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(color, size=(8, 6), form="PNG", **options):
    """Return the bytes of an image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form, **options)
    return file.getvalue()


def color_of(source):
    """Return the colour of an image source of one colour."""
    return source.load().getpixel((0, 0))


def write_jsonl(path, values, newline="\n"):
    """Write one JSON value per line; return the path."""
    path.write_text("".join(json.dumps(value) + newline for value in values), encoding="utf-8")
    return path


def row(references=("r.png", "g.png"), target="b.png", text="do it", **more):
    """Return a canonical row."""
    return {"input_images": list(references), "output_image": target, "instruction": text, **more}


def meaning(found):
    """Return the instruction, the colours of the references, and the colour of the target."""
    return found.instruction, [color_of(s) for s in found.references], found.target and color_of(found.target)


ONE, TWO = ("do it", [RED], BLUE), ("do it", [RED, GREEN], BLUE)  # meanings of rows with one and two references


def write_parquet(path, columns, **options):
    """Write a table of columns; return the path."""
    parquet.write_table(pa.table(columns), path, **options)
    return path
