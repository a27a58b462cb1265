"""A headless Chromium, spoken to over a pipe in the DevTools protocol: no driver, no port, one browser for many pages."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["OVERFLOWS", "Browser", "chromium"]

_SECONDS = 120.0
"""That one answer may take; far more than it needs, for machines under load."""

OVERFLOWS = """(() => {
  const wide = document.scrollingElement.scrollWidth > innerWidth ? ["the page: " + document.scrollingElement.scrollWidth] : [];
  const scrolls = one => {
    for (let e = one; e; e = e.parentElement) if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true;
  };
  for (const one of document.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect();
    if (box.width && (box.right > innerWidth + 1 || box.left < -1) && !scrolls(one.parentElement) && !one.closest("thead"))
      wide.push(one.tagName + " " + (one.textContent || "").trim().slice(0, 40) + " " + box.left + ".." + box.right);
  }
  for (const drawing of document.querySelectorAll("svg")) {
    const frame = drawing.getBoundingClientRect();
    for (const text of drawing.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.width && getComputedStyle(text).visibility !== "hidden" && (box.left < frame.left - 1 || box.right > frame.right + 1))
        wide.push("text of a figure: " + text.textContent);
    }
  }
  return wide;
})()"""
"""JavaScript: what is wider than the window, outside of boxes that scroll, and text that leaves its figure."""


def chromium() -> str | None:
    """Return the path of Chromium (Debian's package `chromium`), None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """One browser and one tab.

    Args:
        program: path of Chromium.
        profile: an empty folder for its files.
    """

    def __init__(self, program: str, profile: Path) -> None:
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        command = [program, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]

        def numbered() -> None:
            first, second = os.dup(there), os.dup(back)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=numbered,
            start_new_session=True,
        )
        os.close(there)
        os.close(back)
        self._rest, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        tab = next(one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; what happens meanwhile is kept in `events`."""
        self._number += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        _write_all(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"Chromium did not answer in {_SECONDS:.0f} s.")
            if not (part := os.read(self._read, 1 << 20)):
                raise RuntimeError(f"Chromium ended with code {self._process.wait()}.")
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found

    def open(self, page: Path, width: int = 1400, *, dark: bool = False, height: int = 900, media: str = "") -> None:
        """Show a file in a window of `width` pixels and wait until it is loaded."""
        self.events.clear()
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page, as JSON."""
        told = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and let go of a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.ask("Input.insertText", text=text)

    def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Scroll an element into view and click into its middle."""
        wanted = json.dumps(selector)
        x, y = self.value(
            f"(() => {{ const one = document.querySelector({wanted}); one.scrollIntoView({{block: 'center', inline: 'center'}});"
            " const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def complaints(self) -> list[str]:
        """Return what the console, the log and the page complained of, and every request but that for the page, since `open`."""
        self.value("0")  # what was sent before this answer is in `events` now
        found = []
        for event in self.events:
            method, told = event.get("method"), event.get("params", {})
            if method == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
                found.append(told["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and told["type"] in ("warning", "error", "assert"):
                found.append(str(told["args"]))
            elif method == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif method == "Network.requestWillBeSent" and told.get("type") != "Document":
                found.append(f"request for {told['request']['url']}")
        return found

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """Return the page as it is printed on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=True, **size)["data"])

    def close(self) -> None:
        """End the browser."""
        try:
            self._session = None
            self.ask("Browser.close")
            self._process.wait(30)
        except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._write)
            os.close(self._read)


def _write_all(handle: int, data: bytes | Sequence[int]) -> None:
    view = memoryview(bytes(data))
    while view:
        view = view[os.write(handle, view) :]
