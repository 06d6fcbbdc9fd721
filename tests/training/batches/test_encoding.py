"""The encoding pass: what it leaves in the cache, what it refuses, and how ranks share it."""

import dataclasses
import json
import shutil
import threading
from collections import namedtuple

import pytest
import torch
from PIL import Image
from synthetic import synthetic_sample

from uniref_fast import cli, encode_rows
from uniref_fast.data.dataset import Dataset
from uniref_fast.data.images import ImageSource
from uniref_fast.training.batches import encoding, samples
from uniref_fast.training.batches.encoding import EncodingPass, RowForms, all_forms, heldout_rows
from uniref_fast.training.batches.heldout import heldout_count
from uniref_fast.training.batches.latent_cache import CacheError, TensorCache
from uniref_fast.training.batches.samples import Encoder, Form
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT_RECIPES

pytestmark = pytest.mark.usefixtures("threads")
STAGES = (BudgetStage(48, 1, 1.0, target_side=32), BudgetStage(None, 1, 1.0, target_side=48))
Usage = namedtuple("Usage", "total used free")


class OneRank:
    """The ranks of a run of one process."""

    rank, size = 0, 1

    def gather(self, value):
        return [value]

    def broadcast(self, value):
        return value


class Thread:
    """One of several ranks, which are threads."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    def gather(self, value):
        self.shared["values"][self.rank] = value
        self.shared["barrier"].wait(20)
        values = [self.shared["values"][i] for i in range(self.size)]
        self.shared["barrier"].wait(20)
        return values

    def broadcast(self, value):
        return self.gather(value)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six rows with none, one or two references."""
    folder, rows = tmp_path_factory.mktemp("rows"), []
    for i in range(6):
        scene = synthetic_sample(i, size=64, references=1 + i % 2)
        names = [f"{i}-{j}.png" for j in range(len(scene.references) + 1)]
        for name, image in zip(names, [*scene.references, scene.target], strict=True):
            image.save(folder / name)
        rows.append({"input_images": names[:-1] if i else [], "output_image": names[-1], "instruction": f"do {i}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def wanted(dataset, forms=None, **more):
    forms = all_forms(STAGES, 0.5, 0.5) if forms is None else forms
    return [RowForms(dataset, index, forms, **more) for index in range(len(dataset))]


def run(pipe, cache, rows, ranks=None):
    return EncodingPass(Encoder(pipe, TensorCache(cache)), ranks or OneRank(), 2, shown=False).run(rows)


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.fixture
def no_encoders(monkeypatch):
    """Return a function after whose call nothing can be encoded."""

    def fail(*args, **kwargs):
        pytest.fail("the cache lacks something")

    def forbid():
        for name in ("image_latents", "prompt_embeddings"):
            monkeypatch.setattr(samples, name, fail)

    return forbid


def test_after_the_pass_every_draw_is_read_from_the_cache_with_the_same_bits(
    builtin_pipe, folder, tmp_path, no_encoders
):
    dataset, drops = Dataset([folder / "rows.jsonl"]), {"drop_text": 0.5, "drop_references": 0.5}
    keys = [(epoch, index) for epoch in range(2) for index in (0, 1, 4, 5)]
    fresh, cached = (Encoder(builtin_pipe, TensorCache(where), 7, **drops) for where in (None, tmp_path))

    def encoded(encoder, key, stage):
        prepared = encoder.prepare(dataset[key[1]], key, stage.budget, stage.target_side)
        return encoder.encode(prepared, prepared.load())

    expected = {(key, stage): encoded(fresh, key, stage) for key in keys for stage in STAGES}
    rows = [row for row in wanted(dataset) if row.index in (0, 1, 4, 5)]
    report = run(builtin_pipe, tmp_path, rows)
    assert (report.rows, report.encoded, report.broken) == (4, 4, ())
    assert sum(path.stat().st_blocks * 512 for path in files(tmp_path)) <= report.written, "the disk that it announced"
    no_encoders()
    for (key, stage), tensors in expected.items():
        found = encoded(cached, key, stage)
        assert all(
            torch.equal(getattr(found, name), getattr(tensors, name)) for name in ("target", "references", "text")
        )
    assert run(builtin_pipe, tmp_path, rows) == encoding.EncodingReport(4, 0, 0, ())
    forms = {cached.form(key, 48, 32) for key in keys}
    assert len(forms) > 2, "the keys draw several forms"


def test_texts_of_guidance_are_encoded_and_targets_are_not_needed(builtin_pipe, folder, tmp_path, no_encoders):
    dataset = Dataset([folder / "rows.jsonl"])
    run(builtin_pipe, tmp_path, wanted(dataset, (Form(48, 32),), target=False, true_cfg_scale=2.0))
    no_encoders()
    encoder = Encoder(builtin_pipe, TensorCache(tmp_path))
    prepared = encoder.prepare(dataset[3], (0, 3), 48, 32, rollout=True)
    encoder.encode_conditions(prepared, prepared.load_references())
    encoder.encode_text(prepared, prepared.load_references(), " ")
    with pytest.raises(pytest.fail.Exception):
        encoder.encode(prepared, prepared.load())


def test_a_pass_that_was_interrupted_encodes_only_the_rest(builtin_pipe, folder, tmp_path, monkeypatch):
    rows = wanted(Dataset([folder / "rows.jsonl"]), (Form(48, 32),))
    make, calls = samples.prompt_embeddings, []

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "prompt_embeddings", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(builtin_pipe, tmp_path, rows)
    kept = files(tmp_path)[0]
    assert run(builtin_pipe, tmp_path, rows).encoded == 3
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="it is computed again"):
        report = run(builtin_pipe, tmp_path, rows)
    assert report.encoded == 1 and report.written == -(-kept.stat().st_size // 4096) * 4096


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(builtin_pipe, folder, tmp_path, monkeypatch):
    rows, cache = wanted(Dataset([folder / "rows.jsonl"])), tmp_path / "cache"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 5000))
    with pytest.raises(ValueError, match=rf"encoding needs .* KiB in the cache {cache}, whose disk has 4.9 KiB free"):
        run(builtin_pipe, cache, rows)
    assert not files(cache)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be created: (File exists|Not a directory)"):
        run(builtin_pipe, tmp_path / "file", rows)


