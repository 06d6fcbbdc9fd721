"""LongCat-Image-Edit as a family: the pipeline around the transformer, and what it costs.

The packed model is in `uniref_fast.models.flux1`. The text encoder sees the one reference and the prompt; its output
for both, padding included, is the text of the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from uniref_fast.models.family import Sizes, Text
from uniref_fast.models.family_checks import check_widths, refuse_masks, with_negative_prompt
from uniref_fast.models.flux1 import PackedLongCat
from uniref_fast.models.flux1_family import AREA, FluxVaeFamily, replaced_parts
from uniref_fast.models.image_sizes import result_size
from uniref_fast.models.text_encoder_costs import condition_tokens, vision_language_cost
from uniref_fast.request import EditRequest, Geometry

__all__ = ["LONGCAT_IMAGE_EDIT", "LongCatImageEdit"]

PROMPT_LENGTH = 512
"""Number of tokens of a prompt, padding included."""

_MODEL = "diffusers.models.transformers.transformer_longcat_image"


class LongCatImageEdit(FluxVaeFamily):
    """LongCat-Image-Edit, and `patch` of LongCat-Image."""

    name = "longcat-image-edit"
    models = ("meituan-longcat/LongCat-Image-Edit",)
    transformer = "LongCatImageTransformer2DModel"
    pipelines = ("LongCatImageEditPipeline",)
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "LongCatImagePipeline": "a text-to-image model, which takes no references",
    }
    replaced = replaced_parts(
        _MODEL, transformer, "LongCatImage", "LongCatImagePosEmbed", (f"{_MODEL}:LongCatImageAttention",) * 2,
        ("torch.nn:RMSNorm",) * 2, PackedLongCat.ends,
    )  # fmt: skip
    packed = PackedLongCat
    random_models = "uniref_fast.random_models.longcat_image"
    latent_arguments = (1,)  # the length of the text, only for positions

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        return 50, 4.5

    def most_references(self, pipe: Any) -> int:
        return 1

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        return super().stock_arguments(pipe, request) | {"image": request.images[0]}

    def check_parts(self, pipe: Any, given: str) -> None:
        widths = [("in_channels", "VAE", pipe.vae.config.latent_channels * 4)]
        if pipe.text_encoder is not None:
            width = pipe.text_encoder.config.get_text_config().hidden_size
            widths.append(("joint_attention_dim", "text encoder", width))
        check_widths(given, pipe.transformer.config, widths)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Refuse what the pipeline does not take, and set the negative prompt that it would use."""
        if len(request.images) != 1:
            raise ValueError(
                f"{where}: a LongCatImageEditPipeline takes exactly one image per request, got {len(request.images)}"
            )
        refuse_masks(request, where)
        request = with_negative_prompt(pipe, request, where, self.usual_negative_prompt())
        for text, _, _ in request.texts:
            if text and (count := len(_prompt_tokens(pipe, text))) > PROMPT_LENGTH:
                raise ValueError(
                    f"{where}: the prompt has {count} tokens, and the pipeline takes at most {PROMPT_LENGTH}; shorten "
                    "it"
                )
        return request

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        """Return the areas; a pipeline may have others than diffusers in an attribute `output_area`."""
        area = getattr(pipe, "output_area", AREA)
        return area // 4, area, area

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import calculate_dimensions

        if budget is not None:
            raise ValueError(
                "budget is not possible for LongCat-Image-Edit, whose reference has the size of the result"
            )
        if len(sizes) != 1:
            raise ValueError(f"a LongCatImageEditPipeline takes exactly one image per request, got {len(sizes)}")
        patch, ((w, h),) = self.token_side(pipe), sizes
        usual = calculate_dimensions(self.image_areas(pipe)[2], w / h)
        result = result_size(width, height, usual, patch)
        return Geometry(result, ((result[0] // 2, result[1] // 2),), (result,), patch)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        processor, ((width, height),) = pipe.image_processor, sizes
        image = processor.resize(images[0], 2 * height, 2 * width)  # as the pipeline does, first to the VAE's size
        embeds, _ = pipe.encode_prompt(prompt=[prompt], image=processor.resize(image, height, width))
        return embeds[0], embeds.shape[1]

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> int:
        return 2 + PROMPT_LENGTH + sum(condition_tokens(pipe, size) for size in sizes)  # between two tokens of vision

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        tokenizer, prefix = pipe.tokenizer, pipe.prompt_template_encode_prefix
        around = (
            len(tokenizer(prefix)["input_ids"]) - 3 + len(tokenizer(pipe.prompt_template_encode_suffix)["input_ids"])
        )
        return vision_language_cost(pipe, sizes, [[length + around for length in lengths] for lengths in texts])


def _prompt_tokens(pipe: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt, in which the pipeline encodes each character of a quotation by itself."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import split_quotation

    parts: list[str] = []
    for part, is_quoted in split_quotation(prompt):
        parts += [*part] if is_quoted else [part]
    return [token for part in parts for token in pipe.tokenizer(part, add_special_tokens=False)["input_ids"]]


LONGCAT_IMAGE_EDIT = LongCatImageEdit()
