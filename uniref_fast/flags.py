"""The configuration of a run: a frozen dataclass that a recipe makes, flags override by field name, and JSON keeps.

    @dataclass(frozen=True)
    class Run:
        \"\"\"One training run.

        Attributes:
            pack_tokens: most tokens of a pack.
            optimizer: AdamW.
        \"\"\"

        pack_tokens: int = 32768
        optimizer: AdamW = AdamW(lr=4e-4)

    config = parse({"paper": Run, "small": small}, sys.argv[1:]).config

    python train.py --recipe small --pack-tokens 16_384 --optimizer.lr=1e-4 --optimizer.betas 0.9,0.95
    python train.py --stages.0.steps 100 --ema false --resume none --help

A field is an int, float, str, bool, Path or Literal, one of these or None, a tuple of these, a dataclass, or a tuple of
dataclasses. Floats are finite: "no limit" is None. Flags cannot say the text "none" where None is possible, a comma
within a text of a tuple, or another number of dataclasses in a tuple; recipes and JSON can.
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
import sys
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

__all__ = ["ConfigError", "Parsed", "differences", "from_json", "parse", "to_json"]

C = TypeVar("C")
E = TypeVar("E")
SCALARS = {int: "integer", float: "number", str: "text", bool: "true|false", Path: "path"}
BOOLEANS = {"true": True, "false": False}


class ConfigError(ValueError):
    """Something in the flags or the JSON that the user can put right."""


@dataclass(frozen=True)
class Parsed(Generic[C, E]):
    """What the command line says.

    Attributes:
        recipe: name of the recipe.
        config: what the recipe returned, with the overrides.
        extra: the options that are not part of the run, with their overrides; None when `parse` was given none.
    """

    recipe: str
    config: C
    extra: E


def parse(
    recipes: Mapping[str, Callable[[], C]],
    argv: Sequence[str],
    *,
    extra: E = None,  # type: ignore[assignment]
    prog: str | None = None,
    description: str | None = None,
) -> Parsed[C, E]:
    """Pick a recipe and override fields: `--recipe NAME --field value --group.field=value --list.0.field value`.

    Dashes and underscores of names are the same. Checks of a dataclass (its `__post_init__`) see all overrides at once.

    Args:
        recipes: functions without arguments that return a frozen dataclass, by name; the first is the default. The
            first line of a function's docstring is its help.
        argv: the arguments, without the program.
        extra: a dataclass instance whose fields are flags as well, such as a folder to resume from.
        prog, description: for `--help`.

    Raises:
        ConfigError: saying which flag is wrong, what was given, and what is possible.
        SystemExit: after `--help` has printed every field with its type, default and doc.
        TypeError: for a field whose type is not supported; naming it.
    """
    flags = _scan(argv)
    recipe = _recipe(recipes, *flags.pop("recipe", ("--recipe", next(iter(recipes), None))))
    config = recipes[recipe]()
    ours, others = _leaves(config), {} if extra is None else _leaves(extra)
    if taken := sorted({*others, "recipe", "help"} & {*ours}) or sorted({"recipe", "help"} & {*others}):
        raise TypeError(f"the flag --{taken[0]} would have two meanings; rename the field")
    if "help" in flags:
        print(_help(recipes, recipe, {**ours, **others}, prog, description), end="")
        raise SystemExit(0)
    changes = {name: _override(name, *given, {**ours, **others}) for name, given in flags.items()}
    return Parsed(
        recipe,
        _rebuilt(config, {name: value for name, value in changes.items() if name in ours}),
        _rebuilt(extra, {name: value for name, value in changes.items() if name in others}),
    )


def to_json(config: Any) -> str:
    """The configuration as JSON text that `from_json` reads back equal.

    Raises:
        ConfigError: naming a field whose value is not of its type, and so would not come back.
    """
    text = json.dumps(_plain(config), indent=1, default=repr) + "\n"
    if changed := differences(config, from_json(type(config), text)):
        raise ConfigError(f"{type(config).__name__} would not come back from JSON as it is: {'; '.join(changed)}")
    return text


def from_json(cls: type[C], text: str) -> C:
    """Read what `to_json` wrote, or what was written by hand; keys that are missing take the field's default.

    Raises:
        ConfigError: for text that is not JSON, unknown or repeated keys, wrong types, or a missing key without default.
    """
    try:
        data = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error}") from error
    return _from_data(cls, data, "")


def differences(a: Any, b: Any) -> list[str]:
    """What changed from one configuration to another of the same class, a line a field, as "adam.lr: 1e-4 -> 2e-4"."""
    if type(a) is not type(b):
        raise TypeError(f"cannot compare a {type(a).__name__} with a {type(b).__name__}")
    before, after = ({name: leaf.value for name, leaf in _leaves(x).items()} for x in (a, b))
    absent = object()
    lines = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name, absent), after.get(name, absent)
        if old != new:
            shown = ("absent" if value is absent else _show(value) for value in (old, new))
            lines.append(f"{name}: {' -> '.join(shown)}")
    return lines


# ---- fields and their types ----


@dataclass(frozen=True)
class _Field:
    kind: Any
    doc: str
    required: bool


@dataclass(frozen=True)
class _Leaf:
    """A field that holds a plain value; `group_doc` is the doc of the field that holds its dataclass."""

    kind: Any
    value: Any
    doc: str
    group_doc: str


def _fields(cls: Any) -> dict[str, _Field]:
    """Fields of a dataclass that its constructor takes, by name."""
    hints, docs, made = typing.get_type_hints(cls), _docs(cls), {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if not _supported(hints[field.name]):
            raise TypeError(
                f"{cls.__name__}.{field.name} has type {hints[field.name]}; a configuration holds "
                f"{', '.join(kind.__name__ for kind in SCALARS)} and Literal, these or None, tuples of these, "
                "dataclasses and tuples of dataclasses"
            )
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        made[field.name] = _Field(hints[field.name], docs.get(field.name, ""), required)
    return made


def _docs(cls: type) -> dict[str, str]:
    """Docs of the fields, from the "Attributes:" section of the docstrings of the class and its bases."""
    docs = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "") + "\n"
        if section := re.search(r"^Attributes:\n((?:[ \t].*\n|\n)*)", text, re.MULTILINE):
            entries = re.finditer(r"^(\w[\w, ]*):(.*(?:\n[ \t].*)*)", textwrap.dedent(section[1]), re.MULTILINE)
            for names, doc in (entry.groups() for entry in entries):
                docs.update({name.strip(): " ".join(doc.split()) for name in names.split(",")})
    return docs


def _optional(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether None was possible."""
    rest = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and len(rest) == 1:
        return rest[0], True
    return kind, False


