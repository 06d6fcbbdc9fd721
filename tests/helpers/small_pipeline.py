"""A pipeline that trains several times as fast as the built-in one, of which it has the encoders."""

import functools
import tempfile
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from uniref_fast import builtin
from uniref_fast.builtin import components, store
from uniref_fast.loading import load_pipeline

_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def folder():
    """Return the folder of a pipeline with an untrained transformer of two blocks with two heads."""
    pipe = builtin.load(torch.bfloat16)
    sizes = {**components.TRANSFORMER, "num_layers": 2, "num_attention_heads": 2}
    areas = pipe.transformer.config[store.AREAS_KEY]
    pipe.transformer = QwenImageTransformer2DModel(**sizes).eval()
    pipe.transformer.register_to_config(**{store.AREAS_KEY: areas})
    components.initialise(pipe.transformer, 0, "transformer")
    pipe.transformer.to(torch.bfloat16)
    return store.write(pipe, Path(_FOLDER.name) / "model", weights="untrained")


def load(dtype=torch.float32):
    """Return that pipeline."""
    return load_pipeline(str(folder()), dtype, "cpu")
