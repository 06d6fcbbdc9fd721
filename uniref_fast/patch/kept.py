"""References kept across the steps of an unchanged pipeline: `patch(pipe, keep_references=...)`.

Two hooks of the transformer decide for each of its calls whether it is a refresh step or a kept step
(`uniref_fast.models.kept_references`). Before a kept step they take the rows of the references out of the arguments, so
that the transformer computes text and target only; the result then has the rows of the target only, which is the part
that the pipeline reads.

A call continues a *prediction* only if everything that its kept keys and values depend on is equal, and time has gone
on: reference latents, embeddings and mask of the prompt, image sizes, dtype, device, weights, adapters with their
scales, and other arguments. Any other call is the first step of a new prediction. So a new edit, other references,
another prompt or another adapter never sees kept keys and values of an earlier one. Guidance has two predictions.

Compiled blocks get their tables, and buffers of keys and values, as tensors in an argument. `KeptBlockCall` adds it,
and copies between the buffers and the stores before and after the compiled code of each block.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.edit_report import ReferenceReport
from uniref_fast.layout import SelfLayout
from uniref_fast.models.compiled_block import CompiledCall, TracedContext, mark_dynamic, traced_context
from uniref_fast.models.kept_references import KeepDtype, KeptReferences, ReferenceRows, RefreshSchedule
from uniref_fast.models.step_constants import weights_state
from uniref_fast.patch.guards import active_backend, active_mode, attention_change, has_hooks, is_plain
from uniref_fast.patch.processors import PatchedAttention
from uniref_fast.patch.stock import weight_hooks
from uniref_fast.patch.traced import TracedPlan

__all__ = ["KeptBlockCall", "KeptForward", "ReferenceKeeper"]

ARGUMENTS = (
    "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes", "guidance",
    "attention_kwargs", "controlnet_block_samples", "additional_t_cond", "return_dict",
)  # fmt: skip
"""Arguments of the transformer's forward, in order."""

BLOCK_ARGUMENTS = (
    "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb",
    "joint_attention_kwargs", "modulate_index",
)  # fmt: skip
"""Arguments of the forward of a block, in order."""

ORIGINAL_RAN = "attention of a block ran the original"
"""Reason for which a call that has computed everything keeps nothing."""

OTHER_INPUTS = ("controlnet_block_samples", "guidance", "additional_t_cond")
"""Arguments with which the references are computed in every step: they are not compared between calls."""

PREDICTIONS = 2
"""Predictions of one edit: with guidance the prompt and the negative prompt."""


@dataclass(eq=False)
class _Prediction:
    """The kept references of one prediction of an edit, and everything that they depend on.

    Attributes:
        settings: Values that are compared on the host.
        tensors: Copies of tensors that are compared on their device.
        time: Copy of the timestep of the last call.
        target: Copy of the target latents of the first call; None after the second call.
        stores: Kept references of each sample of the batch.
        layout: Layout of the whole sequence; None before the first step has reached a block.
        rotary: Rotary tables of that layout.
    """

    settings: tuple
    tensors: tuple[Tensor, ...]
    time: Tensor
    target: Tensor | None
    stores: list[KeptReferences]
    layout: SelfLayout | None = None
    rotary: tuple[Tensor, Tensor] | None = None


@dataclass
class KeptForward:
    """The running call of the transformer.

    Attributes:
        prediction: Prediction that the call is a step of.
        zero_cond_t: True if the model modulates references with t = 0.
        rows: Rows of the call; None in a refresh step until a block knows the layout.
        context: `ForwardContext` of the call, once a block has built it.
        traced: The same for compiled blocks, once a compiled block has been called.
        original_ran: True if the attention of a compiled block ran the original, which fills no buffers.
    """

    prediction: _Prediction
    zero_cond_t: bool
    rows: ReferenceRows | None = None
    context: Any = field(default=None, repr=False)
    traced: TracedContext | None = field(default=None, repr=False)
    original_ran: bool = False

    @property
    def kept(self) -> bool:
        """True if the references are not computed in this call."""
        return self.rows is not None and bool(self.rows.reused)

    def start(self, layout: SelfLayout, rotary: tuple[Tensor, Tensor]) -> ReferenceRows:
        """Return the rows of a refresh step, whose layout is known now."""
        self.prediction.layout, self.prediction.rotary = layout, rotary
        self.rows = ReferenceRows(layout, self.prediction.stores)
        return self.rows


