"""The patched places of a `QwenImageTransformer2DModel`: attention processor and block forward.

Each place calls the modules that diffusers calls, once each, in the same order and with the same shapes, and computes
everything between them with fused operators. It keeps the original and runs it for every call that its guards refuse.

Shapes are diffusers': streams `[B, N, C]`, of B samples with N tokens each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.models.compiled_block import TracedContext
from uniref_fast.models.eight_bit import attend, feed_forward, shared_input
from uniref_fast.models.qwen_image import Modulation, joint_qkv, stream_rows
from uniref_fast.models.tanh_gelu import runs_native_gelu
from uniref_fast.ops.segment_attention import PreparedPlan
from uniref_fast.patch.guards import (
    active_backend,
    active_mode,
    attention_change,
    changed_norm,
    changed_qk_norm,
    innermost_forward,
    is_plain,
    norm_change,
    replaced_forward,
    unlike,
)
from uniref_fast.patch.replay import Calls, StandIn
from uniref_fast.patch.report import EIGHT_BIT_TOLERANCE, SELF_CHECK_TOLERANCE, Site
from uniref_fast.patch.state import PatchState
from uniref_fast.patch.traced import TracedPlan, TracedStreams
from uniref_fast.quantised_linear import recorded_errors

__all__ = [
    "PatchedAttention",
    "PatchedBlock",
    "PatchedMethod",
    "checkable",
    "fused_streams",
    "joint_rows",
    "outside_compiler",
    "refusal",
    "register_processor",
    "untraceable",
    "whole_stream",
]


@functools.cache
def outside_compiler() -> Callable:
    """Return a function that calls another with torch.compile off.

    Nothing below an uncompiled forward is then compiled by itself.
    """
    return torch.compiler.disable(lambda function, *args: function(*args))


def refusal(state: PatchState, site: Site, head_dim: int, *tensors: Tensor, attention: bool = False) -> str | None:
    """Return the reason why a call must run the original, or None.

    Args:
        state: State of the patched transformer.
        site: Counters of the place.
        head_dim: Channels of a head.
        tensors: Inputs of the call.
        attention: True for a place that computes attention itself, for which a library may be chosen.
    """
    if site.disabled:
        return site.disabled
    if not (ops.is_traced() or torch.compiler.is_exporting()) and (reason := active_mode()):
        return reason
    first = tensors[0]
    for tensor in tensors:
        if not is_plain(tensor):
            return f"called with a {type(tensor).__name__}"
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return f"mixed dtypes or devices: {first.dtype} on {first.device}, {tensor.dtype} on {tensor.device}"
    if first.device.type == "meta":
        return "tensors on the meta device have no values"
    if torch.is_autocast_enabled(first.device.type):
        return "inside torch.autocast, where dtypes change between ops"
    if first.dtype not in SELF_CHECK_TOLERANCE:
        return f"{first.dtype} is not one of float32, float16, bfloat16"
    if state.impl in ops.ATTENTION_LIBRARIES and attention:
        return ops.attention_unavailable(state.impl, first.flatten(0, -2)[:, None, :head_dim])
    if state.impl is not None and state.impl not in ops.ATTENTION_LIBRARIES:
        return ops.unavailable(state.impl, first, head_dim)
    if ops.choose(None, first, head_dim) == "reference":
        return f"no fused implementation here: {ops.explain(first, head_dim)[1]}"
    return None


def untraceable(state: PatchState) -> str | None:
    """Return the reason why torch.compile traces the original, or None."""
    if torch.compiler.is_exporting():
        return "torch.export: a program that is exported runs without this package"
    if state.parts is not None:
        return "mode='fast' inside torch.compile"
    if state.impl == "reference" or state.impl in ops.ATTENTION_LIBRARIES:
        return f"impl={state.impl!r} inside torch.compile"
    return None


def checkable(site: Site, tensor: Tensor) -> bool:
    """Return True if the site was not compared with the original yet, and values can be read on the host now."""
    return site.max_rel_error is None and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def joint_rows(x: Tensor) -> Tensor:
    """Reshape `[B, N, C]` to `[B * N, C]`, contiguous in C."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()


