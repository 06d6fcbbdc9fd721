"""LoRA files: key names of each format, equal changes after every conversion, errors instead of lost tensors."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from uniref_fast import builtin
from uniref_fast.adapters import Adapter, apply_adapters, fuse_adapters
from uniref_fast.cli import main
from uniref_fast.lora.cli import WIDTHS
from uniref_fast.lora.file import read_lora
from uniref_fast.lora.names import FORMATS, LINEARS, NORMS, OUTER, split_key, weight_shape

pytestmark = pytest.mark.usefixtures("threads")

WIDTH = 256
LAYERS = ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.3.img_mlp.net.0.proj",
          "transformer_blocks.1.attn.add_q_proj", "transformer_blocks.2.txt_mod.1")  # fmt: skip
NAMES = {  # keys of `attn.to_out.0` of block 12 as the programs write them: first matrix, second matrix, alpha
    "diffusers": ("transformer.transformer_blocks.12.attn.to_out.0.lora_A.weight",
                  "transformer.transformer_blocks.12.attn.to_out.0.lora_B.weight", None),
    "comfyui": ("diffusion_model.transformer_blocks.12.attn.to_out.0.lora_A.weight",
                "diffusion_model.transformer_blocks.12.attn.to_out.0.lora_B.weight",
                "diffusion_model.transformer_blocks.12.attn.to_out.0.alpha"),
    "ai-toolkit": ("diffusion_model.transformer_blocks.12.attn.to_out.0.lora_A.weight",
                   "diffusion_model.transformer_blocks.12.attn.to_out.0.lora_B.weight", None),
    "kohya": ("lora_unet_transformer_blocks_12_attn_to_out_0.lora_down.weight",
              "lora_unet_transformer_blocks_12_attn_to_out_0.lora_up.weight",
              "lora_unet_transformer_blocks_12_attn_to_out_0.alpha"),
    "diffsynth": ("transformer_blocks.12.attn.to_out.0.lora_A.default.weight",
                  "transformer_blocks.12.attn.to_out.0.lora_B.default.weight", None),
    "lightning": ("transformer_blocks.12.attn.to_out.0.lora_down.weight",
                  "transformer_blocks.12.attn.to_out.0.lora_up.weight",
                  "transformer_blocks.12.attn.to_out.0.alpha"),
}  # fmt: skip
VARIANTS = (  # further names of the two matrices of a layer
    "transformer.{}.lora_down.weight transformer.{}.lora_up.weight",
    "base_model.model.{}.lora_A.weight base_model.model.{}.lora_B.weight",
    "pipe.dit.{}.lora_A.default.weight pipe.dit.{}.lora_B.default.weight",
    "{}.lora_A.lightx2v.weight {}.lora_B.lightx2v.weight",
    "model.diffusion_model.{}.lora_A.weight model.diffusion_model.{}.lora_B.weight",
    "transformer.{}.lora.down.weight transformer.{}.lora.up.weight",
)


def matrices(rank=4, dtype=torch.float32, seed=0):
    """Return (down, up) of each layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in LAYERS:
        rows, columns = weight_shape(layer, WIDTH)
        pair = (torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator) / 16)
        found[layer] = tuple(matrix.to(dtype) for matrix in pair)
    return found


def key_of(form, layer, part):
    """Return a key in the pattern of `NAMES`, which has another block and layer."""
    key = NAMES[form][part]
    for joiner in (".", "_"):
        here = "transformer_blocks.12.attn.to_out.0".replace(".", joiner)
        if here in key:
            return key.replace(here, layer.replace(".", joiner))
    raise AssertionError(key)


def written(path, form, pairs, alpha=None, metadata=None):
    """Write a file as a program would, from the key names in `NAMES`."""
    tensors = {}
    for layer, pair in pairs.items():
        for part, matrix in enumerate(pair):
            tensors[key_of(form, layer, part)] = matrix
        if alpha is not None:
            tensors[key_of(form, layer, 2)] = torch.tensor(float(alpha))
    save_file(tensors, path, metadata=metadata)
    return path


