"""Held-out loss and sample grids: rows, times and noise are always the same, so that only the weights matter."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from uniref_fast.edit import edit
from uniref_fast.guidance import negative_prompt_for
from uniref_fast.keyed_random import draw
from uniref_fast.packing import next_fit
from uniref_fast.request import EditRequest
from uniref_fast.schedule import resolution_shift, shift_time
from uniref_fast.sheets import contact_sheet
from uniref_fast.training.batches.heldout import heldout_datasets
from uniref_fast.training.batches.samples import Encoded, Encoder, Prepared
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.supervised.flow_matching import (
    FlowBatch,
    assemble_batch,
    partial_errors,
)
from uniref_fast.training.supervised.recipes import SFT

__all__ = ["Validation"]


class Validation:
    """Rows that are never trained on.

    Args:
        files: Files of held-out rows; each is reported by its name.
        config: Configuration of the run.
        model: Model of the run.
        encoder: Encoder that drops neither texts nor references.
        ranks: Ranks of the run.

    Raises:
        ValueError: A file cannot be read, has no rows, or has the same name as another one.
    """

    def __init__(self, files: list[Path], config: SFT, model: TrainedModel, encoder: Encoder, ranks: Ranks) -> None:
        self.config, self.model, self.encoder, self.ranks = config, model, encoder, ranks
        self.datasets = heldout_datasets(files, config)
        self._encoded: dict[tuple[str, BudgetStage], list[tuple[Prepared, Encoded | None]]] = {}

    @torch.no_grad()
    def losses(self, stage: BudgetStage, pack_tokens: int) -> dict[str, float]:
        """Return the mean loss of each file, as "eval/<file>". All ranks.

        Sample i of n is taken at the i-th of n quantiles of t, so that few samples cover all times evenly.
        """
        return {f"eval/{name}": self._loss(name, stage, pack_tokens) for name in self.datasets}

    def _loss(self, name: str, stage: BudgetStage, pack_tokens: int) -> float:
        ranks, count = self.ranks, min(self.config.eval_samples, len(self.datasets[name]))
        rows = self._rows(name, stage, count)
        packs = next_fit([prepared.sample.length for prepared, _ in rows], pack_tokens)
        total = 0.0
        for first in range(
            0, len(packs), ranks.replicas
        ):  # all replicas run equally often, since they gather the weights together
            number = first + ranks.replica
            if number < len(packs):
                batch = self._batch(name, stage, packs[number])
                total += float(partial_errors(self.model.packed, batch).sum())
            else:
                self.model.idle_forward()
        return sum(ranks.gather(total)) / count

    def _rows(self, name: str, stage: BudgetStage, count: int) -> list[tuple[Prepared, Encoded | None]]:
        """Return prepared rows, with the tensors of those that this rank has encoded; free rows of other stages."""
        if (name, stage) not in self._encoded:
            self._encoded = {key: rows for key, rows in self._encoded.items() if key[1] == stage}
            dataset = self.datasets[name]
            self._encoded[name, stage] = [
                (self.encoder.prepare(dataset[i], (0, i), stage.budget, stage.target_side), None) for i in range(count)
            ]
        return self._encoded[name, stage]

    def _batch(self, name: str, stage: BudgetStage, numbers: list[int]) -> FlowBatch:
        rows = self._encoded[name, stage]
        for i in numbers:
            prepared, encoded = rows[i]
            if encoded is None:
                rows[i] = (prepared, self.encoder.encode(prepared, prepared.load()))
        chosen = [(prepared, encoded) for prepared, encoded in (rows[i] for i in numbers) if encoded is not None]
        times, noises = [], []
        for i, (_, encoded) in zip(numbers, chosen, strict=True):
            quantile = torch.tensor((i + 0.5) / len(rows), dtype=torch.float64)
            shift = resolution_shift(self.model.pipe.scheduler.config, len(encoded.target))
            t = torch.sigmoid(self.config.t_mean + self.config.t_std * torch.special.ndtri(quantile)).item()
            times.append(shift_time(t, shift))
            noises.append(torch.randn(encoded.target.shape, generator=draw(0, f"held out {name}", (i,))))
        return assemble_batch(self.model, chosen, times, noises)

    def grid(self, stage: BudgetStage, pack_tokens: int) -> Image.Image | None:
        """Draw references, target and result of some rows of each file as a labelled image. All ranks.

        Args:
            stage: Stage that decides the sizes.
            pack_tokens: Largest number of tokens in a pack.

        Returns:
            The image; None if there are no held-out rows.
        """
        requests, pictures = [], []
        for name, dataset in self.datasets.items():
            for i in range(min(self.config.sample_count, len(dataset))):
                prepared = self.encoder.prepare(dataset[i], (0, i), stage.budget, stage.target_side)
                target, references = prepared.load()
                width, height = prepared.geometry.size
                requests.append(
                    EditRequest(
                        prepared.instruction,
                        references,
                        negative_prompt=negative_prompt_for(self.config.sample_true_cfg_scale),
                        true_cfg_scale=self.config.sample_true_cfg_scale,
                        width=width,
                        height=height,
                        num_inference_steps=self.config.sample_num_inference_steps,
                        seed=i,
                    )
                )
                pictures.append((name, prepared.instruction, references, target))
        if not requests:
            return None
        packed = self.model.packed
        parallel, packed.parallel = packed.parallel, None
        try:
            results = edit(
                self.model.pipe,
                requests,
                budget=stage.budget,
                model=packed,
                pack_tokens=pack_tokens,
                progress=False,
            )
        finally:
            packed.parallel = parallel
        rows = []
        for i, ((name, _, references, target), result) in enumerate(zip(pictures, results, strict=True), start=1):
            shown = [(f"picture {j}", image) for j, image in enumerate(references, start=1)]
            rows.append([(f"{i}. made", result), (name, target), *shown])
        texts = "\n".join(f"{i}. {text}" for i, (_, text, *_) in enumerate(pictures, start=1))
        return contact_sheet(rows, caption=texts, cell=160)
