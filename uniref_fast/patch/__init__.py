"""`patch(pipe)`: the same diffusers pipeline, same images, faster; `unpatch` undoes it.

Two layers per block, both on the instance, none on the class:

1. the attention processor: QK norm, rotary and packing in one pass, attention without a mask tensor;
2. `block.forward`: norms, modulation and gated residuals in one pass each; installed *below* hooks that are already
   there, with the original's argument names and order, so that caches, offloading and checkpointing go on working.

Every call passes cheap guards; what they refuse runs the original, and the report says how often and why. At the first
accelerated call of each site the code of diffusers is run as well, on the results that the Linears and other modules
returned in that call, and the difference is recorded. No module is called a second time for it.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.qwen_image import ForwardContext, find_transformer
from uniref_fast.patch.processors import (
    SELF_CHECK_TOLERANCE,
    PatchedAttention,
    PatchedBlock,
    Site,
    register_processor,
    stock_forward,
)
from uniref_fast.visibility import Rule, rule_of

__all__ = ["PatchReport", "Site", "patch", "unpatch"]

_STATE = "_uniref_fast"


@dataclass
class PatchReport:
    """What `patch` did; live: its counters go on counting while the pipeline runs. `str(report)` is for people.

    Attributes:
        model: class of the transformer.
        mode, visibility: as patched.
        implementation, reason: the choice for the model as it was when patched; `calls` tells what really served.
        sites: the patched places (`Site`), each with its counters.
        notes: what was left alone, and why.
    """

    model: str
    mode: str
    visibility: str
    implementation: str
    reason: str
    sites: list[Site]
    notes: list[str] = field(default_factory=list)

    @property
    def max_rel_error(self) -> float | None:
        """Largest self-check error over all sites; None before the first call."""
        return max((s.max_rel_error for s in self.sites if s.max_rel_error is not None), default=None)

    @property
    def calls(self) -> Counter[str]:
        """Accelerated calls, by the implementation that served them."""
        return sum((s.calls for s in self.sites), Counter())

    @property
    def fallbacks(self) -> Counter[str]:
        """Calls that ran the original, by reason."""
        return sum((s.fallbacks for s in self.sites), Counter())

    @property
    def traces(self) -> int:
        """How often torch.compile or torch.export traced a site; compiled code runs the original."""
        return sum(s.traces for s in self.sites)

    @property
    def reasons(self) -> Counter[str]:
        """Accelerated attention calls, by implementation and why it was chosen."""
        return sum((s.reasons for s in self.sites), Counter())

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.sites)} sites patched, mode={self.mode}, visibility={self.visibility}",
            f"  implementation  {self.implementation} when patched ({self.reason})",
            f"  accelerated     {self.calls.total()} calls"
            + "".join(f", {count} {name}" for name, count in self.calls.most_common()),
            f"  originals run   {sum(self.fallbacks.values())} calls",
        ]
        lines += [f"    {count:6d} x  {reason}" for reason, count in self.fallbacks.most_common()]
        if self.traces:
            lines.append(
                f"  compiled        {self.traces} traces of sites by torch.compile; compiled code runs the original, "
                "and its calls are not counted"
            )
        lines += [f"  attention       {count} x {reason}" for reason, count in self.reasons.most_common(4)]
        lines += [f"  disabled        {s.name}: {s.disabled}" for s in self.sites if s.disabled]
        error = self.max_rel_error
        checked = sum(s.max_rel_error is not None for s in self.sites)
        result = "not run yet" if error is None else f"max relative error {error:.2e}"
        lines.append(f"  self-check      {result}, {checked} of {len(self.sites)} sites compared with the original")
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
        mode: "exact" computes what the original computes and rounds where the original rounds.
        visibility: "full" is what diffusers computes; other policies (`uniref_fast.visibility`) are for models trained
            with them.
        strict: a failed self-check raises RuntimeError, in the call of the pipeline that finds it and in all after it;
            with False that site runs the original from then on.
        impl: implementation forced on every op ("reference", "native", "triton"); None picks by device.

    Returns:
        a live report of the patched sites.

    Raises:
        TypeError: for a model that is not supported; the message lists those that are.
        ValueError: for impossible options, when it is already patched with other options, or when the transformer or a
            block is compiled already: patch first, then compile.
    """
    transformer = find_transformer(pipe_or_transformer, sharded=True, compiled=True)
    if mode != "exact":
        raise ValueError(f"mode={mode!r} is not available; the only mode so far is 'exact'")
    rule_of(visibility)  # raises for an unknown one
    options = (mode, visibility, strict, impl)
    state: _Patch | None = getattr(transformer, _STATE, None)
    if state is not None:
        if state.options != options:
            raise ValueError(f"already patched with {state.options}; call unpatch first to patch with {options}")
        return state.report
    find_transformer(pipe_or_transformer, sharded=True)  # raises for a wrapper of torch.compile
    _refuse_compiled(transformer)
    state = _Patch(transformer, options)
    object.__setattr__(transformer, _STATE, state)  # not through nn.Module: the state is no submodule
    return state.report


