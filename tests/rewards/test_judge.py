"""The judge against a real endpoint on this machine that is slow, crowded, wrong, away or indiscreet on purpose."""

import dataclasses
import gc
import itertools
import json
import logging
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError

import pytest
from judge_server import (
    MODEL,
    JudgeServer,
    body,
    by_colour,
    cut,
    drop,
    echo_authorization,
    parts,
    pictures,
    say,
    scores,
    slow,
    status,
)
from PIL import Image

from uniref_fast import flags
from uniref_fast.data.dataset import Row
from uniref_fast.files import RecordFile, read_records
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.rewards.judge import Judge
from uniref_fast.rewards.request import encode
from uniref_fast.rewards.types import AXES, Candidate, Failure, Scores

KEY = 'sk-Gh7/"+secret'
QUICK = {"timeout": 5.0, "backoff": 0.02, "backoff_limit": 0.05, "attempts": 3, "patience": 20.0}
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No key or proxy of this machine; no thread left behind."""
    for name in ("JUDGE_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("judge")]
    assert not left


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


class Notes(list):
    """Collects notifications."""

    def __call__(self, kind, **details):
        self.append((kind, details))

    @property
    def kinds(self):
        return [kind for kind, _ in self]


def judge_of(server, log=None, notify=None, **options):
    return Judge(JudgeConfig(**{"url": server.url, "model": MODEL, **QUICK, **options}), log, notify)


COMPLETION = {"choices": [{"index": 0, "message": {"content": scores()}, "finish_reason": "stop"}]}
ROW = Row("", (), None, None, "")


def candidate(number=0, references=1, size=(24, 16), instruction="put the cat on the mat"):
    """Reference i is (number, 100 + i, 0), the result (number, 1, 2)."""
    number, key = number % 256, (0, number, number % 4)
    made = tuple(Image.new("RGB", size, (number, 100 + i, 0)) for i in range(references))
    return Candidate(key, instruction, made, Image.new("RGB", size, (number, 1, 2)), ROW)


def until(true):
    """Waits for it; however busy the machine is."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ask(judge, *candidates, step=3):
    return [future.result(30) for future in [judge.submit(c, step) for c in candidates or [candidate()]]]


def good(integration=7, consistency=8, quality=9):
    return Scores(dict(zip(AXES, (integration, consistency, quality), strict=True)))


# ---- requests ----


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_all_references_are_sent_in_order_then_the_result_then_the_instruction(server, count):
    with judge_of(server, temperature=0.5, seed=7, max_tokens=300) as judge:
        assert ask(judge, candidate(9, count)) == [good(9, 1, 2)]
    (request,) = server.requests
    *given, label, result, words = parts(request)
    assert given[::2] == [f"Picture {i + 1}:" for i in range(count)]
    assert [picture.getpixel((3, 3)) for picture in given[1::2]] == [(9, 100 + i, 0) for i in range(count)]
    assert label == "Result:" and result.getpixel((0, 0)) == (9, 1, 2) and "put the cat on the mat" in words
    assert ("no source picture" in words) == (count == 0)
    system = request["messages"][0]
    assert system["role"] == "system" and all(f"{axis}: " in system["content"] for axis in AXES)
    fields = {key: value for key, value in request.items() if key not in ("messages", "response_format")}
    assert fields == {"model": MODEL, "temperature": 0.5, "seed": 7, "max_tokens": 300}
    schema = request["response_format"]["json_schema"]["schema"]
    assert [*schema["properties"]] == ["reasoning", *AXES] == schema["required"]
    assert "Authorization" not in server.headers[0]


def test_options_that_are_none_are_not_sent(server):
    with judge_of(server, temperature=None, seed=None, token_field="max_completion_tokens", json_mode="off") as judge:
        ask(judge)
    assert {*server.requests[0]} == {"model", "max_completion_tokens", "messages"}


def test_pictures_keep_their_pixels_unless_a_side_is_larger(server):
    noise = Image.effect_noise((60, 31), 80).convert("RGB")
    wide = Image.effect_noise((200, 3), 80).convert("RGB")
    shown = Candidate((0,), "x", (noise, wide), noise, ROW)
    with judge_of(server, max_side=64) as judge:
        ask(judge, shown)
    first, second, result = pictures(server.requests[0])
    assert first.tobytes() == result.tobytes() == noise.tobytes() and first.format is None
    assert second.size == (64, 1)
    assert encode(wide, 64).digest != encode(wide.resize((64, 1)), 64).digest != encode(noise, 64).digest