def products(path, form):
    """Return the change of each layer, computed from the literal key names of a format."""
    tensors = load_file(path)
    found = {}
    for layer in LAYERS:
        down, up = (tensors.pop(key_of(form, layer, part)).double() for part in (0, 1))
        alpha = tensors.pop(key_of(form, layer, 2), None) if NAMES[form][2] else None
        found[layer] = up @ down * (1.0 if alpha is None else float(alpha) / len(down))
    assert not tensors, f"keys that {form} does not have: {list(tensors)}"
    return found


def convert(source, out, form):
    assert main(["lora", "convert", str(source), str(out), "--to", form]) == 0
    return out


def metadata_of(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module")
def model():
    """A pipeline whose adapters each test removes again."""
    return builtin.load()


def loaded_changes(pipe, load):
    """Return the change of each adapted weight after `load(pipe)`, by the code of peft, and remove the adapters."""
    load(pipe)
    adapted = {n: m for n, m in pipe.transformer.named_modules() if hasattr(m, "get_delta_weight")}
    found = {name: module.get_delta_weight(module.active_adapters[0]).detach() for name, module in adapted.items()}
    assert all(not hasattr(m, "merged") or not m.merged for m in adapted.values())
    names = list(pipe.transformer.peft_config)
    pipe.transformer.delete_adapters(names)
    pipe.unload_lora_weights()
    return found


def ours(path):
    return lambda pipe: apply_adapters(pipe, [Adapter.parse(str(path))], None, (), torch.float32)


def theirs(path):
    return lambda pipe: pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="theirs")


def close(found, expected, tolerance=1e-6):
    assert set(found) == set(expected)
    for name, change in expected.items():
        error = (found[name].double() - change.double()).abs().max() / change.abs().max()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("form", NAMES)
def test_each_format_keeps_the_bits_of_a_file_without_scale(tmp_path, form):
    source = written(tmp_path / "a.safetensors", "diffusers", matrices(), metadata={"title": "mine"})
    middle = convert(source, tmp_path / "b.safetensors", form)
    back = convert(middle, tmp_path / "c.safetensors", "diffusers")
    before, after = load_file(source), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    close(products(middle, form), products(source, "diffusers"))
    assert metadata_of(back)["title"] == "mine" and f"from {read_lora(middle).format}" in metadata_of(back)["converted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", NAMES)
def test_each_format_keeps_the_product_of_a_scaled_file(tmp_path, form, dtype):
    """Alpha 3 with rank 4 needs one rounding where there is no alpha.

    A factor of 2 ** -20 would leave the range of float16 if it were multiplied into one matrix alone.
    """
    for alpha in (3.0, 4 * 2.0**-20):
        source = written(tmp_path / f"{alpha}.safetensors", "kohya", matrices(dtype=dtype), alpha)
        middle = convert(source, tmp_path / f"{alpha}-{form}.safetensors", form)
        exact = (alpha != 3.0 and dtype != torch.float16) or NAMES[form][2] is not None
        close(products(middle, form), products(source, "kohya"), 1e-6 if exact else 4 * torch.finfo(dtype).eps)
        back = convert(middle, tmp_path / f"{alpha}-back.safetensors", "kohya")
        close(products(back, "kohya"), products(middle, form), 1e-6)
        assert all(t.dtype == dtype for key, t in load_file(middle).items() if "alpha" not in key)


