"""Results that are equal in all steps of an edit, kept so that they are computed once.

The text stream before the first block depends on the prompt and the weights only. Two other parts are constant and are
still computed in every step. The product of the references with the weights of `img_in` has a few channels only, and
keeping its result would add one image stream to the peak of the memory. The modulation of the rows with t = 0 shares a
matrix product with the other rows, whose time is that of reading the weights.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from uniref_fast.memo import version_of

__all__ = ["StepConstants", "weights_state"]


@dataclass(eq=False)
class StepConstants:
    """The text stream of one pack, as the first step has computed it.

    Attributes:
        computed: Number of times that it was computed and kept.
        is_read_only: Compute what is not kept yet without keeping it, as in the capture of a graph, whose memory other
            graphs overwrite.
    """

    computed: int = 0
    is_read_only: bool = field(default=False, repr=False)
    _key: tuple = field(default=(), repr=False)
    _sources: tuple = field(default=(), repr=False)
    _stream: Tensor | None = field(default=None, repr=False)
    _image: Tensor | None = field(default=None, repr=False)  # of the pack, during a capture

    def stores(self) -> tuple[StepConstants, ...]:
        """Return the stores of all streams of the pack."""
        return (self,)

    def pack_sources(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the pack, beside the prompt, that kept streams depend on.

        Args:
            image: Image stream of the pack, `[N_image, C]`.
        """
        return ()

    @contextlib.contextmanager
    def captured(self, image: Tensor) -> Iterator[None]:
        """Return a context for the capture of a forward that reads a copy of the image stream.

        Args:
            image: Image stream of the pack, `[N_image, C]`, of which the graph has a copy.
        """
        for store in self.stores():
            store.is_read_only = True
        self._image = image
        try:
            yield
        finally:
            for store in self.stores():
                store.is_read_only = False
            self._image = None

    def image_source(self, image: Tensor) -> Tensor:
        """Return the image stream of the pack for the image stream that a forward reads."""
        return image if self._image is None else self._image

    def tensors(self) -> list[Tensor]:
        """Return the streams that are kept now."""
        return [store._stream for store in self.stores() if store._stream is not None]

    def text_stream(self, text: Tensor, modules: Sequence[nn.Module], compute: Callable[[], Tensor]) -> Tensor:
        """Return the text stream, `[n, C]`: the kept one, if it would be computed from the same values.

        It is computed in every step where other code must see the call or the result would differ: with gradients,
        hooks, a replaced forward, or dropout.

        Args:
            text: Prompt embeddings of the pack, `[N_text, D]`.
            modules: Modules that compute the stream.
            compute: Function that computes this rank's rows of the stream.
        """
        return self.stream((text,), version_of(text), modules, compute)

    def stream(
        self, sources: tuple[Any, ...], state: Any, modules: Sequence[nn.Module], compute: Callable[[], Tensor]
    ) -> Tensor:
        """Return a stream that depends on some objects and modules only, as `text_stream` does.

        Args:
            sources: Objects that the stream depends on; another object is another value.
            state: Value that differs after every change of the values of these objects.
            modules: Modules that compute the stream.
            compute: Function that computes this rank's rows of the stream.
        """
        if torch.is_grad_enabled() or any(map(_must_run, modules)):
            return compute()
        key = (state, *map(weights_state, modules))
        same = len(sources) == len(self._sources) and all(map(operator.is_, sources, self._sources))
        if self._stream is not None and same and self._key == key:
            return self._stream
        if self.is_read_only:
            return compute()
        self._stream, self._sources, self._key = compute(), sources, key
        self.computed += 1
        return self._stream


def weights_state(module: nn.Module, addresses: bool = False) -> tuple:
    """Return the identity and version of all weights of a module, and the state of all its adapters.

    It differs after every change of the weights but one that is written through `parameter.data`.

    Args:
        module: The module.
        addresses: Add the addresses of the weights, which also differ when `parameter.data` is replaced. Layerwise
            casting and offloading do so in every forward, without a change of the values.
    """
    state: list[Any] = []
    part: Any
    for part in module.modules():
        own = vars(part)
        for parameter in own["_parameters"].values():
            if parameter is not None:
                state += (id(parameter), version_of(parameter))
                if addresses and type(parameter) in (Tensor, nn.Parameter):
                    state.append(parameter.data_ptr())
        if "scaling" in own:  # a layer of peft
            state.append((tuple(part.active_adapters), tuple(own["scaling"].items()), tuple(part.merged_adapters),
                          part.disable_adapters))  # fmt: skip
    return tuple(state)


def _must_run(module: nn.Module) -> bool:
    """Return True if a call of the module may do more than compute the same function of its input each time."""
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return True
    for part in module.modules():
        own = vars(part)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return True
        if part.training and isinstance(part, nn.Dropout) and part.p:
            return True
    return False
