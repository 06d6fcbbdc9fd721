"""patch/unpatch on the transformer and the pipeline: equal images, true reports, and living with diffusers' hooks."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

import uniref_fast
from uniref_fast.models.qwen_image_patch import SELF_CHECK_TOLERANCE
from uniref_fast.testing import assert_within_budget, max_relative_error

GRIDS = [(1, 4, 6), (1, 3, 5), (1, 1, 7)]
TOKENS = sum(f * h * w for f, h, w in GRIDS)


def inputs(dtype=torch.float32, batch=1, text=7, mask=None):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, TOKENS, 64, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 48, generator=generator).to(dtype),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(batch, generator=generator),
        "img_shapes": [GRIDS] * batch,
        "return_dict": False,
    }


def run(model, **kwargs):
    with torch.no_grad():
        return model(**inputs(**kwargs))[0]


def forwards(model):
    """What unpatch must leave exactly as it was."""
    return [
        (name, vars(block).get("forward"), block.attn.processor, block.attn.processor.__dict__.copy())
        for name, block in model.transformer_blocks.named_children()
    ]


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("batch, masked", [(1, False), (3, False), (2, True)])
def test_equal_outputs_and_exact_undo(make_transformer, zero_cond_t, batch, masked):
    model = make_transformer(zero_cond_t)
    mask = torch.tensor([[1] * 7, [1, 1, 0, 1, 0, 0, 0]]) if masked else None
    before, state, original = forwards(model), copy.deepcopy(model.state_dict()), run(model, batch=batch, mask=mask)
    report = uniref_fast.patch(model)
    assert max_relative_error(run(model, batch=batch, mask=mask), original) < 1e-4
    assert report.calls.total() > 0 and not report.fallbacks and report.max_rel_error < 1e-4
    assert all(site.calls and site.max_rel_error is not None for site in report.sites) and len(report.sites) == 6
    assert state.keys() == model.state_dict().keys(), "patching adds no parameters"
    assert uniref_fast.unpatch(model) and forwards(model) == before
    calls = report.calls.total()
    assert torch.equal(run(model, batch=batch, mask=mask), original) and report.calls.total() == calls
    assert not uniref_fast.unpatch(model)


def test_bfloat16_within_the_budget(make_transformer):
    model = make_transformer(True, dtype=torch.bfloat16)
    wide = make_transformer(True).to(torch.bfloat16).double()
    arguments = inputs(torch.bfloat16)
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
    exact["timestep"] = arguments["timestep"].to(torch.bfloat16).double()
    with torch.no_grad():
        eager, oracle = model(**arguments)[0], wide(**exact)[0]
        uniref_fast.patch(model)
        assert_within_budget(model(**arguments)[0], eager, oracle)


def test_calls_of_different_shapes_follow_each_other(make_transformer):
    """Nothing remembered from one call leaks into the next: shapes, masks and batches alternate."""
    model, stock = make_transformer(True), make_transformer(True)
    uniref_fast.patch(model)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    for kwargs in ({}, {"batch": 2}, {"mask": mask}, {"text": 4}, {}, {"mask": mask.flip(1)}, {"batch": 2}):
        assert max_relative_error(run(model, **kwargs), run(stock, **kwargs)) < 1e-4


def test_idempotent_and_option_changes_are_refused(make_transformer):
    model = make_transformer()
    report = uniref_fast.patch(model)
    assert uniref_fast.patch(model) is report
    with pytest.raises(ValueError, match="call unpatch first"):
        uniref_fast.patch(model, strict=False)
    with pytest.raises(ValueError, match="exact"):
        uniref_fast.patch(model, mode="turbo")


@pytest.mark.parametrize("target", [torch.nn.Linear(2, 2), object()])
def test_unknown_models_are_refused_with_what_is_supported(target):
    with pytest.raises(TypeError, match="QwenImageTransformer2DModel"):
        uniref_fast.patch(target)


def test_subclasses_are_refused(make_transformer):
    model = make_transformer()
    model.__class__ = type("QwenImageTransformer2DModelX", (type(model),), {})
    with pytest.raises(TypeError, match="nearest: QwenImageTransformer2DModel"):
        uniref_fast.patch(model)


def test_report_is_readable(make_transformer):
    model = make_transformer()
    report = uniref_fast.patch(model, impl="reference")
    assert "not run yet" in str(report)
    run(model)
    assert "max relative error" in str(report) and "reference when patched (asked for)" in str(report)


def test_failed_self_check(make_transformer, monkeypatch):
    """A site that differs raises when strict, and otherwise runs the original from then on."""
    monkeypatch.setitem(SELF_CHECK_TOLERANCE, torch.float32, -1.0)
    model = make_transformer()
    original = run(model)
    uniref_fast.patch(model)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0.*strict=False"):
        run(model)
    uniref_fast.unpatch(model)
    report = uniref_fast.patch(model, strict=False)
    assert torch.equal(run(model), original) and torch.equal(run(model), original)
    assert all(site.disabled for site in report.sites) and "disabled" in str(report)


def test_reference_causal_matches_the_packed_model(make_transformer):
    from uniref_fast import PackedQwenImage, Sample, SelfLayout

    model = make_transformer(True)
    arguments = inputs()
    layout = SelfLayout.qwen([Sample(7, GRIDS[0], tuple(GRIDS[1:]))], zero_cond_t=True)
    with torch.no_grad():
        expected = PackedQwenImage(model, visibility="reference_causal")(
            arguments["hidden_states"][0], arguments["encoder_hidden_states"][0], arguments["timestep"], layout
        )
        full = model(**arguments)[0][0, :24]
    report = uniref_fast.patch(model, visibility="reference_causal")
    out = run(model)[0, :24]
    assert "differs from the original by intention" in str(report)
    assert max_relative_error(out, expected) < 1e-5 and max_relative_error(out, full) > 1e-3


# ---- the compatibility matrix: each cell works, or the original runs and the report says why ----


def assert_patched_equals_stock(prepare, make_transformer, *, fallback=None, calls=2, tolerance=1e-4, patch_first):
    """Run stock + feature and patched + feature in the given order of installation; compare every call."""
    stock, model = make_transformer(True), make_transformer(True)
    prepare(stock)
    if patch_first:
        report = uniref_fast.patch(model)
        prepare(model)
    else:
        prepare(model)
        report = uniref_fast.patch(model)
    for _ in range(calls):
        with stock.cache_context("cond"):
            expected = run(stock)
        with model.cache_context("cond"):
            assert max_relative_error(run(model), expected) < tolerance
    if fallback:
        assert any(fallback in reason for reason in report.fallbacks), report
    else:
        assert report.calls.total() > 0 and not report.fallbacks, report
    return model, report


order = pytest.mark.parametrize("patch_first", [True, False])


@order
def test_first_block_cache(make_transformer, patch_first):
    def prepare(model):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.05))

    model, report = assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first, calls=3)
    first = next(site for site in report.sites if site.name == "transformer_blocks.0")
    last = next(site for site in report.sites if site.name == "transformer_blocks.2")
    assert first.calls.total() > last.calls.total(), "the cache skips later blocks, below it ours runs"
    model.disable_cache()
    uniref_fast.unpatch(model)
    assert torch.equal(run(model), run(make_transformer(True)))
    assert all(block.forward.__func__ is type(block).forward for block in model.transformer_blocks)


@order
def test_first_block_cache_undone_in_the_other_order(make_transformer, patch_first):
    """unpatch under a live cache, then disable the cache: nothing of ours is left."""
    model = make_transformer(True)
    steps = [lambda: uniref_fast.patch(model), lambda: model.enable_cache(FirstBlockCacheConfig(threshold=0.05))]
    for step in steps if patch_first else reversed(steps):
        step()
    uniref_fast.unpatch(model)
    model.disable_cache()
    assert torch.equal(run(model), run(make_transformer(True)))
    assert all(type(b.attn.processor) is QwenDoubleStreamAttnProcessor2_0 for b in model.transformer_blocks)


@order
def test_layerwise_casting(make_transformer, patch_first):
    def prepare(model):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first)


@order
@pytest.mark.parametrize("fused", [False, True])
def test_lora(make_transformer, patch_first, fused):
    from peft import LoraConfig

    def prepare(model):
        torch.manual_seed(5)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "add_v_proj", "to_out.0", "net.2"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if fused:
            model.fuse_lora()

    model, _ = assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first)
    assert max_relative_error(run(model), run(make_transformer(True))) > 1e-2, "the adapter must matter"
    if not fused:
        model.disable_adapters()
        assert max_relative_error(run(model), run(make_transformer(True))) < 1e-4


@order
def test_attention_backend_chosen_by_the_user(make_transformer, patch_first):
    def prepare(model):
        model.set_attention_backend("_native_math")

    try:
        model, _ = assert_patched_equals_stock(
            prepare, make_transformer, patch_first=patch_first, fallback="'_native_math' was chosen"
        )
        model.reset_attention_backend()
    finally:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_gradient_checkpointing_and_training(make_transformer):
    """With gradients the originals run: training under a patch is the stock training, and the report says so."""
    grads = []
    for patched in (False, True):
        model = make_transformer(True)
        model.enable_gradient_checkpointing()
        model.train()
        report = uniref_fast.patch(model) if patched else None
        model(**inputs())[0].square().mean().backward()
        grads.append(model.transformer_blocks[0].attn.to_q.weight.grad)
    assert torch.equal(*grads)
    assert not report.calls and any("gradients are enabled" in reason for reason in report.fallbacks)


@order
def test_controlnet_residuals(make_transformer, patch_first):
    model, stock = make_transformer(True), make_transformer(True)
    residuals = [torch.randn(1, TOKENS, 128)]
    uniref_fast.patch(model)
    with torch.no_grad():
        expected = stock(**inputs(), controlnet_block_samples=residuals)[0]
        assert max_relative_error(model(**inputs(), controlnet_block_samples=residuals)[0], expected) < 1e-4


@order
def test_leaf_level_group_offload(make_transformer, patch_first):
    def prepare(model):
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )

    assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first)


@order
def test_block_level_group_offload(make_transformer, patch_first):
    def prepare(model):
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )

    model, _ = assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first)
    uniref_fast.unpatch(model)
    assert max_relative_error(run(model), run(make_transformer(True))) < 1e-6


@order
def test_accelerate_hooks(make_transformer, patch_first):
    """What enable_model_cpu_offload and device maps install: hooks that replace `forward` on the instance."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    def prepare(model):
        for block in model.transformer_blocks:
            add_hook_to_module(block, ModelHook())

    model, _ = assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first)
    uniref_fast.unpatch(model)
    assert torch.equal(run(model), run(make_transformer(True)))


