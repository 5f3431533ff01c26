"""A headless browser for tests, driven through two pipes with the Chrome DevTools Protocol; no port, no driver."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: why a test is skipped where there is none; it comes from the system's packages, as PyPI has no browser
MISSING = (
    "no chromium, chromium-browser or google-chrome on PATH: make test-browser installs Debian's (as root) "
    "and runs these tests"
)
DEADLINE = 120  # seconds for one answer; a lost browser fails the test instead of hanging it

_FLAGS = (
    "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--mute-audio", "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
# The browser reads commands from descriptor 3 and answers on 4. They are moved first: either may be the other.
_LAUNCH = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One browser with one page; a context manager.

    Attributes:
        requests: addresses that the page asked for since it was opened.
        complaints: console messages, uncaught exceptions, and the browser's own log of the page.
    """

    def __init__(self, executable: str) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="report-browser-")
        command_reader, self._commands = os.pipe()
        self._answers, answer_writer = os.pipe()
        launch = [sys.executable, "-c", _LAUNCH, str(command_reader), str(answer_writer), executable]
        self._process = subprocess.Popen(
            [*launch, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(command_reader, answer_writer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_reader)
        os.close(answer_writer)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._loaded: set[str] = set()

    def __enter__(self) -> Self:
        target = next(info for info in self.call("Target.getTargets")["targetInfos"] if info["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # a headless window has no focus of its own
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.call("Browser.close")
                self._process.wait(timeout=DEADLINE)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._commands)
            os.close(self._answers)
            shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path | str, *, width: int = 1280, scheme: str = "light") -> None:
        """Load a file or an address in a window of ``width`` pixels, in the given colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._navigate("about:blank")  # what the last page still has to say must not count as this one's
        self.requests.clear()
        self.complaints.clear()
        self._navigate(page.as_uri() if isinstance(page, Path) else page)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """One key down and up; ``code`` is its Windows virtual key code."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def follow(self, expression: str) -> None:
        """Evaluate what leads to another page, a click for example, and wait until it is loaded."""
        before = set(self._loaded)
        self.evaluate(expression)
        while self._loaded <= before:
            self._note(self._receive())

    def _navigate(self, address: str) -> None:
        loader = self.call("Page.navigate", url=address)["loaderId"]
        while loader not in self._loaded:
            self._note(self._receive())

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method in (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        ):
            self.complaints.append(json.dumps(parameters)[:2000])
        elif method == "Page.lifecycleEvent" and parameters["name"] == "load":
            self._loaded.add(parameters["loaderId"])

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(until - time.monotonic(), 0))
            data = os.read(self._answers, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser does not answer" if not ready else "the browser is gone")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        received: dict[str, Any] = json.loads(message)
        return received
