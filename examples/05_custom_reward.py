"""Train with a reward function of your own.

    python examples/05_custom_reward.py

A reward takes a `Candidate` (instruction, references, image, row) and returns a score from 0 to 10 for each axis, with
the same axes every time. `--rewards module:function` names it, and the module is found from the working directory.
Several rewards may be given and weighted, such as `--rewards judge,my_rewards:brightness --reward-weights 1,0.2`.

This runs two steps of the small built-in model on a CPU. For a real model, use `--recipe lora`, your rows, and
`torchrun --nproc-per-node N`; see docs/msgrpo.md.
"""

import json
import subprocess
import sys
from pathlib import Path

from PIL import ImageStat

from uniref_fast.rewards import UnscoredError
from uniref_fast.rewards.types import Candidate


def brightness(candidate: Candidate) -> dict[str, float]:
    """Score how bright the image is, from 0 for black to 10 for white."""
    if candidate.image.width < 16:  # an image that cannot be scored is left out of its group
        raise UnscoredError("the image is smaller than 16 pixels")
    (mean,) = ImageStat.Stat(candidate.image.convert("L")).mean
    return {"brightness": mean / 25.5}


def main() -> None:
    """Write a few rows, then train on them with `brightness`."""
    from uniref_fast.demo import heldout_scenes  # here, so that training imports the function above alone

    out = Path("out/reward").resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    scenes = [*heldout_scenes(0, references=2, count=2), *heldout_scenes(0, references=1, count=2)]
    for number, scene in enumerate(scenes):
        names = [f"{number}_{i}.png" for i in range(len(scene.references))]
        for name, image in zip(names, scene.references, strict=True):
            image.save(out / name)
        rows.append({"input_images": names, "instruction": scene.instruction})  # rows need no target
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    here = Path(__file__).resolve()
    command = [sys.executable, here.parent.parent / "training" / "msgrpo.py", "--recipe", "tiny",
               "--data", out / "rows.jsonl", "--out", out / "run", "--resume", "auto",
               "--rewards", f"{here.stem}:brightness", "--steps", "2", "--prompts", "2", "--group", "2",
               "--rollout-num-inference-steps", "4", "--noise", "0.4", "--eval-every", "0", "--sample-every", "0",
               "--tensorboard", "false"]  # fmt: skip
    print("$", *command)
    subprocess.run(list(map(str, command)), check=True, cwd=here.parent)

    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    print("reward by step:", [round(line["reward"], 3) for line in lines if "reward" in line])


if __name__ == "__main__":
    main()
