"""patch of FLUX.3 against diffusers: models, modular pipelines and features of diffusers."""

import functools

import flux3
import forwards
import pytest
import torch
from patching import ROUNDING, assert_compiled_blocks

import uniref_fast
from uniref_fast import EditRequest
from uniref_fast.patch.stock import deviations
from uniref_fast.testing import assert_within_budget, max_relative_error

run = functools.partial(forwards.run, kind="flux3", variant="one")


def test_norms_in_float32_of_a_model_in_bfloat16(make_flux3):
    """QK norm and rotary embedding round once, also with the weights of the norms as diffusers loads them."""
    model = make_flux3(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".norm_q" in name or ".norm_k" in name:
            parameter.data = parameter.data.float()
    oracle, eager = forwards.wide(model, "flux3", "one"), run(model)
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


@pytest.mark.slow
def test_compiled_blocks_trace_the_fused_places(make_flux3):
    """Two kinds of block with at most three graphs each, whatever the steps, the batch and the references."""
    calls = [("one", 0), ("one", 1), ("two", 0), ("one without references", 0)]
    calls = [{"variant": variant, "step": step} for variant, step in calls]
    report = assert_compiled_blocks(make_flux3(), run, calls, graphs=6)
    assert report.traces and not report.traced_originals


def test_a_lora_file_loads_through_the_pipeline(make_flux3):
    from peft.utils import get_peft_model_state_dict

    source = make_flux3()
    forwards.lora(source, "flux3")
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


def test_modulation_is_computed_once_for_each_sample(make_flux3):
    model, seen = make_flux3(), {}
    linears = {name: module for name, module in model.named_modules() if name.endswith("modulations.image.linear")}
    report = uniref_fast.patch(model)
    run(model, variant="two")  # with the self-checks
    own = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        seen.update({name: x.shape[:2].numel() for name, each in linears.items() if each.weight is weight})
        return own(x, weight, bias)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(torch.nn.functional, "linear", linear)
        run(model, variant="two")
    assert seen == dict.fromkeys(linears, 2) and len(seen) == 2 and not report.fallbacks


def hooked(model):
    model.single_stream_modulations["image"].linear.register_forward_hook(lambda module, args, out: out * 2)


def hooked_whole(model):
    model.early_stream_modulations["txt"].register_forward_hook(lambda module, args, out: out * 2)


def replaced(model):
    linear = model.norm_out.linear
    linear.forward = lambda x: torch.nn.functional.linear(x, linear.weight) * 2


def adapted(model):
    from peft import LoraConfig

    torch.manual_seed(3)
    target = "single_stream_modulations.image.linear"
    model.add_adapter(LoraConfig(r=4, target_modules=[target], init_lora_weights=False))


@pytest.mark.parametrize(
    "change, reason",
    [(hooked, "hooks"), (hooked_whole, "hooks"), (replaced, "own forward"), (adapted, "peft")],
)
def test_changed_modulation_runs_the_original(make_flux3, change, reason):
    model = make_flux3()
    report = uniref_fast.patch(model)
    run(model)
    change(model)
    out = run(model, variant="two")
    assert uniref_fast.unpatch(model)
    assert max_relative_error(out, run(model, variant="two")) < ROUNDING
    assert len(report.fallbacks) == 1 and all(reason in each for each in report.fallbacks)


def test_times_of_single_tokens_run_the_original(make_flux3):
    model = make_flux3()
    report = uniref_fast.patch(model)
    head, norm = model.early_stream_modulations["image"], model.norm_out
    temb = torch.randn(2, 5, model.inner_dim)
    x = torch.randn(2, 5, model.inner_dim)
    with torch.no_grad():
        equal = temb[:, :1].repeat(1, 5, 1)
        for each in (equal, temb):
            assert max_relative_error(head(each), head.linear(each)) < ROUNDING
            expected = type(norm).forward(norm, x, each)
            assert max_relative_error(norm(x, each), expected) < ROUNDING
        with pytest.raises(RuntimeError, match="must match the size"):
            norm(x, equal[:, :3])  # also after the self-check, which would raise this error itself
    reasons = {"tokens of a sample have different times": 2, "embeddings of the time of 3 tokens for 5 tokens": 1}
    assert report.fallbacks == reasons and report.calls.total() == 2


def test_other_frequencies_and_backends_are_refused_by_edit(make_flux3):
    model = make_flux3()
    model.pos_embed.theta = 2000
    model.mode_blocks["image"][1].attn.processor._attention_backend = "flash"
    found = [*deviations(model, torch.device("cpu"))]
    assert len(found) == 2 and "other frequencies" in found[0]
    assert found[1].startswith("mode_blocks.image.1.attn is set")
    with pytest.raises(ValueError, match="other frequencies"):
        uniref_fast.edit(flux3.pipeline(model), [{"prompt": "x"}])
