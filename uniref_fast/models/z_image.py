"""Z-Image with references (`ZImageOmniPipeline`) over a packed, ragged sequence.

The text of a sample is one caption between two images each. Captions, images and the SigLIP features of the references
pass refiner blocks of their own before the blocks of the whole sequence. Each caption, image and feature map is filled
up to a multiple of 32 tokens with a learned token, to which all tokens attend as to any other.

    captions  [a a a p | b b p p]     images  [r r r p | T T T T]     features  [f f p p | p p p p]
    joint     [a a a p b b p p r r r T T T T p f f p p p p p p]       p filling, T target, r reference

Captions before a reference, references and their features are modulated as clean tokens (t = 1), all others with the
sampled t. Every token attends to every token, so nothing but the refined captions and features is equal in all steps.

The text of a sample (`Sample.text`) are the lengths of the captions with a `REFERENCE_PLACE` between two of them, and
then, for each reference, a place and one run for each row of its features.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uniref_fast.layout import REFERENCE_PLACE, Grid, Kind, Sample, Segment, SelfLayout
from uniref_fast.memo import memo, version_of
from uniref_fast.models.kept_references import Kept
from uniref_fast.models.packed import skip
from uniref_fast.models.sandwich import SandwichBlock, SandwichModel, part_layout, rows_of

__all__ = [
    "MULTIPLE",
    "PackedZImage",
    "captions_and_features",
    "grid_positions",
    "text_of",
    "text_rows",
    "text_width",
    "z_image_layout",
]

MULTIPLE = 32
"""Captions, images and feature maps have a multiple of this number of tokens, filling included."""

PATCH = "2-1"
"""Key of the embedding and of the final layer of patches of 2 x 2 latent pixels."""


class Part(enum.IntEnum):
    """Part of a sample that the tokens of a text segment belong to; the `index` of the segment."""

    CAPTION = 0
    CAPTION_FILLING = 1
    IMAGE_FILLING = 2
    FEATURES = 3
    FEATURES_FILLING = 4


def text_of(captions: Sequence[int], features: Sequence[tuple[int, int]]) -> tuple[tuple[int, bool], ...]:
    """Return the text of a sample.

    Args:
        captions: Tokens of each caption.
        features: Height and width of the features of each reference.
    """
    runs: list[tuple[int, bool]] = []
    for i, length in enumerate(captions):
        runs += [REFERENCE_PLACE] * (i > 0) + [(length, True)]
    for height, width in features:
        runs += [REFERENCE_PLACE, *[(width, True)] * height]
    return tuple(runs)


def captions_and_features(sample: Sample) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the lengths of the captions of a sample, and the height and width of the features of each reference.

    A text without places is one caption.
    """
    groups: list[list[int]] = [[]]
    for run in sample.text_runs:
        if run == REFERENCE_PLACE:
            groups.append([])
        else:
            groups[-1].append(run[0])
    count = len(sample.references)
    first = count + 2 if count else 1
    return [sum(group) for group in groups[:first]], [(len(rows), rows[0]) for rows in groups[first:] if rows]


def z_image_layout(samples: Sequence[Sample]) -> SelfLayout:
    """Return the layout of a pack.

    Args:
        samples: Samples of the pack, in order.

    Raises:
        ValueError: If there are no samples.
    """
    return _layout(tuple(samples))


@functools.lru_cache(maxsize=8)  # few, because device tensors are kept with a layout
def _layout(samples: tuple[Sample, ...]) -> SelfLayout:
    if not samples:
        raise ValueError("a layout needs at least one sample")
    segments: list[Segment] = []
    joint_at = text_at = image_at = 0
    for i, sample in enumerate(samples):
        starts = {0: image_at}  # of the images in their stream: the target, then the references
        for number, grid in enumerate((sample.target, *sample.references)):
            starts[number + 1] = starts[number] + grid[0] * grid[1] * grid[2]
        for kind, index, grid, is_clean, origin in _pieces(sample):
            start = text_at if kind.is_text else starts[index]
            row = i + len(samples) * is_clean
            segment = Segment(kind, i, i, index, grid, start, joint_at, row, origin)
            segments.append(segment)
            joint_at += segment.length
            text_at += segment.length if kind.is_text else 0
        image_at = starts[len(sample.references) + 1]
    return SelfLayout(tuple(segments), len(samples), clean_references=True)


