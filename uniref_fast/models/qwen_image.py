"""Qwen-Image-Edit's double-stream MMDiT over a packed, ragged sequence.

`PackedQwenImage` runs the parameters of a live diffusers `QwenImageTransformer2DModel`: no copy, no new modules. Its
Linears are called, never read, so LoRA, quantised or cast Linears keep working.

Shapes: a stream has N_image or N_text rows of C channels, the joint sequence N rows; H heads of D channels, S samples,
R rows of the modulation table. A rank has n rows of a stream: all of them, or its part under sequence parallelism.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.compiled_block import TracedContext, compiler_of, traced_context
from uniref_fast.models.eight_bit import attend, feed_forward, first_linear, gated_input, modulated_input
from uniref_fast.models.kept_references import KeptReferences, ReferenceRows
from uniref_fast.models.module_hooks import may_have_hooks, onloaded
from uniref_fast.models.sequence_parallel import SequenceParallel
from uniref_fast.quantised_linear import is_quantised
from uniref_fast.visibility import AttentionPlan, Rule, plan, rule_of, target_plan

__all__ = [
    "DeferredResidual",
    "ForwardContext",
    "Modulation",
    "PackedQwenImage",
    "find_transformer",
    "joint_attention",
    "joint_qkv",
    "project_image",
    "qk_norm_eps",
    "qk_norm_weights",
    "stream_rows",
]


def find_transformer(target: Any, *, sharded: bool = False, compiled: bool = False) -> Any:
    """Return the `QwenImageTransformer2DModel` of a pipeline, or the model itself.

    Args:
        target: The pipeline or model.
        sharded: Accept a model that `fully_shard` was applied to.
        compiled: Return the model inside a wrapper of torch.compile.

    Raises:
        TypeError: If the object is anything else; the message says what is supported.
    """
    from diffusers import QwenImageTransformer2DModel as Stock

    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    if compiled:
        model = getattr(model, "_orig_mod", model)
    if type(model) is Stock:
        return model
    if model is None and hasattr(target, "transformer"):
        raise TypeError(f"{type(target).__name__} has no transformer loaded yet; load it first")
    given = type(target if model is None else model).__name__
    if isinstance(model, Stock) and [base.__name__ for base in type(model).__bases__] == ["FSDPModule", Stock.__name__]:
        if sharded:
            return model
        raise TypeError(f"the transformer is sharded by fully_shard ({given}), and a whole one is needed here")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "the transformer is wrapped by torch.compile; use the model inside, `pipe.transformer = "
            "pipe.transformer._orig_mod`, and compile it afterwards"
        )
    supported = ["QwenImageTransformer2DModel", "QwenImageEditPlusPipeline"]
    if isinstance(getattr(model, "module", None), Stock):
        raise TypeError(f"{given} is not supported: it wraps a {supported[0]}; use its attribute `module`")
    if given.startswith("Nunchaku"):
        raise TypeError(
            f"{given} is not supported: its blocks call kernels that compute several Linears and the operations "
            f"between them at once. Load a checkpoint of diffusers' NunchakuLiteQuantizationConfig as a {supported[0]}"
        )
    near = get_close_matches(given, supported, n=1, cutoff=0.5)
    raise TypeError(
        f"{given} is not supported: it must be a {supported[0]} (exactly that class) or a pipeline holding one, "
        f"such as {supported[1]}" + (f"; nearest: {near[0]}" if near else "")
    )


QKV = tuple[Tensor, Tensor, Tensor]
"""q, k and v, or their projections."""


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
    def plan(self) -> AttentionPlan:
        """Plan of all rows that are computed."""
        return plan(self.layout, self.visibility) if self.references is None else self.references.plan(self.visibility)

    @property
    def target_plan(self) -> AttentionPlan:
        """Plan of the targets' queries alone."""
        return target_plan(self.layout if self.references is None else self.references.whole, self.visibility)

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


