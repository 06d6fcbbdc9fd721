import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniref_fast.flags import ConfigError, Parsed, differences, from_json, parse, to_json


@dataclass(frozen=True)
class Adam:
    """AdamW.

    Attributes:
        lr: learning rate; 100% of it after the warm-up.
        betas: decay rates of the two averages.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr must not be negative, got {self.lr}")


@dataclass(frozen=True)
class Stage:
    side: int
    steps: int = 10


@dataclass(frozen=True)
class Base:
    """What runs share.

    Attributes:
        seed: of all random numbers.
    """

    seed: int = 0


@dataclass(frozen=True)
class Run(Base):
    """One run: everything it depends on.

    Attributes:
        pack_tokens: most tokens of a pack; a sample that is larger
            is an error.
        packs, ranks: packs of a step, and how many
            share them.
        precision: of the weights.
        optimizer: how weights move.
        stages: pixel budgets, one after another.

    Not this: it is no attribute.
    """

    pack_tokens: int = 32768
    packs: int = 8
    ranks: int = 1
    ema: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    level: Literal[1, 2, "all"] = 1
    name: str = "run"
    note: str | None = None
    clip: Optional[float] = 1.0  # noqa: UP045  (the old spelling works as well)
    out: Path = Path("out")
    resume: Path | None = None
    data: tuple[Path, ...] = ()
    weights: tuple[float, ...] | None = None
    modes: tuple[Literal["edit", "compose"], ...] = ("edit",)
    optimizer: Adam = field(default_factory=Adam)
    stages: tuple[Stage, ...] = (Stage(1024), Stage(1536, 20))
    derived: int = field(init=False, default=7)

    def __post_init__(self):
        if self.packs % self.ranks:
            raise ValueError(f"{self.packs} packs do not divide by {self.ranks} ranks")


@dataclass(frozen=True)
class Options:
    dry_run: bool = False
    every: int | None = None


def small():
    """A run of seconds.

    This is not in the help.
    """
    return Run(pack_tokens=2048, stages=(Stage(64),))


RECIPES = {"paper": Run, "small": small}


def run(*argv):
    return parse(RECIPES, argv).config


# ---- flags ----


def test_recipes():
    assert parse(RECIPES, []) == Parsed("paper", Run(), None)
    assert parse(RECIPES, ["--recipe", "small"]) == Parsed("small", small(), None)
    assert run("--name=x", "--recipe=small").pack_tokens == 2048  # anywhere


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--pack-tokens", "16_384"], "pack_tokens", 16384),
        (["--pack_tokens=5"], "pack_tokens", 5),
        (["--seed", "-3"], "seed", -3),  # one dash is a value
        (["--ema", "false"], "ema", False),
        (["--ema=True"], "ema", True),
        (["--precision", "fp32"], "precision", "fp32"),
        (["--level", "2"], "level", 2),
        (["--level=all"], "level", "all"),
        (["--name", ""], "name", ""),
        (["--name=--a=b"], "name", "--a=b"),
        (["--name", "none"], "name", "none"),  # a plain text: no None here
        (["--note", "two words"], "note", "two words"),
        (["--note", "none"], "note", None),
        (["--clip", "none"], "clip", None),
        (["--clip", "2"], "clip", 2.0),
        (["--out", "a/b"], "out", Path("a/b")),
        (["--resume", "x"], "resume", Path("x")),
        (["--data", "a,b/c"], "data", (Path("a"), Path("b/c"))),
        (["--data="], "data", ()),
        (["--weights", "1,-2e-3,3"], "weights", (1.0, -0.002, 3.0)),
        (["--weights", "none"], "weights", None),
        (["--modes", "compose,edit"], "modes", ("compose", "edit")),
        (["--optimizer.lr", "1e-5", "--optimizer.betas=0.8,0.9"], "optimizer", Adam(1e-5, (0.8, 0.9))),
        (["--stages.1.steps", "7"], "stages", (Stage(1024), Stage(1536, 7))),
        (["--stages.0.steps", "1", "--stages.1.side=2"], "stages", (Stage(1024, 1), Stage(2, 20))),
    ],
)
def test_fields_by_name(argv, name, value):
    config = run(*argv)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert {change.split(":")[0].split(".")[0] for change in differences(Run(), config)} <= {name}  # and nothing else


def test_checks_see_all_overrides_at_once():
    assert run("--packs", "9", "--ranks", "3").packs == 9
    assert run("--ranks", "3", "--packs", "9").packs == 9
    with pytest.raises(ConfigError, match="8 packs do not divide by 3"):
        run("--ranks", "3")
    with pytest.raises(ConfigError, match=r"optimizer: lr must not be negative, got -1\.0"):
        run("--optimizer.lr", "-1")


def test_options_beside_the_run():
    parsed = parse(RECIPES, ["--dry-run", "true", "--seed", "4", "--every=2"], extra=Options())
    assert parsed == Parsed("paper", Run(seed=4), Options(True, 2))
    with pytest.raises(ConfigError, match="unknown flag --dry-runs; nearest: --dry-run;"):
        parse(RECIPES, ["--dry-runs", "true"], extra=Options())
    with pytest.raises(TypeError, match="--seed would have two meanings"):
        parse(RECIPES, [], extra=Base())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--pack-token", "1"], "unknown flag --pack-token; nearest: --pack-tokens; --help lists all"),
        (["--lr", "1"], "unknown flag --lr; nearest: --optimizer.lr;"),
        (["--optimiser.lr", "1"], "unknown flag --optimiser.lr; nearest: --optimizer.lr;"),
        (["--optimizer.l", "1"], "nearest: --optimizer.lr;"),
        (["--stages.2.steps", "1"], "unknown flag --stages.2.steps; nearest: --stages.0.steps"),
        (["--optimizer", "sgd"], "--optimizer is a group; it has --optimizer.lr, --optimizer.betas"),
        (["--stages", "3"], "--stages is a group; it has --stages.0.side, --stages.0.steps, --stages.1.side"),
        (["--derived", "3"], "unknown flag --derived"),  # not given to the constructor
        (["--seed", "1e3"], "--seed expects integer, got '1e3'"),
        (["--seed", "1.0"], "--seed expects integer"),
        (["--seed", "1__0"], "--seed expects integer"),
        (["--seed", ""], "--seed expects integer, got ''"),
        (["--seed", "\u0663"], "--seed expects integer"),  # a digit for int(), not for a reader
        (["--clip", "fast"], r"--clip expects number\|none, got 'fast'"),
        (["--clip", "nan"], r"--clip expects number\|none, got 'nan'"),
        (["--clip", "1e999"], r"--clip expects number\|none"),
        (["--ema", "yes"], r"--ema expects true\|false, got 'yes'"),
        (["--ema", "none"], r"--ema expects true\|false"),
        (["--ema"], r"--ema needs a value: true\|false"),
        (["--ema", "--seed", "1"], r"--ema needs a value: true\|false"),
        (["--precision", "fp16"], r"--precision expects bf16\|fp32, got 'fp16'"),
        (["--level", "3"], r"--level expects 1\|2\|all, got '3'"),
        (["--out", ""], "--out expects path, got ''"),
        (["--out", "a", "--out", "b"], "--out is given twice"),
        (["--pack-tokens=1", "--pack_tokens=1"], "--pack_tokens is given twice"),
        (["--weights", "1,x"], r"--weights expects number,...\|none, got '1,x'"),
        (["--weights", "1,"], "--weights expects number"),
        (["--data", "a,,b"], "--data expects path,..., got 'a,,b'"),
        (["--modes", "edit,crop"], r"--modes expects edit\|compose,..., got 'edit,crop'"),
        (["--optimizer.betas", "0.9"], "--optimizer.betas expects number,number, got '0.9'"),
        (["--optimizer.betas", "1,2,3"], "--optimizer.betas expects number,number"),
        (["--optimizer.betas="], "--optimizer.betas expects number,number, got ''"),
        (["train"], "'train' is not a flag; flags are --name value"),
        (["-x", "3"], "'-x' is not a flag"),
        (["--"], "'--' is not a flag"),
        (["--=3"], "'--=3' is not a flag"),
        (["--seed", "1", "2"], "'2' is not a flag"),
        (["--recipe", "papers"], "there is no recipe 'papers'; nearest: paper; possible: paper, small"),
        (["--recipe"], "--recipe needs the name of a recipe; possible: paper, small"),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(ConfigError, match=message):
        run(*argv)


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as stopped:
            parse(RECIPES, [flag, "--recipe", "small"], extra=Options(), prog="train", description="Train it.")
        assert stopped.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "usage: train [--recipe NAME] [--FIELD VALUE ...]" and "Train it." in lines
    assert "--recipe small A run of seconds." in lines
    joined = " ".join(lines)
    for expected in (
        "--seed integer of all random numbers (0)",  # from the base class
        "--pack-tokens integer most tokens of a pack; a sample that is larger is an error (2048)",  # of the recipe
        "--packs integer packs of a step, and how many share them (8)",
        "--ranks integer packs of a step, and how many share them (1)",
        "--ema true|false (true)",
        "--precision bf16|fp32 of the weights (bf16)",
        "--note text|none (none)",
        "--data path,... (empty)",
        "--optimizer.lr number learning rate; 100% of it after the warm-up (4e-4)",
        "--optimizer.betas number,number decay rates of the two averages (0.9,0.95)",
        "optimizer: how weights move.",
        "--stages.0.side integer (64)",
        "--dry-run true|false (false)",
    ):
        assert expected in joined
    assert "stages.1" not in joined and "derived" not in joined and "not in the help" not in joined
    for name in ("seed", "level", "name", "clip", "out", "resume", "weights", "modes", "stages.0.steps", "every"):
        assert joined.count(f"--{name} ") == 2  # each once in each of the two texts


# ---- JSON ----

paths = st.text("ab/.é", min_size=1).map(Path)
floats = st.floats(allow_nan=False, allow_infinity=False)
runs = st.builds(
    Run,
    seed=st.integers(),
    pack_tokens=st.integers(),
    ema=st.booleans(),
    precision=st.sampled_from(["bf16", "fp32"]),
    level=st.sampled_from([1, 2, "all"]),
    name=st.text(),
    note=st.none() | st.text(),
    clip=st.none() | floats,
    out=paths,
    resume=st.none() | paths,
    data=st.lists(paths).map(tuple),
    weights=st.none() | st.lists(floats).map(tuple),
    modes=st.lists(st.sampled_from(["edit", "compose"])).map(tuple),
    optimizer=st.builds(Adam, lr=floats.map(abs), betas=st.tuples(floats, floats)),
    stages=st.lists(st.builds(Stage, st.integers(), st.integers()), max_size=3).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(runs)
def test_json_round_trip(config):
    again = from_json(Run, to_json(config))
    assert again == config and repr(again) == repr(config)
    assert differences(config, again) == []


@settings(max_examples=50, deadline=None)
@given(runs, runs)
def test_differences_are_those_of_json(a, b):
    def flat(data, name=""):
        if isinstance(data, dict):
            return {k: v for key, value in data.items() for k, v in flat(value, f"{name}.{key}".lstrip(".")).items()}
        if name == "stages":
            return {k: v for i, value in enumerate(data) for k, v in flat(value, f"{name}.{i}").items()}
        return {name: data}

    x, y = (flat(json.loads(to_json(config))) for config in (a, b))
    expected = {name for name in x | y if x.get(name, "absent") != y.get(name, "absent")}
    assert {line.split(":")[0] for line in differences(a, b)} == expected


def test_json_is_for_people():
    assert json.loads(to_json(small()))["optimizer"] == {"lr": 0.0004, "betas": [0.9, 0.95]}
    assert "derived" not in to_json(small())
    assert from_json(Run, '{"clip": 1, "optimizer": {"lr": 1}, "stages": [{"side": 4}]}') == Run(
        clip=1.0, optimizer=Adam(1.0), stages=(Stage(4),)
    )
    assert type(from_json(Run, '{"clip": 1}').clip) is float
    assert from_json(Run, "{}") == Run()
    undecodable = Run(name="\udcff")  # a byte of the command line that is not UTF-8
    assert from_json(Run, to_json(undecodable).encode().decode()) == undecodable


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"pack_token": 1}', "unknown key pack_token; nearest: pack_tokens; known: seed, pack_tokens, "),
        ('{"optimizer": {"rl": 1}}', "unknown key optimizer.rl; nearest: lr; known: lr, betas"),
        ('{"stages": [{"side": 1, "step": 2}]}', "unknown key stages.0.step; nearest: steps"),
        ('{"derived": 1}', "unknown key derived"),
        ('{"stages": [{"side": 1}, {"steps": 2}]}', "missing without a default: stages.1.side"),
        ('{"seed": 1, "seed": 2}', "gives 'seed' 2 times"),
        ('{"seed": 1.0}', "seed must be integer, not 1.0"),
        ('{"seed": true}', "seed must be integer, not true"),
        ('{"seed": "1"}', 'seed must be integer, not "1"'),
        ('{"seed": null}', "seed must be integer, not null"),
        ('{"ema": 1}', r"ema must be true\|false, not 1"),
        ('{"clip": true}', r"clip must be number\|none, not true"),
        ('{"clip": NaN}', r"clip must be number\|none, not NaN"),
        ('{"clip": Infinity}', "clip must be number"),
        ('{"clip": 1e999}', "clip must be number"),
        ('{"clip": 1%s}' % ("0" * 400), "clip must be number"),
        ('{"name": 3}', "name must be text, not 3"),
        ('{"out": ""}', 'out must be path, not ""'),
        ('{"precision": "fp16"}', r'precision must be bf16\|fp32, not "fp16"'),
        ('{"level": true}', r"level must be 1\|2\|all, not true"),  # True == 1
        ('{"data": "a"}', 'data must be path,..., not "a"'),
        ('{"data": ["a", 1]}', "data.1 must be path, not 1"),
        ('{"optimizer": {"betas": [1]}}', "optimizer.betas must be number,number, not "),
        ('{"optimizer": 3}', "optimizer must be object with the keys lr, betas, not 3"),
        ('{"optimizer": null}', "optimizer must be object"),
        ('{"stages": {"side": 1}}', "stages must be object with the keys side, steps,..., not"),
        ('{"optimizer": {"lr": -1}}', "optimizer: lr must not be negative"),
        ('{"ranks": 3}', "8 packs do not divide by 3 ranks"),
        ("[]", "the JSON must be object with the keys seed, "),
        ("", "not JSON"),
        ('{"seed": 1', "not JSON: .*line 1"),  # truncated
    ],
)
def test_wrong_json(text, message):
    with pytest.raises(ConfigError, match=message):
        from_json(Run, text)


@pytest.mark.parametrize(
    "config, message",
    [
        (Run(clip=math.nan), "clip must be number"),
        (Run(weights=(1.0, math.inf)), "weights.1 must be number"),
        (Run(data=[Path("a")]), "would not come back .* data: "),  # a list would come back as a tuple
        (Run(out="a"), "would not come back .* out: "),
        (Run(seed=1.5), "seed must be integer, not 1.5"),
        (Run(seed={1}), "seed must be integer"),
        (Run(precision="int8"), "precision must be"),
        (Run(optimizer=Stage(1)), "unknown key optimizer.side"),
    ],
)
def test_what_json_cannot_keep_is_not_written(config, message):
    with pytest.raises(ConfigError, match=message):
        to_json(config)


def test_differences():
    assert differences(Run(), Run()) == []
    changed = Run(
        name="a b",
        note="",
        clip=None,
        ema=False,
        data=(Path("x"), Path("y")),
        optimizer=Adam(2e-4),
        stages=(Stage(64),),
    )
    assert differences(Run(), changed) == [
        "ema: true -> false",
        "name: run -> 'a b'",
        "note: none -> ''",
        "clip: 1.0 -> none",
        "data: empty -> x,y",
        "optimizer.lr: 4e-4 -> 2e-4",
        "stages.0.side: 1024 -> 64",
        "stages.1.side: 1536 -> absent",
        "stages.1.steps: 20 -> absent",
    ]
    with pytest.raises(TypeError, match="cannot compare a Run with a Adam"):
        differences(Run(), Adam())
    with pytest.raises(TypeError, match="instance of a dataclass"):
        differences(3, 4)


@settings(max_examples=200, deadline=None)
@given(floats)
def test_floats_are_shown_exactly(value):
    shown = differences(Adam(lr=0.5), Adam(lr=abs(value)))
    assert [float(line.split(" -> ")[1]) for line in shown] == [abs(value)] * (abs(value) != 0.5)


# ---- classes that cannot be a configuration ----


@pytest.mark.parametrize(
    "kind",
    [dict[str, float], list[int], int | str, tuple, tuple[tuple[int, ...], ...], Adam | None, Literal["a", None]],
)
def test_unsupported_types_are_named(kind):
    @dataclass(frozen=True)
    class Odd:
        odd: kind = None

    with pytest.raises(TypeError, match=r"Odd.odd has type .*; a configuration holds int, float, str, bool, Path and"):
        parse({"odd": Odd}, [])


def test_reserved_names():
    @dataclass(frozen=True)
    class Odd:
        recipe: str = ""

    with pytest.raises(TypeError, match="--recipe would have two meanings"):
        parse({"odd": Odd}, [])
    with pytest.raises(TypeError, match="--recipe would have two meanings"):
        parse(RECIPES, [], extra=Odd())
    with pytest.raises(TypeError, match="instance of a dataclass, got 3"):
        parse({"three": lambda: 3}, [])
