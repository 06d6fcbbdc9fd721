"""The built-in model: a small QwenImageEditPlusPipeline that runs in seconds on a CPU.

    pipe = uniref_fast.builtin.load()
    pipe([first, second], "put the owl of picture 1 left of the rocket of picture 2", num_inference_steps=8).images[0]

Importing this package imports neither torch nor diffusers; the functions do.
"""

from .store import AREAS_KEY, build, is_builtin_folder, load, recorded_areas, weights_status, write

__all__ = [
    "AREAS_KEY",
    "BuiltinProcessor",
    "SmallQwenImageEditPlusPipeline",
    "build",
    "is_builtin_folder",
    "load",
    "recorded_areas",
    "weights_status",
    "write",
]


def __getattr__(name: str):
    if name == "SmallQwenImageEditPlusPipeline":
        from .pipeline import SmallQwenImageEditPlusPipeline

        return SmallQwenImageEditPlusPipeline
    if name == "BuiltinProcessor":
        from .processor import BuiltinProcessor

        return BuiltinProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