def test_autocast_runs_the_original(make_transformer):
    stock, model = make_transformer(True), make_transformer(True)
    report = uniref_fast.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model), run(stock))
    assert not report.calls and any("autocast" in reason for reason in report.fallbacks)


def test_modulation_in_another_dtype_runs_the_original(make_transformer):
    """As quantised or partly upcast models have it: streams in one dtype, modulation in another."""
    stock, model = make_transformer(True), make_transformer(True)
    report = uniref_fast.patch(model)
    for m in (stock, model):
        for block in m.transformer_blocks:
            block.txt_mod.register_forward_hook(lambda module, args, out: out.half())
    assert max_relative_error(run(model), run(stock)) < 1e-4
    assert any("modulation is" in reason for reason in report.fallbacks)


def test_context_parallel_runs_the_original(make_transformer):
    """Each rank holds a part of the sequence; layouts are global, so attention is left to diffusers."""
    from diffusers.models._modeling_parallel import ParallelConfig

    model = make_transformer()
    uniref_fast.patch(model)
    processor = model.transformer_blocks[0].attn.processor
    processor._parallel_config = ParallelConfig()
    try:
        with torch.no_grad():
            reason = processor.refusal(model.transformer_blocks[0].attn, torch.zeros(1), torch.zeros(1), None, ())
        assert "context parallel" in reason
    finally:
        processor._parallel_config = None


