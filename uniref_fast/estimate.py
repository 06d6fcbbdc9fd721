"""`estimate(pipe, requests)` computes tokens, floating point operations and memory of an edit before it runs.

Operations count multiply and add as two. Only matrix products and convolutions are counted; the numbers are exact for
the transformer and for the VAE, which runs on the meta device. Activation memory is the peak of the living tensors of a
stage, from a run on the meta device (for the text encoder from a formula). Workspaces of convolution and matmul
libraries and memory that the allocator holds in reserve are not included. Attention is counted as fused everywhere,
also for the VAE's one head of 384 dimensions: PyTorch's flash attention supports at most 256 and cuDNN's fewer, so a
GPU uses the memory-efficient kernel, which has no limit and accumulates its output in a float32 buffer.

The first call of a *patched* pipeline needs more memory than the estimate: for its self-check it also runs the code of
diffusers between the Linears of each block. `edit` has no such check.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from uniref_fast import builtin
from uniref_fast.encode import condition_tokens, prompt_tokens, text_runs
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.meta_device import FusedAttention, LivingTensors
from uniref_fast.model_kind import check_configuration, check_pipeline
from uniref_fast.models.qwen_image import PackedQwenImage, find_transformer
from uniref_fast.packing import next_fit
from uniref_fast.quantised import compute_dtype, largest_cast, planned_bytes, stored_tensors
from uniref_fast.request import EditRequest, Geometry, check_size, geometry, request_geometry, validated
from uniref_fast.visibility import AttentionPlan, Rule, plan, target_plan

__all__ = ["Estimate", "Stage", "estimate", "skeleton"]


@dataclass(frozen=True)
class Stage:
    """One stage of an edit.

    Attributes:
        name: "text encoder", "VAE encode", "transformer" or "VAE decode".
        flops: Floating point operations over the whole edit.
        weight_bytes: Memory of the weights in bytes.
        activation_bytes: Estimated peak of the activations in bytes.
    """

    name: str
    flops: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Tokens, operations and memory of an edit. `str(estimate)` is a table.

    Attributes:
        stages: Stages in the order in which they run.
        layout: Layout of all sequences of the first step in one pack.
        tokens: Number of tokens of that layout, by kind.
        attention_share: Share of attention in the transformer's operations.
    """

    stages: tuple[Stage, ...]
    layout: SelfLayout
    tokens: dict[str, int]
    attention_share: float

    @property
    def flops(self) -> int:
        """Floating point operations of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; text encoder, VAE and transformer are each counted once."""
        return sum(stage.weight_bytes for stage in self.stages if stage.name != "VAE decode")

    @property
    def peak_bytes(self) -> int:
        """Bytes of all weights and of the activations of the largest stage."""
        return self.weight_bytes + max(stage.activation_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes,
            "attention_share": self.attention_share,
            "stages": [
                {
                    "name": s.name,
                    "flops": s.flops,
                    "share": s.flops / self.flops,
                    "weight_bytes": s.weight_bytes,
                    "activation_bytes": s.activation_bytes,
                }
                for s in self.stages
            ],
        }

    def __str__(self) -> str:
        tokens = ", ".join(f"{n} {kind}" for kind, n in self.tokens.items())
        lines = [
            f"tokens      {tokens}",
            f"{'stage':<14}{'TFLOP':>12}{'share':>8}{'weights':>12}{'activations':>14}",
        ]
        for s in self.stages:
            lines.append(
                f"{s.name:<14}{s.flops / 1e12:>12.4g}{s.flops / self.flops:>8.1%}{_size(s.weight_bytes):>12}"
                f"{_size(s.activation_bytes):>14}"
            )
        lines.append(
            f"{'together':<14}{self.flops / 1e12:>12.4g}{'':>8}{_size(self.weight_bytes):>12}{'':>14}  peak about "
            f"{_size(self.peak_bytes)}"
        )
        lines.append(f"attention is {self.attention_share:.1%} of the transformer's operations")
        return "\n".join(lines)


