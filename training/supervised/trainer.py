"""The trainer of supervised fine-tuning: the step, the validation, and the measured cost of samples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from uniref_fast.data.dataset import Dataset, left_out
from uniref_fast.keyed_random import draw
from uniref_fast.layout import Sample
from uniref_fast.request import image_areas
from uniref_fast.training.batches import packing
from uniref_fast.training.batches.encoding import RowForms, heldout_rows
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.loader import PackLoader, StepPacks
from uniref_fast.training.batches.packing import CostModel, PackKey
from uniref_fast.training.batches.rows import check_same_rows
from uniref_fast.training.batches.samples import Encoded, Encoder
from uniref_fast.training.batches.upcoming import encode_ahead, pack_token_bounds, upcoming_rows
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.memory import RECOMPUTATION
from uniref_fast.training.core.monitor import GroupedMean
from uniref_fast.training.core.trainer import Trainer, kept_packs
from uniref_fast.training.supervised.flow_matching import FlowBatch, assemble_batch, partial_errors, sample_t
from uniref_fast.training.supervised.recipes import SFT
from uniref_fast.training.supervised.validation import DeclineDetector, HeldoutSample, Validation

__all__ = ["SFTTrainer"]


class SFTTrainer(Trainer):
    """A trainer on rows with targets (supervised fine-tuning).

    Arguments and errors are those of `Trainer`; also raises ValueError for data that the checkpoint was not trained on.
    """

    config: SFT

    def __init__(self, config: SFT, ranks: Ranks, out: Path, resume: int | None = None) -> None:
        super().__init__(config, ranks, out, resume)
        costs = self.saved["costs"] if self.saved else self._costs().as_dict()
        self.costs = CostModel(**costs)
        loader_state = self.saved["feeder"] if self.saved else None
        self.loader = PackLoader(self.dataset, self.encoder, config, self.plans, self.costs, self._assign, loader_state)
        self.detector = DeclineDetector(config, self.heldout.settings, self.saved.get("validation"))

    def open_rows(self, step: int, state: Mapping[str, Any]) -> None:
        config, model, cache = self.config, self.model, TensorCache(self.cache_folder)
        with self.progress.of("reading the rows"):
            self.dataset = Dataset(config.data, config.image_folder, columns=config.columns)
        drops = config.drop_text, config.drop_references
        guided: dict[str, Any] = {"encoders": model.encoders, "guidance": config.embedded_guidance}
        self.encoder = Encoder(model.pipe, cache, config.seed, *drops, **guided)
        plain = Encoder(model.pipe, cache, **guided)
        self.heldout = Validation([Path(path) for path in config.heldout], config, model, plain, self.ranks)
        if config.resolve_encoders() == "free":
            report = encode_ahead(self.encoder, self.ranks, config, self._rows_to_encode(step, state))
            self.announce("encoded", rows=report.rows, now=report.encoded, broken=len(report.broken))

    def _rows_to_encode(self, step: int, state: Mapping[str, Any]) -> list[RowForms]:
        """Return all rows that the run uses from a step on, held-out rows included."""
        config, pipe = self.config, self.model.pipe
        kept, patch, area = kept_packs(state), self.model.family.token_side(pipe), image_areas(pipe)[1]
        costs = (
            CostModel(**state["costs"]) if state else CostModel.from_config(pipe.transformer.config, self.model.family)
        )
        rows = upcoming_rows(
            self.dataset, self.encoder, config, step,
            [pack_token_bounds(stage, kept, patch, area) for stage in config.stages], costs, state.get("feeder"),
            exact=bool(state) or config.cost == "flops", shown=self.ranks.rank == 0,
        )  # fmt: skip
        guided = config.sample_count
        return rows + heldout_rows(self.heldout.datasets, config, target=True, guided=guided)

    def begin(self) -> None:
        for name, reason in left_out([self.loader.dataset, *self.heldout.datasets.values()]):
            self.monitor.event(self.step, "left out", where=name, reason=reason)

    def state(self) -> dict[str, Any]:
        return {"feeder": self.loader.state(), "costs": self.costs.as_dict(), "validation": self.detector.state()}

    def validate(self, figures: bool, grid: bool) -> bool:
        plan = self.plans[self.stage]
        samples = self.heldout.samples(plan.pack_tokens // plan.sequence_parallel)
        if figures and self.heldout.datasets:
            self._log_validation(self.heldout.losses(plan.pack_tokens), samples)
        if grid and samples:
            self.monitor.image(self.step, "heldout", self.heldout.grid(samples))
        return True

    def _log_validation(self, losses: dict[str, float], samples: list[HeldoutSample]) -> None:
        """Log held-out losses and the PSNR of samples with their settings, and warn if the samples have got worse."""
        psnrs = GroupedMean("psnr")
        for sample in samples:
            psnrs.add(sample.file, sample.psnr)
        means, settings = psnrs.reduce(), self.heldout.settings
        numbers = {f"sampling/{name}": value for name, value in settings.items() if samples and value is not None}
        shown = [f"eval/{name} {loss:.4g}" for name, loss in losses.items()]
        shown += [f"{name} {value:.2f} dB" for name, value in means.items()]
        text = ", ".join(shown) + (f" ({self.heldout.settings_text(samples)})" if samples else "")
        self.monitor.log(self.step, {**{f"eval/{n}": loss for n, loss in losses.items()}, **means, **numbers}, text)
        for message in self.detector.add(self.step, losses, samples):
            self.monitor.event(self.step, "samples get worse", message, message=message)

    def close(self) -> None:
        self.loader.close()

    def finished(self) -> None:
        if self.cache_folder is not None:
            self.monitor.event(self.step, "cache", hits=self.encoder.cache.hits, misses=self.encoder.cache.misses)

    def train_step(self) -> bool:
        start = time.perf_counter()
        # Every rank plans the same packs from the same rows, and knows from them which packs are its own.
        name = f"step {self.step + 1}"
        self.progress.phase(f"{name}: reading rows and planning packs")
        step_packs = self.loader.next(self.step)
        # A rank may fail to read an image that others can read. What failed is exchanged before anything is computed:
        # the samples that remain decide both the packs and what the loss is divided by.
        self.progress.phase(f"{name}: encoding", len(step_packs.prepared), "row")
        encoded, unread = self._encode(step_packs)
        lost = self._exchange_unread(step_packs, unread)
        samples = sum(item.key not in lost for pack in step_packs.packs for item in pack.items)

        # Gradients are summed over packs and ranks. Dividing each pack's loss by the samples of the whole step, instead
        # of averaging over packs, gives each sample the same weight however the samples are packed.
        errors: list[tuple[PackKey, float]] = []
        self.progress.phase(f"{name}: forward and backward", len(step_packs.mine), "pack")
        for keys, batch in self._batches(step_packs, encoded, lost):
            errors += self._backward(keys, batch, samples)
            self.progress.update()

        # A signal reaches ranks at different moments. It is exchanged once a step, with the errors, so that all ranks
        # stop after the same step.
        labels = {key: (len(row.sample.references), row.task) for key, row in step_packs.prepared.items()}
        gathered = self.ranks.gather(([(key, *labels[key], error) for key, error in errors], self.signalled))
        self.stopping = any(signalled for _, signalled in gathered)

        # All ranks see the same norm and loss, so all of them take the step or all skip it. The average follows the
        # weights only where they have moved.
        norm = self.norm()
        metrics = self._losses([row for rows, _ in gathered for row in rows], samples)
        if self.finite(norm, metrics["loss"], lambda: self._places(step_packs)):
            self.take_step(norm)
            if self.average is not None:
                self.average.update(self.step)
        self.optimizer.zero_grad()
        self._log_step(step_packs, {**metrics, "lr": self.config.lr(self.step), "grad_norm": norm}, samples, start)
        return True

    def _encode(self, step_packs: StepPacks) -> tuple[dict[PackKey, Encoded], dict[PackKey, tuple[str, str]]]:
        """Encode this rank's samples.

        Returns:
            Tensors of each sample, and (place, reason) of each sample whose images cannot be read.
        """
        encoded: dict[PackKey, Encoded] = {}
        unread: dict[PackKey, tuple[str, str]] = {}
        for key, prepared in step_packs.prepared.items():
            try:
                encoded[key] = self.encoder.encode(prepared, step_packs.images[key].result())
            except (ValueError, OSError) as error:
                unread[key] = (prepared.row.where, str(error).removeprefix(f"{prepared.row.where}: "))
            self.progress.update()
        return encoded, unread

    def _exchange_unread(self, step_packs: StepPacks, unread: dict[PackKey, tuple[str, str]]) -> set[PackKey]:
        """Return the samples that any rank could not read; they leave the packs of all ranks. Record broken rows.

        Raises:
            BrokenRowsError: The ranks planned different rows, or more rows are broken than the run allows.
        """
        keys = [item.key for pack in step_packs.packs for item in pack.items]
        gathered = self.ranks.gather((keys, step_packs.broken, unread))
        check_same_rows([(planned, broken) for planned, broken, _ in gathered])
        lost = {key: row for *_, rows in gathered for key, row in rows.items()}
        rows = step_packs.broken + list(lost.values())
        for where, reason in rows:
            self.monitor.event(self.step, "broken row", where=where, reason=reason)
        if lost:
            self.loader.rows.count_broken(rows, new=len(lost))
        return set(lost)

    def _batches(
        self, step_packs: StepPacks, encoded: dict[PackKey, Encoded], lost: set[PackKey]
    ) -> Iterator[tuple[list[PackKey], FlowBatch | None]]:
        """Yield the keys and the batch of each of this rank's packs, without lost samples; None for an empty pack."""
        config, model = self.config, self.model
        for number in step_packs.mine:
            keys = [item.key for item in step_packs.packs[number].items if item.key not in lost]
            times, noises = [], []
            for key in keys:
                shape = encoded[key].target.shape  # [n, C]
                shift = model.family.training_shift(model.pipe, len(encoded[key].target))
                times.append(sample_t(draw(config.seed, "t", key), config.t_mean, config.t_std, shift))
                noises.append(torch.randn(shape, generator=draw(config.seed, "noise", key)))
            samples = [(step_packs.prepared[key], encoded[key]) for key in keys]
            outside = config.mask_weight_outside
            yield keys, assemble_batch(model, samples, times, noises, outside) if keys else None

    def _backward(self, keys: list[PackKey], batch: FlowBatch | None, samples: int) -> list[tuple[PackKey, float]]:
        """Add the gradient of a pack; return this rank's part of each sample's error."""
        if batch is None:
            # The other ranks run a pack now, and need this one to gather the weights and to reduce the gradients.
            (self.model.idle_forward().sum() * 0.0).backward()
            return []
        errors = partial_errors(self.model.packed, batch)  # [S]
        (errors.sum() * (1 / samples)).backward()
        return list(zip(keys, errors.detach().tolist(), strict=True))

    def _losses(self, rows: list[tuple[PackKey, int, str, float]], samples: int) -> dict[str, float]:
        """Return the mean loss of all samples, and the means by number of references and by task.

        Args:
            rows: (key, number of references, task, error) of every rank; ranks that share a pack each have a part of
                the error, and the parts of a sample are added up.
            samples: Number of samples of the step.
        """
        by_k, by_task = GroupedMean("loss_by_k"), GroupedMean("loss_by_task")
        whole: dict[PackKey, tuple[int, str, float]] = {}
        for key, k, task, error in rows:
            whole[key] = (k, task, whole[key][2] + error if key in whole else error)
        for k, task, error in whole.values():
            by_k.add(k, error)
            by_task.add(task, error)
        total = math.fsum(error for *_, error in whole.values()) if samples else math.nan
        return {"loss": total / max(samples, 1), **by_k.reduce(), **by_task.reduce()}

    def _log_step(self, step_packs: StepPacks, metrics: dict[str, float], samples: int, start: float) -> None:
        report = packing.report(step_packs.packs, self.ranks.replicas)
        # The backward costs about twice the forward.
        flops = sum(3 * self.flops(pack.samples) for pack in step_packs.packs) if self.monitor.flops_per_second else 0.0
        self.monitor.step(
            self.step,
            {**metrics, "utilisation": report.utilisation, "imbalance": report.imbalance},
            tokens=report.tokens,
            samples=samples,
            flops=flops,
            seconds=time.perf_counter() - start,
        )

    def _places(self, step_packs: StepPacks) -> list[str]:
        return [self.loader.dataset.where(item.key[1]) for pack in step_packs.packs for item in pack.items]

    # ---- planning ----

    def _assign(self, packs: list[packing.Pack], stage: int) -> list[int]:
        sequence = self.plans[stage].sequence_parallel
        return packing.assign(packs, self.ranks.size // sequence)[self.ranks.rank // sequence]

    def _costs(self) -> CostModel:
        """Return the costs of samples: operations, or seconds of forward and backward on this machine. All ranks."""
        config = self.model.pipe.transformer.config
        if self.config.cost == "flops":
            return CostModel.from_config(config, self.model.family)
        # Times are measured up to the tokens that a rank has of a pack in the stage with the smallest packs, which fit
        # the memory of every stage, and with recomputation if any stage needs it.
        most = min(plan.pack_tokens // plan.sequence_parallel for plan in self.plans)
        levels = list(RECOMPUTATION)
        self.model.packed.checkpointing = max((plan.checkpointing for plan in self.plans), key=levels.index)
        self.ranks.share_sequences(self.model.packed, 1)
        samples, seconds = [], []
        with self.progress.of("measuring the cost of packs"):
            for tokens in (most // 8, most // 4, most // 2, most):
                guidance = self.model.family.training_guidance(config)
                sample = Sample(16, (1, 1, max(tokens - 16, 1)), guidance=guidance)
                samples.append(sample)
                seconds.append(min(self._timed(sample) for _ in range(3)))
        self.optimizer.zero_grad()
        return CostModel.fit(samples, self.ranks.broadcast(seconds))

    def _timed(self, sample: Sample) -> float:
        config, device = self.model.pipe.transformer.config, self.ranks.device
        layout = self.model.packed.layout([sample])
        dtype = getattr(torch, self.config.dtype)
        image = torch.randn(layout.image_length, config.in_channels, device=device, dtype=dtype)
        text = torch.randn(layout.text_length, self.model.family.text_channels(config), device=device, dtype=dtype)
        self.wait()
        start = time.perf_counter()
        self.model.packed(image, text, torch.full((1,), 0.5, device=device), layout).square().sum().backward()
        self.wait()
        return time.perf_counter() - start
