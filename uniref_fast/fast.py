"""`mode="fast"`: which parts of a transformer compute in 8 bits, their quantisation, and the way back.

Linears of the blocks get a `QuantisedWeight`, and the attention of a block is computed by `ops.attention_fp8`. The
parts named in `modules_to_not_convert` stay in 16 bits, by default the first and the last block and the modulation.
Several lists of blocks run one after the other, as in FLUX.2, or side by side, as the lists of text and of images in
FLUX.3: the first block of every list that gets embedded tokens and the last block of the last list stay.
Embeddings and the output layers are not in blocks and always stay. So do Linears that another library has quantised.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from uniref_fast.models.families import family_of
from uniref_fast.ops._dispatch import one_of
from uniref_fast.ops.fp8 import FP8_CAPABILITY
from uniref_fast.quantised import stored_format
from uniref_fast.quantised_linear import QuantisedWeight, base_linear, is_quantised

__all__ = [
    "EightBitParts",
    "check_mode",
    "check_supported",
    "default_16bit",
    "eight_bit",
    "eight_bit_parts",
    "quantise",
    "quantised_before",
    "restore",
    "saved_bytes",
    "unsupported",
]

MODES = ("exact", "fast")


@dataclass(frozen=True)
class EightBitParts:
    """Parts of a transformer that compute in 8 bits.

    Attributes:
        linears: Names of the Linears; a layer of peft stands for the Linear inside.
        attention: Names of the attention, such as "transformer_blocks.1.attn.processor".
        impl: "reference" for the emulation, "triton", or None.
    """

    linears: frozenset[str]
    attention: frozenset[str]
    impl: str | None = None


def default_16bit(transformer: Any) -> tuple[str, ...]:
    """Return the default of `modules_to_not_convert`: the first blocks, the last block, and the modulation."""
    lists, packed = _block_lists(transformer), family_of(transformer).packed
    first = [name for name in lists if name in packed.first_lists] or [*lists][:1]
    last = [*lists][-1]
    return *(f"{name}.0" for name in first), f"{last}.{len(lists[last]) - 1}", *packed.modulations


def _block_lists(transformer: Any) -> dict[str, Any]:
    """Return the lists of blocks of a transformer that are not empty, by their names, in the order in which they run.

    A list may be None, as the one of features of references in a Z-Image model without them.
    """
    modules: dict[str, Any] = dict(transformer.named_modules())
    return {name: modules[name] for name in family_of(transformer).packed.block_classes if len(modules.get(name, ()))}


def check_mode(mode: str, modules_to_not_convert: Sequence[str] | None = None) -> bool:
    """Return True for "fast".

    Raises:
        ValueError: If the mode is unknown, or is "exact" with modules that are not to be converted.
    """
    fast = one_of("mode", mode, *MODES)
    if modules_to_not_convert is not None and not fast:
        raise ValueError('modules_to_not_convert is for mode="fast"')
    return fast


def check_supported(device: torch.device | str, impl: str | None) -> None:
    """Raise ValueError, which says what can be done, if a device cannot compute in 8 bits with an implementation."""
    if reason := unsupported(device, impl):
        raise ValueError(f'mode="fast" is not possible here: {reason}')


def unsupported(device: torch.device | str, impl: str | None) -> str | None:
    """Return the reason why a device cannot compute in 8 bits with an implementation, and what can be done, or None."""
    device = torch.device(device)
    if impl == "reference" or device.type == "meta":
        return None
    emulated = "impl='reference' emulates it on any device, slowly"
    if impl not in (None, "triton"):
        return f"impl={impl!r} has no 8-bit operators; leave impl out for a GPU, or {emulated}"
    if device.type != "cuda":
        return (
            f"it needs e4m3 matrix products, which this package has for CUDA devices only, not for {device}; {emulated}"
        )
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has no e4m3 matrix products (compute capability 8.9 and newer have); {emulated}"
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no torch._scaled_mm; a newer torch has, and {emulated}"
    return None


def eight_bit_parts(
    transformer: Any, modules_to_not_convert: Sequence[str] | None = None, impl: str | None = None
) -> EightBitParts:
    """Choose the parts of a transformer that compute in 8 bits: no Linears that another library has quantised.

    Args:
        transformer: A transformer of a family, on any device.
        modules_to_not_convert: Names of modules that stay in 16 bits with everything inside: whole names such as
            "transformer_blocks.0", or parts of names such as "img_mlp" or "to_out". "processor" stands for the
            attention of the blocks. None is the default of `default_16bit`.
        impl: Implementation, "reference", "triton" or None.

    Raises:
        ValueError: If a name fits no module.
    """
    kept = default_16bit(transformer) if modules_to_not_convert is None else tuple(modules_to_not_convert)
    attention = [
        f"{group}.{name}.{family_of(transformer).packed.attention}.processor"
        for group, blocks in _block_lists(transformer).items()
        for name, _ in blocks.named_children()
    ]
    names = [name for name, _ in _linears_of_any_class(transformer)]
    linears = [name for name, linear in _block_linears(transformer)
               if _fits(linear) and (is_quantised(linear) or stored_format(linear) is None)]  # fmt: skip
    candidates = [*names, *attention]
    for pattern in () if modules_to_not_convert is None else kept:
        if not any(_is_in(pattern, name) for name in candidates):
            known = sorted({part for name in candidates for part in name.split(".") if not part.isdigit()})
            near = get_close_matches(pattern.rpartition(".")[2], known, 3)
            raise ValueError(
                f"modules_to_not_convert has {pattern!r}, which fits no Linear and no attention of this model; "
                f"{'near names' if near else 'parts of names'} are {', '.join(near or known)}"
            )

    def converted(name: str) -> bool:
        return not any(_is_in(pattern, name) for pattern in kept)

    return EightBitParts(frozenset(filter(converted, linears)), frozenset(filter(converted, attention)), impl)


def _is_in(pattern: str, name: str) -> bool:
    return f".{pattern}." in f".{name}."


def _fits(linear: nn.Linear) -> bool:
    """Return True if the sizes of a Linear are those that 8-bit products need."""
    return linear.in_features % 16 == 0 and linear.out_features % 16 == 0


def _block_linears(transformer: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the Linears of PyTorch in the blocks; of a layer of peft the one inside, under the name of the layer."""
    for name, module in _linears_of_any_class(transformer):
        if isinstance(module, nn.Linear):
            yield name, module


