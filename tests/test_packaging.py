"""The layout of the repository: what may import what, and names that must stay free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import uniref_fast

ROOT = Path(__file__).parent.parent

# Dependencies point one way; a module may import modules of its own level or a lower one.
LEVELS = [
    {"layout", "budget", "testing", "native", "scenes", "quantised"},
    {"visibility"},
    {"tuning"},
    {"kernels"},
    {"ops"},
    {"models"},
    {"request", "builtin", "encode"},
    {"model_kind"},
    {"loading"},
    {"patch", "edit", "estimate", "training"},
    {"demo"},
    {"cli", "data_cli"},
]


# Names of the package itself, by the module they come from.
PUBLIC = uniref_fast._MODULE_OF


def module_level(name: str) -> int:
    for level, names in enumerate(LEVELS):
        if name in names:
            return level
    raise AssertionError(f"{name} has no level: add it to LEVELS in {Path(__file__).name}")


def imports_of(path: Path) -> set[str]:
    """First component below uniref_fast of everything a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "uniref_fast":
            parts = node.module.split(".")[1:]
            found.update([parts[0]] if parts else [PUBLIC.get(alias.name, alias.name) for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("uniref_fast."))
    return found


def sources() -> list[Path]:
    return [p for p in (ROOT / "uniref_fast").rglob("*.py")] + [
        p for folder in ("kernels", "training") for p in (ROOT / folder).rglob("*.py")
    ]


def test_imports_point_one_way():
    checked = 0
    for path in sources():
        relative = path.relative_to(ROOT)
        parts = relative.parts[1:] if relative.parts[0] == "uniref_fast" else relative.parts
        own = parts[0].removesuffix(".py")
        if own in ("__init__", "__main__", "assets"):
            continue
        for other in imports_of(path) - {own, "__version__", "assets"}:
            checked += 1
            assert module_level(other) <= module_level(own), f"{relative} imports uniref_fast.{other}"
    assert checked > 20


def test_kernels_and_training_are_linked_folders_without_init():
    for name in ("kernels", "training"):
        link = ROOT / "uniref_fast" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("how", ["-c", "-m"])
def test_top_level_kernels_is_never_ours(how, tmp_path):
    """Hugging Face's `kernels` is imported by diffusers; from the root of the checkout ours must not take its place."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is not None or spec.loader is None, spec\n"
        "try:\n    import kernels\nexcept ImportError:\n    sys.exit(0)\n"
        "assert getattr(kernels, '__file__', None) is None or 'site-packages' in kernels.__file__, kernels\n"
        "assert not hasattr(kernels, 'segment_attention'), kernels\n"
    )
    (tmp_path / "probe_kernels.py").write_text(code)
    command = [sys.executable, "-c", code] if how == "-c" else [sys.executable, "-m", "probe_kernels"]
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr


def test_a_regular_kernels_package_wins_over_ours(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("MARK = 'theirs'\n")
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", "import kernels; assert kernels.MARK == 'theirs'"]
    assert subprocess.run(command, cwd=ROOT, env=env).returncode == 0


def test_importing_the_package_does_not_import_diffusers():
    code = "import sys, uniref_fast; assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_csrc_needs_no_torch_headers():
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text and "Python.h" not in text, path
