"""LoRA adapters of single samples in one pack.

    layer(x)      x [N, C]    rows of sample 0 | rows of sample 1 | rows of sample 2
    base layer                all rows, one product
    adapter "a"                                 these rows alone
    adapter "b"               these rows

Adapters are layers of peft that `pipe.load_lora_weights(..., adapter_name="a")` has added. For the time of one forward
no adapter of a layer is active, and a forward hook adds the products of the adapters to the rows of their samples. They
are the modules of peft, called with the rows of all samples that have the same adapters and scales. An adapter that is
more than a product, such as DoRA or LoKr, computes its layer again for its rows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uniref_fast.layout import Kind, SelfLayout
from uniref_fast.memo import memo

__all__ = ["PackAdapters", "check_lora", "tuner_layers"]

Lora = Mapping[str, float]
"""Scale of each adapter of a sample, by its name."""


def tuner_layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers of peft in a transformer with their names; none if no adapter is loaded."""
    if not getattr(transformer, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)]


def check_lora(transformer: nn.Module, lora: Any, where: str, encoders: Sequence[Any] = ()) -> None:
    """Check the LoRA of a request.

    Args:
        transformer: Transformer with the loaded adapters.
        lora: Mapping from names of adapters to their scales.
        where: Name of the request in messages.
        encoders: Text encoders that encode the prompts of the request; each may be None.

    Raises:
        ValueError: If an adapter is not loaded or is fused into the weights, a scale is not finite, or a text encoder
            has adapters, which would change the prompts of all requests.
        TypeError: If the value is not a mapping, or a scale is not a number.
    """
    if not isinstance(lora, Mapping):
        raise TypeError(f"{where}: lora must be a mapping from names of adapters to scales, got {lora!r:.80}")
    for encoder in encoders:
        if encoder is not None and tuner_layers(encoder):
            raise ValueError(
                f"{where}: lora chooses the adapters of the transformer, and {', '.join(encoder.peft_config)} also "
                f"changes the text encoder, a {type(encoder).__name__}, for every request; load the weights of the "
                "transformer alone, or leave lora out"
            )
    loaded = list(getattr(transformer, "peft_config", None) or ())
    layers = [layer for _, layer in tuner_layers(transformer)]
    fused = {name for layer in layers for name in layer.merged_adapters}
    for name, scale in lora.items():
        if name not in loaded:
            known = f"loaded are {', '.join(loaded)}" if loaded else "none is loaded"
            loading = f"pipe.load_lora_weights(..., adapter_name={name!r})"
            if not hasattr(transformer, "add_adapter"):  # diffusers loads no adapters into it
                loading = f"peft.inject_adapter_in_model(config, pipe.transformer, {name!r})"
            raise ValueError(f"{where}: lora has the adapter {name!r}, and {known}; load it with {loading}")
        if name in fused:
            raise ValueError(
                f"{where}: lora has the adapter {name!r}, which is fused into the weights; call pipe.unfuse_lora()"
            )
        if not isinstance(scale, numbers.Real):
            raise TypeError(f"{where}: the scale of the adapter {name!r} must be a number, got {scale!r:.80}")
        if not math.isfinite(scale):
            raise ValueError(f"{where}: the scale of the adapter {name!r} must be finite, got {scale}")
    if any("_diffusers_hook" in vars(part) for layer in layers for part in layer.modules()):
        raise ValueError(
            f"{where}: lora does not work with enable_group_offload(offload_type='leaf_level'), which fetches the "
            "weights of all adapters in a fixed order; use offload_type='block_level'"
        )


@dataclass(frozen=True)
class _Group:
    """Samples that have the same adapters in a layer, with the factors by which peft multiplies these."""

    samples: frozenset[int]
    factors: dict[str, float]


