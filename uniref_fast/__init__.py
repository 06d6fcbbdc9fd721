"""uniref_fast: fast multi-reference image editing.

report = uniref_fast.patch(pipe)                    # the same diffusers pipeline, faster
images = uniref_fast.edit(pipe, [request, ...])     # many unlike requests in one packed loop
print(uniref_fast.estimate(pipe, [request, ...]))   # tokens, flops, memory before running
"""

from uniref_fast.budget import fit_to_budget
from uniref_fast.edit import edit
from uniref_fast.estimate import estimate
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models import PackedQwenImage
from uniref_fast.patch import PatchReport, patch, unpatch
from uniref_fast.request import EditRequest

__version__ = "0.1.0.dev0"

__all__ = [
    "EditRequest",
    "PackedQwenImage",
    "PatchReport",
    "Sample",
    "SelfLayout",
    "__version__",
    "edit",
    "estimate",
    "fit_to_budget",
    "patch",
    "unpatch",
]
