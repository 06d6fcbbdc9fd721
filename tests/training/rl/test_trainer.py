"""Tests of the trainer of MSGRPO, before and in single steps: the gradient, the updates, events, rows, signals."""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from msgrpo_runs import events, flags, records

from uniref_fast import flags as configs
from uniref_fast.rewards.types import Failure
from uniref_fast.training import msgrpo
from uniref_fast.training.batches import samples
from uniref_fast.training.core import launch
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.rl import trainer as rl_trainer
from uniref_fast.training.rl.grpo import Advantages, Objective, advantages
from uniref_fast.training.rl.metrics import RewardHackingDetector
from uniref_fast.training.rl.on_policy import TOLERANCE, OffPolicyError, check_on_policy
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.rl.rollout import replay
from uniref_fast.training.rl.sde import log_density
from uniref_fast.training.rl.trainer import RewardError, RLTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]


@contextlib.contextmanager
def trainer_of(data, out, *more):
    """Build a trainer before its first step, its weights moved a little, so that no part of the gradient vanishes."""
    given = configs.parse(MSGRPO_RECIPES, flags(data, out, *more), extra=msgrpo.RLRunOptions(out))
    trainer = RLTrainer(launch.with_visibility(given.config), Ranks.start(), out)
    try:
        with trainer.monitor, torch.no_grad():
            draw = torch.Generator().manual_seed(1)
            for parameter in trainer.parameters:
                parameter.to_local().add_(torch.randn(parameter.shape, generator=draw), alpha=0.02)
            trainer._enter_stage()
            with torch.enable_grad():
                yield trainer
    finally:
        trainer.close()
        torch.distributed.destroy_process_group()


def generated(trainer):
    """Return a step's rollouts, and advantages of both signs for all of them but one."""
    rows, _ = trainer.prompts.take(trainer.config.prompts, trainer.config.stages[0])
    batch = trainer.generator.training_batch(rows, trainer.plans[0])
    assert trainer.generator.generate(batch)
    keys = [key for group in batch.keys for key in group][:-1]
    values = {key: (-1) ** i * (0.5 + i) for i, key in enumerate(keys)}
    return batch, Advantages(values, 0, 0, 1.0)


def gradient(trainer, loss=None):
    """Return the gradient of a loss, or the one that was accumulated, and set it to zero."""
    if loss is not None:
        loss.backward()
    grads = [torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for p in trainer.parameters]
    trainer.optimizer.zero_grad()
    return torch.cat([grad.flatten() for grad in grads])


def state_of(trainer):
    return [parameter.full_tensor().detach().clone() for parameter in trainer.parameters]


def likelihood(trainer, batch, values, scaled=False):
    """Sum of advantage times gained log-probability over all noisy steps; `scaled` weighs as GRPO-Guard does."""
    terms = []
    for pack in batch.packs:
        for noisy_step in range(trainer.config.noisy_steps):
            steps = replay(trainer.model.packed, pack, noisy_step, trainer.generator.sampler)
            for member, (i, step) in zip(pack.members, steps, strict=True):
                gained = log_density(member.taken[i].after, step) - member.taken[i].log_prob
                t, t_next = member.group.sigmas[i : i + 2]
                terms.append(values.get(member.key, 0.0) * gained * (step.std / (t - t_next) if scaled else 1.0))
    return torch.stack(terms).sum()


def distance(trainer, batch, values):
    """Sum of the divergences from the model without its adapter."""
    terms, adapters = [], trainer.model.pipe.transformer
    for pack in batch.packs:
        for noisy_step in range(trainer.config.noisy_steps):
            arguments = (trainer.model.packed, pack, noisy_step, trainer.generator.sampler)
            adapters.disable_adapters()
            with torch.no_grad():
                before = replay(*arguments)
            adapters.enable_adapters()
            for member, (_, step), (_, other) in zip(pack.members, replay(*arguments), before, strict=True):
                apart = (step.mean - other.mean).square().mean() / (2 * step.std**2)
                terms.append(apart * (member.key in values))
    return torch.stack(terms).sum()


# ---- the update ----


