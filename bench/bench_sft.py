"""A training step on samples with different references: packed, against padding and against a loop over samples.

    pytest bench/bench_sft.py --benchmark-only

Forward and backward of the built-in transformer, no optimizer; the loss is the mean over samples of the mean squared
error over a sample's target tokens. Members:

- one by one: diffusers' forward for each sample, gradients accumulated;
- padded batch: diffusers' forward for all samples at once. It takes one list of image sizes for a batch, so every
  sample is padded with zeros to the most references that one has, and each image to the largest in its place; only
  text has a mask. That pads as little as this forward allows;
- packed: `PackedQwenImage` over all samples, no padding;
- one by one, packed code: the same with one sample per call, to separate the gain of packing from that of the kernels.

Gradients of the packed members are checked against one by one first. Those of the padded batch cannot agree, as
padding moves the images' centres and is attended to; it is checked on samples of equal sizes, where nothing but text is
padded.
"""

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from uniref_fast import builtin
from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import Sample
from uniref_fast.models import PackedQwenImage

TOLERANCE = 1e-4
PHOTOS = ((4000, 3000), (3000, 4000), (1920, 1080), (1080, 1920), (1024, 1024), (800, 600), (2400, 1000))


@dataclass(frozen=True)
class Example:
    """`image` `[tokens, C]`: target, then references; `text` `[n, D]`; `timestep` `[1]`; `goal` of the target."""

    sample: Sample
    image: torch.Tensor
    text: torch.Tensor
    timestep: torch.Tensor
    goal: torch.Tensor

    @property
    def grids(self):
        return (self.sample.target, *self.sample.references)

    @property
    def targets(self):
        return self.sample.target[1] * self.sample.target[2]


@pytest.fixture(scope="module")
def model():
    return builtin.load(device="cuda" if torch.cuda.is_available() else "cpu").transformer


def mixed(side, seed=0):
    """K = 1..6: targets of about side^2 pixels in several shapes, references of photo shapes under one joint budget."""
    draw, samples = random.Random(seed), []
    for references in range(1, 7):
        (target,) = fit_to_budget([draw.choice(PHOTOS)], side)
        sizes = fit_to_budget([draw.choice(PHOTOS) for _ in range(references)], side)
        samples.append(Sample(draw.randint(30, 90), grid(target), tuple(map(grid, sizes))))
    draw.shuffle(samples)
    return samples


def grid(size):
    return 1, size[1] // 16, size[0] // 16


def examples(model, samples):
    generator, config, device = torch.Generator().manual_seed(0), model.config, model.device

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    return [
        Example(
            sample,
            normal(sample.length - sample.text, config.in_channels),
            normal(sample.text, config.joint_attention_dim),
            torch.rand(1, generator=generator).to(device),
            normal(sample.target[1] * sample.target[2], config.in_channels),
        )
        for sample in samples
    ]


def stock_one_by_one(model, batch):
    for one in batch:
        out = model(
            hidden_states=one.image[None],
            encoder_hidden_states=one.text[None],
            timestep=one.timestep,
            img_shapes=[list(one.grids)],
            return_dict=False,
        )[0]
        (F.mse_loss(out[0, : one.targets], one.goal) / len(batch)).backward()


def packed(model, batch, pack=None):
    """All samples of the batch in one pack, or `pack` at a time."""
    run = PackedQwenImage(model)
    for start in range(0, len(batch), pack or len(batch)):
        part = batch[start : start + (pack or len(batch))]
        layout = run.layout([one.sample for one in part])
        image, text, timestep = (torch.cat([getattr(one, n) for one in part]) for n in ("image", "text", "timestep"))
        outs = run(image, text, timestep, layout).split([one.targets for one in part])
        losses = [F.mse_loss(out, one.goal) for out, one in zip(outs, part, strict=True)]
        (torch.stack(losses).sum() / len(batch)).backward()


