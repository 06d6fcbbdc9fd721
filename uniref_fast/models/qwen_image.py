"""Qwen-Image-Edit's double-stream MMDiT over a packed, ragged sequence.

`PackedQwenImage` runs the parameters of a live diffusers `QwenImageTransformer2DModel`: no copy, no new modules. Its
Linears are called, never read, so LoRA, quantised or cast Linears keep working. `joint_attention` is shared with the
drop-in patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.layout import SelfLayout
from uniref_fast.visibility import AttentionPlan, Rule, plan, target_plan

__all__ = ["AttentionContext", "Modulation", "PackedQwenImage", "find_transformer", "joint_attention"]


def find_transformer(target: Any) -> Any:
    """The `QwenImageTransformer2DModel` of a pipeline, or the model itself.

    Raises:
        TypeError: for anything else; the message says what is supported.
    """
    from diffusers import QwenImageTransformer2DModel

    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    if type(model) is QwenImageTransformer2DModel:
        return model
    if model is None and hasattr(target, "transformer"):
        raise TypeError(f"{type(target).__name__} has no transformer loaded yet; load it first")
    if hasattr(model, "_orig_mod"):
        raise TypeError("the transformer is wrapped by torch.compile; use the pipeline before compiling it")
    given = type(target if model is None else model).__name__
    supported = ["QwenImageTransformer2DModel", "QwenImageEditPlusPipeline"]
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
    """

    layout: SelfLayout
    plan: AttentionPlan
    rotary: tuple[Tensor, Tensor]
    impl: str | None = None
    rounding: ops.Rounding = "once"


