"""A headless Chromium that tests drive over its DevTools protocol, without a library."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium")
LIMIT = 30  # seconds that a test waits before it fails

KEYS = {"Tab": 9, "Enter": 13, "Space": 32}


class Browser:
    """One page of a headless Chromium.

    Attributes:
        problems: Exceptions of the page's scripts, and errors of its console such as violations of its policy.
    """

    def __init__(self, profile: Path):
        from_browser, its_output = os.pipe()
        its_input, to_browser = os.pipe()

        def connect():  # the protocol's descriptors are 3 and 4
            for number, descriptor in ((3, os.dup(its_input)), (4, os.dup(its_output))):
                os.dup2(descriptor, number)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        self._process = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self._input, self._output = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._calls, self._session, self._buffer = 0, None, b""
        self.problems: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """Call a method of the protocol and return its result."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._input.write(json.dumps(message).encode() + b"\0")
        self._input.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _read(self):
        while b"\0" not in self._buffer:
            piece = os.read(self._output.fileno(), 1 << 16)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        if event.get("method") == "Runtime.exceptionThrown":
            details = event["params"]["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        entry = event["params"].get("entry", {}) if event.get("method") == "Log.entryAdded" else {}
        if entry.get("level") == "error" and entry["source"] != "network":  # a status such as 400 is no problem here
            self.problems.append(entry["text"])

    def open(self, address: str):
        """Open a page and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception']['description']}")
        return result["result"].get("value")

    def wait(self, expression: str):
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + LIMIT
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):  # between two documents
                if self.evaluate(f"Boolean({expression})"):
                    return
            time.sleep(0.02)
        raise AssertionError(f"not true after {LIMIT} s: {expression}\n{self.evaluate('document.body.innerText')}")

    def choose_files(self, selector: str, *paths: Path):
        """Choose files in an `<input type="file">`."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def press(self, key: str, *, shift: bool = False):
        """Press a key of the keyboard."""
        text = {"Enter": {"text": "\r"}, "Space": {"text": " "}}.get(key, {})
        common = dict(key=" " if key == "Space" else key, code=key, windowsVirtualKeyCode=KEYS[key])
        self.call("Input.dispatchKeyEvent", type="keyDown", modifiers=8 * shift, **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=8 * shift, **common)

    def click(self, selector: str):
        """Click with the mouse on the middle of an element."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"{found}.getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at, button="left", clickCount=1)

    def type(self, selector: str, text: str):
        """Replace the text of a field."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.focus(), {found}.select()")
        self.call("Input.insertText", text=text)

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False):
        """Set the size of the window and the color scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = True):
        """Write a PNG of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        """End the browser."""
        with contextlib.suppress(RuntimeError, OSError):
            self._session = None
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
