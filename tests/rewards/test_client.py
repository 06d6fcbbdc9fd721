"""Odd, endless and indiscreet answers: each becomes a failure in the log, within a bound, and none shows the key."""

import base64
import gzip
import html
import json
import logging
import threading
import tracemalloc
import urllib.parse
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge_server import JudgeServer, body, by_colour, raw, say, scores, slow, status
from PIL import Image

from uniref_fast.data.dataset import Row
from uniref_fast.files import read_records
from uniref_fast.rewards import client
from uniref_fast.rewards.api_key import ApiKey
from uniref_fast.rewards.client import LIMIT, JudgeClient
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.rewards.judge import Judge
from uniref_fast.rewards.types import Candidate, Failure, Scores

KEY = 'sk-Gh7/"+<secret>&\\9'
IMAGE = Image.new("RGB", (8, 8), (1, 2, 3))
GOOD = Scores({"integration": 1.0, "consistency": 2.0, "quality": 3.0})
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("JUDGE_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server():
    with JudgeServer() as server:
        yield server


def judge_of(server, log=None, notify=None, **options):
    quick = {
        "timeout": 20.0,
        "backoff": 0.01,
        "backoff_limit": 0.02,
        "attempts": 1,
        "patience": 20.0,
        "json_mode": "off",
    }
    return Judge(JudgeConfig(**{"url": server.url, "model": "judge-1", **quick, **options}), log, notify)


def ask(judge, behave=None, server=None):
    """The result of one call; afterwards another one works, so that no outage remains."""
    candidate = Candidate((0, 0, 0), "x", (), IMAGE, Row("", (), None, None, ""))
    if behave is None:
        return judge.submit(candidate, 3).result(60)
    server.plan = [behave]
    result = judge.submit(candidate, 3).result(60)
    server.plan = []
    server.wait_closed()
    assert judge.submit(candidate, 3).result(60) == GOOD
    return result


def http(start="HTTP/1.1 200 OK", headers=(), content=b"{}"):
    head = "".join(f"{line}\r\n" for line in (start, *headers, f"Content-Length: {len(content)}"))
    return head.encode("utf-8", "surrogatepass") + b"\r\n" + content


def answer(**message):
    return {"choices": [{"message": {"content": scores(1, 2, 3), **message}, "finish_reason": "stop"}]}


FULL = json.dumps(answer()).encode()
DEEP = b'{"choices": [{"message": {"content": "x"}}], "usage": ' + b'{"a":' * 900 + b"1" + b"}" * 901
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("charset", ["utf-16", "utf-32", "hex", "zlib", "rot13", "idna", "punycode", "undefined", "no"])
def test_the_charset_that_a_server_names_is_not_used(server, tmp_path, charset):
    kind = {"Content_Type": f"application/json; charset={charset}"}
    with judge_of(server, tmp_path / "a.jsonl") as judge:
        assert ask(judge, status(200, FULL, **kind), server) == GOOD
        assert ask(judge, status(200, b"\xff\xfe{\x00", **kind), server).kind == "malformed"
        assert ask(judge, status(404, b"\xff\xfe{\x00", **kind), server).kind == "status"
    assert [("failure" in record) for record in read_records(tmp_path / "a.jsonl")] == [0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "behave, kind",
    [
        (status(200, b'{"a":' * 100_000), "malformed"),
        (status(200, b"[" * 100_000), "malformed"),
        (status(200, FULL[:-1] + b"\xff}"), "malformed"),
        (status(200, FULL.decode().encode("utf-16")), "malformed"),
        (status(200, FULL, Content_Type="text/html"), None),
        (body(answer(content="\ud800 \x1b[31m")), "malformed"),
        (body(answer(content=json.loads('"' + "\\ud800" * 50 + '"'))), "malformed"),
        (body({**answer(), "usage": {"a": {"b": {"c": 1}}}}), None),
        (status(200, DEEP), "malformed"),
        (status(204, b""), "malformed"),
        (status(206, FULL), None),
        (status(299, FULL), None),
        (status(300), "status"),
        (status(304, b""), "status"),
        (status(418), "status"),
        (status(451), "status"),
        (status(599), "overloaded"),
        (raw(http("HTTP/1.1 999 What")), "overloaded"),
        (raw(http("HTTP/1.1 99 What")), "connection"),
        (raw(http("HTTP/1.1 1000 What")), "connection"),
        (raw(http("HTTP/1.1 200")), "empty"),
        (raw(http("HTTP/9.9 200 OK")), "empty"),
        (raw(http("HTTP/1.1 101 Switching Protocols")), "connection"),
        (raw(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + http(content=FULL)), None),
        (raw(b"hello\r\n\r\n"), "connection"),
        (raw(b"\x00" * 1000), "connection"),
        (raw(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000), "connection"),
        (raw(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 500_000), "connection"),
        (raw(http(headers=["Bad Header"])), "connection"),
        (raw(http(headers=[": x"])), "connection"),
        (raw(http(headers=["Content-Length: -1"])), "connection"),
        (raw(http(headers=["Content-Length: 1"])), "connection"),
        (raw(http(headers=["X: \ud800\u0100"], content=FULL)), None),
        (raw(CHUNKED + b"zz\r\n"), "connection"),
        (raw(CHUNKED + b"5\r\nab"), "connection"),
        (raw(CHUNKED + b"ffffffffffffffffffff\r\nab"), "connection"),
        (raw(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in FULL) + b"0\r\n\r\n"), None),
        (status(200, FULL, Set_Cookie="a=b; Max-Age=99999999999999999999; Path=\x7f; Domain=[::1"), None),
        (status(200, FULL, Content_Encoding="gzip"), "malformed"),
        (status(200, FULL, Content_Encoding="br"), "malformed"),
        (status(200, FULL, Content_Encoding="zstd"), "malformed"),
        (status(200, FULL, Content_Encoding="rot13"), "malformed"),
        (status(200, FULL, Content_Encoding=", identity"), None),
        (status(200, gzip.compress(FULL), Content_Encoding="gzip"), None),
        (status(200, zlib.compress(FULL), Content_Encoding="Deflate"), None),
        (status(200, zlib.compress(FULL)[2:-4], Content_Encoding="deflate"), None),
        (status(200, gzip.compress(FULL)[:-30], Content_Encoding="gzip"), "malformed"),
        (status(200, gzip.compress(gzip.compress(FULL)), Content_Encoding="gzip, gzip"), "malformed"),
        (status(500, b"\xff", Content_Encoding="gzip"), "overloaded"),
        *((raw(http("HTTP/1.1 429 X", [f"Retry-After: {text}", f"Date: {text}"])), "overloaded") for text in (
            "9" * 5000, "nan", "-1", "1e9", "٣", "Thu, 01 Jan 99999999999999999999 00:00:00 GMT", "Thu", ",", "0:0:0",
            "Thu, 01 Jan 2015 00:00:00 +9999999999", "Thu, 99 Foo 2015 99:99:99 GMT", "1 2 3 4 5 6")),
        *((raw(http("HTTP/1.1 307 X", [f"Location: {url}"])), "status") for url in (
            "/v1/chat/completions", "http://[", "http://\x7f", "//", "http://" + "a" * 70_000, "http://xn--\xff.x/",
            "ftp://x", "http://a:99999999", "http://user:pw@x", "", "%", "http://١/")),
    ],
)  # fmt: skip
def test_every_answer_is_a_reply_or_a_failure_of_a_kind(server, tmp_path, behave, kind):
    with judge_of(server, tmp_path / "a.jsonl") as judge:
        result = ask(judge, behave, server)
    assert (result.kind if isinstance(result, Failure) else None) == kind, result
    record = read_records(tmp_path / "a.jsonl")[0]
    assert record.get("failure", {}).get("kind") == kind
    if kind is None:
        assert result == GOOD
    else:
        assert result.reason == record["failure"]["reason"] and len(result.reason) < 500
        assert all(c.isprintable() for c in result.reason)


