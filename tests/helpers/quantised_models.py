"""Small transformers, quantised by each library that diffusers loads."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    GGUFQuantizationConfig,
    QuantoConfig,
    QwenImageTransformer2DModel,
    TorchAoConfig,
)
from torch import nn

from uniref_fast.builtin.components import TEXT_DIM

CONFIG = dict(
    patch_size=2, in_channels=64, out_channels=16, num_layers=3, attention_head_dim=32, num_attention_heads=4,
    joint_attention_dim=TEXT_DIM, axes_dims_rope=(8, 12, 12), zero_cond_t=True,
)  # fmt: skip
"""A transformer for the other parts of the built-in pipeline; its widths are multiples of the blocks of all formats."""

DTYPE = torch.bfloat16


def build(dtype=DTYPE):
    """Return the transformer before it is quantised; its norms and biases are random too."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.eval().to(dtype)


def _pretrained(folder: Path, config: Any, **options: Any) -> Any:
    return QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", quantization_config=config, torch_dtype=DTYPE, **options
    )


def _torchao(name: str, **options: Any) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        import torchao.quantization as torchao

        config = getattr(torchao, name)(**{key: make(torchao) for key, make in options.items()})
        return _pretrained(folder, TorchAoConfig(config))

    return load


def _torchao_in_place(folder: Path) -> Any:
    import torchao.quantization as torchao

    model = build()
    torchao.quantize_(model.transformer_blocks, torchao.Int8WeightOnlyConfig())
    return model


@contextlib.contextmanager
def without_gpu_check() -> Iterator[dict[str, Any]]:
    """Let diffusers load weights of bitsandbytes onto a CPU, where the library runs and diffusers refuses to load it.

    Yields:
        Options of `from_pretrained`.
    """
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    with pytest.MonkeyPatch.context() as patched:
        for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
            patched.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
        yield {"device_map": {"": "cpu"}}


def _bitsandbytes(**options: Any) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        with without_gpu_check() as placed:
            return _pretrained(folder, BitsAndBytesConfig(**options), **placed)

    return load


def _quanto(kind: str) -> Callable[[Path], Any]:
    return lambda folder: _pretrained(folder, QuantoConfig(kind))


def _gguf(kind: str) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            write_gguf(build(torch.float32), path, kind)
        return QwenImageTransformer2DModel.from_single_file(
            str(path), config=str(folder / "transformer"), torch_dtype=DTYPE,
            quantization_config=GGUFQuantizationConfig(compute_dtype=DTYPE),
        )  # fmt: skip

    return load


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """Write a transformer as a GGUF file: the Linears of the blocks in a format, everything else in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image")
    form = gguf.GGMLQuantizationType[kind]
    for name, value in model.state_dict().items():
        quantised = name.startswith("transformer_blocks") and value.ndim == 2
        data = value.numpy()
        if quantised:
            writer.add_tensor(name, gguf.quants.quantize(data, form), raw_dtype=form)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def enable_casting(model: Any) -> Any:
    """Store the Linears of a model in 8 bits, which are cast to 16 bits for each call; return the model."""
    model.enable_layerwise_casting(torch.float8_e4m3fn, DTYPE)
    return model


class LowRankLinear(nn.Module):
    """A Linear with the interface of those of SVDQuant: 4-bit weights, a low-rank part, and no `weight`."""

    def __init__(self, linear: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        self.proj_down = nn.Parameter(v[:rank].T.to(DTYPE).contiguous(), requires_grad=False)
        self.proj_up = nn.Parameter((u[:, :rank] * s[:rank]).to(DTYPE), requires_grad=False)
        rest = (weight - (u[:, :rank] * s[:rank]) @ v[:rank]).unflatten(1, (-1, 32))
        scales = rest.abs().amax(-1, keepdim=True) / 7
        low, high = ((rest / scales).round().to(torch.int8).flatten(1) + 8).unflatten(1, (-1, 2)).unbind(-1)
        self.qweight = nn.Parameter(low | high << 4, requires_grad=False)  # two values a byte, int8 [out, in / 2]
        self.wscales = nn.Parameter(scales.squeeze(-1).to(DTYPE), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = torch.stack([self.qweight & 15, self.qweight >> 4 & 15], dim=-1).flatten(1) - 8
        weight = (values.unflatten(1, (-1, 32)) * self.wscales[..., None]).flatten(1).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias) + (x @ self.proj_down) @ self.proj_up.T


def _low_rank(folder: Path) -> Any:
    model = build()
    for parent in list(model.transformer_blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowRankLinear(child))
    return model


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to quantise a transformer.

    Attributes:
        load: Function that returns the quantised transformer, given the folder of a pipeline.
        package: Package that it needs, or None.
        by_row: Its products of one row do not depend on the other rows.
    """

    load: Callable[[Path], Any]
    package: str | None = None
    by_row: bool = True


FORMATS = {
    "torchao int8": Format(_torchao("Int8WeightOnlyConfig"), "torchao"),
    "torchao int8, quantize_": Format(_torchao_in_place, "torchao"),
    "torchao int8 dynamic": Format(_torchao("Int8DynamicActivationInt8WeightConfig"), "torchao"),
    "torchao float8": Format(_torchao("Float8WeightOnlyConfig"), "torchao"),
    "torchao int4": Format(
        _torchao("IntxWeightOnlyConfig", weight_dtype=lambda _: torch.int4, granularity=lambda ao: ao.PerGroup(32)),
        "torchao",
    ),
    "bitsandbytes nf4": Format(
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE), "bitsandbytes"
    ),
    "bitsandbytes nf4 double": Format(
        _bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE, bnb_4bit_use_double_quant=True
        ),
        "bitsandbytes",
    ),
    "bitsandbytes int8": Format(_bitsandbytes(load_in_8bit=True), "bitsandbytes", by_row=False),
    "bitsandbytes int8, threshold 0": Format(_bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0), "bitsandbytes"),
    "GGUF Q8_0": Format(_gguf("Q8_0"), "gguf"),
    "GGUF Q4_0": Format(_gguf("Q4_0"), "gguf"),
    "quanto int8": Format(_quanto("int8"), "optimum.quanto"),
    "quanto float8": Format(_quanto("float8"), "optimum.quanto"),
    "layerwise casting": Format(lambda folder: enable_casting(build())),
    "SVDQuant interface": Format(_low_rank),
}


def load(name: str, folder: Path) -> Any:
    """Return a new quantised transformer, or skip the test if the library of its format is not installed."""
    package = FORMATS[name].package
    if package is not None and importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    return FORMATS[name].load(folder)
