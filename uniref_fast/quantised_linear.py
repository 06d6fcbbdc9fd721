"""Weights and activations in 8 bits behind the interface of tensors, so that Linears are called as before.

    QuantisedWeight        takes the place of `linear.weight`: e4m3 values with a scale per output row
    QuantisedActivation    is the input of Linears: e4m3 values with a scale per row, quantised once for all of them

`F.linear` of a `QuantisedWeight` quantises its input by row, if it is not a `QuantisedActivation`, and multiplies in 8
bits. Every other operation on either of the two, such as the branch of a LoRA adapter, computes with the values that
were quantised, in their own dtype. Modules stay the modules that they were: hooks and adapters keep working.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from uniref_fast import ops

__all__ = [
    "QuantisedActivation",
    "QuantisedWeight",
    "base_linear",
    "describe_errors",
    "exact_products",
    "is_quantised",
    "quantised_input",
    "record_error",
    "recorded_errors",
]

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
        name: Name of the Linear, under which its error is recorded.
    """

    original: Tensor
    impl: str | None
    linear_name: str

    @staticmethod
    def __new__(
        cls, original: Tensor, values: Tensor, row_scale: Tensor, impl: str | None = None, name: str = ""
    ) -> QuantisedWeight:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, dtype=original.dtype, device=values.device, requires_grad=False
        )

    def __init__(
        self, original: Tensor, values: Tensor, row_scale: Tensor, impl: str | None = None, name: str = ""
    ) -> None:
        self.original, self.e4m3, self.row_scale, self.impl, self.linear_name = original, values, row_scale, impl, name

    @classmethod
    def of(cls, weight: Tensor, impl: str | None = None, name: str = "") -> QuantisedWeight:
        """Quantise a weight on its own device."""
        return cls(weight, *ops.quantize_fp8(weight.detach(), impl=_quantising(impl)), impl, name)

    def _like(self, original: Tensor, values: Tensor, row_scale: Tensor) -> QuantisedWeight:
        return QuantisedWeight(original, values, row_scale, self.impl, self.linear_name)

    def unquantised(self) -> Tensor:
        """Return the weight that this one replaces, on the device of the 8-bit values."""
        return self.original.detach().to(self.e4m3.device)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Replace the weight and its 8-bit values by those of another weight of the same shape.

        A weight on another device is the same weight, which offloading has moved.
        """
        if isinstance(weight, QuantisedWeight) and weight.device != self.device:
            with torch._C.DisableTorchFunctionSubclass():
                _SET_DATA(self, weight)
            self.original, self.e4m3, self.row_scale = weight.original, weight.e4m3, weight.row_scale
            return
        source = weight.original if isinstance(weight, QuantisedWeight) else weight
        if source is not self.original:  # `weight.data += x` changes the weight in place and then assigns it
            self.original.detach().copy_(source.detach())
            self._requantise()

    def _requantise(self) -> None:
        values, row_scale = ops.quantize_fp8(self.unquantised(), impl=_quantising(self.impl))
        self.e4m3.copy_(values)
        self.row_scale.copy_(row_scale)

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return ["e4m3", "row_scale"], (self.original, self.impl, self.linear_name)

    @classmethod
    def __metadata_guard__(cls, before: tuple, now: tuple) -> bool:
        """Return True if code that torch.compile compiled for one weight is valid for another."""
        return before[1:] == now[1:]

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: tuple, size: Any, stride: Any) -> QuantisedWeight:
        return cls(context[0], inner["e4m3"], inner["row_scale"], *context[1:])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, weight = kwargs or {}, args[0]
        if isinstance(weight, cls):
            if func in (aten.detach.default, aten.alias.default):
                return weight._like(weight.original, weight.e4m3, weight.row_scale)
            if func is aten.clone.default:
                return weight._like(weight.original.detach().clone(), weight.e4m3.clone(), weight.row_scale.clone())
            if func is aten._to_copy.default:
                return weight._moved(kwargs.get("device"), kwargs.get("dtype"))
            if func is aten._pin_memory.default:  # this and the next two: offloading with a stream
                return weight._like(weight.original, weight.e4m3.pin_memory(), weight.row_scale.pin_memory())
            if func is aten.is_pinned.default:
                return weight.e4m3.is_pinned()
            if func is aten.record_stream.default:
                weight.e4m3.record_stream(args[1])
                return weight.row_scale.record_stream(args[1])
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
            return self._like(self.original, self.e4m3.to(device), self.row_scale.to(device))
        original = self.original.detach().to(dtype)
        values, row_scale = ops.quantize_fp8(original.to(device), impl=_quantising(self.impl))
        return self._like(original, values, row_scale)


class QuantisedActivation(_EightBit):
    """Input of Linears that was quantised by row.

    Args:
        values: 8-bit values, float8_e4m3fn `[N, C]`.
        row_scale: Their scales, float32 `[N]`.
        dtype: Dtype of the activation outside of 8-bit products.
        exact: Function that returns the activation before it was quantised, in that dtype. It is called if an operation
            needs it, and once at most.
        shape: Shape of the activation, with N rows of C channels; None for `[N, C]`.
    """

    @staticmethod
    def __new__(
        cls,
        values: Tensor,
        row_scale: Tensor,
        dtype: torch.dtype,
        exact: Callable[[], Tensor],
        shape: torch.Size | None = None,
    ) -> QuantisedActivation:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape if shape is None else shape, dtype=dtype, device=values.device, requires_grad=False
        )

    def __init__(
        self,
        values: Tensor,
        row_scale: Tensor,
        dtype: torch.dtype,
        exact: Callable[[], Tensor],
        shape: torch.Size | None = None,
    ) -> None:
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
    """Quantise an activation `[..., C]` by row, for several Linears.

    Args:
        x: Activation.
        impl: Implementation, as for `ops.quantize_fp8`.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return QuantisedActivation(*ops.quantize_fp8(rows, impl=_quantising(impl)), x.dtype, lambda: x, x.shape)


