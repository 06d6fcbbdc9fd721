"""Datasets of held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from uniref_fast.data.dataset import Dataset
from uniref_fast.training.core.recipe import Recipe

__all__ = ["heldout_datasets"]


def heldout_datasets(
    files: Iterable[Path], config: Recipe, targets: Literal["required", "optional"] = "required"
) -> dict[str, Dataset]:
    """Files of held-out rows by name.

    Raises:
        ValueError: for those that have the same name, no rows, or a broken one among those that are looked at.
    """
    found: dict[str, Dataset] = {}
    for path in files:
        if path.stem in found:
            raise ValueError(f"two files of held-out rows are called {path.stem}, one is {path}; rename one")
        found[path.stem] = dataset = Dataset(path, config.image_folder, targets, config.columns)
        if not len(dataset):
            raise ValueError(f"{path} has no held-out rows; leave it out")
        looked_at = max(
            config.eval_samples if config.eval_every else 0, config.sample_count if config.sample_every else 0
        )
        for i in range(min(looked_at, len(dataset))):
            row = dataset[i]
            for picture in (*row.references, *([row.target] if row.target else ())):
                try:
                    picture.load()
                except (ValueError, OSError) as error:  # now, not in the middle of the run
                    raise ValueError(f"{row.where}: {error}; mend or leave out this held-out row") from error
    return found
