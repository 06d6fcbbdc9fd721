"""Ulysses sequence parallelism over packs: ranks share the tokens of a pack outside attention, its heads inside.

Each stream is cut into contiguous parts of nearly equal length, one per rank; a segment may lie across a cut. An
all-to-all before attention gives each rank all tokens of some heads, in stream order; another one after it does the
reverse. So kernels, plan and visibility are the same as on one rank, and a pack needs no padding (DeepSpeed Ulysses,
arXiv 2309.14509).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from uniref_fast.layout import SelfLayout

__all__ = ["SequenceParallel"]


class SequenceParallel:
    """Communication between the ranks that share packs.

    Args:
        group: Ranks that work on the same packs.
        heads: Attention heads of the model.

    Raises:
        ValueError: If the heads cannot be shared evenly; the message lists the sizes that can.
    """

    def __init__(self, group: dist.ProcessGroup, heads: int) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if heads % self.size:
            possible = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"{heads} attention heads cannot be shared by {self.size} ranks; sequence parallel sizes that work: "
                f"{', '.join(map(str, possible))}"
            )

    def bounds(self, rows: int) -> list[int]:
        """Return the cuts of a stream with `rows` rows: `size + 1` ascending row numbers."""
        return [rows * rank // self.size for rank in range(self.size + 1)]

    def rows(self, layout: SelfLayout, stream: str) -> slice:
        """Return this rank's rows of a stream ("text" or "image")."""
        bounds = self.bounds(layout.text_length if stream == "text" else layout.image_length)
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def targets(self, layout: SelfLayout) -> list[int]:
        """Return the cuts of the image stream, counted in target rows: `size + 1` ascending numbers.

        Args:
            layout: Layout of the rows that are computed, without references that are kept.
        """
        spans = [(s.stream_start, s.stream_start + s.length) for s in layout.targets]
        bounds = self.bounds(layout.image_length)
        return [sum(min(max(bound - start, 0), end - start) for start, end in spans) for bound in bounds]

    def gather_heads(self, x: Tensor, bounds: list[int]) -> Tensor:
        """Exchange this rank's rows of all heads, `[n, H, D]`, for all rows of its heads, `[N, H / size, D]`."""
        n, lengths = len(x), [b - a for a, b in pairwise(bounds)]
        by_rank = x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)
        return _Exchange.apply(by_rank, lengths, [n] * self.size, self.group)

    def scatter_heads(self, x: Tensor, bounds: list[int]) -> Tensor:
        """Exchange all rows of this rank's heads, `[N, H / size, D]`, for its rows of all heads, `[n, H, D]`."""
        lengths = [b - a for a, b in pairwise(bounds)]
        n = lengths[self.rank]
        received = _Exchange.apply(x, [n] * self.size, lengths, self.group)
        return received.unflatten(0, (self.size, n)).transpose(0, 1).flatten(1, 2)

    def gather_rows(self, x: Tensor, bounds: list[int]) -> Tensor:
        """Gather the rows of all ranks, `[n, ...]` each, to `[N, ...]` on every rank.

        It is meant for losses that all ranks of the group compute alike: in the backward each rank keeps the gradient
        of its own rows.
        """
        return _Gather.apply(x, bounds, self.rank, self.group)

    def add(self, x: Tensor) -> None:
        """Replace a tensor by the sum of those of all ranks, without gradients."""
        dist.all_reduce(x, group=self.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.start, ctx.end = bounds[rank], bounds[rank + 1]
        lengths = [end - start for start, end in pairwise(bounds)]
        padded = x.new_zeros(max(lengths), *x.shape[1:])  # all_gather takes parts of one length
        padded[: len(x)] = x
        gathered = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.start : ctx.end], None, None, None


class _Exchange(torch.autograd.Function):
    """Differentiable `all_to_all_single` along the first dimension; the gradient takes the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(grad, ctx.send, ctx.receive, ctx.group), None, None, None
