"""Models of the hub without a network: one clear line, soon, and the cache where it holds the model."""

import re
import socket
import threading

import pytest
import torch

from uniref_fast import builtin, hub
from uniref_fast.cli import main
from uniref_fast.loading import configuration, load_pipeline
from uniref_fast.training import sft

NAME = "nobody/nothing-here"


@pytest.fixture
def closed_port():
    """Return the port of a server that has ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def no_network(closed_port, tmp_path, monkeypatch):
    """Let the hub be a server that does not answer, with an empty cache; return its URL."""
    url = f"http://127.0.0.1:{closed_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return url


def cached(folder, name=NAME):
    """Write the built-in model into a cache of the hub as a model of this name; return its snapshot."""
    place = folder / "cache" / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    builtin.build(snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.parametrize(
    "args",
    [
        ["edit", "--prompt", "x", "--out", "OUT/x.png", "--model", NAME],
        ["estimate", "--prompt", "x", "--model", NAME],
        ["fuse", NAME, "--lora", "ADAPTER", "--out", "OUT/fused"],
    ],
)
def test_commands_say_that_there_is_no_network(no_network, tmp_path, capsys, args):
    (tmp_path / "a.safetensors").write_bytes(b"")
    args = [a.replace("OUT", str(tmp_path / "out")).replace("ADAPTER", str(tmp_path / "a.safetensors")) for a in args]
    assert main(args) == 2
    problem = (
        f"--model {NAME}: no network: {no_network} could not be reached; give a local folder, or download it first"
    )
    assert (
        f"error: {problem} with: hf download {NAME}\nTry 'uniref-fast {args[0]} --help'.\n" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_training_says_that_there_is_no_network(no_network, tmp_path, capsys):
    args = ["--recipe", "lora", "--data", "rows.jsonl", "--model", NAME, "--out", tmp_path / "run"]
    assert sft.main(list(map(str, args))) == 2
    assert f"no network: {no_network} could not be reached" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_in_the_cache_is_loaded_without_a_network(no_network, tmp_path, capsys):
    snapshot = cached(tmp_path)
    assert configuration(NAME)[0]["_class_name"] == "SmallQwenImageEditPlusPipeline"
    assert load_pipeline(NAME, torch.float32, "cpu").transformer is not None
    assert f"{no_network} could not be reached; {NAME} is read from the cache, {snapshot}" in capsys.readouterr().err


def test_offline_mode_is_respected(no_network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "is_reachable", lambda url: pytest.fail("a connection was attempted"))
    with pytest.raises(ValueError, match=re.escape(f"--model {NAME}: HF_HUB_OFFLINE is set, and the model is not in")):
        hub.local_or_hub(NAME, f"--model {NAME}")
    snapshot = cached(tmp_path)
    assert hub.local_or_hub(NAME, "x") == str(snapshot) and capsys.readouterr().err == ""


def test_a_hub_that_answers_is_used(no_network, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.local_or_hub(NAME, "x") == NAME


def test_the_connection_is_that_of_the_proxy(closed_port, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", here)
        monkeypatch.delenv("no_proxy", raising=False)
        assert hub.is_reachable(f"http://example.invalid:{closed_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert not hub.is_reachable(f"http://127.0.0.1:{closed_port}") and hub.is_reachable(here)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port}")
        assert not hub.is_reachable("http://example.invalid")


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch):
    """The resolver answers when the test has ended."""
    ended = threading.Event()

    def connect(*args):
        ended.wait()
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    try:
        assert not hub.is_reachable("https://example.invalid", seconds=0.1)
    finally:
        ended.set()


def test_folders_need_no_network(no_network, tmp_path):
    assert hub.local_or_hub("builtin", "x") == "builtin" and hub.local_or_hub(str(tmp_path), "x") == str(tmp_path)