@pytest.mark.parametrize(
    "more", [(), ("--kl", 3.0), ("--ratio-guard", "true"), ("--packs", 5), ("--rollout-true-cfg-scale", 2)]
)
def test_the_gradient_is_that_of_the_formula(data, tmp_path, monkeypatch, more):
    """The weights are those of the rollouts, so that nothing is clipped; the packs make no difference."""
    with trainer_of(data, tmp_path / "run", *more, "--timesteps", 1) as trainer:
        batch, advantage = generated(trainer)
        found = []
        monkeypatch.setattr(trainer, "take_step", lambda norm: found.append(gradient(trainer)))
        statistics, norm, _ = trainer.update(batch, advantage)
        (found,) = found
        count = len(advantage.values) * trainer.config.noisy_steps
        wanted = -gradient(trainer, likelihood(trainer, batch, advantage.values, trainer.config.ratio_guard)) / count
        if trainer.config.kl:
            apart = distance(trainer, batch, advantage.values)
            assert sum(statistics.kl) == pytest.approx(apart.item(), rel=1e-5)
            wanted += trainer.config.kl * gradient(trainer, apart) / count
        assert statistics.ratios == [1.0] * count and norm == pytest.approx(wanted.norm().item(), rel=1e-3)
        assert (found - wanted).norm() < 1e-4 * wanted.norm() and wanted.norm() > 0


def test_updates_raise_the_likelihood_of_what_scored_well(data, tmp_path):
    with trainer_of(data, tmp_path / "run", "--inner-epochs", 3, "--clip", 100, "--timesteps", 1) as trainer:
        batch, advantage = generated(trainer)
        assert likelihood(trainer, batch, advantage.values).item() == 0
        statistics, norm, _ = trainer.update(batch, advantage)
        assert likelihood(trainer, batch, advantage.values).item() > 0.01 and norm > 0 and statistics.clipped == 0


def test_the_divergence_pulls_towards_the_reference_policy(data, tmp_path):
    with trainer_of(data, tmp_path / "run", "--inner-epochs", 3, "--kl", 1000.0, "--clip", 0.5) as trainer:
        batch, advantage = generated(trainer)
        before = distance(trainer, batch, advantage.values).item()
        trainer.update(batch, advantage)
        assert 0 < distance(trainer, batch, advantage.values).item() < 0.9 * before


def test_optimizer_steps_and_the_noisy_steps_of_each(data, tmp_path, monkeypatch):
    """Every inner epoch trains on the drawn share of the noisy steps, divided among its updates; clips are counted."""
    more = ("--inner-epochs", 2, "--updates", 2, "--timesteps", 0.7, "--clip", 0, "--clip-high", 0.0)
    with trainer_of(data, tmp_path / "run", *more) as trainer:
        batch, advantage = generated(trainer)
        drawn, draw, trainer.step = [], rl_trainer.minibatches, 1
        monkeypatch.setattr(rl_trainer, "minibatches", lambda *a, **k: (drawn.append((a, k)), draw(*a, **k))[1])
        trained, steps, real = [], [], rl_trainer.replay
        monkeypatch.setattr(rl_trainer, "replay", lambda *a: (trained.append(a[2]), real(*a))[1])
        take_step = trainer.take_step
        monkeypatch.setattr(trainer, "take_step", lambda norm: (steps.append(len(trained)), take_step(norm)))
        statistics, _, tokens = trainer.update(batch, advantage)
        assert drawn == [((3, 2, 2), {"seed": 0, "step": 1, "epoch": epoch}) for epoch in (0, 1)]
        packs = len(batch.packs)
        assert [steps[0], *(b - a for a, b in itertools.pairwise(steps))] == [packs] * 4
        assert len(set(trained)) == 2 and trained[: 2 * packs] != [0] * 2 * packs
        assert len(statistics.ratios) == 2 * 2 * len(advantage.values)
        assert tokens == 2 * 2 * sum(pack.layout.joint_length for pack in batch.packs)
        # clip = 0: of the updates after the first, the ratios that moved as the advantage wants are clipped
        assert 0 < statistics.clipped < len(statistics.ratios) * 3 // 4
        scores = {key: {"quality": 5.0} for group in batch.keys for key in group}
        metrics = rl_trainer.step_metrics(batch, scores, scores, advantage, [statistics], lambda axes: axes["quality"])
        assert metrics["clip_fraction"] == statistics.clipped / len(statistics.ratios)


