"""The server in a process of its own: OpenAI's client, clients that leave, signals, and the command's arguments."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from serving import StubEngine, opened, picture

import uniref_fast
from uniref_fast import EditRequest, builtin, cli
from uniref_fast.data.images import ImageSource
from uniref_fast.serve import command
from uniref_fast.serve.app import create_app
from uniref_fast.serve.config import ServeConfig
from uniref_fast.serve.server import Server
from uniref_fast.serve.service import EditService

ROOT = Path(__file__).parents[2]
LIMIT = 120


class Process:
    """`uniref-fast serve` on a free port."""

    def __init__(self, *flags, **env):
        self.lines = []
        words = [sys.executable, "-m", "uniref_fast", "serve", "--port", "0", "--dtype", "bfloat16", *flags]
        self.process = subprocess.Popen(words, cwd=ROOT, env=os.environ | env, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        self.url = self.wait_for(r"serving .* on (http://\S+)")[1]

    def _read(self):
        self.lines.extend(self.process.stderr)

    def wait_for(self, pattern):
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if found := re.search(pattern, "".join(self.lines)):
                return found
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        raise AssertionError("".join(self.lines))

    def stop(self):
        self.process.kill()
        self.process.wait(LIMIT)
        self.reader.join(LIMIT)
        self.process.stderr.close()


@pytest.fixture
def started():
    """Return a function that starts a server, which ends with the test."""
    found = []

    def start(*flags, **env):
        found.append(Process(*flags, **env))
        return found[-1]

    yield start
    for each in found:
        each.stop()


@pytest.mark.slow
def test_openai_clients_and_signals(started, pipe, tmp_path):
    server = started("--max-steps", "500", UNIREF_API_KEY="secret")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=LIMIT)
    paths = [tmp_path / f"{color}.png" for color in ("red", "blue")]
    for path in paths:
        path.write_bytes(picture(path.stem))
    images = [ImageSource("", path).load() for path in paths]
    more = {"steps": 2, "seed": 5}

    # images equal those of `edit`
    request = EditRequest("make it night", images, seed=5, true_cfg_scale=1.0, num_inference_steps=2)
    expected = np.asarray(uniref_fast.edit(pipe, [request], progress=False)[0])
    found = client.images.edit(
        model="builtin", image=paths, prompt="make it night", size="auto", output_format="png", extra_body=more
    )
    assert np.array_equal(opened(vars(found.data[0])), expected) and found.data[0].seed == 5
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    names, last = [], None
    for event in client.images.edit(
        image=paths, prompt="make it night", stream=True, partial_images=1, extra_body=more
    ):
        names.append(event.type)
        last = event
    assert names == ["image_edit.progress"] * 2 + ["image_edit.partial_image", "image_edit.progress", names[-1]]
    assert names[-1] == "image_edit.completed" and last.b64_json == found.data[0].b64_json
    assert [model.id for model in client.models.list()] == ["builtin"]

    # the examples
    environment = os.environ | {"BASE_URL": f"{server.url}/v1", "UNIREF_API_KEY": "secret"}
    for name, words in (("edit.sh", []), ("client.py", [sys.executable])):
        out = tmp_path / f"{name}.png"
        script = [*words, str(ROOT / "examples/serve" / name), *map(str, paths), "make it night", str(out)]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0 and Image.open(out).size == expected.shape[1::-1], done.stderr
    assert "step 8 of 8" in done.stdout and f"{out}: 64x64" in done.stdout

    # errors of the client
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=paths[0], prompt="make it night", quality="high")
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "quality")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").images.edit(image=paths[0], prompt="make it night")

    # a client that leaves
    files, headers = {"image": picture()}, {"authorization": "Bearer secret"}
    slow = {"prompt": "x", "steps": "500"}
    with pytest.raises(httpx.ReadTimeout):
        timeout = httpx.Timeout(LIMIT, read=1)
        httpx.post(f"{server.url}/v1/images/edits", data=slow, files=files, headers=headers, timeout=timeout)
    data = slow | {"stream": "true"}
    with httpx.stream("POST", f"{server.url}/v1/images/edits", data=data, files=files, headers=headers) as response:
        assert next(response.iter_lines()) == "event: image_edit.progress"

    def metric(name):
        text = httpx.get(f"{server.url}/metrics", headers=headers).text
        return float(re.search(rf"^{re.escape(name)} (.*)$", text, flags=re.M)[1])

    end = time.monotonic() + LIMIT
    while metric('uniref_fast_edits_total{end="cancelled"}') < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert metric('uniref_fast_edits_total{end="cancelled"}') == 2 and metric("uniref_fast_running") == 0

    # a signal: what runs is finished, new edits are refused, and then the process ends
    results = []
    slow |= {"steps": "60"}
    thread = threading.Thread(
        target=lambda: results.append(
            httpx.post(f"{server.url}/v1/images/edits", data=slow, files=files, headers=headers, timeout=LIMIT)
        )
    )
    thread.start()
    while metric("uniref_fast_running") < 1:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("SIGTERM: the server stops after")
    late = httpx.post(f"{server.url}/v1/images/edits", data=slow, files=files, headers=headers)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert httpx.get(f"{server.url}/ready").status_code == 503
    thread.join(LIMIT)
    assert results[0].status_code == 200 and server.process.wait(LIMIT) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_second_signal_stops_at_once(signals):
    stub = StubEngine()
    service = EditService(stub, ServeConfig("builtin"))
    server = Server(service)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/images/edits"
        statuses = []

        def post():
            try:
                statuses.append(httpx.post(url, data={"prompt": "x"}, files={"image": picture()}, timeout=LIMIT))
            except httpx.HTTPError as error:
                statuses.append(error)

        while not server.started:
            time.sleep(0.01)
        client = threading.Thread(target=post)
        client.start()
        while not stub.jobs:
            time.sleep(0.01)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)  # three ticks
        assert thread.is_alive() == (signals == 1)
        if signals == 1:
            late = httpx.post(url, data={"prompt": "x"}, files={"image": picture()}, timeout=LIMIT)
            assert late.json()["error"]["code"] == "shutting_down"
            stub.end(0)
        thread.join(LIMIT)
        client.join(LIMIT)
    assert not thread.is_alive()
    assert (getattr(statuses[0], "status_code", None) == 200) == (signals == 1)


@pytest.fixture
def adapters(tmp_path):
    """The folder of a run with an adapter, and a file with another one."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    for number, folder in enumerate((tmp_path / "run" / "lora", tmp_path)):
        pipe = builtin.load()
        torch.manual_seed(number)
        config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
        pipe.transformer.add_adapter(config)
        lora = get_peft_model_state_dict(pipe.transformer)
        type(pipe).save_lora_weights(str(folder), transformer_lora_layers=lora)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "builtin"}))
    return tmp_path / "run", tmp_path / "pytorch_lora_weights.safetensors"


