"""The loop of supervised fine-tuning: plan, encode, forward, backward, step; look, save, and survive what happens."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from uniref_fast.data.dataset import Dataset, left_out
from uniref_fast.keyed_random import draw
from uniref_fast.layout import Sample
from uniref_fast.training.batches import packing
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.loader import PackLoader, StepPacks, agree
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.batches.samples import Encoded, Encoder
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.monitor import GroupedMean
from uniref_fast.training.core.trainer import Trainer
from uniref_fast.training.supervised.flow_matching import FlowBatch, resolution_shift, sample_t
from uniref_fast.training.supervised.recipes import SFT
from uniref_fast.training.supervised.validation import Validation, assembled, idle_batch, partial_errors

__all__ = ["SFTTrainer"]


class SFTTrainer(Trainer):
    """Trains on rows with targets (supervised fine-tuning).

    Arguments and errors are those of `Trainer`; also raises ValueError for data that the checkpoint was not trained on.
    """

    config: SFT

    def __init__(self, config: SFT, ranks: Ranks, out: Path, resume: int | None = None) -> None:
        super().__init__(config, ranks, out, resume)
        self.model.packed.visibility = config.attends
        costs = self.saved["costs"] if self.saved else self._costs().as_dict()
        self.costs = packing.CostModel(**costs)
        cache = TensorCache(config.cache)
        dataset = Dataset(config.data, config.image_folder, columns=config.columns)
        self.encoder = Encoder(self.model.pipe, cache, config.seed, config.drop_text, config.drop_references)
        loader_state = self.saved["feeder"] if self.saved else None
        self.loader = PackLoader(dataset, self.encoder, config, self.plans, self.costs, self._assign, loader_state)
        files = [Path(path) for path in config.heldout]
        self.heldout = Validation(files, config, self.model, Encoder(self.model.pipe, cache), ranks)

    def begin(self) -> None:
        for name, reason in left_out([self.loader.dataset, *self.heldout.datasets.values()]):
            self.monitor.event(self.step, "left out", where=name, reason=reason)

    def state(self) -> dict[str, Any]:
        return {"feeder": self.loader.state(), "costs": self.costs.as_dict()}

    def validate(self, figures: bool, grid: bool) -> bool:
        stage, plan = self.config.stages[self.stage], self.plans[self.stage]
        if figures and self.heldout.datasets:
            self.monitor.log(self.step, self.heldout.losses(stage, plan.pack_tokens))
        if grid and (picture := self.heldout.grid(stage, plan.pack_tokens // plan.sequence_parallel)):
            self.monitor.image(self.step, "heldout", picture)
        return True

    def close(self) -> None:
        self.loader.close()

    def finished(self) -> None:
        if self.config.cache is not None:
            self.monitor.event(self.step, "cache", hits=self.encoder.cache.hits, misses=self.encoder.cache.misses)

    def train_step(self) -> bool:
        start, config = time.perf_counter(), self.config
        step_packs = self.loader.next(self.step)
        encoded, unread = self._encoded(step_packs)
        keys = [item.key for pack in step_packs.packs for item in pack.items]
        told = self.ranks.gather((keys, step_packs.broken, unread))
        agree([(planned, broken) for planned, broken, _ in told])
        # Ranks of a group run the same packs: what one of them cannot read leaves the packs of all.
        lost = {key: row for *_, rows in told for key, row in rows.items()}
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
        norm = self.norm()
        metrics = self._losses([row for rows, _ in seen for row in rows], samples)
        if self.finite(norm, metrics["loss"], lambda: self._places(step_packs)):
            self.take_step(norm)
            if self.average is not None:
                self.average.update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        report = packing.report(step_packs.packs, self.ranks.replicas)
        metrics |= {
            "lr": config.lr(self.step),
            "grad_norm": norm,
            "utilisation": report.utilisation,
            "imbalance": report.imbalance,
        }
        flops = sum(3 * self.flops(pack.samples) for pack in step_packs.packs) if self.monitor.flops_per_second else 0.0
        self.monitor.step(
            self.step, metrics, tokens=report.tokens, samples=samples, flops=flops, seconds=time.perf_counter() - start
        )
        return True

    def _places(self, step_packs: StepPacks) -> list[str]:
        return [self.loader.dataset.where(item.key[1]) for pack in step_packs.packs for item in pack.items]

    def _encoded(self, step_packs: StepPacks) -> tuple[dict[PackKey, Encoded], dict[PackKey, tuple[str, str]]]:
        """Tensors of this rank's samples, and (place, reason) of those whose images cannot be read."""
        encoded: dict[PackKey, Encoded] = {}
        unread: dict[PackKey, tuple[str, str]] = {}
        for key, prepared in step_packs.prepared.items():
            try:
                encoded[key] = self.encoder.encode(prepared, step_packs.images[key].result())
            except (ValueError, OSError) as error:
                unread[key] = (prepared.row.where, str(error).removeprefix(f"{prepared.row.where}: "))
        return encoded, unread

    def _batches(
        self, step_packs: StepPacks, encoded: dict[PackKey, Encoded], lost: set[PackKey]
    ) -> list[tuple[list[PackKey], FlowBatch]]:
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

    def _report_broken(self, rows: list[tuple[str, str]], uncounted: int) -> None:
        for where, reason in rows:
            self.monitor.event(self.step, "broken row", where=where, reason=reason)
        if uncounted:
            self.loader.count_broken(uncounted, rows)

    # ---- planning ----

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
        layout = self.model.packed.layout([sample])
        dtype = getattr(torch, self.config.dtype)
        image = torch.randn(layout.image_length, config.in_channels, device=device, dtype=dtype)
        text = torch.randn(layout.text_length, config.joint_attention_dim, device=device, dtype=dtype)
        self.wait()
        start = time.perf_counter()
        self.model.packed(image, text, torch.full((1,), 0.5, device=device), layout).square().sum().backward()
        self.wait()
        return time.perf_counter() - start