def test_other_modes_are_refused_before_anything_is_sent(server):
    grey = Candidate((4, 2), "x", (Image.new("RGB", (4, 4)), Image.new("L", (4, 4))), Image.new("RGB", (4, 4)), None)
    with judge_of(server) as judge, pytest.raises(ValueError, match=r"picture 2 of candidate \(4, 2\) has mode L"):
        judge.submit(grey, 0)
    assert not server.requests


@pytest.mark.slow
def test_hundreds_of_candidates_within_the_bound(server):
    """The first six meet at the server: so many come at once, and never more."""
    together = threading.Barrier(6, timeout=20)

    def meet(handler, request):
        together.wait()
        time.sleep(0.1)  # a seventh would come now
        by_colour(handler, request)

    server.plan = [meet] * 6
    shared = candidate(0, 3).references
    many = [Candidate((0, i), "x", shared, candidate(i).image, ROW) for i in range(240)]
    with judge_of(server, concurrency=6) as judge:
        futures = [judge.submit(c, 0) for c in many]
        assert len(server.requests) < 240, "submit returns at once"
        results = [future.result(60) for future in futures]
        encoded = len(judge._pictures)
    assert results == [good(i % 256 % 11, 1, 2) for i in range(240)]
    assert len(server.requests) == 240 and server.peak == 6
    assert encoded == 3, "references that are shared are encoded once"


def test_samples_are_averaged_and_those_that_fail_left_out(server):
    server.plan = [say(scores(1, 2, 3)), say(scores(2, 2, 9)), say("no")]
    with judge_of(server, samples=3, temperature=0.7, concurrency=1, seed=5) as judge:
        assert ask(judge) == [good(1.5, 2, 6)]
        assert [request["seed"] for request in server.requests] == [5, 6, 7]
        server.plan = [say("no"), say(""), say("never")]
        (lost,) = ask(judge)
        assert lost.kind == "malformed" and lost.reason.endswith(": no")
        assert judge.statistics()["calls"] == 6


# ---- failures and retries ----


@pytest.mark.parametrize(
    "behave, kind, reason",
    [
        (say("I like it"), "malformed", "I like it"),
        (body(b"<html>"), "malformed", "<html>"),
        (say(""), "empty", "finish_reason stop"),
        (say(None), "empty", ""),
        (body({"choices": []}), "empty", "choices"),
        (body({"error": "no", **COMPLETION}), "error", "with an error"),
        (body({"choices": COMPLETION["choices"] * 2}), "malformed", "2 choices"),
        (say('{"integration": 1, "quality": 2}'), "schema", "no score for consistency"),
        (say(scores(11)), "schema", "integration must be a number from 0 to 10, got 11"),
        (say(scores(quality=float("nan"))), "schema", "got NaN"),
        (say(scores(quality="good")), "schema", 'got "good"'),
        (say(scores(), "content_filter"), "refused", "content_filter"),
        (say(None, refusal="I must not"), "refused", "I must not"),
        (say(scores(quality="9")), "schema", 'got "9"'),
        (say(scores(quality=True)), "schema", "got true"),
        (say(scores()[:-1] + ', "quality": 10}'), "malformed", "'quality' occurs twice"),
        (say("The picture says " + scores(10, 10, 10)), "malformed", "The picture says"),
        (say('{"reasoning": "it', "length"), "truncated", "raise max_tokens"),
        (say(scores(10, 10, 10), "length"), "truncated", "raise max_tokens"),
        (status(400), "status", "HTTP 400: "),
        (status(401), "status", "this is 401"),
        (status(403), "status", "HTTP 403"),
        (status(404, b""), "status", "HTTP 404: no body"),
        (status(413), "status", "HTTP 413"),
        (status(307, Location="/v1/x"), "status", "HTTP 307"),
    ],
)
def test_failures_that_are_not_repeated(server, behave, kind, reason):
    with judge_of(server, json_mode="off") as judge:
        server.default = behave
        (lost,) = ask(judge)
        assert isinstance(lost, Failure) and lost.kind == kind and reason in lost.reason and "\n" not in lost.reason
        assert len(server.requests) == 1
        numbers = judge.statistics()
    assert numbers["failed"] == numbers[f"failed/{kind}"] == 1 and numbers["retries"] == 0


@pytest.mark.parametrize("behave", [status(408), status(429), status(500), status(503), status(529), cut, drop])
def test_failures_that_are_repeated_until_they_work(server, behave):
    server.plan = [behave, behave]
    with judge_of(server) as judge:
        assert ask(judge) == [good(0, 1, 2)] and len(server.requests) == 3
        assert judge.statistics()["retries"] == 2


def test_a_code_fence_around_the_answer_is_taken_off(server):
    server.default = say("```json\n" + scores(7, 8, 9.5) + "\n```")
    with judge_of(server) as judge:
        assert ask(judge) == [good(7, 8, 9.5)]


