"""The page as a browser lays it out: on a desk, on a phone, in the dark, on paper, by its script, and for axe-core.

`make test-page` leaves the screenshots in .page/, to be looked at.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import found_browser, shown
from channel_pages import CHANNELS, NIGHTS
from matplotlib.image import imread
from page_reports import KINDS, gsm8k
from report_fixtures import LEARNED

from job.core.attempt.run_record import RecordedObject
from job.render.page.finished import report_html
from job.render.page.nights.channel import channel_html
from job.render.page.several import several_html
from job.render.page.unfinished import RunSoFar, unfinished_html
from job.render.runs_table import RunRow

pytestmark = pytest.mark.page

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / ".page"
AXE = SHOTS / "node_modules" / "axe-core" / "axe.min.js"
_POLICY = re.compile(rb'<meta http-equiv="Content-Security-Policy"[^>]*>')


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


PAGES = {name: functools.partial(lambda make: report_html(make()), make) for name, make in KINDS.items()}
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
def browse(tmp_path_factory):
    """Starts the browser on a page, with options; returns what it wrote to standard output."""
    browser = found_browser()
    if browser is None:
        pytest.skip("no browser: install chromium-headless-shell or chromium, or name one with CHROMIUM")
    SHOTS.mkdir(exist_ok=True)
    profile = tmp_path_factory.mktemp("profile")

    def start(content, *options):
        file = profile / "page.html"
        file.write_bytes(content)
        return shown(browser, file, *options, profile=profile)

    return start


def asked(browse, content, script, *options):
    """What a script of ours finds in the page, which then has no policy against it."""
    added = f"<script>{script}</script></body>".encode()
    dom = browse(_POLICY.sub(b"", content).replace(b"</body>", added), *options, "--dump-dom")
    return json.loads(
        re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1].replace("&lt;", "<").replace("&amp;", "&")
    )


SAY = """
const say = (found) => {
  const element = document.createElement("pre");
  element.id = "found";
  element.textContent = JSON.stringify(found);
  document.body.append(element);
};
"""
AXE_RUN = """
const told = (v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)];
axe.run({resultTypes: ["violations"]}).then((found) => say(found.violations.map(told)));
"""


def shot(browse, name, kind, *options, width, height=2600):
    file = SHOTS / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{kind}.png"
    browse(page(name), f"--window-size={width},{height}", f"--screenshot={file}", *options)
    return imread(file)[:, :, :3]


@pytest.mark.parametrize("name", PAGES)
def test_it_is_html_without_a_mistake(name):
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: `make` installs it from the lock")
    parser = html5lib.HTMLParser(strict=False)
    parser.parse(page(name), transport_encoding="utf-8")

    assert [(place, code) for place, code, _ in parser.errors] == []


@pytest.mark.parametrize("name", PAGES)
def test_on_a_desk_it_is_light_and_full_of_words_and_lines(browse, name):
    pixels = shot(browse, name, "desk", width=1280)

    assert pixels.shape == (2600, 1280, 3)
    assert np.allclose(pixels[2, 2], 1.0)
    assert len(np.unique((pixels * 255).astype(int) @ [1, 256, 65536])) > 100


@pytest.mark.parametrize("name", PAGES)
def test_on_a_phone_nothing_is_wider_than_the_screen(browse, name):
    shot(browse, name, "phone", width=390)
    script = SAY + "say([document.documentElement.scrollWidth, window.innerWidth]);"
    widths = asked(browse, page(name), script, "--window-size=390,2600")

    assert widths[0] <= widths[1]


@pytest.mark.parametrize("name", ["gsm8k", "several", "a night, promoted", "a channel, forty nights"])
def test_on_a_phone_words_in_pictures_can_be_read_and_no_caption_or_command_is_cut(browse, name):
    script = (
        SAY
        + """
        const all = (what) => [...document.querySelectorAll(what)];
        const heights = all("svg text").map((text) => text.getBoundingClientRect().height);
        const wide = all("caption, pre code").map((part) => part.getBoundingClientRect().right);
        say([Math.min(...heights), Math.max(...wide), window.innerWidth]);
        """
    )
    smallest, rightmost, width = asked(browse, page(name), script, "--window-size=390,2600")

    assert smallest > 7
    assert rightmost <= width


@pytest.mark.parametrize("name", ["gsm8k", "a night, promoted", "a channel, forty nights"])
def test_in_the_dark_it_is_dark_and_its_pictures_too(browse, name):
    pixels = shot(browse, name, "dark", "--blink-settings=preferredColorScheme=0", width=1280)

    assert pixels[2, 2].max() < 0.15
    assert np.median(pixels) < 0.15


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("gsm8k", 3),
        ("small", 3),
        ("Arabic", 3),
        ("twenty attempts", 4),
        ("a night, promoted", 4),
        ("a channel, forty nights", 4),
    ],
)
def test_on_paper_it_has_two_or_three_pages(browse, name, most):
    file = SHOTS / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.pdf"
    browse(page(name), f"--print-to-pdf={file}", "--no-pdf-header-footer")

    assert len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())) in range(2, most + 1)


def test_the_filter_shows_what_is_asked_for(browse):
    script = (
        SAY
        + """
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
        say(found);
        """
    )

    assert asked(browse, page("gsm8k"), script) == [False, ["50 of 50", 50], ["37 of 50", 37], True, ["1 of 50", 1]]


def test_its_own_script_runs_under_its_own_policy(browse):
    """The hash in the policy is the script's: the filter is there."""
    dom = browse(page("gsm8k"), "--dump-dom")

    assert '<form class="filter">' in dom
    assert "50 of 50" in dom


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_core_finds_nothing(browse, name, scheme):
    if not AXE.exists():
        pytest.skip("axe-core is not there: tests/page/install.sh brings it by npm")
    settings = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    # A module would wait for nothing; the budget is virtual time, which runs while axe works.
    found = asked(browse, page(name), f"{AXE.read_text()};{SAY}{AXE_RUN}", settings, "--virtual-time-budget=60000")

    assert found == []
