"""Linears in float32 that oneDNN computes: bits, guards, and their place in a patched transformer."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from patching import run
from torch import nn
from torch.nn.utils import parametrize
from torch.testing._internal.logging_tensor import LoggingTensorMode

import uniref_fast
from uniref_fast.layout import Sample
from uniref_fast.models import PackedQwenImage, onednn_linear, packed
from uniref_fast.models.onednn_linear import (
    FEWEST_PRODUCTS,
    FEWEST_WEIGHTS,
    onednn_is_faster,
    row_by_row_linear,
    runs_onednn,
)
from uniref_fast.patch import replay
from uniref_fast.testing import max_relative_error

ROWS, WIDTH = 64, 192


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """A CPU on which oneDNN is faster."""
    monkeypatch.setattr(onednn_linear, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)


@pytest.fixture
def linear():
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def rows(n=ROWS):
    return torch.randn(1, n, WIDTH)


def test_the_result_is_that_of_the_linear_and_a_row_does_not_depend_on_the_others(linear):
    x = rows(300)
    whole = onednn_linear.onednn_linear(linear, x)
    assert max_relative_error(whole, linear(x)) < 2e-6 and whole.shape == x.shape
    for n in (2, 3, 16, 17, 63, 299):  # around the tiles of any kernel
        assert torch.equal(onednn_linear.onednn_linear(linear, x[:, :n]), whole[:, :n])
    linear.bias = None
    assert max_relative_error(onednn_linear.onednn_linear(linear, x), linear(x)) < 2e-6


def test_it_runs_for_plain_linears_of_enough_rows(linear):
    x = rows()
    assert runs_onednn(linear, x, None) and runs_onednn(linear, x, "native")
    with torch.inference_mode():
        assert runs_onednn(linear, rows(), None)
    fewest = -(-FEWEST_PRODUCTS // WIDTH**2)
    assert runs_onednn(linear, rows(fewest), None) and not runs_onednn(linear, rows(fewest - 1), None)


@pytest.mark.parametrize("kind", ["dtype", "weight dtype", "meta", "strided", "gradient", "impl", "subclass", "width"])
def test_other_inputs_and_weights_call_the_module(linear, kind):
    x, impl = rows(), None
    if kind == "dtype":
        linear, x = linear.bfloat16(), x.bfloat16()
    elif kind == "weight dtype":
        linear = linear.double()
    elif kind == "meta":
        linear = linear.to("meta")
    elif kind == "strided":
        x = torch.randn(1, WIDTH, ROWS).mT
    elif kind == "gradient":
        x.requires_grad_()
    elif kind == "impl":
        impl = "reference"
    elif kind == "subclass":
        linear.weight = nn.Parameter(linear.weight.as_subclass(type("Quantised", (torch.Tensor,), {})), False)
    else:
        x = torch.randn(1, ROWS, 2 * WIDTH)
    assert not runs_onednn(linear, x, impl)


def parameter(tensor):
    return nn.Parameter(tensor, requires_grad=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    "name, tensor",
    [
        ("weight", lambda weight: weight.mT),
        ("weight", lambda weight: weight.to_sparse_csr()),
        ("weight", lambda weight: torch.empty(0)),  # sharded weights are gathered by hooks
        ("bias", lambda bias: bias[:1].expand(WIDTH)),
        ("bias", lambda bias: bias.repeat(2)[::2]),
        ("bias", lambda bias: bias[:1]),
        ("bias", lambda bias: bias[None]),
    ],
)
def test_weights_in_other_memory_call_the_module(linear, name, tensor):
    setattr(linear, name, parameter(tensor(getattr(linear, name).data)))
    assert not runs_onednn(linear, rows(), None)


def test_a_bias_that_is_no_parameter_calls_the_module(linear):
    del linear.bias
    linear.register_buffer("bias", torch.zeros(WIDTH, dtype=torch.bfloat16))
    assert not runs_onednn(linear, rows(), None)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "global hook", "class", "parametrised", "compiled"])
def test_hooks_and_own_forwards_call_the_module(linear, kind):
    handle = None
    if kind == "hook":
        linear.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "pre-hook":
        linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif kind == "forward":
        linear.forward = lambda x: x
    elif kind == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out)
    elif kind == "class":
        linear.__class__ = type("Adapted", (nn.Linear,), {})
    elif kind == "parametrised":
        parametrize.register_parametrization(linear, "weight", nn.Identity())
    else:
        linear._compiled_call_impl = linear._call_impl
    try:
        assert not runs_onednn(linear, rows(), None)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("owner, name", [(nn.Linear, "forward"), (nn.Module, "__call__"), (F, "linear")])
def test_replaced_code_calls_the_module(linear, monkeypatch, owner, name):
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs)))
    assert not runs_onednn(linear, rows(), None)


def test_settings_of_pytorch_call_the_module(linear):
    with torch.backends.mkldnn.flags(enabled=False):
        assert not runs_onednn(linear, rows(), None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16
    try:
        assert not runs_onednn(linear, rows(), None)
    finally:
        torch.set_float32_matmul_precision(before)
    with LoggingTensorMode():  # it sees the Linears of a patched model, and does not change the results of a packed one
        assert not runs_onednn(linear, rows(), None) and runs_onednn(linear, rows(), None, packed=True)
    assert runs_onednn(linear, rows(), None)


@pytest.mark.parametrize(
    "text, faster",
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel name\t: one\n\nvendor_id\t: other\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", False),  # Zen 4 computes 512 bits in two halves
        ("vendor_id\t: GenuineIntel\ncpu family\t: 26\n", False),
        ("CPU implementer\t: 0x41\n", False),
    ],
)
def test_the_choice_depends_on_the_cpu(monkeypatch, tmp_path, text, faster):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(onednn_linear, "Path", lambda path: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn_is_faster.__wrapped__() == faster
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not onednn_is_faster.__wrapped__()


def test_without_cpuinfo(monkeypatch, tmp_path):
    monkeypatch.setattr(onednn_linear, "Path", lambda path: tmp_path / "missing")
    assert not onednn_is_faster.__wrapped__()


# ---- a patched transformer ----


@pytest.fixture
def calls(monkeypatch):
    """Number of Linears that oneDNN computes, all of which are large enough."""
    seen = []
    monkeypatch.setattr(onednn_linear, "FEWEST_PRODUCTS", 0)
    own = onednn_linear.onednn_linear
    monkeypatch.setattr(replay, "onednn_linear", lambda *args: (seen.append(1), own(*args))[1])
    return seen


def test_a_patched_transformer_uses_it_and_unpatch_undoes_it(make_transformer, calls):
    model = make_transformer(True, layers=2)
    original = run(model)
    report = uniref_fast.patch(model)
    assert max_relative_error(run(model), original) < 1e-5 and 0 < report.max_rel_error < 1e-5
    assert report.onednn_linears == len(calls) == 2 * (8 + 4)  # projections and feed-forwards of both streams
    assert f"{len(calls)} calls in float32 computed by oneDNN" in str(report)
    uniref_fast.unpatch(model)
    assert torch.equal(run(model), original) and report.onednn_linears == len(calls)


def test_the_self_check_compares_the_linears(make_transformer, calls, monkeypatch):
    """Every other operator gets the same wrong values as the original, so only the comparison of Linears sees them."""
    own = onednn_linear.onednn_linear
    monkeypatch.setattr(replay, "onednn_linear", lambda linear, x: own(linear, x) * 1.01)
    model = make_transformer(layers=1)
    original = run(model)
    report = uniref_fast.patch(model, strict=False)
    assert max_relative_error(run(model), original) < 1e-5
    assert [site.disabled is not None for site in report.sites] == [True, True] and not report.calls
    assert torch.equal(run(model), original)
    uniref_fast.unpatch(model)
    uniref_fast.patch(model)
    with pytest.raises(RuntimeError, match=r"differs from the original by 1\.00e-02"):
        run(model)


def test_adapters_and_hooks_of_one_linear_stay(make_transformer, calls):
    model = make_transformer(layers=1)
    model.transformer_blocks[0].attn.to_k.register_forward_hook(lambda module, args, out: 2 * out)
    original = run(model)
    report = uniref_fast.patch(model)
    assert max_relative_error(run(model), original) < 1e-5 and report.onednn_linears == len(calls) == 11


# ---- feed-forwards of other families ----


class Doubled(Flux2FeedForward):
    """A feed-forward of a user, whose forward needs the module itself."""

    def forward(self, x):
        return 2 * super().forward(x)


class Called(Flux2FeedForward):
    """A feed-forward of a user whose call does more than its forward."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def hooked(module):
    module.register_forward_hook(lambda module, args, out: out * 3)