def test_a_cache_that_cannot_be_written_ends_the_pass(builtin_pipe, folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uniref_fast.training.batches.latent_cache.write_whole", full)
    with pytest.raises(CacheError, match="cannot be written: No space left on device"):
        run(builtin_pipe, tmp_path, wanted(Dataset([folder / "rows.jsonl"])))


def test_broken_rows_are_named_and_the_others_encoded(builtin_pipe, folder, tmp_path, no_encoders):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    whole = (data / "2-0.png").read_bytes()
    (data / "2-0.png").write_bytes(whole[:-60])  # its header can be read
    (data / "3-1.png").unlink()
    Image.new("RGB", (1200, 4)).save(data / "4-0.png")
    dataset = Dataset([data / "rows.jsonl"])
    report = run(builtin_pipe, tmp_path / "cache", wanted(dataset))
    broken = dict(report.broken)
    assert [where.rpartition(":")[2] for where in sorted(broken)] == ["3", "4", "5"]
    assert "2-0.png" in broken[dataset.where(2)] and "3-1.png" in broken[dataset.where(3)]
    assert "too elongated" in broken[dataset.where(4)]
    no_encoders()
    encoder = Encoder(builtin_pipe, TensorCache(tmp_path / "cache"))
    for index in (0, 1, 5):
        prepared = encoder.prepare(dataset[index], (0, index), 48, 32)
        encoder.encode(prepared, prepared.load())


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_share_the_rows_if_they_see_the_same_folder(builtin_pipe, folder, tmp_path, monkeypatch, shared):
    dataset = Dataset([folder / "rows.jsonl"])
    state = {"values": {}, "barrier": threading.Barrier(2)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    encoded, lock = {0: set(), 1: set()}, threading.Lock()  # a tokenizer serves one thread at a time

    class Recording(EncodingPass):
        def _encode_form(self, one, form, *images):
            encoded[self.ranks.rank].add(one.index)

    class Locked(Encoder):
        def prepare_form(self, *args, **kwargs):
            with lock:
                return super().prepare_form(*args, **kwargs)

        def missing(self, *args):
            with lock:
                return super().missing(*args)

    def work(rank):
        cache = TensorCache(tmp_path if shared else tmp_path / str(rank))
        one = Recording(Locked(builtin_pipe, cache), Thread(rank, 2, state), 2, shown=False)
        reports.append(one.run(wanted(dataset, (Form(48, 32),))))

    reports = []
    threads = [threading.Thread(target=work, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    everything = set(range(6))
    assert encoded == ({0: {0, 2, 4}, 1: {1, 3, 5}} if shared else {0: everything, 1: everything})
    assert len(reports) == 2 and reports[0] == reports[1] and reports[0].encoded == (6 if shared else 12)
    assert not files(tmp_path), "no probe is left"


# ---- which rows and forms ----


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((0, 0), {(False, False)}), ((1, 0), {(True, False)}), ((0.1, 1.0), {(False, True), (True, True)})],
)
def test_forms_are_those_that_a_run_may_draw(shares, expected):
    forms = all_forms(STAGES, *shares)
    assert {(form.no_text, form.no_references) for form in forms} == expected
    assert {(form.budget, form.target_side) for form in forms} == {(48, 32), (None, 48)}
    assert len(forms) == 2 * len(expected) == len(all_forms((*STAGES, STAGES[0]), *shares))


def test_held_out_rows_are_those_that_validations_use(folder):
    datasets = {"rows": Dataset([folder / "rows.jsonl"])}
    config = dataclasses.replace(
        SFT_RECIPES["tiny"](), stages=STAGES, eval_samples=3, sample_count=2, sample_true_cfg_scale=2.0
    )
    rows = heldout_rows(datasets, config, target=True, guided=2)
    assert [(row.index, row.true_cfg_scale) for row in rows] == [(0, 2.0), (1, 2.0), (2, 1.0)]
    assert {row.forms for row in rows} == {(Form(None, 48),)}, "the sizes of the last stage, nothing dropped"
    off = dataclasses.replace(config, eval_every=0)
    assert [row.index for row in heldout_rows(datasets, off, target=True, guided=2)] == [0, 1]
    assert heldout_rows(datasets, dataclasses.replace(off, sample_every=0), target=True, guided=2) == []


@pytest.mark.parametrize(
    ("settings", "count"),
    [((3, 1, 2, 1), 3), ((1, 1, 2, 1), 2), ((1, 1, 2, 0), 2), ((3, 0, 2, 1), 2), ((3, 0, 2, 0), 0)],
)
@pytest.mark.parametrize("kind", [SFT_RECIPES, MSGRPO_RECIPES])
def test_every_command_uses_as_many_held_out_rows_as_a_validation(folder, monkeypatch, kind, settings, count):
    """The count covers --eval-every 0, where samples are generated, and --sample-every 0, where PSNRs need them."""
    names = ("eval_samples", "eval_every", "sample_count", "sample_every")
    path = str(folder / "rows.jsonl")
    config = dataclasses.replace(
        kind["tiny"](), data=(path,), heldout=(path,), **dict(zip(names, settings, strict=True))
    )
    opened, load = [], ImageSource.load
    monkeypatch.setattr(ImageSource, "load", lambda self: (opened.append(self.name), load(self))[1])
    rows = encode_rows.rows_of(config)
    heldout = [row for row in rows if row.dataset is not rows[0].dataset]
    assert heldout_count(config) == len(heldout) == count
    used = [Dataset([path])[i] for i in range(count)]
    assert len(opened) == sum(1 + len(row.references) for row in used)


def test_rows_of_rollouts_have_the_sizes_of_the_stages_that_use_them(folder, tmp_path):
    config = dataclasses.replace(
        MSGRPO_RECIPES["tiny"](), data=(str(folder / "rows.jsonl"),), rollout_true_cfg_scale=2.0
    )
    multi, single = config.stages
    config = dataclasses.replace(config, stages=(multi, dataclasses.replace(single, budget=64)))
    rows = encode_rows.rows_of(config)
    sides = {row.index: [form.budget for form in row.forms] for row in rows}
    assert sides == {1: [128], 2: [64], 3: [128], 4: [64], 5: [128]}, "no stage uses the row without references"
    assert all(row.true_cfg_scale > 1 and not row.target for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "tiny"], "no folder to write to: give --cache DIR"),
        (["--recipe", "tiny", "--cache", "x"], "no rows to encode: give --data"),
        (["edit", "--cache", "x"], "unknown kind of run 'edit'"),
        (["--recipe", "lora", "--model", "builtin", "--data", "x", "--cache", "x"], "the recipe does not suit"),
    ],
)
def test_wrong_commands_are_one_line(words, message, capsys):
    assert cli.main(["data", "encode", *words]) == 2
    error = capsys.readouterr().err
    assert f"uniref-fast data encode: error: {message}" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "more",
    [
        ["--lora-rank", "4", "--base", "nf4"],
        ["--optimizer", "adamw8bit"],
        ["--stages.0.sequence-parallel", "3"],
        ["--lora-rank", "4", "--offload-blocks", "99"],
    ],
)
def test_settings_that_encoding_does_not_use_are_not_checked(folder, tmp_path, monkeypatch, more):
    class ReachedError(Exception):
        """The settings have been checked."""

    def reached(config):
        raise ReachedError

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("uniref_fast.training.core.distributed.Ranks.start", lambda: OneRank())
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr(encode_rows, "rows_of", reached)
    flags = ["--recipe", "tiny", "--data", str(folder / "rows.jsonl"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(ReachedError):
        encode_rows.run([*flags, *more])


def test_the_command_counts_rows_and_broken_rows(folder, tmp_path, capsys, builtin_pipe, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(folder, data)
    (data / "5-0.png").write_text("not an image")
    monkeypatch.setattr("uniref_fast.loading.load_encoders", lambda *args: builtin_pipe)
    flags = ["--recipe", "tiny", "--data", str(data / "rows.jsonl"), "--cache", str(cache), "--workers", "2"]
    for encoded in (5, 0):
        assert cli.main(["data", "encode", *flags]) == 1
        out, error = capsys.readouterr()
        assert f"{cache}: 6 row(s), {encoded} encoded now" in out and ", 1 broken" in out
        assert "broken: " in error and "5-0.png" in error
    assert len(files(cache)) > 5
