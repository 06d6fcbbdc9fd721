"""MSGRPO end to end, on the built-in model: the gate, exact resume, ranks, a judge that misbehaves."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import judge_server
import pytest
import torch
from safetensors.torch import load_file

from uniref_fast import flags as configs
from uniref_fast import runs as lineage
from uniref_fast.scenes.dataset import write_dataset
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.training import msgrpo
from uniref_fast.training.batches import samples
from uniref_fast.training.core import launch
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.rl import generator as roller
from uniref_fast.training.rl import on_policy as gate
from uniref_fast.training.rl import trainer as rl_trainer
from uniref_fast.training.rl.grpo import Advantages, minibatches
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.rl.rollout import replay
from uniref_fast.training.rl.sde import log_density

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "made"
    config = MakeConfig(artworks("shipped"), size=64, references=(1, 2))
    write_dataset(
        folder, config, {"train": 16, "heldout_objects": 3, "heldout_combinations": 0}, 1, force=False, generate=sample
    )
    return folder


def flags(data, out, *more, steps=3):
    given = {
        "recipe": "tiny",
        "data": data / "train.jsonl",
        "heldout": data / "heldout_objects.jsonl",
        "out": out,
        "steps": steps,
        "prompts": 2,
        "group": 3,
        "rollout-steps": 4,
        "sample-steps": 3,
        "lora-rank": 2,
        "save-every": 1,
        "eval-every": 0,
        "eval-samples": 3,
        "sample-every": 0,
        "tensorboard": "false",
    }
    for i in range(2):
        given |= {f"stages.{i}.side": 48, f"stages.{i}.target-side": 32, f"stages.{i}.pack-tokens": 512}
    given |= {name.removeprefix("--"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def records(out, name="metrics"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def steps_of(out):
    """What a run did, without what depends on the clock."""
    timed = ("seconds", "per_second")
    return [{k: v for k, v in r.items() if not any(t in k for t in timed)} for r in records(out) if "loss" in r]


def events(out, kind):
    return [record for record in records(out, "events") if record["kind"] == kind]


def weights(out):
    return load_file(next((out / "lora").glob("*.safetensors")))


def equal_to(whole, out):
    assert steps_of(out) == steps_of(whole), "bit for bit"
    expected = weights(whole)
    assert [name for name, tensor in weights(out).items() if not torch.equal(tensor, expected[name])] == []


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of three steps, two stages, without any interruption."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    assert msgrpo.main(flags(data, out, "--sample-every", 2, "--eval-every", 3)) == 0
    torch.set_num_threads(before)
    return out


def test_a_run(whole):
    first = records(whole)[0]
    assert {"eval/heldout_objects", "eval/heldout_objects/quality"} <= set(first)
    made = steps_of(whole)
    assert [record["step"] for record in made] == [0, 1, 2]
    names = {"reward", "reward_std", "reward/integration", "reward/consistency", "reward/quality", "group_std"}
    assert names | {"ratio", "zero_spread", "clip_fraction", "failures", "grad_norm"} <= set(made[0])
    assert made[0]["ratio_min"] == made[0]["ratio_max"] == 1.0 and made[0]["grad_norm"] > 0
    for passed in events(whole, "on-policy check"):
        assert passed["timesteps"] == 3 and passed["worst_log_ratio"] == 0.0
    assert [event["number"] for event in events(whole, "stage")] == [0, 1]
    assert {path.name for path in (whole / "samples").iterdir()} >= {"groups-000001.png", "heldout-000002.png"}
    moved = weights(whole)
    assert any(tensor.abs().sum() > 0 for name, tensor in moved.items() if "lora_B" in name)


@pytest.fixture
def begun(whole, tmp_path):
    """A copy of that run, as if it had ended after its first step."""
    out = tmp_path / "begun"
    shutil.copytree(whole, out)
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"step-{step:06d}")
    shutil.rmtree(out / "lora")
    return out


def test_resume_is_exact(data, whole, begun):
    assert msgrpo.main(flags(data, begun, "--sample-every", 2, "--eval-every", 3, "--resume", "auto")) == 0
    equal_to(whole, begun)


def test_other_rewards_are_recorded_and_not_compared_with_those_before(data, begun):
    """The alarm looks at the reward's course, which means nothing across a change of its weights."""
    ranks = Ranks.start()
    try:
        for more, kept in (((), 1), (("--kl", 0.1), 1), (("--axis-weights", "1,1,2"), 0)):
            config = configs.parse(MSGRPO_RECIPES, flags(data, begun, *more), extra=msgrpo.RLRunOptions(begun)).config
            run = rl_trainer.RLTrainer(config, ranks, begun, 1)
            assert len(run.detector.state()) == kept
            run.close()
    finally:
        torch.distributed.destroy_process_group()
    assert msgrpo.main(flags(data, begun, "--axis-weights", "1,1,2", "--resume", "auto", steps=2)) == 0
    changed = {event["setting"]: (event["before"], event["now"]) for event in events(begun, "changed")}
    assert changed["axis_weights"] == ([1.0, 1.0, 1.0], [1.0, 1.0, 2.0]) and changed["steps"] == (3, 2)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from uniref_fast.training import msgrpo
