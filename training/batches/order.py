"""The shuffled order of samples: the same for any number of ranks and workers."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["ShuffledOrder"]


class ShuffledOrder:
    """An endless sequence of (epoch, index) pairs: each epoch is a permutation of the indices, fixed by seed and epoch.

    No pair comes twice, so that random numbers keyed by a pair belong to one sample. If an index may occur w times per
    epoch, epoch e has the numbers from e * w, one for each occurrence.

    One order serves the whole run. Ranks and workers take parts of this order, so that it does not depend on their
    number. It draws raw PCG64 words, whose values NumPy guarantees, so that an upgrade does not reorder a run.
    """

    def __init__(self, length: int, seed: int, weights: Sequence[float] | None = None) -> None:
        """Start at the first sample of epoch 0.

        Args:
            length: Number of samples, at least 1.
            seed: Seed of the order, at least 0.
            weights: Occurrences of each index per epoch, `[length]`: 2 is twice, 0.5 every other epoch, 0 never. After
                any number of epochs e an index has come `e * weight` times, to within one. None: each index once.

        Raises:
            ValueError: The length, the seed or the weights are not valid; weights must add up to at least 1.
        """
        if length < 1:
            raise ValueError(f"an order needs at least one sample, got length {length}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.length, self.seed = int(length), int(seed)
        self._weights = None if weights is None else _checked_weights(weights, self.length)
        self._repeats = 1 if self._weights is None else max(math.ceil(self._weights.max()), 1)
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    def take(self, count: int) -> list[tuple[int, int]]:
        """Return the next `count` pairs (epoch, index)."""
        if count < 0:
            raise ValueError(f"cannot take {count} samples")
        taken: list[tuple[int, int]] = []
        while len(taken) < count:
            chunk = self._order[self._position : self._position + count - len(taken)]
            taken += zip(self._numbers(len(chunk)), chunk.tolist(), strict=True)
            self._position += len(chunk)
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
        return taken

    def _numbers(self, count: int) -> list[int]:
        """Return the first numbers of the next pairs, all of this epoch."""
        first = self._epoch * self._repeats
        if self._repeats == 1:
            return [first] * count
        before, places = self._order[: self._position], range(self._position, self._position + count)
        seen = Counter(before[np.isin(before, self._order[places.start : places.stop])].tolist())
        numbers = []
        for index in self._order[places.start : places.stop].tolist():
            numbers.append(first + seen[index])
            seen[index] += 1
        return numbers

    def state(self) -> dict[str, int]:
        """Return the state from which `from_state` continues with the next pair: plain integers, for JSON."""
        return {
            "length": self.length,
            "seed": self.seed,
            "weights": self._weights_key(),
            "epoch": self._epoch,
            "position": self._position,
        }

    @classmethod
    def from_state(
        cls, length: int, seed: int, state: Mapping[str, int], weights: Sequence[float] | None = None
    ) -> ShuffledOrder:
        """Return an order that continues where `state` was taken.

        Raises:
            ValueError: The length, the seed or the weights differ from the state's, because the data or the run
                changed, or the state is not valid.
        """
        stream = cls(length, seed, weights)
        expected = stream.state()
        if set(state) != set(expected) or not all(type(value) is int for value in state.values()):
            raise ValueError(f"the state of an order has whole numbers {sorted(expected)}, got {dict(state)}")
        if state["length"] != length:
            raise ValueError(f"the data changed: the saved order has {state['length']} samples, now there are {length}")
        if state["seed"] != seed:
            raise ValueError(f"the saved order has seed {state['seed']}, this run has {seed}")
        if state["weights"] != expected["weights"]:
            raise ValueError("the saved order has other weights")
        if state["epoch"] < 0:
            raise ValueError(f"epoch must not be negative, got {state['epoch']}")
        stream._epoch = state["epoch"]
        stream._order = stream._order_of(stream._epoch)
        if not 0 <= state["position"] < max(len(stream._order), 1):
            raise ValueError(f"position {state['position']} is not in an epoch of {len(stream._order)} samples")
        stream._position = state["position"]
        return stream

    def _weights_key(self) -> int:
        return 0 if self._weights is None else zlib.crc32(self._weights.tobytes())

    def _order_of(self, epoch: int) -> np.ndarray:
        """Indices of an epoch in order, int64."""
        indices = np.arange(self.length)
        if self._weights is not None:
            phase = _words((self.seed,), self.length, stream=1) * 2.0**-64  # spreads fractional weights over epochs
            counts = np.floor((epoch + 1) * self._weights + phase) - np.floor(epoch * self._weights + phase)
            indices = np.repeat(indices, counts.astype(np.int64))
        return indices[np.argsort(_words((self.seed, epoch), len(indices), stream=0), kind="stable")]


def _checked_weights(weights: Sequence[float], length: int) -> np.ndarray:
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (length,):
        raise ValueError(f"weights must be one number per sample, {length} in all; got shape {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("weights must be finite and not negative")
    if array.sum() < 1:
        raise ValueError(f"weights count occurrences per epoch and must add up to at least 1, got {array.sum():g}")
    return array


def _words(entropy: tuple[int, ...], count: int, stream: int) -> np.ndarray:
    """Return random 64-bit words `[count]`; `stream` separates uses that share their entropy."""
    seeds = np.random.SeedSequence(entropy, spawn_key=(stream,))
    return np.random.PCG64(seeds).random_raw(count)
