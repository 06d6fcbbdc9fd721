"""Blocks of the frozen base whose weights are on the host, and on the device only while they are used.

Before a block runs, its weights are on the device, and those of the next such block are on their way: the copy runs on
a side stream while the blocks in between are computed. In the backward it is the block before. The device holds the
weights of two such blocks at most.

A tensor on the device keeps its identity and loses its storage: a view that autograd has kept, as the transposed
weight, has its values again as soon as they are back. A block is used three times: in the forward, in the backward,
and, if it is recomputed, in between. Recomputation calls no hooks of the block, so the hooks of the backward do not
rely on it: they are at the outputs of the block, whose gradients come before anything of the block is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from uniref_fast.quantised import stored_tensors

__all__ = ["BlockWeights", "Offloading"]


class BlockWeights:
    """The frozen weights of the Linear layers of a block, on the host.

    Args:
        block: Block, whose weights are moved to the device one at a time, and are absent afterwards.
        device: Device of the computation.
        stream: Stream of the copies; None copies at once.

    Attributes:
        parameters: The weights.
        nbytes: Bytes that they take on the device.
        present: The weights are on the device, or on their way.
    """

    def __init__(self, block: nn.Module, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.stream, self.present = stream, True
        self.parameters = [_moved(layer, device) for layer in block.modules() if _has_frozen_weight(layer)]
        tensors = [tensor for parameter in self.parameters for tensor in stored_tensors(parameter)]
        for tensor in tensors:
            if not tensor.untyped_storage().resizable():  # it is a part of a file that was mapped into memory
                tensor.data = tensor.data.clone()
        # `data` shares the storage and not the version: a copy into it is no change that autograd would refuse
        self._tensors = [*{t.untyped_storage().data_ptr(): t.data for t in tensors}.values()]
        self._sizes = [tensor.untyped_storage().nbytes() for tensor in self._tensors]
        self._host = [_on_host(tensor, pinned=stream is not None) for tensor in self._tensors]
        self.nbytes = sum(self._sizes)
        self._ready: torch.cuda.Event | None = None
        self.release()

    def fetch(self) -> None:
        """Begin to copy the weights to the device if they are not there."""
        if self.present:
            return
        self.present = True
        for tensor, size in zip(self._tensors, self._sizes, strict=True):
            self._allocate(tensor, size)
        if self.stream is None:
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.copy_(host)
            return
        # the memory belongs to the stream of the computation, whose earlier operations may still use it
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.copy_(host, non_blocking=True)
            self._ready = self.stream.record_event()

    def wait(self) -> None:
        """Let the computation wait until the weights have arrived."""
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)
            self._ready = None

    def release(self) -> None:
        """Free the weights on the device."""
        if self.present:
            self.wait()  # also if they were never used: the memory is reused in the order of this stream
            self.present = False
            for tensor in self._tensors:
                self._free(tensor)

    @staticmethod
    def _allocate(tensor: Tensor, size: int) -> None:
        tensor.untyped_storage().resize_(size)

    @staticmethod
    def _free(tensor: Tensor) -> None:
        tensor.untyped_storage().resize_(0)


class Offloading:
    """The blocks of a model whose frozen weights are on the host. It registers hooks that bring them back in time.

    Args:
        blocks: Blocks by their number, in the order in which the model runs them. Each is called once in a forward, and
            all its results pass through its outputs.
        device: Device of the computation.

    Attributes:
        parameters: The weights of all these blocks.
        device_bytes: Bytes that the weights take on the device at most, of two blocks.
    """

    def __init__(self, blocks: Mapping[int, nn.Module], device: torch.device) -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._weights = {number: BlockWeights(blocks[number], device, stream) for number in sorted(blocks)}
        for number, block in blocks.items():
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._after_forward, number))
        self.parameters = [parameter for each in self._weights.values() for parameter in each.parameters]
        self.device_bytes = sum(sorted(each.nbytes for each in self._weights.values())[-2:])

    def _before_forward(self, number: int, block: nn.Module, inputs: Any) -> None:
        self._use(number, 1)

    def _after_forward(self, number: int, block: nn.Module, inputs: Any, outputs: Any) -> None:
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(partial(self._before_backward, number))

    def _before_backward(self, number: int, gradient: Tensor) -> None:
        self._use(number, -1)

    def _use(self, number: int, direction: int) -> None:
        """Have the weights of a block on the device, those of the next one on their way, and no others."""
        numbers = [*self._weights]
        place = numbers.index(number) + direction
        following = numbers[place] if 0 <= place < len(numbers) else number  # the pass that comes begins with it
        for other, weights in self._weights.items():
            if other not in (number, following):
                weights.release()
        self._weights[number].fetch()
        self._weights[number].wait()
        self._weights[following].fetch()


def _has_frozen_weight(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(layer, nn.Linear) and isinstance(weight, nn.Parameter) and not weight.requires_grad


def _moved(layer: Any, device: torch.device) -> nn.Parameter:
    """Move the weight of a layer to a device, and return it there."""
    moved = layer.weight.to(device)
    layer.weight = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
    if hasattr(layer, "quant_state"):  # of bitsandbytes, which moves it with the weight
        layer.quant_state = layer.weight.quant_state
    return layer.weight


def _on_host(tensor: Tensor, pinned: bool) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return host.copy_(tensor)
