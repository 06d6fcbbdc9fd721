"""CPU kernels (`csrc/`), called through ctypes: torch tensors in, torch tensors out; forward and backward.

The library is plain C++ behind a C ABI, built by `setup.py` without torch headers, so one build serves any torch. It
carries the same kernels for several instruction sets and picks the best one that this CPU runs; `level=` forces one.
float32 and bfloat16 storage, float32 arithmetic, one rounding (to nearest even) when a result is stored; where the CPU
multiplies bfloat16 itself (level avx512bf16), attention's probabilities are rounded too. No result depends on the
number of threads.

Without a compiler at install time there is no library: `available()` is then False and `reason()` says why.
"""

from uniref_fast.native.attention import segment_attention, segment_attention_backward
from uniref_fast.native.gelu import gelu, gelu_backward
from uniref_fast.native.library import available, has_branch_norm, has_gelu, levels, missing, reason
from uniref_fast.native.rope import qk_norm_rope, qk_norm_rope_backward
from uniref_fast.native.token_ops import (
    gate_residual,
    gate_residual_backward,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_backward,
    norm_modulate,
    norm_modulate_backward,
)

__all__ = [
    "available",
    "gate_residual",
    "gate_residual_backward",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_backward",
    "gelu",
    "gelu_backward",
    "has_branch_norm",
    "has_gelu",
    "levels",
    "missing",
    "norm_modulate",
    "norm_modulate_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "reason",
    "segment_attention",
    "segment_attention_backward",
]
