"""Small FLUX.3 models of `uniref_fast.random_models`, as tests take them."""

import torch
from flux2 import picture

from uniref_fast.random_models import flux3
from uniref_fast.random_models.flux3 import transformer

__all__ = ["picture", "pipeline", "stock", "transformer"]


def pipeline(transformer, blocks=None):
    """Return a modular pipeline without the block that rewrites prompts; that of a flow map is the distilled one."""
    pipe = flux3.pipeline_of(transformer, blocks)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, request, output_type="pt"):
    """Return the images of the pipeline of diffusers for a request, `[B, 3, H, W]`."""
    options = {"num_images_per_prompt": request.num_images}
    if request.images:
        options["image"] = [*request.images]
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        guider.guidance_scale = request.true_cfg_scale
        options["negative_prompt"] = request.negative_prompt
    seeds = request.seed if isinstance(request.seed, list) else [request.seed]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        prompt=request.prompt, width=request.width, height=request.height, output="images", output_type=output_type,
        num_inference_steps=request.num_inference_steps, generator=generators if len(seeds) > 1 else generators[0],
        **options,
    )  # fmt: skip
