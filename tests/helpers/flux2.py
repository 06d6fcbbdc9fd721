"""Small FLUX.2 models of `uniref_fast.random_models`, as tests take them."""

import numpy as np
import torch
from PIL import Image

from uniref_fast.random_models import flux2


def transformer(kind="klein", dtype=torch.float32, seed=0, **sizes):
    """Return a transformer with random weights; head dimensions and ratios are those of the real ones."""
    torch.manual_seed(seed)  # of what a test draws afterwards
    return flux2.transformer(kind, dtype, seed, **sizes)


def pipeline(transformer, kind="klein", distilled=False, mistral=False):
    """Return the pipeline of a kind ("klein", "klein-kv", "inpaint", "dev").

    That of dev has a text encoder if `mistral` is True.
    """
    torch.manual_seed(1)
    pipe = flux2.pipeline_of(transformer, kind, distilled, mistral)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width, height, seed=0, mode="RGB"):
    """Return an image of random pixels."""
    shape = (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)
