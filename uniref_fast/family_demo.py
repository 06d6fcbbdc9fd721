"""Demonstration of a family of models on small pipelines with random weights: stock against `patch` and `edit`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.demo import GUIDANCE, MAX_REL_ERROR_FLOAT32, heldout_scenes
from uniref_fast.edit import edit
from uniref_fast.models.families import families
from uniref_fast.models.family import Family
from uniref_fast.patch import patch
from uniref_fast.request import EditRequest, validated_one
from uniref_fast.sheets import contact_sheet, difference
from uniref_fast.testing import error_budget, max_relative_error

__all__ = ["PipelineResult", "demo_family", "demo_requests", "report", "run_family_demo", "stock_edit"]

REQUESTS = 6
GRID = 8  # side in tokens of a square with the area of a reference and of a result
TEXT_LENGTH = 24  # of given prompt embeddings


@dataclass(frozen=True)
class PipelineResult:
    """Figures of one pipeline of a demonstration.

    Attributes:
        pipeline: Class of the pipeline.
        text: Source of the embeddings of the prompts.
        references: Numbers of references of the requests.
        patch_error: Error of the patched pipeline for the first request. In float32 it is `max|result - stock| /
            max|stock|` of the image; in another dtype it is taken against float32 with the same weights.
        edit_error: Largest error of the requests that `edit` computed in one packed loop, likewise.
        tolerance: Largest accepted error: 1e-4 in float32; otherwise the error budget, which is twice the error of the
            stock pipeline plus one rounding band.
        equal: True if both errors are within the tolerance.
        stock_seconds: Time of the fastest stock run of the first request, in seconds.
        patched_seconds: Time of the fastest patched run, in seconds; the runs alternate with the stock runs.
        speedup: Stock time divided by patched time.
        one_by_one_seconds: Time of the fastest stock run of all requests one after the other, in seconds.
        packed_seconds: Time of the fastest packed loop of all requests, in seconds; the runs alternate.
        packed_speedup: Time one by one divided by the time of the packed loop.
        accelerated_calls: Number of calls of patched sites that were accelerated.
        original_calls: Number of calls of patched sites that ran the original code.
    """

    pipeline: str
    text: str
    references: tuple[int, ...]
    patch_error: float
    edit_error: float
    tolerance: float
    equal: bool
    stock_seconds: float
    patched_seconds: float
    speedup: float
    one_by_one_seconds: float
    packed_seconds: float
    packed_speedup: float
    accelerated_calls: int
    original_calls: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def demo_family(name: str) -> Family:
    """Return the family with a name that a demonstration can show.

    Raises:
        ValueError: If no family has the name, or it has no small pipelines.
    """
    known = [family.name for family in families() if family.random_pipelines()]
    for family in families():
        if family.name == name and name in known:
            return family
    near = get_close_matches(name, known, n=1)
    raise ValueError(
        f"no small models of a family {name!r} can be built; families: {', '.join(known)}"
        + (f"; nearest: {near[0]}" if near else "")
    )


def run_family_demo(
    family: Family,
    *,
    seed: int = 0,
    references: int = 3,
    num_inference_steps: int = 8,
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[PipelineResult], Image.Image]:
    """Edit requests of different sizes and numbers of references with every small pipeline of a family.

    Each pipeline runs unchanged, patched, and in one packed loop of `uniref_fast.edit`, and the results are compared.

    Args:
        family: The family.
        seed: Seed of the images and the noise.
        references: Largest number of references of a request.
        num_inference_steps: Number of denoising steps, at least 2, with guidance where the pipeline has it.
        repeats: Number of timed runs of each kind, which alternate.
        dtype: Data type of the weights, torch.float32 or torch.bfloat16.
        device: Device to run on.
        log: Function that is called with lines about the progress.

    Returns:
        The figures of each pipeline and a contact sheet.
    """
    if num_inference_steps < 2 or repeats < 1:
        raise ValueError(
            f"the demo needs at least 2 denoising steps and 1 repeat, got {num_inference_steps} and {repeats}"
        )
    results, rows = [], []
    for name in family.random_pipelines():
        log(f"building a small {name} with random weights")
        pipe = family.random_pipeline(name, dtype, grid=GRID).to(device)
        requests = demo_requests(family, pipe, GRID, references, num_inference_steps, seed)
        log(f"{name}: editing {len(requests)} requests, stock one by one and packed")
        result, images = _compare(family, name, pipe, requests, repeats, log)
        results.append(result)
        rows += _rows(result, requests[0], images)
    caption = "The weights are random: the images only show that the results agree.\n" + "\n".join(map(_line, results))
    return results, contact_sheet(rows, f"{family.name}, stock and uniref_fast", caption, cell=128)


def demo_requests(
    family: Family, pipe: Any, grid: int, references: int, num_inference_steps: int, seed: int = 0
) -> list[EditRequest]:
    """Return requests with sizes and numbers of references of their own; the first has the most references.

    Args:
        family: Family of the pipeline.
        pipe: The pipeline. Without a text encoder, the requests have embeddings of prompts.
        grid: Side in tokens of a square with the area of a reference and of a result.
        references: Largest number of references.
        num_inference_steps: Number of denoising steps.
        seed: Seed of the images and of the noise.
    """
    most = family.most_references(pipe)
    counts = [min(k, most or k) for k in range(references, 0, -1)]
    patch = family.geometry(pipe, [(256, 256)]).patch
    narrow, wide = 2 * round(grid * 0.375), 2 * round(grid * 0.625)  # even numbers of tokens, of about the same area
    sizes = [(x * patch, y * patch) for x, y in ((grid, grid), (narrow, wide), (wide, narrow))]
    embeds = None
    if not has_text_encoder(pipe):
        width = family.text_channels(pipe.transformer.config)
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(REQUESTS, TEXT_LENGTH, width, generator=generator).to(pipe.transformer.dtype)
    requests = []
    for i, count in zip(range(REQUESTS), itertools.cycle(counts)):
        (scene,) = heldout_scenes(seed + i, count, 1)
        resized = [image.resize(sizes[(i + j) % 3]) for j, image in enumerate(scene.references[:count])]
        width, height = sizes[i // 2]
        text: dict[str, Any] = {"prompt": family.written(scene.instruction)}
        if embeds is not None:
            text = {"prompt_embeds": embeds[i].to(pipe.device)}
        request = EditRequest(
            images=resized, true_cfg_scale=GUIDANCE, seed=seed + i, num_inference_steps=num_inference_steps,
            width=width, height=height, **text,
        )  # fmt: skip
        if embeds is None and not validated_one(request, "the request", pipe).guided:  # without a negative prompt
            request = replace(request, negative_prompt=family.usual_negative_prompt())
        requests.append(request)
    return requests


def has_text_encoder(pipe: Any) -> bool:
    """Return True if a pipeline can encode prompts."""
    return pipe.components.get("text_encoder") is not None


def stock_edit(family: Family, pipe: Any, request: EditRequest) -> Tensor:
    """Return the image of a request, `[C, H, W]` from 0 to 1, as the pipeline itself computes it."""
    return pipe(**family.stock_arguments(pipe, request), output_type="pt").images[0]


def _compare(
    family: Family, name: str, pipe: Any, requests: Sequence[EditRequest], repeats: int, log: Callable[[str], None]
) -> tuple[PipelineResult, tuple[Tensor, Tensor, Tensor]]:
    """Return the figures of a pipeline, and the first request's image of stock, `patch` and `edit`."""
    dtype, device = pipe.transformer.dtype, pipe.device
    own = family.random_pipeline(name, dtype, grid=GRID).to(device)  # the same weights, to be patched
    report = patch(own)

    def patched() -> list[Tensor]:
        return [stock_edit(family, own, requests[0])]

    def stock() -> list[Tensor]:
        return [stock_edit(family, pipe, requests[0])]

    def one_by_one() -> list[Tensor]:
        return [stock_edit(family, pipe, request) for request in requests]

    def packed() -> list[Tensor]:
        return edit(pipe, requests, output_type="pt", progress=False)

    expected, together, replaced = one_by_one(), packed(), patched()  # they also warm up
    compared, budget = expected, MAX_REL_ERROR_FLOAT32
    if dtype != torch.float32:
        log(f"{name}: running the requests in float32 for the error budget")
        wide = family.random_pipeline(name, torch.float32, grid=GRID).to(device)
        for part, module in pipe.components.items():
            if isinstance(module, torch.nn.Module):
                wide.components[part].load_state_dict(module.state_dict())
        compared = [stock_edit(family, wide, _in_float32(request)) for request in requests]
        budget = max(error_budget(a, b, dtype) / b.abs().max().item() for a, b in zip(expected, compared, strict=True))
    patch_error = max_relative_error(replaced[0], compared[0])
    edit_error = max(max_relative_error(a, b) for a, b in zip(together, compared, strict=True))
    seconds = [
        _fastest(first, second, repeats, lambda turn: log(f"{name}: timing in turns, {turn + 1} of {repeats}"))
        for first, second in ((stock, patched), (one_by_one, packed))
    ]
    return PipelineResult(
        pipeline=name,
        text="prompts" if has_text_encoder(pipe) else "given embeddings: this small pipeline has no text encoder",
        references=tuple(len(request.images) for request in requests),
        patch_error=patch_error,
        edit_error=edit_error,
        tolerance=budget,
        equal=max(patch_error, edit_error) <= budget,
        stock_seconds=seconds[0][0],
        patched_seconds=seconds[0][1],
        speedup=seconds[0][0] / seconds[0][1],
        one_by_one_seconds=seconds[1][0],
        packed_seconds=seconds[1][1],
        packed_speedup=seconds[1][0] / seconds[1][1],
        accelerated_calls=report.calls.total(),
        original_calls=sum(report.fallbacks.values()),
    ), (expected[0], replaced[0], together[0])


