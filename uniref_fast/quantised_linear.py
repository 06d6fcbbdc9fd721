"""Weights and activations in 8 bits behind the interface of tensors, so that Linears are called as before.

    QuantisedWeight        takes the place of `linear.weight`: e4m3 values with a scale per output row
    QuantisedActivation    is the input of Linears: e4m3 values with a scale per row, quantised once for all of them

`F.linear` of a `QuantisedWeight` quantises its input by row, if it is not a `QuantisedActivation`, and multiplies in 8
bits. Every other operation on either of the two, such as the branch of a LoRA adapter, computes with the values that
were quantised, in their own dtype. Modules stay the modules that they were: hooks and adapters keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from uniref_fast import ops

__all__ = ["QuantisedActivation", "QuantisedWeight", "base_linear", "is_quantised", "quantised_input"]

aten = torch.ops.aten


class _EightBit(Tensor):
    """Base of both: `F.linear` is computed in 8 bits where both operands have them.

    Attributes:
        e4m3: 8-bit values, float8_e4m3fn `[N, C]`.
        row_scale: Their scales, float32 `[N]`.
    """

    e4m3: Tensor
    row_scale: Tensor

    def unquantised(self) -> Tensor:
        """Return the tensor that was quantised, in its own dtype."""
        raise NotImplementedError

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func == _SET_DATA and isinstance(args[0], QuantisedWeight):
            return args[0].assign(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]  # peft assigns `weight.data` when it fuses an adapter


class QuantisedWeight(_EightBit):
    """Weight `[out, in]` of a Linear in 8 bits, which keeps the weight that it replaces.

    Adding to it or assigning to its `data`, as fusing an adapter does, changes the weight that it replaces in that
    weight's own dtype, and quantises the result. All other operations but `F.linear` read the replaced weight.

    Args:
        original: The weight that is replaced, float32, float16 or bfloat16 `[out, in]`, on any device.
        values: Its 8-bit values, float8_e4m3fn `[out, in]`.
        row_scale: Their scales, float32 `[out]`.
        impl: Implementation of the products, as for `ops.scaled_linear`.
    """

    original: Tensor
    impl: str | None

    @staticmethod
    def __new__(cls, original: Tensor, values: Tensor, row_scale: Tensor, impl: str | None) -> QuantisedWeight:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, dtype=original.dtype, device=values.device, requires_grad=False
        )

    def __init__(self, original: Tensor, values: Tensor, row_scale: Tensor, impl: str | None) -> None:
        self.original, self.e4m3, self.row_scale, self.impl = original, values, row_scale, impl

    @classmethod
    def of(cls, weight: Tensor, impl: str | None = None) -> QuantisedWeight:
        """Quantise a weight on its own device."""
        return cls(weight, *ops.quantize_fp8(weight.detach(), impl=_quantising(impl)), impl)

    def unquantised(self) -> Tensor:
        """Return the weight that this one replaces, on the device of the 8-bit values."""
        return self.original.detach().to(self.e4m3.device)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Replace the weight and its 8-bit values by those of another weight of the same shape."""
        source = weight.original if isinstance(weight, QuantisedWeight) else weight
        if source is not self.original:  # `weight.data += x` changes the weight in place and then assigns it
            self.original.detach().copy_(source.detach())
            self._requantise()

    def _requantise(self) -> None:
        values, row_scale = ops.quantize_fp8(self.unquantised(), impl=_quantising(self.impl))
        self.e4m3.copy_(values)
        self.row_scale.copy_(row_scale)

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return ["e4m3", "row_scale"], (self.original, self.impl)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: tuple, size: Any, stride: Any) -> QuantisedWeight:
        return cls(context[0], inner["e4m3"], inner["row_scale"], context[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, weight = kwargs or {}, args[0]
        if isinstance(weight, cls):
            if func in (aten.detach.default, aten.alias.default):
                return cls(weight.original, weight.e4m3, weight.row_scale, weight.impl)
            if func is aten.clone.default:
                parts = weight.original.detach().clone(), weight.e4m3.clone(), weight.row_scale.clone()
                return cls(*parts, weight.impl)
            if func is aten._to_copy.default:
                return weight._moved(kwargs.get("device"), kwargs.get("dtype"))
            if func in (aten.add_.Tensor, aten.sub_.Tensor, aten.copy_.default):
                original = weight.original.detach()
                others = map(_unquantised, args[1:])
                func(original, *(x.to(original.device) if isinstance(x, Tensor) else x for x in others), **kwargs)
                weight._requantise()
                return weight
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} cannot change a weight in 8 bits; unpatch the model first")
        return func(*tree_map(_unquantised, args), **tree_map(_unquantised, kwargs))

    def _moved(self, device: Any, dtype: torch.dtype | None) -> QuantisedWeight:
        device = self.device if device is None else device
        if dtype in (None, self.dtype):
            return QuantisedWeight(self.original, self.e4m3.to(device), self.row_scale.to(device), self.impl)
        original = self.original.detach().to(dtype)
        values, row_scale = ops.quantize_fp8(original.to(device), impl=_quantising(self.impl))
        return QuantisedWeight(original, values, row_scale, self.impl)


class QuantisedActivation(_EightBit):
    """Input `[N, C]` of Linears that was quantised by row.

    Args:
        values: 8-bit values, float8_e4m3fn `[N, C]`.
        row_scale: Their scales, float32 `[N]`.
        dtype: Dtype of the activation outside of 8-bit products.
        exact: Function that returns the activation before it was quantised, `[N, C]` in that dtype. It is called if an
            operation needs it, and once at most.
    """

    @staticmethod
    def __new__(
        cls, values: Tensor, row_scale: Tensor, dtype: torch.dtype, exact: Callable[[], Tensor]
    ) -> QuantisedActivation:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, dtype=dtype, device=values.device, requires_grad=False
        )

    def __init__(self, values: Tensor, row_scale: Tensor, dtype: torch.dtype, exact: Callable[[], Tensor]) -> None:
        self.e4m3, self.row_scale, self._exact = values, row_scale, exact
        self._computed: Tensor | None = None

    def unquantised(self) -> Tensor:
        """Return the activation before it was quantised."""
        if self._computed is None:
            self._computed = self._exact()
        return self._computed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} cannot change an activation in 8 bits")
        return func(*tree_map(_unquantised, args), **tree_map(_unquantised, kwargs or {}))


