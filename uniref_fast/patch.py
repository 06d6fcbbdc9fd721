"""`patch(pipe)`: the same diffusers pipeline, same images, faster; `unpatch` undoes it.

Two layers per block, both on the instance, none on the class:

1. the attention processor: QK norm, rotary and packing in one pass, attention without a mask tensor;
2. `block.forward`: norms, modulation and gated residuals in one pass each; installed *below* hooks that are already
   there, with the original's argument names and order, so that caches, offloading and checkpointing go on working.

Every call passes cheap guards; what they refuse runs the original, and the report says how often and why. The first
accelerated call of each site runs the original too and records the difference.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.qwen_image import AttentionContext, Modulation, find_transformer, joint_attention
from uniref_fast.testing import max_relative_error
from uniref_fast.visibility import Rule, plan

__all__ = ["PatchReport", "Site", "patch", "unpatch"]

SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest accepted `max|patched - original| / max|original|` of one block, by dtype."""

_STATE = "_uniref_fast"


@dataclass
class Site:
    """One patched place and what happened there.

    Attributes:
        name: module name within the transformer.
        calls: accelerated calls.
        fallbacks: calls that ran the original, by reason.
        max_rel_error: `max|patched - original| / max|original|` of the first accelerated call; None before it.
        disabled: why the site runs the original for good, if it does.
    """

    name: str
    calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    max_rel_error: float | None = None
    disabled: str | None = None


@dataclass
class PatchReport:
    """What `patch` did; live: its counters go on counting while the pipeline runs. `str(report)` is for people."""

    model: str
    mode: str
    visibility: str
    device: str
    implementation: str
    reason: str
    sites: list[Site]
    notes: list[str] = field(default_factory=list)

    @property
    def max_rel_error(self) -> float | None:
        """Largest self-check error over all sites; None before the first call."""
        return max((s.max_rel_error for s in self.sites if s.max_rel_error is not None), default=None)

    @property
    def calls(self) -> int:
        return sum(s.calls for s in self.sites)

    @property
    def fallbacks(self) -> Counter[str]:
        return sum((s.fallbacks for s in self.sites), Counter())

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.sites)} sites patched, mode={self.mode}, visibility={self.visibility}",
            f"  implementation  {self.implementation} ({self.reason})",
            f"  accelerated     {self.calls} calls",
            f"  originals run   {sum(self.fallbacks.values())} calls",
        ]
        lines += [f"    {count:6d} x  {reason}" for reason, count in self.fallbacks.most_common()]
        lines += [f"  disabled        {s.name}: {s.disabled}" for s in self.sites if s.disabled]
        error = self.max_rel_error
        lines.append(f"  self-check      {'not run yet' if error is None else f'max relative error {error:.2e}'}")
        lines += [f"  note            {note}" for note in self.notes]
        return "\n".join(lines)


def patch(
    pipe_or_transformer: Any,
    mode: str = "exact",
    visibility: str | Rule = "full",
    strict: bool = True,
    *,
    impl: str | None = None,
) -> PatchReport:
    """Make a live diffusers pipeline (or its transformer) faster, in place.

    Args:
        pipe_or_transformer: a `QwenImageEditPlusPipeline` or another pipeline with a `QwenImageTransformer2DModel` as
            `transformer`, or that model.
        mode: "exact" computes what the original computes, up to the rounding of its dtype.
        visibility: "full" is what diffusers computes; other policies (`uniref_fast.visibility`) are for models trained
            with them.
        strict: a failed self-check raises; with False that site runs the original from then on.
        impl: implementation forced on every op ("reference", "native", "triton"); None picks by device.

    Returns:
        a live report of the patched sites.

    Raises:
        TypeError: for a model that is not supported; the message lists those that are.
        ValueError: for impossible options, or when it is already patched with other options.
    """
    transformer = find_transformer(pipe_or_transformer)
    if mode != "exact":
        possible = 'the only mode so far is "exact"'
        raise ValueError(f"mode={mode!r} is not available; {possible}")
    options = (mode, visibility, strict, impl)
    state: _Patch | None = getattr(transformer, _STATE, None)
    if state is not None:
        if state.options != options:
            raise ValueError(f"already patched with {state.options}; call unpatch first to patch with {options}")
        return state.report
    state = _Patch(transformer, options)
    object.__setattr__(transformer, _STATE, state)  # not through nn.Module: the state is no submodule
    return state.report


