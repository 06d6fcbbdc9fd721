"""Flow matching: noise at t = 1, `x_t = (1 - t) x0 + t e`, velocity `v = e - x0`; randomness keyed by sample.

Every random number comes from a generator that is seeded by (seed, purpose, sample), never from one generator that all
samples share: a sample gets the same noise on any rank, in any pack, and after any interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniref_fast.layout import SelfLayout
from uniref_fast.schedule import shift_time
from uniref_fast.training.batches.samples import Encoded, Prepared
from uniref_fast.training.core.model import TrainedModel

__all__ = ["FlowBatch", "assemble_batch", "flow_batch", "loss_weights", "partial_errors", "sample_errors", "sample_t"]


def sample_t(generator: torch.Generator, mean: float, std: float, shift: float) -> float:
    """Logit-normal t, then moved as `shift t / (1 + (shift - 1) t)` (arXiv 2403.03206; the scheduler's own map)."""
    t = torch.sigmoid(mean + std * torch.randn((), generator=generator, dtype=torch.float64)).item()
    return shift_time(t, shift)


@dataclass(frozen=True)
class FlowBatch:
    """The inputs of the model for a pack, and the velocities that it should predict.

    Attributes:
        image: Noisy targets and clean references in the order of the image stream, `[N_image, C]`.
        text: Prompt embeddings, `[N_text, D]`.
        t: Time of each sample, float32 `[S]`.
        velocity: Velocities of the targets' tokens, by sample, float32 `[N_target, C]`.
        layout: Layout of the pack.
        weights: Weights of the targets' tokens in the loss, float32 `[N_target]`, with mean 1 in each sample; None if
            no sample has a mask.
    """

    image: Tensor
    text: Tensor
    t: Tensor
    velocity: Tensor
    layout: SelfLayout
    weights: Tensor | None = None


def loss_weights(mask: Tensor, outside: float) -> Tensor:
    """Return the weights of the tokens of a target in the loss, float32 `[n]`, with mean 1.

    A token with the mask m has the weight `outside + (1 - outside) m`, divided by the mean of all of them, so that a
    sample counts as much with a small mask as without a mask.

    Args:
        mask: Mean of the mask over each token, from 0 to 1, `[n]`; not 0 everywhere.
        outside: Weight of a token that the mask leaves out.
    """
    weights = outside + (1 - outside) * mask.double()
    return (weights * (len(weights) / weights.sum())).float()


def flow_batch(
    targets: Sequence[Tensor],
    references: Sequence[Tensor],
    texts: Sequence[Tensor],
    times: Sequence[float],
    noises: Sequence[Tensor],
    layout: SelfLayout,
    dtype: torch.dtype,
    weights: Sequence[Tensor | None] = (),
) -> FlowBatch:
    """Mix each target with its noise at its time, and concatenate the samples of a pack.

    Args:
        targets: Clean latents of each sample, `[n, C]`.
        references: Latents of all references of each sample, `[m, C]`; m may be 0.
        texts: Prompt embeddings of each sample, `[l, D]`.
        times: Time t of each sample, in [0, 1].
        noises: Noise of each target, `[n, C]`.
        layout: Layout of the samples in this order.
        dtype: Dtype of the model's inputs.
        weights: `loss_weights` of each sample, `[n]`, None for a sample without a mask; empty if no sample has one.
    """
    noisy, velocity = [], []
    for x0, t, noise in zip(targets, times, noises, strict=True):
        x0, noise = x0.float(), noise.to(x0.device)
        noisy.append(((1 - t) * x0 + t * noise).to(dtype))
        velocity.append(noise - x0)
    device = targets[0].device
    of_tokens = None
    if any(weight is not None for weight in weights):
        pairs = zip(weights, targets, strict=True)
        of_tokens = torch.cat([torch.ones(len(x), device=device) if w is None else w.to(device) for w, x in pairs])
    return FlowBatch(
        layout.image_stream(noisy, [clean.to(dtype) for clean in references]),
        torch.cat([text.to(dtype) for text in texts]),
        torch.tensor(times, dtype=torch.float32, device=device),
        torch.cat(velocity),
        layout,
        of_tokens,
    )


def assemble_batch(
    model: TrainedModel,
    samples: Sequence[tuple[Prepared, Encoded]],
    times: Sequence[float],
    noises: Sequence[Tensor],
    mask_weight_outside: float = 0.0,
) -> FlowBatch:
    """Pack encoded samples, with their times and noise, for a model.

    Args:
        model: The model that the batch is for; it decides the layout's modulation and the dtype.
        samples: Sizes and tensors of each sample.
        times: Time t of each sample, in [0, 1].
        noises: Noise of each target, `[n, C]`.
        mask_weight_outside: Weight of the tokens that a mask leaves out, from 0 to 1.
    """
    masks = [encoded.mask for _, encoded in samples]
    return flow_batch(
        [encoded.target for _, encoded in samples],
        [encoded.references for _, encoded in samples],
        [encoded.text for _, encoded in samples],
        times,
        noises,
        model.packed.layout([prepared.sample for prepared, _ in samples]),
        getattr(torch, model.config.dtype),
        [None if mask is None else loss_weights(mask, mask_weight_outside) for mask in masks],
    )


def partial_errors(packed: Any, batch: FlowBatch) -> Tensor:
    """Run the model and return this rank's part of each sample's error, float32 `[S]`, see `sample_errors`.

    Ranks that share a pack each compute the error of their own rows of the targets; their parts add up to the error.

    Args:
        packed: A `PackedModel`.
        batch: The pack to predict.
    """
    prediction = packed(batch.image, batch.text, batch.t, batch.layout)  # [N_target, C], or this rank's rows
    if packed.parallel is None:
        return sample_errors(prediction, batch)
    cuts, rank = packed.parallel.targets(batch.layout), packed.parallel.rank
    return sample_errors(prediction, batch, (cuts[rank], cuts[rank + 1]))


def sample_errors(prediction: Tensor, batch: FlowBatch, bounds: tuple[int, int] | None = None) -> Tensor:
    """Return the error of each sample, float32 `[S]`: the mean over its tokens of weight x mean squared error.

    Args:
        prediction: Velocities of the targets' tokens, `[N_target, C]`, or its rows from bounds[0] to bounds[1]; each
            sample then gets its part of the mean, so that the parts of all ranks add up.
        batch: Batch that the prediction is for.
        bounds: First row of the part, and the row after its last.
    """
    first, last = bounds or (0, len(batch.velocity))
    squares = (prediction.float() - batch.velocity[first:last]).square().mean(1)
    if batch.weights is not None:
        squares = squares * batch.weights[first:last]
    # one sum per sample: the order of additions in index_add is not fixed on a GPU
    parts = zip(batch.layout.split_targets(squares, first), batch.layout.targets, strict=True)
    return torch.stack([part.sum() / target.length for part, target in parts])
