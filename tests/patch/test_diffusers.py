"""The tests of diffusers for a family's model and pipelines: the same tests fail with the patch as without it.

Wheels of diffusers have no tests. The variable `UNIREF_FAST_DIFFUSERS_TESTS` names the folder `tests` of a checkout of
the installed version, or of one near to it. Its tests also need the packages parameterized and requests-mock:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    UNIREF_FAST_DIFFUSERS_TESTS=diffusers/tests python -m pytest tests/patch/test_diffusers.py -s

Nothing is downloaded: `small_checkpoints` writes random stand-ins for the checkpoints that the tests load. Tests that
require an accelerator run on the CPU. The variable `UNIREF_FAST_DIFFUSERS_RESULTS` names a JSON file to which the
numbers of each part are added; docs/patching.md shows `table` of the one in bench/results.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import diffusers
import pytest
import small_checkpoints
import torch
import transformers

from uniref_fast.models.families import families

ROOT = Path(__file__).parent.parent.parent
FOLDER = os.environ.get("UNIREF_FAST_DIFFUSERS_TESTS")
RESULTS = ROOT / "bench/results/2026-11-30-diffusers-tests.json"
PARTS = {  # of the names of files, by family
    "qwen-image-edit": (
        "transformer_qwenimage.py", "qwenimage/test_qwenimage", "modular_pipelines/qwen/", "lora_layers_qwenimage",
    ),
    "qwen-image-2.1": ("transformer_qwenimage21", "qwenimage21/"),
    "flux2": ("transformer_flux2", "pipelines/flux2/", "lora_layers_flux2"),
    "flux1": ("transformer_flux.py", "pipelines/flux/", "controlnet_flux/", "lora_layers_flux.py"),
    "flux3": ("transformer_flux3", "flux3/"),
    "longcat-image-edit": ("transformer_longcat_image", "longcat_image/"),
    "fibo-edit": ("transformer_bria_fibo.py", "bria_fibo/", "bria_fibo_edit/"),
    "fibo-2": ("transformer_bria_fibo2", "bria_fibo2/"),
    "joyimage-edit-plus": ("joyimage_edit_plus",),
    "z-image": ("transformer_z_image", "z_image/", "lora_layers_z_image"),
}  # fmt: skip
FOLDERS = {"model": "models/transformers", "pipelines": "pipelines", "modular": "modular_pipelines", "lora": "lora"}


def files_of(folder, family, part):
    """Return the files of diffusers' tests for a family, of its model, its pipelines, modular ones or LoRA."""
    paths = {path: path.relative_to(folder).as_posix() for path in (folder / FOLDERS[part]).rglob("test_*.py")}
    return sorted(path for path, name in paths.items() if any(each in name for each in PARTS[family]))