@pytest.mark.slow
@pytest.mark.parametrize("behave, kind", [(status(500), "overloaded"), (status(429), "overloaded"),
                                          (slow(1.0, by_colour), "timeout"), (cut, "connection")])  # fmt: skip
def test_after_all_attempts_it_is_a_failure(server, behave, kind):
    server.default = behave
    with judge_of(server, timeout=0.5 if kind == "timeout" else 5.0) as judge:
        (lost,) = ask(judge)
    assert lost.kind == kind and "the last of 3 attempts" in lost.reason and len(server.requests) == 3


def test_a_timeout_counts_for_the_whole_request(server):
    """Bytes that trickle in must not keep a request alive."""

    def trickle(handler, request):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(60):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    server.default = trickle
    with judge_of(server, timeout=0.5, attempts=1) as judge:
        began = time.monotonic()
        assert ask(judge)[0] == Failure("timeout", "no answer within 0.5 s (the last of 1 attempts)")
        assert time.monotonic() - began < 2.5


def test_waits_grow(server):
    server.default = status(500)
    with judge_of(server, attempts=5, backoff=0.1, backoff_limit=0.2) as judge:
        ask(judge)
    waits = [b - a for a, b in itertools.pairwise(server.times)]
    for wait, most in zip(waits, [0.1, 0.2, 0.2, 0.2], strict=True):
        assert most / 2 <= wait < most + 1


@pytest.mark.parametrize("given, least", [
    ({"Retry_After": "0.3"}, 0.3), ({"Retry_After": "0"}, 0), ({"Retry_After": "soon"}, 0),
    ({"Retry_After": "Thu, 01 Jan 2015 00:00:01 GMT", "Date": "Thu, 01 Jan 2015 00:00:00 GMT"}, 0),
])  # fmt: skip
def test_retry_after_comes_first(server, given, least):
    server.plan = [status(429, **given)]
    with judge_of(server) as judge:
        assert ask(judge) == [good(0, 1, 2)]
    assert server.times[1] - server.times[0] >= least


def test_a_date_to_retry_after_counts_from_the_servers_clock():
    from uniref_fast.rewards.client import _retry_after as seconds

    date = "Thu, 01 Jan 2015 00:00:{} GMT"
    assert seconds({"Retry-After": date.format(30), "Date": date.format("05")}) == 25
    assert seconds({"Retry-After": date.format(30), "Date": date.format(50)}) == 0
    assert seconds({"Retry-After": date.format(30)}) is None and seconds({}) is None


def test_a_wait_beyond_the_patience_is_not_made(server):
    server.default = status(429, Retry_After="3600")
    with judge_of(server) as judge:
        (lost,) = ask(judge)
    assert lost.kind == "overloaded" and "asks to wait 3600 s" in lost.reason and len(server.requests) == 1


# ---- outages ----


def test_an_outage_is_waited_out_and_reported(server):
    notes = Notes()
    with judge_of(server, notify=notes, concurrency=8, attempts=3) as judge:
        assert ask(judge) == [good(0, 1, 2)]
        server.stop()
        futures = [judge.submit(candidate(i), 1) for i in range(20)]
        until(lambda: judge.client.breaker.probes >= 9)  # many more than there are attempts
        assert notes.kinds == ["judge down"] and not any(future.done() for future in futures)
        server.start()
        results = [future.result(20) for future in futures]
    assert results == [good(i % 11, 1, 2) for i in range(20)], "no attempt was used up"
    assert notes.kinds == ["judge down", "judge back"]
    assert "Connect" in notes[0][1]["reason"] and 0.3 < notes[1][1]["seconds"] < 20


@pytest.mark.slow
@pytest.mark.parametrize("code, outage", [(502, True), (503, True), (504, True), (500, False), (429, False)])
def test_which_statuses_are_an_outage(server, code, outage):
    notes = Notes()
    server.plan = [status(code), status(code), by_colour] * 2
    with judge_of(server, notify=notes, attempts=6, concurrency=1) as judge:
        assert ask(judge, candidate(1), candidate(2)) == [good(1, 1, 2), good(2, 1, 2)]
        assert notes == [], "two in a row are none"
        server.plan = [status(code)] * 4
        assert ask(judge, candidate(3)) == [good(3, 1, 2)]
    assert notes.kinds == (["judge down", "judge back"] if outage else []) and len(server.requests) == 11


def test_a_probe_waits_as_long_as_the_server_asks(server):
    server.plan = [status(503, Retry_After="0.4")] * 3
    with judge_of(server, concurrency=3) as judge:
        ask(judge, *map(candidate, range(3)))
    assert server.times[3] - server.times[0] > 0.4


