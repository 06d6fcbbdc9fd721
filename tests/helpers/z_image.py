"""Small Z-Image transformers and pipelines with random weights."""

import torch

CAPTION, FEATURES = 48, 32


def transformer(dtype=torch.float32, seed=0, features=FEATURES, layers=2):
    """Return a transformer with the head dimension, rotary axes and ratios of the released ones, norms random too."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(
        dim=256, n_layers=layers, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=CAPTION,
        siglip_feat_dim=features,
    )  # fmt: skip
    return randomised(model).eval().to(dtype)


def randomised(model):
    """Draw the parameters whose initial values would hide faults: norms, pad tokens, gates and modulation."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "pad_token" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
        elif "adaLN" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def pipeline(transformer, name="ZImageOmniPipeline"):
    """Return a small pipeline of a class.

    `ZImageOmniPipeline` gives its VAE pixels in bfloat16; here they are cast to its dtype, for comparisons in float32.
    """
    import diffusers
    from transformers import Qwen3Config, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    from uniref_fast.builtin import components

    tokenizer = components.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    torch.manual_seed(1)
    encoder = Qwen3Model(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=CAPTION, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=24, max_position_embeddings=1024,
    ))  # fmt: skip
    omni = "Omni" in name
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=64,
        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    )  # fmt: skip
    dtype = transformer.dtype
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae.eval().to(dtype),
        "text_encoder": encoder.eval().to(dtype),
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    if omni:
        vae.encoder.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
        siglip = Siglip2VisionModel(Siglip2VisionConfig(
            hidden_size=FEATURES, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_patches=64,
            patch_size=16,
        ))  # fmt: skip
        parts["siglip"] = siglip.eval().to(dtype)
        parts["siglip_processor"] = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=64)
    if "ControlNet" in name:
        torch.manual_seed(2)
        controlnet = diffusers.ZImageControlNetModel(
            control_layers_places=[0, 1], control_refiner_layers_places=[0],
            control_in_dim=33 if "Inpaint" in name else 16, dim=256, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            add_control_noise_refiner="control_noise_refiner",
        )  # fmt: skip
        parts["controlnet"] = randomised(controlnet).eval().to(dtype)
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