@order
def test_own_attention_processor_is_kept(make_transformer, patch_first):
    class Doubled(QwenDoubleStreamAttnProcessor2_0):
        def __call__(
            self,
            attn,
            hidden_states,
            encoder_hidden_states=None,
            encoder_hidden_states_mask=None,
            attention_mask=None,
            image_rotary_emb=None,
        ):
            image, text = super().__call__(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
            return image * 2, text

    def prepare(model):
        model.transformer_blocks[1].attn.set_processor(Doubled())

    model, report = assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first)
    if not patch_first:
        assert any("has its own Doubled" in note for note in report.notes)
    uniref_fast.unpatch(model)
    assert type(model.transformer_blocks[1].attn.processor) is Doubled


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compile_repeated_blocks(make_transformer, fullgraph):
    """Inside torch.compile the original block is traced, without a graph break, and the report says so."""
    model, stock = make_transformer(True, layers=2), make_transformer(True, layers=2)
    report = uniref_fast.patch(model)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=fullgraph)
    assert max_relative_error(run(model), run(stock)) < 1e-4
    assert not report.calls
    torch._dynamo.reset()


def test_already_compiled_is_refused(make_transformer):
    with pytest.raises(TypeError, match=r"torch\.compile"):
        uniref_fast.patch(torch.compile(make_transformer(), backend="eager"))


