"""Small models with an adapter on a quantised base, and their gradients."""

import dataclasses

import mesh_worker
import pytest
import torch

from uniref_fast.training.core.base import LIBRARIES
from uniref_fast.training.core.frozen_base import dequantised, quantise_base
from uniref_fast.training.supervised.flow_matching import sample_errors

CPU = torch.device("cpu")


def needs(base):
    if base in LIBRARIES:
        pytest.importorskip(LIBRARIES[base])


def with_base(base, dtype=torch.float32):
    """Return a model with an adapter on a quantised base, and one with the same adapter on the values of that base."""
    needs(base)
    model, plain = mesh_worker.make_model(dtype), mesh_worker.make_model(dtype)
    quantise_base(model, base, dtype, CPU)
    for name, layer in linears(model):
        plain.get_submodule(name).weight.data = dequantised(layer.weight, dtype)
    for one in (model, plain):
        mesh_worker.add_adapter(one)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:  # peft has rounded those of the model to the dtype of its base
            model.get_parameter(name).data = parameter.detach().clone()
    return model, plain


def linears(model):
    """Yield (name, layer) of the Linear layers of all blocks of a model without an adapter."""
    blocks = model.transformer_blocks.named_modules()
    return [(f"transformer_blocks.{name}", layer) for name, layer in blocks if isinstance(layer, torch.nn.Linear)]


def backward(packed, number=0, dtype=torch.float32, device=CPU):
    """Return the velocity of a pack and the gradients of the adapter by name."""
    for parameter in packed.parameters():
        parameter.grad = None
    batch = mesh_worker.make_batch(number, dtype)
    moved = {name: getattr(batch, name).to(device) for name in ("image", "text", "t", "velocity")}
    batch = dataclasses.replace(batch, **moved)
    velocity = packed(batch.image, batch.text, batch.t, batch.layout)
    sample_errors(velocity, batch).sum().backward()
    named = packed.transformer.named_parameters()
    return velocity.detach(), {name: p.grad for name, p in named if p.grad is not None}
