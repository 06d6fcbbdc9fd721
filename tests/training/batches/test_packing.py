import itertools
import json
import math
import random
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniref_fast.budget import fit_to_budget
from uniref_fast.costs import transformer_flops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.training.batches.packing import CostModel, Pack, Packer, Pending, assign, report

QWEN = types.SimpleNamespace(  # Qwen-Image-Edit, 20B
    num_attention_heads=24,
    attention_head_dim=128,
    num_layers=60,
    zero_cond_t=True,
    patch_size=2,
    in_channels=64,
    out_channels=16,
    joint_attention_dim=3584,
)
PLAIN = CostModel(linear=1.0, quadratic=0.01)


def of_length(tokens):
    return Sample(0, (1, 1, tokens))


def pushed(lengths, **settings):
    packer = Packer(**{"pack_tokens": 100, "packs": 2, "cost_model": PLAIN, **settings})
    packer.push(*(packer.pending((0, i), of_length(n)) for i, n in enumerate(lengths)))
    return packer


def keys(packs):
    return [[item.key for item in pack.items] for pack in packs]


def run(packer, samples, steps):
    """Packs of each step, fed as a trainer feeds it."""
    for _ in range(steps):
        while wanted := packer.need():
            packer.push(*(packer.pending(*next(samples)) for _ in range(wanted)))
        yield packer.pack()


# ---- the mixes it is made for ----

RATIOS = (1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16)


def multi_reference(seed, budget, photo_sides):
    """K = 1..6 photos, long sides log-uniform, under a joint budget; a target of about 1024^2; text of 60 to 400."""
    rng = random.Random(seed)

    def grid(size):
        return 1, size[1] // 16, size[0] // 16

    for index in itertools.count():
        ratio = rng.choice(RATIOS)
        width = round(1024 * math.sqrt(ratio) / 16) * 16
        target = (width, 1024**2 // width // 16 * 16)
        photos = []
        for _ in range(rng.randint(1, 6)):
            low, high = photo_sides
            long, ratio = low * (high / low) ** rng.random(), rng.choice(RATIOS)
            photos.append((round(long * min(1, ratio)), round(long * min(1, 1 / ratio))))
        references = fit_to_budget(photos, budget)
        yield (0, index), Sample(rng.randint(60, 400), grid(target), tuple(map(grid, references)))


def builtin_sized(seed):
    rng = random.Random(seed)
    for index in itertools.count():
        yield (0, index), Sample(40, (1, 8, 8), ((1, 8, 8),) * rng.randint(1, 6))


@pytest.mark.parametrize(
    "samples, pack_tokens, packs, ranks, least, most",
    [
        (multi_reference(0, 1024, (256, 1280)), 32768, 8, 8, 0.97, 0.05),
        (multi_reference(0, 1024, (256, 1280)), 32768, 16, 4, 0.97, 0.05),
        # Most samples have 20,500 tokens, three to a pack: no packing of this mix fills more than 97%.
        (multi_reference(0, 2048, (512, 4000)), 65536, 8, 8, 0.95, 0.05),
        # All photos over the budget: every sample has about 8,400 tokens, so that a pack a little over four fills up.
        (multi_reference(0, 1024, (2000, 4000)), 33792, 8, 8, 0.97, 0.05),
        (builtin_sized(0), 2048, 2, 2, 0.97, 0.05),
    ],
    ids=["budget-1024", "two-a-rank", "budget-2048", "camera-photos", "builtin"],
)
def test_fills_packs_and_balances_ranks(samples, pack_tokens, packs, ranks, least, most):
    packer = Packer(pack_tokens, packs, CostModel.from_config(QWEN))
    reports = [report(step, ranks) for step in run(packer, samples, 30)]
    assert sum(r.utilisation for r in reports) / 30 >= least
    assert sum(r.imbalance for r in reports) / 30 < most


# ---- properties ----

lengths = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 5), st.floats(1, 4))
def test_every_sample_leaves_once_and_the_oldest_first(lengths, packs, lookahead):
    packer = Packer(100, packs, PLAIN, lookahead)
    arrived, gone = [], []
    for epoch in range(4):
        new = [(epoch, i) for i in range(len(lengths))]
        packer.push(*(packer.pending(key, of_length(n)) for key, n in zip(new, lengths, strict=True)))
        arrived += new
        while len(packer) >= packs:
            waiting = [key for key in arrived if key not in gone]
            step = packer.pack()
            assert len(step) == packs and all(pack.items for pack in step)
            assert all(pack.tokens <= 100 == pack.capacity for pack in step)
            taken = [key for pack in keys(step) for key in pack]
            assert set(waiting[:packs]) <= set(taken)  # so a sample waits for at most as many steps as were before it
            assert all(pack == sorted(pack) for pack in keys(step))  # in the order they came
            gone += taken
    assert len(gone) == len(set(gone)) and set(gone) <= set(arrived)
    assert len(arrived) - len(gone) == len(packer) < packs


