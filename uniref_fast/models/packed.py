"""Parts that the packed models of all families share: blocks, their recomputation, and one forward over a pack.

A family derives its block from `PackedBlock` and its model from `PackedModel`. A packed model runs the parameters of a
live diffusers model: no copy, no new modules. Its Linears are called, never read, so LoRA, quantised or cast Linears
keep working.

Shapes: a stream has N rows of C channels, S samples, R rows of the modulation table. A rank has n rows of a stream: all
of them, or its part under sequence parallelism.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from uniref_fast import ops
from uniref_fast.layout import RotaryScheme, Sample, SelfLayout
from uniref_fast.memo import memo
from uniref_fast.models.compiled_block import TracedContext, compiler_of, mark_dynamic, traced_context
from uniref_fast.models.kept_references import Kept, KeptReferences, ReferenceRows
from uniref_fast.models.module_hooks import may_have_hooks, onloaded
from uniref_fast.models.onednn_linear import CallLinear, call_linear, row_by_row_linear
from uniref_fast.models.pack_adapters import PackAdapters
from uniref_fast.models.sequence_parallel import SequenceParallel
from uniref_fast.models.step_constants import StepConstants
from uniref_fast.quantised_linear import is_quantised
from uniref_fast.visibility import AttentionPlan, Rule, plan, rule_of, target_plan

__all__ = [
    "DeferredResidual",
    "ForwardContext",
    "ModelSizes",
    "PackedBlock",
    "PackedModel",
    "angle_dtype",
    "clipped",
    "joint_sources",
    "qk_norm_names",
    "qk_norms",
    "skip",
]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a transformer, under the names that most configurations of diffusers have.

    Attributes:
        token_channels: Channels of a latent token.
        num_attention_heads: Number of heads.
        attention_head_dim: Channels of a head.
        num_layers: Number of blocks, without those of `num_single_layers`.
        num_single_layers: Number of blocks with one stream that follow blocks with two.
    """

    token_channels: int
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    num_single_layers: int = 0

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        """Number of blocks of all kinds."""
        return self.num_layers + self.num_single_layers


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """Arguments of one forward that all its blocks share.

    Attributes:
        layout: Layout of the rows that are computed: of the pack, or without references that are kept.
        visibility: Visibility that attention follows.
        rotary: Rotary cos and sin in joint order, float32 `[N, D / 2]` each.
        references: References whose keys and values are kept, or None.
        impl: Implementation forced on every op, or None.
        rounding: "once" or "eager", see `ops.norm_modulate`.
        for_training: Choose attention by the cost of forward and backward, also where no gradient is computed.
        checkpointing: Recomputation of blocks in the backward, see `PackedQwenImage`.
        fuse_residual: A block leaves its last residual to the first norm of the next block.
        parallel: Communication between the ranks that share the pack, or None.
    """

    # sequence
    layout: SelfLayout
    visibility: str | Rule
    rotary: tuple[Tensor, Tensor]
    references: ReferenceRows | None = None
    # choice of implementation
    impl: str | None = None
    rounding: ops.Rounding = "once"
    for_training: bool = False
    # memory and ranks
    checkpointing: bool | str = False
    fuse_residual: bool = True
    parallel: SequenceParallel | None = None

    @property
    def linear(self) -> CallLinear:
        """Function that calls a Linear of a block with a stream: `row_by_row_linear` except in training.

        In training, forwards without a gradient, such as rollouts, must have the bits of those with one.
        """
        return call_linear if self.for_training else functools.partial(row_by_row_linear, impl=self.impl)

    @property
    def plan(self) -> AttentionPlan:
        """Plan of all rows that are computed."""
        return plan(self.layout, self.visibility) if self.references is None else self.references.plan(self.visibility)

    @property
    def target_plan(self) -> AttentionPlan:
        """Plan of the targets' queries alone."""
        return target_plan(self.layout if self.references is None else self.references.whole, self.visibility)

    def computed(self, stream: str, x: Tensor) -> Tensor:
        """Return the rows that are computed of the "text" or "image" stream of the pack, `[N_stream, C]`."""
        return x if self.references is None else self.references.stream(stream, x)

    def modulation_rows(self, stream: str) -> Tensor:
        """Return the modulation row of every row of a stream that this rank has, int32 `[n]`."""
        rows = self.layout.modulation_rows(stream, self.rotary[0].device)
        return rows if self.parallel is None else rows[self.parallel.rows(self.layout, stream)]

    def target_rows(self) -> Tensor:
        """Return the rows of this rank's part of the image stream that are targets, int64 `[n_target]`."""
        targets = self.layout.target_rows(self.rotary[0].device)
        if self.parallel is None:
            return targets
        bounds, first = self.parallel.targets(self.layout), self.parallel.rows(self.layout, "image").start
        return targets[bounds[self.parallel.rank] : bounds[self.parallel.rank + 1]] - first


