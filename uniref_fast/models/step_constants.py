"""Results that are equal in all steps of an edit, kept so that they are computed once.

The text stream before the first block depends on the prompt and the weights only. Two other parts are constant and are
still computed in every step. The product of the references with the weights of `img_in` has a few channels only, and
keeping its result would add one image stream to the peak of the memory. The modulation of the rows with t = 0 shares a
matrix product with the other rows, whose time is that of reading the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

__all__ = ["StepConstants", "weights_state"]


@dataclass(eq=False)
class StepConstants:
    """The text stream of one pack, as the first step has computed it.

    Attributes:
        computed: Number of times that it was computed and kept.
    """

    computed: int = 0
    _key: tuple = field(default=(), repr=False)
    _sources: tuple = field(default=(), repr=False)
    _stream: Tensor | None = field(default=None, repr=False)

    def text_stream(self, text: Tensor, modules: Sequence[nn.Module], compute: Callable[[], Tensor]) -> Tensor:
        """Return the text stream, `[n, C]`: the kept one, if it would be computed from the same values.

        It is computed in every step where other code must see the call or the result would differ: with gradients,
        hooks, a replaced forward, or dropout.

        Args:
            text: Prompt embeddings of the pack, `[N_text, D]`.
            modules: Modules that compute the stream.
            compute: Function that computes this rank's rows of the stream.
        """
        return self.stream((text,), 0 if text.is_inference() else text._version, modules, compute)

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
        if self._stream is None or not same or self._key != key:
            self._stream, self._sources, self._key = compute(), sources, key
            self.computed += 1
        return self._stream


def weights_state(module: nn.Module) -> tuple:
    """Return the identity, version and address of all weights of a module, and the state of all its adapters.

    It differs after every change of the weights but one that is written in place through `parameter.data`.
    """
    state: list[Any] = []
    part: Any
    for part in module.modules():
        own = vars(part)
        for parameter in own["_parameters"].values():
            if parameter is not None:
                version = 0 if parameter.is_inference() else parameter._version
                address = parameter.data_ptr() if type(parameter) in (Tensor, nn.Parameter) else 0
                state += (id(parameter), version, address)
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
