"""The loop of supervised fine-tuning: plan, encode, forward, backward, step; look, save, and survive what happens."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniref_fast.estimate import transformer_flops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.training import packing
from uniref_fast.training.cache import TensorCache
from uniref_fast.training.checkpoint import Checkpoints
from uniref_fast.training.ema import MovingAverage
from uniref_fast.training.evaluate import HeldOut, assembled, idle_batch, partial_errors
from uniref_fast.training.feeder import Feeder, StepPacks
from uniref_fast.training.flow import FlowBatch, draw, resolution_shift, sample_t
from uniref_fast.training.model import TrainedModel
from uniref_fast.training.monitor import GroupedMean, Monitor, peak_flops
from uniref_fast.training.packing import Key
from uniref_fast.training.parallel import Ranks, global_norm, scale_gradients
from uniref_fast.training.recipes import SFT, stage_at
from uniref_fast.training.rows import Dataset
from uniref_fast.training.samples import Encoded, Encoder
from uniref_fast.training.stages import StagePlan, device_memory, plan_stage

__all__ = ["DivergedError", "Trainer"]


class DivergedError(RuntimeError):
    """Too many steps in a row had a NaN or infinite loss or gradient."""


class Trainer:
    """One process of a run.

    Args:
        config: of the run; data and heldout are paths by now.
        ranks: of the run.
        out: folder of the run.
        resume: step of the checkpoint to go on from, or None.

    Raises:
        ValueError: for a stage that does not fit, or data that is not that of the checkpoint.
    """

    def __init__(self, config: SFT, ranks: Ranks, out: Path, resume: int | None = None) -> None:
        self.config, self.ranks, self.out = config, ranks, out
        self.model = TrainedModel(config, ranks)
        self.parameters = list(self.model.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1.0, betas=config.betas, weight_decay=config.weight_decay, foreach=True
        )
        self.average = None if config.ema is None else MovingAverage(self.model.parameters, config.ema)
        self.checkpoints = Checkpoints(out / "checkpoints", ranks, config.keep)
        self.plans = self._plans()
        self.stage = -1
        self.step = 0
        self.skipped = 0  # in a row
        self.signalled = False  # this process was asked to stop
        self.stopping = False  # all agreed to
        state = None if resume is None else self._load(resume)
        costs = state["costs"] if state else self._costs().as_dict()
        self.costs = packing.CostModel(**costs)
        cache = TensorCache(config.cache)
        dataset = Dataset(config.data, config.image_folder)
        encoder = Encoder(self.model.pipe, cache, config.seed, config.drop_text, config.drop_references)
        self.encoder = encoder
        feeding = state["feeder"] if state else None
        self.feeder = Feeder(dataset, encoder, config, self.plans, self.costs, self._assign, feeding)
        files = [Path(path) for path in config.heldout]
        self.heldout = HeldOut(files, config, self.model, Encoder(self.model.pipe, cache), ranks)
        peak = peak_flops(ranks.device, getattr(torch, config.dtype))
        self.monitor = Monitor(
            out,
            config.total_steps,
            self.step,
            enabled=ranks.rank == 0,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            flops_per_second=peak and peak * ranks.size,
        )

    # ---- the loop ----

    def run(self) -> bool:
        """Train to the last step; False when a signal ended it before. A checkpoint then holds what was done."""
        with self.monitor, self._signals():
            if self.step == 0:
                self._look()
            while self.step < self.config.total_steps and not self.stopping:
                self._enter_stage()
                self._train_step()
                self.step += 1
                done = self.step == self.config.total_steps
                if self.step % self.config.save_every == 0 or done or self.stopping:
                    self._save()
                if not self.stopping:
                    self._look(done)
            if not self.stopping:
                with self.average.applied() if self.average else contextlib.nullcontext():
                    self.model.export(self.out)
            if self.config.cache is not None:
                self.monitor.event(self.step, "cache", hits=self.encoder.cache.hits, misses=self.encoder.cache.misses)
        self.feeder.close()
        return not self.stopping

    def _enter_stage(self) -> None:
        number, stage = stage_at(self.config, self.step)  # of the last step once all are done
        if number != self.stage:
            self.stage, plan = number, self.plans[number]
            self.ranks.share_sequences(self.model.packed, plan.sequence_parallel)
            self.model.packed.checkpointing = plan.checkpointing
            self.monitor.event(
                self.step, "stage", number=number, side=stage.side, pack_tokens=plan.pack_tokens, plan=plan.reason
            )

    def _train_step(self) -> None:
        start, config = time.perf_counter(), self.config
        step_packs = self.feeder.next(self.step)
        encoded, unread = self._encoded(step_packs)
        everywhere = self.ranks.gather(unread)
        # Ranks of a group run the same packs: what one of them cannot read leaves the packs of all.
        lost = {key: row for rows in everywhere for key, row in rows.items()}
        self._report_broken(step_packs.broken + list(lost.values()), len(lost))
        samples = sum(item.key not in lost for pack in step_packs.packs for item in pack.items)
        batches = self._batches(step_packs, encoded, set(lost))
        parts = []
        for keys, batch in batches:
            errors = partial_errors(self.model.packed, batch)
            loss = errors.sum() * (1 / max(samples, 1) if keys else 0.0)
            loss.backward()
            parts += list(zip(keys, errors.detach().tolist(), strict=False))
        labels = {key: (len(p.sample.references), p.task) for key, p in step_packs.prepared.items()}
        seen = self.ranks.gather(([(key, *labels[key], error) for key, error in parts], self.signalled))
        self.stopping = any(signalled for _, signalled in seen)
        norm = global_norm(self.parameters)
        lr = config.lr(self.step)
        metrics = self._losses([row for rows, _ in seen for row in rows], samples)
        if self._finite(norm, metrics["loss"], step_packs):
            if norm > config.max_grad_norm > 0:
                scale_gradients(self.parameters, config.max_grad_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        report = packing.report(step_packs.packs, self.ranks.replicas)
        metrics |= {"lr": lr, "grad_norm": norm, "utilisation": report.utilisation, "imbalance": report.imbalance}
        flops = (
            sum(3 * self._flops(pack.samples) for pack in step_packs.packs) if self.monitor.flops_per_second else 0.0
        )
        self.monitor.step(
            self.step, metrics, tokens=report.tokens, samples=samples, flops=flops, seconds=time.perf_counter() - start
        )

    def _encoded(self, step_packs: StepPacks) -> tuple[dict[Key, Encoded], dict[Key, tuple[str, str]]]:
        """Tensors of this rank's samples, and (place, reason) of those whose images cannot be read."""
        encoded: dict[Key, Encoded] = {}
        unread: dict[Key, tuple[str, str]] = {}
        for key, prepared in step_packs.prepared.items():
            try:
                encoded[key] = self.encoder.encode(prepared, step_packs.images[key].result())
            except (ValueError, OSError) as error:
                unread[key] = (prepared.row.where, str(error))
        return encoded, unread

    def _batches(
        self, step_packs: StepPacks, encoded: dict[Key, Encoded], lost: set[Key]
    ) -> list[tuple[list[Key], FlowBatch]]:
        """This rank's packs as (keys of the samples, batch); what is lost leaves its pack."""
        config, scheduler = self.config, self.model.pipe.scheduler.config
        batches = []
        for number in step_packs.mine:
            keys = [item.key for item in step_packs.packs[number].items if item.key not in lost]
            chosen = [(step_packs.prepared[key], encoded[key]) for key in keys]
            times, noises = [], []
            for key, (_, tensors) in zip(keys, chosen, strict=True):
                shift = resolution_shift(scheduler, len(tensors.target))
                times.append(sample_t(draw(config.seed, "t", key), config.t_mean, config.t_std, shift))
                noises.append(torch.randn(tensors.target.shape, generator=draw(config.seed, "noise", key)))
            batch = assembled(self.model, chosen, times, noises) if keys else idle_batch(self.model)
            batches.append((keys, batch))
        return batches

    def _losses(self, rows: list[tuple[Any, int, str, float]], samples: int) -> dict[str, float]:
        """Mean loss over all samples, and by number of references and by task; parts of one sample are added up."""
        by_k, by_task = GroupedMean("loss_by_k"), GroupedMean("loss_by_task")
        whole: dict[Any, tuple[int, str, float]] = {}
        for key, k, task, error in rows:
            whole[key] = (k, task, whole[key][2] + error if key in whole else error)
        for k, task, error in whole.values():
            by_k.add(k, error)
            by_task.add(task, error)
        total = math.fsum(error for *_, error in whole.values()) if samples else math.nan
        return {"loss": total / max(samples, 1), **by_k.reduce(), **by_task.reduce()}

    def _finite(self, norm: float, loss: float, step_packs: StepPacks) -> bool:
        """Whether the step may be taken; otherwise it is skipped, counted and named.

        Raises:
            DivergedError: after `max_skipped` in a row.
        """
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped = 0
            return True
        self.skipped += 1
        rows = [self.feeder.dataset.where(item.key[1]) for pack in step_packs.packs for item in pack.items]
        self.monitor.event(self.step, "skipped", loss=loss, grad_norm=norm, in_a_row=self.skipped, rows=rows)
        if self.skipped >= self.config.max_skipped:
            raise DivergedError(
                f"{self.skipped} steps in a row had a loss or gradient that is not finite; the last was step "
                f"{self.step} (loss {loss}, gradient norm {norm}) on {', '.join(rows[:8])}. Nothing of these steps was "
                "kept; resume with a lower lr"
            )
        return False

    def _report_broken(self, rows: list[tuple[str, str]], uncounted: int) -> None:
        for where, reason in rows:
            self.monitor.event(self.step, "broken row", where=where, reason=reason)
        if uncounted:
            self.feeder.count_broken(uncounted, rows)

    # ---- looking ----

    def _look(self, done: bool = False) -> None:
        """Held-out losses and samples, when it is time for them."""
        config = self.config
        losses = config.eval_every and (self.step % config.eval_every == 0 or done)
        grid = config.sample_every and ((self.step and self.step % config.sample_every == 0) or done)
        if not self.heldout.datasets or not (losses or grid):
            return
        self._enter_stage()
        stage = config.stages[self.stage]
        self.model.packed.eval()
        with self.average.applied() if self.average and self.step else contextlib.nullcontext():
            if losses:
                self.monitor.log(self.step, self.heldout.losses(stage, self.plans[self.stage].pack_tokens))
            if grid and (picture := self.heldout.grid(stage)):
                self.monitor.image(self.step, "heldout", picture)
        self.model.packed.train()

    # ---- saving ----

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; makes the optimizer's state where there is none yet."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.parameters.items():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
            tensors |= {f"{part}.{name}": state[part] for part in ("exp_avg", "exp_avg_sq")}
            tensors[f"model.{name}"] = parameter.detach()
            if self.average is not None:
                tensors[f"average.{name}"] = self.average.average[name]
        return tensors

    def _save(self) -> None:
        updates = [int(self.optimizer.state[p]["step"]) if self.optimizer.state[p] else 0 for p in self.parameters]
        state = {
            "feeder": self.feeder.state(),
            "costs": self.costs.as_dict(),
            "skipped": self.skipped,
            "updates": updates,
        }
        path = self.checkpoints.save(self.step, self._tensors(), state)
        self.monitor.event(self.step, "checkpoint", path=path.name)

    def _load(self, step: int) -> dict[str, Any]:
        state = self.checkpoints.load(step, self._tensors())
        for parameter, updates in zip(self.parameters, state["updates"], strict=True):
            self.optimizer.state[parameter]["step"].fill_(updates)
        self.step, self.skipped = step, state["skipped"]
        return state

    # ---- planning ----

    def _plans(self) -> list[StagePlan]:
        ranks, config = self.ranks, self.config
        memory = device_memory(ranks.device, config.memory_gib)
        if ranks.device.type == "cpu" and config.memory_gib is None:
            memory //= ranks.size
        plans = [
            plan_stage(
                stage,
                self.model.pipe.transformer.config,
                ranks=ranks.size,
                memory=memory,
                fixed=self.model.fixed_bytes(),
                sharded=self.model.sharded_bytes(),
                element=getattr(torch, config.dtype).itemsize,
                patch=self.model.pipe.vae_scale_factor * 2,
            )
            for stage in config.stages
        ]
        for plan in plans:
            if config.packs % (ranks.size // plan.sequence_parallel):
                raise ValueError(
                    f"packs = {config.packs} cannot be shared equally by {ranks.size // plan.sequence_parallel} groups "
                    f"of ranks ({ranks.size} ranks, {plan.sequence_parallel} a pack)"
                )
        return self.ranks.broadcast(plans)

    def _assign(self, packs: list[packing.Pack], stage: int) -> list[int]:
        sequence = self.plans[stage].sequence_parallel
        return packing.assign(packs, self.ranks.size // sequence)[self.ranks.rank // sequence]

    def _costs(self) -> packing.CostModel:
        """Prices of samples: operations, or seconds of forward and backward on this machine. All ranks."""
        config = self.model.pipe.transformer.config
        if self.config.cost == "flops":
            return packing.CostModel.from_config(config)
        # A rank has so many of a pack's tokens in the stage that gives it least, and may have to recompute.
        most = min(plan.pack_tokens // plan.sequence_parallel for plan in self.plans)
        self.model.packed.checkpointing = any(plan.checkpointing for plan in self.plans)
        self.ranks.share_sequences(self.model.packed, 1)
        samples, seconds = [], []
        for tokens in (most // 8, most // 4, most // 2, most):
            sample = Sample(16, (1, 1, max(tokens - 16, 1)))
            samples.append(sample)
            seconds.append(min(self._timed(sample) for _ in range(3)))
        self.optimizer.zero_grad(set_to_none=True)
        return packing.CostModel.fit(samples, self.ranks.broadcast(seconds))

    def _timed(self, sample: Sample) -> float:
        config, device = self.model.pipe.transformer.config, self.ranks.device
        layout = SelfLayout.qwen([sample], zero_cond_t=bool(config.zero_cond_t))
        dtype = getattr(torch, self.config.dtype)
        image = torch.randn(layout.image_length, config.in_channels, device=device, dtype=dtype)
        text = torch.randn(layout.text_length, config.joint_attention_dim, device=device, dtype=dtype)
        self._wait()
        start = time.perf_counter()
        self.model.packed(image, text, torch.full((1,), 0.5, device=device), layout).square().sum().backward()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _flops(self, samples: tuple[Sample, ...]) -> int:
        config = self.model.pipe.transformer.config
        return sum(transformer_flops(config, SelfLayout.qwen(samples, zero_cond_t=bool(config.zero_cond_t))))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step, with a checkpoint; a second one ends it at once."""

        def stop(number: int, frame: Any) -> None:
            self.signalled = True
            signal.signal(number, before[number])

        before: dict[int, Any] = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
