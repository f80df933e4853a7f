"""docs/demo-report.json, .html and .png: what the run of `make demo` left, its checkout and host under other names.

python tests/page/demo_page.py FOLDER [STORE]

Without a store the page and its picture are made again of the report that stands in the folder.
"""

import json
import sys
import tempfile
from pathlib import Path

from browser import a_tab, found_browser

from job.core.reports.report import Report, read_report
from job.render.page.finished import report_html

ROOT = Path(__file__).parents[2]
ANYBODY, HOST = "/home/me/qlora-job", "demo"


def anonymous(content: str) -> Report:
    """The report as it would be on anybody's machine."""
    report = read_report(json.loads(content.replace(str(ROOT), ANYBODY)))
    attempts = tuple(each.model_copy(update={"host": HOST}) for each in report.attempts)
    return report.model_copy(update={"attempts": attempts})


def main(folder: Path, store: Path | None = None) -> None:
    """Write all three."""
    browser = found_browser()
    if browser is None:
        raise SystemExit("no browser for the picture: tests/page/install.sh brings one")
    page = folder.resolve() / "demo-report.html"
    kept = page.with_suffix(".json")
    if store is not None:
        [run] = store.glob("runs/*/report.json")
        kept.write_text(anonymous(run.read_text(encoding="utf-8")).model_dump_json(indent=1) + "\n", encoding="utf-8")
    page.write_bytes(report_html(read_report(json.loads(kept.read_text(encoding="utf-8")))))
    with tempfile.TemporaryDirectory() as profile, a_tab(browser, Path(profile)) as tab:
        tab.open(page, width=1200, height=1040)
        tab.picture(page.with_suffix(".png"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