def test_a_sample_that_fits_badly_does_not_starve():
    """Alone in its pack, passed over by every better fit, it goes in the step in which it is the oldest."""
    packer = pushed([60, 40, 50, 50, 99, 60, 40, 30, 70], packs=1)
    steps = []
    while len(packer):
        packer.push(*(packer.pending((1, len(steps) * 10 + i), of_length(50)) for i in range(2) if len(steps) < 3))
        steps.append(packer.pack())
    assert keys(steps[2]) == [[(0, 4)]]


# ---- filling ----


def test_finds_the_ending_that_fills():
    by_tokens = CostModel(1.0, 0.0)
    # In order of age 31, 11, 13, 17 and 23 would fit. One sample can end a pack, and so can two.
    assert keys(pushed([31, 11, 13, 17, 40, 29, 23], packs=1, cost_model=by_tokens).pack()) == [
        [(0, 0), (0, 4), (0, 5)]
    ]
    assert keys(pushed([31, 11, 13, 69, 23], packs=1, cost_model=by_tokens).pack()) == [[(0, 0), (0, 3)]]
    # Many small ones: those that wait go in order, the last two are chosen (here 12 and 13 do not fit with them all).
    assert pushed([9] * 9 + [12, 13, 10, 9], packs=1, cost_model=by_tokens).pack()[0].tokens == 100


def test_of_equally_full_packs_it_takes_the_one_of_average_cost():
    by_pairs = CostModel(0.0, 1.0)
    # 50 is filled up by another 50, which is dear, or by 30 and 20; the average is dear, then cheap.
    assert keys(pushed([50, 30, 20, *[50] * 5], packs=1, cost_model=by_pairs).pack()) == [[(0, 0), (0, 3)]]
    assert keys(pushed([50, 50, *[30, 20] * 3], packs=1, cost_model=by_pairs).pack()) == [[(0, 0), (0, 2), (0, 3)]]


def test_few_samples_are_spread_evenly():
    packs = pushed([10] * 8, packs=4).pack()
    assert [len(pack.items) for pack in packs] == [2, 2, 2, 2]
    assert [len(pack.items) for pack in pushed([7, 90, 3], packs=3).pack()] == [1, 1, 1]
    packs = pushed([10, 1, 1, 1], packs=3).pack()
    assert sorted(len(pack.items) for pack in packs) == [1, 1, 2]
    # The first has more than its share by itself, so it gets nothing, though much would fit.
    assert keys(pushed([60, 10, 10, 10], packs=2).pack()) == [[(0, 0)], [(0, 1), (0, 2), (0, 3)]]
    assert len(pushed([100], packs=1).pack()) == 1  # exactly as large as a pack


def test_need_asks_until_there_is_enough():
    packer = pushed([], packs=3, lookahead=2)
    assert packer.need() == 3
    packer = pushed([50, 50, 50], packs=3, lookahead=2)
    assert packer.need() == 9  # 2 steps of 3 x 100 tokens, by samples of 50
    packer.push(*(packer.pending((1, i), of_length(50)) for i in range(8)))
    assert packer.need() == 1
    packer.push(packer.pending((2, 0), of_length(49)))
    assert packer.need() == 1
    packer.push(packer.pending((2, 1), of_length(1)))
    assert packer.need() == 0
    assert pushed([100, 100], packs=3, lookahead=1).need() == 1


def test_packs_make_layouts():
    packer = Packer(100, 1, PLAIN)
    samples = Sample(3, (1, 2, 2), ((1, 3, 1),)), Sample(0, (1, 1, 1))
    packer.push(*(packer.pending((0, i), sample) for i, sample in enumerate(samples)))
    (pack,) = packer.pack()
    assert SelfLayout.qwen(pack.samples).joint_length == pack.tokens == 11
    assert pack.cost == sum(map(PLAIN.of, samples)) and pack.samples == samples


# ---- ranks ----


def of_costs(costs, tokens=10):
    return [Pack((Pending((0, i), of_length(tokens), float(c)),), 20) for i, c in enumerate(costs)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_ranks_share_equally(ranks, each, rng):
    packs = of_costs([rng.uniform(1, 10) for _ in range(ranks * each)])
    shares = assign(packs, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(packs)))
    assert [len(share) for share in shares] == [each] * ranks
    for share in shares:  # those at one place run at the same time
        assert [packs[i].cost for i in share] == sorted((packs[i].cost for i in share), reverse=True)


