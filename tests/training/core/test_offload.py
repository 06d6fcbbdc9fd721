"""Blocks of the base on the host: they are back whenever they are used, also in the backward and in recomputation."""

import dataclasses

import mesh_worker
import pytest
import torch
from frozen_bases import CPU, backward, needs, with_base

from uniref_fast import PackedQwenImage
from uniref_fast.training.core.base import QUANTISED, check_base, offloaded_blocks
from uniref_fast.training.core.distributed import Ranks, shard
from uniref_fast.training.core.frozen_base import quantise_base, quantised_parameters, stored_bytes
from uniref_fast.training.core.offload import BlockWeights, Offloading
from uniref_fast.training.core.suitability import check_suitability
from uniref_fast.training.supervised.recipes import tiny

pytestmark = pytest.mark.usefixtures("threads")
KINDS = (None, "bf16", *QUANTISED)


@pytest.fixture
def poisoned(monkeypatch):
    """Absent weights have all bits set, which is NaN in every dtype of floats, instead of having no storage."""
    monkeypatch.setattr(BlockWeights, "_free", staticmethod(poison))
    monkeypatch.setattr(BlockWeights, "_allocate", staticmethod(poison))


def poison(tensor, size=None):
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)


def offloaded(model, blocks, checkpointing=False, device=CPU):
    packed = PackedQwenImage(model, for_training=True, checkpointing=checkpointing)
    return packed, Offloading({number: packed.blocks[number] for number in blocks}, device)


def model_on(base):
    """Return a model of three blocks with an adapter."""
    if base is None:
        model = mesh_worker.make_model()
        mesh_worker.add_adapter(model)
        return model
    return with_base(base)[0]


def equal(first, second):
    return (
        torch.equal(first[0], second[0])
        and first[1].keys() == second[1].keys()
        and all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", [None, "int8", "nf4"])
@pytest.mark.parametrize("blocks", [(1,), (0, 1, 2)])
def test_gradients_are_the_same_bit_for_bit(poisoned, base, checkpointing, blocks):
    needs(base)
    plain = PackedQwenImage(model_on(base), for_training=True, checkpointing=checkpointing)
    packed, _ = offloaded(model_on(base), blocks, checkpointing)
    for number in (0, 1):  # later steps begin with what the backward before has left
        assert equal(backward(packed, number), backward(plain, number))


def test_a_forward_without_gradients_between_forward_and_backward(poisoned):
    """The backward brings back what the other forward has released."""
    packed, _ = offloaded(model_on(None), (0, 1))
    batch = mesh_worker.make_batch(0)
    given = batch.image, batch.text, batch.t, batch.layout
    expected, gradients = backward(PackedQwenImage(model_on(None), for_training=True))
    velocity = packed(*given)
    with torch.no_grad():
        assert torch.equal(packed(*given), expected)
    torch.autograd.backward(velocity, torch.autograd.grad(loss(velocity, batch), velocity))
    found = {name: p.grad for name, p in packed.transformer.named_parameters() if p.grad is not None}
    assert equal((velocity, found), (expected, gradients))


def loss(velocity, batch):
    from uniref_fast.training.supervised.flow_matching import sample_errors

    return sample_errors(velocity, batch).sum()


@pytest.mark.parametrize("base", KINDS)
def test_two_blocks_are_on_the_device_at_most(base, monkeypatch):
    """Absent weights have no storage; the next block is fetched before its turn, in the forward and in the backward."""
    needs(base)
    packed, offloading = offloaded(model_on(base), (0, 1, 2), checkpointing=True)
    weights, seen, use = [*offloading._weights.values()], [], Offloading._use

    def used(self, number, direction):
        ahead = weights[number].present
        use(self, number, direction)
        stored = [stored_bytes(each.parameters) for each in weights]
        assert stored == [each.nbytes if each.present else 0 for each in weights]
        seen.append((number, direction, ahead, [i for i, each in enumerate(weights) if each.present]))

    monkeypatch.setattr(Offloading, "_use", used)
    assert not any(each.present for each in weights)
    backward(packed)
    assert seen[:3] == [(0, 1, False, [0, 1]), (1, 1, True, [1, 2]), (2, 1, True, [2])]
    assert list(dict.fromkeys((n, d, tuple(p)) for n, d, _, p in seen[3:])) == [
        (2, -1, (1, 2)), (1, -1, (0, 1)), (0, -1, (0,)),
    ]  # fmt: skip
    assert all(ahead for *_, ahead, _ in seen[1:])
    assert offloading.device_bytes == sum(sorted(each.nbytes for each in weights)[-2:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", [None, "int8", "nf4"])
def test_copies_on_a_stream_arrive_before_they_are_used(base, checkpointing):
    needs(base)
    device = torch.device("cuda")
    plain, model = model_on(base).to(device), model_on(base).to(device)
    expected = backward(PackedQwenImage(plain, for_training=True, checkpointing=checkpointing), device=device)
    packed, _ = offloaded(model, (0, 1, 2), checkpointing, device)
    for _ in range(3):
        assert equal(backward(packed, device=device), expected)


@pytest.mark.parametrize("base", KINDS)
def test_sharded_models_too(poisoned, ranks, base):
    """FSDP2 keeps the rest of a block, whose own hooks run at the same places."""
    needs(base)
    dtype = torch.bfloat16
    model = mesh_worker.make_model(dtype)
    model.requires_grad_(False)
    if base is not None:
        quantise_base(model, base, dtype, CPU, host=(0, 2))
    mesh_worker.add_adapter(model)
    plain = mesh_worker.make_model(dtype)
    if base is not None:
        quantise_base(plain, base, dtype, CPU)
    mesh_worker.add_adapter(plain)
    expected, plain_gradients = backward(PackedQwenImage(plain, for_training=True, checkpointing=True), dtype=dtype)
    packed, offloading = offloaded(model, (0, 2), checkpointing=True)
    resident = [p for p in quantised_parameters(packed) if not any(p is other for other in offloading.parameters)]
    shard(packed, ranks, dtype, [*resident, *offloading.parameters])
    for _ in range(2):
        velocity, gradients = backward(packed, dtype=dtype)
        assert torch.equal(velocity, expected) and gradients.keys() == plain_gradients.keys()
        for name, each in gradients.items():
            assert torch.equal(each.full_tensor(), plain_gradients[name].to(each.dtype)), name


@pytest.fixture
def ranks():
    yield Ranks.start()
    torch.distributed.destroy_process_group()


def test_blocks_on_the_host_lie_between_the_others():
    assert offloaded_blocks(60, 0) == () and offloaded_blocks(60, 60) == tuple(range(60))
    assert offloaded_blocks(60, 20) == tuple(range(1, 60, 3)) and offloaded_blocks(3, 1) == (1,)
    assert len(set(offloaded_blocks(60, 47))) == 47 and max(offloaded_blocks(60, 47)) == 59


def test_refusals():
    config = dataclasses.replace(tiny(), offload_blocks=2)
    with pytest.raises(ValueError, match="offload_blocks = 2 moves frozen weights, and this run trains all weights"):
        check_base(config)
    many = dataclasses.replace(config, lora_rank=4, offload_blocks=99)
    with pytest.raises(ValueError, match="offload_blocks = 99 is more than the 4 blocks of the model"):
        check_suitability(many, 1)
    with pytest.raises(ValueError, match="offload_blocks must be at least 0"):
        dataclasses.replace(config, offload_blocks=-1)
