"""The rollouts of one step over all ranks: scheduled alike everywhere, run in shares, scored while others still run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from uniref_fast.encode import decode_image, prompt_text, to_rgb
from uniref_fast.guidance import texts_of
from uniref_fast.layout import Sample
from uniref_fast.models.families import family_of
from uniref_fast.models.kept_references import RefreshSchedule, dependence
from uniref_fast.progress import running
from uniref_fast.rewards.types import Candidate, Failure, Scores
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.batches.samples import Encoder, Prepared
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.sampling import sampling_settings
from uniref_fast.training.rl.recipes import MSGRPO
from uniref_fast.training.rl.rewards import RewardSet
from uniref_fast.training.rl.rollout import (
    EncodedGroup,
    Group,
    Member,
    MemberKey,
    RolloutPack,
    denoise,
    draw_noisy_steps,
    schedule_packs,
    sigmas,
)
from uniref_fast.training.rl.sde import Sampler

__all__ = ["Batch", "RolloutGenerator"]

Row = tuple[PackKey, Prepared]
POLICY_OF_KV = "reference_causal"  # how `PackedFlux2` runs klein-KV, if a run names no other visibility
SYNC_SECONDS = 60.0  # interval in which ranks that wait for rewards report their progress to each other


@dataclass
class Batch:
    """Rollouts of one training step or one validation; `RolloutGenerator.generate` fills in the last four attributes.

    Attributes:
        groups: All groups, on every rank.
        packs: Packs of this rank; None where the rank only keeps step with the others.
        keys: Keys of all members, group by group.
        sampler: Sampler of the noisy steps; None for rollouts without noise.
        seed: Seed of the noise.
        unencodable: (place, reason) of each row that a rank cannot encode, by key. There are no packs if there are any.
        pending: Scores of this rank's members to come, by member and reward.
        images: Images that this rank decoded.
        seconds: Time that the rollouts took.
        tokens: Tokens that went through the model on all ranks.
    """

    groups: list[Group]
    packs: list[RolloutPack | None]
    keys: list[list[MemberKey]]
    sampler: Sampler | None = None
    seed: int = 0
    unencodable: dict[PackKey, tuple[str, str]] = field(default_factory=dict)
    pending: dict[MemberKey, dict[str, Future[Scores | Failure]]] = field(default_factory=dict)
    images: dict[MemberKey, Image.Image] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0


class RolloutGenerator:
    """Generates rollouts and collects their scores. All ranks must call its methods alike.

    Args:
        config: Configuration of the run.
        ranks: Ranks of the run.
        model: Model of the run.
        encoder: Encoder of the rows.
        rewards: Rewards of the run.
        signalled: Function that returns True if this process was asked to stop.
        progress: Display of the work that runs now; None shows nothing.

    Raises:
        ValueError: If rollouts are to keep references that depend on the step.
    """

    def __init__(
        self,
        config: MSGRPO,
        ranks: Ranks,
        model: TrainedModel,
        encoder: Encoder,
        rewards: RewardSet,
        signalled: Callable[[], bool],
        progress: running | None = None,
    ) -> None:
        self.config, self.ranks, self.model, self.encoder = config, ranks, model, encoder
        self.rewards, self.signalled, self.progress = rewards, signalled, progress or running(shown=False)
        self.sampler = Sampler(config.sampler, config.noise)
        family, pipe = family_of(model.pipe), model.pipe
        self.guided = family.unguided(family.index(pipe)) is None
        guidance = family.training_guidance(pipe.transformer.config)
        one = model.packed.layout([Sample(1, (1, 1, 1), ((1, 1, 1),), guidance=guidance)])
        # Text and references that come before the target, at t = 0, are the same for all members of a group.
        self.shares_text = one.causal_prefix and one.clean_references
        self.shared = config.visibility == "group_shared" or self.shares_text
        if config.visibility in (None, "full") and one.clean_references and model.packed.visibility == POLICY_OF_KV:
            # Text, the noise and the time do not reach the references of the model: a group has one copy of them.
            model.packed.visibility, self.shared = "group_shared", True
        if config.keep_references:  # refuse a model for which it is not exact, before any rollout
            RefreshSchedule.of(True, None, dependence(one, model.packed.visibility))

    # ---- batches ----

    def training_batch(self, rows: Sequence[Row], plan: MemoryPlan) -> Batch:
        """Return the groups of a training step: `config.group` members for each row, with noisy steps.

        Args:
            rows: Rows of the step, the same on all ranks.
            plan: Memory plan of the stage.

        Raises:
            ValueError: If a member is larger than a pack of the plan.
        """
        config = self.config
        groups = [self._training_group(key, prepared, number) for number, (key, prepared) in enumerate(rows)]
        return self._batch(groups, config.group, plan.pack_tokens, self.sampler, config.seed)

    def heldout_batch(self, rows: Sequence[Row], plan: MemoryPlan) -> Batch:
        """Return one member for each held-out row, without noisy steps.

        The members start from the same noise in every run, so that validations can be compared. No row is too large,
        since nothing is kept for a backward.
        """
        settings = sampling_settings(self.config, self.model.pipe)
        steps, scale = settings["num_inference_steps"], settings["true_cfg_scale"]
        guidance = scale if self.guided else 1.0
        if self.encoder.guidance is not None:  # the scale is embedded, as in the requests of `uniref-fast eval`
            rows = [(key, replace(each, sample=replace(each.sample, guidance=scale))) for key, each in rows]
        groups = [
            self._group(key, prepared, number, steps, guidance, ()) for number, (key, prepared) in enumerate(rows)
        ]
        room = max(plan.pack_tokens, *(group.tokens for group in groups))
        return self._batch(groups, 1, room, None, 0)

    def check_size(self, key: PackKey, prepared: Prepared, plan: MemoryPlan) -> None:
        """Raise ValueError if a rollout of a row is larger than a pack of the plan."""
        schedule_packs([self._training_group(key, prepared, 0)], 1, plan.pack_tokens, 1, self.shared)

    def _training_group(self, key: PackKey, prepared: Prepared, number: int) -> Group:
        config = self.config
        noisy = draw_noisy_steps(
            config.rollout_num_inference_steps, config.window, config.window_stop, config.seed, key
        )
        return self._group(
            key, prepared, number, config.rollout_num_inference_steps, config.rollout_true_cfg_scale, noisy
        )

    def _group(
        self, key: PackKey, prepared: Prepared, number: int, steps: int, guidance: float, noisy: tuple[int, ...]
    ) -> Group:
        pipe, conditions = self.model.pipe, prepared.geometry.condition_sizes
        texts = texts_of(prepared.instruction, guidance, self.encoder.empty_prompt)
        prompts = [prompt_text(pipe, text, conditions) for text in texts]
        times = sigmas(pipe, math.prod(prepared.sample.target), steps)
        return Group(key, number, prepared, guidance, tuple(prompts), times, noisy, self.shares_text)

    def _batch(
        self,
        groups: list[Group],
        size: int,
        pack_tokens: int,
        sampler: Sampler | None,
        seed: int,
    ) -> Batch:
        """Return the groups of all ranks, with this rank's share of the packs encoded."""
        keys = [[(*group.key, member) for member in range(size)] for group in groups]
        parts = schedule_packs(groups, size, pack_tokens, self.config.packs, self.shared)
        mine = parts[self.ranks.replica :: self.ranks.replicas]
        encoded, refused = self._encode_all(
            [groups[i] for i in dict.fromkeys(i // size for part in mine for i in part)]
        )
        unencodable = {key: row for part in self.ranks.gather(refused) for key, row in part.items()}
        if unencodable:
            return Batch(groups, [], keys, sampler, seed, unencodable)
        packs = [self._pack([Member.start(encoded[i // size], i % size, seed) for i in part]) for part in mine]
        return Batch(groups, packs, keys, sampler, seed)

    def _encode_all(self, groups: Sequence[Group]) -> tuple[dict[int, EncodedGroup], dict[PackKey, tuple[str, str]]]:
        """Return the encoded groups by number, and (place, reason) by key of rows that cannot be encoded."""
        encoded: dict[int, EncodedGroup] = {}
        refused: dict[PackKey, tuple[str, str]] = {}
        self.progress.phase("encoding", len(groups), "row")
        for group in groups:
            try:
                encoded[group.number] = self._encode(group)
            except (ValueError, OSError) as error:
                where = group.prepared.row.where
                refused[group.key] = (where, str(error).removeprefix(f"{where}: "))
            self.progress.update()
        return encoded, refused

    def _encode(self, group: Group) -> EncodedGroup:
        images = group.prepared.load_references()
        references, first = self.encoder.encode_conditions(group.prepared, images)
        others = texts_of("", group.guidance, self.encoder.empty_prompt)[1:]
        texts = (first, *(self.encoder.encode_text(group.prepared, images, text) for text in others))
        return EncodedGroup(**vars(group), references=references, texts=texts)

    def _pack(self, members: Sequence[Member]) -> RolloutPack | None:
        if not members:
            return None
        return RolloutPack.of(members, self.model.packed, self.shared, getattr(torch, self.config.dtype))

    # ---- rollouts ----

    def generate(self, batch: Batch) -> bool:
        """Denoise all packs of a batch; return False if a signal ended it."""
        return self._generate(batch, lambda pack: None)

    def generate_and_score(self, batch: Batch, step: int) -> bool:
        """Denoise all packs of a batch, and ask for the scores of each pack while the next one runs.

        Args:
            batch: Batch to run.
            step: Number of the run's step, for the judge's log.

        Returns:
            False if a signal ended it.
        """
        with self.model.encoders.present("vae"):
            return self._generate(batch, lambda pack: self._submit(batch, pack, step))

    def _generate(self, batch: Batch, finished: Callable[[RolloutPack], None]) -> bool:
        start, tokens = time.perf_counter(), 0
        steps = len(batch.groups[0].sigmas) - 1
        self.progress.phase("denoising rollouts", len(batch.packs), "pack")
        for pack in batch.packs:
            if pack is None:
                self._keep_step(steps)
            else:
                denoise(self.model.packed, pack, batch.sampler, batch.seed, self.config.keep_references)
                tokens += steps * pack.layout.joint_length
                finished(pack)
            self.progress.update()
            if any(self.ranks.gather(self.signalled())):
                return False
        batch.seconds = time.perf_counter() - start
        batch.tokens = sum(self.ranks.gather(tokens)) // self.ranks.sequence
        return True

    @torch.no_grad()
    def _keep_step(self, steps: int) -> None:
        for _ in range(steps):
            self.idle()

    def _submit(self, batch: Batch, pack: RolloutPack, step: int) -> None:
        """Decode the members of a pack and ask for their scores, on one of the ranks that share the pack."""
        if self.ranks.rank % self.ranks.sequence:
            return
        groups = {member.group.number: member.group for member in pack.members}
        references = {number: tuple(map(to_rgb, group.prepared.load_references())) for number, group in groups.items()}
        for member in pack.members:
            prepared = member.group.prepared
            with torch.no_grad():
                image = to_rgb(decode_image(self.model.pipe, member.latents[None], prepared.geometry.size))
            batch.images[member.key] = image
            given = references[member.group.number]
            candidate = Candidate(member.key, prepared.instruction, given, image, prepared.row)
            batch.pending[member.key] = self.rewards.submit(candidate, step)

    def results(self, batch: Batch) -> dict[MemberKey, dict[str, float] | Failure] | None:
        """Wait for the scores of a batch.

        Returns:
            Scores by axis or the failure of every member of all ranks; None if a signal came meanwhile.
        """
        pending = {future for asked in batch.pending.values() for future in asked.values()}
        self.progress.phase("waiting for scores")
        # In rounds: one long exchange would time out on the ranks that wait for a rank whose judge is away.
        while True:
            end = time.perf_counter() + SYNC_SECONDS
            while pending and not self.signalled() and time.perf_counter() < end:
                pending = wait(pending, timeout=0.5).not_done
            everywhere = self.ranks.gather((not pending, self.signalled()))
            if any(signalled for _, signalled in everywhere):
                return None
            if all(done for done, _ in everywhere):
                break
        mine = {
            key: self.rewards.combined({name: future.result() for name, future in asked.items()})
            for key, asked in batch.pending.items()
        }
        results: dict[MemberKey, dict[str, float] | Failure] = {}
        for part, shares in self.ranks.gather((mine, self.rewards.shares)):
            results |= part
            self.rewards.shares |= shares
        return results

    def idle(self) -> torch.Tensor:
        """Run the model on the smallest possible pack: all ranks must take part when sharded weights are gathered."""
        return self.model.idle_forward()
