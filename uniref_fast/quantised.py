"""Sizes of weights that are stored in fewer bits than the computation uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compute_dtype", "largest_cast", "planned_bytes", "row_dependence", "stored_format", "stored_tensors"]


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that a model computes in.

    It is the dtype of the first vector of 16 or 32 bits among the parameters, because norms are not quantised.
    """
    for parameter in module.parameters():
        if parameter.ndim == 1 and parameter.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return parameter.dtype
    return torch.bfloat16


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that hold a parameter: the parameter itself, or those inside a quantised one.

    Wrapper subclasses (torchao, quanto) list theirs by `__tensor_flatten__`; bitsandbytes and GGUF keep packed bytes in
    the tensor itself and the scales in attributes.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored_tensors(getattr(tensor, name))
        return
    yield tensor
    for value in vars(tensor).values() if type(tensor) not in (Tensor, nn.Parameter) else ():
        yield from _tensors_in(value)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value).__module__.split(".")[0] == "bitsandbytes":  # the state of a 4-bit weight, itself nested
        for inner in vars(value).values():
            yield from _tensors_in(inner)


def stored_format(linear: Any) -> str | None:
    """Return the name of the format that a Linear stores its weight in; None for a weight of 16 bits or more.

    Args:
        linear: A Linear of any class: one with `in_features` and `out_features`.
    """
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):  # the Linears of SVDQuant and AWQ have packed parameters under other names
        return type(linear).__name__
    if type(weight).__module__.startswith("torch.distributed"):  # a shard of a weight
        return None
    if (
        sum(t.untyped_storage().nbytes() for t in stored_tensors(weight))
        >= 2 * linear.in_features * linear.out_features
    ):
        return None
    if type(linear) is not nn.Linear:
        return type(linear).__name__
    plain = type(weight) in (Tensor, nn.Parameter)
    return str(weight.dtype).removeprefix("torch.") if plain else type(weight).__name__


def row_dependence(module: nn.Module) -> str | None:
    """Return the reason why a row's product depends on the other rows of a call, or None if no Linear is known to."""
    part: Any
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if type(part).__name__ == "Linear8bitLt" and part.state.threshold > 0:
            return (
                f"{name} and other Linears of bitsandbytes compute all values of a channel in 16 bits if one of them "
                f"is {part.state.threshold:g} or more (llm_int8_threshold=0 turns this off)"
            )
        scaled = getattr(getattr(weight, "act_quant_kwargs", None), "granularity", None)
        if type(scaled).__name__ == "PerTensor":
            return (
                f"{name} and other Linears of torchao have one scale for all rows (granularity=PerRow() has one each)"
            )
    return None


def largest_cast(module: nn.Module) -> int:
    """Return the bytes of the largest weight that is cast to the computation's dtype while it is used; 0 for none."""
    itemsize, largest = compute_dtype(module).itemsize, 0
    planned = _bits(module) is not None
    part: Any
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or not hasattr(part, "in_features"):
            continue
        full = int(part.in_features * part.out_features) * itemsize
        if planned or sum(t.untyped_storage().nbytes() for t in stored_tensors(weight)) < full:
            largest = max(largest, full)
    return largest


def planned_bytes(module: nn.Module) -> int | None:
    """Return the bytes of a model on the meta device whose configuration says how it will be quantised.

    It returns None for any other model.

    Raises:
        ValueError: If the bits per weight of the quantisation method are not known.
    """
    bits = _bits(module)
    if bits is None:
        return None
    kept = _unquantised(_config(module))
    names = {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and not any(pattern in name.split(".") or pattern == name for pattern in kept)
    }
    total = Fraction(0)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        total += value.numel() * (bits / 8 if name in names else value.element_size())
    return int(total)


def _config(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if config is not None and not isinstance(config, Mapping):
        config = config.to_dict()
    return config or {}


def _unquantised(config: Mapping[str, Any]) -> list[str]:
    method = config.get("quant_method")
    skipped = config.get("llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert") or []
    return [*skipped, "lm_head"]


def _bits(module: nn.Module) -> Fraction | None:
    """Return the bits per weight of the quantised Linears of a model on the meta device, scales included, or None."""
    config = _config(module)
    if not config or not all(parameter.is_meta for parameter in module.parameters()):
        return None
    method = str(config.get("quant_method", "")).lower()
    if method == "bitsandbytes":
        if config.get("load_in_8bit"):
            return Fraction(8)
        # a scale for 64 weights: float32, or of 8 bits with a second one for 256 of the first
        double = config.get("bnb_4bit_use_double_quant")
        return 4 + (Fraction(8, 64) + Fraction(32, 64 * 256) if double else Fraction(32, 64))
    names = {"quanto": "weights_dtype", "torchao": "quant_type"}
    kind = str(config.get(names.get(method, ""), config.get("weights", ""))).lower()
    if "intx" in kind:  # torchao keeps its values of fewer bits in a byte each
        return 8 + Fraction(24, 128)
    for bits, words in ((8, ("int8", "float8", "uint8")), (4, ("int4", "uint4")), (2, ("int2", "uint2"))):
        if any(word in kind for word in words):
            # a scale (and for fewer bits a zero point) for 128 weights, of 16 bits each
            return Fraction(bits) + (Fraction(32, 128) if bits < 8 else 0)
    raise ValueError(
        f"estimate() does not know the bits per weight of quantization_config {dict(config)}: it knows bitsandbytes, "
        "quanto and torchao of 8, 4 and 2 bits. Load the pipeline and pass it instead of its name"
    )