def environment(folder, cache):
    """Return the variables of a process that runs tests of diffusers without the Hub.

    Args:
        folder: Folder of the tests of diffusers.
        cache: Cache of the Hub with the stand-ins.
    """
    path = [str(ROOT / "tests/helpers"), str(ROOT), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache of the Hub with small checkpoints."""
    cache = tmp_path_factory.mktemp("hub")
    command = [sys.executable, str(ROOT / "tests/helpers/small_checkpoints.py")]
    done = subprocess.run(command, env=environment(Path(FOLDER).absolute(), cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return cache


def outcomes(folder, files, tmp_path, *options, cache=None):
    """Run test files in a process of their own; return the outcome of each test and the printed lines.

    Args:
        folder: Folder of the tests of diffusers.
        files: Files in it.
        tmp_path: Folder of the results.
        options: Further options of pytest.
        cache: Cache of the Hub with the stand-ins.
    """
    results = tmp_path / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", folder]
    command += ["-p", "accelerator_tests", f"--junitxml={results}", *options, *files]
    done = subprocess.run(
        list(map(str, command)), cwd=folder.parent, env=environment(folder, cache or tmp_path), capture_output=True,
        text=True,
    )  # fmt: skip
    assert results.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        found[f"{case.get('classname')}.{case.get('name')}"] = kind
    return found, done.stdout


def version_of_tests(folder):
    """Return the version of diffusers that a folder of its tests belongs to."""
    setup = folder.parent / "setup.py"
    found = re.search(r'version="([^"]+)"', setup.read_text()) if setup.exists() else None
    return "unknown" if found is None else found[1]


def record(path, key, row):
    """Add the numbers of a part to a JSON file."""
    found = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    found |= {
        "command": "UNIREF_FAST_DIFFUSERS_TESTS=diffusers/tests python -m pytest tests/patch/test_diffusers.py -s"
    }
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    found["parts"][key] = row | versions | {"date": str(datetime.date.today())}
    path.write_text(json.dumps(found, indent=1) + "\n")


def table(results):
    """Return the Markdown table of the numbers in a JSON file of `record`."""
    lines = ["| family, tests | of version | tests | pass | fail | skipped | other outcome with the patch |"]
    lines.append("|---|---|---|---|---|---|---|")
    for key, row in sorted(results["parts"].items()):
        family, part = key.split("/")
        stock = row["stock"]
        numbers = stock["passed"], stock["failure"] + stock["error"], stock["skipped"], row["changed"]
        cells = f"{family}, {part}", row["version_of_tests"], row["tests"], *numbers
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="UNIREF_FAST_DIFFUSERS_TESTS names no tests of diffusers; wheels have none")
@pytest.mark.parametrize("part", FOLDERS)
@pytest.mark.parametrize("family", PARTS)
def test_the_same_tests_of_diffusers_fail_with_the_patch(family, part, tmp_path, cache):
    folder = Path(FOLDER).absolute()
    files = files_of(folder, family, part)
    if not files:
        pytest.skip(f"{folder} has no tests of {family}, {part}; diffusers {diffusers.__version__} is installed")
    expected, _ = outcomes(folder, files, tmp_path, cache=cache)
    found, text = outcomes(folder, files, tmp_path, "-p", "patched_models", cache=cache)
    kinds = {
        side: {kind: list(tests.values()).count(kind) for kind in ("passed", "failure", "error", "skipped")}
        for side, tests in (("stock", expected), ("patched", found))
    }
    summary = text[text.index("patched models:") :]
    print(f"\n{family}, {part}: {len(files)} files, {len(found)} tests, {kinds}\n{summary}")
    changed = {name: (expected.get(name), found.get(name)) for name in expected.keys() | found.keys()
               if expected.get(name) != found.get(name)}  # fmt: skip
    calls = re.search(r"accelerated calls: (\d+)", summary)
    if path := os.environ.get("UNIREF_FAST_DIFFUSERS_RESULTS"):
        row = {"files": len(files), "tests": len(found), "changed": len(changed), "accelerated_calls": int(calls[1])}
        record(Path(path), f"{family}/{part}", row | kinds | {"version_of_tests": version_of_tests(folder)})
    assert "passed" in expected.values() and int(calls[1]) and not changed, changed


def test_the_files_of_a_family(tmp_path):
    names = (
        "models/transformers/test_models_transformer_flux2.py", "models/transformers/test_models_transformer_flux.py",
        "models/transformers/test_models_transformer_qwenimage.py", "pipelines/qwenimage/test_qwenimage_edit.py",
        "models/transformers/test_models_transformer_qwenimage21.py", "pipelines/flux2/test_pipeline_flux2_klein.py",
        "modular_pipelines/flux2/test_modular_pipeline_flux2.py", "lora/test_lora_layers_flux.py",
        "lora/test_lora_layers_flux2.py", "pipelines/controlnet_flux/test_controlnet_flux.py",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {(family, part): [path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path, family, part)]
             for family in PARTS for part in FOLDERS}  # fmt: skip
    assert {key: paths for key, paths in found.items() if paths} == {
        ("qwen-image-edit", "model"): [names[2]], ("qwen-image-edit", "pipelines"): [names[3]],
        ("qwen-image-2.1", "model"): [names[4]],
        ("flux2", "model"): [names[0]], ("flux2", "pipelines"): [names[5]], ("flux2", "modular"): [names[6]],
        ("flux2", "lora"): [names[8]],
        ("flux1", "model"): [names[1]], ("flux1", "pipelines"): [names[9]], ("flux1", "lora"): [names[7]],
    }  # fmt: skip
    assert PARTS.keys() == {family.name for family in families()}


def test_the_table_of_the_documentation():
    results = json.loads(RESULTS.read_text())
    assert table(results) in (ROOT / "docs/patching.md").read_text(), "write `table` of the results into the page"
    assert all(row["changed"] == 0 and row["accelerated_calls"] for row in results["parts"].values())


def test_a_stand_in_is_found_without_the_hub(tmp_path):
    name = "peft-internal-testing/tiny-clip-text-2"
    folder = small_checkpoints.place(tmp_path, name)
    for part in small_checkpoints.CHECKPOINTS[name]():
        part.save_pretrained(folder)
    found = transformers.CLIPTextModel.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert found.config.hidden_size == 32


@pytest.mark.slow
def test_outcomes_with_and_without_the_patch(tmp_path):
    """A test that only passes without the patch has another outcome with it."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_small.py").write_text(
        "import diffusers, torch\n"
        "def test_stock():\n"
        "    with torch.device('meta'):\n"
        "        model = diffusers.Flux2Transformer2DModel(num_layers=1, num_single_layers=1)\n"
        "    assert type(model.transformer_blocks[0].attn.processor).__module__.startswith('diffusers')\n"
        "def test_fails():\n"
        "    assert False\n"
    )
    stock, _ = outcomes(folder, [folder / "test_small.py"], tmp_path)
    patched, text = outcomes(folder, [folder / "test_small.py"], tmp_path, "-p", "patched_models")
    assert {name.rpartition(".")[2]: kind for name, kind in stock.items()} == {
        "test_stock": "passed", "test_fails": "failure",
    }  # fmt: skip
    assert set(patched.values()) == {"failure"} and "patched models: 1" in text
