"""A headless Chromium, driven over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}


class Tab:
    """One page. `answers` and other waits end within a minute."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reader, self._writing = os.fdopen(reading, "rb", buffering=0), writing
        self._held, self._number, self._session = b"", 0, None
        self.faults: list[str] = []
        """What the console was told of errors, and what was loaded from elsewhere."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Close the pipe."""
        self._reader.close()
        os.close(self._writing)

    def call(self, method: str, **parameters: Any) -> Any:
        """What a method returns."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self._note(found)

    def _next(self) -> Any:
        while b"\0" not in self._held:
            more = self._reader.read(1 << 16)
            assert more, "the browser has ended"
            self._held += more
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Any) -> None:
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(parameters["exceptionDetails"]))
        if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.faults.append(parameters["entry"]["text"])
        if event["method"] == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:")):
                self.faults.append(f"it loads {url}")

    def open(self, url: str, width: int, height: int, phone: bool = False) -> None:
        """Load a page in a window of this size."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.getElementById('facts').textContent !== ''")

    def run(self, script: str) -> Any:
        """What an expression is."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        waiting = f"""new Promise((done, failed) => {{
            const end = Date.now() + 60000;
            const look = () => {condition} ? done(true) : Date.now() > end ? failed("late") : setTimeout(look, 20);
            look(); }})"""
        assert self.run(waiting) is True

    def press(self, key: str, times: int = 1) -> None:
        """A key, down and up."""
        for _ in range(times):
            given = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
            text = {"text": "\r" if key == "Enter" else key} if key in ("Enter", " ") else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **given, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def type(self, text: str) -> None:
        """Text at the cursor."""
        self.call("Input.insertText", text=text)

    def tab_to(self, name: str) -> None:
        """Press Tab until the element of this id has the focus."""
        for _ in range(40):
            self.press("Tab")
            if self.run("document.activeElement.id") == name:
                return
        raise AssertionError(f"no Tab leads to {name}")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A browser with one tab. profile: a folder for its files."""
    assert BROWSER is not None
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    options = f"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --user-data-dir={profile}"
    quiet = "--disable-background-networking --disable-component-update --disable-sync --no-proxy-server"
    command = f"exec {BROWSER} {options} {quiet} --remote-debugging-pipe 3<&{theirs_in} 4>&{theirs_out}"
    with subprocess.Popen(
        ["bash", "-c", command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        tab = None
        try:
            tab = Tab(ours_in, ours_out)
            yield tab
        finally:
            process.terminate()
            process.wait(timeout=20)
            if tab is not None:
                tab.close()