def base_linear(linear: Any) -> Any:
    """Return the Linear itself, or the one inside a layer of peft."""
    return linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear


def is_quantised(linear: Any) -> bool:
    """Return True if a Linear, or the one inside a layer of peft, has a weight in 8 bits."""
    return isinstance(getattr(base_linear(linear), "weight", None), QuantisedWeight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, QuantisedWeight) or _EXACT:
        return F.linear(_unquantised(x), _unquantised(weight), bias)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("8-bit Linears have no gradient: use them under torch.no_grad(), or unpatch the model")
    rows = x if isinstance(x, QuantisedActivation) else quantised_input(x, weight.impl)
    out = ops.scaled_linear(
        rows.e4m3, rows.row_scale, weight.e4m3, weight.row_scale, bias, x.dtype, impl=weight.impl
    ).view(*x.shape[:-1], len(weight))
    record_error(weight.linear_name, out, lambda: F.linear(_unquantised(x), weight.unquantised(), bias))
    return out


_RECORDS: list[dict[str, float]] = []
_EXACT: list[bool] = []


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute all Linears inside the block with the 16-bit weights, which are copied to the device for each product."""
    _EXACT.append(True)
    try:
        yield
    finally:
        _EXACT.pop()


@contextlib.contextmanager
def recorded_errors(errors: dict[str, float]) -> Iterator[None]:
    """Record the relative error of every 8-bit product by name, `|8 bits - 16 bits| / |16 bits|` of its first call.

    Args:
        errors: Dictionary that is filled. Names that it holds are not measured again.
    """
    _RECORDS.append(errors)
    try:
        yield
    finally:
        _RECORDS.pop()


def record_error(name: str, result: Tensor, exact: Callable[[], Tensor]) -> None:
    """Record the error of a result, if `recorded_errors` is active and its name is not recorded yet.

    Args:
        name: Name of the Linear or of the attention; nothing is recorded without a name.
        result: Result in 8 bits.
        exact: Function that computes the same in 16 bits.
    """
    if name and _RECORDS and name not in _RECORDS[-1]:
        expected = exact().float()
        error, size = (result.float() - expected).norm(), expected.norm()
        _RECORDS[-1][name] = (error / size).item() if size > 0 else float(error > 0)


def describe_errors(errors: Mapping[str, float]) -> str:
    """Return the mean and the largest of recorded errors in words."""
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    return f"relative errors of {mean:.1%} in the mean, at most {errors[worst]:.1%} ({worst})"


def _quantising(impl: str | None) -> str | None:
    return "reference" if impl == "reference" else None


def _unquantised(x: Any) -> Any:
    return x.unquantised() if isinstance(x, _EightBit) else x
