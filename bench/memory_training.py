"""Track the memory of a LoRA step of the size of Qwen-Image-Edit with fake tensors, beside its plan; on any machine.

    python bench/memory_training.py [--whole] [--results bench/results]

The model code, the adapter (rank 64), FSDP2 on one rank and AdamW run under PyTorch's memory tracker, on tensors
without values: forward and backward of one sample whose target has 1024 x 1024 pixels, while gradients of an earlier
pack and moments exist. Encoders are freed. The recipes for GPUs of 24, 48 and 80 GB are planned for the same samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from conftest import machine, results_path, write_results

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import Sample
from uniref_fast.run_plan import PlanOptions, RunPlan, make_plan
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.memory import RECOMPUTATION
from uniref_fast.training.core.model_size import ModelSize
from uniref_fast.training.core.recipe import Checkpointing
from uniref_fast.training.core.tracked_memory import FakeTrainedModel
from uniref_fast.training.supervised.recipes import SFT, SFT_RECIPES

ROOT = Path(__file__).parent.parent
BUDGETS, COUNTS = (1024, 1536, 2048), (1, 3, 6)
FEW = (3, 4)  # numbers of blocks from which the memory of all is extrapolated
RECIPES = {"lora_24gb": 24, "lora_48gb": 48, "lora_80gb": 80}


def sample_of(budget: int, count: int) -> Sample:
    """Return a sample whose `count` references fill the budget."""
    sizes = fit_to_budget([(4096, 4096)] * count, budget)
    return Sample(100 + 190 * count, (1, 64, 64), tuple((1, height // 16, width // 16) for width, height in sizes))


def plan_of(config: SFT, budget: int, tokens: int, checkpointing: Checkpointing | None, gigabytes: float) -> RunPlan:
    """Return the plan of a run whose only stage has packs of `tokens` tokens."""
    stage = dataclasses.replace(config.stages[0], budget=budget, pack_tokens=tokens, checkpointing=checkpointing)
    return make_plan("sft", "lora", dataclasses.replace(config, stages=(stage,)), PlanOptions(gpu_memory=gigabytes))


def tracked(whole: bool) -> list[dict[str, Any]]:
    """Return the tracked and the planned bytes of each sample.

    Args:
        whole: Track all blocks. Otherwise the memory of three and of four blocks is tracked, and every further block is
            counted as the fourth one.
    """
    config, ranks, layers = SFT_RECIPES["lora_80gb"](), Ranks.start(), ModelSize().num_layers
    models = [FakeTrainedModel(ModelSize(), config, ranks, count) for count in ((layers,) if whole else FEW)]
    cases: list[tuple[Checkpointing, int, int]] = [(True, budget, count) for budget in BUDGETS for count in COUNTS]
    others: tuple[Checkpointing, ...] = (False, "inputs", "host")
    cases += [(again, budget, 6) for again in others for budget in BUDGETS]
    rows = []
    for checkpointing, budget, count in cases:
        start, sample = time.perf_counter(), sample_of(budget, count)
        first, *more = (model.peak([sample], checkpointing) for model in models)
        peak = first + sum((layers - FEW[0]) * (each - first) for each in more)
        plan = plan_of(config, budget, sample.length, checkpointing, 1000).stages[0].plan
        assert plan is not None
        row = {"checkpointing": checkpointing, "budget": budget, "references": count, "tokens": sample.length,
               "tracked_bytes": peak, "planned_bytes": plan.bytes_needed,
               "ratio": round(plan.bytes_needed / peak, 4)}  # fmt: skip
        rows.append(row)
        print(json.dumps(row), f"{time.perf_counter() - start:.0f} s", flush=True)
    return rows


def recipes() -> list[dict[str, Any]]:
    """Return the plan of each recipe on its GPU, for one sample with six references a pack."""
    rows = []
    for name, gigabytes in RECIPES.items():
        config = SFT_RECIPES[name]()
        for budget in BUDGETS:
            run = plan_of(config, budget, sample_of(budget, 6).length, None, gigabytes)
            plan = run.stages[0].plan
            row: dict[str, Any] = {"recipe": name, "gpu_gb": gigabytes, "budget": budget, "fits": plan is not None}
            if plan is not None:
                row |= {"held_bytes": run.held, "checkpointing": plan.checkpointing,
                        "words": RECOMPUTATION[plan.checkpointing], "planned_bytes": plan.bytes_needed}  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help="Track all 60 blocks, which takes ten times as long.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="Folder of the results.")
    args = parser.parse_args()
    command = "python bench/memory_training.py" + " --whole" * args.whole
    blocks = [ModelSize().num_layers] if args.whole else list(FEW)
    results = machine() | {
        "command": command,
        "tracked_blocks": blocks,
        "recipes": recipes(),
        "rows": tracked(args.whole),
    }
    path = results_path(args.results, "memory-training")
    write_results(path, results)
    print(path)


if __name__ == "__main__":
    main()
