"""Datasets of held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from uniref_fast.data.dataset import Dataset
from uniref_fast.training.core.recipe import Recipe

__all__ = ["heldout_count", "heldout_datasets"]


def heldout_count(config: Recipe) -> int:
    """Return the largest number of held-out rows of each file that the validations of a run use.

    Samples are generated at each validation, also where `sample_every` is 0 and no grids are drawn.
    """
    if not config.eval_every and not config.sample_every:
        return 0
    return max(config.eval_samples if config.eval_every else 0, config.sample_count)


def heldout_datasets(
    files: Iterable[Path], config: Recipe, targets: Literal["required", "optional"] = "required"
) -> dict[str, Dataset]:
    """Open files of held-out rows, and read the images of all rows that a validation uses.

    Args:
        files: Files of rows.
        config: Configuration of the run.
        targets: "optional" also takes rows without a target.

    Returns:
        Datasets by the name of their file.

    Raises:
        ValueError: Two files have the same name, a file has no rows, or a row that a validation uses is broken.
    """
    found: dict[str, Dataset] = {}
    for path in files:
        if path.stem in found:
            raise ValueError(f"two files of held-out rows are called {path.stem}, one is {path}; rename one")
        found[path.stem] = dataset = Dataset(path, config.image_folder, targets, config.columns)
        if not len(dataset):
            raise ValueError(f"{path} has no held-out rows; leave it out")
        for i in range(min(heldout_count(config), len(dataset))):
            row = dataset[i]
            try:  # report it now, not in the middle of the run
                for picture in (*row.references, *([row.target] if row.target else ())):
                    picture.load()
                if targets == "required":
                    row.load_mask()
            except (ValueError, OSError) as error:
                raise ValueError(f"{row.where}: {error}; repair or remove this held-out row") from error
    return found
