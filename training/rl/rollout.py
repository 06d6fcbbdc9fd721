"""Rollouts: members of groups, denoised in packs, and the same packs run again for the gradient.

A *group* is one row of the data with several *members*, which differ in their noise alone. Members are laid out once,
in packs. The rollout runs each pack through all denoising steps, and the replay runs the same pack at the same latents
through the same `transition`. So the replay repeats the numbers of the rollout, bit for bit where kernels are
deterministic. Noise is keyed by member and step, never by rank.

A group passes two states: every rank knows the sizes of every `Group`, so that all ranks schedule the same packs; an
`EncodedGroup` has the tensors too and exists only on the ranks that run its members.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from uniref_fast.encode import text_length
from uniref_fast.keyed_random import draw
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.families import family_of
from uniref_fast.models.family import Text
from uniref_fast.models.kept_references import KeptReferences
from uniref_fast.models.packed import PackedModel
from uniref_fast.training.batches.samples import Prepared
from uniref_fast.training.rl.sde import Sampler, Transition, log_density, transition

__all__ = [
    "EncodedGroup", "Group", "Member", "MemberKey", "NoisyStep", "RolloutPack", "denoise", "draw_noisy_steps",
    "replay", "schedule_packs", "sigmas", "velocities",
]  # fmt: skip

GroupKey = tuple[int, int]  # (epoch, index of the row)
MemberKey = tuple[int, int, int]  # (epoch, index of the row, number of the member)


@dataclass(frozen=True)
class Group:
    """Sizes and schedule of a group, which every rank knows.

    Attributes:
        key: (epoch, index) of the row.
        number: Number of the group in the batch.
        prepared: Row with its sizes.
        guidance: True CFG scale of the group's members.
        prompts: Text of the instruction and, with guidance, of the empty prompt, as `Sample.text`.
        sigmas: Times from 1 to 0, one more than there are denoising steps.
        noisy_steps: Numbers of the steps with noise, ascending; the same for all members.
        shares_text: True if the members of a pack with shared references share the text too, as in models whose text
            and references come before the target and do not attend to it.
    """

    key: GroupKey
    number: int
    prepared: Prepared
    guidance: float
    prompts: tuple[Text, ...]
    sigmas: tuple[float, ...]
    noisy_steps: tuple[int, ...]
    shares_text: bool

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Sequences of one member in a pack: with guidance two, else one."""
        shape, number = self.prepared.sample, self.number
        if not self.shares_text:
            return tuple(replace(shape, text=text, group=number) for text in self.prompts)
        # instruction and empty prompt are different texts: each has a group of its own
        return tuple(replace(shape, text=text, group=2 * number + i) for i, text in enumerate(self.prompts))

    @property
    def target_tokens(self) -> int:
        return math.prod(self.prepared.sample.target)

    @property
    def reference_tokens(self) -> int:
        return sum(map(math.prod, self.prepared.sample.references))

    @property
    def shared_tokens(self) -> int:
        """Tokens that the members of a pack with shared references have once."""
        if not self.shares_text:
            return self.reference_tokens
        return sum(map(text_length, self.prompts)) + len(self.prompts) * self.reference_tokens

    @property
    def own_tokens(self) -> int:
        """Tokens of one member without those that it shares."""
        text = 0 if self.shares_text else sum(map(text_length, self.prompts))
        return text + len(self.prompts) * self.target_tokens

    @property
    def tokens(self) -> int:
        """Tokens of one member that shares nothing."""
        images = self.target_tokens + self.reference_tokens
        return sum(map(text_length, self.prompts)) + len(self.prompts) * images


@dataclass(frozen=True)
class EncodedGroup(Group):
    """A group with the tensors that its members are run with.

    Attributes:
        references: Latents of all references, `[M, C]`.
        texts: Embeddings `[L, D]` of the instruction and, with guidance, of the empty prompt.
    """

    references: Tensor
    texts: tuple[Tensor, ...]


@dataclass(frozen=True)
class NoisyStep:
    """A noisy step as the rollout took it.

    Attributes:
        before: Latents before the step, float32 `[N, C]`.
        after: Latents after the step, float32 `[N, C]`.
        log_prob: Log-probability of the step, mean over dimensions.
    """

    before: Tensor
    after: Tensor
    log_prob: float


@dataclass
class Member:
    """One rollout.

    Attributes:
        key: (epoch, index, number in the group).
        group: Group of the member.
        latents: Latents after the steps taken so far, float32 `[N, C]`.
        taken: Each noisy step that was taken, by its number.
    """

    key: MemberKey
    group: EncodedGroup
    latents: Tensor
    taken: dict[int, NoisyStep] = field(default_factory=dict)

    @classmethod
    def start(cls, group: EncodedGroup, number: int, seed: int) -> Member:
        """Return a member at t = 1, with noise of its own as latents."""
        key = (*group.key, number)
        shape = group.target_tokens, group.references.shape[1]
        noise = torch.randn(shape, generator=draw(seed, "rollout", key))
        return cls(key, group, noise.to(group.references.device))

    def noise(self, step: int, seed: int) -> Tensor:
        """Return the standard normal noise of a noisy step, float32 `[N, C]`."""
        values = torch.randn(self.latents.shape, generator=draw(seed, "step", (*self.key, step)))
        return values.to(self.latents.device)


