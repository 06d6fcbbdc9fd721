"""Configuration of supervised fine-tuning, and the recipes: functions that return complete configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from uniref_fast.training.core.recipe import BudgetStage, Recipe

__all__ = [
    "SFT",
    "SFT_RECIPES",
    "builtin",
    "builtin_more",
    "lora",
    "lora_24gb",
    "lora_48gb",
    "lora_80gb",
    "paper",
    "tiny",
]


@dataclass(frozen=True)
class SFT(Recipe):
    """Settings of supervised fine-tuning (SFT).

    Attributes: Model
        visibility: Attention policy between text, target and references (`uniref_fast.visibility`); none takes that of
            the run in `initial`, else "full", which the released models use. A model that is trained with another
            policy must be run with it; its references can then be shared by several targets or cached.

    Attributes: Noise and dropped conditions
        t_mean: Mean of the normal distribution whose sigmoid is the time t, before the shift by resolution.
        t_std: Standard deviation of that normal distribution.
        drop_text: Share of samples, from 0 to 1, that are trained with an empty instruction, for classifier-free
            guidance.
        drop_references: Share of samples, from 0 to 1, that are trained without their references.

    Attributes: Masks
        mask_weight_outside: Weight, from 0 to 1, of what the mask of a row leaves out of the loss, next to a weight of
            1 for what is white; rows without a mask are not affected.

    Attributes: Memory and precision
        cost: Cost model that balances packs between ranks: "measured" times this machine when the run starts, "flops"
            counts operations.
    """

    t_mean: float = 0.0
    t_std: float = 1.0
    drop_text: float = 0.1
    drop_references: float = 0.05
    mask_weight_outside: float = 0.0
    cost: Literal["measured", "flops"] = "measured"
    visibility: Literal["full", "reference_causal", "reference_isolated"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drop_text", "drop_references", "mask_weight_outside"):
            if not 0 <= getattr(self, name) <= 1:
                what = "weight" if name == "mask_weight_outside" else "share"
                raise ValueError(f"{name} must be a {what} from 0 to 1, got {getattr(self, name)}")
        self._at_least({"t_std": 0})


def tiny() -> SFT:
    """Train the built-in model on generated data: a first trial on a CPU that takes a few minutes."""
    return SFT(
        model="builtin",
        data=("builtin",),
        # References as `uniref-fast edit` sizes them: an adapter that was trained with other sizes makes images worse.
        stages=(BudgetStage(budget=None, steps=150, lr=2e-3, target_side=64, pack_tokens=1024),
                BudgetStage(budget=None, steps=150, lr=2e-3, target_side=64, pack_tokens=1024)),
        packs=2,
        dtype="float32",
        betas=(0.9, 0.99),
        weight_decay=0.0,
        warmup=20,
        ema=0.98,
        cost="flops",
        workers=2,
        save_every=50,
        eval_every=50,
        eval_samples=32,
        sample_every=150,
        sample_num_inference_steps=8,
    )  # fmt: skip


def builtin() -> SFT:
    """Train the built-in model from scratch: about 80 minutes on two CPU cores with bfloat16 instructions."""
    return SFT(
        model="builtin",
        data=("builtin",),
        # Ten samples a pack: with fewer, the exchange of weights and gradients takes longer than the products. The
        # first budgets make several pictures smaller than the answer, of which little is learned for the last.
        stages=(BudgetStage(budget=64, steps=200, lr=1.5e-3, target_side=64, pack_tokens=2048),
                BudgetStage(budget=96, steps=300, lr=1.5e-3, target_side=64, pack_tokens=2048),
                BudgetStage(budget=128, steps=12_000, lr=1.5e-3, target_side=64, pack_tokens=2048)),
        packs=2,
        dtype="bfloat16",
        betas=(0.9, 0.99),
        weight_decay=0.01,
        warmup=200,
        ema=0.998,
        t_mean=0.3,
        drop_text=0.05,
        drop_references=0.0,
        cost="flops",
        workers=2,
        save_every=500,
        eval_every=500,
        eval_samples=128,
        sample_every=2000,
        sample_num_inference_steps=12,
        sample_true_cfg_scale=1.0,
    )  # fmt: skip


def builtin_more() -> SFT:
    """Continue a run of the recipe `builtin` with the tasks that it learns last, for about 75 minutes more."""
    return replace(
        builtin(), stages=(BudgetStage(budget=128, steps=10_000, lr=1.2e-3, target_side=64, pack_tokens=2048),)
    )


def lora() -> SFT:
    """Train a LoRA adapter of Qwen-Image-Edit on your own rows, with a joint budget of 1024 x 1024, then 1536 x 1536,
    then 2048 x 2048 pixels for the references: on 1, 2, 4 or 8 GPUs; by the planned memory one of 80 GB is enough.
    """
    return SFT(
        stages=(BudgetStage(1024, 2000, 1e-4), BudgetStage(1536, 1000, 1e-4), BudgetStage(2048, 500, 5e-5)),
        packs=8,
        lora_rank=64,
        weight_decay=0.01,
        warmup=100,
        ema=None,
        save_every=250,
        eval_every=250,
        sample_every=500,
    )


def lora_24gb() -> SFT:
    """Train a LoRA adapter of rank 16 on one GPU of 24 GB: base in 4 bits, moments in 8 bits, encoders freed before the
    first step, and a joint budget of 1024 x 1024, then 1536 x 1536 pixels for the references.
    """
    plain = lora()
    return replace(
        plain, stages=plain.stages[:2], lora_rank=16, base="nf4", optimizer="adamw8bit", encoders="free", packs=4
    )


def lora_48gb() -> SFT:
    """Train a LoRA adapter of rank 32 on one GPU of 48 GB: base in 8 bits, encoders freed before the first step; the
    budgets are those of the recipe `lora`.
    """
    return replace(lora(), lora_rank=32, base="int8", encoders="free")


def lora_80gb() -> SFT:
    """Train the adapter of the recipe `lora` on one GPU of 80 GB, with less recomputation: encoders are freed before
    the first step, and the base stays in bfloat16.
    """
    return replace(lora(), encoders="free")


def paper() -> SFT:
    """Train all weights of Qwen-Image-Edit with the settings that UniRef-Image-Edit (arXiv 2602.14186) reports: 50,000
    steps of about 512 samples, for a cluster of GPUs.
    """
    return SFT(
        stages=(BudgetStage(1024, 30_000, 4e-4), BudgetStage(1536, 12_000, 4e-4), BudgetStage(2048, 8_000, 4e-4)),
        packs=128,  # a pack holds about four samples of the first stage
    )


SFT_RECIPES: dict[str, Callable[[], SFT]] = {
    recipe.__name__: recipe for recipe in (tiny, builtin, builtin_more, lora, lora_24gb, lora_48gb, lora_80gb, paper)
}