def _in_float32(request: EditRequest) -> EditRequest:
    embeds = request.prompt_embeds
    return request if embeds is None else replace(request, prompt_embeds=embeds.float())


def _fastest(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, log: Callable[[int], None]
) -> tuple[float, float]:
    """Return the fastest times of two functions in seconds; the runs alternate."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        log(turn)
        for times, call in zip(seconds, (first, second), strict=True):
            start = time.perf_counter()
            result = call()
            if result[0].is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(seconds[0]), min(seconds[1])


# ---- text and images of the result ----


def report(results: Sequence[PipelineResult], dtype: str, device: str) -> str:
    """Return the figures of all pipelines as text."""
    lines = []
    for result in results:
        lines += [
            result.pipeline,
            f"  requests      {len(result.references)}, with {', '.join(map(str, result.references))} references; "
            f"{dtype} on {device}",
            f"  text          {result.text}",
            f"  patch         max relative error {result.patch_error:.2e} (allowed {result.tolerance:.2e}); "
            f"{result.accelerated_calls} accelerated calls, {result.original_calls} of the original",
            f"  edit          max relative error {result.edit_error:.2e} (allowed {result.tolerance:.2e})",
            f"  one request   stock {result.stock_seconds:.3f} s, patched {result.patched_seconds:.3f} s "
            f"({result.speedup:.2f}x)",
            f"  all requests  stock one by one {result.one_by_one_seconds:.3f} s, packed {result.packed_seconds:.3f} s "
            f"({result.packed_speedup:.2f}x)",
        ]
    return "\n".join(lines)


def _line(result: PipelineResult) -> str:
    verdict = "equal" if result.equal else "NOT equal"
    errors = f"{result.patch_error:.1e} patched and {result.edit_error:.1e} packed (allowed {result.tolerance:.0e})"
    times = f"patched {result.speedup:.2f}x, packed {result.packed_speedup:.2f}x"
    return f"{result.pipeline}: {verdict}, max relative error {errors}; {times}"


def _rows(
    result: PipelineResult, request: EditRequest, images: tuple[Tensor, Tensor, Tensor]
) -> list[list[tuple[str, Image.Image]]]:
    stock, patched, packed = map(_picture, images)
    outputs = [
        ("stock", stock), ("patch", patched), ("edit", packed), ("difference x 1000", difference(stock, packed, 1000)),
    ]  # fmt: skip
    return [[*((f"picture {i}", image) for i, image in enumerate(request.images, start=1)), *outputs]]


def _picture(image: Tensor) -> Image.Image:
    values = (image.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