@pytest.mark.usefixtures("threads")
def test_requests_choose_adapters_beside_those_of_all(adapters):
    """Adapters of --initial apply to all requests, those of --lora to requests that name them."""
    run, file = adapters
    flags = ["serve", "--device", "cpu", "--initial", str(run), "--lora", f"ink={file}"]
    service = command.build_service(cli._parser().parse_args(flags), None)

    pipe = builtin.load()
    pipe.load_lora_weights(str(run / "lora"), adapter_name="first")
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="second")

    def edited(scales):
        pipe.set_adapters(["first", "second"], scales)
        request = EditRequest(
            "x", [ImageSource("", data=picture()).load()], seed=1, true_cfg_scale=1.0, num_inference_steps=2
        )
        return np.asarray(uniref_fast.edit(pipe, [request], progress=False)[0]).astype(int)

    async def work():
        app = create_app(service)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            fields = {"prompt": "x", "steps": "2", "seed": "1"}
            asked = [
                client.post("/v1/images/edits", data=fields | lora, files={"image": picture()}, timeout=LIMIT)
                for lora in ({}, {"lora[ink]": "0.5"}, {"lora": "pencil"})
            ]
            return (await client.get("/v1/models")).json(), await asyncio.gather(*asked)

    try:
        models, (plain, ink, unknown) = asyncio.run(work())
    finally:
        service.engine.close()
    images = [np.asarray(opened(answer.json()["data"][0])).astype(int) for answer in (plain, ink)]
    expected = [edited([1.0, scale]) for scale in (0.0, 0.5)]
    assert np.abs(expected[0] - expected[1]).max() > 10
    for image, own in zip(images, expected, strict=True):
        assert np.abs(image - own).max() <= 1
    assert models["data"][0]["loras"] == ["ink"] and unknown.json()["error"]["code"] == "lora_not_found"


