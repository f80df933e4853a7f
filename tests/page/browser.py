"""A headless browser, where there is one: Chromium under any of its names, or the one that CHROMIUM names."""

import os
import shutil
import subprocess
from pathlib import Path

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def found_browser() -> str | None:
    """Where it is; None: there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def shown(browser: str, file: Path, *options: str, profile: Path) -> str:
    """Open a file; returns what the browser wrote to standard output.

    Args:
        browser: from `found_browser`.
        file: a page.
        options: its own, as `--screenshot=FILE`.
        profile: a folder for what it keeps.
    """
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
