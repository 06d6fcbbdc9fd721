"""A call goes through the dispatcher of PyTorch if something besides the kernel has to see it, and else is direct."""

from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from uniref_fast import native, ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.visibility import plan

LAYOUT = SelfLayout.qwen([Sample(2, (1, 2, 3), ((1, 1, 2),)), Sample(3, (1, 2, 2))])
PLAN, ROTARY = plan(LAYOUT), LAYOUT.rotary((4, 2, 2), "cpu")
N, TEXT = LAYOUT.joint_length, LAYOUT.text_length
X, Y, Q = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((5, 8), (5, 8), (N, 2, 8)))
TABLE, WEIGHT = X[:1].clone(), torch.ones(8)


def qk_norm_rope(x):
    return ops.qk_norm_rope((x[:TEXT],) * 3, (x[TEXT:],) * 3, (WEIGHT, None), (None, WEIGHT), LAYOUT, ROTARY)


CALLS = {
    "gelu": (lambda x: ops.gelu(x), X),
    "norm_modulate": (lambda x: ops.norm_modulate(x, TABLE, TABLE), X),
    "gate_residual": (lambda x: ops.gate_residual(x, Y, TABLE), X),
    "gate_residual_norm_modulate": (lambda x: ops.gate_residual_norm_modulate(x, Y, TABLE, None, TABLE), X),
    "qk_norm_rope": (qk_norm_rope, Q),
    "segment_attention": (lambda x: ops.segment_attention(x, x, x, PLAN, impl="native"), Q),
    "dense_attention": (lambda x: ops.segment_attention(x, x, x, PLAN, impl="dense"), Q),
}
each_op = pytest.mark.parametrize("name", CALLS)
pytestmark = pytest.mark.skipif(not native.available(), reason="not built")


class Recorder(TorchDispatchMode):
    def __init__(self):
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(op.name())
        return op(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """A subclass with its own operators, as distributed and quantised tensors have."""

    seen: ClassVar[set[str]] = set()

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.held = inner

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        cls.seen.add(op.name())
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, op(*args, **kwargs))


def flat(result):
    parts = [result] if isinstance(result, torch.Tensor) else result
    return torch.cat([getattr(part, "held", part).flatten() for part in parts])


@each_op
def test_modes_subclasses_and_the_profiler_see_the_op(name):
    call, x = CALLS[name]
    op, direct = f"uniref_fast::{name}", flat(call(x))
    with Recorder() as mode:
        assert torch.equal(flat(call(x)), direct) and op in mode.seen
    Wrapper.seen.clear()
    assert torch.equal(flat(call(Wrapper(x))), direct) and op in Wrapper.seen
    with profile(activities=[ProfilerActivity.CPU]) as record:
        assert torch.equal(flat(call(x)), direct)
    assert op in {event.key for event in record.key_averages()}


@each_op
def test_no_values_are_computed_of_fake_and_meta_tensors(name):
    call, x = CALLS[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
        assert flat(fake).shape == flat(call(x)).shape
    if name in ("norm_modulate", "segment_attention"):  # the others have operands of their own on the CPU
        meta = x.to("meta")
        out = ops.norm_modulate(meta, None, meta[:1]) if name == "norm_modulate" else call(meta)
        assert out.is_meta and out.shape == meta.shape


@each_op
def test_gradients_are_recorded_only_where_they_are_taken(name):
    call, x = CALLS[name]
    assert not flat(call(x)).requires_grad
    leaf = x.clone().requires_grad_()
    assert torch.equal(flat(call(leaf)), flat(call(x))) and flat(call(leaf)).requires_grad
    with torch.no_grad():
        assert not flat(call(leaf)).requires_grad
    with torch.inference_mode():
        assert flat(call(x)).is_inference()


@each_op
def test_other_calls_do_not_enter_the_dispatcher(name, monkeypatch):
    call, x = CALLS[name]
    op = getattr(torch.ops.uniref_fast, name)
    monkeypatch.setattr(torch.ops.uniref_fast, name, lambda *args: pytest.fail(f"{op} was dispatched"))
    for leaf in (x, torch.nn.Parameter(x, requires_grad=False)):
        assert torch.isfinite(flat(call(leaf))).all()