def replaced(module):
    module.forward = lambda x: x


def sequence(dim):
    return nn.Sequential(nn.Linear(dim, 12), nn.SiLU(), nn.Linear(12, dim))


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize(
    "kind, change",
    [(Flux2FeedForward, None), (Flux2FeedForward, hooked), (Flux2FeedForward, replaced), (Doubled, None),
     (Called, None), (sequence, None)],
)  # fmt: skip
def test_linears_of_a_feed_forward_are_called_one_by_one(monkeypatch, kind, change, faster):
    """Only where oneDNN is faster, for classes of diffusers, and if no hook or replaced code would be passed over."""
    monkeypatch.setattr(onednn_linear, "onednn_is_faster", lambda: faster)
    parent = nn.ModuleDict({"ff": kind(8)})
    if change is not None:
        change(parent["ff"])
    x = torch.randn(5, 8)
    recorder = replay.Calls(parent, SimpleNamespace(impl="reference"), inputs=True)
    expected = parent["ff"](x)
    assert torch.equal(recorder.by_parts("ff", x), expected)
    whole = change is not None or kind is not Flux2FeedForward or not faster
    assert set(recorder.made) == ({"ff"} if whole else {f"ff.{part}" for part in ("linear_in", "act_fn", "linear_out")})
    stand_in = replay.StandIn(recorder)
    assert torch.equal(stand_in.ff(x), expected) and stand_in.max_rel_error == 0


