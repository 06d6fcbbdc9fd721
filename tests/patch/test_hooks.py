"""patch beside everything that others put into a block: hooks, caches, guiders, modes, dropout, replaced functions."""

import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SmoothedEnergyGuidanceConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from patching import ROUNDING, assert_patched_equals_stock, inputs, order, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import uniref_fast
from uniref_fast import native, ops
from uniref_fast.patch.guards import changed_qk_norm
from uniref_fast.testing import max_relative_error


def pair(make_transformer, **options):
    """A stock model, and an equal one that is patched, with its report."""
    stock, model = make_transformer(True, **options), make_transformer(True, **options)
    return stock, model, uniref_fast.patch(model)


def assert_equal_from_the_first_call(stock, model, calls=2, **given):
    for step in range(calls):
        assert max_relative_error(run(model, seed=step, **given), run(stock, seed=step, **given)) < ROUNDING, step


# ---- the self-check must not be noticed by anything ----

TAYLORSEER = {"cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
CACHES = {
    "taylorseer": TaylorSeerCacheConfig(**TAYLORSEER),
    "taylorseer lite": TaylorSeerCacheConfig(**TAYLORSEER, use_lite_mode=True),
    "pab": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
        spatial_attention_timestep_skip_range=(100, 800),
    ),
    "magcache": MagCacheConfig(num_inference_steps=6, retention_ratio=0.2, threshold=10.0, mag_ratios=[1.0] * 6),
}  # fmt: skip


@order
@pytest.mark.parametrize("cache", CACHES)
def test_caches_of_diffusers(make_transformer, cache, patch_first):
    """Equal to stock from the first image on: the self-check does not feed a cache, nor take a step of its schedule."""

    def prepare(model):
        model.enable_cache(CACHES[cache])

    options = {"patch_first": patch_first, "calls": 6, "moving": True}
    _, report = assert_patched_equals_stock(prepare, make_transformer, **options)
    assert report.max_rel_error < ROUNDING and all(site.max_rel_error is not None for site in report.sites)
    expected = sum(site.calls.total() for site in report.sites)
    assert expected < 6 * len(report.sites), "the cache must skip something"


def record_calls(model):
    """Hooks on every module that diffusers calls within blocks, norms apart; returns what they see."""
    seen = []
    for name, module in model.transformer_blocks.named_modules():
        kind = type(module).__name__
        if kind in ("LayerNorm", "RMSNorm", "ModuleList") or not name:
            continue

        def hook(module, args, kwargs, out, name=name):
            tensors = (*args, *kwargs.values(), *(out if isinstance(out, tuple) else (out,)))
            seen.append((name, [tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor)]))

        module.register_forward_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("when", ["before patch", "before the first call", "after the first call"])
@pytest.mark.parametrize("batch", [1, 2])
def test_modules_are_called_as_in_the_original(make_transformer, when, batch):
    """The same modules, as often, in the same order, with the shapes of the original: [B, N, C] everywhere."""
    stock, model = make_transformer(True, layers=2), make_transformer(True, layers=2)
    expected = record_calls(stock)
    seen = record_calls(model) if when == "before patch" else None
    report = uniref_fast.patch(model)
    if when == "after the first call":
        run(model, batch=batch)
    if seen is None:
        seen = record_calls(model)
    run(stock, batch=batch)
    run(model, batch=batch)
    assert seen == expected and len(seen) > 40
    assert not report.fallbacks and report.max_rel_error < ROUNDING


def test_a_hook_that_indexes_tokens_acts_on_the_token_axis(make_transformer):
    stock, model, report = pair(make_transformer)
    run(model)
    for each in (stock, model):
        for name in ("attn.to_q", "img_mlp", "attn.to_out.0", "txt_mlp.net.0"):
            each.transformer_blocks[1].get_submodule(name).register_forward_hook(
                lambda module, args, out: torch.cat([out[:, :3] * 3, out[:, 3:]], dim=1)
            )
    assert_equal_from_the_first_call(stock, model)
    assert not report.fallbacks


def triple_first_tokens(module, args):
    args[0][:, :2].mul_(3.0)


