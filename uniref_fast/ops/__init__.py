"""The operations: one name, one meaning, three implementations each (`impl="reference" | "native" | "triton"`)."""

from uniref_fast.ops._dispatch import IMPLEMENTATIONS, choose, explain, unavailable
from uniref_fast.ops.norm_modulate import gate_residual, gate_residual_norm_modulate, norm_modulate
from uniref_fast.ops.patchify import pack, unpack
from uniref_fast.ops.qk_norm_rope import qk_norm_rope
from uniref_fast.ops.segment_attention import segment_attention

__all__ = [
    "IMPLEMENTATIONS",
    "choose",
    "explain",
    "gate_residual",
    "gate_residual_norm_modulate",
    "norm_modulate",
    "pack",
    "qk_norm_rope",
    "segment_attention",
    "unavailable",
    "unpack",
]
