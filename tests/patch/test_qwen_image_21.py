"""patch() of Qwen-Image-2.1 against diffusers: steps with and without kept keys, masks, hooks, compile, self-check."""

import functools

import pytest
import torch
from patching import ROUNDING
from qwen_image_21 import case, pipeline, transformer
from torch import nn

import uniref_fast
from uniref_fast import EditRequest
from uniref_fast.patch import qwen_image_21
from uniref_fast.testing import max_relative_error

GRIDS = [(1, 2, 6), (1, 8, 2), (1, 2, 2)]
make = functools.cache(transformer)


@pytest.fixture
def model():
    """A model of all tests, unpatched before and after."""
    yield make()
    uniref_fast.unpatch(make())


def batch(mask=None, dtype=torch.float32):
    """Return the arguments of a forward for two samples of one layout, with text of 9 tokens and two references."""
    cases = [case((5, 3, 1), GRIDS[:2], seed=seed, dtype=dtype) for seed in (1, 2)]
    given = {name: torch.cat([one.stock[name] for one in cases]) if torch.is_tensor(value) else value
             for name, value in cases[0].stock.items()}  # fmt: skip
    given["img_shapes"] = [*cases[0].stock["img_shapes"]] * 2
    if mask is not None:
        slots = given["img_mask"][0, : given["encoder_hidden_states"].shape[1]]
        valid = torch.ones(2, len(slots), dtype=torch.bool)
        valid[:, ~slots] = torch.tensor(mask).bool()
        given["encoder_hidden_states_mask"] = valid
    return given


def run(model, given, **options):
    with torch.no_grad():
        return model(**given, **options)[0]