def test_hooks_that_change_their_input_in_place(make_transformer):
    """The self-check compares what a module was given, which such a hook changes."""
    stock, model, report = pair(make_transformer)
    for each in (stock, model):
        for name in ("img_mlp", "attn.to_out.0"):
            each.transformer_blocks[1].get_submodule(name).register_forward_pre_hook(triple_first_tokens)
    assert_equal_from_the_first_call(stock, model)
    with torch.inference_mode():
        uniref_fast.unpatch(model)
        report = uniref_fast.patch(model)
        assert max_relative_error(model(**inputs())[0], stock(**inputs())[0]) < ROUNDING
    assert report.max_rel_error < ROUNDING and not report.fallbacks


@pytest.mark.parametrize("lora", [False, True])
def test_dropout_draws_the_numbers_of_the_original(make_transformer, lora):
    """Images and the state of the generator are stock's from the first call on, which also checks itself."""
    from peft import LoraConfig

    stock, model, report = pair(make_transformer)
    for each in (stock, model):
        each.train()
        if lora:
            torch.manual_seed(3)
            each.add_adapter(LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False,
                                        target_modules=["to_q", "to_v", "add_k_proj", "net.2"]))  # fmt: skip
        else:
            for block in each.transformer_blocks:
                block.attn.to_out[1].p = 0.5
    for _ in range(2):
        results = []
        for each in (stock, model):
            torch.manual_seed(7)
            results.append((run(each), torch.get_rng_state()))
        assert max_relative_error(results[1][0], results[0][0]) < ROUNDING
        assert torch.equal(results[1][1], results[0][1])
    assert report.max_rel_error < ROUNDING and not report.fallbacks


class Counting(QwenDoubleStreamAttnProcessor2_0):
    """A processor with a state: its result depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, attention_mask=None,
        image_rotary_emb=None,
    ):  # fmt: skip
        self.calls += 1
        image, text = super().__call__(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
        )
        return image * self.calls, text


class CountingLinear(torch.nn.Linear):
    """A Linear with a state, as delayed scaling has."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


def test_modules_with_a_state(make_transformer):
    stock, model, report = pair(make_transformer)
    for each in (stock, model):
        each.transformer_blocks[0].attn.set_processor(Counting())
        for linear in (each.transformer_blocks[1].attn.to_v, each.transformer_blocks[2].txt_mod[1]):
            linear.__class__ = CountingLinear
    assert_equal_from_the_first_call(stock, model, calls=3)
    assert model.transformer_blocks[0].attn.processor.calls == 3
    assert report.max_rel_error < ROUNDING and not report.fallbacks


@pytest.mark.parametrize("place", ["attn.to_v", "attn.to_out.0", "img_mod", "img_mlp"])
def test_a_late_change_of_dtype_calls_no_module_twice(make_transformer, place):
    """A change that shows only in the middle of a block: the original continues from there."""
    stock, model, report = pair(make_transformer)
    for each in (stock, model):
        each.transformer_blocks[1].get_submodule(place).register_forward_hook(lambda m, args, out: out.double())
    seen, expected = record_calls(model), record_calls(stock)
    stock_error = None
    try:
        want = run(stock)
    except RuntimeError as error:  # q, k and v of different dtypes
        stock_error = error
    if stock_error:
        with pytest.raises(RuntimeError, match=str(stock_error)[:20]):
            run(model)
    else:
        assert max_relative_error(run(model), want) < ROUNDING
    assert seen == expected
    assert any("returned torch.float64" in reason for reason in report.fallbacks)


# ---- hooks on what is not called: the original runs ----