def test_an_endless_redirect_is_not_followed(server):
    server.plan = [status(code, Location=server.url + "/chat/completions") for code in (301, 302, 303, 307, 308)]
    with judge_of(server) as judge:
        asked = len(server.requests)
        assert [ask(judge).kind for _ in range(5)] == ["status"] * 5
        assert len(server.requests) == asked + 5


def test_cookies_are_not_kept(server):
    with judge_of(server) as judge:
        ask(judge, status(200, FULL, Set_Cookie="a=b"), server)
        assert "Cookie" not in server.headers[-1] and not judge.client._client.cookies


TOKENS = st.one_of(st.text(st.characters(exclude_characters="\r\n"), max_size=12), st.sampled_from(
    ["gzip", "deflate", "identity", "chunked", "0", "5", "-1", "9" * 40, "utf-16", "application/json; charset=idna",
     "close", "http://[", "//", "Thu, 01 Jan 2015 00:00:01 GMT", "Thu, 01 Jan 0 99:00:00", "a=b"]))  # fmt: skip
NAMES = st.sampled_from(
    ["Content-Type", "Content-Encoding", "Transfer-Encoding", "Content-Length", "Retry-After", "Date", "Location",
     "Set-Cookie", "Connection", "Link", "Upgrade", "WWW-Authenticate", "X-\u00e9", "", "Vary"])  # fmt: skip