@pytest.mark.parametrize("form", NAMES)
def test_diffusers_reads_the_same_change_as_the_import(tmp_path, model, form):
    """diffusers' own reader of the file is the reference; bits are equal, as the scale is a power of two."""
    alpha = None if NAMES[form][2] is None else 8
    path = written(tmp_path / "a.safetensors", form, matrices(), alpha)
    if form == "diffsynth":  # diffusers leaves the prefix out if no other sign of a foreign format is there
        expected = {layer: (up @ down) for layer, (down, up) in matrices().items()}
    else:
        expected = loaded_changes(model, theirs(path))
    found = loaded_changes(model, ours(path))
    assert found.keys() == expected.keys() == set(LAYERS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    converted = convert(path, tmp_path / "b.safetensors", "diffusers")
    close(loaded_changes(model, theirs(converted)), expected)


@pytest.mark.parametrize("names", VARIANTS)
def test_variants_are_read(tmp_path, model, names):
    tensors, pairs = {}, matrices()
    for layer, pair in pairs.items():
        tensors |= dict(zip((name.format(layer) for name in names.split()), pair, strict=True))
    save_file(tensors, tmp_path / "a.safetensors")
    close(loaded_changes(model, ours(tmp_path / "a.safetensors")), {n: up @ down for n, (down, up) in pairs.items()})


def test_factors_of_peft_are_not_lost_and_not_applied_twice(tmp_path, model):
    """rsLoRA, a pattern for one layer, and another rank: only peft's configuration in the metadata tells the factor."""
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"to_out.0": 2}, "target_modules": ["x"]}
    expected = {n: up @ down * (2 if "to_out" in n else 8) / 2 for n, (down, up) in matrices().items()}
    for prefix in ("transformer.", ""):  # save_lora_weights and save_lora_adapter
        text = json.dumps({prefix + name: value for name, value in config.items()})
        given = {"lora_adapter_metadata": text, "title": "mine"}
        path = written(tmp_path / "a.safetensors", "diffusers", matrices(), metadata=given)
        for form in ("diffusers", "comfyui", "kohya"):
            out = convert(path, tmp_path / f"{prefix}{form}.safetensors", form)
            assert metadata_of(out).keys() == {"title", "format", "converted"}
            close(products(out, form), expected)
            close(loaded_changes(model, theirs(out)), expected)
    plain = json.dumps({"r": 4, "lora_alpha": 4, "target_modules": list(LAYERS)})
    path = written(tmp_path / "p.safetensors", "diffusers", matrices(), metadata={"lora_adapter_metadata": plain})
    for form in ("comfyui", "diffusers"):
        path = convert(path, tmp_path / f"p-{form}.safetensors", form)
        kept = json.loads(metadata_of(path)["lora_adapter_metadata"])
        assert kept["transformer.lora_alpha"] == 4, "the configuration is kept where it is right"
        close(loaded_changes(model, theirs(path)), {n: up @ down for n, (down, up) in matrices().items()})


def peft_folder(folder, config):
    """Write a folder as peft itself does, and return the tensors and the changes of its adapter."""
    from peft import get_peft_model

    adapted = get_peft_model(builtin.load().transformer, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 8
            assert "lora" in name or "hada" in name
    adapted.save_pretrained(folder)
    base = adapted.base_model.model
    layers = {n: m for n, m in base.named_modules() if hasattr(m, "get_delta_weight")}
    return load_file(folder / "adapter_model.safetensors"), {
        name: layer.get_delta_weight("default").detach() for name, layer in layers.items()
    }


def test_the_configuration_beside_a_file_of_peft_is_read(tmp_path, model):
    """The folder that save_pretrained of peft writes has it in adapter_config.json only."""
    from peft import LoraConfig

    _, expected = peft_folder(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]))
    assert len(expected) == 4
    close(loaded_changes(model, ours(tmp_path)), expected)
    out = convert(tmp_path, tmp_path / "out" / "b.safetensors", "diffusers")
    close(loaded_changes(model, theirs(out)), expected)
    kept = tmp_path / "adapter_model.safetensors"
    renamed = {k.replace("base_model.model.", "transformer."): v for k, v in load_file(kept).items()}
    save_file(renamed, kept)
    close(loaded_changes(model, ours(tmp_path)), expected)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json holds the factor of the adapter beside it and cannot"):
        read_lora(kept)


