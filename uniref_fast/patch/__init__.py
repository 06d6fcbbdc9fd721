"""`patch(pipe)` makes a diffusers pipeline faster and keeps its images the same; `unpatch(pipe)` undoes it.

Each block is patched at two places, on the instance, never on the class:

1. the attention processor: QK norm, rotary and packing in one pass, attention without a mask tensor;
2. `block.forward`: norms, modulation and gated residuals in one pass each. It is installed *below* the hooks that the
   block already has, with the original's argument names and order, so that caches, offloading and checkpointing keep
   working.

Every call passes cheap guards. A call that they refuse runs the original, and the report counts it with the reason. At
the first accelerated call of each site the code of diffusers runs as well, on the results that the Linears and other
modules returned in that call, and the difference is recorded. No module is called a second time for this self-check.

- `install`: `patch` and `unpatch`.
- `processors`: the two patched places.
- `state`: what they share during a forward.
- `guards`: reasons to run the original.
- `replay`: the self-check.
- `report`: `PatchReport`.
- `stock`: the check of a pipeline that `uniref_fast.edit` needs.
"""

from uniref_fast.patch.install import patch, unpatch
from uniref_fast.patch.report import PatchReport, Site

__all__ = ["PatchReport", "Site", "patch", "unpatch"]
