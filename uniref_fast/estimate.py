"""`estimate(pipe, requests)` computes sizes, tokens, operations, memory and time of an edit before it runs.

The module `costs` says what is counted. The first call of a *patched* pipeline needs more memory than the estimate:
for its self-check it also runs the code of diffusers between the Linears of each block. `edit` has no such check.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch

from uniref_fast.costs import offloaded_weights, text_encoder_cost, transformer_peak, vae_cost, weight_bytes
from uniref_fast.encode import request_texts, text_length
from uniref_fast.fast import check_mode, eight_bit_parts, saved_bytes
from uniref_fast.gpu_memory import fits_text, size_text
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.model_kind import check_pipeline
from uniref_fast.models.families import family_of, find_transformer
from uniref_fast.models.image_sizes import ImageOfSize
from uniref_fast.models.kept_references import (
    KeepDtype,
    RefreshSchedule,
    check_keep_dtype,
    dependence,
    kept_bytes,
)
from uniref_fast.models.packed import PackedModel
from uniref_fast.packing import next_fit
from uniref_fast.patch.install import patched_parts
from uniref_fast.quantised import compute_dtype
from uniref_fast.request import EditRequest, as_list, request_geometry, validated
from uniref_fast.skeleton import skeleton
from uniref_fast.speeds import MeasuredTime, edit_time, model_key
from uniref_fast.tuning import named_device
from uniref_fast.visibility import Rule

__all__ = ["Estimate", "Stage", "estimate"]


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
    """Sizes, tokens, operations, memory and time of an edit. `str(estimate)` is a text with a table.

    Attributes:
        stages: Stages in the order in which they run.
        layout: Layout of all sequences of the first step in one pack.
        tokens: Number of tokens of that layout, by kind.
        attention_share: Share of attention in the transformer's operations.
        results: Width and height in pixels of each image of the results.
        time: Seconds of the edit from measurements on the device, or the reason why there is no figure.
        computed_references: Number of steps of each request that compute its references; None if their drift decides
            it, and the operations are then those of computing them in every step.
        kept_bytes: Memory of the keys and values that are kept in the other steps, in bytes. It is part of the
            activations of the transformer.
        offload: "model" or "block" if the weights are in host memory and are brought to the device while they are used.
        resident_bytes: Bytes of weights that are on the device in each stage; all weights without offloading.
    """

    stages: tuple[Stage, ...]
    layout: SelfLayout
    tokens: dict[str, int]
    attention_share: float
    results: tuple[tuple[int, int], ...]
    time: MeasuredTime
    computed_references: tuple[int | None, ...] = ()
    kept_bytes: int = 0
    offload: str | None = None
    resident_bytes: tuple[int, ...] = ()

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
        """Bytes of the weights on the device and of the activations, in the stage that has most of both."""
        return max(weights + s.activation_bytes for weights, s in zip(self.resident_bytes, self.stages, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return {
            "results": [list(size) for size in self.results],
            "tokens": self.tokens,
            "seconds": self.time.value,
            "seconds_source": self.time.source,
            "flops": self.flops,
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes,
            "attention_share": self.attention_share,
            "computed_references": list(self.computed_references),
            "kept_bytes": self.kept_bytes,
            "offload": self.offload,
            "resident_bytes": list(self.resident_bytes),
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
        sizes = ", ".join(f"{width} x {height}" for width, height in self.results)
        tokens = ", ".join(f"{n} {kind}" for kind, n in self.tokens.items())
        lines = [
            f"result      {sizes} pixels",
            f"tokens      {tokens}",
            f"{'stage':<14}{'TFLOP':>12}{'share':>8}{'weights':>12}{'activations':>14}",
        ]
        for s in self.stages:
            lines.append(
                f"{s.name:<14}{s.flops / 1e12:>12.4g}{s.flops / self.flops:>8.1%}{size_text(s.weight_bytes):>12}"
                f"{size_text(s.activation_bytes):>14}"
            )
        lines.append(f"{'together':<14}{self.flops / 1e12:>12.4g}{'':>8}{size_text(self.weight_bytes):>12}")
        lines.append(f"attention   {self.attention_share:.1%} of the transformer's operations")
        if self.kept_bytes:
            steps = ", ".join(
                "as their drift requires" if n is None else f"in {n} step(s)" for n in self.computed_references
            )
            lines.append(f"references  computed {steps}; {size_text(self.kept_bytes)} kept for the others")
            if None in self.computed_references:
                lines.append("            operations are those of computing them in every step")
        if self.offload:
            resident = ", ".join(
                f"{size_text(n)} ({s.name})" for n, s in zip(self.resident_bytes, self.stages, strict=True)
            )
            lines.append(f"offloading  by {self.offload}; weights on the device: {resident}")
        lines.append(f"memory      peak about {size_text(self.peak_bytes)}; {fits_text(self.peak_bytes)}")
        seconds = "" if self.time.value is None else f"{self.time.value:.3g} s: "
        lines.append(f"time        {seconds}{self.time.source}")
        return "\n".join(lines)


def estimate(
    pipe: Any,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    *,
    image_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    budget: int | None = None,
    pack_tokens: int | None = None,
    visibility: str | Rule = "full",
    device: str | torch.device | None = None,
    mode: str = "exact",
    modules_to_not_convert: Sequence[str] | None = None,
    keep_references: bool | int | Literal["auto"] = False,
    drift: float | None = None,
    keep_dtype: KeepDtype | None = None,
    quantisation: str | None = None,
    offload: str | None = None,
    capture: bool = False,
) -> Estimate:
    """Estimate `edit(pipe, requests, ...)` without running a model.

    Args:
        pipe: A pipeline of a supported family, or the folder or hub id of one. Of a folder or hub id only
            configurations, tokenizer and processor are read, and weights count as bfloat16.
        requests: Requests, as for `edit`.
        image_sizes: Width and height in pixels of the references of each request, whose `images` are then empty.
        budget: Joint pixel budget of each request's references, the side of a square in pixels, as for `edit`.
        pack_tokens: Largest number of tokens in one pack, as for `edit`.
        visibility: Policy or rule of attention, as for `edit`.
        device: Device whose measured times are used: "cpu" or "cuda" of this machine, or the name of a measured device,
            such as "h100-80gb-hbm3". None takes that of a loaded pipeline, else a GPU if there is one, else the CPU.
        mode: "fast" for a pipeline that `patch(pipe, mode="fast")` will quantise: the weights in 8 bits count as such.
            Activations count as in the mode "exact", which needs more.
        modules_to_not_convert: Names of modules that stay in 16 bits in the mode "fast", as for `patch`.
        keep_references: Steps that compute the references, as for `edit`.
        drift: Tolerance of `keep_references="auto"`, as for `edit`.
        keep_dtype: Data type of kept keys and values, as for `edit`.
        quantisation: Format in which text encoder and transformer will be stored, "int8", "fp8" or "nf4", as by
            `uniref-fast edit --quantisation`; for a folder or hub id. A loaded pipeline counts as it is stored.
        offload: "model" keeps text encoder, transformer and VAE in host memory and brings one at a time to the device,
            "block" single blocks of the transformer and layers of the others, as `uniref-fast edit --offload`. None
            keeps all weights on the device.
        capture: Count the memory of CUDA graphs, as for `edit`.

    Raises:
        ValueError: If `edit` would raise one before any work is done.
        TypeError: Likewise.
        OSError: If a configuration of a folder or hub id cannot be read.
    """
    if capture and offload is not None:
        raise ValueError(f'capture needs weights that stay on the device, got offload="{offload}"; leave one out')
    if offload not in (None, "model", "block"):
        raise ValueError(f'offload must be "model", "block" or None, got {offload!r}')
    if offload is not None and (quantisation is not None or check_mode(mode, modules_to_not_convert)):
        raise ValueError(
            f'offload="{offload}" needs the weights as they are stored, without mode="fast" and without quantisation'
        )
    if isinstance(pipe, (str, os.PathLike)):
        pipe = skeleton(pipe, quantisation=quantisation)
    elif quantisation is not None:
        raise ValueError(
            "quantisation plans a pipeline that is given by its folder or hub id; this one is loaded, and its weights "
            "count as they are stored"
        )
    check_pipeline(pipe)
    transformer, family = find_transformer(pipe), family_of(pipe)
    family.require("estimate")
    if pack_tokens is not None and pack_tokens < 1:
        raise ValueError(f"pack_tokens must be at least 1, got {pack_tokens}")
    requests = validated(_with_sizes(requests, image_sizes), pipe)
    sizes = [request_geometry(pipe, request, budget) for request in requests]
    runs = [request_texts(pipe, *pair) for pair in zip(requests, sizes, strict=True)]
    images = [request.num_images for request in requests]
    samples = [[size.sample(text) for text in group] * count
               for size, group, count in zip(sizes, runs, images, strict=True)]  # fmt: skip
    texts = [[text_length(text) for text in group] for group in runs]
    saved = _saved_bytes(transformer, mode, modules_to_not_convert)
    model = family.packed(transformer, visibility=visibility)
    if keep_references is False and family.keeps_references(transformer):
        keep_references = True
    layout = model.layout([sample for group in samples for sample in group])
    check_keep_dtype(keep_dtype)
    layouts = [model.layout(group) for group in samples]  # operations of a sample do not depend on its pack
    schedules = [RefreshSchedule.of(keep_references, drift, dependence(one, model.visibility)) for one in layouts]
    steps = [count for request in requests if (count := request.num_inference_steps) is not None]  # of every request
    computed = [count if schedule is None else schedule.refreshes(count)
                for schedule, count in zip(schedules, steps, strict=True)]  # fmt: skip
    linear, attention = _transformer_flops(model, layouts, steps, computed)
    dtype, shape = compute_dtype(transformer), model.sizes(transformer.config)
    kept = 0
    for one, schedule, count in zip(layouts, schedules, images, strict=True):
        if schedule is not None:  # images share what is never computed again
            copies = count if schedule == RefreshSchedule() else 1
            kept += kept_bytes(shape, one, dtype, keep_dtype) // copies
    pixels = [size for item in sizes for size in item.reference_sizes]
    decoded = [item.size for item, count in zip(sizes, images, strict=True) for _ in range(count)]
    results = [item.result_size for item, count in zip(sizes, images, strict=True) for _ in range(count)]
    encoded = [
        [length for length, (_, embeds, _) in zip(lengths, request.texts, strict=True) if embeds is None]
        for request, lengths in zip(requests, texts, strict=True)
    ]
    text_flops, text_peak = text_encoder_cost(pipe, sizes, encoded)
    # every request keeps embeddings, and latents of references and target, from its encoding to its decoding
    embeddings = sum(sum(lengths) for lengths in texts) * family.text_channels(transformer.config)
    targets = sum((count - 1) * item.target_tokens for item, count in zip(sizes, images, strict=True))
    latents = (targets + sum(item.sample(0).length for item in sizes)) * shape.token_channels
    held = (embeddings + latents) * dtype.itemsize
    packs = _packs_peak(model, [sample for group in samples for sample in group], pack_tokens)
    # The memory of CUDA graphs stays reserved beside that of the forwards which are not replayed.
    peak = held + kept + packs * (2 if capture else 1)
    vae_bytes = weight_bytes(pipe.vae)
    encode_flops, encode_peak = vae_cost(pipe, pixels, "encode")
    decode_flops, decode_peak = vae_cost(pipe, decoded, "decode")
    stages = (
        Stage("text encoder", text_flops, sum(map(weight_bytes, family.text_encoders(pipe))), text_peak),
        Stage("VAE encode", encode_flops, vae_bytes, encode_peak),
        Stage("transformer", linear + attention, weight_bytes(transformer) - saved, peak),
        Stage("VAE decode", decode_flops, vae_bytes, held + decode_peak),
    )
    tokens = {"text": family.text_rows(layout)}
    tokens["target"] = sum(s.length for s in layout.targets)
    tokens["reference"] = layout.image_length - tokens["target"]
    tokens["together"] = layout.joint_length
    time = _time(pipe, requests, tokens["together"], pack_tokens, model.visibility, device)
    if check_mode(mode):
        time = MeasuredTime(None, 'measured for the mode "exact" only')
    if keep_references is not False:
        time = MeasuredTime(None, "measured for edits that compute the references in every step")
    if capture:
        time = MeasuredTime(None, "measured without capture only")
    resident: tuple[int, ...]
    if offload is not None:
        time = MeasuredTime(None, "measured without offloading only")
        resident = offloaded_weights(pipe, offload, any(encoded), bool(pixels))
    else:
        resident = (sum(stage.weight_bytes for stage in stages[:3]),) * len(stages)
    share = attention / (linear + attention)
    return Estimate(stages, layout, tokens, share, tuple(results), time, tuple(computed), kept, offload, resident)


def _saved_bytes(transformer: Any, mode: str, modules_to_not_convert: Sequence[str] | None) -> int:
    """Return the bytes of weights that the mode "fast" moves to host memory; 0 if the weights are in 8 bits already."""
    if not check_mode(mode, modules_to_not_convert) or patched_parts(transformer) is not None:
        return 0
    return saved_bytes(transformer, eight_bit_parts(transformer, modules_to_not_convert))


def _time(
    pipe: Any,
    requests: Sequence[EditRequest],
    tokens: int,
    pack_tokens: int | None,
    visibility: Any,
    device: str | torch.device | None,
) -> MeasuredTime:
    """Return the measured time of the edit; only single edits with the policy "full" are measured."""
    if len(requests) > 1 or requests[0].num_images > 1 or pack_tokens is not None or visibility != "full":
        return MeasuredTime(None, 'measured for single requests of one image with the policy "full" only')
    transformer, (request,) = pipe.transformer, requests
    assert request.num_inference_steps is not None  # of a checked request
    if device is None:
        loaded = getattr(transformer, "device", torch.device("meta")).type
        device = loaded if loaded != "meta" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = str(compute_dtype(transformer)).removeprefix("torch.")
    key, name = model_key(family_of(transformer).packed.sizes(transformer.config)), named_device(device)
    return edit_time(key, dtype, request.guided, tokens, request.num_inference_steps, name)


def _transformer_flops(
    model: PackedModel, layouts: Sequence[SelfLayout], steps: Sequence[int], computed: Sequence[int | None]
) -> tuple[int, int]:
    """Return the sum of `transformer_flops` over all steps, of which `computed` compute the references."""
    linear = attention = 0
    for layout, total, whole in zip(layouts, steps, computed, strict=True):
        refreshes = total if whole is None else whole
        for kept, count in ((False, refreshes), (True, total - refreshes)):
            if count:
                family = family_of(model.transformer)
                flops = family.transformer_flops(model.transformer.config, layout, model.visibility, kept)
                linear += flops[0] * count
                attention += flops[1] * count
    return linear, attention


def _packs_peak(model: PackedModel, samples: Sequence[Sample], pack_tokens: int | None) -> int:
    """Return the peak bytes of the largest pack, with the image streams of all others and what all keep over steps."""
    packs = next_fit([sample.length for sample in samples], pack_tokens)
    longest = max(packs, key=lambda pack: sum(samples[i].length for i in pack))
    largest = model.layout([samples[i] for i in longest])
    whole, sizes = model.layout(samples), model.sizes(model.transformer.config)
    images = (whole.image_length - largest.image_length) * sizes.token_channels
    kept = model.constant_rows(whole) * sizes.width
    return (images + kept) * compute_dtype(model.transformer).itemsize + transformer_peak(model.transformer, largest)


def _is_size(value: Any) -> bool:
    """Return True for a width and a height in pixels."""
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(side, Integral) for side in value)


def _with_sizes(
    requests: Sequence[EditRequest | Mapping[str, Any]], image_sizes: Sequence[Sequence[tuple[int, int]]] | None
) -> Sequence[EditRequest | Mapping[str, Any]]:
    """Return requests whose images have the given sizes and no pixels; None for the sizes returns them unchanged."""
    if image_sizes is None:
        return requests
    requests = as_list(requests)
    if len(image_sizes) != len(requests):
        raise ValueError(f"image_sizes has sizes for {len(image_sizes)} requests, and {len(requests)} are given")
    planned: list[Any] = []
    for i, (request, sizes) in enumerate(zip(requests, image_sizes, strict=True), start=1):
        if not isinstance(sizes, Sequence) or not all(map(_is_size, sizes)):
            raise TypeError(
                f"request {i}: image_sizes must be a list with (width, height) in pixels for each image, got "
                f"{sizes!r:.80}"
            )
        given, images = None, [ImageOfSize((width, height)) for width, height in sizes]
        if isinstance(request, Mapping):
            given, request = request.get("images"), {**request, "images": images}
        elif isinstance(request, EditRequest):
            given, request = request.images, replace(request, images=images)
        if given:
            raise ValueError(f"request {i}: give images or image_sizes, not both")
        planned.append(request)
    return planned
