"""Kinds of adapters that are trained: their configuration for peft, their sizes, and what each of them needs.

`--adapter` chooses the kind. For a layer with the weight W, `[out, in]`:

    lora     W + (alpha / rank) B A, where A is `[rank, in]` and B is `[out, rank]`
    rslora   W + (alpha / sqrt(rank)) B A                                              https://arxiv.org/abs/2312.03732
    dora     the rows of W + (alpha / rank) B A, scaled to norms that are trained      https://arxiv.org/abs/2402.09353
    lokr     W + (alpha / rank) kron(W1, W2), where W2 is a product of two matrices if
             the rank is less than half of its longer side                             https://arxiv.org/abs/2309.14859

This module does without PyTorch; peft is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniref_fast.training.core.recipe import Recipe

__all__ = ["NAMES", "add_adapter", "check_adapter", "is_adapter", "layer_parameters", "peft_alpha"]

NAMES: Mapping[str, str] = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "lokr": "LoKr"}


def add_adapter(transformer: Any, rank: int, alpha: float, targets: Sequence[str], kind: str = "lora") -> None:
    """Add a new adapter, which changes nothing before it is trained, to a transformer.

    A name may be that of Linear layers in some blocks and of a list of layers in others, as `to_out` of FLUX.2: only
    the Linear layers get an adapter.

    Args:
        transformer: Transformer of diffusers.
        rank: Rank of the adapter.
        alpha: Alpha of the adapter.
        targets: Names of the Linear layers that get an adapter.
        kind: Kind of the adapter.

    Raises:
        ValueError: No layer has one of the names.
    """
    from peft import LoKrConfig, LoraConfig

    config: Any
    names = _of_linears(transformer, targets)
    if kind == "lokr":
        config = LoKrConfig(r=rank, alpha=alpha, target_modules=names)  # type: ignore[arg-type]
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float works too
            init_lora_weights="gaussian",
            target_modules=names,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
        )
    try:
        transformer.add_adapter(config)
    except ValueError as error:
        raise ValueError(f"lora_targets {list(targets)}: {error}") from error


def _of_linears(transformer: Any, targets: Sequence[str]) -> list[str]:
    """Return targets with those that also name lists of layers replaced by the whole names of their Linear layers.

    A target that names no Linear layer is left to peft, which refuses it.
    """
    from torch import nn

    found: list[str] = []
    for target in targets:
        named = {name: x for name, x in transformer.named_modules() if f".{name}".endswith(f".{target}")}
        linears = [name for name, module in named.items() if isinstance(module, nn.Linear)]
        mixed = any(isinstance(module, nn.ModuleList) for module in named.values())
        found += linears if mixed and linears else [target]
    return found


def is_adapter(name: str) -> bool:
    """Return True for the name of a parameter of an adapter."""
    return "lora_" in name or "lokr_" in name


def peft_alpha(config: Any) -> float:
    """Return the alpha of a configuration of peft, whose name differs between the kinds."""
    return config.lora_alpha if hasattr(config, "lora_alpha") else config.alpha


def layer_parameters(kind: str, rank: int, rows: int, columns: int) -> int:
    """Return the number of parameters that an adapter has for a layer with a weight of `[rows, columns]`."""
    if kind != "lokr":
        return rank * (rows + columns) + (rows if kind == "dora" else 0)
    from peft.tuners.lokr.layer import factorization

    (first_rows, second_rows), (first_columns, second_columns) = factorization(rows), factorization(columns)
    whole = rank >= max(second_rows, second_columns) / 2
    second = second_rows * second_columns if whole else rank * (second_rows + second_columns)
    return first_rows * first_columns + second


def check_adapter(config: Recipe) -> None:
    """Check that a run trains an adapter where a setting needs one, and that its base suits the kind.

    Args:
        config: Configuration of the run, with the settings of the adapter that it continues.

    Raises:
        ValueError: The run trains all weights, or the base is quantised.
    """
    kind = config.adapter
    if kind != "lora" and config.lora_rank is None:
        raise ValueError(f"adapter = {kind} is a kind of adapter, and this run trains all weights; give --lora-rank")
    if kind in ("dora", "lokr") and config.base not in (None, "bf16"):
        why = (
            "the norms of the rows of every weight, which would be read from the rounded weights in each step"
            if kind == "dora"
            else "the shapes of the weights, which a packed weight does not have"
        )
        raise ValueError(
            f"adapter = {kind} needs {why}; base = {config.base} is for lora and rslora, so leave one of them out"
        )
