"""Edit several different requests in one packed loop.

    python examples/02_edit_a_batch.py

Requests may differ in everything: prompt, number and sizes of the references, size of the result, seed, guidance and
number of steps. Nothing is padded. For a real model, replace the line that loads the built-in one by
`QwenImageEditPlusPipeline.from_pretrained(...)`, and leave out width, height and steps.
"""

from pathlib import Path

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.demo import heldout_scenes

pipe = builtin.load()  # it need not be patched
scenes = [*heldout_scenes(0, references=3, count=2), *heldout_scenes(0, references=1, count=1)]

size = {"width": 64, "height": 64}
requests = [
    EditRequest(scene.instruction, scene.references, true_cfg_scale=1.0, seed=i, num_inference_steps=4 + i, **size)
    for i, scene in enumerate(scenes)
]
# Mappings work too. Guidance runs where a negative prompt is given and the scale is above 1.
guided = {"negative_prompt": " ", "true_cfg_scale": 2.0, "num_inference_steps": 4, "width": 96, "height": 64}
requests.append({"prompt": scenes[0].instruction, "images": scenes[0].references, "seed": 9, **guided})

images = uniref_fast.edit(pipe, requests, progress=False)

out = Path("out")
out.mkdir(exist_ok=True)
for i, image in enumerate(images):
    image.save(out / f"edit-{i}.png")
    print(f"out/edit-{i}.png: {image.width} x {image.height}")

# `pack_tokens` limits the size of a pack, and with it the memory. The results stay the same, up to rounding.
uniref_fast.edit(pipe, requests, pack_tokens=256, progress=False)
