"""How good a model is on rows it has not seen: `uniref-fast eval heldout_objects.jsonl --model builtin --out results/`.

    results = evaluate(EvalConfig((Path("heldout_objects.jsonl"),), Path("results"), initial=(Path("runs/mine"),)))
    results["aggregates"]["heldout_objects"]["all"]["scores"]["mean"]  # {"n": 64, "mean": 7.1, "sem": 0.2}

Each row is edited with noise that follows from the seed and the row, the same for every model, so that differences of
two evaluations can be taken row by row. Made data is scored exactly, by the scene reward; anything else by a judge that
is asked for. The folder gets `rows.jsonl` while it works, and `results.json`, `images/FILE/INDEX.png` and `grid.png`;
an evaluation that was stopped goes on with the same settings.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from uniref_fast import __version__
from uniref_fast.adapters import check_adapters
from uniref_fast.data.dataset import Dataset, RowError
from uniref_fast.data.images import ImageSource
from uniref_fast.edit import edit
from uniref_fast.evaluation import model as models
from uniref_fast.evaluation import report
from uniref_fast.evaluation.config import EvalConfig
from uniref_fast.evaluation.journal import Journal
from uniref_fast.evaluation.metrics import judged, measured, scored, through_vae
from uniref_fast.evaluation.requests import Planned, files_of, plan, refusal
from uniref_fast.files import write_whole
from uniref_fast.models.single_frame import single_frame
from uniref_fast.request import EditRequest, image_areas, validated
from uniref_fast.rewards.functions import reward_function
from uniref_fast.rewards.judge import Judge
from uniref_fast.rewards.log import PASSING
from uniref_fast.rewards.types import Candidate, Failure, Scores
from uniref_fast.scenes.scene import crop_box

__all__ = ["EvalConfig", "evaluate"]

GREY = (128, 128, 128)
JUDGED_BY = ("model", "temperature", "seed", "max_tokens", "samples", "max_side", "json_mode")  # what may change scores


def evaluate(config: EvalConfig, progress: bool = False) -> dict[str, Any]:
    """Evaluate, or go on with it, and write the folder.

    Args:
        config: what and how.
        progress: show a bar on stderr.

    Returns:
        What `results.json` holds: "settings", "versions", "aggregates" (see `benchmark_report.aggregates`), "overall"
        (the same of all files as one), "comparison" (see `benchmark_report.compare`; None without `against`, now or
        before), "rows", of which those that cannot be evaluated have an "error", and "left_out", files without rows.

    Raises:
        ValueError, TypeError: for what the caller can put right.
        OSError: when the results cannot be written.
    """
    return _Evaluation(config).results(progress)


class _Evaluation:
    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        for path in config.data:
            if path.is_dir() and config.out.resolve().is_relative_to(path.resolve()):
                raise ValueError(
                    f"out {config.out} lies in {path}, where its files would be taken for rows; name another"
                )
        self.device, self.dtype = models.on_device(config.device, config.dtype)
        self.dataset = Dataset(config.data, config.image_folder, "optional", config.columns)
        self.files = files_of(self.dataset, config.limit, config.language)
        models.check_runs(config.initial, config.model)
        self.adapters = config.adapters
        check_adapters(self.adapters, config.model, config.initial)
        self.own = {name: reward_function(name) for name in config.rewards}
        self.reward = config.reward or self._usual_reward()
        if config.reward == "scene":
            self._all_have_scenes()
        self.settings = self._settings()
        self._seen: set[tuple[str, int]] = set()  # whose images can be read
        self.other = None if config.against is None else report.read_results(config.against)
        if self.other is not None:
            self.files_there = report.same_files(self.settings, self.other["settings"])
            self._check_against(self.other)
        _writable(config.out)
        self.journal = Journal(config.out, self.settings)

    def results(self, progress: bool) -> dict[str, Any]:
        with contextlib.closing(self.journal):
            worked = any(self._open(label, numbers) for label, numbers in self.files.items())
            if worked:
                self._work(progress)
        rows = [self.journal.rows[label, i] for label, numbers in self.files.items() for i in range(len(numbers))]
        made: dict[str, Any] = {
            "format": report.FORMAT,
            "settings": self.settings,
            "versions": _versions(),
            "aggregates": report.aggregates(rows),
            "overall": report.parts(rows),
            "comparison": None if worked else self._earlier_comparison(),
            "rows": rows,
            "left_out": [list(one) for one in self.dataset.left_out],
        }
        self._write(made)
        if self.config.grid and (shown := list(self._shown())):
            sheet = report.sheet(shown)
            write_whole(self.config.out / "grid.png", lambda file: sheet.save(file, "PNG"))
        if self.other is not None:  # after what cost the time is safe
            differing = report.unlike(self.settings, self.other["settings"])
            compared = report.compare(rows, self.other["rows"], str(self.config.against), self.files_there)
            made["comparison"] = compared | {"settings": differing}
            self._write(made)
        return made

    def _write(self, made: dict[str, Any]) -> None:
        text = json.dumps(made, indent=1, allow_nan=False)
        write_whole(self.config.out / "results.json", lambda file: file.write(text.encode()))

    def _earlier_comparison(self) -> Any:
        """Of the same rows, made by an earlier call."""
        try:
            return json.loads((self.config.out / "results.json").read_bytes())["comparison"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # ---- before the work ----

    def _usual_reward(self) -> str:
        """By the first row of each file that can be read."""
        for numbers in self.files.values():
            for number in numbers:
                with contextlib.suppress(RowError):
                    row = self.dataset[number]
                    if row.scene is not None and row.target is not None:
                        return "scene"
                    break
        return "none"

    def _all_have_scenes(self) -> None:
        for numbers in self.files.values():
            for number in numbers:
                with contextlib.suppress(RowError):
                    row = self.dataset[number]
                    if lacking := [name for name in ("scene", "target") if getattr(row, name) is None]:
                        raise ValueError(
                            f"{row.where} has no {lacking[0]}; the scene reward needs rows as `uniref-fast data make` "
                            "writes them; use the judge, or none"
                        )

    def _settings(self) -> dict[str, Any]:
        """All that may change results."""
        config, judge = self.config, self.config.judge
        return {
            "files": {label: len(numbers) for label, numbers in self.files.items()},
            "data": dict(zip(self.files, self.dataset.contents, strict=True)),
            "limit": config.limit,
            "model": config.model,
            "initial": [str(run) for run in config.initial],
            "weights": models.files_digest(config.model, config.initial, self.adapters),
            "baseline": config.baseline,
            "reward": self.reward,
            "judge": {name: getattr(judge, name) for name in JUDGED_BY} if self.reward == "judge" else None,
            "steps": config.all_steps if config.runs_model else None,
            "guidance": config.scale if config.runs_model else None,
            "budget": config.budget,
            "target_side": config.target_side,
            "size": None if config.size is None else list(config.size),
            "language": config.language,
            "seed": config.seed if config.runs_model else None,
            "visibility": config.resolve_visibility() if config.runs_model else None,
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            **({"lora": [f"{one.given}:{one.scale:g}" for one in self.adapters]} if self.adapters else {}),
            **({"rewards": list(config.rewards)} if config.rewards else {}),
        }

    def _check_against(self, other: dict[str, Any]) -> None:
        """Now rather than after hours."""
        report.check_comparable(self.settings, other["settings"])
        known = {report.identity(row) for row in other["rows"]}
        for label, numbers in self.files.items():
            for i, number in enumerate(numbers):
                with contextlib.suppress(RowError):
                    row = {
                        "file": self.files_there.get(label),
                        "index": i,
                        "instruction": self.dataset[number].instruction,
                    }
                    if report.identity(row) in known:
                        return
        raise ValueError(f"no rows of {self.config.against} are the same as here (file, index and instruction)")

    # ---- the work ----

    def _open(self, label: str, numbers: Sequence[int]) -> list[int]:
        """Indices of the rows that are not done."""
        return [i for i in range(len(numbers)) if not self._is_done(label, i)]

    def _is_done(self, label: str, i: int) -> bool:
        """A row that could not be read may be mended meanwhile, and a judge that was away may be back."""
        record = self.journal.rows.get((label, i), {"error": "not yet"})
        if "error" in record or record.get("failure", {}).get("kind") in PASSING:
            return False
        return self._made_already(label, i)

    def _made_already(self, label: str, i: int) -> bool:
        """Also not where what is there is no picture: it is made again."""
        if (label, i) in self._seen:
            return True
        try:
            self._read(label, i)
        except ValueError:
            return False
        self._seen.add((label, i))
        return True

    def _work(self, progress: bool) -> None:
        from tqdm import tqdm

        config = self.config
        total = sum(len(self._open(label, numbers)) for label, numbers in self.files.items())
        with contextlib.ExitStack() as stack:
            judge = None
            if self.reward == "judge":
                log = config.out / "judge.jsonl"
                judge = stack.enter_context(Judge(config.judge, log, earlier=[log] if log.exists() else []))
                judge.check()
            self._load()
            stack.enter_context(single_frame(self.pipe.vae))
            bar = stack.enter_context(tqdm(total=total, desc="rows", unit="row", disable=None if progress else True))
            waiting: deque[list[tuple[dict[str, Any], Future[Scores | Failure] | None]]] = deque()
            for label, numbers in self.files.items():
                for first in range(0, len(numbers), config.batch):  # the same packs however often it is stopped
                    indices = range(first, min(first + config.batch, len(numbers)))
                    waiting.append([self._scored(judge, *one) for one in self._made(label, indices)])
                    if judge is None or len(waiting) > 1:  # a judge works on these while the next are made
                        self._keep(waiting.popleft(), bar)
            while waiting:
                self._keep(waiting.popleft(), bar)

    def _load(self) -> None:
        config = self.config
        untrained = config.baseline == "untrained"
        self.pipe = models.load(config.model, config.initial, untrained, self.device, self.dtype, self.adapters)
        if config.runs_model:
            validated([EditRequest("x", num_inference_steps=config.all_steps)], self.pipe)
        self.target_side = config.target_side or math.isqrt(image_areas(self.pipe)[-1])
        self.journal.check_weights(models.weights_digest(self.pipe))

    def _made(self, label: str, indices: Sequence[int]) -> Iterator[tuple[dict[str, Any], Planned | None]]:
        """Open rows of a batch: the beginnings of their records, and their plans; those that cannot be read without.

        All rows of the batch are edited when one has no image yet.
        """
        numbers, plans, records = self.files[label], {}, {}
        to_do = [i for i in indices if not self._is_done(label, i)]
        for i in indices if to_do else ():
            records[i] = {"file": label, "index": i, "where": self.dataset.where(numbers[i])}
            try:
                plans[i] = self._plan(label, i)
            except ValueError as error:
                reason = error.reason if isinstance(error, RowError) else str(error)
                records[i]["error"] = reason
        lacking = [i for i in plans if i in to_do and not self._made_already(label, i)]
        if lacking:
            for i, image in self._edited(plans, records).items():
                if i in lacking:
                    write_whole(self._image(label, i), functools.partial(image.save, format="PNG"))
        for i in to_do:
            yield records[i], plans.get(i)

    def _plan(self, label: str, i: int) -> Planned:
        config = self.config
        planned = plan(
            self.pipe,
            self.dataset[self.files[label][i]],
            (report.file_name(label), i),
            target_side=self.target_side,
            budget=None if config.budget is None else config.budget**2,
            seed=config.seed,
            steps=config.all_steps,
            guidance=config.scale,
            size=config.size,
        )
        if config.baseline == "vae" and planned.target is None:
            raise ValueError("no target picture, which the baseline vae needs")
        return planned

    def _edited(self, plans: dict[int, Planned], records: dict[int, dict[str, Any]]) -> dict[int, Image.Image]:
        """Results of the plans; those that the text encoder refuses leave the plans, with the reason as their error."""
        try:
            return dict(zip(plans, self._images(list(plans.values())), strict=True))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, IndexError, RuntimeError):
            refused = {i: reason for i, planned in plans.items() if (reason := refusal(self.pipe, planned))}
            if not refused:
                raise
        for i, reason in refused.items():
            records[i]["error"] = reason
            del plans[i]
        return self._edited(plans, records) if plans else {}

    def _images(self, plans: Sequence[Planned]) -> list[Image.Image]:
        config = self.config
        if config.baseline == "input":
            return [_pasted(planned) for planned in plans]
        if config.baseline == "vae":
            return [through_vae(self.pipe, planned.target) for planned in plans if planned.target is not None]
        budget = None if config.budget is None else config.budget**2
        requests = [planned.request for planned in plans]
        return edit(self.pipe, requests, budget=budget, max_tokens=config.pack_tokens,
                    visibility=config.resolve_visibility(), progress=False)  # fmt: skip

    def _image(self, label: str, i: int) -> Path:
        return self.config.out / "images" / label / f"{i}.png"

    def _read(self, label: str, i: int) -> Image.Image:
        """The picture that was made. Raises ValueError without one that can be read."""
        path = self._image(label, i)
        return ImageSource(str(path), path).load()

    def _scored(
        self, judge: Judge | None, record: dict[str, Any], planned: Planned | None
    ) -> tuple[dict[str, Any], Future[Scores | Failure] | None]:
        """The record with its measures, and what the judge will say."""
        if planned is None:
            return record, None
        row, (label, i) = planned.row, (record["file"], record["index"])
        made = self._read(label, i)
        record |= {
            "instruction": row.instruction,
            "task": row.task_type or "none",
            **{name: value for name in ("key", "language") if (value := getattr(row, name)) is not None},
            "references": len(row.references),
            "size": list(made.size),
            "seed": planned.request.seed if self.config.runs_model else None,
        }
        bound = None if planned.target is None else through_vae(self.pipe, planned.target)
        try:
            record |= measured(planned, made, bound, self.reward == "scene")
        except ValueError as error:
            return {**record, "error": error.reason if isinstance(error, RowError) else str(error)}, None
        key = (list(self.files).index(label), i)
        candidate = Candidate(key, row.instruction, tuple(planned.request.images), made, row)
        if self.own:
            record["own"] = {name: scored(reward(candidate)) for name, reward in self.own.items()}
        return record, None if judge is None else judge.submit(candidate, step=0)

    def _keep(self, done: Sequence[tuple[dict[str, Any], Future[Scores | Failure] | None]], bar: Any) -> None:
        for record, future in done:
            self.journal.add(record if future is None else record | judged(future.result()))
            bar.update()

    def _shown(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, Image.Image]]]]:
        """The first rows of each file with their pictures: made, target, references."""
        for label, numbers in self.files.items():
            whole = [i for i in range(len(numbers)) if "error" not in self.journal.rows[label, i]]
            for i in whole[: self.config.grid]:
                row = self.dataset[numbers[i]]
                pictures = [("made", self._read(label, i))]
                if row.target is not None:
                    pictures.append(("target", row.target.load()))
                pictures += [(f"picture {k}", source.load()) for k, source in enumerate(row.references, start=1)]
                yield self.journal.rows[label, i], pictures


def _pasted(planned: Planned) -> Image.Image:
    """What there is before anything is done: the picture whose background is asked for, cropped to the result's aspect
    ratio."""
    images = planned.request.images
    if not images:
        return Image.new("RGB", planned.size, GREY)
    ground = (planned.row.scene or {}).get("background")
    number = ground.get("picture") if isinstance(ground, Mapping) else None
    picture = images[number - 1 if isinstance(number, int) and 0 < number <= len(images) else 0]
    return picture.resize(planned.size, Image.Resampling.LANCZOS, box=crop_box(picture.size, planned.size))


def _writable(folder: Path) -> None:
    """Make the folder; fail before the work when results could not be written after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {folder} cannot be made: {error.strerror}; name a folder that can be") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"out {folder} cannot be written to; name a folder that can")


def _versions() -> dict[str, str]:
    libraries = ("torch", "diffusers", "transformers", "numpy", "pillow")
    found = {name: importlib.metadata.version(name) for name in libraries}
    return {"uniref_fast": __version__, "python": platform.python_version(), **found}