class KeptBlockCall(CompiledCall):
    """The compiled code of a block, which takes part in kept references.

    Args:
        compiled: The compiled code, as PyTorch keeps it with the block.
        block: The block.
        state: State of the patched transformer.
    """

    def __init__(self, compiled: Any, block: Any, state: Any) -> None:
        super().__init__(compiled)
        self.block, self.state = block, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = None if ops.is_traced() or torch.compiler.is_exporting() else self.state.calls.kept
        if kept is None:
            return self.compiled(*args, **kwargs)
        attn, given = self.block.attn, {**dict(zip(BLOCK_ARGUMENTS, args, strict=False)), **kwargs}
        image, text = given["hidden_states"], given["encoder_hidden_states"]
        if kept.traced is None:
            mask, rotary = given["encoder_hidden_states_mask"], given["image_rotary_emb"]
            context = self.state.context(image, text.shape[1], mask, rotary)
            traced = traced_context(context, image.new_empty(0, attn.heads, attn.inner_dim // attn.heads))
            assert isinstance(traced, TracedContext), traced  # `_untraceable` has refused such calls
            if traced.impl == "triton" and self.state.impl is None and mask is None and context.visibility == "full":
                traced = replace(traced, plan=TracedPlan(len(image), "triton", False))  # PyTorch's attention is faster
            kept.traced = traced
            mark_dynamic(*rotary)
        index = given.get("modulate_index")
        mark_dynamic(image, text, *([] if index is None else [index]), dim=1)
        given["joint_attention_kwargs"] = {**(given["joint_attention_kwargs"] or {}), "traced_context": kept.traced}
        kept.rows.before_block(attn)
        outs = self.compiled(**given)
        kept.rows.after_block(attn)
        return outs


class ReferenceKeeper:
    """The hooks of one patched transformer.

    Args:
        state: State of the patched transformer.
        schedule: When the references are computed again.
        dtype: Data type of kept keys and values, or None.
        pipe: Pipeline whose scheduler tells the number of steps, or None.
    """

    def __init__(self, state: Any, schedule: RefreshSchedule, dtype: KeepDtype | None, pipe: Any) -> None:
        self.state, self.schedule, self.dtype = state, schedule, dtype
        self.pipe = None if pipe is None else weakref.ref(pipe)
        torch.compiler.assume_constant_result(ReferenceKeeper.record_whole)  # it must not be traced

    def __reduce__(self) -> tuple:
        return ReferenceKeeper, (self.state, self.schedule, self.dtype, None)

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Return the arguments of a kept step; None leaves them as they are (a forward pre-hook)."""
        if ops.is_traced() or torch.compiler.is_exporting():
            self.record_whole()
            return None
        calls = self.state.calls
        if calls.kept is not None:  # an interrupt has ended the last call, whose stores may be incomplete
            calls.predictions.remove(calls.kept.prediction)
        calls.kept = None
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        if not any(len(shapes) > 1 for shapes in given.get("img_shapes") or ()):
            return None  # no references
        if reason := self._refusal(module, given):
            self.state.report.references_not_kept[reason] += 1
            calls.predictions.clear()
            return None
        prediction = self._prediction(module, given)
        calls.kept = KeptForward(prediction, bool(module.config.zero_cond_t))
        self._wrap_compiled(module)
        if any(store.due for store in prediction.stores):
            for store in prediction.stores:  # the samples of a batch have streams of one length
                store.refresh_now()
            return None
        assert prediction.layout is not None
        calls.kept.rows = ReferenceRows(prediction.layout, prediction.stores)
        shapes = [[each[0]] for each in given["img_shapes"]]
        frames, height, width = shapes[0][0]
        given |= {"hidden_states": given["hidden_states"][:, : frames * height * width], "img_shapes": shapes}
        return (), given

    def after(self, module: Any, args: tuple, output: Any) -> None:
        """Count the step, or forget a prediction whose references not all blocks have stored (a forward hook)."""
        if ops.is_traced() or torch.compiler.is_exporting():
            return
        calls = self.state.calls
        forward, calls.kept = calls.kept, None
        if forward is None:
            return
        prediction = forward.prediction
        if output is None:  # the call raised an error
            calls.predictions.remove(prediction)
            return
        attentions = [getattr(block, "attn", None) for block in module.transformer_blocks]
        stored = all(store.has(attentions) for store in prediction.stores)
        if forward.rows is None or forward.original_ran or not stored:
            self.state.report.references_not_kept[ORIGINAL_RAN] += 1
            calls.predictions.remove(prediction)
            return
        forward.rows.finish()
        number = calls.predictions.index(prediction)
        store = prediction.stores[0]
        reports = self.state.report.references
        reports[number:] = [
            ReferenceReport(None, f"prediction {number + 1}", store.steps, tuple(store.refreshed), tuple(store.drifts),
                            sum(each.nbytes for each in prediction.stores))
        ]  # fmt: skip
        if self._is_last_step():
            for each in prediction.stores:
                each.clear()

    def record_whole(self) -> None:
        """Count a trace of the whole transformer by torch.compile, whose hooks cannot change sizes between steps."""
        self.state.report.references_not_kept[
            "torch.compile traces the whole transformer; compile its blocks instead (compile_repeated_blocks)"
        ] += 1

    def _wrap_compiled(self, module: Any) -> None:
        """Put a `KeptBlockCall` around the compiled code of every block; blocks may have been compiled since."""
        for block in module.transformer_blocks:
            compiled = block._compiled_call_impl
            if compiled is not None and not isinstance(compiled, CompiledCall):
                block._compiled_call_impl = KeptBlockCall(compiled, block, self.state)

    def remove(self, module: Any) -> None:
        """Take the `KeptBlockCall` of every block away."""
        for block in module.transformer_blocks:
            if isinstance(block._compiled_call_impl, CompiledCall):
                block._compiled_call_impl = block._compiled_call_impl.compiled

    def _untraceable(self, module: Any, image: Tensor) -> str | None:
        """Return the reason why compiled blocks cannot keep the references, or None."""
        for block in module.transformer_blocks:
            if block._compiled_call_impl is None:
                continue
            processor = getattr(block.attn, "processor", None)
            if type(processor) is not PatchedAttention:
                return ORIGINAL_RAN
            if reason := processor.kept_refusal(image):
                return f"compiled blocks: {reason}"
        return None

    def _refusal(self, module: Any, given: dict[str, Any]) -> str | None:
        """Return the reason why this call must compute the references and keep nothing, or None."""
        if torch.is_grad_enabled():
            return "gradients are enabled"
        for name in OTHER_INPUTS:
            if given.get(name) is not None:
                return f"called with {name}"
        image, shapes = given.get("hidden_states"), given["img_shapes"]
        tensors = [given.get(name) for name in ("hidden_states", "encoder_hidden_states", "timestep")]
        if not all(is_plain(tensor) for tensor in tensors) or image is None or image.device.type == "meta":
            return "called with other objects than ordinary tensors"
        if image.ndim != 3 or len(image) != len(shapes) or any(each != shapes[0] for each in map(list, shapes)):
            return "the images of the samples have different sizes"
        if image.shape[1] != sum(f * h * w for f, h, w in shapes[0]):
            return "the image tokens are not those of img_shapes"
        for name, hooked in _hooked(module):
            return f"{name} has {hooked}, which must see every row"
        if reason := active_mode() or attention_change():
            return reason
        if backend := active_backend():
            return f"attention backend {backend!r} is active in this process"
        return self._untraceable(module, image)

    def _prediction(self, module: Any, given: dict[str, Any]) -> _Prediction:
        """Return the prediction that a call continues, or a new one."""
        predictions: list[_Prediction] = self.state.calls.predictions
        image, text, mask = (
            given["hidden_states"],
            given["encoder_hidden_states"],
            given.get("encoder_hidden_states_mask"),
        )
        shapes, time = given["img_shapes"], given["timestep"].flatten()
        frames, height, width = shapes[0][0]
        target, references = image.tensor_split([frames * height * width], dim=1)
        tensors = (references, text, *([] if mask is None else [mask]))
        settings = (
            tuple(tuple(map(tuple, each)) for each in shapes), tuple((x.shape, x.dtype, x.device) for x in tensors),
            len(time), repr(given.get("attention_kwargs")), weights_state(module),
        )  # fmt: skip
        predictions[:] = [each for each in predictions if each.time.device == time.device]
        alike = [each for each in predictions if each.settings == settings]
        same = [_equal(each.tensors, tensors) & (time < each.time).all() for each in alike]
        newer = [(time.max() > each.time.max()) | _begins_again(each, time, target) for each in predictions]
        # One read of the device for everything: which predictions this call may continue, and which have ended.
        flags = torch.stack([*same, *newer]).tolist() if predictions else []
        found = next((each for each, yes in zip(alike, flags, strict=False) if yes), None)
        if found is not None:
            found.time, found.target = time.clone(), None
            return found
        ended = [each for each, yes in zip(predictions, flags[len(same) :], strict=True) if yes]
        predictions[:] = [each for each in predictions if each not in ended]
        if len(predictions) >= PREDICTIONS:
            predictions.clear()
        if not predictions:
            self.state.report.references.clear()
        stores = [KeptReferences(self.schedule, self.dtype, self._total()) for _ in range(len(image))]
        copies = tuple(x.clone() for x in tensors)
        predictions.append(_Prediction(settings, copies, time.clone(), target.clone(), stores))
        return predictions[-1]

    def _scheduler(self) -> Any:
        return getattr(None if self.pipe is None else self.pipe(), "scheduler", None)

    def _total(self) -> int | None:
        """Return the number of steps of the running edit, or None if it is not known."""
        timesteps = getattr(self._scheduler(), "timesteps", None)
        return None if timesteps is None else len(timesteps)

    def _is_last_step(self) -> bool:
        """Return True if the scheduler of the pipeline is at its last step: decoding then needs the memory."""
        total, step = self._total(), getattr(self._scheduler(), "step_index", None)
        return total is not None and (step or 0) == total - 1


def _begins_again(last: _Prediction, time: Tensor, target: Tensor) -> Tensor | bool:
    """Return whether a call begins another edit at the time at which an edit was aborted after its first step.

    Both predictions of guidance have the same target.
    """
    if last.target is None or (last.target.shape, last.target.device) != (target.shape, target.device):
        return False
    if last.time.shape != time.shape:
        return False
    return (last.time == time).all() & (last.target != target).any()


def _equal(kept: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> Tensor:
    """Return a bool tensor on the device: whether all tensors are equal."""
    return torch.stack([(a == b).all() for a, b in zip(kept, given, strict=True)]).all()


def _hooked(transformer: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, what it has) of places with hooks or compiled code that must see every row of every step.

    A compiled block sees them in its buffers. A compiled attention has no buffers.
    """
    places = {"the transformer": transformer}
    for name, block in transformer.transformer_blocks.named_children():
        places |= {f"transformer_blocks.{name}": block, f"transformer_blocks.{name}.attn": block.attn}
    for name, place in places.items():
        registry = getattr(place, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks:
            if hook not in weight_hooks():
                yield name, f"the hook {hook!r} of diffusers"
        if place is not transformer and has_hooks(place):
            yield name, "forward hooks"
        if name.endswith(".attn") and getattr(place, "_compiled_call_impl", None) is not None:
            yield name, "compiled code"
