"""How rollouts add noise; `sde.py` has the formulas. Without PyTorch, which the help of a command does not need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Sampler"]


@dataclass(frozen=True)
class Sampler:
    """How noise is added on the way.

    Attributes:
        kind: of the noisy steps.
        noise: a of the formulas. For "cps" from 0 to 1.
    """

    kind: Literal["sde", "cps"] = "sde"
    noise: float = 0.7

    def __post_init__(self) -> None:
        most = math.inf if self.kind == "sde" else 1.0
        if self.kind not in ("sde", "cps") or not 0 < self.noise <= most or math.isinf(self.noise):
            raise ValueError(
                f'a sampler is "sde" with noise above 0, or "cps" with noise above 0 and up to 1; got "{self.kind}" '
                f"with {self.noise}"
            )
