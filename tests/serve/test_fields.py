"""Fields of edit requests: what they mean, and the errors of those that are wrong or cannot be honoured."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from uniref_fast.serve.config import Limits, ServeConfig
from uniref_fast.serve.errors import ApiError, error_body
from uniref_fast.serve.fields import KNOWN, UNSUPPORTED, EditCall, parse

CONFIG = ServeConfig("builtin", ("gpt-image",), steps=8, guidance=1.0, loras=("ink", "oil"), limits=Limits(images=2))
BASE = [("prompt", "make it night"), ("image", b"1")]


def call(*pairs, base=BASE):
    return parse([*base, *pairs], CONFIG)


def test_defaults():
    assert call() == EditCall("make it night", (b"1",), steps=8)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("size", "auto")], {"size": None}),
        ([("size", "96x64")], {"size": (96, 64)}),
        ([("n", "3"), ("seed", "7")], {"n": 3, "seed": 7}),
        ([("n", 3), ("seed", 0)], {"n": 3, "seed": 0}),  # of JSON
        ([("steps", "5")], {"steps": 5}),
        ([("guidance", "2.5")], {"guidance": 2.5, "negative_prompt": " "}),
        ([("guidance", 2), ("negative_prompt", "rain")], {"guidance": 2.0, "negative_prompt": "rain"}),
        ([("output_format", "webp"), ("output_compression", "0")], {"output_format": "webp", "output_compression": 0}),
        ([("stream", "true"), ("partial_images", "2")], {"stream": True, "partial_images": 2}),
        ([("stream", False), ("partial_images", 0)], {}),
        ([("model", "gpt-image"), ("response_format", "b64_json"), ("background", "opaque"), ("quality", "auto")], {}),
        ([("user", "a")], {"safety_identifier": "a"}),
        ([("user", "a"), ("safety_identifier", "b")], {"safety_identifier": "b"}),
        ([("n", None), ("mask", None), ("svg", None)], {}),  # null stands for the default
        ([("lora", "ink")], {"lora": {"ink": 1.0}}),
        ([("lora", "ink:0.5"), ("lora[oil]", "-1")], {"lora": {"ink": 0.5, "oil": -1.0}}),
        ([("lora", {"ink": 0.5})], {"lora": {"ink": 0.5}}),
        ([("lora", '{"ink": 0.5}')], {"lora": {"ink": 0.5}}),
    ],
)
def test_values(pairs, expected):
    found = call(*pairs)
    assert {name: getattr(found, name) for name in expected} == expected


def test_prompts_have_the_form_of_the_model():
    config = replace(CONFIG, negative_prompt="none", written=lambda text: f"<{text}>")
    found = parse([*BASE, ("guidance", 2)], config)
    assert (found.prompt, found.negative_prompt) == ("<make it night>", "none")
    assert parse([*BASE, ("guidance", 2)], replace(config, negative_prompt=None)).negative_prompt is None
    assert parse(BASE, config).negative_prompt is None, "there is no guidance"


def test_images_of_forms_and_of_json():
    prompt = BASE[:1]
    assert call(("image[]", b"1"), ("image[]", b"2"), base=prompt).images == (b"1", b"2")
    data = "data:image/png;base64,AA=="
    assert call(("images", [{"image_url": data}, {"image_url": "https://a/b"}]), base=prompt).images == (
        data,
        "https://a/b",
    )
    assert call(("image", data), base=prompt).images == (data,)


@pytest.mark.parametrize(
    ("pairs", "code", "param"),
    [
        ([("prompt", "again")], "duplicate_parameter", "prompt"),
        ([("lora", "ink"), ("lora", "ink")], "duplicate_parameter", "lora"),
        ([("num_inference_steps", "5")], "unknown_parameter", "num_inference_steps"),
        ([("sede", "5")], "unknown_parameter", "sede"),
        ([("mask", b"1")], "unsupported_parameter", "mask"),
        ([("markup", b"1")], "unsupported_parameter", "markup"),
        ([("input_fidelity", "high")], "unsupported_parameter", "input_fidelity"),
        ([("svg[model]", "x")], "unsupported_parameter", "svg"),
        ([("negative_prompt", "rain")], "unsupported_parameter", "negative_prompt"),
        ([("output_compression", "50")], "unsupported_parameter", "output_compression"),
        ([("partial_images", "2")], "unsupported_parameter", "partial_images"),
        ([("response_format", "url")], "unsupported_value", "response_format"),
        ([("background", "transparent")], "unsupported_value", "background"),
        ([("quality", "high")], "unsupported_value", "quality"),
        ([("output_format", "gif")], "invalid_value", "output_format"),
        ([("response_format", "png")], "invalid_value", "response_format"),
        ([("model", "gpt-image-2")], "model_not_found", "model"),
        ([("lora", "pencil")], "lora_not_found", "lora"),
        ([("lora", "ink:much")], "invalid_value", "lora"),
        ([("lora", "{")], "invalid_value", "lora"),
        ([("lora", 3)], "invalid_value", "lora"),
        ([("n", "0")], "invalid_value", "n"),
        ([("n", "11")], "invalid_value", "n"),
        ([("n", True)], "invalid_value", "n"),
        ([("n", "1.5")], "invalid_value", "n"),
        ([("n", "")], "invalid_value", "n"),
        ([("seed", "-1")], "invalid_value", "seed"),
        ([("seed", str(2**63))], "invalid_value", "seed"),
        ([("seed", "9" * 5000)], "invalid_value", "seed"),
        ([("steps", "101")], "invalid_value", "steps"),
        ([("guidance", "nan")], "invalid_value", "guidance"),
        ([("guidance", "0.5")], "invalid_value", "guidance"),
        ([("guidance", [1])], "invalid_value", "guidance"),
        ([("size", "64")], "invalid_value", "size"),
        ([("size", "64x")], "invalid_value", "size"),
        ([("size", "9000x9000")], "invalid_value", "size"),
        ([("size", "６４x64")], "invalid_value", "size"),  # digits of another script
        ([("size", [64, 64])], "invalid_value", "size"),
        ([("stream", "yes")], "invalid_value", "stream"),
        ([("stream", 1)], "invalid_value", "stream"),
        ([("user", 5)], "invalid_value", "user"),
        ([("user", "\ud800")], "invalid_value", "user"),
        ([("image", "/etc/passwd")], "invalid_image", "image"),
        ([("image", "file:///etc/passwd")], "invalid_image", "image"),
        ([("images", [{"file_id": "file-1"}])], "invalid_image", "image"),
        ([("images", [[b"1"]])], "invalid_image", "image"),
        ([("image", b"2"), ("image", b"3")], "too_many_images", "image"),
    ],
)
def test_errors_name_the_field(pairs, code, param):
    with pytest.raises(ApiError) as caught:
        call(*pairs)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


@pytest.mark.parametrize("missing", ["prompt", "image"])
def test_missing_fields(missing):
    with pytest.raises(ApiError) as caught:
        parse([pair for pair in BASE if pair[0] != missing], CONFIG)
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", missing)
    with pytest.raises(ApiError, match="prompt is missing or empty"):
        parse([("prompt", " \n"), BASE[1]], CONFIG)
    with pytest.raises(ApiError, match="at most 32000"):
        parse([("prompt", "a" * 32001), BASE[1]], CONFIG)


def test_hints_name_our_fields():
    for name, ours in (("guidance_scale", "guidance"), ("num_inference_steps", "steps"), ("promt", "prompt")):
        with pytest.raises(ApiError, match=f"did you mean {ours}"):
            call((name, "1"))


def test_the_documents_list_all_codes_and_fields():
    """The page has a table of the codes of errors, and one of the fields."""
    root = Path(__file__).parents[2]
    text = (root / "docs/serving.md").read_text()
    calls = [
        node for path in (root / "uniref_fast/serve").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    ]
    used = {
        node.args[1].value
        for node in calls
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "ApiError"
        and isinstance(node.args[1], ast.Constant)
    }
    rows = re.findall(r"^\| (?:\d+(?:, )?)+ \| (.*?) \|", text, flags=re.M)
    assert {code for row in rows for code in re.findall(r"`(\w+)`", row)} == used | {"not_found", "method_not_allowed"}
    section = text.partition("## Fields of an edit")[2].partition("## ")[0]
    named = {*re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, flags=re.M)))}
    assert named == {*KNOWN}
    assert all(f"`{name}`" in section for name in UNSUPPORTED)


def test_bodies_of_errors_have_the_form_of_openai():
    body = error_body(ApiError(400, "invalid_value", "n must be 1", "n"))
    assert body == {
        "error": {"message": "n must be 1", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    }
    assert error_body(ApiError(429, "queue_full", ""))["error"]["type"] == "rate_limit_error"
    assert error_body(ApiError(504, "deadline_exceeded", ""))["error"]["type"] == "server_error"
