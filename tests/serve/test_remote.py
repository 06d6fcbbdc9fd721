"""Pictures behind URLs: which are allowed, and that nothing else is asked."""

import http.client
import io
import socket

import pytest

from uniref_fast.serve import remote
from uniref_fast.serve.errors import ApiError

HOSTS = ("images.example", "cdn.example")
PUBLIC = "93.184.215.14"


class Web:
    """Answers of hosts by URL; each is (status, location, content)."""

    def __init__(self, monkeypatch):
        self.pages, self.asked, self.addresses = {}, [], {host: [PUBLIC] for host in HOSTS}
        monkeypatch.setattr(socket, "getaddrinfo", self.resolve)
        monkeypatch.setattr(remote, "_get", self.get)

    def resolve(self, host, port, **_):
        return [
            (socket.AF_INET6 if ":" in text else socket.AF_INET, 1, 6, "", (text, port))
            for text in self.addresses[host]
        ]

    def get(self, parts, end, most):
        remote._address(parts.hostname)
        self.asked.append(parts.geturl())
        return self.pages[parts.geturl()]


@pytest.fixture
def web(monkeypatch):
    return Web(monkeypatch)


def refused(url, code, hosts=HOSTS):
    with pytest.raises(ApiError) as caught:
        remote.fetch(url, hosts, 1000)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, "image")
    return caught.value.message


def test_redirects_among_allowed_hosts_are_followed(web):
    web.pages = {
        "https://images.example/a": (302, "/b", b""),
        "https://images.example/b": (307, "https://cdn.example/c", b""),
        "https://cdn.example/c": (200, None, b"picture"),
    }
    assert remote.fetch("https://images.example/a", HOSTS, 1000) == b"picture"


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/a",
        "http://images.example/a",
        "https://images.example:8443/a",
        "https://user:key@images.example/a",
        "https://images.example@other.example/a",
        "https://images.example.other.example/a",
        "https://127.0.0.1/a",
        "https://[::1]/a",
        "https://[::1/a",
        "https://images.example/a\r\nx: y",
        "https://images.example/ä",
    ],
)
def test_other_urls_are_refused_at_first_and_after_a_redirect(web, url):
    refused(url, "image_url_not_allowed")
    assert not web.asked
    if url.isascii() and url.isprintable():
        web.pages = {"https://images.example/a": (302, url, b"")}
        refused("https://images.example/a", "image_url_failed" if url.endswith("[::1/a") else "image_url_not_allowed")
        assert web.asked == ["https://images.example/a"]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "2002:a00:1::1"],
)  # fmt: skip
def test_hosts_with_an_address_that_is_not_public_are_refused(web, address):
    web.addresses["images.example"] = [PUBLIC, address]
    assert "not public" in refused("https://images.example/a", "image_url_not_allowed")
    assert not web.asked


def test_answers_that_are_no_picture(web):
    web.pages = {"https://images.example/a": (404, None, b""), "https://images.example/r": (302, "/r", b"")}
    assert "status 404" in refused("https://images.example/a", "image_url_failed")
    assert "more than 3 redirects" in refused("https://images.example/r", "image_url_failed")
    assert len(web.asked) == 5
    assert "none" in refused("https://images.example/a", "image_url_not_allowed", hosts=())


class Connection(io.BytesIO):
    """A connection that answers with its content."""

    sent = b""

    def sendall(self, data):
        self.sent += data

    def makefile(self, *_):
        return io.BytesIO(self.getvalue())

    def settimeout(self, seconds):
        assert 0 < seconds <= remote.SECONDS


def test_one_request_is_limited_and_carries_nothing_of_ours(monkeypatch):
    answer = Connection(b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + bytes(2000))
    monkeypatch.setattr(remote, "_connect", lambda host, end: answer)
    assert "more than 1,000 bytes" in refused("https://images.example/a?b=c", "image_url_failed")
    assert answer.sent.startswith(b"GET /a?b=c HTTP/1.1\r\nHost: images.example\r\n")
    assert b"cookie" not in answer.sent.lower() and b"authorization" not in answer.sent.lower()

    def broken(host, end):
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(remote, "_connect", broken)
    refused("https://images.example/a", "image_url_failed")


def test_a_response_that_closes_its_connection(monkeypatch):
    """Newer versions of Python close it when the content is complete."""
    answer = Connection(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\nconnection: close\r\n\r\n" + bytes(500))
    read, closed = http.client.HTTPResponse.read1, []

    def read1(self, most=-1):
        content = read(self, most) if not self.isclosed() else b""
        if not self.length and not closed:
            self._close_conn()
            closed.append(True)
        return content

    def settimeout(seconds):
        assert not closed

    monkeypatch.setattr(http.client.HTTPResponse, "read1", read1)
    monkeypatch.setattr(answer, "settimeout", settimeout)
    monkeypatch.setattr(remote, "_connect", lambda host, end: answer)
    assert remote.fetch("https://images.example/a", HOSTS, 1000) == bytes(500) and closed


def test_the_connection_goes_to_the_checked_address(monkeypatch):
    """A second answer of the name server could be a private address."""
    answers, connected = [PUBLIC, "127.0.0.1"], []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", (answers.pop(0), 443))])

    def connect(self, address):
        connected.append(address)
        raise OSError

    monkeypatch.setattr(socket.socket, "connect", connect)
    refused("https://images.example/a", "image_url_failed")
    assert connected == [(PUBLIC, 443)]