def test_waiting_calls_fail_after_the_patience_and_later_ones_try_again(server):
    notes = Notes()
    server.stop()
    try:
        with judge_of(server, notify=notes, patience=0.5, concurrency=4) as judge:
            began = time.monotonic()
            lost = ask(judge, *map(candidate, range(12)))
            assert 0.4 < time.monotonic() - began < 10
            assert {failure.kind for failure in lost} == {"connection"}
            assert any("was away for" in failure.reason for failure in lost)
            assert judge.statistics()["failed/connection"] == 1
            later = judge.submit(candidate(5), 2)
            server.start()
            assert later.result(20) == good(5, 1, 2)
            assert notes.kinds == ["judge down", "judge back"]
    finally:
        if "judge back" not in notes.kinds:
            server.start()


def test_one_request_that_always_breaks_does_not_stop_the_others(server):
    """The request takes turns with the others as a probe, and its own attempts end."""

    def behave(handler, request):
        red = pictures(request)[-1].getpixel((0, 0))[0]
        (cut if red == 13 else by_colour)(handler, request)

    server.default = behave
    with judge_of(server, concurrency=2, patience=3.0) as judge:
        results = ask(judge, *map(candidate, (13, 1, 2, 3)))
        alone = ask(judge, candidate(13))[0]
    assert results[0].kind == alone.kind == "connection" and results[1:] == [good(i, 1, 2) for i in (1, 2, 3)]


def test_slow_answers_and_errors_are_no_outage(server):
    """An endpoint that answers any request, or refuses it, is not away."""
    notes = Notes()
    server.default = status(500)
    with judge_of(server, notify=notes, attempts=1, timeout=1.0) as judge:
        ask(judge, *map(candidate, range(6)))
        server.default = slow(1.6, by_colour)
        server.plan = [slow(0.5, by_colour)]
        kinds = Counter(getattr(result, "kind", "scores") for result in ask(judge, *map(candidate, range(6))))
    assert kinds == {"timeout": 5, "scores": 1} and notes == []


@pytest.mark.slow
def test_an_endpoint_that_answers_no_request_is_away(server):
    """The endpoint accepts connections and is silent: the calls wait, and none is lost."""
    notes, silent = Notes(), threading.Event()
    server.default = lambda handler, request: silent.wait(20) and by_colour(handler, request)
    with judge_of(server, notify=notes, attempts=2, timeout=0.5, concurrency=4) as judge:
        futures = [judge.submit(candidate(i), 0) for i in range(10)]
        until(lambda: judge.client.breaker.probes >= 2)
        assert notes.kinds == ["judge down"] and "no answer within 0.5 s" in notes[0][1]["reason"]
        server.default = by_colour
        silent.set()
        assert [future.result(20) for future in futures] == [good(i, 1, 2) for i in range(10)]
    assert notes.kinds == ["judge down", "judge back"]


# ---- the way JSON is asked for ----


def without(*kinds, code=400):
    """An endpoint that refuses these response formats."""

    def behave(handler, request):
        kind = request.get("response_format", {}).get("type")
        answer = status(code, {"error": f"response_format {kind} is not supported"}) if kind in kinds else by_colour
        answer(handler, request)

    return behave


@pytest.mark.parametrize("refused, mode, code", [
    (("json_schema",), "object", 400), (("json_schema", "json_object"), "off", 422), ((), "schema", 400),
])  # fmt: skip
def test_a_refused_format_gives_way_to_a_weaker_one_with_the_reason(server, refused, mode, code):
    notes = Notes()
    server.default = without(*refused, code=code)
    with judge_of(server, notify=notes) as judge:
        assert ask(judge, *map(candidate, range(8))) == [good(i, 1, 2) for i in range(8)]
        asked = len(server.requests)
        ask(judge)
        assert len(server.requests) == asked + 1, "the way is known from then on"
        assert judge.json_mode == mode
        assert judge.json_reason == judge.check().partition("(")[2].rstrip(")")
    if refused:
        reason = "'schema' was refused: HTTP " + f'{code}: {{"error": "response_format json_schema is not supported"}}'
        assert notes == [("judge format", {"json_mode": mode, "reason": reason})] and judge.json_reason == reason
    else:
        assert notes == [] and judge.json_reason == ""


def test_a_refused_call_uses_the_json_mode_that_another_call_found(server):
    refuse = without("json_schema")
    server.plan = [slow(1.0, refuse)]  # comes back when the other call is done
    server.default = refuse
    with judge_of(server, concurrency=2) as judge:
        assert ask(judge, candidate(1), candidate(2)) == [good(1, 1, 2), good(2, 1, 2)]
    assert len(server.requests) == 4


