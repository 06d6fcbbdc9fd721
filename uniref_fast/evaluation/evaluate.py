"""Evaluation of a model on held-out rows: `uniref-fast eval heldout_objects.jsonl --model builtin --out results/`.

    results = evaluate(EvalConfig((Path("heldout_objects.jsonl"),), Path("results"), initial=(Path("runs/mine"),)))
    results["aggregates"]["heldout_objects"]["all"]["scores"]["mean"]  # {"n": 64, "mean": 7.1, "sem": 0.2}

The noise of a row follows from the seed and the row. It is the same for every model, so that two evaluations can be
compared row by row. Synthetic rows are scored exactly, by the scene reward; other rows can be scored by a judge. While
the evaluation works it appends to `rows.jsonl`; at the end it writes `results.json` and `grid.png`. Images are in
`images/FILE/INDEX.png`. An interrupted evaluation continues when it is started with the same settings.
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
from collections.abc import Iterator, Sequence
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
from uniref_fast.encode import to_rgb
from uniref_fast.evaluation import compare, report
from uniref_fast.evaluation import model as models
from uniref_fast.evaluation.aggregate import aggregates, breakdown
from uniref_fast.evaluation.config import EvalConfig
from uniref_fast.evaluation.journal import Journal
from uniref_fast.evaluation.metrics import measure, own_reward_record, reward_record, through_vae
from uniref_fast.evaluation.requests import EvalRequest, encoder_refusal, eval_request, input_baseline, rows_by_file
from uniref_fast.fast import check_supported
from uniref_fast.files import created_folders, write_whole
from uniref_fast.models.single_frame import single_frame
from uniref_fast.patch import patch
from uniref_fast.progress import running
from uniref_fast.request import EditRequest, check_steps, image_areas, validated
from uniref_fast.rewards.functions import reward_function
from uniref_fast.rewards.judge import Judge
from uniref_fast.rewards.log import PASSING
from uniref_fast.rewards.types import Candidate, Failure, Scores

__all__ = ["EvalConfig", "evaluate"]

# Settings of the judge that may change its scores.
JUDGE_SETTINGS = ("model", "temperature", "seed", "max_tokens", "samples", "max_side", "json_mode")


def evaluate(config: EvalConfig, progress: bool = False) -> dict[str, Any]:
    """Evaluate a model and write the results into a folder, or continue an evaluation that was interrupted.

    Args:
        config: The model, the data, the reward and the folder.
        progress: Show a progress bar on stderr.

    Returns:
        The content of `results.json`:
            "settings", "versions": Settings that may change the results, and versions of the libraries.
            "aggregates", "overall": Means by file, and of all files together, see `aggregate.breakdown`.
            "comparison": Differences to another evaluation, see `compare.compare`; None if none was given, now or in
                an earlier call.
            "rows": Records of the rows; those of rows that cannot be evaluated have an "error".
            "left_out": Files without rows, and why they are left out.

    Raises:
        ValueError, TypeError: The configuration or the data are wrong; the message says what to change.
        OSError: The results cannot be written.
    """
    return _Evaluation(config, progress).run(progress)


class _Evaluation:
    def __init__(self, config: EvalConfig, progress: bool) -> None:
        self.config = config
        for path in config.data:
            if path.is_dir() and config.out.resolve().is_relative_to(path.resolve()):
                raise ValueError(
                    f"out {config.out} is inside the data folder {path}, where its files would be read as rows; name "
                    "another folder"
                )
        self.device, self.dtype = models.on_device(config.device, config.dtype)
        if config.mode == "fast":
            check_supported(self.device, config.impl)
        with running("reading the rows", shown=progress):
            self.dataset = Dataset(config.data, config.image_folder, "optional", config.columns)
            self.files = rows_by_file(self.dataset, config.limit, config.language)
        models.check_runs(config.initial, config.model)
        self.adapters = config.adapters
        check_adapters(self.adapters, config.model, config.initial)
        self.own = {name: reward_function(name) for name in config.rewards}
        self.reward = config.reward or self._default_reward()
        if config.reward == "scene":
            self._check_scenes()
        self.budget, side = config.resolve_sizes()
        self.settings = self._settings(side)
        self._readable: set[tuple[str, int]] = set()  # rows whose results are on the disk and can be read
        self.other = None if config.against is None else compare.read_results(config.against)
        if self.other is not None:
            self.files_there = compare.matching_files(self.settings, self.other["settings"])
            self._check_against(self.other)

    def run(self, progress: bool) -> dict[str, Any]:
        with _writable(self.config.out), Journal(self.config.out, self.settings) as self.journal:
            return self._run(progress)

    def _run(self, progress: bool) -> dict[str, Any]:
        unfinished = any(self._unfinished(label, range(len(numbers))) for label, numbers in self.files.items())
        if unfinished:
            self._evaluate_rows(progress)
        rows = [self.journal.rows[label, i] for label, numbers in self.files.items() for i in range(len(numbers))]
        results: dict[str, Any] = {
            "format": compare.FORMAT,
            "settings": self.settings,
            "versions": _versions(),
            "aggregates": aggregates(rows),
            "overall": breakdown(rows),
            "comparison": None if unfinished else self._earlier_comparison(),
            "rows": rows,
            "left_out": [list(one) for one in self.dataset.left_out],
        }
        self._write(results)
        if self.config.grid and (shown := list(self._grid_rows())):
            sheet = report.sheet(shown, self.settings)
            write_whole(self.config.out / "grid.png", lambda file: sheet.save(file, "PNG"))
        if self.other is not None:  # last, so that an error here costs no results
            differing = compare.differing_settings(self.settings, self.other["settings"])
            compared = compare.compare(rows, self.other["rows"], str(self.config.against), self.files_there)
            results["comparison"] = compared | {"settings": differing}
            self._write(results)
        return results

    def _write(self, results: dict[str, Any]) -> None:
        text = json.dumps(results, indent=1, allow_nan=False)
        write_whole(self.config.out / "results.json", lambda file: file.write(text.encode()))

    def _earlier_comparison(self) -> Any:
        """Return the comparison that an earlier call wrote for the same rows, or None."""
        try:
            return json.loads((self.config.out / "results.json").read_bytes())["comparison"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # ---- checks before the work ----

    def _default_reward(self) -> str:
        """Return "scene" if the first readable row of a file has a scene and a target, else "none"."""
        for numbers in self.files.values():
            for number in numbers:
                with contextlib.suppress(RowError):
                    row = self.dataset[number]
                    if row.scene is not None and row.target is not None:
                        return "scene"
                    break
        return "none"

    def _check_scenes(self) -> None:
        """Raise ValueError if a row has no scene or no target, which the scene reward needs."""
        for numbers in self.files.values():
            for number in numbers:
                with contextlib.suppress(RowError):
                    row = self.dataset[number]
                    if lacking := [name for name in ("scene", "target") if getattr(row, name) is None]:
                        raise ValueError(
                            f"{row.where} has no {lacking[0]}; the scene reward needs rows of `uniref-fast data make`; "
                            "use --reward judge or --reward none"
                        )

    def _settings(self, target_side: int | None) -> dict[str, Any]:
        """Return all settings that may change the results."""
        config, judge = self.config, self.config.judge
        steps, scale = config.resolve_sampling()
        return {
            "files": {label: len(numbers) for label, numbers in self.files.items()},
            "data": dict(zip(self.files, self.dataset.contents, strict=True)),
            "limit": config.limit,
            "model": config.model,
            "initial": [str(run) for run in config.initial],
            "weights": models.files_digest(config.model, config.initial, self.adapters),
            "baseline": config.baseline,
            "reward": self.reward,
            "judge": {name: getattr(judge, name) for name in JUDGE_SETTINGS} if self.reward == "judge" else None,
            "num_inference_steps": steps if config.runs_model else None,
            "true_cfg_scale": scale if config.runs_model else None,
            "budget": self.budget,
            "target_side": target_side,
            "width": config.width,
            "height": config.height,
            "language": config.language,
            "seed": config.seed if config.runs_model else None,
            "visibility": config.resolve_visibility() if config.runs_model else None,
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            **({"lora": [f"{one.given}:{one.scale:g}" for one in self.adapters]} if self.adapters else {}),
            **({"rewards": list(config.rewards)} if config.rewards else {}),
            **({"quantisation": config.quantisation} if config.quantisation else {}),
            **({"mode": config.mode} if config.mode != "exact" else {}),
            **({"impl": config.impl} if config.impl and config.runs_model else {}),
            **({"keep_references": [config.keep, config.drift, config.keep_dtype]} if config.keep else {}),
        }

    def _check_against(self, other: dict[str, Any]) -> None:
        """Check before the work that the evaluations can be compared after it."""
        compare.check_comparable(self.settings, other["settings"])
        compare.check_common_rows(self._readable_rows(), other["rows"], self.files_there, str(self.config.against))

    def _readable_rows(self) -> Iterator[dict[str, Any]]:
        for label, numbers in self.files.items():
            for i, number in enumerate(numbers):
                with contextlib.suppress(RowError):
                    yield {"file": label, "index": i, "instruction": self.dataset[number].instruction}

    # ---- the work ----

    def _unfinished(self, label: str, indices: Sequence[int]) -> list[int]:
        """Return the indices of rows that are to be evaluated."""
        return [i for i in indices if not self._is_finished(label, i)]

    def _is_finished(self, label: str, i: int) -> bool:
        """Return True if a row has its final record and its image.

        Rows that could not be read may have been repaired, and a judge that did not answer may answer now.
        """
        record = self.journal.rows.get((label, i), {"error": "not evaluated"})
        if "error" in record or record.get("failure", {}).get("kind") in PASSING:
            return False
        return self._has_image(label, i)

    def _has_image(self, label: str, i: int) -> bool:
        """Return True if a row's result exists; if the file is not a readable image, it is generated again."""
        if (label, i) in self._readable:
            return True
        try:
            self._read_image(label, i)
        except ValueError:
            return False
        self._readable.add((label, i))
        return True

    def _evaluate_rows(self, progress: bool) -> None:
        config = self.config
        total = sum(len(self._unfinished(label, range(len(numbers)))) for label, numbers in self.files.items())
        with contextlib.ExitStack() as stack:
            judge = None
            if self.reward == "judge":
                log = config.out / "judge.jsonl"
                judge = stack.enter_context(Judge(config.judge, log, earlier=[log] if log.exists() else []))
                judge.check()
            self._load(progress)
            stack.enter_context(single_frame(self.pipe.vae))
            bar = stack.enter_context(running("evaluating", total, "row", progress))
            waiting: deque[list[tuple[dict[str, Any], Future[Scores | Failure] | None]]] = deque()
            for label, numbers in self.files.items():
                # A batch has the same rows, and so the same packs, however often the evaluation is interrupted.
                for first in range(0, len(numbers), config.batch):
                    indices = range(first, min(first + config.batch, len(numbers)))
                    waiting.append([self._score(judge, *one) for one in self._edit_batch(label, indices)])
                    if judge is None or len(waiting) > 1:  # the judge scores one batch while the next is edited
                        self._keep(waiting.popleft(), bar)
            while waiting:
                self._keep(waiting.popleft(), bar)

    def _load(self, progress: bool) -> None:
        config = self.config
        untrained = config.baseline == "untrained"
        self.pipe = models.load(
            config.model, config.initial, untrained, self.device, self.dtype, self.adapters, config.quantisation
        )
        if config.runs_model:
            steps, _ = config.resolve_sampling()
            validated([EditRequest("x", num_inference_steps=steps)])
            check_steps(self.pipe, steps, config.model)
        self.target_side = self.settings["target_side"] or math.isqrt(image_areas(self.pipe)[-1])
        with running("hashing the weights", shown=progress):
            digest = models.weights_digest(self.pipe)
        self.journal.check_weights(digest)
        if config.mode == "fast":
            patch(self.pipe, mode="fast", impl=config.impl)  # once, instead of in each call of edit()

    def _edit_batch(self, label: str, indices: Sequence[int]) -> Iterator[tuple[dict[str, Any], EvalRequest | None]]:
        """Generate the images of a batch and yield the beginning of each unfinished row's record with its request.

        The request is None if the row cannot be evaluated. All rows of the batch are edited if one of them lacks its
        image, because the packs of the batch must not depend on interruptions.
        """
        numbers, requests, records = self.files[label], {}, {}
        unfinished = self._unfinished(label, indices)
        for i in indices if unfinished else ():
            records[i] = {"file": label, "index": i, "where": self.dataset.where(numbers[i])}
            try:
                requests[i] = self._request(label, i)
            except ValueError as error:
                records[i]["error"] = error.reason if isinstance(error, RowError) else str(error)
        missing = [i for i in requests if i in unfinished and not self._has_image(label, i)]
        if missing:
            for i, image in self._edit(requests, records).items():
                if i in missing:
                    write_whole(self._image_path(label, i), functools.partial(image.save, format="PNG"))
        for i in unfinished:
            yield records[i], requests.get(i)

    def _request(self, label: str, i: int) -> EvalRequest:
        config = self.config
        steps, scale = config.resolve_sampling()
        request = eval_request(
            self.pipe,
            self.dataset[self.files[label][i]],
            (compare.file_name(label), i),
            target_side=self.target_side,
            budget=self.budget,
            seed=config.seed,
            num_inference_steps=steps,
            true_cfg_scale=scale,
            size=config.size,
        )
        if config.baseline == "vae" and request.target is None:
            raise ValueError("no target image, which the baseline vae needs")
        return request

    def _edit(self, requests: dict[int, EvalRequest], records: dict[int, dict[str, Any]]) -> dict[int, Image.Image]:
        """Return the images of the requests.

        Requests that the text encoder refuses are taken out of `requests`, and the reason is written to their records.
        """
        try:
            return dict(zip(requests, self._images(list(requests.values())), strict=True))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, IndexError, RuntimeError):
            pipe, budget = self.pipe, self.budget
            refused = {i: reason for i, one in requests.items() if (reason := encoder_refusal(pipe, one, budget))}
            if not refused:
                raise
        for i, reason in refused.items():
            records[i]["error"] = reason
            del requests[i]
        return self._edit(requests, records) if requests else {}

    def _images(self, requests: Sequence[EvalRequest]) -> list[Image.Image]:
        config = self.config
        if config.baseline == "input":
            return [input_baseline(one) for one in requests]
        if config.baseline == "vae":
            return [through_vae(self.pipe, one.target) for one in requests if one.target is not None]
        return edit(
            self.pipe,
            [one.request for one in requests],
            budget=self.budget,
            pack_tokens=config.pack_tokens,
            visibility=config.resolve_visibility(),
            mode=config.mode,
            impl=config.impl,
            progress=False,
            keep_references=config.keep,
            drift=config.drift,
            keep_dtype=config.keep_dtype,
        )

    def _image_path(self, label: str, i: int) -> Path:
        return self.config.out / "images" / label / f"{i}.png"

    def _read_image(self, label: str, i: int) -> Image.Image:
        """Return the result of a row. Raises ValueError if there is no image that can be read."""
        path = self._image_path(label, i)
        return ImageSource(str(path), path).load()

    def _score(
        self, judge: Judge | None, record: dict[str, Any], request: EvalRequest | None
    ) -> tuple[dict[str, Any], Future[Scores | Failure] | None]:
        """Return the record with its measures, and the future of the judge's scores if there is a judge."""
        if request is None:
            return record, None
        row, (label, i) = request.row, (record["file"], record["index"])
        image = self._read_image(label, i)
        record |= {
            "instruction": row.instruction,
            "task": row.task_type or "none",
            **{name: value for name in ("key", "language") if (value := getattr(row, name)) is not None},
            "references": len(row.references),
            "size": list(image.size),
            "seed": request.request.seed if self.config.runs_model else None,
        }
        bound = None if request.target is None else through_vae(self.pipe, request.target)
        try:
            record |= measure(request, image, bound, self.reward == "scene")
        except ValueError as error:
            return {**record, "error": error.reason if isinstance(error, RowError) else str(error)}, None
        key = (list(self.files).index(label), i)
        candidate = Candidate(key, row.instruction, tuple(map(to_rgb, request.request.images)), image, row)
        if self.own:
            record["own"] = {name: own_reward_record(reward(candidate)) for name, reward in self.own.items()}
        return record, None if judge is None else judge.submit(candidate, step=0)

    def _keep(self, batch: Sequence[tuple[dict[str, Any], Future[Scores | Failure] | None]], bar: running) -> None:
        for record, future in batch:
            self.journal.add(record if future is None else record | reward_record(future.result()))
            bar.update()

    def _grid_rows(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, Image.Image]]]]:
        """Yield the first rows of each file with their images: result, target, references."""
        for label, numbers in self.files.items():
            whole = [i for i in range(len(numbers)) if "error" not in self.journal.rows[label, i]]
            for i in whole[: self.config.grid]:
                row = self.dataset[numbers[i]]
                images = [("result", self._read_image(label, i))]
                if row.target is not None:
                    images.append(("target", row.target.load()))
                images += [(f"picture {k}", source.load()) for k, source in enumerate(row.references, start=1)]
                yield self.journal.rows[label, i], images


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Create the folder, and remove it again if the block raises and leaves it empty.

    Raises:
        ValueError: The results could not be written; raised before the work.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(created_folders(folder))
        except OSError as error:
            raise ValueError(f"out {folder} cannot be created: {error.strerror}; name another folder") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"out {folder} is not writable; name another folder")
        yield


def _versions() -> dict[str, str]:
    libraries = ("torch", "diffusers", "transformers", "numpy", "pillow")
    found = {name: importlib.metadata.version(name) for name in libraries}
    return {"uniref_fast": __version__, "python": platform.python_version(), **found}
