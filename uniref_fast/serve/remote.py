"""Pictures behind URLs, read from allowed hosts only, and never from private addresses."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from uniref_fast.serve.errors import ApiError

__all__ = ["fetch"]

MAX_REDIRECTS = 3
SECONDS = 20.0
"""Longest time of one picture."""


def fetch(url: str, hosts: Sequence[str], most: int) -> bytes:
    """Return the content of a URL.

    The host name is resolved once, and the connection goes to the address that was checked. Redirects are checked in
    the same way. No proxy, cookie or credential is used.

    Args:
        url: URL of the scheme https.
        hosts: Hosts from which pictures may be read.
        most: Largest number of bytes.

    Raises:
        ApiError: If the URL is not allowed, or cannot be read.
    """
    end = time.monotonic() + SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        parts = _checked(url, hosts)
        try:
            status, place, content = _get(parts, end, most)
            following = urljoin(url, place or "")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failed(f"{parts.hostname} could not be read: {type(error).__name__}") from error
        if status in (301, 302, 303, 307, 308) and place:
            url = following
            continue
        if status != 200:
            raise _failed(f"{parts.hostname} answered with status {status}")
        return content
    raise _failed(f"more than {MAX_REDIRECTS} redirects")


def _failed(message: str) -> ApiError:
    return ApiError(400, "image_url_failed", message, "image")


def _checked(url: str, hosts: Sequence[str]) -> SplitResult:
    """Return the parts of an allowed URL."""
    try:
        parts = urlsplit(url)
        allowed = parts.scheme == "https" and parts.hostname in hosts and parts.port in (None, 443)
    except ValueError:
        allowed = False
    if not allowed or parts.username is not None or not url.isascii() or not url.isprintable() or " " in url:
        possible = f"https URLs of {', '.join(hosts)}" if hosts else "none; send the picture itself"
        raise ApiError(400, "image_url_not_allowed", f"this server reads {possible}", "image")
    return parts


def _address(host: str) -> tuple[socket.AddressFamily, str]:
    """Return an address of a host. Raises ApiError if any of its addresses is not a public one."""
    answers = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    found = [(family, str(place[0])) for family, _, _, _, place in answers]
    for _, text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not (address.is_global and inner.is_global) or address.is_multicast:
            raise ApiError(400, "image_url_not_allowed", f"{host} has an address that is not public", "image")
    return found[0]


def _get(parts: SplitResult, end: float, most: int) -> tuple[int, str | None, bytes]:
    """Return status, `Location` and content of one request."""
    host = str(parts.hostname)
    connection = http.client.HTTPSConnection(host, timeout=_left(end))
    try:
        connection.sock = plain = _connect(host, end)  # the attribute is None once the host closes the connection
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"accept": "image/*", "accept-encoding": "identity"})
        response = connection.getresponse()
        chunks, size = [], 0
        while response.status == 200 and (chunk := response.read1(1 << 16)):
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise _failed(f"the picture of {host} has more than {most:,} bytes")
            if not response.isclosed():  # the end of the content may close the connection
                plain.settimeout(_left(end))
        return response.status, response.getheader("location"), b"".join(chunks)
    finally:
        connection.close()


def _connect(host: str, end: float) -> ssl.SSLSocket:
    """Return a TLS connection to a checked address of a host."""
    family, address = _address(host)
    plain = socket.socket(family, socket.SOCK_STREAM)
    try:
        plain.settimeout(_left(end))
        plain.connect((address, 443))
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the picture took too long")
    return left
