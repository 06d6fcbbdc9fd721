"""Values kept with immutable objects."""

import gc
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from torch import func

from uniref_fast.memo import memo, memoised


@dataclass(frozen=True)
class Owner:
    size: int


def table(owner, device, factor=1):
    calls.append(owner)
    return factor * torch.arange(owner.size, device=device)


def other_table(owner, device):
    return torch.zeros(owner.size, device=device)


calls = []


def test_a_value_is_computed_once_for_each_function_and_arguments():
    owner = Owner(3)
    calls.clear()
    kept = memo(owner, table, torch.device("cpu"))
    assert memo(owner, table, torch.device("cpu")) is kept and len(calls) == 1
    assert memo(owner, table, torch.device("cpu"), 2).tolist() == [0, 2, 4]
    assert memo(owner, table, torch.device("meta")).device.type == "meta"
    assert memo(owner, other_table, torch.device("cpu")).tolist() == [0, 0, 0]
    assert len(calls) == 3 and len(memoised(owner)) == 4
    assert (table, torch.device("cpu"), 2) in memoised(owner)


def test_values_belong_to_one_object_and_are_freed_with_it():
    owner = Owner(3)
    kept = weakref.ref(memo(owner, table, torch.device("cpu")))
    assert owner == Owner(3) and hash(owner) == hash(Owner(3))
    assert not memoised(Owner(3)) and not memoised(replace(owner))
    del owner
    calls.clear()
    gc.collect()
    assert kept() is None


def test_a_value_from_inference_mode_serves_training():
    owner = Owner(3)
    with torch.inference_mode():
        kept = memo(owner, other_table, torch.device("cpu"))
    assert not kept.is_inference()
    (kept * torch.ones(3, requires_grad=True)).sum().backward()


def test_a_value_from_inside_a_transform_is_not_stored():
    owner = Owner(3)
    func.grad(lambda x: (x * memo(owner, other_table, torch.device("cpu"))).sum())(torch.ones(3))
    assert not memoised(owner)


def test_torch_compile_traces_through_it():
    owner = Owner(3)
    add = torch.compile(lambda x: x + memo(owner, other_table, x.device), backend="eager", fullgraph=True)
    assert torch.equal(add(torch.ones(3)), torch.ones(3)) and torch.equal(add(torch.ones(3)), torch.ones(3))
    assert not any(type(value) is not torch.Tensor for value in memoised(owner).values())
    torch._dynamo.reset()


def test_an_error_stores_nothing():
    def fails(owner):
        raise ValueError("no table")

    owner = Owner(3)
    with pytest.raises(ValueError, match="no table"):
        memo(owner, fails)
    assert not memoised(owner)