def unpatch(pipe_or_transformer: Any) -> bool:
    """Undo `patch`: the very same processors and forwards as before. False when there was nothing to undo.

    Models that were compiled or sharded after `patch` are unpatched too, without undoing that.

    Raises:
        TypeError: for a model that is not supported.
        RuntimeError: when something else wrapped or replaced a patched forward; nothing is undone then.
    """
    transformer = find_transformer(pipe_or_transformer, sharded=True, compiled=True)
    state: _Patch | None = getattr(transformer, _STATE, None)
    if state is None:
        return False
    state.remove()
    object.__delattr__(transformer, _STATE)
    return True


# ---- the patch of one transformer ----


class _Calls(threading.local):
    """What one thread remembers of its running forward; copies start empty."""

    img_shapes: Any = None
    checking: bool = False
    context: Any = None
    rows: Any = None

    def __reduce__(self) -> tuple:
        return _Calls, ()


class _Shapes(WeakIdKeyDictionary):
    """Image sizes of the forwards that are still known by their rotary tables; copies start empty."""

    def __deepcopy__(self, memo: Any) -> _Shapes:
        return _Shapes()

    def __reduce__(self) -> tuple:
        return _Shapes, ()


class _Patch:
    """Installs and removes; holds what the sites of one transformer share."""

    def __init__(self, transformer: Any, options: tuple) -> None:
        mode, visibility, strict, impl = self.options = options
        device = next((parameter.device for parameter in transformer.parameters()), torch.device("cpu"))
        probe = torch.empty(0, dtype=_compute_dtype(transformer), device=device)
        head_dim = transformer.config.attention_head_dim
        if impl is None:
            implementation, reason = ops.explain(probe, head_dim)
        else:
            implementation, reason = ops.choose(impl, probe, head_dim), "asked for"
        self.report = PatchReport(
            model=type(transformer).__name__,
            mode=mode,
            visibility=visibility if isinstance(visibility, str) else getattr(visibility, "__name__", "custom"),
            implementation=implementation,
            reason=reason,
            sites=[],
        )
        self.strict, self.impl, self.visibility = strict, impl, visibility
        self.calls = _Calls()
        self.installed: list[PatchedBlock | PatchedAttention] = []
        self.shapes = _Shapes()
        self.hook = None
        if visibility != "full":
            _refuse_processors(transformer, visibility)  # before anything is installed
            self.hook = transformer.register_forward_pre_hook(self.remember_shapes, with_kwargs=True)
            self.report.notes.append(
                f"no self-check of attention: {self.report.visibility} differs from the original by intention"
            )
        register_processor()
        for name, block in transformer.transformer_blocks.named_children():
            self._install(f"transformer_blocks.{name}", block)

    def _install(self, name: str, block: Any) -> None:
        if _has_stock_processor(block):
            self._add(PatchedAttention(block.attn, self, Site(f"{name}.attn")))
        else:
            self.report.notes.append(f"{name}.attn has its own {_processor(block)}; attention is left to it")
        if stock_forward(block):
            self._add(PatchedBlock(block, self, Site(name)))
        else:
            self.report.notes.append(f"{name} has a forward of its own; norms and residuals are left to it")

    def _add(self, place: PatchedBlock | PatchedAttention) -> None:
        self.report.sites.append(place.site)
        self.installed.append(place)

    def remove(self) -> None:
        for place in self.installed:  # raises before anything is undone
            place.locate()
        for place in reversed(self.installed):
            place.remove()
        if self.hook is not None:
            self.hook.remove()

    def remember_shapes(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls.img_shapes = kwargs.get("img_shapes", args[4] if len(args) > 4 else None)

    # ---- one forward of the transformer ----

    def context(self, hidden_states: Tensor, text_length: int, mask: Tensor | None, freqs: tuple) -> ForwardContext:
        """Layout, plan and rotary tables of the running forward; built by its first block, reused by the others."""
        batch, image_length = hidden_states.shape[:2]
        # A backward that runs the blocks again may do so after other forwards, and in a thread of its own: what knows
        # its forward are the tensors that the checkpoints keep.
        shapes = None
        if self.visibility != "full":
            shapes = self.shapes.setdefault(freqs[0], self.calls.img_shapes)
            assert shapes is not None, "no image sizes are known of this forward"
        grids = [_grids(shapes, sample, image_length) for sample in range(batch)]
        key = (text_length, grids)
        saved = self.calls.context
        if saved and saved[0] == key and saved[1] is mask and saved[2] is freqs[0] and saved[3] is freqs[1]:
            return saved[4]
        with torch.inference_mode(False), torch.no_grad():
            runs = _text_runs(mask, batch, text_length)
            layout = SelfLayout.qwen([Sample(text, *shapes) for text, shapes in zip(runs, grids, strict=True)])
            joint = torch.cat([freqs[1], freqs[0]]).repeat(batch, 1)  # [text | image] of every sample
            rotary = joint.real.float().contiguous(), joint.imag.float().contiguous()
            context = ForwardContext(
                layout=layout, visibility=self.visibility, rotary=rotary, impl=self.impl, rounding="eager"
            )
        self.calls.context = (key, mask, *freqs, context)  # holding the tensors keeps their identity unambiguous
        return context

    def modulation_rows(self, index: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """Row of the `[B or 2B, C]` modulation table for every token of a stream, int32 `[B * length]`."""
        if index is None:
            return _batch_rows(batch, length, device)
        saved = self.calls.rows
        if saved and saved[0] is index and saved[1] == batch:
            return saved[2]
        # 0: sampled t, others: clean; rows [batch, 2 * batch) of the table are the clean ones
        rows = _batch_rows(batch, length, device).view(batch, length) + (index != 0).to(torch.int32) * batch
        self.calls.rows = (index, batch, rows.reshape(-1))
        return self.calls.rows[2]

    def refuse(self, site: Site, reason: str, original: Callable[[], tuple]) -> tuple:
        """Count a refusal and run the original."""
        if not self.calls.checking:
            site.fallbacks[reason] += 1
        return original()

    def _uncounted(self, original: Callable[[], tuple]) -> tuple:
        """The original's result; what sites within it do is not the user's calling."""
        self.calls.checking = True
        try:
            return original()
        finally:
            self.calls.checking = False

    def accept(
        self,
        site: Site,
        fused: tuple,
        like: Tensor,
        original: Callable[[], tuple],
        check: Callable[[], float] | None,
        choice: tuple[str, str | None],
    ) -> tuple:
        """Count a fused result, after comparing it with the original's by `check` if given.

        `like` is an input of the site; `choice` is the implementation that computed the result, and for attention the
        reason for it.
        """
        if self.calls.checking:  # within an original that runs for another site: not a call of the user's
            return fused
        if check is not None:
            with torch.no_grad():  # also for the comparison: a checkpoint counts the tensors that are kept
                error = check()
            tolerance = SELF_CHECK_TOLERANCE[like.dtype]
            message = f"differs from the original by {error:.2e} (relative; allowed {tolerance:.0e})"
            if error > tolerance and self.strict:  # the site stays unchecked: the next call raises too
                advice = "unpatch, or patch with strict=False to leave such sites alone"
                raise RuntimeError(f"{site.name} {message}; {advice}")
            site.max_rel_error = error
            if error > tolerance:
                site.disabled = message
                site.fallbacks[message] += 1
                return self._uncounted(original)
        served, reason = choice
        site.calls[served] += 1
        if reason is not None:
            site.reasons[f"{served}: {reason}"] += 1
        return fused


def _refuse_compiled(transformer: Any) -> None:
    """Code that is compiled already would go on running what it was compiled from."""
    places = {"transformer": transformer}
    for name, block in transformer.transformer_blocks.named_children():
        places |= {f"transformer_blocks.{name}": block, f"transformer_blocks.{name}.attn": getattr(block, "attn", None)}
    for name, module in places.items():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name} was compiled in place; patch first, then compile. `_compiled_call_impl = None` on that module "
                "takes the compiled code off it"
            )


