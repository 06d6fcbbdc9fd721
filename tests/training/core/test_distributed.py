"""Sharding and sequence parallelism: loss and gradients of several ranks against one rank without either."""

import os
import subprocess
import sys
from pathlib import Path

import mesh_worker
import pytest
import torch
import warm
from safetensors.torch import load_file

from uniref_fast import PackedQwenImage
from uniref_fast.models.sequence_parallel import SequenceParallel
from uniref_fast.testing import assert_within_budget, max_relative_error
from uniref_fast.training.core.base import QUANTISED
from uniref_fast.training.core.frozen_base import dequantised, quantise_base
from uniref_fast.training.supervised.flow_matching import sample_errors

pytestmark = pytest.mark.slow

WORKER = Path(__file__).resolve().parents[2] / "helpers" / "mesh_worker.py"
# Where rows are cut, for two and for three ranks: even parts; uneven ones; an empty part at the beginning, in the
# middle and at the end; one rank that has all; one row.
BOUNDS = ("0-4-8", "0-2-7", "0-6-7", "0-0-1", "0-5-5", "0-2-4-6", "0-1-6-9", "0-0-2-5", "0-3-3-4", "0-1-4-4", "0-0-7-7")
FROZEN_CASES = ("1-kept-nf4", "2-recomputed-nf4.host", "1-recomputed-int8.host", "2-kept-fp8", "1-kept-lora.host")
ADAPTER_CASES = ("1-recomputed-dora", "2-kept-dora.host", "1-kept-lokr", "2-recomputed-lokr")

KEPT_CASES = ("references-2-full", "references-4-full", "references-2-reference_causal")


def run_ranks(count: int, folder: Path, *cases: str) -> dict[str, dict[str, torch.Tensor]]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # on the CPU everywhere: a machine may have one GPU
    warm.run_ranks(count, WORKER, folder, *cases, env=environment)
    one_file = [case for case in cases if not case.startswith(("rows", "references"))]  # the others have one each rank
    return {case: load_file(folder / f"{count}-{case}.safetensors") for case in one_file}


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    """Return a folder and the results of four ranks, which several tests share."""
    folder = tmp_path_factory.mktemp("four")
    more = [*(f"rows-{bounds}" for bounds in BOUNDS), *KEPT_CASES]
    return folder, run_ranks(4, folder, "2-kept-full", "2-host-lora", *more)


def alone(dtype: torch.dtype, kind: str) -> dict[str, torch.Tensor]:
    """Loss, norm and gradients without any sharding; of a quantised base, with the values that its weights stand for.

    With plain Linears, so that neither the library of the quantised ones nor their gradient has a part in it.
    """
    model = mesh_worker.make_model()
    if kind in QUANTISED:
        quantised = mesh_worker.make_model()
        quantise_base(quantised, kind, torch.float32, torch.device("cpu"))
        for name, layer in quantised.transformer_blocks.named_modules():
            if isinstance(layer, torch.nn.Linear):
                plain = model.transformer_blocks.get_submodule(name)
                plain.weight.data = dequantised(layer.weight, torch.float32)
    if kind != "full":
        mesh_worker.add_adapter(model, kind)
    packed = PackedQwenImage(model.to(dtype), impl="reference" if dtype == torch.float64 else None)
    loss = 0.0
    for number in range(len(mesh_worker.PACKS)):
        batch = mesh_worker.make_batch(number, dtype)
        # in the dtype of the oracle: `sample_errors` is float32
        prediction = packed(batch.image, batch.text, batch.t, batch.layout)
        squares = (prediction - batch.velocity).square().mean(1)
        part = sum(each.mean() for each in squares.split([s.length for s in batch.layout.targets])) / 3
        if dtype == torch.float32:
            torch.testing.assert_close(part, sample_errors(prediction, batch).sum() / 3)
        part.backward()
        loss += part.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().to(dtype)
    return {"loss": loss, "norm": norm, **gradients}


def test_gradients_equal_one_rank(tmp_path, four_ranks):
    """Data parallel x sequence parallel in {1x1, 2x1, 1x2, 2x2}; the sharing changes within one run of the ranks.

    With a quantised base too, whose packed values FSDP2 would otherwise cast and cut into parts without their scales,
    and with blocks on the host.
    """
    runs = {
        1: run_ranks(1, tmp_path, "1-kept-full", "1-recomputed-full", "1-kept-nf4", "1-kept-int8"),
        2: run_ranks(2, tmp_path, "1-kept-full", "2-kept-full", "2-recomputed-full", *ADAPTER_CASES, *FROZEN_CASES),
        4: four_ranks[1],
    }
    expected = {kind: [alone(dtype, kind) for dtype in (torch.float32, torch.float64)]
                for kind in ("full", "lora", "dora", "lokr", *QUANTISED)}  # fmt: skip
    for size, results in runs.items():
        for case, result in results.items():
            eager, oracle = expected[case.rsplit("-", 1)[1].removesuffix(".host")]
            assert set(result) == set(oracle)
            for name, value in result.items():
                slack = 1.1 if "dora" in case else 1.0  # magnitudes: one value of 128 was 1 % over the budget
                base = oracle[name] + slack * (eager[name].double() - oracle[name])
                assert_within_budget(value, base.to(value.dtype), oracle[name], f"{size} ranks, {case}: {name}")
    single, double = (runs[size]["1-kept-full"] for size in (1, 2))
    assert [name for name in single if not torch.equal(single[name], double[name])] == [], "a sum of two packs is exact"