def _elements(kind: Any, count: int) -> list[Any]:
    """Types of the elements of a tuple of that length; ValueError when it cannot have that length."""
    args = typing.get_args(kind)
    if args[-1] is Ellipsis:
        return [args[0]] * count
    if len(args) != count:
        raise ValueError(f"{len(args)} values, not {count}")
    return list(args)


def _choices(literal: Any) -> dict[str, Any]:
    """Values of a Literal by how a flag gives them."""
    return {str(c).lower() if isinstance(c, bool) else str(c): c for c in typing.get_args(literal)}


def _holds_dataclasses(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0])


def _supported(kind: Any, in_tuple: bool = False) -> bool:
    inner, optional = _optional(kind)
    if dataclasses.is_dataclass(inner):
        return not optional
    if typing.get_origin(inner) is tuple:
        elements = [arg for arg in typing.get_args(inner) if arg is not Ellipsis]
        groups = sum(map(dataclasses.is_dataclass, elements))
        whole = groups == 0 or (groups == len(elements) and not optional)
        return bool(elements) and not in_tuple and whole and all(_supported(e, True) for e in elements)
    if typing.get_origin(inner) is Literal:
        return all(type(choice) in (str, int, bool) for choice in typing.get_args(inner))
    return inner in SCALARS


def _leaves(config: Any) -> dict[str, _Leaf]:
    """Every plain field of a configuration by dotted name, in order."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"a configuration is an instance of a dataclass, got {config!r}")
    return dict(_walk(type(config), config, "", "", ""))


def _walk(kind: Any, value: Any, name: str, doc: str, group_doc: str) -> Iterator[tuple[str, _Leaf]]:
    if dataclasses.is_dataclass(kind):
        for key, field in _fields(type(value)).items():
            yield from _walk(field.kind, getattr(value, key), f"{name}.{key}".lstrip("."), field.doc, doc)
    elif _holds_dataclasses(kind):
        for i, (element, item) in enumerate(zip(_elements(kind, len(value)), value, strict=True)):
            yield from _walk(element, item, f"{name}.{i}", doc, doc)
    else:
        yield name, _Leaf(kind, value, doc, group_doc)


def _rebuilt(value: Any, changes: Mapping[str, Any], name: str = "") -> Any:
    """The value with its leaves replaced; a dataclass is made once, with all its changes."""
    if name in changes:
        return changes[name]
    if not any(changed.startswith(f"{name}." if name else "") for changed in changes):
        return value
    if isinstance(value, tuple):
        return tuple(_rebuilt(item, changes, f"{name}.{i}") for i, item in enumerate(value))
    new = {key: _rebuilt(getattr(value, key), changes, f"{name}.{key}".lstrip(".")) for key in _fields(type(value))}
    return _made(functools.partial(dataclasses.replace, value), new, name)


def _made(make: Callable[..., Any], values: dict[str, Any], name: str) -> Any:
    try:
        return make(**values)
    except (ValueError, TypeError) as error:  # the dataclass's own checks
        raise ConfigError(f"{name}: {error}" if name else str(error)) from error


# ---- values as text ----


def _from_text(kind: Any, text: str) -> Any:
    """The value that a flag gives; ValueError when it is not of the type."""
    inner, optional = _optional(kind)
    if optional and text.lower() == "none":
        return None
    if typing.get_origin(inner) is tuple:
        parts = text.split(",") if text else []
        return tuple(_from_text(e, part) for e, part in zip(_elements(inner, len(parts)), parts, strict=True))
    if typing.get_origin(inner) is Literal:
        if text in _choices(inner):
            return _choices(inner)[text]
        raise ValueError(text)
    if inner is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if inner is int and re.fullmatch(r"[+-]?[0-9_]+", text):
        return int(text)
    if inner is float and math.isfinite(float(text)):
        return float(text)
    if inner is str or (inner is Path and text):
        return inner(text)
    raise ValueError(text)


def _name(kind: Any) -> str:
    """The type in words, for `--help` and errors."""
    inner, optional = _optional(kind)
    if dataclasses.is_dataclass(inner):
        words = f"object with the keys {', '.join(_fields(inner))}"
    elif typing.get_origin(inner) is tuple:
        words = ",".join("..." if arg is Ellipsis else _name(arg) for arg in typing.get_args(inner))
    elif typing.get_origin(inner) is Literal:
        words = "|".join(_choices(inner))
    else:
        words = SCALARS[inner]
    return f"{words}|none" if optional else words


def _show(value: Any) -> str:
    """A value as a flag would give it, a float as short as it can be: 1e-4."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_show, value)) or "empty"
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        first, *rest = map(str, digits)
        point = "." if rest else ""
        return f"{'-' * sign}{first}{point}{''.join(rest)}e{int(exponent) + len(rest)}"
    if isinstance(value, (str, Path)) and re.fullmatch(r"\S+", str(value)):
        return str(value)
    return repr(value)


