"""Rollouts: a prompt's references and many noises, denoised in packs, and the same packs run again for their gradient.

A *group* is one row of the data and `group` members that differ in their noise alone. Members are laid out once, in
packs; the rollout runs each pack through all denoising steps, and the replay runs the same pack at the same latents
through the same `transition`. So the replay repeats the numbers of the rollout, bit for bit where kernels are
deterministic. Noise is keyed by member and step, never by rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uniref_fast.guidance import guide
from uniref_fast.keyed_random import draw
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models import PackedQwenImage
from uniref_fast.schedule import denoising_schedule
from uniref_fast.training.batches.samples import Prepared
from uniref_fast.training.rl.sde import Sampler, Transition, log_density, transition

__all__ = ["Group", "Member", "RolloutPack", "noisy_steps", "plan_packs", "replay", "roll", "schedule", "velocities"]

MemberKey = tuple[int, int, int]


@dataclass
class Group:
    """A prompt.

    Attributes:
        key: (epoch, index) of its row.
        prepared: its sizes.
        lengths: tokens of the instruction and, with guidance, of the empty one.
        grid: times from 1 to 0, one more than there are steps.
        noisy: numbers of the steps with noise, ascending; the same for all members.
        number: that tells the groups of a step apart.
        references: latents of all its references, `[m, C]`; like `texts` only where its members run.
        texts: embeddings `[l, D]` of the instruction and, with guidance, of the empty one.
    """

    key: tuple[int, int]
    prepared: Prepared
    lengths: tuple[int, ...]
    grid: tuple[float, ...]
    noisy: tuple[int, ...]
    number: int
    references: Tensor | None = None
    texts: tuple[Tensor, ...] = ()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Of one member in a pack: with guidance two."""
        shape = self.prepared.sample
        return tuple(Sample(length, shape.target, shape.references, self.number) for length in self.lengths)

    @property
    def target_tokens(self) -> int:
        return math.prod(self.prepared.sample.target)

    @property
    def reference_tokens(self) -> int:
        return sum(map(math.prod, self.prepared.sample.references))

    @property
    def own_tokens(self) -> int:
        """Of one member, references left out."""
        return sum(self.lengths) + len(self.lengths) * self.target_tokens

    @property
    def tokens(self) -> int:
        """Of one member that shares nothing."""
        return self.own_tokens + len(self.lengths) * self.reference_tokens


@dataclass
class Member:
    """One rollout.

    Attributes:
        key: (epoch, index, number in the group).
        group: what it is a rollout of.
        latents: after the steps so far, float32 `[n, C]`.
        before: latents before each noisy step, and `after`: after it; float32.
        log_probs: of each noisy step as it was taken.
    """

    key: MemberKey
    group: Group
    latents: Tensor
    before: dict[int, Tensor] = field(default_factory=dict)
    after: dict[int, Tensor] = field(default_factory=dict)
    log_probs: dict[int, float] = field(default_factory=dict)

    @classmethod
    def start(cls, group: Group, number: int, seed: int) -> Member:
        """Noise at t = 1."""
        key = (*group.key, number)
        assert group.references is not None
        shape = group.target_tokens, group.references.shape[1]
        noise = torch.randn(shape, generator=draw(seed, "rollout", key))
        return cls(key, group, noise.to(group.references.device))

    def noise(self, step: int, seed: int) -> Tensor:
        """What the transition of a noisy step is drawn with, float32 `[n, C]`."""
        values = torch.randn(self.latents.shape, generator=draw(seed, "step", (*self.key, step)))
        return values.to(self.latents.device)


@dataclass(frozen=True)
class RolloutPack:
    """Members that run as one sequence."""

    members: tuple[Member, ...]
    layout: SelfLayout
    references: tuple[Tensor, ...]  # of each sample of the layout, [m, C]
    text: Tensor  # [N_text, D]

    @classmethod
    def of(cls, members: Sequence[Member], packed: PackedQwenImage, shared: bool, dtype: torch.dtype) -> RolloutPack:
        samples = [sample for member in members for sample in member.group.samples]
        layout = packed.layout(samples, shared_references=shared)
        groups = {member.group.number: member.group for member in members}
        references = {number: group.references.to(dtype) for number, group in groups.items()}  # type: ignore[union-attr]
        text = [text for member in members for text in member.group.texts]
        by_sample = tuple(references[member.group.number] for member in members for _ in member.group.texts)
        return cls(tuple(members), layout, by_sample, torch.cat(text).to(dtype))

    def image(self, latents: Sequence[Tensor]) -> Tensor:
        """The image stream of the members' latents, `[N_image, C]`."""
        pairs = zip(latents, self.members, strict=True)
        targets = [x.to(self.text.dtype) for x, member in pairs for _ in member.group.texts]
        return self.layout.image_stream(targets, self.references)


def noisy_steps(steps: int, window: int | None, stop: int, seed: int, key: tuple[int, int]) -> tuple[int, ...]:
    """Numbers of a group's noisy steps: a window drawn before `stop`, or all but the last."""
    if window is None:
        return tuple(range(steps - 1))
    places = stop - window + 1
    first = int(torch.randint(places, (), generator=draw(seed, "window", key)))
    return tuple(range(first, first + window))


