"""Small Fibo 2 transformers and pipelines with random weights."""

import torch
from z_image import randomised

HIDDEN = 48
BUNDLE = 3 * HIDDEN
"""Width of a bundle of three layers of the text encoder."""


def transformer(dtype=torch.float32, seed=0, layers=3):
    """Return a transformer with the head dimension, rotary axes and ratios of the released one, norms random too."""
    from diffusers import BriaFibo2Transformer2DModel

    torch.manual_seed(seed)
    model = BriaFibo2Transformer2DModel(
        dim=256, n_layers=layers, n_refiner_layers=1, n_heads=2, cap_feat_dim=BUNDLE, injection_layer_ids=(1, 2),
        perceiver_num_layers=1, min_num_gist_tokens=8, max_num_gist_tokens=24, gist_step=8, gist_min_text_len=8,
        gist_max_text_len=200,
    )  # fmt: skip
    return randomised(model).eval().to(dtype)


def pipeline(transformer, area=64 * 64):
    """Return a small pipeline whose results have about `area` pixels unless a request gives their size."""
    from diffusers import AutoencoderKLFlux2, BriaFibo2Pipeline, FlowMatchEulerDiscreteScheduler
    from qwen_image_21 import pipeline as qwen_image_21

    parts = qwen_image_21()
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    dtype = transformer.dtype
    pipe = BriaFibo2Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae.eval().to(dtype),
        parts.text_encoder.to(dtype), parts.processor,
    )  # fmt: skip
    pipe.text_encoder_out_layers = ((0, 1, 2), (2, 1, 0), (1, 1, 2))
    pipe.default_sample_size = round(area**0.5) // pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    return pipe
