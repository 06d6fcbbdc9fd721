"""The tests of diffusers for a family's model and pipelines: the same tests fail with the patch as without it.

Wheels of diffusers have no tests. The variable `UNIREF_FAST_DIFFUSERS_TESTS` names the folder `tests` of a checkout of
the installed version, or of one near to it:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    UNIREF_FAST_DIFFUSERS_TESTS=diffusers/tests python -m pytest tests/patch/test_diffusers.py -s
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import diffusers
import pytest

from uniref_fast.models.family import families

ROOT = Path(__file__).parent.parent.parent
FOLDER = os.environ.get("UNIREF_FAST_DIFFUSERS_TESTS")
PARTS = {  # of the names of files, by family
    "qwen-image-edit": ("transformer_qwenimage", "qwenimage/test_qwenimage"),
    "qwen-image-2.1": ("transformer_qwenimage21", "qwenimage21/"),
    "flux2": ("transformer_flux2", "pipeline_flux2"),
    "flux1": ("transformer_flux.py", "pipeline_flux_kontext"),
    "flux3": ("transformer_flux3", "flux3/"),
    "longcat-image-edit": ("transformer_longcat_image", "longcat_image_edit"),
    "fibo-edit": ("transformer_bria_fibo.py", "bria_fibo_edit/"),
    "fibo-2": ("transformer_bria_fibo2", "bria_fibo2/"),
    "joyimage-edit-plus": ("joyimage_edit_plus",),
    "z-image": ("transformer_z_image", "z_image/"),
}


def files_of(folder, family):
    """Return the files of diffusers' tests for a family, of its model and of its pipelines."""
    found = [path for part in ("models/transformers", "pipelines") for path in (folder / part).rglob("test_*.py")]
    others = [part for name, parts in PARTS.items() if name != family for part in parts]
    chosen = []
    for path in found:
        name = path.relative_to(folder).as_posix()
        longest = max((part for part in (*PARTS[family], *others) if part in name), key=len, default=None)
        if longest in PARTS[family]:
            chosen.append(path)
    return sorted(chosen)


def outcomes(folder, files, tmp_path, *options):
    """Run test files in a process of their own; return the outcome of each test and the printed lines.

    Args:
        folder: Folder of the tests of diffusers.
        files: Files in it.
        tmp_path: Folder of the results.
        options: Further options of pytest.
    """
    results = tmp_path / "results.xml"
    path = os.pathsep.join([str(ROOT / "tests/helpers"), str(ROOT), str(folder.parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", folder]
    command += [f"--junitxml={results}", *options, *files]
    done = subprocess.run(
        list(map(str, command)), cwd=folder.parent, env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert results.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        found[f"{case.get('classname')}.{case.get('name')}"] = kind
    return found, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="UNIREF_FAST_DIFFUSERS_TESTS names no tests of diffusers; wheels have none")
@pytest.mark.parametrize("family", PARTS)
def test_the_same_tests_of_diffusers_fail_with_the_patch(family, tmp_path):
    folder = Path(str(FOLDER)).absolute()
    files = files_of(folder, family)
    if not files:
        pytest.skip(f"{folder} has no tests of {family}; diffusers {diffusers.__version__} is installed")
    expected, _ = outcomes(folder, files, tmp_path)
    found, text = outcomes(folder, files, tmp_path, "-p", "patched_models")
    print(f"\n{family}: {len(files)} files, {len(found)} tests")
    for kind in ("passed", "failure", "error", "skipped"):
        print(f"  {kind}: {list(expected.values()).count(kind)} stock, {list(found.values()).count(kind)} patched")
    summary = text[text.index("patched models:") :]
    print(summary)
    assert "passed" in expected.values() and "accelerated calls: 0" not in summary
    changed = {name: (expected[name], kind) for name, kind in found.items() if expected.get(name) != kind}
    assert not changed and expected.keys() == found.keys(), changed


def test_the_files_of_a_family(tmp_path):
    names = (
        "models/transformers/test_models_transformer_flux2.py", "models/transformers/test_models_transformer_flux.py",
        "models/transformers/test_models_transformer_qwenimage.py", "pipelines/qwenimage/test_qwenimage_edit.py",
        "models/transformers/test_models_transformer_qwenimage21.py", "pipelines/flux2/test_pipeline_flux2_klein.py",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {family: [path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path, family)] for family in PARTS}
    assert {family: paths for family, paths in found.items() if paths} == {
        "qwen-image-edit": [names[2], names[3]], "qwen-image-2.1": [names[4]], "flux2": [names[0], names[5]],
        "flux1": [names[1]],
    }  # fmt: skip
    assert found.keys() == {family.name for family in families()}


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
