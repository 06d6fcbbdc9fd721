"""Offloading that shows on one device: offloaded weights are NaN, and a stream copies them when it is waited for."""

import contextlib
from collections import Counter

import torch
from diffusers.hooks import group_offloading

CPU = torch.device("cpu")
ELSEWHERE = torch.device("cpu:7")
"""Offload device that no weight is on, so that diffusers never takes a weight for one that it must fetch at once."""


class Stream:
    """A stream whose copies are made when it is synchronised, as late as a device may make them."""

    def __init__(self):
        self.pending = []

    def synchronize(self):
        for destination, source in self.pending:
            destination.copy_(source)
        self.pending.clear()


class Backend:
    """The module of an accelerator, as `torch.cuda` is one."""

    def __init__(self, device):
        self.device = device

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self):
        return Stream()


class Offloading:
    """Record of group offloading: the groups that are on the device, and how often each was brought there.

    Args:
        monkeypatch: Fixture of pytest.
    """

    def __init__(self, monkeypatch):
        self.held, self.onloaded, self.fetched, self.peak = {}, set(), Counter(), 0
        monkeypatch.setattr(group_offloading, "TorchDeviceBackend", Backend)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        for name, replacement in (
            ("onload_", self._onload), ("offload_", self._offload), ("_transfer_tensor_to_device", self._transfer),
        ):  # fmt: skip
            original = getattr(group_offloading.ModuleGroup, name)
            monkeypatch.setattr(group_offloading.ModuleGroup, name, self._method(replacement, original))

    @staticmethod
    def _method(replacement, original):
        return lambda group, *arguments: replacement(group, original, *arguments)

    def enable(self, module, kind, *, stream=False, blocks_per_group=1):
        """Enable group offloading of a module, as `enable_group_offload` does on an accelerator."""
        config = group_offloading.GroupOffloadingConfig(
            onload_device=CPU, offload_device=ELSEWHERE, offload_type=group_offloading.GroupOffloadingType(kind),
            num_blocks_per_group=blocks_per_group, non_blocking=False, record_stream=False, low_cpu_mem_usage=True,
            stream=Stream() if stream else None,
        )  # fmt: skip
        group_offloading._apply_group_offloading(module, config)

    def _onload(self, group, original):
        original(group)
        self.onloaded.add(group)
        self.fetched[group] += 1
        blocks = [each for each in self.onloaded if "TransformerBlock" in type((each.modules or [None])[0]).__name__]
        self.peak = max(self.peak, len(blocks))

    def _offload(self, group, original):
        for tensor in self._tensors(group):
            self.held.setdefault(tensor, tensor.data)
            tensor.data = torch.full_like(tensor.data, float("nan"))
        self.onloaded.discard(group)

    def _transfer(self, group, original, tensor, source, default_stream):
        if group.stream is None or not group.non_blocking:
            tensor.data = self.held[tensor]
            return
        tensor.data = torch.full_like(self.held[tensor], float("nan"))
        group.stream.pending.append((tensor.data, self.held[tensor]))

    @staticmethod
    def _tensors(group):
        inside = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
        return [*inside, *group.parameters, *group.buffers]
