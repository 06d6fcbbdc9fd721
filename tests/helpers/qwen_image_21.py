"""Small Qwen-Image-2.1 transformers with random weights, and one sample as diffusers and the packed model take it."""

import math
from dataclasses import dataclass

import torch

from uniref_fast.layout import REFERENCE_PLACE, Sample
from uniref_fast.models import PackedQwenImage21

CHANNELS, CONTEXT = 64, 48


def transformer(dtype=torch.float32, layers=3, seed=0, **config):
    """Return a model with the head dimension, rotary axes and MLP ratio of the released one, norms random too."""
    from diffusers import QwenImage21Transformer2DModel

    torch.manual_seed(seed)
    model = QwenImage21Transformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=layers, context_in_dim=CONTEXT,
        **{"num_attention_heads": 2, **config},
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # the RMSNorm of the text is stored around 0
            mean = float("norm" in name and "weight" in name and "text_norm" not in name)
            torch.nn.init.normal_(parameter, mean=mean, std=0.2)
        elif "modulation" in name or "timestep_embedder" in name or "norm_out" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().to(dtype)


@dataclass
class Case:
    """One sample: `lengths` text tokens before each reference and after the last one, and its tensors."""

    sample: Sample
    image: torch.Tensor  # target, then references, [n, C]
    text: torch.Tensor  # [l, D]
    timestep: torch.Tensor  # [1]
    stock: dict

    @property
    def target_tokens(self):
        return math.prod(self.sample.target)


def case(lengths, references=(), target=(1, 4, 6), seed=1, dtype=torch.float32, mask=None):
    """Return a case with random tensors.

    Args:
        lengths: Text tokens before each reference and after the last one.
        references, target: Grids; diffusers needs a multiple of four tokens.
        seed: Seed of the tensors.
        dtype: Dtype of the tensors.
        mask: Valid text tokens, a list of their number.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    total = sum(lengths)
    text, timestep = normal(total, CONTEXT), torch.rand(1, generator=generator).to(dtype)
    images = [normal(math.prod(grid), CHANNELS) for grid in (target, *references)]
    # The encoder's sequence has one position for every four tokens of a reference, whose embeddings are not used.
    parts, slots, at = [], [], 0
    for length, grid in zip(lengths, (*references, None), strict=True):
        parts.append(text[at : at + length])
        slots += [False] * length
        at += length
        if grid is not None:
            parts.append(normal(math.prod(grid) // 4, CONTEXT))
            slots += [True] * (math.prod(grid) // 4)
    encoder = torch.cat(parts)[None]
    img_mask = torch.tensor([slots + [True] * (math.prod(target) // 4)])
    valid = None
    if mask is not None:
        valid = torch.ones(1, len(slots), dtype=torch.bool)
        valid[0, ~torch.tensor(slots)] = torch.tensor(mask).bool()
    flags, runs = iter([True] * total if mask is None else mask), []
    for length, grid in zip(lengths, (*references, None), strict=True):
        runs += [(1, bool(next(flags))) for _ in range(length)] if mask else [(length, True)] * (length > 0)
        runs += [REFERENCE_PLACE] * (grid is not None)
    stock = {
        "hidden_states": torch.cat([*images[1:], images[0]])[None],
        "encoder_hidden_states": encoder,
        "encoder_hidden_states_mask": valid,
        "timestep": timestep,
        "img_shapes": [[*references, target]],
        "img_mask": img_mask,
        "return_dict": False,
    }
    return Case(Sample(tuple(runs), target, tuple(references)), torch.cat(images), text, timestep, stock)


def run_stock(model, one, dtype=None, **options):
    """Return diffusers' velocity of the target, `[n, C]`."""
    given = {k: v.to(dtype) if dtype and torch.is_tensor(v) and v.is_floating_point() else v
             for k, v in one.stock.items()}  # fmt: skip
    with torch.no_grad():
        return model(**given, **options)[0][0, -one.target_tokens :]


def run_packed(model, cases, kept=None, run=None, **options):
    """Return the packed model's velocity of every target."""
    run = run or PackedQwenImage21(model, **options)
    layout = run.layout([one.sample for one in cases])
    image, text, t = (torch.cat([getattr(one, name) for one in cases]) for name in ("image", "text", "timestep"))
    with torch.no_grad():
        return layout.split_targets(run(image, text, t, layout, kept))


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def pipeline(dtype=torch.float32, area=64 * 64, **config):
    """Return a small `QwenImage21Pipeline` with random weights, whose images have `area` pixels."""
    from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from uniref_fast.builtin import components
    from uniref_fast.builtin.processor import BuiltinProcessor, Qwen2VLImageProcessorPil

    tokenizer = components.tokenizer()
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=32 * 32, max_pixels=512 * 512)
    processor = BuiltinProcessor(images, tokenizer, chat_template=TEMPLATE)
    text = dict(
        vocab_size=components.VOCAB_SIZE, hidden_size=CONTEXT, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=24, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=CONTEXT, patch_size=16,
        num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    torch.manual_seed(0)
    encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    ))  # fmt: skip
    vae = AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
        shift_terminal=0.02,
    )  # fmt: skip
    pipe = QwenImage21Pipeline(
        scheduler, vae.eval().to(dtype), encoder.eval().to(dtype), processor, transformer(dtype, **config)
    )
    pipe.output_area = area
    pipe.set_progress_bar_config(disable=True)
    return pipe
