"""Small Qwen-Image-2.1 transformers with random weights, and one sample as diffusers and the packed model take it."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from uniref_fast.layout import REFERENCE_PLACE, Sample
from uniref_fast.models import PackedQwenImage21
from uniref_fast.random_models import qwen_image_21
from uniref_fast.random_models.qwen_image_21 import CHANNELS, CONTEXT


def transformer(dtype=torch.float32, layers=3, seed=0, **config):
    """Return a model with the head dimension, rotary axes and MLP ratio of the released one, norms random too."""
    torch.manual_seed(seed)  # of what a test draws afterwards
    return qwen_image_21.transformer(dtype, layers, seed, **config)


@dataclass
class Case:
    """One sample: `lengths` text tokens before each reference and after the last one, and its tensors."""

    sample: Sample
    image: torch.Tensor  # target, then references, [n, C]
    text: torch.Tensor  # [l, D]
    timestep: torch.Tensor  # [1]
    stock: dict

    @property
    def target_tokens(self):
        return math.prod(self.sample.target)


def case(lengths, references=(), target=(1, 4, 6), seed=1, dtype=torch.float32, mask=None):
    """Return a case with random tensors.

    Args:
        lengths: Text tokens before each reference and after the last one.
        references, target: Grids; diffusers needs a multiple of four tokens.
        seed: Seed of the tensors.
        dtype: Dtype of the tensors.
        mask: Valid text tokens, a list of their number.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    total = sum(lengths)
    text, timestep = normal(total, CONTEXT), torch.rand(1, generator=generator).to(dtype)
    images = [normal(math.prod(grid), CHANNELS) for grid in (target, *references)]
    # The encoder's sequence has one position for every four tokens of a reference, whose embeddings are not used.
    parts, slots, at = [], [], 0
    for length, grid in zip(lengths, (*references, None), strict=True):
        parts.append(text[at : at + length])
        slots += [False] * length
        at += length
        if grid is not None:
            parts.append(normal(math.prod(grid) // 4, CONTEXT))
            slots += [True] * (math.prod(grid) // 4)
    encoder = torch.cat(parts)[None]
    img_mask = torch.tensor([slots + [True] * (math.prod(target) // 4)])
    valid = None
    if mask is not None:
        valid = torch.ones(1, len(slots), dtype=torch.bool)
        valid[0, ~torch.tensor(slots)] = torch.tensor(mask).bool()
    flags, runs = iter([True] * total if mask is None else mask), []
    for length, grid in zip(lengths, (*references, None), strict=True):
        runs += [(1, bool(next(flags))) for _ in range(length)] if mask else [(length, True)] * (length > 0)
        runs += [REFERENCE_PLACE] * (grid is not None)
    stock = {
        "hidden_states": torch.cat([*images[1:], images[0]])[None],
        "encoder_hidden_states": encoder,
        "encoder_hidden_states_mask": valid,
        "timestep": timestep,
        "img_shapes": [[*references, target]],
        "img_mask": img_mask,
        "return_dict": False,
    }
    return Case(Sample(tuple(runs), target, tuple(references)), torch.cat(images), text, timestep, stock)


def run_stock(model, one, dtype=None, **options):
    """Return diffusers' velocity of the target, `[n, C]`."""
    given = {k: v.to(dtype) if dtype and torch.is_tensor(v) and v.is_floating_point() else v
             for k, v in one.stock.items()}  # fmt: skip
    with torch.no_grad():
        return model(**given, **options)[0][0, -one.target_tokens :]


def run_packed(model, cases, kept=None, run=None, **options):
    """Return the packed model's velocity of every target."""
    run = run or PackedQwenImage21(model, **options)
    layout = run.layout([one.sample for one in cases])
    image, text, t = (torch.cat([getattr(one, name) for one in cases]) for name in ("image", "text", "timestep"))
    with torch.no_grad():
        return layout.split_targets(run(image, text, t, layout, kept))


def pipeline(dtype=torch.float32, area=64 * 64, **config):
    """Return a small `QwenImage21Pipeline` with random weights, whose images have `area` pixels."""
    torch.manual_seed(0)
    config["heads"] = config.pop("num_attention_heads", 2)
    pipe = qwen_image_21.pipeline(dtype=dtype, **config)
    pipe.output_area = area
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dark(candidate):
    """Score an image as a reward of MSGRPO: 10 for a black one, 0 for a white one."""
    assert candidate.image.mode == "RGB" and all(image.mode == "RGB" for image in candidate.references)
    return {"quality": 10 - 10 * float(np.asarray(candidate.image).mean()) / 255}