@pytest.fixture
def unloaded(monkeypatch):
    """A command that fails the test if it loads a model."""
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "65536"], "--port: must be a whole number from 0 to 65535"),
        (["--max-waiting", "0"], "--max-waiting: must be a whole number from 1"),
        (["--deadline", "nan"], "--deadline: must be a number of seconds above 0"),
        (["--allow-origin", "example.com"], "--allow-origin: must be a scheme and a host"),
        (["--allow-origin", "https://example.com/"], "--allow-origin: must be a scheme and a host"),
        (["--allow-origin", "*"], "--allow-origin: must be a scheme and a host"),
        (["--host", "no.such.host.invalid"], "cannot listen on --host no.such.host.invalid"),
        (["--keep-references", "often"], "keep_references is true, false, auto or a number"),
        (["--drift", "0.1"], "--drift is the tolerance of --keep-references auto"),
        (["--budget", "3"], "budget is the side of a square"),
        (["--initial", "/no/such/run"], "/no/such/run"),
        (["--lora", "/no/name"], "--lora is NAME=PATH"),
        (["--lora", "run0=/no/such"], "the name run0 is taken"),
        (["--lora", "ink=/no/such/file"], "no such file or folder /no/such/file"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--offload", "model", "--device", "cpu"], "--offload model makes room on a GPU"),
        (["--offload", "block", "--mode", "fast"], "--offload block needs the weights as they are stored"),
    ],
)
def test_wrong_arguments_fail_before_the_model_is_loaded(unloaded, capsys, flags, words):
    try:
        status = cli.main(["serve", "--port", "0", *flags])
    except SystemExit as end:
        status = end.code
    assert status == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "key", "address", "expected"),
    [
        ([], None, "127.0.0.2", (*command.LOOPBACK, "127.0.0.2")),
        (["Edits.Example"], None, "::1", (*command.LOOPBACK, "::1", "edits.example")),
        (["edits.example"], "secret", "10.0.0.1", (*command.LOOPBACK, "10.0.0.1", "edits.example")),
        (["edits.example"], None, "0.0.0.0", (*command.LOOPBACK, "0.0.0.0", "edits.example")),
        ([], "secret", "127.0.0.1", ()),
        ([], None, "0.0.0.0", ()),
    ],
)
def test_names_of_the_host_that_are_accepted(given, key, address, expected):
    assert command._hosts(given, key, address) == expected


@pytest.mark.parametrize("host", ["127.0.0.2", "LOCALHOST", "127.1"])
def test_the_address_of_the_socket_decides_about_names_of_the_host(monkeypatch, host):
    addresses = []

    def build(args, key, address):
        addresses.append(address)
        raise ValueError("enough")

    monkeypatch.delenv("UNIREF_API_KEY", raising=False)
    monkeypatch.setattr(command, "build_service", build)
    assert cli.main(["serve", "--port", "0", "--host", host]) == 2
    assert addresses[0].startswith("127.0.0.") or addresses == ["::1"]


def test_a_port_in_use_and_a_wrong_key_fail_before_the_model_is_loaded(unloaded, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert cli.main(["serve", "--port", str(other.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err
    for key in ("", " a", "schlüssel", "a\n"):
        monkeypatch.setenv("UNIREF_API_KEY", key)
        assert cli.main(["serve", "--port", "0"]) == 2
        assert "UNIREF_API_KEY must be" in capsys.readouterr().err


def test_without_the_extra_one_line_says_how_to_install_it(unloaded, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('install it with pip install "uniref_fast[serve]"')
