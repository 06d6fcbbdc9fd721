"""Name, bytes and flops of launches, as a profiler reads them."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from uniref_fast.kernels import launch_metadata
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.visibility import POLICIES, block_causal, plan

KERNEL = SimpleNamespace(name="a_kernel")
PACK = [Sample(1, (1, 5, 7), ((1, 1, 1), (1, 3, 2))), Sample(((3, True), (2, False)), (1, 4, 4), ((1, 4, 2),))]


@pytest.mark.parametrize("visibility", [*POLICIES, block_causal])
def test_visible_pairs_are_the_area_of_the_plan(visibility):
    compiled = plan(SelfLayout.qwen(PACK), visibility)
    for each in (compiled, compiled.transpose):
        assert launch_metadata.visible_pairs(*each.tensors("cpu")) == compiled.area


def test_attention():
    compiled = plan(SelfLayout.qwen(PACK))
    names = ("p_q_ranges", "p_kv_ptr", "p_kv_ranges")
    q, k = torch.zeros(2, compiled.num_queries, 3, 16, dtype=torch.float16)
    args = {"p_q": q, "p_k": k, "p_v": k, "s_qn": 48, **dict(zip(names, compiled.tensors("cpu"), strict=True))}
    found = launch_metadata.attention_products(2, *names)((1,), KERNEL, args)
    tables = sum(args[name].numel() * 4 for name in names)
    assert found == {"name": "a_kernel", "flops16": 4 * 16 * 3 * compiled.area, "bytes": 4 * q.numel() + tables}


PROGRAM = """
import importlib
from triton.runtime.jit import JITFunction
for module in ("segment_attention", "segment_attention_backward", "norm_modulate", "norm_modulate_backward",
               "qk_norm_rope", "qk_norm_rope_backward", "fp8"):
    found = vars(importlib.import_module(f"uniref_fast.kernels.{module}"))
    kernels = {n: f for n, f in found.items() if isinstance(f, JITFunction) and n.endswith("_kernel")}
    assert kernels, module
    for name, kernel in kernels.items():
        assert kernel.launch_metadata is not None, name
        free = kernel.launch_metadata.__closure__ or ()
        for cell in free:
            if isinstance(cell.cell_contents, str):
                assert cell.cell_contents in kernel.arg_names, (name, cell.cell_contents)
"""


def test_every_kernel_has_metadata_and_the_arguments_that_it_names():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
