"""The rows of all remaining steps, which are encoded before a run trains."""

import dataclasses
import json

import pytest
from synthetic import synthetic_sample

from uniref_fast.data.dataset import BrokenRowsError, Dataset
from uniref_fast.training.batches.encoding import EncodingPass, EncodingReport
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.loader import PackPlanner
from uniref_fast.training.batches.packing import CostModel
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.batches.upcoming import encode_ahead, pack_token_bounds, upcoming_rows
from uniref_fast.training.core.memory import plan_memory
from uniref_fast.training.core.model_size import ModelSize
from uniref_fast.training.core.recipe import BudgetStage, stage_at
from uniref_fast.training.supervised.recipes import SFT

pytestmark = pytest.mark.usefixtures("threads")
STAGES = (BudgetStage(48, 3, 1.0, 32, pack_tokens=160), BudgetStage(64, 3, 1.0, 48, pack_tokens=200))
CONFIG = SFT(STAGES, data=("x",), packs=2, drop_text=0.3, drop_references=0.2, max_broken=2)
FLOPS = CostModel(1.0, 0.001)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Ninety rows over twelve images; six steps use about half of them."""
    folder, rows = tmp_path_factory.mktemp("rows"), []
    for i in range(12):
        synthetic_sample(i, size=64, references=1).target.resize((64 + 8 * (i % 3), 64)).save(folder / f"{i}.png")
    for i in range(90):
        names = [f"{(i + j) % 12}.png" for j in range(1 + i % 3)]
        rows.append({"input_images": names, "output_image": f"{i % 12}.png", "instruction": f"do {i} " * (1 + i % 2)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset([folder / "rows.jsonl"])


@pytest.fixture
def encoder(builtin_pipe):
    return Encoder(builtin_pipe, TensorCache(None), 5, CONFIG.drop_text, CONFIG.drop_references)


def used(dataset, encoder, config, tokens, costs, step=0, state=None):
    """Return the (row, form) that the steps use, and the state of the planner after each step."""

    def prepare(key, number):
        stage = config.stages[number]
        return encoder.prepare(dataset[key[1]], key, stage.budget, stage.target_side)

    planner, found, states = PackPlanner(dataset, prepare, config, tokens, costs, state), set(), {}
    for at in range(step, config.total_steps):
        stage = stage_at(config, at)[1]
        for key in planner.plan(at)[1]:
            found.add((key[1], encoder.form(key, stage.budget, stage.target_side)))
        states[at + 1] = planner.state()
    return found, states


def pairs(rows):
    return {(row.index, form) for row in rows for form in row.forms}


def upcoming(dataset, encoder, bounds=((160, 160), (200, 200)), costs=FLOPS, step=0, state=None, exact=True):
    return upcoming_rows(dataset, encoder, CONFIG, step, bounds, costs, state, exact=exact)


def test_known_costs_and_packs_give_exactly_the_rows_of_the_steps(dataset, encoder):
    expected, states = used(dataset, encoder, CONFIG, (160, 200), FLOPS)
    found = upcoming(dataset, encoder)
    assert pairs(found) == expected and len({row.index for row in found}) < 80, "not all rows"
    assert len({form for _, form in expected}) > 4, "several forms"
    for step in (2, 3, 4):
        rest, _ = used(dataset, encoder, CONFIG, (160, 200), FLOPS, step, states[step])
        assert pairs(upcoming(dataset, encoder, step=step, state=states[step])) == rest < expected
    assert upcoming(dataset, encoder, step=6, state=states[6]) == []


@pytest.mark.parametrize("costs", [CostModel(0.0, 1.0), CostModel(1.0, 0.0, 500.0)])
def test_whatever_is_measured_later_the_rows_are_among_those(dataset, encoder, costs):
    assert used(dataset, encoder, CONFIG, (160, 200), costs)[0] <= pairs(upcoming(dataset, encoder, exact=False))


@pytest.mark.parametrize("tokens", [(160, 160), (320, 640), (640, 200)])
def test_whatever_is_planned_later_the_rows_are_among_those(dataset, encoder, tokens):
    found = pairs(upcoming(dataset, encoder, ((160, 640), (160, 640))))
    assert used(dataset, encoder, CONFIG, tokens, FLOPS)[0] <= found


def test_bounds_of_packs():
    stage = dataclasses.replace(STAGES[0], pack_tokens=None)
    assert pack_token_bounds(STAGES[0], {}, 8, 64**2) == (160, 160)
    assert pack_token_bounds(stage, {(48, 32): 77}, 8, 64**2) == (77, 77), "those of the run that is resumed"
    low, high = pack_token_bounds(stage, {}, 8, 64**2)
    assert low == (48**2 + 32**2) // 64 + 1536 and high == 4 * low


@pytest.mark.parametrize("budget", [48, None])
def test_bounds_of_packs_are_those_of_the_memory_plan(budget, builtin_pipe):
    """Three references of 50 x 50 pixels have as many tokens as a square of 86 x 86 pixels, and not one more."""
    stage = dataclasses.replace(STAGES[0], budget=budget, target_side=50, pack_tokens=None)
    area, size = 50**2, ModelSize.of(builtin_pipe.transformer.config, {})
    plan = plan_memory(stage, size, ranks=1, memory=10**15, fixed=0, sharded=0, element=2, patch=1,
                       reference_area=area)  # fmt: skip
    assert pack_token_bounds(stage, {}, 1, area)[1] == plan.pack_tokens


def test_a_run_with_too_many_broken_rows_ends_before_it_trains(dataset, encoder, monkeypatch):
    def report(count):
        broken = tuple((f"rows.jsonl:{i}", "no image") for i in range(count))
        monkeypatch.setattr(EncodingPass, "__init__", lambda self, *args: None)
        monkeypatch.setattr(EncodingPass, "run", lambda self, rows: EncodingReport(9, 9, 0, broken))
        return encode_ahead(encoder, None, CONFIG, [])

    assert len(report(2).broken) == 2
    with pytest.raises(BrokenRowsError, match=r"3 rows cannot be encoded, over max_broken = 2; .*rows.jsonl:2: no"):
        report(3)
