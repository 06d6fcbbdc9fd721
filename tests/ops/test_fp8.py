"""8-bit linears: the quantisation's own bounds, the emulation against float64, the Triton kernels against both."""

import pytest
import torch
import torch.nn.functional as F

from uniref_fast.kernels import fp8 as kernels
from uniref_fast.ops import fp8
from uniref_fast.ops.norm_modulate import gate_residual_reference, norm_modulate_reference

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= fp8.FP8_CAPABILITY
DEVICE = "cuda" if CUDA else "cpu"
IMPLEMENTATIONS = ["reference", "triton"]


pytestmark = pytest.mark.usefixtures("rounded_fp8_casts")


@pytest.fixture(autouse=True)
def no_grad_and_seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def check_quantized(values, row_scale, exact):
    """Every value within half an e4m3 step (3 mantissa bits; the smallest step is 2^-9) of the exact one."""
    assert values.dtype == torch.float8_e4m3fn and row_scale.dtype == torch.float32
    exact = exact.double()
    largest = exact.abs().amax(-1)
    torch.testing.assert_close(row_scale.double(), (largest / 448).clamp(min=fp8.SMALLEST_SCALE), rtol=1e-5, atol=0)
    scaled = exact / row_scale.double()[:, None]
    step = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(min=2.0**-6))) - 3)
    off = (values.double() - scaled).abs() > step / 2 + 1e-4 * scaled.abs()
    assert not off.any(), f"{int(off.sum())} of {off.numel()} off"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize(dtype):
    x = torch.randn(33, 64, device=DEVICE).to(dtype) * torch.logspace(-8, 8, 33, device=DEVICE)[:, None].to(dtype)
    x[3] = 0  # the smallest scale, not 0 / 0
    x[4], x[4, 7] = 0, -1e-25  # one value alone: -448 exactly
    values, row_scale = fp8.quantize_fp8(x, impl="reference")
    check_quantized(values, row_scale, x)
    assert not values[3].float().any() and row_scale[3] == fp8.SMALLEST_SCALE and values[4, 7].float() == -448
    assert (values.float().abs().amax(-1)[x.abs().amax(-1) > 0] == 448).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 16), (21, 96), (5, 130)])  # a row, not a power of two, not a multiple of 16
def test_norm_modulate_fp8(impl, norm, shape):
    dtype = torch.float32 if not CUDA else torch.bfloat16
    n, c = shape
    x, (shift, scale) = torch.randn(n, c, device=DEVICE).to(dtype), torch.randn(2, 3, c, device=DEVICE).to(dtype)
    rows = torch.randint(0, 3, (n,), device=DEVICE, dtype=torch.int32)
    for s in (shift, None):
        values, row_scale = fp8.norm_modulate_fp8(x, s, scale, rows, norm=norm, impl=impl)
        wide = (t if t is None else t.double() for t in (x, s, scale))
        check_quantized(values, row_scale, norm_modulate_reference(*wide, rows, 1e-6, norm == "rms"))


@pytest.mark.parametrize("shape", [(1, 16), (70, 96), (3, 3000)])  # less than a program, rows past it, one row each
def test_quantize_kernel(shape, nan_memory):
    x = torch.randn(shape, device=DEVICE) * torch.logspace(-8, 4, shape[0], device=DEVICE)[:, None]
    x[-1] = 0
    values, row_scale = fp8.quantize_fp8(x, impl="triton")
    check_quantized(values, row_scale, x)
    assert values.is_contiguous() and not values[-1].float().any()


