"""A pipeline with the options of `edit`: checks requests, encodes them, decodes results."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from uniref_fast.budget import check_budget
from uniref_fast.edit_loop import Edit, encoded_edit
from uniref_fast.fast import EightBitParts, check_mode, check_supported, eight_bit, eight_bit_parts
from uniref_fast.guidance import is_guided
from uniref_fast.model_kind import check_pipeline
from uniref_fast.models.families import family_of, find_transformer
from uniref_fast.models.family import Family
from uniref_fast.models.kept_references import (
    KeepDtype,
    KeptReferences,
    RefreshSchedule,
    check_keep_dtype,
    dependence,
)
from uniref_fast.models.module_hooks import is_offloaded
from uniref_fast.models.pack_adapters import check_lora
from uniref_fast.models.packed import PackedModel
from uniref_fast.models.step_graphs import check_capture
from uniref_fast.patch.install import patched_parts
from uniref_fast.patch.stock import deviations, is_own_method
from uniref_fast.request import EditRequest, Geometry, as_list, request_geometry, validated_one
from uniref_fast.visibility import Rule

__all__ = ["CheckedRequest", "EditSession", "check_output_type", "warn_of_guidance"]


@dataclass(frozen=True, eq=False)
class CheckedRequest:
    """A request that can run.

    Attributes:
        request: The request.
        geometry: Its sizes.
        scheduler: Scheduler of its own, with its timesteps.
        refresh: When its references are computed again; None computes them in every step.
    """

    request: EditRequest
    geometry: Geometry
    scheduler: Any
    refresh: RefreshSchedule | None


class EditSession:
    """A pipeline with the options of `edit`, checked once for all requests.

    Args:
        pipe: A pipeline of a supported family, patched or not. It must not be used by anything else meanwhile.
        budget, visibility, impl, model, keep_references, drift, keep_dtype, mode, modules_to_not_convert, capture:
            Options of `uniref_fast.edit`.

    Attributes:
        pipe: The pipeline.
        family: Its family.
        device: Device on which it computes.
        model: The packed transformer.
        parts: Parts that compute in 8 bits; None for the mode "exact".

    Raises:
        ValueError: If the pipeline or an option cannot be used; the message says why.
        TypeError: If the pipeline has a class that is not supported.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        budget: int | None = None,
        visibility: str | Rule = "full",
        impl: str | None = None,
        model: PackedModel | None = None,
        keep_references: bool | int | Literal["auto"] = False,
        drift: float | None = None,
        keep_dtype: KeepDtype | None = None,
        mode: str = "exact",
        modules_to_not_convert: Sequence[str] | None = None,
        capture: bool = False,
    ) -> None:
        if budget is not None:
            check_budget(budget)
        check_keep_dtype(keep_dtype)
        check_pipeline(pipe)
        transformer = find_transformer(pipe)
        self.family = family_of(pipe)
        _require(self.family, mode, keep_references)
        self.pipe, self.budget, self.device = pipe, budget, pipe._execution_device
        self.keep_references, self.drift, self.keep_dtype = keep_references, drift, keep_dtype
        _refuse_changes(pipe, transformer, self.device)
        self.parts = _eight_bit_parts(transformer, self.device, impl, mode, modules_to_not_convert, model)
        self._cast = model is None  # the parameters of a given model may have another dtype than its computation
        eight_bit: dict[str, Any] = {} if self.parts is None else {"attention_8bit": self.parts.attention}
        if keep_references is False and self.family.keeps_references(transformer):
            self.keep_references = True
        self.model: PackedModel = model or self.family.packed(
            transformer, visibility=visibility, impl=impl, **eight_bit
        )
        if capture:
            check_capture(self.model, self.device)

    def check(self, requests: Sequence[EditRequest | Mapping[str, Any]]) -> list[CheckedRequest]:
        """Check requests without running a model.

        Args:
            requests: `EditRequest`s, or mappings of its fields.

        Raises:
            ValueError: If a request cannot run; the message names the request and the problem.
            TypeError: If a request or a field has the wrong type, likewise.
        """
        return [self.check_one(request, f"request {i}") for i, request in enumerate(as_list(requests), start=1)]

    def check_one(self, request: EditRequest | Mapping[str, Any], where: str) -> CheckedRequest:
        """Check one request, as `check` does; `where` is its name in messages."""
        request = validated_one(request, where, self.pipe)
        sizes = request_geometry(self.pipe, request, self.budget)
        _check_latents(self.pipe, request, sizes, where)
        if request.lora is not None:
            if not self.model.row_kinds:
                raise ValueError(f"{where}: lora is not supported for {self.family.name} models; leave it out")
            encodes = any(embeds is None for _, embeds, _ in request.texts)
            check_lora(
                self.model.transformer, request.lora, where, self.family.text_encoders(self.pipe) if encodes else ()
            )
        steps = request.num_inference_steps
        assert steps is not None
        scheduler = self.family.schedule(self.pipe, sizes.target_tokens, steps, self.device)
        return CheckedRequest(request, sizes, scheduler, self._refresh(sizes))

    def _refresh(self, sizes: Geometry) -> RefreshSchedule | None:
        if self.keep_references is False and self.drift is None:
            return None
        layout = self.model.layout([sizes.sample(1)])
        return RefreshSchedule.of(self.keep_references, self.drift, dependence(layout, self.model.visibility))

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradients, and with weights in 8 bits in the mode "fast"; `encode` and `decode` need it."""
        transformer = self.model.transformer
        with torch.no_grad(), eight_bit(transformer, None if patched_parts(transformer) else self.parts):
            yield

    def encode(self, checked: CheckedRequest) -> Edit:
        """Encode a request, and return it as an edit for the denoising loop."""
        edit = encoded_edit(self.pipe, checked.request, checked.geometry, checked.scheduler, self._cast)
        if checked.refresh is not None:
            edit.kept = [KeptReferences(checked.refresh, self.keep_dtype, len(edit.timesteps)) for _ in edit.sequences]
            if checked.refresh == RefreshSchedule():  # never computed again, because they depend on the prompt at most
                prompts = len(edit.prompts)
                siblings = [store.sibling() for store in edit.kept[:prompts] * (len(edit.latents) - 1)]
                edit.kept = edit.kept[:prompts] + siblings
        return edit

    def decode(self, edit: Edit, output_type: str) -> Any:
        """Return the result of a finished edit as the `output_type` of `uniref_fast.edit`, or a list of results."""
        images: list[Any] = [*edit.latents.split(1)]
        if output_type != "latent":
            size, crop = edit.geometry.size, edit.geometry.crop
            images = [self.family.decode(self.pipe, each, size, output_type) for each in images]
            images = images if crop is None else [_cropped(each, crop) for each in images]
        return images if edit.request.num_images > 1 else images[0]


def _cropped(image: Any, crop: tuple[int, int, int, int]) -> Any:
    """Return a part of an image: of Pillow, an array `[H, W, C]`, or a tensor `[C, H, W]`."""
    if isinstance(image, Image.Image):
        return image.crop(crop)
    left, top, right, bottom = crop
    return image[..., top:bottom, left:right] if torch.is_tensor(image) else image[top:bottom, left:right]


def check_output_type(output_type: Any) -> None:
    """Raise ValueError unless the value is an `output_type` of `uniref_fast.edit`."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", got {output_type!r}')


