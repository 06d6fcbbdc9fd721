"""Commands in processes that are forked from one that has imported PyTorch and the library, which takes seconds.

`start` and `run` take the arguments of Python: a script, `-m` and a module, or `-c` and code. The processes have their
own working directory, environment, output, signals and exit status, as those of `subprocess`.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = [
    f"uniref_fast.{name}"
    for name in (
        "builtin.pipeline", "cli", "edit", "evaluation.evaluate", "lora.file", "encode_rows", "run_plan",
        "training.supervised.trainer", "training.rl.trainer", "training.builtin.vae_trainer",
    )
]  # fmt: skip
LIBRARIES = ["torch.distributed.fsdp", "torch._dynamo", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "peft",
             "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
             "diffusers.models.transformers.transformer_qwenimage",
             "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus"]  # fmt: skip


class Command:
    """A running command.

    Attributes:
        pid: Number of the process, which leads a session of its own.
    """

    def __init__(self, words, cwd, env):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        files = [*map(str, self._files)]
        self._process = _server().Process(target=_run, args=([*map(str, words)], str(cwd), dict(env), files))
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self):
        return self._files[0].read_text() if self._files[0].exists() else ""

    @property
    def stderr(self):
        return self._files[1].read_text() if self._files[1].exists() else ""

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=300):
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s: {self.stderr[-4000:]}"
        return self

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        self.wait()


def start(*words, cwd=ROOT, env=None):
    """Start a command.

    Args:
        words: Arguments of Python.
        cwd: Working directory.
        env: Environment; None uses that of this process.
    """
    return Command(words, cwd, os.environ if env is None else env)


def run(*words, cwd=ROOT, env=None, timeout=300):
    """Run a command to its end."""
    return start(*words, cwd=cwd, env=env).wait(timeout)


def start_ranks(count, *words, cwd=ROOT, env=None):
    """Start the ranks of a command, with the variables that torchrun gives them, one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "OMP_NUM_THREADS": 1}  # fmt: skip
    given = os.environ if env is None else env
    own = [{**shared, "RANK": i, "LOCAL_RANK": i} for i in range(count)]
    return [start(*words, cwd=cwd, env={**given, **{k: str(v) for k, v in one.items()}}) for one in own]


def run_ranks(count, *words, cwd=ROOT, env=None, timeout=300):
    """Run the ranks of a command to their end; fail if one of them fails."""
    ranks = start_ranks(count, *words, cwd=cwd, env=env)
    try:
        for rank in ranks:
            rank.wait(timeout)
            assert rank.returncode == 0, rank.stderr[-4000:]
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    return ranks


def _server():
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the other way of asking for a GPU forbids forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES, *IMPORTED])
    return context


def _run(words, cwd, env, files):
    """Run a command in a forked process."""
    os.setsid()
    for number, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb", closefd=False), write_through=True) for n in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:
        import torch

        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], [""]
        exec(words[1], sys.modules["__main__"].__dict__)
    elif words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [""]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).resolve().parent)]
        runpy.run_path(words[0], run_name="__main__")
