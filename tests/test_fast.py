"""mode="fast": the parts in 8 bits, their weights, adapters on top, and whole edits in the emulation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

import uniref_fast
from uniref_fast import EditReport, EditRequest, fast, ops
from uniref_fast.models.eight_bit import feed_forward, gated_input, modulated_input
from uniref_fast.quantised_linear import QuantisedActivation, QuantisedWeight, is_quantised, quantised_input

KEPT = ["transformer_blocks.0", "transformer_blocks.2", "img_mod", "txt_mod"]
LINEARS = 12  # of a block without modulation: 8 of attention, 2 of each feed-forward


def picture(color, width, height):
    from PIL import Image

    image = Image.new("RGB", (width, height), color)
    image.paste("white", (width // 4, height // 4, width // 2, height // 2))
    return image


def requests():
    red, blue = picture("red", 60, 40), picture("blue", 33, 77)
    return [
        EditRequest("make it night", [red], seed=1, num_inference_steps=3, negative_prompt=" "),
        EditRequest("put all in one", [red, blue], None, seed=2, height=64, width=96, num_inference_steps=2,
                    true_cfg_scale=1.0),
    ]  # fmt: skip


def fast_edit(pipe, given, **options):
    options = {"mode": "fast", "impl": "reference", "output_type": "latent", "progress": False, **options}
    return uniref_fast.edit(pipe, given, **options)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(64, 48).requires_grad_(False)


@pytest.fixture
def eight_bit_linear(linear):
    layer = copy.deepcopy(linear)
    layer.weight = nn.Parameter(QuantisedWeight.of(layer.weight, "reference"), requires_grad=False)
    return layer


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def rounded(x):
    """Return x as its 8-bit values say, in float64."""
    values, scale = ops.quantize_fp8(x, impl="reference")
    return values.double() * scale.double()[:, None]


# ---- which parts


def test_default_parts(make_transformer):
    parts = fast.eight_bit_parts(make_transformer(layers=4))
    assert parts.attention == {"transformer_blocks.1.attn.processor", "transformer_blocks.2.attn.processor"}
    assert len(parts.linears) == 2 * LINEARS
    assert all(name.startswith(("transformer_blocks.1.", "transformer_blocks.2.")) for name in parts.linears)
    assert not any("mod" in name for name in parts.linears)


@pytest.mark.parametrize(
    ("kept", "linears", "attention"),
    [
        ([], 3 * (LINEARS + 2), 3),
        (["processor"], 3 * (LINEARS + 2), 0),
        (["attn"], 3 * 6, 0),
        (["transformer_blocks.1"], 2 * (LINEARS + 2), 2),
        (["img_mlp", "txt_mlp.net.2", "img_mod", "txt_mod"], 3 * (LINEARS - 3), 3),
        (["transformer_blocks.1.attn.processor"], 3 * (LINEARS + 2), 2),
    ],
)
def test_parts_by_name(make_transformer, kept, linears, attention):
    parts = fast.eight_bit_parts(make_transformer(), kept)
    assert (len(parts.linears), len(parts.attention)) == (linears, attention)


def test_names_match_whole_components(make_transformer):
    """Block 1 is not block 11, and a name that fits nothing is an error with near names."""
    model = make_transformer(layers=12)
    assert "transformer_blocks.11.attn.to_q" in fast.eight_bit_parts(model, ["transformer_blocks.1"]).linears
    with pytest.raises(ValueError, match=r"'img_mpl', which fits no Linear .* near names are .*img_mlp"):
        fast.eight_bit_parts(model, ["img_mpl"])


# ---- one Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_multiplies_8_bit_values(linear, dtype):
    """The result is the float64 product of both operands' 8-bit values, for any shape of the input."""
    linear = linear.to(dtype)
    x = torch.randn(3, 5, 64).to(dtype)
    expected = rounded(x.flatten(0, 1)) @ rounded(linear.weight).T + linear.bias.double()
    linear.weight = nn.Parameter(QuantisedWeight.of(linear.weight, "reference"), requires_grad=False)
    out = linear(x)
    assert out.dtype == dtype and out.shape == (3, 5, 48)
    torch.testing.assert_close(out.flatten(0, 1).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_text_rows_of_zeros_give_the_bias(eight_bit_linear):
    """A stream may hold rows of zeros: their scale must not be 0, which would give NaN."""
    x = torch.randn(4, 64)
    x[1] = 0
    out = eight_bit_linear(x)
    assert torch.equal(out[1], eight_bit_linear.bias) and out.isfinite().all()


def test_an_outlier_costs_its_own_row_only(eight_bit_linear):
    x = torch.randn(6, 64)
    before = eight_bit_linear(x)
    x[2, 7] = 6e4
    after = eight_bit_linear(x)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(after[others], before[others]) and after.isfinite().all()


def test_all_other_operations_read_the_16_bit_weight(linear, eight_bit_linear):
    weight = eight_bit_linear.weight
    assert type(weight) is QuantisedWeight and isinstance(weight, nn.Parameter)
    assert torch.equal(weight.t() @ weight, linear.weight.t() @ linear.weight)
    assert torch.equal(weight.float(), linear.weight) and weight.shape == (48, 64)
    with pytest.raises(NotImplementedError, match="unpatch"):
        weight.mul_(2)


def test_a_weight_can_be_copied_and_cast(eight_bit_linear):
    x = torch.randn(5, 64)
    expected = eight_bit_linear(x)
    other = copy.deepcopy(eight_bit_linear)
    eight_bit_linear.weight.data += 1.0
    assert torch.equal(other(x), expected) and type(other.weight) is QuantisedWeight
    half = other.to(torch.bfloat16)
    assert type(half.weight) is QuantisedWeight and half.weight.dtype == torch.bfloat16
    assert half.weight.original.dtype == torch.bfloat16 and half(x.bfloat16()).dtype == torch.bfloat16


def test_a_changed_weight_is_quantised_again(linear, eight_bit_linear):
    """The ways in which peft changes weights: in place through `data`, a changed clone, another tensor."""
    delta, x = torch.randn(48, 64), torch.randn(5, 64)
    eight_bit_linear.weight.data += delta
    changed = eight_bit_linear.weight.data.clone()
    changed -= 2 * delta
    eight_bit_linear.weight.data = changed
    expected = linear.weight + delta - 2 * delta
    assert torch.equal(eight_bit_linear.weight.original, expected)
    values = rounded(x) @ rounded(expected).T + linear.bias.double()
    torch.testing.assert_close(eight_bit_linear(x).double(), values, rtol=1e-5, atol=1e-5)
    eight_bit_linear.weight.data = linear.weight
    assert torch.equal(eight_bit_linear.weight.e4m3.float(), ops.quantize_fp8(linear.weight)[0].float())


def test_gradients_are_refused(eight_bit_linear):
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        eight_bit_linear(torch.randn(2, 64, requires_grad=True))


def test_an_activation_is_exact_outside_of_8_bit_products(linear, eight_bit_linear):
    """Linears in 16 bits and other operations see the values that were quantised, computed once."""
    x, calls = torch.randn(5, 64), []
    plain = quantised_input(x, "reference")
    counted = QuantisedActivation(plain.e4m3, plain.row_scale, x.dtype, lambda: calls.append(1) or x)
    assert torch.equal(eight_bit_linear(counted), eight_bit_linear(x)) and not calls
    assert torch.equal(linear(counted), linear(x)) and torch.equal(F.gelu(counted), F.gelu(x)) and len(calls) == 1
    with pytest.raises(NotImplementedError, match="cannot change"):
        counted.add_(1)


# ---- blocks


@pytest.mark.parametrize("quantised", [False, True])
def test_inputs_of_linears(linear, eight_bit_linear, quantised):
    """The ops before a Linear quantise for a Linear in 8 bits, and leave 16 bits to the others."""
    layer = eight_bit_linear if quantised else linear
    x, branch = torch.randn(2, 7, 64)
    gate, shift, scale = torch.randn(3, 1, 64)
    exact = ops.norm_modulate(x, shift, scale, None)
    y = modulated_input(layer, x, shift, scale, None, 1e-6, None)
    assert isinstance(y, QuantisedActivation) == quantised
    torch.testing.assert_close(layer(y), layer(exact), rtol=1e-4, atol=0.05 if quantised else 1e-5)
    torch.testing.assert_close(y + 0, exact)
    x_out, y = gated_input(layer, x, branch, gate, shift, scale, None, 1e-6, None)
    torch.testing.assert_close(x_out, x + gate * branch)
    assert isinstance(y, QuantisedActivation) == quantised
    torch.testing.assert_close(y + 0, ops.norm_modulate(x_out, shift, scale, None))


def test_feed_forward_quantises_after_gelu(make_transformer):
    """The fused feed-forward equals the module in 8 bits; hooks, dropout and other kinds call the module."""
    mlp = make_transformer().transformer_blocks[1].txt_mlp
    for layer in (mlp.net[0].proj, mlp.net[2]):
        layer.weight = nn.Parameter(QuantisedWeight.of(layer.weight, "reference"), requires_grad=False)
    x = torch.randn(9, 128)
    x[3] = 0
    mlp.net[0].proj.bias.zero_()  # rows of zeros in front of the second product
    out = feed_forward(mlp, x, None)
    assert out.isfinite().all() and torch.equal(out[3], mlp.net[2].bias)
    assert torch.equal(out, mlp(x))
    seen = []
    mlp.net[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(feed_forward(mlp, x, None), out) and seen


def test_quantise_and_restore(make_transformer):
    """`restore` gives the same parameter objects with the same bits back."""
    model = make_transformer()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    fast.quantise(model, fast.eight_bit_parts(model))
    assert is_quantised(model.transformer_blocks[1].attn.to_q)
    assert not is_quantised(model.transformer_blocks[0].attn.to_q)
    with pytest.raises(ValueError, match="in 8 bits already"):
        fast.quantise(model, fast.eight_bit_parts(model))
    fast.restore(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name


def test_weights_that_are_not_plain_are_refused(make_transformer):
    model = make_transformer()
    layer = model.transformer_blocks[1].img_mlp.net[2]
    layer._parameters["weight"] = layer.weight.data.as_subclass(type("Own", (torch.Tensor,), {}))
    with pytest.raises(ValueError, match=r"blocks.1.img_mlp.net.2: it is a Linear with a weight of type Own"):
        fast.quantise(model, fast.eight_bit_parts(model))
    assert not is_quantised(model.transformer_blocks[1].attn.to_q)


# ---- adapters


def adapter(model, name="a", scale=0.2):
    torch.manual_seed(5)
    targets = ["to_q", "to_out.0", "img_mlp.net.2", "add_k_proj"]
    model.add_adapter(LoraConfig(r=16, lora_alpha=32, init_lora_weights=False, target_modules=targets), name)
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" in parameter_name:
            parameter.mul_(scale)


def outputs(model, seed=0):
    """Input and result of a Linear with an adapter."""
    layer = model.transformer_blocks[1].attn.to_q
    torch.manual_seed(seed)
    return layer, torch.randn(6, 128)


def test_adapters_are_no_parts(make_transformer):
    """The parts have the same names with and without an adapter, whose own Linears are none of them."""
    plain, model = make_transformer(), make_transformer()
    adapter(model)
    assert fast.eight_bit_parts(model, []) == fast.eight_bit_parts(plain, [])


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_branch_of_an_adapter_stays_in_16_bits(make_transformer, when):
    """An adapter adds what it adds to the exact model, whether it is there before or loaded after quantisation."""
    plain, model = make_transformer(), make_transformer()
    adapter(plain)
    if when == "before":
        adapter(model)
    fast.quantise(model, fast.eight_bit_parts(model, impl="reference"))
    if when == "after":
        adapter(model)
    (exact, x), (layer, _) = outputs(plain), outputs(model)
    assert is_quantised(layer) and not is_quantised(layer.lora_A["a"]) and not is_quantised(layer.lora_B["a"])
    branch = exact(x) - exact.get_base_layer()(x)
    assert branch.abs().max() > 0.05
    base = layer.get_base_layer()(x)
    for given in (x, quantised_input(x, "reference")):
        torch.testing.assert_close(layer(given) - base, branch, rtol=1e-4, atol=1e-4)
    model.set_adapters(["a"], [0.5])
    torch.testing.assert_close(layer(x) - base, branch / 2, rtol=1e-4, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("safe", [False, True])
def test_fusing_an_adapter_changes_the_16_bit_weight(make_transformer, safe):
    """A fused and unfused adapter leaves the weights that the exact model would have; restoring keeps what is fused."""
    plain, model = make_transformer(), make_transformer()
    fast.quantise(model, fast.eight_bit_parts(model, impl="reference"))
    for each in (plain, model):
        adapter(each)
        each.fuse_lora(0.7, safe_fusing=safe)
    (exact, x), (layer, _) = outputs(plain), outputs(model)
    assert torch.equal(layer.get_base_layer().weight.original, exact.get_base_layer().weight)
    expected = rounded(x) @ rounded(exact.get_base_layer().weight).T + exact.get_base_layer().bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    for each in (plain, model):
        each.unfuse_lora()
    assert torch.equal(layer.get_base_layer().weight.original, exact.get_base_layer().weight)
    fast.restore(model)
    assert type(layer.get_base_layer().weight) is nn.Parameter
    assert torch.equal(layer(x), exact(x))


# ---- whole edits


@pytest.fixture(scope="module")
def half_pipe():
    """The built-in pipeline in bfloat16, whose Linears in 16 bits do not depend on the number of rows on some CPUs."""
    from uniref_fast import builtin

    pipe = builtin.load(dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_edit_in_8_bits(builtin_pipe):
    """The result differs from the exact edit by a little, and the weights stay as they were."""
    weights = {name: parameter for name, parameter in builtin_pipe.transformer.named_parameters()}
    exact = uniref_fast.edit(builtin_pipe, requests(), output_type="latent", progress=False)
    results = fast_edit(builtin_pipe, requests())
    linears = fast_edit(builtin_pipe, requests(), modules_to_not_convert=["processor", "img_mod", "txt_mod"])
    for one, other, more in zip(exact, results, linears, strict=True):
        for approximate in (other, more):
            error = ((approximate - one).norm() / one.norm()).item()
            assert 0.001 < error < 0.3
        assert not torch.equal(other, more)
    for name, parameter in builtin_pipe.transformer.named_parameters():
        assert parameter is weights[name]
    again = uniref_fast.edit(builtin_pipe, requests(), output_type="latent", progress=False)
    assert all(map(torch.equal, exact, again))


def test_an_edit_below_an_exact_patch(builtin_pipe):
    """An exact patch of the pipeline changes nothing of an edit in 8 bits, and stays as it is."""
    expected = fast_edit(builtin_pipe, requests()[1:])[0]
    uniref_fast.patch(builtin_pipe)
    assert torch.equal(fast_edit(builtin_pipe, requests()[1:])[0], expected)
    assert not any(map(is_quantised, builtin_pipe.transformer.modules()))


def test_the_same_bits_alone_and_in_a_pack(half_pipe):
    """Scales belong to rows, and the emulated sums are exact: no result depends on the rest of a pack."""
    layer = half_pipe.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(300, layer.in_features).bfloat16()
    if not torch.equal(layer(x)[:7], layer(x[:7])):
        pytest.skip("the Linears in 16 bits of this CPU depend on the number of rows")
    together = fast_edit(half_pipe, requests())
    for request, result in zip(requests(), together, strict=True):
        assert torch.equal(fast_edit(half_pipe, [request])[0], result)


def test_an_adapter_in_an_edit(builtin_pipe):
    """An adapter changes an edit in 8 bits as it changes the exact edit, except for the error of 8 bits."""
    options = {"output_type": "latent", "progress": False}
    try:
        before = uniref_fast.edit(builtin_pipe, requests(), **options)
        adapter(builtin_pipe.transformer, "style", 1.0)
        exact, approximate = uniref_fast.edit(builtin_pipe, requests(), **options), fast_edit(builtin_pipe, requests())
    finally:
        builtin_pipe.transformer.unload_lora()
    for one, other, without in zip(exact, approximate, before, strict=True):
        assert (one - without).norm() > 3 * (other - one).norm()


def test_options_of_edit(builtin_pipe):
    given = requests()[:1]
    with pytest.raises(ValueError, match=r"unknown mode 'quick'; known: exact, fast"):
        uniref_fast.edit(builtin_pipe, given, mode="quick")
    with pytest.raises(ValueError, match=r"e4m3 matrix products.* not for cpu; impl='reference' emulates"):
        uniref_fast.edit(builtin_pipe, given, mode="fast")
    with pytest.raises(ValueError, match=r"impl='native' has no 8-bit operators"):
        uniref_fast.edit(builtin_pipe, given, mode="fast", impl="native")
    with pytest.raises(ValueError, match='is for mode="fast"'):
        uniref_fast.edit(builtin_pipe, given, modules_to_not_convert=["attn"])
    with pytest.raises(ValueError, match="builds its own packed model"):
        fast_edit(builtin_pipe, given, model=uniref_fast.PackedQwenImage(builtin_pipe.transformer))


def test_report_of_an_edit(builtin_pipe):
    """The report names each part in 8 bits with its error, and on request the error of the latents."""
    report = EditReport(compare=True)
    results = fast_edit(builtin_pipe, requests(), report=report)
    assert len(report.errors) == 2 * (LINEARS + 1) and all(0.001 < error < 0.1 for error in report.errors.values())
    exact = uniref_fast.edit(builtin_pipe, requests(), impl="reference", output_type="latent", progress=False)
    expected = [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]
    assert report.latent_errors == pytest.approx(expected, rel=1e-2)
    assert "26 parts in 8 bits: relative errors of" in str(report) and "request 2: error of the latents" in str(report)
    uniref_fast.patch(builtin_pipe, mode="fast", impl="reference")
    fast_edit(builtin_pipe, requests(), report=report)
    assert report.latent_errors == pytest.approx(expected, rel=1e-2)
    fast_edit(builtin_pipe, requests(), report=(other := EditReport()))
    assert not other.latent_errors and other.errors


def test_estimate_counts_the_weights(builtin_pipe):
    """The estimate counts the bytes that a patched transformer has."""
    exact = uniref_fast.estimate(builtin_pipe, requests())
    planned = uniref_fast.estimate(builtin_pipe, requests(), mode="fast")
    uniref_fast.patch(builtin_pipe, mode="fast", impl="reference")
    measured = uniref_fast.estimate(builtin_pipe, requests(), mode="fast")
    bytes_of = [next(s.weight_bytes for s in e.stages if s.name == "transformer") for e in (exact, planned, measured)]
    assert bytes_of[1] == bytes_of[2] < 0.8 * bytes_of[0]
    assert planned.flops == exact.flops and "exact" in planned.time.source and planned.time.value is None
    uniref_fast.unpatch(builtin_pipe)
    with pytest.raises(ValueError, match='is for mode="fast"'):
        uniref_fast.estimate(builtin_pipe, requests(), modules_to_not_convert=["attn"])
    with pytest.raises(ValueError, match="fits no Linear"):
        uniref_fast.estimate(builtin_pipe, requests(), mode="fast", modules_to_not_convert=["attention"])


def test_a_20b_model_has_half_of_its_bytes():
    """The weights of all blocks but the first and the last are halved, except modulation."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=4, attention_head_dim=128, num_attention_heads=24,
                                            joint_attention_dim=3584).to(torch.bfloat16)  # fmt: skip
    saved = fast.saved_bytes(model, fast.eight_bit_parts(model))
    linears = 2 * (4 * 3072**2 + 8 * 3072**2) * 2  # two blocks, two streams: projections and feed-forwards
    assert 0.998 * linears < saved < linears


def test_doctor_says_where_8_bits_are_possible():
    from uniref_fast import doctor

    facts = doctor.facts()
    assert "not for cpu" in facts["eight_bit"]["cpu"]
    assert '8 bits (mode="fast")' in doctor.report(facts) and "not for cpu" in doctor.report(facts)
