"""A headless Chromium for tests, spoken to by its DevTools protocol.

with chromium(tmp_path) as browser:
    page = browser.open("file:///report.html", width=390, height=844, dark=True)
    page.until("document.documentElement?.dataset.drawn === 'yes'")
    assert page.errors == []
"""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

START_S = 240.0
WAIT_S = 240.0
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Home": 36, "End": 35, "Enter": 13}


class Page:
    """A tab. `errors` has what its console has said in anger, exceptions, and every request that left the page."""

    def __init__(self, url: str) -> None:
        # the DevTools server refuses origins that it does not know
        self._socket = websocket.create_connection(url, timeout=WAIT_S, suppress_origin=True)
        self._number = 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        what, parameters = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:2000])
        elif what == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(parameters["args"])[:2000])
        elif what == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(parameters["entry"])[:2000])
        elif what == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("data:", "blob:")):
                self.requests.append(url)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str, *, timeout_s: float = WAIT_S) -> None:
        end = time.monotonic() + timeout_s
        while not self._holds(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.errors}"
            time.sleep(0.05)

    def _holds(self, expression: str) -> bool:
        try:
            return bool(self.evaluate(expression))
        except AssertionError as e:
            # the page was being loaded again
            if "navigated" in str(e) or "context" in str(e):
                return False
            raise

    def press(self, key: str) -> None:
        code = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, height: int, *, dark: bool = False, media: str = "", mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False, quality: int = 85) -> None:
        """WebP, PNG or JPEG by the path's suffix; the whole page, or what is seen."""
        kind = {".webp": "webp", ".png": "png", ".jpg": "jpeg"}[path.suffix]
        more = {} if kind == "png" else {"quality": quality}
        result = self.call("Page.captureScreenshot", format=kind, captureBeyondViewport=whole, **more)
        path.write_bytes(base64.b64decode(result["data"]))


class Browser:
    def __init__(self, port: int) -> None:
        self._port = port

    def open(self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False, mobile: bool = False) -> Page:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            page = Page(json.load(answer)["webSocketDebuggerUrl"])
        page.resize(width, height, dark=dark, mobile=mobile)
        page.call("Page.navigate", url=url)
        return page


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Its profile and its log are in `folder`."""
    program = shutil.which("chromium")
    assert program, "chromium is not installed"
    profile = folder / "chromium"
    flags = [
        "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-gpu", "--hide-scrollbars",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--disable-extensions", *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    with open(folder / "chromium.log", "wb") as log:
        process = subprocess.Popen([program, *flags, "about:blank"], stdout=log, stderr=log)
    try:
        yield Browser(_port(process, profile / "DevToolsActivePort", folder / "chromium.log"))
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)


def _port(process: "subprocess.Popen[bytes]", file: Path, log: Path) -> int:
    end = time.monotonic() + START_S
    while not (file.exists() and file.read_text().strip()):
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < end, log.read_text(errors="replace")[-2000:]
        time.sleep(0.05)
    return int(file.read_text().split()[0])