def unpatch(pipe_or_transformer: Any) -> bool:
    """Undo `patch`: the very same processors and forwards as before. False when there was nothing to undo."""
    transformer = find_transformer(pipe_or_transformer)
    state: _Patch | None = getattr(transformer, _STATE, None)
    if state is None:
        return False
    state.remove()
    object.__delattr__(transformer, _STATE)
    return True


# ---- the patch of one transformer ----


class _Patch:
    """Installs and removes; holds what the sites of one transformer share."""

    def __init__(self, transformer: nn.Module, options: tuple) -> None:
        mode, visibility, strict, impl = self.options = options
        weight = next(transformer.parameters())
        probe = weight.new_empty(0, dtype=weight.dtype if weight.is_floating_point() else torch.float32)
        if impl is None:
            implementation, reason = ops.explain(probe)
        else:
            implementation, reason = ops.choose(impl, probe), "asked for"
        self.report = PatchReport(
            model=type(transformer).__name__,
            mode=mode,
            visibility=visibility if isinstance(visibility, str) else getattr(visibility, "__name__", "custom"),
            device=str(weight.device),
            implementation=implementation,
            reason=reason,
            sites=[],
        )
        self.strict, self.impl, self.visibility = strict, impl, visibility
        self.calls = threading.local()
        self.undo: list[Callable[[], None]] = []
        if visibility != "full":
            hook = transformer.register_forward_pre_hook(self._remember_shapes, with_kwargs=True)
            self.undo.append(hook.remove)
        for name, block in transformer.named_modules():
            if type(block).__name__ == "QwenImageTransformerBlock":
                self._install(name, block)

    def remove(self) -> None:
        for undo in reversed(self.undo):
            undo()
        self.undo.clear()

    def _install(self, name: str, block: nn.Module) -> None:
        from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0 as Stock

        attn = block.attn
        if type(attn.processor) is not Stock:
            self.report.notes.append(f"{name}: has its own {type(attn.processor).__name__}, attention left alone")
        else:
            site = Site(f"{name}.attn")
            self.report.sites.append(site)
            stock = attn.processor
            attn.processor = _processor_class()(stock, self, site)
            self.undo.append(lambda: _restore_processor(attn, stock))
        site = Site(name)
        self.report.sites.append(site)
        holder, key = _innermost_forward(block)
        original = getattr(holder, key)
        fused = _bind_forward(block, original, self, site)
        had_own = key in vars(holder)
        setattr(holder, key, fused)
        self.undo.append(lambda: _restore_forward(block, fused, original, had_own and holder is block))

    def _remember_shapes(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls.img_shapes = kwargs.get("img_shapes", args[4] if len(args) > 4 else None)

    # ---- one forward of the transformer ----

    def context(self, hidden_states: Tensor, text_length: int, mask: Tensor | None, freqs: tuple) -> AttentionContext:
        """Layout, plan and rotary tables of the running forward; built by its first block, reused by the others."""
        key = (hidden_states.shape[:2], text_length)
        saved = getattr(self.calls, "context", None)
        if saved and saved[0] == key and saved[1] is mask and saved[2] is freqs[0] and saved[3] is freqs[1]:
            return saved[4]
        batch, image_length = key[0]
        with torch.inference_mode(False), torch.no_grad():
            runs = _text_runs(mask, batch, text_length)
            layout = SelfLayout.qwen([Sample(text, *self._grids(i, image_length)) for i, text in enumerate(runs)])
            joint = torch.cat([freqs[1], freqs[0]]).repeat(batch, 1)  # [text | image] of every sample
            rotary = joint.real.float().contiguous(), joint.imag.float().contiguous()
            context = AttentionContext(layout, plan(layout, self.visibility), rotary, self.impl)
        self.calls.context = (key, mask, *freqs, context)  # holding the tensors keeps their identity unambiguous
        return context

    def _grids(self, sample: int, image_length: int) -> tuple:
        """Target and reference grids; one opaque rectangle where the visibility does not look inside."""
        if self.visibility == "full":
            return ((1, 1, image_length),)
        shapes = self.calls.img_shapes
        target, *references = shapes[sample if sample < len(shapes) else 0]
        return tuple(target), tuple(tuple(grid) for grid in references)

    def modulation_rows(self, index: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """Row of the `[B or 2B, C]` modulation table for every image token, int32 `[B * length]`."""
        saved = getattr(self.calls, "rows", None)
        if saved and saved[0] is index and saved[1] == (batch, length, device):
            return saved[2]
        rows = torch.arange(batch, dtype=torch.int32, device=device)[:, None].expand(batch, length)
        if index is not None:  # 0: sampled t, 1: clean; rows [batch, 2 * batch) are the clean ones
            rows = rows + index.to(torch.int32) * batch
        rows = rows.reshape(-1).contiguous()
        self.calls.rows = (index, (batch, length, device), rows)
        return rows

    def accept(self, site: Site, fused: tuple, original: Callable[[], tuple]) -> tuple:
        """Count a fused result; the first one of a site is compared with the original's."""
        site.calls += 1
        if site.max_rel_error is not None:
            return fused
        expected = original()
        site.max_rel_error = max(max_relative_error(a, b) for a, b in zip(fused, expected, strict=True))
        tolerance = SELF_CHECK_TOLERANCE.get(fused[0].dtype, 1e-4)
        if site.max_rel_error <= tolerance or self.visibility != "full":
            return fused
        message = f"differs from the original by {site.max_rel_error:.2e} (relative; allowed {tolerance:.0e})"
        if self.strict:
            raise RuntimeError(f"{site.name} {message}; unpatch, or patch with strict=False to leave such sites alone")
        site.disabled = message
        return expected


def _refusal(site: Site, *tensors: Tensor) -> str | None:
    """Why this call must run the original, or None."""
    if site.disabled:
        return site.disabled
    if torch.compiler.is_compiling():
        return "inside torch.compile, which fuses the original itself"
    if torch.is_grad_enabled():
        return "gradients are enabled and the fused ops have no backward; use torch.no_grad() for inference"
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return f"mixed dtypes or devices: {first.dtype} on {first.device}, {tensor.dtype} on {tensor.device}"
    if first.dtype not in SELF_CHECK_TOLERANCE:
        return f"{first.dtype} is not one of float32, float16, bfloat16"
    return None


# ---- layer 1: the attention processor ----


def _processor_class() -> type:
    """The processor class, made once: diffusers is imported only when something is patched."""
    global _PROCESSOR
    if _PROCESSOR is None:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
        from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

        class UniRefAttnProcessor:
            """Joint attention of `QwenDoubleStreamAttnProcessor2_0` on fused ops."""

            def __init__(self, stock: Any, owner: _Patch, site: Site) -> None:
                self.stock, self.owner, self.site = stock, owner, site
                self._attention_backend = stock._attention_backend
                self._parallel_config = stock._parallel_config

            def __call__(
                self,
                attn: nn.Module,
                hidden_states: Tensor,
                encoder_hidden_states: Tensor | None = None,
                encoder_hidden_states_mask: Tensor | None = None,
                attention_mask: Tensor | None = None,
                image_rotary_emb: tuple[Tensor, Tensor] | None = None,
            ) -> tuple[Tensor, Tensor]:
                def original() -> tuple[Tensor, Tensor]:
                    self.stock._attention_backend = self._attention_backend
                    self.stock._parallel_config = self._parallel_config
                    return self.stock(
                        attn,
                        hidden_states,
                        encoder_hidden_states=encoder_hidden_states,
                        encoder_hidden_states_mask=encoder_hidden_states_mask,
                        attention_mask=attention_mask,
                        image_rotary_emb=image_rotary_emb,
                    )

                reason = self._refusal(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
                if reason:
                    self.site.fallbacks[reason] += 1
                    return original()
                text = encoder_hidden_states
                context = self.owner.context(
                    hidden_states, text.shape[1], encoder_hidden_states_mask, image_rotary_emb
                )
                image_out, text_out = joint_attention(attn, hidden_states.flatten(0, 1), text.flatten(0, 1), context)
                fused = image_out.unflatten(0, hidden_states.shape[:2]), text_out.unflatten(0, text.shape[:2])
                return self.owner.accept(self.site, fused, original)

            def _refusal(self, attn, image, text, attention_mask, rotary) -> str | None:
                if text is None or rotary is None or attention_mask is not None:
                    return "called without text or rotary embedding, or with an external mask"
                if reason := _refusal(self.site, image, text):
                    return reason
                if self._parallel_config is not None:
                    return "context parallel: the sequence is split over ranks"
                if self._attention_backend is not None:
                    backend = getattr(self._attention_backend, "value", self._attention_backend)
                    return f"attention backend {backend!r} was chosen with set_attention_backend"
                for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
                    if norm is not None and (norm.weight is None or norm.weight.device != image.device):
                        return "a QK norm has no weight on this device (offloaded by layer)"
                return None

        AttentionProcessorRegistry.register(
            UniRefAttnProcessor, AttentionProcessorRegistry.get(QwenDoubleStreamAttnProcessor2_0)
        )
        _PROCESSOR = UniRefAttnProcessor
    return _PROCESSOR


_PROCESSOR: type | None = None


def _restore_processor(attn: nn.Module, stock: Any) -> None:
    if isinstance(attn.processor, _processor_class()):  # else the user has set another one since: theirs stays
        stock._attention_backend = attn.processor._attention_backend
        stock._parallel_config = attn.processor._parallel_config
        attn.processor = stock


# ---- layer 2: the block ----


def _bind_forward(block: nn.Module, original: Callable, owner: _Patch, site: Site) -> Callable:
    def forward(
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
        if reason := _refusal(site, hidden_states, encoder_hidden_states, temb):
            site.fallbacks[reason] += 1
            return original(*arguments)
        fused = _block_forward(block, owner, *arguments)
        return owner.accept(site, fused, lambda: original(*arguments))

    return forward


def _block_forward(block, owner, image, text, mask, temb, rotary, attention_kwargs, index) -> tuple[Tensor, Tensor]:
    """`QwenImageTransformerBlock.forward` with fused norms, modulation and residuals. Returns (text, image)."""
    batch, length = image.shape[:2]
    impl, eps = owner.impl, block.img_norm1.eps
    text_temb = temb.chunk(2)[0] if block.zero_cond_t else temb
    rows = {
        "image": owner.modulation_rows(index, batch, length, image.device),
        "text": owner.modulation_rows(None, batch, text.shape[1], image.device),
    }
    mods = {
        "image": Modulation(*block.img_mod(temb).chunk(6, dim=-1)),
        "text": Modulation(*block.txt_mod(text_temb).chunk(6, dim=-1)),
    }
    flat = {"image": image.flatten(0, 1), "text": text.flatten(0, 1)}
    normed = {
        name: ops.norm_modulate(x, mods[name].shift1, mods[name].scale1, rows[name], eps, impl=impl)
        for name, x in flat.items()
    }
    branches = block.attn(
        hidden_states=normed["image"].view_as(image),
        encoder_hidden_states=normed["text"].view_as(text),
        encoder_hidden_states_mask=mask,
        image_rotary_emb=rotary,
        **(attention_kwargs or {}),
    )
    out = {}
    for name, branch, mlp in (("image", branches[0], block.img_mlp), ("text", branches[1], block.txt_mlp)):
        mod = mods[name]
        x, hidden = ops.gate_residual_norm_modulate(
            flat[name], branch.flatten(0, 1), mod.gate1, mod.shift2, mod.scale2, rows[name], eps, impl=impl
        )
        x = ops.gate_residual(x, mlp(hidden), mod.gate2, rows[name], impl=impl)
        out[name] = x.clip(-65504, 65504) if x.dtype == torch.float16 else x
    return out["text"].view_as(text), out["image"].view_as(image)


def _innermost_forward(block: nn.Module) -> tuple[Any, str]:
    """Where the block's own forward lives, below hooks of diffusers and accelerate: (object, attribute)."""
    registry = getattr(block, "_diffusers_hook", None)
    if registry is not None and registry._fn_refs:
        innermost = registry._fn_refs[0]
        return innermost, "forward" if innermost.original_forward is None else "original_forward"
    if hasattr(block, "_hf_hook"):
        return block, "_old_forward"
    return block, "forward"


def _restore_forward(block: nn.Module, fused: Callable, original: Callable, had_own: bool) -> None:
    """Put the original back wherever the fused forward is now; hooks may have come or gone since."""
    holder, key = _innermost_forward(block)
    if getattr(holder, key) is not fused:
        return  # replaced since by someone else: theirs stays
    if holder is block and key == "forward" and not had_own:
        del block.forward  # back to the class's
    else:
        setattr(holder, key, original)


def _text_runs(mask: Tensor | None, batch: int, length: int) -> list[int | tuple[tuple[int, bool], ...]]:
    """Text of each sample as (length, valid) runs; one host read per mask."""
    if mask is None:
        return [length] * batch
    return [tuple((len(list(run)), bool(valid)) for valid, run in itertools.groupby(row)) for row in mask.bool().tolist()]
