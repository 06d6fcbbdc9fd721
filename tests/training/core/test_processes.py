"""One run for a folder, and no rank without its launcher; with real processes."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_pipeline
import torch
import torch.distributed as dist
import warm
from safetensors.torch import load_file
from synthetic import synthetic_sample

from uniref_fast.training.core import processes
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.processes import LOCK_FILE, locked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def ranks():
    yield Ranks.start()
    dist.destroy_process_group()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.0)


HOLDER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_SH)
os.write(file, sys.argv[2].replace("PID", str(os.getpid())).encode())
print("held", flush=True)
sys.stdin.read()
"""
LINE = '{"rank": 1, "ranks": 2, "pid": PID, "host": "HOST", "since": "2026-01-02 03:04:05+00:00"}\n'


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path/run`, as rank 1 of a run whose rank 0 has ended."""
    (tmp_path / "run").mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = processes.socket.gethostname()
    line = LINE.replace("HOST", host)
    lines = line.replace('"rank": 1', '"rank": 0').replace("PID", str(ended.pid)) + line
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / LOCK_FILE), lines]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_and_the_process_named(holder, ranks, tmp_path, impatient):
    with pytest.raises(ValueError) as caught, locked(tmp_path / "run", ranks):
        pass
    expected = rf"is in use by process {holder.pid} (rank 1 of 2) on {processes.socket.gethostname()} since 2026-01-02"
    assert expected in str(caught.value) and "give another --out" in str(caught.value)
    holder.kill()  # nothing is left to clean up
    holder.wait()
    with locked(tmp_path / "run", ranks):
        (line,) = (tmp_path / "run" / LOCK_FILE).read_text().splitlines()
        assert json.loads(line)["pid"] == os.getpid()


def test_processes_that_end_are_waited_for(holder, ranks, tmp_path):
    started = time.monotonic()
    ending = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with locked(tmp_path / "run", ranks):
        assert time.monotonic() - started > 0.3
    ending.wait()


def test_a_folder_can_be_held_once_and_again_afterwards(ranks, tmp_path, impatient):
    out = tmp_path / "a" / "run"
    with locked(out, ranks):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} "), locked(out, ranks):
            pass
        (out / "kept").write_text("")
    with locked(out, ranks):
        pass
    assert (out / "kept").exists()


def test_a_refused_command_leaves_no_folder(ranks, tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "run", ranks):
        raise RuntimeError
    assert not (tmp_path / "run").exists()


def test_a_lock_that_was_removed_meanwhile_is_not_taken_for_the_new_one(ranks, tmp_path, monkeypatch):
    out, flock, calls = tmp_path / "run", fcntl.flock, []

    def slow(file, kind):
        if not calls:
            (out / LOCK_FILE).unlink()  # by a refused command, between opening and locking
        calls.append(kind)
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", slow)
    with locked(out, ranks):
        assert (out / LOCK_FILE).read_text() and len(calls) == 3


def test_a_file_system_without_locks_is_said(ranks, tmp_path, monkeypatch, capsys):
    def none(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "run", ranks):
        pass
    assert "has no locks" in capsys.readouterr().err


def test_without_prctl_a_watchdog_ends_the_rank(tmp_path):
    """A launcher that is killed, with a rank that waits in a call that never returns to Python."""
    rank = (
        "import os, signal, threading\n"
        "from uniref_fast.training.core import processes\n"
        "processes.signal_at_parent_end = lambda number: False\n"
        "processes.end_with_launcher()\n"
        "print(os.getpid(), flush=True)\n"
        "threading.Event().wait()\n"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    wait_for(lambda: not alive(pid), "the rank to end")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_command_of_the_built_in_model_ends_with_it():
    """torchrun, which gets SIGTERM, ends its ranks; here any process stands for it."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    imports = "import sys; from uniref_fast.training.builtin import make"
    code = f"{imports}; make.run_command((sys.executable, '-c', {child!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    wait_for(lambda: not alive(pid), "the command to end")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


# ---- a run under torchrun ----


@pytest.fixture
def data(tmp_path):
    """Four rows with one or two references."""
    rows = []
    for i in range(4):
        scene = synthetic_sample(i, size=64, references=1 + i % 2)
        files = [f"{i}-{j}.png" for j in range(len(scene.references) + 1)]
        for file, image in zip(files, [*scene.references, scene.target], strict=True):
            image.save(tmp_path / file)
        rows.append({"input_images": files[:-1], "output_image": files[-1], "instruction": scene.instruction})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def flags(data, out):
    given = {"recipe": "tiny", "model": small_pipeline.folder(), "data": data, "out": out, "steps": 3, "save-every": 1,
             "eval-every": 0, "sample-every": 0, "tensorboard": "false", "resume": "auto"}  # fmt: skip
    for i in (0, 1):
        given |= {f"stages.{i}.budget": 64, f"stages.{i}.target-side": 64, f"stages.{i}.pack-tokens": 320}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


SLOW = """
import os, sys, time
from pathlib import Path
from uniref_fast.training import sft
from uniref_fast.training.core import processes
from uniref_fast.training.supervised import trainer
step, folder = trainer.SFTTrainer.train_step, Path(sys.argv.pop(1))
def waiting(self):
    if self.step == 1 and folder.exists():
        (folder / str(os.getpid())).touch()
        while folder.exists():
            time.sleep(0.02)
    return step(self)
trainer.SFTTrainer.train_step = waiting
processes.PARENT = os.getppid()  # of the process that has imported the module
processes.leave(sft.main(sys.argv[1:]))
"""


def weights(out):
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_a_launcher_killed_with_9_takes_its_ranks_along_and_the_same_command_resumes(data, tmp_path):
    out, script, waiting = tmp_path / "run", tmp_path / "slow.py", tmp_path / "waiting"
    script.write_text(SLOW)
    waiting.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    forked = ["--start-method", "fork", "--run-path", script]  # ranks that start as new processes import PyTorch again
    first = warm.start(*launcher, *forked, waiting, *flags(data, out), cwd=ROOT, env=environment)
    wait_for(lambda: len(list(waiting.iterdir())) == 2 or first.poll() is not None, "the second step of both ranks")
    pids = [int(path.name) for path in waiting.iterdir()]
    assert first.poll() is None and len(pids) == 2, first.stderr[-3000:]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = [rank.wait() for rank in warm.start_ranks(2, "training/sft.py", *flags(data, out))]  # while it runs
    assert [rank.returncode for rank in second] == [2, 2]
    used = [f"is in use by process {pid} (rank 0 of 2) on " for pid in pids]
    assert any(text in second[0].stderr for text in used), second[0].stderr[-3000:]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}, "nothing was written"
    assert all(map(alive, pids))

    first.kill()
    wait_for(lambda: not any(map(alive, pids)), "both ranks to end")
    shutil.rmtree(waiting)
    warm.run_ranks(2, "training/sft.py", *flags(data, out))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [0, 1, 2]
    assert (out / "checkpoints" / "step-000003").is_dir() and weights(out)


def test_torchrun_ends_with_the_message_of_the_rank_that_failed(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, "training/msgrpo.py", "--group", "1", "--out", tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    cause = done.stderr.split("Root Cause")[1]
    assert done.returncode == 1 and "traceback : msgrpo: group must be at least 2" in cause, done.stderr[-3000:]
    assert "To enable traceback" not in done.stderr