def test_a_bad_request_for_another_reason_changes_nothing(server):
    notes = Notes()
    server.default = status(400, {"error": "the context is too long"})
    with judge_of(server, notify=notes) as judge:
        (lost,) = ask(judge)
        assert lost.kind == "status" and "too long" in lost.reason
        assert [request.get("response_format", {}).get("type") for request in server.requests] == [
            "json_schema", "json_object", None,
        ]  # fmt: skip
        assert judge.json_mode == "schema"
        server.default = by_colour
        ask(judge)
        assert "response_format" in server.requests[-1]
        asked = len(server.requests)
        server.plan = [status(400)]
        assert ask(judge)[0].kind == "status" and len(server.requests) == asked + 1, "schema is known to work"
    assert notes == []


# ---- check ----


def test_check_tells_who_answers(server):
    with judge_of(server) as judge:
        assert f"'{MODEL}' at {server.url} answers in" in judge.check() and judge.statistics()["calls"] == 0
    sent = pictures(server.requests[0])
    assert len(sent) == 2 and sent[0].size == (64, 64)


@pytest.mark.parametrize(
    "behave, message",
    [
        (status(401), r"HTTP 401.*put the API key into the environment variable JUDGE_API_KEY, which is not set"),
        (status(404), rf"'{MODEL}' at http://127.*HTTP 404.*models listed at http://.*/v1/models: {MODEL}, other"),
        (status(400), r"HTTP 400: .*this is 400.*models listed"),
        (status(503), r"HTTP 503: .*this is 503"),
        (say("what a nice square"), r"gives no scores: malformed: .*nice square.*max_tokens"),
        (drop, r"does not answer: RemoteProtocolError.*vllm serve"),
        (slow(1.0, by_colour), r"no answer within 0.5 s"),
    ],
)
def test_check_says_what_to_do(server, behave, message):
    server.default = behave
    limit = 0.5 if "within" in message else 5.0
    with judge_of(server, timeout=limit) as judge, pytest.raises(ValueError, match=message):
        judge.check()


def test_check_of_a_wrong_key_or_url(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "wrong")
    server.default = status(403)
    with judge_of(server, key_variable="MY_KEY") as judge, pytest.raises(ValueError, match="variable MY_KEY may be"):
        judge.check()
    with judge_of(server, url=server.url[:-3]) as judge:
        with pytest.raises(ValueError, match=r"HTTP 404: .*lists no models: check that the url goes as far as /v1"):
            judge.check()
        assert ask(judge)[0].kind == "status"
    server.stop()
    try:
        with judge_of(server) as judge, pytest.raises(ValueError, match="does not answer: ConnectError"):
            judge.check()
    finally:
        server.start()


# ---- the log and its replay ----


def test_the_log_has_every_call_and_no_pictures(server, tmp_path):
    server.plan = [status(500), say(scores(1, 2, 3)), say("no"), status(404)]
    log = tmp_path / "deep" / "judge-0.jsonl"
    with judge_of(server, log, concurrency=1) as judge:
        ask(judge, *map(candidate, range(3)), step=17)
        assert len(read_records(log)) == 3, "there before the end"
    first, second, third = read_records(log)
    content, seconds = first.pop("content"), first.pop("seconds")
    assert len(content) == 64 and seconds > 0
    assert first == {
        "step": 17, "key": [0, 0, 0], "sample": 0, "attempts": 2, "status": 200, "reply": scores(1, 2, 3),
        "finish_reason": "stop", "usage": {"total_tokens": 12},
        "scores": {"integration": 1, "consistency": 2, "quality": 3},
    }  # fmt: skip
    assert second["reply"] == "no" and second["failure"]["kind"] == "malformed"
    assert third["status"] == 404 and third["reply"] is None and third["failure"]["kind"] == "status"
    assert "base64" not in log.read_text() and log.stat().st_size < 2000


