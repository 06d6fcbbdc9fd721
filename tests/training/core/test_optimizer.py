"""AdamW with moments in 8 bits: close to AdamW, in a quarter of the memory, and refused where it cannot be resumed."""

import dataclasses

import pytest
import torch

from uniref_fast.training.core.launch import recorded
from uniref_fast.training.core.optimizer import check_optimizer, make_optimizer, moment_bytes, update_bytes
from uniref_fast.training.core.suitability import check_suitability
from uniref_fast.training.supervised.recipes import tiny

EIGHT = dataclasses.replace(tiny(), optimizer="adamw8bit", weight_decay=0.1)


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (64, 256), "uneven": (61, 97), "small": (5, 7), "unused": (3,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def updated(optimizer, tensors, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.groups:
            group["lr"] = 0.01 / (step + 1)
        for name, parameter in tensors.items():
            if name != "unused":
                parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.3
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in tensors.values())


def test_updates_are_close_to_those_of_adamw():
    pytest.importorskip("bitsandbytes")
    plain, eight, before = parameters(), parameters(), parameters()
    updated(make_optimizer(dataclasses.replace(EIGHT, optimizer="adamw"), plain), plain, 5)
    optimizer = make_optimizer(EIGHT, eight)
    updated(optimizer, eight, 5)
    for name, parameter in eight.items():
        moved = (plain[name] - before[name]).norm()
        assert (parameter - plain[name]).norm() <= 0.05 * moved, name
        assert moved > 0 or name == "unused"
    states = optimizer.tensors()
    assert states["exp_avg.large"].dtype == torch.uint8 and states["exp_avg.small"].dtype == torch.float32
    large = sum(tensor.nbytes for name, tensor in states.items() if name.endswith(".large"))
    assert large == moment_bytes(EIGHT, 64 * 256) < moment_bytes(tiny(), 64 * 256) / 3.9
    assert optimizer.updates() == [5, 5, 5, 0] and update_bytes(EIGHT, 100) == 0


def test_moments_are_saved_and_loaded_exactly():
    pytest.importorskip("bitsandbytes")
    whole, half = parameters(), parameters()
    updated(make_optimizer(EIGHT, whole), whole, 4)
    optimizer = make_optimizer(EIGHT, half)
    updated(optimizer, half, 2)
    again = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in half.items()}
    loaded = make_optimizer(EIGHT, again)
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    assert loaded.tensors().keys() == saved.keys()
    for name, tensor in loaded.tensors().items():
        tensor.copy_(saved[name])
    loaded.set_updates(optimizer.updates())
    updated(loaded, again, 2, first=2)
    assert all(torch.equal(again[name], parameter) for name, parameter in whole.items())


@pytest.mark.parametrize(
    ("fields", "ranks", "message"),
    [
        (
            {},
            2,
            "optimizer = adamw8bit keeps the scales of moments for the parts of one rank, .* has 2 ranks",
        ),
        ({"weight_dtype": "bfloat16"}, 1, "optimizer = adamw8bit needs --weight-dtype float32, got bfloat16"),
    ],
)
def test_what_cannot_work_is_refused(fields, ranks, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(dataclasses.replace(EIGHT, **fields), ranks)
    check_optimizer(dataclasses.replace(tiny(), **fields), ranks)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the library bitsandbytes, which is not installed: pip install"):
        check_suitability(EIGHT, 1)
    check_optimizer(EIGHT, 1)  # a plan needs no library


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_have_the_dtype_of_the_trained_weights(dtype):
    config = dataclasses.replace(tiny(), weight_dtype=dtype)
    weight = torch.nn.Parameter(torch.ones(64, 32, dtype=getattr(torch, dtype)))
    optimizer = make_optimizer(config, {"weight": weight})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = optimizer.tensors().values()
    assert {moment.dtype for moment in moments} == {weight.dtype}
    assert sum(moment.nbytes for moment in moments) == moment_bytes(config, weight.numel())


def test_a_run_of_a_version_without_the_setting_used_adamw(tmp_path):
    from uniref_fast.training.core.checkpoint import Newest

    class Alone:
        def broadcast(self, value):
            return value

    newest = Newest(10, {"config": {"lora_rank": 4}, "visibility": "full"}, [])
    assert recorded(newest, tmp_path, Alone())["optimizer"] == "adamw"