def project_qkv(attn: Any, image: Tensor, text: Tensor, context: ForwardContext) -> QKV:
    """Project, normalise and rotate both streams (`[n, C]`) into the joint q, k, v, `[N, H, D]` each."""
    head_dim = attn.inner_dim // attn.heads  # the head count stays free: tensor parallel shards it

    def heads(linear: Any, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, head_dim))  # [n, H, D]

    # In the order of diffusers, in which offloading fetches weights in advance.
    image_qkv = heads(attn.to_q, image), heads(attn.to_k, image), heads(attn.to_v, image)
    text_qkv = heads(attn.add_q_proj, text), heads(attn.add_k_proj, text), heads(attn.add_v_proj, text)
    if context.parallel is not None:
        text_qkv, image_qkv = _all_rows(text_qkv, context, "text"), _all_rows(image_qkv, context, "image")
    return joint_qkv(attn, image_qkv, text_qkv, context)


def joint_qkv(attn: Any, image_qkv: QKV, text_qkv: QKV, context: ForwardContext) -> QKV:
    """Normalise and rotate the projections of both streams into the joint q, k, v, `[N, H, D]` each.

    With kept references, q has the rows that are computed, and k and v have all rows of the pack.

    Args:
        attn: The diffusers `Attention` that holds the QK norms.
        image_qkv: Projections of the image stream, `[N_image, H, D]` each.
        text_qkv: Projections of the text stream, `[N_text, H, D]` each.
        context: Context of the forward.
    """
    with onloaded(*qk_norms(attn)):  # their weights are read
        q, k, v = ops.qk_norm_rope(
            text_qkv,
            image_qkv,
            qk_norm_weights(attn, "text"),
            qk_norm_weights(attn, "image"),
            context.layout,
            context.rotary,
            eps=qk_norm_eps(attn),
            rounding=context.rounding,
            impl=context.impl,
        )
    if context.references is not None:
        k, v = context.references.keys_and_values(attn, k, v)
    return q, k, v


def _all_rows(qkv: QKV, context: ForwardContext, stream: str) -> QKV:
    """Exchange q, k, v of this rank's rows and all heads for those of all rows and this rank's heads.

    `[n, H, D]` to `[N, H / ranks, D]`, all three in one exchange.
    """
    parallel, layout = context.parallel, context.layout
    assert parallel is not None
    bounds = parallel.bounds(layout.text_length if stream == "text" else layout.image_length)
    together = torch.stack(qkv, dim=2).flatten(2)  # [n, H, 3 D]
    q, k, v = parallel.gather_heads(together, bounds).unflatten(2, (3, -1)).unbind(2)
    return q, k, v


def joint_attention(
    attn: Any, image: Tensor, text: Tensor, context: ForwardContext, eight_bit: str = ""
) -> tuple[Tensor, Tensor]:
    """Run the attention of one double-stream block, output projections included.

    Args:
        attn: The diffusers `Attention` with added k, v projections.
        image: Modulated image stream, `[n, C]`.
        text: Modulated text stream, `[n, C]`.
        context: Context of the forward.
        eight_bit: Name of attention in 8 bits (`models.eight_bit.attend`); empty for 16 bits.

    Returns:
        (image, text) stream outputs with the shapes of the inputs.
    """
    q, k, v = project_qkv(attn, image, text, context)
    del image, text
    out = attend(q, k, v, context.plan, context.impl, context.for_training, eight_bit)
    del q, k, v
    streams = {}
    for name in ("image", "text"):
        part = stream_rows(out, context.layout, name)  # [N_stream, H, D]
        if context.parallel is not None:
            part = context.parallel.scatter_heads(part, context.parallel.bounds(len(part)))
        streams[name] = part.flatten(1)
    return project_image(attn, streams["image"]), attn.to_add_out(streams["text"])


