"""Small FLUX.2 pipelines with random weights, whose parts fit each other as those of the real checkpoints do."""

import numpy as np
import torch
from PIL import Image

CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def transformer(kind="klein", dtype=torch.float32, seed=0):
    """Return a transformer with random weights; head dimensions and ratios are those of the real ones."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.models.transformers import transformer_flux2

    torch.manual_seed(seed)
    model = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        guidance_embeds="dev" in kind,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    if "kv" in kind:  # as `Flux2KleinKVPipeline` does
        for block in model.transformer_blocks:
            block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    return model.eval().to(dtype)


def pipeline(transformer, kind="klein", distilled=False):
    """Return the pipeline of a kind ("klein", "klein-kv", "inpaint", "dev"); that of dev has no text encoder."""
    import diffusers

    from uniref_fast.builtin import components

    torch.manual_seed(1)
    parts = {"transformer": transformer, "vae": _vae(transformer.dtype), "scheduler": _scheduler()}
    if kind == "dev":
        pipe = diffusers.Flux2Pipeline(text_encoder=None, tokenizer=None, **parts)
    else:
        tokenizer = components.tokenizer()
        tokenizer.chat_template = CHAT
        parts |= {"text_encoder": _text_encoder(len(tokenizer)).to(transformer.dtype), "tokenizer": tokenizer}
        if kind == "klein-kv":
            pipe = diffusers.Flux2KleinKVPipeline(**parts)
        elif kind == "inpaint":
            pipe = diffusers.Flux2KleinInpaintPipeline(**parts)
        else:
            pipe = diffusers.Flux2KleinPipeline(**parts, is_distilled=distilled)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _text_encoder(vocabulary):
    """Return an encoder with the 27 layers that the pipelines read; its width is a third of that of the embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=27, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def _vae(dtype):
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval().to(dtype)


def picture(width, height, seed=0, mode="RGB"):
    """Return an image of random pixels."""
    shape = (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)
