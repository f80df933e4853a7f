"""The page of a night, and that of a channel: what they say first, and that all of it is text, and small."""

import re

import pytest
from channel_material import judged
from channel_pages import CHANNELS, NIGHTS, a_channel, a_night, a_verdict
from test_page import Parsed

from job.core.nightly.channel import KEPT_NIGHTS
from job.render.channel_text import promotion_lines
from job.render.page.finished import report_html
from job.render.page.nights.channel import channel_html
from job.render.page.writing import MOST_BYTES

HOSTILE = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "]]> {{ 7 }} \u202e")
PAGES = {f"night, {name}": (lambda make=make: report_html(make())) for name, make in NIGHTS.items()}
PAGES |= {f"channel, {name}": (lambda make=make: channel_html(make())) for name, make in CHANNELS.items()}


def text_of(page):
    return " ".join(" ".join(data for tag, data in Parsed(page).texts if tag not in {"style", "script"}).split())


def cells(page, caption):
    """The rows of a table."""
    table = re.search(rf"<caption>[^<]*{re.escape(caption)}.*?</table>", page.decode(), re.DOTALL)
    assert table, caption
    rows = re.findall(r"<tr.*?</tr>", table[0], re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


# --- of a night -------------------------------------------------------------------------------------------------------


def test_a_night_s_page_says_first_promoted_or_not_and_why():
    found = a_night()
    page = report_html(found)
    verdict = re.search(r'<p class="verdict"[^>]*>(.*?)</p>', page.decode(), re.DOTALL)[1]
    assert verdict.startswith("Promoted: run-2 is 0.1")
    assert "than run-1 on 100 examples (95 % interval" in verdict
    assert re.findall(r'<section id="([\w-]+)"', page.decode())[:3] == ["verdict", "night", "answers"]

    refused = report_html(a_night(judged(gain=-0.2), "refused"))
    assert b'dir="auto">Not promoted, not better: run-2 is 0.2' in refused
    assert "not better; run-1 stays in use" in text_of(refused)
    rolled_back = text_of(report_html(a_night(replaced_by="run-1")))
    assert "better; it was put in use, and is no longer: run-1 is" in rolled_back


def test_champion_and_challenger_stand_beside_each_other_with_intervals_by_slice():
    rows = cells(report_html(a_night()), "This run less run-1")
    names = [row[0] for row in rows]
    assert names == [
        "on",
        "frozen examples",
        "slice language=en",
        "slice language=de",
        "regression set",
        "drift, against the base",
    ]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["frozen examples"][:3] == ["100", "100", "-0.1000"]
    for name in names[1:]:
        assert re.fullmatch(r"[+-]\d\.\d{4} to [+-]\d\.\d{4}", by_name[name][3]), name
    assert by_name["slice language=en"][0] == "50"


def test_the_answers_of_both_are_counted_and_the_text_says_so_too():
    report = a_night(a_verdict(lost=10))
    (row,) = cells(report_html(report), "Wrong answers of this run")[1:]
    assert row[:4] == ["frozen examples", "40", "40", "+25.0"]
    assert any("answers" in line and "+25.0 (" in line for line in promotion_lines(report.promotion))


def test_answers_of_base_champion_and_challenger_stand_together_regressions_first():
    page = report_html(a_night()).decode()
    articles = re.findall(r'<article class="answer".*?</article>', page, re.DOTALL)
    first = [re.search(r"test\.jsonl:(\d+)", each)[1] for each in articles]
    assert first[:3] == ["1", "11", "21"], "what the model in use answered better, then what neither did"
    assert "2 were answered better by run-1, and come first" in page
    assert re.findall(r"<dt>([\w ]+)</dt>", articles[0]) == ["prompt", "expected", "base", "in use", "tuned"]
    assert "of the model in use 1" in articles[0]


def test_what_is_not_known_of_the_model_in_use_is_no_regression_and_of_the_base_it_is_known():
    report = a_night()
    unknown = [each.model_copy(update={"champion": None, "champion_score": None}) for each in report.answers]
    base_was_right = [each.model_copy(update={"base_score": 1.0}) for each in unknown]
    page = report_html(report.model_copy(update={"answers": tuple(base_was_right)})).decode()
    assert "0 were answered better by run-1" in page
    first = a_verdict()
    decision = first.decision.model_copy(update={"champion": "the base"})
    report = a_night(first.model_copy(update={"decision": decision}))
    page = report_html(report.model_copy(update={"answers": tuple(base_was_right)})).decode()
    assert "3 were answered better by the base" in page


def test_without_a_channel_there_is_no_such_chapter():
    page = report_html(a_night().model_copy(update={"promotion": None})).decode()
    assert 'id="night"' not in page
    assert "were answered better by" not in page


# --- of a channel -----------------------------------------------------------------------------------------------------


def test_a_channel_s_page_says_what_is_in_use_and_why_and_draws_its_nights():
    page = channel_html(a_channel())
    verdict = re.search(r'<p class="verdict"[^>]*>(.*?)</p>', page.decode(), re.DOTALL)[1]
    assert (
        verdict.startswith("run-36 is in use since 2026-02-10 05:00 UTC. run-36 is ") or "run-36 is in use" in verdict
    )
    anchors = re.findall(r'<section id="([\w-]+)"', page.decode())
    assert anchors == ["verdict", "nights", "fresh", "budget", "waiting", "cost", "changes"]
    titles = re.findall(r'<title id="([\w-]+)-says">(.*?)</title>', page.decode())
    assert [name for name, _ in titles] == ["nights", "nights-narrow", "fresh", "budget", "work"]
    assert titles[0][1].startswith("40 nights, 7 promoted.")


def test_each_night_stands_there_with_its_interval_the_newest_first():
    rows = cells(channel_html(a_channel()), "The last nights")
    assert [row[1] for row in rows[1:4]] == ["run-39", "run-38", "run-37"]
    by_run = {row[1]: row for row in rows[1:]}
    assert by_run["run-36"][2:4] == ["promoted", "run-30"]
    assert by_run["run-36"][6:8] == ["-0.0300", "-0.0400 to -0.0200"]
    assert by_run["run-32"][2] == "lost"


def test_new_records_budget_goodput_and_hours_are_those_of_the_state():
    channel = a_channel()
    page = channel_html(channel)
    assert cells(page, "New records")[1][1:3] == ["300", "1.4100"]
    spent = channel.state.budget.spent_since(0)
    assert f"{spent:.3f} of 1" in text_of(page)
    hours = sum(each.work.held_seconds * 2 for each in channel.nights) / 3600
    assert f"{hours:,.2f}" in text_of(page)
    assert "75% of that time in training steps" in text_of(page)
    assert cells(page, "What each night took")[1][2:6] == ["NVIDIA H200", "2", "1", "2640 s"]


def test_a_channel_whose_copy_is_behind_says_what_to_do():
    page = text_of(channel_html(CHANNELS["rolled back"]()))
    assert "The base is in use since 2026-01-06 02:00 UTC. Rolled back by hand from run-0 to the base." in page
    assert "Start `run` once more" in page


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_element_is_closed_every_name_is_there_once_and_it_is_small(name):
    content = PAGES[name]()
    page = Parsed(content)
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]

    assert page.wrong == []
    assert sorted(ids) == sorted(set(ids))
    assert len(content) < MOST_BYTES
    assert not [value for _, a, _ in page.elements for value in a.values() if "alert" in (value or "")]
    assert "\u202e" not in content.decode()
    scripts = [tag for tag, _, _ in page.elements if tag == "script"]
    assert len(scripts) == (0 if name.startswith("channel") else 1), "only answers are filtered"


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "]]> {{ 7 }} \u202e"]
)
def test_whatever_names_and_sentences_hold_the_pages_have_the_same_elements(text):
    harmless, spoilt = (Parsed(channel_html(a_channel(9, words=words, again=(words,)))) for words in ("run", text))
    assert spoilt.wrong == []
    assert spoilt.skeleton() == harmless.skeleton()

    nights = [a_night(a_verdict(run_id=f"r{words}", slices=(f"a{words}",)), words=words) for words in ("run", text)]
    harmless, spoilt = (Parsed(report_html(each)) for each in nights)
    assert spoilt.wrong == []
    assert spoilt.skeleton() == harmless.skeleton()


def test_nights_for_which_there_is_no_room_are_counted():
    channel = a_channel(500)
    assert len(channel.nights) == KEPT_NIGHTS
    assert f"{KEPT_NIGHTS - 60} more rows are in state.json." in channel_html(channel).decode()
