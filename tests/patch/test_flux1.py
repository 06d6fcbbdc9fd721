"""patch of FLUX.1, LongCat-Image and FIBO against diffusers: models and features of diffusers."""

import pickle

import flux1
import forwards
import pytest
import torch
from patching import ROUNDING, assert_compiled_blocks

import uniref_fast
from uniref_fast import native, ops
from uniref_fast.testing import max_relative_error

KINDS = list(flux1.CLASSES)


def inputs(model, batch=1, step=0, masked=0):
    """Return the arguments of a forward with 24 target and 6 reference tokens."""
    variant = f"{masked} padded" if masked else "two" if batch == 2 else "one"
    return forwards.arguments(model, "kontext", variant, step)[1]


def run(model, **options):
    with torch.no_grad():
        return model(**inputs(model, **options))[0]


@pytest.mark.parametrize("hooked", [False, True])
def test_the_activation_of_blocks_with_one_stream_is_the_native_gelu(monkeypatch, hooked):
    """Packed and patched; a hook on the activation runs."""
    seen = []
    monkeypatch.setattr(ops, "gelu", lambda x, own=ops.gelu: (seen.append(x.shape[-1]), own(x))[1])
    model = flux1.transformer("kontext")
    if hooked:
        for block in model.single_transformer_blocks:
            block.act_mlp.register_forward_hook(lambda module, args, out: 2 * out)
    expected, feed_forwards = run(model), 2 * len(model.transformer_blocks)
    report = uniref_fast.patch(model)
    assert max_relative_error(run(model), expected) < ROUNDING and not report.fallbacks
    singles = len(model.single_transformer_blocks)
    assert len(seen) == (native.has_gelu() and feed_forwards + (0 if hooked else singles))


@pytest.mark.parametrize("masked", [1, 5])
def test_a_mask_of_padded_text(masked):
    """FIBO pads the shorter of prompt and negative prompt; a batch of two with unlike numbers of valid tokens."""
    model = flux1.transformer("fibo")
    expected = run(model, batch=2, masked=masked)
    assert max_relative_error(expected, run(model, batch=2)) > 100 * ROUNDING
    report = uniref_fast.patch(model)
    for _ in range(2):
        assert max_relative_error(run(model, batch=2, masked=masked), expected) < ROUNDING
    assert max_relative_error(run(model, batch=2, masked=7 - masked), expected) > 100 * ROUNDING, "another mask"
    assert not report.fallbacks
    given = inputs(model, batch=2, masked=masked)
    given["joint_attention_kwargs"]["attention_mask"] = given["joint_attention_kwargs"]["attention_mask"].float()
    with torch.no_grad():
        model(**given)
    assert any("not a boolean tensor" in reason for reason in report.fallbacks)


