"""What a judge's reply says: three scores, or the kind of failure. Never a score that the judge did not give."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from uniref_fast.training.rewards import AXES, Failure, Scores

__all__ = ["Reply", "read_completion", "read_scores", "shown"]

NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:/\s*10)?\s*")
START = 160  # characters of a reply that a reason shows


@dataclass(frozen=True)
class Reply:
    """One choice of a chat completion.

    Attributes:
        text: of the message; None where it has none.
        finish_reason: why the model stopped: "stop", "length", "content_filter", ...
        refusal: what the model said when it refused.
        usage: tokens, as the server counts them.
    """

    text: str | None
    finish_reason: str | None = None
    refusal: str | None = None
    usage: dict[str, Any] | None = None


def read_completion(body: str) -> Reply | Failure:
    """The first choice of a chat completion.

    Returns:
        Failure "malformed" for a body that is not JSON, "empty" for one without a choice.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return Failure("malformed", f"HTTP 200, but no chat completion: {shown(body)}")
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Failure("empty", f"HTTP 200, but no choice with a message: {shown(body)}")
    if isinstance(text, list):  # some servers give a message in parts, as requests have them
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    finish, usage = choice.get("finish_reason"), data.get("usage")
    return Reply(
        None if text is None else str(text),
        None if finish is None else str(finish),
        str(refusal) if refusal else None,
        usage if isinstance(usage, dict) else None,
    )


def read_scores(reply: Reply) -> Scores | Failure:
    """The scores in a reply: those of the last whole JSON object in its text that has all axes.

    Text around the object and thinking before it (`<think>...</think>`) are passed over; objects within objects are not
    looked into. A score is a number from 0 to 10, or a text that can only mean one: "7", "7.5", "7/10". Anything else
    is none, such as true, NaN, "8-9", "70%", a list, or two scores under the same name.

    Returns:
        Failure "refused", "empty", "truncated" (stopped at the limit of tokens before an object was whole),
        "malformed" (no JSON object) or "schema" (an object without all axes or with something else than scores).
    """
    text, truncated = reply.text or "", reply.finish_reason == "length"
    if reply.refusal is not None or reply.finish_reason == "content_filter":
        return Failure("refused", f"{reply.finish_reason}: {shown(reply.refusal or text) or 'without a word'}")
    objects = _objects(_answer(text))
    whole = [found for found in objects if all(axis in found for axis in AXES)]
    if whole:
        return _scores(whole[-1])
    if truncated:
        return Failure("truncated", f"the limit of tokens came before a whole JSON object; raise it: {shown(text)}")
    if not text.strip():
        return Failure("empty", f"a message without text, finish_reason {reply.finish_reason}")
    if not objects:
        return Failure("malformed", f"no JSON object: {shown(text)}")
    missing = ", ".join(axis for axis in AXES if axis not in objects[-1])
    return Failure("schema", f"no score for {missing}: {shown(text)}")


def shown(text: str) -> str:
    """The start of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= START else line[:START] + "..."


def _answer(text: str) -> str:
    """Without the thinking; its start may be in the prompt, so that only its end is seen."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _objects(text: str) -> list[dict[str, Any]]:
    """The whole JSON objects in a text, in order."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, strict=False)  # line breaks in a text are usual
    found, at = [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that comes twice, a list of the values: no score."""
    counts = Counter(name for name, _ in pairs)
    twice = {name: [value for other, value in pairs if other == name] for name in counts if counts[name] > 1}
    return {**dict(pairs), **twice}


def _scores(found: dict[str, Any]) -> Scores | Failure:
    axes = {}
    for axis in AXES:
        score = _score(found[axis])
        if score is None:
            return Failure("schema", f"{axis} must be a number from 0 to 10, got {shown(json.dumps(found[axis]))}")
        axes[axis] = score
    return Scores(axes)


def _score(value: Any) -> float | None:
    if isinstance(value, str) and (match := NUMBER.fullmatch(value)):
        value = float(match[1])
    if type(value) not in (int, float) or not 0 <= value <= 10:  # NaN is not
        return None
    return float(value)
