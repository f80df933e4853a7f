"""A headless browser, where there is one: Chromium under any of its names, or the one that CHROMIUM names.

It is driven by its DevTools protocol over a pipe, so that one process opens all pages, and keys can be pressed.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
_READS, _WRITES = 3, 4
"""Where the browser reads what it is asked, and writes what it answers."""
_PATIENCE_SECONDS = 300
_KEYS = {"Tab": 9, "Enter": 13, " ": 32}


def found_browser() -> str | None:
    """Where it is; None: there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Tab:
    """One page at a time, in a browser that runs."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._read, self._number, self._session = b"", 0, None
        pages = self._ask("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in pages if each["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._ask("Page.enable")

    def open(self, file: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Lay a page out, in CSS pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=file.as_uri())
        self._until(lambda said: said.get("method") == "Page.loadEventFired")

    def found(self, script: str) -> Any:
        """What an expression of ours comes to in the page, whose own policy it does not meet."""
        said = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in said:
            raise ValueError(f"the page's answer to {script[:200]!r}: {said['exceptionDetails']}")
        return said["result"].get("value")

    def picture(self, file: Path) -> None:
        """A PNG of what is seen."""
        file.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def paper(self, file: Path, *, inches: tuple[float, float]) -> None:
        """A PDF as the page is printed on such sheets."""
        size = {"paperWidth": inches[0], "paperHeight": inches[1], "printBackground": False}
        file.write_bytes(base64.b64decode(self._ask("Page.printToPDF", **size)["data"]))

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, down and up."""
        named = {"key": key, "code": key.strip() or "Space", "windowsVirtualKeyCode": _KEYS[key]}
        named |= {"modifiers": 8 if shift else 0}
        text = {"Enter": "\r", " ": " "}.get(key)
        self._ask("Input.dispatchKeyEvent", type="keyDown", **named, **({} if text is None else {"text": text}))
        self._ask("Input.dispatchKeyEvent", type="keyUp", **named)

    def write(self, text: str) -> None:
        """As if it was typed where the focus is."""
        self._ask("Input.insertText", text=text)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        asked = {"id": number, "method": method, "params": parameters}
        asked |= {} if self._session is None else {"sessionId": self._session}
        left = json.dumps(asked).encode() + b"\0"
        while left:
            left = left[os.write(self._to, left) :]
        said = self._until(lambda said: said.get("id") == number)
        if "error" in said:
            raise ValueError(f"{method}: {said['error']}")
        return said["result"]

    def _until(self, fits: Any) -> dict[str, Any]:
        """What the browser says next that fits; the rest is passed over."""
        while True:
            message, whole, rest = self._read.partition(b"\0")
            if whole:
                self._read = rest
                said = json.loads(message)
                if fits(said):
                    return said
                continue
            if not select.select([self._back], [], [], _PATIENCE_SECONDS)[0]:
                raise TimeoutError("the browser says nothing")
            part = os.read(self._back, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._read += part


@contextlib.contextmanager
def a_tab(browser: str, profile: Path) -> Iterator[Tab]:
    """A browser that runs meanwhile.

    Args:
        browser: from `found_browser`.
        profile: a folder for what it keeps.
    """
    # Above the two numbers that the browser expects, so that neither is overwritten before it is where it belongs.
    (reads, to), (back, writes) = (map(_above, os.pipe()) for _ in range(2))
    in_place = f'exec "$0" "$@" {_READS}<&{reads} {_WRITES}>&{writes}'
    process = subprocess.Popen(
        ["bash", "-c", in_place, browser, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(reads, writes),
    )
    os.close(reads)
    os.close(writes)
    try:
        yield Tab(to, back)
    finally:
        # At the end of what it is asked it goes by itself, and takes its own processes along.
        os.close(to)
        process.wait(timeout=_PATIENCE_SECONDS)
        os.close(back)


def _above(number: int) -> int:
    high = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(number)
    return high
