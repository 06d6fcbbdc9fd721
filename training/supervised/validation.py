"""Held-out losses and samples: rows, sizes, times and noise are always the same, so that only the weights matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from uniref_fast.data.dataset import Dataset
from uniref_fast.evaluation.aggregate import statistic
from uniref_fast.evaluation.metrics import psnr
from uniref_fast.evaluation.report import sampling_text
from uniref_fast.evaluation.requests import EvalRequest, eval_request
from uniref_fast.keyed_random import draw
from uniref_fast.packing import next_fit
from uniref_fast.request import EditRequest
from uniref_fast.schedule import shift_time
from uniref_fast.training.batches.heldout import heldout_count, heldout_datasets
from uniref_fast.training.batches.samples import Encoded, Encoder, Form, Prepared
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.sampling import embedded, generate, sample_grid, sampling_settings
from uniref_fast.training.supervised.flow_matching import (
    FlowBatch,
    assemble_batch,
    partial_errors,
)
from uniref_fast.training.supervised.recipes import SFT

__all__ = ["DeclineDetector", "HeldoutSample", "Validation"]

NOISE = 2.0  # standard errors of the mean difference that chance may explain
NOTICEABLE = 0.25  # dB: smaller differences are not reported, however certain they are


@dataclass(frozen=True)
class HeldoutSample:
    """A result of the model for a held-out row.

    Attributes:
        file: Name of the file of the row.
        request: The row with its target at the size of the result, and the request.
        image: The result.
        psnr: PSNR of the result against the target, in dB.
    """

    file: str
    request: EvalRequest
    image: Image.Image
    psnr: float


class Validation:
    """Rows that are never trained on, with the sizes of the last stage of the run at every step.

    Args:
        files: Files of held-out rows; each is reported by its name.
        config: Configuration of the run.
        model: Model of the run.
        encoder: Encoder that drops neither texts nor references.
        ranks: Ranks of the run.

    Attributes:
        settings: Settings that the samples are generated with.

    Raises:
        ValueError: A file cannot be read, has no rows, or has the same name as another one.
    """

    def __init__(self, files: list[Path], config: SFT, model: TrainedModel, encoder: Encoder, ranks: Ranks) -> None:
        self.config, self.model, self.encoder, self.ranks = config, model, encoder, ranks
        self.datasets = heldout_datasets(files, config)
        self.stage = config.validation_stage
        self.settings = sampling_settings(config, model.pipe)
        self._encoded: dict[str, list[tuple[Prepared, Encoded | None]]] = {}
        for dataset in self.datasets.values():
            for i in range(min(heldout_count(config), len(dataset))):
                try:  # report it now, not at the first validation
                    self._prepared(dataset, i)
                except ValueError as error:
                    raise ValueError(f"{error}; repair or remove this held-out row") from error

    @torch.no_grad()
    def losses(self, pack_tokens: int) -> dict[str, float]:
        """Return the mean loss of each file, by its name. All ranks.

        Sample i of n is taken at the i-th of n quantiles of t, so that few samples cover all times evenly.

        Args:
            pack_tokens: Largest number of tokens in a pack; a larger sample has a pack of its own.
        """
        return {name: self._loss(name, pack_tokens) for name in self.datasets}

    def _loss(self, name: str, pack_tokens: int) -> float:
        ranks, count = self.ranks, min(self.config.eval_samples, len(self.datasets[name]))
        rows = self._rows(name, count)
        packs = next_fit([prepared.sample.length for prepared, _ in rows], pack_tokens)
        total = 0.0
        for first in range(
            0, len(packs), ranks.replicas
        ):  # all replicas run equally often, since they gather the weights together
            number = first + ranks.replica
            if number < len(packs):
                batch = self._batch(name, packs[number])
                total += float(partial_errors(self.model.packed, batch).sum())
            else:
                self.model.idle_forward()
        return sum(ranks.gather(total)) / count

    def _rows(self, name: str, count: int) -> list[tuple[Prepared, Encoded | None]]:
        """Return prepared rows, with the tensors of those that this rank has encoded."""
        if name not in self._encoded:
            self._encoded[name] = [(self._prepared(self.datasets[name], i), None) for i in range(count)]
        return self._encoded[name]

    def _prepared(self, dataset: Dataset, i: int) -> Prepared:
        return self.encoder.prepare(dataset[i], (0, i), self.stage.budget, self.stage.target_side)

    def _batch(self, name: str, numbers: list[int]) -> FlowBatch:
        rows = self._encoded[name]
        for i in numbers:
            prepared, encoded = rows[i]
            if encoded is None:
                rows[i] = (prepared, self.encoder.encode(prepared, prepared.load()))
        chosen = [(prepared, encoded) for prepared, encoded in (rows[i] for i in numbers) if encoded is not None]
        times, noises = [], []
        for i, (_, encoded) in zip(numbers, chosen, strict=True):
            quantile = torch.tensor((i + 0.5) / len(rows), dtype=torch.float64)
            shift = self.model.family.training_shift(self.model.pipe, len(encoded.target))
            t = torch.sigmoid(self.config.t_mean + self.config.t_std * torch.special.ndtri(quantile)).item()
            times.append(shift_time(t, shift))
            noises.append(torch.randn(encoded.target.shape, generator=draw(0, f"held out {name}", (i,))))
        return assemble_batch(self.model, chosen, times, noises, self.config.mask_weight_outside)

    def samples(self, pack_tokens: int) -> list[HeldoutSample]:
        """Generate the results of the first `sample_count` rows of each file. All ranks.

        The requests are those of `uniref-fast eval` for the same rows, so that the PSNRs are equal too.

        Args:
            pack_tokens: Largest number of tokens in a pack; a larger sample has a pack of its own.
        """
        asked: list[tuple[str, EvalRequest]] = []
        for name, dataset in self.datasets.items():
            for i in range(min(self.config.sample_count, len(dataset))):
                asked.append((name, eval_request(self.model.pipe, dataset[i], (name, i), seed=0, **self.settings)))
        if not asked:
            return []
        freed = self.model.encoders.freed
        requests = [self._embedded(one) if freed else one.request for _, one in asked]
        images = generate(self.model, requests, self.stage.budget, pack_tokens)
        found = []
        for (name, one), image in zip(asked, images, strict=True):
            assert one.target is not None  # `heldout_datasets` refuses rows without a target
            found.append(HeldoutSample(name, one, image, psnr(image, one.target)))
        return found

    def _embedded(self, one: EvalRequest) -> EditRequest:
        """Return a request with the embeddings of its texts, which do not need the text encoder."""
        prepared = self.encoder.prepare_form(one.row, Form(self.stage.budget, self.stage.target_side), rollout=True)
        images = list(one.request.images)
        return embedded(
            self.model.pipe,
            one.request,
            self.stage.budget,
            lambda text, _: self.encoder.encode_text(prepared, images, text),
        )

    def settings_text(self, samples: Sequence[HeldoutSample]) -> str:
        """Return the settings that samples were generated with, in words."""
        return sampling_text(self.settings, [sample.image.size for sample in samples])

    def grid(self, samples: Sequence[HeldoutSample]) -> Image.Image:
        """Draw result, target and references of each sample as a labelled image, with the settings above them."""
        return sample_grid(
            self.settings, [(f"result {one.psnr:.1f} dB", one.file, one.request, one.image) for one in samples]
        )


class DeclineDetector:
    """Detection of samples that get worse while the held-out loss falls, compared with the first validation of a run.

    Args:
        config: Configuration of the run, for the advice.
        settings: Settings of the samples; a comparison with samples of other settings begins again.
        state: Result of `state` from a checkpoint; None begins a comparison.
    """

    def __init__(self, config: SFT, settings: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> None:
        self.config, self.settings = config, dict(settings)
        same = state is not None and state["settings"] == self.settings
        self._first: dict[str, dict[str, Any]] = dict(state["first"]) if state is not None and same else {}
        self._declined: set[str] = set()  # files that were reported, and have not recovered

    def state(self) -> dict[str, Any]:
        """Return the first validation of each file, for JSON."""
        return {"settings": self.settings, "first": self._first}

    def add(self, step: int, losses: Mapping[str, float], samples: Sequence[HeldoutSample]) -> list[str]:
        """Add a validation, and return a warning for each file whose samples have begun to be worse than the first.

        Samples are worse if their mean PSNR is lower than that of the same rows in the first validation, by more than
        `NOISE` standard errors of the mean difference and by at least `NOTICEABLE`.

        Args:
            step: Number of steps done.
            losses: Held-out loss of each file.
            samples: Samples of this validation.
        """
        warnings = []
        for name, loss in losses.items():
            now = [sample.psnr for sample in samples if sample.file == name]
            first = self._first.get(name)
            if first is None or len(first["psnr"]) != len(now):
                self._first[name] = {"step": step, "loss": loss, "psnr": now}
                continue
            change = statistic([b - a for a, b in zip(first["psnr"], now, strict=True)])
            worse = change["sem"] is not None and -change["mean"] > max(NOISE * change["sem"], NOTICEABLE)
            declined = worse and loss < first["loss"]
            if declined and name not in self._declined:
                warnings.append(
                    f"{name}: since step {first['step']} the held-out loss has fallen from {first['loss']:.3g} to "
                    f"{loss:.3g}, but the samples have lost {-change['mean']:.1f} ±{change['sem']:.1f} dB of PSNR; "
                    f"{self._advice()}"
                )
            (self._declined.add if declined else self._declined.discard)(name)
        return warnings

    def _advice(self) -> str:
        rank, alpha = self.config.lora_rank, self.config.resolve_alpha()
        scale = f", lora_alpha = {rank} in place of {alpha:g}," if rank and alpha and alpha > rank else ""
        return f"start another run with a lower lr{scale} or fewer steps, or export an earlier checkpoint"