def quantised_input(x: Tensor, impl: str | None = None) -> QuantisedActivation:
    """Quantise an activation `[N, C]` by row, for several Linears.

    Args:
        x: Activation with contiguous rows.
        impl: Implementation, as for `ops.quantize_fp8`.
    """
    return QuantisedActivation(*ops.quantize_fp8(x, impl=_quantising(impl)), x.dtype, lambda: x)


def base_linear(linear: Any) -> Any:
    """Return the Linear itself, or the one inside a layer of peft."""
    return linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear


def is_quantised(linear: Any) -> bool:
    """Return True if a Linear, or the one inside a layer of peft, has a weight in 8 bits."""
    return isinstance(getattr(base_linear(linear), "weight", None), QuantisedWeight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, QuantisedWeight):
        return F.linear(_unquantised(x), weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("8-bit Linears have no gradient: use them under torch.no_grad(), or unpatch the model")
    if isinstance(x, QuantisedActivation):
        rows = x
    else:
        flat = x.reshape(-1, x.shape[-1])
        rows = quantised_input(flat if flat.stride(-1) == 1 else flat.contiguous(), weight.impl)
    out = ops.scaled_linear(rows.e4m3, rows.row_scale, weight.e4m3, weight.row_scale, bias, x.dtype, impl=weight.impl)
    return out.view(*x.shape[:-1], -1) if x.ndim != 2 else out


def _quantising(impl: str | None) -> str | None:
    return "reference" if impl == "reference" else None


def _unquantised(x: Any) -> Any:
    return x.unquantised() if isinstance(x, _EightBit) else x