def test_a_nan_in_one_update_leaves_the_others(data, tmp_path, monkeypatch):
    real, calls = Objective.__call__, []

    def sometimes(*arguments, **named):
        one = real(*arguments, **named)
        calls.append(one)
        return dataclasses.replace(one, loss=one.loss * math.nan) if len(calls) == 1 else one

    monkeypatch.setattr(Objective, "__call__", sometimes)
    with trainer_of(data, tmp_path / "run", "--timesteps", 1, "--updates", 3, "--max-skipped", 2) as trainer:
        batch, advantage = generated(trainer)
        steps, real_step = [], trainer.take_step
        monkeypatch.setattr(trainer, "take_step", lambda norm: (steps.append(norm), real_step(norm)))
        trainer.update(batch, advantage)
        assert len(steps) == 2 and all(map(math.isfinite, steps))
        assert all(torch.isfinite(tensor).all() for tensor in state_of(trainer))
    assert len(events(tmp_path / "run", "skipped")) == 1


@pytest.mark.parametrize(
    "more",
    [
        ("--visibility", "group_shared", "--rollout-true-cfg-scale", "3"),
        ("--sampler", "cps", "--noise", "0.8"),
        ("--window", "2", "--rollout-num-inference-steps", "6", "--ratio-guard", "true"),
        ("--dtype", "bfloat16", "--stages.0.checkpointing", "true", "--ema", "0.9"),
        ("--lora-rank", "none"),
    ],
    ids=lambda more: " ".join(more),
)
def test_a_step_is_on_policy_with_other_settings(data, tmp_path, more):
    with trainer_of(data, tmp_path / "run", *more) as trainer:
        assert trainer.train_step()
        trainer.step += 1
        assert trainer.train_step()
    (check,) = events(tmp_path / "run", "on-policy check")
    assert check["worst_log_ratio"] <= TOLERANCE
    for record in records(tmp_path / "run"):
        assert record["grad_norm"] > 0 and record["ratio_max"] == pytest.approx(1.0, abs=1e-6) and "kl" not in record


# ---- a step ----


def test_every_setting_of_the_advantages_arrives(data, tmp_path, monkeypatch):
    """The figures of the step are those of the weighted sum."""
    given = []

    def kept(scores, *arguments, **settings):
        given.append((scores, *arguments, settings))
        return advantages(scores, *arguments, **settings)

    monkeypatch.setattr(rl_trainer, "advantages", kept)
    more = {"axis-weights": "0.5,0,2", "advantage": "per_axis", "advantage-std": "batch", "min-members": 3,
            "advantage-clip": 1.5}  # fmt: skip
    with trainer_of(data, tmp_path / "run", *(x for pair in more.items() for x in pair)) as trainer:
        assert trainer.train_step()
    ((scores, groups, weights, settings),) = given
    assert weights == {"integration": 0.5, "consistency": 0.0, "quality": 2.0} and list(map(len, groups)) == [3, 3]
    assert settings == {"kind": "per_axis", "std": "batch", "min_members": 3, "clip": 1.5}
    totals = [0.5 * one["integration"] + 2 * one["quality"] for one in scores.values()]
    (record,) = records(tmp_path / "run")
    assert record["reward"] == pytest.approx(math.fsum(totals) / 6 / 2.5)


def test_a_step_that_is_off_policy_trains_nothing(data, tmp_path, monkeypatch):
    def off(*arguments):
        found = check_on_policy(*arguments)
        return [dataclasses.replace(found[0], log_ratio=0.1, cause="a fault"), *found[1:]]

    monkeypatch.setattr(rl_trainer, "check_on_policy", off)
    with trainer_of(data, tmp_path / "run") as trainer:
        before = state_of(trainer)
        with pytest.raises(OffPolicyError, match=r"1 of 18 ratios are not 1.*Likely cause: a fault"):
            trainer.train_step()
        assert all(map(torch.equal, before, state_of(trainer)))


def test_a_signal_ends_a_step_or_a_validation_without_any_effect(data, tmp_path):
    with trainer_of(data, tmp_path / "run") as trainer:
        before, prompts = state_of(trainer), trainer.state()["prompts"]
        trainer.signalled = True
        assert trainer.train_step() is False and trainer.validate(figures=True, grid=True) is False
        assert all(map(torch.equal, before, state_of(trainer))) and trainer.state()["prompts"] == prompts
        assert not trainer.stopping
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or records(tmp_path / "run") == []


