"""patch of every family against diffusers: values, gradients, features of diffusers, and options that are refused."""

import pytest
import torch
from forwards import FEATURES, FORWARDS, arguments, result, run, wide
from patching import ROUNDING, order

import uniref_fast
from uniref_fast.testing import assert_within_budget, max_relative_error

VARIANTS = [(kind, variant) for kind, known in FORWARDS.items() for variant in known.variants]
FEATURE_CASES = [(kind, feature) for kind, known in FORWARDS.items() for feature in known.features]
TRAINED = [kind for kind in FORWARDS if kind not in ("klein", "klein-kv")]


def replaceable(model):
    """Return what unpatch must restore."""
    return [
        (set(vars(module)), getattr(module, "processor", None), vars(module).get("forward"))
        for module in model.modules()
    ]


@pytest.mark.parametrize("kind, variant", VARIANTS)
def test_equals_diffusers(kind, variant):
    model, known = FORWARDS[kind].make(), FORWARDS[kind]
    expected = [run(model, kind, variant, step) for step in range(2)]
    assert max_relative_error(*expected) > 10 * ROUNDING
    before = replaceable(model)
    report = uniref_fast.patch(model)
    for step in range(2):
        assert max_relative_error(run(model, kind, variant, step), expected[step]) < ROUNDING
    assert len(report.sites) == known.sites and not report.fallbacks
    assert report.calls.total() - report.calls["kept"] == 2 * known.calls(variant)
    assert all(site.max_rel_error < ROUNDING for site in report.sites if site.calls)
    assert uniref_fast.unpatch(model) and replaceable(model) == before
    assert torch.equal(run(model, kind, variant), expected[0])


@pytest.mark.parametrize("kind", FORWARDS)
def test_inputs_that_differ_follow_each_other(kind):
    """Nothing that is remembered of one call is used in another: masks of one shape, too."""
    variants = FORWARDS[kind].variants
    model = FORWARDS[kind].make()
    expected = [run(model, kind, variant) for variant in variants]
    uniref_fast.patch(model)
    for number in (*range(len(variants)), *reversed(range(len(variants)))):
        assert max_relative_error(run(model, kind, variants[number]), expected[number]) < ROUNDING, variants[number]


@pytest.mark.parametrize("kind", FORWARDS)
def test_inference_mode(kind):
    """Tensors of inference mode have no version."""
    model = FORWARDS[kind].make()
    expected, report = run(model, kind), uniref_fast.patch(model)
    with torch.inference_mode():
        for _ in range(2):
            assert max_relative_error(run(model, kind), expected) < ROUNDING
    assert report.calls.total() and not report.fallbacks


@pytest.mark.parametrize("kind", FORWARDS)
def test_bfloat16_within_the_budget(kind):
    model = FORWARDS[kind].make(dtype=torch.bfloat16)
    oracle, eager = wide(model, kind), run(model, kind)
    report = uniref_fast.patch(model)
    assert_within_budget(run(model, kind), eager, oracle)
    assert report.calls.total() and not report.fallbacks


def gradients(model, kind):
    """Return the gradients of all parameters that have one."""
    positional, named = arguments(model, kind)
    model.zero_grad()
    result(model(*positional, **named)).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys() and expected
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        assert (actual[name] - grad).abs().max().item() < 1e-4 * scale, name


@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_and_checkpointing(kind):
    model, found = FORWARDS[kind].make().train(), []
    for patched in (False, True):
        if patched:
            report = uniref_fast.patch(model)
        for checkpointing in (False, True):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            found.append(gradients(model, kind))
    assert report.calls.total()  # the modulation of FLUX.3 compares the times of tokens without gradients only
    assert all("without gradients only" in reason for reason in report.fallbacks)
    for other in found[1:]:
        assert_same_gradients(other, found[0])


@order
@pytest.mark.parametrize("kind, feature", [case for case in FEATURE_CASES if case[1] != "cache"])
def test_features_of_diffusers(kind, feature, patch_first):
    stock, model, prepare = FORWARDS[kind].make(), FORWARDS[kind].make(), FEATURES[feature]
    prepare(stock, kind)
    if patch_first:
        report = uniref_fast.patch(model)
    prepare(model, kind)
    if not patch_first:
        report = uniref_fast.patch(model)
    for step in range(2):
        assert max_relative_error(run(model, kind, step=step), run(stock, kind, step=step)) < ROUNDING
    if feature == "offload":  # the weights of norms come with a call only; all norms of these two models have weights
        assert report.fallbacks and all("hooks of diffusers" in reason for reason in report.fallbacks)
        assert bool(report.calls.total()) == (kind not in ("z-image", "fibo-2"))
    else:
        assert report.calls.total() > report.calls["kept"] and not report.fallbacks
    if feature == "lora":
        assert_same_gradients(gradients(model, kind), gradients(stock, kind))


@order
@pytest.mark.parametrize("kind", [kind for kind, feature in FEATURE_CASES if feature == "cache"])
def test_a_first_block_cache_works_as_much_as_in_diffusers(kind, patch_first):
    """The error is that of diffusers where it has no such cache for a model, or cannot run it."""
    found = []
    for patched in (False, True):
        model = FORWARDS[kind].make()
        steps = [lambda model=model: FEATURES["cache"](model, kind)]
        if patched:
            steps.insert(0 if patch_first else 1, lambda model=model: uniref_fast.patch(model))
        try:
            for step in steps:
                step()
            outs = []
            for step in range(2):
                with model.cache_context("cond") if hasattr(model, "cache_context") else torch.no_grad():
                    outs.append(run(model, kind, step=step))
            found.append(outs)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            found.append(error)
    expected, actual = found
    if isinstance(expected, Exception):
        same = type(actual) is type(expected) and str(actual)[:40] == str(expected)[:40]
        assert same or all("'hidden_states'" in str(error) for error in found), "an argument that these blocks lack"
        # diffusers raises ValueError the first time that it looks for it in a process, and KeyError later
    else:
        assert all(max_relative_error(one, other) < ROUNDING for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in FORWARDS if kind not in ("klein-kv", "flux3 flow map")])
def test_refused_options(kind):
    model, known = FORWARDS[kind].make(), FORWARDS[kind]
    before = replaceable(model)
    with pytest.raises(ValueError, match=known.visibility):
        uniref_fast.patch(model, visibility="reference_causal")
    with pytest.raises(ValueError, match=known.keep_references):
        uniref_fast.patch(model, keep_references="auto")
    assert replaceable(model) == before
