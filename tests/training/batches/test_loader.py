"""Packs step after step: the same on any number of ranks, the same after an interruption, broken rows named."""

import json

import numpy as np
import pytest
from PIL import Image

from uniref_fast.data.dataset import BrokenRowsError, Dataset
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.loader import PackLoader
from uniref_fast.training.batches.packing import CostModel, assign
from uniref_fast.training.batches.rows import check_same_rows
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.supervised.recipes import SFT

ROWS = 24
STEPS = 6
COSTS = CostModel(1.0, 0.01, 5.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        size = (int(rng.integers(20, 130)), int(rng.integers(20, 130)))
        Image.new("RGB", size, (i * 30, 0, 0)).save(folder / f"{i}.png")
    return folder


def rows_of(count=ROWS):
    return [
        {
            "input_images": [f"{(i + j) % 8}.png" for j in range(i % 4)],
            "output_image": f"{(i * 3) % 8}.png",
            "instruction": "word " * (1 + i % 5),
        }
        for i in range(count)
    ]


def write(folder, rows, pictures, name="rows.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return Dataset(folder / name, pictures)


@pytest.fixture
def dataset(tmp_path, pictures):
    return write(tmp_path, rows_of(), pictures)


# The second stage has other sizes, so what waits at its beginning gets other lengths.
STAGES = (
    BudgetStage(48, 3, 1e-3, target_side=32, pack_tokens=200),
    BudgetStage(64, 3, 1e-3, target_side=48, pack_tokens=320),
)


class Remembering(Encoder):
    """Sizes depend on what is given alone, so dozens of loaders over the same rows may share them."""

    known: dict = {}  # noqa: RUF012

    def prepare(self, row, key, budget, target_side):
        given = (row, key, budget, target_side, self.seed, self.drop_text, self.drop_references)
        if given not in self.known:
            self.known[given] = super().prepare(row, key, budget, target_side)
        return self.known[given]


@pytest.fixture
def feed(builtin_pipe):
    """Makes loaders, and closes them."""
    made = []

    def build(dataset, rank=0, ranks=1, state=None, stages=STAGES, **fields):
        config = SFT(stages, **{"data": ("x",), "packs": 4, "steps": STEPS, "workers": 2, **fields})
        encoder = Remembering(builtin_pipe, TensorCache(None), config.seed, config.drop_text, config.drop_references)
        plans = [MemoryPlan(stage.pack_tokens, 1, False, 0, "") for stage in stages]
        loader = PackLoader(dataset, encoder, config, plans, COSTS, lambda packs, n: assign(packs, ranks)[rank], state)
        made.append(loader)
        return loader

    yield build
    for loader in made:
        loader.close()


def keys_of(step_packs):
    return [[item.key for item in pack.items] for pack in step_packs.packs]


def given(loader, steps=range(STEPS)):
    """(keys, samples) of every pack of the steps."""
    taken = [loader.next(step) for step in steps]
    return [(keys_of(packs), [pack.samples for pack in packs.packs]) for packs in taken]


# ---- the same packs ----


@pytest.mark.parametrize("ranks", [2, 4])
def test_packs_do_not_depend_on_ranks_and_are_shared_out_whole(dataset, feed, ranks):
    loaders = [feed(dataset, rank, ranks) for rank in range(ranks)]
    alone = feed(dataset)
    for step in range(STEPS):
        expected, mine = alone.next(step), []
        for loader in loaders:
            packs = loader.next(step)
            assert packs.packs == expected.packs, "the same packs, in the same order"
            own = {item.key for number in packs.mine for item in packs.packs[number].items}
            assert set(packs.prepared) == set(packs.images) == own, "only its own rows are read"
            assert len(packs.mine) == 4 // ranks
            mine += packs.mine
            for key, prepared in packs.prepared.items():
                assert prepared.sample == next(
                    item.sample for pack in packs.packs for item in pack.items if item.key == key
                )
        assert sorted(mine) == list(range(4))
        assert loaders[0].state() == loaders[-1].state() == alone.state()


def test_packs_are_filled_from_the_stream_and_no_row_is_lost_or_repeated(dataset, feed):
    loader = feed(dataset)
    seen = [key for keys, _ in given(loader) for pack in keys for key in pack]
    assert len(seen) == len(set(seen)), "(epoch, index) once"
    waiting = {tuple(key) for key in loader.state()["waiting"]}
    assert not waiting & set(seen)
    epochs = {epoch for epoch, _ in seen}
    for epoch in range(max(epochs)):  # those that the stream has left behind
        assert sorted(i for e, i in set(seen) | waiting if e == epoch) == list(range(ROWS))
    stage_of = [0] * 3 + [1] * 3
    for (_, samples), stage in zip(given(feed(dataset)), stage_of, strict=True):
        for pack in samples:
            assert 0 < sum(sample.length for sample in pack) <= STAGES[stage].pack_tokens


def test_a_stage_prepares_what_waits_anew(dataset, feed):
    loader = feed(dataset)
    for step in range(STEPS):
        packs = loader.next(step)
        stage = STAGES[step // 3]
        for prepared in packs.prepared.values():
            assert np.prod(prepared.geometry.size) <= stage.target_side**2
            assert sum(w * h for w, h in prepared.geometry.reference_sizes) <= stage.budget**2
    assert any(np.prod(p.geometry.size) > STAGES[0].target_side ** 2 for p in packs.prepared.values())


def test_pictures_are_read_ahead(dataset, feed):
    packs = feed(dataset).next(0)
    for key, future in packs.images.items():
        target, references, _ = future.result(timeout=20)
        row = dataset[key[1]]
        assert target.size == row.target.size()
        assert len(references) == (0 if packs.prepared[key].dropped else len(row.references))


def test_what_is_dropped_follows_the_key_not_the_stage(dataset, feed):
    """A sample that waits over the change of stages keeps its choice."""
    fields = {"drop_text": 0.5, "drop_references": 0.5}
    first = {key: p for step in range(3) for key, p in [*_prepared(feed(dataset, **fields), step)]}
    only_second = feed(dataset, stages=(STAGES[1],), **fields)
    both = [(first[key], p) for step in range(3) for key, p in _prepared(only_second, step) if key in first]
    assert len(both) > 10 and any(p.dropped for p, _ in both) and not all(p.dropped for p, _ in both)
    assert all((a.dropped, a.instruction) == (b.dropped, b.instruction) for a, b in both)


def _prepared(loader, last):
    for step in range(last):
        loader.next(step)
    return list(loader.next(last).prepared.items())


# ---- resuming ----


@pytest.mark.parametrize("done", range(1, STEPS))
def test_a_state_continues_with_exactly_the_same_packs(dataset, feed, done):
    """Interrupt at every step, also right before and after the change of stages, and resume with other ranks."""
    whole = given(feed(dataset))
    first = feed(dataset, rank=1, ranks=2)
    assert given(first, range(done)) == whole[:done]
    state = json.loads(json.dumps(first.state()))
    assert first.state() == first.state(), "asking changes nothing"
    resumed = feed(dataset, rank=3, ranks=4, state=state)
    assert resumed.state() == state
    assert given(resumed, range(done, STEPS)) == whole[done:]


def test_states_chain(dataset, feed):
    whole, state, taken = given(feed(dataset)), None, []
    for step in range(STEPS):
        loader = feed(dataset, state=state)
        taken += given(loader, [step])
        state = json.loads(json.dumps(loader.state()))
    assert taken == whole


def test_a_state_from_before_the_first_step(dataset, feed):
    assert given(feed(dataset, state=feed(dataset).state())) == given(feed(dataset))


def test_the_state_does_not_grow(dataset, feed):
    loader = feed(dataset)
    sizes = []
    for step in range(STEPS):
        loader.next(step)
        sizes.append(len(loader.state()["waiting"]))
    assert max(sizes) < 80 and len(json.dumps(loader.state())) < 2000


def test_the_state_of_other_data_is_refused(dataset, feed, tmp_path, pictures):
    loader = feed(dataset)
    loader.next(0)
    more = write(tmp_path, rows_of(ROWS + 1), pictures, "rows.jsonl")
    with pytest.raises(ValueError, match="this run was trained on other data so far; give the same files"):
        feed(more, state=loader.state())


def test_the_state_of_another_seed_is_refused(dataset, feed):
    loader = feed(dataset)
    loader.next(0)
    with pytest.raises(ValueError, match="seed"):
        feed(dataset, state=loader.state(), seed=1)


# ---- broken rows ----


def broken_rows():
    """(rows, places of the broken ones with what is said of them)."""
    rows = rows_of()
    rows[3]["input_images"] = ["0.png", "gone.png"]
    rows[7] = '{"input_images": [], "output_image": '
    rows[11]["output_image"] = "text.png"
    rows[13]["instruction"] = "very long " * 400
    rows[17].pop("output_image")
    return rows, {"rows.jsonl:4": "gone.png", "rows.jsonl:8": "", "rows.jsonl:12": "text.png",
                  "rows.jsonl:14": "over the 200 of a pack", "rows.jsonl:18": "target"}  # fmt: skip


@pytest.fixture
def damaged(tmp_path, pictures):
    (pictures / "text.png").write_text("no picture")
    return write(tmp_path, broken_rows()[0], pictures)


def test_broken_rows_are_counted_and_named_and_the_others_are_used(damaged, feed):
    loader = feed(damaged)
    taken = [loader.next(step) for step in range(3)]
    found = [row for packs in taken for row in packs.broken]
    assert len(loader.rows.broken) == 5 < len(found), "a row that comes again in the next epoch counts once"
    reasons = broken_rows()[1]
    assert {where for where, _ in found} == set(reasons)
    for where, reason in found:
        assert reasons[where] in reason and not reason.startswith(where), "the place is said once"
    indices = {int(where.split(":")[1]) - 1 for where in reasons}
    for packs in taken:
        assert len(packs.packs) == 4 and all(pack.items for pack in packs.packs)
        assert not {item.key[1] for pack in packs.packs for item in pack.items} & indices
    seen = {item.key for packs in taken for pack in packs.packs for item in pack.items}
    assert {i for epoch, i in seen if epoch == 0} == set(range(ROWS)) - indices


def test_broken_rows_are_the_same_on_all_ranks(damaged, feed):
    first, second = feed(damaged, 0, 2), feed(damaged, 1, 2)
    for step in range(STEPS):
        assert first.next(step).broken == second.next(step).broken
    assert len(first.rows.broken) == len(second.rows.broken) == 5


@pytest.mark.parametrize("done", range(1, STEPS))
def test_the_count_is_neither_lost_nor_doubled_by_an_interruption(damaged, feed, done):
    """A resumed run plans the step ahead again, with its broken rows; rows that the trainer counted are kept."""
    first = feed(damaged)
    for step in range(done):
        packs = first.next(step)
    lost = [("rows.jsonl:1", "a picture that could not be decoded"), ("rows.jsonl:2", "another")]
    first.rows.count_broken(packs.broken + lost, new=2)
    assert len(first.rows.broken) == 7
    resumed = feed(damaged, state=json.loads(json.dumps(first.state())))
    for step in range(done, STEPS):
        resumed.next(step)
    assert len(resumed.rows.broken) == 7


def test_only_the_last_rows_are_new(dataset, feed):
    """The trainer hands on those of the plan, which are counted, with those it met itself."""
    loader = feed(dataset)
    rows = [(f"rows.jsonl:{i}", "x") for i in range(1, 6)]
    loader.rows.count_broken(rows, new=0)
    assert len(loader.rows.broken) == 0
    loader.rows.count_broken(rows, new=2)
    loader.rows.count_broken(rows, new=2)
    assert len(loader.rows.broken) == 2 and loader.state()["broken"] == ["rows.jsonl:4", "rows.jsonl:5"]


def test_a_row_that_fits_the_first_stage_alone_is_named_at_the_second(tmp_path, pictures, feed):
    dataset = write(tmp_path, rows_of(), pictures)
    stages = (STAGES[0], BudgetStage(64, 3, 1e-3, target_side=64, pack_tokens=90))
    loader = feed(dataset, stages=stages, packs=2)
    taken = [loader.next(step) for step in range(STEPS)]
    assert not any(packs.broken for packs in taken[:3])
    reasons = [reason for packs in taken[3:] for _, reason in packs.broken]
    assert reasons and all("over the 90 of a pack" in reason for reason in reasons)
    assert all(pack.tokens <= 90 for packs in taken[3:] for pack in packs.packs)


def test_too_many_broken_rows_end_the_run_with_the_last_named(damaged, feed):
    loader = feed(damaged, max_broken=4)
    with pytest.raises(
        BrokenRowsError, match=r"^5 rows could not be used, over max_broken = 4; the last: .*rows.jsonl:\d+: "
    ):
        for step in range(STEPS):
            loader.next(step)
    patient = feed(damaged, max_broken=5)
    assert len(given(patient)) == STEPS


def test_the_limit_holds_over_interruptions(damaged, feed):
    loader = feed(damaged, max_broken=6)
    loader.next(0)
    loader.rows.count_broken([("rows.jsonl:1", "x")], new=1)
    resumed = feed(damaged, state=loader.state(), max_broken=6)
    resumed.next(1)
    with pytest.raises(
        BrokenRowsError, match=r"7 rows could not be used, over max_broken = 6; the last: rows.jsonl:2: y"
    ):
        resumed.rows.count_broken([("rows.jsonl:2", "y")], new=1)


@pytest.mark.parametrize("limit, reason", [(100, "all of them"), (5, "over max_broken = 5")])
def test_data_of_broken_rows_alone_ends_the_run(tmp_path, pictures, feed, limit, reason):
    rows = rows_of(6)
    for row in rows:
        row["output_image"] = "gone.png"
    with pytest.raises(BrokenRowsError, match=f"6 rows could not be used, {reason}; the last: rows.jsonl"):
        feed(write(tmp_path, rows, pictures), max_broken=limit).next(0)


def test_less_data_than_a_step_needs_is_repeated(tmp_path, pictures, feed):
    loader = feed(write(tmp_path, rows_of(2), pictures))
    seen = [key for keys, _ in given(loader) for pack in keys for key in pack]
    assert len(set(seen)) == len(seen) and {i for _, i in seen} == {0, 1}


def test_a_picture_that_breaks_later_is_an_error_of_its_own_future(dataset, feed, pictures, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = rows_of(8)
    for row in rows:
        row["input_images"], row["output_image"] = [], "0.png"
    rows[2]["output_image"] = "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(pictures / "cut.png")
    content = (pictures / "cut.png").read_bytes()
    (pictures / "cut.png").write_bytes(content[: len(content) // 2])
    loader = feed(write(tmp_path / "rows", rows, pictures))
    packs = loader.next(0)
    outcomes = {key[1]: future.exception(timeout=20) for key, future in packs.images.items()}
    assert outcomes[2] is not None and "cut.png" in str(outcomes[2]) and isinstance(outcomes[2], ValueError)
    assert all(error is None for index, error in outcomes.items() if index != 2) and not packs.broken


# ---- ranks that read unlike rows ----


def test_ranks_that_plan_different_rows_are_refused():
    keys, broken = [(0, 1), (0, 2)], [("rows.jsonl:4", "cannot be opened")]
    check_same_rows([(keys, broken), (list(keys), broken)])
    with pytest.raises(BrokenRowsError, match=r"rank 1: rows\.jsonl:4: cannot be opened"):
        check_same_rows([([(0, 1), (0, 3)], []), (keys, broken)])
    with pytest.raises(BrokenRowsError, match="none; an earlier step had one"):
        check_same_rows([(keys, []), (keys, []), (keys[::-1], [])])


def test_rows_that_never_come_do_not_hide_that_all_others_are_broken(tmp_path, feed):
    for name, picture in (("bad", "gone.png"), ("good", "there.png")):
        row = {"input_images": [picture], "output_image": picture, "instruction": "x"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "there.png")
    paths = tuple(str(tmp_path / f"{name}.jsonl") for name in ("bad", "good"))
    loader = feed(Dataset(paths), data=paths, weights=(1.0, 0.0))
    with pytest.raises(BrokenRowsError, match="all of them"):
        loader.next(0)
