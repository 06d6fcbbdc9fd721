"""Parts of diffusers that a packed forward replaces, and a check that each of them is still diffusers' own.

A packed forward runs a transformer's parameters without calling its blocks, attention modules and norms. Code that
was put around or in place of these modules would therefore not run. `deviations` finds such code.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from uniref_fast.models.families import family_of
from uniref_fast.models.module_hooks import device_of_hooks, is_offloaded
from uniref_fast.models.replaced import Replaced
from uniref_fast.patch.families import family_patch
from uniref_fast.patch.guards import (
    active_backend,
    active_modes,
    innermost_forward,
    norm_change,
)
from uniref_fast.patch.processors import PatchedMethod

__all__ = ["deviations", "found_modules", "is_own_method", "processor_changes", "weight_hooks"]

_KNOWN = ("diffusers", "torch", "uniref_fast")
"""Packages whose own code the packed forward is written for."""


def deviations(transformer: Any, device: torch.device) -> Iterator[str]:
    """Describe every change around or inside a transformer that a packed forward would skip or compute wrongly.

    Args:
        transformer: A transformer of a supported family, patched or not.
        device: Device that it computes on.

    Yields:
        One phrase for each change, which begins with the name of the module or function.
    """
    yield from _process_wide()
    replaced: set[int] = set()
    family = family_of(transformer)
    for part in family.replaced:
        for name, module in found_modules(transformer, part.path):
            if module is None and part.optional:
                continue
            replaced.add(id(module))
            yield from _replaced_module(name, module, part)
    for name, module in transformer.named_modules():
        if id(module) not in replaced:
            yield from _called_module(name, module)
    if (patch := family_patch(family)) is not None:
        yield from patch.changes(transformer)
    yield from _other_devices(transformer, device)


def is_own_method(owner: Any, name: str) -> bool:
    """Return True if `owner.name(...)` runs code of diffusers, PyTorch or this package.

    It returns False for a method that was set on the instance or on the class, and for one of a subclass in another
    package. A method that `patch` installed counts as the one that it replaced. It returns True for a name that the
    class does not have.
    """
    bound = getattr(*innermost_forward(owner)) if name == "forward" else vars(owner).get(name)
    if isinstance(getattr(bound, "__self__", None), PatchedMethod):
        bound = bound.__self__.original
    bound = getattr(bound, "_torchdynamo_orig_callable", bound)  # torch.compile computes the same
    function = getattr(type(owner), name, None)
    if bound is not None and (function is None or bound != types.MethodType(function, owner)):
        return False
    while function is not None:
        inner = getattr(function, "__wrapped__", None)
        if isinstance(function, types.FunctionType):
            if _root(function.__globals__["__name__"]) not in _KNOWN:
                return False
        elif inner is None:
            return False
        function = inner
    return True


def _process_wide() -> Iterator[str]:
    """Describe changes that apply to every model of this process."""
    if backend := active_backend():
        yield f"attention backend {backend!r} is active in this process, and a packed forward chooses its own (impl=)"
    if reason := norm_change():
        yield reason
    for mode in active_modes():
        if _root(type(mode).__module__) not in _KNOWN:  # PyTorch's own, such as counters of operations, change nothing
            yield f"the torch mode {type(mode).__name__} is active"
    hooks = {**torch_module._global_forward_pre_hooks, **torch_module._global_forward_hooks}
    for hook in _foreign(hooks):
        yield f"torch.nn has the global module hook {hook}"


def found_modules(transformer: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of all modules with a path of `Replaced`; None for a module that does not exist."""
    if "*" not in path:
        yield path or "the transformer", transformer.get_submodule(path)
        return
    before, after = path.split(".*")
    for name, block in transformer.get_submodule(before).named_children():
        module: Any = block
        for attribute in after.split(".")[1:]:
            module = getattr(module, attribute, None)
        yield f"{before}.{name}{after}", module


def _replaced_module(name: str, module: Any, part: Replaced) -> Iterator[str]:
    package, kind = part.kind.split(":")
    expected = getattr(importlib.import_module(package), kind)
    if type(module) is not expected:
        yield f"{name} is a {type(module).__name__}, not a {kind}"
        return
    if hooks := _hooks(module, moving=part.onloaded):
        yield f"{name} has hooks ({', '.join(hooks)}) of a cache, a guider or your own"
    for method in part.methods:
        if not is_own_method(module, method):
            yield f"{name}.{method} was replaced by code that is not diffusers' own"
    if kind.endswith("LayerNorm") and any(getattr(module, part, None) is not None for part in ("weight", "bias")):
        yield f"{name} has a weight or bias of its own"
    if kind == "RMSNorm" and getattr(module, "bias", None) is not None:
        yield f"{name} has a bias"


