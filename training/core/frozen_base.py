"""Quantise the frozen base of a LoRA run: the weights of the Linear layers of all blocks, by bitsandbytes or torchao.

Quantised weights are whole on every rank: FSDP2 would cut packed values without their scales (`shard` leaves them out).
A Linear layer stays a module that is called, so adapters and the packed forward work as with plain weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniref_fast.models.families import family_of
from uniref_fast.quantised import stored_tensors
from uniref_fast.training.core.base import Base

__all__ = ["FrozenLinear", "dequantised", "quantise_base", "quantised_parameters", "stored_bytes"]


class FrozenLinear(nn.Linear):
    """A Linear layer with a frozen weight that is stored in another dtype than the input's.

    The weight is cast or dequantised for the product, and once more for the gradient of the input. Autograd would keep
    the whole weight of the first cast until then.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenProduct.apply(input, self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a parameter: it is not kept for the backward, it lives on
        return F.linear(x, dequantised(weight, x.dtype) if type(weight) in _PLAIN else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        return gradient @ dequantised(ctx.weight, gradient.dtype), None, None


_PLAIN = (Tensor, nn.Parameter)


def dequantised(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of a weight of a frozen base, `[out, in]`, in a dtype: those that the products are made of."""
    if hasattr(weight, "quant_state"):  # bitsandbytes
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    whole = weight if type(weight) in _PLAIN else weight.dequantize()  # type: ignore[attr-defined, operator]
    return whole.detach().to(dtype)


def quantise_base(
    transformer: Any, base: Base, dtype: torch.dtype, device: torch.device, host: Collection[int] = ()
) -> None:
    """Store the weights of the Linear layers of all blocks in fewer bits, before an adapter is added.

    One weight at a time is copied to the device and quantised there, so that the device never holds the whole model in
    16 bits.

    Args:
        transformer: The diffusers model, on the host and without an adapter.
        base: Kind of the base.
        dtype: Dtype of the computation.
        device: Device that quantises; quantised weights stay on it.
        host: Numbers of the blocks whose quantised weights go back to the host.
    """
    for number, block in enumerate(family_of(transformer).packed.blocks_of(transformer)):
        place = torch.device("cpu") if number in host else device
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    setattr(parent, name, _quantised(layer, base, dtype, device, place))
    if base == "nf4":  # peft chooses its layer by this attribute, which diffusers sets on models that it has quantised
        transformer.is_loaded_in_4bit = True


def quantised_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the quantised parameters of a module that is not sharded yet."""
    return (parameter for parameter in module.parameters() if type(parameter) is not nn.Parameter)


def stored_bytes(parameters: Iterable[Tensor]) -> int:
    """Return the bytes of parameters as they are stored, scales included; a tensor that several share counts once."""
    tensors = (tensor for parameter in parameters for tensor in stored_tensors(parameter))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _quantised(
    layer: nn.Linear, base: Base, dtype: torch.dtype, device: torch.device, place: torch.device
) -> nn.Module:
    """Return a Linear layer with the quantised weight of another one, and the bias of that layer itself."""
    weight = layer.weight.detach()
    if base == "nf4":
        return _four_bit(layer, weight.to(device), dtype, place)
    weight = weight.to(torch.bfloat16) if base == "bf16" else _torchao(weight.to(device), base).to(place)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if base != "bf16" or dtype != torch.bfloat16:
        layer.__class__ = FrozenLinear
    return layer


def _four_bit(layer: nn.Linear, weight: Tensor, dtype: torch.dtype, place: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    new: Any = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4", device="meta"
    )
    new.bias = layer.bias
    packed: Any = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    new.weight = packed.to(weight.device).to(place)  # the first quantises it, also on the device where it is
    new.quant_state = new.weight.quant_state
    # On the CPU, a call without gradients would pack the weights for another kernel, whose results have other bits and
    # no gradients, and which later steps of training would then use too.
    new.support_avx512bf16_for_cpu = False
    return new


def _torchao(weight: Tensor, base: Base) -> Tensor:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # peft warns that it could not merge an adapter into such a weight; here none is merged
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    config = Int8WeightOnlyConfig if base == "int8" else Float8WeightOnlyConfig
    quantize_(holder, config(set_inductor_config=False))
    return holder.weight.detach()
