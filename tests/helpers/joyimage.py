"""Small JoyImage-Edit-Plus pipelines, and the arguments of a forward of diffusers."""

import math

import torch

from uniref_fast.random_models import joyimage
from uniref_fast.random_models.joyimage import TEXT, transformer

__all__ = ["SIZES", "inputs", "pipeline", "targets", "transformer"]

SIZES = joyimage.listed_sizes(4)
"""(height, width) of the references of the small pipeline."""


def pipeline(dtype=torch.float32):
    """Return a small `JoyImageEditPlusPipeline`, whose references have the sizes of `SIZES`."""
    pipe = joyimage.pipeline(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(samples, dtype=torch.float32, seed=1, mask=True):
    """Return the arguments of a forward of diffusers for samples of (text length, grids), padded as by the pipeline.

    Args:
        samples: Text length and grids (target first) of each sample.
        dtype: Dtype of the tensors.
        seed: Seed of the first sample; that of the others follows.
        mask: Give the mask of the text, without which diffusers masks nothing.
    """
    texts, images, times = [], [], []
    for i, (length, grids) in enumerate(samples):
        generator = torch.Generator().manual_seed(seed + i)
        tokens = sum(map(math.prod, grids))
        images.append(torch.randn(tokens, 16, 1, 2, 2, generator=generator).to(dtype))
        texts.append(torch.randn(length, TEXT, generator=generator).to(dtype))
        times.append(1000 * torch.rand(1, generator=generator))
    valid = [torch.ones(len(text), dtype=torch.int64) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "hidden_states": pad(images, batch_first=True),
        "timestep": torch.cat(times),
        "encoder_hidden_states": pad(texts, batch_first=True),
        "encoder_hidden_states_mask": pad(valid, batch_first=True) if mask else None,
        "shape_list": [[*grids] for _, grids in samples],
        "return_dict": False,
    }


def targets(out, samples):
    """Return the targets' rows of the result of diffusers as tokens, `[n, 64]` of each sample."""
    return [out[i, : math.prod(grids[0])].flatten(1) for i, (_, grids) in enumerate(samples)]
