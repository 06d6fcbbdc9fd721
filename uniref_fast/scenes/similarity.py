"""Similarity of two images in colours and structure, sharpness compared with a known image, and seams on a grid.

Images are float32 [h, w, 3], 0..255.
"""

from __future__ import annotations

import numpy as np

from uniref_fast.scenes.locate import weighted

__all__ = ["Edges", "alike", "softened", "steps_on_grids"]

SHADE = 25.0  # levels: RMS difference that halves the score for colour
CALM = 3.0  # levels: RMS differences of this size hardly matter for structure
GRAIN = 7.0  # levels: RMS steps between pixels of this size hardly matter for quality
SHOWN = 30.0  # levels: RMS difference of softened images at which they count half as different content
BLOCK = 8  # pixels: side of the blocks over which sharpness is averaged
SLACK = 2  # pixels: displacement of details that still counts as sharp
GRIDS = (8, 16)  # pixels: sides of the areas that a latent and a token of the model cover


def softened(pixels: np.ndarray, window: int) -> np.ndarray:
    """Average an image [H, W, n] over windows of odd side, which removes its finest details."""
    height, width, _ = pixels.shape
    pad = window // 2
    padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    rows = sum(padded[i : i + height] for i in range(1, window)) + padded[:height]
    total = sum(rows[:, i : i + width] for i in range(1, window)) + rows[:, :width]
    return total / np.float32(window * window)


def alike(image: np.ndarray, known: np.ndarray, weights: np.ndarray) -> float:
    """Return the similarity 0..1 of two images [h, w, 3] by colours, structure, and the steps between pixels."""
    shade = 1 / (1 + weighted((image - known) ** 2, weights) / (3 * SHADE**2))
    structure = _concordance(image, known, weights)
    detail = _concordance(_slopes(image), _slopes(known), weights)
    return 0.3 * shade + 0.35 * max(structure, 0.0) + 0.35 * max(detail, 0.0)


def _concordance(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """Return the concordance correlation of [h, w, n] arrays, -1..1; it is 1 only for equal values."""
    weights = weights / weights.sum()
    mean_a, mean_b = np.tensordot(weights, a, 2), np.tensordot(weights, b, 2)
    a, b = a - mean_a, b - mean_b
    both = float(np.tensordot(weights, a * b, 2).sum())
    difference = weighted((a - b) ** 2, weights) + ((mean_a - mean_b) ** 2).sum()
    calm = 3 * CALM**2
    return float((2 * both + calm) / (difference + 2 * both + calm))


def _slopes(pixels: np.ndarray) -> np.ndarray:
    """Return the steps to the next pixel to the right and below, [h, w, 6]; 0 at the edge."""
    steps = np.zeros((*pixels.shape[:2], 6), np.float32)
    np.subtract(pixels[:, 1:], pixels[:, :-1], out=steps[:, :-1, :3])
    np.subtract(pixels[1:], pixels[:-1], out=steps[:-1, :, 3:])
    return steps


class Edges:
    """Steps between the pixels of an image, [h, w, 6], and for each block their energy and the share in edges."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.steps = _slopes(pixels)
        self.energy = _blocks(np.einsum("hwn,hwn->hw", self.steps, self.steps))
        # averaged over two pixels and two lines, noise keeps a quarter of its energy, and edges gain
        wide = np.zeros_like(self.steps)
        across, down = self.steps[..., :3], self.steps[..., 3:]
        wide[:-1, 1:-1, :3] = _pair(across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:], 0)
        wide[1:-1, :-1, 3:] = _pair(down[:-2] + 2 * down[1:-1] + down[2:], 1)
        kept = np.maximum(_blocks(np.einsum("hwn,hwn->hw", wide, wide)) - self.energy / 4, 0)
        self.edges = (kept + 6 * CALM**2) / (self.energy + 6 * CALM**2)

    def like(self, known: Edges, difference: np.ndarray) -> float:
        """Return how sharp and clean the image is compared with a known one, 0..1; 1 for equal images.

        Args:
            known: Edges of the known image.
            difference: Mean squared difference of the softened images, [h, w]. If it is small, both images show the
                same content, and only the known steps count as sharpness, since noise must not count as detail. If it
                is large, as many steps count as sharp, provided that they belong to edges.
        """
        height, width, _ = self.steps.shape
        padded = np.pad(self.steps, ((SLACK, SLACK), (SLACK, SLACK), (0, 0)))
        reach = range(-SLACK, SLACK + 1)
        shifts = [(SLACK + y, SLACK + x) for y in reach for x in reach if abs(y) + abs(x) <= SLACK]
        products = np.stack(
            [np.einsum("hwn,hwn->hw", known.steps, padded[y : y + height, x : x + width]) for y, x in shifts]
        )
        products = _blocks(products)
        # the shift is found for a block and its neighbours, since a single block may fit noise by chance
        best = softened(products.transpose(1, 2, 0), 3).argmax(-1)
        common = np.take_along_axis(products, best[None], 0)[0]
        level = np.sqrt(self.energy * known.energy)
        plausible = level * np.minimum(1, self.edges / known.edges)
        different = (_blocks(difference) / SHOWN**2) ** 2
        common = (common + different * plausible) / (1 + different)
        grain = 6 * GRAIN**2
        like = np.maximum((2 * common + grain) / (self.energy + known.energy + grain), 0)
        scores = []  # blocks with edges and calm blocks: one cannot compensate for the other
        for weights in (np.sqrt(known.energy) + 0.01, 1 / (1 + 0.5 * known.energy / grain)):
            scores.append(float((like * weights).sum() / weights.sum()))
        return scores[0] ** 0.75 * scores[1] ** 0.25


def _pair(steps: np.ndarray, axis: int) -> np.ndarray:
    """Return half of the sums over two lines, for steps with weights 1, 2, 1 in quarters, so that a slope doubles."""
    first, second = (steps[:-1], steps[1:]) if axis == 0 else (steps[:, :-1], steps[:, 1:])
    return (first + second) / np.float32(4)


def _blocks(values: np.ndarray) -> np.ndarray:
    """Return means of [..., h, w] over blocks of BLOCK pixels; blocks at the lower and right edge may be smaller."""
    height, width = values.shape[-2:]
    rows, columns = np.arange(0, height, BLOCK), np.arange(0, width, BLOCK)
    sums = np.add.reduceat(np.add.reduceat(values, rows, -2), columns, -1)
    return sums / (np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)).astype(np.float32)


def steps_on_grids(pixels: np.ndarray) -> np.ndarray:
    """Return by how many levels the steps between pixels on each of GRIDS exceed the others, in both directions."""
    excess = np.zeros(len(GRIDS))
    for axis in (0, 1):
        steps = np.abs(np.diff(pixels, axis=axis)).sum(1 - axis).sum(-1) / (3 * pixels.shape[1 - axis])
        for i, grid in enumerate(GRIDS):
            at = np.arange(grid - 1, len(steps), grid)
            if len(at):
                excess[i] += (steps[at].mean() - np.delete(steps, at).mean()) / 2
    return excess
