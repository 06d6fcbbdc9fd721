"""Parse a judge's reply: three scores, or a kind of failure. A score is never taken from text that the judge quotes.

The policy that is trained paints the image that the judge describes, so any text may occur inside a reply, also JSON
objects with high scores. For that reason a reply is never searched: it is one JSON object with the keys of the request
and nothing else, or it is a failure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uniref_fast.rewards.types import AXES, Failure, Scores

__all__ = ["Reply", "excerpt", "parse_json", "read_completion", "read_scores", "shown"]

START = 160  # characters of a reply that a reason shows
WINDOW = 2**16  # bytes of a body from which they are taken, after secrets are removed
FENCES = ("```", "```json")
KEYS = ("reasoning", *AXES)
FINISHED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")  # the model ended the reply by itself
MOST_TOKENS = 10**9
Hide = Callable[[str], str]


@dataclass(frozen=True)
class Reply:
    """One choice of a chat completion.

    Attributes:
        text: Text of the message; None if it has none.
        finish_reason: Reason why the model stopped: "stop", "length", "content_filter", ...; None if it is not given.
        refusal: Text with which the model refused to answer.
        usage: Numbers of tokens as the server counts them, at most one level of nested objects.
    """

    text: str | None
    finish_reason: str | None = None
    refusal: str | None = None
    usage: dict[str, Any] | None = None


def parse_json(text: str, strict: bool = True) -> Any:
    """Parse one JSON value in time linear in its length.

    Args:
        text: JSON, with nothing but white space around it.
        strict: If True, control characters, line breaks included, are refused inside strings.

    Raises:
        ValueError: If the text is anything else, an object has a key twice, or the nesting is too deep for Python.
    """
    try:
        return json.loads(text, strict=strict, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_completion(body: bytes, hide: Hide = str) -> Reply | Failure:
    """Read the only choice of a chat completion.

    Args:
        body: Body of the HTTP response.
        hide: Function that removes secrets from a text; everything in the result has passed it.

    Returns:
        Reply, or a failure: "malformed" for a body that is not the JSON of a completion, "error" for one that has an
        error, even with a choice, "empty" for one without a choice.
    """

    def failure(kind: str, reason: str) -> Failure:
        return Failure(kind, f"HTTP 200, but {shown(hide(reason))}: {excerpt(body, hide)}")

    try:
        data = parse_json(body.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one; its text would repeat the body
        reason = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
        return failure("malformed", f"the body is no JSON ({reason})")
    if not isinstance(data, dict):
        return failure("malformed", "the body is no JSON object")
    choices = data.get("choices")
    if data.get("error"):
        return failure("error", "with an error")
    if not isinstance(choices, list) or not choices:
        return failure("empty", "without a choice")
    if len(choices) > 1:
        return failure("malformed", f"with {len(choices)} choices where one was asked for")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return failure("empty", "with a choice that has no message")
    if choice.get("error"):
        return failure("error", "with an error in its choice")
    finish, refusal = choice.get("finish_reason"), message.get("refusal")
    try:
        text = _content(message.get("content"))
    except ValueError as error:
        return failure("malformed", str(error))
    for name, value in (("finish_reason", finish), ("refusal", refusal)):
        if value is not None and not isinstance(value, str):
            return failure("malformed", f"with a {name} that is no string")
    return Reply(
        None if text is None else hide(text),
        None if finish is None else shown(hide(finish)),
        shown(hide(refusal)) if refusal else None,
        _usage(data.get("usage"), hide),
    )


def read_scores(reply: Reply) -> Scores | Failure:
    """Read the scores of a reply that is one whole JSON object with the keys that were asked for.

    Two things may surround the object: thinking at the beginning of the reply (`<think>...</think>`), and one Markdown
    code fence. No other text may. Each axis is a JSON number from 0 to 10. "reasoning" is a
    string and may be missing. Any other key is refused, since unescaped quotation marks in the reasoning could add it,
    and so is a key that occurs twice.

    Returns:
        Scores, or a failure: "refused"; "truncated" for a reply that the model did not end by itself, whatever its
        text; "empty"; "malformed" for text that is not one JSON object; "schema" for an object with other keys or with
        other values than scores.
    """
    text, finish = (reply.text or "").strip(), (reply.finish_reason or FINISHED[0]).lower()
    if reply.refusal is not None or finish == "content_filter":
        return Failure("refused", f"{reply.finish_reason}: {shown(reply.refusal or text) or 'without any text'}")
    if finish not in FINISHED:
        advice = "; raise max_tokens" if finish == "length" else ""
        return Failure(
            "truncated", f"the model did not end its reply, finish_reason {reply.finish_reason}{advice}: {shown(text)}"
        )
    if not text:
        return Failure("empty", f"a message without text, finish_reason {reply.finish_reason}")
    try:
        found = parse_json(_answer(text), strict=False)  # line breaks inside the reasoning are usual
    except ValueError as error:
        return Failure("malformed", f"the reply is not one JSON object ({shown(str(error))}): {shown(text)}")
    if not isinstance(found, dict):
        return Failure("malformed", f"the reply is JSON, but no object: {shown(text)}")
    return _scores(found, text)


def excerpt(body: bytes, hide: Hide) -> str:
    """Return the start of a body of any encoding as `shown` does, without secrets."""
    text = body[:WINDOW].decode("utf-8", "replace")
    return shown(hide("".join(c for c in text if c.isprintable() or c.isspace())))  # UTF-16 has NUL in between


def shown(text: str) -> str:
    """Return the start of a text on one line, with printable characters only."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 20 * START].split()))
    return line if len(line) <= START else line[:START] + "..."


