import argparse
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniref_fast import cli, flags
from uniref_fast.evaluation.config import EvalConfig
from uniref_fast.flags import ConfigError, Parsed, add_fields, parse, to_json
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.training.builtin.make import BuiltinModel
from uniref_fast.training.builtin.vae import VAE
from uniref_fast.training.msgrpo import RLRunOptions
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT_RECIPES


@dataclass(frozen=True)
class Adam:
    """Settings of AdamW.

    Attributes:
        lr: Learning rate, 100% of which is reached after the warm-up.
        betas: Decay rates of the two averages.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr must not be negative, got {self.lr}")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        side: Side of the images in pixels.
    """

    side: int
    steps: int = 10


@dataclass(frozen=True)
class Base:
    """Settings that runs share.

    Attributes: Random numbers
        seed: Seed of all random numbers.
    """

    seed: int = 0


@dataclass(frozen=True)
class Run(Base):
    """Settings of one run.

    Attributes: Model
        precision: Data type of the weights.

    Attributes: Batches
        pack_tokens: Largest number of tokens in a pack; a larger sample
            is an error.
        packs, ranks: Packs of a step, and the number of
            ranks that share them.

    Attributes: Schedule
        optimizer: Settings of AdamW.
        stages: Pixel budgets, one after another.

    Note: this line is not an attribute.
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
    """A run of a few seconds on a CPU,
    with 100% of its data.

    This paragraph is not in the help.
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
    assert replace(config, **{name: getattr(Run(), name)}) == Run()  # and nothing else changed


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
    assert "seed" in parsed.given and "steps" not in parsed.given
    with pytest.raises(ConfigError, match="unknown flag --dry-runs; did you mean --dry-run\\?"):
        parse(RECIPES, ["--dry-runs", "true"], extra=Options())
    with pytest.raises(TypeError, match="--seed would have two meanings"):
        parse(RECIPES, [], extra=Base())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--pack-token", "1"], "unknown flag --pack-token; did you mean --pack-tokens[?] --help lists all"),
        (["--lr", "1"], "unknown flag --lr; did you mean --optimizer.lr[?]"),
        (["--optimiser.lr", "1"], "unknown flag --optimiser.lr; did you mean --optimizer.lr[?]"),
        (["--optimizer.l", "1"], "did you mean --optimizer.lr[?]"),
        (["--stages.2.steps", "1"], "unknown flag --stages.2.steps; did you mean --stages.0.steps[?]"),
        (
            ["--optimizer", "sgd"],
            "group of flags; give one of them: --optimizer.lr, --optimizer.betas",
        ),
        (
            ["--stages", "3"],
            "--stages is a group of flags; give one of them: --stages.0.side, --st",
        ),
        (["--derived", "3"], "unknown flag --derived"),  # not given to the constructor
        (["--seed", "1e3"], "--seed expects INTEGER, got '1e3'"),
        (["--seed", "1.0"], "--seed expects INTEGER"),
        (["--seed", "1__0"], "--seed expects INTEGER"),
        (["--seed", ""], "--seed expects INTEGER, got ''"),
        (["--seed", "\u0663"], "--seed expects INTEGER"),  # a digit for int(), not for a reader
        (["--clip", "fast"], r"--clip expects NUMBER\|none, got 'fast'"),
        (["--clip", "nan"], r"--clip expects NUMBER\|none, got 'nan'"),
        (["--clip", "1e999"], r"--clip expects NUMBER\|none"),
        (["--ema", "yes"], r"--ema expects true\|false, got 'yes'"),
        (["--ema", "none"], r"--ema expects true\|false"),
        (["--ema"], r"--ema needs a value: true\|false"),
        (["--ema", "--seed", "1"], r"--ema needs a value: true\|false"),
        (["--precision", "fp16"], r"--precision expects bf16\|fp32, got 'fp16'"),
        (["--level", "3"], r"--level expects 1\|2\|all, got '3'"),
        (["--out", ""], "--out expects PATH, got ''"),
        (["--out", "a", "--out", "b"], "--out is given twice"),
        (["--pack-tokens=1", "--pack_tokens=1"], "--pack_tokens is given twice"),
        (["--weights", "1,x"], r"--weights expects NUMBER,...\|none, got '1,x'"),
        (["--weights", "1,"], "--weights expects NUMBER"),
        (["--data", "a,,b"], "--data expects PATH,..., got 'a,,b'"),
        (["--modes", "edit,crop"], r"--modes expects edit\|compose,..., got 'edit,crop'"),
        (["--optimizer.betas", "0.9"], "--optimizer.betas expects NUMBER,NUMBER, got '0.9'"),
        (["--optimizer.betas", "1,2,3"], "--optimizer.betas expects NUMBER,NUMBER"),
        (["--optimizer.betas="], "--optimizer.betas expects NUMBER,NUMBER, got ''"),
        (["train"], "'train' is not a flag; flags are --name value"),
        (["-x", "3"], "'-x' is not a flag"),
        (["--"], "'--' is not a flag"),
        (["--=3"], "'--=3' is not a flag"),
        (["--seed", "1", "2"], "'2' is not a flag"),
        (["--recipe", "papers"], "no recipe 'papers'; did you mean paper[?] possible: paper, small"),
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
            parse(RECIPES, [flag, "--recipe", "small"], extra=Options(), prog="train", description="Train 100%.")
        assert stopped.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "usage: train [--recipe NAME] [--FLAG VALUE ...]" and "Train 100%." in lines
    assert "--recipe small A run of a few seconds on a CPU, with 100% of its data." in lines  # its first paragraph
    joined = " ".join(lines)
    for expected in (
        "--seed INTEGER Seed of all random numbers. (default: 0)",  # from the base class
        "--pack-tokens INTEGER Largest number of tokens in a pack; a larger sample is an error. (default: 2048)",
        "--packs INTEGER Packs of a step, and the number of ranks that share them. (default: 8)",
        "--ranks INTEGER Packs of a step, and the number of ranks that share them. (default: 1)",
        "--ema true|false (default: true)",
        "--precision bf16|fp32 Data type of the weights. (default: bf16)",
        "--note TEXT|none (default: none)",
        "--data PATH,... (default: empty)",
        "--optimizer.lr NUMBER Learning rate, 100% of which is reached after the warm-up. (default: 0.0004)",
        "--optimizer.betas NUMBER,NUMBER Decay rates of the two averages. (default: 0.9,0.95)",
        "optimizer: Settings of AdamW.",
        "stages.N: Pixel budgets, one after another.",
        "--stages.N.side INTEGER Side of the images in pixels. (default: 64)",
        "--dry-run true|false (default: false)",
        "Defaults are those of the recipe small",
    ):
        assert expected in joined, expected
    assert "derived" not in joined and "not in the help" not in joined and "not an attribute" not in joined
    for name in ("seed", "level", "name", "clip", "out", "resume", "weights", "modes", "stages.N.steps", "every"):
        assert joined.count(f"--{name} ") == 2  # each once in each of the two texts


