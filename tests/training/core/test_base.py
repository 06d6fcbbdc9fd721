"""A frozen base in fewer bits: sizes, gradients, what is kept for the backward, and what is refused."""

import dataclasses
import importlib.util

import mesh_worker
import pytest
import torch
from frozen_bases import CPU, backward, linears, needs, with_base
from torch.autograd.graph import saved_tensors_hooks

from uniref_fast import PackedQwenImage
from uniref_fast.training.core import base as bases
from uniref_fast.training.core.base import LIBRARIES, QUANTISED, base_bytes, check_base
from uniref_fast.training.core.distributed import shard
from uniref_fast.training.core.frozen_base import (
    FrozenLinear,
    quantise_base,
    quantised_parameters,
    stored_bytes,
)
from uniref_fast.training.core.suitability import check_suitability
from uniref_fast.training.supervised.recipes import tiny

pytestmark = pytest.mark.usefixtures("threads")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", ["bf16", *QUANTISED])
def test_gradients_are_those_of_the_values_that_the_weights_stand_for(base, checkpointing):
    """Bit for bit, except with torchao, which multiplies by the scales, or adds the bias, after the product."""
    model, plain = (PackedQwenImage(one, checkpointing=checkpointing, for_training=True) for one in with_base(base))
    velocity, gradients = backward(model)
    expected, plain_gradients = backward(plain)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 20
    if LIBRARIES.get(base) == "torchao":
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, plain_gradients, rtol=1e-4, atol=1e-6)
    else:
        assert torch.equal(velocity, expected)
        assert [name for name, each in gradients.items() if not torch.equal(each, plain_gradients[name])] == []


@pytest.mark.parametrize("base", QUANTISED)
def test_a_validation_between_two_steps_changes_nothing(base):
    """Bitsandbytes would pack the weights for a kernel without gradients, on a CPU with bfloat16 instructions."""
    packed = PackedQwenImage(with_base(base)[0], for_training=True)
    first, gradients = backward(packed.train())
    batch = mesh_worker.make_batch(0)
    with torch.no_grad():
        assert torch.equal(packed.eval()(batch.image, batch.text, batch.t, batch.layout), first)
    again, later = backward(packed.train())
    assert torch.equal(again, first)
    assert gradients.keys() == later.keys() and all(torch.equal(later[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("base", ["bf16", *QUANTISED])
def test_no_weight_is_kept_for_the_backward(base):
    """Autograd would keep the dequantised weights of every layer, which take the memory that the base saves."""
    model = PackedQwenImage(with_base(base)[0], for_training=True)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        batch = mesh_worker.make_batch(0)
        model(batch.image, batch.text, batch.t, batch.layout)
    width = mesh_worker.SHAPE["attention_head_dim"] * mesh_worker.SHAPE["num_attention_heads"]
    assert kept and not [t.shape for t in kept if min(t.shape, default=0) >= width and t.is_floating_point()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["bf16", *QUANTISED])
def test_sizes_are_those_of_the_stored_weights(base, dtype):
    needs(base)
    model = mesh_worker.make_model(dtype)
    sides = [layer.weight.shape for _, layer in linears(model)]
    quantise_base(model, base, dtype, CPU)
    stored = stored_bytes(layer.weight for _, layer in linears(model))
    assert stored == sum(base_bytes(base, *each, dtype.itemsize) for each in sides)


def test_only_the_layers_of_blocks_are_quantised():
    needs("int8")
    model = mesh_worker.make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantise_base(model, "int8", torch.float32, CPU)
    found = set(quantised_parameters(model))
    assert found == {layer.weight for _, layer in linears(model)}
    assert all(isinstance(layer, FrozenLinear) for _, layer in linears(model))
    rest = {name: p for name, p in model.named_parameters() if p not in found}
    assert all(torch.equal(p, before[name]) for name, p in rest.items()) and "proj_out.weight" in rest


def test_sharding_leaves_packed_values_and_their_scales_as_they_are(ranks):
    """FSDP2 would cast 4-bit values to the dtype of the computation, and lose the scales of its parts of them."""
    model, plain = with_base("nf4", torch.bfloat16)
    packed = PackedQwenImage(model, for_training=True)
    before = {id(p): p.detach().clone() for p in quantised_parameters(packed)}
    whole = [*quantised_parameters(packed)]
    shard(packed, ranks, torch.bfloat16, whole)
    weight = model.transformer_blocks[0].attn.to_q.base_layer.weight
    assert weight.quant_state is not None and weight.dtype == torch.uint8
    assert all(torch.equal(p, before[id(p)]) for p in whole) and len(whole) == 42
    found, gradients = backward(packed, dtype=torch.bfloat16)
    expected, plain_gradients = backward(PackedQwenImage(plain, for_training=True), dtype=torch.bfloat16)
    assert torch.equal(found, expected)
    for name, each in gradients.items():
        assert torch.equal(each.full_tensor(), plain_gradients[name].float()), name


@pytest.fixture
def ranks():
    from uniref_fast.training.core.distributed import Ranks

    yield Ranks.start()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("base", ["bf16", *QUANTISED])
def test_a_base_needs_an_adapter(base):
    with pytest.raises(ValueError, match=f"base = {base} .* trains all weights; give --lora-rank"):
        check_base(dataclasses.replace(tiny(), base=base))


@pytest.mark.parametrize("base", QUANTISED)
def test_a_missing_library_is_named_before_anything_is_loaded(base, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == LIBRARIES[base] else find(name))
    monkeypatch.setattr("uniref_fast.loading.configuration", lambda name: pytest.fail("read before the check"))
    config = dataclasses.replace(tiny(), base=base, lora_rank=4)
    with pytest.raises(ValueError, match=f"base = {base} needs the library {LIBRARIES[base]}, .* pip install"):
        check_suitability(config, 1)
    check_base(config)  # a plan needs no library
    assert bases.QUANTISED == ("int8", "fp8", "nf4")
