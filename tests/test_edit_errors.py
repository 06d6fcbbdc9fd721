"""Errors of single requests in `edit`, raised or returned."""

import pytest
import torch
from PIL import Image

import uniref_fast
from uniref_fast import EditReport
from uniref_fast.edit_session import EditSession

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def pipe():
    return uniref_fast.builtin.load(torch.bfloat16)


def request(seed, **fields):
    given = {"prompt": "make it night", "images": [Image.new("RGB", (40, 30), "red")], "seed": seed, "height": 32,
             "width": 32, "num_inference_steps": 3, "true_cfg_scale": 1.0}  # fmt: skip
    return given | fields


def edit(pipe, requests, **options):
    return uniref_fast.edit(pipe, requests, progress=False, output_type="latent", **options)


def damaged(tmp_path):
    """An opened file that ends in the middle of its pixels."""
    path = tmp_path / "cut.png"
    Image.effect_noise((60, 40), 60).save(path)
    path.write_bytes(path.read_bytes()[:500])
    return Image.open(path)


def stops(pipe, step, timestep, tensors):
    if step == 1:
        raise KeyError("a callback")


def test_requests_that_fail_at_any_stage_leave_the_others_their_bits(pipe, tmp_path, monkeypatch):
    decode = EditSession.decode

    def failing(session, edit, output_type):
        if edit.request.seed == 5:
            raise torch.OutOfMemoryError("no memory to decode")
        return decode(session, edit, output_type)

    good = request(1)
    (expected,) = edit(pipe, [good])
    monkeypatch.setattr(EditSession, "decode", failing)
    requests = [
        good,
        {"prompt": " "},  # refused by the check
        request(3, images=[damaged(tmp_path)]),  # fails while it is encoded
        request(4, callback_on_step_end=stops),  # fails in its second step
        request(5),  # fails while it is decoded
        request(1),
    ]
    report = EditReport(compare=True)
    results = edit(pipe, requests, errors="return", report=report, keep_references=2)
    kinds = [type(result).__name__ for result in results]
    assert kinds == ["Tensor", "ValueError", "ValueError", "KeyError", "OutOfMemoryError", "Tensor"]
    assert "request 2 has no prompt" in str(results[1]) and "cut.png cannot be decoded" in str(results[2])
    assert [each.request for each in report.references] == [0, 4, 5] and len(report.latent_errors) == 3
    results = edit(pipe, requests, errors="return")
    assert torch.equal(results[0], expected) and torch.equal(results[5], expected)
    assert all(isinstance(error, ValueError) for error in edit(pipe, [{"prompt": ""}, {"prompt": ""}], errors="return"))


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"prompt": " "}, ValueError, "request 2 has no prompt"),
        ({"images": "cut"}, ValueError, "request 2 of 3, which failed while it was encoded"),
        ({"callback_on_step_end": stops}, KeyError, "request 2 of 3, which failed in step 2"),
    ],
)
def test_an_error_that_is_raised_names_its_request(pipe, tmp_path, bad, error, message):
    if "images" in bad:
        bad = {"images": [damaged(tmp_path)]}
    with pytest.raises(error) as raised:
        edit(pipe, [request(1), request(2, **bad), request(3)])
    notes = getattr(raised.value, "__notes__", []) if hasattr(raised.value, "add_note") else [message]  # Python 3.10
    assert message in "\n".join([str(raised.value), *notes])


def test_a_check_that_fails_is_raised_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(EditSession, "encode", None)
    with pytest.raises(ValueError, match="request 2 has no prompt"):
        edit(pipe, [request(1), {"prompt": ""}])


def test_errors_of_the_whole_call_are_raised_in_any_case(pipe, monkeypatch):
    for given, options, message in (
        ([], {}, "no requests"),
        ([request(1)], {"budget": 1}, "budget"),
        ([request(1)], {"errors": "ignore"}, "unknown errors 'ignore'; known: raise, return"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(pipe, given, **({"errors": "return"} | options))

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, [request(1, callback_on_step_end=interrupted)], errors="return")
    monkeypatch.setattr(uniref_fast.PackedQwenImage, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit(pipe, [request(1)], errors="return")
