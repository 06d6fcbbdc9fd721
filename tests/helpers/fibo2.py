"""Small Fibo 2 models of `uniref_fast.random_models`, as tests take them."""

from uniref_fast.random_models import fibo2
from uniref_fast.random_models.fibo2 import BUNDLE, transformer

__all__ = ["BUNDLE", "pipeline", "transformer"]


def pipeline(transformer):
    """Return a small pipeline around a transformer."""
    pipe = fibo2.pipeline_of(transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
