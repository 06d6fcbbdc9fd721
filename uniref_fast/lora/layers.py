"""The change that an adapter makes to one layer: its tensors, its scale, and the difference of the weight.

    lora   up @ down * alpha / rank
    lokr   kron(w1, w2), where w1 and w2 may themselves be products of two matrices
    loha   (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank, elementwise
    full   the difference itself

A magnitude makes it a DoRA: each row of the changed weight is scaled to the norm that the magnitude says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Layer", "as_lora", "folded"]

KINDS = {"diff": "full", "up_bias": "full", "down": "lora", "up": "lora", "lokr": "lokr", "hada": "loha"}


@dataclass(frozen=True)
class Layer:
    """The change of one layer.

    Attributes:
        tensors: Tensors by the names of `uniref_fast.lora.names.Key`, without alpha.
        alpha: Alpha, which is divided by the rank; None if the change is not scaled.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None

    @property
    def kinds(self) -> set[str]:
        """Kinds of the change: lora, lokr, loha or full, and full beside another one for the difference of a bias."""
        names = [name for name in self.tensors if name != "magnitude"]
        return {next(kind for start, kind in KINDS.items() if name.startswith(start)) for name in names}

    @property
    def rank(self) -> int | None:
        """Rank that alpha is divided by; None where alpha has no meaning."""
        for name in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
            if name in self.tensors:
                return self.tensors[name].shape[0]
        return None

    @property
    def scale(self) -> float:
        """Factor alpha / rank; 1 without either."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of the weight that is changed; None if only a bias or a vector is changed."""
        has = {name: tensor.shape for name, tensor in self.tensors.items()}
        if "up" in has:
            return has["up"][0], has["down"][1]
        if "hada_w1_a" in has:
            return has["hada_w1_a"][0], has["hada_w1_b"][1]
        if any(name.startswith("lokr_") for name in has):
            first, second = (
                has.get(f"lokr_{w}") or (has[f"lokr_{w}_a"][0], has[f"lokr_{w}_b"][1]) for w in ("w1", "w2")
            )
            return first[0] * second[0], first[1] * second[1]
        return (has["diff"][0], has["diff"][1]) if len(has.get("diff", ())) == 2 else None

    def missing(self) -> list[str]:
        """Return the names of tensors without which the others cannot be used."""
        has = self.tensors
        pairs = [("down", "up"), *((f"lokr_{w}_a", f"lokr_{w}_b") for w in ("w1", "w2"))]
        found = [b if a in has else a for a, b in pairs if (a in has) != (b in has)]
        if any(name.startswith("lokr_") for name in has):
            found += [f"lokr_{w}" for w in ("w1", "w2") if f"lokr_{w}" not in has and f"lokr_{w}_a" not in has]
        if any(name.startswith("hada_") for name in has):
            found += [f"hada_{w}_{m}" for w in ("w1", "w2") for m in "ab" if f"hada_{w}_{m}" not in has]
        return found


def folded(layer: Layer) -> Layer:
    """Return the same change of a LoRA or LoKr without alpha, whose factor is multiplied into the matrices.

    Powers of two are divided evenly between both matrices of a LoRA, so that neither leaves the range of 16 bits; they
    change no digit. The rest of the factor is multiplied into one matrix in float32 and rounded once.
    """
    if layer.scale == 1:
        return Layer(layer.tensors, None)
    tensors = dict(layer.tensors)
    rest, exponent = math.frexp(layer.scale)  # 0.5 <= rest < 1
    rest, exponent = 2 * rest, exponent - 1
    if "up" in tensors:
        half = exponent // 2
        factors = {"up": 2.0**half, "down": rest * 2.0 ** (exponent - half)}
    else:
        factors = {next(n for n in ("lokr_w1", "lokr_w1_a") if n in tensors): layer.scale}
    for name, factor in factors.items():
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
    return Layer(tensors, None)


def as_lora(layer: Layer) -> Layer:
    """Return a LoHa of rank r as the LoRA of rank r * r that makes the same change.

    Column (i, j) of `up` is the product of column i of the first and column j of the second matrix, in float32.
    """
    first_a, first_b, second_a, second_b = (layer.tensors[f"hada_{name}"].float()
                                            for name in ("w1_a", "w1_b", "w2_a", "w2_b"))  # fmt: skip
    up = (first_a[:, :, None] * second_a[:, None, :]).flatten(1)
    down = (first_b[:, None, :] * second_b[None, :, :]).flatten(0, 1)
    rest = {name: tensor for name, tensor in layer.tensors.items() if not name.startswith("hada_")}
    return Layer({"down": down * layer.scale, "up": up, **rest}, None)
