"""Operations and peak memory of the parts of a model, without running it.

Operations count multiply and add as two. Only matrix products and convolutions are counted; the numbers are exact for
the transformer and for the VAE, which runs on the meta device. Activation memory is the peak of the living tensors of a
part, from a run on the meta device (for the text encoder from a formula). Workspaces of convolution and matmul
libraries and memory that the allocator holds in reserve are not included. Attention is counted as fused everywhere,
also for the VAE's one head of 384 dimensions: PyTorch's flash attention supports at most 256 and cuDNN's fewer, so a
GPU uses the memory-efficient kernel, which has no limit and accumulates its output in a float32 buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

from uniref_fast.layout import SelfLayout
from uniref_fast.meta_device import FusedAttention, LivingTensors
from uniref_fast.models.families import families, family_of
from uniref_fast.models.family import Family
from uniref_fast.quantised import compute_dtype, largest_cast, planned_bytes, stored_tensors
from uniref_fast.request import Geometry
from uniref_fast.visibility import Rule

__all__ = [
    "offloaded_weights",
    "text_encoder_cost",
    "transformer_flops",
    "transformer_peak",
    "vae_cost",
    "vae_image_cost",
    "weight_bytes",
]


def transformer_flops(
    config: Any,
    layout: SelfLayout,
    visibility: str | Rule = "full",
    *,
    kept: bool = False,
    family: Family | None = None,
) -> tuple[int, int]:
    """Return (linear, attention) floating point operations of one packed forward.

    Args:
        config: Configuration of the transformer.
        layout: Layout of the pack.
        visibility: Policy or rule of attention.
        kept: Count a step that takes the keys and values of the references from a store.
        family: Family of the transformer; None is Qwen-Image-Edit.
    """
    return (family or families()[0]).transformer_flops(config, layout, visibility, kept)


def text_encoder_cost(pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
    """Return the operations of the text encoder, which runs once per prompt, and the peak bytes of its largest run.

    Args:
        pipe: A pipeline of a supported family, loaded or without weights.
        sizes: Sizes of each request.
        texts: Numbers of text tokens of the prompts of each request that are encoded.
    """
    return family_of(pipe).text_encoder_cost(pipe, sizes, texts) if any(texts) else (0, 0)


def vae_cost(pipe: Any, sizes: Sequence[tuple[int, int]], direction: str) -> tuple[int, int]:
    """Return the operations of the VAE for all images, and the peak bytes of the largest one.

    Args:
        pipe: A pipeline of a supported family, loaded or without weights.
        sizes: Width and height in pixels of each image.
        direction: "encode" or "decode".
    """
    vae, vae_class = pipe.vae, cast(Any, type(pipe.vae))
    config = tuple(sorted((k, _hashable(v)) for k, v in vae.config.items() if not k.startswith("_")))
    settings = tuple(
        sorted((k, v) for k, v in vars(vae).items() if k.startswith(("use_tiling", "use_slicing", "tile_")))
    )
    shapes = [family_of(pipe).vae_shape(vae, size, direction) for size in sizes]
    counts = [vae_image_cost(vae_class, config, settings, compute_dtype(vae), shape, direction) for shape in shapes]
    weight = largest_cast(vae) if sizes else 0
    return sum(flops for flops, _ in counts), max((peak for _, peak in counts), default=0) + weight


@functools.lru_cache(maxsize=256)
def vae_image_cost(
    vae_class: Any, config: tuple, settings: tuple, dtype: torch.dtype, shape: tuple[int, ...], direction: str
) -> tuple[int, int]:
    """Return operations and peak bytes for one image, from a run of the same architecture on the meta device.

    Args:
        vae_class: Class of the VAE.
        config: Its configuration, as sorted (name, value) pairs.
        settings: Attributes that decide its tiling, likewise.
        dtype: Dtype of the computation.
        shape: Shape of its input for the image (`Family.vae_shape`).
        direction: "encode" or "decode".
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        vae = vae_class(**{k: list(v) if isinstance(v, tuple) else v for k, v in config})
        torch.nn.Module.to(vae, dtype)
        vars(vae).update(settings)
        with FlopCounterMode(display=False) as counter, LivingTensors() as memory, FusedAttention() as attention:
            getattr(vae, direction)(torch.empty(shape, dtype=dtype))
    return counter.get_total_flops() + attention.flops, memory.peak


