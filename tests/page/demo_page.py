"""docs/demo-report.html and .png: the page of the run that `make demo` left, its checkout and host under other names.

python tests/page/demo_page.py STORE FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path

from browser import found_browser, shown

from job.core.reports.report import Report, read_report
from job.render.page.finished import report_html

ROOT = Path(__file__).parents[2]
ANYBODY, HOST = "/home/me/qlora-job", "demo"


def anonymous(content: bytes) -> Report:
    """The report as it would be on anybody's machine."""
    report = read_report(json.loads(content.decode().replace(str(ROOT), ANYBODY)))
    attempts = tuple(each.model_copy(update={"host": HOST}) for each in report.attempts)
    return report.model_copy(update={"attempts": attempts})


def main(store: Path, folder: Path) -> None:
    """Write both."""
    browser = found_browser()
    if browser is None:
        raise SystemExit("no browser for the picture: tests/page/install.sh brings one")
    [run] = store.glob("runs/*/report.json")
    page = folder.resolve() / "demo-report.html"
    page.write_bytes(report_html(anonymous(run.read_bytes())))
    with tempfile.TemporaryDirectory() as profile:
        picture = f"--screenshot={page.with_suffix('.png')}"
        shown(browser, page, "--window-size=1200,1040", picture, profile=Path(profile))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
