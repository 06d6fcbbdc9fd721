"""patch/unpatch on the transformer and the pipeline: equal images, true reports, and living with diffusers' hooks."""

import copy
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from patching import GRIDS, ROUNDING, TOKENS, assert_patched_equals_stock, inputs, order, run

import uniref_fast
from uniref_fast import ops
from uniref_fast.models import PackedQwenImage
from uniref_fast.patch.processors import PatchedBlock
from uniref_fast.patch.report import SELF_CHECK_TOLERANCE
from uniref_fast.patch.state import _Calls, _grids
from uniref_fast.testing import assert_within_budget, max_relative_error


def forwards(model):
    """Return everything that unpatch must restore exactly."""
    return [
        (name, vars(block).get("forward"), block.attn.processor, block.attn.processor.__dict__.copy())
        for name, block in model.transformer_blocks.named_children()
    ]


@pytest.mark.parametrize("impl, other", [("reference", "dense"), ("dense", "reference")])
def test_the_report_counts_the_implementation_that_ran(make_transformer, monkeypatch, impl, other):
    """The choice is taken once: one that changes while a site runs shows in the call and in the report alike."""
    used = Counter()

    def spy(*args, **kwargs):
        used[kwargs["impl"]] += 1
        return attend(*args, **kwargs)

    attend = ops.segment_attention
    choices = itertools.cycle([(impl, "the first"), (other, "the second")])
    monkeypatch.setattr(ops, "explain_attention", lambda *args, **kwargs: next(choices))
    monkeypatch.setattr(ops, "segment_attention", spy)
    model = make_transformer()
    report = uniref_fast.patch(model)
    run(model)
    sites = [site for site in report.sites if site.name.endswith("attn")]
    assert sum((site.calls for site in sites), Counter()) == used == {impl: 2, other: 1}
    assert report.reasons == {f"{impl}: the first": 2, f"{other}: the second": 1}


def test_a_library_serves_attention_alone(make_transformer):
    """The other ops keep the choice by device; a library that is missing is an error before anything is patched."""
    model = make_transformer()
    original, before = run(model), forwards(model)
    with pytest.raises(ValueError, match="impl='flash' is not possible here: FlashAttention needs a CUDA device"):
        uniref_fast.patch(model, impl="flash")
    assert forwards(model) == before
    report = uniref_fast.patch(model, impl="dense")
    assert max_relative_error(run(model), original) < ROUNDING and not report.fallbacks
    assert "dense when patched (asked for" in str(report)
    for site in report.sites:
        expected = "dense" if site.name.endswith(".attn") else ops.choose(None, torch.zeros(1, 32), 32)
        assert set(site.calls) == {expected}


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("batch, masked", [(1, False), (3, False), (2, True)])
def test_equal_outputs_and_exact_undo(make_transformer, zero_cond_t, batch, masked):
    model = make_transformer(zero_cond_t)
    mask = torch.tensor([[1] * 7, [1, 1, 0, 1, 0, 0, 0]]) if masked else None
    before, state, original = forwards(model), copy.deepcopy(model.state_dict()), run(model, batch=batch, mask=mask)
    report = uniref_fast.patch(model)
    assert max_relative_error(run(model, batch=batch, mask=mask), original) < ROUNDING
    assert report.calls.total() > 0 and not report.fallbacks and report.max_rel_error < ROUNDING
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
        assert max_relative_error(run(model, **kwargs), run(stock, **kwargs)) < ROUNDING


def test_idempotent_and_option_changes_are_refused(make_transformer):
    model = make_transformer()
    report = uniref_fast.patch(model)
    assert uniref_fast.patch(model) is report
    with pytest.raises(ValueError, match="call unpatch first"):
        uniref_fast.patch(model, strict=False)
    with pytest.raises(ValueError, match="exact"):
        uniref_fast.patch(model, mode="turbo")