@pytest.mark.parametrize("patch_first", [True, False])
def test_ip_adapters_run_the_original(patch_first):
    """Attention with an IP-Adapter returns a third stream, which the block adds."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(0)
    adapters = [FluxIPAdapterAttnProcessor(256, 256, num_tokens=(2,)) for _ in range(2)]

    def adapt(model):
        for block, processor in zip(model.transformer_blocks, adapters, strict=True):
            block.attn.set_processor(processor)

    def call(model):
        given = inputs(model)
        tokens = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            return model(**given, joint_attention_kwargs={"ip_hidden_states": [tokens]})[0]

    stock, model = flux1.transformer(), flux1.transformer()
    plain = run(stock)
    adapt(stock)
    if patch_first:
        report = uniref_fast.patch(model)
    adapt(model)
    if not patch_first:
        report = uniref_fast.patch(model)
        assert sum("FluxIPAdapterAttnProcessor, which runs unchanged" in note for note in report.notes) == 2
    expected = call(stock)
    assert max_relative_error(call(model), expected) < ROUNDING < max_relative_error(plain, expected)
    assert {*report.fallbacks} == {"attention did not return two streams"} and report.calls.total() == 6
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn has its own processor FluxIPAdapter"):
        uniref_fast.edit(flux1.pipeline(model), [{"prompt": "x"}])


def ip_adapter(model):
    """Return the weights of an IP-Adapter with 4 image tokens, as `load_ip_adapter` reads them from a file."""
    width, generator = model.inner_dim, torch.Generator().manual_seed(5)
    text, pooled = model.config.joint_attention_dim, model.config.pooled_projection_dim
    shapes = {}
    for index in range(len(model.transformer_blocks)):
        shapes |= {f"{index}.to_{name}_ip.weight": (width, text) for name in "kv"}
        shapes |= {f"{index}.to_{name}_ip.bias": (width,) for name in "kv"}
    image = {"proj.weight": (4 * text, pooled), "proj.bias": (4 * text,), "norm.weight": (text,), "norm.bias": (text,)}
    return {
        part: {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in named.items()}
        for part, named in {"ip_adapter": shapes, "image_proj": image}.items()
    }


@pytest.mark.parametrize("patch_first", [True, False])
def test_an_ip_adapter_is_loaded_and_unloaded(patch_first):
    """The loader of diffusers constructs a processor of the class of the one that each block has."""
    stock, model = flux1.pipeline(flux1.transformer()), flux1.pipeline(flux1.transformer())
    results = []
    for pipe in (stock, model):
        transformer = pipe.transformer
        if pipe is model and patch_first:
            report = uniref_fast.patch(pipe)
            assert not report.replaced and "replaced" not in str(report)
        transformer._load_ip_adapter_weights([ip_adapter(transformer)])
        if pipe is model and not patch_first:
            report = uniref_fast.patch(pipe)
        embeds = [
            torch.randn(1, 1, transformer.config.pooled_projection_dim, generator=torch.Generator().manual_seed(6))
        ]
        with torch.no_grad():
            results.append(
                transformer(**inputs(transformer), joint_attention_kwargs={"ip_adapter_image_embeds": embeds})
            )
        pipe.unload_ip_adapter()
        results.append((run(transformer),))
    for at in range(2):
        assert max_relative_error(results[2 + at][0], results[at][0]) < ROUNDING
    assert max_relative_error(results[1][0], results[0][0]) > ROUNDING
    names = "transformer_blocks", "single_transformer_blocks"
    names = [f"{group}.{index}.attn" for group in names for index in range(len(model.transformer.get_submodule(group)))]
    assert [each.split()[0] for each in report.replaced] == (names if patch_first else names[2:])
    assert "attn has a FluxAttnProcessor set after patch" in str(report)
    assert uniref_fast.unpatch(model) and not report.replaced
    assert torch.equal(run(model.transformer), results[1][0])
    assert not uniref_fast.patch(model).replaced


def test_a_pickled_model_stays_patched():
    model = flux1.transformer()
    uniref_fast.patch(model)
    copy = pickle.loads(pickle.dumps(model))
    processor = copy.transformer_blocks[0].attn.processor
    assert type(processor) is type(model.transformer_blocks[0].attn.processor)
    assert processor.__class__ is type(processor.stock) and processor.attn is copy.transformer_blocks[0].attn
    assert torch.equal(run(copy), run(model))


def test_changed_code_runs():
    """Adaptive norms with hooks, or with a LayerNorm of another kind, run the original."""
    model = flux1.transformer()
    report = uniref_fast.patch(model)
    run(model)
    seen = []
    model.transformer_blocks[0].norm1.register_forward_hook(lambda *args: seen.append(1))
    model.single_transformer_blocks[0].norm.norm = torch.nn.LayerNorm(256, eps=1e-3)
    run(model)
    assert seen == [1]
    assert {*report.fallbacks} == {
        "an adaptive norm has hooks or its own forward",
        "a block's norm is LayerNorm((256,), eps=0.001, elementwise_affine=True, bias=True)",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kontext", "fibo"])
def test_compiled_blocks_trace_the_fused_places(kind):
    """Each kind of block and input has at most two graphs, whatever the steps; a mask needs the original attention."""
    masked = [{"masked": 2}] if kind == "fibo" else []
    calls = [{"step": 0}, {"step": 1}, {"batch": 2}, *masked]
    report = assert_compiled_blocks(flux1.transformer(kind), run, calls, graphs=8)
    assert report.traces and ["mask" in reason for reason in report.traced_originals] == [True] * len(masked)