def test_the_bias_of_a_lora_is_scaled_and_read_again(tmp_path):
    """A LoRA with a bias has the key diff_b in ComfyUI, which alpha does not scale."""
    from peft import LoraConfig

    for alpha in (8, 4):
        folder = tmp_path / str(alpha)
        tensors, changes = peft_folder(
            folder, LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q"], lora_bias=True)
        )
        name = "transformer_blocks.1.attn.to_q"
        bias = tensors[f"base_model.model.{name}.lora_B.bias"] * alpha / 4
        out = convert(folder, folder / "b" / "b.safetensors", "comfyui")
        assert torch.equal(load_file(out)[f"diffusion_model.{name}.diff_b"], bias)
        again = read_lora(out)
        assert again.format == "comfyui" and again.kinds == {"lora", "full"}
        found = {n: layer.tensors["up"] @ layer.tensors["down"] * layer.scale for n, layer in again.layers.items()}
        close(found, changes)
    pair = dict(zip(NAMES["diffusers"], next(iter(matrices().values())), strict=False))
    pair |= {NAMES["diffusers"][1].replace("weight", "bias"): torch.ones(256)}
    own = pair | {"transformer.transformer_blocks.12.attn.to_out.0.alpha": torch.tensor(2.0)}
    save_file(own, tmp_path / "a.safetensors")
    (layer,) = read_lora(tmp_path / "a.safetensors").layers.values()
    assert torch.equal(layer.tensors["diff_b"], torch.full((256,), 0.5)) and "up_bias" not in layer.tensors
    with pytest.raises(ValueError, match=r"two changes of the bias of transformer_blocks.12.attn.to_out.0"):
        refuse(tmp_path, own | {"transformer.transformer_blocks.12.attn.to_out.0.diff_b": torch.ones(256)}, "comfyui")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_loha_of_peft_keeps_its_factor(tmp_path, model, prefix):
    """save_lora_adapter of diffusers writes no LoHa that a format of matrices alone has, whatever its keys are."""
    from peft import LoHaConfig

    config = {"r": 3, "alpha": 6, "target_modules": ["to_q"]}
    tensors, expected = peft_folder(tmp_path, LoHaConfig(**config))
    path = tmp_path / "a.safetensors"
    text = json.dumps({prefix + name: value for name, value in config.items()})
    renamed = {k.replace("base_model.model.", prefix): v for k, v in tensors.items()}
    save_file(renamed, path, metadata={"lora_adapter_metadata": text})
    assert read_lora(path).format is None
    for file in (path, tmp_path / "adapter_model.safetensors"):
        close(loaded_changes(model, ours(file)), expected)


