"""Location of known objects in an image: how well each is shown at its place, near it, and anywhere else.

Arrays are float32, colours RGB in 0..255. The distance of an image from an object is a mean squared distance over the
object's pixels, in units of the same distance for an image without the object: 1 is as bad as absent. A blob of about
the right colour, a faded object and a noisy object therefore all count in part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

__all__ = ["FLOOR", "Canvas", "Found", "Piece", "Search", "find", "likeness", "reduction", "resized", "weighted"]

SEARCHED = 48  # pixels: largest longer side of the reduced image in which objects are searched everywhere
SCALES = (0.8, 1.25)  # scales of its side at which an object is also searched around its best place
NEAR = {1.0: 2, **dict.fromkeys(SCALES, 1)}  # pixels around a likely place that are searched, by scale
REACH = 0.35  # distance from its place, in sides of the object, at which the score is multiplied by 0.71
FLOOR = 3 * 16.0**2  # squared distance added to that of an absent object, so that small contrasts do not decide


@dataclass(frozen=True, eq=False)
class Piece:
    """An object in an image.

    Attributes:
        colours: Its colours, [h, w, 3].
        alpha: Weights of its pixels, [h, w].
        outline: Its own alpha channel, [h, w]; the rest of its square belongs to the surroundings.
        top: Row of its upper left corner, in pixels.
        left: Column of its upper left corner, in pixels.
        absent: Mean squared distance of an image that does not show it, FLOOR included.
        contrast: Distance of its mean colour from that of its surroundings.
    """

    colours: np.ndarray
    alpha: np.ndarray
    outline: np.ndarray
    top: int
    left: int
    absent: float = math.inf
    contrast: float = 0.0

    @property
    def box(self) -> tuple[slice, slice]:
        height, width = self.alpha.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def centre(self) -> tuple[float, float]:
        height, width = self.alpha.shape
        return self.top + height / 2, self.left + width / 2

    @functools.cached_property
    def mean(self) -> np.ndarray:
        return np.tensordot(self.alpha, self.colours, 2) / self.alpha.sum()

    @functools.cached_property
    def ring(self) -> np.ndarray:
        """Weights of the surroundings, [h + 2 pad, w + 2 pad]: its square and a margin without the object itself."""
        height, width = self.outline.shape
        pad = max(2, round(0.12 * min(height, width)))
        weights = np.ones((height + 2 * pad, width + 2 * pad), np.float32)
        weights[pad:-pad, pad:-pad] -= self.outline
        return weights

    @functools.cached_property
    def scaled(self) -> dict[float, Piece]:
        """The piece at each scale, 1 included; the corners of the others have no meaning."""
        height, width = self.alpha.shape
        pieces = {1.0: self}
        for scale in SCALES:
            size = max(2, round(width * scale)), max(2, round(height * scale))
            colours, outline = resized(self.colours, self.outline, size)
            pieces[scale] = replace(self, colours=colours, alpha=outline, outline=outline)
        return pieces

    def distance(self, other: np.ndarray) -> float:
        """Return the mean squared distance of other colours, [h, w, 3] or [3]."""
        return weighted((other - self.colours) ** 2, self.alpha)


def reduction(size: Sequence[int]) -> int:
    """Return the factor by which an image of that size is reduced for the search."""
    return max(1, math.ceil(max(size) / SEARCHED))


def weighted(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the mean, weighted by weights [h, w], of the sum over the last axis of values [h, w, n]."""
    return float(np.tensordot(weights, values, 2).sum() / weights.sum())


