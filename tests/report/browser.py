"""A real browser for tests: headless Chromium, driven by its DevTools protocol over a pipe.

Over a pipe, because that needs neither a driver nor a port: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-sandbox", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars"),
)
_PATIENCE = 120.0


class Page:
    """One open page.

    Attributes:
        requests: addresses that the page asked for, its own apart.
        complaints: errors and warnings of the console, and exceptions that nothing caught.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in, self._rest = to_browser, from_browser, b""
        self._number, self._session = 0, None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for room in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{room}.enable")

    def open(self, file: Path, width: int = 1200, height: int = 900) -> None:
        """Loads a file at a window size, in pixels."""
        self.resize(width, height)
        self.requests.clear()
        self.complaints.clear()
        self._ask("Page.navigate", url=file.as_uri())
        end = time.monotonic() + _PATIENCE
        while self.run("document.readyState") != "complete":
            assert time.monotonic() < end, "the page does not get ready"
            time.sleep(0.05)

    def resize(self, width: int, height: int = 900) -> None:
        """Gives the window another size; below 600 pixels it is a phone."""
        phone = width < 600
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript, in JSON types."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of the first element that a CSS selector finds and that can be seen."""
        place = self.run(
            f"(() => {{ const all = [...document.querySelectorAll({json.dumps(selector)})];"
            "const seen = all.find((one) => one.checkVisibility()); if (!seen) return null;"
            "seen.scrollIntoView({block: 'center', behavior: 'instant'}); const r = seen.getClientRects()[0];"
            "return [r.x + Math.min(r.width / 2, 40), r.y + r.height / 2]; })()"
        )
        assert place is not None, f"nothing that can be seen is {selector}"
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def text(self, selector: str = "body") -> str:
        """What can be read of an element, in one line."""
        return " ".join(self.run(f"document.querySelector({json.dumps(selector)}).innerText").split())

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """Saves what the page looks like."""
        data = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(b64decode(data))

    def print_to(self, file: Path) -> None:
        """Saves what the page looks like on paper."""
        file.write_bytes(b64decode(self._ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]))

    def dark(self, on: bool) -> None:
        """Whether the reader likes dark pages."""
        value = "dark" if on else "light"
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def media(self, name: str) -> None:
        """The medium that the styles are for: `print`, or empty for a screen."""
        self._ask("Emulation.setEmulatedMedia", media=name)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]  # type: ignore[no-any-return]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._in, 1 << 20)
            assert read, "the browser has gone"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)  # type: ignore[no-any-return]

    def _note(self, event: dict[str, Any]) -> None:
        method, given = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and given["type"] != "Document":
            self.requests.append(given["request"]["url"])
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.complaints.append(given["entry"]["text"])
        elif method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert")
        ):
            self.complaints.append(json.dumps(given)[:500])


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser that ends with the block, with a profile of its own."""
    assert CHROMIUM is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads from descriptor 3 and writes to 4, whatever ours are called.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        arguments = ["bash", "-c", command, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            arguments, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(ours_out, ours_in)
        finally:
            os.close(ours_out)
            os.close(ours_in)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
