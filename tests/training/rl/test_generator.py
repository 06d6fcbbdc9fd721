"""A step's rollouts: who runs which member, what a pack holds, rewards asked for and collected, signals obeyed."""

import io
import itertools
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from uniref_fast.data.dataset import Row
from uniref_fast.data.images import ImageSource
from uniref_fast.layout import Kind
from uniref_fast.models import PackedQwenImage
from uniref_fast.rewards.types import Failure, Scores
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.rl.generator import Batch, Roller
from uniref_fast.training.rl.recipes import MSGRPO, RLStage
from uniref_fast.training.rl.rollout import noisy_steps
from uniref_fast.training.rl.sde import Sampler

pytestmark = pytest.mark.usefixtures("threads")
STEPS = 4
PLAN = MemoryPlan(400, 1, False, 0, "")


def source(i):
    content = io.BytesIO()
    Image.new("RGB", (32 + 8 * i, 48), (50 * i, 90, 0)).save(content, "PNG")
    return ImageSource(f"{i}.png", data=content.getvalue())


class FakeRanks:
    """As `Ranks`, for one of several; others answer `gather` as they are told."""

    def __init__(self, rank=0, size=1, sequence=1, others=None):
        self.rank, self.size, self.sequence, self.others = rank, size, sequence, others
        self.replica, self.replicas, self.device = rank // sequence, size // sequence, torch.device("cpu")

    def gather(self, value):
        return [value] if self.others is None else [value, *self.others(value)]


class FakeRewards:
    def __init__(self):
        self.asked = []
        self.shares = {}

    def submit(self, candidate, step):
        self.asked.append((candidate, step))
        future = Future()
        future.set_result(Scores({"quality": float(candidate.key[2])}))
        return {"mine": future}

    def combined(self, results):
        (result,) = results.values()
        return result if isinstance(result, Failure) else dict(result.axes)


@pytest.fixture
def make(builtin_pipe):
    def build(ranks=None, signalled=lambda: False, **fields):
        fields = {"packs": 2, "dtype": "float32", "rollout_steps": STEPS, "rewards": ("scene",), **fields}
        config = MSGRPO((RLStage(64, 1, 1e-3),), model="builtin", **fields)
        packed = PackedQwenImage(builtin_pipe.transformer, visibility=config.visibility or "full")
        model = SimpleNamespace(pipe=builtin_pipe, packed=packed, config=config, ranks=ranks or FakeRanks())
        model.idle_forward = lambda: TrainedModel.idle_forward(model)
        encoder = Encoder(builtin_pipe, TensorCache(None))
        return Roller(config, model.ranks, model, encoder, FakeRewards(), signalled)

    return build


@pytest.fixture
def rows(builtin_pipe):
    """Rows of so many references each, prepared."""
    encoder = Encoder(builtin_pipe, TensorCache(None))

    def build(*counts):
        made = []
        for i, count in enumerate(counts):
            sources = tuple(source(j) for j in range(count))
            row = Row("word " * (1 + i), sources, source(i % 3), None, f"rows.jsonl:{i + 1}")
            made.append(((2, 10 + i), encoder.prepare(row, (2, 10 + i), 48, 32, rollout=True)))
        return made

    return build


def members_of(batch):
    return [member for pack in batch.packs if pack is not None for member in pack.members]


# ---- the plan ----


