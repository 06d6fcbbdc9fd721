"""Scores for generated data without a judge: the targets are exact, so the faults of an image can be measured.

    scene_details(row, image).axes
    {"integration": 7.9, "consistency": 9.1, "quality": 8.2}

- integration: each requested object is searched near its place, then anywhere; each removed object is searched where it
  was; the background is compared as a whole. The score is the geometric mean of new, kept and removed objects and the
  background, so that one cannot make up for another; it is divided by more for every surplus object.
- consistency: colours, structure and details of each object at the place where it was found, and of the background.
- quality: sharpness compared with the target, noise, and seams on the grids of the model's latents and tokens. Where
  the image shows the same as the target, only its details count; where it shows something else, any edges count.

All scores fall smoothly, so that the images of a model that has learned little differ too, and no image scores higher
than the target itself. Means over 40 samples of train, the shipped artworks, 64 pixels:

    change of the target                     integration  consistency  quality
    none: the target itself                         10.0         10.0     10.0
    blurred, sigma 0.5 / 1 / 2 / 4 pixels 9.7 8.3 5.8 3.4  9.2 6.1 3.3 1.8  9.5 6.6 4.0 2.9
    noise of 4 / 10 / 25 / 60 levels      9.9 9.8 8.8 6.1  9.7 8.7 6.0 2.5  9.1 7.0 3.8 1.2
    blurred by 2, noise of 8                         5.8          3.0      2.8
    objects moved by 2 / 4 / 8 pixels        9.0 7.7 5.6  9.1 8.6 7.8  9.2 7.4 7.0
    objects faded to 3/4, 1/2, 1/4, 0     8.0 4.8 2.7 1.6  7.8 4.9 3.2 2.5  9.7 9.0 7.6 5.9
    all objects at the opposite place                3.8          6.9      6.6
    other objects                                    2.4          2.3      7.7
    objects in another colour                        1.9          3.0      8.9
    one of the objects all over the image            1.3          5.2      5.8
    another background                               2.4          4.5      7.4
    picture 1, untouched                             1.0          2.2      5.5
    its mean colour                                  1.4          0.6      2.0
    noise alone                                      0.6          0.1      0.1
    sharpened                                        6.5          5.7      6.9
    tiles of 8 pixels, 4 / 10 / 25 levels    9.9 9.5 8.1  9.9 9.6 8.1  7.9 5.7 3.1
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from uniref_fast.data.dataset import Row, RowError
from uniref_fast.data.images import ImageSource
from uniref_fast.rewards.types import Candidate, Failure, Scores
from uniref_fast.scenes.changes import SceneChanges, scene_changes
from uniref_fast.scenes.locate import (
    FLOOR,
    Canvas,
    Found,
    Piece,
    Search,
    find,
    likeness,
    reduction,
    resized,
    weighted,
)
from uniref_fast.scenes.render import recolour
from uniref_fast.scenes.scene import PlacedObject, Scene, SceneError
from uniref_fast.scenes.similarity import Edges, alike, softened, steps_on_grids

__all__ = ["PRESENT", "SceneDetails", "SceneError", "SceneObject", "scene_details", "scene_reward"]

SMALLEST = 16  # shortest side in pixels of an image that can be scored
GROUND = 3 * 32.0**2  # squared distance that is added to the variance of a background, as FLOOR to that of an object
EXTRA = 0.7  # integration is divided by 1 + EXTRA for one surplus object
OBJECTS = 0.7  # share of the objects in consistency; the background has the rest
SEAM = 16.0  # levels by which steps on a grid are larger when quality is halved
# Smallest likeness of an object that counts as present. Of 98 objects of held-out samples of 64 pixels, these are all
# in the targets, 95% in targets blurred by 2 pixels, 47% in targets mixed half and half with the target of another
# sample, 5% in that other target alone.
PRESENT = 0.3


@dataclass(frozen=True)
class SceneObject:
    """A requested object, and how an image shows it.

    Attributes:
        artwork: Path of the artwork, as in the scene.
        colour: Colour of the object, as in the scene; None for the colours of the artwork.
        kept: True if a reference shows the object at the same place.
        likeness: Likeness of the image and the object at the place where it is largest, 0..1; 1 in the target.
        distance: Distance of that place from the requested place, centre to centre, in pixels of the image.
        similarity: Part of the object in the consistency axis: colours, structure and details at that place, 0..1.
    """

    artwork: str
    colour: str | None
    kept: bool
    likeness: float
    distance: float
    similarity: float

    @property
    def present(self) -> bool:
        """Return True if the image shows the object."""
        return self.likeness >= PRESENT


@dataclass(frozen=True)
class SceneDetails:
    """Scores of an image.

    Attributes:
        axes: Score of each axis, 0..10.
        objects: Details of each requested object, in the scene's order.
    """

    axes: Mapping[str, float]
    objects: tuple[SceneObject, ...]


def scene_reward(candidate: Candidate) -> Scores | Failure:
    """Return the scores of a candidate whose row has a scene and an exact target; deterministic.

    Returns:
        Scores, or a failure ("unreadable") if the file of the target or of an artwork cannot be read.

    Raises:
        RowError: If the row has no scene or no target, or its scene does not follow the dataset card.
    """
    details = scene_details(candidate.row, candidate.image)
    return details if isinstance(details, Failure) else Scores(details.axes)


def scene_details(row: Row, image: Image.Image) -> SceneDetails | Failure:
    """Return the scores that `scene_reward` gives an image for a row, with the details of each object."""
    if row.scene is None or row.target is None:
        lacking = "scene" if row.scene is None else "target image"
        raise RowError(
            row.where, f"has no {lacking}; the scene reward needs rows as `uniref-fast data make` writes them"
        )
    try:
        return _target(row, image.size).details(image)
    except SceneError as error:
        raise RowError(row.where, error) from error
    except ValueError as error:
        return Failure("unreadable", str(error))


@functools.lru_cache(maxsize=16)  # shared by the candidates of a group
def _target(row: Row, size: tuple[int, int]) -> _Target:
    assert row.scene is not None and row.target is not None
    scene = scene_changes(Scene.from_json(row.scene))
    paths = {placed.artwork for placed in (*scene.objects, *scene.removed, *scene.unused)}
    artworks = {path: _rgba(row.artworks[path]) for path in sorted(paths & row.artworks.keys())}
    return _Target(row.target.load(), scene, artworks, size)


@functools.lru_cache(maxsize=1024)
def _rgba(source: ImageSource) -> Image.Image:
    """Return an artwork with its alpha channel, which `ImageSource.load` fills with white by default."""
    return source.load("RGBA")


class _Target:
    """A target, analysed once for all candidates: its objects as pieces, its edges, its background."""

    def __init__(
        self, target: Image.Image, scene: SceneChanges, artworks: Mapping[str, Image.Image], size: tuple[int, int]
    ) -> None:
        if min(size) < SMALLEST:
            raise SceneError(f"an image to score has at least {SMALLEST} pixels a side, got {size[0]} x {size[1]}")
        self.scene = scene
        self.window = 2 * reduction(size) - 1
        target = target.convert("RGB")
        if target.size != size:
            target = target.resize(size, Image.Resampling.LANCZOS)
        self.target = np.asarray(target).astype(np.float32)
        self.soft = softened(self.target, self.window)
        self.edges = Edges(self.target)
        self.seams = steps_on_grids(self.target)
        drawn = [self._drawn(placed, artworks) for placed in scene.objects]
        self.cover = np.zeros(self.target.shape[:2], np.float32)  # share of each pixel of the target that objects cover
        requested = []
        for piece in reversed(drawn):
            visible = piece.outline * (1 - self.cover[piece.box])
            self.cover[piece.box] = np.maximum(self.cover[piece.box], piece.outline)
            # the rim has the colours of both sides when it is softened
            inner = np.clip(2 * softened(visible[..., None], self.window)[..., 0] - 1, 0.05, 1)
            requested.append(replace(piece, colours=self.soft[piece.box], alpha=visible * inner + np.float32(1e-6)))
        others = [self._drawn(placed, artworks) for placed in (*scene.removed, *scene.unused)]
        self._measure(requested[::-1], others[: len(scene.removed)])
        mean = self.target.mean((0, 1))
        others = [replace(piece, absent=piece.distance(mean) + FLOOR) for piece in others]
        self.search = Search(self.soft, [*self.objects, *others])
        looks = [placed.appearance for placed in scene.objects]
        self.groups = [[i for i, other in enumerate(looks) if other == look] for look in dict.fromkeys(looks)]

    def _drawn(self, placed: PlacedObject, artworks: Mapping[str, Image.Image]) -> Piece:
        """Return an object in pixels of the image."""
        if placed.artwork not in artworks:
            raise SceneError(
                f"no artwork {placed.artwork!r}; its path is relative to the same folder as the row's images"
            )
        image = artworks[placed.artwork].convert("RGBA")
        if placed.colour is not None:
            image = recolour(image, placed.colour)
        height, width = self.target.shape[:2]
        across, down = width / self.scene.size[0], height / self.scene.size[1]
        w, h = min(max(2, round(placed.side * across)), width), min(max(2, round(placed.side * down)), height)
        left = min(max(0, round((placed.centre[0] - placed.side / 2) * across)), width - w)
        top = min(max(0, round((placed.centre[1] - placed.side / 2) * down)), height - h)
        rgba = np.asarray(image.resize((w, h), Image.Resampling.LANCZOS)).astype(np.float32)
        alpha = rgba[..., 3] / 255 + np.float32(1e-6)
        return Piece(rgba[..., :3], alpha, alpha, top, left)

    def _measure(self, requested: Sequence[Piece], removed: Sequence[Piece]) -> None:
        """Set `objects` and `removed`, with the distance of an image that lacks the former or still has the latter."""
        canvas = Canvas(self.soft)
        grounds = [canvas.around(p, range(p.top, p.top + 1), range(p.left, p.left + 1))[0, 0] for p in requested]
        before = self.target.copy()  # without the requested objects, with the removed ones
        for piece, ground in zip(requested, grounds, strict=True):
            _paint(before, piece, ground)
        for piece in removed:
            _paint(before, piece, piece.colours)
        before = softened(before, self.window)
        self.objects, self.removed = [], []
        for piece, ground in zip(requested, grounds, strict=True):
            absent = min(piece.distance(ground), piece.distance(before[piece.box])) + FLOOR
            contrast = float(np.sqrt(((ground - piece.mean) ** 2).sum()))
            self.objects.append(replace(piece, absent=absent, contrast=contrast))
        for piece in removed:
            bare = piece.outline * (1 - self.cover[piece.box])
            if bare.sum() > 0.1 * piece.outline.sum():  # otherwise requested objects hide it
                piece = replace(piece, colours=self.soft[piece.box], alpha=bare + np.float32(1e-6))
                self.removed.append(replace(piece, absent=piece.distance(before[piece.box]) + FLOOR))

    def details(self, image: Image.Image) -> SceneDetails:
        """Return the scores of an image, which has the size that this target was analysed for."""
        pixels = np.asarray(image.convert("RGB")).astype(np.float32)
        soft = softened(pixels, self.window)
        maps, canvas = self.search.maps(soft), Canvas(soft)
        found = [
            find(canvas, piece, self.search.likely(piece, values))
            for piece, values in zip(self.objects, maps[: len(self.objects)], strict=True)
        ]
        free = 1 - self.cover  # share of the background in each pixel; objects that were found hide it
        for one in found:
            part = free[one.piece.box]
            np.minimum(part, 1 - one.likeness * one.piece.outline, out=part)
        free += np.float32(1e-6)
        extras = self.search.extras(maps, self.groups)
        similar = self._similarities(pixels, found)
        scores = {
            "integration": self._integration(soft, found, free) / (1 + EXTRA * extras),
            "consistency": self._consistency(pixels, similar, free),
            "quality": self._quality(pixels, soft),
        }
        axes = {axis: 10 * min(max(score, 0.0), 1.0) for axis, score in scores.items()}
        objects = [
            SceneObject(
                *placed.appearance, kept, one.likeness, math.dist(one.piece.centre, requested.centre), similarity
            )
            for placed, kept, requested, one, similarity in zip(
                self.scene.objects, self.scene.kept, self.objects, found, similar, strict=True
            )
        ]
        return SceneDetails(axes, tuple(objects))

    def _integration(self, soft: np.ndarray, found: Sequence[Found], free: np.ndarray) -> float:
        """Return the geometric mean over new objects, kept objects, removed objects and the background."""
        removed = [float(likeness(piece.distance(soft[piece.box]) / piece.absent)) for piece in self.removed]
        new = [one.score for one, kept in zip(found, self.scene.kept, strict=True) if not kept]
        kept = [one.score for one, kept in zip(found, self.scene.kept, strict=True) if kept]
        mean = np.tensordot(free, self.soft, 2) / free.sum()
        spread = weighted((self.soft - mean) ** 2, free) + GROUND
        ground = float(likeness(weighted((soft - self.soft) ** 2, free) / spread)) ** 0.5
        weights = (1.0, 1.0, 0.6 if new else 1.0)  # a removed object matters less if it is to be elsewhere
        parts = [(sum(each) / len(each), w) for each, w in zip((new, kept, removed), weights, strict=True) if each]
        parts.append((ground, 1.0 if self.scene.new_background or not found else 0.4))
        whole = sum(weight for _, weight in parts)
        return math.prod(score ** (weight / whole) for score, weight in parts)

    def _similarities(self, pixels: np.ndarray, found: Sequence[Found]) -> list[float]:
        """Return the similarity of each object at the place where it was found."""
        similar = []
        for one, requested in zip(found, self.objects, strict=True):
            sharp, (height, width) = self.target[requested.box], one.piece.alpha.shape
            if sharp.shape[:2] != (height, width):
                sharp, _ = resized(sharp, requested.outline, (width, height))
            similar.append(math.sqrt(one.likeness) * alike(pixels[one.piece.box], sharp, one.piece.outline))
        return similar

    def _consistency(self, pixels: np.ndarray, similar: Sequence[float], free: np.ndarray) -> float:
        """Return the weighted mean over the objects and the background."""
        ground = alike(pixels, self.target, free)
        if not similar:
            return ground
        return OBJECTS * sum(similar) / len(similar) + (1 - OBJECTS) * ground

    def _quality(self, pixels: np.ndarray, soft: np.ndarray) -> float:
        sharp = Edges(pixels).like(self.edges, ((soft - self.soft) ** 2).mean(-1))
        # in the image, where a texture hides some, and in what it has beside the target, where a texture adds some
        more = [np.maximum(steps_on_grids(pixels) - self.seams, 0), np.maximum(steps_on_grids(pixels - self.target), 0)]
        return sharp / (1 + float(np.sqrt(more[0] * more[1]).sum()) / SEAM)


def _paint(pixels: np.ndarray, piece: Piece, colours: np.ndarray) -> None:
    part = pixels[piece.box]
    part += (colours - part) * piece.outline[..., None]