@pytest.mark.parametrize("place", ["img_norm1", "txt_norm2", "attn.norm_q", "attn.norm_added_k"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_norms_run(make_transformer, place, kind):
    stock, model, report = pair(make_transformer)
    run(model)
    fired = []
    for each in (stock, model):
        norm = each.transformer_blocks[1].get_submodule(place)
        getattr(norm, f"register_{kind}_hook")(lambda module, *args: fired.append(module))
        each(**inputs())[0].square().mean().backward()
    assert [type(module) for module in fired] == [type(fired[0])] * 2
    assert any(reason in ("the norms have hooks", "a QK norm has hooks") for reason in report.fallbacks)


@pytest.mark.parametrize("place", ["img_norm1", "attn.norm_q"])
def test_forward_hooks_of_norms_that_change_the_result(make_transformer, place):
    stock, model, report = pair(make_transformer)
    run(model)
    for each in (stock, model):
        each.transformer_blocks[1].get_submodule(place).register_forward_hook(lambda module, args, out: 2 * out)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert any(reason in ("the norms have hooks", "a QK norm has hooks") for reason in report.fallbacks)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_global_module_hooks_see_every_module(make_transformer, kind):
    stock, model, report = pair(make_transformer)
    run(model)
    seen = {}
    for each in (stock, model):
        calls = seen.setdefault(id(each), [])
        register = getattr(torch.nn.modules.module, f"register_module_{kind}")
        handle = register(lambda module, *args, calls=calls: calls.append(type(module).__name__) and None)
        each(**inputs())[0].square().mean().backward()
        handle.remove()
    assert seen[id(model)] == seen[id(stock)] and "RMSNorm" in seen[id(model)]
    before = report.calls.total()
    assert max_relative_error(run(model), run(stock)) < ROUNDING and report.calls.total() > before


def test_norms_that_are_offloaded(make_transformer):
    """Offloading uses hooks, which hold the weights elsewhere between calls, or without any."""
    attn, cpu = make_transformer(layers=1).transformer_blocks[0].attn, torch.device("cpu")
    assert changed_qk_norm(attn, torch.float32, cpu) is None
    assert "torch.float32 on cpu, the streams are torch.bfloat16" in changed_qk_norm(attn, torch.bfloat16, cpu)
    attn.norm_k._hf_hook = object()
    assert "hooks of diffusers or accelerate" in changed_qk_norm(attn, torch.float32, cpu)
    attn.norm_q.to("meta")
    assert "on meta" in changed_qk_norm(attn, torch.float32, cpu)


# ---- changes of attention: the original runs, and the report says so ----


class ValuesOnly(torch.overrides.TorchFunctionMode):
    """Attention that returns its values, as perturbed-attention guidance has it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return args[2] if len(args) > 2 else kwargs["value"]
        return func(*args, **(kwargs or {}))


class DoubledNorms(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return (2 * out[0], *out[1:]) if func is torch.ops.aten.native_layer_norm.default else out


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("mode", [ValuesOnly, DoubledNorms])
def test_modes_that_change_operators(make_transformer, mode, called_before):
    stock, model, report = pair(make_transformer)
    plain = run(stock)
    if called_before:
        run(model)
    with mode():
        expected = run(stock)
        assert max_relative_error(run(model), expected) < ROUNDING
    assert max_relative_error(expected, plain) > 1e-2, "the mode must matter"
    assert any(f"mode {mode.__name__} is active" in reason for reason in report.fallbacks)
    before = report.calls.total()
    assert max_relative_error(run(model), plain) < ROUNDING and report.calls.total() == before + 6


def test_flops_are_counted_as_for_the_original(make_transformer):
    stock, model, _ = pair(make_transformer)
    counts = []
    for each in (stock, model):
        with FlopCounterMode(display=False) as counter:
            run(each)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_changes_nothing(make_transformer, device):
    """The default device may also be another than the model's: new tensors of the fused path name their device."""
    stock, model, report = pair(make_transformer)
    text = {"cpu": 13, "meta": 17}[device]  # lengths of which no other test leaves a plan behind
    mask = torch.ones(2, text, dtype=torch.int64)
    mask[1, 5:] = 0
    given = [(inputs(batch=2, text=text, mask=mask), each) for each in (stock, model)]
    with torch.no_grad(), torch.device(device):
        expected, out = (each(**kwargs)[0] for kwargs, each in given)
    assert max_relative_error(out, expected) < ROUNDING
    assert report.calls.total() == 6 and not report.fallbacks


def test_fake_tensors(make_transformer):
    """Shapes as the original's, and nothing fake is remembered for the real call that follows."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    stock, model, report = pair(make_transformer)
    for each in (stock, model):  # diffusers caches the rotary tables of a size, fake ones too
        each.pos_embed([inputs()["img_shapes"][0]], device=torch.device("cpu"), max_txt_seq_len=7)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(**inputs())[0].shape == stock(**inputs())[0].shape
    assert_equal_from_the_first_call(stock, model)
    assert any("FakeTensorMode is active" in reason for reason in report.fallbacks)


def test_meta_tensors(make_transformer):
    stock, model, report = pair(make_transformer, layers=1)
    given = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in inputs().items()}
    shapes = []
    for each in (stock, model):
        each.to("meta")
        with torch.no_grad():
            shapes.append(each(**given)[0].shape)
    assert shapes[0] == shapes[1] and any("meta device" in reason for reason in report.fallbacks)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize(
    "skip",
    [{"skip_attention_scores": True, "skip_attention": False, "skip_ff": False}, {"skip_attention": False}],
    ids=["scores", "feed-forward"],
)
def test_layer_skipping_of_diffusers(make_transformer, skip, called_before):
    """Perturbed-attention guidance and skip-layer guidance change the model like this during a call.

    Skipping the attention or the whole of a block of this model fails in diffusers itself.
    """
    stock, model, report = pair(make_transformer)
    plain = run(stock)
    if called_before:
        run(model)
    for each in (stock, model):
        _apply_layer_skip_hook(each, LayerSkipConfig(indices=[1], **skip), name="skip")
    expected = run(stock)
    assert max_relative_error(run(model), expected) < ROUNDING and max_relative_error(expected, plain) > 1e-2
    if skip.get("skip_attention_scores"):
        assert any("AttentionScoreSkipFunctionMode" in reason for reason in report.fallbacks)
    for each in (stock, model):
        for module in each.transformer_blocks.modules():
            if registry := getattr(module, "_diffusers_hook", None):
                registry.remove_hook("skip", recurse=False)
    assert max_relative_error(run(model), plain) < ROUNDING


def test_smoothed_energy_guidance(make_transformer):
    stock, model, _ = pair(make_transformer)
    plain = run(stock)
    run(model)
    for each in (stock, model):
        _apply_smoothed_energy_guidance_hook(each, SmoothedEnergyGuidanceConfig(indices=[1]), 3.0, name="seg")
    expected = run(stock)
    assert max_relative_error(run(model), expected) < ROUNDING and max_relative_error(expected, plain) > 1e-2


@pytest.mark.parametrize("where, name", [
    (F, "scaled_dot_product_attention"),
    (transformer_qwenimage, "dispatch_attention_fn"),
    (transformer_qwenimage, "apply_rotary_emb_qwen"),
])  # fmt: skip
@pytest.mark.parametrize("called_before", [False, True])
def test_replaced_functions(make_transformer, monkeypatch, where, name, called_before):
    """Other attention kernels are often put in place of PyTorch's function."""
    stock, model, report = pair(make_transformer)
    plain = run(stock)
    if called_before:
        run(model)
    original = getattr(where, name)
    if hasattr(transformer_qwenimage, "ROPE_PER_DEVICE") and "rotary" in name:
        pytest.skip("this diffusers looks the function up in a table")
    monkeypatch.setattr(where, name, lambda *args, **kwargs: original(*args, **kwargs) * 2)
    expected = run(stock)
    assert max_relative_error(run(model), expected) < ROUNDING and max_relative_error(expected, plain) > 1e-2
    assert any(f"{name} was replaced" in reason for reason in report.fallbacks)


@pytest.mark.parametrize("owner, name", [(FeedForward, "forward"), (GELU, "gelu"), (F, "gelu")])
def test_replaced_code_of_feed_forwards_is_run(make_transformer, monkeypatch, owner, name):
    stock, model, report = pair(make_transformer)
    plain = run(model)
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 2 * own(*args, **kwargs))
    assert max_relative_error(run(model), run(stock)) < ROUNDING and max_relative_error(run(stock), plain) > 1e-2
    assert not report.fallbacks


@pytest.mark.skipif(not native.has_gelu() or torch.cuda.is_available(), reason="GELU of PyTorch")
def test_the_self_check_covers_gelu(make_transformer, monkeypatch):
    model = pair(make_transformer)[1]
    monkeypatch.setattr(ops, "gelu", F.silu)
    with pytest.raises(RuntimeError, match=r"transformer_blocks.0 differs from the original"):
        run(model)


@pytest.mark.parametrize("name", ["forward", "_modulate"])
def test_block_methods_that_are_replaced_after_patching(make_transformer, monkeypatch, name):
    stock, model, report = pair(make_transformer)
    run(model)
    cls = type(model.transformer_blocks[0])
    original = getattr(cls, name)

    def changed(self, *args, **kwargs):
        first, second = original(self, *args, **kwargs)
        return first * 2, second

    monkeypatch.setattr(cls, name, changed)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert any("was replaced" in reason for reason in report.fallbacks)


def test_a_block_with_a_forward_of_its_own_is_left_alone(make_transformer):
    stock, model = make_transformer(True), make_transformer(True)
    for each in (stock, model):
        block = each.transformer_blocks[1]
        block.forward = lambda *args, own=block.forward, **kwargs: tuple(2 * x for x in own(*args, **kwargs))
    own = model.transformer_blocks[1].forward
    report = uniref_fast.patch(model)
    assert_equal_from_the_first_call(stock, model)
    assert any("transformer_blocks.1 has its own forward" in note for note in report.notes)
    assert uniref_fast.unpatch(model) and model.transformer_blocks[1].forward is own


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(
    "owner, name",
    [
        (torch.nn.LayerNorm, "forward"),
        (F, "layer_norm"),
        (RMSNorm, "forward"),
        (QwenDoubleStreamAttnProcessor2_0, "__call__"),
    ],
)
def test_replaced_code_of_every_norm_or_processor_is_run(make_transformer, monkeypatch, owner, name, patch_first):
    stock, model = make_transformer(True), make_transformer(True)
    if patch_first:
        report = uniref_fast.patch(model)
        run(model)  # the self-check is over
    own = getattr(owner, name)

    @functools.wraps(own)
    def replaced(*args, **kwargs):
        out = own(*args, **kwargs)
        return tuple(each * 0.5 for each in out) if isinstance(out, tuple) else out * 0.5

    monkeypatch.setattr(owner, name, replaced)
    if not patch_first:
        report = uniref_fast.patch(model)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert any(f"{name} was replaced" in reason for reason in report.fallbacks)


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
def test_transforms_of_torch_func_run_the_original(make_transformer, transform):
    stock, model, report = pair(make_transformer)
    run(model)
    given = inputs()
    x, tangent = given.pop("hidden_states"), torch.randn(1, 46, 64)

    def transformed(each):
        def function(x):
            return each(hidden_states=x, **given)[0]

        if transform == "jvp":  # PyTorch's flash attention has no forward-mode derivative
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return torch.func.jvp(function, (x,), (tangent,))[1]
        if transform == "grad":
            return torch.func.grad(lambda x: function(x).square().mean())(x)
        return torch.func.vmap(function)(torch.stack([x, tangent]))

    assert max_relative_error(transformed(model), transformed(stock)) < ROUNDING
    assert any("torch.func" in reason or "forward-mode" in reason for reason in report.fallbacks)


def test_jit_trace_runs_the_original(make_transformer):
    _, model, report = pair(make_transformer, layers=1)
    model.requires_grad_(False)
    block = model.transformer_blocks[0]
    freqs = torch.polar(torch.ones(5, 16), torch.rand(5, 16)), torch.polar(torch.ones(3, 16), torch.rand(3, 16))
    index = torch.tensor([[0, 0, 1, 1, 1]])

    def function(image, text, temb):
        return block(image, text, None, temb, freqs, None, index)

    arguments = torch.randn(1, 5, 128), torch.randn(1, 3, 128), torch.randn(2, 128)
    with torch.no_grad():
        traced = torch.jit.trace(function, arguments, check_trace=False)
        assert "uniref_fast" not in str(traced.graph)
        for out, expected in zip(traced(*arguments), function(*arguments), strict=True):
            assert max_relative_error(out, expected) < ROUNDING
    assert any("torch.jit.trace" in reason for reason in report.fallbacks)
