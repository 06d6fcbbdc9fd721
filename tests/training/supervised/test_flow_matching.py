"""The flow matching batch: what is mixed, what is predicted, how errors are averaged, where t and noise come from."""

import itertools
import math

import numpy as np
import pytest
import torch

from uniref_fast.keyed_random import draw, uniform
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.training.supervised.flow_matching import flow_batch, loss_weights, sample_errors, sample_t

# one with references, one token alone, none, and two of different sizes: the targets' rows are not consecutive
SAMPLES = [
    Sample(3, (1, 2, 3), ((1, 2, 2),)),
    Sample(1, (1, 1, 1)),
    Sample(2, (1, 4, 4)),
    Sample(4, (1, 1, 5), ((1, 3, 1), (1, 1, 2))),
]
CHANNELS = 8


def tokens(*grids):
    return sum(math.prod(grid) for grid in grids)


def batch_of(samples, times, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    targets = [normal(tokens(s.target), CHANNELS) for s in samples]
    references = [normal(tokens(*s.references), CHANNELS) for s in samples]
    texts = [normal(s.text, 6) for s in samples]
    noises = [normal(tokens(s.target), CHANNELS) for s in samples]
    layout = SelfLayout.qwen(samples)
    return flow_batch(targets, references, texts, times, noises, layout, dtype), (targets, references, texts, noises)


def of_targets(batch):
    """The noisy targets out of the image stream, by sample."""
    return batch.layout.split_targets(batch.image[batch.layout.target_rows("cpu")])


# ---- the batch ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_are_clean_at_0_and_noise_at_1_and_references_always_clean(dtype):
    times = [0.0, 1.0, 0.25, 0.5]
    batch, (targets, references, texts, noises) = batch_of(SAMPLES, times, dtype=dtype)
    x = of_targets(batch)
    assert torch.equal(x[0], targets[0].to(dtype)), "t = 0 is the picture"
    assert torch.equal(x[1], noises[1].to(dtype)), "t = 1 is the noise"
    assert torch.equal(x[2], (0.75 * targets[2] + 0.25 * noises[2]).to(dtype)), "rounded once, after mixing"
    clean = [segment for segment in batch.layout.image_segments if segment.index]
    given = torch.cat(references).to(dtype).split([segment.length for segment in clean])
    for segment, reference in zip(clean, given, strict=True):
        assert torch.equal(batch.image[segment.stream_start :][: segment.length], reference)
    assert torch.equal(batch.text, torch.cat(texts).to(dtype))
    assert batch.image.dtype == batch.text.dtype == dtype
    assert batch.t.dtype == torch.float32 and batch.t.tolist() == times
    assert len(batch.image) == batch.layout.image_length and len(batch.text) == batch.layout.text_length


def test_velocity_leads_from_any_t_to_the_picture_and_to_the_noise():
    times = [0.1, 0.9, 0.5, 0.33]
    batch, (targets, _, _, noises) = batch_of(SAMPLES, times, dtype=torch.bfloat16)
    assert batch.velocity.dtype == torch.float32, "the answer is not rounded with the input"
    batch, (targets, _, _, noises) = batch_of(SAMPLES, times)
    velocities = batch.velocity.split([len(x) for x in targets])
    for x, v, t, target, noise in zip(of_targets(batch), velocities, times, targets, noises, strict=True):
        assert torch.equal(v, noise - target)
        torch.testing.assert_close(x - t * v, target)
        torch.testing.assert_close(x + (1 - t) * v, noise)


def test_a_batch_needs_everything_of_every_sample():
    with pytest.raises(ValueError):
        batch_of(SAMPLES, [0.5] * 3)


# ---- errors ----


def test_errors_are_means_of_each_sample_whatever_it_is_packed_with():
    batch, _ = batch_of(SAMPLES, [0.5] * 4)
    prediction = torch.randn(batch.velocity.shape, generator=torch.Generator().manual_seed(1))
    errors = sample_errors(prediction, batch)
    lengths = [tokens(s.target) for s in SAMPLES]
    start = 0
    for i, n in enumerate(lengths):
        part, velocity = prediction[start : start + n], batch.velocity[start : start + n]
        torch.testing.assert_close(errors[i], (part - velocity).square().mean())
        alone = flow_batch(
            [torch.zeros(n, CHANNELS)], [torch.zeros(0, CHANNELS)], [torch.zeros(1, 6)], [0.5], [velocity],
            SelfLayout.qwen([Sample(1, SAMPLES[i].target)]), torch.float32,
        )  # fmt: skip
        assert torch.equal(sample_errors(part, alone)[0], errors[i]), "to the last bit"
        start += n
    # A sample of one token weighs as much as one of sixteen: the mean over tokens would be another number.
    assert not torch.isclose(errors.mean(), (prediction - batch.velocity).square().mean(), rtol=1e-3)


def test_gradients_of_a_sample_do_not_depend_on_the_length_of_others():
    batch, _ = batch_of(SAMPLES, [0.5] * 4)
    prediction = torch.zeros_like(batch.velocity, requires_grad=True)
    sample_errors(prediction, batch).sum().backward()
    expected = []
    for velocity in batch.velocity.split([tokens(s.target) for s in SAMPLES]):
        expected.append(-2 * velocity / velocity.numel())
    torch.testing.assert_close(prediction.grad, torch.cat(expected))


@pytest.mark.parametrize("cuts", [[0, 28], [0, 14, 28], [0, 6, 7, 28], [0, 0, 3, 28, 28], list(range(29))])
def test_parts_add_up_exactly_to_the_whole(cuts):
    """Cut as ranks that share a pack cut it: between samples, within them, into nothing."""
    batch, _ = batch_of(SAMPLES, [0.5] * 4)
    assert len(batch.velocity) == 28
    # squares that are whole numbers, and lengths 6, 1, 16, 5: sums are exact, so parts must be
    whole = torch.randint(-9, 10, batch.velocity.shape, generator=torch.Generator().manual_seed(2)).float()
    prediction = batch.velocity.round() + whole * 4
    object.__setattr__(batch, "velocity", batch.velocity.round())
    parts = [sample_errors(prediction[a:b], batch, (a, b)) for a, b in itertools.pairwise(cuts)]
    lengths = torch.tensor([6, 1, 16, 5])
    sums = sum((part * lengths).round() for part in parts)
    assert torch.equal(sums, (sample_errors(prediction, batch) * lengths).round())
    torch.testing.assert_close(sum(parts), sample_errors(prediction, batch))
    for (a, b), part in zip(itertools.pairwise(cuts), parts, strict=True):
        outside = [i for i, (s, e) in enumerate([(0, 6), (6, 7), (7, 23), (23, 28)]) if e <= a or b <= s]
        assert part[outside].eq(0).all()


def test_low_precision_predictions_are_compared_in_float32():
    batch, _ = batch_of(SAMPLES, [0.5] * 4)
    errors = sample_errors(batch.velocity.bfloat16(), batch)
    assert errors.dtype == torch.float32 and 0 < errors.max() < 1e-4


# ---- masks ----


def masked(samples, masks, outside=0.0, seed=0):
    """A batch whose samples have these masks, None for none, and a prediction."""
    batch, _ = batch_of(samples, [0.5] * len(samples), seed)
    tokens_of = batch.velocity.split([tokens(s.target) for s in samples])
    weights = [None if mask is None else loss_weights(torch.tensor(mask), outside) for mask in masks]
    again = flow_batch(
        [torch.zeros_like(v) for v in tokens_of], [torch.zeros(tokens(*s.references), CHANNELS) for s in samples],
        [torch.zeros(s.text, 6) for s in samples], [0.5] * len(samples), tokens_of, batch.layout, torch.float32,
        weights,
    )  # fmt: skip
    return again, torch.randn(batch.velocity.shape, generator=torch.Generator().manual_seed(seed + 1))


MASKS = [[0.0, 1.0, 0.5, 0.0, 0.0, 0.25], None, [0.0] * 15 + [1.0], [0.1, 0.2, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("outside", [0.0, 0.1, 1.0])
def test_a_mask_weighs_the_tokens_of_its_sample(outside):
    """The error is the weighted mean, so that a small mask makes the gradient of its sample no smaller."""
    batch, prediction = masked(SAMPLES, MASKS, outside)
    lengths = [tokens(s.target) for s in SAMPLES]
    squares = (prediction.double() - batch.velocity.double()).square().mean(1).split(lengths)
    for found, own, mask in zip(sample_errors(prediction, batch), squares, MASKS, strict=True):
        weights = (
            torch.ones(len(own)).double() if mask is None else outside + (1 - outside) * torch.tensor(mask).double()
        )
        expected = (weights * own).sum() / weights.sum()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for weights in batch.weights.split(lengths):
        assert weights.double().mean().item() == pytest.approx(1, rel=1e-6)
    if outside == 1:
        assert batch.weights.eq(1).all()


@pytest.mark.parametrize("outside", [0.0, 0.1, 0.3, 1 / 3, 0.7])
def test_a_white_mask_is_exactly_no_mask(outside):
    for n in (1, 7, 4096, 16383):
        assert loss_weights(torch.ones(n), outside).eq(1).all()
    plain, prediction = masked(SAMPLES, [None] * 4)
    white, _ = masked(SAMPLES, [[1.0] * 6, None, [1.0] * 16, [1.0] * 5], outside)
    assert plain.weights is None and white.weights is not None
    assert torch.equal(sample_errors(prediction, white), sample_errors(prediction, plain))


def test_a_mask_changes_no_other_sample_of_the_pack():
    batch, prediction = masked(SAMPLES, MASKS)
    plain, _ = masked(SAMPLES, [None] * 4)
    errors, unmasked = sample_errors(prediction, batch), sample_errors(prediction, plain)
    assert torch.equal(errors[1], unmasked[1]) and not errors.eq(unmasked)[[0, 2, 3]].any()
    start = 0
    for i, n in enumerate([6, 1, 16, 5]):
        alone = masked([Sample(1, SAMPLES[i].target)], [MASKS[i]])[0]
        object.__setattr__(alone, "velocity", batch.velocity[start : start + n])
        assert torch.equal(sample_errors(prediction[start : start + n], alone)[0], errors[i]), "to the last bit"
        start += n


def test_what_a_mask_leaves_out_has_no_gradient():
    batch, prediction = masked(SAMPLES, MASKS)
    prediction.requires_grad_()
    sample_errors(prediction, batch).sum().backward()
    left_out = torch.tensor(
        [value == 0 for n, mask in zip((6, 1, 16, 5), MASKS, strict=True) for value in mask or [1] * n]
    )
    assert prediction.grad[left_out].eq(0).all() and prediction.grad[~left_out].ne(0).all()


@pytest.mark.parametrize("cuts", [[0, 14, 28], [0, 6, 7, 28], [0, 0, 3, 28, 28]])
def test_masked_parts_of_ranks_add_up(cuts):
    batch, prediction = masked(SAMPLES, MASKS, 0.1)
    parts = [sample_errors(prediction[a:b], batch, (a, b)) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(sum(parts), sample_errors(prediction, batch))


# ---- t ----


def statistics(mean, std, shift, count=4000):
    """Mean and deviation of logit(t) over keyed draws."""
    t = np.array([sample_t(draw(0, "t", (0, i)), mean, std, shift) for i in range(count)])
    assert ((t > 0) & (t < 1)).all()
    logit = np.log(t / (1 - t))
    return logit.mean(), logit.std()


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.5, 0.7, 1.6), (1.0, 1.5, 0.5)])
def test_t_is_logit_normal_and_the_shift_adds_its_logarithm(mean, std, shift):
    """logit(s t / (1 + (s - 1) t)) = logit(t) + log s."""
    got_mean, got_std = statistics(mean, std, shift)
    assert got_mean == pytest.approx(mean + math.log(shift), abs=4 * std / math.sqrt(4000))
    assert got_std == pytest.approx(std, rel=0.05)


def test_without_spread_t_is_the_shifted_middle():
    assert sample_t(draw(0, "t", (0,)), 0.0, 0.0, 1.0) == 0.5
    assert sample_t(draw(0, "t", (0,)), 0.0, 0.0, 3.0) == pytest.approx(0.75)


# ---- keyed draws ----


def test_draws_are_fixed_for_good_by_seed_purpose_and_sample():
    # Written down: a run that is resumed with a newer version must drop the same samples.
    assert uniform(0, "drop text", (3, 17)) == 0.3029024099635321
    keys = [(0, "t", (0, 1)), (1, "t", (0, 1)), (0, "noise", (0, 1)), (0, "t", (0, 2)), (0, "t", (1, 1)),
            (0, "t", (0, 11)), (0, "t", (0, 1, 1)), (0, "t", ())]  # fmt: skip
    noises = [torch.randn(4, generator=draw(*key)) for key in keys]
    for i, key in enumerate(keys):
        assert torch.equal(noises[i], torch.randn(4, generator=draw(*key)))
        assert not any(torch.equal(noises[i], other) for other in noises[:i])


def test_no_global_generator_is_touched():
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    uniform(0, "x", (1, 2))
    sample_t(draw(0, "t", (0,)), 0.0, 1.0, 2.0)
    batch_of(SAMPLES, [0.1, 0.2, 0.3, 0.4])
    assert torch.equal(before, torch.get_rng_state()) and (numpy_before == np.random.get_state()[1]).all()
    torch.manual_seed(6)
    assert uniform(0, "x", (1, 2)) == uniform(0, "x", (1, 2))


def test_uniform_is_spread_over_the_unit_interval():
    values = np.array([uniform(0, "drop text", (0, i)) for i in range(2000)])
    assert values.min() >= 0 and values.max() < 1
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert counts.min() > 140 and counts.max() < 260