Piece = tuple[Kind, int, Grid, bool, Grid]
"""Kind, index, grid, whether it is clean, and origin of a segment."""


def _pieces(sample: Sample) -> Iterator[Piece]:
    """Yield the segments of a sample, in joint order.

    The origin of an image is its first position; that of features is their position on the first axis and the last row
    and column of latent pixels of their reference, to which they are stretched.
    """
    captions, features = captions_and_features(sample)
    count, at, ends = len(sample.references), 1, []
    for j, length in enumerate(captions):
        yield from _filled(Kind.TEXT, Part.CAPTION, (length, 1, 1), j < count, (at, 0, 0))
        ends.append(at + length)
        at += length + 2
    ends += [at] * (count + 1 - len(ends))  # a text without places
    images = [*enumerate(sample.references, 1), (0, sample.target)]  # in the order of their positions
    for index, grid in images:
        kind = Kind.REFERENCE if index else Kind.TARGET
        yield kind, index, grid, index > 0, (ends[(index or count + 1) - 1], 0, 0)
    for index, (frames, height, width) in images:
        if rest := -(frames * height * width) % MULTIPLE:
            yield Kind.TEXT, Part.IMAGE_FILLING, (rest, 1, 1), index > 0, (0, 0, 0)
    for j, ((height, width), (_, rows, columns)) in enumerate(zip(features, sample.references, strict=False)):
        origin = ends[j] + 1, 2 * rows - 1, 2 * columns - 1
        yield from _filled(Kind.TEXT, Part.FEATURES, (1, height, width), True, origin)
    if features:  # the target has none
        yield Kind.TEXT, Part.FEATURES_FILLING, (MULTIPLE, 1, 1), False, (0, 0, 0)


def _filled(kind: Kind, part: Part, grid: Grid, is_clean: bool, origin: Grid) -> Iterator[Piece]:
    yield kind, part, grid, is_clean, origin
    if rest := -(grid[0] * grid[1] * grid[2]) % MULTIPLE:
        yield kind, part + 1, (rest, 1, 1), is_clean, (0, 0, 0)


def text_rows(layout: SelfLayout) -> int:
    """Return the rows of the prompt embeddings of a pack: of captions and features, without filling."""
    return sum(s.length for s in layout.segments if _is_caption_token(s) or _is_feature_token(s))


def text_width(config: Any) -> int:
    """Return the columns of the prompt embeddings: those of captions or of features, whichever are more."""
    return max(config.cap_feat_dim, config.siglip_feat_dim)


def _is_caption(s: Segment) -> bool:
    return s.kind.is_text and s.index <= Part.CAPTION_FILLING


def _is_caption_token(s: Segment) -> bool:
    return s.kind.is_text and s.index == Part.CAPTION


def _is_image(s: Segment) -> bool:
    return not s.kind.is_text or s.index == Part.IMAGE_FILLING


def _is_feature(s: Segment) -> bool:
    return s.kind.is_text and s.index >= Part.FEATURES


def _is_feature_token(s: Segment) -> bool:
    return s.kind.is_text and s.index == Part.FEATURES


