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
from collections.abc import Sequence
from typing import Any, cast

import torch

from uniref_fast.encode import condition_tokens
from uniref_fast.layout import SelfLayout
from uniref_fast.meta_device import FusedAttention, LivingTensors
from uniref_fast.models.kept_references import kept_step
from uniref_fast.models.qwen_image import PackedQwenImage
from uniref_fast.quantised import compute_dtype, largest_cast, planned_bytes, stored_tensors
from uniref_fast.request import Geometry
from uniref_fast.visibility import AttentionPlan, Rule, plan, target_plan

__all__ = ["text_encoder_cost", "transformer_flops", "transformer_peak", "vae_cost", "vae_image_cost", "weight_bytes"]


def transformer_flops(
    config: Any, layout: SelfLayout, visibility: str | Rule = "full", *, kept: bool = False
) -> tuple[int, int]:
    """Return (linear, attention) floating point operations of one packed forward.

    Args:
        config: Configuration of the `QwenImageTransformer2DModel`.
        layout: Layout of the pack.
        visibility: Policy or rule of attention.
        kept: Count a step that takes the keys and values of the references from a store.
    """
    whole: AttentionPlan = plan(layout, visibility)
    last = target_plan(layout, visibility)
    if kept:
        computed = kept_step(layout)
        layout, whole = computed.layout, computed.plan(visibility)
    width = config.num_attention_heads * config.attention_head_dim
    text, image, targets = layout.text_length, layout.image_length, sum(s.length for s in layout.targets)
    rows, samples = layout.num_modulation_rows, layout.num_samples
    blocks = config.num_layers
    out = config.patch_size**2 * config.out_channels
    qkv, rest = 3 * width**2, 9 * width**2  # output projection and the 4x feed-forward
    linear = blocks * qkv * (text + image) + (blocks - 1) * rest * (text + image) + rest * targets
    linear += blocks * 6 * width**2 * (rows + samples)  # modulation of both streams
    linear += rows * (256 * width + width**2) + rows * 2 * width**2  # timestep embedding, last modulation
    linear += image * config.in_channels * width + text * config.joint_attention_dim * width + targets * width * out
    area = (blocks - 1) * whole.area + last.area
    return 2 * linear, 4 * area * width


def text_encoder_cost(pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
    """Return the operations of the text encoder, which runs once per prompt, and the peak bytes of its largest run.

    Args:
        pipe: A `QwenImageEditPlusPipeline`, loaded or without weights.
        sizes: Sizes of each request.
        texts: Numbers of text tokens of the prompts of each request that are encoded.
    """
    if not any(texts):
        return 0, 0
    config = pipe.text_encoder.config
    language, vision = config.text_config, config.vision_config
    merge = pipe.processor.image_processor.merge_size**2
    flops = peak = 0
    width, head = language.hidden_size, language.hidden_size // language.num_attention_heads
    kv = language.num_key_value_heads * head
    layer = 2 * width**2 + 2 * width * kv + 3 * width * language.intermediate_size
    vision_layer = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    element = compute_dtype(pipe.text_encoder).itemsize
    for size, lengths in zip(sizes, texts, strict=True):
        patches = [condition_tokens(pipe, s) * merge for s in size.condition_sizes]
        for kept in lengths:
            tokens = kept + pipe.prompt_template_encode_start_idx
            flops += language.num_hidden_layers * (2 * layer * tokens + 4 * tokens**2 * width)
            flops += 2 * width * language.vocab_size * tokens  # diffusers calls the head as well
            flops += vision.depth * sum(2 * vision_layer * n + 4 * n**2 * vision.hidden_size for n in patches)
            states = (language.num_hidden_layers + 1) * width + language.vocab_size + 3 * language.intermediate_size
            peak = max(peak, tokens * states * element)
    return flops, peak


def vae_cost(pipe: Any, sizes: Sequence[tuple[int, int]], direction: str) -> tuple[int, int]:
    """Return the operations of the VAE for all images, and the peak bytes of the largest one.

    Args:
        pipe: A `QwenImageEditPlusPipeline`, loaded or without weights.
        sizes: Width and height in pixels of each image.
        direction: "encode" or "decode".
    """
    vae, vae_class = pipe.vae, cast(Any, type(pipe.vae))
    config = tuple(sorted((k, _hashable(v)) for k, v in vae.config.items() if not k.startswith("_")))
    settings = tuple(
        sorted((k, v) for k, v in vars(vae).items() if k.startswith(("use_tiling", "use_slicing", "tile_")))
    )
    counts = [vae_image_cost(vae_class, config, settings, compute_dtype(vae), size, direction) for size in sizes]
    weight = largest_cast(vae) if sizes else 0
    return sum(flops for flops, _ in counts), max((peak for _, peak in counts), default=0) + weight


@functools.lru_cache(maxsize=256)
def vae_image_cost(
    vae_class: Any, config: tuple, settings: tuple, dtype: torch.dtype, size: tuple[int, int], direction: str
) -> tuple[int, int]:
    """Return operations and peak bytes for one image, from a run of the same architecture on the meta device.

    Args:
        vae_class: Class of the VAE.
        config: Its configuration, as sorted (name, value) pairs.
        settings: Attributes that decide its tiling, likewise.
        dtype: Dtype of the computation.
        size: Width and height in pixels.
        direction: "encode" or "decode".
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        vae = vae_class(**{k: list(v) if isinstance(v, tuple) else v for k, v in config})
        torch.nn.Module.to(vae, dtype)
        vars(vae).update(settings)
        factor = 2 ** len(vae.temperal_downsample)
        width, height = size
        with FlopCounterMode(display=False) as counter, LivingTensors() as memory, FusedAttention() as attention:
            if direction == "encode":
                vae.encode(torch.empty(1, 3, 1, height, width, dtype=dtype))
            else:
                vae.decode(torch.empty(1, vae.config.z_dim, 1, height // factor, width // factor, dtype=dtype))
    return counter.get_total_flops() + attention.flops, memory.peak


def transformer_peak(transformer: Any, layout: SelfLayout) -> int:
    """Return the peak bytes of living tensors of one packed forward, its inputs included.

    Args:
        transformer: A `QwenImageTransformer2DModel`, loaded or on the meta device, quantised or not.
        layout: Layout of the pack.
    """
    config = transformer.config
    sizes = {
        name: value for name, value in config.items() if not name.startswith("_") and name != "quantization_config"
    }
    sizes["num_layers"] = min(config.num_layers, 3)  # all blocks between the first and the last are equal
    shape = tuple(sorted((k, _hashable(v)) for k, v in sizes.items()))
    return _packed_peak(shape, compute_dtype(transformer), layout) + largest_cast(transformer)


@functools.lru_cache(maxsize=8)
def _packed_peak(config: tuple, dtype: torch.dtype, layout: SelfLayout) -> int:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"), torch.no_grad():
        model: Any = QwenImageTransformer2DModel(**dict(config))
        packed = PackedQwenImage(torch.nn.Module.to(model, dtype), impl="native")
        with LivingTensors() as memory:
            image = torch.empty(layout.image_length, model.config.in_channels, dtype=dtype)
            text = torch.empty(layout.text_length, model.config.joint_attention_dim, dtype=dtype)
            packed(image, text, torch.empty(layout.num_samples, dtype=dtype), layout)
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


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