def test_quantize_heads_kernel(nan_memory):
    """Scales are in the order [H, N], and strides of tokens and heads are followed."""
    x = torch.randn(3, 37, 32, device=DEVICE).transpose(0, 1) * torch.logspace(-3, 3, 37, device=DEVICE)[:, None, None]
    values, scale = kernels.quantize_heads_fp8(x)
    assert values.shape == x.shape and scale.shape == (3, 37)
    check_quantized(values.reshape(-1, 32), scale.T.reshape(-1), x.reshape(-1, 32))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gate_residual_norm_modulate_fp8(impl, norm, nan_memory):
    """x' equals the one of the op in 16 bits, and the values are those of `norm_modulate_fp8` on x'."""
    dtype = torch.float32 if not CUDA else torch.bfloat16
    x, y = torch.randn(2, 21, 130, device=DEVICE).to(dtype)
    gate, shift, scale = torch.randn(3, 4, 130, device=DEVICE).to(dtype)
    rows = torch.randint(0, 4, (21,), device=DEVICE, dtype=torch.int32)
    x_out, values, row_scale = fp8.gate_residual_norm_modulate_fp8(x, y, gate, shift, scale, rows, norm=norm, impl=impl)
    wide = [t.double() for t in (x, y, gate)]
    expected = gate_residual_reference(*wide, rows).to(dtype)  # a sum on the other side of a tie differs by one step
    torch.testing.assert_close(x_out, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    wide = [t.double() for t in (x_out, shift, scale)]
    check_quantized(values, row_scale, norm_modulate_reference(*wide, rows, 1e-6, norm == "rms"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_outlier_costs_its_own_row_only(impl):
    """A value of 6e4 in one row leaves the values of all other rows as they are."""
    x = torch.randn(20, 64, device=DEVICE)
    outlier = x.clone()
    outlier[7, 5] = 6e4
    before, after = (fp8.quantize_fp8(t, impl=impl) for t in (x, outlier))
    others = torch.arange(20, device=DEVICE) != 7
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[others].float(), other[others].float())
    assert not torch.equal(before[0][7].float(), after[0][7].float())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gelu_fp8(impl):
    x = torch.randn(9, 200, device=DEVICE) * 3
    x[2] = 0
    values, row_scale = fp8.gelu_fp8(x, impl=impl)
    check_quantized(values, row_scale, F.gelu(x.double(), approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_linear(dtype, with_bias):
    """The product equals float64 of the same 8-bit values; the whole 8-bit linear has its stated error."""
    if CUDA and dtype == torch.float32:
        pytest.skip("row-wise scaling on a GPU gives bfloat16")
    x, w = torch.randn(37, 128, device=DEVICE), torch.randn(48, 128, device=DEVICE)
    bias = torch.randn(48, device=DEVICE) if with_bias else None
    a, b = fp8.quantize_fp8(x), fp8.quantize_fp8(w)
    out = fp8.scaled_linear(*a, *b, bias, dtype)
    same = (a[0].double() @ b[0].double().T) * a[1].double()[:, None] * b[1].double()
    same = same if bias is None else same + bias.double()
    assert out.dtype == dtype
    assert (out.double() - same).abs().max() <= 2 * torch.finfo(dtype).eps * same.abs().max()
    exact = F.linear(x.double(), w.double(), bias if bias is None else bias.double())
    assert (out.double() - exact).norm() / exact.norm() < 0.05


def test_emulated_product_does_not_depend_on_the_other_rows():
    """A row has the same bits alone and among others; a float32 product of the BLAS library does not guarantee it."""
    x, w = torch.randn(300, 512, device=DEVICE), fp8.quantize_fp8(torch.randn(64, 512, device=DEVICE))
    values, scale = fp8.quantize_fp8(x)
    whole = fp8.scaled_linear(values, scale, *w, dtype=torch.float32, impl="reference")
    for rows in (slice(0, 1), slice(7, 24), slice(100, 299)):
        part = fp8.scaled_linear(values[rows], scale[rows], *w, dtype=torch.float32, impl="reference")
        assert torch.equal(part, whole[rows])


@pytest.mark.skipif(CUDA, reason="compares the CPU's emulation")
def test_emulation_is_what_pytorch_computes():
    a, b = fp8.quantize_fp8(torch.randn(32, 64)), fp8.quantize_fp8(torch.randn(16, 64))
    theirs = torch._scaled_mm(a[0], b[0].t(), a[1][:, None], b[1][None], out_dtype=torch.float32)
    torch.testing.assert_close(fp8.scaled_linear(*a, *b, dtype=torch.float32), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm_modulate_fp8", "gate_residual_norm_modulate_fp8", "gelu_fp8", "quantize_fp8"])
def test_torch_library_contract(name):
    x = torch.randn(5, 32, device=DEVICE)
    args = {
        "norm_modulate_fp8": (x, None, x[:2], None, 1e-6, True),
        "gate_residual_norm_modulate_fp8": (x, x, x[:2], None, x[:2], None, 1e-6, True),
    }.get(name, (x,))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.uniref_fast, name).default, args, test_utils=tests)


def test_refusals():
    a, b = fp8.quantize_fp8(torch.randn(4, 32)), fp8.quantize_fp8(torch.randn(16, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8.scaled_linear(*a, *fp8.quantize_fp8(torch.randn(15, 32)))
    with pytest.raises(ValueError, match=r"scales must be \[4\] and \[16\]"):
        fp8.scaled_linear(a[0], a[1][:3], *b)
    with pytest.raises(ValueError, match="float8_e4m3fn, got"):
        fp8.scaled_linear(a[0].float(), a[1], *b)
    for impl in ("native", "dense"):
        with pytest.raises(ValueError, match="a reference and a Triton kernel"):
            fp8.gelu_fp8(torch.randn(4, 32), impl=impl)
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        fp8.gelu_fp8(torch.randn(4, 32, requires_grad=True))
