"""Run every script in `examples/`, and check what it prints and writes."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from PIL import Image

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "examples"
PRINTED = {
    "01_patch_a_pipeline": ["originals run   0 calls", "8 of 8 sites compared"],
    "02_edit_a_batch": ["out/edit-3.png: 96 x 64"],
    "03_estimate": ["of the transformer's operations", "pack_tokens=300"],
    "04_lora_on_your_pictures": ["out/lora/edited.png: 64 x 64"],
    "05_custom_reward": ["reward by step: ["],
    "06_custom_visibility": [
        "queries [7, 11) attend to keys [0, 3), [7, 11)",
        "###....####....",
        "edited 64 x 64 pixels",
    ],
}
WRITTEN = {"02_edit_a_batch": ["out/edit-0.png", "out/edit-2.png"], "04_lora_on_your_pictures": ["out/lora/edited.png"]}
SLOW = ("04_lora_on_your_pictures", "05_custom_reward")  # train in a process of their own


def run(command, check, cwd=None):
    """Run a command of Python in a process that starts quickly."""
    assert check and command[0] == sys.executable
    done = warm.run(*command[1:], cwd=cwd or Path.cwd())
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*PRINTED}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PRINTED])
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # examples write below the working directory
    monkeypatch.setattr(subprocess, "run", run)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for text in PRINTED[name]:
        assert text in printed, printed
    for file in WRITTEN.get(name, ()):
        with Image.open(tmp_path / file) as image:
            assert image.size == (64, 64) and image.convert("L").getextrema()[0] < image.convert("L").getextrema()[1]
    if name == "05_custom_reward":
        rewards = [float(word) for word in printed.partition("reward by step: [")[2].partition("]")[0].split(",")]
        assert len(rewards) == 2 and all(0 < reward < 10 for reward in rewards)


def test_the_example_of_the_readme():
    """Run it with the built-in model, drawn pictures and two steps."""
    (code,) = re.findall(r"```python\n(.*?)```", (FOLDER.parent / "README.md").read_text(), flags=re.S)
    for before, after in (
        (r"QwenImageEditPlusPipeline\.from_pretrained\(.*\)", "builtin.load()"),
        ("from diffusers.utils import load_image", "from uniref_fast import builtin"),
        (r'load_image\("(\w+)\.png"\)', r'Image.new("RGB", (64, 64), len("\1"))'),
        (r'negative_prompt=" "', 'negative_prompt=" ", num_inference_steps=2'),
        (r'"negative_prompt": " "', '"negative_prompt": " ", "num_inference_steps": 2'),
    ):
        code, found = re.subn(before, after, code)
        assert found, before
    names = {"Image": Image}
    exec(code, names)
    assert names["report"].fallbacks.total() == 0
    assert len(names["images"]) == len(names["requests"]) == 2