@dataclass(frozen=True)
class RolloutPack:
    """Members that run as one sequence.

    Attributes:
        members: Members of the pack.
        guidance: True CFG scale; above 1, each member has two sequences (instruction and empty prompt).
        layout: Layout of all sequences of the pack.
        references: Latents `[M, C]` of the references of each sequence of the layout, in the dtype of the model.
        text: Text embeddings of the sequences that hold their text, `[N_text, D]`, in the dtype of the model.
    """

    members: tuple[Member, ...]
    guidance: float
    layout: SelfLayout
    references: tuple[Tensor, ...]
    text: Tensor

    @classmethod
    def of(cls, members: Sequence[Member], packed: PackedModel, shared: bool, dtype: torch.dtype) -> RolloutPack:
        """Return the pack of some members.

        Args:
            members: Members of the pack, of groups with the same guidance.
            packed: Model that runs the pack.
            shared: True if the members of a group share one copy of its references.
            dtype: Dtype of the model.
        """
        samples = [sample for member in members for sample in member.group.samples]
        layout = packed.layout(samples, shared_references=shared)
        groups = {member.group.number: member.group for member in members}
        references = {number: group.references.to(dtype) for number, group in groups.items()}
        by_sample = tuple(references[member.group.number] for member in members for _ in member.group.texts)
        held = {segment.sample for segment in layout.text_segments}
        text = [text for i, text in enumerate(t for m in members for t in m.group.texts) if i in held]
        return cls(tuple(members), members[0].group.guidance, layout, by_sample, torch.cat(text).to(dtype))

    def image(self, latents: Sequence[Tensor]) -> Tensor:
        """Return the image stream `[N_image, C]` for the latents `[N, C]` of each member."""
        targets = [x.to(self.text.dtype) for x in self._by_sequence(latents)]
        return self.layout.image_stream(targets, self.references)

    def write_latents(self, image: Tensor, latents: Sequence[Tensor]) -> None:
        """Overwrite the targets' rows of an image stream with the latents `[N, C]` of each member."""
        self.layout.write_targets(image, self._by_sequence(latents))

    def _by_sequence(self, latents: Sequence[Tensor]) -> list[Tensor]:
        return [x for x, member in zip(latents, self.members, strict=True) for _ in member.group.texts]


# ---- schedules ----


def draw_noisy_steps(steps: int, window: int | None, stop: int, seed: int, key: GroupKey) -> tuple[int, ...]:
    """Return the numbers of a group's noisy steps: a window drawn before `stop`, or all steps but the last."""
    if window is None:
        return tuple(range(steps - 1))
    places = stop - window + 1
    first = int(torch.randint(places, (), generator=draw(seed, "window", key)))
    return tuple(range(first, first + window))


def sigmas(pipe: Any, tokens: int, steps: int) -> tuple[float, ...]:
    """Return the times of a pipeline's scheduler, from its first time to 0."""
    return tuple(family_of(pipe).schedule(pipe, tokens, steps, "cpu").sigmas.tolist())


def schedule_packs(
    groups: Sequence[Group], size: int, pack_tokens: int, multiple: int, shared: bool
) -> list[list[int]]:
    """Divide the members of groups into packs, the fewest that `pack_tokens` allows.

    Members stay in order, so that a group is spread over few packs and its references are shared by most of it.

    Args:
        groups: Groups of the batch.
        size: Members of each group.
        pack_tokens: Largest number of tokens of a pack.
        multiple: Number that the count of packs is a multiple of.
        shared: True if the members of a group in one pack share one copy of its references.

    Returns:
        Members of each pack, numbered group by group; a pack may be empty.

    Raises:
        ValueError: If a member is larger than a pack.
    """
    members = [group for group in groups for _ in range(size)]

    def tokens(part: Sequence[int]) -> int:
        inside = [members[i] for i in part]
        if not shared:
            return sum(group.tokens for group in inside)
        owners = {group.number: group for group in inside}.values()
        return sum(group.shared_tokens for group in owners) + sum(group.own_tokens for group in inside)

    alone = [tokens([i]) for i in range(len(members))]
    if max(alone) > pack_tokens:
        where = members[alone.index(max(alone))].prepared.row.where
        raise ValueError(
            f"{where}: a rollout has {max(alone)} tokens, over the {pack_tokens} of a pack; raise pack_tokens or lower "
            "the stage's budget"
        )
    for count in itertools.count(multiple, multiple):
        parts = [list(range(a, b)) for a, b in itertools.pairwise(_cut(alone, count))]
        if all(tokens(part) <= pack_tokens for part in parts):
            return parts
    raise AssertionError("unreachable")