@pytest.mark.parametrize(("size", "least", "pack_tokens"), [(1, 4, 400), (3, 4, 120), (5, 4, 10000), (2, 12, 400)])
@pytest.mark.parametrize(("count", "sequence"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_every_member_once_over_packs_and_ranks(make, rows, size, least, pack_tokens, count, sequence):
    """Few and many packs, more packs than members; no pack too large, all ranks as many of them."""
    given = rows(2, 0, 3)
    plan = MemoryPlan(pack_tokens, sequence, False, 0, "")
    batches = [make(FakeRanks(rank, count, sequence), packs=least).plan(given, plan, size, STEPS, 1.0)
               for rank in range(count)]  # fmt: skip
    keys = [(2, 10 + row, member) for row in range(3) for member in range(size)]
    assert all(list(itertools.chain(*batch.keys)) == keys for batch in batches), "all of them, on every rank"
    assert len({len(batch.packs) for batch in batches}) == 1, "ranks keep step"
    found = [member.key for batch in batches[::sequence] for member in members_of(batch)]
    assert sorted(found) == keys
    if sequence == 2:
        shared = [[member.key for member in members_of(batch)] for batch in batches]
        assert shared[::2] == shared[1::2], "neighbours share their packs"
    packs = [pack for batch in batches for pack in batch.packs if pack is not None]
    assert all(pack.layout.joint_length <= pack_tokens for pack in packs)
    total = len(batches[0].packs) * count // sequence
    assert total % least == 0 and total >= least


def test_members_are_the_same_whoever_runs_them(make, rows):
    given = rows(2, 1)
    (one,) = [{m.key: m for m in members_of(make().plan(given, PLAN, 3, STEPS, 1.0))}]
    for rank in range(2):
        batch = make(FakeRanks(rank, 2), packs=6).plan(given, PLAN, 3, STEPS, 1.0)
        for member in members_of(batch):
            assert torch.equal(member.latents, one[member.key].latents)
            assert torch.equal(member.group.references, one[member.key].group.references)
    assert len({tuple(member.latents.flatten().tolist()) for member in one.values()}) == 6, "noises of their own"


def test_only_what_runs_here_is_encoded(make, rows):
    batch = make(FakeRanks(1, 2)).plan(rows(2, 1, 3, 2), PLAN, 2, STEPS, 1.0)
    here = {member.group.number for member in members_of(batch)}
    assert {group.number for group in batch.groups if group.references is not None} == here
    assert 0 < len(here) < 4 and [group.number for group in batch.groups] == [0, 1, 2, 3]


def test_times_and_noisy_steps(make, rows):
    batch = make(window=1, window_end=2).plan(rows(2, 0), PLAN, 2, STEPS, 1.0)
    for group in batch.groups:
        assert len(group.grid) == STEPS + 1 and group.grid[0] == 1 and group.grid[-1] == 0
        assert list(group.grid) == sorted(group.grid, reverse=True) and group.noisy in {(0,), (1,)}
    again = make(window=1, window_end=2).plan(rows(2, 0), PLAN, 2, STEPS, 1.0)
    assert [group.noisy for group in again.groups] == [group.noisy for group in batch.groups]
    assert all(group.noisy == (0, 1, 2) for group in make().plan(rows(2), PLAN, 2, STEPS, 1.0).groups)
    windows = {noisy_steps(25, 3, 12, 0, (0, row)) for row in range(200)}
    assert windows == {(first, first + 1, first + 2) for first in range(10)}, "drawn for each row, up to the end"


def test_a_look_takes_rows_that_are_larger_than_a_pack(make, rows):
    """It keeps nothing for a backward; what is trained on must fit."""
    small = MemoryPlan(100, 1, False, 0, "")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: a rollout has 1\d\d tokens, over the 100 of a pack"):
        make().plan(rows(2), small, 2, STEPS, 4.0)
    looked = make().plan(rows(2, 0), small, 1, STEPS, 4.0)
    assert [member.key for member in members_of(looked)] == [(2, 10, 0), (2, 11, 0)]


def test_looks_at_held_out_rows_have_noise_of_their_own(make, rows):
    """One member each, denoised without noise, the same in every run; members of a group depend on the run's seed."""
    given = rows(1)
    looks, groups = ([members_of(make(seed=seed).plan(given, PLAN, size, STEPS, 1.0))[0] for seed in (0, 5)]
                     for size in (1, 2))  # fmt: skip
    assert torch.equal(looks[0].latents, looks[1].latents) and looks[0].group.noisy == ()
    assert not torch.equal(groups[0].latents, groups[1].latents)


def test_guidance_takes_every_member_twice(make, rows):
    given = rows(2, 0)
    plain, guided = (make().plan(given, PLAN, 2, STEPS, guidance) for guidance in (1.0, 2.5))
    for one, two in zip(plain.groups, guided.groups, strict=True):
        assert (len(one.lengths), len(two.lengths)) == (1, 2) and two.lengths[0] == one.lengths[0]
        assert [len(text) for text in two.texts] == list(two.lengths) and torch.equal(one.texts[0], two.texts[0])
        assert not torch.equal(two.texts[0][-4:], two.texts[1][-4:])
    assert sum(len(pack.layout.targets) for pack in guided.packs if pack) == 2 * 4
    assert sum(len(pack.layout.targets) for pack in plain.packs if pack) == 4


def references_in(pack):
    return [segment for segment in pack.layout.image_segments if segment.kind is Kind.REFERENCE]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_shared_group_has_one_copy_of_its_references(make, rows, guidance):
    given = rows(2, 3)
    tokens = {}
    for visibility, copies in (("group_shared", 1), ("full", 3 if guidance == 1 else 6)):
        roller = make(visibility=visibility, packs=1)
        (pack,) = roller.plan(given, MemoryPlan(10**4, 1, False, 0, ""), 3, STEPS, guidance).packs
        assert len(references_in(pack)) == copies * 5
        image = pack.image([member.latents for member in pack.members])
        assert len(image) == pack.layout.image_length
        rows = [image[s.stream_start : s.stream_start + s.length] for s in references_in(pack)]
        held = [group.references for group in {m.group.number: m.group for m in pack.members}.values()]
        assert torch.equal(torch.cat(rows), torch.cat([each for each in held for _ in range(copies)]))
        tokens[visibility] = pack.layout.joint_length
    assert tokens["group_shared"] < tokens["full"]


def test_a_group_that_is_cut_has_its_references_in_both_packs(make, rows):
    roller = make(visibility="group_shared", packs=2)
    first, second = roller.plan(rows(2), PLAN, 4, STEPS, 1.0).packs
    assert len(first.members) == len(second.members) == 2
    assert len(references_in(first)) == len(references_in(second)) == 2


def test_rows_that_any_rank_cannot_encode_are_named_to_all(make, rows, monkeypatch):
    given = rows(2, 1, 3)
    key, prepared = given[1]
    encode = Encoder.encode_conditions

    def refusing(self, row, *rest):
        if row is prepared:
            raise ValueError(f"{row.row.where}: no such words")
        return encode(self, row, *rest)

    monkeypatch.setattr(Encoder, "encode_conditions", refusing)
    batch = make().plan(given, PLAN, 2, STEPS, 1.0)
    assert batch.lost == {key: (prepared.row.where, "no such words")} and batch.packs == []
    other = {given[0][0]: ("elsewhere", "damaged")}
    batch = make(FakeRanks(1, 2, others=lambda value: [other])).plan(given, PLAN, 2, STEPS, 1.0)
    assert other.items() <= batch.lost.items() and batch.packs == []


def test_a_member_larger_than_a_pack(make, rows):
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: a rollout has \d+ tokens, over the 60 of a pack"):
        make().plan(rows(0, 3), MemoryPlan(60, 1, False, 0, ""), 2, STEPS, 1.0)


# ---- rolling ----


def test_rolling_asks_for_every_member_once(make, rows):
    roller = make()
    batch = roller.plan(rows(2, 0), PLAN, 2, STEPS, 1.0)
    starts = {member.key: member.latents for member in members_of(batch)}
    assert roller.roll(batch, Sampler("sde", 0.7), 1.0, 0, step=7)
    assert [(candidate.key, step) for candidate, step in roller.rewards.asked] == [(key, 7) for key in starts]
    assert set(batch.asked) == set(batch.images) == set(starts)
    for candidate, _ in roller.rewards.asked:
        prepared = {group.key: group.prepared for group in batch.groups}[candidate.key[:2]]
        assert candidate.row is prepared.row and candidate.instruction == prepared.instruction
        assert [image.size for image in candidate.references] == [s.size() for s in prepared.row.references]
        assert candidate.image is batch.images[candidate.key] and candidate.image.size == prepared.geometry.size
    for member in members_of(batch):
        assert torch.isfinite(member.latents).all() and not torch.equal(member.latents, starts[member.key])
        assert set(member.log_probs) == set(member.before) == {0, 1, 2}
    assert batch.tokens == STEPS * sum(pack.layout.joint_length for pack in batch.packs) and batch.seconds > 0
    assert roller.results(batch) == {key: {"quality": float(key[2])} for key in starts}


def test_rolling_without_a_step_asks_for_nothing(make, rows):
    roller = make()
    batch = roller.plan(rows(1), PLAN, 2, STEPS, 1.0)
    assert roller.roll(batch, None, 1.0, 0, step=None)
    assert (roller.rewards.asked, batch.asked, batch.images) == ([], {}, {}) and batch.tokens > 0
    assert roller.results(batch) == {}


def test_the_result_does_not_depend_on_packs(make, rows):
    given, latents = rows(2, 1), []
    for packs in (1, 4):
        roller = make(packs=packs)
        batch = roller.plan(given, MemoryPlan(10**4, 1, False, 0, ""), 2, STEPS, 1.0)
        assert len(batch.packs) == packs and roller.roll(batch, Sampler("sde", 0.7), 1.0, 3, None)
        latents.append({member.key: member.latents for member in members_of(batch)})
    for key, value in latents[0].items():
        torch.testing.assert_close(latents[1][key], value, rtol=1e-3, atol=1e-3)


def test_a_rank_without_a_pack_keeps_step(make, rows, monkeypatch):
    """The model is run as often as elsewhere: its weights are gathered by all ranks together."""
    calls = []
    monkeypatch.setattr(Roller, "idle", lambda self: calls.append(torch.is_grad_enabled()))
    given, idle = rows(1), []
    for rank in range(4):
        calls.clear()
        roller = make(FakeRanks(rank, 4), packs=4)
        batch = roller.plan(given, PLAN, 2, STEPS, 1.0)
        assert len(batch.packs) == 1 and roller.roll(batch, Sampler("sde", 0.7), 1.0, 0, step=0)
        idle.append(batch.packs == [None])
        assert calls == [False] * (STEPS if idle[-1] else 0)
        assert (batch.tokens == 0) == (batch.asked == {}) == idle[-1]
    assert idle.count(True) == 2


def test_idle_runs_the_model(make):
    roller = make()
    assert torch.isfinite(roller.idle()).all()


def test_one_of_the_ranks_that_share_a_pack_asks(make, rows):
    given = rows(1)
    for rank, asks in ((0, 2), (1, 0)):
        roller = make(FakeRanks(rank, 2, sequence=2, others=lambda value: [value]), packs=1)
        batch = roller.plan(given, PLAN, 2, STEPS, 1.0)
        assert roller.roll(batch, None, 1.0, 0, step=0) and len(batch.asked) == len(roller.rewards.asked) == asks
        assert batch.tokens == STEPS * batch.packs[0].layout.joint_length, "of a pack, not of each that shares it"


def test_rolling_stops_at_a_signal(make, rows):
    """After the pack that is under way, on all ranks, whichever was asked to stop."""
    given = rows(1)
    for others, signalled in ((None, True), (lambda value: [True], False)):
        roller = make(signalled=lambda answer=signalled: answer)
        batch = roller.plan(given, PLAN, 2, STEPS, 1.0)
        roller.ranks.others = others
        assert len(batch.packs) == 2 and not roller.roll(batch, None, 1.0, 0, step=0)
        assert len(batch.asked) == 1 and batch.tokens == 0


# ---- results ----


def batch_of(**futures):
    asked = {(0, 0, i): {"mine": future} for i, future in enumerate(futures.values())}
    return Batch([], [], [], asked)


def done(result=None, error=None):
    future = Future()
    future.set_exception(error) if error else future.set_result(result)
    return future


def test_results_of_all_ranks(make):
    theirs = {(0, 1, 0): {"quality": 4.0}}
    said = {bool: (True, False), dict: (theirs, {"quality": 1.0})}  # how far they are, then what they found
    roller = make(FakeRanks(0, 2, others=lambda value: [said[type(value[0])]]))
    failure = Failure("timeout", "60 seconds")
    found = roller.results(batch_of(a=done(Scores({"quality": 3.0})), b=done(failure)))
    assert found == {(0, 0, 0): {"quality": 3.0}, (0, 0, 1): failure, (0, 1, 0): {"quality": 4.0}}


def test_results_wait_until_they_are_there(make):
    late, asked = Future(), []

    def signalled():
        asked.append(1)
        if len(asked) == 3:
            late.set_result(Scores({"quality": 1.0}))
        return False

    assert make(signalled=signalled).results(batch_of(a=late)) == {(0, 0, 0): {"quality": 1.0}}


def test_waiting_ends_at_a_signal(make):
    asked = []

    def signalled():
        asked.append(1)
        return len(asked) > 2

    assert make(signalled=signalled).results(batch_of(a=done(Scores({"quality": 1.0})), b=Future())) is None


def test_a_signal_of_another_rank_leaves_no_results(make):
    roller = make(FakeRanks(0, 2, others=lambda value: [({}, True)]))
    assert roller.results(batch_of(a=done(Scores({"quality": 1.0})))) is None


@pytest.mark.parametrize("error", [ValueError("nonsense"), KeyError("mine"), TimeoutError("no answer in 5 s")])
def test_what_a_reward_raises_ends_the_run(make, error):
    """A TimeoutError of its own is not a wait that goes on."""
    turns = itertools.count()

    def signalled():
        assert next(turns) < 100, "waits for ever"
        return False

    with pytest.raises(type(error), match=error.args[0]):
        make(signalled=signalled).results(batch_of(a=done(error=error)))