@pytest.mark.parametrize("visibility", ["reference-causal", None])
def test_an_unknown_visibility_is_refused_before_anything_is_installed(make_transformer, visibility):
    model = make_transformer()
    before = forwards(model)
    for build in (uniref_fast.patch, PackedQwenImage):
        with pytest.raises(ValueError, match=r"unknown visibility .*reference_causal"):
            build(model, visibility=visibility)
    assert forwards(model) == before and not uniref_fast.unpatch(model)


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


@pytest.mark.parametrize("value", [float("nan"), 1e3])
def test_self_check_sees_a_wrong_image_stream(make_transformer, monkeypatch, value):
    """NaN and wrong numbers in the second output of one block, and only there."""
    fused = PatchedBlock._fused

    def wrong(self, *args):
        text, image = fused(self, *args)
        return (text, image + value) if self.site.name.endswith(".1") else (text, image)

    monkeypatch.setattr(PatchedBlock, "_fused", wrong)
    model = make_transformer()
    original = run(model)
    uniref_fast.patch(model)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1 differs"):
        run(model)
    uniref_fast.unpatch(model)
    report = uniref_fast.patch(model, strict=False)
    assert max_relative_error(run(model), original) < ROUNDING
    assert [s.name for s in report.sites if s.disabled] == ["transformer_blocks.1"]
    assert sum(report.fallbacks.values()) == 1 and report.calls.total() == 5, "a rejected result is no accelerated call"


def test_failed_self_check(make_transformer, monkeypatch):
    """A site that differs raises when strict, and otherwise runs the original from then on."""
    monkeypatch.setitem(SELF_CHECK_TOLERANCE, torch.float32, -1.0)
    model = make_transformer()
    original = run(model)
    uniref_fast.patch(model)
    for _ in range(2):  # not once only
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
    assert "no self-check of attention" in str(report)
    assert max_relative_error(out, expected) < ROUNDING and max_relative_error(out, full) > 1e-3


# ---- the compatibility matrix: each cell works, or the original runs and the report says why ----


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
@pytest.mark.parametrize("how", ["added", "fused", "loaded"])
def test_lora(make_transformer, patch_first, how, tmp_path):
    from peft import LoraConfig

    def add(model):
        torch.manual_seed(5)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "add_v_proj", "to_out.0", "net.2"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)

    def prepare(model):
        if how == "loaded":  # what a pipeline's load_lora_weights does with its transformer
            model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
            return
        add(model)
        if how == "fused":
            model.fuse_lora()

    if how == "loaded":
        donor = make_transformer(True)
        add(donor)
        donor.save_lora_adapter(tmp_path)
    model, _ = assert_patched_equals_stock(prepare, make_transformer, patch_first=patch_first)
    assert max_relative_error(run(model), run(make_transformer(True))) > 1e-2, "the adapter must matter"
    if how != "fused":
        model.disable_adapters()
        assert max_relative_error(run(model), run(make_transformer(True))) < ROUNDING


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_training_under_a_patch(make_transformer, zero_cond_t, checkpointing):
    """Every parameter's gradient is the stock one, through the fused backwards."""
    grads, losses = [], []
    for patched in (False, True):
        model = make_transformer(zero_cond_t)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        report = uniref_fast.patch(model) if patched else None
        for _ in range(2):  # the first call of a site also checks itself
            model.zero_grad()
            loss = model(**inputs())[0].square().mean()
            loss.backward()
        losses.append(loss)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert not report.fallbacks and report.max_rel_error < ROUNDING
    # The recomputation of a checkpoint stops at the last tensor it needs: before the block's own call is counted.
    assert report.calls.total() == 2 * len(report.sites) * 3 // 2 if checkpointing else 2 * len(report.sites)
    assert max_relative_error(*losses) < ROUNDING
    stock, fused = grads
    for name, grad in stock.items():
        assert (fused[name] is None) == (grad is None), name
        if grad is not None:
            scale = max(
                grad.abs().max().item(), 1e-3 * max(g.abs().max().item() for g in stock.values() if g is not None)
            )
            assert (fused[name] - grad).abs().max().item() < 1e-4 * scale, name


