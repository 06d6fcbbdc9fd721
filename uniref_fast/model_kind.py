"""Check that a pipeline is of the kind that `edit`, `estimate`, training and evaluation support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_configuration", "check_pipeline", "check_transformer"]

PIPELINE = "QwenImageEditPlusPipeline"
TRANSFORMER = "QwenImageTransformer2DModel"
PIPELINES = (PIPELINE, "SmallQwenImageEditPlusPipeline")
INSTEAD = (
    f"editing, estimates, training and evaluation take a {PIPELINE}: use Qwen/Qwen-Image-Edit-2511, "
    "Qwen/Qwen-Image-Edit-2509, or another model of that class"
)
OTHERS = {
    "QwenImageEditPipeline": "the first generation of Qwen-Image-Edit, which takes one image and has another prompt",
    "QwenImageEditInpaintPipeline": "the first generation of Qwen-Image-Edit, for inpainting",
    "QwenImagePipeline": "a text-to-image model, which takes no references",
    "QwenImageImg2ImgPipeline": "a text-to-image model, which starts from an image instead of taking references",
    "QwenImageInpaintPipeline": "a text-to-image model for inpainting, which takes no references",
    "QwenImageControlNetPipeline": "a text-to-image model with a ControlNet, which takes no references",
    "QwenImageControlNetInpaintPipeline": "a text-to-image model with a ControlNet, which takes no references",
    "QwenImageLayeredPipeline": "a model that splits one image into layers",
}
# Options of the transformer that change its layout or its inputs, with the values that the packed model supports.
LAYOUT = {
    "patch_size": 2,
    "guidance_embeds": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}


def check_configuration(given: str, index: Mapping[str, Any], transformer: Mapping[str, Any] | None = None) -> None:
    """Check the configuration files of a pipeline.

    Args:
        given: Name of the pipeline in messages, such as "--model NAME".
        index: Content of `model_index.json`.
        transformer: Content of `transformer/config.json`; None checks the index only.

    Raises:
        ValueError: If the pipeline is of another kind; the message says what is supported and what to use instead.
    """
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise ValueError(_message(given, kind))
    part = (index.get("transformer") or (None, None))[1]
    check_transformer(given, {"_class_name": part})
    if transformer is not None:
        check_transformer(given, transformer)


def check_transformer(given: str, config: Mapping[str, Any]) -> None:
    """Check the configuration of a transformer, the content of its `config.json`; as `check_configuration`."""
    found = config.get("_class_name", TRANSFORMER)
    if found != TRANSFORMER:
        raise ValueError(f"{given} has a transformer of the class {found}, not {TRANSFORMER}; {INSTEAD}")
    _check_layout(given, config)


def check_pipeline(pipe: Any, given: str | None = None) -> None:
    """Check a loaded pipeline.

    Args:
        pipe: The pipeline.
        given: Name of the pipeline in messages; None uses its class.

    Raises:
        TypeError: If it is of another class.
        ValueError: If its transformer has options that are not supported, or its parts belong to different models.
    """
    from diffusers import QwenImageEditPlusPipeline

    from uniref_fast.models import find_transformer

    kind = type(pipe).__name__
    if not isinstance(pipe, QwenImageEditPlusPipeline):
        raise TypeError(_message(given or kind, kind))
    named, parts = given or f"the {kind}", pipe.components  # type: ignore[attr-defined]  # diffusers has no type for it
    for part in ("vae", "scheduler"):
        if parts[part] is None:
            raise ValueError(
                f"{named} has no {part}; load the whole pipeline, of which only the text encoder may be None"
            )
    config = find_transformer(pipe).config
    _check_layout(named, config)
    latent = parts["vae"].config.z_dim * config.patch_size**2
    if config.in_channels != latent:
        raise ValueError(
            f"{named} has a transformer of {config.in_channels} channels, but its VAE gives {latent}; the two belong "
            "to different models"
        )
    if (encoder := parts["text_encoder"]) is not None:
        width = encoder.config.get_text_config().hidden_size
        if config.joint_attention_dim != width:
            raise ValueError(
                f"{named} has a transformer for text of width {config.joint_attention_dim}, but its text encoder gives "
                f"{width}; the two belong to different models"
            )


def _message(given: str, kind: str) -> str:
    what = f": {OTHERS[kind]}" if kind in OTHERS else ""
    named = kind if given == kind else f"{given} is a {kind}, which"
    patch = "; uniref_fast.patch(pipe) accelerates this one in diffusers" if _can_be_patched(kind) else ""
    return f"{named} is not supported{what}; {INSTEAD}{patch}"


def _can_be_patched(kind: str) -> bool:
    return kind in OTHERS and kind != "QwenImageLayeredPipeline"


def _check_layout(given: str, transformer: Mapping[str, Any]) -> None:
    for name, value in LAYOUT.items():
        if transformer.get(name, value) != value:
            raise ValueError(
                f"{given} has a transformer with {name} = {transformer[name]!r}, which is not supported (it must be "
                f"{value!r}); {INSTEAD}"
            )
    axes, width = transformer.get("axes_dims_rope", (16, 56, 56)), transformer.get("attention_head_dim", 128)
    if len(axes) != 3 or sum(axes) != width:
        raise ValueError(
            f"{given} has a transformer with rotary axes {tuple(axes)}, which must be three that add up to the width "
            f"of a head, {width}; {INSTEAD}"
        )