def test_a_signal_during_the_updates_ends_the_run_after_the_step(data, tmp_path, monkeypatch):
    with trainer_of(data, tmp_path / "run") as trainer:
        real = trainer.update
        monkeypatch.setattr(trainer, "update", lambda *a: (setattr(trainer, "signalled", True), real(*a))[1])
        prompts = trainer.state()["prompts"]
        assert trainer.train_step() is True and trainer.stopping
        assert trainer.state()["prompts"] != prompts, "the step is done, its prompts are used up"


def test_too_many_failures_end_the_run_and_keep_nothing_of_the_step(data, tmp_path, monkeypatch):
    failed = Failure("malformed", "no JSON")
    with trainer_of(data, tmp_path / "run", "--max-failures", 0.5) as trainer:
        before, voided = state_of(trainer), []
        monkeypatch.setattr(trainer.rewards, "void", voided.append)
        real, left = trainer.rewards.combined, iter([failed] * 4)
        monkeypatch.setattr(trainer.rewards, "combined", lambda results: next(left, None) or real(results))
        with pytest.raises(RewardError, match=r"4 of 6 rollouts of step 0 got no scores.*malformed: no JSON"):
            trainer.train_step()
        assert voided == [0], "a resumed run asks for them again"
        assert all(map(torch.equal, before, state_of(trainer)))
        (event,) = events(tmp_path / "run", "no scores")
        assert (event["failure"], event["count"], event["such_as"]) == ("malformed", 4, "no JSON")


def test_failures_within_the_limit_leave_the_step(data, tmp_path, monkeypatch):
    failed = Failure("malformed", "no JSON")
    with trainer_of(data, tmp_path / "run", "--max-failures", 0.5) as trainer:
        real, left = trainer.rewards.combined, iter([failed] * 2)
        monkeypatch.setattr(trainer.rewards, "combined", lambda results: next(left, None) or real(results))
        assert trainer.train_step()
    (record,) = records(tmp_path / "run")
    assert record["failures"] == pytest.approx(1 / 3) and record["samples"] == 4


def test_reward_hacking_is_reported_with_the_means_of_the_step(data, tmp_path, monkeypatch):
    given, add = [], RewardHackingDetector.add

    def warn(*arguments):
        given.append(arguments[1:])
        return add(*arguments) or "a warning"

    monkeypatch.setattr(RewardHackingDetector, "add", warn)
    with trainer_of(data, tmp_path / "run", "--prompts", 1) as trainer:
        assert trainer.train_step()
        assert trainer.state()["alarm"] == [list(one) for one in given]
    (event,), (record,) = events(tmp_path / "run", "reward hacking?"), records(tmp_path / "run")
    assert event["message"] == "a warning" and given == [(0, record["reward"], record["reward/quality"])]


def test_a_visibility_that_nothing_vouches_for_is_reported(data, tmp_path):
    with trainer_of(data, tmp_path / "run", "--visibility", "group_shared") as trainer:
        trainer.begin()
        assert trainer.generator.shared and trainer.model.packed.visibility == "group_shared"
    assert "nothing says" in events(tmp_path / "run", "visibility")[0]["message"]


# ---- rows ----


