"""The memory plan of a run against PyTorch's memory tracker, on the model code at the size of Qwen-Image-Edit."""

import dataclasses

import pytest

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import Sample
from uniref_fast.run_plan import PlanOptions, make_plan
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.model_size import ModelSize
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.core.tracked_memory import FakeTrainedModel
from uniref_fast.training.supervised.recipes import lora

pytestmark = pytest.mark.slow
LAYERS, FEW = ModelSize().num_layers, (3, 4)
TOLERANCE = {True: 0.01, "inputs": 0.01, "host": 0.02, False: 0.05}  # by `checkpointing`


def sample(budget, count):
    """One sample with a target of 1024 x 1024 pixels, and references that fill the budget."""
    sizes = fit_to_budget([(4096, 4096)] * count, budget)
    return Sample(100 + 190 * count, (1, 64, 64), tuple((1, height // 16, width // 16) for width, height in sizes))


def planned(tokens, checkpointing):
    stage = BudgetStage(1024, 10, 1e-4, pack_tokens=tokens, checkpointing=checkpointing)
    config = dataclasses.replace(lora(), stages=(stage,), encoders="free")
    return make_plan("sft", "lora", config, PlanOptions(gpu_memory=1000)).stages[0].plan.bytes_needed


@pytest.fixture(scope="module")
def models():
    ranks = Ranks.start()
    return [FakeTrainedModel(ModelSize(), lora(), ranks, layers) for layers in FEW]


@pytest.mark.parametrize("checkpointing", TOLERANCE)
def test_the_plan_is_the_tracked_memory(models, checkpointing):
    """The plan agrees with the tracked memory of a few blocks, as every further block adds the same."""
    cases = [(1024, 1), (1536, 3), (2048, 6)]
    for budget, count in cases if checkpointing is True else cases[-1:]:
        one = sample(budget, count)
        few, more = (model.peak([one], checkpointing) for model in models)
        tracked = few + (LAYERS - FEW[0]) * (more - few)
        plan = planned(one.length, checkpointing)
        assert plan == pytest.approx(tracked, rel=TOLERANCE[checkpointing]), (
            f"{budget} x {budget} pixels, {count} references"
        )
        assert few > models[0].held(), "weights, gradients and moments are tracked too"
