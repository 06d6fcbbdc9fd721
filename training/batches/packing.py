"""Packs of ragged samples: full, of equal cost, and the same on every rank without communication.

An optimizer step takes `packs` packs of at most `pack_tokens` tokens each from a buffer of pending samples, a few steps
deep:

    packer = Packer(pack_tokens=32768, packs=8, cost_model=CostModel.from_config(transformer.config))
    while wanted := packer.need():
        packer.push(*(packer.pending(key, sample) for key, sample in take(wanted)))
    packs = packer.pack()
    mine = [packs[i] for i in assign(packs, ranks)[rank]]

Each pack begins with the oldest sample that is left, so that no sample waits forever. The next oldest samples that fit
follow, and at most two samples of the buffer end the pack: those that bring it closest to both its goals, of tokens and
of cost. All packs of a step aim at the same cost, that of a full pack of average pending samples, which also keeps the
mix of sizes in the buffer constant.

The packs depend on the samples alone, not on the number of ranks. Ranks agree bit for bit because every number is
an integer, an exactly rounded sum, or the result of single IEEE operations.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from uniref_fast.layout import Sample

if TYPE_CHECKING:
    from uniref_fast.models.family import Family

__all__ = ["CostModel", "Pack", "PackKey", "PackReport", "Packer", "Pending", "assign", "report"]

PackKey = tuple[int, int]
"""(epoch, index of the sample in the data)."""

CANDIDATES = 128  # oldest samples considered for the end of a pack; all pairs of them are tried


@dataclass(frozen=True)
class CostModel:
    """The cost of a sample, in seconds or floating-point operations; only ratios matter for packing.

    Attributes:
        linear: Cost per token.
        quadratic: Cost per visible (query, key) pair; under the "full" visibility a sample has length^2 pairs.
        constant: Cost per sample.
    """

    linear: float
    quadratic: float
    constant: float = 0.0

    def __post_init__(self) -> None:
        values = (self.linear, self.quadratic, self.constant)
        if not all(0 <= value < math.inf for value in values) or not any(values):
            raise ValueError(f"costs must be finite, at least 0 and not all 0, got {self}")

    def of(self, sample: Sample) -> float:
        """Return the cost of one sample under the "full" visibility."""
        length = sample.length
        return self.linear * length + self.quadratic * length**2 + self.constant

    def as_dict(self) -> dict[str, float]:
        """Return plain numbers for JSON; `CostModel(**d)` reads them."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Any, family: Family | None = None) -> CostModel:
        """Return the costs in floating-point operations of a forward of a transformer.

        A backward multiplies all costs by the same factor. The result is exact for samples that are half target and
        half references.

        Args:
            config: Configuration of the transformer.
            family: Family of the transformer; None is Qwen-Image-Edit.
        """
        from uniref_fast.costs import transformer_flops  # it imports the models
        from uniref_fast.models.families import families

        family = family or families()[0]
        guidance = family.training_guidance(config)

        small = Sample(128, (1, 64, 64), ((1, 64, 64),), guidance=guidance)
        large = Sample(256, (1, 128, 64), ((1, 128, 64),), guidance=guidance)
        # Rows of the modulation table for t = 0 are few, and are not counted.
        layouts = [replace(family.layout(config, [one]), clean_references=False) for one in (small, large)]
        (few, _), (many, pairs) = (transformer_flops(config, each, family=family) for each in layouts)
        linear = (many - few) / (large.length - small.length)
        return cls(linear, pairs / large.length**2, max(few - linear * small.length, 0.0))

    @classmethod
    def fit(cls, samples: Sequence[Sample], seconds: Sequence[float]) -> CostModel:
        """Fit non-negative costs to measured times by least squares of the relative errors.

        One rank must fit and broadcast the result: packs would differ if each rank used the times that it measured.

        Args:
            samples: Samples of at least three different lengths.
            seconds: Time of each sample alone, above 0.

        Raises:
            ValueError: There are too few samples, or times are missing or not above 0.
        """
        if len(samples) != len(seconds):
            raise ValueError(f"each sample needs its time: got {len(samples)} samples and {len(seconds)} times")
        lengths = sorted({sample.length for sample in samples})
        if len(lengths) < 3:
            raise ValueError(f"three costs need samples of at least three different lengths, got {lengths}")
        if not all(0 < s < math.inf for s in seconds):
            raise ValueError(f"times must be finite and above 0 seconds, got {min(seconds)} to {max(seconds)}")
        features = np.array([(s.length, s.length**2, 1) for s in samples], dtype=np.float64)
        return cls(*_non_negative_least_squares(features, np.array(seconds, dtype=np.float64)))


