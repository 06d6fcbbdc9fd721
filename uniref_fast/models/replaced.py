"""Names of the modules of a transformer that a packed forward replaces (`Family.replaced`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["CONTINUOUS_NORM", "PROJECTIONS", "QK_NORMS", "Replaced", "layer_norms", "rms_norms"]

NORMS = "diffusers.models.normalization"

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out", "to_add_out")
"""Linears of the attention of a block with two streams; the first three are those of a block with one stream."""

QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""QK norms of the attention of a block with two streams; the first two are those of a block with one stream."""


@dataclass(frozen=True)
class Replaced:
    """A module whose `forward` a packed forward does not call.

    Attributes:
        path: Name in the transformer; `*` stands for every block, the empty path for the transformer itself.
        kind: Class that the module must have exactly, as "package.module:Class".
        methods: Methods of that class whose work the packed forward does.
        calls: Submodules that the packed forward calls instead, with rows `[N, C]` of all samples of a pack.
        reads: Attributes that the packed forward reads.
        onloaded: True if the packed forward runs the hooks of the module that move its weights.
        optional: True if a model may lack the module.
    """

    path: str
    kind: str
    methods: tuple[str, ...] = ("forward",)
    calls: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    onloaded: bool = False
    optional: bool = False


def layer_norms(at: str, names: Iterable[str], kind: str = "torch.nn:LayerNorm") -> tuple[Replaced, ...]:
    """Return LayerNorms without weights of a module.

    Args:
        at: Path of the module.
        names: Names of its norms.
        kind: Class of the norms.
    """
    return tuple(Replaced(f"{at}.{name}", kind, reads=("eps",)) for name in names)


def rms_norms(
    at: str, names: Iterable[str], kind: str = "torch.nn:RMSNorm", optional: bool = False
) -> tuple[Replaced, ...]:
    """Return RMSNorms of a module, whose weights the packed forward reads; the arguments are those of `layer_norms`.

    Args:
        at: Path of the module.
        names: Names of its norms.
        kind: Class of the norms.
        optional: True if a model may lack the norms.
    """
    return tuple(
        Replaced(f"{at}.{name}", kind, reads=("weight", "eps"), onloaded=True, optional=optional) for name in names
    )


CONTINUOUS_NORM = (
    Replaced("norm_out", f"{NORMS}:AdaLayerNormContinuous", calls=("silu", "linear")),
    *layer_norms("norm_out", ("norm",)),
)
"""Adaptive norm of the output of most models, and the LayerNorm inside."""