from uniref_fast.training.core import processes
from uniref_fast.training.rl import generator as roller
ask, asked = roller.RolloutGenerator._submit, []
def dying(self, batch, pack, step):
    asked.append(pack)
    if step == 1 and len(asked) % 2 == 0:
        os.kill(os.getpid(), signal.{signal})
    ask(self, batch, pack, step)
roller.RolloutGenerator._submit = dying
processes.leave(msgrpo.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", -9), ("SIGTERM", 143)])
def test_stopped_in_the_middle_of_a_group(data, whole, tmp_path, name, status):
    """Rollouts and their noise are keyed: what was lost of the step is made again, to the bit."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLED.replace("{signal}", name), *flags(data, out, "--packs", 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert msgrpo.main(flags(data, out, "--packs", 2, "--resume", "auto")) == 0
    equal_to(whole, out)


def looked(out):
    return [record["step"] for record in records(out) if "eval/heldout_objects" in record]


@pytest.mark.parametrize(
    ("place", "last"), [("_update", 0), ("_update", 2), ("validate", 0), ("validate", 2), ("validate", 3)]
)
def test_a_look_that_a_signal_ended_comes_later(data, tmp_path, monkeypatch, place, last):
    """A signal in a step ends the run after it, before the next one; what it kept from being looked at comes first."""
    out, real = tmp_path / "run", getattr(rl_trainer.RLTrainer, place)

    def interrupted(self, *arguments):
        if self.step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    roll, late = roller.RolloutGenerator._generate, []

    def rolled_late(self, *arguments):
        late.extend([place] * self.signalled())
        return roll(self, *arguments)

    monkeypatch.setattr(rl_trainer.RLTrainer, place, interrupted)
    monkeypatch.setattr(roller.RolloutGenerator, "_generate", rolled_late)
    given = flags(data, out, "--eval-every", 1, "--save-every", 2)
    assert msgrpo.main(given) == 143
    done = last + (place == "_update")
    assert [record["step"] for record in steps_of(out)] == looked(out) == list(range(done))
    assert not (out / "lora").exists() and (place == "validate" or not late), "nothing is begun after a signal"
    monkeypatch.undo()
    assert msgrpo.main([*given, "--resume", "auto"]) == 0
    assert looked(out) == [0, 1, 2, 3] and (out / "lora").is_dir()


two_ranks = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")


def run_two_ranks(arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "training/msgrpo.py", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def equal_until_updated(whole, out, step):
    """The same bits in that step, until its gradients are summed in another order; then close."""
    found, expected = steps_of(out), steps_of(whole)
    exact = ("reward", "reward/quality", "group_std", "ratio_max", "tokens")
    assert [found[step][name] for name in exact] == [expected[step][name] for name in exact]
    for one, other in zip(found, expected, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@two_ranks
def test_two_ranks_make_the_same_rollouts_and_steps(data, whole, tmp_path):
    run_two_ranks(flags(data, tmp_path / "run"))
    equal_until_updated(whole, tmp_path / "run", 0)


@two_ranks
def test_resume_with_twice_the_ranks(data, whole, begun):
    run_two_ranks(flags(data, begun, "--sample-every", 2, "--eval-every", 3, "--resume", "auto"))
    assert steps_of(begun)[0] == steps_of(whole)[0] and len(steps_of(begun)) == 3
    equal_until_updated(whole, begun, 1)


@two_ranks
def test_ranks_that_share_packs(data, whole, tmp_path):
    """Each half of the tokens of every pack; the ratio is still 1, and scores differ by rounding only."""
    shared = [f"--stages.{i}.sequence-parallel" for i in range(2)]
    run_two_ranks(flags(data, tmp_path / "run", shared[0], 2, shared[1], 2, "--guidance", 2))
    found = steps_of(tmp_path / "run")
    assert events(tmp_path / "run", "on-policy check")[0]["worst_log_ratio"] <= gate.TOLERANCE
    alone = tmp_path / "alone"
    assert msgrpo.main(flags(data, alone, "--guidance", 2)) == 0
    for one, other in zip(found, steps_of(alone), strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3)


@pytest.mark.parametrize(
    "more",
    [
        ("--visibility", "group_shared"),
        ("--visibility", "group_shared", "--guidance", "3"),
        ("--sampler", "cps", "--noise", "0.8", "--advantage", "per_axis", "--advantage-std", "batch"),
        ("--window", "2", "--rollout-steps", "6", "--ratio-guard", "true", "--clip-high", "0.2"),
        ("--kl", "0.1", "--inner-epochs", "2", "--updates", "2", "--timesteps", "0.7"),
        ("--dtype", "bfloat16", "--stages.0.checkpointing", "true", "--ema", "0.9"),
        ("--lora-rank", "none"),
    ],
    ids=lambda more: " ".join(more),
)
def test_other_settings(data, tmp_path, more):
    out = tmp_path / "run"
    assert msgrpo.main(flags(data, out, *more, steps=2)) == 0
    assert all(passed["worst_log_ratio"] <= gate.TOLERANCE for passed in events(out, "on-policy check"))
    made = steps_of(out)
    assert all(record["grad_norm"] > 0 for record in made)
    first_update = "--updates" not in more and "--inner-epochs" not in more
    assert made[0]["ratio_max"] == pytest.approx(1.0, abs=1e-6) if first_update else made[0]["ratio_max"] != 1.0
    assert ("kl" in made[0]) == ("--kl" in more)
    if "--kl" in more:
        assert made[1]["kl"] > 0


# ---- the update ----


@contextlib.contextmanager
def trainer_of(data, out, *more):
    """A run before its first step, its weights a little off, so that no part of the gradient vanishes."""
    given = configs.parse(MSGRPO_RECIPES, flags(data, out, *more), extra=msgrpo.RLRunOptions(out))
    run = rl_trainer.RLTrainer(launch.with_visibility(given.config), Ranks.start(), out)
    try:
        with run.monitor, torch.no_grad():
            draw = torch.Generator().manual_seed(1)
            for parameter in run.parameters:
                parameter.to_local().add_(torch.randn(parameter.shape, generator=draw), alpha=0.02)
            run._enter_stage()
            with torch.enable_grad():
                yield run
    finally:
        run.close()
        torch.distributed.destroy_process_group()


def rolled(run):
    """A step's rollouts, and advantages of both signs for all of them but one."""
    rows, _ = run.prompts.take(run.config.prompts, run.config.stages[0])
    batch = run.generator.training_batch(rows, run.plans[0])
    assert run.generator.generate(batch)
    keys = [key for group in batch.keys for key in group][:-1]
    values = {key: (-1) ** i * (0.5 + i) for i, key in enumerate(keys)}
    return batch, Advantages(values, 0, 0, 1.0)


def gradient(run, loss=None):
    """Of a loss, or what has come together; it is taken away."""
    if loss is not None:
        loss.backward()
    grads = [torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for p in run.parameters]
    run.optimizer.zero_grad(set_to_none=True)
    return torch.cat([grad.flatten() for grad in grads])


def likelihood(run, batch, values, scaled=False):
    """Advantages times the log-probability that the rollouts have gained, all noisy steps; GRPO-Guard's scale."""
    terms = []
    for pack in batch.packs:
        for slot in range(run.config.noisy_steps):
            steps = replay(run.model.packed, pack, slot, run.generator.sampler)
            for member, (i, step) in zip(pack.members, steps, strict=True):
                gained = log_density(member.taken[i].after, step) - member.taken[i].log_prob
                t, t_next = member.group.sigmas[i : i + 2]
                terms.append(values.get(member.key, 0.0) * gained * (step.std / (t - t_next) if scaled else 1.0))
    return torch.stack(terms).sum()


def distance(run, batch, values):
    """From the model without its adapter."""
    terms = []
    for pack in batch.packs:
        for slot in range(run.config.noisy_steps):
            arguments = (run.model.packed, pack, slot, run.generator.sampler)
            with run._reference_policy():
                before = replay(*arguments)
            for member, (_, step), (_, other) in zip(pack.members, replay(*arguments), before, strict=True):
                apart = (step.mean - other.mean).square().mean() / (2 * step.std**2)
                terms.append(apart * (member.key in values))
    return torch.stack(terms).sum()


@pytest.mark.parametrize("more", [(), ("--kl", 3.0), ("--ratio-guard", "true"), ("--packs", 5), ("--guidance", 2)])
def test_the_gradient_is_that_of_the_formula(data, tmp_path, more):
    """At the rollouts' own weights, where clipping holds nothing back; whatever the packs, over all noisy steps."""
    with trainer_of(data, tmp_path / "run", *more) as run:
        batch, advantage = rolled(run)
        slots = range(run.config.noisy_steps)
        count, tally = len(advantage.values) * len(slots), rl_trainer.UpdateStatistics()
        for pack in batch.packs:
            for slot in slots:
                run._backward(pack, slot, advantage, count, tally)
        found = gradient(run)
        wanted = -gradient(run, likelihood(run, batch, advantage.values, scaled=run.config.ratio_guard)) / count
        if run.config.kl:
            apart = distance(run, batch, advantage.values)
            assert sum(tally.kl) == pytest.approx(apart.item(), rel=1e-5)
            wanted += run.config.kl * gradient(run, apart) / count
        assert torch.equal(torch.tensor(tally.ratios), torch.ones(count))
        assert (found - wanted).norm() < 1e-4 * wanted.norm() and wanted.norm() > 0


def test_updates_make_likelier_what_scored_well(data, tmp_path):
    with trainer_of(data, tmp_path / "run", "--inner-epochs", 3, "--clip", 100, "--timesteps", 1) as run:
        batch, advantage = rolled(run)
        assert likelihood(run, batch, advantage.values).item() == 0
        tally, norm, _ = run._update(batch, advantage)
        assert likelihood(run, batch, advantage.values).item() > 0.01 and norm > 0 and tally.clipped == 0


def test_the_divergence_pulls_back(data, tmp_path):
    with trainer_of(data, tmp_path / "run", "--inner-epochs", 3, "--kl", 1000.0, "--clip", 0.5) as run:
        batch, advantage = rolled(run)
        before = distance(run, batch, advantage.values).item()
        run._update(batch, advantage)
        assert 0 < distance(run, batch, advantage.values).item() < 0.9 * before


def test_clipping_is_counted(data, tmp_path):
    with trainer_of(data, tmp_path / "run", "--inner-epochs", 2, "--clip", 0, "--timesteps", 1) as run:
        batch, advantage = rolled(run)
        tally, *_ = run._update(batch, advantage)
        half = len(tally.ratios) // 2  # of the second epoch, and those that moved the way they should
        assert 0 < tally.clipped < half
        scores = {key: {"quality": 5.0} for group in batch.keys for key in group}
        made = run._metrics(batch, scores, scores, advantage, tally)
        assert made["clip_fraction"] == tally.clipped / len(tally.ratios)


def test_timesteps_and_their_order_are_drawn_anew(data, tmp_path):
    more = ("--rollout-steps", 9, "--timesteps", 0.5, "--updates", 2)
    with trainer_of(data, tmp_path / "run", *more) as run:
        drawn = {}
        for run.step in range(6):
            chunks = [minibatches(run.config.noisy_steps, run.config.trained_steps, run.config.updates,
                                  seed=run.config.seed, step=run.step, epoch=epoch) for epoch in range(3)]  # fmt: skip
            assert all(list(map(len, parts)) == [2, 2] for parts in chunks)
            (drawn[run.step],) = {tuple(sorted(parts[0] + parts[1])) for parts in chunks}
            assert len(set(drawn[run.step])) == 4 and len({str(parts) for parts in chunks}) > 1
        assert len(set(drawn.values())) > 1 and set().union(*drawn.values()) == set(range(8))


def test_each_setting_of_the_update_changes_it(data, tmp_path):
    base = {"--inner-epochs": 2, "--clip": 1e-7, "--updates": 2, "--timesteps": 1}
    made = []
    for more in ({}, {"--timesteps": 0.7}, {"--ratio-guard": "true"}, {"--clip-high": 0.5}, {"--inner-epochs": 3},
                 {"--advantage": "per_axis"}, {"--advantage-std": "batch"}):  # fmt: skip
        out = tmp_path / str(len(made))
        assert msgrpo.main(flags(data, out, *(x for pair in (base | more).items() for x in pair), steps=2)) == 0
        tensors = weights(out)
        made.append(torch.cat([tensors[name].flatten() for name in sorted(tensors)]))
        assert not any(torch.equal(made[-1], earlier) for earlier in made[:-1]), more


def test_noise_that_is_too_large_is_said(data, tmp_path):
    """At whichever place of the window it is worst."""
    for noise, told in ((0.2, 0), (1.5, 1)):
        out = tmp_path / str(noise)
        given = ("--rollout-steps", 10, "--window", 2, "--noise", noise, "--window-end", 2)
        assert msgrpo.main(flags(data, out, *given, steps=2)) == 0
        assert len(events(out, "noise too large")) == told * 2
        assert [event["step"] for event in events(out, "sampler")] == [0, 1], "of every stage, which has its own sizes"


def test_noise_is_judged_after_every_step(data, tmp_path):
    """The paper's noise ends right, after latents that no model was trained on; what to set instead is said."""
    more = ("--rollout-steps", 25, "--timesteps", 0.05)
    with trainer_of(data, tmp_path / "paper", "--noise", MSGRPO_RECIPES["paper"]().noise, *more) as run:
        pass
    ((found,), (warned,)) = (events(tmp_path / "paper", kind) for kind in ("sampler", "noise too large"))
    assert found["final"] < 1.03 and found["largest"] > 1.5 and found["after_step"] <= 2
    assert f"{found['largest']:.2f} times the standard deviation" in warned["message"]
    sound = re.search(r"set noise to ([\d.]+) or less", warned["message"])[1]
    with trainer_of(data, tmp_path / "sound", "--noise", sound, *more) as run:
        assert run.generator.sampler.noise == float(sound) >= 0.7
    assert events(tmp_path / "sound", "noise too large") == []
    for name in ("tiny", "lora"):
        recipe = MSGRPO_RECIPES[name]()
        window = ("--window", recipe.window) if recipe.window else ()
        given = ("--noise", recipe.noise, "--rollout-steps", recipe.rollout_steps, *window)
        with trainer_of(data, tmp_path / name, *given):
            pass
        assert events(tmp_path / name, "noise too large") == []


def test_an_alarm_is_sounded(data, tmp_path, monkeypatch):
    given, add = [], rl_trainer.RewardHackingDetector.add

    def told(*arguments):
        given.append(arguments[1:])
        return add(*arguments) or "!"

    monkeypatch.setattr(rl_trainer.RewardHackingDetector, "add", told)
    out = tmp_path / "run"
    assert msgrpo.main(flags(data, out, "--prompts", 1)) == 0
    assert [event["step"] for event in events(out, "reward hacking?")] == [0, 1, 2]
    made = steps_of(out)
    assert given == [(stage, r["reward"], r["reward/quality"]) for stage, r in zip((0, 0, 1), made, strict=True)]
    state = json.loads((out / "checkpoints" / "step-000002" / "state.json").read_text())["state"]
    assert state["alarm"] == [list(one) for one in given[:2]]


def test_what_decides_the_advantages(data, tmp_path, monkeypatch):
    """Every setting arrives, and the figures are those of the weighted sum."""
    given, real = [], rl_trainer.advantages

    def kept(scores, *arguments, **settings):
        given.append((scores, *arguments, settings))
        return real(scores, *arguments, **settings)

    monkeypatch.setattr(rl_trainer, "advantages", kept)
    more = {"axis-weights": "0.5,0,2", "advantage": "per_axis", "advantage-std": "batch", "min-members": 3,
            "advantage-clip": 1.5}  # fmt: skip
    out = tmp_path / "run"
    assert msgrpo.main(flags(data, out, *(x for pair in more.items() for x in pair), steps=2)) == 0
    scores, groups, weights, settings = given[0]
    assert weights == {"integration": 0.5, "consistency": 0.0, "quality": 2.0} and list(map(len, groups)) == [3, 3]
    assert settings == {"kind": "per_axis", "std": "batch", "min_members": 3, "clip": 1.5}
    totals = [0.5 * one["integration"] + 2 * one["quality"] for one in scores.values()]
    first = steps_of(out)[0]
    assert first["reward"] == pytest.approx(statistics.fmean(totals) / 2.5)
    inside = [statistics.pstdev(totals[i : i + 3]) for i in (0, 3)]
    assert first["group_std"] == pytest.approx(statistics.fmean(inside))


def test_pictures_of_the_best_and_the_worst(data, tmp_path, monkeypatch):
    shown, sheet = [], rl_trainer.group_sheet
    monkeypatch.setattr(rl_trainer, "group_sheet", lambda given: shown.append(given) or sheet(given))
    assert msgrpo.main(flags(data, tmp_path / "run", "--sample-every", 1, "--group", 6, steps=2)) == 0
    assert len(shown) == 2 and all(len(one) == 2 for one in shown)
    for (best, its), (worst, others) in ((one.images["best"], one.images["worst"]) for given in shown for one in given):
        assert sum(its.values()) > sum(others.values()) and best.tobytes() != worst.tobytes()


def test_group_shared_sends_fewer_tokens(data, tmp_path):
    tokens = {}
    for visibility in ("full", "group_shared"):
        out = tmp_path / visibility
        assert msgrpo.main(flags(data, out, "--visibility", visibility, "--group", 6, steps=2)) == 0
        tokens[visibility] = steps_of(out)[0]["tokens"]
    assert tokens["group_shared"] < 0.8 * tokens["full"]


# ---- the gate ----


def test_check_ratio_prints_every_timestep_and_trains_nothing(data, tmp_path, capsys):
    assert msgrpo.main(flags(data, tmp_path / "run", "--check-ratio", "true")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[::5]] == ["stage 0", "stage 1"] and len(lines) == 2 * (2 + 3)
    assert all("1.000000000" in line for start in (2, 7) for line in lines[start : start + 3])
    assert not (tmp_path / "run").exists()


def low_precision_latents(monkeypatch):
    real = roller.denoise

    def rounded(packed, pack, *rest):
        real(packed, pack, *rest)
        for member in pack.members:
            member.taken = {i: dataclasses.replace(x, before=x.before.bfloat16()) for i, x in member.taken.items()}

    monkeypatch.setattr(roller, "denoise", rounded)


def dropout(monkeypatch):
    real = roller.RolloutGenerator.training_batch

    def planned(self, *arguments):
        for module in self.model.packed.transformer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
                module.train()
        return real(self, *arguments)

    monkeypatch.setattr(roller.RolloutGenerator, "training_batch", planned)


def moved_weights(monkeypatch):
    real = rl_trainer.RLTrainer._check_on_policy

    def moved(self, batch):
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.05)
        real(self, batch)

    monkeypatch.setattr(rl_trainer.RLTrainer, "_check_on_policy", moved)


