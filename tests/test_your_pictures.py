"""Check that the commands of docs/your-pictures.md lead from drawn pictures to an edit with the adapter."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from PIL import Image, ImageOps

from uniref_fast.scenes.backgrounds import PHOTOS, background

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-pictures.md").read_text()
# A run of two steps.
SHORT = (
    "--stages.0.steps 1 --stages.1.steps 1 --stages.0.pack-tokens 512 --stages.1.pack-tokens 512 "
    "--sample-count 1 --sample-num-inference-steps 2 --warmup 1 --save-every 2"
)


def commands():
    """Return the commands of the page in order."""
    return [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]


def draw(folder, count):
    """Draw photos and their prints in two colours, as the page lays them out."""
    (folder / "control").mkdir(parents=True)
    for i in range(1, count + 1):
        before = background(list(PHOTOS)[i % len(PHOTOS)], (64, 64), i)
        before.save(folder / "control" / f"{i:04}.png")
        after = ImageOps.colorize(ImageOps.autocontrast(before.convert("L")), (24, 20, 80), (255, 190, 110))
        after.save(folder / f"{i:04}.png")
        (folder / f"{i:04}.txt").write_text("print picture 1 in two colours")


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_order(tmp_path):
    draw(tmp_path / "pictures", 10)
    (tmp_path / "training").symlink_to(ROOT / "training")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = {}
    for line in commands():
        if line.startswith("uniref-fast "):
            fewer = ["--num-inference-steps", "2"] if line.startswith("uniref-fast eval ") else []
            done = warm.run("-m", "uniref_fast", *shlex.split(line)[1:], *fewer, cwd=tmp_path, env=environment)
        else:
            command = re.sub(
                "^torchrun (.*)", rf"{sys.executable} -m torch.distributed.run --standalone \1 {SHORT}", line
            )
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed[line] = done.stdout + done.stderr
    found = "\n".join(printed.values())
    assert "10 in 1 file(s), 0 broken" in printed["uniref-fast data check pictures"]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 4
    assert len((tmp_path / "heldout.jsonl").read_text().splitlines()) == 6
    assert "psnr" in found.lower() and "uniref-fast edit --lora runs/mine" in found.replace(f"{tmp_path}/", "")
    for name in ("runs/mine/lora", "runs/mine/samples", "curves.png", "eval/after/grid.png"):
        assert (tmp_path / name).exists(), name
    with Image.open(tmp_path / "result.png") as result:
        assert result.size == (64, 64)


def test_the_page_names_what_the_commands_write():
    text = " ".join(PAGE.split())
    assert commands(), "the page has commands"
    for name in re.findall(r"`((?:runs|eval)/[\w/.]+)`", text):
        assert any(name.startswith(out) for out in re.findall(r"--out (\S+)", "\n".join(commands()))), name
