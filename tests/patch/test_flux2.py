"""patch of FLUX.2 against diffusers: models, pipelines and features of diffusers."""

import flux2
import pytest
import torch
from patching import ROUNDING

import uniref_fast
from uniref_fast.patch.stock import deviations
from uniref_fast.testing import assert_within_budget, max_relative_error

KINDS = ["klein", "klein-kv", "dev"]
IMAGE, TEXT = 30, 7


def inputs(model, batch=1, seed=0, step=0):
    """Return the arguments of a forward with 24 target and 6 reference tokens; `step` changes target and time."""
    generator = torch.Generator().manual_seed(seed)
    config, dtype = model.config, model.dtype
    image = torch.randn(batch, IMAGE, config.in_channels, generator=generator)
    text = torch.randn(batch, TEXT, config.joint_attention_dim, generator=generator)
    image[:, :24] += step
    ids = torch.zeros(IMAGE, 4, dtype=torch.int64)
    ids[:24, 1], ids[:24, 2] = torch.arange(24) // 6, torch.arange(24) % 6
    ids[24:, 0], ids[24:, 2] = 10, torch.arange(6)
    txt_ids = torch.zeros(TEXT, 4, dtype=torch.int64)
    txt_ids[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": image.to(dtype),
        "encoder_hidden_states": text.to(dtype),
        "timestep": torch.linspace(0.9, 0.3, batch) - step / 10,
        "guidance": torch.full((batch,), 3.0) if config.guidance_embeds else None,
        "img_ids": ids,
        "txt_ids": txt_ids,
        "return_dict": False,
    }


def run(model, **options):
    with torch.no_grad():
        return model(**inputs(model, **options))[0]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(make_flux2, kind, batch):
    model = make_flux2(kind)
    expected = [run(model, batch=batch, step=step) for step in range(2)]
    processors = {name: p for name, p in model.attn_processors.items()}
    report = uniref_fast.patch(model)
    for step in range(2):
        assert max_relative_error(run(model, batch=batch, step=step), expected[step]) < ROUNDING
    assert report.calls.total() == 2 * 2 * 5 and not report.fallbacks and len(report.sites) == 10
    assert all(site.max_rel_error < ROUNDING for site in report.sites)
    assert uniref_fast.unpatch(model) and model.attn_processors == processors
    assert torch.equal(run(model, batch=batch), expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_within_the_budget(make_flux2, kind):
    model, wide = make_flux2(kind, dtype=torch.bfloat16), make_flux2(kind).to(torch.bfloat16).double()
    given = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
             for name, x in inputs(model).items()}  # fmt: skip
    given |= {name: given[name].bfloat16().double() for name in ("timestep", "guidance") if given[name] is not None}
    with torch.no_grad():
        oracle = wide(**given)[0]
    eager = run(model)
    report = uniref_fast.patch(model)
    assert_within_budget(run(model), eager, oracle)
    assert not report.fallbacks


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines(make_flux2, kind):
    """The cache of klein-KV is filled in the first step and read in the others, as without the patch."""
    pipe = flux2.pipeline(make_flux2(kind), kind)
    options = {"prompt_embeds": torch.randn(2, 9, 96), "image": [flux2.picture(64, 80, i) for i in range(2)]}
    if kind == "klein":
        options |= {"guidance_scale": 3.0, "negative_prompt_embeds": torch.randn(2, 9, 96)}

    def call():
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=3, generator=generator, output_type="pt", **options).images

    expected = call()
    report = uniref_fast.patch(pipe)
    for _ in range(2):  # the first call compares every place with the original
        assert max_relative_error(call(), expected) < ROUNDING
    assert not report.fallbacks and report.calls.total() == 2 * 3 * 10 * (2 if kind == "klein" else 1)


def test_gradients_and_checkpointing(make_flux2):
    model = make_flux2("dev").train()
    found = []
    for patched in (False, True):
        if patched:
            report = uniref_fast.patch(model)
        for checkpointing in (False, True):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            model.zero_grad()
            model(**inputs(model, batch=2))[0].square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
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
    names = ["to_q", "add_v_proj", "to_qkv_mlp_proj", "linear_in"]
    model.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False))


