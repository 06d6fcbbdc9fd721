"""The on-policy check: before the first update, a replay must give the rollout's own probabilities at every timestep.

With unchanged weights the ratio of a step is 1. If it is not, the replay is another computation than the rollout (other
packs, other precision, another random stream, dropout), and an objective with a clip of 1e-4 would train on that
difference. So training is refused, and the error names the first timestep that differs and the likely cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from uniref_fast.models.packed import PackedModel
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.rl.rollout import RolloutPack, replay, velocities
from uniref_fast.training.rl.sde import Sampler, log_density

__all__ = ["TOLERANCE", "OffPolicyError", "ReplayedStep", "check_on_policy", "probe", "refuse_off_policy", "table"]

TOLERANCE = 2e-6  # largest |log-ratio| that counts as 0: it is a mean over dimensions in float32
DIAGNOSIS_FORWARDS = 4  # forwards of `probe` with `diagnose`: one replay and three of `_cause`


class OffPolicyError(RuntimeError):
    """The replay does not repeat the rollout."""


@dataclass(frozen=True)
class ReplayedStep:
    """Difference between a replay and the rollout at one noisy step of one member.

    Attributes:
        step: Number of the denoising step.
        t: Time at which the step starts.
        log_ratio: Log-probability in the replay minus that in the rollout.
        cause: Likely cause; empty if the ratio is 1.
    """

    step: int
    t: float
    log_ratio: float
    cause: str = ""

    @property
    def off(self) -> bool:
        """Return True if the ratio is not 1."""
        return not abs(self.log_ratio) <= TOLERANCE  # NaN is off too

    def because(self, again: ReplayedStep) -> ReplayedStep:
        """Return this step with the cause that a second, diagnosing probe found."""
        unsteady = "a second replay gave another number: a kernel or a module is not deterministic"
        return replace(self, cause=(again.cause or unsteady) if self.off else "")


def check_on_policy(
    packed: PackedModel,
    packs: Sequence[RolloutPack | None],
    noisy_steps: int,
    sampler: Sampler,
    ranks: Ranks,
    idle: Callable[[], object],
) -> list[ReplayedStep]:
    """Replay every noisy step of a rollout. All ranks must call.

    Args:
        packed: Model.
        packs: Packs of this rank, denoised; None where it has none.
        noisy_steps: Number of noisy steps of each member.
        sampler: Sampler of the rollout.
        ranks: Ranks of the run.
        idle: Function that takes part in a forward without a pack.

    Returns:
        One entry for each member and noisy step of all ranks.
    """
    found: list[ReplayedStep] = []
    for noisy_step in range(noisy_steps):
        for pack in packs:
            mine = [] if pack is None else probe(packed, pack, noisy_step, sampler, diagnose=False)
            if pack is None:
                idle()
            # If any rank is off, all diagnose: its forwards gather sharded weights from every rank.
            if any(ranks.gather(any(one.off for one in mine))):
                if pack is not None:
                    again = probe(packed, pack, noisy_step, sampler, diagnose=True)
                    mine = [one.because(other) for one, other in zip(mine, again, strict=True)]
                else:
                    for _ in range(DIAGNOSIS_FORWARDS):
                        idle()
            found += mine
    return [one for ones in ranks.gather(found) for one in ones]


def refuse_off_policy(found: Sequence[ReplayedStep]) -> None:
    """Raise OffPolicyError if any ratio is not 1; the error names the first such timestep and its likely cause."""
    bad = sorted((one for one in found if one.off), key=lambda one: one.step)
    if not bad:
        return
    first = max((one for one in bad if one.step == bad[0].step), key=lambda one: abs(one.log_ratio))
    raise OffPolicyError(
        f"the replay does not repeat the rollout: {len(bad)} of {len(found)} ratios are not 1. First at timestep "
        f"{first.step} (t = {first.t:.4f}): ratio {math.exp(first.log_ratio):.8f}. Likely cause: {first.cause}. "
        "Nothing was trained"
    )


def probe(
    packed: PackedModel, pack: RolloutPack, noisy_step: int, sampler: Sampler, diagnose: bool = True
) -> list[ReplayedStep]:
    """Replay one noisy step of a pack as the update does, with gradients.

    Args:
        packed: Model.
        pack: Members, denoised.
        noisy_step: Number of the step among the noisy steps of each member.
        sampler: Sampler of the rollout.
        diagnose: If True, run the model three times more to find the cause of a difference; must be the same on all
            ranks.

    Returns:
        One entry for each member.
    """
    found = []
    with torch.enable_grad():
        for member, (i, step) in zip(pack.members, replay(packed, pack, noisy_step, sampler), strict=True):
            taken = member.taken[i]
            now = log_density(taken.after, step).item()
            found.append(ReplayedStep(i, member.group.sigmas[i], now - taken.log_prob))
    if not diagnose:
        return found
    cause = _cause(packed, pack, noisy_step)
    return [replace(one, cause=cause if one.off else "") for one in found]


def _cause(packed: PackedModel, pack: RolloutPack, noisy_step: int) -> str:
    """Return the likely reason why two forwards of the same pack differ, found by trying."""
    steps = [member.group.noisy_steps[noisy_step] for member in pack.members]
    latents = [member.taken[i].before for member, i in zip(pack.members, steps, strict=True)]
    times = [member.group.sigmas[i] for member, i in zip(pack.members, steps, strict=True)]

    def run(gradients: bool) -> list[Tensor]:
        with torch.set_grad_enabled(gradients):
            return [v.detach() for v in velocities(packed, pack, latents, times)]

    dropout = [m for m in packed.transformer.modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    first, second, with_gradients = run(False), run(False), run(True)  # on every rank, whatever the first one shows
    if low := {x.dtype for x in latents if x.dtype != torch.float32}:
        return f"latents are kept in {', '.join(map(str, low))}, not float32: rounding moves the ratio"
    if not _equal(first, second):
        if dropout:
            return f"dropout is on in {len(dropout)} modules: set it to 0"
        return "the same forward twice gives other numbers: a kernel or a module is not deterministic"
    if not _equal(first, with_gradients):
        return "a forward that keeps gradients differs from one that does not: recomputation, compilation or a hook"
    return (
        "weights, packs or latents changed between the rollout and its replay (an adapter, an average, another "
        "layout), or the rollout kept its references and a matrix product depends on its number of rows (leave out "
        "keep_references)"
    )


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def table(found: Sequence[ReplayedStep]) -> str:
    """Return a text table with one line for each noisy step: number of members, and the ratio furthest from 1."""
    lines = ["step  t       members  furthest ratio"]
    for step in sorted({one.step for one in found}):
        ones = [one for one in found if one.step == step]
        worst = max(ones, key=lambda one: abs(one.log_ratio))
        lines.append(
            f"{step:4d}  {worst.t:.4f}  {len(ones):7d}  {math.exp(worst.log_ratio):.9f}  {worst.cause}".rstrip()
        )
    return "\n".join(lines)