def test_help_is_in_the_groups_and_the_order_of_the_docstrings(capsys):
    with pytest.raises(SystemExit):
        parse(RECIPES, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Recipes:", "Random numbers:", "Model:", "Batches:", "optimizer:", "stages.N:", "Other:"]
    batches = lines[lines.index("Batches:") : lines.index("optimizer:")]
    assert [line.split()[0] for line in batches if "--" in line] == ["--pack-tokens", "--packs", "--ranks"]


def test_help_shows_the_default_of_each_element_where_they_differ(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(RECIPES, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--stages.N.side INTEGER Side of the images in pixels. (default: 1024; 1536)" in text
    assert "--stages.N.steps INTEGER (default: 10; 20)" in text


def test_help_of_one_recipe_lists_no_recipes(capsys):
    with pytest.raises(SystemExit):
        parse({"run": Run}, ["--help"], prog="train")
    text = capsys.readouterr().out
    assert text.startswith("usage: train [--FLAG VALUE ...]\n") and "ecipe" not in text


@pytest.mark.parametrize(
    "config",
    [
        *(recipe() for recipe in (*SFT_RECIPES.values(), *MSGRPO_RECIPES.values())),
        RLRunOptions(Path("out")), EvalConfig((), Path()), JudgeConfig(), VAE(), BuiltinModel(),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_every_flag_of_the_commands_has_a_sentence_and_a_group(config):
    for name, leaf in flags._leaves(config).items():
        assert re.fullmatch(r"[A-Z].*\.", leaf.doc), f"{type(config).__name__}.{name}: {leaf.doc!r}"
        assert leaf.group or isinstance(config, JudgeConfig), f"{type(config).__name__}.{name} is in no group"


# ---- arguments of argparse ----


def arguments(*argv, names=None):
    parser = argparse.ArgumentParser(prog="train")
    add_fields(parser, Run(), names, prefix="run")
    return vars(parser.parse_args(argv))


def test_fields_as_arguments():
    assert arguments() == {}  # flags that are not given leave nothing
    given = arguments("--run.pack-tokens", "5", "--run.clip=none", "--run.data", "a,b", "--run.data=c")
    assert given == {
        "run.pack_tokens": 5,
        "run.clip": None,
        "run.data": [Path("a"), Path("b"), Path("c")],
    }


def test_fields_as_arguments_are_chosen_and_checked(capsys):
    assert arguments("--run.seed", "3", names=["seed", "packs"]) == {"run.seed": 3}
    for argv, message in (
        (["--run.ema", "true"], "unrecognized arguments"),
        (["--run.packs", "many"], "--run.packs: expects INTEGER, got 'many'"),
    ):
        with pytest.raises(SystemExit):
            arguments(*argv, names=["seed", "packs"])
        assert message in capsys.readouterr().err


# ---- JSON ----


def test_json():
    config = replace(small(), data=(Path("a"),), note="é", clip=None)
    saved = json.loads(to_json(config))
    assert list(saved)[:3] == ["seed", "pack_tokens", "packs"]  # in the order of the fields
    assert saved["optimizer"] == {"lr": 0.0004, "betas": [0.9, 0.95]} and saved["stages"] == [{"side": 64, "steps": 10}]
    assert (saved["out"], saved["data"], saved["note"], saved["clip"]) == ("out", ["a"], "é", None)
    assert "derived" not in saved
    undecodable = Run(name="\udcff")  # a byte of the command line that is not UTF-8
    assert json.loads(to_json(undecodable).encode().decode())["name"] == "\udcff"


@settings(max_examples=50, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False).map(abs))
def test_json_keeps_floats_exactly(value):
    assert json.loads(to_json(Adam(lr=value)))["lr"] == value


@pytest.mark.parametrize("config", [Run(clip=math.nan), Run(weights=(1.0, math.inf))])
def test_json_holds_finite_numbers_only(config):
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(config)


# ---- classes that cannot be a configuration ----


@pytest.mark.parametrize(
    "kind",
    [dict[str, float], list[int], int | str, tuple, tuple[tuple[int, ...], ...], Adam | None, Literal["a", None]],
)
def test_unsupported_types_are_named(kind):
    @dataclass(frozen=True)
    class Odd:
        odd: kind = None

    with pytest.raises(TypeError, match=r"the field odd has the type .*, which no flag can express"):
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


# ---- the parsers of the command line ----


def parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_every_flag_and_command_of_the_command_line_has_a_description():
    found = list(parsers(cli._parser()))
    assert len(found) >= 12
    for parser in found:
        assert re.fullmatch(r"[A-Z].*\.", parser.description or "", re.DOTALL), parser.prog
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                listed = {choice.dest: choice.help for choice in action._choices_actions}
                assert listed.keys() == action.choices.keys() and all(listed.values()), parser.prog
            elif not isinstance(action, (argparse._HelpAction, argparse._VersionAction)):
                name = f"{parser.prog} {action.option_strings or action.dest}"
                assert re.fullmatch(r'[A-Z"].*(\.|\))', action.help or "", re.DOTALL), name
