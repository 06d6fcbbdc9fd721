"""`ops.gelu`: gradients, contract, choice, and the feed-forwards that use it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward

from uniref_fast import native, ops
from uniref_fast.models.eight_bit import feed_forward
from uniref_fast.models.tanh_gelu import runs_native_activation
from uniref_fast.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not native.has_gelu(), reason="not built")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient(dtype):
    x, upstream = torch.randn(2, 5, 3, 7).to(dtype)
    results = []
    for impl, wide in (("native", x), ("reference", x), ("reference", x.double())):
        leaf = wide.clone().requires_grad_()
        out = ops.gelu(leaf, impl=impl)
        results.append((out.detach(), torch.autograd.grad(out, leaf, upstream.to(wide.dtype))[0]))
    for ours, eager, oracle in zip(*results, strict=True):
        assert_within_budget(ours, eager, oracle)
    assert torch.equal(results[0][0], native.gelu(x))
    assert torch.equal(ops.gelu(x, impl="reference"), F.gelu(x, approximate="tanh"))


@pytest.mark.slow
def test_torch_library_contract():
    torch.library.opcheck(torch.ops.uniref_fast.gelu.default, (torch.randn(3, 5, requires_grad=True),))


@pytest.mark.slow
def test_under_torch_compile():
    x = torch.randn(3, 5, requires_grad=True)
    out = torch.compile(lambda x: ops.gelu(x * 2).sin(), backend="aot_eager", fullgraph=True)(x)
    expected = ops.gelu(x * 2).sin()
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (out, expected)))


def test_choice(monkeypatch):
    x = torch.randn(4)
    assert torch.equal(ops.gelu(x.double()), F.gelu(x.double(), approximate="tanh"))
    with pytest.raises(ValueError, match="'reference' and 'native', got impl='triton'"):
        ops.gelu(x, impl="triton")
    with pytest.raises(ValueError, match="native kernels take float32 and bfloat16"):
        ops.gelu(x.double(), impl="native")
    monkeypatch.setattr(native, "has_gelu", lambda: False)
    assert torch.equal(ops.gelu(x), F.gelu(x, approximate="tanh"))
    with pytest.raises(ValueError, match="older than this op"):
        ops.gelu(x, impl="native")


# ---- feed-forwards ----


@pytest.fixture
def mlp():
    return FeedForward(16, 16, activation_fn="gelu-approximate").requires_grad_(False).eval()


@pytest.fixture
def called(monkeypatch):
    """Inputs of `ops.gelu`."""
    seen = []
    monkeypatch.setattr(ops, "gelu", lambda x, own=ops.gelu: (seen.append(x), own(x))[1])
    return seen


def test_a_feed_forward_uses_it(mlp, called):
    x = torch.randn(5, 16)
    torch.testing.assert_close(feed_forward(mlp, x, None), mlp(x), rtol=1e-5, atol=1e-6)
    assert len(called) == 1
    for impl in ("reference", "triton"):
        assert torch.equal(feed_forward(mlp, x, impl), mlp(x))
    compiled = torch.compile(lambda x: feed_forward(mlp, x, None), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), mlp(x))
    assert torch.equal(feed_forward(mlp.double(), x.double(), None), mlp(x.double()))
    other = FeedForward(16, 16, activation_fn="gelu").eval()
    assert torch.equal(feed_forward(other, x, None), other(x))
    assert len(called) == 1


@pytest.mark.parametrize("place", ["", "net.0", "net.1"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "global hook"])
def test_hooks_and_own_forwards_of_a_feed_forward_run(mlp, called, place, kind):
    x, module = torch.randn(5, 16), mlp.get_submodule(place)
    if kind == "hook":
        module.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif kind == "forward":
        module.forward = lambda x, own=module.forward: 2 * own(x)
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda each, args, out: 2 * out if each is module else None
        )
    out, expected = feed_forward(mlp, x, None), mlp(x)
    if kind == "global hook":
        handle.remove()
    assert torch.equal(out, expected) and not called


@pytest.mark.parametrize("owner, name", [(FeedForward, "forward"), (GELU, "forward"), (GELU, "gelu"), (F, "gelu")])
def test_replaced_code_of_a_feed_forward_runs(mlp, called, monkeypatch, owner, name):
    x, own = torch.randn(5, 16), getattr(owner, name)
    plain = mlp(x)

    @functools.wraps(own)
    def replaced(*args, **kwargs):
        return 2 * own(*args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)
    assert torch.equal(feed_forward(mlp, x, None), mlp(x)) and not torch.equal(mlp(x), plain) and not called


def test_dropout_of_a_feed_forward_runs(called):
    mlp = FeedForward(16, 16, activation_fn="gelu-approximate", dropout=0.5).train()
    x = torch.randn(5, 16)
    torch.manual_seed(1)
    out = feed_forward(mlp, x, None)
    torch.manual_seed(1)
    assert torch.equal(out, mlp(x)) and not called


# ---- activations of blocks with one stream ----


@pytest.mark.parametrize("kind", ["plain", "hook", "forward", "class", "erf", "double", "reference", "replaced", "F"])
def test_which_activations_use_it(kind, monkeypatch):
    gelu, x, impl = torch.nn.GELU(approximate="tanh"), torch.randn(5, 16), None
    if kind == "hook":
        gelu.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "forward":
        gelu.forward = lambda x: x
    elif kind == "class":
        gelu = GELU(16, 16, approximate="tanh")
    elif kind == "erf":
        gelu.approximate = "none"
    elif kind == "double":
        x = x.double()
    elif kind == "reference":
        impl = kind
    elif kind == "replaced":
        monkeypatch.setattr(torch.nn.GELU, "forward", functools.wraps(gelu.forward)(lambda self, x: x))
    elif kind == "F":
        monkeypatch.setattr(F, "gelu", lambda x, approximate: x)
    assert runs_native_activation(gelu, x, impl) == (kind == "plain")
