"""Rollouts of a step over all ranks: planned alike everywhere, run where they belong, their rewards asked meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import torch
from PIL import Image

from uniref_fast.encode import decode_image, prompt_tokens
from uniref_fast.guidance import texts_of
from uniref_fast.rewards.types import Candidate, Failure, Scores
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.batches.samples import Encoder, Prepared
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.rl.recipes import MSGRPO
from uniref_fast.training.rl.rewards import RewardSet
from uniref_fast.training.rl.rollout import (
    Group,
    Member,
    MemberKey,
    RolloutPack,
    noisy_steps,
    plan_packs,
    roll,
    schedule,
)
from uniref_fast.training.rl.sde import Sampler

__all__ = ["Batch", "Roller"]

ROUND = 60.0  # seconds after which ranks tell each other how far they are


@dataclass
class Batch:
    """The rollouts of one step, or of a look at held-out rows.

    Attributes:
        groups: all of them, on every rank.
        packs: of this rank; None where it only keeps step with the others.
        keys: of all members, by group.
        asked: rewards of this rank's members, by key.
        images: that this rank made.
        seconds, tokens: that rolling took, and went through the model on all ranks.
        lost: (place, reason) of rows that cannot be encoded, by key; nothing is packed then.
    """

    groups: list[Group]
    packs: list[RolloutPack | None]
    keys: list[list[MemberKey]]
    asked: dict[MemberKey, dict[str, Future[Scores | Failure]]] = field(default_factory=dict)
    images: dict[MemberKey, Image.Image] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    lost: dict[PackKey, tuple[str, str]] = field(default_factory=dict)


class Roller:
    """Makes batches.

    Args:
        config, ranks, model, encoder, rewards: of the run.
        signalled: whether this process was asked to stop.
    """

    def __init__(
        self,
        config: MSGRPO,
        ranks: Ranks,
        model: TrainedModel,
        encoder: Encoder,
        rewards: RewardSet,
        signalled: Callable[[], bool],
    ) -> None:
        self.config, self.ranks, self.model, self.encoder = config, ranks, model, encoder
        self.rewards, self.signalled = rewards, signalled
        self.shared = config.visibility == "group_shared"

    def plan(
        self,
        rows: Sequence[tuple[PackKey, Prepared]],
        stage: MemoryPlan,
        size: int,
        steps: int,
        guidance: float,
    ) -> Batch:
        """Groups of all ranks, and this rank's packs of their members, encoded. All ranks.

        Where rows cannot be encoded the batch has no packs; `Batch.lost` names them.
        """
        groups = [
            self._group(key, prepared, size, steps, guidance, number) for number, (key, prepared) in enumerate(rows)
        ]
        most = stage.pack_tokens
        if size == 1:  # a look keeps nothing for a backward: there is room for any row
            most = max(most, *(group.tokens for group in groups))
        parts = plan_packs(groups, size, most, self.config.packs, self.shared)
        keys = [[(*group.key, member) for member in range(size)] for group in groups]
        mine = parts[self.ranks.replica :: self.ranks.replicas]
        lost: dict[PackKey, tuple[str, str]] = {}
        for group in [groups[i] for i in dict.fromkeys(i // size for part in mine for i in part)]:
            try:
                self._encode(group, guidance)
            except (ValueError, OSError) as error:
                where = group.prepared.row.where
                lost[group.key] = (where, str(error).removeprefix(f"{where}: "))
        lost = {key: row for part in self.ranks.gather(lost) for key, row in part.items()}
        if lost:
            return Batch(groups, [], keys, lost=lost)
        packs = [self._pack([groups[i // size] for i in part], [i % size for i in part], size) for part in mine]
        return Batch(groups, packs, keys)

    def check_size(self, key: PackKey, prepared: Prepared, stage: MemoryPlan) -> None:
        """Raise ValueError for a row whose rollouts are larger than a pack of the stage."""
        config = self.config
        group = self._group(key, prepared, config.group, config.rollout_steps, config.guidance, 0)
        plan_packs([group], 1, stage.pack_tokens, 1, self.shared)

    def _group(self, key: PackKey, prepared: Prepared, size: int, steps: int, guidance: float, number: int) -> Group:
        config, shape = self.config, prepared.sample
        conditions = prepared.geometry.condition_sizes
        lengths = [
            prompt_tokens(self.model.pipe, text, conditions) for text in texts_of(prepared.instruction, guidance)
        ]
        grid = schedule(self.model.pipe.scheduler, math.prod(shape.target), steps)
        noisy = noisy_steps(steps, config.window, config.window_stop, config.seed, key) if size > 1 else ()
        return Group(key, prepared, tuple(lengths), grid, noisy, number)

    def _encode(self, group: Group, guidance: float) -> None:
        images = group.prepared.load_references()
        group.references, first = self.encoder.encode_conditions(group.prepared, images)
        others = texts_of(group.prepared.instruction, guidance)[1:]
        group.texts = (first, *(self.encoder.encode_conditions(group.prepared, images, text)[1] for text in others))

    def _pack(self, owners: Sequence[Group], numbers: Sequence[int], size: int) -> RolloutPack | None:
        if not owners:
            return None
        seed = self.config.seed if size > 1 else 0
        members = [Member.start(group, number, seed) for group, number in zip(owners, numbers, strict=True)]
        return RolloutPack.of(members, self.model.packed, self.shared, getattr(torch, self.config.dtype))

    def roll(self, batch: Batch, sampler: Sampler | None, guidance: float, seed: int, step: int | None) -> bool:
        """Roll every pack out, and ask for the rewards of each that is done; False when a signal came.

        `step` is that of the run; None asks for no rewards.
        """
        start = time.perf_counter()
        packed = self.model.packed
        tokens = 0
        for pack in batch.packs:
            if pack is None:
                for _ in range(len(batch.groups[0].grid) - 1):
                    with torch.no_grad():
                        self.idle()
            else:
                for _ in roll(packed, pack, sampler, guidance, seed):
                    tokens += pack.layout.joint_length
                if step is not None:
                    self._ask(batch, pack, step)
            if any(self.ranks.gather(self.signalled())):
                return False
        batch.seconds = time.perf_counter() - start
        batch.tokens = sum(self.ranks.gather(tokens)) // self.ranks.sequence
        return True

    def _ask(self, batch: Batch, pack: RolloutPack, step: int) -> None:
        """Decode the members of a pack and ask for their rewards; one rank of those that share it."""
        if self.ranks.rank % self.ranks.sequence:
            return
        groups = {member.group.number: member.group for member in pack.members}
        references = {number: tuple(group.prepared.load_references()) for number, group in groups.items()}
        for member in pack.members:
            prepared = member.group.prepared
            with torch.no_grad():
                image = decode_image(self.model.pipe, member.latents[None], prepared.geometry.size)
            batch.images[member.key] = image
            shown = references[member.group.number]
            candidate = Candidate(member.key, prepared.instruction, shown, image, prepared.row)
            batch.asked[member.key] = self.rewards.submit(candidate, step)

    def results(self, batch: Batch) -> dict[MemberKey, dict[str, float] | Failure] | None:
        """Scores or failure of every member of all ranks; None when a signal came while waiting."""
        pending = {future for asked in batch.asked.values() for future in asked.values()}
        while True:  # in rounds: a rank that waited for the others in one exchange would give up before a judge is back
            end = time.perf_counter() + ROUND
            while pending and not self.signalled() and time.perf_counter() < end:
                pending = wait(pending, timeout=0.5).not_done
            everywhere = self.ranks.gather((not pending, self.signalled()))
            if any(signalled for _, signalled in everywhere):
                return None
            if all(done for done, _ in everywhere):
                break
        mine = {
            key: self.rewards.combined({name: future.result() for name, future in asked.items()})
            for key, asked in batch.asked.items()
        }
        results: dict[MemberKey, dict[str, float] | Failure] = {}
        for part, shares in self.ranks.gather((mine, self.rewards.shares)):
            results |= part
            self.rewards.shares |= shares
        return results

    def idle(self) -> torch.Tensor:
        """Take part in gathering the weights, without a pack."""
        return self.model.idle_forward()
