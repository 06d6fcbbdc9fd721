"""The command `uniref-fast data encode`: fill the cache that a training run reads, before the run starts.

    uniref-fast data encode --recipe lora --data rows.jsonl --cache cache
    torchrun --nproc-per-node 8 -m uniref_fast data encode --recipe lora --data rows.jsonl --cache cache

It takes the flags of `training/sft.py`, or after `msgrpo` those of `training/msgrpo.py`, and encodes every row in all
forms that a run with these settings may draw, whatever its seed and its steps are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uniref_fast import flags
from uniref_fast.data.readers import escape_controls
from uniref_fast.gpu_memory import size_text
from uniref_fast.plan import KINDS, split_kind
from uniref_fast.progress import announce_import, launcher_rank
from uniref_fast.training.core import resume
from uniref_fast.training.core.recipe import Recipe
from uniref_fast.training.core.suitability import check_model
from uniref_fast.training.rl.recipes import MSGRPO
from uniref_fast.training.supervised.recipes import SFT

__all__ = ["rows_of", "run"]

DESCRIPTION = (
    "Encode the images and prompts of a dataset into the folder --cache, which training reads later. `data encode sft` "
    "(the default) takes the flags of training/sft.py, `data encode msgrpo` those of training/msgrpo.py. Each row is "
    "encoded at the sizes of all stages, and without its text and its references where the run may drop them. A "
    "command that was interrupted continues where it was. The exit status is 1 if there are broken rows."
)
SHOWN = 20  # broken rows that are listed


def run(argv: Sequence[str]) -> int:
    """Encode the rows of a run; return 0, or 1 if there are broken rows.

    Args:
        argv: Arguments after `uniref-fast data encode`.
    """
    kind, words = split_kind(argv)
    config: Recipe = flags.parse(
        KINDS[kind], words, prog=f"uniref-fast data encode {kind}", description=DESCRIPTION, renamed=resume.RENAMED
    ).config
    if config.cache is None:
        raise ValueError("no folder to write to: give --cache DIR, and the same to the training command")
    if not config.data or "builtin" in config.data:
        raise ValueError(
            "no rows to encode: give --data FILE_OR_FOLDER; the rows of --data builtin are generated when a run starts"
        )
    rank = launcher_rank()
    if not rank:
        announce_import("PyTorch", "torch")
    check_model(config)  # encoding does not need what check_suitability checks besides
    import torch
    import torch.distributed as dist

    from uniref_fast.loading import load_encoders
    from uniref_fast.models.single_frame import single_frame
    from uniref_fast.training.batches.encoding import EncodingPass
    from uniref_fast.training.batches.latent_cache import TensorCache
    from uniref_fast.training.batches.samples import Encoder
    from uniref_fast.training.core.distributed import Ranks

    ranks = Ranks.start()
    try:
        rows = rows_of(config)
        pipe = load_encoders(config.model, getattr(torch, config.dtype), str(ranks.device))
        with single_frame(pipe.vae):  # as in training: the same bits
            report = EncodingPass(Encoder(pipe, TensorCache(config.cache)), ranks, config.workers).run(rows)
    finally:
        dist.destroy_process_group()
    if not rank:
        for where, reason in report.broken[:SHOWN]:
            print(escape_controls(f"broken: {where}: {reason}"), file=sys.stderr)
        if len(report.broken) > SHOWN:
            print(f"and {len(report.broken) - SHOWN} more broken rows", file=sys.stderr)
        print(
            f"{escape_controls(config.cache)}: {report.rows:,} row(s), {report.encoded:,} encoded now "
            f"({size_text(report.written)}), {len(report.broken):,} broken"
        )
    return 1 if report.broken else 0


def rows_of(config: Recipe) -> list[Any]:
    """Return the rows of a configuration with all forms that a run may draw for them, held-out rows included."""
    from uniref_fast.data.dataset import Dataset
    from uniref_fast.training.batches.encoding import RowForms, all_forms, heldout_rows
    from uniref_fast.training.batches.heldout import heldout_count, heldout_datasets

    targets: Any = "required" if isinstance(config, SFT) else "optional"
    dataset = Dataset(config.data, config.image_folder, targets, config.columns)
    heldout = heldout_datasets(map(Path, config.heldout), config, targets)
    if isinstance(config, SFT):
        forms = all_forms(config.stages, config.drop_text, config.drop_references)
        rows = [RowForms(dataset, index, forms) for index in range(len(dataset))]
        return rows + heldout_rows(heldout, config, target=True, guided=config.sample_count)
    assert isinstance(config, MSGRPO)
    rows = []
    for index in range(len(dataset)):
        try:
            count = len(dataset[index].references)
            stages = [stage for stage in config.stages if stage.uses(count)]
        except (ValueError, OSError):  # the pass reports it
            stages = list(config.stages)
        if stages:
            rows.append(RowForms(dataset, index, all_forms(stages), False, config.rollout_true_cfg_scale))
    return rows + heldout_rows(heldout, config, target=False, guided=heldout_count(config))
