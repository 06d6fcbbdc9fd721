"""Small random stand-ins for the checkpoints of the Hub that diffusers' tests load.

    python tests/helpers/small_checkpoints.py

writes them into the cache that `HF_HUB_CACHE` names. The folder with the package `tests` of diffusers must be on
`PYTHONPATH`, because its modular pipelines load the parts that its other tests build. A test that compares with printed
numbers of the real checkpoints fails with the stand-ins, with and without the patch.
"""

import functools
import importlib
import json
import os
from pathlib import Path

import diffusers
import torch
import transformers
from transformers import AddedToken

from uniref_fast.builtin.components import ASSETS
from uniref_fast.random_models import flux2, parts

INTERNAL = "hf-internal-testing"
QWEN_SPECIAL = [  # with the ids of Qwen2-VL, 151643 and up, which the configurations in the tests name
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
PIPELINES = {  # checkpoint: class of the pipeline, and the module of tests that has its parts
    f"{INTERNAL}/tiny-flux-modular": ("FluxPipeline", "flux.test_pipeline_flux"),
    f"{INTERNAL}/tiny-flux-pipe": ("FluxPipeline", "flux.test_pipeline_flux"),
    f"{INTERNAL}/tiny-flux-kontext-pipe": ("FluxKontextPipeline", "flux.test_pipeline_flux_kontext"),
    f"{INTERNAL}/tiny-flux2-modular": ("Flux2Pipeline", "flux2.test_pipeline_flux2"),
    f"{INTERNAL}/tiny-flux2-klein-modular": ("Flux2KleinPipeline", "flux2.test_pipeline_flux2_klein"),
    f"{INTERNAL}/tiny-flux2-klein-base-modular": ("Flux2KleinPipeline", "flux2.test_pipeline_flux2_klein"),
    f"{INTERNAL}/tiny-qwenimage-pipe": ("QwenImagePipeline", "qwenimage.test_qwenimage"),
    f"{INTERNAL}/tiny-qwenimage-modular": ("QwenImagePipeline", "qwenimage.test_qwenimage"),
    f"{INTERNAL}/tiny-qwenimage-edit-modular": ("QwenImageEditPipeline", "qwenimage.test_qwenimage_edit"),
    f"{INTERNAL}/tiny-qwenimage-edit-plus-modular": (
        "QwenImageEditPlusPipeline", "qwenimage.test_qwenimage_edit_plus",
    ),
    f"{INTERNAL}/tiny-zimage-modular-pipe": ("ZImagePipeline", "z_image.test_z_image"),
    "akshan-main/tiny-qwenimage21-modular-pipe": ("QwenImage21Pipeline", "qwenimage21.test_qwenimage21"),
}  # fmt: skip


def small_vocabulary():
    """Return the vocabulary and the merges of the built-in tokenizer."""
    folder = ASSETS / "tokenizer"
    lines = (folder / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#")]
    return json.loads((folder / "vocab.json").read_text()), merges


def t5():
    """Return the parts of a small T5."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    letters = [chr(code) for code in range(33, 127)]
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [("▁", -2.0)]
    pieces += [(f"▁{letter}", -2.5) for letter in letters] + [(letter, -3.0) for letter in letters]
    return transformers.T5Tokenizer(vocab=pieces, model_max_length=512), transformers.T5EncoderModel(config)


def clip():
    """Return the parts of a small CLIP for texts."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4,
        projection_dim=32, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    letters = [token for token in small_vocabulary()[0] if len(token) == 1]
    words = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocabulary, [], model_max_length=77), transformers.CLIPTextModel(config)


@functools.cache
def qwen_tokenizer():
    """Return a tokenizer with the special tokens of Qwen2-VL."""
    vocabulary, merges = small_vocabulary()
    vocabulary |= {f"<unused{index}>": index for index in range(len(vocabulary), 151643)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocabulary, merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL], True)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == QWEN_IDS["image_token_id"]
    tokenizer.chat_template = parts.CHAT_OF_PARTS
    return tokenizer


def qwen_processor(kind, patch_size):
    """Return a processor of Qwen2-VL or Qwen3-VL for pictures of few patches."""
    sizes = dict(patch_size=patch_size, merge_size=2, temporal_patch_size=2, min_pixels=56 * 56, max_pixels=112 * 112)
    videos = getattr(transformers, f"{kind}VideoProcessor")(patch_size=patch_size, merge_size=2, temporal_patch_size=2)
    return getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes), tokenizer=qwen_tokenizer(),
        video_processor=videos, chat_template=parts.CHAT_OF_PARTS,
    )  # fmt: skip


def qwen25():
    """Return a small Qwen2.5-VL with its tokenizer and its processor."""
    torch.manual_seed(0)
    text = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}, vocab_size=152064,
    )  # fmt: skip
    vision = dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return qwen_processor("Qwen2VL", 14), transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3():
    """Return a small Qwen3-VL with its tokenizer and its processor."""
    torch.manual_seed(0)
    text = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        vocab_size=151936,
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=16,
        num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return qwen_processor("Qwen3VL", 16), transformers.Qwen3VLForConditionalGeneration(config)


def mistral():
    """Return a small Mistral 3 with its processor."""
    torch.manual_seed(0)
    vocabulary, merges = small_vocabulary()
    tokenizer = transformers.Qwen2Tokenizer(vocabulary, merges, model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(), tokenizer, patch_size=14, chat_template=flux2.CHAT_OF_PARTS
    )
    text = transformers.MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=image)
    return processor, transformers.Mistral3ForConditionalGeneration(config)


CHECKPOINTS = {
    f"{INTERNAL}/tiny-random-t5": t5,
    f"{INTERNAL}/tiny-random-clip": clip,
    "peft-internal-testing/tiny-clip-text-2": clip,
    f"{INTERNAL}/tiny-random-Qwen2VLForConditionalGeneration": qwen25,
    f"{INTERNAL}/tiny-random-Qwen25VLForCondGen": qwen25,
    "huangfeice/tiny-random-Qwen3VLForConditionalGeneration": qwen3,
    f"{INTERNAL}/tiny-mistral3-diffusers": mistral,
    f"{INTERNAL}/Mistral-Small-3.1-24B-Instruct-2503-only-processor": mistral,
}


def pipeline(name, module):
    """Return the pipeline that a module of diffusers' tests builds, or None if the folder does not have the module."""
    try:
        found = vars(importlib.import_module(f"tests.pipelines.{module}"))
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("tests.pipelines"):
            raise
        return None
    kinds = [kind for kind in found.values() if isinstance(kind, type) and "get_dummy_components" in vars(kind)]
    kind = next(kind for kind in kinds if kind.__module__ == f"tests.pipelines.{module}")
    return getattr(diffusers, name)(**object.__new__(kind).get_dummy_components())


def place(cache, name):
    """Return the new folder of a checkpoint in a cache of the Hub."""
    revision = "0" * 40
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(revision)
    return folder / "snapshots" / revision


def write(cache):
    """Write all checkpoints into a new cache of the Hub."""
    for name, build in CHECKPOINTS.items():
        folder = place(cache, name)
        for part in build():
            part.save_pretrained(folder)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    model.save_pretrained(place(cache, f"{INTERNAL}/tiny-flux-transformer"))
    for name, (kind, module) in PIPELINES.items():
        pipe = pipeline(kind, module)
        if pipe is not None:
            pipe.save_pretrained(place(cache, name))


if __name__ == "__main__":
    write(Path(os.environ["HF_HUB_CACHE"]))
