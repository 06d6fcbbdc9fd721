"""A stand-in for CUDA graphs that runs on a CPU: it records operators with their tensors, and runs them again.

As on a GPU, a capture computes nothing that is seen outside, a replay runs no Python of the model and reads the tensors
of the capture, and graphs that share a pool overwrite each other's memory, which becomes NaN here. A replay that reads
memory from outside of the pool that nobody has kept is an error.
"""

import itertools
import weakref
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HANDLES = itertools.count(1)
POOLS: dict[int, weakref.WeakSet] = {}
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh")
"""Operators that wait for the device or copy from pageable host memory: an error while a stream is captured."""


def graph_pool_handle():
    return next(HANDLES)


class CUDAGraph(TorchDispatchMode):
    """Methods and arguments of `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph=False):
        super().__init__()
        self.calls, self.created, self.before, self.pool_handle, self.error = [], {}, [], None, None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert pool is not None and not self.calls
        self.pool_handle = pool
        self._overwrite_pool()
        POOLS.setdefault(pool, weakref.WeakSet()).add(self)
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        with torch.no_grad():
            for tensor, values in reversed(self.before):  # a capture runs no kernel
                tensor.copy_(values)
        self.before.clear()
        if self.error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.calls = [tree_map(self._unowned, call) for call in self.calls]

    def _unowned(self, value):
        """Return a reference that does not keep a tensor from outside of the pool alive; other values as they are."""
        if not isinstance(value, torch.Tensor) or not value.untyped_storage().nbytes():
            return value
        return value if value.untyped_storage().data_ptr() in self.created else Outside.of(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in FORBIDDEN:
            self.error = RuntimeError(f"{name}: operation not permitted when stream is capturing")
            raise self.error
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep_values(argument, value)
        for argument in func._schema.arguments:
            self._keep_values(argument, kwargs.get(argument.name))
        given = {x.untyped_storage().data_ptr() for x in tensors(args) + tensors(kwargs)}
        result = func(*args, **kwargs)
        for x in tensors(result):
            if x.untyped_storage().data_ptr() not in given:
                self.created[x.untyped_storage().data_ptr()] = x
        self.calls.append((func, args, kwargs, result))
        return result

    def _keep_values(self, argument, value):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.created:
            self.before.append((value, value.clone()))

    def _overwrite_pool(self):
        for graph in POOLS.get(self.pool_handle, ()):
            for tensor in graph.created.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    @torch.no_grad()
    def replay(self):
        self._overwrite_pool()
        for func, args, kwargs, result in self.calls:
            args, kwargs, result = tree_map(lambda x: x.tensor() if isinstance(x, Outside) else x,
                                            (args, kwargs, result))  # fmt: skip
            for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return self.pool_handle


@dataclass(frozen=True)
class Outside:
    """A tensor from outside of the pool, which the graph does not keep alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    place: tuple  # offset, shape and strides

    @classmethod
    def of(cls, x):
        return cls(StorageWeakRef(x.untyped_storage()), x.dtype, (x.storage_offset(), tuple(x.shape), x.stride()))

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, f"a replay reads freed memory: {self.dtype}, {self.place}"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Stream:
    """Arguments of `torch.cuda.Stream`."""

    def __init__(self, device=None):
        self.device = device


CURRENT = {"stream": Stream(), "device": None}


def current_stream():
    return CURRENT["stream"]


def set_stream(stream):
    CURRENT["stream"] = stream


class device:  # noqa: N801
    """Arguments of `torch.cuda.device`."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.before, CURRENT["device"] = CURRENT["device"], self.device

    def __exit__(self, *error):
        CURRENT["device"] = self.before


class graph:  # noqa: N801 (the name in torch.cuda)
    """Arguments of `torch.cuda.graph`, which needs a stream of the device that is current."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        assert stream is not None and stream.device == CURRENT["device"]
        self.cuda_graph, self.stream = cuda_graph, stream
        self.options = {"pool": pool, "capture_error_mode": capture_error_mode}

    def __enter__(self):
        self.before = current_stream()
        set_stream(self.stream)
        self.cuda_graph.capture_begin(**self.options)

    def __exit__(self, *error):
        self.cuda_graph.capture_end()
        set_stream(self.before)


def install(monkeypatch):
    """Replace the CUDA graphs of PyTorch."""
    for stand_in in (CUDAGraph, Stream, current_stream, device, graph, graph_pool_handle, set_stream):
        monkeypatch.setattr(torch.cuda, stand_in.__name__, stand_in)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
