"""Small pipelines of every class that a family supports, with random or built-in weights."""

import inspect

import diffusers
import fibo2
import flux1
import flux2
import flux3
import joyimage
import numpy as np
import qwen_image_21
import torch
import z_image
from PIL import Image

from uniref_fast import builtin

SIDE = 64


def picture(seed=0, side=SIDE):
    """Return an image of noise."""
    values = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _random(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _transformer(like, **changes):
    """Return a random transformer of two blocks with a changed configuration."""
    known = inspect.signature(type(like).__init__).parameters
    config = {key: value for key, value in like.config.items() if key in known} | changes | {"num_layers": 2}
    return _random(type(like)(**config))


def _qwen(name, request):
    """Return a pipeline on the components of the built-in model, which makes images of 64 x 64 pixels."""
    import diffusers.pipelines.qwenimage as folder

    patcher = request.getfixturevalue("monkeypatch")
    for module in ("edit", "edit_inpaint", "layered"):  # these pipelines take no other size
        place = getattr(folder, f"pipeline_qwenimage_{module}")
        size = (SIDE, SIDE) if module == "layered" else (SIDE, SIDE, None)
        patcher.setattr(place, "calculate_dimensions", lambda area, ratio, size=size: size)
    if name == "QwenImageEditPlusPipeline":
        return builtin.load()
    parts = dict(builtin.load().components)
    transformer, vae = parts["transformer"], parts["vae"]
    kind = getattr(diffusers, name)
    if "ControlNet" in name:  # for text-to-image models, which have no zero_cond_t
        parts["transformer"] = transformer = _transformer(transformer, zero_cond_t=False)
        config = transformer.config
        parts["controlnet"] = _random(
            diffusers.QwenImageControlNetModel.from_transformer(
                transformer, 1, config.attention_head_dim, config.num_attention_heads,
                extra_condition_channels=4 if "Inpaint" in name else 0,
            )
        )  # fmt: skip
    if "Layered" in name:
        parts["transformer"] = _transformer(transformer, use_layer3d_rope=True, use_additional_t_cond=True)
        known = inspect.signature(diffusers.AutoencoderKLQwenImage.__init__).parameters
        config = {key: value for key, value in vae.config.items() if key in known} | {"input_channels": 4}
        parts["vae"] = _random(diffusers.AutoencoderKLQwenImage(**config))
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in parts.items() if key in known})


def _qwen_arguments(name):
    mask = Image.fromarray((np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 7 < 3).astype(np.uint8) * 255)
    more = {
        "QwenImageEditPlusPipeline": {"image": [picture(1), picture(2)]},
        "QwenImageEditPipeline": {"image": picture(1)},
        "QwenImageEditInpaintPipeline": {"image": picture(1), "mask_image": mask},
        "QwenImageImg2ImgPipeline": {"image": picture(1)},
        "QwenImageInpaintPipeline": {"image": picture(1), "mask_image": mask},
        "QwenImageControlNetPipeline": {"control_image": picture(1)},
        "QwenImageControlNetInpaintPipeline": {"control_image": picture(1), "control_mask": mask},
        "QwenImageLayeredPipeline": {"image": picture(1).convert("RGBA"), "layers": 2},
    }.get(name, {})
    size = {} if "Layered" in name else {"height": SIDE, "width": SIDE}
    return {"prompt": "an owl", "negative_prompt": " ", "true_cfg_scale": 2.0, **size, **more}


def _qwen_21(name, request):
    return qwen_image_21.pipeline(area=SIDE * SIDE)


def _qwen_21_arguments(name):
    return {
        "prompt": "an owl", "negative_prompt": " ", "true_cfg_scale": 2.0, "height": SIDE, "width": SIDE,
        "image": [picture(1), picture(2)], "output_resolution": SIDE, "use_kv_cache": False,
    }  # fmt: skip


def _z_image(name, request):
    with_features = {} if "Omni" in name else {"features": None}
    return z_image.pipeline(z_image.transformer(**with_features), name)


def _z_image_arguments(name):
    mask = Image.new("L", (SIDE, SIDE), 255)
    more = {
        "ZImageOmniPipeline": {"image": [picture(1), picture(2)]},
        "ZImageImg2ImgPipeline": {"image": picture(1)},
        "ZImageInpaintPipeline": {"image": picture(1), "mask_image": mask},
        "ZImageControlNetPipeline": {"control_image": picture(1)},
        "ZImageControlNetInpaintPipeline": {"image": picture(1), "mask_image": mask, "control_image": picture(2)},
    }.get(name, {})
    return {"prompt": "an owl", "guidance_scale": 2.0, "height": SIDE, "width": SIDE, **more}


def _fibo_2(name, request):
    return fibo2.pipeline(fibo2.transformer())


def _fibo_2_arguments(name):
    images = [picture(1), picture(2)]
    return {"prompt": "an owl", "guidance_scale": 2.0, "height": SIDE, "width": SIDE, "image": images}


def _flux2(name, request):
    kind = {"Flux2KleinKVPipeline": "klein-kv", "Flux2Pipeline": "dev"}.get(name, "klein")
    pipe = flux2.pipeline(request.getfixturevalue("make_flux2")(kind), kind)
    return diffusers.Flux2KleinInpaintPipeline(**pipe.components) if "Inpaint" in name else pipe


