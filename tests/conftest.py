import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when a kernel is decorated, so it must be set before any of them is imported.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture
def nan_memory(monkeypatch):
    """New memory is NaN, so that a value nobody wrote fails the test."""
    original = torch.empty

    def empty(*args, **kwargs):
        new = original(*args, **kwargs)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty", empty)
    torch.manual_seed(0)


@pytest.fixture
def rounded_fp8_casts(monkeypatch):
    """Casts to e4m3 round to the nearest value, as on a GPU: those of the interpreter truncate and drop carries."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if target != tl.float8e4nv or source != tl.float32:
            return original(values, source, target, rounding_mode)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def threads():
    """One thread unless a test asks for more: hundreds of tiny oracle calls spend their time waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_transformer():
    """Builds small diffusers transformers with random weights, the biases and norms random too."""
    from diffusers import QwenImageTransformer2DModel

    def build(zero_cond_t=False, layers=3, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        model = QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=48,
            axes_dims_rope=(8, 12, 12),
            zero_cond_t=zero_cond_t,
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
        return model.eval().to(dtype)

    return build


@pytest.fixture(scope="session")
def make_flux2():
    """Builds small FLUX.2 transformers with random weights; head dimensions and ratios are those of the real ones."""
    from flux2 import transformer

    return transformer


@pytest.fixture(scope="session")
def make_flux3():
    """Builds small FLUX.3 transformers with random weights; head dimensions and ratios are those of the real ones."""
    from flux3 import transformer

    return transformer


@pytest.fixture
def linear_by_row(monkeypatch):
    """Linears compute each row by itself: the library's products depend, by rounding, on the number of rows."""
    linear = torch.nn.functional.linear

    def by_row(x, weight, bias=None):
        return torch.cat([linear(row, weight, bias) for row in x.split(1)])

    monkeypatch.setattr(torch.nn.functional, "linear", by_row)


@pytest.fixture(scope="session")
def _builtin_pipe():
    from uniref_fast import builtin

    pipe = builtin.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def builtin_pipe(_builtin_pipe):
    """The small built-in pipeline, unpatched before and after."""
    import uniref_fast

    yield _builtin_pipe
    uniref_fast.unpatch(_builtin_pipe)