def estimate(
    pipe: Any,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    *,
    image_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    budget: int | None = None,
    max_tokens: int | None = None,
    visibility: str | Rule = "full",
) -> Estimate:
    """Estimate `edit(pipe, requests, ...)` without running a model.

    Args:
        pipe: A `QwenImageEditPlusPipeline`, or the folder or hub id of one. Of a folder or hub id only configurations,
            tokenizer and processor are read, and weights count as bfloat16.
        requests: Requests, as for `edit`.
        image_sizes: Width and height in pixels of the references of each request, whose `images` are then empty.
        budget: Joint pixel budget of each request's references, as for `edit`.
        max_tokens: Largest number of tokens in one pack, as for `edit`.
        visibility: Policy or rule of attention, as for `edit`.

    Raises:
        ValueError: If `edit` would raise one before any work is done.
        TypeError: Likewise.
        OSError: If a configuration of a folder or hub id cannot be read.
    """
    if isinstance(pipe, (str, os.PathLike)):
        pipe = skeleton(pipe)
    check_pipeline(pipe)
    transformer = find_transformer(pipe)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    requests = validated(requests, pipe)
    sizes = _geometries(pipe, requests, image_sizes, budget)
    texts = [_text_lengths(pipe, *pair) for pair in zip(requests, sizes, strict=True)]
    rows = [(size.sample(text), request.num_inference_steps)
            for request, size, lengths in zip(requests, sizes, texts, strict=True) for text in lengths]  # fmt: skip
    model = PackedQwenImage(transformer, visibility=visibility)
    layout = model.layout([sample for sample, _ in rows])
    linear, attention = _transformer_flops(model, rows)
    pixels = [size for item in sizes for size in item.reference_sizes]
    results = [item.size for item in sizes]
    encoded = [
        [length for length, (_, embeds, _) in zip(lengths, request.texts, strict=True) if embeds is None]
        for request, lengths in zip(requests, texts, strict=True)
    ]
    text_flops, text_peak = _text_encoder(pipe, sizes, encoded)
    # every request keeps embeddings, and latents of references and target, from its encoding to its decoding
    embeddings = sum(sum(lengths) for lengths in texts) * transformer.config.joint_attention_dim
    latents = sum(item.sample(0).length for item in sizes) * transformer.config.in_channels
    held = (embeddings + latents) * compute_dtype(transformer).itemsize
    peak = held + _packs_peak(model, [sample for sample, _ in rows], max_tokens)
    vae_bytes = _weight_bytes(pipe.vae)
    encode_flops, encode_peak = _vae(pipe, pixels, "encode")
    decode_flops, decode_peak = _vae(pipe, results, "decode")
    stages = (
        Stage("text encoder", text_flops, _weight_bytes(pipe.text_encoder), text_peak),
        Stage("VAE encode", encode_flops, vae_bytes, encode_peak),
        Stage("transformer", linear + attention, _weight_bytes(transformer), peak),
        Stage("VAE decode", decode_flops, vae_bytes, held + decode_peak),
    )
    tokens = {"text": layout.text_length}
    tokens["target"] = sum(s.length for s in layout.targets)
    tokens["reference"] = layout.image_length - tokens["target"]
    tokens["together"] = layout.joint_length
    return Estimate(stages, layout, tokens, attention / (linear + attention))


def _transformer_flops(model: PackedQwenImage, rows: Sequence[tuple[Sample, int]]) -> tuple[int, int]:
    """Return the sum of `transformer_flops` over the steps of all (sample, number of steps)."""
    linear = attention = 0
    for sample, steps in rows:  # a sample's operations do not depend on its pack
        counts = transformer_flops(model.transformer.config, model.layout([sample]), model.visibility)
        linear += counts[0] * steps
        attention += counts[1] * steps
    return linear, attention


def _packs_peak(model: PackedQwenImage, samples: Sequence[Sample], max_tokens: int | None) -> int:
    """Return the peak bytes of the largest pack, with the image streams of all other packs."""
    packs = next_fit([sample.length for sample in samples], max_tokens)
    longest = max(packs, key=lambda pack: sum(samples[i].length for i in pack))
    largest = model.layout([samples[i] for i in longest])
    others = model.layout(samples).image_length - largest.image_length
    streams = others * model.transformer.config.in_channels * compute_dtype(model.transformer).itemsize
    return streams + transformer_peak(model.transformer, largest)


def _geometries(
    pipe: Any,
    requests: Sequence[EditRequest],
    image_sizes: Sequence[Sequence[tuple[int, int]]] | None,
    budget: int | None,
) -> list[Geometry]:
    if image_sizes is None:
        return [request_geometry(pipe, request, budget) for request in requests]
    if len(image_sizes) != len(requests):
        raise ValueError(f"image_sizes has sizes for {len(image_sizes)} requests, and {len(requests)} are given")
    geometries = []
    for i, (request, sizes) in enumerate(zip(requests, image_sizes, strict=True), start=1):
        if request.images:
            raise ValueError(f"request {i}: give images or image_sizes, not both")
        for j, size in enumerate(sizes, start=1):
            check_size(size, f"request {i}: image {j}")
        geometries.append(geometry(pipe, sizes, width=request.width, height=request.height, budget=budget))
    return geometries