def test_the_content_is_that_of_the_whole_question(server, tmp_path):
    base = candidate(1, 2)
    a, b = base.references
    others = [
        base,
        Candidate(base.key, base.instruction, (b, a), base.image, ROW),
        Candidate(base.key, base.instruction, (a,), base.image, ROW),
        Candidate(base.key, "another", (a, b), base.image, ROW),
        Candidate(base.key, base.instruction, (a, b), a, ROW),
        Candidate((9,), base.instruction, (a.copy(), b.copy()), base.image.copy(), ROW),  # the same question
    ]
    settings = [{}, {"temperature": 0.1}, {"model": "other"}, {"seed": None}, {"max_side": 16}, {"max_tokens": 99}]
    same = {"timeout": 4.0, "json_mode": "off", "concurrency": 1, "attempts": 1}
    for number, options in enumerate([*settings, same]):
        with judge_of(server, tmp_path / f"{number}.jsonl", **options) as judge:
            ask(judge, *(others if not options else others[:1]))
    found = [[record["content"] for record in read_records(tmp_path / f"{n}.jsonl")] for n in range(len(settings) + 1)]
    assert len({*found[0]}) == 5
    assert len({contents[0] for contents in found if contents[0] not in found[0]}) == len(settings) - 1
    assert found[-1][0] in found[0]
    with judge_of(server, tmp_path / "s.jsonl", samples=2, temperature=0.5, seed=None) as judge:
        ask(judge, base)
    assert len({record["content"] for record in read_records(tmp_path / "s.jsonl")}) == 2


def test_a_replay_gives_the_same_without_the_server(server, tmp_path):
    log, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    server.plan = [
        say(scores(quality=9.5)),
        say("no"),
        say(None, refusal="no"),
        status(404),
        say(scores(quality=50)),
    ]
    asked = [candidate(i) for i in range(10)]
    with judge_of(server, log, concurrency=1, json_mode="off") as judge:
        live = ask(judge, *asked)
    assert sum(isinstance(result, Failure) for result in live) == 4
    sent = len(server.requests)
    with judge_of(server, again, url="", replay=log) as judge:
        assert judge.check().startswith("no judge is asked")
        assert ask(judge, *asked) == live
        (lost,) = ask(judge, candidate(99))
        assert lost.kind == "replay" and "no call of this content" in lost.reason and "a.jsonl" in lost.reason
        numbers = judge.statistics()
        assert numbers["calls"] == 11 and numbers["replayed"] == 10 and numbers["failed"] == 5 / 11
        assert all(
            numbers[f"failed/{kind}"] == 1 / 11 for kind in ("malformed", "refused", "status", "schema", "replay")
        )
    assert len(server.requests) == sent
    records = read_records(again)
    assert [record.get("replayed") for record in records] == [True] * 10 + [None]
    old = {tuple(record["key"]): record for record in read_records(log)}
    for now in records[:-1]:
        assert now == {**old[tuple(now["key"])], "attempts": 0, "seconds": 0, "replayed": True}
    with judge_of(server, url="", replay=again) as judge:  # a replay can be replayed
        assert ask(judge, *asked) == live


def test_a_replay_reads_the_replies_anew(server, tmp_path):
    log = tmp_path / "a.jsonl"
    with judge_of(server, log) as judge:
        ask(judge, candidate(1))
    text = log.read_text().replace(json.dumps(scores(1, 1, 2))[1:-1], json.dumps(scores(5, 5, 5))[1:-1])
    assert text != log.read_text()
    log.write_text(text)
    with judge_of(server, url="", replay=log) as judge:
        assert ask(judge, candidate(1)) == [good(5, 5, 5)]


def test_equal_questions_get_their_own_replies_back(server, tmp_path):
    log = tmp_path / "a.jsonl"
    twins = [Candidate((0, 0, i), "x", (), candidate().image, ROW) for i in range(4)]
    server.plan = [say(scores(i, i, i)) for i in range(4)]
    with judge_of(server, log, concurrency=1) as judge:
        ask(judge, *twins)
    with judge_of(server, url="", replay=log) as judge:
        assert ask(judge, *twins[::-1]) == [good(i, i, i) for i in (3, 2, 1, 0)]
        assert ask(judge, twins[0], step=99) == [good(3, 3, 3)], "another step: the last reply to this question"


def test_a_replay_with_a_server_asks_only_what_is_new_or_failed_on_the_way(server, tmp_path):
    log = tmp_path / "a.jsonl"
    server.plan = [status(500), status(500), say("no")]
    with judge_of(server, log, concurrency=1, attempts=2) as judge:
        lost = ask(judge, *map(candidate, range(3)))
    assert [result.kind for result in lost[:2]] == ["overloaded", "malformed"]
    with judge_of(server, url="", replay=log) as judge:
        assert ask(judge, *map(candidate, range(3))) == lost
    sent = len(server.requests)
    with judge_of(server, log, replay=log) as judge:  # the same file is continued
        assert ask(judge, *map(candidate, range(4))) == [good(0, 1, 2), lost[1], lost[2], good(3, 1, 2)]
        assert judge.statistics()["replayed"] == 2
    assert len(server.requests) == sent + 2
    assert len(read_records(log)) == 5, "what was replayed from a file is not written to it again"