def resized(colours: np.ndarray, alpha: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return colours and weights resized to (width, height), with averaging if it is smaller."""
    rgba = np.empty((*alpha.shape, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = colours + 0.5, 255 * alpha + 0.5
    how = Image.Resampling.BOX if size[0] < alpha.shape[1] else Image.Resampling.BILINEAR
    image = np.asarray(Image.fromarray(rgba).resize(size, how)).astype(np.float32)
    return image[..., :3], image[..., 3] / 255 + np.float32(1e-6)


def likeness(ratio: float | np.ndarray) -> np.ndarray:
    """Return the likeness for a relative squared distance: 1 for 0, 0.4 for 1/4, 0.06 for 1 (absent), then less."""
    return (1 + 1.5 * np.maximum(ratio, 0)) ** -3.0


def nearness(off: np.ndarray) -> np.ndarray:
    """Return the factor of the score for a distance from the expected place, in sides of the object; never 0."""
    return 1 / np.sqrt(1 + (off / REACH) ** 2)


class Canvas:
    """An image [H, W, 3] at whose places pieces are compared."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.shape = pixels.shape[:2]
        self._layers = np.concatenate([pixels, np.ones((*self.shape, 1), np.float32)], -1)
        self._padded: dict[int, np.ndarray] = {}

    def around(self, piece: Piece, tops: range, lefts: range) -> np.ndarray:
        """Return the mean colour of the surroundings of a piece at these corners, [tops, lefts, 3]."""
        pad = (piece.ring.shape[0] - piece.alpha.shape[0]) // 2
        if pad not in self._padded:
            height, width = self.shape
            self._padded[pad] = np.zeros((height + 2 * pad, width + 2 * pad, 4), np.float32)
            self._padded[pad][pad:-pad, pad:-pad] = self._layers
        sums = _windows(self._padded[pad], piece.ring.shape, tops, lefts) @ piece.ring.ravel()
        return sums[..., :3] / np.maximum(sums[..., 3:], 1e-6)

    def ratios(self, piece: Piece, tops: range, lefts: range) -> np.ndarray:
        """Return the relative squared distance of the image from a piece at these corners, [tops, lefts]; 1 if absent.

        If the surroundings have the piece's colour, it does not stand out, and the missing contrast is added: an image
        of a single colour shows no object.
        """
        windows = _windows(self._layers, piece.alpha.shape, tops, lefts)[..., :3, :]
        colours = piece.colours.transpose(2, 0, 1).reshape(3, -1)
        inside = (((windows - colours) ** 2) @ piece.alpha.ravel()).sum(-1) / piece.alpha.sum()
        apart = np.sqrt(((self.around(piece, tops, lefts) - piece.mean) ** 2).sum(-1))
        return (inside + np.maximum(piece.contrast - apart, 0) ** 2) / piece.absent


def _windows(layers: np.ndarray, shape: Sequence[int], tops: range, lefts: range) -> np.ndarray:
    """Return the windows at these corners, [tops, lefts, channels, pixels]."""
    part = layers[tops[0] : tops[-1] + shape[0], lefts[0] : lefts[-1] + shape[1]]
    windows: np.ndarray = sliding_window_view(part, tuple(shape), (0, 1))  # type: ignore[call-overload]
    return windows.reshape(len(tops), len(lefts), layers.shape[-1], -1)


@dataclass(frozen=True)
class Found:
    """The place at which an image shows a piece best.

    Attributes:
        piece: The piece at that place and scale.
        likeness: Likeness of the image to the piece there, 0..1.
        score: The likeness, reduced if place or scale differ from the expected ones.
    """

    piece: Piece
    likeness: float
    score: float


def find(canvas: Canvas, piece: Piece, likely: tuple[float, float]) -> Found:
    """Search a piece at its expected place and around another likely centre (y, x), then at other scales."""
    centres = [piece.centre]
    if max(abs(likely[0] - piece.centre[0]), abs(likely[1] - piece.centre[1])) > 1:  # otherwise it is the same place
        centres.append(likely)
    best: Found | None = None
    for scale, scaled in piece.scaled.items():
        height, width = scaled.alpha.shape
        if height > canvas.shape[0] or width > canvas.shape[1]:
            continue
        for y, x in centres if best is None else [best.piece.centre]:
            tops = _around(y - height / 2, canvas.shape[0] - height, NEAR[scale])
            lefts = _around(x - width / 2, canvas.shape[1] - width, NEAR[scale])
            like = likeness(canvas.ratios(scaled, tops, lefts))
            down = np.array(tops) + height / 2 - piece.centre[0]
            across = np.array(lefts) + width / 2 - piece.centre[1]
            off = np.hypot(down[:, None], across) / (sum(piece.alpha.shape) / 2)
            score = like * nearness(off) / (1 + (math.log(scale) / 0.5) ** 2)
            i, j = np.unravel_index(score.argmax(), score.shape)
            if best is None or score[i, j] > best.score:
                placed = replace(scaled, top=tops[i], left=lefts[j])
                best = Found(placed, float(like[i, j]), float(score[i, j]))
    assert best is not None  # at scale 1 the piece fits into its canvas
    return best


def _around(at: float, last: int, reach: int) -> range:
    first = min(max(0, round(at) - reach), last)
    return range(first, max(first, min(last, round(at) + reach)) + 1)


class Search:
    """Search for all pieces at all places at once, in images reduced to at most SEARCHED pixels."""

    def __init__(self, target: np.ndarray, pieces: Sequence[Piece]) -> None:
        """Prepare the search; the maps of the target [H, W, 3] are the reference for counting objects."""
        self._step = reduction(target.shape[:2])
        self._shape = target.shape[0] // self._step, target.shape[1] // self._step
        self._fast = tuple(extent + -extent % 8 for extent in self._shape)
        self._pieces = pieces
        self._stamps: list[tuple[int, int, float]] = []  # height, width, mean of the squared colours
        kernels = np.zeros((len(pieces), 4, *self._fast), np.float32)
        for kernel, piece in zip(kernels, pieces, strict=True):
            height, width = (
                min(max(1, round(n / self._step)), most) for n, most in zip(piece.alpha.shape, self._shape, strict=True)
            )
            colours, alpha = resized(piece.colours, piece.alpha, (width, height))
            alpha = alpha / alpha.sum()
            kernel[:3, :height, :width] = -2 * (alpha[..., None] * colours).transpose(2, 0, 1)
            kernel[3, :height, :width] = alpha
            self._stamps.append((height, width, weighted(colours**2, alpha)))
        self._kernels = np.fft.rfft2(kernels).conj()
        self.known = self.maps(target)

    def maps(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Return a map of the likeness of an image [H, W, 3] to each piece, by the piece's corner in reduced pixels."""
        if not self._pieces:
            return []
        (height, width), step = self._shape, self._step
        small = pixels[: height * step, : width * step].reshape(height, step, width, step, 3).mean((1, 3))
        layers = np.concatenate([small.transpose(2, 0, 1), np.einsum("hwn,hwn->hw", small, small)[None]])
        # squared distance at every place: sum of a (I - T)^2 = a * I^2 - 2 a T * I + const, correlated by FFT
        both = np.fft.irfft2((np.fft.rfft2(layers, self._fast) * self._kernels).sum(1), self._fast)
        return [
            likeness((distance[: height - h + 1, : width - w + 1] + own) / piece.absent)
            for distance, (h, w, own), piece in zip(both, self._stamps, self._pieces, strict=True)
        ]

    def likely(self, piece: Piece, values: np.ndarray) -> tuple[float, float]:
        """Return the centre (y, x), in pixels, at which a piece has the best score according to its map."""
        height, width = piece.alpha.shape
        down = np.arange(values.shape[0]) * self._step - piece.top
        across = np.arange(values.shape[1]) * self._step - piece.left
        near = nearness(np.hypot(down[:, None], across) / ((height + width) / 2))
        y, x = np.unravel_index((values * near).argmax(), values.shape)
        return float(y * self._step + height / 2), float(x * self._step + width / 2)

    def extras(self, maps: Sequence[np.ndarray], groups: Sequence[Sequence[int]]) -> float:
        """Return about how many objects an image shows in addition to those of the target.

        Args:
            maps: Maps of the image, see `maps`.
            groups: Indices of pieces that are copies of one another; pieces in no group should not be visible at all.
        """
        total = 0.0
        for group in groups:
            shown, known = (float((values[group[0]] ** 3).sum()) for values in (maps, self.known))
            more = max(0.0, shown / known - 1)
            # Differences below a third may come from the position of the pixels on the reduced grid.
            total += len(group) * more * more / (more + 0.3)
        grouped = {i for group in groups for i in group}
        for i in set(range(len(maps))) - grouped:
            total += max(0.0, float(maps[i].max()) ** 3 - float(self.known[i].max()) ** 3)
        return total