def offload(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("feature", [fuse, lora, offload, offload_blocks, casting])
def test_features_of_diffusers(make_flux2, feature, patch_first):
    stock, model = make_flux2("klein"), make_flux2("klein")
    feature(stock)
    if patch_first:
        report = uniref_fast.patch(model)
    feature(model)
    if not patch_first:
        report = uniref_fast.patch(model)
    for step in range(2):
        assert max_relative_error(run(model, step=step), run(stock, step=step)) < ROUNDING
    assert report.calls.total() > 0
    if feature is offload:  # the weights of the QK norms come with a call only
        assert all("hooks of diffusers" in reason for reason in report.fallbacks)
    else:
        assert not report.fallbacks


def test_first_block_cache_works_as_much_as_in_diffusers(make_flux2):
    """The hooks read arguments that these blocks do not have, which is an error with and without the patch."""
    from diffusers import FirstBlockCacheConfig

    errors = []
    for patched in (False, True):
        model = make_flux2("klein")
        if patched:
            uniref_fast.patch(model)
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with model.cache_context("cond"):
            try:
                errors.append(run(model))
            except Exception as error:
                errors.append(error)
    if isinstance(errors[0], torch.Tensor):
        assert max_relative_error(errors[1], errors[0]) < ROUNDING
    else:
        assert type(errors[1]) is type(errors[0]) and str(errors[1]) == str(errors[0])


@pytest.mark.slow
def test_compiled_blocks_trace_the_code_of_diffusers(make_flux2):
    """Each kind of block is compiled once, whatever the number of steps."""
    from torch._dynamo.testing import CompileCounter

    model = make_flux2("klein")
    expected = run(model)
    report = uniref_fast.patch(model)
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    frames = []
    for step in range(12):
        out = run(model, step=step)
        frames.append(counter.frame_count)
        if step == 0:
            assert max_relative_error(out, expected) < ROUNDING
    assert frames[0] > 0 and frames == frames[:1] * 12
    assert all("torch.compile" in reason for reason in report.fallbacks)


def test_edit_on_a_patched_pipeline(make_flux2):
    """The packed forward is of the same kind, also for klein-KV, whose processors the patch has replaced."""
    pipe = flux2.pipeline(make_flux2("klein-kv"), "klein-kv")
    request = {"prompt": "x", "images": [flux2.picture(64, 80)], "num_inference_steps": 2, "seed": 1}
    expected = uniref_fast.edit(pipe, [request], output_type="latent", progress=False)
    uniref_fast.patch(pipe)
    assert torch.equal(uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0], expected[0])


def test_lora_files_load_through_the_pipeline(make_flux2):
    from peft.utils import get_peft_model_state_dict

    source = make_flux2("klein")
    lora(source)
    weights = {f"transformer.{name}": x for name, x in get_peft_model_state_dict(source).items()}
    pipe = flux2.pipeline(make_flux2("klein"))
    request = {"prompt": "x", "images": [flux2.picture(64, 80)], "num_inference_steps": 2, "seed": 1}
    request |= {"true_cfg_scale": 1.0}

    def stock():
        generator = torch.Generator().manual_seed(1)
        return pipe(request["images"], "x", num_inference_steps=2, guidance_scale=1.0, generator=generator,
                    output_type="pt").images[0]  # fmt: skip

    before = stock()
    report = uniref_fast.patch(pipe)
    pipe.load_lora_weights(weights)
    patched = stock()
    (packed,) = uniref_fast.edit(pipe, [request], output_type="pt", progress=False)
    uniref_fast.unpatch(pipe)
    expected = stock()
    assert max_relative_error(expected, before) > 100 * ROUNDING and not report.fallbacks
    for result in (patched, packed):
        assert max_relative_error(result, expected) < 3 * ROUNDING


def test_refusals(make_flux2):
    model = make_flux2("klein")
    with pytest.raises(ValueError, match="visibility='full' only"):
        uniref_fast.patch(model, visibility="reference_causal")
    with pytest.raises(ValueError, match="keep_references"):
        uniref_fast.patch(model, keep_references="auto")
    with pytest.raises(ValueError, match="e4m3 matrix products"):
        uniref_fast.patch(model, mode="fast")
    pipe = flux2.pipeline(model)
    stock = model.attn_processors
    for block in model.transformer_blocks:
        block.attn.processor = lambda *args, **options: None  # without the settings of diffusers' own
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn has its own processor function"):
        uniref_fast.edit(pipe, [{"prompt": "x"}])
    assert len([*deviations(model, torch.device("cpu"))]) == 2
    model.set_attn_processor(stock)
    model.single_transformer_blocks[1].attn.processor._attention_backend = "flash"
    with pytest.raises(ValueError, match=r"single_transformer_blocks\.1\.attn is set to attention backend 'flash'"):
        uniref_fast.edit(pipe, [{"prompt": "x"}])
