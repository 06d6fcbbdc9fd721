"""Tests of the rollout generator: the shares of ranks, the contents of packs, scores, signals."""

import itertools
from concurrent.futures import Future

import pytest
import torch
from rollouts import PLAN, STEPS, FakeRanks

from uniref_fast.layout import Kind
from uniref_fast.rewards.types import Failure, Scores
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.rl.generator import Batch, RolloutGenerator
from uniref_fast.training.rl.rollout import draw_noisy_steps

pytestmark = pytest.mark.usefixtures("threads")


def members_of(batch):
    return [member for pack in batch.packs if pack is not None for member in pack.members]


# ---- the plan ----


@pytest.mark.parametrize(("size", "least", "pack_tokens"), [(2, 4, 400), (3, 4, 120), (5, 4, 10000), (2, 12, 400)])
@pytest.mark.parametrize(("count", "sequence"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_every_member_once_over_packs_and_ranks(
    make_generator, prepared_rows, size, least, pack_tokens, count, sequence
):
    """Few and many packs, more packs than members; no pack too large, all ranks as many of them."""
    given = prepared_rows(2, 0, 3)
    plan = MemoryPlan(pack_tokens, sequence, False, 0, "")
    batches = [make_generator(FakeRanks(rank, count, sequence), packs=least, group=size).training_batch(given, plan)
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


def test_members_are_the_same_on_every_rank(make_generator, prepared_rows):
    given = prepared_rows(2, 1)
    (one,) = [{m.key: m for m in members_of(make_generator(group=3).training_batch(given, PLAN))}]
    for rank in range(2):
        batch = make_generator(FakeRanks(rank, 2), packs=6, group=3).training_batch(given, PLAN)
        for member in members_of(batch):
            assert torch.equal(member.latents, one[member.key].latents)
            assert torch.equal(member.group.references, one[member.key].group.references)
    assert len({tuple(member.latents.flatten().tolist()) for member in one.values()}) == 6, "noises of their own"


def test_only_groups_with_members_on_this_rank_are_encoded(make_generator, prepared_rows, monkeypatch):
    encoded, real = [], Encoder.encode_conditions
    monkeypatch.setattr(
        Encoder, "encode_conditions", lambda self, row, *rest: (encoded.append(row), real(self, row, *rest))[1]
    )
    batch = make_generator(FakeRanks(1, 2)).training_batch(prepared_rows(2, 1, 3, 2), PLAN)
    here = {member.group.number: member.group.prepared for member in members_of(batch)}
    assert encoded == list(here.values()) and 0 < len(here) < 4
    assert [group.number for group in batch.groups] == [0, 1, 2, 3], "sizes of all groups are known to every rank"


def test_references_are_encoded_once_for_all_texts_of_guidance(make_generator, prepared_rows, monkeypatch):
    encoded, real = [], Encoder._latents
    monkeypatch.setattr(Encoder, "_latents", lambda self, *args: (encoded.append(args[1]), real(self, *args))[1])
    batch = make_generator(rollout_true_cfg_scale=4.0).training_batch(prepared_rows(2, 3), PLAN)
    assert all(len(member.group.texts) == 2 for member in members_of(batch)) and len(encoded) == 5


def test_times_and_noisy_steps(make_generator, prepared_rows):
    batch = make_generator(window=1, window_end=2).training_batch(prepared_rows(2, 0), PLAN)
    for group in batch.groups:
        assert len(group.sigmas) == STEPS + 1 and group.sigmas[0] == 1 and group.sigmas[-1] == 0
        assert list(group.sigmas) == sorted(group.sigmas, reverse=True) and group.noisy_steps in {(0,), (1,)}
    again = make_generator(window=1, window_end=2).training_batch(prepared_rows(2, 0), PLAN)
    assert [group.noisy_steps for group in again.groups] == [group.noisy_steps for group in batch.groups]
    assert all(
        group.noisy_steps == (0, 1, 2) for group in make_generator().training_batch(prepared_rows(2), PLAN).groups
    )
    windows = {draw_noisy_steps(25, 3, 12, 0, (0, row)) for row in range(200)}
    assert windows == {(first, first + 1, first + 2) for first in range(10)}, "drawn for each row, up to the end"


def test_held_out_rows_may_be_larger_than_a_pack(make_generator, prepared_rows):
    """Validation keeps nothing for a backward; rows that are trained on must fit."""
    small = MemoryPlan(100, 1, False, 0, "")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: a rollout has 1\d\d tokens, over the 100 of a pack"):
        make_generator(rollout_true_cfg_scale=4.0).training_batch(prepared_rows(2), small)
    batch = make_generator(sample_true_cfg_scale=4.0).heldout_batch(prepared_rows(2, 0), small)
    assert [member.key for member in members_of(batch)] == [(2, 10, 0), (2, 11, 0)]


def test_held_out_rows_start_from_the_same_noise_in_every_run(make_generator, prepared_rows):
    """One member each, without noisy steps; the noise of training members depends on the seed of the run."""
    given = prepared_rows(1)
    heldout = [make_generator(seed=seed).heldout_batch(given, PLAN) for seed in (0, 5)]
    training = [make_generator(seed=seed).training_batch(given, PLAN) for seed in (0, 5)]
    (one,), (two,) = map(members_of, heldout)
    assert torch.equal(one.latents, two.latents) and one.group.noisy_steps == () and heldout[0].sampler is None
    assert not torch.equal(members_of(training[0])[0].latents, members_of(training[1])[0].latents)
    assert training[0].sampler is not None and training[1].seed == 5


def test_held_out_rows_have_steps_and_guidance_of_their_own(make_generator, prepared_rows):
    generator = make_generator(
        rollout_num_inference_steps=4,
        rollout_true_cfg_scale=1.0,
        sample_num_inference_steps=3,
        sample_true_cfg_scale=2.0,
    )
    (member,) = members_of(generator.heldout_batch(prepared_rows(1), PLAN))
    assert len(member.group.sigmas) == 4 and len(member.group.texts) == 2


def test_guidance_gives_every_member_two_sequences(make_generator, prepared_rows):
    given = prepared_rows(2, 0)
    plain, guided = (
        make_generator(rollout_true_cfg_scale=guidance).training_batch(given, PLAN) for guidance in (1.0, 2.5)
    )
    assert [pack.guidance for pack in guided.packs if pack] == [2.5] * len([pack for pack in guided.packs if pack])
    for one, two in zip(members_of(plain), members_of(guided), strict=True):
        one, two = one.group, two.group
        assert (len(one.prompts), len(two.prompts)) == (1, 2) and two.prompts[0] == one.prompts[0]
        assert [len(text) for text in two.texts] == list(two.prompts) and torch.equal(one.texts[0], two.texts[0])
        assert not torch.equal(two.texts[0][-4:], two.texts[1][-4:])
    assert sum(len(pack.layout.targets) for pack in guided.packs if pack) == 2 * 4
    assert sum(len(pack.layout.targets) for pack in plain.packs if pack) == 4


def references_in(pack):
    return [segment for segment in pack.layout.image_segments if segment.kind is Kind.REFERENCE]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_shared_group_has_one_copy_of_its_references(make_generator, prepared_rows, guidance):
    given = prepared_rows(2, 3)
    tokens = {}
    for visibility, copies in (("group_shared", 1), ("full", 3 if guidance == 1 else 6)):
        generator = make_generator(visibility=visibility, packs=1, group=3, rollout_true_cfg_scale=guidance)
        batch = generator.training_batch(given, MemoryPlan(10**4, 1, False, 0, ""))
        (pack,) = batch.packs
        assert len(references_in(pack)) == copies * 5
        image = pack.image([member.latents for member in pack.members])
        in_stream = [image[s.stream_start : s.stream_start + s.length] for s in references_in(pack)]
        held = [group.references for group in {m.group.number: m.group for m in pack.members}.values()]
        assert torch.equal(torch.cat(in_stream), torch.cat([each for each in held for _ in range(copies)]))
        tokens[visibility] = pack.layout.joint_length
    assert tokens["group_shared"] < tokens["full"]


def test_a_group_in_two_packs_has_its_references_in_both(make_generator, prepared_rows):
    generator = make_generator(visibility="group_shared", packs=2, group=4)
    first, second = generator.training_batch(prepared_rows(2), PLAN).packs
    assert len(first.members) == len(second.members) == 2
    assert len(references_in(first)) == len(references_in(second)) == 2


def test_rows_that_any_rank_cannot_encode_are_named_to_all(make_generator, prepared_rows, monkeypatch):
    given = prepared_rows(2, 1, 3)
    key, prepared = given[1]
    encode = Encoder.encode_conditions

    def refusing(self, row, *rest):
        if row is prepared:
            raise ValueError(f"{row.row.where}: no such words")
        return encode(self, row, *rest)

    monkeypatch.setattr(Encoder, "encode_conditions", refusing)
    batch = make_generator().training_batch(given, PLAN)
    assert batch.unencodable == {key: (prepared.row.where, "no such words")} and batch.packs == []
    other = {given[0][0]: ("elsewhere", "damaged")}
    batch = make_generator(FakeRanks(1, 2, others=lambda value: [other])).training_batch(given, PLAN)
    assert other.items() <= batch.unencodable.items() and batch.packs == []


def test_a_member_larger_than_a_pack(make_generator, prepared_rows):
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: a rollout has \d+ tokens, over the 60 of a pack"):
        make_generator().training_batch(prepared_rows(0, 3), MemoryPlan(60, 1, False, 0, ""))


# ---- rolling ----


def test_rolling_asks_for_every_member_once(make_generator, prepared_rows):
    generator = make_generator()
    batch = generator.training_batch(prepared_rows(2, 0), PLAN)
    starts = {member.key: member.latents for member in members_of(batch)}
    assert generator.generate_and_score(batch, step=7)
    assert [(candidate.key, step) for candidate, step in generator.rewards.asked] == [(key, 7) for key in starts]
    assert set(batch.pending) == set(batch.images) == set(starts)
    for candidate, _ in generator.rewards.asked:
        prepared = {group.key: group.prepared for group in batch.groups}[candidate.key[:2]]
        assert candidate.row is prepared.row and candidate.instruction == prepared.instruction
        assert [image.size for image in candidate.references] == [s.size() for s in prepared.row.references]
        assert candidate.image is batch.images[candidate.key] and candidate.image.size == prepared.geometry.size
    for member in members_of(batch):
        assert torch.isfinite(member.latents).all() and not torch.equal(member.latents, starts[member.key])
        assert set(member.taken) == {0, 1, 2}
    assert batch.tokens == STEPS * sum(pack.layout.joint_length for pack in batch.packs) and batch.seconds > 0
    assert generator.results(batch) == {key: {"quality": float(key[2])} for key in starts}


def test_rolling_without_a_step_asks_for_nothing(make_generator, prepared_rows):
    generator = make_generator()
    batch = generator.training_batch(prepared_rows(1), PLAN)
    assert generator.generate(batch)
    assert (generator.rewards.asked, batch.pending, batch.images) == ([], {}, {}) and batch.tokens > 0
    assert generator.results(batch) == {}


def test_the_result_does_not_depend_on_packs(make_generator, prepared_rows):
    given, latents = prepared_rows(2, 1), []
    for packs in (1, 4):
        generator = make_generator(packs=packs)
        batch = generator.training_batch(given, MemoryPlan(10**4, 1, False, 0, ""))
        assert len(batch.packs) == packs and generator.generate(batch)
        latents.append({member.key: member.latents for member in members_of(batch)})
    for key, value in latents[0].items():
        torch.testing.assert_close(latents[1][key], value, rtol=1e-3, atol=1e-3)


def test_a_rank_without_a_pack_keeps_step(make_generator, prepared_rows, monkeypatch):
    """The model is run as often as elsewhere: its weights are gathered by all ranks together."""
    calls = []
    monkeypatch.setattr(RolloutGenerator, "idle", lambda self: calls.append(torch.is_grad_enabled()))
    given, idle = prepared_rows(1), []
    for rank in range(4):
        calls.clear()
        generator = make_generator(FakeRanks(rank, 4), packs=4)
        batch = generator.training_batch(given, PLAN)
        assert len(batch.packs) == 1 and generator.generate_and_score(batch, step=0)
        idle.append(batch.packs == [None])
        assert calls == [False] * (STEPS if idle[-1] else 0)
        assert (batch.tokens == 0) == (batch.pending == {}) == idle[-1]
    assert idle.count(True) == 2


def test_idle_runs_the_model(make_generator):
    generator = make_generator()
    assert torch.isfinite(generator.idle()).all()


def test_one_of_the_ranks_that_share_a_pack_asks(make_generator, prepared_rows):
    given = prepared_rows(1)
    for rank, asks in ((0, 2), (1, 0)):
        generator = make_generator(FakeRanks(rank, 2, sequence=2, others=lambda value: [value]), packs=1)
        batch = generator.training_batch(given, PLAN)
        assert (
            generator.generate_and_score(batch, step=0) and len(batch.pending) == len(generator.rewards.asked) == asks
        )
        assert batch.tokens == STEPS * batch.packs[0].layout.joint_length, "of a pack, not of each that shares it"


def test_rolling_stops_at_a_signal(make_generator, prepared_rows):
    """All ranks stop after the current pack, whichever was asked to stop."""
    given = prepared_rows(1)
    for others, signalled in ((None, True), (lambda value: [True], False)):
        generator = make_generator(signalled=lambda answer=signalled: answer)
        batch = generator.training_batch(given, PLAN)
        generator.ranks.others = others
        assert len(batch.packs) == 2 and not generator.generate_and_score(batch, step=0)
        assert len(batch.pending) == 1 and batch.tokens == 0


# ---- results ----


def batch_of(**futures):
    asked = {(0, 0, i): {"mine": future} for i, future in enumerate(futures.values())}
    return Batch([], [], [], pending=asked)


def done(result=None, error=None):
    future = Future()
    future.set_exception(error) if error else future.set_result(result)
    return future


def test_results_of_all_ranks(make_generator):
    theirs = {(0, 1, 0): {"quality": 4.0}}
    said = {bool: (True, False), dict: (theirs, {"quality": 1.0})}  # how far they are, then what they found
    generator = make_generator(FakeRanks(0, 2, others=lambda value: [said[type(value[0])]]))
    failure = Failure("timeout", "60 seconds")
    found = generator.results(batch_of(a=done(Scores({"quality": 3.0})), b=done(failure)))
    assert found == {(0, 0, 0): {"quality": 3.0}, (0, 0, 1): failure, (0, 1, 0): {"quality": 4.0}}


def test_results_wait_until_they_are_there(make_generator):
    late, asked = Future(), []

    def signalled():
        asked.append(1)
        if len(asked) == 3:
            late.set_result(Scores({"quality": 1.0}))
        return False

    assert make_generator(signalled=signalled).results(batch_of(a=late)) == {(0, 0, 0): {"quality": 1.0}}


def test_waiting_ends_at_a_signal(make_generator):
    asked = []

    def signalled():
        asked.append(1)
        return len(asked) > 2

    assert make_generator(signalled=signalled).results(batch_of(a=done(Scores({"quality": 1.0})), b=Future())) is None


def test_a_signal_of_another_rank_leaves_no_results(make_generator):
    generator = make_generator(FakeRanks(0, 2, others=lambda value: [({}, True)]))
    assert generator.results(batch_of(a=done(Scores({"quality": 1.0})))) is None


@pytest.mark.parametrize("error", [ValueError("nonsense"), KeyError("mine"), TimeoutError("no answer in 5 s")])
def test_an_exception_of_a_reward_ends_the_run(make_generator, error):
    """A TimeoutError of the reward itself does not prolong the wait."""
    turns = itertools.count()

    def signalled():
        assert next(turns) < 100, "waits for ever"
        return False

    with pytest.raises(type(error), match=error.args[0]):
        make_generator(signalled=signalled).results(batch_of(a=done(error=error)))
