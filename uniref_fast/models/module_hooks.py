"""Hooks that move weights, for modules whose weights are used although the module is not called.

Offloading of diffusers and accelerate puts hooks around `module.forward`: they bring the weights to the device before a
call, move them away after it, and fetch those of the next module in advance. The packed forward computes what the
transformer, its blocks and their QK norms compute without calling them, so it runs their hooks itself.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from uniref_fast import ops

__all__ = [
    "code_module",
    "device_of_hooks",
    "free_model_hooks",
    "has_global_hooks",
    "has_moving_hooks",
    "innermost_forward",
    "is_offloaded",
    "may_have_hooks",
    "onloaded",
    "runs_class_forward",
]

_NO_HOOKS = contextlib.nullcontext()


def onloaded(*modules: nn.Module | None) -> contextlib.AbstractContextManager[None]:
    """Return a context that runs the hooks of modules as calls of these modules would: a part before, a part after it.

    The hooks see no arguments, so they must be hooks that move weights (`patch.stock.deviations` checks it). As in a
    call, nothing runs after an error.

    Args:
        *modules: Modules in the order in which diffusers calls them; None stands for a missing one.
    """
    if ops.is_traced():  # only blocks whose QK norms have no hooks are compiled
        return _NO_HOOKS
    hooked = [each for each in modules if each is not None and may_have_hooks(each)]
    return _hooks_run(hooked) if hooked else _NO_HOOKS


@contextlib.contextmanager
def _hooks_run(modules: list[nn.Module]) -> Iterator[None]:
    called = [(module, hook) for module in modules for hook in _hooks(module)]
    for module, hook in called:
        hook.pre_forward(module)
    yield
    for module, hook in reversed(called):
        hook.post_forward(module, None)


def free_model_hooks(pipe: Any) -> None:
    """Move the models of a pipeline to host memory, if its offloading has brought them to the device.

    Modular pipelines have no such method: their `ComponentsManager` moves models when another one needs the memory.
    """
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()


def device_of_hooks(module: nn.Module) -> torch.device | None:
    """Return the device to which the hooks of a module bring its weights; None if they bring them nowhere."""
    for hook in _parts(module):
        device = getattr(hook, "execution_device", None)
        device = getattr(getattr(hook, "group", None), "onload_device", None) if device is None else device
        if device is not None:
            return torch.device(device)
    return None


def is_offloaded(module: nn.Module, *, whole: bool = True) -> bool:
    """Return True if hooks of a module keep its weights elsewhere between calls.

    Args:
        module: The module.
        whole: Count hooks that bring the whole model and leave it on the device after a call.
    """
    return any(
        getattr(hook, "offload", False) or hasattr(hook, "group") or (whole and type(hook).__name__ == "CpuOffload")
        for hook in _parts(module)
    )


def may_have_hooks(module: nn.Module) -> bool:
    """Return False only for a module without hooks of diffusers and accelerate."""
    own = vars(module)
    return "_hf_hook" in own or "_diffusers_hook" in own


def has_moving_hooks(module: nn.Module) -> bool:
    """Return True if a module has hooks of diffusers or accelerate."""
    return bool(_hooks(module))


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate and diffusers of a module, the outermost first."""
    own = vars(module)
    registry = own.get("_diffusers_hook")
    added = [] if registry is None else [registry.hooks[name] for name in reversed(registry._hook_order)]
    return [own["_hf_hook"], *added] if "_hf_hook" in own else added


def _parts(module: nn.Module) -> list[Any]:
    """Return the hooks of a module, those of accelerate's `SequentialHook` one by one."""
    return [part for hook in _hooks(module) for part in getattr(hook, "hooks", (hook,))]


def innermost_forward(module: Any) -> tuple[Any, str]:
    """Return (object, attribute) of a module's own forward, below hooks of diffusers and accelerate."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and registry._fn_refs:
        innermost = registry._fn_refs[0]
        place = innermost, "forward" if innermost.original_forward is None else "original_forward"
        below = hasattr(module, "_hf_hook") and isinstance(getattr(*place), functools.partial)
        return (module, "_old_forward") if below else place  # accelerate hooked first: its hook is the inner one
    if hasattr(module, "_hf_hook"):
        return module, "_old_forward"
    return module, "forward"


# ---- modules whose parts are computed without a call ----


def runs_class_forward(module: nn.Module, below_hooks: bool = False) -> bool:
    """Return True if a call of a module runs only the forward of its class, apart from global hooks.

    Args:
        module: The module.
        below_hooks: Leave out hooks of diffusers and accelerate.
    """
    own = vars(module)  # quicker than attributes of a module
    replaced = "forward" in own
    if replaced and below_hooks:
        replaced = getattr(getattr(*innermost_forward(module)), "__func__", None) is not type(module).forward
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or replaced
        or own.get("_compiled_call_impl")
    )


def has_global_hooks() -> bool:
    """Return True if PyTorch runs hooks when any module is called."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def code_module(function: Any) -> str:
    """Return the name of the module of the code of a function; a wrapper may copy every other attribute."""
    return function.__globals__["__name__"] if isinstance(function, types.FunctionType) else ""
