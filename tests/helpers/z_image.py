"""Small Z-Image models of `uniref_fast.random_models`, as tests take them."""

from uniref_fast.random_models import z_image
from uniref_fast.random_models.z_image import CAPTION, FEATURES, transformer

__all__ = ["CAPTION", "FEATURES", "pipeline", "transformer"]


def pipeline(transformer, name="ZImageOmniPipeline"):
    """Return a small pipeline of a class around a transformer."""
    pipe = z_image.pipeline_of(transformer, name)
    pipe.set_progress_bar_config(disable=True)
    return pipe
