"""Tests of imports: the package and the help of a command load no heavy modules; the package has its public names."""

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import uniref_fast
from uniref_fast import cli

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torch._dynamo", "triton", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "pyarrow")

RUN = f"""
import os, runpy, sys
def leave(status):
    raise SystemExit(status)
os._exit = leave  # with which the training commands end
kind, name, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = name
try:
    options = {{"alter_sys": True}} if kind == "-m" else {{}}
    (runpy.run_module if kind == "-m" else runpy.run_path)(name, run_name="__main__", **options)
    status = 0
except SystemExit as end:
    status = end.code or 0
print(status, *[module for module in {HEAVY} if module in sys.modules])
"""


def run(*command):
    """(exit status, heavy modules that were loaded, the output before that) of a command, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RUN, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *output, last = done.stdout.splitlines()
    status, *heavy = last.split()
    return int(status), heavy, "\n".join(output)


def commands():
    """All commands of `uniref-fast`, with those of its groups."""
    found, waiting = [], [((), cli._parser())]
    while waiting:
        words, parser = waiting.pop()
        found.append(words)
        for action in parser._actions:
            if isinstance(action.choices, dict):
                waiting += [((*words, name), sub) for name, sub in action.choices.items()]
    return sorted(found)


def training_commands():
    """All programs of `training/`: the two scripts, and the modules that `python -m` runs."""
    files = [path for path in (ROOT / "training").rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    paths = sorted(path.relative_to(ROOT) for path in files)
    return [
        ("path", str(path)) if len(path.parts) == 2 else ("-m", ".".join(("uniref_fast", *path.with_suffix("").parts)))
        for path in paths
    ]


COMMANDS = [command for command in training_commands() if not command[1].endswith("make_tokenizer")]  # has no flags


def test_there_are_commands():
    assert {("edit",), ("eval",), ("data", "check"), ("data", "make")} <= {*commands()}
    names = {command[1].split(".")[-1] if command[0] == "-m" else command[1] for command in COMMANDS}
    assert names == {"training/sft.py", "training/msgrpo.py", "vae", "make", "plots"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_loads_nothing_heavy(words):
    status, heavy, output = run("-m", "uniref_fast", *words, "--help")
    assert status == 0 and not heavy and output.startswith("usage: ")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_training_commands_loads_nothing_heavy(command):
    status, heavy, output = run(*command, "--help")
    assert status == 0 and not heavy and "usage: " in output


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c[1].endswith("plots")], ids=" ".join)
def test_wrong_flags_load_nothing_heavy(command):
    assert run(*command, "--no-such-flag", "1")[:2] == (2, [])


def test_the_package_loads_nothing():
    code = "import sys, uniref_fast; print([name for name in sys.modules if name.startswith('uniref_fast')])"
    code += f"; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['uniref_fast']", "[]"]


@pytest.mark.parametrize(
    "first",
    [
        "import uniref_fast.patch, uniref_fast.edit, uniref_fast.estimate",
        "from uniref_fast import patch, edit",
    ],
)
def test_functions_stay_functions_whatever_is_imported_first(first):
    """`patch`, `edit` and `estimate` are modules too, and the import system binds a module to its package."""
    code = f"""
{first}
import sys, types, uniref_fast
for name in ("patch", "edit", "estimate"):
    assert isinstance(getattr(uniref_fast, name), types.FunctionType), name
    assert isinstance(sys.modules["uniref_fast." + name], types.ModuleType), name
from uniref_fast import *
assert patch is uniref_fast.patch is sys.modules["uniref_fast.patch"].patch
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_names_of_the_package():
    for name in uniref_fast.__all__:
        assert getattr(uniref_fast, name) is not None
    assert {*uniref_fast.__all__, "ops", "native", "models", "layout", "visibility", "builtin"} <= {*dir(uniref_fast)}
    for name in uniref_fast._MODULES:
        assert isinstance(getattr(uniref_fast, name), types.ModuleType)
    assert "pipe_or_transformer" in inspect.signature(uniref_fast.patch).parameters
    with pytest.raises(AttributeError, match="module 'uniref_fast' has no attribute 'pach'"):
        uniref_fast.pach  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'pach'"):
        from uniref_fast import pach  # noqa: F401


def test_type_checkers_see_what_is_loaded_lazily():
    """They read the imports under TYPE_CHECKING, which must say the same as the table that is used when it runs."""
    tree = ast.parse((ROOT / "uniref_fast" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {name.name: node.module.removeprefix("uniref_fast.") for node in block.body for name in node.names}
    assert seen == uniref_fast._MODULE_OF and {*seen, "__version__"} == {*uniref_fast.__all__}