# ---- JSON ----


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in _fields(type(value))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ConfigError(f"the JSON gives {name!r} {count} times in one object")
    return dict(pairs)


def _from_data(kind: Any, data: Any, name: str) -> Any:
    """The value of that type from JSON data; `name` is its dotted name."""
    inner, optional = _optional(kind)
    origin = typing.get_origin(inner)
    if data is None and optional:
        return None
    if dataclasses.is_dataclass(inner) and isinstance(data, dict):
        return _from_object(inner, data, name)
    if origin is tuple and isinstance(data, list):
        args = typing.get_args(inner)
        if args[-1] is Ellipsis or len(args) == len(data):
            elements = _elements(inner, len(data))
            return tuple(_from_data(e, d, f"{name}.{i}") for i, (e, d) in enumerate(zip(elements, data, strict=True)))
    elif origin is Literal:
        for choice in typing.get_args(inner):
            if type(choice) is type(data) and choice == data:
                return choice
    elif inner is Path and isinstance(data, str) and data:
        return Path(data)
    elif inner is float and type(data) in (int, float) and abs(data) <= sys.float_info.max:
        return float(data)
    elif type(data) is inner and inner is not float:
        return data
    raise ConfigError(f"{name or 'the JSON'} must be {_name(kind)}, not {json.dumps(data)}")


