"""patch of Z-Image and Fibo 2 against diffusers: models and features of diffusers."""

import fibo2
import pytest
import torch
import z_image
from patching import ROUNDING
from torch import nn

import uniref_fast
from uniref_fast import ops
from uniref_fast.patch import sandwich
from uniref_fast.patch.stock import deviations
from uniref_fast.testing import assert_within_budget, max_relative_error

MODELS = {"z-image": z_image.transformer, "fibo-2": fibo2.transformer}


def inputs(name, dtype=torch.float32, step=0, unlike=False, wide=None):
    """Return the arguments of a forward for two samples.

    Args:
        name: Name of the family.
        dtype: Dtype in which the tensors are drawn.
        step: Number of the step; it changes targets and times.
        unlike: Give the samples texts of unlike lengths, and so a mask of keys.
        wide: Dtype to which the tensors are cast, or None.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        x = (torch.randn(*shape, generator=generator) + step / 3).to(dtype)
        return x if wide is None else x.to(wide)

    t = torch.tensor([0.9, 0.4]).to(dtype) - step / 8
    t = t if wide is None else t.to(wide)
    if name == "fibo-2":
        mask = torch.ones(2, 90, dtype=torch.bool)
        mask[1, 20:] = False
        return (), {
            "hidden_states": normal(2, 32, 8, 6), "timestep": t, "return_dict": False,
            "encoder_hidden_states": normal(2, 3, 90, fibo2.BUNDLE), "encoder_attention_mask": mask if unlike else None,
            "context_latents": [normal(2, 32, 4, 4), normal(2, 32, 2, 6)],
        }  # fmt: skip
    x, captions, features = [], [], []
    for more in (0, 40 * unlike):
        x.append([normal(16, 1, 4, 6), normal(16, 1, 8, 6)])
        captions.append([normal(n, z_image.CAPTION) for n in (9 + more, 12, 3)])
        features.append([normal(2, 3, z_image.FEATURES), None])
    return (x, t, captions), {"siglip_feats": features, "image_noise_mask": [[0, 1]] * 2, "return_dict": False}


def run(model, name, **options):
    positional, named = inputs(name, **options)
    with torch.no_grad():
        out = model(*positional, **named)[0]
    return torch.stack(list(out)) if isinstance(out, list) else out


def sites(name):
    """Return the number of places: attention and block of each block."""
    return 2 * (5 if name == "z-image" else 4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unlike", [False, True])
def test_equals_diffusers(name, unlike):
    model = MODELS[name]()
    expected = [run(model, name, unlike=unlike, step=step) for step in range(2)]
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    report = uniref_fast.patch(model)
    for step in range(2):
        assert max_relative_error(run(model, name, unlike=unlike, step=step), expected[step]) < ROUNDING
    assert len(report.sites) == sites(name) and report.calls.total() == 2 * sites(name) and not report.fallbacks
    assert all(site.max_rel_error < ROUNDING for site in report.sites)
    assert uniref_fast.unpatch(model)
    assert processors == [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert torch.equal(run(model, name, unlike=unlike), expected[0])


def test_masks_of_one_shape_do_not_share_a_plan():
    model = fibo2.transformer()
    _, named = inputs("fibo-2", unlike=True)
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
def test_bfloat16_within_the_budget(name):
    model, wide = MODELS[name](dtype=torch.bfloat16), MODELS[name]().to(torch.bfloat16).double()
    oracle = run(wide, name, dtype=torch.bfloat16, wide=torch.float64)
    eager = run(model, name, dtype=torch.bfloat16)
    report = uniref_fast.patch(model)
    assert_within_budget(run(model, name, dtype=torch.bfloat16), eager, oracle)
    assert not report.fallbacks


@pytest.mark.parametrize("name", MODELS)
def test_small_weights_of_norms_keep_their_digits(name):
    """The fused operators add 1 to a scale, which would round factors around 0.01 to 2 ** -9 in bfloat16."""
    model = MODELS[name](dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        if "_norm1.weight" in key or "ffn_norm" in key:
            parameter.data.mul_(0.01)
    report = uniref_fast.patch(model)
    run(model, name, dtype=torch.bfloat16)
    assert report.max_rel_error < 0.02 and not report.fallbacks


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_checkpointing(name):
    model, found = MODELS[name]().train(), []
    positional, named = inputs(name)
    for patched in (False, True):
        if patched:
            report = uniref_fast.patch(model)
        for checkpointing in (False, True):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            model.zero_grad()
            out = model(*positional, **named)[0]
            (torch.stack(list(out)) if isinstance(out, list) else out).square().mean().backward()
            found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert not report.fallbacks
    largest = max(g.abs().max().item() for g in found[0].values())
    for other in found[1:]:
        for key, grad in found[0].items():
            scale = max(grad.abs().max().item(), 1e-3 * largest)
            assert (other[key] - grad).abs().max().item() < 1e-4 * scale, key


def lora(model):
    from peft import LoraConfig

    torch.manual_seed(3)
    names = ["to_q", "to_out.0", "w2", "t_embedder.mlp.0"]
    model.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False))


def offload(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("feature", [lora, offload, offload_blocks, casting])
@pytest.mark.parametrize("name", MODELS)
def test_features_of_diffusers(name, feature, patch_first):
    stock, model = MODELS[name](), MODELS[name]()
    feature(stock)
    if patch_first:
        report = uniref_fast.patch(model)
    feature(model)
    if not patch_first:
        report = uniref_fast.patch(model)
    for step in range(2):
        assert max_relative_error(run(model, name, step=step), run(stock, name, step=step)) < ROUNDING
    if feature is offload:  # the weights of the norms come with a call only
        assert report.fallbacks and all("hooks of diffusers" in reason for reason in report.fallbacks)
    else:
        assert report.calls.total() > 0 and not report.fallbacks


@pytest.mark.parametrize("name", MODELS)
def test_first_block_cache_works_as_much_as_in_diffusers(name):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    results = []
    for patched in (False, True):
        model = MODELS[name]()
        if patched:
            uniref_fast.patch(model)
        try:
            apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
            results.append(run(model, name))
        except Exception as error:
            results.append(error)
    if isinstance(results[0], torch.Tensor):
        assert max_relative_error(results[1], results[0]) < ROUNDING
    else:
        assert all(isinstance(error, (KeyError, ValueError)) for error in results)
        if name == "z-image":  # a name of an argument that these blocks do not have; the text differs by the call
            assert all("hidden_states" in str(error) for error in results)


@pytest.mark.parametrize("strict", [True, False])
def test_the_self_check_compares_with_the_original(monkeypatch, strict):
    """A wrong row of the modulation table: an error, or the original for that place."""
    model = z_image.transformer()
    expected = run(model, "z-image")
    monkeypatch.setattr(
        sandwich.SandwichBlock, "_rows_of",
        lambda self, mask, batch, length, device: torch.zeros(batch * length, dtype=torch.int32),
    )  # fmt: skip
    report = uniref_fast.patch(model, strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match=r"noise_refiner\.0 differs from the original"):
            run(model, "z-image")
    else:
        assert max_relative_error(run(model, "z-image"), expected) < ROUNDING
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
    out = run(model, name)
    assert any(reason in each for each in report.fallbacks), report.fallbacks
    uniref_fast.unpatch(model)
    for each in model.layers:
        each.attention.processor._attention_backend = None
    assert max_relative_error(out, run(model, name)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_run_the_original(name):
    torch._dynamo.reset()
    model = MODELS[name]()
    expected = run(model, name)
    report = uniref_fast.patch(model)
    model.compile_repeated_blocks(backend="eager")
    assert max_relative_error(run(model, name), expected) < ROUNDING
    assert any("torch.compile" in reason for site in report.sites for reason in site.traced_originals), report
    torch._dynamo.reset()


def test_refused_options_and_changes():
    for name, make in MODELS.items():
        model = make()
        with pytest.raises(ValueError, match="visibility='full' only"):
            uniref_fast.patch(model, visibility="reference_causal")
        with pytest.raises(ValueError, match="do not say which tokens are those of a reference"):
            uniref_fast.patch(model, keep_references="auto")
        with pytest.raises(ValueError, match="not measured in 8 bits"):
            uniref_fast.patch(model, mode="fast")
        assert not [*deviations(model, torch.device("cpu"))], name
        model.layers[1].attention.processor = type("Own", (), {"__call__": lambda *args: None})()
        model.rope_embedder.theta = 10000.0
        found = [*deviations(model, torch.device("cpu"))]
        assert len(found) == 2 and "other frequencies" in found[0] and "its own processor Own" in found[1]
        assert any("its own Own, which runs unchanged" in note for note in uniref_fast.patch(model).notes)