@pytest.mark.parametrize("bounds", BOUNDS)
def test_gathered_rows(four_ranks, bounds):
    """All rows in their order on every rank; each keeps the gradient of its own part of them."""
    cuts = [int(bound) for bound in bounds.split("-")]
    rows = mesh_worker.all_rows(cuts[-1]).requires_grad_()
    (expected,) = torch.autograd.grad(mesh_worker.loss_of(rows), rows)
    assert expected.flatten(1).any(1).all(), "every row has a gradient"
    for rank in range(len(cuts) - 1):
        found = load_file(four_ranks[0] / f"{rank}-rows-{bounds}.safetensors")
        assert torch.equal(found["rows"], rows), f"rank {rank}"
        assert torch.equal(found["bfloat16"], mesh_worker.all_rows(cuts[-1], torch.bfloat16)), f"rank {rank}"
        mine = torch.zeros_like(expected)
        mine[cuts[rank] : cuts[rank + 1]] = expected[cuts[rank] : cuts[rank + 1]]
        torch.testing.assert_close(found["gradient"], mine)


@pytest.mark.parametrize("case", KEPT_CASES)
def test_kept_references_of_some_heads(four_ranks, case):
    """Each rank keeps its heads; velocities, drift and the steps that compute the references are those of one rank."""
    _, size, visibility = case.split("-")
    expected = mesh_worker.kept_steps(PackedQwenImage(mesh_worker.make_model(), visibility=visibility))
    refreshed = [len(value) for name, value in expected.items() if "refreshed" in name]
    assert max(refreshed) < mesh_worker.STEPS and (visibility != "full" or len({*refreshed}) > 2)
    for rank in range(4):
        found = load_file(four_ranks[0] / f"{rank}-{case}.safetensors")
        assert set(found) == set(expected)
        for name, value in found.items():
            value = value * int(size) if "nbytes" in name else value
            assert value.shape == expected[name].shape, f"rank {rank}: {name}"
            if "drifts" in name:
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=0)
            elif value.dtype == torch.int64:
                assert torch.equal(value, expected[name]), f"rank {rank}: {name}"
            else:
                assert max_relative_error(value, expected[name]) < 1e-5, f"rank {rank}: {name}"


class FakeGroup:
    """Enough of a process group to ask for its size."""


@pytest.mark.parametrize(("heads", "size", "possible"), [(24, 5, "1, 2, 3, 4, 6, 8, 12, 24"), (4, 3, "1, 2, 4")])
def test_heads_that_do_not_divide(heads, size, possible, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    with pytest.raises(ValueError, match=rf"{heads} attention heads .* {size} ranks.*work: {possible}"):
        SequenceParallel(FakeGroup(), heads)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cuts(size, monkeypatch):
    """Every row of a stream and every target belongs to exactly one rank, more ranks than rows included."""
    from uniref_fast import Sample, SelfLayout

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    layouts = [SelfLayout.qwen(pack, zero_cond_t=True) for pack in mesh_worker.PACKS]
    layouts.append(SelfLayout.qwen([Sample(0, (1, 1, 1))]))
    for layout in layouts:
        rows, targets = [], []
        for rank in range(size):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
            parallel = SequenceParallel(FakeGroup(), 12)
            mine = parallel.rows(layout, "image")
            rows += range(mine.start, mine.stop)
            cuts = parallel.targets(layout)
            all_targets = layout.target_rows("cpu").tolist()
            own = all_targets[cuts[rank] : cuts[rank + 1]]
            assert all(mine.start <= row < mine.stop for row in own)
            targets += own
        assert rows == list(range(layout.image_length)) and targets == all_targets


def test_leaving_flushes_what_was_written_and_tears_nothing_down():
    """A process that would fail on its way out has its status all the same."""
    code = (
        "import atexit, os, sys; from uniref_fast.training.core.processes import leave; atexit.register(os.abort)\n"
        "print('written', end=''); print('said', end='', file=sys.stderr); leave(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "written") and done.stderr.endswith("said")
