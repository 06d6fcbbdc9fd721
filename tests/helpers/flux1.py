"""Small models of FLUX.1, LongCat-Image and FIBO of `uniref_fast.random_models`, as tests take them."""

import json

import diffusers
import flux2
import torch

from uniref_fast.models.flux1 import PackedFibo, PackedFlux1, PackedLongCat
from uniref_fast.random_models import fibo, longcat_image
from uniref_fast.random_models import flux1 as random_flux1

MODULES = {"kontext": random_flux1, "longcat": longcat_image, "fibo": fibo}
CLASSES = {"kontext": PackedFlux1, "longcat": PackedLongCat, "fibo": PackedFibo}
picture = flux2.picture


def transformer(kind="kontext", dtype=torch.float32, seed=0, **changes):
    """Return a transformer with random weights; head dimensions and ratios are those of the real ones."""
    torch.manual_seed(seed)  # of what a test draws afterwards
    return MODULES[kind].transformer(dtype, seed, **changes)


def inputs(model, grids, text=7, seed=1):
    """Return image tokens (target first) and prompt embeddings of one sample, as the packed model takes them, its time
    and its guidance scale, or None for a model that embeds none."""
    generator = torch.Generator().manual_seed(seed)
    config, dtype = model.config, model.dtype
    image = torch.randn(sum(f * h * w for f, h, w in grids), config.in_channels, generator=generator).to(dtype)
    prompt = torch.randn(text, packed_class(model).prompt_channels(config), generator=generator).to(dtype)
    if is_kind(model, "Flux"):  # a vector of the whole prompt
        prompt[:, config.joint_attention_dim :] = prompt[0, config.joint_attention_dim :].clone()
    t, scale = torch.rand(1, generator=generator), 1 + 4 * torch.rand(1, generator=generator)
    return image, prompt, t, scale if config.get("guidance_embeds") else None


def is_kind(model, name):
    return type(model).__name__ == f"{name}Transformer2DModel"


def packed_class(model):
    names = {"Flux": PackedFlux1, "LongCatImage": PackedLongCat, "BriaFibo": PackedFibo}
    return next(kind for name, kind in names.items() if is_kind(model, name))


def ids(model, grids, text):
    """Return the position ids that the pipelines make: of the text, and of target and references."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import prepare_pos_ids

    if is_kind(model, "LongCatImage"):
        images = [prepare_pos_ids(1 + i, "image", (text, text), height=h, width=w) for i, (_, h, w) in enumerate(grids)]
        return prepare_pos_ids(0, "text", num_token=text), torch.cat(images)
    images = []
    for i, (_, h, w) in enumerate(grids):
        images.append(diffusers.FluxKontextPipeline._prepare_latent_image_ids(1, h, w, "cpu", torch.float32))
        images[-1][:, 0] = i
    return torch.zeros(text, 3), torch.cat(images)


def arguments(model, grids, image, prompt, t, scale=None, batch=1, mask=None):
    """Return the arguments of the forward in diffusers, for a batch of equal samples."""
    config, text = model.config, prompt[:, : model.config.joint_attention_dim]
    more = prompt[:, text.shape[1] :]
    txt_ids, img_ids = ids(model, grids, len(prompt))
    given = {"hidden_states": image, "encoder_hidden_states": text, "timestep": t[0]}
    if is_kind(model, "Flux"):
        given |= {"pooled_projections": more[0]}
    given = {name: x.expand(batch, *x.shape) for name, x in given.items()}
    if is_kind(model, "BriaFibo"):
        given["text_encoder_layers"] = [x.expand(batch, *x.shape) for x in more.split(config.text_encoder_dim, dim=-1)]
        given["timestep"] = (t.float() * 1000).expand(batch)
        if mask is not None:
            given["joint_attention_kwargs"] = {"attention_mask": mask}
    if scale is not None:
        given["guidance"] = scale.expand(batch)
    return given | {"txt_ids": txt_ids, "img_ids": img_ids, "return_dict": False}


def stock(model, grids, *data):
    """Return the target's part of diffusers' forward, `[n, C]`."""
    _, height, width = grids[0]
    return model(**arguments(model, grids, *data))[0][0, : height * width]


def pipeline(model, kind="kontext"):
    """Return the pipeline of a kind around a transformer."""
    torch.manual_seed(1)
    pipe = MODULES[kind].pipeline_of(model)
    if kind == "kontext":
        pipe.auto_resize = False
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(kind, text):
    """Return a prompt that the pipeline takes: FIBO's are JSON."""
    return json.dumps({"edit_instruction": text}) if kind == "fibo" else text