def _non_negative_least_squares(features: np.ndarray, values: np.ndarray) -> list[float]:
    """Return the coefficients of the best of all subsets of columns, by relative error.

    Args:
        features: Float64 `[N, F]`.
        values: Float64 `[N]`.
    """
    scale = features.max(axis=0)  # columns of similar size are solved accurately
    relative = features / scale / values[:, None]
    best, answer = math.inf, np.zeros(features.shape[1])
    for size in range(1, features.shape[1] + 1):
        for columns in map(list, itertools.combinations(range(features.shape[1]), size)):
            solved = np.linalg.lstsq(relative[:, columns], np.ones_like(values), rcond=None)[0]
            error = float(((relative[:, columns] @ solved - 1) ** 2).sum())
            if (solved >= 0).all() and error < best:
                best, answer = error, np.zeros(features.shape[1])
                answer[columns] = solved / scale[columns]
    return answer.tolist()


@dataclass(frozen=True)
class Pending:
    """A sample that waits to be packed.

    Attributes:
        key: Epoch and index of the row.
        sample: Sizes of the sample.
        cost: Cost of the sample, above 0.
    """

    key: PackKey
    sample: Sample
    cost: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", tuple(self.key))
        if len(self.key) != 2 or not all(isinstance(part, int) for part in self.key):
            raise ValueError(f"a key is (epoch, index), two integers, got {self.key}")
        if not 0 < self.cost < math.inf:
            raise ValueError(f"the cost of sample {self.key} must be finite and above 0, got {self.cost}")

    @functools.cached_property
    def tokens(self) -> int:
        return self.sample.length


