"""Flags and JSON for configurations: frozen dataclasses that a recipe returns and flags override by field name.

    @dataclass(frozen=True)
    class Run:
        \"\"\"Settings of a training run.

        Attributes: Data
            pack_tokens: Largest number of tokens in a pack.
        \"\"\"

        pack_tokens: int = 32768

    config = parse({"paper": Run, "small": small}, sys.argv[1:]).config

    python train.py --recipe small --pack-tokens 16_384 --optimizer.betas=0.9,0.95 --stages.0.steps 100 --resume none

`--help` shows the title after "Attributes:" as a group of flags, and each description as the help of its flag. A field
is an int, float, str, bool, Path or Literal, one of these or None, a tuple of these, a dataclass, or a tuple of
dataclasses. Floats are finite; None stands for "no limit". Flags cannot express the text "none" where None is possible,
a comma within a text of a tuple, or a different number of dataclasses in a tuple; recipes can.

Why no library: tyro 1.0.17 groups flags by nested dataclass only, makes a recipe a subcommand, needs own constructors
to read `true`, `none` and `1,2`, suggests nothing for `--pack-tokns`, accepts nan and repeated flags, and prints its
errors on every rank. simple-parsing 0.1.9 refuses tuples of dataclasses; jsonargparse 4.53 cannot override their
fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

__all__ = ["ConfigError", "Parsed", "add_fields", "current_name", "parse", "parse_keep_references", "to_json",
           "with_plain"]  # fmt: skip

C = TypeVar("C")
E = TypeVar("E")
SCALARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false", Path: "PATH"}


class ConfigError(ValueError):
    """A flag or a value of a configuration is wrong; the message says which one and what is possible."""


@dataclass(frozen=True)
class Parsed(Generic[C, E]):
    """Result of `parse`.

    Attributes:
        recipe: Name of the recipe.
        config: Configuration that the recipe returned, with the overrides of the flags.
        extra: Options that are not part of the configuration, with their overrides; None when `parse` got none.
        given: Dotted names of the fields that flags have set.
    """

    recipe: str
    config: C
    extra: E
    given: frozenset[str] = field(default=frozenset(), compare=False)


def parse(
    recipes: Mapping[str, Callable[[], C]],
    argv: Sequence[str],
    *,
    extra: E = None,  # type: ignore[assignment]
    prog: str | None = None,
    description: str | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Parsed[C, E]:
    """Pick a recipe and override fields: `--recipe NAME --field value --group.field=value --list.0.field value`.

    Dashes and underscores in names are equivalent. The checks of a dataclass (its `__post_init__`) run once, after all
    overrides.

    Args:
        recipes: Functions without arguments that return a frozen dataclass, by name; the first is the default. The
            first paragraph of a function's docstring is its help.
        argv: Arguments of the command, without the program.
        extra: Instance of a dataclass whose fields are flags as well, such as the folder of a run.
        prog: Name of the program in the help.
        description: Description of the program in the help.
        renamed: New names of fields by their former names, for the message of the error; N stands for the number of an
            element, as in "stages.N.side".

    Raises:
        ConfigError: If a flag is wrong; the message has the flag, the value and what is possible.
        SystemExit: Raised once `--help` has printed every field with its type, description and default.
        TypeError: If a field has a type that is not supported.
    """
    flags = _scan(argv)
    recipe = _recipe(recipes, *flags.pop("recipe", ("--recipe", next(iter(recipes), None))))
    config = recipes[recipe]()
    ours, others = _leaves(config), {} if extra is None else _leaves(extra)
    if taken := sorted({*others, "recipe", "help"} & {*ours}) or sorted({"recipe", "help"} & {*others}):
        raise TypeError(f"the flag --{taken[0]} would have two meanings; rename the field")
    if "help" in flags:
        print(_help(recipes, recipe, {**others, **ours}, prog, description), end="")
        raise SystemExit(0)
    for name, (flag, _) in flags.items():
        if (now := current_name(name, renamed or {})) != name and now in {**ours, **others}:
            raise ConfigError(f"{flag} is now called {_flag(now)}")
    changes = {name: _override(name, *given, {**ours, **others}) for name, given in flags.items()}
    extra = extra if extra is None else _rebuilt(extra, changes)
    return Parsed(recipe, _rebuilt(config, changes), extra, frozenset(changes))


def add_fields(parser: Any, config: Any, names: Iterable[str] | None = None, prefix: str = "") -> dict[str, Any]:
    """Add plain fields of a configuration to an argparse parser as `--PREFIX.FIELD`, and return their groups by title.

    A flag that is not given leaves no attribute in the namespace (`argparse.SUPPRESS`). A flag of a tuple of any length
    may be repeated; its attribute is a list.

    Args:
        parser: `argparse.ArgumentParser`, or a group of its arguments, which then holds all flags.
        config: Instance of a dataclass with the defaults that the help shows.
        names: Fields to add; None adds all.
        prefix: Beginning of the names of the flags and of the attributes.
    """
    leaves, groups = _leaves(config), {"": parser}
    for name in leaves if names is None else names:
        leaf = leaves[name]
        if leaf.group not in groups:
            groups[leaf.group] = parser.add_argument_group(leaf.group)
        flag = _flag(f"{prefix}.{name}" if prefix else name)
        action = "extend" if Ellipsis in typing.get_args(leaf.kind) else "store"
        convert = functools.partial(_value, leaf)
        _add_flag(groups[leaf.group], flag, leaf, _show(leaf.value), type=convert, action=action)
    return groups


def current_name(name: str, renamed: Mapping[str, str]) -> str:
    """Return the new dotted name of a field that was renamed, or the given name of another one.

    Args:
        name: Dotted name, such as "stages.0.side".
        renamed: New names of fields by their former names; N stands for the number of an element in both.
    """
    new = renamed.get(_pattern(name))
    if new is None:
        return name
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.|$)", name))
    return ".".join(next(numbers) if part == "N" else part for part in new.split("."))


def with_plain(config: C, values: Mapping[str, Any]) -> C:
    """Return the configuration with fields replaced by values that were written as JSON.

    Args:
        config: Instance of a dataclass.
        values: JSON values by the dotted names of fields.

    Raises:
        ConfigError: If the dataclass refuses a value.
    """
    leaves = _leaves(config)
    changed: C = _rebuilt(config, {name: _from_plain(leaves[name].kind, value) for name, value in values.items()})
    return changed


def to_json(config: Any) -> str:
    """Return the configuration as JSON text. Raises ValueError for numbers that are not finite."""
    return json.dumps(_plain(config), indent=1, allow_nan=False) + "\n"


# ---- fields and their types ----


@dataclass(frozen=True)
class _Leaf:
    """A field that holds a plain value; the group is its place in `--help`."""

    kind: Any
    metavar: str
    value: Any
    doc: str
    group: str
    group_doc: str


def _fields(cls: Any) -> dict[str, Any]:
    """Return the types of the fields that the constructor of a dataclass takes, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _docs(cls: type) -> dict[str, tuple[str, str]]:
    """Return (description, group) of the fields, from the "Attributes:" sections of the class and of its bases."""
    docs = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "") + "\n"
        for section in re.finditer(r"^Attributes:[ ]*(.*)\n((?:[ \t].*\n|\n)*)", text, re.MULTILINE):
            entries = re.finditer(r"^(\w[\w, ]*):(.*(?:\n[ \t].*)*)", textwrap.dedent(section[2]), re.MULTILINE)
            for names, doc in (entry.groups() for entry in entries):
                docs.update({name.strip(): (" ".join(doc.split()), section[1]) for name in names.split(",")})
    return docs


