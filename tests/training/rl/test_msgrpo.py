"""MSGRPO runs from end to end, on a small model: exact resume, ranks, a judge that misbehaves, refusals."""

import contextlib
import shutil
import statistics
import threading
import time
from pathlib import Path

import judge_server
import pytest
import torch
import warm
from msgrpo_runs import assert_same_run, events, flags, records, steps_of, weights

from uniref_fast import cli
from uniref_fast import flags as configs
from uniref_fast.training import msgrpo
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.encoders import Encoders
from uniref_fast.training.rl import generator as generation
from uniref_fast.training.rl import on_policy
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.rl.trainer import RLTrainer

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]


@contextlib.contextmanager
def one_thread():
    """Use one thread in a fixture of the module, as the fixture `threads` does in a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- a run, and its resume ----


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of three steps and two stages, without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with one_thread():
        assert msgrpo.main(flags(data, out, "--sample-every", 2, "--eval-every", 3)) == 0
    return out


def test_export_writes_the_adapter_of_the_run(whole, tmp_path):
    last = max(int(path.name.removeprefix("step-")) for path in (whole / "checkpoints").iterdir())
    assert cli.main(["export", str(whole), "--step", str(last), "--out", str(tmp_path / "out")]) == 0
    exported, own = weights(tmp_path / "out"), weights(whole)
    assert exported.keys() == own.keys() and all(torch.equal(exported[name], own[name]) for name in own)


def test_freed_encoders_change_nothing_and_the_vae_is_there_for_rollouts_only(data, whole, tmp_path, monkeypatch):
    update, loaded, load = RLTrainer.update, [], Encoders._loaded

    def updated(run, *args):
        assert run.model.pipe.vae is None and run.model.pipe.text_encoder is None
        return update(run, *args)

    def watched(encoders, name):
        loaded.append(name)
        return load(encoders, name)

    monkeypatch.setattr(RLTrainer, "update", updated)
    monkeypatch.setattr(Encoders, "_loaded", watched)
    more = ("--sample-every", 2, "--eval-every", 3, "--encoders", "free", "--cache", tmp_path / "cache")
    assert msgrpo.main(flags(data, tmp_path / "run", *more)) == 0
    assert_same_run(tmp_path / "run", whole)
    assert set(loaded) == {"vae"} and len(loaded) >= 3
    (event,) = events(tmp_path / "run", "encoded")
    assert 0 < event["now"] == event["rows"] <= 2 * 3 + 3


def test_the_records_of_a_run(whole):
    first = records(whole)[0]
    assert {"eval/heldout_objects", "eval/heldout_objects/quality"} <= set(first)
    found = steps_of(whole)
    assert [record["step"] for record in found] == [0, 1, 2]
    names = {"reward", "reward_std", "reward/integration", "reward/consistency", "reward/quality", "group_std"}
    assert names | {"ratio", "zero_spread", "clip_fraction", "failures", "grad_norm"} <= set(found[0])
    assert found[0]["ratio_min"] == found[0]["ratio_max"] == 1.0 and found[0]["grad_norm"] > 0
    checks = events(whole, "on-policy check")
    assert [check["step"] for check in checks] == [0, 2], "once for each stage, which has packs of its own"
    assert all(check["timesteps"] == 3 and check["worst_log_ratio"] == 0.0 for check in checks)
    assert [event["number"] for event in events(whole, "stage")] == [0, 1]
    assert [event["step"] for event in events(whole, "sampler")] == [0, 2]
    warnings = [event["message"] for event in events(whole, "noise too large")]
    assert len(warnings) == 2 and all("set noise to" in message for message in warnings), "0.7 is much for 4 steps"
    assert {path.name for path in (whole / "samples").iterdir()} >= {"groups-000001.png", "heldout-000002.png"}
    assert any(tensor.abs().sum() > 0 for name, tensor in weights(whole).items() if "lora_B" in name)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from uniref_fast.training import msgrpo
from uniref_fast.training.core import processes
from uniref_fast.training.rl.generator import RolloutGenerator
submit, packs = RolloutGenerator._submit, []
def dying(self, batch, pack, step):
    packs.append(pack)
    if step == 1 and len(packs) % 2 == 0:
        os.kill(os.getpid(), signal.{signal})
    submit(self, batch, pack, step)
RolloutGenerator._submit = dying
processes.leave(msgrpo.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", -9), ("SIGTERM", 143)])
def test_a_run_that_is_stopped_in_the_middle_of_a_group_resumes_exactly(data, whole, tmp_path, name, status):
    """Rollouts and their noise are keyed, so that the lost part of the step is repeated bit for bit."""
    out = tmp_path / "run"
    done = warm.run("-c", KILLED.replace("{signal}", name), *flags(data, out, "--packs", 2))
    assert done.returncode == status, done.stderr[-2000:]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert msgrpo.main(flags(data, out, "--packs", 2, "--resume", "auto")) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_an_adapter_of_another_kind_is_on_policy_and_turned_off_for_the_divergence(data, tmp_path, kind):
    """A replay repeats its rollout, and the policy before the run has no divergence from that of its first step."""
    out = tmp_path / "run"
    assert msgrpo.main(flags(data, out, "--adapter", kind, "--kl", 0.1, steps=2)) == 0
    first, second = steps_of(out)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6
    assert any(".lokr_w1" in name or "magnitude" in name for name in weights(out))


@pytest.fixture
def begun(whole, tmp_path):
    """A copy of the whole run as it was after its first step."""
    out = tmp_path / "begun"
    shutil.copytree(whole, out)
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"step-{step:06d}")
    shutil.rmtree(out / "lora")
    return out


def test_the_state_of_the_detector_is_kept_unless_the_rewards_change(data, begun):
    """The course of the reward means nothing across a change of its weights."""
    ranks = Ranks.start()
    try:
        for more, kept in (((), 1), (("--kl", 0.1), 1), (("--axis-weights", "1,1,2"), 0)):
            config = configs.parse(MSGRPO_RECIPES, flags(data, begun, *more), extra=msgrpo.RLRunOptions(begun)).config
            trainer = RLTrainer(config, ranks, begun, 1)
            assert len(trainer.detector.state()) == kept
            trainer.close()
    finally:
        torch.distributed.destroy_process_group()


# ---- ranks ----

two_ranks = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")


@two_ranks
def test_two_ranks_resume_a_run_of_one(data, whole, begun):
    """Step 1 has the same rollouts and scores bit for bit; its gradients are summed in another order."""
    more = ("--sample-every", 2, "--eval-every", 3, "--resume", "auto")
    warm.run_ranks(2, "training/msgrpo.py", *flags(data, begun, *more))
    found, expected = steps_of(begun), steps_of(whole)
    assert found[0] == expected[0] and len(found) == 3
    exact = ("reward", "reward/quality", "group_std", "ratio_max", "tokens")
    assert [found[1][name] for name in exact] == [expected[1][name] for name in exact]
    for one, other in zip(found, expected, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@two_ranks
def test_two_ranks_share_packs(data, tmp_path):
    """Each rank has half of the tokens of every pack; the ratio is still 1, and scores differ by rounding only.

    In the rollouts, each rank keeps the references of half of the heads.
    """
    shared = ("--rollout-true-cfg-scale", 2, "--visibility", "reference_causal", "--keep-references", "true")
    more = ("--stages.0.sequence-parallel", 2, "--stages.1.sequence-parallel", 2, *shared)
    warm.run_ranks(2, "training/msgrpo.py", *flags(data, tmp_path / "run", *more, steps=2))
    found = steps_of(tmp_path / "run")
    assert events(tmp_path / "run", "on-policy check")[0]["worst_log_ratio"] <= on_policy.TOLERANCE
    alone = tmp_path / "alone"
    assert msgrpo.main(flags(data, alone, *shared, steps=2)) == 0
    for one, other in zip(found, steps_of(alone), strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3)


# ---- the on-policy check ----


@pytest.mark.parametrize("more", [(), ("--base", "nf4", "--offload-blocks", 1)])
def test_check_ratio_prints_every_timestep_and_trains_nothing(data, tmp_path, capsys, more):
    if more:
        pytest.importorskip("bitsandbytes")
    assert msgrpo.main(flags(data, tmp_path / "run", "--check-ratio", "true", *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[::5]] == ["stage 0", "stage 1"] and len(lines) == 2 * (2 + 3)
    assert all("1.000000000" in line for start in (2, 7) for line in lines[start : start + 3])
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_off_policy_ends_before_it_trains(data, tmp_path, monkeypatch, capsys):
    real = generation.denoise

    def dropout_in_the_rollout(packed, pack, *rest):
        for module in packed.transformer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
                module.train()
        real(packed, pack, *rest)

    monkeypatch.setattr(generation, "denoise", dropout_in_the_rollout)
    assert msgrpo.main(flags(data, tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert "msgrpo: the replay does not repeat the rollout" in message and "dropout is on" in message
    assert "First at timestep 0 (t = 1.0000)" in message
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not steps_of(tmp_path / "run")


# ---- the judge ----


def judged(data, out, server, *more, steps=2):
    return flags(data, out, "--rewards", "judge", "--judge.url", server.url, "--judge.backoff", 0.05,
                 "--judge.timeout", 20, "--judge.attempts", 8, "--judge.model", judge_server.MODEL, "--group", 8,
                 "--max-failures", 0.9, *more, steps=steps)  # fmt: skip


def by_content(handler, request):
    """Fail for some results and score the others, whatever the order of the requests."""
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
    """A run with a judge that fails for some rollouts, and the number of calls that it got."""
    out = tmp_path_factory.mktemp("judged") / "run"
    with judge_server.JudgeServer() as server, one_thread():
        server.default = by_content
        server.plan = [judge_server.by_colour]  # the check before the run
        assert msgrpo.main(judged(data, out, server)) == 0
        calls = len(server.requests)
    return out, calls


def test_failures_are_never_scores(judged_whole):
    """The scores in the log, without the failures, give the means and standard deviations that were trained on."""
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
        stds = [statistics.pstdev(group) for group in groups.values() if len(group) > 1]
        kept = [std for std in stds if std > 1e-6]
        assert record["group_std"] == pytest.approx(statistics.fmean(kept) if kept else 0.0)
        kinds = {event["failure"] for event in events(out, "no scores") if event["step"] == record["step"]}
        assert kinds and kinds <= {"malformed", "empty", "schema", "status", "truncated"}
        assert record["judge/calls"] == 16
    assert all(record["judge/seconds_p95"] > 0 for record in records(out) if "loss" in record)


def test_a_run_waits_out_an_outage_and_its_resume_repeats_no_call(data, judged_whole, tmp_path):
    """The outage begins among the calls of step 0 and lasts until the run has noticed it."""
    out, requests, lock = tmp_path / "run", [], threading.Lock()

    def away():
        server.stop()
        end = time.monotonic() + 60
        while "judge down" not in (out / "events.jsonl").read_text() and time.monotonic() < end:
            time.sleep(0.01)
        server.start()

    def going(handler, request):
        with lock:
            requests.append(request)
            ninth = len(requests) == 9
        if ninth:
            threading.Thread(target=away).start()
        by_content(handler, request)

    with judge_server.JudgeServer() as server:
        server.default, server.plan = going, [judge_server.by_colour]
        assert msgrpo.main(judged(data, out, server)) == 0
    (down,), (back,) = events(out, "judge down"), events(out, "judge back")
    assert down["reason"] and back["seconds"] > 0
    assert [r["reward"] for r in steps_of(out)] == [r["reward"] for r in steps_of(judged_whole[0])]

    shutil.rmtree(out / "checkpoints" / "step-000002")
    with judge_server.JudgeServer() as server:
        server.plan, server.default = [judge_server.by_colour], judge_server.status(500)
        assert msgrpo.main(judged(data, out, server, "--resume", "auto")) == 0
        assert len(server.requests) == 1, "the check before the run"
    found, expected = (
        [{k: v for k, v in r.items() if not k.startswith("judge/")} for r in steps_of(one)]
        for one in (out, judged_whole[0])
    )
    assert found == expected
    wanted = weights(judged_whole[0])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(out).items())


# ---- refusals ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rewards", "beauty"), "possible: scene, judge"),
        (("--clip", "-1"), "clip must be at least 0"),
        (("--initial", "nowhere"), "neither lora/ nor transformer/"),
        (("--stages.0.pack-tokens", "64"), "over the 64 of a pack"),
        (("--rewards", "judge", "--judge.url", "http://localhost:9/v1"), "does not answer"),
        (("--min-members", "9"), "more than a group has"),
    ],
)
def test_wrong_input_is_refused_in_one_line(data, tmp_path, capfd, more, message):
    assert msgrpo.main(flags(data, tmp_path / "run", *more)) == 2
    error = capfd.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("msgrpo: ") and "msgrpo: recipe " not in line]
    assert message in line and "Traceback" not in error
    assert "pack-tokens" in more[0] or not (tmp_path / "run").exists(), "a run that is refused leaves no folder"
