"""examples/serve/nginx.conf in a real nginx, in front of a server whose engine the tests control."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from serving import StubEngine, picture, served

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
EXAMPLE = Path(__file__).parents[2] / "examples/serve/nginx.conf"
KEY = {"Authorization": "Bearer secret"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]


@contextlib.contextmanager
def proxied(folder, server):
    """Run the example without TLS in front of a server, and yield a client of the proxy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    block = re.sub(r"\n    ssl_.*", "", EXAMPLE.read_text()).replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    block = block.replace("http://127.0.0.1:8000", server)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{block}\n}}\n"
    )
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(config)])
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Host": "edits.example.com"}, timeout=20)
    try:
        for _ in range(100):
            with contextlib.suppress(httpx.TransportError):
                client.get("/health")
                break
            time.sleep(0.05)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(10)


def until(condition):
    """Wait until a condition holds, and return it."""
    for _ in range(200):
        if condition():
            break
        time.sleep(0.02)
    return condition()


FORM = {"prompt": "x", "stream": "true", "seed": "1"}
FILES = {"image": ("a.png", picture(), "image/png")}


def test_requests_pass_through_the_proxy(tmp_path):
    engine = StubEngine(max_waiting=1)
    with (
        served(engine, api_key="secret", hosts=("edits.example.com",)) as server,
        proxied(tmp_path, server) as client,
    ):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/metrics", headers=KEY).status_code == 403
        assert client.get("/ready").status_code == 200

        with client.stream("POST", "/v1/images/edits", data=FORM, files=FILES, headers=KEY) as response:
            lines = response.iter_lines()
            assert response.status_code == 200 and next(lines) == "event: image_edit.progress"
            engine.step(0, 1)  # each event arrives before the next one is made
            while next(lines) != "event: image_edit.progress":
                pass
            assert '"step": 1' in next(lines)

            refused = client.post("/v1/images/edits", data={"prompt": "x"}, files=FILES, headers=KEY)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "queue_full"
        assert until(lambda: engine.jobs[0][2].cancelled()), "a client that leaves cancels its edit"

        large = {"image": ("a.png", bytes(65 * 1024**2 - 10000), "image/png")}
        answer = client.post("/v1/images/edits", data={"prompt": "x"}, files=large, headers=KEY)
        assert answer.status_code == 413 and "67,108,864" in answer.json()["error"]["message"]
        large = {"image": ("a.png", bytes(66 * 1024**2), "image/png")}
        answer = client.post("/v1/images/edits", data={"prompt": "x"}, files=large, headers=KEY)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_a_server_that_does_not_answer_is_an_error_in_the_same_form(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        server = f"http://127.0.0.1:{free.getsockname()[1]}"
    with proxied(tmp_path, server) as client:
        answer = client.get("/v1/models")
        assert answer.status_code == 502 and answer.json()["error"]["code"] == "unreachable"