def _from_object(cls: Any, data: dict[str, Any], name: str) -> Any:
    fields, prefix = _fields(cls), f"{name}." if name else ""
    for key in data:
        if key not in fields:
            raise ConfigError(
                f"unknown key {prefix}{key}; nearest: {_nearest(key, fields)}; known: {', '.join(fields)}"
            )
    if missing := [prefix + key for key, field in fields.items() if field.required and key not in data]:
        raise ConfigError(f"missing without a default: {', '.join(missing)}")
    return _made(cls, {key: _from_data(fields[key].kind, value, prefix + key) for key, value in data.items()}, name)


# ---- flags ----


def _scan(argv: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """(flag as typed, its text or None when it has none) by name with underscores."""
    given: dict[str, tuple[str, str | None]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, text = ("--help" if word == "-h" else word).partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or not name:
            raise ConfigError(f"{word!r} is not a flag; flags are --name value or --name=value, see --help")
        if name in given:
            raise ConfigError(f"{flag} is given twice")
        if equals or name == "help":
            given[name] = (flag, text)
        else:  # a value may begin with one dash, as negative numbers do
            given[name] = (flag, words.pop(0) if words and not words[0].startswith("--") else None)
    return given


def _recipe(recipes: Mapping[str, Any], flag: str, name: str | None) -> str:
    if name is None or name not in recipes:
        nearest = "" if name is None else f"; nearest: {_nearest(name, recipes)}"
        what = f"{flag} needs the name of a recipe" if name is None else f"there is no recipe {name!r}"
        raise ConfigError(f"{what}{nearest}; possible: {', '.join(recipes)}")
    return name


def _override(name: str, flag: str, text: str | None, leaves: Mapping[str, _Leaf]) -> Any:
    """The value that a flag gives to the leaf of that name."""
    if name not in leaves:
        if inside := [_flag(leaf) for leaf in leaves if leaf.startswith(f"{name}.")]:
            raise ConfigError(f"{flag} is a group; it has {', '.join(inside)}")
        raise ConfigError(f"unknown flag {flag}; nearest: {_flag(_nearest(name, leaves))}; --help lists all")
    kind = leaves[name].kind
    if text is None:
        raise ConfigError(f"{flag} needs a value: {_name(kind)}")
    try:
        return _from_text(kind, text)
    except ValueError:
        raise ConfigError(f"{flag} expects {_name(kind)}, got {text!r}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like it, as a whole or in its last part; the first of equals."""

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def score(other: str) -> tuple[float, float]:
        whole, last = likeness(name, other), likeness(name.split(".")[-1], other.split(".")[-1])
        return max(whole, last), whole

    return max(known, key=score, default="none")


def _help(
    recipes: Mapping[str, Callable], recipe: str, leaves: Mapping[str, _Leaf], prog: str | None, description: str | None
) -> str:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--recipe NAME] [--FIELD VALUE ...]",
        description=description,
        add_help=False,
    )
    choice = parser.add_argument_group("recipes (--recipe NAME)")
    for name, make in recipes.items():
        first = (inspect.getdoc(make) or "").partition("\n")[0]
        choice.add_argument(f"--recipe {name}", metavar="", help=_escaped(first))
    groups = {"": parser.add_argument_group(f"fields, with the defaults of recipe {recipe}")}
    for name, leaf in leaves.items():
        inside = name.rpartition(".")[0]
        if inside not in groups:
            groups[inside] = parser.add_argument_group(inside, _escaped(leaf.group_doc))
        text = f"{leaf.doc.rstrip('.')} ({_show(leaf.value)})".strip()
        groups[inside].add_argument(_flag(name), metavar=_name(leaf.kind), help=_escaped(text))
    return parser.format_help()


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
