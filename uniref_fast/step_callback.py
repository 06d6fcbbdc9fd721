"""`callback_on_step_end` of a request: the arguments, the tensors and the interruption are those of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from uniref_fast.memo import version_of

__all__ = ["TENSOR_INPUTS", "StepCallback", "StepPipeline"]

TENSOR_INPUTS = ("latents", "prompt_embeds")
"""Tensors that a callback may read and replace, those of diffusers' `QwenImageEditPlusPipeline`."""


class StepPipeline:
    """A pipeline, as the callback of one edit sees it.

    Attributes are those of the pipeline, but `_interrupt`, the scheduler, the timesteps and the guidance scale belong
    to the edit. Setting `_interrupt` ends the edit; nothing else can be set, because all edits share the pipeline.

    Args:
        pipe: The pipeline.
        edit: The `Edit`, after a step.
    """

    def __init__(self, pipe: Any, edit: Any) -> None:
        own = {"scheduler": edit.scheduler, "num_timesteps": len(edit.timesteps), "_num_timesteps": len(edit.timesteps),
               "_current_timestep": edit.timesteps[edit.steps - 1], "_guidance_scale": edit.request.true_cfg_scale,
               "current_timestep": edit.timesteps[edit.steps - 1],
               "guidance_scale": edit.request.true_cfg_scale, "_interrupt": False, "interrupt": False}  # fmt: skip
        object.__setattr__(self, "_pipe", pipe)
        object.__setattr__(self, "_own", own)

    def __getattr__(self, name: str) -> Any:
        return self._own[name] if name in self._own else getattr(self._pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_interrupt":
            raise AttributeError(
                f"a callback cannot set {name!r} of the pipeline, which all running edits share; it can set "
                "_interrupt=True, which ends its own edit"
            )
        self._own["_interrupt"] = self._own["interrupt"] = bool(value)


class StepCallback:
    """Callback of an edit.

    Args:
        pipe: Pipeline of the edit.
        function: `callback_on_step_end` of the request.
        names: `callback_on_step_end_tensor_inputs` of the request.
    """

    def __init__(self, pipe: Any, function: Callable[..., Any], names: Sequence[str]) -> None:
        self.pipe, self.function, self.names = pipe, function, tuple(names)

    @property
    def may_change_prompts(self) -> bool:
        """True if the callback is given the embeddings, which it may also change in place."""
        return "prompt_embeds" in self.names

    def __call__(self, edit: Any) -> None:
        """Call the function after a step of an edit, and apply what it returns.

        Args:
            edit: The `Edit`.

        Raises:
            TypeError: If the function returns no mapping, or a value that is not a tensor.
            ValueError: If it returns an unknown name or a tensor of another shape.
        """
        given = {"latents": edit.latents, "prompt_embeds": edit.prompts[0][None]}
        view, before = StepPipeline(self.pipe, edit), _version(edit.prompts[0])
        step = edit.steps - 1
        returned = self.function(view, step, edit.timesteps[step], {name: given[name] for name in self.names})
        if returned is None:
            returned = {}
        if not isinstance(returned, Mapping):
            raise TypeError(f"callback_on_step_end must return a dict of tensors, got {type(returned).__name__}")
        for name, value in returned.items():
            if name not in TENSOR_INPUTS:
                raise ValueError(
                    f"callback_on_step_end returned {name!r}; it can replace {' and '.join(TENSOR_INPUTS)}"
                )
            old = given[name]
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"callback_on_step_end must return a tensor as {name}, got {type(value).__name__}")
            if value.shape != old.shape:
                raise ValueError(
                    f"callback_on_step_end returned {name} of shape {list(value.shape)} instead of {list(old.shape)}"
                )
            value = value.to(old.device, old.dtype)
            if name == "latents":
                edit.latents = value
            elif value is not old:
                edit.prompts[0] = value[0]
        if self.may_change_prompts and _version(edit.prompts[0]) != before:
            for store in edit.kept or ():  # its keys and values may depend on the text
                store.refresh_now()
        edit.is_stopped = view._interrupt


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    """Return numbers that differ after a tensor was replaced or changed in place."""
    return tensor.data_ptr(), version_of(tensor)
