"""The page at `/`: what its response allows, and its use in a real browser where Chromium is installed."""

import base64
import hashlib
import re
import time

import pytest
from browser import CHROMIUM, Browser
from serving import StubEngine, picture, served

from uniref_fast.serve.config import Limits
from uniref_fast.serve.page import page

COLORS = ("red", "green", "blue")
NAMES = "[...document.querySelectorAll('#pictures img')].map(image => image.alt.split(': ')[1])"


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{color}.png" for color in COLORS]
    for path, color in zip(paths, COLORS, strict=True):
        path.write_bytes(picture(color))
    return paths


def opened(browser, address, files):
    """Open the page and choose files."""
    browser.problems.clear()
    browser.look()
    browser.open(address)
    browser.wait("document.getElementById('model').textContent === 'builtin' || !document.getElementById('key').hidden")
    browser.choose_files("#files", *files)
    browser.wait(f"{NAMES}.length === {len(files)}")


def arrived(engine, count):
    """Wait until the engine has a number of jobs."""
    until = time.monotonic() + 30
    while len(engine.jobs) < count:
        assert time.monotonic() < until
        time.sleep(0.01)
    return engine.jobs[-1]


def text(browser, selector):
    return browser.evaluate(f"document.querySelector('{selector}').textContent")


@pytest.mark.slow
def test_an_edit_from_its_pictures_to_its_result(browser, files):
    """Pictures are put in order with the keyboard, sent in that order, and shown beside progress and result."""
    engine = StubEngine()
    with served(engine) as address:
        opened(browser, address, files)
        browser.evaluate("document.querySelector('#pictures button:not(:disabled)').focus()")
        browser.press("Enter")
        assert browser.evaluate(NAMES) == ["green.png", "red.png", "blue.png"]
        focused = "document.activeElement.getAttribute('aria-label')"
        assert browser.evaluate(focused) == "Move picture 2 after picture 3"  # the focus moves with the picture
        browser.press("Tab")
        assert browser.evaluate(focused) == "Remove picture 2"
        browser.press("Enter")
        assert text(browser, "#live") == "Picture 2 is removed."
        browser.choose_files("#files", files[0])
        browser.wait(f"{NAMES}.join() === 'green.png,blue.png,red.png'")
        browser.type("#prompt", "put them together")
        for name, value in {"steps": "4", "seed": "7", "size": "96 x 64"}.items():
            browser.type(f"[name={name}]", value)
        browser.click("button.main")
        request, _, _ = arrived(engine, 1)
        assert [image.getpixel((0, 0)) for image in request.images] == [(0, 128, 0), (0, 0, 255), (255, 0, 0)]
        assert (request.prompt, request.num_inference_steps, request.seed) == ("put them together", 4, 7)
        assert (request.width, request.height) == (96, 64)
        engine.step(0, 1)
        engine.step(0, 2)
        browser.wait("document.querySelector('.card .partial')")
        browser.wait("document.querySelector('.card .state').textContent === 'Step 2 of 4'")
        assert browser.evaluate("document.querySelector('.card progress').value") == 0.5
        images = "document.querySelectorAll('.card .results img').length"
        assert browser.evaluate(images) == 1  # the second partial image takes the place of the first
        engine.end(0)
        browser.wait("document.querySelector('.card.done')")
        browser.wait("document.querySelector('.card .results img:not(.partial)').naturalWidth === 96")
        assert not browser.evaluate("document.querySelector('.card .partial')")
        assert browser.evaluate("document.querySelectorAll('.card .references img').length") == 3
        assert re.fullmatch(r"75 tokens · waited 0\.5 s.* · seed 7", text(browser, ".card .facts"))
        assert browser.evaluate("document.querySelector('.card a[download]').download") == "edit-1-seed-7.png"
        assert text(browser, "#live") == "Edit 1: The edit is finished."
        assert browser.problems == []


@pytest.mark.slow
def test_several_edits_and_what_can_go_wrong(browser, files):
    """Two edits run at once; one is cancelled, one fails, one value is refused, and the queue is full for a while."""
    engine = StubEngine()
    with served(engine) as address:
        opened(browser, address, files[:1])
        browser.type("#prompt", "first")
        browser.click("button.main")
        arrived(engine, 1)
        browser.type("#prompt", "second")
        browser.click("button.main")
        arrived(engine, 2)
        engine.step(1, 1)
        browser.wait("document.querySelector('.card .state').textContent === 'Step 1 of 4'")
        browser.click(".card .actions button")
        browser.wait("document.querySelector('.card.cancelled')")
        until = time.monotonic() + 30
        while not engine.jobs[1][2].cancelled():  # the server has seen that the client left
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not engine.jobs[0][2].done()
        engine.end(0, RuntimeError("secret"))
        browser.wait("document.querySelector('.card.failed')")
        assert "The server has failed." in text(browser, ".card.failed .error")
        assert "secret" not in text(browser, ".card.failed .error")
        browser.type("[name=size]", "99x64")
        browser.click("button.main")
        browser.wait("document.querySelectorAll('.card.failed').length === 2")
        assert "no image of 99x64 pixels" in text(browser, ".card.failed .error")
        assert browser.evaluate("document.querySelector('[name=size]').getAttribute('aria-invalid')") == "true"
        browser.type("[name=size]", "auto")
        engine.max_waiting = 0
        browser.click("button.main")
        browser.wait("document.querySelector('.card .state').textContent.includes('trying again in')")
        engine.max_waiting = None
        arrived(engine, 3)
        engine.end(2)
        browser.wait("document.querySelector('.card.done')")
        assert browser.problems == []


@pytest.mark.slow
def test_the_key_of_a_server_is_asked_for(browser, files):
    with served(StubEngine(), api_key="right", limits=Limits(steps=9), loras=("ink",)) as address:
        opened(browser, address, files)
        browser.type("#key-value", "wrong")
        browser.press("Enter")
        browser.wait("document.getElementById('key-error').textContent.includes('does not accept')")
        browser.type("#key-value", "right")
        browser.press("Enter")
        browser.wait("document.getElementById('key').hidden")
        assert text(browser, "#model") == "builtin"
        assert browser.evaluate("document.querySelector('[name=steps]').max") == "9"  # limits of this server
        assert browser.evaluate("[...document.querySelector('[name=lora]').options].map(each => each.value)") == [
            "",
            "ink",
        ]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_window_has_one_column_and_colors_have_contrast(browser, files, dark):
    with served(StubEngine()) as address:
        opened(browser, address, files)
        browser.look(width=360, height=740, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 360
        assert browser.evaluate(CONTRAST) >= 4.5  # as WCAG asks for


CONTRAST = """(() => {
    const light = color => {
        const [r, g, b] = color.match(/\\d+/g).map(each => { each /= 255; return each <= .03928 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4; });
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const panel = getComputedStyle(document.querySelector('.panel')).backgroundColor, button = getComputedStyle(document.querySelector('button.main'));
    const pairs = [[getComputedStyle(document.body).color, panel], [getComputedStyle(document.querySelector('label .quiet')).color, panel], [button.color, button.backgroundColor]];
    return Math.min(...pairs.map(pair => pair.map(light).sort((a, b) => b - a)).map(([a, b]) => (a + .05) / (b + .05)));
})()"""  # noqa: E501
