"""Small transformers of every family with fused places, the arguments of their forwards, and features of diffusers."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import fibo2
import flux1
import flux2
import flux3
import joyimage
import qwen_image_21
import torch
import z_image


@dataclass(frozen=True)
class Forward:
    """A kind of transformer, and what is known about it.

    Attributes:
        make: Function of a dtype that returns a model.
        arguments: Function of (model, variant, step) that returns the arguments of a forward, positional and named;
            `step` changes the target and the time.
        variants: Names of inputs that differ, such as in masks; the last one is the most general.
        sites: Number of fused places.
        lora: Modules of an adapter.
        rounded: Names of arguments that a model in bfloat16 rounds first.
        fewer: Number of calls of fused places in a forward, by variant, where not every place is called.
        keep_references: Part of the reason against kept references.
        visibility: Part of the reason against another visibility.
        features: Features of diffusers that are tested; none for those that another kind of the family shows.
    """

    make: Callable
    arguments: Callable
    variants: tuple
    sites: int
    lora: tuple
    keep_references: str
    rounded: tuple = ("timestep", "target_timestep", "guidance")
    fewer: dict = None
    visibility: str = "visibility='full' only"
    features: tuple = ("lora", "offload", "offload_blocks", "offload_to_disk", "casting", "cache")

    def calls(self, variant):
        """Return the number of calls of fused places in a forward."""
        return (self.fewer or {}).get(variant, self.sites)


# ---- arguments ----


def _flux1(model, variant, step):
    """24 target and 6 reference tokens; FIBO pads the shorter of two prompts and masks the padding."""
    grids, text, batch = [(1, 4, 6), (1, 2, 3)], 7, 1 if variant == "one" else 2
    image, prompt, t, scale = flux1.inputs(model, grids, text)
    image = image.clone()
    image[:24] += step
    mask = None
    if variant.endswith("padded"):
        mask = torch.ones(batch, 1, 1, text + 30, dtype=torch.bool)
        mask[0, :, :, text - int(variant[0]) : text] = False
    return (), flux1.arguments(model, grids, image, prompt, t - step / 10, scale, batch=batch, mask=mask)


def _flux2(model, variant, step):
    """24 target and 6 reference tokens."""
    batch, length, generator = 1 if variant == "one" else 2, 7, torch.Generator().manual_seed(0)
    image = torch.randn(batch, 30, model.config.in_channels, generator=generator)
    text = torch.randn(batch, length, model.config.joint_attention_dim, generator=generator)
    image[:, :24] += step
    ids, txt_ids = torch.zeros(30, 4, dtype=torch.int64), torch.zeros(length, 4, dtype=torch.int64)
    ids[:24, 1], ids[:24, 2] = torch.arange(24) // 6, torch.arange(24) % 6
    ids[24:, 0], ids[24:, 2] = 10, torch.arange(6)
    txt_ids[:, 3] = torch.arange(length)
    return (), {
        "hidden_states": image.to(model.dtype), "encoder_hidden_states": text.to(model.dtype), "img_ids": ids,
        "txt_ids": txt_ids, "timestep": torch.linspace(0.9, 0.3, batch) - step / 10, "return_dict": False,
        "guidance": torch.full((batch,), 3.0) if model.config.guidance_embeds else None,
    }  # fmt: skip


def _flux3(model, variant, step):
    """24 target tokens and 6 of references, or none."""
    batch, references, text = 2 if variant == "two" else 1, 0 if "without" in variant else 6, 7
    generator, config, dtype = torch.Generator().manual_seed(0), model.config, model.proj_out.weight.dtype
    image = torch.randn(batch, 24, config.in_channels, generator=generator)
    clean = torch.randn(batch, references, config.in_channels, generator=generator)
    prompt = torch.randn(batch, text, config.joint_attention_dim, generator=generator)
    img_ids, clean_ids, txt_ids = (torch.zeros(n, 4) for n in (24, references, text))
    img_ids[:, 1], img_ids[:, 2] = torch.arange(24) // 6 / 2, torch.arange(24) % 6 / 2
    clean_ids[:, 2], clean_ids[:, 3], txt_ids[:, 3] = torch.arange(references) / 2, -1, torch.arange(text)
    given = {
        "hidden_states": (image + step).to(dtype), "encoder_hidden_states": prompt.to(dtype),
        "timestep": torch.linspace(0.9, 0.3, batch) - step / 10, "img_ids": img_ids, "txt_ids": txt_ids,
        "return_dict": False,
    }  # fmt: skip
    if references:
        given |= {"image_cond_hidden_states": clean.to(dtype), "image_cond_ids": clean_ids}
    if config.flow_map:
        given["target_timestep"] = given["timestep"] - 0.2
    return (), given


GRIDS = [(1, 4, 6), (1, 3, 5), (1, 1, 1), (1, 2, 9)]
JOYIMAGE = [(7, GRIDS[:1]), (11, GRIDS), (3, GRIDS[1:3])]
"""Text length and grids (target first) of each sample; the longest one is not the first."""


def _joyimage(model, variant, step):
    """A padded batch with a mask, one sample whose mask hides nothing, or a batch without a mask."""
    samples = JOYIMAGE[1:2] if variant == "one" else JOYIMAGE
    return (), joyimage.inputs(samples, model.dtype, seed=1 + step, mask=variant != "without a mask")


def _normal(dtype, step):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: (torch.randn(*shape, generator=generator) + step / 3).to(dtype)


def _z_image(model, variant, step):
    """Two samples; texts of unlike lengths need a mask of keys."""
    normal, x, captions, features = _normal(model.dtype, step), [], [], []
    for more in (0, 40 * (variant == "unlike")):
        x.append([normal(16, 1, 4, 6), normal(16, 1, 8, 6)])
        captions.append([normal(n, z_image.CAPTION) for n in (9 + more, 12, 3)])
        features.append([normal(2, 3, z_image.FEATURES), None])
    t = torch.tensor([0.9, 0.4]).to(model.dtype) - step / 8
    return (x, t, captions), {"siglip_feats": features, "image_noise_mask": [[0, 1]] * 2, "return_dict": False}


def _fibo2(model, variant, step):
    """Two samples; texts of unlike lengths need a mask of keys."""
    normal, mask = _normal(model.dtype, step), torch.ones(2, 90, dtype=torch.bool)
    mask[1, 20:] = False
    return (), {
        "hidden_states": normal(2, 32, 8, 6), "timestep": torch.tensor([0.9, 0.4]).to(model.dtype) - step / 8,
        "encoder_hidden_states": normal(2, 3, 90, fibo2.BUNDLE), "return_dict": False,
        "encoder_attention_mask": mask if variant == "unlike" else None,
        "context_latents": [normal(2, 32, 4, 4), normal(2, 32, 2, 6)],
    }  # fmt: skip


MASKS = {"two": None, "padded": [[1] * 9, [1] * 6 + [0] * 3], "masked": [[1, 0, 1, 1, 0, 1, 1, 1, 0]] * 2}
"""Valid tokens of the two texts of a batch of Qwen-Image-2.1."""


def _qwen_image_21(model, variant, step):
    """Two samples of one layout, with text of 9 tokens and two references."""
    cases = [qwen_image_21.case((5, 3, 1), [(1, 2, 6), (1, 8, 2)], seed=seed, dtype=model.dtype) for seed in (1, 2)]
    given = {name: torch.cat([one.stock[name] for one in cases]) if torch.is_tensor(value) else value
             for name, value in cases[0].stock.items()}  # fmt: skip
    given["img_shapes"] = [*cases[0].stock["img_shapes"]] * 2
    given["timestep"] = given["timestep"] / (1 + step)
    given["hidden_states"][:, -24:] += step
    if (mask := MASKS[variant]) is not None:
        slots = given["img_mask"][0, : given["encoder_hidden_states"].shape[1]]
        valid = torch.ones(2, len(slots), dtype=torch.bool)
        valid[:, ~slots] = torch.tensor(mask).bool()
        given["encoder_hidden_states_mask"] = valid
    return (), given


# ---- kinds ----

_FLUX1 = {"arguments": _flux1, "sites": 10, "keep_references": "keep_references"}
_FLUX1_LORA = ("to_q", "add_v_proj", "proj_mlp", "proj_out", "norm1.linear", "norm.linear", "net.0.proj")
_FLUX2 = {"arguments": _flux2, "sites": 10, "keep_references": "keep_references", "variants": ("one", "two"),
          "lora": ("to_q", "add_v_proj", "to_qkv_mlp_proj", "linear_in")}  # fmt: skip
_SANDWICH = {"variants": ("alike", "unlike"), "lora": ("to_q", "to_out.0", "w2", "t_embedder.mlp.0"),
             "keep_references": "do not say which tokens are those of a reference"}  # fmt: skip
_FLUX3 = {"arguments": _flux3, "sites": 25, "lora": ("to_q", "to_out.0", "linear_in"),
          "keep_references": "keep_references"}  # fmt: skip


def _of(module, kind):
    return lambda dtype=torch.float32: module.transformer(kind, dtype)


FORWARDS = {
    "kontext": Forward(_of(flux1, "kontext"), variants=("one", "two"), lora=_FLUX1_LORA, **_FLUX1,
                       features=("fuse", *Forward.features)),
    "longcat": Forward(_of(flux1, "longcat"), variants=("one", "two"), lora=_FLUX1_LORA, **_FLUX1, features=("fuse",)),
    "fibo": Forward(_of(flux1, "fibo"), variants=("one", "two", "1 padded", "5 padded"), lora=_FLUX1_LORA, **_FLUX1,
                    features=("lora", "offload_blocks")),
    "klein": Forward(_of(flux2, "klein"), **_FLUX2, features=("fuse", *Forward.features)),
    "klein-kv": Forward(_of(flux2, "klein-kv"), **_FLUX2, features=()),
    "dev": Forward(_of(flux2, "dev"), **_FLUX2, features=()),
    "flux3": Forward(flux3.transformer, variants=("one without references", "one", "two"),
                     fewer={"one without references": 19}, **_FLUX3, features=("fuse", *Forward.features)),
    "flux3 flow map": Forward(functools.partial(flux3.transformer, flow_map=True), variants=("two",), **_FLUX3,
                              features=()),
    "joyimage": Forward(joyimage.transformer, _joyimage, ("one", "without a mask", "padded"), 7,
                        ("img_attn_qkv", "txt_attn_proj", "time_proj", "net.2"),
                        "step for the latents of the references", rounded=(),
                        fewer=dict.fromkeys(("one", "without a mask", "padded"), 6)),
    "z-image": Forward(lambda dtype=torch.float32: z_image.transformer(dtype=dtype), _z_image, sites=10, **_SANDWICH),
    "fibo-2": Forward(lambda dtype=torch.float32: fibo2.transformer(dtype=dtype), _fibo2, sites=8, **_SANDWICH),
    "qwen-image-2.1": Forward(qwen_image_21.transformer, _qwen_image_21, tuple(MASKS), 6,
                              ("to_q", "to_v", "gate_layer"), "use_kv_cache=True",
                              visibility="one causal sequence: patch supports its own visibility"),
}  # fmt: skip
"""By name; the tests of Qwen-Image-Edit are in test_patch.py and test_hooks.py."""


def arguments(model, kind, variant=None, step=0):
    """Return the arguments of a forward; those of the last variant unless another is named."""
    known = FORWARDS[kind]
    return known.arguments(model, variant or known.variants[-1], step)


def result(out):
    """Return the result of a forward as one tensor."""
    return torch.stack(list(out[0])) if isinstance(out[0], list) else out[0]


def run(model, kind, variant=None, step=0):
    """Return the result of a forward without gradients."""
    positional, named = arguments(model, kind, variant, step)
    with torch.no_grad():
        return result(model(*positional, **named))


def wide(model, kind, variant=None):
    """Return the result in float64 of a model in bfloat16, whose arguments are rounded as that model rounds them."""
    positional, named = arguments(model, kind, variant)
    named |= {key: named[key].bfloat16() for key in FORWARDS[kind].rounded if named.get(key) is not None}
    with torch.no_grad():
        return result(FORWARDS[kind].make().to(torch.bfloat16).double()(*_double(positional), **_double(named)))


def _double(x):
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, (list, tuple)):
        return type(x)(map(_double, x))
    return {key: _double(value) for key, value in x.items()} if isinstance(x, dict) else x


# ---- features of diffusers ----


def fuse(model, kind):
    model.fuse_qkv_projections()


def lora(model, kind):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=[*FORWARDS[kind].lora], init_lora_weights=False)
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:
        inject_adapter_in_model(config, model)


def offload(model, kind):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(model, kind):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def offload_to_disk(model, kind):
    model.folder = tempfile.TemporaryDirectory()  # removed together with the model
    place = {"num_blocks_per_group": 1, "offload_to_disk_path": model.folder.name}
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", **place)


def casting(model, kind):
    storage = torch.float8_e4m3fn if kind in ("kontext", "klein", "flux3", "joyimage") else torch.bfloat16
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)


def cache(model, kind):
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    if hasattr(model, "enable_cache"):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    else:
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))


FEATURES = {each.__name__: each for each in (fuse, lora, offload, offload_blocks, offload_to_disk, casting, cache)}
