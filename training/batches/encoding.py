"""The encoding pass: everything that a run encodes is computed into the cache, before the encoders are freed.

All ranks share the rows. A pass that was interrupted continues where it was, because it computes only what the cache
lacks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from uniref_fast.data.dataset import Dataset, Row
from uniref_fast.data.prefetch import prefetch
from uniref_fast.evaluation.requests import guidance_texts
from uniref_fast.gpu_memory import size_text
from uniref_fast.progress import announce, running
from uniref_fast.training.batches.heldout import heldout_count
from uniref_fast.training.batches.latent_cache import CacheError
from uniref_fast.training.batches.samples import Encoder, Form
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.recipe import BudgetStage, Recipe

__all__ = ["EncodingPass", "EncodingReport", "RowForms", "all_forms", "heldout_rows"]

T = TypeVar("T")

BLOCK = 4096  # bytes of a block of a file system: a file takes whole ones
HEADER = 128  # bytes of a file besides its tensor
SYNC_SECONDS = 60.0  # interval in which ranks report to each other: one that waits for hours would time out


@dataclass(frozen=True)
class RowForms:
    """A row and the forms that it is needed in.

    Attributes:
        dataset: Dataset of the row.
        index: Number of the row.
        forms: Forms of the row.
        target: The latents of the target are needed, and rows without a target are broken.
        true_cfg_scale: Scale of the guidance that the row is sampled with, 1 for none. With guidance, the negative
            prompt is encoded with the references too.
    """

    dataset: Dataset
    index: int
    forms: tuple[Form, ...]
    target: bool = True
    true_cfg_scale: float = 1.0


@dataclass(frozen=True)
class EncodingReport:
    """Result of a pass, over all ranks.

    Attributes:
        rows: Number of rows that were needed.
        encoded: Number of rows of which something was encoded.
        written: Number of bytes of these tensors.
        broken: (place, reason) of rows that cannot be encoded.
    """

    rows: int
    encoded: int
    written: int
    broken: tuple[tuple[str, str], ...]


def all_forms(stages: Iterable[BudgetStage], drop_text: float = 0.0, drop_references: float = 0.0) -> tuple[Form, ...]:
    """Return all forms that a run may draw for a row, whatever its seed and its steps are.

    Args:
        stages: Stages of the run that use the row.
        drop_text: Share of samples without text: with 0 no sample is without, with 1 all samples are.
        drop_references: Share of samples without references, likewise.
    """
    drops = [[drop for drop in (False, True) if (share > 0 if drop else share < 1)]
             for share in (drop_text, drop_references)]  # fmt: skip
    sides = dict.fromkeys((stage.budget, stage.target_side) for stage in stages)
    return tuple(Form(*side, *dropped) for side in sides for dropped in itertools.product(*drops))


def heldout_rows(datasets: Mapping[str, Dataset], config: Recipe, *, target: bool, guided: int) -> list[RowForms]:
    """Return the held-out rows that the validations of a run encode.

    Args:
        datasets: Held-out rows of each file, by its name.
        config: Configuration of the run.
        target: The validation compares with the targets.
        guided: Number of rows of each file that samples are generated for, with the guidance of the run.
    """
    stage, (_, scale) = config.validation_stage, config.resolve_sampling()
    form = Form(stage.budget, stage.target_side)
    return [
        RowForms(dataset, index, (form,), target, scale if index < guided else 1.0)
        for dataset in datasets.values()
        for index in range(min(heldout_count(config), len(dataset)))
    ]


class EncodingPass:
    """Encodes rows into the cache of an encoder. All ranks must call `run` with the same rows.

    Args:
        encoder: Encoder with a cache.
        ranks: Ranks that share the work.
        workers: Number of threads that read images ahead.
        shown: Show progress.

    Raises:
        ValueError: The folder of the cache cannot be created.
    """

    def __init__(self, encoder: Encoder, ranks: Ranks, workers: int, shown: bool = True) -> None:
        assert encoder.cache.folder is not None
        self.encoder, self.ranks, self.workers = encoder, ranks, workers
        self.folder: Path = encoder.cache.folder
        self.shown = shown and ranks.rank == 0
        self._known_texts: dict[float, tuple[str, ...]] = {}  # by the scale
        problem = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"the cache {self.folder} cannot be created: {error.strerror or error}"
        for found in ranks.gather(problem):
            if found:
                raise ValueError(found)

    def run(self, rows: Sequence[RowForms]) -> EncodingReport:
        """Encode what the cache lacks.

        Args:
            rows: Rows with the forms that are needed, the same on all ranks.

        Raises:
            ValueError: The disk of the cache is too small. Nothing has been encoded.
            CacheError: The cache cannot be written.
        """
        number, count, group = self._share()
        mine = rows[number::count]
        broken: dict[str, str] = {}
        missing: list[RowForms] = []
        size = sum(self._check(mine, missing, broken))
        sizes: Counter[int] = Counter()
        for other, part in self.ranks.gather((group, size)):
            sizes[other] += part
        encoded = sum(self.ranks.gather(len(missing)))
        if encoded:
            self._check_disk(sizes[group], encoded)
            self._encode(missing, broken)
        found = {where: reason for part in self.ranks.gather(broken) for where, reason in part.items()}
        return EncodingReport(len(rows), encoded, sum(sizes.values()), tuple(found.items()))

    def _share(self) -> tuple[int, int, int]:
        """Return the number of this rank among those that share the work, their count, and a number of their group.

        Ranks share the work if they see the files of each other: all of them, or else those of one machine.
        """
        if self.ranks.size == 1:
            return 0, 1, 0
        probe = self.folder / self.ranks.broadcast(f".probe-{uuid.uuid4().hex}")
        if self.ranks.rank == 0:
            probe.touch()
        self.ranks.gather(None)  # the file exists now
        seen = self.ranks.gather(probe.exists())
        if self.ranks.rank == 0:
            probe.unlink(missing_ok=True)
        if all(seen):
            return self.ranks.rank, self.ranks.size, 0
        local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return *local, self.ranks.rank // local[1]

    def _check(self, rows: Sequence[RowForms], missing: list[RowForms], broken: dict[str, str]) -> Iterator[int]:
        """Yield the bytes that the cache lacks of each row.

        Rows of which it lacks something are added to `missing`, and broken ones to `broken`.
        """
        written: set[str] = set()  # the tensors of several rows are counted once
        for one, found in self._ahead(_digested, rows, "searching the cache"):
            forms, sizes = [], dict[str, int]()
            for form in one.forms:
                with _broken_rows(one, broken):
                    prepared = self.encoder.prepare_form(_result(found), form, rollout=not one.target)
                    if lacking := self.encoder.missing(prepared, one.target, self._texts(one.true_cfg_scale)):
                        forms.append(form)
                        sizes |= lacking
            if forms:
                missing.append(replace(one, forms=tuple(forms)))
            yield sum(-(-(size + HEADER) // BLOCK) * BLOCK for key, size in sizes.items() if key not in written)
            written.update(sizes)

    def _check_disk(self, needed: int, rows: int) -> None:
        """Say how much is written and where; raise ValueError on all ranks if a disk is too small."""
        free, problem = shutil.disk_usage(self.folder).free, None
        if needed > free:
            problem = (
                f"encoding needs {size_text(needed)} in the cache {self.folder}, whose disk has {size_text(free)} "
                "free; make room, or give another --cache"
            )
        for found in self.ranks.gather(problem):
            if found:
                raise ValueError(found)
        if self.shown:
            announce(f"encoding {rows} rows into {self.folder}: {size_text(needed)}, {size_text(free)} are free")

    def _encode(self, rows: Sequence[RowForms], broken: dict[str, str]) -> None:
        cache = self.encoder.cache
        cache.required = True
        try:
            load = functools.partial(_images, mode=self.encoder.family.image_mode)
            for one, loaded in self._ahead(load, rows, "encoding"):
                for form in one.forms:
                    with _broken_rows(one, broken):
                        self._encode_form(one, form, *_result(loaded))
        finally:
            cache.required = False

    def _encode_form(
        self, one: RowForms, form: Form, row: Row, target: Image.Image | None, references: list[Image.Image]
    ) -> None:
        prepared = self.encoder.prepare_form(row, form, rollout=not one.target)
        seen = [] if prepared.dropped else references
        if target is None:
            self.encoder.encode_conditions(prepared, seen)
        else:
            self.encoder.encode(prepared, (target, seen, None))
        for text in self._texts(one.true_cfg_scale):
            self.encoder.encode_text(prepared, seen, text)

    def _texts(self, true_cfg_scale: float) -> tuple[str, ...]:
        """Return the texts that rows with a scale are encoded with besides their instructions."""
        if true_cfg_scale not in self._known_texts:
            self._known_texts[true_cfg_scale] = guidance_texts(self.encoder.pipe, true_cfg_scale)
        return self._known_texts[true_cfg_scale]

    def _ahead(
        self, function: Callable[[RowForms], T], rows: Sequence[RowForms], what: str
    ) -> Iterator[tuple[RowForms, T | Exception]]:
        """Yield the results of a function that runs in threads, until all ranks have theirs."""
        results, done = prefetch(function, rows, self.workers, ahead=2 * self.workers), False
        with running(what, len(rows), "row", shown=self.shown) as bar:
            while True:
                end = time.monotonic() + SYNC_SECONDS
                while not done and time.monotonic() < end:
                    try:
                        found = next(results)
                    except StopIteration:
                        done = True
                    else:
                        yield found
                        bar.update()
                if all(self.ranks.gather(done)):
                    return


# In threads; a tokenizer serves one thread at a time, so that rows are prepared in the main one.


def _digested(one: RowForms) -> Row:
    """Return a row whose images have computed their digests."""
    row = one.dataset[one.index]
    for source in (*row.references, *([row.target] if one.target and row.target else ())):
        _ = source.digest
    return row


def _images(one: RowForms, mode: Literal["RGB", "RGBA"]) -> tuple[Row, Image.Image | None, list[Image.Image]]:
    """Return a row with its target, if that is needed, and its references."""
    row = one.dataset[one.index]
    target = row.target.load(mode) if one.target and row.target else None
    return row, target, [] if all(form.no_references for form in one.forms) else [x.load(mode) for x in row.references]


def _result(found: T | Exception) -> T:
    """Return the result of a thread, or raise its exception."""
    if isinstance(found, Exception):
        raise found
    return found


@contextlib.contextmanager
def _broken_rows(one: RowForms, broken: dict[str, str]) -> Iterator[None]:
    """Add the row to `broken` with the reason if the block cannot use it."""
    try:
        yield
    except CacheError:
        raise
    except (ValueError, OSError) as error:
        where = one.dataset.where(one.index)
        broken[where] = str(error).removeprefix(f"{where}: ")
