"""Kernels compiled for GPUs that are not here, judged by the compiler's report; see `kernels/compile_matrix.py`."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ("-m", "uniref_fast.kernels.compile_matrix")


def python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    """A process of its own: in this one the kernels may be interpreted, which is settled at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def compiled(names: tuple[str, ...], *archs: str) -> dict[str, list[str]]:
    """Return the lines of the report by architecture, after all launches were compiled without violations."""
    result = python(*MATRIX, "--arch", *archs, "--head-dim", "128", "--only", *names, "--jobs", "1")
    assert result.returncode == 0 and ", 0 violations" in result.stdout, f"{result.stdout}\n{result.stderr}"
    return {arch: [line for line in result.stdout.splitlines() if f"sm_{arch} " in line] for arch in archs}


def test_attention_compiles_without_violations():
    """The kernels that fill the registers. `make kernels` compiles all, and with the newest Triton."""
    found = compiled(("attention", "attention_backward", "attention_causal", "attention_backward_causal"), "90")
    assert len(found["90"]) == 16
    found = compiled(("attention_backward",), "80", "100")
    assert len(found["80"]) == len(found["100"]) > 0


def test_attention_in_8_bits_compiles_without_violations():
    found = compiled(("attention_fp8",), "89", "100") | compiled(("attention_fp8", "attention_fp8_causal"), "90")
    assert all("segment_attention_fp8_kernel" in "".join(lines) for lines in found.values())


def test_token_kernels_compile_without_violations():
    names = ("norm_modulate", "gate_residual_norm_modulate_backward", "qk_norm_rope_backward", "gelu_fp8")
    assert compiled(names, "90")["90"]


def test_unknown_launches_are_named():
    result = python(*MATRIX, "--only", "attentoin")
    assert result.returncode == 2 and "attention_backward" in result.stderr


# Too few warps for the tile, too many stages for the memory; rows of an odd length, which no vector is aligned to.
BAD_LAUNCHES = """
import torch
from uniref_fast.kernels import compile_matrix as matrix, norm_modulate
from uniref_fast.kernels import segment_attention_config as configs
configs.pick_config = lambda *_: configs.AttentionConfig(128, 64, num_warps=4, num_stages=6)
attention = next(case for case in matrix.cases(80, (128,)) if case.name == "attention")
(report,) = matrix.compile_case(attention, 80)
print(report.violations())
x = matrix._meta(64, 77)
odd = matrix.Case("norm", torch.bfloat16, 0, lambda arch: norm_modulate.norm_modulate(x, x, x, None, 1e-6))
(report,) = matrix.compile_case(odd, 80)
print(report.violations())
"""


def test_violations_are_seen():
    """Launches that cannot pass must fail, or the checks above show nothing."""
    result = python("-c", BAD_LAUNCHES)
    assert result.returncode == 0, result.stderr
    attention, norm = result.stdout.splitlines()
    assert "local-memory instructions" in attention and "bytes of shared memory, limit" in attention
    assert "global access: loads of 16 bits" in norm and "global accesses of 8 or 16 bits" in norm


def test_refuses_to_run_interpreted():
    result = python(*MATRIX, interpret=True)
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr
