"""Pipelines in fewer bits, quantised by torchao or bitsandbytes while diffusers loads them, and what a device can run.

`--quantisation int8|fp8|nf4` stores the Linears of the text encoder and of the transformer's blocks in fewer bits. The
layers outside of the blocks stay in 16 bits: they are few, and every token passes through them. `patch` and `edit` take
any other format that diffusers loads as well (docs/quantised.md).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

__all__ = ["NAMES", "check_unquantised", "outside", "pipeline_config", "planned_configs", "trials"]

NAMES = ("int8", "fp8", "nf4")
"""Values of `--quantisation`: 8-bit integers and floats by torchao, 4-bit values by bitsandbytes; weights only."""

PACKAGES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "gguf": "gguf", "optimum.quanto": "optimum-quanto"}
"""Names of the libraries as they are imported and as they are installed."""

LOADED_ON_GPU = "diffusers loads it onto a GPU only; the library itself runs"


def pipeline_config(name: str, dtype: torch.dtype, device: str) -> Any:
    """Return the configuration with which diffusers loads a pipeline in fewer bits.

    Args:
        name: One of `NAMES`.
        dtype: Dtype of the computation.
        device: Device that the pipeline will run on.

    Raises:
        ValueError: If the library is missing, or diffusers does not load the format onto the device.
    """
    from diffusers.quantizers import PipelineQuantizationConfig

    package = "bitsandbytes" if name == "nf4" else "torchao"
    if reason := _missing(package):
        raise ValueError(f"--quantisation {name} needs {package}, which is {reason}")
    if name == "nf4" and torch.device(device).type == "cpu":
        raise ValueError(
            f"--quantisation nf4 needs a GPU: diffusers loads no weights of bitsandbytes onto {device}; int8 and fp8 "
            "work there"
        )
    return PipelineQuantizationConfig(quant_mapping=_configs(name, dtype))


def outside() -> list[str]:
    """Return the names of the modules outside of the blocks of the transformers of all families.

    They are not quantised. No module of a block has one of these names.
    """
    from uniref_fast.models.families import families

    return [*dict.fromkeys(name for family in families() for name in family.packed.ends)]


def check_unquantised(given: str, transformer: Mapping[str, Any]) -> None:
    """Raise ValueError if the configuration of a transformer says that it is quantised already.

    Args:
        given: Name of the pipeline in the message.
        transformer: Content of `transformer/config.json`.
    """
    if found := transformer.get("quantization_config"):
        raise ValueError(f"{given} is quantised already ({found.get('quant_method')}); leave out the quantisation")


def _configs(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the configurations of the parts of a pipeline, of the classes of diffusers and of transformers."""
    import diffusers
    import transformers

    if name == "nf4":
        options: dict[str, Any] = {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }  # fmt: skip
        return {
            "transformer": diffusers.BitsAndBytesConfig(**options, llm_int8_skip_modules=outside()),
            "text_encoder": transformers.BitsAndBytesConfig(**options),
        }
    import torchao.quantization as torchao

    kind = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}[name]
    return {
        "transformer": diffusers.TorchAoConfig(kind(), modules_to_not_convert=outside()),
        "text_encoder": transformers.TorchAoConfig(kind()),
    }


def planned_configs(name: str) -> dict[str, dict[str, Any]]:
    """Return what the configuration files of the parts of a pipeline say once they are saved in a format.

    Args:
        name: One of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"unknown quantisation {name!r}; known: {', '.join(NAMES)}")
    if name == "nf4":
        common: dict[str, Any] = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True,
        }  # fmt: skip
        return {"transformer": common | {"llm_int8_skip_modules": outside()}, "text_encoder": common}
    common = {"quant_method": "torchao", "quant_type": {"int8": "int8_weight_only", "fp8": "float8_weight_only"}[name]}
    return {"transformer": common | {"modules_to_not_convert": outside()}, "text_encoder": common}


# ---- what a device can run


def trials(device: str) -> dict[str, str | None]:
    """Try a product of each format on a device, and return the reason why it does not work, or None, by format.

    Args:
        device: "cpu" or "cuda".
    """
    found: dict[str, str | None] = {}
    for name, (package, quantised) in _FORMATS.items():
        found[name] = _missing(package)
        if found[name] is None:
            with _quiet():
                found[name] = _failure(quantised, device)
    return found


def _missing(package: str) -> str | None:
    try:
        metadata.version(PACKAGES[package])
    except metadata.PackageNotFoundError:
        return f"not installed: pip install {PACKAGES[package]}"
    return None


def _failure(quantised: Callable[[nn.Linear, str], nn.Module], device: str) -> str | None:
    try:
        linear = quantised(nn.Linear(256, 128, dtype=torch.bfloat16).requires_grad_(False), device).eval()
        with torch.no_grad():
            finite = bool(linear(torch.ones(32, 256, dtype=torch.bfloat16, device=device)).isfinite().all())
    except Exception as error:  # whatever a library or its extension raises on this machine
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first}".rstrip(": ")
    if not finite:
        return "its results are not finite"
    return LOADED_ON_GPU if device == "cpu" and "bitsandbytes" in type(linear).__module__ else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings that libraries give when they are imported and tried."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _torchao(kind: str, **options: str) -> Callable[[nn.Linear, str], nn.Module]:
    def quantised(linear: nn.Linear, device: str) -> nn.Module:
        library: Any = importlib.import_module("torchao.quantization")
        config = getattr(library, kind)(**{name: getattr(library, value)() for name, value in options.items()})
        config.set_inductor_config = False
        library.quantize_(linear.to(device), config)
        return linear

    return quantised


def _four_bit(linear: nn.Linear, device: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    new: Any = Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
    new.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return new.to(device)


def _eight_bit(linear: nn.Linear, device: str) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    new: Any = Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0)
    new.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return new.to(device)


def _gguf(linear: nn.Linear, device: str) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    form = gguf.GGMLQuantizationType.Q8_0
    values = torch.from_numpy(gguf.quants.quantize(linear.weight.float().numpy(), form))
    new = GGUFLinear(linear.in_features, linear.out_features, compute_dtype=torch.bfloat16)
    new._parameters["weight"] = GGUFParameter(values, quant_type=form)
    return new.to(device)


def _quanto(linear: nn.Linear, device: str) -> nn.Module:
    from optimum import quanto

    holder = nn.Sequential(linear.to(device))
    quanto.quantize(holder, weights=quanto.qint8)
    quanto.freeze(holder)
    return holder


_FORMATS: dict[str, tuple[str, Callable[[nn.Linear, str], nn.Module]]] = {
    "torchao int8": ("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao int8 dynamic": ("torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao float8": ("torchao", _torchao("Float8WeightOnlyConfig")),
    "torchao float8 dynamic": ("torchao", _torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow")),
    "torchao int4": ("torchao", _torchao("Int4WeightOnlyConfig")),
    "bitsandbytes nf4": ("bitsandbytes", _four_bit),
    "bitsandbytes int8": ("bitsandbytes", _eight_bit),
    "GGUF": ("gguf", _gguf),
    "quanto int8": ("optimum.quanto", _quanto),
}
