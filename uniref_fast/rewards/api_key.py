"""API key of a judge: read from the environment, sent to the server, hidden everywhere else."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["ApiKey"]


class ApiKey:
    """The API key in an environment variable; no key if the variable is not set.

    Args:
        variable: Name of the environment variable.

    Attributes:
        variable: Name of the environment variable.
        headers: HTTP headers that send the key; empty without a key.

    Raises:
        ValueError: If the key cannot be sent; the message does not show it.
    """

    def __init__(self, variable: str) -> None:
        self.variable = variable
        key = os.environ.get(variable, "").strip()
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(f"the environment variable {variable} holds no key: it has spaces or unusual characters")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._pattern = re.compile("".join(map(_forms, key)), re.IGNORECASE) if key else None

    def hide(self, value: Any) -> Any:
        """Return a text, or a JSON value with all its texts, without the key, which some servers repeat.

        Everything that is logged, printed or raised passes this function. The key is found as it is and as JSON, URLs,
        HTML and Python's repr escape it, any of its characters or all of them, in upper or lower case.
        """
        if isinstance(value, str):
            return self._pattern.sub("[the key]", value) if self._pattern is not None else value
        if isinstance(value, Mapping):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    def filter(self, record: logging.LogRecord) -> bool:
        """Hide the key in a log record of the HTTP library, which logs response headers when it is debugged."""
        record.msg, record.args = self.hide(record.getMessage()), ()
        return True

    def __repr__(self) -> str:
        return f"ApiKey({self.variable})"


def _forms(character: str) -> str:
    """Return a regular expression for a character of the key and its escaped forms, each of bounded length."""
    code, plain = ord(character), re.escape(character)
    backslash = rf"\\{{0,8}}(?:{plain}|u00{code:02x}|x{code:02x})"  # a text in JSON in JSON has several of them
    entities = [f"&#x0{{0,4}}{code:x};", f"&#0{{0,4}}{code};"]
    if (named := html.escape(character)) != character:
        entities.append(named)
    return f"(?:{backslash}|%(?:25){{0,4}}{code:02x}|{'|'.join(entities)})"