def skeleton(name: str | os.PathLike, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a pipeline without weights: models on the meta device; tokenizer, processor and scheduler loaded.

    Args:
        name: A diffusers pipeline folder or hub id.
        dtype: Dtype of the parameters on the meta device.

    Raises:
        OSError: If a configuration is missing or cannot be loaded.
        ValueError: If the model is of another kind.
    """
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(name)
    check_configuration(str(name), index)
    transformer = diffusers.QwenImageTransformer2DModel.load_config(name, subfolder="transformer")
    check_configuration(str(name), index, transformer)
    parts: dict[str, Any] = {}
    for part, spec in index.items():
        if not (isinstance(spec, (list, tuple)) and len(spec) == 2):
            continue
        own = spec[1] == "BuiltinProcessor" or (
            spec[1] == "Qwen2VLProcessor" and importlib.util.find_spec("torchvision") is None
        )  # transformers' own needs torchvision, for its videos
        if not own and spec[0] not in ("diffusers", "transformers"):
            continue
        part_class = builtin.BuiltinProcessor if own else getattr(importlib.import_module(spec[0]), spec[1])
        if not issubclass(part_class, torch.nn.Module):
            parts[part] = part_class.from_pretrained(name, subfolder=part)
            continue
        with torch.device("meta"):
            if spec[0] == "diffusers":
                model = part_class.from_config(part_class.load_config(name, subfolder=part))
            else:
                model = part_class(part_class.config_class.from_pretrained(name, subfolder=part))
            for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as they are
                parameter.data = parameter.data.to(dtype)
            parts[part] = model
    if areas := builtin.recorded_areas(index, getattr(parts.get("transformer"), "config", {})):
        return builtin.SmallQwenImageEditPlusPipeline(**parts, **areas)
    return getattr(diffusers, index["_class_name"])(**parts)


def transformer_flops(config: Any, layout: SelfLayout, visibility: str | Rule = "full") -> tuple[int, int]:
    """Return (linear, attention) floating point operations of one packed forward.

    Args:
        config: Configuration of the `QwenImageTransformer2DModel`.
        layout: Layout of the pack.
        visibility: Policy or rule of attention.
    """
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
    whole: AttentionPlan = plan(layout, visibility)
    area = (blocks - 1) * whole.area + target_plan(layout, visibility).area
    return 2 * linear, 4 * area * width


def _text_lengths(pipe: Any, request: EditRequest, sizes: Geometry) -> list[int]:
    """Return the numbers of text tokens of the prompt and, with guidance, of the negative prompt."""
    lengths = []
    for text, embeds, mask in request.texts:
        runs = prompt_tokens(pipe, text or "", sizes.condition_sizes) if embeds is None else (
            text_runs(embeds.shape[-2], mask))  # fmt: skip
        lengths.append(runs if isinstance(runs, int) else sum(length for length, _ in runs))
    return lengths


def _text_encoder(pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
    """Return the operations of the text encoder, which runs once per prompt, and the peak of its largest run."""
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


def _vae(pipe: Any, sizes: Sequence[tuple[int, int]], direction: str) -> tuple[int, int]:
    """Return the operations for all images, and the peak of the largest one."""
    vae, vae_class = pipe.vae, cast(Any, type(pipe.vae))
    config = tuple(sorted((k, _hashable(v)) for k, v in vae.config.items() if not k.startswith("_")))
    settings = tuple(
        sorted((k, v) for k, v in vars(vae).items() if k.startswith(("use_tiling", "use_slicing", "tile_")))
    )
    counts = [_vae_image(vae_class, config, settings, compute_dtype(vae), size, direction) for size in sizes]
    weight = largest_cast(vae) if sizes else 0
    return sum(flops for flops, _ in counts), max((peak for _, peak in counts), default=0) + weight


@functools.lru_cache(maxsize=256)
def _vae_image(
    vae_class: Any, config: tuple, settings: tuple, dtype: torch.dtype, size: tuple[int, int], direction: str
) -> tuple[int, int]:
    """Return operations and peak memory for one image, from a run of the same architecture on the meta device."""
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


def _weight_bytes(module: torch.nn.Module | None) -> int:
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


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} GiB"