def project_image(attn: Any, out: Tensor) -> Tensor:
    """Apply the output projection of the image stream and, in training, its dropout."""
    for module in attn.to_out:
        out = module(out)
    return out


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
    """A double-stream block over a pack.

    It is a module, so that a model can be sharded and recomputed block by block.

    Args:
        block: The diffusers block whose parameters are used.
        last: True for the last block of a model, of whose output only the targets' rows are used.
        attention_8bit: Name of its attention if that is computed in 8 bits, or an empty string. Linears are in 8 bits
            if their weights are (`uniref_fast.fast`).

    Attributes:
        compiled: Compiled code of the block, which `compile` sets, or None.
    """

    block: Any

    def __init__(self, block: Any, last: bool = False, attention_8bit: str = "") -> None:
        super().__init__()
        self.block, self.last, self.attention_8bit = block, last, attention_8bit
        self.compiled: Callable[..., Any] | None = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block; the arguments are those of `torch.compile`."""
        self.compiled = torch.compile(self._run, *args, **kwargs)

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
            streams: Image and text stream, this rank's rows of them, `[n, C]` each.
            residuals: Residuals of both streams that the block before has left, or none.
            temb: Timestep embedding, `[R, C]`.
            context: Context of the forward.
            traced: The same context for compiled code; None runs the block uncompiled.

        Returns:
            The streams and the residuals that are left to the next block. The last block returns one stream, the
            targets' rows of the image stream, `[n_target, C]`.
        """
        if context.checkpointing and torch.is_grad_enabled():
            return self._recomputed(streams, residuals, temb, context)
        with onloaded(self.block):
            if traced is not None and self.compiled is not None:
                for table in (temb, *(gate for _, gate in residuals)):
                    torch._dynamo.maybe_mark_dynamic(table, 0)  # packs of 2 and 3 samples share a graph
                return self.compiled(streams, residuals, temb, traced)
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
        self,
        streams: list[Tensor],
        residuals: list[DeferredResidual],
        temb: Tensor,
        context: ForwardContext,  # or a `TracedContext`, which has the attributes that are used here
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        block, impl = self.block, context.impl
        mods = _modulation(block, temb, context.layout)
        all_rows = tuple(context.modulation_rows(name) for name in ("image", "text"))
        norms = (block.img_norm1, block.img_norm2), (block.txt_norm1, block.txt_norm2)
        first = block.attn.to_q, block.attn.add_q_proj  # they share their inputs with the projections of k and v
        unchanged, normed = [], []  # image and text, [n, C] each
        for i, (mod, rows) in enumerate(zip(mods, all_rows, strict=True)):
            x, eps = streams.pop(0), norms[i][0].eps
            if residuals:
                branch, gate = residuals.pop(0)
                x, y = gated_input(first[i], x, branch, gate, mod.shift1, mod.scale1, rows, eps, impl)
                del branch
            else:
                y = modulated_input(first[i], x, mod.shift1, mod.scale1, rows, eps, impl)
            unchanged.append(x)
            normed.append(y)
            del x, y
        if self.last:
            return [self._targets(mods[0], unchanged.pop(0), normed, context)], []
        branches = [*joint_attention(block.attn, normed.pop(0), normed.pop(0), context, self.attention_8bit)]
        outputs, left = [], []
        for mod, mlp, rows, (_, norm) in zip(mods, (block.img_mlp, block.txt_mlp), all_rows, norms, strict=True):
            x, y = gated_input(
                first_linear(mlp), unchanged.pop(0), branches.pop(0), mod.gate1, mod.shift2, mod.scale2, rows, norm.eps,
                impl,
            )  # fmt: skip
            y = feed_forward(mlp, y, impl)
            if context.fuse_residual:
                left.append(DeferredResidual(y, mod.gate2))
            else:
                x = _clipped(ops.gate_residual(x, y, mod.gate2, rows, impl=impl))
            outputs.append(x)
            del x, y
        return outputs, left

    def _targets(self, mod: Modulation, image: Tensor, normed: list[Tensor], context: ForwardContext) -> Tensor:
        """Run the last block for the targets' queries only, because no other rows of its output are used.

        Keys and values need all rows, so both streams (`[n, C]`) come in; the result is `[n_target, C]`.
        """
        block, layout, impl = self.block, context.layout, context.impl
        targets = layout.target_rows(image.device)
        q, k, v = project_qkv(block.attn, normed.pop(0), normed.pop(0), context)
        q = q[layout.joint_index("image", image.device)[targets]]  # [N_target, H, D]
        out = attend(q, k, v, context.target_plan, impl, context.for_training, self.attention_8bit)
        del q, k, v
        if context.parallel is not None:
            out = context.parallel.scatter_heads(out, context.parallel.targets(layout))
        mine = context.target_rows()
        rows = context.modulation_rows("image")[mine]
        image, hidden = gated_input(
            first_linear(block.img_mlp), image[mine], project_image(block.attn, out.flatten(1)), mod.gate1, mod.shift2,
            mod.scale2, rows, block.img_norm2.eps, impl,
        )  # fmt: skip
        del out
        _skip(block.attn.to_add_out)
        hidden = feed_forward(block.img_mlp, hidden, impl)
        _skip(block.txt_mlp)
        return _clipped(ops.gate_residual(image, hidden, mod.gate2, rows, impl=impl))


