"""Qwen-Image-Edit's double-stream MMDiT over a packed, ragged sequence.

`PackedQwenImage` runs the parameters of a live diffusers `QwenImageTransformer2DModel`: no copy, no new modules. Its
Linears are called, never read, so LoRA, quantised or cast Linears keep working. `joint_attention` is shared with the
drop-in patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.sequence_parallel import SequenceParallel
from uniref_fast.visibility import AttentionPlan, Rule, plan, rule_of, target_plan

__all__ = ["AttentionContext", "Modulation", "PackedQwenImage", "find_transformer", "joint_attention", "stream_rows"]


def find_transformer(target: Any, *, sharded: bool = False, compiled: bool = False) -> Any:
    """The `QwenImageTransformer2DModel` of a pipeline, or the model itself.

    Args:
        target: the pipeline or model.
        sharded: also take a model that `fully_shard` was applied to.
        compiled: take the model out of a wrapper of torch.compile.

    Raises:
        TypeError: for anything else; the message says what is supported.
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
    near = get_close_matches(given, supported, n=1, cutoff=0.5)
    raise TypeError(
        f"{given} is not supported: it must be a {supported[0]} (exactly that class) or a pipeline holding one, "
        f"such as {supported[1]}" + (f"; nearest: {near[0]}" if near else "")
    )


@dataclass(frozen=True)
class AttentionContext:
    """What every block of one forward needs to attend.

    Attributes:
        layout: the packed sequence.
        plan: its compiled visibility.
        rotary: cos, sin in joint order, float32 `[N, D / 2]`.
        impl: implementation forced on the ops, or None.
        rounding: "once" or "eager", see `ops.norm_modulate`.
        visibility: what the plan was compiled from.
        parallel: exchange among the ranks that share the pack, or None.
        checkpointing: recompute blocks in the backward.
        closed: whether every block adds its last residual itself, or leaves it to be fused with the next norm.
        trained: attention is picked as for training, with and without gradients.
    """

    layout: SelfLayout
    plan: AttentionPlan
    rotary: tuple[Tensor, Tensor]
    impl: str | None = None
    rounding: ops.Rounding = "once"
    visibility: str | Rule = "full"
    parallel: SequenceParallel | None = None
    checkpointing: bool = False
    closed: bool = False
    trained: bool = False

    def modulation_rows(self, stream: str) -> Tensor:
        """Modulation row of every row of a stream that this rank has, int32 `[n]`."""
        rows = self.layout.modulation_rows(stream, self.rotary[0].device)
        return rows if self.parallel is None else rows[self.parallel.rows(self.layout, stream)]

    def target_rows(self) -> Tensor:
        """Rows of this rank's part of the image stream that are targets, int64 `[n_target]`."""
        targets = self.layout.target_rows(self.rotary[0].device)
        if self.parallel is None:
            return targets
        bounds, first = self.parallel.targets(self.layout), self.parallel.rows(self.layout, "image").start
        return targets[bounds[self.parallel.rank] : bounds[self.parallel.rank + 1]] - first


Pending = list[Tensor]
"""[image branch, image gate, text branch, text gate] of a block's last residual, which the next block adds; or []."""