def schedule(scheduler: Any, tokens: int, steps: int) -> tuple[float, ...]:
    """Times of the pipeline's scheduler, from its first to 0."""
    return tuple(denoising_schedule(scheduler, tokens, steps, "cpu").sigmas.tolist())


def plan_packs(groups: Sequence[Group], size: int, pack_tokens: int, least: int, shared: bool) -> list[list[int]]:
    """Members of each pack, as numbers group by group: a multiple of `least` packs, as few as hold `pack_tokens`.

    Members stay in order, so that a group is spread over few packs and its references are shared by most of it.

    Raises:
        ValueError: for a member that is larger than a pack.
    """
    members = [group for group in groups for _ in range(size)]

    def tokens(part: Sequence[int]) -> int:
        inside = [members[i] for i in part]
        if not shared:
            return sum(group.tokens for group in inside)
        owners = {group.number: group for group in inside}.values()
        return sum(group.reference_tokens for group in owners) + sum(group.own_tokens for group in inside)

    alone = [tokens([i]) for i in range(len(members))]
    if max(alone) > pack_tokens:
        where = members[alone.index(max(alone))].prepared.row.where
        raise ValueError(
            f"{where}: a rollout has {max(alone)} tokens, over the {pack_tokens} of a pack; raise pack_tokens or lower "
            "the stage's side"
        )
    for count in itertools.count(least, least):
        parts = [list(range(a, b)) for a, b in itertools.pairwise(_cut(alone, count))]
        if all(tokens(part) <= pack_tokens for part in parts):
            return parts
    raise AssertionError("unreachable")


def _cut(costs: Sequence[int], count: int) -> list[int]:
    """Where a sequence is cut into so many parts of like cost; parts may be empty where there are more than items."""
    total, sums = sum(costs), [0, *itertools.accumulate(costs)]
    ends = [0]
    for part in range(1, count):
        goal = total * part / count
        ends.append(max(ends[-1], min(range(len(sums)), key=lambda i: abs(sums[i] - goal))))
    return [*ends, len(costs)]


def velocities(
    packed: PackedQwenImage, pack: RolloutPack, latents: Sequence[Tensor], times: Sequence[float], guidance: float
) -> list[Tensor]:
    """The model's velocity for each member, `[n, C]`; on every rank that shares the pack all of them.

    Args:
        packed: the model.
        pack: members.
        latents: of each member.
        times: t of each member.
        guidance: true CFG scale, used where members have two texts.
    """
    t = torch.tensor(
        [time for time, member in zip(times, pack.members, strict=True) for _ in member.group.texts],
        dtype=torch.float32,
        device=pack.text.device,
    )
    out = packed(pack.image(latents), pack.text, t, pack.layout)
    if packed.parallel is not None:
        out = packed.parallel.gather_rows(out, packed.parallel.targets(pack.layout))
    parts = iter(pack.layout.split_targets(out))
    made = [[next(parts).float() for _ in member.group.texts] for member in pack.members]
    return [guide(each[0], each[1], guidance) if len(each) == 2 else each[0] for each in made]


@torch.no_grad()
def roll(
    packed: PackedQwenImage, pack: RolloutPack, sampler: Sampler | None, guidance: float, seed: int
) -> Iterator[int]:
    """Denoise the members of a pack, step by step; yields the number of each step done.

    Args:
        packed: the model.
        pack: its members end with their result in `latents`; noisy steps keep what the replay needs.
        sampler: of the noisy steps; None denoises without noise.
        guidance: true CFG scale.
        seed: of the noise.
    """
    for i in range(len(pack.members[0].group.grid) - 1):
        times = [member.group.grid[i] for member in pack.members]
        made = velocities(packed, pack, [member.latents for member in pack.members], times, guidance)
        for member, v in zip(pack.members, made, strict=True):
            _advance(member, i, v, sampler, seed)
        yield i


def _advance(member: Member, i: int, v: Tensor, sampler: Sampler | None, seed: int) -> None:
    if sampler is None or i not in member.group.noisy:
        member.latents = _step(member, i, member.latents, v, None).mean
        return
    step = _step(member, i, member.latents, v, sampler)
    member.before[i] = member.latents
    member.latents = member.after[i] = step.mean + step.std * member.noise(i, seed)
    member.log_probs[i] = log_density(member.latents, step).item()


def replay(
    packed: PackedQwenImage, pack: RolloutPack, slot: int, sampler: Sampler, guidance: float
) -> list[tuple[int, Transition]]:
    """Run a pack again at the latents before its members' noisy step number `slot`.

    Returns:
        of each member the number of the step, and its transition now; gradients reach the model.
    """
    steps = [member.group.noisy[slot] for member in pack.members]
    latents = [member.before[i] for member, i in zip(pack.members, steps, strict=True)]
    times = [member.group.grid[i] for member, i in zip(pack.members, steps, strict=True)]
    made = velocities(packed, pack, latents, times, guidance)
    return [
        (i, _step(member, i, x, v, sampler)) for member, i, x, v in zip(pack.members, steps, latents, made, strict=True)
    ]


def _step(member: Member, i: int, latents: Tensor, v: Tensor, sampler: Sampler | None) -> Transition:
    return transition(sampler, latents, v, member.group.grid[i], member.group.grid[i + 1])
