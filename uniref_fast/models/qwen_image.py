"""Qwen-Image-Edit's double-stream MMDiT over a packed, ragged sequence.

`PackedQwenImage` runs the parameters of a live diffusers `QwenImageTransformer2DModel`: no copy, no new modules. Its
Linears are called, never read, so LoRA, quantised or cast Linears keep working.

Shapes: a stream has N_image or N_text rows of C channels, the joint sequence N rows; H heads of D channels, S samples,
R rows of the modulation table. A rank has n rows of a stream: all of them, or its part under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.compiled_block import TracedContext, TracedLayout
from uniref_fast.models.eight_bit import attend, feed_forward, first_linear, gated_input, modulated_input
from uniref_fast.models.kept_references import Kept
from uniref_fast.models.module_hooks import onloaded
from uniref_fast.models.onednn_linear import CallLinear, call_linear
from uniref_fast.models.packed import (
    DeferredResidual,
    ForwardContext,
    PackedBlock,
    PackedModel,
    clipped,
    qk_norm_names,
    qk_norms,
    skip,
)

__all__ = [
    "Modulation",
    "PackedQwenImage",
    "joint_qkv",
    "project_output",
    "project_qkv",
    "qk_norm_eps",
    "qk_norm_weights",
    "stream_rows",
]


QKV = tuple[Tensor, Tensor, Tensor]
"""q, k and v, or their projections."""


def has_fused_projections(attn: Any) -> bool:
    """Return True if diffusers would call fused projections, as after `fuse_qkv_projections`; Qwen-Image never does."""
    return hasattr(attn, "_supports_qkv_fusion") and attn.fused_projections


def project_qkv(attn: Any, x: Tensor, linear: CallLinear) -> QKV:
    """Project an image stream, or the one stream of a block, `[n, C]`, to q, k, v, `[n, H, D]` each.

    Args:
        attn: The diffusers `Attention` that holds the projections.
        x: The stream.
        linear: Function that calls a Linear, `ForwardContext.linear`.
    """
    if has_fused_projections(attn):
        return _heads(attn, linear(attn.to_qkv, x).chunk(3, -1))
    return _heads(attn, [linear(each, x) for each in (attn.to_q, attn.to_k, attn.to_v)])


def _heads(attn: Any, parts: Sequence[Tensor]) -> QKV:
    head_dim = attn.inner_dim // attn.heads  # the head count stays free: tensor parallel shards it
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    return q, k, v


def joint_qkv(attn: Any, image_qkv: QKV, text_qkv: QKV | None, context: ForwardContext) -> QKV:
    """Normalise and rotate the projections of both streams into the joint q, k, v, `[N, H, D]` each.

    With kept references, q has the rows that are computed, and k and v have all rows of the pack.

    Args:
        attn: The diffusers `Attention` that holds the QK norms.
        image_qkv: Projections of the image stream, `[N_image, H, D]` each.
        text_qkv: Projections of the text stream, `[N_text, H, D]` each; None for a block with one stream of all tokens
            in joint order, whose projections `image_qkv` then has.
        context: Context of the forward.
    """
    with onloaded(*qk_norms(attn)):  # their weights are read
        q, k, v = ops.qk_norm_rope(
            text_qkv,
            image_qkv,
            (None, None) if text_qkv is None else qk_norm_weights(attn, "text"),
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


def project_output(output: Any, out: Tensor, linear: CallLinear = call_linear) -> Tensor:
    """Apply the output projection of an attention, `[n, H * D]` to `[n, C]`.

    Args:
        output: The Linear, or a list that also has its dropout.
        out: Result of the attention.
        linear: Function that calls a Linear.
    """
    for module in output if isinstance(output, nn.ModuleList) else (output,):
        out = linear(module, out)
    return out


class DoubleStreamBlock(PackedBlock):
    """A block with two streams, image and text.

    Attributes:
        norms: Names of the two norms of the image stream, and of those of the text stream.
        finite: Function that is applied to the output of the block: diffusers clips that of most models in float16.
    """

    norms: ClassVar = (("img_norm1", "img_norm2"), ("txt_norm1", "txt_norm2"))
    mlps = ("img_mlp", "txt_mlp")  # of both streams
    finite: Callable[[Tensor], Tensor] = staticmethod(clipped)

    def layer_norms(self) -> list[list[Any]]:
        """Return the two LayerNorms of the image stream and those of the text stream."""
        return [[getattr(self.block, name) for name in names] for names in self.norms]

    def first_linears(self) -> tuple[nn.Module, nn.Module]:
        """Return the first projection of the image and of the text stream; the others share their inputs."""
        return self.block.attn.to_q, self.block.attn.add_q_proj

    def projections(self, x: Tensor, stream: str, linear: CallLinear) -> QKV:
        """Project a modulated stream "image" or "text", `[n, C]`, to q, k, v, `[n, H, D]` each."""
        attn = self.block.attn
        if stream == "image":
            return project_qkv(attn, x, linear)
        if has_fused_projections(attn):
            return _heads(attn, linear(attn.to_added_qkv, x).chunk(3, -1))
        return _heads(attn, [linear(each, x) for each in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)])

    def output(self, stream: str) -> nn.Module:
        """Return the output projection of attention for the stream "image" or "text", with its dropout in a list."""
        attn = self.block.attn
        return attn.to_out if stream == "image" else attn.to_add_out

    def modulation(self, temb: Tensor, layout: SelfLayout | TracedContext) -> tuple[Modulation, Modulation]:
        """Return the modulation of both streams; text always uses the sampled timesteps, the first S rows.

        Args:
            temb: Timestep embedding, `[R, C]`.
            layout: Layout of the pack.
        """
        image = self.block.img_mod(temb).chunk(6, dim=-1)
        if not isinstance(layout, TracedContext):  # a graph would be compiled again for one sample
            temb = temb[: layout.num_samples]
        text = self.block.txt_mod(temb).chunk(6, dim=-1)
        return Modulation(*image), Modulation(*text)

    def _run(
        self, streams: list[Tensor], residuals: list[DeferredResidual], temb: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[DeferredResidual]]:
        block, impl = self.block, context.impl
        mods = self.modulation(temb, context.layout)
        all_rows = tuple(context.modulation_rows(name) for name in ("image", "text"))
        norms = self.layer_norms()
        mlps = [getattr(block, name) for name in self.mlps]
        first = self.first_linears()
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
        branches = self._attention(normed, context)
        outputs, left = [], []
        for mod, mlp, rows, (_, norm) in zip(mods, mlps, all_rows, norms, strict=True):
            x, y = gated_input(
                first_linear(mlp), unchanged.pop(0), branches.pop(0), mod.gate1, mod.shift2, mod.scale2, rows, norm.eps,
                impl,
            )  # fmt: skip
            y = feed_forward(mlp, y, impl, context.linear)
            if context.fuse_residual:
                left.append(DeferredResidual(y, mod.gate2))
            else:
                x = self.finite(ops.gate_residual(x, y, mod.gate2, rows, impl=impl))
            outputs.append(x)
            del x, y
        return outputs, left

    def _joint_qkv(self, normed: list[Tensor], context: ForwardContext) -> QKV:
        """Project, normalise and rotate both streams (image and text, `[n, C]`) into the joint q, k, v, `[N, H, D]`.

        The list is emptied.
        """
        # In the order of diffusers, in which offloading fetches weights in advance.
        image, text = (self.projections(normed.pop(0), stream, context.linear) for stream in ("image", "text"))
        if context.parallel is not None:
            text, image = _all_rows(text, context, "text"), _all_rows(image, context, "image")
        return joint_qkv(self.block.attn, image, text, context)

    def _attention(self, normed: list[Tensor], context: ForwardContext) -> list[Tensor]:
        """Run attention, output projections included; the arguments and results are those of `_joint_qkv`, `[n, C]`."""
        q, k, v = self._joint_qkv(normed, context)
        out = attend(q, k, v, context.plan, context.impl, context.for_training, self.attention_8bit)
        del q, k, v
        parts = []
        for name in ("image", "text"):
            part = stream_rows(out, context.layout, name)  # [N_stream, H, D]
            if context.parallel is not None:
                part = context.parallel.scatter_heads(part, context.parallel.bounds(len(part)))
            parts.append(part.flatten(1))
        del out, part
        return [project_output(self.output(name), parts.pop(0), context.linear) for name in ("image", "text")]

    def _targets(self, mod: Modulation, image: Tensor, normed: list[Tensor], context: ForwardContext) -> Tensor:
        """Run the last block for the targets' queries only, because no other rows of its output are used.

        Keys and values need all rows, so both streams (`[n, C]`) come in; the result is `[n_target, C]`.
        """
        block, layout, impl = self.block, context.layout, context.impl
        targets = layout.target_rows(image.device)
        q, k, v = self._joint_qkv(normed, context)
        q = q[layout.joint_index("image", image.device)[targets]]  # [N_target, H, D]
        out = attend(q, k, v, context.target_plan, impl, context.for_training, self.attention_8bit)
        del q, k, v
        if context.parallel is not None:
            out = context.parallel.scatter_heads(out, context.parallel.targets(layout))
        mine = context.target_rows()
        rows = context.modulation_rows("image")[mine]
        branch = project_output(self.output("image"), out.flatten(1), context.linear)
        del out
        image, hidden = gated_input(
            first_linear(block.img_mlp), image[mine], branch, mod.gate1, mod.shift2, mod.scale2, rows,
            block.img_norm2.eps, impl,
        )  # fmt: skip
        del branch
        skip(self.output("text"))
        hidden = feed_forward(block.img_mlp, hidden, impl, context.linear)
        skip(block.txt_mlp)
        return self.finite(ops.gate_residual(image, hidden, mod.gate2, rows, impl=impl))


class PackedQwenImage(PackedModel):
    """A `QwenImageTransformer2DModel` that runs packs of samples of different sizes; arguments as in `PackedModel`."""

    block_classes: ClassVar = {"transformer_blocks": DoubleStreamBlock}
    modulations = ("img_mod", "txt_mod")
    ends = ("img_in", "txt_norm", "txt_in", "time_text_embed", "norm_out", "proj_out")
    shares_packs = True
    refused_options = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
    row_kinds = (
        ("time_text_embed", "table"), ("norm_out", "table"), ("img_mod", "table"), ("txt_mod", "table"),
        ("txt_", "text"), ("to_added_qkv", "text"), (".add_", "text"), ("to_add_out", "text"), ("", "image"),
    )  # fmt: skip

    def layout(self, samples: Sequence[Sample], *, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for this model (`SelfLayout.qwen` with the model's `zero_cond_t`).

        Args:
            samples: Samples of the pack, in order.
            shared_references: Hold the references of samples of one group once, see `SelfLayout.qwen`.
        """
        zero_cond_t = bool(self.transformer.config.zero_cond_t)
        return SelfLayout.qwen(samples, zero_cond_t=zero_cond_t, shared_references=shared_references)

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model = self.transformer
        rotary = layout.rotary(model.config.axes_dims_rope, image.device)
        context = self._step(layout, kept, rotary, image.dtype)
        layout, image = context.layout, context.computed("image", image)
        if self.parallel is not None:
            image = image[self.parallel.rows(layout, "image")]
        streams = [model.img_in(image), self._text_stream(text, layout, model.txt_norm, model.txt_in)]  # [n, C] each
        timestep = timestep.to(streams[0].dtype)
        if layout.clean_references:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
        temb = model.time_text_embed(timestep, streams[0])  # [R, C]
        out = self._run_blocks(streams, temb, context)
        return self._head(out, temb, context)

    def _check(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> None:
        super()._check(image, text, timestep, layout)
        config = self.transformer.config
        if layout.clean_references != bool(config.zero_cond_t):
            raise ValueError(
                f"the layout was built with zero_cond_t={layout.clean_references}, the model has {config.zero_cond_t}; "
                "build it with the model's own `layout(samples)`"
            )


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of a block's two norms in one stream, `[R, C]` each (views of one `[R, 6 C]` table)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


def qk_norm_weights(attn: Any, stream: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of a stream's RMSNorms of q and k; None where the attention has no such norm."""
    names = qk_norm_names(attn)
    norms = [getattr(attn, name) for name in (names[:2] if stream == "image" else names[2:])]
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


def stream_rows(joint: Tensor, layout: SelfLayout | TracedLayout, stream: str) -> Tensor:
    """Return the rows of one stream out of the joint sequence: a view for one sample, one gather for a pack.

    Args:
        joint: Values in joint order, `[N, ...]`.
        layout: Layout of the pack.
        stream: "text" or "image".
    """
    if isinstance(layout, TracedLayout):
        return layout.rows(joint, stream)
    segments = layout.text_segments if stream == "text" else layout.image_segments
    if not segments:
        return joint[:0]
    start, end = segments[0].joint_start, segments[-1].joint_end
    if end - start == sum(s.length for s in segments):
        return joint[start:end]
    return joint.index_select(0, layout.joint_index(stream, joint.device))
