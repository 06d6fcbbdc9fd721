"""Reasons why a call of a patched block or attention must run the code of diffusers.

The fused operators stand for the code between the Linears of a block: LayerNorms, modulation, QK norms, rotary
embedding, attention. Whatever others have put there (hooks, modes, replaced functions or modules) only takes effect
when that code itself runs, so each guard here names one such change. All are cheap: they run at every call.
"""

from __future__ import annotations

import types
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

__all__ = [
    "active_mode",
    "attention_change",
    "changed_norm",
    "changed_qk_norm",
    "has_hooks",
    "is_plain",
    "norm_change",
    "replaced_forward",
]

QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def is_plain(tensor: Any) -> bool:
    """Whether an object is an ordinary tensor: a subclass (fake, distributed, quantised, proxy) has operators of its
    own."""
    return type(tensor) in (Tensor, nn.Parameter)


def active_mode() -> str | None:
    """Describe what is active in this thread and may change what an operator computes or records; None if nothing is.

    Fused operators are opaque to function modes, dispatch modes, `torch.func` transforms, forward-mode derivatives and
    `torch.jit.trace`. Only the mode of `torch.device(...)` and `torch.set_default_device(...)` is harmless: it sets the
    device of new tensors, and the fused operators name theirs.
    """
    if torch._C._len_torch_function_stack():
        for function_mode in _get_current_function_mode_stack():
            if not isinstance(function_mode, DeviceContext):
                return f"the function mode {type(function_mode).__name__} is active"
    if torch._C._len_torch_dispatch_stack():
        for dispatch_mode in _get_current_dispatch_mode_stack():
            return f"the dispatch mode {type(dispatch_mode).__name__} is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are being computed"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit.trace"
    return None


def attention_change() -> str | None:
    """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import transformer_qwenimage as stock

    if F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    for name, home in (("dispatch_attention_fn", attention_dispatch), ("apply_rotary_emb_qwen", stock)):
        if not _is_from(getattr(stock, name), home):
            return f"{stock.__name__}.{name} was replaced"
    if not _is_from(stock.QwenDoubleStreamAttnProcessor2_0.__call__, stock):
        return "QwenDoubleStreamAttnProcessor2_0.__call__ was replaced"
    return None


def norm_change() -> str | None:
    """Describe replaced code of the LayerNorms of every model; None if none is replaced."""
    if not _is_from(nn.LayerNorm.forward, nn_normalization):
        return "torch.nn.LayerNorm.forward was replaced"
    return None if _is_from(F.layer_norm, F) else "torch.nn.functional.layer_norm was replaced"


def _is_from(function: Any, module: types.ModuleType) -> bool:
    """Whether the code of a function is in the file of a module; a wrapper may copy every other attribute."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == module.__file__


def has_hooks(module: nn.Module) -> bool:
    """Whether PyTorch runs forward or backward hooks, of the module or global ones, when the module is called."""
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
    """Whether a module has a forward other than its class's; hooks of diffusers and accelerate are such forwards."""
    forward = vars(module).get("forward")
    return forward is not None and forward != types.MethodType(type(module).forward, module)


def changed_norm(norm: Any, channels: int) -> str | None:
    """What a block's norm is other than a LayerNorm over `channels` without affine parameters; None if nothing."""
    if type(norm) is not nn.LayerNorm:
        return f"a block's norm is a {type(norm).__name__}"
    if norm.normalized_shape != (channels,) or norm.weight is not None or norm.bias is not None:
        return f"a block's norm is {norm}"
    if has_hooks(norm):
        return "the norms have hooks"
    return "a block's norm has a forward of its own" if replaced_forward(norm) else None


def changed_qk_norm(attn: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """What the QK norms of an attention are other than RMSNorms with one eps, or none; None if nothing."""
    from diffusers.models import normalization
    from diffusers.models.normalization import RMSNorm

    found = [norm for norm in map(attn._modules.get, QK_NORMS) if norm is not None]
    if found and not _is_from(RMSNorm.forward, normalization):
        return "diffusers.models.normalization.RMSNorm.forward was replaced"
    for norm in found:
        if type(norm) is not RMSNorm:
            return f"a QK norm is a {type(norm).__name__}"
        if reason := _held_elsewhere(norm):
            return reason
        if replaced_forward(norm):
            return "a QK norm has a forward of its own"
        weight = norm.weight
        if weight is None or norm.bias is not None or len(norm.dim) != 1:
            return "a QK norm has no weight, a bias, or more than one dimension"
        if not is_plain(weight):
            return f"the weight of a QK norm is a {type(weight).__name__}"
        if weight.dtype != dtype or weight.device != device:
            return f"the weight of a QK norm is {weight.dtype} on {weight.device}, the streams are {dtype} on {device}"
        if norm.eps != found[0].eps:
            return f"the QK norms have different eps: {sorted({norm.eps for norm in found})}"
    return None


def _held_elsewhere(norm: nn.Module) -> str | None:
    """Why the weight of a QK norm must not be read instead of calling the norm; None if it may be."""
    own = vars(norm)
    registry = own.get("_diffusers_hook")
    if "_hf_hook" in own or (registry is not None and registry.hooks):
        return "the QK norms have hooks of their own (offloaded by layer)"
    return "the QK norms have hooks" if has_hooks(norm) else None