class DeferredResidual(NamedTuple):
    """Last residual of a block in one stream, `x + gate[row] * branch`, which the next block adds."""

    branch: Tensor  # [n, C]
    gate: Tensor  # [R, C]


HOST = "cpu"  # device of the copies in host memory


class HostCopy:
    """A tensor that is taken on its device once, and afterwards from a copy in host memory.

    Args:
        tensor: The tensor, on any device. It is freed once it has been taken and is not used elsewhere.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.requires_grad = tensor.device, tensor.requires_grad
        self.first: Tensor | None = tensor
        # Pinned memory is copied by the stream of the computation, in order with the use of the tensor.
        self.copy = torch.empty_like(tensor, device=HOST, pin_memory=tensor.is_cuda, requires_grad=False)
        self.copy.copy_(tensor.detach(), non_blocking=True)

    def take(self) -> Tensor:
        """Return the tensor at the first call, and a copy with the same values on the same device at later calls."""
        first, self.first = self.first, None
        if first is not None:
            return first
        return self.copy.to(self.device, non_blocking=True, copy=True).requires_grad_(self.requires_grad)


class PackedBlock(nn.Module):
    """A block over a pack.

    It is a module, so that a model can be sharded and recomputed block by block.

    Args:
        block: The diffusers block whose parameters are used.
        last: True for the last block of a model, of whose output only the targets' rows are used.
        attention_8bit: Name of its attention if that is computed in 8 bits, or an empty string. Linears are in 8 bits
            if their weights are (`uniref_fast.fast`).

    Attributes:
        mlps: Names of the feed-forwards of the diffusers block.
        compiled: Compiled code of the block, which `compile` sets, or None.
        compiled_with_references: The same for forwards with kept references.
    """

    mlps: ClassVar[tuple[str, ...]] = ()
    block: Any

    def __init__(self, block: Any, last: bool = False, attention_8bit: str = "") -> None:
        super().__init__()
        self.block, self.last, self.attention_8bit = block, last, attention_8bit
        self.compiled: Callable[..., Any] | None = None
        self.compiled_with_references: Callable[..., Any] | None = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block; the arguments are those of `torch.compile`."""
        self.compile_by(lambda run: torch.compile(run, *args, **kwargs))

    def compile_by(self, compiler: Callable[[Callable], Callable]) -> None:
        """Compile the block with a function such as `torch.compile`."""
        self.compiled, self.compiled_with_references = compiler(self._run), compiler(self._run_with_references)

    def forward(
        self,
        streams: list[Tensor],
        residuals: list[DeferredResidual],
        temb: Tensor,
        context: ForwardContext,
        traced: TracedContext | None = None,
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        """Run the block. It empties both lists, so that each tensor is freed as soon as it has been used.

        Args:
            streams: Streams of the model, this rank's rows of them, `[n, C]` each.
            residuals: Residuals of the streams that the block before has left, or none.
            temb: Timestep embedding, `[R, C]`, or the modulation that all blocks share, `[R, ...]`.
            context: Context of the forward.
            traced: The same context for compiled code; None runs the block uncompiled.

        Returns:
            The streams and the residuals that are left to the next block. The last block returns one stream, the
            targets' rows of the image stream, `[n_target, C]`.
        """
        if context.checkpointing and torch.is_grad_enabled():
            return self._recomputed(streams, residuals, temb, context)
        with onloaded(self.block):
            if traced is not None and self.compiled is not None and self.compiled_with_references is not None:
                mark_dynamic(temb, *(gate for _, gate in residuals))  # packs of 2 and 3 samples share a graph
                if context.references is None:
                    return self.compiled(streams, residuals, temb, traced)
                mark_dynamic(*streams, *(branch for branch, _ in residuals))
                context.references.before_block(self.block.attn)
                outputs = self.compiled_with_references(streams, residuals, temb, traced)
                context.references.after_block(self.block.attn)
                return outputs
            return self._run(streams, residuals, temb, context)

    def _recomputed(
        self, streams: list[Tensor], residuals: list[DeferredResidual], temb: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        """Run the block, and once more in the backward, for which its inputs are kept."""
        kept = tuple(map(HostCopy, streams) if context.checkpointing == "host" else streams)
        streams.clear()

        def run(
            kept: Sequence[Any], residuals: Sequence[DeferredResidual], temb: Tensor, context: ForwardContext
        ) -> Any:
            inputs = [x.take() if isinstance(x, HostCopy) else x for x in kept]
            return self._run(inputs, [*residuals], temb, context)

        more: Any = {"context_fn": _keep_attention} if context.checkpointing is True else {}
        return checkpoint(run, kept, tuple(residuals), temb, context, use_reentrant=False, **more)

    def _run(
        self, streams: list[Tensor], residuals: list[DeferredResidual], temb: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        """Run the block as `forward` describes; a family defines it.

        In compiled code `context` is a `TracedContext`, which has the attributes that are used here.
        """
        raise NotImplementedError

    def _run_with_references(self, *arguments: Any) -> tuple[list[Tensor], list[DeferredResidual]]:
        """Run the block: a function of its own, because torch.compile limits the number of graphs of a function."""
        return self._run(*arguments)


class PackedModel(nn.Module):
    """A diffusers transformer that runs packs of samples of different sizes; a family derives its model from it.

    Args:
        transformer: The diffusers model whose parameters are used. It is not changed. Add adapters first.
        visibility: Policy name or rule (`uniref_fast.visibility`). Anything but "full" needs a model trained for it.
        impl: Implementation forced on every op. None chooses by device.
        checkpointing: Recomputation of blocks in the backward. True keeps the input of each block and the output of its
            attention, "inputs" the input alone, "host" the input in host memory; False keeps everything.
        for_training: Always choose attention by the cost of forward and backward, so that a forward without gradients
            equals one with gradients bit for bit.
        attention_8bit: Names of the attention that is computed in 8 bits, such as
            "transformer_blocks.1.attn.processor".

    Attributes:
        block_classes: Class of the family's blocks, by the name of their list in the transformer, in order.
        attention: Name of the self-attention in a block.
        first_lists: Lists whose first blocks get embedded tokens and not the output of another list; empty for the
            first list alone.
        modulations: Parts of the names of the Linears of blocks that compute modulation.
        ends: Names of the modules of the transformer that are called outside of its blocks.
        refused_options: Options of the transformer's configuration that the family's forward does not compute.
        text_channels: Name of the option that is the width of the prompt embeddings.
        scheme: Rotary scheme of a family whose layouts are those of `SelfLayout.pack`.
        clean_references: True if these layouts modulate references with t = 0.
        shares_packs: True if several ranks can share a pack (`parallel`).
        jumps: True for a flow map, whose `forward` takes the time of each sample and the time to which the step jumps.
        row_kinds: Parts of the names of modules, and the kind of the rows of their inputs: "text", "image" or "joint"
            for a stream, "table" for the modulation table. The first part that a name contains counts. Empty for a
            family whose samples cannot have adapters of their own.
        blocks: The `PackedBlock`s, which sharding by block wraps.
        parallel: A `SequenceParallel` if the ranks of a group share every pack, or None.
        target_bounds: Cuts of the targets' rows that each rank has got from the last forward under `parallel`:
            `ranks + 1` ascending numbers.

    Raises:
        ValueError: If the model's forward differs from the packed one (`refused_options`).
    """

    block_classes: ClassVar[Mapping[str, type[PackedBlock]]]
    attention: ClassVar[str] = "attn"
    first_lists: ClassVar[tuple[str, ...]] = ()
    modulations: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]]
    refused_options: ClassVar[tuple[str, ...]] = ()
    text_channels: ClassVar[str] = "joint_attention_dim"
    jumps: bool = False
    scheme: ClassVar[RotaryScheme]
    clean_references: bool = False
    shares_packs: ClassVar[bool] = False
    row_kinds: ClassVar[tuple[tuple[str, str], ...]] = ()
    transformer: Any

    def __init__(
        self,
        transformer: Any,
        *,
        visibility: str | Rule = "full",
        impl: str | None = None,
        checkpointing: bool | str = False,
        for_training: bool = False,
        attention_8bit: Collection[str] = (),
    ) -> None:
        super().__init__()
        rule_of(visibility)  # raises for an unknown one
        config = transformer.config
        for option in self.refused_options:
            if getattr(config, option, False):
                raise ValueError(f"packed forward does not know config.{option}=True of {type(transformer).__name__}")
        # Not a submodule: its blocks are in `blocks`, and a parameter must belong to one place to be sharded.
        object.__setattr__(self, "transformer", transformer)
        blocks: list[PackedBlock] = []
        for name, block_class in self.block_classes.items():
            for i, block in enumerate(transformer.get_submodule(name)):
                attention = f"{name}.{i}.{self.attention}.processor"
                blocks.append(block_class(block, attention_8bit=attention if attention in attention_8bit else ""))
        blocks[-1].last = True
        for packed in blocks:  # as the user has compiled the blocks of diffusers, or the whole model
            if compiler := compiler_of(packed.block) or compiler_of(transformer):
                packed.compile_by(compiler)
        self.blocks = nn.ModuleList(blocks)
        self._linears: list[nn.Linear] | None = None  # of the blocks, if they are compiled
        self.embed_and_head = nn.ModuleList(getattr(transformer, name) for name in self.ends)
        self.visibility = visibility
        self.impl = impl
        self.checkpointing = checkpointing
        self.for_training = for_training
        self.parallel: SequenceParallel | None = None
        self.target_bounds: list[int] | None = None
        self._constants: StepConstants | None = None  # of the running forward, and its adapters
        self._adapters: PackAdapters | None = None

    @classmethod
    def sizes(cls, config: Any) -> ModelSizes:
        """Return the sizes of a transformer with a configuration."""
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        return ModelSizes(config.in_channels, heads, head_dim, config.num_layers, config.get("num_single_layers", 0))

    @classmethod
    def prompt_channels(cls, config: Any) -> int:
        """Return the width of the prompt embeddings of a transformer with a configuration."""
        return config[cls.text_channels]

    def times(self, timesteps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the times of samples for `timestep` of `forward`, with the rounding of the pipeline in diffusers.

        Args:
            timesteps: Timestep of the scheduler of each sample, 1000 times its time.
            dtype: Dtype of the latents.
        """
        return torch.stack([t.to(dtype) / 1000 for t in timesteps])

    @classmethod
    def blocks_of(cls, transformer: Any) -> list[Any]:
        """Return the diffusers blocks of a transformer, in the order in which they run."""
        return [block for name in cls.block_classes for block in getattr(transformer, name)]

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile every block; the arguments are those of `torch.compile`.

        One block is compiled for all of them: once for the first, the last and the others, and again when a size
        changes for the first time; once more for each of them with kept references. A model whose transformer was
        compiled has compiled blocks from the beginning.
        """
        for packed in self.blocks:
            packed.compile(*args, **kwargs)

    def layout(self, samples: Sequence[Sample], *, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for this model.

        Args:
            samples: Samples of the pack, in order. A model with guidance embeddings takes a guidance scale of each.
            shared_references: Hold the references of samples of one group once, see `SelfLayout.pack`.
        """
        return SelfLayout.pack(
            samples, self.scheme, clean_references=self.clean_references, shared_references=shared_references
        )

    def constant_rows(self, layout: SelfLayout) -> int:
        """Return the number of rows of all streams that are computed once for all steps of a pack (`StepConstants`)."""
        return layout.text_length

    def step_constants(self) -> StepConstants:
        """Return an empty store of what is equal in all steps of one pack, for `constants` of `forward`."""
        return StepConstants()

    def pack_adapters(self, loras: Sequence[Mapping[str, float] | None]) -> PackAdapters:
        """Return the adapters of the samples of a pack, for `adapters` of `forward`.

        Args:
            loras: Scales of the adapters of each sample by name; None for the active adapters of the transformer.
        """
        return PackAdapters(self.transformer, self.row_kinds, loras)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        timestep: Tensor,
        layout: SelfLayout,
        kept: Kept = None,
        constants: StepConstants | None = None,
        adapters: PackAdapters | None = None,
    ) -> Tensor:
        """Predict the velocity of every target.

        Args:
            image: Latents of targets and references, `[N_image, in_channels]`, model dtype (`layout.image_stream`).
            text: Prompt embeddings without padding, `[N_text, text_channels]`, model dtype.
            timestep: Time of each sample in [0, 1], `[S]`; noise is at 1.
            layout: Layout of the pack, from `self.layout`.
            kept: Store of the references of each sample, or None for a sample whose references are computed in every
                step (`uniref_fast.models.kept_references`). The forward is then one step of them, without gradients.
                `ReferenceRows` of these stores may be given instead.
            constants: Store of what is equal in all steps of this pack, from `step_constants`, or None.
            adapters: Adapters of each sample, from `pack_adapters`, without gradients. None applies the active adapters
                of the transformer to all samples.

        Returns:
            Velocities of the targets' tokens by sample, `[N_target, 4 * out_channels]` (`layout.split_targets`). Under
            sequence parallelism all ranks of a group are given the same whole pack, and each returns its own part
            (`target_bounds`), which is `parallel.targets(layout)` unless references are kept.

        Raises:
            ValueError: If shapes differ from the layout's, or the layout is not one of this model.
        """
        self._check(image, text, timestep, layout)
        if adapters is not None and (torch.is_grad_enabled() or self.parallel is not None):
            raise ValueError("adapters of single samples have no gradients and no sequence parallelism")
        self._constants, self._adapters = constants, adapters
        try:
            with contextlib.nullcontext() if adapters is None else adapters.applied(), onloaded(self.transformer):
                return self._predict(image, text, timestep, layout, kept)
        finally:
            self._constants = self._adapters = None

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        """Compute `forward` for arguments that have been checked; a family defines it."""
        raise NotImplementedError

    def _step(
        self, layout: SelfLayout, kept: Kept, rotary: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> ForwardContext:
        """Return the context of a forward that computes the rows of a pack without the references that are kept.

        Args:
            layout: Layout of the pack.
            kept: Stores of the references, as for `forward`.
            rotary: Rotary tables of the pack.
            dtype: Dtype of the streams.
        """
        references = None if kept is None else self._references(layout, kept)
        if references is not None:
            layout, rotary = references.layout, references.rotary(rotary)
        return self._context(layout, rotary, references, dtype)

    def _context(
        self, layout: SelfLayout, rotary: tuple[Tensor, Tensor], references: ReferenceRows | None, dtype: torch.dtype
    ) -> ForwardContext:
        """Return the context of a forward whose streams have a dtype."""
        if self.parallel is not None:
            self.target_bounds = self.parallel.targets(layout)
        if self._adapters is not None:
            self._adapters.layout = layout
        return ForwardContext(
            layout=layout,
            visibility=self.visibility,
            rotary=rotary,
            references=references,
            impl=self.impl,
            for_training=self.for_training,
            checkpointing=self.checkpointing,
            # Checkpointing keeps the inputs of each block, and a deferred residual would be one more of them. In
            # float16 diffusers clips the output of each block to the finite range, so it must be computed there.
            fuse_residual=not self.checkpointing and dtype != torch.float16,
            parallel=self.parallel,
        )

    def _text_stream(self, text: Tensor, layout: SelfLayout, *modules: nn.Module, columns: int | None = None) -> Tensor:
        """Return this rank's rows of the text stream before the first block, `[n, C]`; once for all steps of a pack.

        Args:
            text: Prompt embeddings of the pack, `[N_text, text_channels]`.
            layout: Layout of the rows that are computed.
            modules: Modules that are applied to them, one after the other.
            columns: Number of columns of the embeddings that the modules get; None for all.
        """

        def compute() -> Tensor:
            stream = text if self.parallel is None else text[self.parallel.rows(layout, "text")]
            stream = stream if columns is None else stream[:, :columns]
            for module in modules:
                stream = module(stream)
            return stream

        return compute() if self._constants is None else self._constants.text_stream(text, modules, compute)

    def _head(self, out: Tensor, temb: Tensor, context: ForwardContext) -> Tensor:
        """Return the velocities of the targets' tokens, `[n_target, 4 * out_channels]`.

        Args:
            out: Targets' rows of the output of the last block, `[n_target, C]`.
            temb: Timestep embedding, `[R, C]`.
            context: Context of the forward.
        """
        model = self.transformer
        scale, shift = model.norm_out.linear(model.norm_out.silu(temb).to(out.dtype)).chunk(2, dim=1)
        rows = context.modulation_rows("image")[context.target_rows()]
        return model.proj_out(ops.norm_modulate(out, shift, scale, rows, model.norm_out.norm.eps, impl=self.impl))

    def _run_blocks(
        self,
        streams: list[Tensor],
        temb: Tensor,
        context: ForwardContext,
        blocks: Sequence[PackedBlock] | None = None,
        before: Callable[[int, list[Tensor]], None] | None = None,
    ) -> Tensor:
        """Run the blocks, and return the targets' rows of their output, `[n_target, C]`.

        Args:
            streams: Streams of the model, `[n, C]` each; the list is emptied.
            temb: Timestep embedding, `[R, C]`, or the modulation that all blocks share, `[R, ...]`.
            context: Context of the forward.
            blocks: Blocks of all tokens; None for all blocks of the model.
            before: Function of the number of a block and the list of streams, called before each block. It may replace
                streams in the list, if the context does not fuse residuals.
        """
        residuals: list[DeferredResidual] = []
        traced = self._traced(context, streams[0])
        if traced is not None and len(temb) == 1:
            temb = temb.repeat(2, 1)  # a size of 1 would be a constant of the graph; no row refers to the second one
        for i, block in enumerate(self.blocks if blocks is None else blocks):
            if before is not None:
                before(i, streams)
            streams, residuals = block(streams, residuals, temb, context, traced)
        if context.references is not None:
            context.references.finish(self.parallel)
        return streams[0]

    def _traced(self, context: ForwardContext, image: Tensor) -> TracedContext | None:
        """Return the context of compiled blocks; None, with a warning, if blocks were compiled and cannot be used."""
        if all(packed.compiled is None for packed in self.blocks):
            return None
        blocks: list[Any] = [packed.block for packed in self.blocks]
        attention = [block.attn for block in blocks]
        q = image.new_empty(0, attention[0].heads, self.sizes(self.transformer.config).attention_head_dim)
        if self._linears is None:
            self._linears = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
        traced: TracedContext | str
        if self._adapters is not None:
            traced = "samples have their own LoRA"
        elif any(map(is_quantised, self._linears)):
            traced = "Linears compute in 8 bits"
        elif any(may_have_hooks(norm) for attn in attention for norm in qk_norms(attn)):
            traced = "hooks move the weights of the QK norms"
        else:
            traced = traced_context(context, q)
        if isinstance(traced, str):
            warnings.warn(f"the packed forward ran its blocks uncompiled, because {traced}", stacklevel=5)
            return None
        return traced

    def _references(self, layout: SelfLayout, kept: Sequence[KeptReferences | None] | ReferenceRows) -> ReferenceRows:
        if torch.is_grad_enabled():
            raise ValueError("kept references have no gradients; call the model under torch.no_grad()")
        return kept if isinstance(kept, ReferenceRows) else ReferenceRows(layout, kept)

    def _check_guidance(self, layout: SelfLayout) -> None:
        """Raise ValueError unless the samples have guidance scales exactly if the model embeds them."""
        if layout.guidance and not self.transformer.config.guidance_embeds:
            raise ValueError(
                "the samples have guidance scales, but the model has no guidance embeddings "
                "(config.guidance_embeds=False); leave out `Sample.guidance`"
            )
        if not layout.guidance and self.transformer.config.guidance_embeds:
            raise ValueError(
                "the model has guidance embeddings (config.guidance_embeds=True), but the samples have no guidance "
                "scales; give each sample one, `Sample.guidance`"
            )

    def _check(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> None:
        expected = {
            "image": (image, (layout.image_length, self.sizes(self.transformer.config).token_channels)),
            "text": (text, self._text_shape(layout)),
            "timestep": (timestep, (layout.num_samples,)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, the layout expects {list(shape)}")
        if self.parallel is not None and not self.shares_packs:
            raise ValueError(
                f"sequence parallelism is not supported for {type(self.transformer).__name__}; use 1 rank for each pack"
            )

    def _text_shape(self, layout: SelfLayout) -> tuple[int, int]:
        """Return the shape of the prompt embeddings of a pack."""
        return layout.text_length, self.prompt_channels(self.transformer.config)


def clipped(x: Tensor) -> Tensor:
    """Clip the residual stream of a float16 model to the finite range, as diffusers does."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _keep_attention() -> Any:
    """Return the contexts of a checkpoint that keeps attention's output: costly to recompute, and small."""
    names = ("segment_attention", "dense_attention", "flash_attention", "flex_attention")
    kept = [getattr(torch.ops.uniref_fast, name).default for name in names]

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def skip(part: nn.Module) -> None:
    """Run the hooks of a part that is not needed, because offloading with prefetch counts on a call of every module."""
    for module in part.modules():
        with onloaded(module):
            pass


def angle_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which diffusers computes rotary angles and times: float64 where the device has it."""
    return torch.float32 if device.type in ("mps", "npu") else torch.float64


def joint_sources(layout: SelfLayout, device: torch.device) -> Tensor:
    """Return for each joint row its row in text stream and image stream one after the other, int64 `[N]`."""
    return memo(layout, _inverse_of_joint, device)


def _inverse_of_joint(layout: SelfLayout, device: torch.device) -> Tensor:
    joint = torch.cat([layout.joint_index("text", device), layout.joint_index("image", device)])
    return torch.argsort(joint)


def qk_norm_names(attn: Any) -> tuple[str, str, str, str]:
    """Return the names of the QK norms of an attention: of q and k of the image stream, then of the text stream."""
    if hasattr(attn, "img_attn_q_norm"):
        return "img_attn_q_norm", "img_attn_k_norm", "txt_attn_q_norm", "txt_attn_k_norm"
    return "norm_q", "norm_k", "norm_added_q", "norm_added_k"


def qk_norms(attn: Any) -> list[Any]:
    """Return the QK norms that an attention has."""
    norms = (getattr(attn, name, None) for name in qk_norm_names(attn))
    return [norm for norm in norms if norm is not None]
