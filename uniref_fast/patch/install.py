"""Install the patched places in a transformer, and remove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from uniref_fast import ops
from uniref_fast.fast import (
    EightBitParts,
    check_mode,
    check_supported,
    eight_bit_parts,
    quantise,
    quantised_before,
    restore,
)
from uniref_fast.layout import Sample
from uniref_fast.models.families import family_of, find_transformer
from uniref_fast.models.kept_references import KeepDtype, RefreshSchedule, check_keep_dtype, dependence
from uniref_fast.patch.families import Place, family_patch
from uniref_fast.patch.kept import ReferenceKeeper
from uniref_fast.patch.report import SELF_CHECK_TOLERANCE, PatchReport
from uniref_fast.patch.state import PatchState
from uniref_fast.quantised_linear import QuantisedWeight
from uniref_fast.visibility import Rule, rule_of

__all__ = ["patch", "patched_parts", "unpatch"]

_INSTALLATION = "_uniref_fast"  # attribute of a patched transformer


def patch(
    pipe_or_transformer: Any,
    mode: str = "exact",
    visibility: str | Rule = "full",
    strict: bool = True,
    *,
    impl: str | None = None,
    keep_references: bool | int | Literal["auto"] = False,
    drift: float | None = None,
    keep_dtype: KeepDtype | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
) -> PatchReport:
    """Make a diffusers pipeline (or its transformer) faster, in place.

    Args:
        pipe_or_transformer: A pipeline of a supported family, another pipeline with the transformer of one, such as a
            `QwenImageTransformer2DModel`, or that model. It may be compiled; the next call then compiles it again.
        mode: "exact" computes the same as the original and rounds where the original rounds. "fast" computes Linears of
            the blocks and attention in 8 bits (docs/fast.md). Their 16-bit weights move to host memory, and `unpatch`
            brings them back with the same bits.
        visibility: Visibility of attention. "full" is the one of diffusers; other policies (`uniref_fast.visibility`)
            are for models trained with them.
        strict: Raise RuntimeError when a self-check fails, in that call of the pipeline and in every later one. With
            False the site runs the original from then on.
        impl: Implementation forced on every op ("reference", "native", "triton"), or on attention alone ("dense",
            "flash", "cudnn_flex": libraries). None chooses by device. For the mode "fast", "reference" emulates the 8
            bits on any device.
        keep_references: Keep the keys and values of references over denoising steps, so that most steps compute text
            and target only (docs/fast.md). A number n computes the references in every n-th step, "auto" as often as
            `drift` requires. True computes them once, which needs a model for which this is exact. In the other steps
            the transformer returns the rows of the target only.
        drift: Tolerance of "auto": the largest relative change of the references' keys and values between two steps
            that compute them. None takes the default.
        keep_dtype: "int8" keeps them in 8 bits. None keeps them unchanged.
        modules_to_not_convert: Names of modules that stay in 16 bits in the mode "fast". None keeps the first and the
            last block and the modulation.

    Returns:
        A live report of the patched sites.

    Raises:
        TypeError: If the model is not supported; the message lists the supported ones.
        ValueError: If options are impossible, or if the model is already patched with other options.
    """
    transformer = find_transformer(pipe_or_transformer, sharded=True, compiled=True)
    family = family_of(transformer)
    family.require("patch")
    fast = check_mode(mode, modules_to_not_convert)
    if fast:
        family.require("fast")
    if keep_references is not False:
        family.require("patch_keep_references")
    rule_of(visibility)  # raises for an unknown one
    check_keep_dtype(keep_dtype)
    one = family.layout(transformer.config, [Sample(1, (1, 1, 1), ((1, 1, 1),) * 2)])
    schedule = RefreshSchedule.of(keep_references, drift, dependence(one, visibility))
    kept = None if modules_to_not_convert is None else tuple(modules_to_not_convert)
    options = (mode, visibility, strict, impl, schedule, keep_dtype, kept)
    found: _Installation | None = getattr(transformer, _INSTALLATION, None)
    if found is not None:
        if found.options != options:
            raise ValueError(f"already patched with {found.options}; call unpatch first to patch with {options}")
        return found.state.report
    parts = _eight_bit_parts(pipe_or_transformer, transformer, kept, impl) if fast else None
    pipe = None if pipe_or_transformer is transformer else pipe_or_transformer
    installation = _Installation(transformer, options, pipe, parts)
    object.__setattr__(transformer, _INSTALLATION, installation)  # not through nn.Module: it is no submodule
    return installation.state.report


def unpatch(pipe_or_transformer: Any) -> bool:
    """Undo `patch`, and return False if the model was not patched.

    The processors and forwards are then the same objects as before. A model that was compiled or sharded after `patch`
    stays compiled or sharded.

    Args:
        pipe_or_transformer: The pipeline or transformer that was patched.

    Raises:
        TypeError: If the model is not supported.
        RuntimeError: If other code wrapped or replaced a patched forward; nothing is undone then.
    """
    transformer = find_transformer(pipe_or_transformer, sharded=True, compiled=True)
    found: _Installation | None = getattr(transformer, _INSTALLATION, None)
    if found is None:
        return False
    found.remove()
    object.__delattr__(transformer, _INSTALLATION)
    return True


def patched_parts(transformer: Any) -> EightBitParts | None:
    """Return the parts that a patch computes in 8 bits; None for a model without a patch in the mode "fast"."""
    found: _Installation | None = getattr(transformer, _INSTALLATION, None)
    return None if found is None else found.state.parts


def _eight_bit_parts(owner: Any, transformer: Any, kept: tuple[str, ...] | None, impl: str | None) -> EightBitParts:
    device = getattr(owner, "_execution_device", None) or _device(transformer)
    check_supported(device, impl)
    return eight_bit_parts(transformer, kept, impl)


def _device(transformer: Any) -> torch.device:
    return next((parameter.device for parameter in transformer.parameters()), torch.device("cpu"))


class _Installation:
    """The patched places of one transformer and the options that it was patched with."""

    def __init__(self, transformer: Any, options: tuple, pipe: Any, parts: EightBitParts | None) -> None:
        mode, visibility, strict, impl, schedule, keep_dtype, _ = self.options = options
        family = family_of(transformer)
        installed = family_patch(family)
        assert installed is not None  # `Family.require` has checked it
        probe = torch.empty(0, dtype=_compute_dtype(transformer), device=_device(transformer))
        head_dim = family.packed.sizes(transformer.config).attention_head_dim
        if impl is None:
            implementation, reason = ops.explain(probe, head_dim)
        elif impl in ops.ATTENTION_LIBRARIES:
            if why := ops.attention_unavailable(impl, probe.new_empty(2, 1, head_dim)):
                raise ValueError(f"impl={impl!r} is not possible here: {why}")
            implementation, reason = impl, "asked for, for attention"
        else:
            implementation, reason = ops.choose(impl, probe, head_dim), "asked for"
        report = PatchReport(
            model=type(transformer).__name__,
            mode=mode,
            visibility=visibility if isinstance(visibility, str) else getattr(visibility, "__name__", "custom"),
            implementation=implementation,
            reason=reason,
            sites=[],
        )
        self.state = PatchState(report, visibility, strict, impl, parts)
        self.places: list[Place] = []
        self.hooks: list[Any] = []
        self.keeper: ReferenceKeeper | None = None
        if visibility != "full":
            installed.refuse_processors(transformer, visibility)  # before anything is installed
            report.notes.append(
                f"no self-check of attention: visibility {report.visibility} differs from the original's on purpose"
            )
        self.transformer = transformer
        if parts is not None:
            quantise(transformer, parts, to_host=True)
            self.hooks.append(transformer.register_state_dict_post_hook(_with_exact_weights))
            report.eight_bit = len(parts.linears), len(parts.attention)
            if note := quantised_before(transformer):
                report.notes.append(note)
        if visibility != "full" or schedule is not None:
            self.hooks.append(transformer.register_forward_pre_hook(self.state.remember_shapes, with_kwargs=True))
        if schedule is not None:
            keeper = ReferenceKeeper(self.state, schedule, keep_dtype, pipe)
            self.hooks.append(transformer.register_forward_pre_hook(keeper.before, with_kwargs=True))
            self.hooks.append(transformer.register_forward_hook(keeper.after, always_call=True))
            self.keeper = keeper
        for place in installed.install(transformer, self.state):
            if isinstance(place, str):
                report.notes.append(place)
            else:
                report.sites.append(place.site)
                self.places.append(place)

    def remove(self) -> None:
        """Undo everything, or raise RuntimeError before anything is undone."""
        for place in self.places:
            place.locate()
        for place in reversed(self.places):
            place.remove()
        for hook in self.hooks:
            hook.remove()
        if self.keeper is not None:
            self.keeper.remove(self.transformer)
        if self.state.parts is not None:
            restore(self.transformer)


def _with_exact_weights(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Put the 16-bit weights into a state dict, so that a patched model is saved as it was."""
    for name, value in state_dict.items():
        if isinstance(value, QuantisedWeight):
            state_dict[name] = value.original.detach()


def _compute_dtype(transformer: Any) -> torch.dtype:
    """Return the dtype that the blocks compute in: the first parameter's that is no storage dtype of quantisation."""
    dtypes = [transformer.dtype, *(parameter.dtype for parameter in transformer.parameters())]
    return next((dtype for dtype in dtypes if dtype in SELF_CHECK_TOLERANCE), torch.float32)