def lokr_tensors(prefix, joiner, dtype=torch.float32):
    """Return a LoKr of whole and of divided matrices, and the changes that it makes."""
    generator = torch.Generator().manual_seed(1)
    tensors, changes = {}, {}
    for layer in LAYERS[:3]:
        rows, columns = weight_shape(layer, WIDTH)
        first = torch.randn(16, 16, generator=generator)
        second = torch.randn(rows // 16, 4, generator=generator), torch.randn(4, columns // 16, generator=generator)
        name = prefix + layer.replace(".", joiner)
        whole = layer == LAYERS[0]
        parts = {"lokr_w1": first, "alpha": torch.tensor(1e10 if whole else 2.0)}
        parts |= {"lokr_w2": second[0] @ second[1]} if whole else {"lokr_w2_a": second[0], "lokr_w2_b": second[1]}
        tensors |= {f"{name}.{part}": tensor.to(dtype) for part, tensor in parts.items()}
        changes[layer] = torch.kron(first, second[0] @ second[1]) * (1 if whole else 0.5)
    return tensors, changes


@pytest.mark.parametrize(("prefix", "joiner"), [("lora_unet_", "_"), ("lycoris_", "_"), ("diffusion_model.", ".")])
def test_lokr(tmp_path, model, prefix, joiner):
    """Alpha counts where a matrix is divided, and only there; the pipeline's own reader refuses LoKr."""
    tensors, changes = lokr_tensors(prefix, joiner)
    save_file(tensors, tmp_path / "a.safetensors")
    out = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    expected = {f"transformer.{n}.lokr_w1" for n in changes}
    assert expected < set(load_file(out)) and not any("alpha" in key for key in load_file(out))
    load = lambda pipe: pipe.transformer.load_lora_adapter(str(out), adapter_name="x")  # noqa: E731
    close(loaded_changes(model, load), changes)
    close(loaded_changes(model, ours(tmp_path / "a.safetensors")), changes)
    close(loaded_changes(model, ours(out)), changes)
    pipe = builtin.load()
    ours(out)(pipe)
    assert not any(module.training for module in pipe.transformer.modules()), "a LoKr would draw random numbers"
    back = load_file(convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohya"))
    same = {key for key in back if not key.endswith("alpha")}
    kohya, _ = lokr_tensors("lora_unet_", "_")
    assert len(same) == 8 and all(torch.equal(back[key], kohya[key]) for key in same)
    with pytest.raises(
        ValueError, match=r"changed by a LoKr, which diffsynth cannot hold; .* file: diffusers, comfyui"
    ):
        refuse(tmp_path, tensors, "diffsynth")


def refuse(folder, tensors, form="diffusers"):
    from uniref_fast.lora.file import write_lora

    path = folder / "refused.safetensors"
    save_file(tensors, path)
    try:
        write_lora(read_lora(path), folder / "never.safetensors", FORMATS[form], "")
    finally:
        assert not (folder / "never.safetensors").exists()


def test_loha_becomes_a_lora(tmp_path, model, capsys):
    generator = torch.Generator().manual_seed(2)
    parts = {"w1_a": (256, 3), "w1_b": (3, 256), "w2_a": (256, 3), "w2_b": (3, 256)}
    tensors = {f"hada_{name}": torch.randn(shape, generator=generator) for name, shape in parts.items()}
    expected = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"]) / 3
    name = "lora_unet_transformer_blocks_1_attn_to_q"
    save_file(
        {f"{name}.{k}": v for k, v in tensors.items()} | {f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
    )
    out = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert "1 layers with a LoHa of rank r were written as a LoRA of rank r * r" in capsys.readouterr().out
    for load in (theirs(out), ours(tmp_path / "a.safetensors")):
        close(loaded_changes(model, load), {"transformer_blocks.1.attn.to_q": expected})
    kept = load_file(convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "comfyui"))
    assert torch.equal(kept["diffusion_model.transformer_blocks.1.attn.to_q.hada_w2_b"], tensors["hada_w2_b"])


def test_dora_keeps_its_magnitude(tmp_path, model):
    """diffusers' reader drops `dora_scale`; the import and the converted file keep it."""
    (layer,) = LAYERS[2:3]
    down, up = matrices()[layer]
    weight = model.transformer.get_submodule(layer).weight.detach()
    magnitude = torch.rand(256, generator=torch.Generator().manual_seed(3)) + 0.5
    changed = weight + up @ down / 2
    expected = magnitude[:, None] / changed.norm(dim=1, keepdim=True) * changed
    path = written(tmp_path / "a.safetensors", "kohya", {layer: (down, up)}, 2)
    name = layer.replace(".", "_")
    save_file(load_file(path) | {f"lora_unet_{name}.dora_scale": magnitude[:, None]}, path)
    out = convert(path, tmp_path / "b.safetensors", "diffusers")
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(4))
    for load in (theirs(out), ours(out), ours(path)):
        load(model)
        module = model.transformer.get_submodule(layer)
        result = module(x) - module.base_layer.bias
        model.transformer.delete_adapters(list(model.transformer.peft_config))
        model.unload_lora_weights()
        assert torch.allclose(result, x @ expected.T, atol=1e-4)
    back = load_file(convert(out, tmp_path / "c.safetensors", "kohya"))
    assert torch.equal(back[f"lora_unet_{name}.dora_scale"], magnitude[:, None])
    for form in ("comfyui", "ai-toolkit", "diffsynth", "lightning"):
        with pytest.raises(ValueError, match=r"is a DoRA, and .* has no magnitude of that meaning"):
            refuse(tmp_path, load_file(path), form)
    with pytest.raises(ValueError, match=r"has the shape \[1, 256\]: it holds the norms of the columns"):
        refuse(tmp_path, load_file(path) | {f"lora_unet_{name}.dora_scale": magnitude[None]})


def test_whole_differences_are_kept_or_refused(tmp_path):
    shapes = {"transformer_blocks.0.attn.norm_q.diff": [64], "img_in.diff": [256, 64], "img_in.diff_b": [256]}
    tensors = {f"diffusion_model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    kept = load_file(convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui"))
    assert kept.keys() == tensors.keys() and all(torch.equal(kept[key], tensors[key]) for key in kept)
    message = r"is changed by a whole difference of a weight or a bias, which diffusers cannot hold; .* file: comfyui$"
    with pytest.raises(ValueError, match=message):
        refuse(tmp_path, tensors)
    with pytest.raises(ValueError, match="a whole difference of a weight or a bias, which kohya cannot hold"):
        refuse(tmp_path, tensors, "kohya")
    pair = dict(zip(NAMES["diffusers"], next(iter(matrices().values())), strict=False))
    bias = {NAMES["diffusers"][1].replace("weight", "bias"): torch.ones(256)}
    with pytest.raises(ValueError, match=r"which diffusers cannot hold; formats that can hold this file: comfyui$"):
        refuse(tmp_path, pair | bias)