def project_qkv(attn: Any, image: Tensor, text: Tensor, context: AttentionContext) -> tuple[Tensor, ...]:
    """Project, normalise and rotate both streams into the joint q, k, v, `[N, H, D]` each."""
    head_dim = attn.inner_dim // attn.heads  # the head count stays free: tensor parallel shards it
    text_qkv = tuple(p(text).unflatten(-1, (-1, head_dim)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    image_qkv = tuple(p(image).unflatten(-1, (-1, head_dim)) for p in (attn.to_q, attn.to_k, attn.to_v))
    if context.parallel is not None:
        text_qkv, image_qkv = (_all_rows(x, context, name) for x, name in ((text_qkv, "text"), (image_qkv, "image")))
    return ops.qk_norm_rope(
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


def _all_rows(qkv: tuple[Tensor, ...], context: AttentionContext, stream: str) -> tuple[Tensor, ...]:
    """q, k, v of this rank's rows and all heads -> of all rows and this rank's heads, in one exchange."""
    parallel, layout = context.parallel, context.layout
    assert parallel is not None
    bounds = parallel.bounds(layout.text_length if stream == "text" else layout.image_length)
    together = torch.stack(qkv, dim=2).flatten(2)  # [n, H, 3 D]
    return parallel.gather_heads(together, bounds).unflatten(2, (3, -1)).unbind(2)


def joint_attention(attn: Any, image: Tensor, text: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """The attention of one double-stream block, output projections included.

    Args:
        attn: diffusers `Attention` with added k, v projections.
        image: image stream `[N_image, C]`, modulated; this rank's rows of it under sequence parallelism.
        text: text stream `[N_text, C]`, modulated; likewise.
        context: layout, plan and rotary tables.

    Returns:
        (image, text) stream outputs, shapes as given.
    """
    q, k, v = project_qkv(attn, image, text, context)
    del image, text
    out = ops.segment_attention(q, k, v, context.plan, impl=context.impl, backward=context.trained or None)
    del q, k, v
    streams = {}
    for name in ("image", "text"):
        part = stream_rows(out, context.layout, name)
        if context.parallel is not None:
            part = context.parallel.scatter_heads(part, context.parallel.bounds(len(part)))
        streams[name] = part.flatten(1)
    return project_image(attn, streams["image"]), attn.to_add_out(streams["text"])


def project_image(attn: Any, out: Tensor) -> Tensor:
    """The image stream's output projection and (in training) dropout."""
    for module in attn.to_out:
        out = module(out)
    return out


class PackedBlock(nn.Module):
    """A double-stream block over a pack: a module of its own, so that a pack can be sharded and recomputed by block.

    Args:
        block: the diffusers block whose parameters are used.
        last: whether only the targets' rows of its output are used (the last block of a model).
    """

    block: Any

    def __init__(self, block: Any, last: bool = False) -> None:
        super().__init__()
        self.block, self.last = block, last

    def forward(
        self, streams: list[Tensor], pending: Pending, temb: Tensor, context: AttentionContext
    ) -> tuple[list[Tensor], Pending]:
        """Run the block; it empties both lists, so that each of their tensors is freed once it has been used.

        Args:
            streams: image `[N_image, C]` and text `[N_text, C]`, this rank's rows of them.
            pending: residuals of the block before that are still to be added (`Pending`).
            temb: timestep embedding `[R, C]`.
            context: of this forward.

        Returns:
            the streams and what is pending; of the last block, the image stream's target rows alone.
        """
        if context.checkpointing and torch.is_grad_enabled():
            inputs = tuple(streams), tuple(pending), temb, context  # kept for the second run, in the backward
            return checkpoint(
                lambda x, y, *rest: self._run([*x], [*y], *rest), *inputs,
                use_reentrant=False, context_fn=_keep_attention,
            )  # fmt: skip
        return self._run(streams, pending, temb, context)

    def _run(
        self, streams: list[Tensor], pending: Pending, temb: Tensor, context: AttentionContext
    ) -> tuple[list[Tensor], Pending]:
        block, impl, layout = self.block, context.impl, context.layout
        mods = _modulation(block, temb, layout)
        all_rows = tuple(context.modulation_rows(name) for name in ("image", "text"))
        residual, normed = [], []  # of image and text
        norms = (block.img_norm1, block.img_norm2), (block.txt_norm1, block.txt_norm2)
        for i, (mod, rows) in enumerate(zip(mods, all_rows, strict=True)):
            x, eps = streams.pop(0), norms[i][0].eps
            if pending:
                branch, gate = pending.pop(0), pending.pop(0)
                x, y = ops.gate_residual_norm_modulate(x, branch, gate, mod.shift1, mod.scale1, rows, eps, impl=impl)
                del branch
            else:
                y = ops.norm_modulate(x, mod.shift1, mod.scale1, rows, eps, impl=impl)
            residual.append(x)
            normed.append(y)
            del x, y
        if self.last:
            return [self._targets(mods[0], residual.pop(0), normed, context)], []
        branches = [*joint_attention(block.attn, normed.pop(0), normed.pop(0), context)]
        outputs, left = [], []
        for mod, mlp, rows, (_, norm) in zip(mods, (block.img_mlp, block.txt_mlp), all_rows, norms, strict=True):
            x, y = ops.gate_residual_norm_modulate(
                residual.pop(0), branches.pop(0), mod.gate1, mod.shift2, mod.scale2, rows, norm.eps, impl=impl
            )
            y = mlp(y)
            if context.closed:
                x = _clipped(ops.gate_residual(x, y, mod.gate2, rows, impl=impl))
            else:
                left += [y, mod.gate2]
            outputs.append(x)
            del x, y
        return outputs, left

    def _targets(self, mod: Modulation, image: Tensor, normed: list[Tensor], context: AttentionContext) -> Tensor:
        """Run the last block for the targets' queries only, as nothing else of its output is used."""
        block, layout, impl = self.block, context.layout, context.impl
        targets = layout.target_rows(image.device)
        q, k, v = project_qkv(block.attn, normed.pop(0), normed.pop(0), context)
        q = q[layout.joint_index("image", image.device)[targets]]
        mine_only = target_plan(layout, context.visibility)
        out = ops.segment_attention(q, k, v, mine_only, impl=impl, backward=context.trained or None)
        del q, k, v
        if context.parallel is not None:
            out = context.parallel.scatter_heads(out, context.parallel.targets(layout))
        mine = context.target_rows()
        rows = context.modulation_rows("image")[mine]
        image, hidden = ops.gate_residual_norm_modulate(
            image[mine], project_image(block.attn, out.flatten(1)), mod.gate1, mod.shift2, mod.scale2, rows,
            block.img_norm2.eps, impl=impl,
        )  # fmt: skip
        del out
        return _clipped(ops.gate_residual(image, block.img_mlp(hidden), mod.gate2, rows, impl=impl))


class PackedQwenImage(nn.Module):
    """A `QwenImageTransformer2DModel` over packs of unlike samples.

    Args:
        transformer: the diffusers model whose parameters are used; it stays usable as it is. Add adapters first.
        visibility: policy name or rule (`uniref_fast.visibility`); anything but "full" needs a model trained for it.
        impl: implementation forced on every op, or None to pick by device.
        checkpointing: keep only each block's input and attention output for the backward, and recompute the rest.
        trained: a forward without gradients must be the one with them to the bit: attention is then picked by what both
            directions cost, always.

    Attributes:
        blocks: the `PackedBlock`s; what sharding by block wraps.
        parallel: a `SequenceParallel` when the ranks of a group share every pack, or None.

    Raises:
        ValueError: for models whose forward differs from the packed one (guidance embeddings, extra timestep
            conditions, layered rotary embeddings).
    """

    transformer: Any

    def __init__(
        self,
        transformer: Any,
        *,
        visibility: str | Rule = "full",
        impl: str | None = None,
        checkpointing: bool = False,
        trained: bool = False,
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
        self.blocks = nn.ModuleList(PackedBlock(b, i == last) for i, b in enumerate(transformer.transformer_blocks))
        self.ends = nn.ModuleList(
            getattr(transformer, name)
            for name in ("img_in", "txt_norm", "txt_in", "time_text_embed", "norm_out", "proj_out")
        )
        self.visibility = visibility
        self.impl = impl
        self.checkpointing = checkpointing
        self.trained = trained
        self.parallel: SequenceParallel | None = None

    def layout(self, samples: Sequence[Sample], *, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for this model (`SelfLayout.qwen` with the model's `zero_cond_t`).

        Args:
            samples: the pack, in order.
            shared_references: samples of one group hold their references once, see `SelfLayout.qwen`.
        """
        zero_cond_t = bool(self.transformer.config.zero_cond_t)
        return SelfLayout.qwen(samples, zero_cond_t=zero_cond_t, shared_references=shared_references)

    def forward(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> Tensor:
        """Predict the velocity of every target.

        Args:
            image: packed latents of targets and references, `[N_image, in_channels]`, model dtype
                (`layout.image_stream`).
            text: prompt embeddings without padding, `[N_text, joint_attention_dim]`, model dtype.
            timestep: t in [0, 1] of each sample, `[S]`; noise is at t = 1.
            layout: the pack, from `self.layout`.

        Returns:
            `[N_target, 4 * out_channels]`: the targets' tokens by sample (`layout.split_targets`). Under sequence
            parallelism all ranks of a group are given the same whole pack, and each returns its own part
            (`parallel.targets(layout)`).
        """
        model = self.transformer
        self._check(image, text, timestep, layout)
        context = AttentionContext(
            layout,
            plan(layout, self.visibility),
            layout.rotary(model.config.axes_dims_rope, image.device),
            self.impl,
            visibility=self.visibility,
            parallel=self.parallel,
            checkpointing=self.checkpointing,
            # float16 models: diffusers clips the residual stream to the finite range, so every block closes it
            closed=self.checkpointing or image.dtype == torch.float16,
            trained=self.trained,
        )
        if self.parallel is not None:
            image, text = image[self.parallel.rows(layout, "image")], text[self.parallel.rows(layout, "text")]
        streams = [model.img_in(image), model.txt_in(model.txt_norm(text))]
        timestep = timestep.to(streams[0].dtype)
        if layout.clean_references:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
        temb = model.time_text_embed(timestep, streams[0])
        pending: Pending = []
        for block in self.blocks:
            streams, pending = block(streams, pending, temb, context)
        scale, shift = model.norm_out.linear(model.norm_out.silu(temb).to(streams[0].dtype)).chunk(2, dim=1)
        rows = context.modulation_rows("image")[context.target_rows()]
        return model.proj_out(
            ops.norm_modulate(streams[0], shift, scale, rows, model.norm_out.norm.eps, impl=self.impl)
        )

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


@dataclass(frozen=True)
class Modulation:
    """shift, scale, gate of a block's two norms in one stream, `[R, C]` each (views of one `[R, 6 C]` table)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


def _modulation(block: Any, temb: Tensor, layout: SelfLayout) -> tuple[Modulation, Modulation]:
    """(image, text) modulation of a block; text always uses the sampled timestep, the first rows."""
    image = block.img_mod(temb).chunk(6, dim=-1)
    text = block.txt_mod(temb[: layout.num_samples]).chunk(6, dim=-1)
    return Modulation(*image), Modulation(*text)


def _clipped(x: Tensor) -> Tensor:
    """diffusers clips the residual stream of float16 models to the finite range."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _keep_attention() -> Any:
    """For checkpointing: attention costs the most to recompute and its output little to keep."""
    kept = (torch.ops.uniref_fast.segment_attention.default, torch.ops.uniref_fast.dense_attention.default)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def qk_norm_weights(attn: Any, stream: str) -> tuple[Tensor | None, Tensor | None]:
    """Weights of a stream's RMSNorms over q and over k; None where the attention has no such norm."""
    norms = (attn.norm_q, attn.norm_k) if stream == "image" else (attn.norm_added_q, attn.norm_added_k)
    q, k = (None if norm is None else norm.weight for norm in norms)
    return q, k


def qk_norm_eps(attn: Any) -> float:
    """The eps that all QK norms of an attention have; any value where it has none.

    Raises:
        ValueError: when they differ, since the fused operator takes one.
    """
    norms = {"norm_q": attn.norm_q, "norm_k": attn.norm_k}
    norms |= {"norm_added_q": attn.norm_added_q, "norm_added_k": attn.norm_added_k}
    eps = {name: norm.eps for name, norm in norms.items() if norm is not None}
    if len(set(eps.values())) > 1:
        raise ValueError(f"the QK norms of an attention must have the same eps, got {eps}")
    return next(iter(eps.values()), 1e-6)


def stream_rows(joint: Tensor, layout: SelfLayout, stream: str) -> Tensor:
    """Rows of one stream out of the joint sequence: a view for one sample, one gather for a pack."""
    segments = layout.text_segments if stream == "text" else layout.image_segments
    if not segments:
        return joint[:0]
    start, end = segments[0].joint_start, segments[-1].joint_end
    if end - start == sum(s.length for s in segments):
        return joint[start:end]
    return joint.index_select(0, layout.joint_index(stream, joint.device))
