"""SelfLayout: the one description of a packed multi-reference sequence.

SELF (Sequence-Extended Latent Fusion, arXiv 2602.14186) puts the noisy target and every reference in one latent
sequence. A layout lists the contiguous pieces of that sequence, for one sample or for a ragged pack of many; kernels,
models, patch, packer and trainer all read it. Two orders exist side by side:

- the *streams*: all text tokens of the pack, and all image tokens of the pack (where the double-stream blocks compute);
- the *joint* sequence: the tokens that attend together, text before images in each sample (where attention computes).

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

__all__ = ["Grid", "Kind", "Sample", "Segment", "SelfLayout", "kept"]

Grid = tuple[int, int, int]
"""(frames, height, width) of an image, in tokens (one token = 2 x 2 latent pixels)."""


class Kind(enum.IntEnum):
    """What the tokens of a segment are."""

    TEXT = 0
    PADDING = 1  # text positions that the mask switched off: they query, but nothing sees them
    TARGET = 2
    REFERENCE = 3

    @property
    def is_text(self) -> bool:
        return self <= Kind.PADDING


@dataclass(frozen=True)
class Segment:
    """Contiguous tokens of one thing.

    Attributes:
        kind: what the tokens are.
        sample: the sample it belongs to; for references shared by a group, the first sample of the group.
        group: samples of one group may share references; a sample alone is a group of its own.
        index: which reference (1, 2, ...), 0 for the target, or the number of the text run.
        grid: (frames, height, width) in tokens; (length, 1, 1) for text.
        stream_start: first row in the text stream (text) or in the image stream (images).
        joint_start: first row in the joint sequence.
        mod_row: row of the modulation table (see `SelfLayout.modulation_rows`).
        origin: rotary position (frame, height, width) of the first token.
    """

    kind: Kind
    sample: int
    group: int
    index: int
    grid: Grid
    stream_start: int
    joint_start: int
    mod_row: int
    origin: Grid

    @property
    def length(self) -> int:
        return math.prod(self.grid)

    @property
    def joint_end(self) -> int:
        return self.joint_start + self.length


def kept(cache: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """Return what the cache has under a key, after making it where it has nothing.

    What is made inside a transform of `torch.func` is not kept: its tensors belong to that transform.
    """
    if key in cache:
        return cache[key]
    with torch.inference_mode(False):  # one tensor serves inference and training
        value = make()
    if not torch._C._are_functorch_transforms_active():
        cache[key] = value
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Sample:
    """One request of a pack.

    Attributes:
        text: number of text tokens, or a tuple of (length, valid) runs as a padding mask has them.
        target: grid of the noisy target.
        references: grids of the references, in order; any number, any sizes.
        group: samples with the same group number and `shared_references` share one copy of their references.
    """

    text: int | tuple[tuple[int, bool], ...]
    target: Grid
    references: tuple[Grid, ...] = ()
    group: int | None = None

    @property
    def text_runs(self) -> tuple[tuple[int, bool], ...]:
        return ((self.text, True),) if isinstance(self.text, int) else self.text

    @property
    def length(self) -> int:
        """Tokens of the sample, its references included."""
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
class SelfLayout:
    """Immutable layout of a pack. Build it with `SelfLayout.qwen`; equal inputs give the same (cached) object.

    Attributes:
        segments: in joint order, without gaps.
        num_samples: number of targets.
        clean_references: references (and nothing else) use modulation row `num_samples + sample`, the t = 0 row.
    """

    segments: tuple[Segment, ...]
    num_samples: int
    clean_references: bool

    @staticmethod
    def qwen(samples: Sequence[Sample], *, zero_cond_t: bool = False, shared_references: bool = False) -> SelfLayout:
        """Layout of Qwen-Image-Edit-Plus models.

        Rotary scheme (diffusers `QwenEmbedRope` with `scale_rope`): image i of a sample sits on frame i, its height
        and width are centred on 0, text continues on all three axes after the sample's largest half side.

        Args:
            samples: the pack, in order.
            zero_cond_t: modulate references with t = 0 (Qwen-Image-Edit-2511), in rows after the sampled ones.
            shared_references: samples of one `group` hold their references once (they must list the same ones);
                use it with the `group_shared` visibility. Without `zero_cond_t` the first sample's t modulates them.
        """
        return _qwen_layout(tuple(samples), zero_cond_t, shared_references)

    # ---- sizes ----

    @functools.cached_property
    def text_length(self) -> int:
        return sum(s.length for s in self.segments if s.kind.is_text)

    @functools.cached_property
    def image_length(self) -> int:
        return sum(s.length for s in self.segments if not s.kind.is_text)

    @property
    def joint_length(self) -> int:
        return self.text_length + self.image_length

    @property
    def num_modulation_rows(self) -> int:
        return self.num_samples * (2 if self.clean_references else 1)

    @functools.cached_property
    def targets(self) -> tuple[Segment, ...]:
        """The target segments, by sample."""
        return tuple(sorted((s for s in self.segments if s.kind is Kind.TARGET), key=lambda s: s.sample))

    @functools.cached_property
    def shares_references(self) -> bool:
        """Whether samples hold references in common."""
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

    # ---- the order of the image stream: per sample its target, then the references that it holds ----

    def image_stream(self, targets: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate targets and references of all samples in the order of the image stream, `[N_image, C]`.

        Args:
            targets: one tensor `[n, C]` per sample.
            references: one tensor `[m, C]` per sample, all references of the sample in order; m may be 0. Of samples
                that share references, only the entry of the sample that holds them is read.

        Raises:
            ValueError: for a number of tensors or rows that differs from the layout's.
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
            image: image stream `[N_image, C]`, as `image_stream` returns it.
            targets: one tensor `[n, C]` per sample.
        """
        self._check_rows("targets", targets, self._target_lengths)
        for segment, target in zip(self.targets, targets, strict=True):
            image[segment.stream_start : segment.stream_start + segment.length] = target

    def split_targets(self, x: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, ...]:
        """Split the targets' rows, in the order that a model returns them, into one view per sample.

        Args:
            x: `[N_target, ...]`, or the part of it that begins with row `first`; a sample that has no row in the part
                gets an empty view.
            first: first row of the part.

        Raises:
            ValueError: for more rows than the targets have.
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

    # ---- device tensors, computed on the device from the segments; kept with the layout and freed with it ----

    @functools.cached_property
    def cache(self) -> dict[Any, Any]:
        """What was derived from this layout: device tensors, and the plans of `uniref_fast.visibility`."""
        return {}

    def _cached(self, make: Callable[..., Any], *args: Any) -> Any:
        return kept(self.cache, (make, *args), lambda: make(self, *args))

    def joint_index(self, stream: str, device: torch.device | str) -> torch.Tensor:
        """Joint row of every row of a stream, int32 `[N_stream]`; `stream` is "text" or "image"."""
        return self._cached(_joint_index, stream, torch.device(device))

    def modulation_rows(self, stream: str, device: torch.device | str) -> torch.Tensor:
        """Modulation row of every row of a stream, int32 `[N_stream]`; rows are `[t of sample 0..S-1 | t=0 ...]`."""
        return self._cached(_modulation_rows, stream, torch.device(device))

    def positions(self, device: torch.device | str) -> torch.Tensor:
        """Rotary positions (frame, height, width) in joint order, int32 `[N, 3]`."""
        return self._cached(_positions, torch.device(device))

    def rotary(
        self, axes_dims: Sequence[int], device: torch.device | str, theta: float = 10000.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin in joint order, float32 `[N, sum(axes_dims) / 2]` each; one column per interleaved pair.

        Args:
            axes_dims: head dimensions given to the frame, height and width axes, e.g. (16, 56, 56); each even.
            theta: base of the frequencies.
        """
        return self._cached(_rotary, tuple(axes_dims), torch.device(device), theta)

    def target_rows(self, device: torch.device | str) -> torch.Tensor:
        """Rows of the image stream that are targets, by sample, int64 `[N_target]`."""
        return self._cached(_target_rows, torch.device(device))