@pytest.mark.parametrize("elsewhere", [False, True])
def test_recomputation_knows_its_own_forward(make_transformer, elsewhere):
    """A backward may run blocks again after another forward, on a GPU in a thread of its own."""

    def gradients(between):
        model = make_transformer(True).train()
        model.enable_gradient_checkpointing()
        uniref_fast.patch(model, visibility="reference_isolated")
        loss = model(**inputs())[0].square().mean()
        if between:
            model(**{**inputs(), "img_shapes": [[GRIDS[0], GRIDS[2], GRIDS[1]]]})
        if elsewhere:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(*pair) for pair in zip(gradients(False), gradients(True), strict=True))


def test_controlnet_residuals(make_transformer):
    model, stock = make_transformer(True), make_transformer(True)
    residuals = [torch.randn(1, TOKENS, 128)]
    uniref_fast.patch(model)
    with torch.no_grad():
        expected = stock(**inputs(), controlnet_block_samples=residuals)[0]
        assert max_relative_error(model(**inputs(), controlnet_block_samples=residuals)[0], expected) < ROUNDING


def test_float16_overflow_is_clipped_as_in_diffusers(make_transformer):
    """A residual stream driven over float16's range; the packed model too."""
    from uniref_fast import PackedQwenImage, Sample, SelfLayout

    model = make_transformer(True, dtype=torch.float16)
    for block in model.transformer_blocks:
        for mlp in (block.img_mlp, block.txt_mlp):
            mlp.net[2].bias.data.fill_(60000)
        for mod in (block.img_mod, block.txt_mod):
            mod[1].weight.data[-128:].zero_()
            mod[1].bias.data[-128:].fill_(1.0)  # the second gate: each block adds 60000
    arguments = inputs(torch.float16)
    with torch.no_grad():
        expected = model(**arguments)[0]
        layout = SelfLayout.qwen([Sample(7, GRIDS[0], tuple(GRIDS[1:]))], zero_cond_t=True)
        streams = (arguments[name][0] for name in ("hidden_states", "encoder_hidden_states"))
        packed = PackedQwenImage(model, impl="reference")(*streams, arguments["timestep"], layout)
        uniref_fast.patch(model, impl="reference")
        patched = model(**arguments)[0]
    assert expected.isfinite().all() and max_relative_error(patched, expected) < 5e-3
    assert max_relative_error(packed, expected[0, :24]) < 5e-3


def test_without_a_fused_implementation_the_original_runs(make_transformer):
    """float16 on a CPU: the plain reference would be slower than diffusers, so it is not used unasked."""
    stock, model = make_transformer(True, dtype=torch.float16), make_transformer(True, dtype=torch.float16)
    report = uniref_fast.patch(model)
    assert torch.equal(run(model, dtype=torch.float16), run(stock, dtype=torch.float16))
    assert not report.calls and any("no fused implementation" in reason for reason in report.fallbacks)


def test_changing_the_dtype_after_patching(make_transformer):
    """The report counts what really served each call."""
    model = make_transformer(True)
    report = uniref_fast.patch(model, impl="native")
    run(model)
    first = report.calls.total()
    model.to(torch.float16)
    run(model, dtype=torch.float16)
    assert report.calls == {"native": first} and any("float32 and bfloat16" in r for r in report.fallbacks)


def test_head_dimensions_that_kernels_do_not_take(make_transformer):
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    shape = {"attention_head_dim": 20, "axes_dims_rope": (4, 8, 8), "num_attention_heads": 2, "joint_attention_dim": 48}
    model = QwenImageTransformer2DModel(in_channels=64, out_channels=16, num_layers=1, **shape).eval()
    expected = run(model)
    report = uniref_fast.patch(model)
    assert torch.equal(run(model), expected) and any("multiples of 8" in reason for reason in report.fallbacks)


