"""Changes that an edit makes, derived from a scene: objects that are new, kept, removed, or not used."""

from __future__ import annotations

from dataclasses import dataclass, replace

from uniref_fast.scenes.scene import PlacedObject, Scene

__all__ = ["SceneChanges", "scene_changes"]


@dataclass(frozen=True)
class SceneChanges:
    """Objects of the target and of the references, grouped by the change; places are in pixels of the target.

    Attributes:
        size: (width, height) of the target in pixels.
        objects: Objects of the target; later ones are drawn over earlier ones.
        kept: True for each of `objects` that a reference shows at the same place.
        removed: Objects of the reference that gives the background, which the target does not show at that place.
        unused: Objects of the references that the target does not show anywhere; they have the mean side of `objects`.
        new_background: True if objects are kept, but the background of their reference is not.
    """

    size: tuple[int, int]
    objects: tuple[PlacedObject, ...]
    kept: tuple[bool, ...]
    removed: tuple[PlacedObject, ...]
    unused: tuple[PlacedObject, ...]
    new_background: bool


def scene_changes(scene: Scene) -> SceneChanges:
    """Compare the target of a scene with its references."""
    size, objects = scene.size, scene.objects
    ground = scene.background.picture if scene.background is not None else None
    kept: set[int] = set()  # indices into `objects`
    sources: set[int] = set()  # numbers of the references that show kept objects
    removed: list[PlacedObject] = []
    for number, reference in enumerate(scene.references, start=1):
        whole = (0.0, 0.0, float(reference.size[0]), float(reference.size[1]))
        crop = scene.background.crop if number == ground and scene.background is not None else None
        shown = [placed.resized(crop or whole, size) for placed in reference.objects]
        same = {i for i, placed in enumerate(objects) if any(map(placed.coincides, shown))}
        kept |= same
        sources |= {number} if same else set()
        if number == ground:
            removed = [placed for placed in shown if placed.inside(size) and not any(map(placed.coincides, objects))]
    known = {placed.appearance for placed in (*objects, *removed)}
    side = sum(placed.side for placed in objects) / len(objects) if objects else 0.4 * min(size)
    unused = {
        placed.appearance: replace(placed, centre=(size[0] / 2, size[1] / 2), side=min(side, *size))
        for reference in scene.references
        for placed in reference.objects
        if placed.appearance not in known
    }
    is_kept = tuple(i in kept for i in range(len(objects)))
    new_background = bool(sources) and ground not in sources
    return SceneChanges(size, objects, is_kept, tuple(removed), tuple(unused.values()), new_background)
