"""patch of FLUX.3 against diffusers: models, modular pipelines and features of diffusers."""

import flux3
import pytest
import torch
from patching import ROUNDING

import uniref_fast
from uniref_fast import EditRequest
from uniref_fast.patch.stock import deviations
from uniref_fast.testing import assert_within_budget, max_relative_error

TARGET, REFERENCES, TEXT = 24, 6, 7


def inputs(model, batch=1, step=0, references=REFERENCES):
    """Return the arguments of a forward; `step` changes target and time."""
    generator = torch.Generator().manual_seed(0)
    config, dtype = model.config, model.proj_out.weight.dtype
    image = torch.randn(batch, TARGET, config.in_channels, generator=generator)
    clean = torch.randn(batch, references, config.in_channels, generator=generator)
    text = torch.randn(batch, TEXT, config.joint_attention_dim, generator=generator)
    img_ids, clean_ids, txt_ids = (torch.zeros(n, 4) for n in (TARGET, references, TEXT))
    img_ids[:, 1], img_ids[:, 2] = torch.arange(TARGET) // 6 / 2, torch.arange(TARGET) % 6 / 2
    clean_ids[:, 2], clean_ids[:, 3], txt_ids[:, 3] = torch.arange(references) / 2, -1, torch.arange(TEXT)
    given = {
        "hidden_states": (image + step).to(dtype), "encoder_hidden_states": text.to(dtype),
        "timestep": torch.linspace(0.9, 0.3, batch) - step / 10, "img_ids": img_ids, "txt_ids": txt_ids,
        "return_dict": False,
    }  # fmt: skip
    if references:
        given |= {"image_cond_hidden_states": clean.to(dtype), "image_cond_ids": clean_ids}
    if config.flow_map:
        given["target_timestep"] = given["timestep"] - 0.2
    return given


def run(model, **options):
    with torch.no_grad():
        return model(**inputs(model, **options))[0]


@pytest.mark.parametrize("batch, references, flow_map", [(1, 0, False), (1, 6, False), (2, 6, False), (2, 6, True)])
def test_equals_diffusers(make_flux3, batch, references, flow_map):
    model = make_flux3(flow_map=flow_map)
    expected = [run(model, batch=batch, references=references, step=step) for step in range(2)]
    processors = dict(model.attn_processors)
    report = uniref_fast.patch(model)
    for step in range(2):
        out = run(model, batch=batch, references=references, step=step)
        assert max_relative_error(out, expected[step]) < 1e-5
    blocks = 3 + 2 * (3 if references else 2)
    assert report.calls.total() == 2 * 2 * blocks and not report.fallbacks and len(report.sites) == 18
    assert all(site.max_rel_error < ROUNDING for site in report.sites if site.calls)
    assert uniref_fast.unpatch(model) and model.attn_processors == processors
    assert torch.equal(run(model, batch=batch, references=references), expected[0])


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16])
def test_bfloat16_within_the_budget(make_flux3, norms):
    """QK norm and rotary embedding round once, also with weights of the norms in float32, as diffusers loads them."""
    model, wide = make_flux3(torch.bfloat16), make_flux3(torch.bfloat16).double()
    for name, parameter in model.named_parameters():
        if ".norm_q" in name or ".norm_k" in name:
            parameter.data = parameter.data.to(norms)
    given = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs(model).items()}
    given["timestep"] = given["timestep"].bfloat16().double()
    with torch.no_grad():
        oracle = wide(**given)[0]
    eager = run(model)
    report = uniref_fast.patch(model)
    assert_within_budget(run(model), eager, oracle)
    assert not report.fallbacks and report.calls.total()