def test_no_tensor_is_left_out(tmp_path):
    good = load_file(written(tmp_path / "a.safetensors", "kohya", matrices(), 4))
    one = "lora_unet_transformer_blocks_0_attn_to_out_0"
    vector = torch.zeros(4)
    for extra, message in (
        ({"lora_te1_x.lora_down.weight": vector}, r"1 of 13 .* not known: lora_te1_x.*Known are the formats diff"),
        ({f"x.{i}.lora_A.weight": vector.clone() for i in range(5)}, r"5 of 17 .*: x.*lora_A.weight, x.*, \.\.\."),
        ({"transformer_blocks_0_attn_to_q.lora_A.weight": vector}, "1 of 13 tensors are not known"),
        ({"transformer.transformer_blocks.0.attn.to_qkv.lora_A.weight": vector}, "1 of 13 tensors are not known"),
        ({f"{one}.lora_mid.weight": vector}, "1 of 13 tensors are not known"),
        ({f"{one}.alpha": torch.tensor(float("nan"))}, "alpha of .*to_out.0 is nan, not a finite number"),
        ({"lora_unet_img_in.lora_down.weight": torch.zeros(4, 64)}, "up of img_in are missing"),
        ({"lora_unet_img_in.alpha": torch.tensor(1.0)}, "all matrices of img_in are missing"),
        ({"lora_unet_img_in.lokr_w2_a": torch.zeros(4, 4)}, "lokr_w2_b and lokr_w1 of img_in are missing"),
        ({"lora_unet_img_in.hada_w1_a": torch.zeros(4, 4)}, "hada_w1_b and hada_w2_a and hada_w2_b of img_in"),
        ({"transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": torch.zeros(4, 256)}, "two tensors for one"),
        ({f"{one}.lora_up.weight": torch.zeros(256, 4, 1, 1)}, "is not a matrix; all layers of Qwen-Image are linear"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            refuse(tmp_path, good | extra)
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        read_lora(tmp_path / "cut.safetensors")


def test_every_layer_of_the_model_has_its_name(model):
    """The table of layers is that of diffusers, with and without underscores, and the widths are the models'."""
    modules = {n: m for n, m in model.transformer.named_modules() if getattr(m, "weight", None) is not None}
    blocks = {name.split(".", 2)[2] for name in modules if name.startswith("transformer_blocks.")}
    assert blocks == {*LINEARS, *NORMS} and {n for n in modules if "blocks" not in n} == set(OUTER)
    for name, module in modules.items():
        for form in FORMATS.values():
            assert split_key(form.key(name, "down")).layer == name
        if isinstance(module, torch.nn.Linear) and "blocks" in name:
            assert tuple(module.weight.shape) == weight_shape(name, model.transformer.inner_dim)
    assert model.transformer.inner_dim in WIDTHS


def test_info(tmp_path, capsys):
    path = written(tmp_path / "a.safetensors", "lightning", matrices(dtype=torch.bfloat16), 2, {"title": "mine"})
    assert main(["lora", "info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "lightning" and found["kind"] == ["lora"] and found["rank"] == [4]
    assert found["scale"] == {"0.5": 4} and found["dtype"] == ["bfloat16"] and "built-in" in found["model"]
    assert found["layers"]["img_mlp.net.0.proj"] == 1 and found["metadata"] == ["title"]
    assert found["parameters"] == sum(t.numel() for pair in matrices().values() for t in pair)
    for form in ("diffusers", "comfyui", "kohya", "diffsynth"):
        assert main(["lora", "info", str(written(tmp_path / "b.safetensors", form, matrices()))]) == 0
        assert re.search(rf"^format +{form}$", capsys.readouterr().out, flags=re.M)
    wide = {NAMES["diffusers"][0]: torch.zeros(2, 3072), NAMES["diffusers"][1]: torch.zeros(3072, 2)}
    save_file(wide, tmp_path / "wide.safetensors")
    main(["lora", "info", str(tmp_path / "wide.safetensors")])
    assert "2509 and 2511" in capsys.readouterr().out
    save_file({NAMES["diffusers"][0]: torch.zeros(2, 3072), NAMES["diffusers"][1]: torch.zeros(512, 2)}, path)
    main(["lora", "info", str(path)])
    assert "not known: the weight of transformer_blocks.12.attn.to_out.0 would be 512 x 3072" in capsys.readouterr().out


def test_the_command_refuses_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    path = written(tmp_path / "a.safetensors", "kohya", matrices(), 4)
    for arguments, message in (
        ([path, path], "exists; give a new file"),
        ([path, tmp_path / "b.bin"], "the file to write is a .safetensors file"),
        ([tmp_path / "gone", tmp_path / "b.safetensors"], "no such file or folder"),
        ([tmp_path, tmp_path / "b.safetensors"], None),
    ):
        assert main(["lora", "convert", *map(str, arguments), "--to", "diffusers"]) == (2 if message else 0)
        assert (message or "4 layers, diffusers") in "".join(capsys.readouterr())
    (tmp_path / "b.safetensors").unlink()
    monkeypatch.setattr("uniref_fast.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    assert main(["lora", "convert", str(path), str(tmp_path / "new" / "b.safetensors"), "--to", "diffusers"]) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"], "no part of a file is left"


def test_a_scaled_lokr_is_fused_like_its_difference(tmp_path, model):
    tensors, changes = lokr_tensors("lora_unet_", "_")
    save_file(tensors, tmp_path / "a.safetensors")
    pipe = builtin.load()
    fuse_adapters(pipe, [Adapter.parse(f"{tmp_path}/a.safetensors:0.5")], None)
    for name, change in changes.items():
        before, after = (p.transformer.get_submodule(name).weight for p in (model, pipe))
        assert torch.allclose(after, before + 0.5 * change, atol=1e-4)


def test_the_documents_list_every_format():
    text = (Path(__file__).parents[2] / "docs/lora.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| `(.*?)` \|.*?\| (.*?) \|$", text, flags=re.M)
    assert [row[0] for row in rows] == list(FORMATS)
    words = {"LoRA": "lora", "DoRA": "dora", "LoKr": "lokr", "LoHa": "loha", "whole differences": "full"}
    for name, programs, example, kinds in rows:
        form = FORMATS[name]
        assert (programs, example) == (form.programs, NAMES[name][0])
        assert {words[kind] for kind in kinds.split(", ")} == form.kinds | ({"dora"} if form.magnitude else set())