class PackedZImage(SandwichModel):
    """A `ZImageTransformer2DModel` that runs packs of samples of different sizes; arguments as in `SandwichModel`.

    `text` of its `forward` has the captions of a sample and then the features of its references, one row for each
    token, with zeros in the columns that the narrower of both lacks. `timestep` is 1 for clean images.
    """

    block_classes: ClassVar = dict.fromkeys(
        ("noise_refiner", "context_refiner", "siglip_refiner", "layers"), SandwichBlock
    )
    first_lists = ("noise_refiner", "context_refiner", "siglip_refiner")
    ends = ("all_x_embedder", "t_embedder", "cap_embedder", "siglip_embedder", "all_final_layer")

    def _layout(self, samples: Sequence[Sample]) -> SelfLayout:
        return z_image_layout(samples)

    def times(self, timesteps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the times of samples; unlike those of other models, clean images are at 1."""
        return torch.stack([(1000 - t.to(dtype)) / 1000 for t in timesteps])

    def _text_shape(self, layout: SelfLayout) -> tuple[int, int]:
        return text_rows(layout), text_width(self.transformer.config)

    def _predict(self, image: Tensor, text: Tensor, timestep: Tensor, layout: SelfLayout, kept: Kept) -> Tensor:
        model = self.transformer
        image, device, dtype = image.to(text.dtype), image.device, text.dtype
        rotary = memo(layout, _rotary, model.rope_embedder, device)
        conditions = self._conditions(text, layout, rotary)
        self._adapt(layout)
        temb = self._time_embedding(timestep, dtype)
        context = self._step(layout, kept, rotary, dtype)
        whole, layout, image = layout, context.layout, context.computed("image", image)
        images = torch.cat([model.all_x_embedder[PATCH](image), model.x_pad_token.to(dtype)])
        images = images.index_select(0, memo(layout, _image_sources, device))
        part = whole, _is_image, rotary, context.references, dtype
        images = self._run_stage("noise_refiner", images, temb, self._part(*part))
        joint = torch.cat([conditions, images]).index_select(0, memo(layout, _joint_sources, device))
        del images, conditions, image
        out = self._run_stage("layers", joint, temb, context)
        if context.references is not None:
            context.references.finish()
        return -self._final(out, temb, layout, model.all_final_layer[PATCH]).float()

    def _time_embedding(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the embeddings of the sampled times and of t = 1 of each sample, `[2 S, 256]`."""
        t = torch.cat([timestep, torch.ones_like(timestep)])
        return self.transformer.t_embedder(t * self.transformer.t_scale).to(dtype)

    def _conditions(self, text: Tensor, layout: SelfLayout, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return the refined captions and features of all samples, `[N, C]`; once for all steps of a pack."""
        model = self.transformer
        modules = model.cap_embedder, *model.context_refiner, model.siglip_embedder, *model.siglip_refiner
        fillings = model.cap_pad_token, model.siglip_pad_token
        none = text.new_zeros(0)  # these blocks have no modulation

        def compute() -> Tensor:
            found = []
            for chosen, is_token, names, filling, width in (
                (_is_caption, _is_caption_token, ("cap_embedder", "context_refiner"), fillings[0],
                 model.config.cap_feat_dim),
                (_is_feature, _is_feature_token, ("siglip_embedder", "siglip_refiner"), fillings[1],
                 model.config.siglip_feat_dim),
            ):  # fmt: skip
                rows = memo(layout, _token_rows, is_token, text.device)
                embed, refiner = getattr(model, names[0]), names[1]
                if not len(rows):
                    for module in (embed, *getattr(model, refiner)):
                        skip(module)
                    continue
                self._adapt(memo(layout, part_layout, is_token))
                x = torch.cat([embed(text.index_select(0, rows)[:, :width]), filling.to(text.dtype)])
                x = x.index_select(0, memo(layout, _filled_sources, chosen, is_token, text.device))
                found.append(self._run_stage(refiner, x, none, self._part(layout, chosen, rotary, None, text.dtype)))
            return torch.cat(found)

        if self._constants is None:
            return compute()
        sources = text, *fillings
        state = [(version_of(each), each.data_ptr() if type(each) in (Tensor, nn.Parameter) else 0) for each in sources]
        return self._constants.stream(sources, state, modules, compute)


# ---- rows and positions ----


def _token_rows(layout: SelfLayout, is_token: Callable[[Segment], bool], device: torch.device) -> Tensor:
    """Return the rows of the prompt embeddings of some segments, int64 `[n]`."""
    spans, at = [], 0
    for segment in layout.segments:
        if _is_caption_token(segment) or _is_feature_token(segment):
            if is_token(segment):
                spans.append((at, at + segment.length))
            at += segment.length
    return rows_of(spans, device)


def _filled_sources(
    layout: SelfLayout, chosen: Callable[[Segment], bool], is_token: Callable[[Segment], bool], device: torch.device
) -> Tensor:
    """Return for each row of a part its row in the embedded tokens, after which the filling follows as one row."""
    segments = [segment for segment in layout.segments if chosen(segment)]
    last = sum(segment.length for segment in segments if is_token(segment))
    parts, at = [torch.arange(0, device=device)], 0
    for segment in segments:
        if is_token(segment):
            parts.append(torch.arange(at, at + segment.length, device=device))
            at += segment.length
        else:
            parts.append(torch.full((segment.length,), last, device=device))
    return torch.cat(parts)


def _image_sources(layout: SelfLayout, device: torch.device) -> Tensor:
    """Return for each row of the images with their filling its row in the image stream, after which the filling is."""
    parts = [torch.arange(0, device=device)]
    for segment in layout.segments:
        if not segment.kind.is_text:
            parts.append(torch.arange(segment.stream_start, segment.stream_start + segment.length, device=device))
        elif segment.index == Part.IMAGE_FILLING:
            parts.append(torch.full((segment.length,), layout.image_length, device=device))
    return torch.cat(parts)


def _joint_sources(layout: SelfLayout, device: torch.device) -> Tensor:
    """Return for each joint row its row in captions, features and images one after the other."""
    parts, at = [], dict.fromkeys((_is_caption, _is_feature, _is_image), 0)
    starts = dict(zip(at, itertools.accumulate(
        (sum(s.length for s in layout.segments if chosen(s)) for chosen in at), initial=0), strict=False))  # fmt: skip
    for segment in layout.segments:
        chosen = next(each for each in at if each(segment))
        first = starts[chosen] + at[chosen]
        parts.append(torch.arange(first, first + segment.length, device=device))
        at[chosen] += segment.length
    return torch.cat(parts)


def _rotary(layout: SelfLayout, embedder: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin in joint order, float32 `[N, D / 2]` each, from the model's own tables."""
    turn = embedder(positions(layout).to(device))
    return turn.real.contiguous(), turn.imag.contiguous()


def positions(layout: SelfLayout) -> Tensor:
    """Return the rotary positions in joint order, int32 `[N, 3]`, on the CPU.

    The pipeline lists, for each caption, the positions of its tokens and its filling, and then zeros for the filling
    once more, but takes the positions of all captions of a sample one after the other: those of a caption begin too
    early by the filling of the captions before it.
    """
    with torch.device("cpu"):
        parts = []
        for segment in layout.segments:
            if not segment.kind.is_text:
                parts.append(grid_positions(segment.origin, segment.grid))
            elif segment.index == Part.FEATURES:
                parts.append(_stretched(segment))
            else:
                parts.append(torch.zeros(segment.length, 3, dtype=torch.int32))
        captions: dict[int, list[Segment]] = {}
        for number, segment in enumerate(layout.segments):
            if _is_caption(segment):
                captions.setdefault(segment.sample, []).append(segment)
                parts[number] = torch.zeros(0, 3, dtype=torch.int32)  # all of a sample at its first one
        first = {id(found[0]): found for found in captions.values()}
        for number, segment in enumerate(layout.segments):
            if id(segment) in first:
                parts[number] = _caption_positions(first[id(segment)])
        return torch.cat(parts)


def _caption_positions(segments: Sequence[Segment]) -> Tensor:
    listed: list[Tensor] = []
    for segment in segments:
        if segment.index == Part.CAPTION:
            filling = -segment.length % MULTIPLE
            listed.append(grid_positions(segment.origin, (segment.length + filling, 1, 1)))
            listed.append(torch.zeros(filling, 3, dtype=torch.int32))
    return torch.cat(listed)[: sum(segment.length for segment in segments)]


def grid_positions(origin: Sequence[int], grid: Grid) -> Tensor:
    """Return the positions of the tokens of a grid from its first position on, int32 `[N, 3]`."""
    axes = [torch.arange(start, start + side, dtype=torch.int32) for start, side in zip(origin, grid, strict=True)]
    return torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).flatten(0, 2)


def _stretched(segment: Segment) -> Tensor:
    """Return the positions of features, which are stretched over the latent pixels of their reference."""
    frame, *last = segment.origin
    found = grid_positions((frame, 0, 0), segment.grid).float()
    for axis, (side, end) in enumerate(zip(segment.grid[1:], last, strict=True), 1):
        found[:, axis] = found[:, axis] / max(side - 1, 1) * end
    return found.to(torch.int32)
