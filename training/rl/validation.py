"""Validation on held-out rows: rewards of rollouts without noise, from the same start every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from uniref_fast.data.dataset import Dataset
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.batches.samples import Encoder, Prepared
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.rl.generator import RolloutGenerator
from uniref_fast.training.rl.metrics import judge_metrics, validation_metrics
from uniref_fast.training.rl.recipes import MSGRPO
from uniref_fast.training.rl.rewards import RewardSet
from uniref_fast.training.rl.sheets import GroupSheet, first_members

__all__ = ["RewardValidation", "ValidationResult"]


@dataclass(frozen=True)
class ValidationResult:
    """Results of one validation.

    Attributes:
        scores: Mean scores, as "eval/<file>", "eval/<file>/<axis>" and "eval/<file>/failures".
        judge: Statistics of the judge, as "eval/judge/...".
        groups: Images of the first `config.sample_count` rows of each file.
    """

    scores: dict[str, float]
    judge: dict[str, float]
    groups: list[GroupSheet]


class RewardValidation:
    """Rewards of rows that are never trained on. All ranks must call its methods.

    Args:
        datasets: Held-out rows of each file, by its name.
        config: Configuration of the run.
        ranks: Ranks of the run.
        encoder: Encoder of the rows.
        generator: Generator of the rollouts.
        rewards: Rewards of the run.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        config: MSGRPO,
        ranks: Ranks,
        encoder: Encoder,
        generator: RolloutGenerator,
        rewards: RewardSet,
    ) -> None:
        self.datasets, self.config, self.ranks, self.encoder = datasets, config, ranks, encoder
        self.generator, self.rewards = generator, rewards

    def validate(self, stage: BudgetStage, plan: MemoryPlan, step: int, count: int) -> ValidationResult | None:
        """Generate and score one rollout for each of the first rows of each file.

        Args:
            stage: Stage whose sizes are used.
            plan: Memory plan of the stage.
            step: Number of the run's step, for the judge's log.
            count: Number of rows of each file.

        Returns:
            None if a signal came meanwhile.

        Raises:
            ValueError: If a row cannot be encoded.
        """
        scores: dict[str, float] = {}
        groups: list[GroupSheet] = []
        for name, dataset in self.datasets.items():
            batch = self.generator.heldout_batch(self._rows(dataset, count, stage), plan)
            for where, reason in batch.unencodable.values():
                raise ValueError(f"{where}: {reason}; mend or leave out this held-out row")
            if not self.generator.generate_and_score(batch, step):
                return None
            results = self.generator.results(batch)
            if results is None:
                return None
            scores |= validation_metrics(name, results, self.rewards.total)
            groups += first_members(batch, results, self.config.sample_count, self.ranks)
        # Taken here, so that these calls are not counted in the next training step.
        judge = judge_metrics(self.ranks.gather(self.rewards.statistics()))
        return ValidationResult(scores, {f"eval/{name}": value for name, value in judge.items()}, groups)

    def _rows(self, dataset: Dataset, count: int, stage: BudgetStage) -> list[tuple[PackKey, Prepared]]:
        return [
            ((0, i), self.encoder.prepare(dataset[i], (0, i), stage.budget, stage.target_side, rollout=True))
            for i in range(min(count, len(dataset)))
        ]
