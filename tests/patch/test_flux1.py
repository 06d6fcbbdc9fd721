"""patch of FLUX.1, LongCat-Image and FIBO against diffusers: models and features of diffusers."""

import pickle

import flux1
import pytest
import torch
from patching import ROUNDING

import uniref_fast
from uniref_fast import native, ops
from uniref_fast.testing import assert_within_budget, max_relative_error

KINDS = list(flux1.CLASSES)
GRIDS, TEXT = [(1, 4, 6), (1, 2, 3)], 7


def inputs(model, batch=1, step=0, masked=0):
    """Return the arguments of a forward with 24 target and 6 reference tokens; `step` changes target and time."""
    image, prompt, t, scale = flux1.inputs(model, GRIDS, TEXT)
    image = image.clone()
    image[:24] += step
    mask = None
    if masked:  # padded text tokens of the first sample
        mask = torch.ones(batch, 1, 1, TEXT + 30, dtype=torch.bool)
        mask[0, :, :, TEXT - masked : TEXT] = False
    return flux1.arguments(model, GRIDS, image, prompt, t - step / 10, scale, batch=batch, mask=mask)


def run(model, **options):
    with torch.no_grad():
        return model(**inputs(model, **options))[0]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(kind, batch):
    model = flux1.transformer(kind)
    expected = [run(model, batch=batch, step=step) for step in range(2)]
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    report = uniref_fast.patch(model)
    for step in range(2):
        assert max_relative_error(run(model, batch=batch, step=step), expected[step]) < ROUNDING
    assert report.calls.total() == 2 * 2 * 5 and not report.fallbacks and len(report.sites) == 10
    assert all(0 < site.max_rel_error < ROUNDING for site in report.sites)
    assert uniref_fast.unpatch(model)
    assert [module.processor for module in model.modules() if hasattr(module, "processor")] == processors
    assert torch.equal(run(model, batch=batch), expected[0])


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


@pytest.mark.parametrize("masked", [0, 5])
def test_inference_mode(masked):
    """Tensors of inference mode have no version."""
    model = flux1.transformer("fibo")
    expected = run(model, batch=2, masked=masked)
    report = uniref_fast.patch(model)
    with torch.inference_mode():
        for _ in range(2):
            assert max_relative_error(run(model, batch=2, masked=masked), expected) < ROUNDING
    assert report.calls.total() == 2 * 2 * 5 and not report.fallbacks


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_within_the_budget(kind):
    model, wide = flux1.transformer(kind, torch.bfloat16), flux1.transformer(kind).to(torch.bfloat16).double()

    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    given = {name: [*map(double, x)] if isinstance(x, list) else double(x) for name, x in inputs(model).items()}
    for name in {"timestep", "guidance"} & set(given):
        given[name] = given[name].bfloat16().double()
    with torch.no_grad():
        oracle = wide(**given)[0]
    eager = run(model)
    report = uniref_fast.patch(model)
    assert_within_budget(run(model), eager, oracle)
    assert not report.fallbacks


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_checkpointing(kind):
    model = flux1.transformer(kind).train()
    found = []
    for patched in (False, True):
        if patched:
            report = uniref_fast.patch(model)
        for checkpointing in (False, True):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            model.zero_grad()
            model(**inputs(model, batch=2))[0].square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert not report.fallbacks
    largest = max(g.abs().max().item() for g in found[0].values())
    for other in found[1:]:
        for name, grad in found[0].items():
            scale = max(grad.abs().max().item(), 1e-3 * largest)
            assert (other[name] - grad).abs().max().item() < 1e-4 * scale, name


def fuse(model):
    model.fuse_qkv_projections()


def lora(model):
    from peft import LoraConfig

    torch.manual_seed(3)
    names = ["to_q", "add_v_proj", "proj_mlp", "proj_out", "norm1.linear", "norm.linear", "net.0.proj"]
    model.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False))


def offload(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def first_block_cache(model):
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))


FEATURES = [fuse, lora, offload, offload_blocks, casting, first_block_cache]
CASES = [("kontext", feature) for feature in FEATURES] + [("longcat", fuse), ("fibo", lora), ("fibo", offload_blocks)]


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("kind, feature", CASES)
def test_features_of_diffusers(kind, feature, patch_first):
    stock, model = flux1.transformer(kind), flux1.transformer(kind)
    feature(stock)
    if patch_first:
        report = uniref_fast.patch(model)
    feature(model)
    if not patch_first:
        report = uniref_fast.patch(model)
    for step in range(2):
        results = []
        for each in (model, stock):
            with each.cache_context("cond") if hasattr(each, "cache_context") else torch.no_grad():
                results.append(run(each, step=step))
        assert max_relative_error(*results) < ROUNDING
    assert report.calls.total() > 0
    if feature is offload:  # the weights of the QK norms come with a call only
        assert report.fallbacks and all("hooks of diffusers" in reason for reason in report.fallbacks)
    else:
        assert not report.fallbacks


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
def test_compiled_blocks_trace_the_code_of_diffusers(kind):
    """Each kind of block is compiled once, whatever the number of steps."""
    from torch._dynamo.testing import CompileCounter

    model = flux1.transformer(kind)
    expected = run(model)
    report = uniref_fast.patch(model)
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    frames = []
    for step in range(4):
        out = run(model, step=step)
        frames.append(counter.frame_count)
        if step == 0:
            assert max_relative_error(out, expected) < ROUNDING
    assert frames[0] > 0 and frames == frames[:1] * 4
    assert all("torch.compile" in reason for reason in report.fallbacks)


def test_refusals():
    model = flux1.transformer()
    with pytest.raises(ValueError, match="visibility='full' only"):
        uniref_fast.patch(model, visibility="reference_causal")
    with pytest.raises(ValueError, match="keep_references"):
        uniref_fast.patch(model, keep_references="auto")
    with pytest.raises(ValueError, match="8 bits"):
        uniref_fast.patch(model, mode="fast")
