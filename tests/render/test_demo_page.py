"""The demo's page that the README shows is the one that the code makes of the demo's report."""

import json
import re
from pathlib import Path

import html5lib

from job.core.reports.report import read_report
from job.render.page.finished import report_html

DOCS = Path(__file__).parents[2] / "docs"


def parts(page):
    """Elements with their words: numbers of a drawing are another machine's business."""
    root = html5lib.parse(page, namespaceHTMLElements=False)
    return [(each.tag, " ".join((each.text or "").split())) for each in root.iter() if isinstance(each.tag, str)]


def test_the_demo_s_page_is_made_of_its_report_as_the_code_makes_it_now():
    report = read_report(json.loads((DOCS / "demo-report.json").read_text(encoding="utf-8")))

    said = "run `make demo-page`, or `PYTHONPATH=. python tests/page/demo_page.py docs`"
    assert parts((DOCS / "demo-report.html").read_bytes()) == parts(report_html(report)), said


def test_nothing_in_it_is_of_the_machine_that_made_it():
    for name in ("demo-report.json", "demo-report.html"):
        text = (DOCS / name).read_text(encoding="utf-8")
        assert {*re.findall(r"file://(/[\w-]+/[\w-]+)/", text)} <= {"/home/me"}, name
        assert "/home/me/qlora-job" in text
    attempts = json.loads((DOCS / "demo-report.json").read_text(encoding="utf-8"))["attempts"]
    assert {each["host"] for each in attempts} == {"demo"}
