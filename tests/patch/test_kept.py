"""`patch(pipe, keep_references=...)`: the pipeline keeps references as `edit` does, and never those of another call."""

import contextlib
import gc

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from patching import GRIDS, ROUNDING, inputs
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import uniref_fast
from uniref_fast.models.compiled_block import compiler_of
from uniref_fast.models.kept_references import RefreshSchedule
from uniref_fast.testing import max_relative_error

TARGET = GRIDS[0][1] * GRIDS[0][2]


def call(model, t, seed=1, text_seed=1, **changes):
    """One call of the transformer at time t; returns its output `[B, rows, C]`."""
    given = inputs(seed=seed, **{k: changes.pop(k) for k in ("dtype", "batch", "text") if k in changes})
    targets = torch.Generator().manual_seed(int(1000 * t))
    given["hidden_states"] = given["hidden_states"].clone()
    noise = torch.randn(given["hidden_states"][:, :TARGET].shape, generator=targets)
    given["hidden_states"][:, :TARGET] = noise.to(given["hidden_states"].dtype)
    given["timestep"] = torch.full_like(given["timestep"], t)
    if text_seed != seed:
        given["encoder_hidden_states"] = inputs(seed=text_seed)["encoder_hidden_states"]
    with torch.no_grad():
        return model(**{**given, **changes})[0]


def is_kept(out):
    return out.shape[1] == TARGET


