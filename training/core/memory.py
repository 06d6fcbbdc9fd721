"""The memory plan of a stage: tokens of a pack, ranks that share a pack, and whether blocks are recomputed.

A rank holds its share of weights, gradients and optimizer state, and the activations that the backward keeps for its
part of a pack. Activations are counted in widths (heads x head dimension) per token; a test compares the count with
what autograd holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uniref_fast.gpu_memory import USABLE
from uniref_fast.training.core.recipe import BudgetStage

if TYPE_CHECKING:  # the command `plan` starts without torch
    import torch

__all__ = ["MemoryPlan", "activation_bytes", "check_packs", "device_memory", "machine_memory", "plan_memory"]

KEPT = 22  # widths per token that a block keeps: see `activation_bytes`
KEPT_RECOMPUTED = 2
REFERENCES = 3  # of the largest sample without a joint budget: the models were trained with up to three
TEXT_TOKENS = 1536  # room in the largest sample for the prompt and six pictures of about 190 tokens


@dataclass(frozen=True)
class MemoryPlan:
    """The packs and the recomputation of a stage.

    Attributes:
        pack_tokens: Largest number of tokens in a pack.
        sequence_parallel: Number of ranks that share a pack.
        checkpointing: Recompute blocks in the backward.
        bytes_needed: Estimated memory of a rank, in bytes.
        reason: Explanation of the choice.
    """

    pack_tokens: int
    sequence_parallel: int
    checkpointing: bool
    bytes_needed: int
    reason: str


def activation_bytes(config: Any, tokens: int, checkpointing: bool, element: int) -> int:
    """Return the bytes that the backward of one pack keeps, on a rank that holds `tokens` of its tokens.

    A block keeps, in widths per token: its input and the normed input (2), q, k, v before norm and rotary (3; without
    the exchange between ranks only q and k) and after (3), attention's result twice, in joint and in stream order (2;
    once for a single sample), the branch, the stream after it and its normed form (3), the 4x hidden layer before and
    after GELU (8), the second branch (1). A recomputed block keeps its input and attention's result (2), and one block
    at a time keeps everything; gradients take the place of the activations that they free.
    """
    width = config.num_attention_heads * config.attention_head_dim
    blocks = config.num_layers
    widths = KEPT_RECOMPUTED * blocks + KEPT if checkpointing else KEPT * blocks
    return tokens * width * widths * element


def device_memory(device: torch.device, limit_gib: float | None) -> int:
    """Return the bytes to plan for: the limit, or nine tenths of a GPU's memory, or half of the machine's."""
    if limit_gib is not None:
        return int(limit_gib * 2**30)
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory * USABLE)
    return machine_memory()


def machine_memory() -> int:
    """Return the bytes to plan for on the CPU: half of the machine's memory, for all ranks together."""
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.5)


def check_packs(packs: int, ranks: int, plans: Sequence[MemoryPlan]) -> None:
    """Raise ValueError if the packs of a step cannot be shared equally by the groups of ranks of every plan."""
    for plan in plans:
        groups = ranks // plan.sequence_parallel
        if packs % groups:
            raise ValueError(
                f"packs = {packs} cannot be shared equally by {groups} groups of ranks ({ranks} ranks, "
                f"{plan.sequence_parallel} a pack)"
            )


def plan_memory(
    stage: BudgetStage,
    config: Any,
    *,
    ranks: int,
    memory: int,
    fixed: int,
    sharded: int,
    element: int,
    patch: int = 16,
    sequences: int = 1,
    reference_area: int = 1024**2,
) -> MemoryPlan:
    """Plan a stage with the least sharing and recomputation that fits the memory; values that the stage sets are kept.

    Args:
        stage: Stage of the curriculum.
        config: Configuration of the transformer.
        ranks: Number of ranks of the run.
        memory: Memory of a rank, in bytes.
        fixed: Bytes that every rank holds: text encoder and VAE.
        sharded: Bytes that the ranks share: weights, gradients, optimizer state and averages.
        element: Bytes per number in the computation.
        patch: Side of a token in pixels.
        sequences: Sequences that a sample takes in a pack; two with guidance.
        reference_area: Pixels of a reference in a stage without a joint budget.

    Raises:
        ValueError: Not even one sample of the largest size fits; the message says what would help.
    """
    # The largest sample of the stage: with pack_tokens unset, every sample must fit a pack.
    budget = math.isqrt(REFERENCES * reference_area) if stage.budget is None else stage.budget
    largest = sequences * ((budget**2 + stage.target_side**2) // patch**2 + TEXT_TOKENS)
    wanted = stage.pack_tokens or largest
    free = memory - fixed - sharded // ranks
    # Sharing a pack costs exchanges in every block, recomputing costs a second forward. The first option that fits is
    # the cheapest: within a degree of sharing, keep the activations if possible.
    recomputation = (False, True) if stage.checkpointing is None else (stage.checkpointing,)
    options = [(degree, again) for degree in sharing_degrees(stage, ranks, config) for again in recomputation]
    for degree, checkpointing in options:
        per_token = activation_bytes(config, 1, checkpointing, element) / degree
        fitting = int(free / per_token) if free > 0 else 0
        if fitting >= wanted:
            tokens = stage.pack_tokens or largest * min(fitting // largest, 4)
            needed = int(memory - free + tokens * per_token)
            how = f"{degree} rank(s) per pack, blocks {'recomputed' if checkpointing else 'kept'}"
            reason = f"{how}: {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB"
            return MemoryPlan(tokens, degree, checkpointing, needed, reason)
    degree, checkpointing = options[-1]
    least = memory - free + activation_bytes(config, wanted, checkpointing, element) / degree
    twice = ", twice for guidance" if sequences > 1 else ""
    raise ValueError(
        f"a pack of {wanted} tokens (references of {budget} x {budget} pixels together, targets of "
        f"{stage.target_side} x {stage.target_side}{twice}) needs {least / 2**30:.1f} GiB on each of {ranks} rank(s), "
        f"there are {memory / 2**30:.1f}; use more ranks, a LoRA, smaller sides, or set the stage's "
        "pack_tokens"
    )


def sharing_degrees(stage: BudgetStage, ranks: int, config: Any) -> list[int]:
    """Return the numbers of ranks that may share a pack, ascending, or the one that the stage sets."""
    heads = config.num_attention_heads
    possible = [n for n in range(1, ranks + 1) if ranks % n == 0 and heads % n == 0]
    if stage.sequence_parallel is None:
        return possible
    if stage.sequence_parallel not in possible:
        raise ValueError(
            f"sequence_parallel = {stage.sequence_parallel} does not work for {ranks} rank(s) and {heads} attention "
            f"heads; these do: {', '.join(map(str, possible))}"
        )
    return [stage.sequence_parallel]