@functools.lru_cache(maxsize=8)  # few, because device tensors stay with a layout
def _qwen_layout(samples: tuple[Sample, ...], zero_cond_t: bool, shared_references: bool) -> SelfLayout:
    if not samples:
        raise ValueError("a layout needs at least one sample")
    groups = [("group", s.group) if shared_references and s.group is not None else ("alone", i)
              for i, s in enumerate(samples)]  # fmt: skip
    first_of_group: dict[tuple[str, int], int] = {}
    segments: list[Segment] = []
    text_at = image_at = joint_at = 0
    for i, sample in enumerate(samples):
        owner = first_of_group.setdefault(groups[i], i)
        if samples[owner].references != sample.references:
            raise ValueError(
                f"samples {owner} and {i} of group {sample.group} share references but list different ones: "
                f"{samples[owner].references} and {sample.references}"
            )
        pieces: list[tuple[Kind, int, Grid, int]] = []  # kind, index, grid, text offset
        offset = 0
        for run, (length, valid) in enumerate(sample.text_runs):
            if length:
                pieces.append((Kind.TEXT if valid else Kind.PADDING, run, (length, 1, 1), offset))
            offset += length
        pieces.append((Kind.TARGET, 0, sample.target, 0))
        if owner == i:
            pieces += [(Kind.REFERENCE, j, grid, 0) for j, grid in enumerate(sample.references, start=1)]
        for kind, index, grid, offset in pieces:
            origin = (
                (sample.text_origin + offset,) * 3
                if kind.is_text
                else (index, -(grid[1] - grid[1] // 2), -(grid[2] - grid[2] // 2))
            )
            mod_row = i + (len(samples) if zero_cond_t and kind is Kind.REFERENCE else 0)
            stream_at = text_at if kind.is_text else image_at
            segment = Segment(kind, i, owner, index, grid, stream_at, joint_at, mod_row, origin)
            segments.append(segment)
            joint_at += segment.length
            if kind.is_text:
                text_at += segment.length
            else:
                image_at += segment.length
    return SelfLayout(tuple(segments), len(samples), zero_cond_t)


def _stream_segments(layout: SelfLayout, stream: str) -> tuple[Segment, ...]:
    if stream not in ("text", "image"):
        raise ValueError(f'stream must be "text" or "image", got {stream!r}')
    return layout.text_segments if stream == "text" else layout.image_segments


def _spread(values: list[int], segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """One value per segment -> one value per token, int64."""
    lengths = torch.tensor([s.length for s in segments], dtype=torch.int64, device=device)
    total = sum(s.length for s in segments)
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.int64, device=device), lengths, output_size=total)


def _joint_index(layout: SelfLayout, stream: str, device: torch.device) -> torch.Tensor:
    segments = _stream_segments(layout, stream)
    shift = _spread([s.joint_start - s.stream_start for s in segments], segments, device)
    return (shift + torch.arange(len(shift), device=device)).to(torch.int32)


def _modulation_rows(layout: SelfLayout, stream: str, device: torch.device) -> torch.Tensor:
    segments = _stream_segments(layout, stream)
    return _spread([s.mod_row for s in segments], segments, device).to(torch.int32)


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
    steps = (
        torch.where(text, local, local // (height * width)),
        torch.where(text, local, local // width % height),
        torch.where(text, local, local % width),
    )
    origins = (_spread([s.origin[axis] for s in segments], segments, device) for axis in range(3))
    return torch.stack([o + s for o, s in zip(origins, steps, strict=True)], dim=1).to(torch.int32)


def _rotary(
    layout: SelfLayout, axes_dims: tuple[int, ...], device: torch.device, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(axes_dims) != 3 or any(dim % 2 for dim in axes_dims):
        raise ValueError(f"axes_dims must be three even numbers (frame, height, width), got {axes_dims}")
    positions = layout.positions(device).float()
    angles = []
    for axis, dim in enumerate(axes_dims):
        # float32 throughout, in the order diffusers uses, so that the angles agree to the last bit
        exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32).div(dim)
        angles.append(torch.outer(positions[:, axis], 1.0 / torch.pow(theta, exponent)))
    angle = torch.cat(angles, dim=1)
    turn = torch.polar(torch.ones_like(angle), angle)  # as diffusers does: cos and sin kernels round differently
    return turn.real.contiguous(), turn.imag.contiguous()