def picture(color, width=40, height=40):
    image = Image.new("RGB", (width, height), color)
    image.paste("white", (width // 4, height // 4, width // 2, height // 2))
    return image


def edited(pipe, images=("red", "blue"), prompt="swap them", seed=3, steps=4, **options):
    return pipe(
        image=[picture(color) for color in images], prompt=prompt, negative_prompt=" ", true_cfg_scale=2.0,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="latent", **options,
    ).images  # fmt: skip


def test_the_pipeline_equals_edit(builtin_pipe):
    """Guidance: both predictions keep their own references; memory is free before the decoding."""
    request = uniref_fast.EditRequest(
        "swap them", [picture("red"), picture("blue")], " ", 2.0, num_inference_steps=4, seed=3
    )
    report = uniref_fast.EditReport()
    options = {"output_type": "latent", "progress": False, "keep_references": 2}
    (expected,) = uniref_fast.edit(builtin_pipe, [request], report=report, **options)
    patched = uniref_fast.patch(builtin_pipe, keep_references=2)
    assert max_relative_error(edited(builtin_pipe), expected) < 1e-4
    assert [steps.refreshed for steps in patched.references] == [(0, 2), (0, 2)]
    drifts = [steps.drift for steps in report.references]
    assert [steps.drift for steps in patched.references] == [pytest.approx(drift, rel=1e-3) for drift in drifts]
    assert "references      prediction 2: references computed in 2 of 4 steps (0, 2); drift" in str(patched)
    assert not patched.fallbacks and not patched.references_not_kept
    predictions = builtin_pipe.transformer._uniref_fast.state.calls.predictions
    assert sum(store.nbytes for each in predictions for store in each.stores) == 0
    (again,) = uniref_fast.edit(builtin_pipe, [request], **options)
    assert torch.equal(again, expected), "the hooks of the patch do not change edit"


def test_edits_do_not_see_each_other(builtin_pipe):
    """Each edit equals itself alone, whatever ran before."""
    variants = [{}, {}, {"images": ("green", "blue")}, {"prompt": "make it night"}, {"seed": 9}, {}]
    alone = []
    for variant in variants:
        uniref_fast.patch(builtin_pipe, keep_references="auto")
        alone.append(edited(builtin_pipe, **variant))
        uniref_fast.unpatch(builtin_pipe)
    report = uniref_fast.patch(builtin_pipe, keep_references="auto")
    for variant, expected in zip(variants, alone, strict=True):
        assert torch.equal(edited(builtin_pipe, **variant), expected), variant
        assert len(report.references) == 2 and all(steps.refreshed[0] == 0 for steps in report.references)


def test_a_kept_step_equals_the_packed_model(make_transformer):
    """Several images for a prompt, and a masked text: each sample of the batch keeps its own references."""
    model = make_transformer(True)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    uniref_fast.patch(model, visibility="reference_causal", keep_references=True)
    kept = [call(model, t, batch=2, encoder_hidden_states_mask=mask) for t in (0.9, 0.8)]
    uniref_fast.unpatch(model)
    report = uniref_fast.patch(model, visibility="reference_causal")
    for t, out in zip((0.9, 0.8), kept, strict=True):
        expected = call(model, t, batch=2, encoder_hidden_states_mask=mask)
        assert max_relative_error(out[:, :TARGET], expected[:, :TARGET]) < ROUNDING
    assert is_kept(kept[1]) and not is_kept(kept[0])
    assert report.calls.total() == 2 * 2 * 3


def test_samples_of_a_batch_compute_their_references_together(make_transformer):
    model = make_transformer(True)
    report = uniref_fast.patch(model, keep_references="auto", drift=0.2)
    outs = [call(model, 1 - step / 20, batch=2) for step in range(8)]
    (steps,) = report.references
    model._uniref_fast.state.calls.predictions[0].stores[1].schedule = RefreshSchedule(every=1)
    assert not is_kept(call(model, 0.5, batch=2)) and not is_kept(call(model, 0.4, batch=2)), "one sample decides"
    assert [i for i, out in enumerate(outs) if not is_kept(out)] == list(steps.refreshed)
    assert 1 < len(steps.refreshed) < 8


def edit(model, text, grids, steps=4, noise=5):
    """Return the rows of the target of each step, and the steps that computed the references."""
    outs, target = [], grids[0][1] * grids[0][2]
    for step in range(steps):
        given = inputs(text=text, grids=grids) | {"timestep": torch.tensor([1 - step / 8])}
        noisy = inputs(text=text, grids=grids, seed=step + noise)["hidden_states"]
        given["hidden_states"] = torch.cat([noisy[:, :target], given["hidden_states"][:, target:]], dim=1)
        with torch.no_grad():
            outs.append(model(**given)[0])
    return [out[:, :target] for out in outs], [i for i, out in enumerate(outs) if out.shape[1] > target]


def add_adapters(model):
    from peft import LoraConfig

    for name in ("a", "b"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), name)
    model.set_adapters("a")


CHANGES = {
    "references": lambda model: {"seed": 2, "text_seed": 1},
    "prompt": lambda model: {"text_seed": 2},
    "length of the prompt": lambda model: {"text": 9},
    "mask": lambda model: {"encoder_hidden_states_mask": torch.tensor([[True] * 6 + [False]])},
    "time goes back": lambda model: {"t": 1.0},
    "time stays": lambda model: {"t": 0.8},
    "batch": lambda model: {"batch": 2},
    "order of the sizes": lambda model: {"img_shapes": [[GRIDS[0], *GRIDS[:0:-1]]]},
    "other arguments": lambda model: {"attention_kwargs": {"x": 1}},
    "weights": lambda model: touch(model),
    "dtype": lambda model: {"dtype": model.to(torch.bfloat16).dtype},
    "adapter": lambda model: model.set_adapters("b"),
    "scale of the adapter": lambda model: model.set_adapters("a", 0.5),
    "adapter off": lambda model: model.disable_adapters(),
    "adapter removed": lambda model: (
        model.unload_lora() if hasattr(model, "unload_lora") else model.delete_adapters("a")
    ),
}


def touch(model):
    with torch.no_grad():
        model.transformer_blocks[-1].attn.to_k.base_layer.bias.add_(0.1)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_computes_the_references_again(make_transformer, change):
    model = make_transformer(True)
    add_adapters(model)
    uniref_fast.patch(model, keep_references=6)
    assert not is_kept(call(model, 0.9)) and is_kept(call(model, 0.8))
    given = {"t": 0.7} | (CHANGES[change](model) or {})
    out = call(model, **given)
    assert not is_kept(out), "the step used kept keys and values of another call"
    uniref_fast.unpatch(model)
    uniref_fast.patch(model)
    assert torch.equal(call(model, **given), out)


def test_without_a_change_they_stay(make_transformer):
    """The other side of the test above, over forwards of two alternating prompts."""
    model = make_transformer(True)
    add_adapters(model)
    report = uniref_fast.patch(model, keep_references=6)
    kept = [is_kept(call(model, t, text_seed=text)) for t in (0.9, 0.8, 0.7) for text in (1, 2)]
    assert kept == [False, False, True, True, True, True]
    assert [steps.refreshed for steps in report.references] == [(0,), (0,)]


def test_memory_of_an_ended_edit_is_freed(make_transformer):
    """A call at an earlier time ends all predictions; at most two are kept."""
    model = make_transformer(True)
    uniref_fast.patch(model, keep_references=6)
    predictions = model._uniref_fast.state.calls.predictions
    for t, text, count in (
        (0.8, 9, 1),
        (0.9, 1, 1),
        (0.9, 2, 2),
        (0.8, 1, 2),
        (0.95, 3, 1),
        (0.95, 4, 2),
        (0.95, 5, 1),
    ):
        call(model, t, text_seed=text)
        assert len(predictions) == count


def interrupt(model):
    """Raise what Ctrl-C raises in the last block of the next call."""
    linear = model.transformer_blocks[-1].attn.to_k

    def interrupted(x):
        del linear.forward
        raise KeyboardInterrupt

    linear.forward = interrupted


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_edit_that_did_not_end_does_not_reach_the_next(make_transformer, steps, interrupted):
    """Another edit of the same images and prompt begins at the same time, with other noise."""
    model = make_transformer(True, layers=2)
    uniref_fast.patch(model, keep_references=2)
    expected, computed = edit(model, 7, GRIDS)
    uniref_fast.unpatch(model)
    uniref_fast.patch(model, keep_references=2)
    edit(model, 7, GRIDS, steps - interrupted, noise=50)
    if interrupted:
        interrupt(model)
        with pytest.raises(KeyboardInterrupt):
            call(model, 1 - (steps - 1) / 8)
    outs, mine = edit(model, 7, GRIDS)
    assert mine == computed == [0, 2]
    assert all(map(torch.equal, outs, expected))
    assert len(model._uniref_fast.state.calls.predictions) == 1


def hook_on_a_block(model):
    model.transformer_blocks[1].register_forward_hook(lambda *args: None)


def stock_processor(model):
    model.transformer_blocks[-1].attn.processor = model.transformer_blocks[-1].attn.processor.stock


REFUSALS = {
    "forward hooks": hook_on_a_block,
    "hook 'fbc": lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
    "attention of a block ran the original": stock_processor,
    "compiled code": lambda model: model.transformer_blocks[1].attn.compile(backend="eager"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_must_see_every_row_computes_every_step(make_transformer, reason):
    model = make_transformer(True)
    report = uniref_fast.patch(model, keep_references=6)
    REFUSALS[reason](model)
    with contextlib.ExitStack() as stack:
        if "fbc" in reason:
            stack.enter_context(model.cache_context("cond"))
        assert not any(is_kept(call(model, t)) for t in (0.9, 0.8))
    assert [reason in each for each in report.references_not_kept] == [True]
    assert report.references_not_kept.total() == 2 and "not kept        2 x" in str(report)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("controlnet_block_samples", {"controlnet_block_samples": [torch.zeros(1, 1, 128)]}),
        ("additional_t_cond", {"additional_t_cond": torch.zeros(1, dtype=torch.long)}),
        ("not those of img_shapes", {"img_shapes": [[(1, 4, 6), (1, 3, 4)]]}),
    ],
)
def test_other_calls_compute_everything(make_transformer, reason, changes):
    model = make_transformer(True)
    report = uniref_fast.patch(model, keep_references=6)
    call(model, 0.9)
    with contextlib.suppress(RuntimeError):  # diffusers refuses wrong sizes by itself
        assert not is_kept(call(model, 0.8, **changes))
    assert any(reason in each for each in report.references_not_kept)
    assert not is_kept(call(model, 0.7)), "a refused call ends the prediction"


def test_gradients_compute_everything(make_transformer):
    model = make_transformer(True)
    report = uniref_fast.patch(model, keep_references=6)
    call(model, 0.9)
    out = model(**inputs() | {"timestep": torch.tensor([0.8])})[0]
    assert not is_kept(out) and out.requires_grad
    assert list(report.references_not_kept) == ["gradients are enabled"]


def test_an_original_cannot_run_in_a_kept_step(make_transformer):
    model = make_transformer(True)
    uniref_fast.patch(model, keep_references=6)
    call(model, 0.9)
    model.transformer_blocks[1].attn.processor._attention_backend = "_native_math"
    with pytest.raises(RuntimeError, match="needs the references, and this step has kept them"):
        call(model, 0.8)
    model.transformer_blocks[1].attn.processor._attention_backend = None
    assert not is_kept(call(model, 0.7)), "the failed call is forgotten"


def test_refused_values(make_transformer):
    model = make_transformer(True)
    with pytest.raises(ValueError, match="not be exact: references attend to text and target"):
        uniref_fast.patch(model, keep_references=True)
    with pytest.raises(ValueError, match="modulated with the time t"):
        uniref_fast.patch(make_transformer(False), visibility="reference_causal", keep_references=True)
    with pytest.raises(ValueError, match='keep_dtype must be "int8" or None'):
        uniref_fast.patch(model, keep_references=2, keep_dtype="fp4")
    assert not hasattr(model, "_uniref_fast")
    uniref_fast.patch(model, keep_references=2)
    with pytest.raises(ValueError, match="already patched"):
        uniref_fast.patch(model, keep_references=3)


def test_unpatch_removes_the_hooks_and_the_memory(make_transformer):
    model = make_transformer(True)
    before = (len(model._forward_pre_hooks), len(model._forward_hooks))
    report = uniref_fast.patch(model, keep_references=6)
    call(model, 0.9)
    del report
    uniref_fast.unpatch(model)
    gc.collect()
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == before
    assert not is_kept(call(model, 0.8))


def test_8_bits(make_transformer):
    outs = []
    for dtype in (None, "int8"):
        model = make_transformer(True)
        report = uniref_fast.patch(model, keep_references=2, keep_dtype=dtype)
        outs.append([call(model, t) for t in (0.9, 0.8)][1])
        outs.append(report.references[0].kept_bytes)
    assert is_kept(outs[0]) and 0 < max_relative_error(outs[2], outs[0]) < 0.01 and outs[3] < 0.3 * outs[1]


# ---- compiled blocks ----


@pytest.fixture
def backend():
    """A backend of torch.compile that counts graphs; the compiler forgets everything before and after the test."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def compile_blocks(model, backend):
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    return model


LAYOUTS = [
    (5 + i, [(1, 4 + i % 3, 6 + i % 4), *((1, 3 + (i + j) % 4, 5) for j in range(i % 3 + 1))]) for i in range(4)
]  # text tokens and grids, 1 to 3 references


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_cond_t", "keep", "patch_first"), [(True, 1, False), (True, 2, True), (False, "auto", False)]
)
def test_compiled_blocks_equal_uncompiled_ones(make_transformer, backend, zero_cond_t, keep, patch_first):
    """Few graphs serve all steps of all layouts, and with n = 1 each step computes what it does without the option."""
    models = [make_transformer(zero_cond_t, layers=2) for _ in range(2)]
    expected_report = uniref_fast.patch(models[0], keep_references=keep if keep != 1 else False)
    if not patch_first:
        compile_blocks(models[1], backend)
    block, compiled = models[1].transformer_blocks[0], models[1].transformer_blocks[0]._compiled_call_impl
    report = uniref_fast.patch(models[1], keep_references=keep)
    if patch_first:
        compile_blocks(models[1], backend)
    for layout in LAYOUTS:
        (expected, computed), (outs, mine) = (edit(model, *layout) for model in models)
        assert mine == computed and (len(mine) < 4 or keep == 1)
        assert max(map(max_relative_error, outs, expected)) < ROUNDING
        assert mine == list(report.references[0].refreshed) and len(report.references[0].drift) == len(mine) - 1
        if keep != 1:
            assert report.references[0].drift == pytest.approx(expected_report.references[0].drift, rel=1e-3)
    assert backend.frame_count <= 2, "steps or layouts were compiled anew"
    assert report.traces == 2 * backend.frame_count and not report.references_not_kept and not report.calls
    compiler = compiler_of(block)
    uniref_fast.unpatch(models[1])
    assert patch_first or block._compiled_call_impl is compiled
    assert compiler is compiler_of(block), "edit() compiles as the user did, patched or not"


@pytest.mark.slow
def test_compiled_blocks_of_a_batch_with_masks_under_another_visibility(make_transformer, backend):
    """The plan of the step is an argument of the graph, so that it may be any."""
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    models = [make_transformer(True, layers=2) for _ in range(2)]
    outs = []
    for model in models:
        uniref_fast.patch(model, visibility="reference_causal", keep_references=True, keep_dtype="int8")
    compile_blocks(models[1], backend)
    outs = [[call(model, t, batch=2, encoder_hidden_states_mask=mask) for t in (0.9, 0.8)] for model in models]
    for ours, theirs in zip(outs[1], outs[0], strict=True):
        assert max_relative_error(ours, theirs) < ROUNDING
    assert is_kept(outs[1][1]) and backend.frame_count == 1


@pytest.mark.slow
def test_compiled_blocks_never_see_references_of_another_call(make_transformer, backend):
    model, expected = compile_blocks(make_transformer(True, layers=1), backend), make_transformer(True, layers=1)
    for each in (model, expected):
        torch.manual_seed(0)
        add_adapters(each)
    uniref_fast.patch(model, keep_references=6)
    uniref_fast.patch(expected)
    for change in ("references", "prompt", "weights", "adapter", "dtype"):
        given = {}
        for step, t in enumerate((0.9, 0.8, 0.7)):
            if step == 2:
                given = CHANGES[change](model) or {}
                CHANGES[change](expected)
            out = call(model, t, **given)
            assert is_kept(out) == (step == 1), f"step {step} of {change}"
            if step != 1:
                budget = 2e-2 if change == "dtype" and step == 2 else ROUNDING
                assert max_relative_error(out, call(expected, t, **given)) < budget, change


@pytest.mark.slow
def test_compiled_blocks_that_the_compiler_leaves_uncompiled(make_transformer, backend):
    """Beyond the limit of graphs PyTorch runs a block as it is, which then writes the same buffers."""
    models = [make_transformer(True, layers=2) for _ in range(2)]
    for model in models:
        uniref_fast.patch(model, keep_references=2)
    models[1].compile_repeated_blocks(backend=backend)
    kept = []
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (1, 2):  # the second size needs another graph, which is beyond the limit
            for t in (0.9, 0.8, 0.7, 0.6):
                out, expected = (call(model, t, batch=batch) for model in reversed(models))
                assert max_relative_error(out, expected) < ROUNDING
                kept.append(is_kept(out))
    assert kept == [False, True] * 4 and backend.frame_count == 1
    assert "a compiled block that ran uncompiled" in str(models[1]._uniref_fast.state.report)


@pytest.mark.slow
def test_what_cannot_be_traced_with_kept_references(make_transformer, backend):
    for reason, cause in {
        "set_attention_backend": lambda model: setattr(
            model.transformer_blocks[-1].attn.processor, "_attention_backend", "_native_math"
        ),
        "attention of a block ran the original": stock_processor,
        "torch.compile traces the whole transformer": lambda model: model.compile(backend=backend),
    }.items():
        model = make_transformer(True, layers=1)
        report = uniref_fast.patch(model, keep_references=6)
        if "whole" not in reason:
            compile_blocks(model, backend)
        cause(model)
        assert not any(is_kept(call(model, t)) for t in (0.9, 0.8))
        assert any(reason in each for each in report.references_not_kept), report
        torch._dynamo.reset()


@pytest.mark.parametrize("options", [{"keep_references": 2}, {"visibility": "reference_causal"}])
def test_a_thread_does_not_notice_that_another_compiles(make_transformer, monkeypatch, options):
    """PyTorch sets this flag for the whole process while a thread compiles."""
    model = make_transformer(True, layers=2)
    report = uniref_fast.patch(model, **options)
    expected, computed = edit(model, 7, GRIDS)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    outs, mine = edit(model, 7, GRIDS)
    assert mine == computed and all(map(torch.equal, outs, expected))
    assert not report.traces and not report.references_not_kept
