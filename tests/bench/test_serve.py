"""A short soak of the server with the clients of bench/, in this process: images, counts, and edits of lost clients."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from serving import served

from uniref_fast import Engine
from uniref_fast.builtin import load

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_a_soak_has_no_wrong_image_and_no_lost_request(monkeypatch):
    """Bfloat16: every image has the bits of `edit` alone, beside bad requests and clients that leave."""
    monkeypatch.syspath_prepend(str(BENCH))
    import serve_clients

    pipe = load(torch.bfloat16)
    calls = serve_clients.draw_calls(6, (2, 3), ("32x32", "48x32"))
    expected = serve_clients.edits_alone(pipe, calls)
    monkeypatch.setattr(serve_clients, "FAULTY", 0.4)
    with Engine(pipe, max_waiting=64) as engine, served(engine) as address:
        server = SimpleNamespace(url=address, resident_bytes=lambda: 1)
        soak = asyncio.run(serve_clients.soak_clients(server, calls, 40, 8))
        until = time.monotonic() + 30
        while (stats := engine.stats()).running + stats.waiting and time.monotonic() < until:
            time.sleep(0.02)
    assert soak.problems == [] and all(soak.kinds.values())
    assert len(soak.images) == soak.kinds["good"]
    for at, content in soak.images:
        assert np.array_equal(serve_clients.pixels(content), expected[at])
    assert stats.waiting == stats.running == stats.failed == 0 and stats.finished >= len(soak.images)


@pytest.mark.usefixtures("threads")
def test_the_stock_pipeline_answers_behind_the_same_routes(monkeypatch):
    """The server of the comparison: state, readiness, and the image of the pipeline of diffusers."""
    monkeypatch.syspath_prepend(str(BENCH))
    import httpx
    import serve_backends
    import serve_clients

    pipe = load(torch.bfloat16)
    calls = serve_clients.draw_calls(1, (2, 2), ("32x32",))
    expected = serve_clients.edits_alone(pipe, calls)
    queue = serve_backends.StockQueue(pipe)
    with served(queue) as address:
        assert httpx.get(f"{address}/ready").status_code == 200
        answer = httpx.post(f"{address}/v1/images/edits", data=calls[0].fields, files=calls[0].parts(), timeout=60)
        assert answer.status_code == 200, answer.text
        assert queue.stats().finished == 1 and not queue.stats().has_failed
    queue.close()
    difference = np.abs(serve_clients.pixels(answer.json()["data"][0]["b64_json"]) - expected[0])
    assert difference.mean() < 2
