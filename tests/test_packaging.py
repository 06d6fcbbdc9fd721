"""The layout of the repository: what may import what, and names that must stay free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import uniref_fast

ROOT = Path(__file__).parent.parent

# Dependencies point one way: a unit, which is a module or a folder below `uniref_fast` (in
# training, a folder below it), imports units of its own level or of a level above it in this list.
LEVELS = [
    {"memo", "guidance", "packing", "meta_device", "gpu_memory", "speeds", "hub", "progress", "step_callback"},
    {"quantised"},
    {"layout", "budget", "testing", "native", "files", "keyed_random", "fingerprint", "sheets", "runs"},
    {"visibility"},
    {"tuning"},
    {"kernels"},
    {"ops"},
    {"quantised_linear"},
    {"models", "fast", "builtin", "random_models", "edit_report", "encode", "request", "schedule"},
    {"model_kind", "quantisation"},
    {"loading"},
    {"patch"},
    {"skeleton", "costs"},
    {"edit_loop", "edit_session", "engine_queue"},
    {"adapters", "edit", "engine", "estimate", "lora"},
    {"flags"},
    {"data"},
    {"scenes"},
    {"rewards"},
    {"evaluation"},
    {"training.core"},
    {"training.batches"},
    {"training.supervised", "training.rl"},
    {"training.builtin"},
    {"training.sft", "training.msgrpo"},
    {"run_plan"},
    {"demo", "doctor", "family_demo", "encode_rows", "family_table", "plan", "serve", "weights"},
    {"cli"},
]
APART = {("training.rl", "training.supervised"), ("training.supervised", "training.rl")}  # neither imports the other
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}
PUBLIC = uniref_fast._MODULE_OF  # names of the package itself, by the module that defines them
FREE = ("__init__", "__main__", "__version__", "assets")  # no unit: the package itself and its data


def unit(parts: tuple[str, ...]) -> str:
    """Unit of a module, from the parts of its name below `uniref_fast`."""
    return ".".join(parts[:2]) if parts[0] == "training" else parts[0]


def sources() -> dict[Path, tuple[str, ...]]:
    """All files of the package, with the parts of their names below `uniref_fast`."""
    files = [path for folder in ("uniref_fast", "kernels", "training") for path in (ROOT / folder).rglob("*.py")]
    named = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    return {path: parts[1:] if parts[0] == "uniref_fast" else parts for path, parts in named.items()}


def imports_of(path: Path) -> set[str]:
    """Units that a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "uniref_fast":
            module = tuple(node.module.split(".")[1:])
            if module and module != ("training",):
                found.add(unit(module))
            else:
                found.update(unit((*module, *PUBLIC.get(alias.name, alias.name).split("."))) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("uniref_fast.")]
            found.update(map(unit, names))
    return found - {*FREE}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = unit(sources()[path])
    if own in FREE:
        return
    for other in imports_of(path):
        assert other in LEVEL_OF, f"{other} has no level: add it to LEVELS"
        assert (own, other) not in APART, f"{path.relative_to(ROOT)} imports uniref_fast.{other}"
        assert LEVEL_OF[other] <= LEVEL_OF[own], f"{path.relative_to(ROOT)} imports uniref_fast.{other}"


def test_every_level_is_used():
    assert {unit(parts) for parts in sources().values()} - {*FREE} == {*LEVEL_OF}


def test_training_shadows_no_package():
    """`torchrun training/sft.py` puts `training/` first on the path: nothing there may take the place of a package."""
    files = {path.name for path in (ROOT / "training").iterdir() if not path.name.startswith(("_", "."))}
    assert files == {"README.md", "sft.py", "msgrpo.py", "core", "batches", "supervised", "rl", "builtin"}
    assert not any((ROOT / "training" / name / "__init__.py").exists() for name in files), "a regular package would win"


def test_kernels_and_training_are_linked_folders_without_init():
    for name in ("kernels", "training"):
        link = ROOT / "uniref_fast" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()


TOP_LEVEL_KERNELS = """
import importlib.metadata
import kernels
from diffusers.utils import is_kernels_available
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    assert kernels.__spec__.origin is None and kernels.__file__ is None, f"{kernels} is a package with code of its own"
    names = [name for name in vars(kernels) if not name.startswith("__")]
    assert not names, f"the folder offers {names} at top level"
    assert not is_kernels_available(), "diffusers takes our folder for the package of Hugging Face"
else:
    assert "site-packages" in kernels.__file__, f"{kernels} has taken the place of the package of Hugging Face"
"""


def test_our_kernels_folder_is_not_taken_for_a_package(tmp_path):
    """Our folder has, from the root of the checkout, the name of Hugging Face's `kernels`, which diffusers imports."""
    (tmp_path / "probe_kernels.py").write_text(TOP_LEVEL_KERNELS)
    command = [sys.executable, "-m", "probe_kernels"]
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