def test_one_timestep_for_a_batch_runs_the_original(make_transformer):
    """diffusers broadcasts a [1] timestep; the fused ops have a row a sample and would read past the table."""
    stock, model = make_transformer(True), make_transformer(True)
    report = uniref_fast.patch(model)
    arguments = inputs(batch=2) | {"timestep": torch.tensor([0.7])}
    with torch.no_grad():
        expected = stock(**arguments)[0]
        assert max_relative_error(model(**arguments)[0], expected) < ROUNDING
    assert any("timestep embeddings for a batch of 2" in reason for reason in report.fallbacks)


@pytest.mark.parametrize("cause", ["autocast", "backend", "processor"])
def test_other_visibilities_never_fall_back_to_full_attention(make_transformer, cause):
    model = make_transformer(True)
    if cause == "processor":
        model.transformer_blocks[1].attn.set_processor(type("Own", (QwenDoubleStreamAttnProcessor2_0,), {})())
        before = forwards(model)
        with pytest.raises(ValueError, match="has its own Own"):
            uniref_fast.patch(model, visibility="reference_causal")
        assert forwards(model) == before and not model._forward_pre_hooks and not uniref_fast.unpatch(model)
        return
    uniref_fast.patch(model, visibility="reference_causal")
    if cause == "backend":
        model.transformer_blocks[0].attn.processor._attention_backend = "native"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cause == "autocast")
    with torch.no_grad(), autocast, pytest.raises(RuntimeError, match="would use full attention"):
        model(**inputs())


def test_batched_shapes_under_another_visibility():
    """Every row of a batch has its own references."""
    shapes = [GRIDS, [GRIDS[0], GRIDS[2]]]
    assert _grids(shapes, 1, 0) == (GRIDS[0], (GRIDS[2],)) and _grids(shapes, 0, 0) == (GRIDS[0], tuple(GRIDS[1:]))


def test_process_wide_attention_backend(make_transformer):
    from diffusers.models.attention_dispatch import attention_backend

    stock, model = make_transformer(True), make_transformer(True)
    report = uniref_fast.patch(model)
    with attention_backend("_native_math"):
        assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert any("'_native_math' is active" in reason for reason in report.fallbacks)


def test_remembered_context_is_keyed_by_mask_and_frequencies(make_transformer):
    model = make_transformer(True)
    uniref_fast.patch(model)
    state = model._uniref_fast.state
    hidden, freqs = torch.zeros(1, 5, 128), (torch.polar(torch.ones(5, 16), torch.rand(5, 16)), torch.ones(3, 16) + 0j)
    other = (freqs[0] * 1j, freqs[1])
    mask = torch.tensor([[True, True, False]])
    first = state.context(hidden, 3, None, freqs)
    assert state.context(hidden, 3, None, freqs) is first
    masked = state.context(hidden, 3, mask, freqs)
    assert masked.layout != first.layout
    assert not torch.equal(state.context(hidden, 3, mask, other).rotary[0], masked.rotary[0])


def test_modulation_rows_follow_the_index(make_transformer):
    """Calls of equal length that split it differently into target and references."""
    stock, model = make_transformer(True), make_transformer(True)
    uniref_fast.patch(model)
    for target in (4, 2, 4):
        shapes = [(1, target, 6), (1, 1, TOKENS - 6 * target)]
        arguments = inputs() | {"img_shapes": [shapes]}
        with torch.no_grad():
            assert max_relative_error(model(**arguments)[0], stock(**arguments)[0]) < ROUNDING


def test_threads_have_calls_of_their_own():
    from concurrent.futures import ThreadPoolExecutor

    calls = _Calls()
    calls.context = calls.rows = "mine"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (calls.context, calls.rows)).result() == (None, None)


