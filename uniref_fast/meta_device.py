"""Modes of PyTorch that measure operations and memory of code that runs on the meta device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["FusedAttention", "LivingTensors"]


class FusedAttention(TorchFunctionMode):
    """Mode that counts `scaled_dot_product_attention` of meta tensors as a fused kernel, without a matrix of scores.

    Attributes:
        flops: Operations of the calls so far; multiply and add count as two.
    """

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args
        self.flops += 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        sums = q.new_empty(q.shape, dtype=torch.float32) if q.shape[-1] > 128 and q.element_size() < 4 else None
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        del sums
        return out


class LivingTensors(TorchDispatchMode):
    """Mode that counts the bytes of living tensors that were created within it, also on the meta device.

    Attributes:
        living: Bytes of the tensors that are alive now.
        peak: Largest value of `living` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.living = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            # A view of a tensor from outside, such as a weight, needs no memory.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.living += size
        self.peak = max(self.peak, self.living)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.living -= size