def _linears_of_any_class(transformer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the Linears of the blocks, those of other classes included; of a layer of peft the one inside."""
    inside = ""  # name of the layer of peft that is being passed
    lists = [blocks.named_modules(prefix=group) for group, blocks in _block_lists(transformer).items()]
    for name, module in itertools.chain(*lists):
        if inside and name.startswith(inside):
            continue
        base = base_linear(module)
        if base is not module:
            inside, module = f"{name}.", base
        has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
        if has_sizes and (hasattr(module, "weight") or next(module.children(), None) is None):  # not attention itself
            yield name, module


def quantised_before(transformer: Any) -> str | None:
    """Return a sentence on the Linears of the blocks that another library has quantised, or None if there is none."""
    linears = [linear for _, linear in _linears_of_any_class(transformer) if not is_quantised(linear)]
    found = Counter(stored for linear in linears if (stored := stored_format(linear)) is not None)
    if not found:
        return None
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.items())
    return f"{found.total()} Linears of the blocks are quantised already and stay as they are: {kinds}"


def quantise(transformer: Any, parts: EightBitParts, *, to_host: bool = False) -> None:
    """Give the chosen Linears of a transformer weights in 8 bits, in place.

    Args:
        transformer: The model.
        parts: Parts from `eight_bit_parts`.
        to_host: Move the 16-bit weights to host memory, so that the device has half of their bytes.

    Raises:
        ValueError: If a weight is not a plain one of 16 or 32 bits; nothing is changed then.
    """
    chosen = [(name, linear) for name, linear in _block_linears(transformer) if name in parts.linears]
    for name, linear in chosen:
        if problem := _problem(linear):
            raise ValueError(f"{name}: {problem}, and mode='fast' quantises weights of 16 or 32 bits itself")
    for name, linear in chosen:
        original = linear.weight
        quantised = QuantisedWeight.of(original, parts.impl, name)
        linear._parameters["weight"] = nn.Parameter(quantised, requires_grad=False)
        if to_host and original.device.type != "cpu":
            original.data = original.data.cpu()


def _problem(linear: nn.Linear) -> str | None:
    weight = linear._parameters.get("weight")
    if is_quantised(linear):
        return "the weight is in 8 bits already"
    if type(linear) is not nn.Linear or weight is None or type(weight) is not nn.Parameter:
        return f"it is a {type(linear).__name__} with a weight of type {type(weight).__name__}"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the weight is stored as {weight.dtype}"
    return None


def restore(transformer: Any) -> None:
    """Give all Linears of a transformer the weights back that they had before `quantise`, with the same bits.

    Adapters that were fused into them meanwhile stay fused.
    """
    for _, linear in _block_linears(transformer):
        weight = linear._parameters.get("weight")
        if isinstance(weight, QuantisedWeight):
            original = weight.original
            original.data = original.data.to(weight.device)
            linear._parameters["weight"] = original if isinstance(original, nn.Parameter) else nn.Parameter(original)


def saved_bytes(transformer: Any, parts: EightBitParts) -> int:
    """Return by how many bytes the weights on the device shrink if the chosen parts are quantised.

    Args:
        transformer: The model before `quantise`, on any device.
        parts: Parts from `eight_bit_parts`.
    """
    weights = [linear.weight for name, linear in _block_linears(transformer) if name in parts.linears]
    return sum(weight.numel() * (weight.element_size() - 1) - 4 * len(weight) for weight in weights)


@contextlib.contextmanager
def eight_bit(transformer: Any, parts: EightBitParts | None) -> Iterator[None]:
    """Compute the Linears of a transformer in 8 bits inside the block; with None, nothing changes."""
    if parts is None:
        yield
        return
    quantise(transformer, parts)
    try:
        yield
    finally:
        restore(transformer)