def test_every_order_of_patch_accelerate_and_cache_can_be_undone(make_transformer):
    """Hooks under and over the patch, put on and taken off in every nested order."""
    import itertools

    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    expected = run(make_transformer(True))
    for names in itertools.permutations(("patch", "accelerate", "cache")):
        model, hook = make_transformer(True), Counting()

        def put_on(name, model=model, hook=hook):
            if name == "patch":
                uniref_fast.patch(model)
            elif name == "cache":
                model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
            else:
                for block in model.transformer_blocks:
                    add_hook_to_module(block, hook)

        def take_off(name, model=model):
            if name == "patch":
                uniref_fast.unpatch(model)
            elif name == "cache":
                model.disable_cache()
            else:
                for block in model.transformer_blocks:
                    remove_hook_from_module(block)

        for name in names:
            put_on(name)
        with model.cache_context("cond"):
            assert max_relative_error(run(model), expected) < ROUNDING, names
        assert hook.calls == 3, f"{names}: accelerate's hook ran {hook.calls} times"
        for name in reversed(names):
            take_off(name)
        assert torch.equal(run(model), expected), names
        assert all("fused" not in repr(vars(b).get("forward")) for b in model.transformer_blocks), names
        assert not any(isinstance(getattr(b.forward, "__self__", None), PatchedBlock) for b in model.transformer_blocks)


def test_unpatch_refuses_when_the_forward_was_wrapped(make_transformer):
    model = make_transformer()
    uniref_fast.patch(model)
    block = model.transformer_blocks[1]
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.forward was wrapped"):
        uniref_fast.unpatch(model)
    block.forward = ours
    assert uniref_fast.unpatch(model) and torch.equal(run(model), run(make_transformer()))


@order
def test_leaf_level_group_offload(make_transformer, patch_first):
    def prepare(model):
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )

    assert_patched_equals_stock(
        prepare, make_transformer, patch_first=patch_first, fallback="hooks of diffusers or accelerate"
    )


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
    """Hooks as of enable_model_cpu_offload and device maps, which replace `forward` on the instance."""
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


def test_context_parallel_runs_the_original(make_transformer):
    """Each rank holds a part of the sequence; layouts are global, so attention is left to diffusers."""
    from diffusers.models._modeling_parallel import ParallelConfig

    model = make_transformer()
    uniref_fast.patch(model)
    processor = model.transformer_blocks[0].attn.processor
    processor._parallel_config = ParallelConfig()
    try:
        with torch.no_grad():
            reason = processor.refusal(model.transformer_blocks[0].attn, *[torch.zeros(1, 2, 4)] * 2, None, None, ())
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


def test_save_and_load(make_transformer, tmp_path):
    """A patched model saves what the stock model saves."""
    model = make_transformer(True)
    uniref_fast.patch(model)
    expected = run(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == make_transformer(True).state_dict().keys()
    assert max_relative_error(run(loaded), expected) < ROUNDING


@pytest.mark.parametrize("keep", [False, 2])
def test_deepcopy_of_a_patched_model_is_independent(make_transformer, keep):
    """A copy must not call the blocks of the model it was copied from, and keeps references of its own."""
    model = make_transformer(True)
    report = uniref_fast.patch(model, keep_references=keep)
    run(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert max_relative_error(run(clone), run(make_transformer(True))) < ROUNDING
    own = clone._uniref_fast.state.report
    assert not own.references_not_kept and not report.references_not_kept
    assert own is not report and len(own.references) == bool(keep)


def test_layer_skipping_finds_the_attention_processor(make_transformer):
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    model = make_transformer()
    uniref_fast.patch(model)
    assert AttentionProcessorRegistry.get(model.transformer_blocks[0].attn.processor.__class__)


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
            assert max_relative_error(out, want) < ROUNDING


def test_pipeline_gives_the_same_image(builtin_pipe):
    from PIL import Image

    images = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 50), "blue")]
    arguments = {"image": images, "prompt": "put picture 1 on picture 2", "num_inference_steps": 2}
    arguments |= {"negative_prompt": " ", "true_cfg_scale": 3.0, "output_type": "pt"}
    before = builtin_pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    report = uniref_fast.patch(builtin_pipe)
    after = builtin_pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert max_relative_error(after, before) < ROUNDING and report.calls.total() > 0 and not report.fallbacks
    uniref_fast.unpatch(builtin_pipe)
    assert torch.equal(builtin_pipe(**arguments, generator=torch.Generator().manual_seed(0)).images, before)