def _has_stock_processor(block: Any) -> bool:
    from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0 as Stock

    return type(getattr(getattr(block, "attn", None), "processor", None)) is Stock


def _processor(block: Any) -> str:
    return type(getattr(getattr(block, "attn", None), "processor", None)).__name__


def _refuse_processors(transformer: Any, visibility: str | Rule) -> None:
    """Processors of the user's own attend as they like, so another visibility cannot be had with them."""
    for name, block in transformer.transformer_blocks.named_children():
        if not _has_stock_processor(block):
            raise ValueError(
                f"transformer_blocks.{name}.attn has its own {_processor(block)}, which knows nothing of visibility "
                f"{visibility!r}"
            )


def _grids(shapes: Any, sample: int, image_length: int) -> tuple:
    """Target and reference grids; without shapes, where the visibility does not look inside, one opaque rectangle."""
    if shapes is None:
        return ((1, 1, image_length),)
    target, *references = shapes[sample if sample < len(shapes) else 0]
    return tuple(target), tuple(tuple(grid) for grid in references)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _batch_rows(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(length)


def _compute_dtype(transformer: Any) -> torch.dtype:
    """What the blocks compute in, as far as the parameters tell; storage dtypes of quantised Linears do not count."""
    dtypes = [transformer.dtype, *(parameter.dtype for parameter in transformer.parameters())]
    return next((dtype for dtype in dtypes if dtype in SELF_CHECK_TOLERANCE), torch.float32)


def _text_runs(mask: Tensor | None, batch: int, length: int) -> list[int | tuple[tuple[int, bool], ...]]:
    """Text of each sample as (length, valid) runs; one host read per mask."""
    if mask is None:
        return [length] * batch
    return [
        tuple((len(list(run)), bool(valid)) for valid, run in itertools.groupby(row)) for row in mask.bool().tolist()
    ]
