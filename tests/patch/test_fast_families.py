"""mode="fast" of the families beside Qwen-Image-Edit: a patched model, the packed model, zero rows, whole edits."""

import flux2
import pytest
import qwen_image_21
import torch
from torch import nn

import uniref_fast
from uniref_fast import EditReport, EditRequest, fast
from uniref_fast.family_demo import demo_requests, stock_edit
from uniref_fast.models.eight_bit import feed_forward, first_linear
from uniref_fast.models.families import families, family_of
from uniref_fast.quantised_linear import QuantisedActivation, QuantisedWeight, is_quantised

FAST = {"mode": "fast", "impl": "reference"}
PARTS = {  # Linears and attention in 8 bits of the small models
    "qwen-image-2.1": (7, ["transformer_blocks.1.attn.processor"]),
    "klein": (
        12 + 2 * 2,
        ["transformer_blocks.1.attn.processor", *(f"single_transformer_blocks.{i}.attn.processor" for i in (0, 1))],
    ),
}
PARTS["klein-kv"] = PARTS["klein"]
_LISTS = {  # of the other families: lists with the numbers of their blocks in 8 bits, and Linears of each of these
    "flux1": ((("transformer_blocks", 1), ("single_transformer_blocks", 0)), (12, 5)),
    "fibo-2": ((("layers", 0), ("layers", 1)), (7 + 4, 7)),  # one of them reads the text encoder
    "z-image": ((("layers", 0), ("layers", 1)), (7, 7)),
    "flux3": (
        (("txt_mode_blocks", 1), ("mode_blocks.image", 1), ("mode_blocks.image_cond", 1),
         ("single_transformer_blocks", 0)), (6,) * 4,
    ),
    "joyimage-edit-plus": ((("double_blocks", 1),), (8,)),
}  # fmt: skip
_LISTS |= dict.fromkeys(("longcat-image-edit", "fibo-edit"), _LISTS["flux1"])
SANDWICH = ("fibo-2", "z-image")
for _family, (_blocks, _linears) in _LISTS.items():
    _attention = "attention" if _family in SANDWICH else "attn"
    PARTS[_family] = sum(_linears), [f"{name}.{i}.{_attention}.processor" for name, i in _blocks]


def small(kind):
    if kind == "qwen-image-2.1":
        return qwen_image_21.pipeline()
    if kind.startswith("klein"):
        return flux2.pipeline(flux2.transformer(kind), kind)
    family = next(family for family in families() if family.name == kind)
    # the feed-forwards of Z-Image and Fibo 2 have a multiple of 16 channels with 3 heads
    sizes = {"heads": 3, "layers": 3} if kind in SANDWICH else {"heads": 1, "layers": 3 if "joy" in kind else 2}
    return family.random_pipeline(family.random_pipelines()[0], grid=4, **sizes)


def relative(actual, expected):
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=PARTS)
def pipe(request):
    pipe = small(request.param)
    pipe.kind = request.param
    return pipe


