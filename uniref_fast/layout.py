"""Layout of a packed multi-reference sequence.

SELF (Sequence-Extended Latent Fusion, arXiv 2602.14186) puts the noisy target and every reference in one latent
sequence. A `SelfLayout` lists the contiguous segments of that sequence, for one sample or for a ragged pack of many;
kernels, models, the patch and training all read it. Tokens have two orders:

- in the *streams* of the double-stream blocks: all text tokens of the pack, and all image tokens of the pack;
- in the *joint* sequence of attention: sample by sample, text before images.

    streams   text  [a a a | b b]          image [A A A A r r | B B]
    joint     [a a a A A A A r r | b b B B]
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from uniref_fast.memo import memo

__all__ = ["REFERENCE_PLACE", "Grid", "Kind", "Position", "RotaryScheme", "Sample", "Segment", "SelfLayout"]

Grid = tuple[int, int, int]
"""(frames, height, width) of an image, in tokens (one token = 2 x 2 latent pixels)."""

Position = tuple[int, ...]
"""Rotary position of a token, one number per axis: frame, height, width and any more that a model has."""


REFERENCE_PLACE = (0, False)
"""Run of a text, `Sample.text`, that is the place of the next reference in models whose text and images alternate."""


class Kind(enum.IntEnum):
    """Kind of the tokens of a segment."""

    TEXT = 0
    PADDING = 1  # masked text positions: they are queries, but no query sees them
    TARGET = 2
    REFERENCE = 3

    @property
    def is_text(self) -> bool:
        """Return True if the tokens are in the text stream."""
        return self <= Kind.PADDING


@dataclass(frozen=True)
class Segment:
    """Contiguous tokens of one image or of one run of text.

    Attributes:
        kind: Kind of the tokens.
        sample: Sample that the segment belongs to. References that a group shares belong to the first sample of the
            group.
        group: First sample of the group, whose samples may share references. A single sample is its own group.
        index: Number of the reference (1, 2, ...), 0 for the target, or the number of the text run.
        grid: Frames, height and width in tokens; (length, 1, 1) for text.
        stream_start: First row in the text stream (text) or in the image stream (images).
        joint_start: First row in the joint sequence.
        mod_row: Row of the modulation table (see `SelfLayout.modulation_rows`).
        origin: Rotary position of the first token.
    """

    kind: Kind
    sample: int
    group: int
    index: int
    grid: Grid
    stream_start: int
    joint_start: int
    mod_row: int
    origin: Position

    @property
    def length(self) -> int:
        """Number of tokens."""
        return math.prod(self.grid)

    @property
    def joint_end(self) -> int:
        """Row after the last one in the joint sequence."""
        return self.joint_start + self.length


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Sample:
    """One sample of a pack.

    Attributes:
        text: Number of text tokens, or the (length, valid) runs of a padding mask. In models whose text and images
            alternate, an empty run is the place of the next reference (`REFERENCE_PLACE`).
        target: Grid of the noisy target.
        references: Grids of the references, in order; any number, any sizes.
        group: Samples with the same group number share one copy of their references in a layout with
            `shared_references`.
        guidance: Guidance scale for models that embed it (FLUX.2 dev); None for all others.
    """

    text: int | tuple[tuple[int, bool], ...]
    target: Grid
    references: tuple[Grid, ...] = ()
    group: int | None = None
    guidance: float | None = None

    @property
    def text_runs(self) -> tuple[tuple[int, bool], ...]:
        """(length, valid) runs of the text."""
        return ((self.text, True),) if isinstance(self.text, int) else self.text

    @property
    def length(self) -> int:
        """Number of tokens of the sample, references included."""
        return sum(length for length, _ in self.text_runs) + sum(map(math.prod, (self.target, *self.references)))

    @property
    def text_origin(self) -> int:
        """Rotary position of the first text token: after the largest half side of the sample's images."""
        return max(max(h // 2, w // 2) for _, h, w in (self.target, *self.references))

    def __post_init__(self) -> None:
        for name in ("target", "references"):  # lists would not hash, and layouts are memoised by their samples
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        if not isinstance(self.text, int):
            object.__setattr__(self, "text", _frozen(self.text))
        if any(length < 0 for length, _ in self.text_runs):
            raise ValueError(f"text lengths must not be negative, got {self.text}")
        for grid in (self.target, *self.references):
            if len(grid) != 3 or any(side < 1 for side in grid):
                raise ValueError(f"an image grid is (frames, height, width) in tokens, each at least 1, got {grid}")


@dataclass(frozen=True)
class RotaryScheme:
    """Rotary positions of the tokens of a sample; they never depend on the other samples of a pack.

    Attributes:
        text: Function `text(sample, n)` that returns the position of text token n.
        image: Function `image(index, grid)` that returns the position of the first token of an image: of the target for
            index 0, and of reference 1, 2, ... The tokens of an image advance on the first three axes: frame, height,
            width.
        text_axes: Axes on which the tokens of a text advance, by 1 for each token.
        after_text: Axes on which the images of a sample come after its text: by its length after `image`.
    """

    text: Callable[[Sample, int], Position]
    image: Callable[[int, Grid], Position]
    text_axes: tuple[int, ...]
    after_text: tuple[int, ...] = ()


def _qwen_text(sample: Sample, n: int) -> Position:
    return (sample.text_origin + n,) * 3


def _qwen_image(index: int, grid: Grid) -> Position:
    _, height, width = grid
    return index, -(height - height // 2), -(width - width // 2)


QWEN = RotaryScheme(_qwen_text, _qwen_image, text_axes=(0, 1, 2))
"""Scheme of diffusers' `QwenEmbedRope` with `scale_rope`."""


@dataclass(frozen=True)
class SelfLayout:
    """Immutable layout of a pack.

    A model builds its layouts (`PackedQwenImage.layout`). The last few layouts are kept: equal inputs give the same
    object. Device tensors are computed on the device from the segments, kept with the layout and freed with it.

    Attributes:
        segments: Segments in joint order, without gaps.
        num_samples: Number of samples; each has one target.
        clean_references: True if references, and with `causal_prefix` text too, are modulated with t = 0, in row
            `num_samples + sample`.
        text_axes: Rotary axes on which the tokens of a text advance.
        causal_prefix: True if text and references come before the target and do not attend to it, so that their keys
            and values can be kept together.
        guidance: Guidance scale of each sample for models that embed it; empty for all others.
    """

    segments: tuple[Segment, ...]
    num_samples: int
    clean_references: bool
    text_axes: tuple[int, ...] = QWEN.text_axes
    causal_prefix: bool = False
    guidance: tuple[float, ...] = ()

    @staticmethod
    def pack(
        samples: Sequence[Sample], scheme: RotaryScheme, *, clean_references: bool, shared_references: bool = False
    ) -> SelfLayout:
        """Return the layout of a pack in which a sample is its text, its target and its references, in this order.

        Args:
            samples: Samples of the pack, in order.
            scheme: Rotary positions of the model.
            clean_references: Modulate references with t = 0, in rows after those of the sampled t.
            shared_references: Hold the references of samples of one `group` once, for the visibility "group_shared".
                These samples must list the same references. Without `clean_references` the t of the first sample
                modulates them.

        Raises:
            ValueError: If there are no samples, samples of a group list different references, or some samples have a
                guidance scale and others have none.
        """
        return _pack(tuple(samples), scheme, clean_references, shared_references)

    @staticmethod
    def qwen(samples: Sequence[Sample], *, zero_cond_t: bool = False, shared_references: bool = False) -> SelfLayout:
        """Return the layout of a pack for Qwen-Image-Edit-Plus models.

        Rotary scheme (diffusers `QwenEmbedRope` with `scale_rope`): image i of a sample sits on frame i, its height
        and width are centred on 0, text continues on all three axes after the sample's largest half side.

        Args:
            samples: Samples of the pack, in order.
            zero_cond_t: Modulate references with t = 0 (Qwen-Image-Edit-2511).
            shared_references: Hold the references of samples of one `group` once, see `pack`.

        Raises:
            ValueError: If there are no samples, or samples of a group list different references.
        """
        return SelfLayout.pack(samples, QWEN, clean_references=zero_cond_t, shared_references=shared_references)

    # ---- sizes ----

    @functools.cached_property
    def text_length(self) -> int:
        """Rows of the text stream."""
        return sum(s.length for s in self.segments if s.kind.is_text)

    @functools.cached_property
    def image_length(self) -> int:
        """Rows of the image stream."""
        return sum(s.length for s in self.segments if not s.kind.is_text)

    @property
    def joint_length(self) -> int:
        """Rows of the joint sequence."""
        return self.text_length + self.image_length

    @property
    def num_modulation_rows(self) -> int:
        """Rows of the modulation table."""
        return self.num_samples * (2 if self.clean_references else 1)

    @functools.cached_property
    def targets(self) -> tuple[Segment, ...]:
        """Target segments, by sample."""
        return tuple(sorted((s for s in self.segments if s.kind is Kind.TARGET), key=lambda s: s.sample))

    @functools.cached_property
    def shares_references(self) -> bool:
        """True if samples share one copy of their references."""
        held = {s.group for s in self.segments if s.kind is Kind.REFERENCE}
        return any(s.group in held and s.sample != s.group for s in self.targets)

    @functools.cached_property
    def text_segments(self) -> tuple[Segment, ...]:
        """Text and padding segments in stream order."""
        return tuple(sorted((s for s in self.segments if s.kind.is_text), key=lambda s: s.stream_start))

    @functools.cached_property
    def image_segments(self) -> tuple[Segment, ...]:
        """Target and reference segments in stream order."""
        return tuple(sorted((s for s in self.segments if not s.kind.is_text), key=lambda s: s.stream_start))

    def is_kept(self, segment: Segment) -> bool:
        """Return True if the keys and values of a segment can be kept over steps: references, or the whole prefix."""
        return segment.kind is Kind.REFERENCE or (self.causal_prefix and segment.kind is not Kind.TARGET)

    # ---- image stream: for each sample its target, then the references that it holds ----

    def image_stream(self, targets: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate targets and references of all samples in the order of the image stream, `[N_image, C]`.

        Args:
            targets: One tensor `[n, C]` per sample.
            references: One tensor `[m, C]` per sample with all its references in order; m may be 0. Where samples share
                references, only the entry of the sample that holds them is read.

        Raises:
            ValueError: If the numbers of tensors or rows differ from the layout's.
        """
        self._check_rows("targets", targets, self._target_lengths)
        held = [x for x, length in zip(references, self._reference_lengths, strict=False) if length]
        self._check_rows("references", held, [length for length in self._reference_lengths if length])
        after = iter(held)
        parts: list[torch.Tensor] = []
        for target, length in zip(targets, self._reference_lengths, strict=True):
            parts += [target, next(after)] if length else [target]
        return torch.cat(parts)

    def write_targets(self, image: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Overwrite the targets' rows of an image stream in place; the rows of references stay.

        Args:
            image: Image stream `[N_image, C]`, as `image_stream` returns it.
            targets: One tensor `[n, C]` per sample.
        """
        self._check_rows("targets", targets, self._target_lengths)
        for segment, target in zip(self.targets, targets, strict=True):
            image[segment.stream_start : segment.stream_start + segment.length] = target

    def split_targets(self, x: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, ...]:
        """Split the targets' rows, in the order that a model returns them, into one view per sample.

        Args:
            x: Rows of the targets, `[N_target, ...]`, or the part of these rows that begins with row `first`. A sample
                without a row in the part gets an empty view.
            first: First row of the part.

        Raises:
            ValueError: If x has more rows than the targets have.
        """
        last, rows = first + len(x), sum(self._target_lengths)
        if last > rows:
            raise ValueError(f"x ends with row {last} of the targets, the layout has {rows}")
        ends = itertools.accumulate(self._target_lengths)
        return x.split([
            max(min(end, last) - max(end - length, first), 0)
            for length, end in zip(self._target_lengths, ends, strict=True)
        ])  # fmt: skip

    @functools.cached_property
    def _target_lengths(self) -> list[int]:
        return [segment.length for segment in self.targets]

    @functools.cached_property
    def _reference_lengths(self) -> list[int]:
        """Reference tokens that each sample holds in the stream."""
        lengths = [0] * self.num_samples
        for segment in self.segments:
            if segment.kind is Kind.REFERENCE:
                lengths[segment.sample] += segment.length
        return lengths

    def _check_rows(self, name: str, given: Sequence[torch.Tensor], expected: list[int]) -> None:
        rows = [len(x) for x in given]
        if rows != expected:
            raise ValueError(f"{name} have {rows} rows, the layout expects {expected}")

    # ---- device tensors ----

    def joint_index(self, stream: str, device: torch.device | str) -> torch.Tensor:
        """Return the joint row of every row of a stream, int32 `[N_stream]`.

        Args:
            stream: "text", "image", or "joint" for the joint sequence itself.
            device: Device of the result.
        """
        return memo(self, _joint_index, stream, torch.device(device))

    def modulation_rows(self, stream: str, device: torch.device | str) -> torch.Tensor:
        """Return the modulation row of every row of a stream, int32 `[N_stream]`.

        The modulation table has one row per sample for its sampled t and, with `clean_references`, one row per sample
        for t = 0 after these.

        Args:
            stream: "text", "image", or "joint" for the joint sequence.
            device: Device of the result.
        """
        return memo(self, _modulation_rows, stream, torch.device(device))

    def positions(self, device: torch.device | str) -> torch.Tensor:
        """Return the rotary positions in joint order, int32 `[N, axes]`."""
        return memo(self, _positions, torch.device(device))

    def rotary(
        self,
        axes_dims: Sequence[int],
        device: torch.device | str,
        theta: float = 10000.0,
        dtype: torch.dtype = torch.float32,
        scales: Sequence[float] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin in joint order, float32 `[N, sum(axes_dims) / 2]` each; one column per interleaved pair.

        Args:
            axes_dims: Head dimensions of the axes, such as (16, 56, 56) for frame, height and width; each even.
            device: Device of the result.
            theta: Base of the frequencies.
            dtype: Dtype of the angles, in which the model of diffusers computes them.
            scales: Factor of the positions of each axis, such as 0.5; empty for positions as they are.

        Raises:
            ValueError: If `axes_dims` are not an even number for each axis of the positions.
        """
        return memo(self, _rotary, tuple(axes_dims), torch.device(device), theta, dtype, tuple(scales))

    def guidance_scales(self, device: torch.device | str) -> torch.Tensor:
        """Return the guidance scale of each sample, float32 `[S]`."""
        return memo(self, _guidance_scales, torch.device(device))

    def target_rows(self, device: torch.device | str) -> torch.Tensor:
        """Return the rows of the image stream that are targets, by sample, int64 `[N_target]`."""
        return memo(self, _target_rows, torch.device(device))


@functools.lru_cache(maxsize=8)  # few, because device tensors are kept with a layout
def _pack(
    samples: tuple[Sample, ...], scheme: RotaryScheme, clean_references: bool, shared_references: bool
) -> SelfLayout:
    if not samples:
        raise ValueError("a layout needs at least one sample")
    guidance = [sample.guidance for sample in samples if sample.guidance is not None]
    if guidance and len(guidance) != len(samples):
        raise ValueError(f"{len(guidance)} of {len(samples)} samples have a guidance scale; give it to all or none")
    owners = _owners(samples) if shared_references else range(len(samples))
    segments: list[Segment] = []
    joint_at, stream_at = 0, {True: 0, False: 0}  # by whether the segment is text
    for i, (sample, owner) in enumerate(zip(samples, owners, strict=True)):
        for kind, index, grid, origin in _pieces(sample, scheme, holds_references=owner == i):
            mod_row = i + (len(samples) if clean_references and kind is Kind.REFERENCE else 0)
            segment = Segment(kind, i, owner, index, grid, stream_at[kind.is_text], joint_at, mod_row, origin)
            segments.append(segment)
            joint_at += segment.length
            stream_at[kind.is_text] += segment.length
    return SelfLayout(
        tuple(segments), len(samples), clean_references, scheme.text_axes, guidance=tuple(map(float, guidance))
    )


def _owners(samples: tuple[Sample, ...]) -> list[int]:
    """Return for each sample the first sample of its group, which holds the references of the group."""
    first: dict[int, int] = {}
    owners = [i if sample.group is None else first.setdefault(sample.group, i) for i, sample in enumerate(samples)]
    for i, owner in enumerate(owners):
        if samples[owner].references != samples[i].references:
            raise ValueError(
                f"samples {owner} and {i} of group {samples[i].group} share references but list different ones: "
                f"{samples[owner].references} and {samples[i].references}"
            )
    return owners


def _pieces(sample: Sample, scheme: RotaryScheme, holds_references: bool) -> list[tuple[Kind, int, Grid, Position]]:
    """Return (kind, index, grid, rotary origin) of the segments of a sample, in joint order."""
    pieces: list[tuple[Kind, int, Grid, Position]] = []
    at = 0
    for run, (length, valid) in enumerate(sample.text_runs):
        if length:
            pieces.append((Kind.TEXT if valid else Kind.PADDING, run, (length, 1, 1), scheme.text(sample, at)))
        at += length
    images = (sample.target, *sample.references) if holds_references else (sample.target,)
    for index, grid in enumerate(images):
        origin = tuple(x + at * (axis in scheme.after_text) for axis, x in enumerate(scheme.image(index, grid)))
        pieces.append((Kind.REFERENCE if index else Kind.TARGET, index, grid, origin))
    return pieces


def _stream_segments(layout: SelfLayout, stream: str) -> tuple[Segment, ...]:
    streams = {"text": layout.text_segments, "image": layout.image_segments, "joint": layout.segments}
    if stream not in streams:
        raise ValueError(f'stream must be "text", "image" or "joint", got {stream!r}')
    return streams[stream]


def _spread(values: list[int], segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """Repeat the value of each segment for each of its tokens, int64 `[N]`."""
    lengths = torch.tensor([s.length for s in segments], dtype=torch.int64, device=device)
    total = sum(s.length for s in segments)
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.int64, device=device), lengths, output_size=total)


def _joint_index(layout: SelfLayout, stream: str, device: torch.device) -> torch.Tensor:
    segments = _stream_segments(layout, stream)
    shift = _spread([0 if stream == "joint" else s.joint_start - s.stream_start for s in segments], segments, device)
    return (shift + torch.arange(len(shift), device=device)).to(torch.int32)


def _modulation_rows(layout: SelfLayout, stream: str, device: torch.device) -> torch.Tensor:
    segments = _stream_segments(layout, stream)
    return _spread([s.mod_row for s in segments], segments, device).to(torch.int32)


def _guidance_scales(layout: SelfLayout, device: torch.device) -> torch.Tensor:
    return torch.tensor(layout.guidance, dtype=torch.float32, device=device)


def _target_rows(layout: SelfLayout, device: torch.device) -> torch.Tensor:
    shift, at = [], 0
    for segment in layout.targets:
        shift.append(segment.stream_start - at)
        at += segment.length
    spread = _spread(shift, layout.targets, device)
    return spread + torch.arange(at, device=device)


def _positions(layout: SelfLayout, device: torch.device) -> torch.Tensor:
    segments = layout.segments
    local = torch.arange(layout.joint_length, device=device)
    local = local - _spread([s.joint_start for s in segments], segments, device)
    text = _spread([int(s.kind.is_text) for s in segments], segments, device).bool()
    height = _spread([s.grid[1] for s in segments], segments, device)
    width = _spread([s.grid[2] for s in segments], segments, device)
    image_steps = (local // (height * width), local // width % height, local % width)
    positions = []
    for axis in range(len(segments[0].origin)):
        steps = local * text if axis in layout.text_axes else torch.zeros_like(local)
        if axis < len(image_steps):
            steps = torch.where(text, steps, image_steps[axis])
        positions.append(_spread([s.origin[axis] for s in segments], segments, device) + steps)
    return torch.stack(positions, dim=1).to(torch.int32)


def _rotary(
    layout: SelfLayout,
    axes_dims: tuple[int, ...],
    device: torch.device,
    theta: float,
    dtype: torch.dtype,
    scales: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = layout.positions(device).to(dtype)
    if scales:
        positions = positions * torch.tensor(scales, device=device, dtype=dtype)
    if len(axes_dims) != positions.shape[1] or any(dim % 2 for dim in axes_dims):
        raise ValueError(f"axes_dims must be {positions.shape[1]} even numbers, one for each axis, got {axes_dims}")
    angles = []
    for axis, dim in enumerate(axes_dims):
        # in one dtype throughout and in the order diffusers uses, so that the angles agree to the last bit
        exponent = torch.arange(0, dim, 2, device=device, dtype=dtype).div(dim)
        angles.append(torch.outer(positions[:, axis], 1.0 / torch.pow(theta, exponent)))
    angle = torch.cat(angles, dim=1)
    turn = torch.polar(torch.ones_like(angle), angle)  # as diffusers does: cos and sin kernels round differently
    return turn.real.float().contiguous(), turn.imag.float().contiguous()
