"""Write a visibility rule of your own, see the plan it becomes, and edit with it.

    python examples/06_custom_visibility.py

A rule says whether the tokens of one segment attend to those of another. It is compiled to intervals of keys, so there
is no mask tensor. A model must be trained with a rule to give good images under it; here only the computation is shown.
"""

import uniref_fast
from uniref_fast import EditRequest, Sample, SelfLayout, builtin
from uniref_fast.demo import heldout_scenes
from uniref_fast.layout import Kind, Segment
from uniref_fast.visibility import full, plan


def references_read_the_prompt(query: Segment, key: Segment) -> bool:
    """Let references attend to each other and to the text, but not to the noisy target.

    Their keys and values then stay the same in all denoising steps.
    """
    return full(query, key) and not (query.kind is Kind.REFERENCE and key.kind is Kind.TARGET)


# A sample with 3 text tokens, a target of 2 x 2 tokens and two references; a second sample without references.
layout = SelfLayout.qwen([Sample(3, (1, 2, 2), ((1, 1, 2), (1, 2, 1))), Sample(2, (1, 1, 2))])
compiled = plan(layout, references_read_the_prompt)
for (start, end), keys in zip(compiled.ranges, compiled.intervals, strict=True):
    print(f"queries [{start}, {end}) attend to keys", ", ".join(f"[{a}, {b})" for a, b in keys))

# Draw it: a row for each query token, a column for each key token.
seen = [[False] * layout.joint_length for _ in range(layout.joint_length)]
for (start, end), keys in zip(compiled.ranges, compiled.intervals, strict=True):
    for query in range(start, end):
        for a, b in keys:
            seen[query][a:b] = [True] * (b - a)
print("\n".join("".join(".#"[visible] for visible in row) for row in seen))

pipe = builtin.load()
(scene,) = heldout_scenes(0, references=2, count=1)
request = EditRequest(scene.instruction, scene.references, true_cfg_scale=1.0, seed=0, width=64, height=64,
                      num_inference_steps=2)  # fmt: skip
(image,) = uniref_fast.edit(pipe, [request], visibility=references_read_the_prompt, progress=False)
print(f"edited {image.width} x {image.height} pixels under a rule of our own")
