"""The page as a browser lays it out: on all screens, in the dark, on paper, by keys, by its script, and for axe-core.

`make test-page` leaves the screenshots in .page/, to be looked at.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import a_tab, found_browser
from channel_pages import CHANNELS, NIGHTS
from matplotlib.image import imread
from page_reports import KINDS, gsm8k
from report_fixtures import LEARNED

from job.core.attempt.run_record import RecordedObject
from job.core.reports.report import read_report
from job.render.page.finished import report_html
from job.render.page.nights.channel import channel_html
from job.render.page.several import several_html
from job.render.page.unfinished import RunSoFar, unfinished_html
from job.render.runs_table import RunRow

pytestmark = pytest.mark.page

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / ".page"
AXE = SHOTS / "node_modules" / "axe-core" / "axe.min.js"
SCREENS = {"desk": 1280, "wide": 1920, "phone": 390, "narrow phone": 320}
"""Widths in CSS pixels; the narrowest is that to which WCAG 2.2 (1.4.10) wants pages to flow."""
PAPERS = {"A4": (8.27, 11.69), "letter": (8.5, 11.0)}


def failed():
    objects = (RecordedObject(uri="s3://notes/train.jsonl", etag="e", version=None, size=1234),)
    found = gsm8k()
    return unfinished_html(
        RunSoFar(
            run_id="notes-1f2e",
            run_uri=found.run_uri,
            recipe={"train": {"steps": 500}},
            objects=objects,
            attempts=[each.model_copy(update={"exit_code": 74, "reason": "no room left"}) for each in found.attempts],
            step=100,
            curve=LEARNED["curve"],
            evaluations=found.evaluations[:3],
            plus_minus=found.held_out.plus_minus[:3],
            notes=("step-000150-a01 was passed over: damaged",),
        )
    )


def several():
    rows = [RunRow(run_id=f"run-{n}", recipe={"lora": {"r": n}}, report=gsm8k(), standing="finished") for n in (8, 16)]
    return several_html(rows)


def the_demo():
    return report_html(read_report(json.loads((ROOT / "docs" / "demo-report.json").read_text(encoding="utf-8"))))


PAGES = {"the demo": the_demo}
PAGES |= {name: functools.partial(lambda make: report_html(make()), make) for name, make in KINDS.items()}
PAGES |= {"failed": failed, "several": several}
PAGES |= {
    f"a night, {name}": functools.partial(lambda make: report_html(make()), make) for name, make in NIGHTS.items()
}
PAGES |= {
    f"a channel, {name}": functools.partial(lambda make: channel_html(make()), make) for name, make in CHANNELS.items()
}


@functools.cache
def page(name):
    return PAGES[name]()


@pytest.fixture(scope="session")
def tab(tmp_path_factory):
    browser = found_browser()
    if browser is None:
        pytest.skip("no browser: install chromium-headless-shell or chromium, or name one with CHROMIUM")
    SHOTS.mkdir(exist_ok=True)
    with a_tab(browser, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def look(tab, tmp_path):
    """Opens a page on a screen."""

    def at(name, **screen):
        file = tmp_path / "page.html"
        file.write_bytes(page(name))
        tab.open(file, **screen)
        return tab

    return at


def left(name, kind):
    """Where what was seen is left."""
    return SHOTS / f"{re.sub('[^a-z0-9]+', '-', name.lower())}{kind}"


def pixels_of(tab, name, kind):
    file = left(name, f"-{kind}.png")
    tab.picture(file)
    return imread(file)[:, :, :3]


@pytest.mark.parametrize("name", PAGES)
def test_it_is_html_without_a_mistake(name):
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: `make` installs it from the lock")
    parser = html5lib.HTMLParser(strict=False)
    parser.parse(page(name), transport_encoding="utf-8")

    assert [(place, code) for place, code, _ in parser.errors] == []


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_on_every_screen_it_is_light_full_of_words_and_lines_and_nothing_is_wider(look, name, screen):
    tab = look(name, width=SCREENS[screen], height=2600)
    pixels = pixels_of(tab, name, screen.replace(" ", "-"))

    assert pixels.shape == (2600, SCREENS[screen], 3)
    assert np.allclose(pixels[2, 2], 1.0)
    assert len(np.unique((pixels * 255).astype(int) @ [1, 256, 65536])) > 100
    assert tab.found("document.scrollingElement.scrollWidth") <= SCREENS[screen]


@pytest.mark.parametrize("name", PAGES)
def test_in_the_dark_it_is_dark_and_its_pictures_too(look, name):
    pixels = pixels_of(look(name, width=1280, height=2600, dark=True), name, "dark")

    assert pixels[2, 2].max() < 0.15
    assert np.median(pixels) < 0.15
    assert pixels.max() > 0.8


_PARTS = """
(() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const boxes = (what) => all(what).map((part) => part.getBoundingClientRect()).filter((box) => box.width > 0);
  const heights = boxes("svg text").map((box) => box.height);
  const ends = boxes("svg, svg text, caption, pre code").map((box) => box.right);
  const hidden = all(".drawing").map((box) => box.scrollWidth - box.clientWidth);
  return [Math.min(...heights), Math.max(...ends), Math.max(...hidden)];
})()
"""
"""How high the smallest word in a picture is, where the outermost part ends, what of a picture is to be scrolled to."""


@pytest.mark.parametrize("width", [390, 360, 320])
@pytest.mark.parametrize(
    "name", ["the demo", "gsm8k", "failed", "several", "a night, promoted", "a channel, forty nights"]
)
def test_on_a_phone_pictures_are_whole_with_words_that_can_be_read_and_no_caption_or_command_is_cut(look, name, width):
    smallest, rightmost, hidden = look(name, width=width, height=2600).found(_PARTS)

    assert smallest > 7
    assert rightmost <= width
    assert hidden <= 0


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize(
    ("name", "most"),
    [
        *((name, 3) for name in ("the demo", *KINDS)),
        ("a night, promoted", 4),
        ("a channel, forty nights", 4),
    ],
)
def test_on_paper_it_has_two_or_three_pages(look, name, most, paper):
    file = left(name, f"-{paper}.pdf")
    look(name, width=1280).paper(file, inches=PAPERS[paper])

    assert len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())) in range(2, most + 1)


def test_the_filter_shows_what_is_asked_for_under_the_page_s_own_policy(look):
    """The hash in the policy is the script's: the filter is there."""
    script = """
    (() => {
      const form = document.querySelector("form.filter");
      const shown = () => document.querySelectorAll(".answer:not([hidden])").length;
      const look = () => [form.querySelector("output").value, shown()];
      const found = [form.hidden, look()];
      form.elements.state.value = "right";
      form.dispatchEvent(new Event("input"));
      found.push(look(), document.querySelector("details.rest").open);
      form.elements.words.value = "(7)";
      form.dispatchEvent(new Event("input"));
      found.push(look());
      return found;
    })()
    """

    found = look("gsm8k", width=1280).found(script)
    assert found == [False, ["50 of 50", 50], ["37 of 50", 37], True, ["1 of 50", 1]]


