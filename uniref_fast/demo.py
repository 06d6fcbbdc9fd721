"""Demonstration of the library on synthetic scenes with held-out objects: stock against patched, and a packed loop."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from uniref_fast import builtin
from uniref_fast.edit import edit
from uniref_fast.evaluation.metrics import psnr
from uniref_fast.guidance import EMPTY_PROMPT
from uniref_fast.patch import PatchReport, patch, unpatch
from uniref_fast.request import EditRequest
from uniref_fast.scenes.make import MakeConfig, SyntheticSample, artworks
from uniref_fast.scenes.render import render
from uniref_fast.scenes.tasks import scene_spec
from uniref_fast.sheets import contact_sheet, difference
from uniref_fast.testing import error_budget, max_relative_error

__all__ = ["DemoResult", "heldout_scenes", "run_demo"]

MAX_REL_ERROR_FLOAT32 = 1e-4
SIDE = 64  # pixels: side of the targets that the built-in model was trained on
GUIDANCE = 2.0  # true CFG scale
MORE = 5  # scenes that are edited in one packed loop


@dataclass(frozen=True)
class DemoResult:
    """Figures of one demonstration.

    Attributes:
        max_rel_error: Largest error relative to the largest value. In float32 it is `max|patched - stock| /
            max|stock|` of the final latents or the image, whichever is larger. In bfloat16 it is the error of the first
            prediction against float64 with the same weights and inputs, because later steps of an untrained model
            amplify any rounding, also that of the stock pipeline.
        tolerance: Largest accepted `max_rel_error`: 1e-4 in float32; in bfloat16 the error budget, which is twice the
            error of the stock pipeline plus one rounding band.
        equal: True if the error is within the tolerance.
        stock_seconds: Time of the fastest stock run, in seconds.
        patched_seconds: Time of the fastest patched run, in seconds; the runs alternate with the stock runs.
        speedup: Stock time divided by patched time.
        weights: "untrained" or "trained".
        psnr: PSNR of the first scene's edit against its target, in dB.
        packed_psnr: Mean PSNR of the scenes that were edited in one packed loop, in dB.
        packed_seconds: Time of the packed loop, in seconds.
        implementation: Implementation that served the operations, with its reason.
        accelerated_calls: Number of calls of patched sites that were accelerated, in all patched runs.
        original_calls: Number of calls of patched sites that ran the original code.
        instruction: Instruction of the first scene.
        dtype: Data type of the pipeline.
        device: Device of the pipeline.
        num_inference_steps: Number of denoising steps.
        references: Number of references of the first scene.
        seed: Seed of the scenes and the noise.
    """

    max_rel_error: float
    tolerance: float
    equal: bool
    stock_seconds: float
    patched_seconds: float
    speedup: float
    weights: str
    psnr: float
    packed_psnr: float
    packed_seconds: float
    implementation: str
    accelerated_calls: int
    original_calls: int
    instruction: str
    dtype: str
    device: str
    num_inference_steps: int
    references: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_demo(
    *,
    seed: int = 0,
    references: int = 3,
    num_inference_steps: int = 8,
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> tuple[DemoResult, Image.Image, PatchReport]:
    """Edit one scene with the stock and the patched pipeline, and more with `uniref_fast.edit` in one packed loop.

    Args:
        seed: Seed of the scenes and the noise.
        references: Number of references of the first scene, 1 to 3; the other scenes have 1 to 3.
        num_inference_steps: Number of denoising steps, at least 2, each with classifier-free guidance.
        repeats: Number of timed runs of each pipeline, which alternate.
        dtype: Data type, torch.float32 or torch.bfloat16.
        device: Device to run on.
        log: Function that is called with lines about the progress.

    Returns:
        The figures, a contact sheet, and the report of the patch.
    """
    steps = num_inference_steps
    if steps < 2 or repeats < 1:
        raise ValueError(f"the demo needs at least 2 denoising steps and 1 repeat, got {steps} and {repeats}")
    log("loading the built-in pipeline")
    pipe = builtin.load(dtype, device)
    pipe.set_progress_bar_config(disable=True)
    (scene,) = heldout_scenes(seed, references, 1)
    log(f'editing {references} reference(s): "{scene.instruction}"')
    stock, _ = _edit(pipe, scene, seed, steps)  # also warms up
    report = patch(pipe)
    patched, _ = _edit(pipe, scene, seed, steps)  # also runs the self-check
    unpatch(pipe)
    stock_seconds, patched_seconds = _timed(pipe, scene, seed, steps, repeats, report, log)
    log(f"editing {MORE} more scenes in one packed loop")
    counts = ((3, 2), (2, 2), (1, 1))  # (number of references, number of scenes)
    others = [one for k, count in counts for one in heldout_scenes(seed + (k == references), k, count)]
    start = time.perf_counter()
    packed = edit(pipe, [_request(other, seed + i, steps) for i, other in enumerate(others, start=1)])
    packed_seconds = time.perf_counter() - start
    error = max(max_relative_error(a, b) for a, b in zip(patched, stock, strict=True))
    tolerance = MAX_REL_ERROR_FLOAT32
    if dtype != torch.float32:
        log("running one prediction in float64 for the error budget")
        error, tolerance = _first_prediction(pipe, scene, seed, steps)
    images = [pipe.image_processor.postprocess(image.float(), output_type="pil")[0] for _, image in (stock, patched)]
    result = DemoResult(
        max_rel_error=error,
        tolerance=tolerance,
        equal=error <= tolerance,
        stock_seconds=stock_seconds,
        patched_seconds=patched_seconds,
        speedup=stock_seconds / patched_seconds,
        weights=builtin.weights_status(pipe),
        psnr=psnr(images[1], scene.target),
        packed_psnr=sum(psnr(image, other.target) for image, other in zip(packed, others, strict=True)) / len(others),
        packed_seconds=packed_seconds,
        implementation=f"{report.implementation}: {report.reason}",
        accelerated_calls=report.calls.total(),
        original_calls=sum(report.fallbacks.values()),
        instruction=scene.instruction,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        num_inference_steps=steps,
        references=references,
        seed=seed,
    )
    return result, _sheet(scene, images, list(zip(others, packed, strict=True)), result), report


def _timed(
    pipe: Any, scene: SyntheticSample, seed: int, steps: int, repeats: int, report: PatchReport,
    log: Callable[[str], None],
) -> tuple[float, float]:  # fmt: skip
    """Return the fastest times of the stock and of the patched pipeline in seconds; the runs alternate."""
    seconds: dict[str, list[float]] = {"stock": [], "patched": []}
    for turn in range(repeats):
        log(f"timing stock and patched in turns, {turn + 1} of {repeats}")
        seconds["stock"].append(_edit(pipe, scene, seed, steps)[1])
        timed = patch(pipe)
        for site, checked in zip(timed.sites, report.sites, strict=True):
            site.max_rel_error = checked.max_rel_error  # known already, so that the timed run has no self-check
        seconds["patched"].append(_edit(pipe, scene, seed, steps)[1])
        unpatch(pipe)
    return min(seconds["stock"]), min(seconds["patched"])


def heldout_scenes(seed: int, references: int, count: int) -> list[SyntheticSample]:
    """Return scenes of SIDE x SIDE pixels with exact targets, of shipped objects that no training data shows."""
    config = MakeConfig(artworks("shipped"), size=SIDE, references=(references,), pictures="simple")
    specs = (scene_spec("heldout_objects", index, config) for index in itertools.count(1000 * seed))
    square = (spec for spec in specs if spec.scene.size == (SIDE, SIDE))
    return [render(spec, config.artworks) for spec in itertools.islice(square, count)]


def _request(scene: SyntheticSample, seed: int, steps: int) -> EditRequest:
    return EditRequest(
        scene.instruction, scene.references, negative_prompt=EMPTY_PROMPT, true_cfg_scale=GUIDANCE, seed=seed,
        num_inference_steps=steps, width=scene.target.width, height=scene.target.height,
    )  # fmt: skip


def _edit(pipe: Any, scene: SyntheticSample, seed: int, steps: int) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """Run one guided edit; return ((final latents, image in -1..1), seconds)."""
    latents: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        latents[:] = [tensors["latents"]]
        return {}

    start = time.perf_counter()
    image = pipe(
        image=list(scene.references),
        prompt=scene.instruction,
        negative_prompt=EMPTY_PROMPT,
        true_cfg_scale=GUIDANCE,
        num_inference_steps=steps,
        height=scene.target.height,
        width=scene.target.width,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    if image.is_cuda:
        torch.cuda.synchronize()
    return (latents[0], image * 2 - 1), time.perf_counter() - start


def _first_prediction(pipe: Any, scene: SyntheticSample, seed: int, steps: int) -> tuple[float, float]:
    """Return error and budget of the patched first prediction against float64, relative to its maximum."""
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: calls.append(kwargs), with_kwargs=True)
    _edit(pipe, scene, seed, steps)
    hook.remove()
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in calls[0].items()}
    with torch.no_grad():
        oracle = copy.deepcopy(pipe.transformer).double()(**wide)[0]
        stock = pipe.transformer(**calls[0])[0]
        patch(pipe)
        patched = pipe.transformer(**calls[0])[0]
        unpatch(pipe)
    return max_relative_error(patched, oracle), error_budget(stock, oracle) / oracle.abs().max().item()


def _sheet(
    scene: SyntheticSample,
    images: Sequence[Image.Image],
    others: Sequence[tuple[SyntheticSample, Image.Image]],
    result: DemoResult,
) -> Image.Image:
    stock, patched = images
    outputs = [
        ("stock diffusers", stock),
        ("uniref_fast.patch", patched),
        ("difference x 1000", difference(stock, patched, 1000)),
        ("target", scene.target),
    ]
    verdict = "equal" if result.equal else "NOT equal"
    caption = [
        f"First: {verdict}, max relative error {result.max_rel_error:.1e} (allowed {result.tolerance:.0e}); stock "
        f"{result.stock_seconds:.2f} s, patched {result.patched_seconds:.2f} s, {result.speedup:.2f}x, "
        f"{result.num_inference_steps} guided steps, {result.dtype} on {result.device}, {result.implementation}. The "
        f"other {len(others)} in one packed loop of uniref_fast.edit, {result.packed_seconds:.2f} s.",
        *(f"{i}. {other.instruction}" for i, (other, _) in enumerate(others, start=1)),
    ]
    if result.weights == "untrained":
        caption.append("The built-in weights are untrained: the outputs only show that both pipelines agree.")
    lines = [_references(scene), outputs]
    lines += [
        [(f"{i}. uniref_fast.edit", image), ("target", other.target), *_references(other)]
        for i, (other, image) in enumerate(others, start=1)
    ]
    return contact_sheet(lines, f'"{scene.instruction}"', "\n".join(caption), cell=192)


def _references(scene: SyntheticSample) -> list[tuple[str, Image.Image]]:
    return [(f"picture {i}", picture) for i, picture in enumerate(scene.references, start=1)]