def test_the_self_check_calls_no_part_of_a_feed_forward_again(monkeypatch, make_transformer):
    """Hooks would notice, and a dropout would draw other numbers."""
    monkeypatch.setattr(onednn_linear, "onednn_is_faster", lambda: True)
    model, called = make_transformer(layers=1), []
    activation, dropout, _ = model.transformer_blocks[0].img_mlp.net
    dropout.p = 0.5
    dropout.train()
    uniref_fast.patch(model)
    for module in (activation, dropout):
        module.register_forward_hook(lambda module, args, out: called.append(module))
    run(model)
    assert called == [activation, dropout]


# ---- a packed transformer ----


@pytest.mark.parametrize("n", [0, 1, 2, 5, 299, 300])
def test_a_row_has_the_same_bits_in_any_pack(linear, n):
    x = rows(300)[0]
    whole = row_by_row_linear(linear, x, None)
    assert torch.equal(whole, onednn_linear.onednn_linear(linear, x))
    assert torch.equal(row_by_row_linear(linear, x[:n], None), whole[:n])
    small = nn.Linear(WIDTH, FEWEST_WEIGHTS // WIDTH).requires_grad_(False)
    assert torch.equal(row_by_row_linear(small, x, None), small(x)), "too small"
    assert torch.equal(row_by_row_linear(linear, x, "reference"), linear(x))


@pytest.mark.parametrize("replaced", [False, True])
def test_hooks_that_move_weights_run_around_it(linear, replaced):
    """Only in a packed forward, which runs them; a forward that was replaced below them is called."""
    seen, x = [], rows()[0]
    if replaced:
        linear.forward = lambda x: 2 * x
    hook = ModelHook()
    hook.pre_forward = lambda module, *args: (seen.append("before"), (args, {}))[1]
    hook.post_forward = lambda module, out: (seen.append("after"), out)[1]
    add_hook_to_module(linear, hook)
    assert runs_onednn(linear, x, None, packed=True) != replaced and not runs_onednn(linear, x, None)
    out = row_by_row_linear(linear, x, None)
    assert torch.equal(out, 2 * x if replaced else onednn_linear.onednn_linear(linear, x))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("for_training", [False, True])
def test_a_packed_transformer_uses_it_except_in_training(make_transformer, monkeypatch, for_training):
    seen = []
    monkeypatch.setattr(packed, "row_by_row_linear", lambda linear, x, impl: (seen.append(len(x)), linear(x))[1])
    model = make_transformer(layers=2)
    forward = PackedQwenImage(model, for_training=for_training)
    layout = forward.layout([Sample(7, (1, 4, 6))])
    with torch.no_grad():
        forward(torch.randn(24, 64), torch.randn(7, 48), torch.ones(1), layout)
    dropout = 1
    expected = [24] * (3 + 1 + dropout + 2) + [7] * (3 + 1 + 2) + [24] * (3 + 1 + dropout + 2) + [7] * 3
    assert sorted(seen) == sorted([] if for_training else expected)
