"""The operations: one name, one meaning, three implementations each (`impl="reference" | "native" | "triton"`).

GELU has no Triton kernel. Attention has more implementations, which are libraries: "dense" (PyTorch's own fused
attention), "flash" (FlashAttention 2, 3 and 4) and "cudnn_flex" (cuDNN's flex attention).
"""

from uniref_fast.ops._dispatch import (
    ATTENTION_LIBRARIES,
    IMPLEMENTATIONS,
    Rounding,
    choose,
    explain,
    is_traced,
    unavailable,
)
from uniref_fast.ops.attention_fp8 import attention_fp8
from uniref_fast.ops.fp8 import (
    gate_residual_norm_modulate_fp8,
    gelu_fp8,
    norm_modulate_fp8,
    quantize_fp8,
    scaled_linear,
)
from uniref_fast.ops.gelu import gelu
from uniref_fast.ops.norm_modulate import gate_residual, gate_residual_norm_modulate, norm_modulate
from uniref_fast.ops.qk_norm_rope import qk_norm_rope
from uniref_fast.ops.segment_attention import attention_unavailable, explain_attention, segment_attention

__all__ = [
    "ATTENTION_LIBRARIES",
    "IMPLEMENTATIONS",
    "Rounding",
    "attention_fp8",
    "attention_unavailable",
    "choose",
    "explain",
    "explain_attention",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_fp8",
    "gelu",
    "gelu_fp8",
    "is_traced",
    "norm_modulate",
    "norm_modulate_fp8",
    "qk_norm_rope",
    "quantize_fp8",
    "scaled_linear",
    "segment_attention",
    "unavailable",
]