def warn_of_guidance(checked: Mapping[int, CheckedRequest]) -> None:
    """Warn about scales and negative prompts that have no effect, as the pipeline does; called by a public function.

    Args:
        checked: Checked requests by number, from 1.
    """
    for i, each in checked.items():
        request = each.request
        if each.geometry.guidance is not None:  # the transformer embeds the scale
            continue
        scale = request.true_cfg_scale
        assert scale is not None
        if is_guided(scale) and not request.has_negative_prompt:
            reason = f"true_cfg_scale={scale} has no effect without a negative prompt, such as ' '"
        elif not is_guided(scale) and request.has_negative_prompt:
            reason = f"the negative prompt has no effect at true_cfg_scale={scale}, which is not over 1"
        else:
            continue
        warnings.warn(f"request {i}: {reason}; classifier-free guidance is off", stacklevel=3)


def _require(family: Family, mode: str, keep_references: bool | int | str) -> None:
    """Raise ValueError with the reason if a family does not support an option."""
    family.require("edit")
    if mode == "fast":
        family.require("fast")
    if keep_references is not False:
        family.require("keep_references")


def _eight_bit_parts(
    transformer: Any,
    device: torch.device,
    impl: str | None,
    mode: str,
    modules_to_not_convert: Sequence[str] | None,
    model: PackedModel | None,
) -> EightBitParts | None:
    """Return the parts that compute in 8 bits, or None for the mode "exact"."""
    installed = patched_parts(transformer)
    if not check_mode(mode, modules_to_not_convert):
        if installed is not None:
            raise ValueError('the pipeline is patched with mode="fast"; give edit() the same mode, or unpatch first')
        return None
    if model is not None:
        raise ValueError('mode="fast" builds its own packed model; leave model out')
    check_supported(device, impl)
    if installed is None:
        if any(is_offloaded(module, whole=False) for module in transformer.modules()):
            raise ValueError(
                'mode="fast" quantises the weights, and offloading by block or by layer holds them elsewhere; without '
                'offloading, call patch(pipe, mode="fast") first, and then enable it'
            )
        return eight_bit_parts(transformer, modules_to_not_convert, impl)
    if modules_to_not_convert is not None or impl != installed.impl:
        raise ValueError(
            f"the pipeline is patched with mode='fast' and impl={installed.impl!r}; give edit() the same impl, and no "
            "modules_to_not_convert: those of the patch hold"
        )
    return installed


def _check_latents(pipe: Any, request: EditRequest, sizes: Geometry, where: str) -> None:
    if request.latents is None:
        return
    _, height, width = sizes.grid(sizes.size)
    channels = family_of(pipe).packed.sizes(pipe.transformer.config).token_channels
    expected = [request.num_images, height * width, channels]
    if list(request.latents.shape) != expected:
        raise ValueError(
            f"{where}: latents have shape {list(request.latents.shape)}, a {sizes.size[0]} x {sizes.size[1]} result "
            f"needs {expected}"
        )


def _refuse_changes(pipe: Any, transformer: Any, device: torch.device) -> None:
    """Raise ValueError if the pipeline's call or code in its transformer was changed: the packed loop would skip it."""
    found = next(deviations(transformer, device), None)
    if found is None and not is_own_method(pipe, "__call__"):
        found = f"{type(pipe).__name__}.__call__ is not diffusers' own"
    if found is not None:
        raise ValueError(
            f"{found}. edit() runs all requests through one packed forward, which would skip this; undo it, or call "
            "the pipeline (patched or not) request by request"
        )
