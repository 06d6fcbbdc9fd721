"""Several rewards of one candidate: how they are weighted, what fails, and functions of one's own."""

import json
import math
import re
import sys
from concurrent.futures import CancelledError

import judge_server
import pytest
from PIL import Image

from uniref_fast.data.dataset import Row
from uniref_fast.rewards import UnscoredError
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.rewards.types import AXES, Candidate, Failure, Scores
from uniref_fast.training.rl.recipes import MSGRPO, RLStage
from uniref_fast.training.rl.rewards import RewardSet

OWN = """
import statistics
import threading
from uniref_fast.rewards import UnscoredError

started, going, seen = threading.Event(), threading.Event(), []

def good(candidate):
    return {"quality": candidate.image.getpixel((0, 0))[0] / 25.5, "mood": 3}

def unscored(candidate):
    raise UnscoredError("too dark to say")

def slow(candidate):
    started.set()
    assert going.wait(20)
    seen.append(candidate.key)
    return {"quality": 1.0}

def raising(candidate):
    raise KeyError("mine")

def dividing(candidate):
    return {"quality": statistics.fmean([])}

def leaving(candidate):
    raise SystemExit

answers = {"number": 5, "nothing": {}, "over": {"quality": 10.5}, "under": {"quality": -0.1},
           "nan": {"quality": float("nan")}, "text": {"quality": "good"}, "none": {"quality": None},
           "digits": {"quality": "7"},
           "one of two": {"quality": 5, "mood": [1, 2]}, "a list": [("quality", 5)], "no answer": None}
edges = {"low": 0, "high": 10, "whole": True}
for name, answer in answers.items():
    globals()[name.replace(" ", "_")] = lambda candidate, answer=answer: answer
def edge(candidate):
    return edges
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own, new for each test."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


@pytest.fixture
def make(tmp_path):
    """Makes reward sets, and closes them."""
    made = []

    def build(*rewards, rank=0, notify=None, **fields):
        config = MSGRPO((RLStage(64, 1, 1e-3),), model="builtin", rewards=rewards, **fields)
        made.append(RewardSet(config, tmp_path / "judge", rank, notify))
        return made[-1]

    yield build
    for each in made:
        each.close()


def candidate(red=51, member=0):
    image = Image.new("RGB", (16, 16), (red, 0, 0))
    return Candidate((0, 0, member), "make it red", (), image, Row("make it red", (), None, None, "rows.jsonl:1"))


def asked(rewards, given=None, step=0):
    futures = rewards.submit(given or candidate(), step)
    return {name: future.result(timeout=20) for name, future in futures.items()}


# ---- weights ----


def test_rewards_weigh_one_by_default(make, own):
    names = ("scene", f"{own}:good")
    assert make(*names).weights == {"scene": 1.0, f"{own}:good": 1.0}
    assert make(*names, reward_weights=(0.5, 2.0)).weights == {"scene": 0.5, f"{own}:good": 2.0}
    with pytest.raises(ValueError, match="one for each of 2 rewards"):
        make(*names, reward_weights=(1.0,))


def test_axes_are_averaged_over_the_rewards_that_score_them(make, own):
    rewards = make("scene", f"{own}:good", reward_weights=(3.0, 1.0))
    scene = Scores({"integration": 2.0, "quality": 8.0})
    found = rewards.combined({"scene": scene, f"{own}:good": Scores({"quality": 4.0, "mood": 1.0})})
    assert found == {"integration": 2.0, "quality": (3 * 8 + 4) / 4, "mood": 1.0}
    assert rewards.combined({"scene": scene}) == dict(scene.axes), "the weight of one alone does not scale it"


def test_a_reward_with_axes_of_its_own_counts_as_its_weight_says(make, own):
    rewards = make("scene", f"{own}:good", reward_weights=(1.0, 0.5))
    given = {"scene": Scores({"integration": 4.0}), f"{own}:good": Scores({"mood": 10.0})}
    axes = rewards.combined(given)
    assert axes == {"integration": 4.0, "mood": 10.0}
    assert rewards.total(axes) == pytest.approx((4.0 + 0.5 * 10.0) / 1.5)
    assert rewards.axis_weights["mood"] == 0.5 and rewards.axis_weights["integration"] == 1.0


def test_a_failure_wins(make, own):
    rewards = make("scene", f"{own}:good")
    bad = Failure("timeout", "60 seconds")
    for results in ({"scene": bad, f"{own}:good": Scores({"quality": 9.0})},
                    {f"{own}:good": Scores({"quality": 9.0}), "scene": bad}):  # fmt: skip
        assert rewards.combined(results) == Failure("timeout", "scene: 60 seconds")
    both = rewards.combined({"scene": bad, f"{own}:good": Failure("refused", "no")})
    assert both == Failure("timeout", "scene: 60 seconds")


def test_the_total_is_the_weighted_mean_of_the_axes(make):
    assert make("scene").total({"integration": 3.0, "consistency": 6.0, "quality": 9.0}) == 6.0
    rewards = make("scene", axis_weights=(2.0, 1.0, 0.0))
    assert rewards.axis_weights == dict(zip(AXES, (2.0, 1.0, 0.0), strict=True))
    assert rewards.total({"integration": 3.0, "consistency": 6.0, "quality": 9.0}) == pytest.approx(4.0)
    assert rewards.total({"integration": 3.0, "mood": 9.0}) == pytest.approx((2 * 3 + 9) / 3), "others weigh 1"
    assert rewards.total({"integration": 10.0}) == 10.0


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_weights_without_a_mean_are_refused(make, own, weights):
    with pytest.raises(ValueError, match=r"reward_weights must be above 0"):
        make("scene", f"{own}:good", reward_weights=weights)


def test_a_reward_given_twice(make):
    with pytest.raises(ValueError, match=r"given twice: scene.*reward_weights"):
        make("scene", "scene", reward_weights=(1.0, 2.0))


# ---- functions of one's own ----


def test_a_function_of_your_own(make, own):
    name = f"{own}:good"
    found = asked(make(name), candidate(red=51))
    assert found == {name: Scores({"quality": 2.0, "mood": 3.0})}
    assert asked(make(f"{own}:edge"))[f"{own}:edge"] == Scores({"low": 0.0, "high": 10.0, "whole": 1.0})


def test_a_candidate_that_cannot_be_scored_is_a_failure(make, own):
    name = f"{own}:unscored"
    rewards = make(name)
    found = asked(rewards)
    assert found == {name: Failure("refused", "too dark to say")}
    assert rewards.combined({name: found[name]}) == Failure("refused", f"{name}: too dark to say")
    assert issubclass(UnscoredError, Exception) and not issubclass(UnscoredError, ValueError)


@pytest.mark.parametrize(
    "name",
    [
        "number",
        "nothing",
        "over",
        "under",
        "nan",
        "text",
        "digits",
        "none",
        "one_of_two",
        "a_list",
        "no_answer",
    ],
)
def test_nonsense_ends_the_run(make, own, name):
    (future,) = make(f"{own}:{name}").submit(candidate(), 0).values()
    with pytest.raises(ValueError, match=rf"{own}:{name}' must return scores from 0 to 10 by axis, .* got"):
        future.result(timeout=20)


@pytest.mark.parametrize(
    ("name", "raised", "line"),
    [
        ("raising", "KeyError: 'mine'", 'raise KeyError("mine")'),
        ("dividing", "StatisticsError: fmean requires at least one data point", "statistics.fmean"),  # in a library
        ("leaving", "SystemExit", "raise SystemExit"),
    ],
)
def test_any_other_exception_ends_the_run_and_is_named_with_its_line(make, own, tmp_path, name, raised, line):
    (future,) = make(f"{own}:{name}").submit(candidate(), 0).values()
    number = next(i for i, text in enumerate(OWN.splitlines(), 1) if line in text)
    place = f"{tmp_path / 'own_rewards.py'}:{number}"
    with pytest.raises(
        ValueError, match=re.escape(f"reward 'own_rewards:{name}' raised {raised} at {place};")
    ) as caught:
        future.result(timeout=20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nx = y\n", "NameError: name 'y' is not defined at PATH:2"),
        ("def f(:\n", "SyntaxError: invalid syntax (broken_rewards.py, line 1)"),
    ],
)
def test_a_module_that_raises_an_error_is_named_with_its_line(make, tmp_path, monkeypatch, text, message):
    path = tmp_path / "broken_rewards.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = f"the module of reward 'broken_rewards:f' raised {message.replace('PATH', str(path))}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        make("broken_rewards:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beauty", "unknown reward 'beauty'; possible: scene, judge, or \"package.module:function\""),
        ("", "unknown reward ''"),
        ("Scene", "unknown reward 'Scene'"),
        ("nowhere.at.all:f", "No module named 'nowhere'"),
        ("own_rewards:absent", "no attribute 'absent'"),
        ("own_rewards:answers", "own_rewards:answers' is not a function but {"),
        ("own_rewards:", "unknown reward 'own_rewards:'"),
        (":good", "unknown reward ':good'"),
        ("os:getcwd", "reward 'os:getcwd' cannot be called with a candidate (too many positional arguments)"),
        ("builtins:divmod", "reward 'builtins:divmod' cannot be called with a candidate (missing a required argument"),
    ],
)
def test_rewards_that_do_not_exist_or_take_no_candidate(make, own, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(name)


# ---- asking ----


def test_submit_returns_at_once_and_close_drops_waiting_candidates(make, own):
    name = f"{own}:slow"
    rewards = make(name)
    first = rewards.submit(candidate(member=0), 0)[name]
    module = sys.modules[own]
    assert module.started.wait(20) and not first.done()
    waiting = [rewards.submit(candidate(member=i), 0)[name] for i in (1, 2)]
    rewards.close()
    module.going.set()
    assert first.result(timeout=20) == Scores({"quality": 1.0})
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(timeout=20)
    assert module.seen == [(0, 0, 0)]


def test_every_candidate_gets_its_own_scores(make, own):
    name = f"{own}:good"
    rewards = make(name)
    futures = [rewards.submit(candidate(red=red, member=red), 0)[name] for red in range(0, 250, 10)]
    found = [future.result(timeout=20).axes["quality"] for future in futures]
    assert found == [red / 25.5 for red in range(0, 250, 10)]


def test_without_a_judge(make, tmp_path):
    rewards = make("scene", judge=JudgeConfig(url="http://localhost:9/v1"))
    assert rewards.judge is None and rewards.statistics() == {}
    assert set(rewards.submit(candidate(), 0)) == {"scene"}
    assert not (tmp_path / "judge").exists()


def test_with_a_judge(make, own, tmp_path):
    """The log has the number of the rank; earlier calls are answered from the logs of all ranks."""
    name = f"{own}:good"
    with judge_server.JudgeServer() as server:
        given = {"judge": JudgeConfig(url=server.url, model=judge_server.MODEL), "reward_weights": (1.0, 3.0)}
        rewards = make("judge", name, rank=2, **given)
        found = asked(rewards, candidate(red=51), step=4)
        assert found["judge"] == Scores({"integration": 51 % 11, "consistency": 0, "quality": 0})
        assert rewards.combined(found)["quality"] == pytest.approx((0 + 3 * 2.0) / 4)
        assert rewards.statistics()["calls"] == 1
        rewards.close()
        (record,) = [json.loads(line) for line in (tmp_path / "judge" / "judge-2.jsonl").read_text().splitlines()]
        assert record["step"] == 4 and tuple(record["key"]) == (0, 0, 0)
        assert len(server.requests) == 1
        resumed = make("judge", name, rank=0, **given)
        assert asked(resumed, candidate(red=51), step=4) == found and len(server.requests) == 1
        resumed.close()
        asked(make("judge", name, rank=1, **given), candidate(red=52), step=4)
        assert len(server.requests) == 2


def test_a_module_of_the_working_directory_is_found(make, tmp_path, monkeypatch):
    (tmp_path / "rewards_here.py").write_text("def flat(candidate):\n    return {'quality': 5}\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert asked(make("rewards_here:flat"), candidate())["rewards_here:flat"] == Scores({"quality": 5.0})


def test_the_ratio_check_asks_no_judge():
    rewards = RewardSet(MSGRPO((RLStage(64, 1, 1e-3),), model="builtin", rewards=("judge", "scene")), None, 0)
    assert rewards.judge is None and set(rewards.submit(candidate(), 0)) == {"scene"}
    rewards.close()


def test_weights_of_axes_that_give_no_mean(make):
    for weights in ((1.0, -1.0, 0.0), (float("nan"), 1.0, 1.0), (math.inf, 1.0, 1.0)):
        with pytest.raises(ValueError, match="axis_weights must be at least 0"):
            make("scene", axis_weights=weights)
    with pytest.raises(ValueError, match="the weight 0: quality"):
        make("scene", axis_weights=(1.0, 0.0, 0.0)).total({"quality": 4.0})


def test_a_reward_that_scores_only_axes_without_a_weight_is_refused(make, own):
    """Refuse it also if another reward scores the other axes; an axis of another name always weighs 1."""
    name = f"{own}:good"
    rewards = make("scene", name, axis_weights=(1.0, 0.5, 0.0))
    scene = Scores({"integration": 2.0, "quality": 8.0})
    assert rewards.combined({"scene": scene, name: Scores({"mood": 1.0})}) == {**scene.axes, "mood": 1.0}
    with pytest.raises(ValueError, match="own_rewards:good' has no effect: it scores quality, with") as caught:
        rewards.combined({"scene": scene, name: Scores({"quality": 1.0})})
    assert "the axes with a weight are integration 1, consistency 0.5, and each" in str(caught.value)
    with pytest.raises(ValueError, match=r"'scene' has no effect.* are none of integration, consistency, quality"):
        make("scene", axis_weights=(0.0, 0.0, 0.0)).combined({"scene": scene})
