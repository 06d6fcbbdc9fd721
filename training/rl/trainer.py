"""The training loop of MSGRPO: rollouts with noise, scores, advantages within groups, updates on the replayed steps."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uniref_fast import flags as configs
from uniref_fast.costs import transformer_flops
from uniref_fast.data.dataset import Dataset, left_out
from uniref_fast.rewards.types import Failure
from uniref_fast.runs import trained_visibility
from uniref_fast.training.batches.encoding import heldout_rows
from uniref_fast.training.batches.heldout import heldout_count, heldout_datasets
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.batches.rows import check_same_rows
from uniref_fast.training.batches.samples import Encoder, Prepared
from uniref_fast.training.batches.upcoming import encode_ahead
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.trainer import Trainer
from uniref_fast.training.rl.generator import Batch, RolloutGenerator
from uniref_fast.training.rl.grpo import Advantages, Objective, advantages, minibatches
from uniref_fast.training.rl.metrics import (
    RewardHackingDetector,
    UpdateStatistics,
    judge_metrics,
    mean,
    nothing_to_learn,
    step_metrics,
)
from uniref_fast.training.rl.on_policy import check_on_policy, refuse_off_policy, table
from uniref_fast.training.rl.prompts import Prompts
from uniref_fast.training.rl.recipes import MSGRPO
from uniref_fast.training.rl.rewards import RewardSet
from uniref_fast.training.rl.rollout import MemberKey, RolloutPack, replay, sigmas
from uniref_fast.training.rl.sde import check_noise
from uniref_fast.training.rl.sheets import best_and_worst, group_sheet, heldout_sheet
from uniref_fast.training.rl.validation import RewardValidation

__all__ = ["RLTrainer", "RewardError"]

SCORING = ("rewards", "reward_weights", "axis_weights", "judge")  # settings that decide the scores


class RewardError(RuntimeError):
    """Too many rollouts of a step got no scores."""


class RLTrainer(Trainer):
    """A run of MSGRPO; see `Trainer` for the other arguments and errors.

    Args:
        check: If True, `run` generates the rollouts of one step of each stage, checks that they are on-policy, and
            trains nothing.

    Raises:
        ValueError: If the data are not those that the checkpoint was trained on.
    """

    config: MSGRPO

    def __init__(self, config: MSGRPO, ranks: Ranks, out: Path, resume: int | None = None, check: bool = False) -> None:
        super().__init__(config, ranks, out, resume)
        if getattr(self.model.pipe.vae, "use_tiling", False):
            self.model.pipe.vae.disable_tiling()  # its seams would lower the scores, and the policy would learn that
        self.check = check
        self.checked_stage = -1  # stage whose packs and parallel layout are known to be on-policy
        self.monitor.enabled &= not check
        self.prompts = Prompts(self.dataset, self.encoder, config, self.saved.get("prompts"))
        self._prompts_state = self.prompts.state()
        self.rewards = RewardSet(config, None if check else out / "judge", ranks.rank, self._notify)
        self.generator = RolloutGenerator(
            config, ranks, self.model, self.encoder, self.rewards, lambda: self.signalled > 0, self.progress
        )
        self.validation = RewardValidation(self.heldout, config, ranks, self.encoder, self.generator, self.rewards)
        self.objective = Objective.from_config(config)
        self.detector = RewardHackingDetector(config.alarm, self.saved.get("alarm") if self._same_scores() else None)

    def open_rows(self, step: int, state: Mapping[str, Any]) -> None:
        config, model = self.config, self.model
        self.encoder = Encoder(
            model.pipe, TensorCache(self.cache_folder), encoders=model.encoders, guidance=config.embedded_guidance
        )
        with self.progress.of("reading the rows"):
            self.dataset = Dataset(config.data, config.image_folder, "optional", config.columns)
        self.heldout = heldout_datasets(map(Path, config.heldout), config, "optional")
        if config.resolve_encoders() == "free":
            heldout = heldout_rows(self.heldout, config, target=False, guided=heldout_count(config))
            broken: dict[str, str] = {}
            encoded, found = 0, True
            while found:  # other rows take the places of broken ones, and may be broken too
                prompts = Prompts(self.dataset, self.encoder, config, state.get("prompts"))
                report = encode_ahead(self.encoder, self.ranks, config, prompts.upcoming(step, broken) + heldout)
                encoded, found = encoded + report.encoded, not broken.keys() >= dict(report.broken).keys()
                broken |= dict(report.broken)
            self.announce("encoded", rows=report.rows, now=encoded, broken=len(broken))

    def _same_scores(self) -> bool:
        """Return True if the scores before the resume can be compared with those after it."""
        before, now = self.saved.get("config", {}), json.loads(configs.to_json(self.config))
        return all(before[name] == now[name] for name in SCORING if name in before)

    # ---- one step ----

    def train_step(self) -> bool:
        """Generate rollouts of a batch of prompts, score them, and update the policy on them."""
        start, config = time.perf_counter(), self.config

        # Rollouts of all prompts, under the current weights. Each finished pack is sent to the rewards at once, so
        # that a judge works while the next pack is denoised.
        batch = self._training_batch()
        if not self.generator.generate_and_score(batch, self.step):
            return False

        # Before the first update of a stage: the replay must repeat the rollout, or the ratios below mean nothing. The
        # check comes before the wait for the scores, since it uses the time in which the judge works.
        if self.checked_stage != self.stage:
            self.progress.phase(f"step {self.step + 1}: replaying the rollouts")
            self._check_on_policy(batch)

        # All scores are awaited before any update: an advantage compares a member with its whole group.
        results = self.generator.results(batch)
        if results is None:
            return False
        scores = self._scores(results)
        advantage = advantages(
            scores, batch.keys, self.rewards.axis_weights, kind=config.advantage, std=config.advantage_std,
            min_members=config.min_members, clip=config.advantage_clip,
        )  # fmt: skip

        began = time.perf_counter()
        self.progress.phase(f"step {self.step + 1}: update")
        statistics, norm, trained = self.update(batch, advantage)
        seconds = max(time.perf_counter() - began, 1e-9)
        if self.average is not None:
            self.average.update(self.step)

        metrics = self._metrics(batch, results, scores, advantage, statistics)
        metrics |= {"lr": config.lr(self.step), "grad_norm": norm, "update/tokens_per_second": trained / seconds}
        self.monitor.step(
            self.step, metrics, tokens=batch.tokens + trained, samples=len(scores), flops=self._flops(batch),
            seconds=time.perf_counter() - start,
        )  # fmt: skip
        self._detect_reward_hacking(scores)
        if config.sample_every and (self.step + 1) % config.sample_every == 0:
            self._show_groups(batch, scores)

        # Only now are the prompts used up: a step that a signal ended takes the same ones again after the resume.
        self._prompts_state = self.prompts.state()
        self.stopping = any(self.ranks.gather(self.signalled))
        return True

    # ---- rollouts ----

    def _training_batch(self) -> Batch:
        """Return the batch of the next prompts; rows that cannot be encoded are replaced by those after them."""
        rows = self._take_prompts(self.config.prompts)
        while True:
            batch = self.generator.training_batch(rows, self.plans[self.stage])
            if not batch.unencodable:
                return batch
            broken = list(batch.unencodable.values())
            self._report_broken(broken)
            self.prompts.rows.count_broken(broken)
            rows = [row for row in rows if row[0] not in batch.unencodable] + self._take_prompts(len(broken))

    def _take_prompts(self, count: int) -> list[tuple[PackKey, Prepared]]:
        """Return the next rows; those that cannot be used are recorded and passed over."""

        def check(key: PackKey, prepared: Prepared) -> None:
            self.generator.check_size(key, prepared, self.plans[self.stage])

        taken, broken = self.prompts.take(count, self.config.stages[self.stage], check)
        check_same_rows(self.ranks.gather(([key for key, _ in taken], broken)))
        self._report_broken(broken)
        return taken

    def _report_broken(self, rows: Sequence[tuple[str, str]]) -> None:
        for where, reason in rows:
            self.monitor.event(self.step, "broken row", where=where, reason=reason)

    def _check_on_policy(self, batch: Batch) -> None:
        """Replay every noisy step of a rollout, and raise OffPolicyError on all ranks if a ratio is not 1."""
        found = check_on_policy(
            self.model.packed, batch.packs, self.config.noisy_steps, self.generator.sampler, self.ranks,
            self.generator.idle,
        )  # fmt: skip
        self.checked_stage = self.stage
        if not self.check:
            largest = max((abs(one.log_ratio) for one in found), default=0.0)
            steps = len({one.step for one in found})
            self.monitor.event(self.step, "on-policy check", timesteps=steps, worst_log_ratio=largest)
        elif self.ranks.rank == 0:
            stage = self.config.stages[self.stage]
            print(f"stage {self.stage}: budget {stage.budget}, references {stage.references}\n{table(found)}")
        refuse_off_policy(found)

    def _scores(self, results: Mapping[MemberKey, dict[str, float] | Failure]) -> dict[MemberKey, dict[str, float]]:
        """Return the scores of the members that have scores.

        Raises:
            RewardError: If the share of failures is larger than `max_failures`.
        """
        failed = [result for result in results.values() if isinstance(result, Failure)]
        for kind, count in Counter(failure.kind for failure in failed).items():
            reason = next(failure.reason for failure in failed if failure.kind == kind)
            self.monitor.event(self.step, "no scores", failure=kind, count=count, such_as=reason)
        if len(failed) > self.config.max_failures * len(results):
            self.rewards.void(self.step)
            raise RewardError(
                f"{len(failed)} of {len(results)} rollouts of step {self.step} got no scores, over max_failures = "
                f"{self.config.max_failures:g}; the last: {failed[-1].kind}: {failed[-1].reason}. Nothing of this step "
                "was kept; put it right and resume"
            )
        return {key: result for key, result in results.items() if not isinstance(result, Failure)}

    # ---- updates ----

    def update(self, batch: Batch, advantage: Advantages) -> tuple[UpdateStatistics, float, int]:
        """Train on the rollouts; return statistics of this rank, the largest gradient norm, and tokens of all ranks."""
        config, statistics, norms, tokens = self.config, UpdateStatistics(), [0.0], 0
        if not advantage.values:
            text = nothing_to_learn(advantage, config)
            self.monitor.event(self.step, "nothing to learn", text, zero_spread=advantage.zero_spread)
            return statistics, 0.0, 0
        # Rollouts cost more than updates, so they are trained on `inner_epochs` times. Within an epoch each noisy step
        # belongs to one of `updates` optimizer steps; the first update is on-policy, the clip bounds the others.
        for epoch in range(config.inner_epochs):
            for noisy_steps in minibatches(
                config.noisy_steps, config.trained_steps, config.updates, seed=config.seed, step=self.step, epoch=epoch
            ):
                update = UpdateStatistics()
                # The loss is a mean over all members and steps of the update on all ranks; gradients are summed.
                terms = len(advantage.values) * len(noisy_steps)
                for pack in batch.packs:
                    for noisy_step in noisy_steps:
                        tokens += self._backward(pack, noisy_step, advantage, terms, update)
                norm, loss = self.norm(), math.fsum(self.ranks.gather(update.loss))
                norms.append(norm)
                statistics.add(update, 1 / (config.inner_epochs * config.updates))
                if self.finite(norm, loss, lambda: [group.prepared.row.where for group in batch.groups]):
                    self.take_step(norm)
                self.optimizer.zero_grad()
        largest = math.nan if any(map(math.isnan, norms)) else max(norms)
        return statistics, largest, sum(self.ranks.gather(tokens)) // self.ranks.sequence

    def _backward(
        self,
        pack: RolloutPack | None,
        noisy_step: int,
        advantage: Advantages,
        terms: int,
        statistics: UpdateStatistics,
    ) -> int:
        """Add the gradient of one pack at one noisy step, and return the tokens that it took.

        Args:
            pack: Denoised members; None if this rank only keeps step with the others.
            noisy_step: Number of the step among the noisy steps of each member.
            advantage: Advantages of the step.
            terms: Number of terms that the mean loss of the update has on all ranks.
            statistics: Statistics of the update, which are added to.
        """
        packed, sampler, kl = self.model.packed, self.generator.sampler, self.config.kl
        if pack is None or not any(member.key in advantage.values for member in pack.members):
            # As many forwards and backwards as on the other ranks: each gathers sharded weights from all of them.
            if kl:
                with self._reference_policy():
                    self.generator.idle()
            (self.generator.idle().sum() * 0.0).backward()
            return 0
        references = None
        if kl:
            with self._reference_policy():
                references = [step for _, step in replay(packed, pack, noisy_step, sampler)]
        losses = []
        for number, (member, (i, step)) in enumerate(
            zip(pack.members, replay(packed, pack, noisy_step, sampler), strict=True)
        ):
            if member.key not in advantage.values:
                continue
            one = self.objective(
                step,
                member.taken[i],
                advantage.values[member.key],
                noise=member.noise(i, self.config.seed) if self.config.ratio_guard else None,
                dt=member.group.sigmas[i] - member.group.sigmas[i + 1],
                reference=None if references is None else references[number],
            )
            statistics.count(one)
            losses.append(one.loss)
        total = torch.stack(losses).sum() / terms
        # Every rank that shares the pack has the whole loss, and gets the gradient of its own rows of the sequence.
        total.backward()
        statistics.loss += total.item() / self.ranks.sequence
        return pack.layout.joint_length

    @contextlib.contextmanager
    def _reference_policy(self) -> Iterator[None]:
        """Turn the adapter off: the policy before this run, from the same weights, without gradients."""
        transformer = self.model.pipe.transformer
        transformer.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            transformer.enable_adapters()

    # ---- what `Trainer` calls ----

    def run(self) -> bool:
        if not self.check:
            return super().run()
        try:
            for start in [self.step, *(end for end in self.config.ends()[:-1] if end > self.step)]:
                self.step = start
                self._enter_stage()
                batch = self._training_batch()
                if not self.generator.generate(batch):
                    return False
                self._check_on_policy(batch)
        finally:
            self.close()
        return True

    def preflight(self) -> None:
        super().preflight()
        judge = self.rewards.judge

        def ask() -> None:
            if judge is not None and self.ranks.rank == 0:
                self.announce("judge", message=judge.check())

        self.agreed(ask)

    def begin(self) -> None:
        config = self.config
        for name, reason in left_out([self.prompts.dataset, *self.validation.datasets.values()]):
            self.monitor.event(self.step, "left out", where=name, reason=reason)
        if self.prompts.dataset.has_masks:
            message = "the rows have masks, which are not used: rewards judge whole images"
            self.monitor.event(self.step, "masks", message=message)
        if config.visibility not in (None, "full") and not trained_visibility(config.initial):
            message = (
                f"nothing says that the model was trained with it; {config.visibility} is only for models that were"
            )
            self.monitor.event(self.step, "visibility", message=message)

    def _enter_stage(self) -> None:
        before = self.stage
        super()._enter_stage()
        if self.stage != before:
            self._report_noise()

    def _report_noise(self) -> None:
        """Record how noisy the latents of the stage's rollouts are, and warn if the model was not trained on such."""
        config = self.config
        tokens = (config.stages[self.stage].target_side // (self.encoder.token_side)) ** 2
        grid = sigmas(self.model.pipe, tokens, config.rollout_num_inference_steps)
        noise = check_noise(self.generator.sampler, grid, config.window, config.window_stop)
        self.monitor.event(
            self.step, "sampler", final=noise.final, largest=noise.largest, after_step=noise.after_step,
            without_noise=noise.without_noise,
        )  # fmt: skip
        if noise.warning:
            self.monitor.event(self.step, "noise too large", message=noise.warning)

    def validate(self, figures: bool, grid: bool) -> bool:
        """Log the rewards of held-out rows, and save a contact sheet of some; return False if a signal came."""
        config = self.config
        count = config.eval_samples if figures else config.sample_count
        found = self.validation.validate(config.validation_stage, self.plans[self.stage], self.step, count)
        if found is None:
            return False
        if values := (found.scores if figures else {}) | found.judge:
            self.monitor.log(self.step, values)
        if grid and found.groups and self.ranks.rank == 0:
            self.monitor.image(self.step, "heldout", heldout_sheet(found.groups))
        return True

    def state(self) -> dict[str, Any]:
        return {"prompts": self._prompts_state, "alarm": self.detector.state()}

    def close(self) -> None:
        self.rewards.close()

    # ---- figures and events ----

    def _metrics(
        self,
        batch: Batch,
        results: Mapping[MemberKey, Any],
        scores: Mapping[MemberKey, dict[str, float]],
        advantage: Advantages,
        statistics: UpdateStatistics,
    ) -> dict[str, float]:
        # Ranks that share packs have the same statistics: one of them counts.
        first = self.ranks.rank % self.ranks.sequence == 0
        parts = self.ranks.gather((statistics if first else UpdateStatistics(), self.rewards.statistics()))
        updates = [update for update, _ in parts]
        loss = math.fsum(update.loss for update in updates) * self.ranks.sequence
        metrics = step_metrics(batch, results, scores, advantage, updates, self.rewards.total)
        return {"loss": loss} | metrics | judge_metrics([judge for _, judge in parts])

    def _flops(self, batch: Batch) -> float:
        """Return the FLOPs of rollouts and updates, summed over ranks; 0 if the monitor does not log utilisation."""
        if not self.monitor.flops_per_second:
            return 0.0
        config = self.config
        passes = config.rollout_num_inference_steps + config.inner_epochs * config.trained_steps * (
            4 if config.kl else 3
        )
        model, family = self.model.pipe.transformer.config, self.model.family
        own = sum(sum(transformer_flops(model, pack.layout, family=family)) for pack in batch.packs if pack is not None)
        return math.fsum(self.ranks.gather(float(own * passes))) / self.ranks.sequence

    def _detect_reward_hacking(self, scores: Mapping[MemberKey, dict[str, float]]) -> None:
        quality = [axes["quality"] for axes in scores.values() if "quality" in axes]
        if not quality:
            return
        reward = mean([self.rewards.total(axes) for axes in scores.values()])
        if warning := self.detector.add(self.stage, reward, mean(quality)):
            self.monitor.event(self.step, "reward hacking?", message=warning)

    def _show_groups(self, batch: Batch, scores: Mapping[MemberKey, dict[str, float]]) -> None:
        groups = best_and_worst(batch, scores, self.rewards.total, self.config.sample_count, self.ranks)
        if self.ranks.rank == 0 and groups:
            self.monitor.image(self.step, "groups", group_sheet(groups))

    def _notify(self, kind: str, **details: Any) -> None:
        """Record an event of this rank's judge; the monitor prints on rank 0 only."""
        self.monitor.event(self.step, kind, **details)
        if self.ranks.rank:
            text = "  ".join(f"{name}={value}" for name, value in details.items())
            print(f"step {self.step}  rank {self.ranks.rank}  {kind}  {text}", file=sys.stderr, flush=True)
