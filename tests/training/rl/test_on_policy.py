"""Tests of the on-policy check: it passes an unchanged policy, and names the first difference and its cause."""

import dataclasses
import re

import pytest
import torch
from rollouts import PLAN, FakeRanks

from uniref_fast.training.core.model_size import ModelSize, QwenImage21Size
from uniref_fast.training.core.suitability import check_kept_references
from uniref_fast.training.rl import on_policy, rollout
from uniref_fast.training.rl.on_policy import OffPolicyError, check_on_policy, refuse_off_policy, table
from uniref_fast.training.rl.recipes import MSGRPO, RLStage

pytestmark = pytest.mark.usefixtures("threads")
NOISY_STEPS = 3


@pytest.fixture
def generator(make_generator):
    return make_generator()


@pytest.fixture
def batch(generator, prepared_rows):
    """Two packs of two rollouts each, denoised."""
    batch = generator.training_batch(prepared_rows(2, 1), PLAN)
    assert generator.generate(batch) and len(batch.packs) == 2
    return batch


def check(generator, batch, ranks=None):
    return check_on_policy(
        generator.model.packed, batch.packs, NOISY_STEPS, generator.sampler, ranks or FakeRanks(), generator.idle
    )


def alter(batch, step, **changes):
    """Replace parts of a noisy step of every member, as functions of the old value."""
    for pack in batch.packs:
        for member in pack.members:
            old = member.taken[step]
            new = {name: change(getattr(old, name)) for name, change in changes.items()}
            member.taken[step] = dataclasses.replace(old, **new)


def test_every_ratio_of_an_unchanged_policy_is_one(generator, batch):
    found = check(generator, batch)
    assert len(found) == 4 * NOISY_STEPS and {one.step for one in found} == {0, 1, 2}
    assert all(one.log_ratio == 0.0 and not one.off and one.cause == "" for one in found)
    refuse_off_policy(found)
    lines = table(found).splitlines()
    assert len(lines) == 1 + NOISY_STEPS and all("1.000000000" in line for line in lines[1:])


def low_precision_latents(generator, batch, monkeypatch):
    for step in range(NOISY_STEPS):
        alter(batch, step, before=torch.Tensor.bfloat16)


def dropout(generator, batch, monkeypatch):
    for module in generator.model.packed.transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.3)
            monkeypatch.setattr(module, "training", True)


def moved_weights(generator, batch, monkeypatch):
    weight = generator.model.pipe.transformer.proj_out.weight
    monkeypatch.setattr(weight, "data", 1.05 * weight.data)


def other_gradients(generator, batch, monkeypatch):
    real = rollout.velocities

    def other(*arguments):
        found = real(*arguments)
        return [v * 1.01 for v in found] if torch.is_grad_enabled() else found

    for module in (on_policy, rollout):
        monkeypatch.setattr(module, "velocities", other)


def unsteady_kernel(generator, batch, monkeypatch):
    real = rollout.velocities
    for module in (on_policy, rollout):
        monkeypatch.setattr(module, "velocities", lambda *a: [v + 0.05 * torch.randn_like(v) for v in real(*a)])


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (low_precision_latents, "latents are kept in torch.bfloat16"),
        (dropout, "dropout is on"),
        (moved_weights, "weights, packs or latents changed"),
        (other_gradients, "keeps gradients differs"),
        (unsteady_kernel, "not deterministic"),
    ],
)
def test_a_fault_is_refused_with_its_cause(generator, batch, monkeypatch, fault, cause):
    fault(generator, batch, monkeypatch)
    found = check(generator, batch)
    with pytest.raises(OffPolicyError, match=cause) as error:
        refuse_off_policy(found)
    # One of the twelve may still be 1 by chance, with latents that are rounded.
    assert re.search(r"1[12] of 12 ratios are not 1\. First at timestep 0 \(t = 1\.0000\)", str(error.value))


