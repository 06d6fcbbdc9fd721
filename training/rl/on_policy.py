"""The on-policy gate: before the first update a replay must give the rollout's own probabilities, at every timestep.

With unchanged weights the ratio of a step is 1. Where it is not, the replay is another computation than the rollout
(other packs, other precision, another random stream, dropout), and a clipped objective with a clip of 1e-4 would train
on that difference. So training is refused, with the first timestep that differs and what looks like the cause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from uniref_fast.models import PackedQwenImage
from uniref_fast.training.rl.rollout import RolloutPack, replay, velocities
from uniref_fast.training.rl.sde import Sampler, log_density

__all__ = ["TOLERANCE", "OffPolicyError", "Timestep", "probe", "table"]

TOLERANCE = 2e-6  # of a log-ratio that is a mean over dimensions in float32


class OffPolicyError(RuntimeError):
    """The replay does not repeat the rollout."""


@dataclass(frozen=True)
class Timestep:
    """How far a replay is off at one noisy step of a member.

    Attributes:
        step: its number.
        t: where it starts.
        log_ratio: largest in size over members.
        cause: what it looks like; empty where the ratio is 1.
    """

    step: int
    t: float
    log_ratio: float
    cause: str = ""

    @property
    def off(self) -> bool:
        """Whether the ratio is not 1."""
        return not abs(self.log_ratio) <= TOLERANCE  # nor NaN

    def because(self, again: Timestep) -> Timestep:
        """This one with the cause that a second, diagnosing probe found."""
        unsteady = "a second replay gave another number: a kernel or a module is not deterministic"
        return replace(self, cause=(again.cause or unsteady) if self.off else "")


def probe(
    packed: PackedQwenImage, pack: RolloutPack, slot: int, sampler: Sampler, guidance: float, diagnose: bool = True
) -> list[Timestep]:
    """Replay a noisy step of a pack as the update does, with gradients; one `Timestep` a member.

    All ranks must call alike, and `diagnose` runs the model again: give the same on all of them.
    """
    found = []
    with torch.enable_grad():
        for member, (i, step) in zip(pack.members, replay(packed, pack, slot, sampler, guidance), strict=True):
            now = log_density(member.after[i], step).item()
            found.append(Timestep(i, member.group.grid[i], now - member.log_probs[i]))
    if not diagnose:
        return found
    cause = _cause(packed, pack, slot, guidance)
    return [replace(one, cause=cause if one.off else "") for one in found]


def _cause(packed: PackedQwenImage, pack: RolloutPack, slot: int, guidance: float) -> str:
    """What makes two forwards of the same pack differ, by trying."""
    steps = [member.group.noisy[slot] for member in pack.members]
    latents = [member.before[i] for member, i in zip(pack.members, steps, strict=True)]
    times = [member.group.grid[i] for member, i in zip(pack.members, steps, strict=True)]

    def run(gradients: bool) -> list[Tensor]:
        with torch.set_grad_enabled(gradients):
            return [v.detach() for v in velocities(packed, pack, latents, times, guidance)]

    dropout = [m for m in packed.transformer.modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    first, second, with_gradients = run(False), run(False), run(True)  # on every rank, whatever is found
    if low := {x.dtype for x in latents if x.dtype != torch.float32}:
        return f"latents are kept in {', '.join(map(str, low))}, not float32: rounding moves the ratio"
    if not _equal(first, second):
        if dropout:
            return f"dropout is on in {len(dropout)} modules: set it to 0"
        return "the same forward twice gives other numbers: a kernel or a module is not deterministic"
    if not _equal(first, with_gradients):
        return "a forward that keeps gradients differs from one that does not: recomputation, compilation or a hook"
    return (
        "weights, packs or latents changed between the rollout and its replay: an adapter, an average, another layout"
    )


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def table(found: Sequence[Timestep]) -> str:
    """Ratios by noisy step: how many members, and the one furthest from 1."""
    lines = ["step  t       members  furthest ratio"]
    for step in sorted({one.step for one in found}):
        ones = [one for one in found if one.step == step]
        worst = max(ones, key=lambda one: abs(one.log_ratio))
        lines.append(
            f"{step:4d}  {worst.t:.4f}  {len(ones):7d}  {math.exp(worst.log_ratio):.9f}  {worst.cause}".rstrip()
        )
    return "\n".join(lines)
