"""Families of models: what `patch`, `edit`, `estimate` and training need to know about an architecture.

    family = family_of(pipe)                    # of a pipeline or of a transformer (uniref_fast.models.families)
    model = family.packed(transformer)          # runs packs of samples, as `PackedQwenImage` does
    sizes = family.geometry(pipe, [(640, 480)])

A family is a subclass of `Family` in a file of this folder, with one instance that `uniref_fast.models.families` names.
Everything that is equal for all families is outside: the denoising loop, kept references, packing, checks of requests.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.family_checks import given_embeddings
from uniref_fast.models.packed import PackedModel
from uniref_fast.models.replaced import Replaced
from uniref_fast.schedule import denoising_schedule, resolution_shift
from uniref_fast.visibility import Rule

if TYPE_CHECKING:
    from uniref_fast.request import EditRequest, Geometry

__all__ = [
    "CAPABILITIES",
    "EDIT_ONLY",
    "NOT_TRAINED",
    "UNMARKED_REFERENCES",
    "Family",
    "SizedImages",
    "Sizes",
    "Text",
    "prepared_references",
]

CAPABILITIES = {
    "patch": "uniref_fast.patch accelerates the pipeline of diffusers",
    "edit": "uniref_fast.edit and Engine run requests in one packed loop",
    "estimate": "uniref_fast.estimate",
    "keep_references": "references kept across steps in edit (keep_references=)",
    "patch_keep_references": "references kept across steps in patch (keep_references=)",
    "fast": 'computation in 8 bits (mode="fast")',
    "sft": "training/sft.py",
    "msgrpo": "training/msgrpo.py",
}
"""Description of each capability that a family may have, by its name, which is a key of `Family.missing`."""

NOT_TRAINED = "training has no description of its sizes (`ModelSize`), and was not tested with it"
"""Reason of a family that was not prepared for training."""

EDIT_ONLY = {"sft": NOT_TRAINED, "msgrpo": NOT_TRAINED}
"""Part of `Family.missing` of a family that was not prepared for training."""

UNMARKED_REFERENCES = "calls of its transformer do not say which tokens are those of a reference"
"""Reason of a family whose kept references `patch` cannot find."""

Sizes = Sequence[tuple[int, int]]
"""Width and height in pixels of images."""

SizedImages = Sequence[tuple[Image.Image, tuple[int, int]]]
"""References of a request, each with its size for the VAE."""

Text = int | tuple[tuple[int, bool], ...]
"""Text of a sequence: its length without padding, or (length, valid) runs, as `Sample.text`."""


class Family:
    """One architecture: names, packed model, and the part of its pipeline around the transformer.

    Attributes:
        name: Name of the family.
        models: Hub ids of known checkpoints.
        transformer: Name of the class of the transformer in diffusers.
        pipelines: Names of the pipeline classes that `edit`, `estimate` and training take.
        other_pipelines: Other pipeline classes with that transformer, which `patch` accelerates, and the reason why
            `edit` does not take them.
        untrained: Classes of `pipelines` that training does not take, and the reason.
        missing: Reason why a capability (`CAPABILITIES`) does not work, by its name. What is not named works.
        replaced: Modules that the packed forward replaces; it calls the other modules inside the transformer.
        packed: Class of the packed model.
        negative_images: True if the negative prompt is encoded with the references too.
        exact_references: When kept references give the same result as computing them in every step.
        random_models: Module that builds small pipelines with random weights (`uniref_fast.random_models`); None for
            no such module.
        image_mode: Mode in which the pipeline's components take images: "RGB", with transparency over white, or "RGBA".
        loads_lokr: True if `load_lora_weights` of the pipelines takes a LoKr, whose names it may convert.
        drops_transparency: The pipeline converts images with `convert("RGB")`, which shows their transparent pixels.
    """

    name: str
    models: tuple[str, ...]
    transformer: str
    pipelines: tuple[str, ...]
    other_pipelines: ClassVar[Mapping[str, str]] = {}
    untrained: ClassVar[Mapping[str, str]] = {}
    missing: ClassVar[Mapping[str, str]] = {}
    replaced: tuple[Replaced, ...]
    packed: type[PackedModel]
    negative_images: bool = True
    exact_references: str = "never"
    random_models: str | None = None
    image_mode: Literal["RGB", "RGBA"] = "RGB"
    loads_lokr: bool = False
    drops_transparency: bool = False

    # ---- names and classes ----

    def transformer_class(self) -> Any:
        """Return the class of the transformer; None if the installed diffusers does not have it."""
        return _diffusers_class(self.transformer)

    def has_pipeline(self, pipe: Any) -> bool:
        """Return True if a pipeline is of a class in `pipelines` or of a subclass of one."""
        classes = [_diffusers_class(name) for name in self.pipelines]
        return isinstance(pipe, tuple(each for each in classes if each is not None))

    def index(self, pipe: Any) -> dict[str, Any]:
        """Return what `model_index.json` says of a loaded pipeline: its options, and the class of `pipelines`.

        A pipeline of a subclass gets the class that this one extends.
        """
        names = (base.__name__ for base in type(pipe).__mro__)
        known = {*self.pipelines, *self.other_pipelines}
        name = next((each for each in names if each in known), type(pipe).__name__)
        return {**pipe.config, "_class_name": name}

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        """Return the denoising steps and the true CFG scale that commands use for a pipeline unless flags give others.

        Args:
            index: Content of the `model_index.json` of the pipeline.
        """
        return 50, 4.0

    def call_defaults(self, pipe: Any) -> tuple[int, float]:
        """Return the denoising steps and the scale of a call of a pipeline that is given neither.

        They may differ from `defaults`, which knows more about a checkpoint.
        """
        steps, scale = _call_default(pipe, "num_inference_steps"), _call_default(pipe, self.scale_argument(pipe))
        return steps, 1.0 if scale is None else float(scale)

    def scale_argument(self, pipe: Any) -> str:
        """Return the argument of a pipeline's call that is the `true_cfg_scale` of a request, if it has one."""
        return "true_cfg_scale" if any("true_cfg_scale" in known for known in _calls(pipe)) else "guidance_scale"

    def usual_negative_prompt(self) -> str | None:
        """Return the negative prompt of commands with guidance: that of the pipelines, or one that turns it on."""
        return ""

    def reason_against(self, capability: str) -> str | None:
        """Return the reason why a capability (`CAPABILITIES`) does not work for this family, or None."""
        return self.missing.get(capability)

    def require(self, capability: str) -> None:
        """Raise ValueError with the reason if a capability (`CAPABILITIES`) does not work for this family."""
        if reason := self.reason_against(capability):
            raise ValueError(f"{CAPABILITIES[capability]}: not supported for {self.name} models: {reason}")

    # ---- small pipelines, and calls of the pipelines of diffusers ----

    def random_pipelines(self) -> tuple[str, ...]:
        """Return the classes of pipelines that `random_pipeline` builds."""
        return () if self.random_models is None else importlib.import_module(self.random_models).PIPELINES

    def random_pipeline(self, name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
        """Return a small pipeline with random weights and without a progress bar.

        Args:
            name: Class of the pipeline, one of `random_pipelines`.
            dtype: Data type of the weights.
            sizes: `layers`, `heads` and `grid` (`uniref_fast.random_models`).

        Raises:
            ValueError: If the class is not one of `random_pipelines`.
        """
        if name not in self.random_pipelines():
            raise ValueError(f"no small {name} can be built; {self.name} has {', '.join(self.random_pipelines())}")
        pipe = importlib.import_module(str(self.random_models)).pipeline(name, dtype, **sizes)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def written(self, text: str) -> str:
        """Return an instruction in the form in which the pipelines take prompts; commands and the server use it."""
        return text

    def most_references(self, pipe: Any) -> int | None:
        """Return the largest number of references of a request for a pipeline; None if the pipeline has no limit."""
        return None

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        """Return the arguments with which the pipeline itself computes a request that has one seed.

        Args:
            pipe: The pipeline.
            request: The request, with prompts or with embeddings of prompts.
        """
        known = inspect.signature(type(pipe).__call__).parameters
        names = (
            "prompt", "negative_prompt", "height", "width", "num_inference_steps", "prompt_embeds",
            "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask",
        )  # fmt: skip
        given = {name: getattr(request, name) for name in names}
        given |= {name: value[None] for name, value in given.items() if torch.is_tensor(value) and value.ndim == 2}
        given["image"] = list(request.images) or None
        given[self.scale_argument(pipe)] = request.true_cfg_scale
        given["generator"] = torch.Generator().manual_seed(request.seed)  # type: ignore[arg-type]
        return {name: value for name, value in given.items() if name in known and value is not None}

    # ---- the packed model ----

    def text_channels(self, config: Any) -> int:
        """Return the width of the text embeddings of a transformer with a configuration."""
        return self.packed.prompt_channels(config)

    def text_rows(self, layout: SelfLayout) -> int:
        """Return the number of rows of the prompt embeddings of a pack."""
        return layout.text_length

    def layout(self, config: Any, samples: Sequence[Sample]) -> SelfLayout:
        """Return the layout of a pack for a transformer with a configuration."""
        return SelfLayout.pack(samples, self.packed.scheme, clean_references=False)

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        """Raise ValueError if the packed model does not support the configuration of a transformer.

        Args:
            given: Name of the pipeline in the message.
            config: Configuration of the transformer.
            instead: End of the message: what is supported.
        """
        raise NotImplementedError

    def built(self, config: dict[str, Any], layout: SelfLayout) -> Any:
        """Return a new transformer with a configuration, of the kind that a layout is for."""
        return self.transformer_class()(**config)

    def adopted(self, pipe: Any, transformer: Any) -> Any:
        """Return a loaded transformer that replaces the one of a pipeline, changed as the pipeline changes its own."""
        return transformer

    def keeps_references(self, transformer: Any) -> bool:
        """Return True for a model whose pipeline in diffusers computes references in the first step only."""
        return False

    # ---- the pipeline around the transformer ----

    def text_encoders(self, pipe: Any) -> tuple[Any, ...]:
        """Return the models that encode prompts and what they see of references; each may be None."""
        return (getattr(pipe, "text_encoder", None),)

    def check_parts(self, pipe: Any, given: str) -> None:
        """Raise ValueError if the parts of a loaded pipeline do not belong together; `given` names the pipeline."""

    def image_refusal(self, pipe: Any, sizes: Sizes) -> str | None:
        """Return the reason why a pipeline refuses references of (width, height) in pixels; None if it takes them."""
        return None

    def checked(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Check the images of a request and what this family restricts; arguments and result as for `check_request`."""
        if reason := self.image_refusal(pipe, [image.size for image in request.images]):
            raise ValueError(f"{where}: {reason}")
        return self.check_request(pipe, request, where)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Check what only this family restricts, and return the request, changed where its pipeline fixes a value.

        Args:
            pipe: The pipeline.
            request: A request that passed the checks that are equal for all families.
            where: Name of the request in messages.

        Raises:
            ValueError: If the request cannot run.
        """
        return request

    def embedded_guidance(self, pipe: Any, request: EditRequest) -> float | None:
        """Return the guidance scale that the transformer embeds for a checked request; None if it embeds none."""
        return None

    def token_side(self, pipe: Any) -> int:
        """Return the side of a token in pixels."""
        return 2 * pipe.vae_scale_factor

    def token_grid(self, pipe: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of tokens of an image of (width, height) pixels."""
        side = self.token_side(pipe)
        return size[1] // side, size[0] // side

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        """Return three areas in pixels: of a reference for the text encoder, of one for the VAE, and of the result."""
        raise NotImplementedError

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        """Compute the sizes of a request; the arguments are those of `uniref_fast.request.geometry`."""
        raise NotImplementedError

    def schedule(self, pipe: Any, tokens: int, steps: int, device: torch.device | str) -> Any:
        """Return a copy of the pipeline's scheduler with the timesteps of one request set.

        Args:
            pipe: The pipeline.
            tokens: Number of target tokens.
            steps: Number of denoising steps.
            device: Device of the timesteps.
        """
        return denoising_schedule(pipe.scheduler, tokens, steps, device)

    def encode_prompt(
        self,
        pipe: Any,
        prompt: str | None,
        images: Sequence[Image.Image],
        sizes: Sizes,
        embeds: Tensor | None = None,
        mask: Tensor | None = None,
        device: Any = None,
        cast: bool = True,
    ) -> tuple[Tensor, Text]:
        """Encode a prompt, or take given embeddings instead (`uniref_fast.encode.encoded_prompt`)."""
        device = device or pipe._execution_device
        if embeds is None:
            return self.encoded(pipe, prompt or "", images, sizes, device)
        return self.given(pipe, *given_embeddings(pipe, embeds, mask, device, cast), device)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        """Return `encode_prompt` of a text; a family defines it.

        Args:
            pipe: The pipeline, whose text encoder runs.
            prompt: The text.
            images: References that the text encoder sees, converted by `convert_image`.
            sizes: Width and height in pixels at which it sees each of them.
            device: Device of the pipeline.
        """
        raise NotImplementedError

    def given(self, pipe: Any, embeds: Tensor, mask: Tensor | None, device: Any) -> tuple[Tensor, Text]:
        """Return `encode_prompt` of given embeddings.

        Args:
            pipe: The pipeline.
            embeds: Embeddings, `[1, L, C]`.
            mask: Valid rows, `[1, L]`; None for all.
            device: Device of the pipeline.
        """
        return self.valid_rows(embeds[0], mask)

    def valid_rows(self, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Text]:
        """Return embeddings without the padding at their end, `[n, C]`, and their text.

        Args:
            embeds: Embeddings, `[L, C]`.
            mask: Valid rows, `[L]` or `[1, L]`; None for all.
        """
        text = self.given_text(len(embeds), mask)
        return embeds[: text if isinstance(text, int) else sum(length for length, _ in text)], text

    def encode_prompts(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: Sequence[Image.Image], cast: bool = True
    ) -> list[tuple[Tensor, Text]]:
        """Return `encode_prompt` of the prompt of a request and, with guidance, of the negative prompt.

        Args:
            pipe: The pipeline.
            request: A checked request.
            sizes: Sizes of the request.
            images: References of the request, converted by `convert_image`.
            cast: Cast the request's embeddings to the dtype of the transformer.
        """
        return [
            self.encode_prompt(
                pipe, None if embeds is not None else text or "", images[: len(seen)], seen, embeds, mask, cast=cast
            )
            for (text, embeds, mask), seen in zip(request.texts, sizes.seen(self), strict=False)
        ]

    def given_text(self, length: int, mask: Tensor | None) -> Text:
        """Return the text of `encode_prompt` for given embeddings.

        Args:
            length: Number of rows of the embeddings.
            mask: Valid rows, `[length]` or `[1, length]`; None for all.
        """
        from uniref_fast.encode import text_runs

        return text_runs(length, mask)

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        """Encode an image to normalised latents, `[tokens, channels]` (`uniref_fast.encode.image_latents`)."""
        raise NotImplementedError

    def starting_latents(
        self,
        pipe: Any,
        request: EditRequest,
        sizes: Geometry,
        images: Sequence[Image.Image],
        dtype: torch.dtype,
        generator: Any,
        own: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the starting noise of all images `[num_images, n, C]` and the latents of all references `[m, C]`.

        Args:
            pipe: The pipeline.
            request: A checked request.
            sizes: Sizes of the request.
            images: References of the request, converted by `convert_image`.
            dtype: Dtype of the noise.
            generator: Generator of the noise, or None.
            own: True if `prepare_latents` of the pipeline is diffusers' own method; another one must be called as the
                pipeline calls it, with the references if it takes them.
        """
        pairs = self.sized_references(images, sizes)
        latents, references = self.prepared_latents(pipe, request, sizes, [] if own else pairs, dtype, generator)
        if references is None:
            # diffusers' own method would give the VAE the references in the transformer's dtype, or once for each image
            parts = [self.encode_image(pipe, *pair).to(latents.dtype) for pair in pairs]
            references = torch.cat([latents[0, :0], *parts])
        return latents, references

    def sized_references(self, images: Sequence[Image.Image], sizes: Geometry) -> SizedImages:
        """Return the references of a request as `encode_image` takes them, each with its size for the VAE."""
        return list(zip(images, sizes.reference_sizes, strict=True))

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the starting noise `[num_images, n, C]`, and the latents of references `[m, C]`; a family defines it.

        Args:
            pipe: The pipeline, whose `prepare_latents` draws the noise.
            request: A checked request.
            sizes: Sizes of the request.
            images: References that `prepare_latents` has to encode, each with its size; the second result is None
                without any, and if the method takes none.
            dtype: Dtype of the noise.
            generator: Generator of the noise, or None.
        """
        raise NotImplementedError

    def convert_image(self, image: Image.Image) -> Image.Image:
        """Return an image as the pipeline's components take it (`image_mode`, `drops_transparency`)."""
        from uniref_fast.encode import opaque, to_rgb, to_rgba

        if self.drops_transparency:
            return opaque(image)
        return to_rgba(image) if self.image_mode == "RGBA" else to_rgb(image)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Combine the velocities `[n, C]` of both prompts by classifier-free guidance, without rescaling."""
        return negative + scale * (positive - negative)

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int], output_type: str = "pil") -> Any:
        """Decode latents `[1, n, C]` to an image (`uniref_fast.encode.decode_image`)."""
        latents = self.vae_latents(pipe, latents, size).to(pipe.vae.dtype)
        image = pipe.vae.decode(latents, return_dict=False)[0]
        image = image[:, :, 0] if image.ndim == 5 else image  # of a video with one frame
        return pipe.image_processor.postprocess(image, output_type=output_type)[0]

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return latents `[1, n, C]` of an image of (width, height) pixels in the scale and shape of its VAE.

        The shape is `[1, C, H, W]`, or `[1, C, 1, H, W]` for a VAE of videos. A family defines it.
        """
        raise NotImplementedError

    # ---- training ----

    def training_guidance(self, config: Any) -> float | None:
        """Return the guidance scale that a transformer with a configuration embeds in training; None if it has none."""
        return None

    def training_shift(self, pipe: Any, tokens: int) -> float:
        """Return the shift of the times of training for a target of `tokens` tokens (`schedule.shift_time`)."""
        return resolution_shift(pipe.scheduler.config, tokens)

    def unguided(self, index: Mapping[str, Any]) -> str | None:
        """Return the reason why a pipeline has no classifier-free guidance; None if it has.

        Args:
            index: Content of the `model_index.json` of the pipeline.
        """
        return None

    def prompt_template(self, pipe: Any) -> Any:
        """Return what `encode_prompt` adds to a prompt, as JSON data; it identifies kept embeddings."""
        return pipe.prompt_template_encode

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> Text:
        """Return the text of `encode_prompt` without running the encoder."""
        raise NotImplementedError

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        """Return (linear, attention) operations of one packed forward (`uniref_fast.costs.transformer_flops`)."""
        raise NotImplementedError

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        """Return operations and peak bytes of the text encoder (`uniref_fast.costs.text_encoder_cost`)."""
        raise NotImplementedError

    def vae_shape(self, vae: Any, size: tuple[int, int], direction: str) -> tuple[int, ...]:
        """Return the shape of the VAE's input for one image.

        Args:
            vae: The VAE, of images or of videos.
            size: Width and height of the image in pixels.
            direction: "encode" or "decode".
        """
        (width, height), config = size, vae.config
        if "z_dim" in config:  # of videos, whose encoder may take patches of pixels as channels
            channels = config.get("in_channels", 3) // (config.get("patch_size") or 1) ** 2
            if direction == "encode":
                return 1, channels, 1, height, width
            factor = vae.spatial_compression_ratio
            return 1, config.z_dim, 1, height // factor, width // factor
        if direction == "encode":
            return 1, config.in_channels, height, width
        factor = 2 ** (len(config.block_out_channels) - 1)
        return 1, config.latent_channels, height // factor, width // factor


def prepared_references(latents: Tensor, packed: Tensor | None, references: Sequence[Any]) -> Tensor | None:
    """Return the latents of references that `prepare_latents` of a pipeline has encoded, as `prepared_latents` does.

    Args:
        latents: Starting noise, `[num_images, n, C]`.
        packed: Latents of the references `[num_images, m, C]`, or None.
        references: References that the method was given.
    """
    if not references:
        return None
    return latents[0, :0] if packed is None else packed[0].to(latents.dtype)


def _calls(pipe: Any) -> list[Mapping[str, inspect.Parameter]]:
    """Return the arguments of a call of a pipeline: those of its class, then of the classes that this one extends."""
    return [inspect.signature(kind.__call__).parameters for kind in type(pipe).__mro__ if "__call__" in vars(kind)]


def _call_default(pipe: Any, name: str) -> Any:
    """Return the default of an argument of a call of a pipeline; None if it has none."""
    values = (known[name].default for known in _calls(pipe) if name in known)
    return next((value for value in values if value not in (None, inspect.Parameter.empty)), None)


def _diffusers_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name, None)