def _called_module(name: str, module: nn.Module) -> Iterator[str]:
    """Describe hooks of a module that the packed forward calls. Such a module may be of any class."""
    if hooks := _hooks(module, called=True):
        yield f"{name} has hooks ({', '.join(hooks)}), which would see the tokens of all samples as one [N, C] tensor"


def _hooks(module: nn.Module, *, called: bool = False, moving: bool = False) -> list[str]:
    """Return names of the hooks of a module that a packed forward would skip or, if it is `called`, disturb.

    Args:
        module: The module.
        called: True for a module that the packed forward calls: hooks that only move or cast weights then do no harm.
        moving: True for a module whose hooks that move weights the packed forward runs.
    """
    names: list[str] = []
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        names += [hook for hook in registry.hooks if not ((called or moving) and hook in weight_hooks())]
    if hook := getattr(module, "_hf_hook", None):
        own = _root(type(hook).__module__) == "accelerate"
        if not own or not (called or (moving and _moves(hook))):
            names.append(f"accelerate's {type(hook).__name__}" if own else type(hook).__name__)
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    for patched in getattr(getattr(module, "_uniref_fast", None), "hooks", ()):  # hooks of `patch`
        hooks.pop(patched.id, None)
    names += _foreign(hooks) if called else [_name(hook) for hook in hooks.values()]
    return names


@functools.cache
def weight_hooks() -> frozenset[str]:
    """Return the hooks of diffusers that only move or cast the weights of their module."""
    from diffusers.hooks import group_offloading as offloading
    from diffusers.hooks import layerwise_casting as casting

    return frozenset((
        casting._LAYERWISE_CASTING_HOOK, casting._PEFT_AUTOCAST_DISABLE_HOOK,
        offloading._GROUP_OFFLOADING, offloading._LAZY_PREFETCH_GROUP_OFFLOADING, offloading._LAYER_EXECUTION_TRACKER,
    ))  # fmt: skip


def _moves(hook: Any) -> bool:
    """Return True if a hook of accelerate moves weights and does no more."""
    from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook

    if isinstance(hook, SequentialHook):
        return all(map(_moves, hook.hooks))
    return type(hook) in (AlignDevicesHook, CpuOffload)


def _other_devices(transformer: Any, device: torch.device) -> Iterator[str]:
    """Describe modules that would not be on the pipeline's device when they are used."""
    for name, module in transformer.named_modules():
        place = device_of_hooks(module)
        if place is not None and (place.type, place.index or 0) != (device.type, device.index or 0):
            yield f"{name or 'the transformer'} is brought to {place} by its hooks, and the pipeline runs on {device}"
    for part in family_of(transformer).replaced:
        if "weight" not in part.reads:
            continue
        for name, module in found_modules(transformer, part.path):
            weight = None if module is None else module.weight
            if weight is None or (weight.device.type, weight.device.index or 0) == (device.type, device.index or 0):
                continue
            parents = [transformer.get_submodule(name.rsplit(".", i)[0]) for i in range(1, name.count(".") + 1)]
            if not any(map(is_offloaded, (transformer, *parents, module))):
                yield f"{name} has its weight on {weight.device}, not {device}"


def _foreign(hooks: dict[int, Any]) -> list[str]:
    """Return names of PyTorch hooks that come neither from PyTorch (pruning, sharding, counters) nor from peft."""
    return [_name(hook) for hook in hooks.values() if _root(_home(hook)) not in ("torch", "peft")]


def _home(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", None) or ""


def _name(hook: Any) -> str:
    return f"forward hook {getattr(hook, '__qualname__', type(hook).__name__)}"


def _root(module: str) -> str:
    return module.split(".", 1)[0]


def processor_changes(where: str, processor: Any, kinds: tuple[Any, ...]) -> Iterator[str]:
    """Describe how an attention processor differs from those that a packed forward is written for.

    Args:
        where: Name of the attention.
        processor: Its processor, patched or not.
        kinds: Classes of the processors of diffusers.
    """
    stock = getattr(processor, "stock", processor)  # of a patched place
    if type(stock) not in kinds:
        yield f"{where} has its own processor {type(stock).__name__}"
        return
    if not is_own_method(stock, "__call__"):
        yield f"{type(stock).__name__}.__call__ was replaced by code that is not diffusers' own"
        return
    if processor._parallel_config is not None:
        yield f"{where} is set to context parallelism, which splits a sequence over ranks"
    backend = getattr(processor._attention_backend, "value", processor._attention_backend)
    if backend not in (None, "native"):
        advice = "transformer.reset_attention_backend() undoes it"
        yield f"{where} is set to attention backend {backend!r}, and a packed forward chooses its own (impl=); {advice}"
