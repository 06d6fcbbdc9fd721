"""Reasons why a call of a patched block or attention must run the code of diffusers.

The fused operators replace the code between the Linears of a block: LayerNorms, modulation, QK norms, rotary embedding,
attention. Hooks, modes, replaced functions and replaced modules at these places only take effect when that code itself
runs, so each guard finds one kind of change. Guards are cheap, because they run at every call.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.modules import normalization as nn_normalization
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from uniref_fast.models.module_hooks import innermost_forward
from uniref_fast.models.packed import qk_norm_names
from uniref_fast.models.qwen_image import qk_norm_eps

__all__ = [
    "active_backend",
    "active_mode",
    "active_modes",
    "attention_change",
    "changed_adaptive_norm",
    "changed_norm",
    "changed_qk_norm",
    "changed_rms_norm",
    "has_hooks",
    "innermost_forward",
    "is_from",
    "is_plain",
    "norm_change",
    "replaced_attention",
    "replaced_forward",
    "stock_forward",
    "unlike",
]


def is_plain(tensor: Any) -> bool:
    """Return True if an object is an ordinary tensor.

    A subclass (fake, distributed, quantised, proxy) has its own operators.
    """
    return type(tensor) in (Tensor, nn.Parameter)


def active_mode() -> str | None:
    """Describe a state of this thread that may change what an operator computes or records; None if there is none.

    Fused operators are opaque to torch modes, `torch.func` transforms, forward-mode derivatives and `torch.jit.trace`.
    """
    for mode in active_modes():
        return f"the torch mode {type(mode).__name__} is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are being computed"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit.trace"
    return None


def active_modes() -> Iterator[Any]:
    """Yield the torch function modes and dispatch modes of this thread.

    The mode of `torch.device(...)` and `torch.set_default_device(...)` is left out. It sets the device of new tensors,
    and the fused operators name theirs.
    """
    if torch._C._len_torch_function_stack():
        yield from (mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext))
    if torch._C._len_torch_dispatch_stack():
        yield from _get_current_dispatch_mode_stack()


def attention_change() -> str | None:
    """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import transformer_qwenimage as stock

    homes = {"dispatch_attention_fn": attention_dispatch, "apply_rotary_emb_qwen": stock}
    return replaced_attention(stock, homes, ("QwenDoubleStreamAttnProcessor2_0",))


def replaced_attention(
    stock: types.ModuleType, homes: dict[str, types.ModuleType], processors: tuple[str, ...]
) -> str | None:
    """Describe a replaced function of a model's attention; None if none is replaced.

    Args:
        stock: Module of the model in diffusers.
        homes: Functions that its attention calls by name, and the module of the code of each.
        processors: Names of its attention processors.
    """
    if F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    for name, home in homes.items():
        if not is_from(getattr(stock, name), home):
            return f"{stock.__name__}.{name} was replaced"
    for name in processors:
        if not is_from(getattr(stock, name).__call__, stock):
            return f"{name}.__call__ was replaced"
    return None


def norm_change() -> str | None:
    """Describe replaced code of the LayerNorms of every model; None if none is replaced."""
    if not is_from(nn.LayerNorm.forward, nn_normalization):
        return "torch.nn.LayerNorm.forward was replaced"
    return None if is_from(F.layer_norm, F) else "torch.nn.functional.layer_norm was replaced"


def is_from(function: Any, module: types.ModuleType) -> bool:
    """Return True if the code of a function is in the file of a module; a wrapper may copy every other attribute."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == module.__file__


def has_hooks(module: nn.Module) -> bool:
    """Return True if PyTorch runs forward or backward hooks, the module's or global ones, when the module is called."""
    own = vars(module)  # quicker than attributes of a module
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def replaced_forward(module: nn.Module) -> bool:
    """Return True if a module has another forward than its class; hooks of diffusers and accelerate set one."""
    forward = vars(module).get("forward")
    return forward is not None and forward != types.MethodType(type(module).forward, module)


def changed_norm(norm: Any, channels: int, kind: Any = nn.LayerNorm) -> str | None:
    """Describe how a block's norm differs from a LayerNorm over `channels` without weight and bias, or return None.

    Args:
        norm: The norm.
        channels: Number of channels.
        kind: Class that the norm must have.
    """
    if type(norm) is not kind:
        return f"a block's norm is a {type(norm).__name__}"
    if norm.normalized_shape != (channels,) or norm.weight is not None or norm.bias is not None:
        return f"a block's norm is {norm}"
    if has_hooks(norm):
        return "the norms have hooks"
    return "a block's norm has its own forward" if replaced_forward(norm) else None


