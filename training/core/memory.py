"""What a stage of the curriculum needs: tokens of a pack, ranks that share it, recomputation, for the memory there is.

Memory of a rank is its share of weights, gradients and optimizer state, plus what the backward keeps of its part of a
pack. The latter is counted in widths (heads x head dimension) of a token, as the blocks keep them; a test compares it
with what autograd really holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from uniref_fast.training.core.recipe import BudgetStage

__all__ = ["MemoryPlan", "activation_bytes", "device_memory", "plan_memory"]

KEPT = 22  # widths a token that a block keeps: see `activation_bytes`
KEPT_RECOMPUTED = 2
TEXT_TOKENS = 1536  # room in the largest sample for the prompt and six pictures of about 190 tokens


@dataclass(frozen=True)
class MemoryPlan:
    """How a stage runs.

    Attributes:
        pack_tokens: most tokens of a pack.
        sequence_parallel: ranks that share it.
        checkpointing: whether blocks are recomputed.
        bytes_needed: of memory on a rank, estimated.
        reason: what decided.
    """

    pack_tokens: int
    sequence_parallel: int
    checkpointing: bool
    bytes_needed: int
    reason: str


def activation_bytes(config: Any, tokens: int, checkpointing: bool, element: int) -> int:
    """Bytes that the backward of one pack keeps, on a rank that has so many of its tokens.

    A block keeps, in widths a token: its input and the normed input (2), q, k, v before norm and rotary (3; without the
    exchange between ranks only q and k) and after (3), attention's result twice, in joint and in stream order (2; once
    for a sample alone), the branch, the stream after it and its normed form (3), the 4x hidden layer before and after
    GELU (8), the second branch (1). Recomputed, it keeps its input and attention's result (2), and one block at a time
    all of it; the gradients on their way take the place of what they free.
    """
    width = config.num_attention_heads * config.attention_head_dim
    blocks = config.num_layers
    widths = KEPT_RECOMPUTED * blocks + KEPT if checkpointing else KEPT * blocks
    return tokens * width * widths * element


def device_memory(device: torch.device, limit_gib: float | None) -> int:
    """Bytes to plan for: the limit, or nine tenths of a GPU's memory, or half of the machine's."""
    if limit_gib is not None:
        return int(limit_gib * 2**30)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * 0.9)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.5)


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
) -> MemoryPlan:
    """The least sharing and recomputing that fits the memory; what the stage sets is kept.

    Args:
        stage: of the curriculum.
        config: of the transformer.
        ranks: of the run.
        memory: bytes of a rank.
        fixed: bytes that every rank holds: text encoder, VAE.
        sharded: bytes that the ranks share: weights, gradients, optimizer state, averages.
        element: bytes of a number in the computation.
        patch: pixels that a token covers per side.
        sequences: that a sample takes; two with guidance.

    Raises:
        ValueError: when not even one of the largest samples fits; says what would help.
    """
    largest = sequences * ((stage.side**2 + stage.target_side**2) // patch**2 + TEXT_TOKENS)
    free = memory - fixed - sharded // ranks
    heads = config.num_attention_heads
    degrees = [n for n in range(1, ranks + 1) if ranks % n == 0 and heads % n == 0]
    if stage.sequence_parallel is not None:
        if stage.sequence_parallel not in degrees:
            raise ValueError(
                f"sequence_parallel = {stage.sequence_parallel} does not work for {ranks} rank(s) and {heads} "
                f"attention heads; these do: {', '.join(map(str, degrees))}"
            )
        degrees = [stage.sequence_parallel]
    options = [(degree, kept) for degree in degrees for kept in
               ((False, True) if stage.checkpointing is None else (stage.checkpointing,))]  # fmt: skip
    wanted = stage.pack_tokens or largest
    for degree, checkpointing in options:
        per_token = activation_bytes(config, 1, checkpointing, element) / degree
        fits = int(free / per_token) if free > 0 else 0
        if fits < wanted:
            continue
        tokens = stage.pack_tokens or largest * min(fits // largest, 4)
        needed = int(memory - free + tokens * per_token)
        how = f"{degree} rank(s) a pack, blocks {'recomputed' if checkpointing else 'kept'}"
        return MemoryPlan(
            tokens, degree, checkpointing, needed, f"{how}: {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB"
        )
    degree, checkpointing = options[-1]
    least = memory - free + activation_bytes(config, wanted, checkpointing, element) / degree
    twice = ", twice for guidance" if sequences > 1 else ""
    raise ValueError(
        f"a pack of {wanted} tokens (references of {stage.side} x {stage.side} pixels together, targets of "
        f"{stage.target_side} x {stage.target_side}{twice}) needs {least / 2**30:.1f} GiB on each of {ranks} rank(s), "
        f"there are {memory / 2**30:.1f}; use more ranks, a LoRA, smaller sides, or set the stage's pack_tokens"
    )
