"""Errors of the server, in the form of OpenAI's API: a status, a message, a stable code, and the name of the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ApiError", "error_body"]

NO_RETRY = {"x-should-retry": "false"}
"""Header that keeps OpenAI's client from sending a request again that would fail, or take as long, again."""


class ApiError(Exception):
    """An error that becomes the response.

    Args:
        status: Status of the response.
        code: Stable name of the kind of error.
        message: Sentence that says what was given and what is possible.
        param: Name of the field that is wrong.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON body of an error response."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