def padded_grids(batch):
    """Return the largest height and width in the batch, for the target and for each place of a reference."""
    places = max(len(one.grids) for one in batch)
    images = [[one.grids[place] for one in batch if place < len(one.grids)] for place in range(places)]
    return [(1, max(h for _, h, _ in grids), max(w for _, _, w in grids)) for grids in images]


def padded(model, batch):
    grids, length = padded_grids(batch), max(len(one.text) for one in batch)
    images = torch.stack([pad_images(one, grids) for one in batch])
    texts = torch.stack([F.pad(one.text, (0, 0, 0, length - len(one.text))) for one in batch])
    mask = torch.stack([torch.arange(length, device=texts.device) < len(one.text) for one in batch])
    out = model(
        hidden_states=images,
        encoder_hidden_states=texts,
        encoder_hidden_states_mask=mask,
        timestep=torch.cat([one.timestep for one in batch]),
        img_shapes=[grids] * len(batch),
        return_dict=False,
    )[0]
    _, rows, columns = grids[0]
    targets = out[:, : rows * columns].unflatten(1, (rows, columns))
    losses = []
    for one, target in zip(batch, targets, strict=True):
        _, height, width = one.sample.target
        losses.append(F.mse_loss(target[:height, :width].flatten(0, 1), one.goal))
    torch.stack(losses).mean().backward()


def pad_images(one, grids):
    """`[tokens of the padded grids, C]`: each image in the upper left of its place, zeros elsewhere."""
    parts, images = [], one.image.split([h * w for _, h, w in one.grids])
    for place, (_, rows, columns) in enumerate(grids):
        field = one.image.new_zeros(rows, columns, one.image.shape[1])
        if place < len(images):
            _, height, width = one.grids[place]
            field[:height, :width] = images[place].unflatten(0, (height, width))
        parts.append(field.flatten(0, 1))
    return torch.cat(parts)


def step(model, member, batch):
    """Return a function without arguments that computes the gradients of a batch."""
    calls = {
        "one by one": stock_one_by_one,
        "padded batch": padded,
        "packed": packed,
        "one by one, packed code": lambda model, batch: packed(model, batch, pack=1),
    }

    def run():
        model.zero_grad(set_to_none=True)
        calls[member](model, batch)

    return run


def assert_same_gradients(model, member, batch):
    found = []
    for each in ("one by one", member):
        step(model, each, batch)()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    expected, ours = found
    largest = max(grad.abs().max().item() for grad in expected.values())
    # The text stream's last residuals reach no output: diffusers gives them zeros, the packed model no gradient.
    assert not any(expected[name].any() for name in expected.keys() - ours.keys())
    for name, grad in ours.items():
        scale = max(expected[name].abs().max().item(), 1e-3 * largest)
        assert (grad - expected[name]).abs().max().item() < TOLERANCE * scale, name


@pytest.mark.parametrize("which", ["one by one", "padded batch", "packed", "one by one, packed code"])
@pytest.mark.parametrize("side", [128, 192])
def test_sft_step(timed, benchmark, model, side, which):
    benchmark.group = f"SFT step, K = 1 to 6, {side}x{side} budget"
    samples = mixed(side)
    batch = examples(model, samples)
    tokens = sum(sample.length for sample in samples)
    computed = tokens
    if which == "padded batch":
        equal = [Sample(text, samples[0].target, samples[0].references) for text in (31, 50, 40)]
        assert_same_gradients(model, which, examples(model, equal))
        places = sum(rows * columns for _, rows, columns in padded_grids(batch))
        computed = len(batch) * (places + max(sample.text for sample in samples))
    elif which != "one by one":
        assert_same_gradients(model, which, batch)
    timed(step(model, which, batch), step(model, "one by one", batch))
    info = benchmark.extra_info
    info.update(tokens=tokens, utilisation=tokens / computed, samples_per_second=len(batch) / info["seconds"])
    model.zero_grad(set_to_none=True)