def test_save_and_load(make_transformer, tmp_path):
    """A patched model saves what the stock model saves."""
    model = make_transformer(True)
    uniref_fast.patch(model)
    expected = run(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == make_transformer(True).state_dict().keys()
    assert max_relative_error(run(loaded), expected) < 1e-4


def test_deepcopy_of_a_patched_model_is_independent(make_transformer):
    """A copy must not call the blocks of the model it was copied from."""
    model = make_transformer(True)
    uniref_fast.patch(model)
    run(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert max_relative_error(run(clone), run(make_transformer(True))) < 1e-4


def test_attention_processor_is_registered(make_transformer):
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    model = make_transformer()
    uniref_fast.patch(model)
    assert AttentionProcessorRegistry.get(type(model.transformer_blocks[0].attn.processor))


def test_threads_do_not_share_a_call(make_transformer):
    """Two threads with different shapes through one patched model."""
    from concurrent.futures import ThreadPoolExecutor

    model, stock = make_transformer(True), make_transformer(True)
    uniref_fast.patch(model)
    run(model)
    jobs = [{"text": 3}, {"batch": 2}] * 4
    expected = [run(stock, **job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        for out, want in zip(pool.map(lambda job: run(model, **job), jobs), expected, strict=True):
            assert max_relative_error(out, want) < 1e-4


def test_pipeline_gives_the_same_image(builtin_pipe):
    from PIL import Image

    images = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 50), "blue")]
    arguments = {"image": images, "prompt": "put picture 1 on picture 2", "num_inference_steps": 2}
    arguments |= {"negative_prompt": " ", "true_cfg_scale": 3.0, "output_type": "pt"}
    before = builtin_pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    report = uniref_fast.patch(builtin_pipe)
    after = builtin_pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert max_relative_error(after, before) < 1e-4 and report.calls.total() > 0 and not report.fallbacks
    uniref_fast.unpatch(builtin_pipe)
    assert torch.equal(builtin_pipe(**arguments, generator=torch.Generator().manual_seed(0)).images, before)