# --- by keys ----------------------------------------------------------------------------------------------------------

_REACHED = "a[href], input, select, summary, [tabindex='0']"
_FOCUS = f"""
(() => {{
  const all = [...document.querySelectorAll("{_REACHED}")].filter((part) => part.checkVisibility());
  const at = document.activeElement;
  const box = at.getBoundingClientRect(), style = getComputedStyle(at);
  const inside = box.left >= 0 && box.left < innerWidth && box.bottom > 0 && box.top < innerHeight;
  return {{
    place: all.indexOf(at), of: all.length, what: at.tagName.toLowerCase(), name: at.name || "", inside,
    marked: style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2,
  }};
}})()
"""


def tabbed(tab, most=400):
    """What has the focus, key after key, until the page's end."""
    seen = []
    for _ in range(most):
        tab.press("Tab")
        found = tab.found(_FOCUS)
        if found["place"] < 0:
            break
        seen.append(found)
        if found["place"] == found["of"] - 1:
            break
    return seen


@pytest.mark.parametrize("name", ["gsm8k", "a channel, forty nights"])
def test_tab_reaches_everything_in_its_order_each_seen_and_marked(look, name):
    seen = tabbed(look(name, width=1280))

    assert [each["place"] for each in seen] == [*range(seen[0]["of"])]
    assert [each for each in seen if not (each["inside"] and each["marked"])] == []
    assert {"a", "summary", "div"} <= {each["what"] for each in seen}


def test_by_keys_alone_answers_are_searched_and_folds_opened(look):
    tab = look("gsm8k", width=1280)
    reached = [each["name"] or each["what"] for each in tabbed(tab)]
    assert {"words", "state", "summary", "a", "pre"} <= {*reached}

    tab = look("gsm8k", width=1280)
    for _ in range(reached.index("words") + 1):
        tab.press("Tab")
    tab.write("(7)")
    assert tab.found("document.querySelector('form.filter output').value") == "1 of 50"

    tab = look("gsm8k", width=1280)
    for _ in range(len(reached) - reached[::-1].index("summary")):
        tab.press("Tab")
    tab.press("Enter")
    assert tab.found("document.activeElement.parentElement.open") is True
    tab.press(" ")
    assert tab.found("document.activeElement.parentElement.open") is False
    tab.press("Tab", shift=True)
    assert tab.found("document.activeElement.textContent") != "The recipe as it was run"


def test_the_first_key_leads_past_the_contents(look):
    tab = look("gsm8k", width=1280)
    tab.press("Tab")
    assert tab.found("document.activeElement.textContent") == "To the verdict"
    tab.press("Enter")
    tab.press("Tab")

    assert tab.found("document.querySelector('nav').contains(document.activeElement)") is False


# --- for axe-core -----------------------------------------------------------------------------------------------------

_AXE_RUN = """
(async () => {
  const told = (v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)];
  const closed = await axe.run({resultTypes: ["violations"]});
  document.querySelectorAll("details").forEach((fold) => { fold.open = true; });
  const open = await axe.run({resultTypes: ["violations"]});
  return [...closed.violations, ...open.violations].map(told);
})()
"""


@pytest.mark.parametrize("screen", [{"width": 1280}, {"width": 1280, "dark": True}, {"width": 390}], ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_axe_core_finds_nothing_with_folds_closed_and_open(look, name, screen):
    if not AXE.exists():
        pytest.skip("axe-core is not there: tests/page/install.sh brings it by npm")
    tab = look(name, **screen)
    tab.found(AXE.read_text(encoding="utf-8"))

    assert tab.found(_AXE_RUN) == []
