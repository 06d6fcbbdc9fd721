"""patch on models of every build: quantised, sharded, wrapped, without norms, parameters or blocks, with other eps."""

import math

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from patching import ROUNDING, inputs, run

import uniref_fast
from uniref_fast.patch import replay
from uniref_fast.testing import max_relative_error

QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def pair(make_transformer, change, **options):
    """A stock model and a patched one, both changed before patching."""
    stock, model = make_transformer(True, **options), make_transformer(True, **options)
    for each in (stock, model):
        change(each)
    return stock, model, uniref_fast.patch(model)


def assert_accelerated(stock, model, report, tolerance=1e-4, **given):
    for _ in range(2):
        assert max_relative_error(run(model, **given), run(stock, **given)) < tolerance
    assert report.calls.total() == 2 * len(report.sites) and not report.fallbacks and report.max_rel_error < 4e-2


# ---- parameters of any kind ----


class Int8(torch.Tensor):
    """A quantised weight of the kind that torchao has: no operator but a Linear's takes it."""

    @staticmethod
    def __new__(cls, values, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)

    def __init__(self, values, scale, dtype):
        self.values, self.scale = values, scale

    def __repr__(self):
        return f"Int8({tuple(self.shape)})"

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale, weight.dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return torch.nn.functional.linear(x, weight.values.to(x.dtype) * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantised weight")


def quantise(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(Int8.of(module.weight.data), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_by_a_tensor_subclass(make_transformer, dtype):
    stock, model, report = pair(make_transformer, quantise, dtype=dtype)
    assert isinstance(next(model.parameters()), Int8) and "native when patched" in str(report)
    assert_accelerated(stock, model, report, 1e-4 if dtype == torch.float32 else 3e-2, dtype=dtype)
    assert uniref_fast.unpatch(model) and torch.equal(run(model, dtype=dtype), run(stock, dtype=dtype))


def test_quantised_by_torchao(make_transformer):
    torchao = pytest.importorskip("torchao.quantization")
    stock, model, report = pair(
        make_transformer, lambda each: torchao.quantize_(each, torchao.Int8WeightOnlyConfig()), dtype=torch.bfloat16
    )
    assert_accelerated(stock, model, report, 3e-2, dtype=torch.bfloat16)


class BlockLinear(torch.nn.Module):
    """A Linear of another class with integer storage, as bitsandbytes and GGUF have."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax() / 127
        self.register_buffer("packed", (linear.weight / scale).round().to(torch.int8))
        self.scale, self.bias = float(scale), linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed.to(x.dtype) * self.scale, self.bias)


def replace_linears(model):
    for parent in [module for module in model.modules() if not isinstance(module, BlockLinear)]:
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, BlockLinear(child))


def test_linears_of_another_class(make_transformer):
    assert_accelerated(*pair(make_transformer, replace_linears))


def move_parameters_to_buffers(model):
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.data)


def test_no_parameters_at_all(make_transformer):
    stock, model, report = pair(make_transformer, move_parameters_to_buffers)
    assert not list(model.parameters())
    assert_accelerated(stock, model, report)


@pytest.mark.parametrize("layers", [0, 1])
def test_few_blocks(make_transformer, layers):
    stock, model, report = pair(make_transformer, lambda each: None, layers=layers)
    assert len(report.sites) == 2 * layers and max_relative_error(run(model), run(stock)) < ROUNDING
    assert uniref_fast.unpatch(model)


def test_a_model_on_the_meta_device_is_patched_before_its_weights_come(make_transformer):
    stock, model = make_transformer(True), make_transformer(True)
    weights = model.state_dict()
    model.to("meta")
    report = uniref_fast.patch(model)
    model.load_state_dict(weights, assign=True)
    assert_accelerated(stock, model, report)


# ---- norms ----


@pytest.mark.parametrize(
    "absent", [QK_NORMS, ("norm_q",), ("norm_q", "norm_added_k"), ("norm_added_q", "norm_added_k")]
)
def test_without_qk_norms(make_transformer, absent):
    """The remaining norms keep their own eps."""

    def change(model):
        for block in model.transformer_blocks:
            for name in QK_NORMS:
                getattr(block.attn, name).eps = 0.3
            for name in absent:
                setattr(block.attn, name, None)

    assert_accelerated(*pair(make_transformer, change))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", QK_NORMS)
def test_qk_norms_with_different_eps_run_the_original(make_transformer, name, later):
    def change(model):
        for block in model.transformer_blocks:
            getattr(block.attn, name).eps = 100.0

    stock, model, report = pair(make_transformer, (lambda each: None) if later else change)
    plain = run(make_transformer(True))
    run(model)
    if later:
        for each in (stock, model):
            change(each)
    assert max_relative_error(run(model), run(stock)) < ROUNDING and max_relative_error(run(stock), plain) > 3e-4
    assert any("different eps: [1e-06, 100.0]" in reason for reason in report.fallbacks)


def test_eps_that_changes_for_all_qk_norms(make_transformer):
    stock, model, report = pair(make_transformer, lambda each: None)
    run(model)
    for each in (stock, model):
        for block in each.transformer_blocks:
            for name in QK_NORMS:
                getattr(block.attn, name).eps = 0.5
    assert max_relative_error(run(model), run(stock)) < ROUNDING and not report.fallbacks


@pytest.mark.parametrize("later", [False, True])
def test_four_different_eps_of_the_norms_of_a_block(make_transformer, later):
    def change(model):
        for block in model.transformer_blocks:
            for i, name in enumerate(("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")):
                getattr(block, name).eps = 0.1 * (i + 1)

    stock, model, report = pair(make_transformer, (lambda each: None) if later else change)
    run(model)
    if later:
        for each in (stock, model):
            change(each)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert report.calls.total() == 12 and not report.fallbacks


def affine(channels):
    norm = torch.nn.LayerNorm(channels)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "place, norm, reason",
    [
        ("img_norm1", lambda: affine(128), "a block's norm is LayerNorm"),
        ("txt_norm2", torch.nn.Identity, "a block's norm is a Identity"),
        ("attn.norm_q", lambda: torch.nn.LayerNorm(32), "a QK norm is a LayerNorm"),
        ("attn.norm_k", lambda: RMSNorm(32, eps=1e-6, elementwise_affine=False), "a QK norm has no weight"),
        ("attn.norm_added_q", lambda: RMSNorm(32, eps=1e-6, bias=True), "a QK norm has no weight, a bias"),
    ],
)
def test_other_norms_run_the_original(make_transformer, place, norm, reason, later):
    def change(model):
        torch.manual_seed(2)
        new = norm()
        for parameter in new.parameters():
            torch.nn.init.normal_(parameter)
        parent, name = place.rpartition(".")[::2]
        setattr(model.transformer_blocks[1].get_submodule(parent), name, new)

    stock, model, report = pair(make_transformer, (lambda each: None) if later else change)
    run(model)
    if later:
        for each in (stock, model):
            change(each)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert any(reason in given for given in report.fallbacks), report


def test_a_norm_with_a_replaced_forward_runs_the_original(make_transformer):
    stock, model, report = pair(make_transformer, lambda each: None)
    run(model)
    for each in (stock, model):
        for norm in (each.transformer_blocks[0].txt_norm1, each.transformer_blocks[1].attn.norm_k):
            norm.forward = lambda x, own=norm.forward: 2 * own(x)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert sum("has its own forward" in reason for reason in report.fallbacks) == 2


# ---- streams that are not laid out as usual ----


def test_strided_streams_and_modulation(make_transformer):
    """Hooks may return tensors of any layout."""

    def transposed(module, args, out):
        return out.transpose(-1, -2).contiguous().transpose(-1, -2)

    def change(model):
        for name in ("img_in", "transformer_blocks.1.img_mod", "transformer_blocks.0.attn.to_v",
                     "transformer_blocks.2.txt_mlp", "transformer_blocks.1.attn.to_add_out"):  # fmt: skip
            model.get_submodule(name).register_forward_hook(transposed)

    assert_accelerated(*pair(make_transformer, change))


def test_outputs_may_be_changed_in_place(make_transformer):
    """A block's outputs are, like the original's, no views, which autograd and FSDP warn about."""
    _, model, _ = pair(make_transformer, lambda each: None, layers=1)
    outputs = []
    model.transformer_blocks[0].register_forward_hook(lambda module, args, out: outputs.extend(out))
    model(**inputs())
    assert len(outputs) == 2 and not any(out._is_view() for out in outputs)


# ---- sharded and wrapped models ----


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("places", ["model", "blocks", "attention"])
def test_fully_shard(make_transformer, one_rank, places, patch_first):
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        for block in model.transformer_blocks:
            if places == "attention":
                fully_shard(block.attn, mesh=one_rank)
            if places != "model":
                fully_shard(block, mesh=one_rank)
        fully_shard(model, mesh=one_rank)

    stock, model = make_transformer(True), make_transformer(True)
    expected = stock(**inputs())[0]
    expected.square().mean().backward()
    if patch_first:
        report = uniref_fast.patch(model)
        shard(model)
        assert uniref_fast.patch(model) is report
    else:
        shard(model)
        report = uniref_fast.patch(model)
    out = model(**inputs())[0]
    out.square().mean().backward()
    assert max_relative_error(out, expected) < ROUNDING and report.max_rel_error < ROUNDING
    assert report.calls == {"native": 6} and not report.fallbacks
    for (name, parameter), other in zip(stock.named_parameters(), model.parameters(), strict=True):
        if parameter.grad is not None:
            grad = other.grad.full_tensor()
            assert (grad - parameter.grad).abs().max() < 1e-4 * max(parameter.grad.abs().max().item(), 1e-3), name
    assert uniref_fast.unpatch(model) and not uniref_fast.unpatch(model)
    assert torch.equal(run(model), run(stock)) and report.calls.total() == 6


def test_edit_says_that_it_takes_no_sharded_model(make_transformer, one_rank):
    from torch.distributed.fsdp import fully_shard

    from uniref_fast.models import find_transformer

    model = make_transformer()
    fully_shard(model, mesh=one_rank)
    with pytest.raises(TypeError, match="sharded by fully_shard"):
        find_transformer(model)


def test_wrappers_that_hold_the_model_are_named(make_transformer):
    model = make_transformer(layers=1)
    with pytest.raises(TypeError, match="it wraps a QwenImageTransformer2DModel; use its attribute `module`"):
        uniref_fast.patch(torch.nn.DataParallel(model))
    wrapped = torch.nn.Module()
    wrapped.module = model
    with pytest.raises(TypeError, match="use its attribute `module`"):
        uniref_fast.unpatch(wrapped)


def test_differences_are_the_same_in_parts_and_for_every_shape(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(replay, "PART", 5)  # parts that end within a row
    for shape in ((), (0,), (2, 0), (7,), (2, 3, 4)):
        expected = torch.randn(shape)
        ours = expected + 0.1 * torch.randn(shape)
        assert replay._difference(ours, expected) == pytest.approx(max_relative_error(ours, expected), rel=1e-12)
    ours, expected = torch.randn(4, 3).T, torch.randn(4, 3).T  # not contiguous
    assert replay._difference(ours, expected) == pytest.approx(max_relative_error(ours, expected), rel=1e-12)
    infinite = expected.clone()
    infinite[2, 3] = torch.inf  # in the last part
    assert replay._difference(expected, infinite) == math.inf
    assert replay._difference(infinite, infinite.clone()) == 0.0