def test_a_resumed_run_repeats_no_call(server, tmp_path):
    """The number of ranks may have changed: each rank reads the logs of all."""
    logs = [tmp_path / f"judge-{rank}.jsonl" for rank in (0, 1)]
    for rank, log in enumerate(logs):
        with judge_of(server, log) as judge:
            ask(judge, candidate(rank))
    with Judge(JudgeConfig(url=server.url, **QUICK, model=MODEL), logs[0], earlier=logs) as judge:
        assert ask(judge, *map(candidate, range(3))) == [good(i, 1, 2) for i in range(3)]
        assert judge.statistics()["replayed"] == 2
    assert len(server.requests) == 3 and [len(read_records(log)) for log in logs] == [2, 1]


def test_a_void_is_for_the_failures_before_it_in_its_own_log(server, tmp_path):
    """All ranks void the step at the end of a run that fails; later replies count, in whichever log they are."""
    logs = [tmp_path / f"judge-{rank}.jsonl" for rank in (0, 1)]
    server.default = say("no")
    for log in logs:
        with judge_of(server, log) as judge:
            ask(judge, candidate(1))
            judge.void(3)
    with Judge(JudgeConfig(url=server.url, **QUICK, model=MODEL), logs[0], earlier=logs) as judge:
        assert ask(judge, candidate(1))[0].kind == "malformed" and judge.statistics()["replayed"] == 0
    sent = len(server.requests)
    with Judge(JudgeConfig(url=server.url, **QUICK, model=MODEL), logs[1], earlier=logs) as judge:
        assert ask(judge, candidate(1))[0].kind == "malformed" and judge.statistics()["replayed"] == 1
    assert len(server.requests) == sent == 3