def _flux2_arguments(name):
    prompt = {"prompt": "an owl"}
    if name == "Flux2Pipeline":  # without a text encoder
        prompt = {"prompt_embeds": torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(0))}
    guidance = {} if "KV" in name else {"guidance_scale": 2.0}
    if "Inpaint" in name:
        mask = Image.new("L", (SIDE, SIDE), 255)
        return {**prompt, **guidance, "height": SIDE, "width": SIDE, "image": picture(1), "mask_image": mask}
    return {**prompt, **guidance, "height": SIDE, "width": SIDE, "image": [picture(1), picture(2)]}


def _flux3(name, request):
    pipe = flux3.pipeline(request.getfixturevalue("make_flux3")(flow_map="Distilled" in name))
    if "Distilled" not in name:
        pipe.guider.guidance_scale = 2.0
    return pipe


def _flux3_arguments(name):
    guidance = {} if "Distilled" in name else {"negative_prompt": "red", "guidance_scale": 2.0}  # set in its guider
    return {"prompt": "an owl", **guidance, "height": SIDE, "width": SIDE, "image": [picture(1), picture(2)]}


def _joyimage(name, request):
    return joyimage.pipeline()


def _joyimage_arguments(name):
    return {
        "prompt": "an owl", "negative_prompt": "a cat", "guidance_scale": 2.0, "height": SIDE, "width": SIDE,
        "images": [picture(1), picture(2)],
    }  # fmt: skip


FLUX1_CHANNELS = {"Fill": 384, "Control": 128}
"""Channels of the latents of models that get an image as more channels, by a part of the name of the pipeline."""


def _flux1(name, request):
    import diffusers.pipelines.flux as folder

    request.getfixturevalue("monkeypatch").setattr(
        folder.pipeline_flux_kontext_inpaint, "PREFERRED_KONTEXT_RESOLUTIONS", [(SIDE, SIDE)]
    )
    if name == "FluxKontextPipeline":
        pipe = flux1.pipeline(flux1.transformer(layers=1, single_layers=1))
        pipe.auto_resize = True
        request.getfixturevalue("monkeypatch").setattr(
            folder.pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(SIDE, SIDE)]
        )
        return pipe
    net = "ControlNet" in name
    channels = next((n for part, n in FLUX1_CHANNELS.items() if part in name and not net), 64)
    transformer = flux1.transformer(in_channels=channels, out_channels=64, layers=1, single_layers=1)
    more = {}
    if net:
        net = diffusers.FluxControlNetModel.from_transformer(
            transformer, 1, 1, transformer.config.attention_head_dim, transformer.config.num_attention_heads,
            load_weights_from_transformer=False,
        )  # fmt: skip
        more["controlnet"] = _random(net)
    return flux1.MODULES["kontext"].pipeline_of(transformer, name, **more)


def _flux1_arguments(name):
    mask = Image.fromarray((np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 7 < 3).astype(np.uint8) * 255)
    given = {"prompt": "an owl", "guidance_scale": 2.0, "height": SIDE, "width": SIDE}
    if "Kontext" in name:
        given["max_area"] = SIDE * SIDE
    if name != "FluxKontextPipeline":
        given["max_sequence_length"] = 16
    if "Control" in name:
        given["control_image"] = picture(2)
    if "Inpaint" in name or "Fill" in name:
        given["mask_image"] = mask
    if name not in ("FluxPipeline", "FluxControlPipeline", "FluxControlNetPipeline"):
        given["image"] = picture(1)
    return given


def _longcat(name, request):
    import diffusers.pipelines.longcat_image as folder

    request.getfixturevalue("monkeypatch").setattr(
        folder.pipeline_longcat_image_edit, "calculate_dimensions", lambda area, ratio: (SIDE, SIDE)
    )
    return flux1.MODULES["longcat"].pipeline_of(
        flux1.transformer("longcat", layers=1, single_layers=1), getattr(diffusers, name)
    )


def _longcat_arguments(name):
    if "Edit" in name:
        return {"prompt": "an owl", "guidance_scale": 2.0, "image": picture(1)}
    return {"prompt": "an owl", "guidance_scale": 2.0, "height": SIDE, "width": SIDE, "enable_prompt_rewrite": False}


def _fibo(name, request):
    return flux1.MODULES["fibo"].pipeline_of(flux1.transformer("fibo"), name)


def _fibo_arguments(name):
    given = {"prompt": flux1.prompt("fibo", "an owl"), "guidance_scale": 2.0, "height": SIDE, "width": SIDE}
    return given | ({"image": [picture(1), picture(2)]} if "Edit" in name else {})


FAMILIES = {
    "qwen-image-edit": (_qwen, _qwen_arguments),
    "qwen-image-2.1": (_qwen_21, _qwen_21_arguments),
    "z-image": (_z_image, _z_image_arguments),
    "fibo-2": (_fibo_2, _fibo_2_arguments),
    "flux2": (_flux2, _flux2_arguments),
    "flux3": (_flux3, _flux3_arguments),
    "joyimage-edit-plus": (_joyimage, _joyimage_arguments),
    "flux1": (_flux1, _flux1_arguments),
    "longcat-image-edit": (_longcat, _longcat_arguments),
    "fibo-edit": (_fibo, _fibo_arguments),
}
"""By the name of a family: a function of (pipeline class, pytest's request) that returns a small pipeline, and one of
the pipeline class that returns the arguments of a call, without steps, generator and output type."""