# ---- layer 1: the attention processor ----


class PatchedAttention:
    """Joint attention of diffusers' `QwenDoubleStreamAttnProcessor2_0` on fused operators.

    It has the two attributes that `set_attention_backend` and `enable_parallelism` write, and the keyword signature of
    that processor, by which diffusers filters arguments. `__class__` is the class of that processor: IP-Adapters of
    FLUX.1 construct a new processor of that class for every block, and layer skipping looks it up.

    Args:
        attn: Attention module; the constructor replaces its processor.
        state: State of the patched transformer.
        site: Counters of this place.
    """

    def __init__(self, attn: Any, state: PatchState, site: Site) -> None:
        self.attn, self.state, self.site, self.stock = attn, state, site, attn.processor
        self._attention_backend = self.stock._attention_backend
        self._parallel_config = self.stock._parallel_config
        name = f"{site.name}.processor"
        self.eight_bit = name if state.parts is not None and name in state.parts.attention else ""
        site.tolerance = EIGHT_BIT_TOLERANCE if self.eight_bit else None
        site.replacement = self._replacement
        attn.processor = self

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Class of the original processor; `type` returns the one of this object, and so does this while Dynamo traces.

        Dynamo of torch 2.13 would trace the calls of that class in place of the calls of this one.
        """
        return type(self) if torch.compiler.is_compiling() else type(self.stock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how pickle constructs a copy: the way it takes by default needs `type` and `__class__` to be equal."""
        return object.__new__, (type(self),), vars(self)

    def locate(self) -> None:
        """Do nothing: a processor that the user has set since can stay."""

    def _replacement(self) -> str | None:
        """Describe the processor that was set after this one, or return None."""
        processor = self.attn.processor
        return (
            None if processor is self else f"has a {type(processor).__name__} set after patch; unpatch and patch again"
        )

    def remove(self) -> None:
        """Put the original processor back, unless the user has set another one since."""
        self.site.replacement = None
        if self.attn.processor is self:
            self._pass_on()
            self.attn.processor = self.stock

    def _pass_on(self) -> Any:
        """Return the original processor, with the settings that diffusers has written on this one."""
        for name in ("_attention_backend", "_parallel_config"):
            if getattr(self.stock, name) is not getattr(self, name):
                setattr(self.stock, name, getattr(self, name))
        return self.stock

    def record_trace(self, reason: str | None) -> None:
        self.site.record_trace(reason)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        traced_context: TracedContext | None = None,
    ) -> tuple[Tensor, Tensor]:
        arguments = (
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask,
            attention_mask,
            image_rotary_emb,
        )
        if ops.is_traced() or torch.compiler.is_exporting():
            if traced_context is None and self.state.visibility != "full":
                raise RuntimeError(self._impossible("inside torch.compile"))
            return self._trace(attn, *arguments, traced_context)
        return outside_compiler()(self._run, attn, *arguments, traced_context)

    def _trace(
        self, attn: Any, image: Tensor, text: Any, mask: Any, attention_mask: Any, rotary: Any, kept: Any
    ) -> Any:
        """Run a call as torch.compile traces it: the fused operators, or the original, in the graph.

        Args:
            attn, image, text, mask, attention_mask, rotary: Arguments of the original.
            kept: `TracedContext` of a step with kept references, which has the plan of any mask, or None.
        """
        reason = self._untraceable(attn, image, text, mask if kept is None else None, attention_mask, rotary)
        if reason is None:
            context: Any = kept
            if kept is None:
                cos, sin = torch.cat([torch.view_as_real(freqs) for freqs in (rotary[1], rotary[0])]).unbind(-1)
                context = TracedStreams(
                    len(image), text.shape[1], image.shape[1], (cos, sin), self.state.impl,
                    image.unflatten(-1, (-1, attn.inner_dim // attn.heads)),
                )  # fmt: skip
            fused = self._fused(Calls(attn, self.state, inputs=False), image, text, context)
            if not isinstance(fused, str):
                self.record_trace(None)
                return fused[:2]
            reason = fused
        if kept is not None:
            raise RuntimeError(self._in_kept_step(reason))
        self.record_trace(reason)
        return self._pass_on()(attn, image, text, mask, attention_mask, rotary)

    def kept_refusal(self, like: Tensor) -> str | None:
        """Return the reason why compiled code cannot keep references here, or None.

        Args:
            like: Tensor with the dtype and device of the streams.
        """
        head_dim = self.attn.inner_dim // self.attn.heads
        reason = untraceable(self.state) or refusal(self.state, self.site, head_dim, like, attention=True)
        return reason or self.settings_refusal() or self._code_refusal(like.dtype, like.device)

    def _untraceable(self, attn: Any, *arguments: Any) -> str | None:
        """Return the reason why torch.compile traces the original for a call, or None."""
        if reason := untraceable(self.state) or self.call_refusal(attn, *arguments):
            return reason
        if arguments[2] is not None:
            return "a text mask inside torch.compile, which cannot plan from its values"
        return self.traced_refusal(str(arguments[0].dtype), str(arguments[0].device))

    def _run(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        traced: TracedContext | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run an uncompiled call; `traced` is given where the compiler has left a compiled block uncompiled."""

        def original(instead: Any = attn) -> tuple[Tensor, Tensor]:
            return self._pass_on()(instead, image, text, mask, attention_mask, rotary)

        if reason := self.refusal(attn, image, text, mask, attention_mask, rotary):
            return self._refuse(reason, original)
        assert text is not None and rotary is not None  # else refused
        comparable = self.state.visibility == "full" and not self.state.in_kept_step and checkable(self.site, image)
        calls = Calls(attn, self.state, inputs=comparable)
        fused = self._fused(calls, image, text, traced or self.state.context(image, text.shape[1], mask, rotary))
        if isinstance(fused, str):
            return self._refuse(fused, lambda: original(StandIn(calls)))
        *streams, choice = fused

        def check() -> float:
            stand_in = StandIn(calls)
            stand_in.compare(streams, original(stand_in))
            return stand_in.max_rel_error

        return self.state.accept(self.site, tuple(streams), image, original, check if comparable else None, choice)

    def _fused(
        self, calls: Calls, image: Tensor, text: Tensor, context: Any
    ) -> tuple[Tensor, Tensor, tuple[str, str]] | str:
        """Return (image, text, (implementation, reason of the choice)), or the reason why this is not possible."""
        attn: Any = calls.module
        head_dim = attn.inner_dim // attn.heads  # the head count stays free: tensor parallel shards it
        image_input, text_input = self.shared_input(attn.to_q, image), self.shared_input(attn.add_q_proj, text)
        streams = {"to_q": image_input, "to_k": image_input, "to_v": image_input}
        streams |= {"add_q_proj": text_input, "add_k_proj": text_input, "add_v_proj": text_input}
        qkv: list[Tensor] = []
        for name, stream in streams.items():
            out = calls(name, stream)
            width = out.shape[-1] if not qkv and isinstance(out, Tensor) and out.ndim else qkv[0].shape[-1]
            if reason := unlike(out, (*stream.shape[:2], width), stream, name):
                return reason
            qkv.append(out)
        if qkv[0].shape[-1] % head_dim:
            return f"to_q returned {qkv[0].shape[-1]} channels, heads have {head_dim}"
        calls.release()
        heads = [joint_rows(x).unflatten(-1, (-1, head_dim)) for x in qkv]
        del qkv, out
        q, k, v = joint_qkv(attn, (heads[0], heads[1], heads[2]), (heads[3], heads[4], heads[5]), context)
        del heads
        joint, choice = self.attention(q, k, v, context.plan)
        del q, k, v
        image_out, text_out = (
            stream_rows(joint, context.layout, name).flatten(1).unflatten(0, stream.shape[:2])
            for name, stream in (("image", image), ("text", text))
        )
        image_out = calls("to_out.0", image_out)
        if len(attn.to_out) > 1:
            image_out = calls("to_out.1", image_out)  # dropout
        return image_out, calls("to_add_out", text_out), choice

    def attention(self, q: Tensor, k: Tensor, v: Tensor, plan: Any) -> tuple[Tensor, tuple[str, str]]:
        """Return the attention of all queries, and the implementation with the reason of its choice.

        Args:
            q, k, v: Queries, keys and values, `[N, H, D]` each.
            plan: Plan of the queries and keys, an `AttentionPlan`, `PreparedPlan` or `TracedPlan`.
        """
        # Chosen once, here, so that the report counts the implementation that the operator uses.
        if isinstance(plan, TracedPlan):
            return plan.attend(q, k, v), (plan.impl, "inside torch.compile")
        if isinstance(plan, PreparedPlan):
            choice = plan.impl, "a compiled block that ran uncompiled"
        elif self.eight_bit:
            choice = self.state.impl or "triton", "8 bits"
        else:
            needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            choice = ops.explain_attention(q.detach(), plan, self.state.impl, backward=needs_grad)
        return attend(q, k, v, plan, choice[0], False, self.eight_bit), choice

    def shared_input(self, linear: Any, x: Tensor) -> Tensor:
        """Return the input of the projections of a stream, quantised once for all of them if they are in 8 bits."""
        return x if self.state.parts is None else shared_input(linear, x, self.state.impl)

    def _refuse(self, reason: str, original: Callable[[], tuple]) -> Any:
        if self.state.visibility != "full":
            raise RuntimeError(self._impossible(reason))
        if self.state.in_kept_step:
            raise RuntimeError(self._in_kept_step(reason))
        if self.state.calls.kept is not None:
            self.state.calls.kept.original_ran = True
        return self.state.refuse(self.site, reason, original)

    def _in_kept_step(self, reason: str) -> str:
        return (
            f"{self.site.name} must run the original ({reason}), which needs the references, and this step has "
            "kept them; call unpatch, or patch with keep_references=False"
        )

    def _impossible(self, reason: str) -> str:
        return (
            f"{self.site.name} cannot run under visibility {self.state.visibility!r}: {reason}. The original would use "
            "full attention, which is another model; unpatch, or remove the cause"
        )

    def refusal(self, attn: Any, image: Tensor, *others: Any) -> str | None:
        """Return the reason why this call must run the original, or None."""
        return self.call_refusal(attn, image, *others) or self._code_refusal(image.dtype, image.device)

    def call_refusal(
        self, attn: Any, image: Tensor, text: Tensor | None, mask: Tensor | None, attention_mask: Any, rotary: Any
    ) -> str | None:
        """Return the reason why the arguments of a call need the original, or None; torch.compile traces it."""
        if text is None or rotary is None or attention_mask is not None:
            return "called without text or rotary embedding, or with an external mask"
        head_dim = attn.inner_dim // attn.heads
        if reason := refusal(self.state, self.site, head_dim, image, text, attention=True):
            return reason
        if image.ndim != 3 or text.ndim != 3 or len(image) != len(text):
            return f"called with streams of shapes {list(image.shape)} and {list(text.shape)}"
        if reason := self.settings_refusal():
            return reason
        if mask is not None and not (is_plain(mask) and mask.dtype == torch.bool and mask.shape == text.shape[:2]):
            return "the text mask is not a boolean tensor with one value per token"
        lengths = image.shape[1], text.shape[1]
        if len(rotary) != 2 or any(
            not is_plain(freqs) or freqs.dtype != torch.complex64 or freqs.device != image.device
            or freqs.shape != (length, head_dim // 2)
            for freqs, length in zip(rotary, lengths, strict=True)
        ):  # fmt: skip
            return "the rotary embedding does not have one complex value per token and pair of channels"
        return None

    def settings_refusal(self) -> str | None:
        """Return the reason why the settings of this place need the original, or None."""
        if self._parallel_config is not None:
            return "context parallel: the sequence is split over ranks"
        if self._attention_backend is not None:
            backend = getattr(self._attention_backend, "value", self._attention_backend)
            return f"attention backend {backend!r} was chosen with set_attention_backend"
        if active := active_backend():
            return f"attention backend {active!r} is active in this process"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return the reason why the code of this place needs the original, or None."""
        return attention_change() or changed_qk_norm(self.attn, dtype, device)

    def traced_refusal(self, dtype: str, device: str) -> str | None:
        """Return `_code_refusal` for the names of a dtype and a device.

        torch.compile does not trace it, but runs it once for each trace, with constants as arguments.
        """
        return self._code_refusal(getattr(torch, dtype.removeprefix("torch.")), torch.device(device))


def register_processor() -> None:
    """Register the methods that count traces with torch.compile, which must not trace them."""
    for place in (PatchedAttention, PatchedBlock):
        torch.compiler.assume_constant_result(place.record_trace)
        torch.compiler.assume_constant_result(place.traced_refusal)
    torch.compiler.assume_constant_result(PatchedAttention.settings_refusal)


# ---- layer 2: the block ----


class PatchedMethod:
    """A place that replaces a method of a module by one of its own.

    Attributes:
        original: The method that it replaces.
        site: Counters of this place.
    """

    original: Any
    site: Site

    def record_trace(self, reason: str | None) -> None:
        self.site.record_trace(reason)


class PatchedBlock(PatchedMethod):
    """Forward of one `QwenImageTransformerBlock` with fused norms, modulation and residuals.

    Args:
        block: Block whose forward the constructor replaces.
        state: State of the patched transformer.
        site: Counters of this place.
    """

    def __init__(self, block: Any, state: PatchState, site: Site) -> None:
        self.block, self.state, self.site = block, state, site
        holder, key = innermost_forward(block)
        self.original = getattr(holder, key)
        self.methods = self._methods()
        setattr(holder, key, self.forward)

    def _methods(self) -> tuple[Any, ...]:
        """Return the code that the fused forward replaces."""
        return type(self.block).forward, type(self.block)._modulate, vars(self.block).get("_modulate")

    def remove(self) -> None:
        """Put the original back."""
        holder, key = self.locate()
        setattr(holder, key, self.original)
        if not replaced_forward(self.block):
            vars(self.block).pop("forward", None)  # only the forward of the class is left

    def locate(self) -> tuple[Any, str]:
        """Return (object, attribute) of the fused forward; hooks may have been added or removed since.

        Raises:
            RuntimeError: If the forward was wrapped or replaced by other code.
        """
        holder, key = innermost_forward(self.block)
        if getattr(holder, key) != self.forward:
            raise RuntimeError(
                f"{self.site.name}.forward was wrapped or replaced after patching by something other than hooks of "
                "diffusers and accelerate; undo that first, then unpatch"
            )
        return holder, key

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        arguments = (
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
            modulate_index,
        )
        return self._start(*arguments)

    def _start(self, *arguments: Any) -> Any:
        """Run a call, whose arguments are those of the original."""
        if ops.is_traced() or torch.compiler.is_exporting():
            return self._trace(*arguments)
        return outside_compiler()(self._run, *arguments)

    def _trace(self, *arguments: Any) -> Any:
        """Run the block as torch.compile traces it: the fused operators, or the original, in the graph."""
        image = arguments[0]
        reason = untraceable(self.state) or self.call_refusal(*arguments)
        reason = reason or self.traced_refusal(str(image.dtype), str(image.device))
        calls = Calls(self.block, self.state, inputs=False)
        if reason is None:
            fused = self._fused(calls, ops.choose(self.state.impl, image), *arguments)
            if not isinstance(fused, str):
                self.record_trace(None)
                return fused
            reason = fused
        self.record_trace(reason)
        return type(self.block).forward(StandIn(calls), *arguments) if calls.made else self.original(*arguments)

    def _run(self, *arguments: Any) -> Any:
        def original() -> Any:
            return type(self.block).forward(self.block, *arguments)

        image = arguments[0]
        if reason := self.refusal(*arguments):
            return self.state.refuse(self.site, reason, original)
        checked = checkable(self.site, image)
        calls = Calls(self.block, self.state, inputs=checked)

        def replay() -> tuple[Any, StandIn]:
            stand_in = StandIn(calls)
            return type(self.block).forward(stand_in, *arguments), stand_in

        impl = ops.choose(self.state.impl, image)
        recorded = self.state.parts is not None and checked
        with recorded_errors(self.state.report.errors) if recorded else contextlib.nullcontext():
            fused = self._fused(calls, impl, *arguments)
        if isinstance(fused, str):
            return self.state.refuse(self.site, fused, lambda: replay()[0])

        def check() -> float:
            expected, stand_in = replay()
            stand_in.compare(*((x,) if isinstance(x, Tensor) else x for x in (fused, expected)))
            return stand_in.max_rel_error

        return self.state.accept(self.site, fused, image, original, check if checked else None, (impl, None))

    def refusal(self, image: Tensor, *others: Any) -> str | None:
        """Return the reason why this call must run the original, or None."""
        return self.call_refusal(image, *others) or self._code_refusal(image.dtype, image.device)

    def call_refusal(self, image, text, mask, temb, rotary, attention_kwargs, index) -> str | None:
        """Return the reason why the arguments of a call need the original, or None; torch.compile traces it."""
        block = self.block
        if reason := refusal(self.state, self.site, block.attn.inner_dim // block.attn.heads, image, text, temb):
            return reason
        if image.ndim != 3 or text.ndim != 3 or len(image) != len(text) or image.shape[2] != text.shape[2]:
            return f"called with streams of shapes {list(image.shape)} and {list(text.shape)}"
        batch = image.shape[0]
        if temb.ndim != 2 or temb.shape[0] != batch * (2 if block.zero_cond_t else 1):
            return f"{temb.shape[0]} timestep embeddings for a batch of {batch}"
        if (index is not None) != bool(block.zero_cond_t):
            return "modulate_index must be given with zero_cond_t, and only then"
        if index is not None and not (is_plain(index) and index.shape == image.shape[:2]):
            return "modulate_index does not have one value per token"
        return None

    def traced_refusal(self, dtype: str, device: str) -> str | None:
        """Return `_code_refusal` for the names of a dtype and a device.

        torch.compile does not trace it, but runs it once for each trace, with constants as arguments.
        """
        return self._code_refusal(getattr(torch, dtype.removeprefix("torch.")), torch.device(device))

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return the reason why the code of this place needs the original, or None.

        Args:
            dtype, device: Dtype and device of the streams.
        """
        block = self.block
        if self._methods() != self.methods:
            return f"forward or _modulate of {type(block).__name__} was replaced"
        for name in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2"):
            if reason := changed_norm(block._modules.get(name), block.dim):
                return reason
        return norm_change()

    def _fused(self, calls: Calls, impl: str, image, text, mask, temb, rotary, attention_kwargs, index) -> tuple | str:
        """Return (text, image) computed by one implementation, or the reason why that is not possible."""
        block, state = self.block, self.state
        batch, _, channels = image.shape
        # text always uses the sampled timestep, the first half of a doubled `temb`
        text_temb = temb.chunk(2)[0] if block.zero_cond_t else temb
        mods = []
        for name, embedding in (("img_mod", temb), ("txt_mod", text_temb)):
            table = calls(name, embedding)
            if reason := unlike(table, (len(embedding), 6 * channels), image, name):
                return reason
            mods.append(Modulation(*(table if table.stride(-1) == 1 else table.contiguous()).chunk(6, dim=-1)))
        rows = (
            state.modulation_rows(index, batch, image.shape[1], image.device),
            state.modulation_rows(None, batch, text.shape[1], image.device),
        )
        attention = {"encoder_hidden_states_mask": mask, "image_rotary_emb": rotary, **(attention_kwargs or {})}
        norms = (block.img_norm1, block.txt_norm1), (block.img_norm2, block.txt_norm2)
        return fused_streams(calls, state, impl, (image, text), mods, rows, norms, ("img_mlp", "txt_mlp"), attention)


def fused_streams(
    calls: Calls,
    state: PatchState,
    impl: str,
    streams: tuple[Tensor, Tensor],
    mods: Sequence[Modulation],
    rows: tuple[Tensor, Tensor],
    norms: Sequence[tuple[Any, Any]],
    mlps: tuple[str, str],
    attention: dict[str, Any],
    clip: bool = True,
) -> tuple[Tensor, Tensor] | str:
    """Return (text, image) of a block with two streams, or the reason why that is not possible.

    Args:
        calls: Recorder that calls the children of the block.
        state: State of the patched transformer.
        impl: Implementation of the operators.
        streams: Image and text, `[B, N, C]` each; all arguments in pairs have this order.
        mods: Modulation of both streams.
        rows: Row of the modulation table of every token of both streams, int32 `[B * N]`.
        norms: First norms of both streams, and their second norms.
        mlps: Names of both feed-forwards.
        attention: Further arguments of the attention.
        clip: Clip the results in float16 to the finite range, as most models of diffusers do.
    """
    image, text = streams
    options: Any = {"rounding": "eager", "impl": impl}
    flat = joint_rows(image), joint_rows(text)
    normed = [
        ops.norm_modulate(x, mod.shift1, mod.scale1, row, norm.eps, **options)
        for x, mod, row, norm in zip(flat, mods, rows, norms[0], strict=True)
    ]
    branches = calls(
        "attn",
        hidden_states=normed[0].view(image.shape),
        encoder_hidden_states=normed[1].view(text.shape),
        **attention,
    )
    del normed
    if not isinstance(branches, (tuple, list)) or len(branches) != 2:
        return "attention did not return two streams"
    for branch, like in zip(branches, streams, strict=True):
        if reason := unlike(branch, tuple(like.shape), like, "attention"):
            return reason
    out = []
    for x, branch, mod, row, norm, mlp, like in zip(flat, branches, mods, rows, norms[1], mlps, streams, strict=True):
        x, hidden = ops.gate_residual_norm_modulate(
            x, joint_rows(branch), mod.gate1, mod.shift2, mod.scale2, row, norm.eps, **options
        )
        branch = _feed_forward(calls, mlp, hidden.view(like.shape), state, impl)
        if isinstance(branch, str):
            return branch
        out.append(whole_stream(ops.gate_residual(x, joint_rows(branch), mod.gate2, row, **options), like.shape, clip))
    return out[1], out[0]


def _feed_forward(calls: Calls, name: str, x: Tensor, state: PatchState, impl: str) -> Tensor | str:
    """Return the result of a feed-forward, or the reason why it cannot be used.

    Its Linears are called one by one if `ops.gelu` runs between them: the self-check then compares its results.
    """
    if state.parts is not None:
        out = calls(name, x, run=functools.partial(feed_forward, impl=state.impl))
    elif runs_native_gelu(calls.child(name), x, impl):
        hidden = calls(f"{name}.net.0.proj", x)
        width = hidden.shape[-1:] if isinstance(hidden, Tensor) else ()
        if reason := unlike(hidden, (*x.shape[:-1], *width), x, "the feed-forward"):
            return reason
        out = calls(f"{name}.net.2", ops.gelu(hidden))
    else:
        out = calls.by_parts(name, x)
    return unlike(out, tuple(x.shape), x, "the feed-forward") or out


def whole_stream(x: Tensor, shape: torch.Size, clip: bool = True) -> Tensor:
    """Return rows `[B * N, C]` as a stream `[B, N, C]`, in float16 clipped to the finite range, as diffusers does."""
    x = torch.ops.aten._unsafe_view(x, shape)  # for autograd not a view: nothing else refers to the rows
    return x.clip(-65504, 65504) if clip and x.dtype == torch.float16 else x