def _content(content: Any) -> str | None:
    """Return the text of a message; some servers give it in parts, as requests have them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError("with a content that is not text")
    parts = [part.get("text") for part in content if part.get("type") not in ("thinking", "reasoning")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("with a part of the content that is not text")
    return "".join(parts)


def _usage(usage: Any, hide: Hide, nested: bool = False) -> dict[str, Any] | None:
    """Return the numbers of tokens, without whatever else a server puts there."""
    if not isinstance(usage, dict):
        return None
    counts: dict[str, Any] = {}
    for name, value in usage.items():
        if type(value) is int and 0 <= value <= MOST_TOKENS:
            counts[shown(hide(name))] = value
        elif not nested and (inner := _usage(value, hide, nested=True)):
            counts[shown(hide(name))] = inner
    return counts


def _answer(text: str) -> str:
    """Return what follows the thinking, without the code fence around it."""
    if text.startswith("<think>"):
        _, end, text = text.partition("</think>")
        if not end:
            raise ValueError("its thinking has no end")
        text = text.strip()
    elif "</think>" in text and not text.startswith(("{", "`")):
        raise ValueError(
            "</think> without <think> at the start; have the server separate the thinking, as vLLM does with "
            "--reasoning-parser"
        )
    first, newline, rest = text.partition("\n")
    if newline and first.strip().lower() in FENCES:
        if not rest.endswith("```"):
            raise ValueError("its code fence has no end")
        text = rest[:-3]
    return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)!r} occurs twice")
        found[name] = value
    return found


def _scores(found: dict[str, Any], text: str) -> Scores | Failure:
    if missing := [axis for axis in AXES if axis not in found]:
        return Failure("schema", f"no score for {', '.join(missing)}: {shown(text)}")
    if unknown := [shown(name) for name in found if name not in KEYS]:
        return Failure("schema", f"only {', '.join(KEYS)} were asked for, got {shown(', '.join(unknown))}")
    if not isinstance(found.get("reasoning", ""), str):
        return Failure("schema", f"reasoning must be a string: {shown(text)}")
    for axis in AXES:
        value = found[axis]
        if type(value) not in (int, float) or not 0 <= value <= 10:  # a bool is no int here; NaN fails the comparison
            return Failure("schema", f"{axis} must be a number from 0 to 10, got {_json(value)}")
    return Scores({axis: float(found[axis]) for axis in AXES})


def _json(value: Any) -> str:
    try:
        return shown(json.dumps(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        return f"a value of type {type(value).__name__}"