def _optional(kind: Any) -> tuple[Any, bool]:
    """Return the type without None, and whether None was possible."""
    rest = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and len(rest) == 1:
        return rest[0], True
    return kind, False


def _choices(literal: Any) -> dict[str, Any]:
    """Return the values of a Literal, keyed by their text in a flag."""
    return {str(c).lower() if isinstance(c, bool) else str(c): c for c in typing.get_args(literal)}


def _holds_dataclasses(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0])


def _leaves(config: Any) -> dict[str, _Leaf]:
    """Return every plain field of a configuration by its dotted name, in the order of the "Attributes:" sections."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"a configuration is an instance of a dataclass, got {config!r}")
    order = {name: i for i, name in enumerate(_docs(type(config)))}
    leaves = _walk(type(config), config, "", "", ("", ""))
    return dict(sorted(leaves, key=lambda leaf: order.get(leaf[0].partition(".")[0], len(order))))


def _walk(kind: Any, value: Any, name: str, doc: str, group: tuple[str, str]) -> Iterator[tuple[str, _Leaf]]:
    if dataclasses.is_dataclass(kind):
        docs = _docs(type(value))
        for key, inner in _fields(type(value)).items():
            text, title = docs.get(key, ("", ""))
            inside = (_pattern(name), doc) if name else (title, "")
            yield from _walk(inner, getattr(value, key), f"{name}.{key}".lstrip("."), text, inside)
    elif _holds_dataclasses(kind):
        for i, item in enumerate(value):
            yield from _walk(type(item), item, f"{name}.{i}", doc, group)
    else:
        yield name, _Leaf(kind, _name(kind, name), value, doc, *group)


def _pattern(name: str) -> str:
    """Replace the numbers of elements in a dotted name by N: "stages.0.steps" becomes "stages.N.steps"."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def _rebuilt(value: Any, changes: Mapping[str, Any], name: str = "") -> Any:
    """Return the value with its leaves replaced; each dataclass is constructed once, with all its changes."""
    if name in changes:
        return changes[name]
    if not any(changed.startswith(f"{name}." if name else "") for changed in changes):
        return value
    if isinstance(value, tuple):
        return tuple(_rebuilt(item, changes, f"{name}.{i}") for i, item in enumerate(value))
    new = {key: _rebuilt(getattr(value, key), changes, f"{name}.{key}".lstrip(".")) for key in _fields(type(value))}
    try:
        return dataclasses.replace(value, **new)
    except (ValueError, TypeError) as error:  # the dataclass's own checks
        raise ConfigError(f"{name}: {error}" if name else str(error)) from error