def test_assigns_the_costliest_first():
    assert assign(of_costs([5, 9, 1, 8, 2, 4]), 2) == [[1, 5, 4], [3, 0, 2]]
    assert assign(of_costs([1, 1, 1, 1]), 2) == [[0, 2], [1, 3]]
    assert assign(of_costs([9, 1, 1, 1]), 2) == [[0, 3], [1, 2]]  # equal counts come first


def test_reports():
    made = report(of_costs([3, 1, 1, 1], tokens=15), 2)
    assert (made.utilisation, made.samples, made.tokens) == (0.75, 4, 60)
    assert made.imbalance == pytest.approx(4 / 3 - 1)
    assert report(of_costs([3, 3]), 2).imbalance == 0


# ---- costs ----


def test_costs_follow_the_transformer():
    """The model is within 2% of the counted operations, for any shares of text, target and references."""
    model = CostModel.from_config(QWEN)
    for sample in (
        Sample(60, (1, 64, 64)),
        Sample(400, (1, 64, 64), ((1, 20, 30),)),
        Sample(230, (1, 48, 85), ((1, 64, 64),) * 4),
        Sample(40, (1, 8, 8), ((1, 8, 8),) * 6),
    ):
        exact = sum(transformer_flops(QWEN, SelfLayout.qwen([sample])))
        assert model.of(sample) == pytest.approx(exact, rel=0.02)


def test_fits_measured_times():
    samples = [of_length(n) for n in (10, 100, 1000, 5000, 20000)]
    true = CostModel(2e-5, 3e-9, 4e-3)
    fitted = CostModel.fit(samples, [true.of(s) for s in samples])
    assert list(fitted.as_dict().values()) == pytest.approx(list(true.as_dict().values()), rel=1e-6)
    assert CostModel(**json.loads(json.dumps(fitted.as_dict()))) == fitted


def test_a_fit_has_no_negative_cost():
    samples = [of_length(n) for n in (100, 200, 400, 800)]
    fitted = CostModel.fit(samples, [1e-6 * s.length**2 - 1e-6 * s.length + 1e-3 for s in samples])
    assert fitted.linear == 0 and min(fitted.as_dict().values()) >= 0
    assert all(fitted.of(s) == pytest.approx(1e-6 * s.length**2, rel=0.2) for s in samples)


# ---- errors ----


def test_a_sample_larger_than_a_pack_is_named_and_nothing_is_pushed():
    packer = pushed([10])
    good, bad = packer.pending((0, 8), of_length(10)), packer.pending((3, 9), Sample(4, (1, 8, 8), ((1, 3, 11),)))
    with pytest.raises(ValueError, match=r"\(3, 9\) has 101 tokens, over the 100 .* 4 of text.*\(1, 8, 8\)"):
        packer.push(good, bad)
    assert len(packer) == 1
    with pytest.raises(ValueError, match=r"\(0, 0\) is pending already"):
        packer.push(good, packer.pending((0, 0), of_length(1)))
    with pytest.raises(ValueError, match=r"\(0, 8\) is pending already"):
        packer.push(good, good)
    assert len(packer) == 1
    with pytest.raises(ValueError, match="over the 9 of a pack"):
        Packer(9, 2, PLAIN).push(packer.pending((0, 0), of_length(10)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Packer(0, 1, PLAIN), "pack_tokens must be at least 1, got 0"),
        (lambda: Packer(10, 0, PLAIN), "packs must be at least 1"),
        (lambda: Packer(10, 1, PLAIN, lookahead=0.5), "lookahead must be at least 1"),
        (lambda: Packer(10, 1, PLAIN, lookahead=float("nan")), "lookahead must be at least 1"),
        (lambda: pushed([10], packs=3).pack(), "3 packs need at least as many samples, 1 are pending; push 2 more"),
        (lambda: CostModel(-1.0, 1.0), "at least 0"),
        (lambda: CostModel(0.0, 0.0), "not all 0"),
        (lambda: CostModel(1.0, float("inf")), "finite"),
        (lambda: Pending((0, 1), of_length(1), 0.0), "above 0"),
        (lambda: Pending((0,), of_length(1), 1.0), "two integers"),
        (lambda: Pending((0, 1.5), of_length(1), 1.0), "two integers"),
        (lambda: CostModel.fit([of_length(1)], [1.0, 2.0]), "1 samples and 2 times"),
        (lambda: CostModel.fit([of_length(n) for n in (1, 2, 2)], [1.0] * 3), r"three different lengths, got \[1, 2\]"),
        (lambda: CostModel.fit([of_length(n) for n in (1, 2, 3)], [1.0, 0.0, 1.0]), "above 0 seconds"),
        (lambda: assign(of_costs([1] * 12), 5), "12 packs .* 5 ranks; possible: 1, 2, 3, 4, 6, 12"),
        (lambda: assign(of_costs([1] * 2), 0), "by 0 ranks; possible: 1, 2"),
        (lambda: report([], 1), "no packs"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
