"""The loop of MSGRPO: prompts, rollouts in packs with rewards asked meanwhile, advantages, the replayed updates."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from uniref_fast import flags as configs
from uniref_fast.data.dataset import Dataset, left_out
from uniref_fast.estimate import transformer_flops
from uniref_fast.keyed_random import draw
from uniref_fast.rewards.types import Failure
from uniref_fast.runs import trained_visibility
from uniref_fast.training.batches.heldout import heldout_datasets
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.batches.rows import check_same_rows
from uniref_fast.training.batches.samples import Encoder, Prepared
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.trainer import Trainer
from uniref_fast.training.rl.generator import Batch, Roller
from uniref_fast.training.rl.grpo import Advantages, advantages, guarded_log_ratio, objective
from uniref_fast.training.rl.monitoring import Alarm, Shown, group_sheet, heldout_sheet
from uniref_fast.training.rl.on_policy import OffPolicyError, Timestep, probe, table
from uniref_fast.training.rl.prompts import Prompts
from uniref_fast.training.rl.recipes import MSGRPO, RLStage
from uniref_fast.training.rl.rewards import RewardSet
from uniref_fast.training.rl.rollout import Group, MemberKey, RolloutPack, replay, schedule
from uniref_fast.training.rl.sde import (
    FINAL_LIMIT,
    STEP_LIMIT,
    Sampler,
    deviations,
    divergence,
    largest_noise,
    log_density,
    worst,
)

__all__ = ["RLTrainer", "RewardError"]


class RewardError(RuntimeError):
    """Too many rollouts of a step got no scores."""


@dataclass
class Tally:
    """What the updates of a step came to, on this rank."""

    loss: float = 0.0
    ratios: list[float] = field(default_factory=list)
    clipped: int = 0
    kl: list[float] = field(default_factory=list)

    def add(self, part: Tally, share: float) -> None:
        """Count an update, whose loss has that share of the step's."""
        self.loss += share * part.loss
        self.ratios += part.ratios
        self.clipped += part.clipped
        self.kl += part.kl