def test_bad_logs(server, tmp_path):
    with pytest.raises(ValueError, match=r"no reward log .*none.jsonl"):
        judge_of(server, replay=tmp_path / "none.jsonl")
    other = tmp_path / "metrics.jsonl"
    other.write_text('{"step": 4, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is not a reward log: a record of step 4"):
        judge_of(server, replay=other)
    other.write_text("{broken\n")
    for options in ({"replay": other}, {"log": other}):
        with pytest.raises(ValueError, match="line 1 is damaged"):
            judge_of(server, **options)
    other.write_text('{"step": 4, "cut by a k')
    with judge_of(server, other) as judge:
        ask(judge)
    assert len(read_records(other)) == 1


def test_a_full_disk_is_an_error_and_no_score(server, tmp_path, monkeypatch):
    with judge_of(server, tmp_path / "a.jsonl") as judge:

        def full(file, record):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(RecordFile, "append", full)
        with pytest.raises(OSError, match="No space left"):
            ask(judge)


# ---- the key ----


@pytest.mark.slow
def test_the_key_goes_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_API_KEY", f" {KEY}\n")
    notes, log, seen = Notes(), tmp_path / "a.jsonl", []
    config = JudgeConfig(url=server.url, model=MODEL, **QUICK)
    with Judge(config, log, notes) as judge:
        for behave in [
            *map(echo_authorization, (200, 400, 401, 500, 503)),
            say(f"your key is {KEY}"),
            drop,
            cut,
            say(None, refusal=f"Bearer {KEY}"),
            say(scores(reasoning=f"Bearer {KEY}")),
            body(json.dumps({"choices": [{"message": {"content": KEY}}]}).replace("s", "\\u0073").encode()),
        ]:
            server.default = behave
            try:
                seen.append(judge.check())
            except ValueError as error:
                seen += [repr(error), repr(error.__cause__), repr(error.__context__)]
            server.plan = [behave] * 5  # then it works, so that no outage remains
            server.default = by_colour
            seen += map(repr, ask(judge))
            server.plan = []
        seen += [repr(judge), repr(config), repr(judge._key), repr(judge.client._client.headers), judge.json_reason]
        seen += [flags.to_json(config), repr(judge.statistics())]
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    texts = [*seen, repr(notes), log.read_text(), caplog.text, *capfd.readouterr()]
    for text in texts:
        for form in ("secret", KEY, json.dumps(KEY)[1:-1]):
            assert form not in text
    assert sum("[the key]" in text for text in texts) > 5, "they would have shown it"


def test_a_short_key_spoils_no_answer(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "1234")
    reply = {"index": 0, "message": {"content": scores(1, 2, 3, "with 1234 dots")}, "finish_reason": "stop"}
    server.plan = [body({"created": 1771234567, "choices": [reply]}), body({"created": 1771234567, "oops": "1234"})]
    with judge_of(server, tmp_path / "a.jsonl", concurrency=1) as judge:
        first, second = ask(judge, candidate(1), candidate(2))
    assert first == good(1, 2, 3) and second.kind == "empty"
    assert "1234" not in second.reason and "[the key]" in second.reason
    assert "with [the key] dots" in (tmp_path / "a.jsonl").read_text()


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "nul\0"[:3] + "\x07"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(server, monkeypatch, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(ValueError, match="JUDGE_API_KEY holds no key") as caught:
        judge_of(server)
    assert key not in str(caught.value)


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with judge_of(server) as judge:
        assert ask(judge) == [good(0, 1, 2)]


# ---- its life ----


def test_closing_cancels_what_waits(server):
    server.default = slow(5.0, by_colour)
    judge = judge_of(server, concurrency=2)
    futures = [judge.submit(candidate(i), 0) for i in range(30)]
    time.sleep(0.2)
    began = time.monotonic()
    judge.close()
    assert time.monotonic() - began < 5
    assert all(future.cancelled() for future in futures)
    gc.collect()  # shows what was left open, or never awaited
    with pytest.raises(CancelledError):
        futures[0].result()
    judge.close()
    for use in (lambda: judge.submit(candidate(), 0), judge.check):
        with pytest.raises(RuntimeError, match="the judge is closed"):
            use()


def test_closing_in_an_outage(server):
    server.stop()
    try:
        judge = judge_of(server, backoff=0.2, backoff_limit=1.0)
        futures = [judge.submit(candidate(i), 0) for i in range(30)]
        time.sleep(0.4)
        judge.close()
        assert all(future.cancelled() for future in futures)
        gc.collect()  # shows what was left open, or never awaited
    finally:
        server.start()


def test_one_candidate_may_be_cancelled(server):
    server.default = slow(0.2, by_colour)
    with judge_of(server, concurrency=1) as judge:
        first, second, third = (judge.submit(candidate(i), 0) for i in range(3))
        assert second.cancel()
        assert first.result(20) == good(0, 1, 2) and third.result(20) == good(2, 1, 2)
    assert len(server.requests) == 2


def test_statistics_since_the_last_time(server):
    server.plan = [slow(0.1, status(500)), by_colour, say("no"), by_colour, by_colour]
    with judge_of(server, concurrency=1) as judge:
        ask(judge, *map(candidate, range(4)))
        numbers = judge.statistics()
        assert judge.statistics() == {"calls": 0, "retries": 0, "replayed": 0, "failed": 0}
    assert all(type(value) is float for value in numbers.values())
    assert 0 < numbers["seconds_mean"] < numbers["seconds_p95"] and numbers["seconds_p95"] > 0.08
    assert {name: value for name, value in numbers.items() if "seconds" not in name} == {
        "calls": 4, "retries": 1, "replayed": 0, "failed": 0.25, "failed/malformed": 0.25,
    }  # fmt: skip


# ---- configuration ----


def test_the_configuration_becomes_flags(tmp_path, capsys):
    argv = ["--url=http://h:1/v1/", "--temperature", "none", "--replay", str(tmp_path), "--json-mode", "off"]
    config = flags.parse({"judge": JudgeConfig}, argv).config
    assert config.base == "http://h:1/v1" and config.temperature is None and config.replay == tmp_path
    assert json.loads(flags.to_json(config)) == {**dataclasses.asdict(config), "replay": str(tmp_path)}
    with pytest.raises(SystemExit):
        flags.parse({"judge": JudgeConfig}, ["--help"])
    assert "(" not in [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    with pytest.raises(flags.ConfigError, match="2 samples at temperature 0"):
        flags.parse({"judge": JudgeConfig}, ["--samples", "2"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": ""}, "needs a url, or a reward log"),
        ({"url": "localhost:8000/v1"}, "must be like"),
        ({"url": "http://"}, "or no host"),
        ({"url": "http://[::1/v1"}, "must be like"),
        ({"url": "http://me:pw@host/v1"}, "keys go into key_variable"),
        ({"url": "http://host/v1?key=pw"}, "keys go into key_variable"),
        ({"url": "http://host/v1/chat/completions"}, "without the path of a request: http://host/v1"),
        ({"model": ""}, "name of its model"),
        ({"key_variable": "sk-pw"}, "name of an environment variable"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"attempts": 0}, "attempts must"),
        ({"timeout": 0.0}, "timeout must be above 0 seconds"),
        ({"patience": float("nan")}, "patience must"),
        ({"temperature": -1.0}, "temperature must"),
        ({"samples": 3}, "the same reply"),
        ({"max_side": 8}, "max_side must be at least 16"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        JudgeConfig(**options)
    assert "pw" not in str(caught.value)
