"""The memory plan of a stage: tokens of a pack, ranks that share a pack, and what is recomputed in the backward.

A rank holds its share of weights, gradients and optimizer state, the weights of one or two gathered blocks, and the
activations that the backward keeps for its part of a pack. Activations are counted in widths (heads x head dimension)
per token. Tests compare the plan with the tracked memory of the model code at the size of Qwen-Image-Edit
(`tracked_memory`) and with what autograd holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uniref_fast.gpu_memory import USABLE
from uniref_fast.training.core.recipe import BudgetStage, Checkpointing

if TYPE_CHECKING:  # the command `plan` starts without torch
    import torch

    from uniref_fast.training.core.model_size import ModelSize

__all__ = [
    "RECOMPUTATION",
    "MemoryPlan",
    "activation_bytes",
    "check_packs",
    "coding_bytes",
    "device_memory",
    "gathered_bytes",
    "largest_sample",
    "machine_memory",
    "plan_memory",
    "plan_stages",
    "smaller_stages",
]

RECOMPUTATION: dict[Checkpointing, str] = {
    False: "blocks kept",
    True: "blocks recomputed, their inputs and attention kept",
    "inputs": "blocks and attention recomputed, inputs kept",
    "host": "blocks and attention recomputed, inputs in host memory",
}
"""Values of `BudgetStage.checkpointing` in words, the one that takes the least time first."""

KEPT_RECOMPUTED: dict[Checkpointing, int] = {True: 2, "inputs": 1, "host": 0}
FETCHED = 3  # widths per token of inputs on their way to host memory and back
REFERENCES = 3  # of the largest sample without a joint budget: the models were trained with up to three
TEXT_TOKENS = 1536  # room in the largest sample for the prompt and six pictures of about 190 tokens


@dataclass(frozen=True)
class MemoryPlan:
    """The packs and the recomputation of a stage.

    Attributes:
        pack_tokens: Largest number of tokens in a pack.
        sequence_parallel: Number of ranks that share a pack.
        checkpointing: Recomputation in the backward, as in `BudgetStage`.
        bytes_needed: Estimated memory of a rank, in bytes.
        reason: Explanation of the choice.
        rejected: The last part of `reason`: options that take less time and do not fit, with the bytes that they need.
    """

    pack_tokens: int
    sequence_parallel: int
    checkpointing: Checkpointing
    bytes_needed: int
    reason: str
    rejected: str = ""


def activation_bytes(
    size: ModelSize, tokens: int, checkpointing: Checkpointing, element: int, shared: bool = False
) -> int:
    """Return the bytes that the backward of one pack keeps, on a rank that holds `tokens` of its tokens.

    A block of Qwen-Image-Edit keeps, in widths per token: its input and the normed input (2), q and k before norm and
    rotary (2; q, k, v with the exchange between ranks that share a pack) and q, k, v after (3), attention's result
    twice, in joint and in stream order (2; once for a single sample), the branch, the stream after it and its normed
    form (3), the 4x hidden layer before and after GELU (8), the second branch (1). A recomputed block keeps its input
    and, unless attention is recomputed too, attention's result. One block at a time keeps everything, beside the
    gradients of activations.

    Args:
        size: Sizes of the model.
        tokens: Number of tokens on the rank.
        checkpointing: Recomputation in the backward, as in `BudgetStage`.
        element: Bytes per number.
        shared: Ranks share the pack.
    """
    blocks = size.num_blocks
    widths = size.kept_widths + shared * blocks
    if checkpointing is not False:
        widths = KEPT_RECOMPUTED[checkpointing] * blocks + size.recomputing + shared
        widths += FETCHED * (checkpointing == "host")
    return tokens * size.width * widths * element


def gathered_bytes(block: int, trained: int, element: int, ranks: int, quantised: int = 0) -> int:
    """Return the bytes of the blocks that FSDP2 gathers at a time: two if there are several ranks, else one.

    Args:
        block: Number of parameters of a block that are sharded.
        trained: Number of them that are trained. Their gradients exist twice, whole, when they are reduced in float32.
        element: Bytes per number in the computation.
        ranks: Number of ranks.
        quantised: Number of parameters of the largest quantised weight, which is dequantised by way of a copy.
    """
    return block * element * (1 if ranks == 1 else 2) + trained * (element + 4) + 2 * quantised * element


def coding_bytes(size: ModelSize, element: int, encoded: int, decoded: int) -> int:
    """Return the bytes that the VAE needs at its peak for the largest images of a stage.

    Args:
        size: Sizes of the model.
        element: Bytes per number.
        encoded: Pixels of the largest image that is encoded.
        decoded: Pixels of the largest image that is decoded.
    """
    encoding, decoding = size.coding
    return int(max(encoding * encoded, decoding * decoded) * size.vae_width * element)


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


def largest_sample(stage: BudgetStage, patch: int, reference_area: int) -> int:
    """Return the number of tokens of the largest sample of a stage, with one sequence.

    Args:
        stage: Stage of the curriculum.
        patch: Side of a token in pixels.
        reference_area: Pixels of a reference in a stage without a joint budget.
    """
    return (_joint_side(stage, reference_area) ** 2 + stage.target_side**2) // patch**2 + TEXT_TOKENS


def _joint_side(stage: BudgetStage, reference_area: int) -> int:
    """Return the side in pixels of a square with the area of all references of the largest sample."""
    return math.isqrt(REFERENCES * reference_area) if stage.budget is None else stage.budget


def plan_memory(
    stage: BudgetStage,
    size: ModelSize,
    *,
    ranks: int,
    memory: int,
    fixed: int,
    sharded: int,
    element: int,
    gathered: int = 0,
    update: int = 0,
    freed: int = 0,
    patch: int = 16,
    sequences: int = 1,
    reference_area: int = 1024**2,
) -> MemoryPlan:
    """Plan a stage with the least sharing and recomputation that fits the memory; values that the stage sets are kept.

    Args:
        stage: Stage of the curriculum.
        size: Sizes of the model.
        ranks: Number of ranks of the run.
        memory: Memory of a rank, in bytes.
        fixed: Bytes that every rank holds, such as the text encoder and the VAE.
        sharded: Bytes that the ranks share: weights, gradients, optimizer state and averages.
        element: Bytes per number in the computation.
        gathered: Bytes of gathered blocks (`gathered_bytes`).
        update: Bytes that the update of the weights needs for a moment, and that the ranks share.
        freed: Bytes of text encoder and VAE if they encode before the first step, when they are alone on the device,
            and are freed then; 0 if images are encoded while the run trains. Samples are decoded in any case.
        patch: Side of a token in pixels.
        sequences: Sequences that a sample takes in a pack; two with guidance.
        reference_area: Pixels of a reference in a stage without a joint budget.

    Raises:
        ValueError: Not even one sample of the largest size fits; the message says what would help.
    """
    # The largest sample of the stage: with pack_tokens unset, every sample must fit a pack.
    budget, largest = _joint_side(stage, reference_area), sequences * largest_sample(stage, patch, reference_area)
    wanted = stage.pack_tokens or largest
    held = fixed + sharded // ranks
    # Images are encoded and weights are updated while no activations are kept.
    reference, target = reference_area if stage.budget is None else stage.budget**2, stage.target_side**2
    largest_image = max(reference, target)
    other = max(coding_bytes(size, element, 0 if freed else largest_image, target), update // ranks)
    first = freed + coding_bytes(size, element, largest_image, 0) if freed else 0
    # Sharing a pack costs exchanges in every block, recomputing costs a second forward. The first option that fits is
    # the cheapest: within a degree of sharing, keep as many activations as possible.
    recomputation = list(RECOMPUTATION) if stage.checkpointing is None else [stage.checkpointing]
    options = [(degree, again) for degree in sharing_degrees(stage, ranks, size) for again in recomputation]
    before, least = "", 0
    for degree, checkpointing in options:
        per_token = activation_bytes(size, 1, checkpointing, element, degree > 1) / degree
        least = max(first, held + max(other, int(gathered + wanted * per_token)))
        how = f"{degree} rank(s) per pack, {RECOMPUTATION[checkpointing]}"
        if least <= memory:
            fitting = int((memory - held - gathered) / per_token)
            tokens = stage.pack_tokens or largest * min(fitting // largest, 4)
            needed = max(first, held + max(other, int(gathered + tokens * per_token)))
            reason = f"{how}: {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB{before}"
            return MemoryPlan(tokens, degree, checkpointing, needed, reason, before)
        before = f"; {how} would need {least / 2**30:.1f} GiB"
    twice = ", twice for guidance" if sequences > 1 else ""
    raise ValueError(
        f"a pack of {wanted} tokens (references of {budget} x {budget} pixels together, targets of "
        f"{stage.target_side} x {stage.target_side}{twice}) needs {least / 2**30:.1f} GiB on each of {ranks} rank(s), "
        f"there are {memory / 2**30:.1f}; use more ranks, a LoRA, smaller sides, or set the stage's "
        "pack_tokens"
    )


def plan_stages(stages: Sequence[BudgetStage], plan: Callable[[BudgetStage], MemoryPlan]) -> list[MemoryPlan]:
    """Plan all stages of a run.

    Args:
        stages: Stages of the run.
        plan: Function that plans a stage, or raises ValueError if it does not fit.

    Raises:
        ValueError: A stage does not fit; the message says which ones do, and the flags with which the others fit too.
    """
    found: list[MemoryPlan] = []
    problems: dict[int, str] = {}
    for number, stage in enumerate(stages):
        try:
            found.append(plan(stage))
        except ValueError as error:
            problems[number] = str(error)
    if problems:
        advice = smaller_stages(stages, [i not in problems for i in range(len(stages))])
        lines = [f"stage {i} does not fit the memory: {problem}" for i, problem in problems.items()]
        raise ValueError("; ".join([*lines, advice] if advice else lines))
    return found


def smaller_stages(stages: Sequence[BudgetStage], fits: Sequence[bool]) -> str:
    """Return the flags that give the sizes of the last stage that fits to those that do not.

    Args:
        stages: Stages of the run.
        fits: Whether each of them fits.

    Returns:
        A part of a message; it is empty if all stages fit, or none does.
    """
    if all(fits) or not any(fits):
        return ""
    flags, best = [], max(i for i, fit in enumerate(fits) if fit)
    for number, stage in enumerate(stages):
        for name in () if fits[number] else ("budget", "target_side", "pack_tokens"):
            value = getattr(stages[best], name)
            if value != getattr(stage, name):
                flags.append(f"--stages.{number}.{name.replace('_', '-')} {'none' if value is None else value}")
    fitting = ", ".join(str(number) for number, fit in enumerate(fits) if fit)
    return f"stage {fitting} fits; train the others with its sizes: {' '.join(flags)}"


def sharing_degrees(stage: BudgetStage, ranks: int, size: ModelSize) -> list[int]:
    """Return the numbers of ranks that may share a pack, ascending, or the one that the stage sets."""
    heads = size.num_attention_heads
    if not size.shares_packs:
        if stage.sequence_parallel not in (None, 1):
            raise ValueError(
                f"sequence_parallel = {stage.sequence_parallel}: ranks cannot share a pack of a "
                f"{size.transformer_class}; leave it out, or set it to 1. More ranks share the weights and run packs "
                "of their own"
            )
        return [1]
    possible = [n for n in range(1, ranks + 1) if ranks % n == 0 and heads % n == 0]
    if stage.sequence_parallel is None:
        return possible
    if stage.sequence_parallel not in possible:
        raise ValueError(
            f"sequence_parallel = {stage.sequence_parallel} does not work for {ranks} rank(s) and {heads} attention "
            f"heads; these do: {', '.join(map(str, possible))}"
        )
    return [stage.sequence_parallel]
