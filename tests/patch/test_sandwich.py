"""patch of Z-Image and Fibo 2 against diffusers: models and features of diffusers."""

import fibo2
import pytest
import torch
import z_image
from forwards import arguments, run
from patching import ROUNDING, assert_compiled_blocks
from torch import nn

import uniref_fast
from uniref_fast import ops
from uniref_fast.patch import sandwich
from uniref_fast.patch.stock import deviations
from uniref_fast.testing import max_relative_error

MODELS = {"z-image": z_image.transformer, "fibo-2": fibo2.transformer}


def test_masks_of_one_shape_do_not_share_a_plan():
    model = fibo2.transformer()
    _, named = arguments(model, "fibo-2", "unlike")
    other = {**named, "encoder_attention_mask": named["encoder_attention_mask"].flip(0)}
    with torch.no_grad():
        expected = [model(**each)[0] for each in (named, other)]
        uniref_fast.patch(model)
        for each, out in zip((named, other), expected, strict=True):
            assert max_relative_error(model(**each)[0], out) < ROUNDING
        attention, x = model.layers[0].attention, torch.randn(2, 6, 256)
        freqs = torch.polar(torch.ones(1, 6, 64), torch.randn(1, 6, 64))
        masks = [torch.ones(2, 6, dtype=torch.bool), torch.arange(6).expand(2, 6) < 3]
        outs = [attention(x, attention_mask=mask, freqs_cis=freqs) for mask in masks]  # with one table
        changed = masks[1].clone()
        masks.append(changed)
        attention(x, attention_mask=changed, freqs_cis=freqs)
        changed.copy_(torch.arange(6) > 1)  # in place
        outs.append(attention(x, attention_mask=changed, freqs_cis=freqs))
        uniref_fast.unpatch(model)
        for mask, out in zip(masks, outs, strict=True):
            assert max_relative_error(out, attention(x, attention_mask=mask, freqs_cis=freqs)) < ROUNDING


def test_a_noise_mask_that_was_changed_in_place():
    model, stock = fibo2.transformer(), fibo2.transformer().layers[0]
    uniref_fast.patch(model)
    x, noisy, clean = torch.randn(1, 6, 256), torch.randn(1, 256), torch.randn(1, 256)
    freqs, noise_mask = torch.polar(torch.ones(1, 6, 64), torch.randn(1, 6, 64)), torch.ones(1, 6)
    for _ in range(2):
        with torch.no_grad():
            outs = [block(x, None, freqs, None, noise_mask, noisy, clean) for block in (model.layers[0], stock)]
        assert max_relative_error(*outs) < ROUNDING
        noise_mask[0, 3:] = 0


@pytest.mark.parametrize("name", MODELS)
def test_small_weights_of_norms_keep_their_digits(name):
    """The fused operators add 1 to a scale, which would round factors around 0.01 to 2 ** -9 in bfloat16."""
    model = MODELS[name](dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        if "_norm1.weight" in key or "ffn_norm" in key:
            parameter.data.mul_(0.01)
    report = uniref_fast.patch(model)
    run(model, name, "alike")
    assert report.max_rel_error < 0.02 and not report.fallbacks


@pytest.mark.parametrize("strict", [True, False])
def test_the_self_check_compares_with_the_original(monkeypatch, strict):
    """A wrong row of the modulation table: an error, or the original for that place."""
    model = z_image.transformer()
    expected = run(model, "z-image", "alike")
    monkeypatch.setattr(
        sandwich.SandwichBlock, "_rows_of",
        lambda self, mask, batch, length, device: torch.zeros(batch * length, dtype=torch.int32),
    )  # fmt: skip
    report = uniref_fast.patch(model, strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match=r"noise_refiner\.0 differs from the original"):
            run(model, "z-image", "alike")
    else:
        assert max_relative_error(run(model, "z-image", "alike"), expected) < ROUNDING
        assert sum("differs from the original" in reason for reason in report.fallbacks) > 0


@pytest.mark.parametrize("what", ["backend", "function", "norm", "select", "library"])
@pytest.mark.parametrize("name", MODELS)
def test_calls_that_need_the_original(name, what, monkeypatch):
    model = MODELS[name]()
    report, block = uniref_fast.patch(model, impl="dense" if what == "library" else None), model.layers[0]
    module = (sandwich._Z_IMAGE if name == "z-image" else sandwich._FIBO_2).stock
    if what == "backend":
        for each in [*model.layers]:
            each.attention.processor._attention_backend = "native"
        reason = "attention backend 'native' was chosen"
    elif what == "library":
        monkeypatch.setattr(ops, "attention_unavailable", lambda impl, q: f"{impl} cannot do this")
        reason = "dense cannot do this"
    elif what == "norm":
        block.ffn_norm1 = nn.LayerNorm(256)
        reason = "a norm of a block is a LayerNorm"
    else:
        function = "dispatch_attention_fn" if what == "function" else "select_per_token"
        replaced = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, **more: replaced(*args, **more))
        reason = f"{function} was replaced"
    out = run(model, name, "alike")
    assert any(reason in each for each in report.fallbacks), report.fallbacks
    uniref_fast.unpatch(model)
    for each in model.layers:
        each.attention.processor._attention_backend = None
    assert max_relative_error(out, run(model, name, "alike")) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_trace_the_fused_places(name):
    """Compile as many graphs as without the patch, whatever the steps; a mask of keys needs the original attention."""
    calls = [{"variant": variant, "step": step} for variant, step in [("alike", 0), ("alike", 1), ("unlike", 0)]]
    masked, graphs = (2, 6) if name == "z-image" else (0, 4)
    report = assert_compiled_blocks(MODELS[name](), lambda model, **given: run(model, name, **given), calls, graphs)
    assert report.traces and ["mask" in reason for reason in report.traced_originals] == [True] * (masked > 0)
    assert report.traced_originals.total() == masked


@pytest.mark.slow
def test_changes_that_are_checked_when_the_compiler_traces():
    model = z_image.transformer()
    block, other = model.layers
    block.ffn_norm2.register_forward_hook(lambda module, args, out: out * 2)
    x, temb, freqs = (
        torch.randn(2, 6, 256),
        torch.randn(2, 256),
        torch.polar(torch.ones(1, 6, 64), torch.randn(1, 6, 64)),
    )
    expected = [each(x, None, freqs, temb) for each in (block, other)]
    report = uniref_fast.patch(model)
    block.attention.processor._attention_backend = "_native_math"  # as set_attention_backend does
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for each, theirs in zip((block, other), expected, strict=True):
        assert max_relative_error(each(x, None, freqs, temb), theirs) < ROUNDING
    torch.compiler.reset()
    assert {*report.traced_originals} == {
        "a norm of a block has hooks", "attention backend '_native_math' was chosen with set_attention_backend",
    }  # fmt: skip
    assert report.traces == 2, "the other block has the fused operators"


def test_refused_options_and_changes():
    for name, make in MODELS.items():
        model = make()
        with pytest.raises(ValueError, match="visibility='full' only"):
            uniref_fast.patch(model, visibility="reference_causal")
        with pytest.raises(ValueError, match="do not say which tokens are those of a reference"):
            uniref_fast.patch(model, keep_references="auto")
        assert not [*deviations(model, torch.device("cpu"))], name
        model.layers[1].attention.processor = type("Own", (), {"__call__": lambda *args: None})()
        model.rope_embedder.theta = 10000.0
        found = [*deviations(model, torch.device("cpu"))]
        assert len(found) == 2 and "other frequencies" in found[0] and "its own processor Own" in found[1]
        assert any("its own Own, which runs unchanged" in note for note in uniref_fast.patch(model).notes)
