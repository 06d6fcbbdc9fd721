"""The frozen base of a LoRA run in fewer bits: its kinds, their sizes, and the libraries that they need.

`--base` chooses the kind. The weights of the Linear layers of all blocks are stored in it; everything else, as norms,
biases and the layers outside of the blocks, keeps the dtype of the computation. This module does without PyTorch.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

from uniref_fast.training.core.recipe import Recipe

__all__ = ["LIBRARIES", "QUANTISED", "Base", "base_bytes", "check_base", "offloaded_blocks"]

Base = Literal["bf16", "int8", "fp8", "nf4"]
LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""Library that quantises the weights, by the kind of the base."""
QUANTISED = tuple(LIBRARIES)
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256  # numbers that share a scale; scales that share an outer scale
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes of the values of 4 and of 8 bits, and of an offset


def base_bytes(base: Base | None, rows: int, columns: int, element: int) -> int:
    """Return the bytes that the weight of one Linear layer takes, scales included.

    Per parameter that is 2 bytes for "bf16", 1 for "int8" and "fp8" with a float32 scale a row (and for "int8" one
    byte more), and 0.516 for "nf4", whose scales of 64 numbers are quantised to 8 bits.

    Args:
        base: Kind of the base; None stands for the dtype of the computation.
        rows: Rows of the weight, its outputs.
        columns: Columns of the weight, its inputs.
        element: Bytes of a number in the dtype of the computation.
    """
    numbers = rows * columns
    if base is None or base == "bf16":
        return numbers * (element if base is None else 2)
    if base == "nf4":
        blocks = ceil(numbers / NF4_BLOCK)
        return ceil(numbers / 2) + blocks + 4 * ceil(blocks / NF4_OUTER_BLOCK) + NF4_TABLES
    return numbers + rows * (5 if base == "int8" else 4)


def offloaded_blocks(layers: int, count: int) -> tuple[int, ...]:
    """Return the numbers of the blocks whose frozen weights are on the host, ascending.

    They lie evenly between the others, whose computation hides the copies.

    Args:
        layers: Number of blocks of the model.
        count: Number of blocks on the host, `offload_blocks`.

    Raises:
        ValueError: The model has fewer blocks.
    """
    if count > layers:
        raise ValueError(f"offload_blocks = {count} is more than the {layers} blocks of the model; give at most that")
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))


def check_base(config: Recipe) -> None:
    """Check that a run has a frozen base where a setting needs one.

    `check_suitability` checks that the library of its kind is installed.

    Args:
        config: Configuration of the run, with the settings of the adapter that it continues.

    Raises:
        ValueError: The run trains all weights.
    """
    if config.offload_blocks and config.lora_rank is None:
        raise ValueError(
            f"offload_blocks = {config.offload_blocks} moves frozen weights, and this run trains all weights; give "
            "--lora-rank to train an adapter on top, or leave --offload-blocks out"
        )
    if config.base is None:
        return
    if config.lora_rank is None:
        raise ValueError(
            f"base = {config.base} is a dtype of frozen weights, and this run trains all weights; give --lora-rank to "
            "train an adapter on top, or leave --base out"
        )
