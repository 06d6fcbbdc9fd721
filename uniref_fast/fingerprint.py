"""Digests that identify the contents of a model, an image or a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from uniref_fast.quantised import stored_tensors

__all__ = ["content_key", "fingerprint", "weights_fingerprint"]


def content_key(*parts: Any) -> str:
    """Return a hex digest of texts and numbers, which depends on their order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Return a hex digest of a model's configuration and of dtype, shape, first and last values of each weight.

    Of a quantised weight, these are those of the tensors that it is stored in.
    """
    config: Any = model.config
    text = config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(dict(config), default=str)
    digest = hashlib.sha256(text.encode())
    for part in _weights(model):
        digest.update(part)
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hex digest of dtype, shape, first and last values of each weight of a model."""
    return hashlib.sha256(b"".join(_weights(model))).hexdigest()


def _weights(model: nn.Module) -> Iterator[bytes]:
    for name, parameter in model.named_parameters():
        for tensor in stored_tensors(parameter):
            flat = tensor.detach().as_subclass(torch.Tensor).flatten()
            ends = torch.cat([flat[:8], flat[-8:]]).float().cpu()
            yield f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + ends.numpy().tobytes()