def test_queries_and_keys_round_once(make_flux3, monkeypatch):
    """They equal those of diffusers except for the order of sums; rounding twice would change half of the values."""
    from diffusers.models.embeddings import apply_rotary_emb

    from uniref_fast.patch import joint_streams

    made, own = [], joint_streams.joint_qkv

    def recorded(attn, projections, text, context):
        made.append((attn, projections, context.rotary, own(attn, projections, text, context)))
        return made[-1][-1]

    monkeypatch.setattr(joint_streams, "joint_qkv", recorded)
    model = make_flux3(torch.bfloat16)
    uniref_fast.patch(model)
    run(model)
    attn, projections, rotary, results = made[0]
    tables = [table.repeat_interleave(2, dim=1) for table in rotary]
    for norm, x, result in zip((attn.norm_q, attn.norm_k), projections, results, strict=False):
        with torch.no_grad():
            expected = apply_rotary_emb(norm(x.float())[None], tables, sequence_dim=1)[0].to(torch.bfloat16)
        assert (result != expected).float().mean() < 0.02


def test_gradients_and_checkpointing(make_flux3):
    model = make_flux3().train()
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
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_out.0", "linear_in"], init_lora_weights=False))


def offload(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("feature", [fuse, lora, offload, offload_blocks, casting])
def test_features_of_diffusers(make_flux3, feature, patch_first):
    stock, model = make_flux3(), make_flux3()
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
        assert report.fallbacks and all("hooks of diffusers" in reason for reason in report.fallbacks)
    else:
        assert not report.fallbacks


def test_first_block_cache_is_not_in_diffusers(make_flux3):
    """The transformer has no caches; the patch does not change the error."""
    from diffusers import FirstBlockCacheConfig

    errors = []
    for patched in (False, True):
        model = make_flux3()
        if patched:
            uniref_fast.patch(model)
        with pytest.raises(AttributeError) as error:
            model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.slow
def test_compiled_blocks_trace_the_code_of_diffusers(make_flux3):
    """Each kind of block is compiled once for each kind of input, whatever the number of steps."""
    from torch._dynamo.testing import CompileCounter

    model = make_flux3()
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
    assert report.traced_originals and not report.traces
    assert all("torch.compile traces" in reason for reason in report.traced_originals)


def test_a_lora_file_loads_through_the_pipeline(make_flux3):
    from peft.utils import get_peft_model_state_dict

    source = make_flux3()
    lora(source)
    weights = {f"transformer.{name}": x for name, x in get_peft_model_state_dict(source).items()}
    pipe = flux3.pipeline(make_flux3())
    request = EditRequest("x", [flux3.picture(64, 80)], num_inference_steps=2, seed=1, true_cfg_scale=1.0)
    before = flux3.stock(pipe, request)[0]
    report = uniref_fast.patch(pipe)
    pipe.load_lora_weights(weights)
    patched = flux3.stock(pipe, request)[0]
    (packed,) = uniref_fast.edit(pipe, [request], output_type="pt", progress=False)
    uniref_fast.unpatch(pipe)
    expected = flux3.stock(pipe, request)[0]
    assert max_relative_error(expected, before) > 100 * ROUNDING and not report.fallbacks
    for result in (patched, packed):
        assert max_relative_error(result, expected) < 3 * ROUNDING


def test_replaced_code_runs_and_is_reported(make_flux3, monkeypatch):
    from diffusers.models.transformers import transformer_flux3

    model = make_flux3()
    own = transformer_flux3.apply_rotary_emb
    report = uniref_fast.patch(model)
    monkeypatch.setattr(transformer_flux3, "apply_rotary_emb", lambda *args, **options: own(*args, **options) * 2)
    out = run(model)
    uniref_fast.unpatch(model)
    assert max_relative_error(out, run(model)) < ROUNDING
    assert any("apply_rotary_emb was replaced" in reason for reason in report.fallbacks)


def test_refusals(make_flux3):
    model = make_flux3()
    for options, message in (
        ({"visibility": "reference_causal"}, "visibility='full' only"),
        ({"keep_references": "auto"}, "keep_references"),
        ({"mode": "fast"}, "8 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            uniref_fast.patch(model, **options)
    model.pos_embed.theta = 2000
    model.mode_blocks["image"][1].attn.processor._attention_backend = "flash"
    found = [*deviations(model, torch.device("cpu"))]
    assert len(found) == 2 and "other frequencies" in found[0]
    assert found[1].startswith("mode_blocks.image.1.attn is set")
    with pytest.raises(ValueError, match="other frequencies"):
        uniref_fast.edit(flux3.pipeline(model), [{"prompt": "x"}])
