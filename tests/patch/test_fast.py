"""patch(mode="fast"): a patched pipeline in 8 bits, its report, and the way back."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from patching import inputs, run
from peft import LoraConfig
from torch import nn

import uniref_fast
from uniref_fast import EditRequest
from uniref_fast.patch.install import patched_parts
from uniref_fast.quantised_linear import QuantisedWeight, is_quantised


def relative(actual, expected):
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def patch(model, **options):
    return uniref_fast.patch(model, **{"mode": "fast", "impl": "reference", **options})


@pytest.fixture
def model(make_transformer):
    return make_transformer(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_model_in_8_bits(make_transformer, dtype):
    """The result differs a little; the report names each part in 8 bits with its error; unpatch restores everything."""
    model = make_transformer(True, dtype=dtype)
    expected, before = run(model, dtype=dtype), dict(model.named_parameters())
    bits = {name: parameter.clone() for name, parameter in before.items()}
    report = patch(model)
    assert report.mode == "fast" and report.eight_bit == (12, 1) and "measured in the first call" in str(report)
    out = run(model, dtype=dtype)
    assert 1e-4 < relative(out, expected) < 0.1 and not report.fallbacks
    assert len(report.errors) == 13 and all(0.001 < error < 0.15 for error in report.errors.values())
    assert "transformer_blocks.1.attn.processor" in report.errors and "12 Linears, attention of 1 blocks" in str(report)
    assert {site.name: site.tolerance for site in report.sites}["transformer_blocks.1.attn"] == 0.3
    assert torch.equal(run(model, dtype=dtype), out)
    uniref_fast.unpatch(model)
    assert torch.equal(run(model, dtype=dtype), expected)
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and torch.equal(parameter, bits[name]), name


def test_a_batch_and_the_packed_model_agree(make_transformer):
    """A patched model and `edit` compute the same in 8 bits, up to rounding of the parts in 16 bits."""
    model = make_transformer(True)
    exact = run(model)
    patch(model)
    batch = run(model, batch=2)
    assert batch.shape[0] == 2 and relative(run(model), exact) < 0.1
    packed = uniref_fast.PackedQwenImage(model, impl="reference", attention_8bit=patched_parts(model).attention)
    given = inputs()
    layout = packed.layout([uniref_fast.Sample(7, given["img_shapes"][0][0], tuple(given["img_shapes"][0][1:]))])
    with torch.no_grad():
        out = packed(given["hidden_states"][0], given["encoder_hidden_states"][0], given["timestep"], layout)
    targets = len(out)
    assert relative(out, run(model)[0, :targets]) < 0.02


def test_modules_in_16_bits_are_chosen_by_name(model):
    report = patch(model, modules_to_not_convert=["attn", "img_mod", "txt_mod", "transformer_blocks.2"])
    run(model)
    assert report.eight_bit == (8, 0) and all("mlp" in name for name in report.errors)
    with pytest.raises(ValueError, match="already patched"):
        patch(model)
    uniref_fast.unpatch(model)
    with pytest.raises(ValueError, match="fits no Linear"):
        patch(model, modules_to_not_convert=["transformer_blocks.7"])
    with pytest.raises(ValueError, match='is for mode="fast"'):
        uniref_fast.patch(model, modules_to_not_convert=["attn"])
    with pytest.raises(
        ValueError, match=r'mode="fast" is not possible here: .* not for cpu; impl=.reference. emulates'
    ):
        patch(model, impl=None)
    with pytest.raises(ValueError, match="unknown mode 'faster'"):
        patch(model, mode="faster")
    assert not uniref_fast.unpatch(model) and not any(map(is_quantised, model.modules()))


def test_text_rows_of_zeros(model):
    """Rows of zeros in front of Linears give no NaN (their scale would be 0)."""
    for block in model.transformer_blocks:
        block.txt_mlp.net[0].proj.weight.data.zero_()
        block.txt_mlp.net[0].proj.bias.data.zero_()
    expected = run(model)
    patch(model)
    assert relative(run(model), expected) < 0.1


def test_an_outlier_in_one_row(model):
    """One text row of 6e4 leaves the error of the others as it is."""
    given = inputs()
    given["encoder_hidden_states"][0, 3, 5] = 6e4
    with torch.no_grad():
        expected = model(**given)[0]
        patch(model)
        assert relative(model(**given)[0], expected) < 0.1


def test_a_failed_self_check_of_attention_is_an_error(model, monkeypatch):
    monkeypatch.setattr(uniref_fast.ops, "attention_fp8", lambda q, k, v, plan, impl=None: q.clone())
    patch(model)
    with pytest.raises(RuntimeError, match=r"transformer_blocks.1.attn differs from the original"):
        run(model)


def test_hooks_see_the_shapes_of_the_original(model):
    seen = {}
    for name in ("attn.to_q", "img_mlp", "txt_mlp.net.2"):
        module = model.transformer_blocks[1].get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0].shape, out.shape)}))
    run(model)
    expected = dict(seen)
    seen.clear()
    report = patch(model)
    run(model)
    assert seen == expected and not report.fallbacks


def test_saved_weights_are_the_16_bit_ones(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch(model)
    model.save_pretrained(tmp_path)
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_can_be_loaded_into_a_patched_model(make_transformer, model):
    other = make_transformer(True, seed=3)
    expected = run(other)
    patch(model)
    model.load_state_dict(other.state_dict())
    assert relative(run(model), expected) < 0.1
    uniref_fast.unpatch(model)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("patch_first", [True, False])
def test_adapters(make_transformer, patch_first):
    """An adapter that is loaded, scaled, fused and unfused has the effect that it has in 16 bits."""
    plain, model = make_transformer(True), make_transformer(True)
    config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["to_q", "to_v", "img_mlp.net.2"])

    def add(each):
        torch.manual_seed(2)
        each.add_adapter(config, "a")

    if not patch_first:
        add(model)
    patch(model)
    if patch_first:
        add(model)
    base = run(plain)
    add(plain)
    steps = (
        lambda each: None,
        lambda each: each.set_adapters(["a"], [0.5]),
        lambda each: each.set_adapters(["a"], [1.0]),
        lambda each: each.fuse_lora(1.0),
    )
    for step in steps:
        for each in (plain, model):
            step(each)
        expected = run(plain)
        assert relative(expected, base) > 3 * relative(run(model), expected)
    for each in (plain, model):
        each.unfuse_lora()
        each.unload_lora()
    expected = run(plain)
    assert relative(run(model), expected) < 0.1
    uniref_fast.unpatch(model)
    assert torch.equal(run(model), expected)


def test_moved_weights(model):
    """Offloading moves the 8-bit values; the 16-bit weight stays where it is. A cast changes both."""
    patch(model)
    weight = model.transformer_blocks[1].attn.to_k.weight
    moved = weight.to("meta")
    assert type(moved) is QuantisedWeight and moved.e4m3.device.type == "meta" and moved.original is weight.original
    model.to(torch.bfloat16)
    weight = model.transformer_blocks[1].attn.to_v.weight
    assert type(weight) is QuantisedWeight and weight.original.dtype == torch.bfloat16
    uniref_fast.unpatch(model)
    assert type(model.transformer_blocks[1].attn.to_v.weight) is nn.Parameter


def test_group_offloading(make_transformer, model):
    """Offloading of blocks, which assigns `data` of each weight, leaves the result as it is."""
    patch(model)
    expected = run(model)
    other = make_transformer(True)
    patch(other)
    devices = {name: torch.device("cpu") for name in ("onload_device", "offload_device")}
    other.enable_group_offload(**devices, offload_type="block_level", num_blocks_per_group=1)
    for _ in range(2):
        assert torch.equal(run(other), expected)


def test_gradients_are_refused(model):
    patch(model)
    with pytest.raises(ValueError, match="no gradient"):
        model(**inputs() | {"hidden_states": inputs()["hidden_states"].requires_grad_()})


@pytest.mark.slow
def test_compiled_code_computes_linears_in_8_bits(make_transformer):
    model, other = make_transformer(True), make_transformer(True)
    patch(model, modules_to_not_convert=["transformer_blocks.0", "transformer_blocks.2", "processor", "img_mod"])
    patch(other, modules_to_not_convert=["transformer_blocks.0", "transformer_blocks.2", "processor", "img_mod"])
    exact = run(make_transformer(True))
    expected = run(model)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    assert relative(run(compiled), expected) < 0.1 * relative(expected, exact)
    torch._dynamo.reset()


def test_edit_of_a_patched_pipeline(builtin_pipe):
    """`edit` takes the weights and the parts of the patch, and never mixes the two modes."""
    request = [EditRequest("make it night", seed=1, true_cfg_scale=1.0, num_inference_steps=2, height=64, width=64)]
    options = {"output_type": "latent", "progress": False}
    expected = uniref_fast.edit(builtin_pipe, request, mode="fast", impl="reference", **options)[0]
    patch(builtin_pipe)
    assert torch.equal(uniref_fast.edit(builtin_pipe, request, mode="fast", impl="reference", **options)[0], expected)
    assert is_quantised(builtin_pipe.transformer.transformer_blocks[1].attn.to_q)
    with pytest.raises(ValueError, match=r"patched with mode=.fast.; give edit\(\) the same mode"):
        uniref_fast.edit(builtin_pipe, request, **options)
    for other in ({"modules_to_not_convert": ["attn"], "impl": "reference"},):
        with pytest.raises(ValueError, match="no modules_to_not_convert"):
            uniref_fast.edit(builtin_pipe, request, mode="fast", **other, **options)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with e4m3"
)
def test_on_a_gpu(make_transformer):
    """Kernels and emulation agree, the device has half of the bytes, and unpatch restores the bits."""
    emulated, model = (make_transformer(True, layers=6, dtype=torch.bfloat16).cuda() for _ in range(2))
    given = {name: x.cuda() if torch.is_tensor(x) else x for name, x in inputs(torch.bfloat16).items()}
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        exact = model(**given)[0]
        patch(emulated)
        expected = emulated(**given)[0]
        report = patch(model, impl=None)
        out = model(**given)[0]
    assert not report.fallbacks and "triton" in report.calls
    assert relative(out, expected) < max(0.02, relative(expected, exact))
    layer = model.transformer_blocks[1].attn.to_q
    assert layer.weight.original.device.type == "cpu" and layer.weight.e4m3.is_cuda
    layer.weight.data = layer.weight.data.to("cpu")  # as group offloading does
    assert layer.weight.e4m3.device.type == layer.weight.device.type == "cpu"
    layer.weight.data = layer.weight.data.to("cuda")
    uniref_fast.unpatch(model)
    assert all(torch.equal(value, bits[name]) and value.is_cuda for name, value in model.state_dict().items())


@pytest.mark.parametrize("patched", [False, True])
def test_with_kept_references(builtin_pipe, patched):
    """References are kept over steps in 8 bits too: the result is near the one that computes them in every step."""
    from PIL import Image

    picture = Image.new("RGB", (48, 48), "red")
    given = {"prompt": "make it night", "num_inference_steps": 4, "height": 64, "width": 64, "true_cfg_scale": 1.0}

    def latents(keep):
        if not patched:
            request = [EditRequest(images=[picture], seed=1, **given)]
            options = {"mode": "fast", "impl": "reference", "output_type": "latent", "progress": False}
            return uniref_fast.edit(builtin_pipe, request, keep_references=keep, **options)[0]
        patch(builtin_pipe, keep_references=keep)
        out = builtin_pipe(image=[picture], output_type="latent", generator=torch.Generator().manual_seed(1), **given)
        uniref_fast.unpatch(builtin_pipe)
        return out.images

    every, kept = latents(False), latents(2)
    assert not torch.equal(every, kept) and relative(kept, every) < 0.2
