"""The patched places of a `QwenImageTransformer2DModel`: attention processor and block forward.

Each place holds the original and runs it for every call that its guards refuse.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.models.qwen_image import AttentionContext, Modulation, joint_attention

__all__ = [
    "SELF_CHECK_TOLERANCE",
    "Owner",
    "PatchedAttention",
    "PatchedBlock",
    "Site",
    "active_backend",
    "has_hooks",
    "offloaded_norm",
    "register_processor",
]

SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest accepted `max|patched - original| / max|original|` of one block, by dtype."""


@dataclass
class Site:
    """One patched place and what happened there.

    Attributes:
        name: module name within the transformer.
        calls: accelerated calls, by the implementation that served them.
        fallbacks: calls that ran the original, by reason.
        reasons: accelerated attention calls, by "implementation: why it was chosen".
        max_rel_error: `max|patched - original| / max|original|` of the first accelerated call; None before it.
        disabled: why the site runs the original for good, if it does.
    """

    name: str
    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    max_rel_error: float | None = None
    disabled: str | None = None


class Owner(Protocol):
    """What the places of one transformer share; see `uniref_fast.patch`."""

    impl: str | None
    visibility: Any

    def context(self, hidden_states: Tensor, text_length: int, mask: Tensor | None, freqs: tuple) -> AttentionContext:
        """Layout, plan and rotary tables of the running forward."""

    def modulation_rows(self, index: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """Row of the modulation table for every token of a stream."""

    def accept(
        self,
        site: Site,
        fused: tuple,
        original: Callable[[], tuple],
        module: nn.Module,
        choice: tuple[str, str] | None = None,
    ) -> tuple:
        """Count a fused result of a module and, the first time, compare it with the original's; `choice` is what served
        and why."""

    def refuse(self, site: Site, reason: str, original: Callable[[], tuple]) -> tuple:
        """Count a refusal and run the original."""


def _refusal(owner: Owner, site: Site, head_dim: int, *tensors: Tensor) -> str | None:
    """Why this call must run the original, or None."""
    if site.disabled:
        return site.disabled
    if torch.compiler.is_compiling():
        return "inside torch.compile, which fuses the original itself"
    first = tensors[0]
    if torch.is_autocast_enabled(first.device.type):
        return "inside torch.autocast, where dtypes change between ops"
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return f"mixed dtypes or devices: {first.dtype} on {first.device}, {tensor.dtype} on {tensor.device}"
    if first.dtype not in SELF_CHECK_TOLERANCE:
        return f"{first.dtype} is not one of float32, float16, bfloat16"
    if owner.impl is not None:
        return ops.unavailable(owner.impl, first, head_dim)
    if ops.choose(None, first, head_dim) == "reference":
        return f"no fused implementation here: {ops.explain(first, head_dim)[1]}"
    return None


# ---- layer 1: the attention processor ----


class PatchedAttention:
    """Joint attention of diffusers' `QwenDoubleStreamAttnProcessor2_0` on fused ops.

    Has the two attributes that `set_attention_backend` and `enable_parallelism` write, and that processor's explicit
    keyword signature: diffusers filters arguments by it.
    """

    def __init__(self, attn: Any, owner: Owner, site: Site) -> None:
        self.attn, self.owner, self.site, self.stock = attn, owner, site, attn.processor
        self._attention_backend = self.stock._attention_backend
        self._parallel_config = self.stock._parallel_config
        attn.processor = self

    def locate(self) -> None:
        """Nothing to find: a processor that the user has set since is theirs to keep."""

    def remove(self) -> None:
        if self.attn.processor is self:  # else the user has set another one since: theirs stays
            self._pass_on()
            self.attn.processor = self.stock

    def _pass_on(self) -> Any:
        """The stock processor, told what diffusers told this one."""
        for name in ("_attention_backend", "_parallel_config"):
            if getattr(self.stock, name) is not getattr(self, name):
                setattr(self.stock, name, getattr(self, name))
        return self.stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        def original() -> tuple[Tensor, Tensor]:
            return self._pass_on()(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                attention_mask=attention_mask,
                image_rotary_emb=image_rotary_emb,
            )

        text = encoder_hidden_states
        if reason := self.refusal(attn, hidden_states, text, attention_mask, image_rotary_emb):
            if self.owner.visibility != "full":
                raise RuntimeError(
                    f"{self.site.name} cannot attend under visibility {self.owner.visibility!r}: {reason}. The "
                    "original would attend fully, which is another model; unpatch, or remove the cause"
                )
            return self.owner.refuse(self.site, reason, original)
        assert text is not None and image_rotary_emb is not None  # else refused
        context = self.owner.context(hidden_states, text.shape[1], encoder_hidden_states_mask, image_rotary_emb)
        image_out, text_out = joint_attention(attn, hidden_states.flatten(0, 1), text.flatten(0, 1), context)
        fused = image_out.unflatten(0, hidden_states.shape[:2]), text_out.unflatten(0, text.shape[:2])
        like = hidden_states.flatten(0, 1)[:, : attn.inner_dim].unflatten(-1, (attn.heads, -1))  # shaped as q is
        choice = ops.explain_attention(like, context.plan, context.impl, backward=image_out.requires_grad)
        return self.owner.accept(self.site, fused, original, attn, choice)

    def refusal(self, attn: Any, image: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any) -> str | None:
        """Why this call must run the original, or None."""
        if text is None or rotary is None or mask is not None:
            return "called without text or rotary embedding, or with an external mask"
        if reason := _refusal(self.owner, self.site, attn.inner_dim // attn.heads, image, text):
            return reason
        if self._parallel_config is not None:
            return "context parallel: the sequence is split over ranks"
        if self._attention_backend is not None:
            backend = getattr(self._attention_backend, "value", self._attention_backend)
            return f"attention backend {backend!r} was chosen with set_attention_backend"
        if active := active_backend():
            return f"attention backend {active!r} is active in this process"
        return offloaded_norm(attn, image.device)


def offloaded_norm(attn: Any, device: torch.device | None) -> str | None:
    """Why the QK norm weights cannot be read on a device, or None: hooks may hold them elsewhere between calls.

    Without a device only the hooks count: the whole model may still be moved.
    """
    for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
        if norm is None:
            continue
        registry = getattr(norm, "_diffusers_hook", None)
        if hasattr(norm, "_hf_hook") or (registry is not None and registry.hooks):
            return "the QK norms have hooks of their own (offloaded by layer)"
        if has_hooks(norm):
            return "the QK norms have forward hooks"
        if device is not None and norm.weight.device != device:
            return f"a QK norm has its weight on {norm.weight.device}, not {device}"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has PyTorch's forward hooks, which nobody runs who reads its weights instead of calling it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def active_backend() -> str | None:
    """The process-wide attention backend of diffusers, unless it is PyTorch's own."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name, _ = _AttentionBackendRegistry.get_active_backend()
    return None if name == AttentionBackendName.NATIVE else name.value


def register_processor() -> None:
    """Guiders and layer skipping look processors up by exact class."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry
    from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

    stock = AttentionProcessorRegistry.get(QwenDoubleStreamAttnProcessor2_0)
    AttentionProcessorRegistry.register(PatchedAttention, stock)


# ---- layer 2: the block ----


class PatchedBlock:
    """`QwenImageTransformerBlock.forward` with fused norms, modulation and residuals, bound to one block."""

    def __init__(self, block: Any, owner: Owner, site: Site) -> None:
        self.block, self.owner, self.site = block, owner, site
        holder, key = _innermost_forward(block)
        self.original = getattr(holder, key)
        setattr(holder, key, self.forward)

    def remove(self) -> None:
        """Put the original back."""
        holder, key = self.locate()
        setattr(holder, key, self.original)
        if self.block.forward == types.MethodType(type(self.block).forward, self.block):
            del self.block.forward  # nothing but the class's own is left

    def locate(self) -> tuple[Any, str]:
        """Where the fused forward is now; hooks may have come or gone since."""
        holder, key = _innermost_forward(self.block)
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

        def original() -> tuple[Tensor, Tensor]:
            return self.original(*arguments)

        attn = self.block.attn
        tensors = (hidden_states, encoder_hidden_states, temb)
        fused = _refusal(self.owner, self.site, attn.inner_dim // attn.heads, *tensors) or self._fused(*arguments)
        if isinstance(fused, str):
            return self.owner.refuse(self.site, fused, original)
        return self.owner.accept(self.site, fused, original, self.block)

    def _modulation(self, temb: Tensor) -> tuple[Modulation, Modulation]:
        """(image, text) modulation; text always uses the sampled timestep, the first half of a doubled `temb`."""
        block = self.block
        text_temb = temb.chunk(2)[0] if block.zero_cond_t else temb
        image, text = block.img_mod(temb), block.txt_mod(text_temb)
        return Modulation(*image.chunk(6, dim=-1)), Modulation(*text.chunk(6, dim=-1))

    def _fused(self, image, text, mask, temb, rotary, attention_kwargs, index) -> tuple[Tensor, Tensor] | str:
        """(text, image), or why it cannot be."""
        block, owner = self.block, self.owner
        impl, eps = owner.impl, block.img_norm1.eps
        batch = image.shape[0]
        if any(map(has_hooks, (block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2))):
            return "the norms have forward hooks"
        if temb.shape[0] != batch * (2 if block.zero_cond_t else 1):
            return f"{temb.shape[0]} timestep embeddings for a batch of {batch}"
        mods = self._modulation(temb)
        if any(mod.shift1.dtype != image.dtype for mod in mods):
            return f"modulation is {mods[0].shift1.dtype} and {mods[1].shift1.dtype}, the streams are {image.dtype}"
        rows = (
            owner.modulation_rows(index, batch, image.shape[1], image.device),
            owner.modulation_rows(None, batch, text.shape[1], image.device),
        )
        streams = image.flatten(0, 1), text.flatten(0, 1)
        normed = [
            ops.norm_modulate(x, mod.shift1, mod.scale1, row, eps, rounding="eager", impl=impl)
            for x, mod, row in zip(streams, mods, rows, strict=True)
        ]
        branches = block.attn(
            hidden_states=normed[0].view_as(image),
            encoder_hidden_states=normed[1].view_as(text),
            encoder_hidden_states_mask=mask,
            image_rotary_emb=rotary,
            **(attention_kwargs or {}),
        )
        if any(branch.dtype != image.dtype for branch in branches):
            return f"attention returned {branches[0].dtype} and {branches[1].dtype}, the streams are {image.dtype}"
        out = []
        for x, branch, mod, row, mlp in zip(streams, branches, mods, rows, (block.img_mlp, block.txt_mlp), strict=True):
            x, hidden = ops.gate_residual_norm_modulate(
                x, branch.flatten(0, 1), mod.gate1, mod.shift2, mod.scale2, row, eps, rounding="eager", impl=impl
            )
            branch = mlp(hidden)
            if branch.dtype != x.dtype:
                return f"the feed-forward returned {branch.dtype}, the streams are {x.dtype}"
            x = ops.gate_residual(x, branch, mod.gate2, row, rounding="eager", impl=impl)
            out.append(x.clip(-65504, 65504) if x.dtype == torch.float16 else x)
        return out[1].view_as(text), out[0].view_as(image)


def _innermost_forward(block: Any) -> tuple[Any, str]:
    """Where the block's own forward lives, below hooks of diffusers and accelerate: (object, attribute)."""
    registry = getattr(block, "_diffusers_hook", None)
    if registry is not None and registry._fn_refs:
        innermost = registry._fn_refs[0]
        place = innermost, "forward" if innermost.original_forward is None else "original_forward"
        below = hasattr(block, "_hf_hook") and isinstance(getattr(*place), functools.partial)
        return (block, "_old_forward") if below else place  # accelerate hooked first: its hook is the inner one
    if hasattr(block, "_hf_hook"):
        return block, "_old_forward"
    return block, "forward"