class RLTrainer(Trainer):
    """A run of MSGRPO; arguments and errors as `Trainer`, and ValueError for data that is not that of the checkpoint.

    Args:
        check: only pass the on-policy gate: `run` then rolls out one step, replays it, and trains nothing.
    """

    config: MSGRPO

    def __init__(self, config: MSGRPO, ranks: Ranks, out: Path, resume: int | None = None, check: bool = False) -> None:
        super().__init__(config, ranks, out, resume)
        if getattr(self.model.pipe.vae, "use_tiling", False):
            self.model.pipe.vae.disable_tiling()  # its seams would be judged, and learnt
        self.check = check
        self.checked = -1  # the stage whose packs and parallel layout passed the gate
        self.monitor.enabled &= not check
        self.sampler = Sampler(config.sampler, config.noise)
        cache = TensorCache(config.cache)
        self.encoder = Encoder(self.model.pipe, cache)
        dataset = Dataset(config.data, config.image_folder, "optional", config.columns)
        self.prompts = Prompts(dataset, self.encoder, config, self.saved.get("prompts"))
        self._prompts_state = self.prompts.state()
        self.heldout = heldout_datasets(map(Path, config.heldout), config, "optional")
        scored = ("rewards", "reward_weights", "axis_weights", "judge")  # other scores are not compared with these
        before, now = self.saved.get("config", {}), json.loads(configs.to_json(config))
        same = all(before[name] == now[name] for name in scored if name in before)
        self.alarm = Alarm(config.alarm, self.saved.get("alarm") if same else None)
        self.rewards = RewardSet(config, None if check else out / "judge", ranks.rank, self._notified)
        self.roller = Roller(config, ranks, self.model, self.encoder, self.rewards, lambda: self.signalled)

    # ---- what `Trainer` asks for ----

    def run(self) -> bool:
        if not self.check:
            return super().run()
        try:
            for start in [self.step, *(end for end in self.config.ends()[:-1] if end > self.step)]:
                self.step = start
                self._enter_stage()
                self._gate(self._rolled(self._taken(self.config.prompts), None)[0])
        finally:
            self.close()
        return True

    def preflight(self) -> None:
        super().preflight()
        judge = self.rewards.judge

        def asked() -> None:
            if judge is not None and self.ranks.rank == 0:
                self.announce("judge", told=judge.check())

        self.agreed(asked)

    def begin(self) -> None:
        config = self.config
        for name, reason in left_out([self.prompts.dataset, *self.heldout.values()]):
            self.monitor.event(self.step, "left out", where=name, reason=reason)
        if config.visibility not in (None, "full") and not trained_visibility(config.initial):
            told = f"nothing says that the model was trained with it; {config.visibility} is only for models that were"
            self.monitor.event(self.step, "visibility", told=told)

    def state(self) -> dict[str, Any]:
        return {"prompts": self._prompts_state, "alarm": self.alarm.state()}

    def close(self) -> None:
        self.rewards.close()

    def train_step(self) -> bool:
        start, config = time.perf_counter(), self.config
        batch, whole = self._rolled(self._taken(config.prompts), self.step)
        if not whole:
            return False
        if self.checked != self.stage:
            self._gate(batch)
        results = self.roller.results(batch)
        if results is None:
            return False
        scores = self._scores(results)
        advantage = advantages(
            scores, batch.keys, self.rewards.axis_weights, kind=config.advantage, spread=config.spread,
            min_members=config.min_members, clip=config.advantage_clip,
        )  # fmt: skip
        began = time.perf_counter()
        tally, norm, trained = self._updated(batch, advantage)
        metrics = self._metrics(batch, results, scores, advantage, tally)
        metrics |= {"lr": config.lr(self.step), "grad_norm": norm}
        metrics["update/tokens_per_second"] = trained / max(time.perf_counter() - began, 1e-9)
        if self.average is not None:
            self.average.update(self.step)
        self.monitor.step(
            self.step, metrics, tokens=batch.tokens + trained, samples=len(scores), flops=self._flops(batch),
            seconds=time.perf_counter() - start,
        )  # fmt: skip
        self._sound(scores)
        if config.sample_every and (self.step + 1) % config.sample_every == 0:
            self._show_groups(batch, scores)
        self._prompts_state = self.prompts.state()
        self.stopping = any(self.ranks.gather(self.signalled))
        return True

    def _enter_stage(self) -> None:
        before = self.stage
        super()._enter_stage()
        if self.stage != before:
            self._warn_of_noise()

    # ---- rollouts ----

    def _taken(self, count: int) -> list[tuple[PackKey, Prepared]]:
        """The next rows; those that cannot be used are recorded and passed over. All ranks."""

        def check(key: PackKey, prepared: Prepared) -> None:
            self.roller.check_size(key, prepared, self.plans[self.stage])

        taken, broken = self.prompts.take(count, self.config.stages[self.stage], check)
        check_same_rows(self.ranks.gather(([key for key, _ in taken], broken)))
        self._report_broken(broken)
        return taken

    def _report_broken(self, rows: Sequence[tuple[str, str]]) -> None:
        for where, reason in rows:
            self.monitor.event(self.step, "broken row", where=where, reason=reason)

    def _rolled(self, rows: Sequence[tuple[PackKey, Prepared]], step: int | None) -> tuple[Batch, bool]:
        """Rollouts of rows; whether a signal left them whole. `step` None asks for no rewards.

        The rows after them take the places of those that cannot be encoded.
        """
        config, rows = self.config, list(rows)
        while True:
            batch = self.roller.plan(rows, self.plans[self.stage], config.group, config.rollout_steps, config.guidance)
            if not batch.lost:
                return batch, self.roller.roll(batch, self.sampler, config.guidance, config.seed, step)
            lost = list(batch.lost.values())
            self._report_broken(lost)
            self.prompts.rows.count_broken(lost)
            rows = [row for row in rows if row[0] not in batch.lost] + self._taken(len(lost))

    def _scores(self, results: Mapping[MemberKey, dict[str, float] | Failure]) -> dict[MemberKey, dict[str, float]]:
        """Scores of the members that have them.

        Raises:
            RewardError: when more failed than the run allows.
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

    # ---- the gate ----

    def _gate(self, batch: Batch) -> None:
        """Replay every noisy step of a rollout.

        Raises:
            OffPolicyError: on all ranks, where a ratio is not 1.
        """
        found: list[Timestep] = []
        for slot in range(self.config.noisy_steps):
            for pack in batch.packs:
                mine = [] if pack is None else self._probed(pack, slot, diagnose=False)
                if pack is None:
                    self.roller.idle()
                if any(self.ranks.gather(any(one.off for one in mine))):  # all look for the cause: weights are gathered
                    if pack is not None:
                        again = self._probed(pack, slot, diagnose=True)
                        mine = [one.because(other) for one, other in zip(mine, again, strict=True)]
                    else:
                        for _ in range(4):
                            self.roller.idle()
                found += mine
        everywhere = [one for ones in self.ranks.gather(found) for one in ones]
        self.checked = self.stage
        worst = max((abs(one.log_ratio) for one in everywhere), default=0.0)
        if self.check and self.ranks.rank == 0:
            stage = self.config.stages[self.stage]
            print(f"stage {self.stage}: side {stage.side}, references {stage.references}\n{table(everywhere)}")
        elif not self.check:
            steps = len({one.step for one in everywhere})
            self.monitor.event(self.step, "on-policy gate", timesteps=steps, worst_log_ratio=worst)
        bad = sorted((one for one in everywhere if one.cause), key=lambda one: one.step)
        if bad:
            first = max((one for one in bad if one.step == bad[0].step), key=lambda one: abs(one.log_ratio))
            raise OffPolicyError(
                f"the replay does not repeat the rollout: {len(bad)} of {len(everywhere)} ratios are not 1. First at "
                f"timestep {first.step} (t = {first.t:.4f}): ratio {math.exp(first.log_ratio):.8f}. Likely cause: "
                f"{first.cause}. Nothing was trained"
            )

    def _probed(self, pack: RolloutPack, slot: int, diagnose: bool) -> list[Timestep]:
        return probe(self.model.packed, pack, slot, self.sampler, self.config.guidance, diagnose)

    # ---- updates ----

    def _updated(self, batch: Batch, advantage: Advantages) -> tuple[Tally, float, int]:
        """Train on the rollouts; (tally of this rank, largest gradient norm, tokens of all ranks)."""
        config, tally, norms, tokens = self.config, Tally(), [0.0], 0
        if not advantage.values:
            self.monitor.event(self.step, "nothing to learn", zero_spread=advantage.zero_spread)
            return tally, 0.0, 0
        for epoch in range(config.inner_epochs):
            for slots in self._chunks(epoch):
                count, part = len(advantage.values) * len(slots), Tally()
                for pack in batch.packs:
                    for slot in slots:
                        tokens += self._backward(pack, slot, advantage, count, part)
                norm = self.norm()
                norms.append(norm)
                loss = math.fsum(self.ranks.gather(part.loss))
                tally.add(part, 1 / (config.inner_epochs * config.updates))
                if self.finite(norm, loss, lambda: [group.prepared.row.where for group in batch.groups]):
                    self.take_step(norm)
                self.optimizer.zero_grad(set_to_none=True)
        worst = math.nan if any(map(math.isnan, norms)) else max(norms)
        return tally, worst, sum(self.ranks.gather(tokens)) // self.ranks.sequence

    def _chunks(self, epoch: int) -> Iterator[list[int]]:
        """The noisy steps that are trained on in an epoch, drawn for the step and shared out to its updates."""
        config = self.config
        drawn = torch.randperm(config.noisy_steps, generator=draw(config.seed, "timesteps", (self.step,)))
        slots = sorted(drawn[: config.trained_steps].tolist())
        order = torch.randperm(len(slots), generator=draw(config.seed, "slots", (self.step, epoch))).tolist()
        for part in range(config.updates):
            yield [slots[i] for i in order[part :: config.updates]]

    def _backward(self, pack: RolloutPack | None, slot: int, advantage: Advantages, count: int, tally: Tally) -> int:
        """Add the gradient of a pack at one noisy step; returns its tokens."""
        packed, config = self.model.packed, self.config
        if pack is None or not any(member.key in advantage.values for member in pack.members):
            if config.kl:
                with torch.no_grad(), self._adapter_off():
                    self.roller.idle()
            (self.roller.idle().sum() * 0.0).backward()
            return 0
        reference = None
        if config.kl:
            with torch.no_grad(), self._adapter_off():
                reference = replay(packed, pack, slot, self.sampler, config.guidance)
        terms = []
        for number, (member, (i, step)) in enumerate(
            zip(pack.members, replay(packed, pack, slot, self.sampler, config.guidance), strict=True)
        ):
            if member.key not in advantage.values:
                continue
            log_ratio = log_density(member.after[i], step) - member.log_probs[i]
            tally.ratios.append(log_ratio.exp().item())
            weight = 1.0
            if config.guard:
                rollout_mean = member.after[i] - step.std * member.noise(i, config.seed)
                log_ratio = guarded_log_ratio(log_ratio, step.mean, rollout_mean, step.std)
                weight = 1.0 / (member.group.grid[i] - member.group.grid[i + 1])
            high = config.clip if config.clip_high is None else config.clip_high
            loss, clipped = objective(log_ratio, advantage.values[member.key], config.clip, high)
            tally.clipped += clipped
            loss = weight * loss
            if reference is not None:
                kl = divergence(step, reference[number][1])
                tally.kl.append(kl.item())
                loss = loss + config.kl * kl
            terms.append(loss)
        total = torch.stack(terms).sum() / count
        # every rank that shares the pack has the whole loss, and keeps the gradient of its own rows
        total.backward()
        tally.loss += total.item() / self.ranks.sequence
        return pack.layout.joint_length

    @contextlib.contextmanager
    def _adapter_off(self) -> Iterator[None]:
        transformer = self.model.pipe.transformer
        transformer.disable_adapters()
        try:
            yield
        finally:
            transformer.enable_adapters()

    def _flops(self, batch: Batch) -> float:
        """Of the rollouts and the updates, on all ranks; 0 where the monitor has no use for them."""
        if not self.monitor.flops_per_second:
            return 0.0
        config = self.config
        passes = config.rollout_steps + config.inner_epochs * config.trained_steps * (4 if config.kl else 3)
        model = self.model.pipe.transformer.config
        own = sum(sum(transformer_flops(model, pack.layout)) for pack in batch.packs if pack is not None)
        return math.fsum(self.ranks.gather(float(own * passes))) / self.ranks.sequence

    # ---- sight ----

    def _metrics(
        self,
        batch: Batch,
        results: Mapping[MemberKey, Any],
        scores: Mapping[MemberKey, dict[str, float]],
        advantage: Advantages,
        tally: Tally,
    ) -> dict[str, float]:
        first = self.ranks.rank % self.ranks.sequence == 0
        parts = self.ranks.gather((tally if first else Tally(), self.rewards.statistics()))
        tallies = [part for part, _ in parts]
        ratios = [ratio for part in tallies for ratio in part.ratios] or [1.0]
        kl = [value for part in tallies for value in part.kl]
        totals = [self.rewards.total(axes) for axes in scores.values()]
        metrics = {
            "loss": math.fsum(part.loss for part in tallies) * self.ranks.sequence,
            "reward": _mean(totals),
            "reward_std": _std(totals),
            "group_std": advantage.spread,
            "ratio": _mean(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "clip_fraction": sum(part.clipped for part in tallies) / len(ratios),
            "zero_spread": advantage.zero_spread / len(batch.groups),
            "too_few": advantage.too_few / len(batch.groups),
            "failures": sum(isinstance(result, Failure) for result in results.values()) / len(results),
            "rollout/tokens_per_second": batch.tokens / batch.seconds,
        }
        for axis in sorted({axis for axes in scores.values() for axis in axes}):
            values = [axes[axis] for axes in scores.values() if axis in axes]
            metrics |= {f"reward/{axis}": _mean(values), f"reward_std/{axis}": _std(values)}
        if kl:
            metrics["kl"] = _mean(kl)
        return metrics | _judge_metrics([statistics for _, statistics in parts])

    def _sound(self, scores: Mapping[MemberKey, dict[str, float]]) -> None:
        if not scores:
            return
        quality = [axes["quality"] for axes in scores.values() if "quality" in axes]
        total = _mean([self.rewards.total(axes) for axes in scores.values()])
        if quality and (told := self.alarm.add(self.stage, total, _mean(quality))):
            self.monitor.event(self.step, "reward hacking?", told=told)

    def _show_groups(self, batch: Batch, scores: Mapping[MemberKey, dict[str, float]]) -> None:
        """The best and the worst member of some groups, as a picture. All ranks."""
        wanted: dict[MemberKey, str] = {}
        chosen: list[tuple[Group, MemberKey, MemberKey]] = []
        for group, keys in zip(batch.groups, batch.keys, strict=True):
            scored = sorted((key for key in keys if key in scores), key=lambda key: self.rewards.total(scores[key]))
            if len(scored) > 1 and len(chosen) < self.config.sample_count:
                chosen.append((group, scored[-1], scored[0]))
                wanted |= {scored[-1]: "best", scored[0]: "worst"}
        mine = {key: image for key, image in batch.images.items() if key in wanted}
        images = {key: image for part in self.ranks.gather(mine) for key, image in part.items()}
        if self.ranks.rank == 0 and chosen:
            shown = [
                Shown(group.prepared, {"best": (images[best], scores[best]), "worst": (images[worst], scores[worst])})
                for group, best, worst in chosen
            ]
            self.monitor.image(self.step, "groups", group_sheet(shown))

    def validate(self, figures: bool, grid: bool) -> bool:
        """Rewards of held-out rows, denoised without noise from the same start every time; and a picture of some."""
        config, stage = self.config, self.config.stages[self.stage]
        values: dict[str, float] = {}
        shown: list[Shown] = []
        for name, dataset in self.heldout.items():
            count = min(config.eval_samples if figures else config.sample_count, len(dataset))
            rows = [((0, i), self._prepared(dataset, i, stage)) for i in range(count)]
            batch = self.roller.plan(rows, self.plans[self.stage], 1, config.sample_steps, config.sample_guidance)
            for where, reason in batch.lost.values():
                raise ValueError(f"{where}: {reason}; mend or leave out this held-out row")
            if not self.roller.roll(batch, None, config.sample_guidance, 0, self.step):
                return False
            results = self.roller.results(batch)
            if results is None:
                return False
            scores = {key: result for key, result in results.items() if not isinstance(result, Failure)}
            if figures and scores:
                values[f"eval/{name}"] = _mean([self.rewards.total(axes) for axes in scores.values()])
                for axis in sorted({axis for axes in scores.values() for axis in axes}):
                    values[f"eval/{name}/{axis}"] = _mean([axes[axis] for axes in scores.values() if axis in axes])
                if len(scores) < len(results):
                    values[f"eval/{name}/failures"] = 1 - len(scores) / len(results)
            first = {keys[0] for keys in batch.keys[: config.sample_count]}
            mine = {key: image for key, image in batch.images.items() if key in first}
            images = {key: image for part in self.ranks.gather(mine) for key, image in part.items()}
            for group, (key,) in zip(batch.groups[: config.sample_count], batch.keys, strict=False):
                shown.append(Shown(group.prepared, {"made": (images[key], scores.get(key, {}))}))
        asked = _judge_metrics(self.ranks.gather(self.rewards.statistics()))  # not to be counted in the next step
        values |= {f"eval/{name}": value for name, value in asked.items()}
        if values:
            self.monitor.log(self.step, values)
        if grid and shown and self.ranks.rank == 0:
            self.monitor.image(self.step, "heldout", heldout_sheet(shown))
        return True

    def _prepared(self, dataset: Dataset, index: int, stage: RLStage) -> Prepared:
        return self.encoder.prepare(dataset[index], (0, index), stage.side, stage.target_side, rollout=True)

    def _warn_of_noise(self) -> None:
        """Say when the noise of the rollouts leaves the model's latents other than those it was trained on."""
        config = self.config
        tokens = (config.stages[self.stage].target_side // (self.model.pipe.vae_scale_factor * 2)) ** 2
        grid = schedule(self.model.pipe.scheduler, tokens, config.rollout_steps)
        window, last = config.window, 0 if config.window is None else config.window_stop - config.window
        places = [None if window is None else range(first, first + window) for first in range(last + 1)]
        plain, (largest, step, final) = deviations(None, grid)[-1], worst(self.sampler, grid, places)
        self.monitor.event(self.step, "sampler", final=final, largest=largest, after_step=step, without_noise=plain)
        if largest <= STEP_LIMIT and final <= FINAL_LIMIT:
            return
        sound = largest_noise(self.sampler, grid, places)
        if sound is not None:
            advice = f"set noise to {sound:g} or less"
        elif window is not None:
            advice = "let all steps be noisy (window = none), or take more rollout_steps"
        else:
            advice = "take more rollout_steps"
        told = (
            f"noise = {config.noise:g} is too large: for Gaussian data with the exact velocity, latents have "
            f"{largest:.2f} times the standard deviation that the model was trained on after step {step} of "
            f"{config.rollout_steps} (up to {STEP_LIMIT:g} is sound) and {final:.2f} times at the end (up to "
            f"{FINAL_LIMIT:g}; {plain:.2f} without noise); {advice}"
        )
        self.monitor.event(self.step, "noise too large", told=told)

    def _notified(self, kind: str, **details: Any) -> None:
        """Of this rank's judge; the monitor speaks on rank 0 only."""
        self.monitor.event(self.step, kind, **details)
        if self.ranks.rank:
            told = "  ".join(f"{name}={value}" for name, value in details.items())
            print(f"step {self.step}  rank {self.ranks.rank}  {kind}  {told}", file=sys.stderr, flush=True)


def _judge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all ranks: counts added up, shares weighed by calls, seconds by those that were not replayed."""
    parts = [part for part in parts if part.get("calls")]
    if not parts:
        return {}
    metrics = {f"judge/{name}": sum(part[name] for part in parts) for name in ("calls", "retries", "replayed")}
    for name in sorted({name for part in parts for name in part} - {"calls", "retries", "replayed"}):
        asked = [part["calls"] - part["replayed"] * name.startswith("seconds") for part in parts]
        added = sum(part.get(name, 0.0) * weight for part, weight in zip(parts, asked, strict=True))
        metrics[f"judge/{name}"] = added / max(sum(asked), 1.0)
    return metrics


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values])) if values else math.nan