@dataclass(frozen=True)
class Pack:
    """Samples that run as one sequence.

    Attributes:
        items: Samples in the order in which they were pushed; at least one.
        capacity: Largest number of tokens that the pack may hold.
    """

    items: tuple[Pending, ...]
    capacity: int

    @functools.cached_property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)

    @functools.cached_property
    def cost(self) -> float:
        return math.fsum(item.cost for item in self.items)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Return the samples that the layout is made of."""
        return tuple(item.sample for item in self.items)


class Packer:
    """A buffer of samples of any sizes that gives out full packs of equal cost, step by step.

    A pack holds whole samples: if most samples have a similar length, choose `pack_tokens` a little over a multiple of
    that length.
    """

    def __init__(self, pack_tokens: int, packs: int, cost_model: CostModel, lookahead: float = 3.0) -> None:
        """Create an empty buffer.

        Args:
            pack_tokens: Largest number of tokens in a pack.
            packs: Packs of a step, over all ranks.
            cost_model: Costs of the samples.
            lookahead: Tokens to hold before packing, in steps, at least 1. A larger value fills packs better.
        """
        for name, value in (("pack_tokens", pack_tokens), ("packs", packs), ("lookahead", lookahead)):
            if not 1 <= value < math.inf:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.pack_tokens, self.packs, self.cost_model, self.lookahead = pack_tokens, packs, cost_model, lookahead
        self._pending: list[Pending] = []

    def __len__(self) -> int:
        """Return the number of pending samples."""
        return len(self._pending)

    def pending(self, key: PackKey, sample: Sample) -> Pending:
        """Return a sample with its cost, to be pushed."""
        return Pending(key, sample, self.cost_model.of(sample))

    def push(self, *items: Pending) -> None:
        """Add samples after those that wait; on an error, none is added.

        Raises:
            ValueError: A sample is larger than a pack, or its key is pending already.
        """
        known = {item.key for item in self._pending}
        for item in items:
            if item.tokens > self.pack_tokens:
                s = item.sample
                text = sum(length for length, _ in s.text_runs)
                raise ValueError(
                    f"sample {item.key} has {item.tokens} tokens, over the {self.pack_tokens} of a pack: {text} of "
                    f"text, target {s.target}, references {list(s.references)}; raise pack_tokens, lower the pixel "
                    "budget, or leave the sample out"
                )
            if item.key in known:
                raise ValueError(f"sample {item.key} is pending already; keys (epoch, index) must differ")
            known.add(item.key)
        self._pending += items

    def need(self) -> int:
        """Estimate, from the lengths so far, how many samples to push before `pack`; 0 if there are enough."""
        count, tokens = len(self._pending), sum(item.tokens for item in self._pending)
        if count < self.packs:
            return self.packs - count
        missing = self.lookahead * self.packs * self.pack_tokens - tokens
        return max(math.ceil(missing * count / tokens), 0)

    def pack(self) -> list[Pack]:
        """Return the packs of a step: exactly `packs`, none of them empty. They always hold the `packs` oldest samples.

        Fewer samples than `need` asks for are enough, down to one per pack: the packs are then less full, but still
        balanced.

        Raises:
            ValueError: There are fewer samples than packs.
        """
        pending = self._pending
        if len(pending) < self.packs:
            raise ValueError(
                f"{self.packs} packs need at least as many samples, {len(pending)} are pending; push {self.need()} more"
            )
        tokens = np.array([item.tokens for item in pending], dtype=np.int64)
        costs = np.array([item.cost for item in pending], dtype=np.float64)
        total = sum(item.tokens for item in pending)
        goal_tokens = min(float(self.pack_tokens), total / self.packs)
        goal_cost = math.fsum(item.cost for item in pending) / total * goal_tokens
        rest, groups = np.arange(len(pending)), []
        for packs_after in reversed(range(self.packs)):
            fill = _Fill(tokens[rest], costs[rest], self.pack_tokens, goal_tokens, goal_cost, len(rest) - packs_after)
            chosen = fill.best()
            groups.append(rest[chosen])
            rest = np.delete(rest, chosen)
        self._pending = [pending[i] for i in rest]
        return [Pack(tuple(pending[i] for i in group), self.pack_tokens) for group in groups]


@dataclass(frozen=True)
class _Fill:
    """One pack to fill from samples in order of age; it always takes the first sample.

    Attributes:
        tokens: Tokens of each sample, int64 `[N]`.
        costs: Cost of each sample, float64 `[N]`.
        capacity: Largest number of tokens.
        goal_tokens: Tokens to come close to.
        goal_cost: Cost to come close to.
        most: Largest number of samples, at least 1.
    """

    tokens: np.ndarray
    costs: np.ndarray
    capacity: int
    goal_tokens: float
    goal_cost: float
    most: int

    def best(self) -> list[int]:
        """Return the indices of the samples to take, ascending."""
        prefix = self._oldest_that_fit()
        reach = int(np.sort(self.tokens)[-2:].sum())  # the most that two samples can add
        best, answer = math.inf, prefix
        used, cost = 0, 0.0
        for count, index in enumerate(prefix, start=1):
            used += int(self.tokens[index])
            cost += float(self.costs[index])
            if used + reach < self.goal_tokens and count < len(prefix):
                continue
            off, ending = self._ending(prefix[:count], used, cost)
            if off < best:
                best, answer = off, prefix[:count] + ending
        return sorted(answer)

    def _oldest_that_fit(self) -> list[int]:
        taken: list[int] = []
        used = 0
        for index, tokens in enumerate(self.tokens.tolist()):
            if len(taken) < self.most and used + tokens <= self.capacity:
                taken.append(index)
                used += tokens
        return taken

    def _ending(self, taken: list[int], used: int, cost: float) -> tuple[float, list[int]]:
        """Return the distance from the goals with the best ending of at most two samples, and that ending."""
        free = np.delete(np.arange(len(self.tokens)), taken)[:CANDIDATES]
        tokens = np.concatenate(([0], self.tokens[free]))  # candidate 0 stands for no sample
        costs = np.concatenate(([0.0], self.costs[free]))
        room = self.most - len(taken)
        rows, columns = len(tokens) if room > 1 else 1, len(tokens) if room > 0 else 1
        together = used + tokens[:rows, None] + tokens[None, :columns]
        off = np.abs(self.goal_tokens - together) / self.goal_tokens
        off += np.abs(cost + costs[:rows, None] + costs[None, :columns] - self.goal_cost) / self.goal_cost
        off[together > self.capacity] = math.inf
        nothing = off[0, 0]
        np.fill_diagonal(off, math.inf)  # a sample is taken once
        off[0, 0] = nothing
        first, second = divmod(int(off.argmin()), columns)
        return float(off[first, second]), [int(free[i - 1]) for i in (first, second) if i]


def assign(packs: Sequence[Pack], ranks: int) -> list[list[int]]:
    """Assign packs to ranks: the same number to each, of total costs that are as equal as possible.

    In order of falling cost, each pack goes to the rank with the least total cost that has room. A rank runs its packs
    in that order, so that packs which run at the same time have similar costs.

    Returns:
        Numbers of the packs of each rank.

    Raises:
        ValueError: The packs cannot be divided equally among the ranks.
    """
    if ranks < 1 or len(packs) % ranks:
        possible = ", ".join(str(n) for n in range(1, len(packs) + 1) if len(packs) % n == 0)
        raise ValueError(
            f"{len(packs)} packs cannot be shared equally by {ranks} ranks; possible: {possible or 'none'}"
        )
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for number in sorted(range(len(packs)), key=lambda i: (-packs[i].cost, i)):
        rank = min((r for r in range(ranks) if len(shares[r]) * ranks < len(packs)), key=loads.__getitem__)
        shares[rank].append(number)
        loads[rank] += packs[number].cost
    return shares


@dataclass(frozen=True)
class PackReport:
    """The quality of a step's packs.

    Attributes:
        utilisation: Tokens divided by the capacity of the packs, 0 to 1.
        imbalance: Cost of the rank with the highest cost, divided by the mean of the ranks, minus 1; 0 is perfect.
        samples: Number of samples in all packs.
        tokens: Number of tokens in all packs.
    """

    utilisation: float
    imbalance: float
    samples: int
    tokens: int


def report(packs: Sequence[Pack], ranks: int) -> PackReport:
    """Report the utilisation of packs, and their balance over the ranks that `assign` gives them to."""
    if not packs:
        raise ValueError("no packs to report on")
    loads = [math.fsum(packs[i].cost for i in share) for share in assign(packs, ranks)]
    tokens = sum(pack.tokens for pack in packs)
    return PackReport(
        utilisation=tokens / sum(pack.capacity for pack in packs),
        imbalance=max(loads) * ranks / math.fsum(loads) - 1,
        samples=sum(len(pack.items) for pack in packs),
        tokens=tokens,
    )
