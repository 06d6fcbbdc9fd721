"""Rows for rollouts: their order, the kinds that stages want, going on, and rows that are broken."""

import json

import pytest
from PIL import Image

from uniref_fast.data.dataset import BrokenRowsError, Dataset
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.order import ShuffledOrder
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.rl.prompts import Prompts
from uniref_fast.training.rl.recipes import MSGRPO, RLStage

ROWS = 12
STAGES = {kind: RLStage(64, 1, 1e-3, target_side=32, references=kind) for kind in ("multi", "single", "any")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        Image.new("RGB", (40 + 20 * i, 70 - 10 * i), (i * 60, 0, 0)).save(folder / f"{i}.png")
    return folder


def row(references, number=0):
    """The instruction holds `number`."""
    return {"input_images": [f"{j % 4}.png" for j in range(references)], "instruction": f"row {number}"}


def write(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder / name


@pytest.fixture
def make(tmp_path, pictures, builtin_pipe):
    """Makes prompts over rows with so many references each; None is a row without its pictures."""

    def build(counts=None, state=None, seed=0, name="rows.jsonl", **fields):
        counts = [i % 4 for i in range(ROWS)] if counts is None else counts
        rows = [row(2, i) | {"input_images": ["gone.png", "0.png"]} if n is None else row(n, i)
                for i, n in enumerate(counts)]  # fmt: skip
        path = write(tmp_path, rows, name)
        fields = {"data": (str(path),), "seed": seed, "image_folder": pictures, **fields}
        config = MSGRPO((STAGES["any"],), model="builtin", rewards=("scene",), **fields)
        dataset = Dataset(config.data, pictures, targets="optional")
        return Prompts(dataset, Encoder(builtin_pipe, TensorCache(None)), config, state)

    return build


def taken(prompts, count, kind="any"):
    """Keys of the next rows; none of them broken."""
    rows, broken = prompts.take(count, STAGES[kind])
    assert broken == [] and len(rows) == count
    return [key for key, _ in rows]


# ---- order and kinds ----


def test_rows_come_in_shuffled_order_for_any_sizes_of_batches(make):
    expected = ShuffledOrder(ROWS, 0).take(30)
    assert taken(make(), 30) == expected
    prompts = make()
    assert [key for count in (1, 0, 11, 13, 5) for key in taken(prompts, count)] == expected
    assert taken(make(seed=1), 30) != expected


@pytest.mark.parametrize(("kind", "wanted"), [("multi", {2, 3}), ("single", {1}), ("any", {0, 1, 2, 3})])
def test_rows_of_each_kind(make, kind, wanted):
    """The rows of a kind in shuffled order, every one of them once an epoch, with the right contents."""
    each = 3 * len(wanted)
    expected = [key for key in ShuffledOrder(ROWS, 0).take(2 * ROWS) if key[1] % 4 in wanted]
    rows, _ = make().take(2 * each, STAGES[kind])
    assert [key for key, _ in rows] == expected and len({index for _, index in expected}) == each
    for (_, index), prepared in rows:
        assert prepared.instruction == f"row {index}" and len(prepared.sample.references) == index % 4


def test_rows_that_a_stage_skips_do_not_come_again(make):
    prompts = make()
    first = taken(prompts, 2, "multi")
    rest = taken(prompts, 5)
    stream = ShuffledOrder(ROWS, 0).take(ROWS)
    place = stream.index(first[-1]) + 1
    assert rest == stream[place : place + 5]


def test_sizes_are_those_of_the_stage(make):
    """`budget` for the references, `target_side` for the result."""

    def tokens(budget, target_side):
        ((_, prepared),), _ = make([2]).take(1, RLStage(budget, 1, 1e-3, target_side=target_side))
        return [rows * columns for _, rows, columns in (prepared.sample.target, *prepared.sample.references)]

    large_target, large_references = tokens(32, 96), tokens(128, 32)
    assert large_target[0] > large_references[0]
    assert all(a < b for a, b in zip(large_target[1:], large_references[1:], strict=True))


def test_weights(make, tmp_path):
    other = write(tmp_path, [row(2, 100)], "other.jsonl")
    prompts = make([1] * 4, data=(str(tmp_path / "rows.jsonl"), str(other)), weights=(1.0, 3.0))
    indices = [index for _, index in taken(prompts, 14)]
    assert {i: indices.count(i) for i in range(5)} == {0: 2, 1: 2, 2: 2, 3: 2, 4: 6}
    again = make([1] * 4, prompts.state(), data=prompts.config.data, weights=(1.0, 3.0))
    assert taken(again, 9) == taken(prompts, 9)


# ---- no row of the kind ----


@pytest.mark.parametrize(("counts", "kind", "says"), [([1, 0, 1], "multi", "two references or more"),
                                                      ([0, 2, 3], "single", "one reference")])  # fmt: skip
def test_no_row_of_the_kind(make, counts, kind, says):
    prompts = make(counts)
    with pytest.raises(ValueError, match=f'no row with {says}.*references = "{kind}"'):
        prompts.take(1, STAGES[kind])
    assert len(taken(make(counts), 9)) == 9


def test_one_row_of_the_kind_comes_once_an_epoch(make):
    assert taken(make([1] * 11 + [2]), 5, "multi") == [(epoch, 11) for epoch in range(5)]


@pytest.mark.parametrize("weights", [(9.0, 1.0), (1.0, 0.2)], ids=str)
def test_a_rare_row_of_the_kind_is_waited_for(make, tmp_path, weights):
    """An epoch may be longer than the data, and a row come in one epoch of several."""
    other = write(tmp_path, [row(2, 100)], "other.jsonl")
    given = {"data": (str(tmp_path / "rows.jsonl"), str(other)), "weights": weights}
    assert [index for _, index in taken(make([1] * 4, **given), 3, "multi")] == [4, 4, 4]


def test_rows_that_never_come_are_not_waited_for(make, tmp_path):
    other = write(tmp_path, [row(2, 100)], "other.jsonl")
    given = {"data": (str(tmp_path / "rows.jsonl"), str(other)), "weights": (1.0, 0.0)}
    with pytest.raises(ValueError, match="no row with two references or more"):
        make([1] * 4, **given).take(1, STAGES["multi"])


# ---- going on ----


@pytest.mark.parametrize("before", [0, 1, ROWS, 17])
def test_prompts_continue_from_a_state(make, before):
    prompts = make(max_broken=9)
    taken(prompts, before, "multi")
    state = json.loads(json.dumps(prompts.state()))
    expected = taken(prompts, 10)
    assert taken(make(state=state, max_broken=9), 10) == expected
    assert state == json.loads(json.dumps(make(state=state).state())), "taken or not, the same state"


def test_the_state_holds_the_broken_rows(make):
    counts = [None, None, 1, 2, 3]
    prompts = make(counts, max_broken=2)
    _, broken = prompts.take(4, STAGES["any"])  # into the second epoch
    assert {where for where, _ in broken} == {"rows.jsonl:1", "rows.jsonl:2"}
    assert make(counts, prompts.state(), max_broken=2).state() == prompts.state()
    _, again = make(counts, prompts.state(), max_broken=2).take(6, STAGES["any"])
    assert {where for where, _ in again} == {where for where, _ in broken}, "the same two are still two"
    with pytest.raises(BrokenRowsError, match="2 rows could not be used, over max_broken = 1"):
        make(counts, prompts.state(), max_broken=1).take(3, STAGES["any"])


def test_other_data_is_refused(make):
    state = make().state()
    with pytest.raises(ValueError, match="this run was trained on other data"):
        make([1] * ROWS, state)
    with pytest.raises(ValueError, match="seed"):
        make(state=state, seed=1)


# ---- broken rows ----


def test_broken_rows_are_passed_over_and_named(make):
    prompts = make([1, None, 2, None, 3], max_broken=2)
    rows, broken = prompts.take(3, STAGES["any"])
    assert sorted(key[1] for key, _ in rows) == [0, 2, 4]
    assert sorted(where for where, _ in broken) == ["rows.jsonl:2", "rows.jsonl:4"]
    assert all("gone.png" in reason and "rows.jsonl" not in reason for _, reason in broken), "the place is said once"
    assert prompts.state()["broken"] == ["rows.jsonl:2", "rows.jsonl:4"]


def test_the_limit_is_of_different_rows(make):
    prompts = make([None, 1], max_broken=1)
    reported = [place for _ in range(6) for place, _ in prompts.take(1, STAGES["any"])[1]]
    assert len(reported) >= 2 and set(reported) == {"rows.jsonl:1"}
    with pytest.raises(BrokenRowsError, match=r"3 rows could not be used, over max_broken = 2.*gone\.png"):
        make([None] * 3 + [1] * 3, max_broken=2).take(6, STAGES["any"])


def test_broken_rows_alone(make):
    with pytest.raises(BrokenRowsError, match="all of them"):
        make([None, None], max_broken=100).take(1, STAGES["any"])


def test_no_row_of_the_kind_that_is_whole(make):
    """The only row with two references is broken: an end, not a search without one."""
    with pytest.raises(ValueError, match=r"no row with two references or more.*rows\.jsonl:3: .*gone\.png"):
        make([1, 1, None], max_broken=100).take(1, STAGES["multi"])


def test_broken_rows_beside_rows_that_never_come(make, tmp_path):
    other = write(tmp_path, [row(2, 100)], "other.jsonl")
    given = {"data": (str(tmp_path / "rows.jsonl"), str(other)), "weights": (1.0, 0.0)}
    with pytest.raises(BrokenRowsError, match=r"rows\.jsonl:[12]: .*gone\.png"):
        make([None, None], max_broken=100, **given).take(1, STAGES["any"])


def test_mistakes_of_the_program_are_not_called_missing_rows(make, monkeypatch):
    prompts = make()
    monkeypatch.setattr(prompts.encoder, "prepare", lambda *arguments, **more: {}["size"])
    with pytest.raises(KeyError, match="size"):
        prompts.take(1, STAGES["any"])
