"""Small FLUX.2 models with random weights, whose parts fit each other as those of the released checkpoints do."""

from __future__ import annotations

from typing import Any

import torch

from uniref_fast.random_models.parts import CHAT, batch_norm_vae, language_config, random_model, scheduler

__all__ = ["PIPELINES", "pipeline", "pipeline_of", "transformer"]

PIPELINES = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2Pipeline")
"""Pipeline classes that `pipeline` builds. `Flux2Pipeline` has no text encoder, and gets prompt embeddings instead;
`pipeline_of` can give it a small Mistral."""

CHAT_OF_PARTS = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}\n{% endfor %}"
)


def transformer(
    kind: str = "klein",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    layers: int = 2,
    single_layers: int = 3,
    heads: int = 2,
) -> Any:
    """Return a transformer with random weights.

    Args:
        kind: "klein", "klein-kv" or "dev", or a name that contains "kv" or "dev".
        dtype: Data type of the weights.
        seed: Seed of the weights.
        layers: Number of blocks with two streams.
        single_layers: Number of blocks with one stream.
        heads: Number of attention heads.
    """
    from diffusers import Flux2Transformer2DModel
    from diffusers.models.transformers import transformer_flux2

    model = random_model(
        Flux2Transformer2DModel, dtype, seed, in_channels=128, num_layers=layers, num_single_layers=single_layers,
        attention_head_dim=128, num_attention_heads=heads, joint_attention_dim=96, timestep_guidance_channels=256,
        mlp_ratio=3.0, axes_dims_rope=(32, 32, 32, 32), rope_theta=2000, guidance_embeds="dev" in kind,
    )  # fmt: skip
    if "kv" in kind:  # as `Flux2KleinKVPipeline` does
        for block in model.transformer_blocks:
            block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    return model


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline, which takes references as they are; arguments as in `random_models`."""
    kind = {"Flux2KleinKVPipeline": "klein-kv", "Flux2Pipeline": "dev"}.get(name, "klein")
    return pipeline_of(transformer(kind, dtype, layers=layers, single_layers=layers, heads=heads), kind)


def pipeline_of(transformer: Any, kind: str = "klein", distilled: bool = False, mistral: bool = False) -> Any:
    """Return a pipeline around a transformer.

    Args:
        transformer: Transformer of `transformer`.
        kind: "klein", "klein-kv", "inpaint" or "dev".
        distilled: Make a klein pipeline one of a distilled model, without classifier-free guidance.
        mistral: Give a pipeline of dev a text encoder.
    """
    import diffusers

    from uniref_fast.builtin import components

    dtype = transformer.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts = {"transformer": transformer, "vae": batch_norm_vae(dtype), "scheduler": scheduler()}
        if kind == "dev":
            processor = _mistral_processor() if mistral else None
            encoder = None if processor is None else _mistral(processor.tokenizer).to(dtype)
            return diffusers.Flux2Pipeline(text_encoder=encoder, tokenizer=processor, **parts)
        tokenizer = components.tokenizer()
        tokenizer.chat_template = CHAT
        parts |= {"text_encoder": _text_encoder(len(tokenizer)).to(dtype), "tokenizer": tokenizer}
    if kind == "klein-kv":
        return diffusers.Flux2KleinKVPipeline(**parts)
    if kind == "inpaint":
        return diffusers.Flux2KleinInpaintPipeline(**parts)
    return diffusers.Flux2KleinPipeline(**parts, is_distilled=distilled)


def _text_encoder(vocabulary: int) -> Any:
    """Return an encoder with the 27 layers that the pipelines read; its width is a third of that of the embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = language_config(Qwen3Config, vocabulary, 32, 48, 27)
    return Qwen3ForCausalLM(config).eval()


def _mistral_processor() -> Any:
    """Return the processor of dev with the small tokenizer of the built-in model."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    from uniref_fast.builtin import components

    tokenizer = components.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=14, chat_template=CHAT_OF_PARTS)


def _mistral(tokenizer: Any) -> Any:
    """Return an encoder with the 30 layers that the pipeline of dev reads."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = language_config(MistralConfig, len(tokenizer), 32, 48, 30)
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=image)
    return Mistral3ForConditionalGeneration(config).eval()