@pytest.fixture
def own_data(data, tmp_path):
    """A copy of the data that a test may change."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def test_masks_are_reported_as_not_used(own_data, tmp_path):
    for name, masked in (("plain", False), ("masked", True)):
        path = own_data / "train.jsonl"
        rows = map(json.loads, path.read_text().splitlines())
        lines = [json.dumps(row | ({"mask": row["output_image"]} if masked else {})) for row in rows]
        path.write_text("\n".join(lines))
        with trainer_of(own_data, tmp_path / name) as trainer:
            trainer.begin()
            assert trainer.prompts.dataset[0].mask is not None or not masked
        assert len(events(tmp_path / name, "masks")) == masked


def test_own_prompts_are_drawn_before_the_first_step(own_data, tmp_path):
    rows = [json.loads(line) for line in (own_data / "train.jsonl").read_text().splitlines()[:2]]
    prompts = own_data / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({**row, "output_image": None}) for row in rows))
    out = tmp_path / "run"
    with trainer_of(own_data, out, "--validate", prompts, "--sample-every", 2, "--sample-count", 1) as trainer:
        trainer._validate()
        (out / "samples" / "prompts-000000.png").rename(tmp_path / "first.png")
        trainer._validate(resumed=True)
    assert (out / "samples" / "prompts-000000.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    assert (out / "samples" / "heldout-000000.png").exists()


def test_rows_that_cannot_be_used_are_replaced_and_named(own_data, tmp_path, monkeypatch):
    """A damaged image, a row larger than a pack, an image token, a row that only the text encoder refuses."""
    path = own_data / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    several = [number for number, row in enumerate(rows) if len(row["input_images"]) == 2]
    long, token, refused, damaged = several[:4]
    rows[long]["instruction"] = "red " * 600
    rows[token]["instruction"] += " <|image_pad|>"
    rows[refused]["instruction"] = "the encoder refuses this"
    image = own_data / rows[damaged]["input_images"][0]
    image.write_bytes(image.read_bytes()[:-200])  # its header is whole, so only decoding shows it
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embeddings = samples.prompt_embeddings

    def refusing(pipe, prompt, *rest):
        if prompt == "the encoder refuses this":
            raise ValueError("no such words")
        return embeddings(pipe, prompt, *rest)

    monkeypatch.setattr(samples, "prompt_embeddings", refusing)
    out, usable = tmp_path / "run", len(several) - 4
    with trainer_of(own_data, out, "--prompts", usable) as trainer:
        assert trainer.train_step()
        assert len(trainer.state()["prompts"]["broken"]) >= 1
        trainer.step += 1
        assert trainer.train_step()
        broken = trainer.state()["prompts"]["broken"]
    found = {event["where"].rpartition(":")[2]: event["reason"] for event in events(out, "broken row")}
    assert set(found) == {str(number + 1) for number in (long, token, refused, damaged)}
    assert "over the 512 of a pack" in found[str(long + 1)] and "<|image_pad|>" in found[str(token + 1)]
    assert "no such words" in found[str(refused + 1)]
    assert {where.rpartition(":")[2] for where in broken} == set(found)
    assert [record["samples"] for record in records(out)] == [usable * 3] * 2


def test_rows_in_place_of_broken_ones_are_encoded_before_the_run_until_none_is_broken(own_data, tmp_path, monkeypatch):
    """All rows with two references but one are refused by the text encoder."""
    path = own_data / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    refused = [number for number, row in enumerate(rows) if len(row["input_images"]) == 2][:-1]
    for number in refused:
        rows[number]["instruction"] = f"the encoder refuses {number}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embeddings, kept = samples.prompt_embeddings, []

    def refusing(pipe, prompt, *rest):
        if prompt.startswith("the encoder refuses"):
            raise ValueError("no such words")
        kept.append(prompt)
        return embeddings(pipe, prompt, *rest)

    monkeypatch.setattr(samples, "prompt_embeddings", refusing)
    with trainer_of(own_data, tmp_path / "run", "--prompts", 1, "--encoders", "free") as trainer:
        (announced,) = [details for kind, details in trainer._announced if kind == "encoded"]
        assert announced["broken"] == len(refused) > 3
        before = len(kept)
        assert trainer.train_step() and len(kept) == before, "everything was encoded"


def test_a_damaged_held_out_image_is_named(own_data, tmp_path):
    heldout = own_data / "heldout_objects.jsonl"
    image = own_data / json.loads(heldout.read_text().splitlines()[1])["input_images"][0]
    image.write_bytes(image.read_bytes()[:-200])
    with (
        trainer_of(own_data, tmp_path / "run") as trainer,
        pytest.raises(ValueError, match=r"heldout_objects\.jsonl:2: .*held-out row"),
    ):
        trainer.validate(figures=True, grid=False)


def test_validation_counts_rows_and_images_on_their_own(data, tmp_path):
    with trainer_of(data, tmp_path / "run", "--eval-samples", 2, "--sample-count", 3) as trainer:
        assert trainer.validate(figures=False, grid=True)
        assert not (tmp_path / "run" / "metrics.jsonl").exists() or records(tmp_path / "run") == []
        assert trainer.validate(figures=True, grid=False)
        (record,) = records(tmp_path / "run")
        assert {"eval/heldout_objects", "eval/heldout_objects/quality"} <= set(record)
        assert [path.name[:7] for path in (tmp_path / "run" / "samples").iterdir()] == ["heldout"]