def two_steps(model, given):
    """Return the outputs of a step that stores keys and values, and of one that reads them, and the cache."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(len(model.transformer_blocks))
    later = {**given, "timestep": given["timestep"] * 0.5, "hidden_states": given["hidden_states"].clone()}
    later["hidden_states"][:, -24:] += 1
    outs = [run(model, given, kv_cache=cache, kv_cache_mode="extract")]
    outs.append(run(model, later, kv_cache=cache, kv_cache_mode="cached"))
    return outs, cache


MASKS = [None, [[1] * 9, [1] * 6 + [0] * 3], [[1, 0, 1, 1, 0, 1, 1, 1, 0]] * 2]


@pytest.mark.parametrize("mask", MASKS)
def test_equals_diffusers(model, mask):
    given = batch(mask)
    expected, (kept, _) = run(model, given), two_steps(model, given)
    report = uniref_fast.patch(model)
    outs, _ = two_steps(model, given)
    for out, other in zip([run(model, given), *outs], [expected, *kept], strict=True):
        assert max_relative_error(out, other) < ROUNDING
    assert report.calls.total() == 3 * 2 * 3 and not report.fallbacks, report


def test_without_references_and_without_causal_condition():
    for one, options in ((case((7,)), {}), (case((2, 3), GRIDS[:1]), {"causal_condition": False})):
        model = make(**options)
        expected = run(model, one.stock)
        report = uniref_fast.patch(model)
        assert max_relative_error(run(model, one.stock), expected) < ROUNDING
        assert not report.fallbacks
        uniref_fast.unpatch(model)


def test_kept_keys_own_their_storage_and_fit_the_original(model):
    """A step of the original can read keys that the patched model has stored."""
    given = batch()
    uniref_fast.patch(model)
    _, cache = two_steps(model, given)
    for layer in cache.layer_caches:
        for x in layer.get():
            assert x.shape == (2, 37, 2, 128) and x.untyped_storage().nbytes() == x.nbytes
    patched = run(model, given, kv_cache=cache, kv_cache_mode="cached")
    uniref_fast.unpatch(model)
    assert max_relative_error(run(model, given, kv_cache=cache, kv_cache_mode="cached"), patched) < ROUNDING


BFLOAT16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no instructions for bfloat16 products")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BFLOAT16)])
def test_the_pipeline_and_edit_on_it(dtype):
    pipe = pipeline(dtype)
    from PIL import Image

    request = EditRequest("make it night", [Image.new("RGB", (64, 40), "red")], " ", true_cfg_scale=3.0, seed=1,
                          num_inference_steps=3)  # fmt: skip

    def call(**options):
        return pipe(
            prompt=request.prompt, image=[*request.images], negative_prompt=" ", true_cfg_scale=3.0,
            num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="latent",
            output_resolution=64, **options,
        ).images  # fmt: skip

    expected, edited = call(), uniref_fast.edit(pipe, [request], output_type="latent", progress=False)
    report = uniref_fast.patch(pipe)
    kept, computed = call(), call(use_kv_cache=False)
    assert not report.fallbacks and len(report.sites) == 6
    if dtype == torch.float32:
        assert max_relative_error(kept, expected) < ROUNDING > max_relative_error(kept, computed)
    else:  # the keys that the first step stores and the later ones read are exact
        assert torch.equal(kept, computed)
    assert torch.equal(uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0], edited[0])


@pytest.mark.parametrize("strict", [True, False])
def test_the_self_check_compares_with_the_original(model, monkeypatch, strict):
    """A wrong row of the modulation table in one place: an error, or the original for that place."""
    given = batch()
    expected = run(model, given)

    def wrong(self, mask, batch, length, device):
        return torch.zeros(batch * length, dtype=torch.int32)

    monkeypatch.setattr(qwen_image_21.PatchedBlock21, "_rows_of", wrong)
    report = uniref_fast.patch(model, strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.0 differs from the original"):
            run(model, given)
    else:
        assert max_relative_error(run(model, given), expected) < ROUNDING
        assert sum("differs from the original" in reason for reason in report.fallbacks) > 0


def test_other_processors_run_unchanged():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor

    class Own(QwenImage21AttnProcessor):
        pass

    model, given = transformer(), batch()
    expected = run(model, given)
    model.transformer_blocks[1].attn.set_processor(Own())
    report = uniref_fast.patch(model)
    assert max_relative_error(run(model, given), expected) < ROUNDING
    assert len(report.sites) == 5 and any("its own Own, which runs unchanged" in note for note in report.notes)


@pytest.mark.parametrize("what", ["backend", "function"])
def test_calls_that_need_the_original(model, monkeypatch, what):
    given = batch()
    expected = run(model, given)
    report = uniref_fast.patch(model)
    if what == "backend":
        model.set_attention_backend("native")
        reason = "attention backend 'native' was chosen"
    else:
        module = qwen_image_21._stock()
        replaced = module.apply_rotary_emb_qwen
        monkeypatch.setattr(module, "apply_rotary_emb_qwen", lambda *args, **more: replaced(*args, **more))
        reason = "apply_rotary_emb_qwen was replaced"
    try:
        assert max_relative_error(run(model, given), expected) < ROUNDING
        assert any(reason in each for each in report.fallbacks)
    finally:
        if what == "backend":
            model.reset_attention_backend()


# ---- hooks ----


def checkpointed(model):
    model.enable_gradient_checkpointing()
    model.train()


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def by_block(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def by_leaf(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def adapter(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "gate_layer"], init_lora_weights=False))


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("prepare", [checkpointed, casting, by_block, by_leaf, adapter])
def test_hooks(prepare, patch_first):
    """Both orders of patch() and a feature of diffusers give what the feature alone gives, gradients included."""
    stock, patched, given = transformer(), transformer(), batch()
    prepare(stock)
    if patch_first:
        report = uniref_fast.patch(patched)
        prepare(patched)
    else:
        prepare(patched)
        report = uniref_fast.patch(patched)
    for expected, out in zip(two_steps(stock, given)[0], two_steps(patched, given)[0], strict=True):
        assert max_relative_error(out, expected) < ROUNDING
    assert report.calls.total() > 0, report
    if prepare in (checkpointed, adapter):
        for each in (stock, patched):
            each(**given)[0].square().mean().backward()
        grads = [
            {name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (stock, patched)
        ]
        assert grads[0].keys() == grads[1].keys() and grads[0]
        largest = max(grad.abs().max().item() for grad in grads[0].values())
        for name, grad in grads[1].items():
            assert (grad - grads[0][name]).abs().max().item() < 1e-4 * largest, name


@pytest.mark.slow
def test_compiled_blocks_trace_the_fused_norms(model):
    """Attention plans from the segments of a call, so it runs the original, and the report says why."""
    torch._dynamo.reset()
    given = batch()
    expected = run(model, given)
    report = uniref_fast.patch(model)
    out = run(torch.compile(model, backend="eager"), given)
    assert max_relative_error(out, expected) < ROUNDING
    assert report.traces == len(model.transformer_blocks)
    assert ["segments" in reason for reason in report.traced_originals] == [True], report
    torch._dynamo.reset()


def test_every_norm_of_a_block_is_checked(model):
    uniref_fast.patch(model)
    block, given = model.transformer_blocks[1], batch()
    norm = block.img_norm2
    block.img_norm2 = nn.LayerNorm(256)
    try:
        run(model, given)
        report = uniref_fast.patch(model)
        assert any("a block's norm is LayerNorm" in reason for reason in report.fallbacks)
    finally:
        block.img_norm2 = norm