def _cut(costs: Sequence[int], count: int) -> list[int]:
    """Return the borders that cut a sequence into `count` parts of similar cost; parts may be empty."""
    total, sums = sum(costs), [0, *itertools.accumulate(costs)]
    ends = [0]
    for part in range(1, count):
        goal = total * part / count
        ends.append(max(ends[-1], min(range(len(sums)), key=lambda i: abs(sums[i] - goal))))
    return [*ends, len(costs)]


# ---- running a pack ----


def velocities(
    packed: PackedModel,
    pack: RolloutPack,
    latents: Sequence[Tensor],
    times: Sequence[float],
    image: Tensor | None = None,
    kept: Sequence[KeptReferences] | None = None,
) -> list[Tensor]:
    """Return the model's velocity `[N, C]`, float32, for each member; all of them on every rank that shares the pack.

    Args:
        packed: Model.
        pack: Members to run.
        latents: Latents `[N, C]` of each member.
        times: Time t of each member.
        image: Image stream of the pack, `[N_image, C]`, whose targets are overwritten; None allocates a new one, which
            a backward needs.
        kept: Stores of the references, one for each sequence; this call is their next step. None computes the
            references.
    """
    if image is None:
        image = pack.image(latents)
    else:
        pack.write_latents(image, latents)
    t = torch.tensor(
        [time for time, member in zip(times, pack.members, strict=True) for _ in member.group.texts],
        dtype=torch.float32,
        device=pack.text.device,
    )  # [S], one for each sequence
    out = packed(image, pack.text, t, pack.layout, kept)  # [N_target, C]
    if packed.parallel is not None and packed.target_bounds is not None:
        out = packed.parallel.gather_rows(out, packed.target_bounds)
    parts = iter(pack.layout.split_targets(out))
    predicted = [[next(parts).float() for _ in member.group.texts] for member in pack.members]
    guide = family_of(packed.transformer).guide
    return [guide(each[0], each[1], pack.guidance) if len(each) == 2 else each[0] for each in predicted]


@torch.no_grad()
def denoise(
    packed: PackedModel, pack: RolloutPack, sampler: Sampler | None, seed: int, keep_references: bool = False
) -> None:
    """Denoise the members of a pack to the end.

    Each member's result is in its `latents`; its noisy steps keep what the replay needs.

    Args:
        packed: Model.
        pack: Members to denoise.
        sampler: Sampler of the noisy steps; None denoises without noise.
        seed: Seed of the noise.
        keep_references: Compute the references in the first step only; `RolloutGenerator` has checked that this is
            exact.
    """
    kept = [KeptReferences() for _ in range(pack.layout.num_samples)] if keep_references else None
    image = pack.image([member.latents for member in pack.members])  # a step changes only the rows of the targets
    for i in range(len(pack.members[0].group.sigmas) - 1):
        times = [member.group.sigmas[i] for member in pack.members]
        predicted = velocities(packed, pack, [member.latents for member in pack.members], times, image, kept)
        for member, v in zip(pack.members, predicted, strict=True):
            _advance(member, i, v, sampler, seed)


def _advance(member: Member, i: int, v: Tensor, sampler: Sampler | None, seed: int) -> None:
    if sampler is None or i not in member.group.noisy_steps:
        member.latents = _transition(member, i, member.latents, v, None).mean
        return
    step = _transition(member, i, member.latents, v, sampler)
    after = step.mean + step.std * member.noise(i, seed)
    member.taken[i] = NoisyStep(member.latents, after, log_density(after, step).item())
    member.latents = after


def replay(packed: PackedModel, pack: RolloutPack, noisy_step: int, sampler: Sampler) -> list[tuple[int, Transition]]:
    """Run a pack again at the latents before one noisy step of each member; gradients reach the model.

    Args:
        packed: Model.
        pack: Members, denoised before.
        noisy_step: Number of the step among the noisy steps of each member, from 0.
        sampler: Sampler of the rollout.

    Returns:
        Number of the denoising step and transition under the current weights, for each member.
    """
    steps = [member.group.noisy_steps[noisy_step] for member in pack.members]
    latents = [member.taken[i].before for member, i in zip(pack.members, steps, strict=True)]
    times = [member.group.sigmas[i] for member, i in zip(pack.members, steps, strict=True)]
    predicted = velocities(packed, pack, latents, times)
    return [
        (i, _transition(member, i, x, v, sampler))
        for member, i, x, v in zip(pack.members, steps, latents, predicted, strict=True)
    ]


def _transition(member: Member, i: int, latents: Tensor, v: Tensor, sampler: Sampler | None) -> Transition:
    return transition(sampler, latents, v, member.group.sigmas[i], member.group.sigmas[i + 1])
