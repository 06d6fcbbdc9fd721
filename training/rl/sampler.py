"""Settings of the noise of rollouts; `sde.py` has the formulas. Imports no PyTorch, so that `--help` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Sampler"]


@dataclass(frozen=True)
class Sampler:
    """Settings of the steps that add noise.

    Attributes:
        kind: Sampler: "sde" (stochastic differential equation) or "cps" (coefficient-preserving sampling).
        noise: Noise level, a in the formulas of `sde.py`: above 0, and at most 1 for "cps".
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