def transformer_peak(transformer: Any, layout: SelfLayout) -> int:
    """Return the peak bytes of living tensors of one packed forward, its inputs included.

    Args:
        transformer: A transformer of a supported family, loaded or on the meta device, quantised or not.
        layout: Layout of the pack.
    """
    config = transformer.config
    sizes = {
        name: value for name, value in config.items() if not name.startswith("_") and name != "quantization_config"
    }
    for name in ("num_layers", "num_single_layers", "n_layers"):
        if name in sizes:
            sizes[name] = min(sizes[name], 3)  # all blocks between the first and the last are equal
    shape = tuple(sorted((k, _hashable(v)) for k, v in sizes.items()))
    return _packed_peak(family_of(transformer), shape, compute_dtype(transformer), layout) + largest_cast(transformer)


@functools.lru_cache(maxsize=8)
def _packed_peak(family: Family, config: tuple, dtype: torch.dtype, layout: SelfLayout) -> int:
    with torch.device("meta"), torch.no_grad():
        model: Any = family.built(dict(config), layout)
        packed = family.packed(torch.nn.Module.to(model, dtype), impl="native")
        with LivingTensors() as memory:
            image = torch.empty(layout.image_length, packed.sizes(model.config).token_channels, dtype=dtype)
            text = torch.empty(family.text_rows(layout), family.text_channels(model.config), dtype=dtype)
            times = (layout.num_samples, 2) if packed.jumps else (layout.num_samples,)
            packed(image, text, torch.empty(times, dtype=dtype), layout)
    return memory.peak


def weight_bytes(module: torch.nn.Module | None) -> int:
    """Return the bytes of a model's parameters and buffers as they are stored."""
    if module is None:
        return 0
    planned = planned_bytes(module)
    if planned is not None:
        return planned
    storages: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        for part in stored_tensors(tensor):
            storages[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
    return sum(storages.values())


def offloaded_weights(pipe: Any, how: str, encoded: bool, references: bool) -> tuple[int, int, int, int]:
    """Return the bytes of weights on the device in each stage of an edit under `uniref_fast.loading.offload`.

    With "model", the hooks of diffusers take a part away only when the next one in the order text encoder, transformer,
    VAE is called: the text encoder stays while the VAE encodes, and the VAE then stays beside the transformer. With
    "block", the next block or layer is fetched while one computes.

    Args:
        pipe: The pipeline, loaded or without weights.
        how: "model" or "block".
        encoded: The text encoder runs.
        references: The VAE encodes references.

    Returns:
        Bytes for text encoder, VAE encode, transformer and VAE decode.

    Raises:
        ValueError: If blocks of a pipeline without weights have no size, because its configuration quantises them.
    """
    encoders = family_of(pipe).text_encoders(pipe)
    if how == "block":
        if any(part is not None and planned_bytes(part) is not None for part in (*encoders, pipe.transformer)):
            raise ValueError(
                'offload="block" needs the size of single blocks, which a configuration that quantises them does not '
                "give; load the pipeline, and estimate with it"
            )
        *texts, vae = (_two_largest(part.modules()) if part is not None else 0 for part in (*encoders, pipe.vae))
        return max(texts), vae, _two_blocks(pipe.transformer), vae
    text = max(map(weight_bytes, encoders)) if encoded else 0  # one after the other
    vae = weight_bytes(pipe.vae)
    encoding = text + (vae if references else 0)
    return encoding, encoding, weight_bytes(pipe.transformer) + (vae if references else 0), vae


def _two_blocks(transformer: torch.nn.Module) -> int:
    """Return the bytes of everything outside of the blocks and of the two largest blocks."""
    lists = [each for each in transformer.children() if isinstance(each, (torch.nn.ModuleList, torch.nn.Sequential))]
    blocks = [weight_bytes(block) for each in lists for block in each]
    return weight_bytes(transformer) - sum(blocks) + sum(sorted(blocks)[-2:])


def _two_largest(modules: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of the two largest layers."""
    layers = [weight_bytes(module) for module in modules if not any(True for _ in module.children())]
    return sum(sorted(layers)[-2:])


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