def unlike_gradients(monkeypatch):
    real = gate.velocities

    def other(*arguments):
        made = real(*arguments)
        return [v * 1.01 for v in made] if torch.is_grad_enabled() else made

    monkeypatch.setattr(gate, "velocities", other)
    monkeypatch.setattr("uniref_fast.training.rl.rollout.velocities", other)


def unsteady(monkeypatch):
    real = gate.velocities

    def other(*arguments):
        return [v + 1e-3 * torch.randn_like(v) for v in real(*arguments)]

    monkeypatch.setattr(gate, "velocities", other)
    monkeypatch.setattr("uniref_fast.training.rl.rollout.velocities", other)


def test_the_gate_names_the_first_timestep_that_differs(data, tmp_path, monkeypatch, capsys):
    real = roller.denoise

    def late(packed, pack, *rest):
        real(packed, pack, *rest)
        for member in pack.members:
            member.taken[2] = dataclasses.replace(member.taken[2], before=member.taken[2].before + 0.01)

    monkeypatch.setattr(roller, "denoise", late)
    assert msgrpo.main(flags(data, tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert "6 of 18 ratios are not 1. First at timestep 2 (t = 0." in message


def test_a_ratio_that_is_off_once_is_not_forgotten(data, tmp_path, monkeypatch, capsys):
    """The second look, for the cause, finds nothing: the first counts."""
    real, calls = gate.replay, []

    def once(*arguments):
        made = real(*arguments)
        calls.append(made)
        if len(calls) > 1:
            return made
        return [(i, dataclasses.replace(step, mean=step.mean + 0.01)) for i, step in made]

    monkeypatch.setattr(gate, "replay", once)
    assert msgrpo.main(flags(data, tmp_path / "run")) == 1
    assert "a second replay gave another number" in capsys.readouterr().err


def test_every_stage_passes_the_gate(whole):
    """The second has packs of its own."""
    assert [event["step"] for event in events(whole, "on-policy check")] == [0, 2]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (low_precision_latents, "latents are kept in torch.bfloat16"),
        (dropout, "dropout is on"),
        (moved_weights, "weights, packs or latents changed"),
        (unlike_gradients, "keeps gradients differs"),
        (unsteady, "not deterministic"),
    ],
)
def test_the_gate_refuses_and_names_the_cause(data, tmp_path, monkeypatch, capsys, fault, cause):
    fault(monkeypatch)
    assert msgrpo.main(flags(data, tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert "OffPolicyError" in message and cause in message and "First at timestep 0 (t = 1.0000)" in message
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not steps_of(tmp_path / "run")


# ---- the judge ----


def judged(data, out, server, *more, steps=2):
    return flags(data, out, "--rewards", "judge", "--judge.url", server.url, "--judge.backoff", 0.05,
                 "--judge.timeout", 20, "--judge.attempts", 8, "--judge.model", judge_server.MODEL, "--group", 8,
                 "--max-failures", 0.9, *more, steps=steps)  # fmt: skip


def by_content(handler, request):
    """Misbehaves for some results and not for others, whatever the order of the requests."""
    result = judge_server.pictures(request)[-1]
    value = sum(result.resize((1, 1)).getpixel((0, 0)))
    misbehave = {
        0: judge_server.say("I like it"),
        1: judge_server.say(""),
        2: judge_server.say(judge_server.scores(integration=70)),
        3: judge_server.say('{"reasoning": "no scores"}'),
        4: judge_server.status(400),
        5: judge_server.say(judge_server.scores(0, 0, 0).replace("fine", f"it says {judge_server.scores(10, 10, 10)}")),
        6: judge_server.say(f"<think>it says </think>{judge_server.scores(10, 10, 10)}", "length"),
    }.get(value % 13)
    (misbehave or judge_server.say(judge_server.scores(value % 10, value % 7, 5)))(handler, request)


@pytest.fixture(scope="module")
def judged_whole(data, tmp_path_factory):
    """A run with a judge that fails for some rollouts, and the calls it got."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("judged") / "run"
    with judge_server.JudgeServer() as server:
        server.default = by_content
        server.plan = [judge_server.by_colour]  # the check before the run
        assert msgrpo.main(judged(data, out, server)) == 0
        calls = len(server.requests)
    torch.set_num_threads(before)
    return out, calls


def test_failures_are_never_scores(judged_whole):
    """Scores of the log alone, without those that failed, give the means and the spreads that were trained on."""
    out, calls = judged_whole
    log = records(out / "judge", "judge-0")
    assert len(log) + 1 == calls == 1 + 2 * 2 * 8
    for record in steps_of(out):
        mine = [entry for entry in log if entry["step"] == record["step"]]
        scored = [entry["scores"] for entry in mine if "scores" in entry]
        assert {scores["quality"] for scores in scored} == {5}, "scores that the judge gave, none that it quoted"
        assert 0 < len(scored) < len(mine) and record["failures"] == 1 - len(scored) / len(mine)
        assert record["samples"] == len(scored)
        for axis in ("integration", "consistency", "quality"):
            assert record[f"reward/{axis}"] == pytest.approx(statistics.fmean(s[axis] for s in scored))
        groups = {}
        for entry in mine:
            if "scores" in entry:
                groups.setdefault(tuple(entry["key"][:2]), []).append(sum(entry["scores"].values()))
        spreads = [statistics.pstdev(group) for group in groups.values() if len(group) > 1]
        kept = [spread for spread in spreads if spread > 1e-6]
        assert record["group_std"] == pytest.approx(statistics.fmean(kept) if kept else 0.0)
        kinds = {event["failure"] for event in events(out, "no scores") if event["step"] == record["step"]}
        assert kinds and kinds <= {"malformed", "empty", "schema", "status", "truncated"}
        assert record["judge/calls"] == 16
    assert all(record["judge/seconds_p95"] > 0 for record in records(out) if "loss" in record)


def test_a_resumed_run_asks_nothing_twice(data, judged_whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(judged_whole[0], out)
    shutil.rmtree(out / "checkpoints" / "step-000002")
    with judge_server.JudgeServer() as server:
        server.plan = [judge_server.by_colour]
        server.default = judge_server.status(500)
        assert msgrpo.main(judged(data, out, server, "--resume", "auto")) == 0
        assert len(server.requests) == 1, "the check before the run"
    strip = [{k: v for k, v in r.items() if not k.startswith("judge/")} for r in steps_of(out)]
    assert strip == [{k: v for k, v in r.items() if not k.startswith("judge/")} for r in steps_of(judged_whole[0])]
    expected = weights(judged_whole[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())


def test_an_outage_pauses_and_goes_on(data, judged_whole, tmp_path):
    """It begins among the calls of step 0 and lasts until the run has noticed it, however long that takes."""
    out, asked, lock = tmp_path / "run", [], threading.Lock()

    def away():
        server.stop()
        end = time.monotonic() + 60
        while "judge down" not in (out / "events.jsonl").read_text() and time.monotonic() < end:
            time.sleep(0.01)
        server.start()

    def going(handler, request):
        with lock:
            asked.append(request)
            ninth = len(asked) == 9
        if ninth:
            threading.Thread(target=away).start()
        by_content(handler, request)

    with judge_server.JudgeServer() as server:
        server.default, server.plan = going, [judge_server.by_colour]
        assert msgrpo.main(judged(data, out, server)) == 0
    (down,), (back,) = events(out, "judge down"), events(out, "judge back")
    assert down["reason"] and back["seconds"] > 0
    assert [r["reward"] for r in steps_of(out)] == [r["reward"] for r in steps_of(judged_whole[0])]


def test_too_many_failures_end_the_run_and_keep_nothing_of_the_step(data, tmp_path, capsys):
    out = tmp_path / "run"
    with judge_server.JudgeServer() as server:
        server.plan = [judge_server.by_colour, *[by_content] * 16]
        server.default = judge_server.say("nothing to say")
        assert msgrpo.main(judged(data, out, server, "--save-every", 1)) == 1
    message = capsys.readouterr().err
    assert "msgrpo: 16 of 16 rollouts of step 1 got no scores" in message and "malformed" in message
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    with judge_server.JudgeServer() as mended:  # what ended the run is asked again
        mended.plan, mended.default = [judge_server.by_colour], by_content
        assert msgrpo.main([*judged(data, out, mended, "--save-every", 1), "--resume", "auto"]) == 0
    assert [record["step"] for record in steps_of(out)] == [0, 1] and steps_of(out)[1]["failures"] < 1


def test_a_damaged_picture_is_passed_over_with_its_place(data, tmp_path):
    """Its header is whole, so only decoding shows it."""
    shutil.copytree(data, tmp_path / "data")
    row = json.loads((tmp_path / "data" / "train.jsonl").read_text().splitlines()[3])
    path = tmp_path / "data" / row["input_images"][0]
    path.write_bytes(path.read_bytes()[:-200])
    out = tmp_path / "run"
    assert msgrpo.main(flags(tmp_path / "data", out, "--prompts", 6)) == 0
    assert {event["where"].rpartition(":")[2] for event in events(out, "broken row")} == {"4"}


def test_rows_that_cannot_be_rolled_out_are_passed_over_with_their_places(data, tmp_path, monkeypatch):
    """One larger than a pack, one with a picture's token, one that only the text encoder refuses; also resumed."""
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    several = [number for number, row in enumerate(rows) if len(row["input_images"]) == 2]
    long, token, refused = several[:3]
    rows[long]["instruction"] = "red " * 600
    rows[token]["instruction"] += " <|image_pad|>"
    rows[refused]["instruction"] = "the encoder refuses this"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embeddings = samples.prompt_embeddings

    def refusing(pipe, prompt, *rest):
        if prompt == "the encoder refuses this":
            raise ValueError("no such words")
        return embeddings(pipe, prompt, *rest)

    monkeypatch.setattr(samples, "prompt_embeddings", refusing)
    out, again = tmp_path / "run", tmp_path / "again"
    given = ("--prompts", len(several), "--stages.1.references", "multi")  # the first step takes an epoch of them
    assert msgrpo.main(flags(tmp_path / "data", out, *given)) == 0
    found = {event["where"].rpartition(":")[2]: event["reason"] for event in events(out, "broken row")}
    assert set(found) == {str(number + 1) for number in (long, token, refused)}
    assert "over the 512 of a pack" in found[str(long + 1)] and "<|image_pad|>" in found[str(token + 1)]
    assert "no such words" in found[str(refused + 1)]
    assert [record["step"] for record in steps_of(out)] == [0, 1, 2]
    shutil.copytree(out, again)
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    assert msgrpo.main(flags(tmp_path / "data", again, *given, "--resume", "auto")) == 0
    equal_to(out, again)
    assert msgrpo.main(flags(tmp_path / "data", tmp_path / "few", *given, "--max-broken", 2)) == 1


def test_a_damaged_held_out_picture_is_said_at_once(data, tmp_path, capsys):
    """With its place, and not in the middle of the run; the folder is free for the next try."""
    shutil.copytree(data, tmp_path / "data")
    heldout = tmp_path / "data" / "heldout_objects.jsonl"
    path = tmp_path / "data" / json.loads(heldout.read_text().splitlines()[1])["input_images"][0]
    whole_picture = path.read_bytes()
    path.write_bytes(whole_picture[:-200])
    given = flags(tmp_path / "data", tmp_path / "run", "--eval-every", 5, steps=2)
    assert msgrpo.main(given) == 2
    assert "heldout_objects.jsonl:2: " in capsys.readouterr().err
    path.write_bytes(whole_picture)
    assert msgrpo.main(given) == 0


def test_a_model_is_trained_as_it_attends(data, tmp_path, capsys):
    """As the run says that it goes on from, or the one before; another visibility is refused, or said where none is."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert msgrpo.main(flags(data, first, "--visibility", "reference_causal", "--lora-rank", "none", steps=2)) == 0
    assert "nothing says" in events(first, "visibility")[0]["message"]
    assert msgrpo.main(flags(data, second, "--initial", first, "--lora-rank", 2, steps=2)) == 0
    assert events(second, "visibility") == [] and lineage.trained_visibility(second) == "reference_causal"
    assert json.loads((second / "config.json").read_text())["visibility"] == "reference_causal"
    given = configs.parse(
        MSGRPO_RECIPES, flags(data, tmp_path, "--initial", second), extra=msgrpo.RLRunOptions(tmp_path)
    ).config
    assert given.visibility is None and launch.with_visibility(given).visibility == "reference_causal"
    shared = dataclasses.replace(given, visibility="group_shared")
    assert launch.with_visibility(shared).visibility == "group_shared"
    for wrong in ("full", "reference_isolated"):
        assert msgrpo.main(flags(data, tmp_path / "third", "--initial", second, "--visibility", wrong)) == 2
        assert f'visibility = "{wrong}" is not how' in capsys.readouterr().err
    with trainer_of(data, tmp_path / "fourth", "--initial", second) as run:
        assert run.model.packed.visibility == "reference_causal" and not run.generator.shared


def test_a_nan_in_one_update_leaves_the_others(data, tmp_path, monkeypatch):
    real, calls = rl_trainer.Objective.__call__, []

    def sometimes(*arguments, **named):
        one = real(*arguments, **named)
        calls.append(one)
        return dataclasses.replace(one, loss=one.loss * math.nan) if len(calls) == 1 else one

    monkeypatch.setattr(rl_trainer.Objective, "__call__", sometimes)
    out = tmp_path / "run"
    assert msgrpo.main(flags(data, out, "--timesteps", 1, "--updates", 3, "--max-skipped", 2)) == 0
    assert len(events(out, "skipped")) == 1 and all(math.isfinite(record["loss"]) for record in steps_of(out)[1:])


def test_two_held_out_files_of_one_name(data, tmp_path, capsys):
    (tmp_path / "heldout_objects.jsonl").write_text("")
    both = f"{data / 'heldout_objects.jsonl'},{tmp_path / 'heldout_objects.jsonl'}"
    assert msgrpo.main(flags(data, tmp_path / "run", "--heldout", both)) == 2
    assert "two files of held-out rows are called heldout_objects" in capsys.readouterr().err
    assert msgrpo.main(flags(data, tmp_path / "b", "--heldout", tmp_path / "heldout_objects.jsonl")) == 2
    assert "has no held-out rows" in capsys.readouterr().err


def test_a_reward_of_ones_own(data, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "import numpy as np\n"
        "def brightness(candidate):\n"
        "    return {'quality': float(np.asarray(candidate.image).mean()) / 25.5}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert msgrpo.main(flags(data, tmp_path / "run", "--rewards", "own_reward:brightness", steps=2)) == 0
    assert "reward/quality" in steps_of(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rewards", "beauty"), "possible: scene, judge"),
        (("--rewards", "nowhere:f"), "nowhere"),
        (("--clip", "-1"), "clip must be at least 0"),
        (("--window", "9"), "does not fit"),
        (("--kl", "0.1", "--lora-rank", "none"), "lora_rank"),
        (("--group", "1"), "group must be at least 2"),
        (("--initial", "nowhere"), "neither lora/ nor transformer/"),
        (("--stages.0.pack-tokens", "64"), "over the 64 of a pack"),
        (("--sampler", "ddim"), "sde"),
        (("--rewards", "judge", "--judge.url", "http://localhost:9/v1"), "does not answer"),
        (("--min-members", "9"), "more than a group has"),
        (("--max-failures", "-0.5"), "share from 0 to 1"),
        (("--axis-weights", "1,-1,0"), "axis_weights must be at least 0"),
        (("--alarm", "3"), "at least 4 steps"),
        (("--ratio-guard", "true", "--sampler", "cps"), 'ratio_guard weighs steps by the noise of sampler = "sde"'),
    ],
)
def test_wrong_input(data, tmp_path, capsys, more, message):
    assert msgrpo.main(flags(data, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    (said,) = [line for line in error.splitlines() if line.startswith("msgrpo: ")]
    assert message in said and "Traceback" not in error


def test_no_rows_of_a_stages_kind(data, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    single = [json.dumps(row) for row in rows if len(row["input_images"]) == 1]
    (tmp_path / "single.jsonl").write_text("\n".join(single) + "\n")
    status = msgrpo.main(
        flags(data, tmp_path / "run", "--data", tmp_path / "single.jsonl", "--image-folder", data, "--heldout", "")
    )
    assert status == 2 and "no row with two references or more" in capsys.readouterr().err


def test_goes_on_from_an_adapter_and_from_weights(data, whole, tmp_path):
    out = tmp_path / "run"
    assert msgrpo.main(flags(data, out, "--initial", whole, steps=2)) == 0
    assert steps_of(out)[0]["reward"] != steps_of(whole)[0]["reward"], "the same rows and noise, other weights"
    full = tmp_path / "full"
    assert msgrpo.main(flags(data, full, "--lora-rank", "none", steps=2)) == 0
    assert (full / "transformer").is_dir() and not (full / "lora").exists()
    assert msgrpo.main(flags(data, tmp_path / "third", "--initial", full, "--kl", 0.1, steps=2)) == 0
    assert msgrpo.main(flags(data, tmp_path / "fourth", "--initial", whole, "--lora-rank", 4)) == 2


def test_a_run_that_is_refused_since_no_judge_answers_leaves_no_folder(data, tmp_path, capfd):
    out = tmp_path / "run"
    judge = ("--rewards", "judge", "--judge.url", "http://localhost:1/v1", "--judge.model", "none")
    assert msgrpo.main(flags(data, out, *judge)) != 0
    assert "http://localhost:1/v1" in capfd.readouterr().err
    assert not out.exists()
