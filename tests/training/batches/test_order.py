"""The order of samples, its exact continuation, and the ordered prefetch."""

import itertools
import json
import math
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniref_fast.data.prefetch import prefetch
from uniref_fast.training.batches.order import ShuffledOrder


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**70), st.lists(st.integers(0, 50), max_size=6))
def test_every_epoch_is_a_permutation_however_it_is_taken(length, seed, counts):
    stream = ShuffledOrder(length, seed)
    taken = [pair for count in counts for pair in stream.take(count)]
    assert taken == ShuffledOrder(length, seed).take(sum(counts))
    taken += stream.take(-len(taken) % length)
    for epoch, start in enumerate(range(0, len(taken), length)):
        chunk = taken[start : start + length]
        assert [e for e, _ in chunk] == [epoch] * length
        assert sorted(i for _, i in chunk) == list(range(length))


def test_the_order_is_fixed_for_good_and_differs_by_seed_and_epoch():
    # Written down: a run that is resumed with another NumPy must see the same order.
    assert [i for _, i in ShuffledOrder(8, seed=0).take(8)] == [6, 3, 1, 4, 5, 2, 7, 0]
    orders = [
        tuple(i for e, i in ShuffledOrder(50, seed).take(150) if e == epoch) for seed in range(3) for epoch in range(3)
    ]
    assert len(set(orders)) == 9
    assert all(type(value) is int for pair in ShuffledOrder(5, 1).take(7) for value in pair)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 99), st.integers(0, 70), st.booleans())
def test_a_saved_state_continues_with_the_next_sample(length, seed, before, weighted):
    weights = [1 + 0.3 * i for i in range(length)] if weighted else None
    stream = ShuffledOrder(length, seed, weights)
    stream.take(before)
    state = json.loads(json.dumps(stream.state()))
    assert all(type(value) is int for value in state.values())
    resumed = ShuffledOrder.from_state(length, seed, state, weights)
    assert resumed.take(3 * length) == stream.take(3 * length) and resumed.state() == stream.state()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": 11}, "the data changed: the saved order has 11 samples, now there are 10"),
        ({"seed": 4}, "seed 4"),
        ({"weights": 7}, "other weights"),
        ({"epoch": -1}, "epoch"),
        ({"position": 10}, "position 10"),
        ({"position": -1}, "position -1"),
        ({"position": 1.0}, "whole numbers"),
        ({"extra": 1}, "whole numbers"),
    ],
)
def test_a_state_of_something_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ShuffledOrder.from_state(10, 3, {**ShuffledOrder(10, 3).state(), **change})


def test_a_state_needs_the_weights_it_was_made_with():
    state = ShuffledOrder(3, 0, [1, 2, 3]).state()
    with pytest.raises(ValueError, match="other weights"):
        ShuffledOrder.from_state(3, 0, state)
    with pytest.raises(ValueError, match="other weights"):
        ShuffledOrder.from_state(3, 0, state, [1, 2, 2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 3), min_size=1, max_size=12), st.integers(0, 99))
def test_weights_are_occurrences_per_epoch(weights, seed):
    if sum(weights) < 1:
        weights[0] += 1
    stream, epochs = ShuffledOrder(len(weights), seed, weights), 7
    taken = stream.take(int(sum(weights) * (epochs + 1)) + len(weights) * 2)
    repeats = max(math.ceil(max(weights)), 1)  # numbers of an epoch
    counts = Counter(i for number, i in taken if number // repeats < epochs)
    assert taken[-1][0] // repeats >= epochs, "the epochs counted are complete"
    for i, weight in enumerate(weights):
        assert abs(counts[i] - epochs * weight) < 1 + 1e-9
        assert weight > 0 or counts[i] == 0


def test_fractional_weights_are_spread_over_the_epochs():
    taken = ShuffledOrder(1000, 0, [0.5] * 1000).take(1000)
    first = [i for e, i in taken if e == 0]
    assert 430 < len(first) < 570, "not all in every other epoch"
    assert sorted(i for e, i in taken if e <= 1) == list(range(1000))


def test_weights_of_one_change_nothing():
    assert ShuffledOrder(30, 5, [1.0] * 30).take(100) == ShuffledOrder(30, 5).take(100)


@pytest.mark.parametrize(
    "args, message",
    [
        ((0, 1), "at least one sample"),
        ((3, -1), "seed"),
        ((3, 0, [1, 2]), "3 in all"),
        ((2, 0, [1, -1]), "not negative"),
        ((2, 0, [1, float("nan")]), "finite"),
        ((2, 0, [0.2, 0.3]), "at least 1"),
    ],
)
def test_impossible_streams_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        ShuffledOrder(*args)
    with pytest.raises(ValueError, match="-1"):
        ShuffledOrder(3, 0).take(-1)


def test_a_long_stream_is_quick_and_even():
    stream = ShuffledOrder(200_000, 1)
    started = time.perf_counter()
    indices = np.array([i for _, i in stream.take(200_000)])
    assert time.perf_counter() - started < 5
    assert abs(np.corrcoef(indices, np.arange(200_000))[0, 1]) < 0.02


# ---- prefetch ----


def test_results_keep_the_order_of_the_items_though_the_first_take_longest():
    gate = threading.Event()

    def square(x):
        if x == 0:
            assert gate.wait(10)
        if x == 3:
            gate.set()
        return x * x

    assert list(prefetch(square, range(10), workers=4, ahead=5)) == [(x, x * x) for x in range(10)]
    assert list(prefetch(square, [], workers=2, ahead=1)) == []


def test_an_exception_is_the_result_of_its_item():
    results = list(prefetch(lambda x: 1 // x, [1, 0, -1], workers=2, ahead=2))
    assert [item for item, _ in results] == [1, 0, -1] and results[0][1] == 1 and results[2][1] == -1
    assert isinstance(results[1][1], ZeroDivisionError)


@pytest.mark.parametrize("ahead", [1, 3])
def test_items_are_drawn_only_as_there_is_room_and_closing_stops(ahead):
    drawn = []

    def items():
        for i in itertools.count():
            drawn.append(i)
            yield i

    results = prefetch(str, items(), workers=2, ahead=ahead)
    assert next(results) == (0, "0") and len(drawn) == ahead
    assert next(results) == (1, "1") and len(drawn) == ahead + 1
    results.close()
    assert len(drawn) == ahead + 1 and not any(t.name.startswith("prefetch") for t in threading.enumerate())


@pytest.mark.parametrize("workers, ahead", [(0, 1), (1, 0)])
def test_wrong_numbers_are_refused_at_once(workers, ahead):
    with pytest.raises(ValueError, match="at least 1"):
        prefetch(str, [1], workers, ahead)


def test_no_pair_comes_twice_however_often_an_index_does():
    stream = ShuffledOrder(4, 7, [3.0, 1.0, 0.5, 2.0])
    pairs = stream.take(65)
    assert len(set(pairs)) == len(pairs)
    assert [index for _, index in pairs].count(0) == 30, "ten epochs of 6 or 7"
    again = ShuffledOrder(4, 7, [3.0, 1.0, 0.5, 2.0])
    first = again.take(5)
    resumed = ShuffledOrder.from_state(4, 7, again.state(), [3.0, 1.0, 0.5, 2.0])
    assert first + resumed.take(60) == pairs, "also when the state is taken and used in the middle of an epoch"
