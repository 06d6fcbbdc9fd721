"""The page at `/` of the server, with the headers that allow nothing but the page itself and the server's own API."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi import APIRouter, Response

__all__ = ["page", "router"]

router = APIRouter()


@router.get("/")
async def index() -> Response:
    """Return the page. It needs no key, because it holds no data; its requests to the API do."""
    html, headers = page()
    return Response(html, headers=headers)


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """Return the HTML of the page, and the headers of its response.

    The Content-Security-Policy names the page's own script and style by their SHA-256 digests.
    """
    html = (resources.files(__package__) / "page.html").read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_digest(html, b'script')}",
        f"style-src {_digest(html, b'style')}",
        "img-src blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _digest(html: bytes, tag: bytes) -> str:
    """Return the source expression of the page's only element with this tag."""
    (content,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), html, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
