"""Replies of models, as they come: the scores that are in them, or what is wrong; never scores that are not."""

import json

import pytest

from uniref_fast.training.judge_reply import Reply, read_completion, read_scores
from uniref_fast.training.rewards import AXES, Failure, Scores

GOOD = '{"reasoning": "a {b}", "integration": 7, "consistency": 6.5, "quality": 10}'


def read(text, finish_reason="stop", refusal=None):
    result = read_scores(Reply(text, finish_reason, refusal))
    return [result.axes[axis] for axis in AXES] if isinstance(result, Scores) else result.kind


def one(value):
    """A reply with that as the JSON of the score for quality."""
    return f'{{"integration": 1, "consistency": 2, "quality": {value}}}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here it is: {GOOD} I hope that helps {{}}, {{x}}.",
        f"<think>maybe {one(3)}?</think>{GOOD}",
        f"maybe {one(3)}? the start of the thinking was in the prompt</think>\n{GOOD}",
        f"{one(3)} no, I correct myself: {GOOD}",
        f"{GOOD}\n{one(3)[:-1]}",  # the second is not whole
        f'{GOOD}\n{{"integration": 1}}',  # the second has not all axes
        f'{{"form": {one(3)}}} {GOOD}',
        f"{{{{{{ {GOOD}",
        GOOD.replace("a {b}", "two\nlines\tof text, \\u00e9 \\\" {"),
        GOOD.replace('"reasoning": "a {b}", ', ""),
        GOOD.replace("7", '" 7/10"').replace("6.5", '"6.5"').replace("10}", '"10 / 10"}'),
        GOOD.replace("7", "7.0").replace("10}", "1e1}"),
    ],
)  # fmt: skip
def test_scores_are_found(text):
    assert read(text) == [7, 6.5, 10]
    assert read(text, "length") == [7, 6.5, 10], "whole, although the limit came after it"


@pytest.mark.parametrize(
    "value",
    ["11", "-1", "10.01", "-0.5", "NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "true", "null", "[7]", "{}",
     '""', '"8-9"', '"70%"', '"7/5"', '"7 out of 10"', '"11"', '"-3"', '"seven"', '"7 8"', '"٧"', '"1e1"', '"nan"',
     '3, "quality": 9'],
)  # fmt: skip
def test_anything_else_is_no_score(value):
    result = read_scores(Reply(one(value)))
    assert isinstance(result, Failure) and result.kind == "schema" and "quality must be a number" in result.reason


def test_the_borders_are_scores():
    assert read(one("0"))[2] == 0 and read(one("10"))[2] == 10 and read(one('"0"'))[2] == 0


@pytest.mark.parametrize(
    "reply, kind",
    [
        (("",), "empty"),
        ((None,), "empty"),
        ((" \n",), "empty"),
        (("I like it, 8 of 10.",), "malformed"),
        (("[7, 8, 9]",), "malformed"),
        ((GOOD[:-1],), "malformed"),
        ((f"<think>{GOOD}</think>",), "malformed"),
        ((f"<think>{GOOD}",), "malformed"),
        (('{"a":' * 3000,), "malformed"),
        ((GOOD[:-1], "length"), "truncated"),
        ((None, "length"), "truncated"),
        ((f"<think>{GOOD}", "length"), "truncated"),
        (('{"integration": 7, "quality": 8}',), "schema"),
        ((f'{{"scores": {GOOD}}}',), "schema"),
        (("{}",), "schema"),
        ((GOOD, "content_filter"), "refused"),
        ((None, "stop", "I cannot judge this."), "refused"),
    ],
)
def test_failures_have_their_kind(reply, kind):
    assert read(*reply) == kind


def test_reasons_are_one_short_line_that_says_what():
    lost = read_scores(Reply('{"integration": 7, "quality": 8}'))
    assert lost.reason == 'no score for consistency: {"integration": 7, "quality": 8}'
    long = read_scores(Reply("so\nbad " * 500))
    assert long.reason.startswith("no JSON object: so bad so") and len(long.reason) < 200 and "\n" not in long.reason
    assert "I cannot" in read_scores(Reply(None, "stop", "I cannot")).reason


@pytest.mark.parametrize(
    "body, kind",
    [
        ("", "malformed"),
        ("<html>please log in</html>", "malformed"),
        ("[" * 100_000, "malformed"),
        ("[]", "empty"),
        ("null", "empty"),
        ('{"error": {"message": "no"}}', "empty"),
        ('{"choices": []}', "empty"),
        ('{"choices": [{"message": null}]}', "empty"),
        ('{"choices": [{"message": "text"}]}', "empty"),
    ],
)
def test_bodies_that_are_no_completion(body, kind):
    result = read_completion(body)
    assert isinstance(result, Failure) and result.kind == kind and "HTTP 200" in result.reason


def test_completions():
    def choice(content, **more):
        return json.dumps({"choices": [{"message": {"content": content, **more}, "finish_reason": "stop"}]})

    assert read_completion(choice("x")) == Reply("x", "stop")
    assert read_completion(choice(None, refusal="no")) == Reply(None, "stop", "no")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_completion(choice(parts)).text == "ab"
    assert read_completion('{"choices": [{"message": {"content": "x"}}], "usage": {"n": 1}}').usage == {"n": 1}