# ---- values as text and as JSON ----


def _from_text(kind: Any, text: str) -> Any:
    """Return the value that a flag gives; raise ValueError if it does not have the type."""
    inner, optional = _optional(kind)
    if optional and text.lower() == "none":
        return None
    if typing.get_origin(inner) is tuple:
        parts, kinds = text.split(",") if text else [], typing.get_args(inner)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(parts)
        return tuple(_from_text(kind, part) for kind, part in zip(kinds, parts, strict=True))
    if typing.get_origin(inner) is Literal:
        if text in _choices(inner):
            return _choices(inner)[text]
        raise ValueError(text)
    if inner is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if inner is int and re.fullmatch(r"[+-]?[0-9_]+", text):
        return int(text)
    if inner is float and math.isfinite(float(text)):
        return float(text)
    if inner is str or (inner is Path and text):
        return inner(text)
    raise ValueError(text)


def _value(leaf: _Leaf, text: str) -> Any:
    """Return the value of an argparse argument."""
    try:
        return _from_text(leaf.kind, text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects {leaf.metavar}, got {text!r}") from None


def _name(kind: Any, field: str, in_tuple: bool = False) -> str:
    """Return the type of a field as `--help` and errors show it; placeholders are capitals."""
    inner, optional = _optional(kind)
    if typing.get_origin(inner) is tuple and not in_tuple:
        words = ",".join("..." if arg is Ellipsis else _name(arg, field, True) for arg in typing.get_args(inner))
    elif typing.get_origin(inner) is Literal and None not in typing.get_args(inner):
        words = "|".join(_choices(inner))
    elif inner in SCALARS:
        words = SCALARS[inner]
    else:
        raise TypeError(f"the field {field} has the type {kind}, which no flag can express; see {__name__}")
    return f"{words}|none" if optional else words


def _show(value: Any) -> str:
    """Return a value as a flag would give it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_show, value)) or "empty"
    if isinstance(value, (str, Path)) and re.fullmatch(r"\S+", str(value)):
        return str(value)
    return repr(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in _fields(type(value))}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _from_plain(kind: Any, value: Any) -> Any:
    """Return the value of a field whose JSON value `_plain` wrote."""
    inner, _ = _optional(kind)
    if isinstance(value, list):
        parts = typing.get_args(inner)
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_from_plain(kind, item) for kind, item in zip(kinds, value, strict=True))
    return inner(value) if value is not None and inner in (float, Path) else value


# ---- flags ----


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _scan(argv: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Return (flag as typed, its text or None without one), keyed by the name with underscores."""
    given: dict[str, tuple[str, str | None]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, text = ("--help" if word == "-h" else word).partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or not name:
            raise ConfigError(f"{word!r} is not a flag; flags are --name value or --name=value, see --help")
        if name in given:
            raise ConfigError(f"{flag} is given twice; give it once")
        if equals or name == "help":
            given[name] = (flag, text)
        else:  # a value may begin with one dash, as negative numbers do
            given[name] = (flag, words.pop(0) if words and not words[0].startswith("--") else None)
    return given


def _recipe(recipes: Mapping[str, Any], flag: str, name: str | None) -> str:
    if name is None:
        raise ConfigError(f"{flag} needs the name of a recipe; possible: {', '.join(recipes)}")
    if name not in recipes:
        raise ConfigError(f"no recipe {name!r}; did you mean {_nearest(name, recipes)}? possible: {', '.join(recipes)}")
    return name


def _override(name: str, flag: str, text: str | None, leaves: Mapping[str, _Leaf]) -> Any:
    """Return the value that a flag gives to the leaf of that name."""
    if name not in leaves:
        if inside := [_flag(leaf) for leaf in leaves if leaf.startswith(f"{name}.")]:
            raise ConfigError(f"{flag} is a group of flags; give one of them: {', '.join(inside)}")
        raise ConfigError(f"unknown flag {flag}; did you mean {_flag(_nearest(name, leaves))}? --help lists all flags")
    if text is None:
        raise ConfigError(f"{flag} needs a value: {leaves[name].metavar}")
    try:
        return _value(leaves[name], text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag} {error}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most similar, as a whole or in its last part; the first of equals."""

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def score(other: str) -> tuple[float, float]:
        whole, last = likeness(name, other), likeness(name.split(".")[-1], other.split(".")[-1])
        return max(whole, last), whole

    return max(known, key=score, default="none")


class _WholeWords(argparse.HelpFormatter):
    """Formatter that does not break long words, such as lists with commas."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _help(
    recipes: Mapping[str, Callable], recipe: str, leaves: Mapping[str, _Leaf], prog: str | None, description: str | None
) -> str:
    usage = f"%(prog)s {'[--recipe NAME] ' * (len(recipes) > 1)}[--FLAG VALUE ...]"
    parser = argparse.ArgumentParser(prog, usage, description, formatter_class=_WholeWords, add_help=False)
    if len(recipes) > 1:
        parser.epilog = f"Defaults are those of the recipe {recipe}; --recipe NAME --help shows those of another one."
        choice = parser.add_argument_group("Recipes")
        for name, function in recipes.items():
            first, _, _ = (inspect.getdoc(function) or "").partition("\n\n")
            choice.add_argument(f"--recipe {name}", metavar="", help=" ".join(first.split()).replace("%", "%%"))
    flags: dict[str, list[_Leaf]] = {}  # the leaves of a field, one for each element of a tuple of dataclasses
    groups: dict[str, Any] = {}
    for name, leaf in leaves.items():
        flags.setdefault(_pattern(name), []).append(leaf)
    for name, same in flags.items():
        leaf, values = same[0], [_show(leaf.value) for leaf in same]
        if leaf.group not in groups:
            groups[leaf.group] = parser.add_argument_group(leaf.group or "Other", leaf.group_doc or None)
        shown = values[0] if len({*values}) == 1 else "; ".join(values)
        _add_flag(groups[leaf.group], _flag(name), leaf, shown)
    return parser.format_help()


def _add_flag(group: Any, flag: str, leaf: _Leaf, default: str, **options: Any) -> None:
    text = f"{leaf.doc} (default: {default})".lstrip()
    group.add_argument(flag, metavar=leaf.metavar, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


def parse_keep_references(text: str) -> bool | int | Literal["auto"]:
    """Return the value of `--keep-references` as `edit` takes it.

    Raises:
        ConfigError: If the text is not "true", "false", "auto" or a number of steps.
    """
    if text in ("true", "false"):
        return text == "true"
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text):
        return int(text)
    raise ConfigError(f"keep_references is true, false, auto or a number of steps from 1, got {text!r}")