def changed_adaptive_norm(norm: Any, kind: str, channels: int) -> str | None:
    """Describe how an adaptive norm differs from diffusers' own over `channels`, or return None.

    Args:
        norm: The norm, with an activation, a Linear and a LayerNorm.
        kind: Name of its class in diffusers.
        channels: Number of channels.
    """
    from diffusers.models import normalization

    stock = getattr(normalization, kind)
    if type(norm) is not stock or getattr(norm, "emb", None) is not None or type(norm.silu) is not nn.SiLU:
        return f"a block's adaptive norm is a {type(norm).__name__}, not a plain {kind}"
    if not is_from(stock.forward, normalization):
        return f"{kind}.forward was replaced"
    if any(has_hooks(each) or replaced_forward(each) for each in (norm, norm.silu)):
        return "an adaptive norm has hooks or its own forward"
    return changed_norm(norm.norm, channels)


def changed_qk_norm(attn: Any, dtype: torch.dtype, device: torch.device, kind: Any = None) -> str | None:
    """Describe how the QK norms of an attention differ from RMSNorms with one eps, or return None.

    Args:
        attn: Attention module; any of its QK norms may be missing.
        dtype: Dtype of the streams, which the weights of the norms must have.
        device: Device of the streams, likewise.
        kind: Class of the norms; None is diffusers' `RMSNorm`.
    """
    found = [norm for norm in map(attn._modules.get, qk_norm_names(attn)) if norm is not None]
    for norm in found:
        if reason := changed_rms_norm(norm, dtype, device, "QK norm", kind):
            return reason
    try:
        qk_norm_eps(attn)
    except ValueError as error:
        return str(error)
    return None


def changed_rms_norm(
    norm: Any, dtype: torch.dtype, device: torch.device, what: str = "norm", kind: Any = None
) -> str | None:
    """Describe how a norm differs from an RMSNorm over one dimension whose weight can be read, or return None.

    Args:
        norm: The norm.
        dtype: Dtype of the streams, which its weight must have.
        device: Device of the streams, likewise.
        what: Name of the norm in the description.
        kind: Class of the norm; None is diffusers' `RMSNorm`.
    """
    if kind is None:
        from diffusers.models.normalization import RMSNorm

        kind = RMSNorm
    if not is_from(kind.forward, sys.modules[kind.__module__]):
        return f"{kind.__module__}.RMSNorm.forward was replaced"
    if type(norm) is not kind:
        return f"a {what} is a {type(norm).__name__}"
    if reason := _held_elsewhere(norm, what):
        return reason
    if replaced_forward(norm):
        return f"a {what} has its own forward"
    weight = norm.weight
    shape = norm.dim if hasattr(norm, "dim") else norm.normalized_shape
    if weight is None or getattr(norm, "bias", None) is not None or len(shape) != 1:
        return f"a {what} has no weight, a bias, or more than one dimension"
    if not is_plain(weight):
        return f"the weight of a {what} is a {type(weight).__name__}"
    if weight.dtype != dtype or weight.device != device:
        return f"the weight of a {what} is {weight.dtype} on {weight.device}, the streams are {dtype} on {device}"
    return None


def _held_elsewhere(norm: nn.Module, what: str) -> str | None:
    """Return the reason why a norm must be called and its weight must not be read, or None."""
    own = vars(norm)
    registry = own.get("_diffusers_hook")
    if "_hf_hook" in own or (registry is not None and registry.hooks):
        return f"a {what} has hooks of diffusers or accelerate (offloaded by layer)"
    return f"a {what} has hooks" if has_hooks(norm) else None


def unlike(value: Any, shape: tuple[int, ...], like: Tensor, what: str) -> str | None:
    """Return the reason why the fused operators cannot use the result of a module, or None.

    Args:
        value: Result of the module.
        shape: Shape that it must have.
        like: Tensor whose dtype and device it must have.
        what: Name of the module in the reason.
    """
    if not is_plain(value):
        return f"{what} returned a {type(value).__name__}"
    if value.dtype != like.dtype or value.device != like.device:
        return f"{what} returned {value.dtype} on {value.device}, the streams are {like.dtype} on {like.device}"
    return f"{what} returned {list(value.shape)} instead of {list(shape)}" if tuple(value.shape) != shape else None


def active_backend() -> str | None:
    """Return the process-wide attention backend of diffusers, or None if it is PyTorch's own."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name, _ = _AttentionBackendRegistry.get_active_backend()
    return None if name == AttentionBackendName.NATIVE else name.value


def stock_forward(block: Any, kind: Any) -> bool:
    """Return True if a block runs the forward of its class `kind` in diffusers, below hooks."""
    if not isinstance(block, kind):
        return False
    forward = getattr(*innermost_forward(block))
    modulate = [getattr(each, "_modulate", None) for each in (type(block), kind)]  # a method that some classes have
    stock = type(block).forward is kind.forward and modulate[0] is modulate[1]
    return stock and "_modulate" not in vars(block) and getattr(forward, "__func__", None) is kind.forward
