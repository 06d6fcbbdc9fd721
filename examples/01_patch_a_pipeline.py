"""Make a diffusers pipeline faster in place, and compare its images with those of before.

    python examples/01_patch_a_pipeline.py

It runs the small built-in model on a CPU. For a real model, replace the line that loads it by

    pipe = QwenImageEditPlusPipeline.from_pretrained("Qwen/Qwen-Image-Edit-2511", torch_dtype=torch.bfloat16).to("cuda")

and the images by your own.
"""

import numpy as np
import torch

import uniref_fast
from uniref_fast import builtin
from uniref_fast.demo import heldout_scenes

pipe = builtin.load()  # a diffusers QwenImageEditPlusPipeline
(scene,) = heldout_scenes(seed=0, references=2, count=1)  # two references, and an instruction about them


def run() -> np.ndarray:
    """Call the pipeline as diffusers documents it."""
    return pipe(
        image=list(scene.references),
        prompt=scene.instruction,
        true_cfg_scale=1.0,  # without guidance
        num_inference_steps=4,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images[0]


before = run()
report = uniref_fast.patch(pipe)  # the same pipeline, changed in place
patched = run()
print(report)  # what was accelerated, and what ran the original with the reason
print(f"largest difference of a pixel, 0 to 1: {np.abs(patched - before).max():.1e}")

uniref_fast.unpatch(pipe)  # exactly as before
assert np.array_equal(run(), before)