def requests(pipe):
    """Two requests; those of FLUX.2 have short embeddings, because its prompts are padded to 512 tokens."""
    if pipe.kind in _LISTS:
        return demo_requests(family_of(pipe), pipe, 4, 1, 1)[:4:3]  # of different sizes
    images = [flux2.picture(64, 64, 1), flux2.picture(96, 64, 2)]
    texts = [{"prompt": "an owl", "negative_prompt": " "}, {"prompt": "a cat"}]
    if pipe.kind != "qwen-image-2.1":
        embeds = torch.randn(3, 9, 96, generator=torch.Generator().manual_seed(0))
        texts = [{"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}, {"prompt_embeds": embeds[2]}]
    if pipe.kind == "klein-kv":
        del texts[0]["negative_prompt_embeds"]
    one = EditRequest(images=images, seed=1, height=64, width=64, num_inference_steps=2, true_cfg_scale=2.0, **texts[0])
    two = EditRequest(images=images[:1], seed=2, height=64, width=96, num_inference_steps=3, true_cfg_scale=1.0,
                      **texts[1])  # fmt: skip
    return [one, two]


def test_default_parts(pipe):
    """The first and the last block stay in 16 bits; in FLUX.2 they are of different kinds."""
    parts = fast.eight_bit_parts(pipe.transformer)
    linears, attention = PARTS[pipe.kind]
    assert (len(parts.linears), sorted(parts.attention)) == (linears, sorted(attention))
    blocks = {name.rpartition(".attn" if "attn" in name else ".attention")[0] for name in attention}
    assert all(any(name.startswith(f"{block}.") for block in blocks) for name in parts.linears)
    everything = fast.eight_bit_parts(pipe.transformer, [])
    assert len(everything.attention) == len(family_of(pipe).packed(pipe.transformer).blocks)
    with pytest.raises(ValueError, match=r"fits no Linear"):
        fast.eight_bit_parts(pipe.transformer, ["transformer_blocks.9"])


@pytest.mark.parametrize("pipe", [kind for kind in PARTS if kind != "longcat-image-edit"], indirect=True)
def test_edit_and_patch_in_8_bits(pipe):
    """Both differ from the exact edit by a little; the report names each part; the weights stay as they were."""
    options = {"output_type": "latent", "progress": False}
    weights = dict(pipe.transformer.named_parameters())
    exact = uniref_fast.edit(pipe, requests(pipe), **options)
    packed = uniref_fast.edit(pipe, requests(pipe), report=(report := EditReport(compare=True)), **FAST, **options)
    linears, attention = PARTS[pipe.kind]
    assert len(report.errors) == linears + len(attention) and all(0.001 < e < 0.2 for e in report.errors.values())
    for one, other in zip(exact, packed, strict=True):
        assert 1e-4 < relative(other, one) < 0.1
    assert report.latent_errors == pytest.approx([relative(a, b) for a, b in zip(packed, exact, strict=True)], rel=0.05)
    alone = uniref_fast.edit(pipe, requests(pipe)[1:], **FAST, **options)[0]
    assert relative(alone, packed[1]) < 0.01, "only roundings to 8 bits that change with the 16-bit Linears"
    patched = uniref_fast.patch(pipe, **FAST)
    again = uniref_fast.edit(pipe, requests(pipe), **FAST, **options)
    assert all(relative(a, b) < 0.01 for a, b in zip(again, packed, strict=True))
    family = family_of(pipe)
    request = requests(pipe)[0]
    result = stock_edit(family, pipe, request)
    assert patched.eight_bit == (linears, len(attention)) and not patched.fallbacks and len(patched.errors) > linears
    assert {site.name: site.tolerance for site in patched.sites}[attention[0].removesuffix(".processor")] == 0.3
    uniref_fast.unpatch(pipe)
    expected = stock_edit(family, pipe, request)
    (edited,) = uniref_fast.edit(pipe, [request], output_type="pt", progress=False, **FAST)
    assert 1e-5 < relative(result, expected) < 0.1 and relative(result, edited) < 0.02
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter is weights[name]


FEED_FORWARDS = {
    "qwen-image-2.1": "transformer_blocks.1.img_mlp",
    "klein": "transformer_blocks.1.ff",
    "fibo-2": "layers.1.feed_forward",
    "z-image": "layers.1.feed_forward",
    "flux3": "single_transformer_blocks.0.ff",
}


@pytest.mark.parametrize("pipe", FEED_FORWARDS, indirect=True)
@pytest.mark.parametrize("impl", ["reference", None])
def test_a_feed_forward_with_swiglu(pipe, impl):
    """The input of a feed-forward with SwiGLU is quantised once; zeros stay zeros, an outlier costs its row only."""
    mlp = pipe.transformer.get_submodule(FEED_FORWARDS[pipe.kind])
    linears = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    weights = [linear.weight for linear in linears]
    x = torch.randn(6, linears[0].in_features, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    exact = mlp(x)
    try:
        for linear in linears:
            linear.weight = nn.Parameter(QuantisedWeight.of(linear.weight, "reference"), requires_grad=False)
        assert is_quantised(first_linear(mlp))
        out = feed_forward(mlp, x, impl)
        assert relative(out, exact) < 0.1 and torch.equal(out[3], torch.zeros_like(out[3]))
        assert torch.equal(out, mlp(x))
        larger = x.clone()
        larger[2, 5] = 6e4
        others = [0, 1, 3, 4, 5]
        assert torch.equal(feed_forward(mlp, larger, impl)[others], out[others])
        seen = []
        hook = mlp.register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
        assert first_linear(mlp) is None and torch.equal(feed_forward(mlp, x, impl), out)
        assert seen == [torch.Tensor] and QuantisedActivation not in seen
        hook.remove()
    finally:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = weight


def test_zero_rows_and_outliers_in_a_packed_forward(pipe):
    """A text of zeros gives a finite result, and an outlier of one sample does not change the other one."""
    model = pipe.transformer
    parts = fast.eight_bit_parts(model, impl="reference")
    family, guidance = family_of(pipe), 2.0 if model.config.get("guidance_embeds") else None
    packed = family.packed(model, impl="reference", attention_8bit=parts.attention)
    samples = (5, (1, 2, 4), ((1, 2, 2),)), (3, (1, 4, 4), ())
    layout = packed.layout([uniref_fast.Sample(*sample, guidance=guidance) for sample in samples])
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(layout.image_length, packed.sizes(model.config).token_channels, generator=generator)
    text = torch.randn(family.text_rows(layout), family.text_channels(model.config), generator=generator)
    text[1] = 0
    with fast.eight_bit(model, parts):
        out = layout.split_targets(packed(image, text, torch.tensor([0.5, 0.7]), layout))
        text[-1] = 1e4
        changed = layout.split_targets(packed(image, text, torch.tensor([0.5, 0.7]), layout))
    assert all(each.isfinite().all() for each in out)
    assert relative(changed[0], out[0]) < 1e-5 and relative(changed[1], out[1]) > 1e-3


def test_saved_bytes_of_real_sizes():
    """The Linears of all blocks but the first and the last have one byte for each weight."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel(num_layers=2, num_single_layers=3).to(torch.bfloat16)
    saved = fast.saved_bytes(model, fast.eight_bit_parts(model))
    inside = [model.transformer_blocks[1], *model.single_transformer_blocks[:2]]
    numbers = sum(m.weight.numel() for block in inside for m in block.modules() if isinstance(m, nn.Linear))
    assert 0.998 * numbers < saved < numbers