class PackAdapters:
    """Adapters of the samples of one pack.

    Args:
        transformer: Transformer with the loaded adapters.
        row_kinds: Kinds of the rows of modules (`PackedModel.row_kinds`).
        loras: Scales of the adapters of each sample; None for the active adapters of the transformer.

    Attributes:
        layout: Layout of the rows that the running forward computes.
    """

    def __init__(
        self, transformer: nn.Module, row_kinds: Sequence[tuple[str, str]], loras: Sequence[Lora | None]
    ) -> None:
        samples: dict[Any, set[int]] = {}
        for i, lora in enumerate(loras):
            samples.setdefault(None if lora is None else tuple(lora.items()), set()).add(i)
        self.layout: SelfLayout | None = None
        self._layers: list[tuple[Any, str, list[_Group]]] = []
        for name, layer in tuner_layers(transformer):
            kind = next(kind for part, kind in row_kinds if part in name)
            groups = [_Group(frozenset(members), _factors(layer, key)) for key, members in samples.items()]
            self._layers.append((layer, kind, [group for group in groups if group.factors]))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Return a context in which layers apply the adapters of the samples; `layout` must be set in it."""
        active = [layer._active_adapter for layer, _, _ in self._layers]
        handles = []
        try:
            for layer, kind, groups in self._layers:
                layer._active_adapter = []
                handles.append(layer.register_forward_hook(_Hook(self, kind, groups)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for (layer, _, _), names in zip(self._layers, active, strict=True):
                layer._active_adapter = names
            self.layout = None


def _factors(layer: Any, lora: tuple[tuple[str, float], ...] | None) -> dict[str, float]:
    """Return the factor of each adapter of a layer, in the order in which they are applied.

    Args:
        layer: Layer of peft.
        lora: Names and scales, or None for the active adapters.
    """
    if lora is None:
        names = () if layer.disable_adapters or layer.merged else layer.active_adapters
        return {name: layer.scaling[name] for name in names if name in layer.scaling}
    factors = {}
    for name, scale in lora:
        if name in layer.scaling:
            before = layer.scaling[name]
            layer.set_scale(name, scale)
            factors[name], layer.scaling[name] = layer.scaling[name], before
    return factors


@dataclass(frozen=True, eq=False)
class _Hook:
    """Forward hook of a layer, which adds the products of adapters to the output of the base layer."""

    adapters: PackAdapters
    kind: str
    groups: list[_Group]

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, layout = args[0], self.adapters.layout
        assert layout is not None
        for group in self.groups:
            rows = memo(layout, _rows, self.kind, x.shape[0], group.samples, x.device)
            output[rows] = _adapted(layer, x[rows], output[rows], group.factors).to(output.dtype)
        return output


def _adapted(layer: Any, x: Tensor, result: Tensor, factors: Mapping[str, float]) -> Tensor:
    """Return the output of a layer with adapters for some rows, computed as peft does.

    Args:
        layer: Layer of peft.
        x: Input, `[n, C]`.
        result: Output of the base layer, `[n, D]`.
        factors: Factors of the adapters.
    """
    products = getattr(layer, "lora_A", {})
    if all(name in products and name not in getattr(layer, "lora_variant", {}) for name in factors):
        for name, factor in factors.items():
            x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
            result = result + layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * factor
        return result
    before = {
        name: vars(layer)[name] for name in ("_disable_adapters", "merged_adapters", "_active_adapter", "scaling")
    }
    vars(layer).update(
        _disable_adapters=False, merged_adapters=[], _active_adapter=[*factors], scaling=layer.scaling | dict(factors)
    )
    try:
        return layer.forward(x)
    finally:
        vars(layer).update(before)


def _rows(layout: SelfLayout, kind: str, count: int, samples: frozenset[int], device: torch.device) -> Any:
    """Return the rows of samples in the input of a layer: a slice, or an int64 tensor of their numbers.

    Args:
        layout: Layout of the rows that are computed.
        kind: "text", "image" or "joint" for a stream, the last two also for the targets' rows alone; "references" for
            the rows of references alone; "table" for the modulation table, or its rows of the sampled t alone.
        count: Number of rows of the input.
        samples: The samples.
        device: Device of the result.
    """
    spans: list[tuple[int, int]]
    if kind == "table":
        spans = [(at, at + 1) for at in range(count) if at % layout.num_samples in samples]
        # With kept references a layout may have no clean tokens while the table still has their rows.
        expected = {layout.num_samples, 2 * layout.num_samples}
    elif kind == "references":
        held = [s for s in layout.image_segments if s.kind is Kind.REFERENCE]
        ends = list(itertools.accumulate(segment.length for segment in held))
        spans = [(end - s.length, end) for s, end in zip(held, ends, strict=True) if s.sample in samples]
        expected = {ends[-1]}
    elif kind != "text" and count != (layout.image_length if kind == "image" else layout.joint_length):
        ends = list(itertools.accumulate(segment.length for segment in layout.targets))
        spans = [(end - s.length, end) for s, end in zip(layout.targets, ends, strict=True) if s.sample in samples]
        expected = {ends[-1]}
    elif kind == "joint":
        spans = [(s.joint_start, s.joint_end) for s in layout.segments if s.sample in samples]
        expected = {layout.joint_length}
    else:
        segments = layout.text_segments if kind == "text" else layout.image_segments
        spans = [(s.stream_start, s.stream_start + s.length) for s in segments if s.sample in samples]
        expected = {layout.text_length if kind == "text" else layout.image_length}
    if count not in expected:
        raise RuntimeError(f"a layer has {count} rows of the kind {kind!r}, and the layout has {sorted(expected)}")
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    if len(merged) <= 1:
        return slice(*merged[0]) if merged else slice(0, 0)
    return torch.cat([torch.arange(start, end, device=device) for start, end in merged])
