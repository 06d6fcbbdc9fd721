"""Tests of imports: the package and the help of a command load no heavy modules; the package has its public names."""

import ast
import inspect
import json
import re
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
import json, os, runpy, sys
def leave(status):
    raise SystemExit(status)
os._exit = leave  # the function with which the training commands end
kind, name, *calls = sys.argv[1:]
for call in calls:
    sys.argv = [name, *json.loads(call)]
    try:
        options = {{"alter_sys": True}} if kind == "-m" else {{}}
        (runpy.run_module if kind == "-m" else runpy.run_path)(name, run_name="__main__", **options)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    print("# status", status, *[module for module in {HEAVY} if module in sys.modules])
"""


def run(*program, calls):
    """Return (exit status, heavy modules that are loaded, output) of each call, all in one new process."""
    code = [sys.executable, "-c", RUN, *program, *map(json.dumps, calls)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *outputs, rest = re.split(r"^# (status .*)\n", done.stdout, flags=re.M)
    assert not rest and len(outputs) == 2 * len(calls), done.stdout
    results = []
    for output, status in zip(outputs[::2], outputs[1::2], strict=True):
        number, *heavy = status.split()[1:]
        results.append((int(number), heavy, output))
    return results


def commands():
    """Return all commands of `uniref-fast`, with those of its groups, as lists of words."""
    found, waiting = [], [([], cli._parser())]
    while waiting:
        words, parser = waiting.pop()
        found.append(words)
        for action in parser._actions:
            if isinstance(action.choices, dict):
                waiting += [([*words, name], sub) for name, sub in action.choices.items()]
    return sorted(found)


def training_programs():
    """Return all programs of `training/` that have flags: the two scripts, and the modules that `python -m` runs."""
    files = [path for path in (ROOT / "training").rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    paths = sorted(path.relative_to(ROOT) for path in files if path.stem != "make_tokenizer")
    return [
        ("path", str(path)) if len(path.parts) == 2 else ("-m", ".".join(("uniref_fast", *path.with_suffix("").parts)))
        for path in paths
    ]


def test_all_commands_are_found():
    words = commands()
    assert all(command in words for command in (["edit"], ["eval"], ["plot"], ["data", "check"], ["data", "make"]))
    names = {name.split(".")[-1] if kind == "-m" else name for kind, name in training_programs()}
    assert names == {"training/sft.py", "training/msgrpo.py", "vae", "make"}


def test_help_of_every_command_loads_nothing_heavy():
    results = run("-m", "uniref_fast", calls=[[*words, "--help"] for words in commands()])
    for words, (status, heavy, output) in zip(commands(), results, strict=True):
        assert status == 0 and not heavy and output.startswith("usage: " + " ".join(["uniref-fast", *words])), words


@pytest.mark.parametrize("program", training_programs(), ids=" ".join)
def test_help_and_wrong_flags_of_training_programs_load_nothing_heavy(program):
    shown, wrong = run(*program, calls=[["--help"], ["--no-such-flag", "1"]])
    assert shown[:2] == (0, []) and shown[2].startswith("usage: ")
    assert wrong[:2] == (2, [])


def test_the_package_loads_nothing_and_the_built_in_model_nothing_heavy():
    code = "import sys, uniref_fast; print([name for name in sys.modules if name.startswith('uniref_fast')])"
    code += f"; from uniref_fast import builtin; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['uniref_fast']", "[]"]


@pytest.mark.slow
def test_functions_stay_functions_after_any_first_import():
    """`patch`, `edit` and `estimate` are modules too, and the import system binds a module to its package."""
    code = """
import os, sys, types, torch, diffusers
for first in ("import uniref_fast.patch, uniref_fast.edit", "from uniref_fast import estimate, patch, edit"):
    if child := os.fork():  # each import happens in a process that has not imported uniref_fast
        assert os.waitpid(child, 0)[1] == 0, first
        continue
    exec(first)
    import uniref_fast
    for name in ("patch", "edit", "estimate"):
        assert isinstance(getattr(uniref_fast, name), types.FunctionType), name
        assert isinstance(sys.modules["uniref_fast." + name], types.ModuleType), name
    from uniref_fast import *
    assert patch is uniref_fast.patch is sys.modules["uniref_fast.patch"].patch
    break
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
    """Type checkers read the imports under TYPE_CHECKING, which must agree with the table that is used at run time."""
    tree = ast.parse((ROOT / "uniref_fast" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {name.name: node.module.removeprefix("uniref_fast.") for node in block.body for name in node.names}
    assert seen == uniref_fast._MODULE_OF and {*seen, "__version__"} == {*uniref_fast.__all__}