JSONS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8) | st.just(scores(1, 2, 3)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "error", "finish_reason", "refusal", "usage", "type", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
COMPLETIONS = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"message": JSONS}, optional={"finish_reason": JSONS}), max_size=2)},
    optional={"usage": JSONS, "error": JSONS},
)
BODIES = st.one_of(st.binary(max_size=60), st.one_of(JSONS, COMPLETIONS).map(lambda value: json.dumps(value).encode()))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    code=st.sampled_from([200, 200, 200, 201, 302, 404, 429, 500]) | st.integers(100, 999),
    headers=st.lists(st.tuples(NAMES, TOKENS), max_size=3),
    content=BODIES,
    packed=st.sampled_from([None, None, gzip.compress, zlib.compress]),
    cut=st.integers(0, 400),
)
def test_no_answer_raises_an_error(server, tmp_path, code, headers, content, packed, cut):
    """Whatever the bytes of an answer are, a call ends with a result, which is in the log."""
    log = tmp_path / "a.jsonl"
    log.unlink(missing_ok=True)
    data = packed(content) if packed else content
    data = http(f"HTTP/1.1 {code} X", [f"{name}: {value}" for name, value in headers], data)
    with judge_of(server, log) as judge:
        result = ask(judge, raw(data[:-cut] if cut < len(data) // 2 else data), server)
        assert isinstance(result, (Scores, Failure))
    records = read_records(log)
    assert len(records) == 2 and ("failure" in records[0]) == isinstance(result, Failure)


# ---- bounds ----


def endless(handler, request):
    """An answer without an end, as fast as it is taken."""
    handler.server.judge.sent = 0
    handler.close_connection = True
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"choices": "')
    while handler.server.judge.sent < 200 * 2**20:
        handler.server.judge.sent += handler.wfile.write(b"x" * 2**16)


def bomb(pack, coding, layers=1):
    """256 MiB of one character, packed."""
    data = b'{"choices": "' + b"x" * 2**28
    for _ in range(layers):
        data = pack(data)
    assert len(data) < 2**20
    return status(200, data, Content_Encoding=", ".join([coding] * layers))


@pytest.mark.parametrize(
    "behave, kind",
    [
        (endless, "oversized"),
        (status(200, b"x" * 2**24), "oversized"),
        (status(404, b"x" * 2**24), "status"),
        (bomb(gzip.compress, "gzip"), "oversized"),
        (bomb(zlib.compress, "deflate"), "oversized"),
        (bomb(gzip.compress, "gzip", 3), "malformed"),
        (raw(CHUNKED[:-2] + b"Content-Encoding: gzip\r\n\r\n" + b"".join(
            b"%x\r\n%b\r\n" % (len(part), part) for part in [gzip.compress(b"x" * 2**24)] * 200)), "oversized"),
    ],
)  # fmt: skip
def test_an_answer_is_taken_up_to_a_limit(server, behave, kind):
    with judge_of(server, timeout=30.0, concurrency=4) as judge:
        assert ask(judge) == GOOD
        tracemalloc.start()
        try:
            result = ask(judge, behave, server)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert result.kind == kind and (kind != "oversized" or f"more than {LIMIT} bytes" in result.reason)
    assert peak < 40 * 2**20, f"{peak / 2**20:.0f} MiB"
    if behave is endless:
        assert server.sent < 2 * LIMIT + 2**24, "the connection is closed at the limit"


def test_the_largest_answer_that_is_taken(server):
    data = FULL + b" " * (LIMIT - len(FULL))
    with judge_of(server) as judge:
        assert ask(judge, status(200, data), server) == GOOD
        assert ask(judge, status(200, data + b" "), server).kind == "oversized"
        assert ask(judge, status(200, gzip.compress(data), Content_Encoding="gzip"), server) == GOOD


@pytest.mark.slow
def test_the_list_of_models_has_the_same_bounds(server):
    models = server.models
    try:
        odd = [body({"data": [{"id": [[]]}, {"id": 7}, 3]}), body({"data": 3}), body([]), status(200, b"[" * 10**6)]
        for behave in [*odd, endless, raw(http(headers=["Content-Encoding: gzip"])), slow(2.6, models)]:
            server.models, server.plan = behave, [status(404)]
            with judge_of(server, timeout=2.0) as judge, pytest.raises(ValueError, match="lists no models"):
                judge.check()
    finally:
        server.models = models


@pytest.mark.slow
def test_an_answer_is_parsed_outside_the_loop_and_within_the_timeout(server, monkeypatch):
    """While one answer is read, however long that takes, other calls time out as they should."""
    reading, go_on, read = threading.Event(), threading.Event(), client.read_completion

    def stuck(*args):
        assert threading.current_thread().name.startswith("judge-read")
        reading.set()
        go_on.wait(30)
        return read(*args)

    monkeypatch.setattr(client, "read_completion", stuck)
    with judge_of(server, timeout=2.0) as judge:
        result = ask(judge)
        assert reading.is_set() and not go_on.is_set()
        assert result.kind == "timeout" and "within 2 s" in result.reason
        go_on.set()
        monkeypatch.undo()
        assert ask(judge) == GOOD


# ---- the key ----


def forms(key):
    """The key as servers may write it."""
    text = json.dumps(key)[1:-1]
    return [
        key,
        text,
        json.dumps(text)[1:-1],
        "".join(f"\\u{ord(c):04x}" for c in key),
        "".join(f"\\u{ord(c):04X}" for c in key[:5]) + key[5:],
        key.replace("/", "\\/"),
        urllib.parse.quote(key),
        urllib.parse.quote(key, safe=""),
        urllib.parse.quote(urllib.parse.quote(key, safe="")).lower().replace("g", "G").replace("sk-gh7", "sk-Gh7"),
        html.escape(key),
        "".join(f"&#{ord(c)};" for c in key),
        repr(key.encode())[2:-1],
        f"Bearer {key}",
        key * 3,
    ]


def test_the_key_is_hidden_in_every_form(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    key = ApiKey("JUDGE_API_KEY")
    for form in forms(KEY):
        hidden = key.hide(f"a{form}z")
        assert (
            hidden.startswith("a")
            and hidden.endswith("z")
            and hidden.replace("Bearer ", "")[1:-1] == "[the key]" * (3 if form == KEY * 3 else 1)
        ), form
    assert key.hide({KEY: [KEY, {"a": (KEY, 1, None)}]}) == {"[the key]": ["[the key]", {"a": ["[the key]", 1, None]}]}
    monkeypatch.setenv("JUDGE_API_KEY", "")
    assert ApiKey("JUDGE_API_KEY").hide(KEY) == KEY


def secrets():
    """Answers that repeat the key in every place there is."""
    for form in (forms(KEY)[0], forms(KEY)[4]):
        yield status(200, {**answer(), "id": form, "model": form})
        yield status(200, {**answer(), "usage": {form: 1, "details": {form: 2}, "text": form}})
        yield status(200, {"choices": [{"message": {"content": scores(1, 2, 3)}, "finish_reason": form}]})
        yield status(200, {"choices": [{"message": {"content": form, "refusal": form}, "finish_reason": "stop"}]})
        yield status(200, {"choices": [{"message": {"content": form}, "finish_reason": form}], "error": form})
        yield say(scores(1, 2, 3, form))
        yield say(scores(1, 2, form))
        yield say(scores(1, 2, "x" * 120 + form))
        yield say('{"integration": "' + form + '"}')
        yield say('{"' + form + '": 1, "' + form + '": 2}')
        yield say(json.dumps({"integration": 1, "consistency": 1, "quality": 1, form: 1}))
        yield say("x" * 150 + form)
        yield say([{"type": "text", "text": form[:4]}, {"type": "text", "text": form[4:]}])
        for code in (200, 307, 401, 404, 429, 500, 503):
            yield status(
                code, form.encode(), Location="http://x/" + form, X_Key=form, Retry_After=form, Set_Cookie=form
            )
            yield status(code, form.encode("utf-16"))
            yield status(code, b"y" * 140 + form.encode())
            yield status(code, form.encode(), Content_Encoding=form)
        yield raw(http("HTTP/1.1 404 " + form))
        yield raw(f"{form}\r\n\r\n".encode())
        yield raw(http(headers=[form]))
        yield raw(CHUNKED + form.encode())


@pytest.mark.slow
def test_the_key_is_written_nowhere(server, tmp_path, monkeypatch, caplog, capfd):
    for name in client.LOGGERS:
        caplog.set_level(logging.DEBUG, name)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    notes, log, seen = [], tmp_path / "a.jsonl", []
    with judge_of(server, log, lambda kind, **details: notes.append((kind, details))) as judge:
        for behave in secrets():
            seen.append(repr(ask(judge, behave, server)))
        server.models = body({"data": [{"id": form} for form in forms(KEY)]})
        for behave in [*secrets()][:40:2]:
            server.plan = [behave]
            try:
                seen.append(judge.check())
            except ValueError as error:
                seen += [repr(error), repr(error.__cause__), repr(error.__context__)]
            server.plan = []
        for behave in [status(503, KEY.encode()), raw(KEY.encode() + b"\r\n\r\n")]:  # an outage tells its reason
            server.plan = [behave] * 4
            judge.config.__dict__["attempts"] = 6
            assert ask(judge) == GOOD
    server.models = body({"data": []})
    assert len(notes) >= 4
    texts = {"results": "\n".join(seen), "notes": repr(notes), "log": log.read_text(), "logging": caplog.text}
    texts |= dict(zip(("stdout", "stderr"), capfd.readouterr(), strict=True))
    for where, text in texts.items():
        for read in (text, urllib.parse.unquote(text), html.unescape(text), text.encode().decode("unicode_escape")):
            assert "secret" not in read.lower() and "sk-gh7" not in read.lower(), where
    assert min(texts[where].count("[the key]") for where in ("results", "notes", "log", "logging")) > 1


def test_the_key_is_hidden_in_the_logs_of_the_http_library(server):
    """The filter is set for loggers by name, so a new logger would not be filtered."""
    used = set()

    class Names(logging.Handler):
        def emit(self, record):
            used.add(record.name)

    handler, root = Names(level=logging.DEBUG), logging.getLogger()
    level, _ = root.level, root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with judge_of(server) as judge:
            ask(judge)
            assert {name for name in used if "http" in name} <= {*client.LOGGERS}
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert "httpcore2.http11" in used


def test_closing_while_an_answer_comes(server):
    server.plan = [endless, slow(3.0, by_colour)]
    judge = judge_of(server)
    future = judge.submit(Candidate((0, 0, 0), "x", (), IMAGE, Row("", (), None, None, "")), 0)
    judge.close()
    assert future.cancelled() or future.result(0)
    server.plan = []
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("judge")]


def test_a_key_of_any_characters_is_hidden(monkeypatch):
    for number in range(33, 127):
        text = f"a{chr(number)}9z{chr(number)}"
        monkeypatch.setenv("JUDGE_API_KEY", text)
        for form in (*forms(text)[:4], base64.b64encode(b"").decode() + text):
            assert "9z" not in ApiKey("JUDGE_API_KEY").hide(form)


def test_no_key_is_needed(server):
    with judge_of(server) as judge:
        assert ask(judge) == GOOD and isinstance(judge.client, JudgeClient)
    assert "Authorization" not in server.headers[-1] and server.headers[-1]["Accept-Encoding"] == "identity"
