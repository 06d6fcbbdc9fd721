"""Texts that go with a made data set: its card, and the notice of the artworks' licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from uniref_fast.scenes.specs import SPLITS

__all__ = ["card", "notice"]

SHIPPED_VERSION = "2.042"  # of the font that the shipped artworks were drawn from


def notice(font: Mapping[str, str] | None) -> str:
    version = font["version"] if font else SHIPPED_VERSION
    return f"""# Artworks

The PNG files in this folder are drawn from the Noto Color Emoji font (Copyright 2013-2017 Google Inc.,
<https://github.com/googlefonts/noto-emoji>), version {version}. File names are the Unicode
character names. They are used under the SIL Open Font License, Version 1.1, which is in `OFL.txt`.
"""


def card(facts: Mapping[str, Any]) -> str:
    """The data set card (Markdown with the front matter that hubs read) of what `made.json` states."""
    arguments, counts = facts["arguments"], facts["counts"]
    splits = [split for split in SPLITS if counts[split]["rows"]]
    files = "\n".join(f"      - split: {split}\n        path: {split}.jsonl" for split in splits)
    rows = "\n".join(f"| {split} | {counts[split]['rows']} | {_listed(counts[split])} |" for split in splits)
    references = ",".join(str(count) for count in arguments["references"])
    command = (
        f"uniref-fast data make OUT --train {arguments['train']} --heldout {arguments['heldout_objects']}"
        f" --size {arguments['size']} --seed {arguments['seed']} --artworks {arguments['artworks']}"
        f" --references {references} --pictures {arguments['pictures']}"
        + (f" --tasks {','.join(arguments['tasks'])}" if arguments["tasks"] else "")
    )
    font = f"{facts['font']['file']}, {facts['font']['version']}" if facts["font"] else "the shipped PNG files"
    return f"""---
pretty_name: Multi-reference edits of emoji scenes
license: ofl-1.1
task_categories:
  - image-to-image
configs:
  - config_name: default
    data_files:
{files}
---

# Multi-reference edits of emoji scenes

Made with uniref_fast {facts["uniref_fast"]}, Pillow {facts["pillow"]} and NumPy {facts["numpy"]}; objects from {font}:

    {command}

| split | rows | rows by task |
|---|---|---|
{rows}

## Rows

- `input_images`: pictures 1 .. K, K = 0 .. 6, of various sizes; paths beside this file.
- `output_image`: the answer, exact: computed with the operations that made the pictures.
- `instruction`: names pictures by number, and objects, places, sizes, counts and colours.
- `task_type`: `generate` (K = 0), `recolour`, `remove`, `move`, `add`, `replace_background` (K = 1 or 2), `compose`
  (K = 2 .. 6: objects of the pictures on the background of picture K).
- `scene`: what the answer shows.
  - `size`: [width, height] in pixels.
  - `objects`, later ones drawn over earlier ones: `name`; `artwork`, the PNG file; `centre` [x, y] and `side` of its
    square in pixels; `picture`, the picture it comes from, where it comes from one; `colour`, where it is recoloured.
  - `background`: `kind` and `seed`, or `kind` and `colour` when words ask for it, or `picture` and `crop`: the box
    [left, top, right, bottom] of that picture's background that was resized to the answer.
  - `combinations`: what the splits go by.
  - `references`: `size`, `background` and `objects` of each picture.

An artwork is resized to `side` x `side` with Pillow's LANCZOS filter and pasted with its alpha channel.

## Splits

{facts["split_rule"]}

Held-out objects: {", ".join(facts["heldout_objects"])}.

## Licence

The artworks in `artworks/` are under the SIL Open Font License 1.1 (`artworks/OFL.txt`, `artworks/NOTICE.md`);
backgrounds and instructions are generated.
"""


def _listed(count: Mapping[str, Any]) -> str:
    return json.dumps(count["by_task"])[1:-1].replace('"', "")
