"""The page at `/`: what its response allows, and its use in a real browser where Chromium is installed."""

import base64
import hashlib
import re

from uniref_fast.serve.page import page


def test_the_policy_allows_the_own_script_and_style_only():
    html, headers = page()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html.decode(), flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_the_page_needs_no_other_resource():
    """Nothing outside is loaded, and no code or style sits in an attribute, which the policy would block."""
    html = page()[0].decode()
    assert not re.findall(r"(?:https?:)?//[a-z0-9]+\.", html)
    markup = re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL)
    assert not re.findall(r"\s(?:on[a-z]+|style)=", markup)
    assert re.findall(r"\s(?:src|href)=\"([^\"]*)\"", markup) == ["data:,"]
