"""Numbers of tokens of the rows of a run, from the headers of images, without the model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from uniref_fast.data.dataset import Dataset
from uniref_fast.training.core.launch import BUILTIN_ROWS, builtin_rows
from uniref_fast.training.core.model_size import ModelSize
from uniref_fast.training.core.recipe import BudgetStage, Recipe

__all__ = ["RowTokens", "row_tokens"]

MOST = 1000  # rows whose images are opened; of more rows, evenly spread ones stand for all
GENERATED = 50  # generated rows that stand for the built-in data
Sizes = tuple[tuple[int, int] | None, list[tuple[int, int]], str]  # target, references, instruction


@dataclass(frozen=True)
class RowTokens:
    """Numbers of tokens of rows; the words of instructions are counted roughly.

    Attributes:
        rows: Number of rows of an epoch.
        broken: Number of rows, among those that were read, that cannot be used.
        lengths: Tokens of each row that was read, in order, for each stage.
        references: Number of references of each of these rows.
        cache_bytes: Size of the cache of latents and embeddings of all rows, in bytes.
    """

    rows: int
    broken: int
    lengths: tuple[tuple[int, ...], ...]
    references: tuple[int, ...]
    cache_bytes: int


def row_tokens(config: Recipe, size: ModelSize, target: bool, element: int) -> RowTokens | None:
    """Return the numbers of tokens of the rows of `config.data`; None without data.

    Args:
        config: Configuration of the run.
        size: Sizes of the model.
        target: Rows need a target, as in supervised fine-tuning.
        element: Bytes per number of the cache.

    Raises:
        ValueError: The data cannot be read, or no row can be used.
    """
    if not config.data:
        return None
    paths = [path for path in config.data if path != "builtin"]
    dataset = (
        Dataset(paths, config.image_folder, "required" if target else "optional", config.columns) if paths else None
    )
    generated = BUILTIN_ROWS["train"] * config.data.count("builtin")
    read: list[Sizes] = list(_generated(config.seed)) if generated else []
    broken, first = 0, ""
    step = -(-len(dataset) // MOST) if dataset else 1
    for index in range(0, len(dataset) if dataset else 0, step):
        assert dataset is not None
        try:
            row = dataset[index]
            own, references = row.sizes()
            if target and own is None:
                raise ValueError("no target image to train on")
            read.append((own, references, row.instruction))
        except (ValueError, OSError) as error:
            broken, first = broken + 1, first or str(error)
    if not read:
        raise ValueError(f"no row of the data can be used: {first}; `uniref-fast data check` lists the problems")
    rows = generated + (len(dataset) if dataset else 0)
    if config.weights and dataset and not generated:
        rows = max(round(sum(w * n for w, n in zip(config.weights, dataset.path_lengths, strict=True))), 1)
    stages = [[_tokens(stage, size, row) for row in read] for stage in config.stages]
    latents = {(i, *found[:2]) for stage in stages for i, found in enumerate(stage)}
    cached = sum(target + references for _, target, references in latents) * size.in_channels
    cached += sum(text for _, _, text in stages[0]) * size.text_channels
    lengths = tuple(tuple(sum(found) for found in stage) for stage in stages)
    counts = tuple(len(references) for _, references, _ in read)
    return RowTokens(rows, broken, lengths, counts, round(cached * element * rows / len(read)))


def _tokens(stage: BudgetStage, size: ModelSize, row: Sizes) -> tuple[int, int, int]:
    """Return the tokens of the target, of the references and of the text of a row in a stage."""
    from uniref_fast.request import target_size

    own, references, instruction = row

    def count(pixels: tuple[int, int]) -> int:
        return (pixels[0] // size.token_side) * (pixels[1] // size.token_side)

    target = count(target_size(own, references, stage.target_side))
    scaled = size.reference_sizes(references, stage.budget)
    return target, sum(map(count, scaled)), size.text_tokens(instruction, len(references))


def _generated(seed: int) -> Iterator[Sizes]:
    """Yield the sizes of some rows of the built-in data, which a run generates when it starts."""
    from uniref_fast.scenes.make import sample

    made = builtin_rows(seed)
    for index in range(GENERATED):
        row = sample("train", index, made)
        yield row.target.size, [image.size for image in row.references], row.instruction
