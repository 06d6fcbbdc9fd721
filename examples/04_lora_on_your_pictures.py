"""Train a LoRA on a folder of image pairs, then edit with it.

    python examples/04_lora_on_your_pictures.py

It runs four steps of the small built-in model on a CPU, which is enough to show every part and not enough to learn. The
folder has the layout of ai-toolkit and musubi-tuner; put your own images there:

    pictures/0000.png  0000.txt       the edited image and its instruction
    pictures/control/0000.png         the image before

For a real model, leave out everything of the command below but `--recipe lora`, `--data` and `--out`, start it with
`torchrun --nproc-per-node N`, and load the pipeline by `QwenImageEditPlusPipeline.from_pretrained(...)`.
"""

import subprocess
import sys
from pathlib import Path

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.demo import heldout_scenes

TRAIN = Path(__file__).parent.parent / "training" / "sft.py"
out = Path("out/lora")

# A folder of pairs. Here the images are synthetic scenes with one reference each.
pictures = out / "pictures"
(pictures / "control").mkdir(parents=True, exist_ok=True)
scenes = heldout_scenes(0, references=1, count=8)
for number, scene in enumerate(scenes):
    scene.references[0].save(pictures / "control" / f"{number:04}.png")
    scene.target.save(pictures / f"{number:04}.png")
    (pictures / f"{number:04}.txt").write_text(scene.instruction)

# `--resume auto` continues a run that was stopped, so the same command can always be given again.
run = out / "run"
command = [sys.executable, TRAIN, "--recipe", "tiny", "--data", pictures, "--out", run, "--resume", "auto",
           "--lora-rank", "4", "--steps", "4", "--eval-every", "0", "--sample-every", "0",
           "--tensorboard", "false"]  # fmt: skip
print("$", *command)
subprocess.run(list(map(str, command)), check=True)

# The adapter is in the format of diffusers.
pipe = builtin.load()
pipe.load_lora_weights(run / "lora")
request = EditRequest(scenes[0].instruction, scenes[0].references, true_cfg_scale=1.0, seed=0, width=64, height=64,
                      num_inference_steps=4)  # fmt: skip
(image,) = uniref_fast.edit(pipe, [request], progress=False)
image.save(out / "edited.png")
print(f"{out / 'edited.png'}: {image.width} x {image.height}, edited with the adapter of {run / 'lora'}")
