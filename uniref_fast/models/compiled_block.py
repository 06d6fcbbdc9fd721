"""Blocks of a packed model under torch.compile: tables as tensors, and the compiler that the user chose for diffusers.

An uncompiled block reads its tables from a layout and a plan on the host. A graph that did so would be compiled again
for every layout, so a compiled block gets a `TracedContext`, whose sizes are those of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.models.kept_references import TracedReferences
from uniref_fast.models.onednn_linear import call_linear
from uniref_fast.ops.segment_attention import PreparedPlan, prepare_plan

__all__ = ["CompiledCall", "TracedContext", "TracedLayout", "compiler_of", "mark_dynamic", "traced_context"]


class TracedLayout:
    """Layout of a call inside a graph: its tables are tensors."""

    def rows(self, joint: Tensor, stream: str) -> Tensor:
        """Return the rows of the stream "text" or "image" out of values in joint order, `[N_stream, ...]`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class TracedContext(TracedLayout):
    """A `ForwardContext` of tensors and constants, which is its own layout.

    Attributes:
        joint_rows: Joint row of every row of the text and of the image stream, int32 `[N_text]` and `[N_image]`.
        table_rows: Row of the modulation table of every row of both streams and of the joint sequence, int32.
        rotary: Rotary cos and sin in joint order, float32 `[N, D / 2]` each.
        targets: Rows of the image stream that are targets, int64 `[N_target]`.
        plan: Prepared plan of all rows, or another object that the attention of a patched block takes.
        target_plan: Prepared plan of the targets' queries.
        impl: Implementation of every op.
        fuse_residual: A block leaves its last residual to the first norm of the next block.
        for_training: Attention was chosen by the cost of forward and backward.
        references: Keys and values of the whole joint sequence if some references are kept, or None.
    """

    joint_rows: tuple[Tensor, Tensor]
    table_rows: tuple[Tensor, Tensor, Tensor]
    rotary: tuple[Tensor, Tensor]
    targets: Tensor
    plan: Any
    target_plan: PreparedPlan
    impl: str
    fuse_residual: bool
    for_training: bool
    rounding: ops.Rounding = "once"
    references: TracedReferences | None = None
    parallel: None = None

    linear = staticmethod(call_linear)

    @property
    def layout(self) -> TracedContext:
        """The context, which has the methods of a layout that a block calls."""
        return self

    @property
    def text_length(self) -> int:
        """Number of rows of the text stream."""
        return self.joint_rows[0].shape[0]

    @property
    def image_length(self) -> int:
        """Number of rows of the image stream."""
        return self.joint_rows[1].shape[0]

    @property
    def joint_length(self) -> int:
        """Number of rows of the joint sequence."""
        return self.text_length + self.image_length

    def joint_index(self, stream: str, device: Any = None) -> Tensor:
        """Return the joint row of every row of a stream, int32 `[N_stream]`."""
        if stream == "joint":
            return torch.arange(self.joint_length, dtype=torch.int32, device=self.joint_rows[0].device)
        return self.joint_rows[stream == "image"]

    def rows(self, joint: Tensor, stream: str) -> Tensor:
        """Return the rows of a stream out of values in joint order, `[N_stream, ...]`."""
        return joint.index_select(0, self.joint_index(stream))

    def modulation_rows(self, stream: str, device: Any = None) -> Tensor:
        """Return the modulation row of every row of a stream, int32 `[N_stream]`."""
        return self.table_rows[("text", "image", "joint").index(stream)]

    def target_rows(self, device: Any = None) -> Tensor:
        """Return the rows of the image stream that are targets, int64 `[N_target]`."""
        return self.targets


def traced_context(context: Any, q: Tensor) -> TracedContext | str:
    """Return the context of compiled blocks, or the reason why blocks cannot be compiled under a `ForwardContext`.

    Args:
        context: The `ForwardContext`.
        q: Tensor `[0, H, D]` with the heads, dtype and device of the queries.
    """
    layout, device = context.layout, q.device
    if context.parallel is not None or context.checkpointing:
        return "it is recomputed or shared between ranks"
    impl = ops.choose(context.impl, q, q.shape[-1])
    if impl == "reference" or context.impl in ops.ATTENTION_LIBRARIES:
        return f"impl={context.impl or impl!r} plans attention on the host"
    backward = torch.is_grad_enabled()
    plans = [prepare_plan(q, plan, impl, backward=backward) for plan in (context.plan, context.target_plan)]
    references = None if context.references is None else context.references.buffers(q)

    def own(x: Tensor) -> Tensor:
        """Return a tensor that can be marked: those of the layout also serve forwards without kept references."""
        return x if references is None else x.detach()

    rows = [own(context.modulation_rows(stream)) for stream in ("text", "image", "joint")]
    traced = TracedContext(
        joint_rows=(own(layout.joint_index("text", device)), own(layout.joint_index("image", device))),
        table_rows=(rows[0], rows[1], rows[2]),
        rotary=(own(context.rotary[0]), own(context.rotary[1])),
        targets=own(context.target_rows()),
        plan=plans[0],
        target_plan=plans[1],
        impl=impl,
        fuse_residual=context.fuse_residual,
        for_training=context.for_training,
        rounding=context.rounding,
        references=references,
    )
    if references is not None:  # the steps of one edit have different numbers of rows, but not in every tensor
        tensors = *traced.joint_rows, *traced.table_rows, *traced.rotary, traced.targets
        mark_dynamic(*tensors, references.rows, references.keys, references.values)
    return traced


def mark_dynamic(*tensors: Tensor, dim: int = 0) -> None:
    """Make one size of tensors, the first by default, a symbol from the first compilation on."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


class CompiledCall:
    """The compiled code of a module, as a place for code that runs before and after it and is not compiled.

    Args:
        compiled: The compiled code, as PyTorch keeps it with the module.
    """

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled


def compiler_of(module: nn.Module) -> Callable[[Callable], Callable] | None:
    """Return a function that compiles as `module.compile(...)` was called, or None if the module is not compiled.

    PyTorch keeps the options of that call with the compiled function; if they are not found there, they are the
    defaults of torch.compile.
    """
    compiled = module._compiled_call_impl
    if isinstance(compiled, CompiledCall):
        compiled = compiled.compiled
    if compiled is None:
        return None
    from torch._dynamo.eval_frame import _TorchDynamoContext

    for cell in getattr(compiled, "__closure__", None) or ():
        if isinstance(cell.cell_contents, _TorchDynamoContext):
            return cell.cell_contents
    return torch.compile