class PackedQwenImage(nn.Module):
    """A `QwenImageTransformer2DModel` that runs packs of samples of different sizes.

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
        blocks: The `PackedBlock`s, which sharding by block wraps.
        parallel: A `SequenceParallel` if the ranks of a group share every pack, or None.

    Raises:
        ValueError: If the model's forward differs from the packed one (guidance embeddings, extra timestep conditions,
            layered rotary embeddings).
    """

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
        for option in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if getattr(config, option, False):
                raise ValueError(f"packed forward does not know config.{option}=True of {type(transformer).__name__}")
        # Not a submodule: its blocks are in `blocks`, and a parameter must belong to one place to be sharded.
        object.__setattr__(self, "transformer", transformer)
        last = len(transformer.transformer_blocks) - 1
        attention = [f"transformer_blocks.{i}.attn.processor" for i in range(last + 1)]
        blocks = [
            PackedBlock(block, i == last, attention[i] if attention[i] in attention_8bit else "")
            for i, block in enumerate(transformer.transformer_blocks)
        ]
        for packed in blocks:  # as the user has compiled the blocks of diffusers, or the whole model
            if compiler := compiler_of(packed.block) or compiler_of(transformer):
                packed.compiled = compiler(packed._run)
        self.blocks = nn.ModuleList(blocks)
        self._linears: list[nn.Linear] | None = None  # of the blocks, if they are compiled
        self.embed_and_head = nn.ModuleList(
            getattr(transformer, name)
            for name in ("img_in", "txt_norm", "txt_in", "time_text_embed", "norm_out", "proj_out")
        )
        self.visibility = visibility
        self.impl = impl
        self.checkpointing = checkpointing
        self.for_training = for_training
        self.parallel: SequenceParallel | None = None

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile every block; the arguments are those of `torch.compile`.

        One block is compiled for all of them: once for the first, the last and the others, and again when a size
        changes for the first time. A model whose transformer was compiled has compiled blocks from the beginning.
        """
        for packed in self.blocks:
            packed.compile(*args, **kwargs)

    def layout(self, samples: Sequence[Sample], *, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for this model (`SelfLayout.qwen` with the model's `zero_cond_t`).

        Args:
            samples: Samples of the pack, in order.
            shared_references: Hold the references of samples of one group once, see `SelfLayout.qwen`.
        """
        zero_cond_t = bool(self.transformer.config.zero_cond_t)
        return SelfLayout.qwen(samples, zero_cond_t=zero_cond_t, shared_references=shared_references)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        timestep: Tensor,
        layout: SelfLayout,
        kept: Sequence[KeptReferences | None] | None = None,
    ) -> Tensor:
        """Predict the velocity of every target.

        Args:
            image: Latents of targets and references, `[N_image, in_channels]`, model dtype (`layout.image_stream`).
            text: Prompt embeddings without padding, `[N_text, joint_attention_dim]`, model dtype.
            timestep: Time of each sample in [0, 1], `[S]`; noise is at 1.
            layout: Layout of the pack, from `self.layout`.
            kept: Store of the references of each sample, or None for a sample whose references are computed in every
                step (`uniref_fast.models.kept_references`). The forward is then one step of them, without gradients.

        Returns:
            Velocities of the targets' tokens by sample, `[N_target, 4 * out_channels]` (`layout.split_targets`). Under
            sequence parallelism all ranks of a group are given the same whole pack, and each returns its own part
            (`parallel.targets(layout)`).

        Raises:
            ValueError: If shapes differ from the layout's, or the layout is not one of this model.
        """
        self._check(image, text, timestep, layout)
        with onloaded(self.transformer):
            return self._predict(image, text, timestep, layout, kept)

    def _predict(
        self,
        image: Tensor,
        text: Tensor,
        timestep: Tensor,
        layout: SelfLayout,
        kept: Sequence[KeptReferences | None] | None,
    ) -> Tensor:
        model = self.transformer
        rotary = layout.rotary(model.config.axes_dims_rope, image.device)
        references = None if kept is None else self._references(layout, kept)
        if references is not None:
            layout, image, rotary = references.layout, references.image(image), references.rotary(rotary)
        context = ForwardContext(
            layout=layout,
            visibility=self.visibility,
            rotary=rotary,
            references=references,
            impl=self.impl,
            for_training=self.for_training,
            checkpointing=self.checkpointing,
            # Checkpointing keeps the inputs of each block, and a deferred residual would be one more of them. In
            # float16 diffusers clips the output of each block to the finite range, so it must be computed there.
            fuse_residual=not self.checkpointing and image.dtype != torch.float16,
            parallel=self.parallel,
        )
        if self.parallel is not None:
            image, text = image[self.parallel.rows(layout, "image")], text[self.parallel.rows(layout, "text")]
        streams = [model.img_in(image), model.txt_in(model.txt_norm(text))]  # [n, C] each
        timestep = timestep.to(streams[0].dtype)
        if layout.clean_references:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
        temb = model.time_text_embed(timestep, streams[0])  # [R, C]
        residuals: list[DeferredResidual] = []
        traced = self._traced(context, streams[0])
        if traced is not None and len(temb) == 1:
            temb = temb.repeat(2, 1)  # a size of 1 would be a constant of the graph; no row refers to the second one
        for block in self.blocks:
            streams, residuals = block(streams, residuals, temb, context, traced)
        if references is not None:
            references.finish()
        # streams[0] now holds the targets' rows alone, [n_target, C]
        scale, shift = model.norm_out.linear(model.norm_out.silu(temb).to(streams[0].dtype)).chunk(2, dim=1)
        rows = context.modulation_rows("image")[context.target_rows()]
        return model.proj_out(
            ops.norm_modulate(streams[0], shift, scale, rows, model.norm_out.norm.eps, impl=self.impl)
        )

    def _traced(self, context: ForwardContext, image: Tensor) -> TracedContext | None:
        """Return the context of compiled blocks; None, with a warning, if blocks were compiled and cannot be used."""
        if all(packed.compiled is None for packed in self.blocks):
            return None
        attn = self.transformer.transformer_blocks[0].attn
        q = image.new_empty(0, attn.heads, attn.inner_dim // attn.heads)
        if self._linears is None:
            self._linears = [m for m in self.transformer.transformer_blocks.modules() if isinstance(m, nn.Linear)]
        traced: TracedContext | str
        if any(map(is_quantised, self._linears)):
            traced = "Linears compute in 8 bits"
        elif any(
            may_have_hooks(norm) for block in self.transformer.transformer_blocks for norm in qk_norms(block.attn)
        ):
            traced = "hooks move the weights of the QK norms"
        else:
            traced = traced_context(context, q)
        if isinstance(traced, str):
            warnings.warn(f"the packed forward ran its blocks uncompiled, because {traced}", stacklevel=4)
            return None
        return traced

    def _references(self, layout: SelfLayout, kept: Sequence[KeptReferences | None]) -> ReferenceRows:
        if torch.is_grad_enabled():
            raise ValueError("kept references have no gradients; call the model under torch.no_grad()")
        if self.parallel is not None:
            raise ValueError("kept references are not supported under sequence parallelism; leave out kept=")
        return ReferenceRows(layout, kept)

    def _check(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> None:
        config = self.transformer.config
        expected = {
            "image": (image, (layout.image_length, config.in_channels)),
            "text": (text, (layout.text_length, config.joint_attention_dim)),
            "timestep": (timestep, (layout.num_samples,)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, the layout expects {list(shape)}")
        if layout.clean_references != bool(config.zero_cond_t):
            raise ValueError(
                f"the layout was built with zero_cond_t={layout.clean_references}, the model has {config.zero_cond_t}; "
                "build it with the model's own `layout(samples)`"
            )


def _skip(part: nn.Module) -> None:
    """Run the hooks of a part that is not needed, because offloading with prefetch counts on a call of every module."""
    for module in part.modules():
        with onloaded(module):
            pass


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of a block's two norms in one stream, `[R, C]` each (views of one `[R, 6 C]` table)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


def _modulation(block: Any, temb: Tensor, layout: SelfLayout | TracedContext) -> tuple[Modulation, Modulation]:
    """Return (image, text) modulation of a block; text always uses the sampled timesteps, the first S rows."""
    image = block.img_mod(temb).chunk(6, dim=-1)
    if not isinstance(layout, TracedContext):  # a graph would be compiled again for one sample
        temb = temb[: layout.num_samples]
    text = block.txt_mod(temb).chunk(6, dim=-1)
    return Modulation(*image), Modulation(*text)


def _clipped(x: Tensor) -> Tensor:
    """Clip the residual stream of a float16 model to the finite range, as diffusers does."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _keep_attention() -> Any:
    """Return the contexts of a checkpoint that keeps attention's output: costly to recompute, and small."""
    names = ("segment_attention", "dense_attention", "flash_attention", "flex_attention")
    kept = [getattr(torch.ops.uniref_fast, name).default for name in names]

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def qk_norms(attn: Any) -> list[Any]:
    """Return the QK norms that an attention has."""
    norms = attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k
    return [norm for norm in norms if norm is not None]


def qk_norm_weights(attn: Any, stream: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of a stream's RMSNorms of q and k; None where the attention has no such norm."""
    norms = (attn.norm_q, attn.norm_k) if stream == "image" else (attn.norm_added_q, attn.norm_added_k)
    q, k = (None if norm is None else norm.weight for norm in norms)
    return q, k


def qk_norm_eps(attn: Any) -> float:
    """Return the eps of all QK norms of an attention; any value if it has none.

    Raises:
        ValueError: If they differ, because the fused operator takes one.
    """
    eps = [norm.eps for norm in qk_norms(attn)]  # not a set: torch 2.13 cannot trace its order
    if any(value != eps[0] for value in eps):
        raise ValueError(f"the QK norms have different eps: {sorted(set(eps))}")
    return eps[0] if eps else 1e-6


def stream_rows(joint: Tensor, layout: SelfLayout | TracedContext, stream: str) -> Tensor:
    """Return the rows of one stream out of the joint sequence: a view for one sample, one gather for a pack.

    Args:
        joint: Values in joint order, `[N, ...]`.
        layout: Layout of the pack.
        stream: "text" or "image".
    """
    if isinstance(layout, TracedContext):
        return joint.index_select(0, layout.joint_index(stream))
    segments = layout.text_segments if stream == "text" else layout.image_segments
    if not segments:
        return joint[:0]
    start, end = segments[0].joint_start, segments[-1].joint_end
    if end - start == sum(s.length for s in segments):
        return joint[start:end]
    return joint.index_select(0, layout.joint_index(stream, joint.device))