def test_the_first_timestep_that_differs_is_named(generator, batch):
    alter(batch, 2, before=lambda x: x + 0.01)
    with pytest.raises(OffPolicyError, match=r"4 of 12 ratios are not 1. First at timestep 2 \(t = 0\."):
        refuse_off_policy(check(generator, batch))


def test_a_nan_is_off(generator, batch):
    alter(batch, 1, log_prob=lambda x: float("nan"))
    assert [one.step for one in check(generator, batch) if one.off] == [1] * 4


def test_a_ratio_that_is_off_only_once_is_refused(generator, batch, monkeypatch):
    """The second replay, which looks for the cause, finds nothing; the first one counts."""
    real, calls = on_policy.replay, []

    def once(*arguments):
        found = real(*arguments)
        calls.append(found)
        if len(calls) > 1:
            return found
        return [(i, dataclasses.replace(step, mean=step.mean + 0.01)) for i, step in found]

    monkeypatch.setattr(on_policy, "replay", once)
    with pytest.raises(OffPolicyError, match="a second replay gave another number"):
        refuse_off_policy(check(generator, batch))


def test_a_rank_without_a_pack_runs_as_many_forwards(generator, batch):
    """One forward for each noisy step; where another rank is off, as many as its diagnosis takes."""
    forwards = []
    batch.packs = [None]
    others = iter([[False], [True], [False], [[]]])
    ranks = FakeRanks(1, 2, others=lambda value: next(others))
    found = check_on_policy(
        generator.model.packed, batch.packs, NOISY_STEPS, generator.sampler, ranks, lambda: forwards.append(1)
    )
    assert found == [] and len(forwards) == NOISY_STEPS + on_policy.DIAGNOSIS_FORWARDS


def test_the_number_of_forwards_of_a_diagnosis(generator, batch, monkeypatch):
    calls, real = [], generator.model.packed.forward
    monkeypatch.setattr(generator.model.packed, "forward", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    on_policy.probe(generator.model.packed, batch.packs[0], 0, generator.sampler, diagnose=True)
    assert len(calls) == on_policy.DIAGNOSIS_FORWARDS


# ---- references kept over the steps of a rollout ----


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("visibility", ["reference_causal", "reference_isolated", "group_shared"])
def test_rollouts_that_keep_their_references_are_on_policy(
    make_generator, prepared_rows, monkeypatch, visibility, guidance
):
    """Compute the references in the first step of each pack only; the replay computes them again."""
    ends, rows = {}, []
    for keep in (False, True):
        generator = make_generator(
            visibility=visibility, keep_references=keep, rollout_true_cfg_scale=guidance, group=3
        )
        batch = generator.training_batch(prepared_rows(2, 3), PLAN)
        counting = generator.model.pipe.transformer.img_in.register_forward_pre_hook(
            lambda module, inputs: rows.append(len(inputs[0]))
        )
        assert generator.generate(batch)
        counting.remove()
        expected, steps = [], len(batch.groups[0].sigmas) - 1
        for pack in batch.packs:
            targets = sum(segment.length for segment in pack.layout.targets)
            expected += [pack.layout.image_length] + [targets if keep else pack.layout.image_length] * (steps - 1)
        assert rows == expected
        found = check(generator, batch)
        assert len(found) == 6 * NOISY_STEPS and not any(one.off for one in found)
        ends[keep] = torch.cat([member.latents for pack in batch.packs for member in pack.members])
        rows.clear()
    torch.testing.assert_close(ends[True], ends[False], rtol=0, atol=5e-5)  # float32 products of other row counts


def test_references_that_depend_on_the_step_are_not_kept(make_generator):
    config = MSGRPO((RLStage(64, 1, 1e-3),), visibility="full", keep_references=True)
    with pytest.raises(ValueError, match='under visibility = "full" its references depend'):
        check_kept_references(config, ModelSize(), {})
    check_kept_references(config, QwenImage21Size(), {})
    with pytest.raises(ValueError, match="would not be exact: references attend to text and target"):
        make_generator(keep_references=True)  # the visibility is that of the initial run, here "full"