def project_qkv(attn: Any, image: Tensor, text: Tensor, context: AttentionContext) -> tuple[Tensor, ...]:
    """Project, normalise and rotate both streams into the joint q, k, v, `[N, H, D]` each."""
    head_dim = attn.inner_dim // attn.heads  # the head count stays free: tensor parallel shards it
    text_qkv = tuple(p(text).unflatten(-1, (-1, head_dim)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    image_qkv = tuple(p(image).unflatten(-1, (-1, head_dim)) for p in (attn.to_q, attn.to_k, attn.to_v))
    return ops.qk_norm_rope(
        text_qkv,
        image_qkv,
        (_weight(attn.norm_added_q), _weight(attn.norm_added_k)),
        (_weight(attn.norm_q), _weight(attn.norm_k)),
        context.layout,
        context.rotary,
        eps=attn.norm_q.eps if attn.norm_q is not None else 1e-6,
        rounding=context.rounding,
        impl=context.impl,
    )


def joint_attention(attn: Any, image: Tensor, text: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """The attention of one double-stream block, output projections included.

    Args:
        attn: diffusers `Attention` with added k, v projections.
        image: image stream `[N_image, C]`, modulated.
        text: text stream `[N_text, C]`, modulated.
        context: layout, plan and rotary tables.

    Returns:
        (image, text) stream outputs, shapes as given.
    """
    q, k, v = project_qkv(attn, image, text, context)
    out = ops.segment_attention(q, k, v, context.plan, impl=context.impl).flatten(1)
    return project_image(attn, _stream(out, context.layout, "image")), attn.to_add_out(
        _stream(out, context.layout, "text")
    )


def project_image(attn: Any, out: Tensor) -> Tensor:
    """The image stream's output projection and (in training) dropout."""
    for module in attn.to_out:
        out = module(out)
    return out


class PackedQwenImage:
    """A `QwenImageTransformer2DModel` over packs of unlike samples.

    Args:
        transformer: the diffusers model whose parameters are used; it stays usable as it is.
        visibility: policy name or rule (`uniref_fast.visibility`); anything but "full" needs a model trained for it.
        impl: implementation forced on every op, or None to pick by device.

    Raises:
        ValueError: for models whose forward differs from the packed one (guidance embeddings, extra timestep
            conditions, layered rotary embeddings).
    """

    def __init__(self, transformer: Any, *, visibility: str | Rule = "full", impl: str | None = None) -> None:
        config = transformer.config
        for option in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if getattr(config, option, False):
                raise ValueError(f"packed forward does not know config.{option}=True of {type(transformer).__name__}")
        self.transformer = transformer
        self.visibility = visibility
        self.impl = impl

    def __call__(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout) -> Tensor:
        """Predict the velocity of every target.

        Args:
            image: packed latents of targets and references in stream order, `[N_image, in_channels]`, model dtype.
            text: prompt embeddings without padding, `[N_text, joint_attention_dim]`, model dtype.
            timestep: t in [0, 1] of each sample, `[S]`; noise is at t = 1.
            layout: the pack; `zero_cond_t` as the model's config says.

        Returns:
            `[N_target, 4 * out_channels]`: the targets' tokens, by sample.
        """
        model = self.transformer
        self._check(image, text, timestep, layout)
        device = image.device
        context = AttentionContext(
            layout, plan(layout, self.visibility), layout.rotary(model.config.axes_dims_rope, device), self.impl
        )
        image, text = model.img_in(image), model.txt_in(model.txt_norm(text))
        timestep = timestep.to(image.dtype)
        if layout.clean_references:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
        temb = model.time_text_embed(timestep, image)
        image = self._blocks(image, text, temb, context)
        scale, shift = model.norm_out.linear(model.norm_out.silu(temb).to(image.dtype)).chunk(2, dim=1)
        rows = layout.modulation_rows("image", device)[layout.target_rows(device)]
        return model.proj_out(ops.norm_modulate(image, shift, scale, rows, model.norm_out.norm.eps, impl=self.impl))

    def _blocks(self, image: Tensor, text: Tensor, temb: Tensor, context: AttentionContext) -> Tensor:
        """All blocks; returns the targets' tokens only. A block's last residual is fused with the next norm."""
        layout, impl = context.layout, context.impl
        image_rows = layout.modulation_rows("image", image.device)
        text_rows = layout.modulation_rows("text", image.device)
        clip = image.dtype == torch.float16  # diffusers clips the residual stream of float16 models to the finite range
        blocks = list(self.transformer.transformer_blocks)
        mods = _modulation(blocks[0], temb, layout)
        eps = blocks[0].img_norm1.eps
        image_in = ops.norm_modulate(image, mods[0].shift1, mods[0].scale1, image_rows, eps, impl=impl)
        text_in = ops.norm_modulate(text, mods[1].shift1, mods[1].scale1, text_rows, eps, impl=impl)
        for i, block in enumerate(blocks[:-1]):
            following = _modulation(blocks[i + 1], temb, layout)
            branches = joint_attention(block.attn, image_in, text_in, context)
            streams = []
            for x, branch, mod, after, mlp, rows in (
                (image, branches[0], mods[0], following[0], block.img_mlp, image_rows),
                (text, branches[1], mods[1], following[1], block.txt_mlp, text_rows),
            ):
                x, normed = ops.gate_residual_norm_modulate(
                    x, branch, mod.gate1, mod.shift2, mod.scale2, rows, eps, impl=impl
                )
                branch = mlp(normed)
                if clip:
                    x = ops.gate_residual(x, branch, mod.gate2, rows, impl=impl).clip(-65504, 65504)
                    normed = ops.norm_modulate(x, after.shift1, after.scale1, rows, eps, impl=impl)
                else:
                    x, normed = ops.gate_residual_norm_modulate(
                        x, branch, mod.gate2, after.shift1, after.scale1, rows, eps, impl=impl
                    )
                streams.append((x, normed))
            (image, image_in), (text, text_in) = streams
            mods = following
        return self._last_block(blocks[-1], mods[0], image, image_in, text_in, context)

    def _last_block(
        self, block: Any, mod: Modulation, image: Tensor, image_in: Tensor, text_in: Tensor, ctx: AttentionContext
    ) -> Tensor:
        """The last block for the targets' queries only: nothing else of its output is used."""
        layout, impl = ctx.layout, ctx.impl
        targets = layout.target_rows(image.device)
        rows = layout.modulation_rows("image", image.device)[targets]
        q, k, v = project_qkv(block.attn, image_in, text_in, ctx)
        q = q[layout.joint_index("image", image.device)[targets]]
        out = ops.segment_attention(q, k, v, target_plan(layout, self.visibility), impl=impl).flatten(1)
        image, normed = ops.gate_residual_norm_modulate(
            image[targets], project_image(block.attn, out), mod.gate1, mod.shift2, mod.scale2, rows,
            block.img_norm2.eps, impl=impl,
        )  # fmt: skip
        image = ops.gate_residual(image, block.img_mlp(normed), mod.gate2, rows, impl=impl)
        return image.clip(-65504, 65504) if image.dtype == torch.float16 else image

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
                f"the layout was built with zero_cond_t={layout.clean_references}, the model has {config.zero_cond_t}"
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


def _weight(norm: Any) -> Tensor | None:
    return None if norm is None else norm.weight


def _stream(joint: Tensor, layout: SelfLayout, stream: str) -> Tensor:
    """Rows of one stream out of the joint sequence: a view for one sample, one gather for a pack."""
    segments = layout.text_segments if stream == "text" else layout.image_segments
    if not segments:
        return joint[:0]
    start, end = segments[0].joint_start, segments[-1].joint_end
    if end - start == sum(s.length for s in segments):
        return joint[start:end]
    return joint.index_select(0, layout.joint_index(stream, joint.device))
