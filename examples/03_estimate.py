"""Estimate tokens, operations and memory of an edit before anything runs.

    python examples/03_estimate.py

Given a pipeline, `estimate` reads its parts. Given a folder or a hub id, it reads configurations only and loads no
weights: `uniref_fast.estimate("Qwen/Qwen-Image-Edit-2511", requests)`.
"""

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.demo import heldout_scenes

pipe = builtin.load()
scenes = heldout_scenes(0, references=3, count=4)
requests = [EditRequest(scene.instruction, scene.references, width=64, height=64) for scene in scenes]

# Sizes in pixels are enough; then the requests need no images.
planned = [EditRequest("put the cup of picture 1 on picture 2")]
print(uniref_fast.estimate(pipe, planned, image_sizes=[[(1024, 768), (800, 800)]]), end="\n\n")

whole = uniref_fast.estimate(pipe, requests)
print(whole)

# Two ways to use less memory: smaller packs, and fewer pixels for the references of each request together.
small = uniref_fast.estimate(pipe, requests, pack_tokens=300)
fewer = uniref_fast.estimate(pipe, requests, budget=64)
for name, result in (("one pack", whole), ("pack_tokens=300", small), ("budget=64", fewer)):
    print(f"{name:16} {result.tokens['together']:5} tokens, peak {result.peak_bytes / 2**20:.1f} MiB")
