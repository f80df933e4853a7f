"""The report's page: what it says, that all of it is text, and that it stays small whatever it is made of."""

import base64
import functools
import hashlib
import json
import re
import shlex
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_reports import KINDS, gsm8k, several_gpus, small, with_sources
from report_fixtures import ADAPTER, DATA, FINISHED, KILLED, LEARNED, THROUGHPUT, evaluation

from job import __version__
from job.core.attempt.run_record import RecordedObject
from job.core.data.report_data import BadLine
from job.core.judging.held_out import Answer
from job.core.reports.report import MachineReport, Report, TrainingCurve, read_report
from job.render.cards.adapter import adapter_card
from job.render.page.finished import report_html, some_places
from job.render.page.several import several_html
from job.render.page.unfinished import RunSoFar, unfinished_html
from job.render.page.writing import MOST_BYTES, seen
from job.render.runs_table import RunRow

VOID = {"meta", "link", "br", "input", "img", "hr"}
PATHS = {"path", "use"}
"""Of a drawing: how many there are depends on its numbers."""


class Parsed(HTMLParser):
    """A page taken apart: its elements with their attributes, and the text of each."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open, self.wrong = [], [], [], []
        self.feed(page.decode())
        self.close()
        self.wrong += [f"<{name}> is never closed" for name in self.open]

    def handle_starttag(self, tag, attrs):
        if len({name for name, _ in attrs}) != len(attrs):
            self.wrong.append(f"<{tag}> has an attribute twice")
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *, without=("style", "script")):
        return " ".join(" ".join(data for tag, data in self.texts if tag not in without).split())

    def named(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def skeleton(self):
        """Elements and the names of their attributes: what no text may change."""
        return [(tag, sorted(attributes)) for tag, attributes, _ in self.elements if tag not in PATHS]


def page_of(report):
    return Parsed(report_html(report))


@functools.cache
def page_of_kind(kind):
    """Taken apart once, for all who look at it."""
    return page_of(KINDS[kind]())


@pytest.fixture
def full():
    return page_of_kind("gsm8k")


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_in_one_sentence_with_its_uncertainty(full):
    report = gsm8k()
    found = report.held_out
    said = (
        f"It learned: validation loss fell from {report.sweet_spot.base_loss:.4f} to {report.sweet_spot.loss:.4f} nats "
        f"a token, by {found.gain:.4g} ± {found.gain_plus_minus:.2g} (95 % interval) on 300 held-out examples."
    )

    assert said in full.text()
    assert full.text().index(said) < full.text().index("What to do next") < full.text().index("Curves", 300)


def test_a_gain_within_its_interval_may_be_chance():
    found = gsm8k().held_out.model_copy(update={"gain": 0.01, "gain_plus_minus": 0.02})

    assert "that may be chance" in page_of(gsm8k(held_out=found)).text()


def test_a_run_in_which_the_base_was_best_says_so():
    spot = LEARNED["sweet_spot"].model_copy(update={"step": 0, "loss": 2.5, "best_step": 0})

    assert "Nothing better than the base was found on 120 held-out examples" in page_of(small(sweet_spot=spot)).text()


def test_where_the_base_was_kept_the_best_trained_step_stands_beside_it_with_its_uncertainty():
    report, text = gsm8k(rises=0.02), page_of_kind("base kept").text()
    found, loss = report.tried, {each.step: each.loss for each in report.evaluations}

    assert report.sweet_spot.step == 0 < found.step
    assert (
        f"The best step that was trained, {found.step}, has a loss of {loss[found.step]:.4f} nats a token, higher by "
        f"{-found.gain:.4g} ± {found.gain_plus_minus:.2g} (95 % interval)"
    ) in text
    assert f"At step {found.step}, the best that was trained, the loss has fallen on {300 - found.worse} of 300" in text
    assert f"risen on {found.worse}." in text
    assert f"loss at step {found.step}" in text
    far = found.outliers[0]
    assert f"{far.where} {far.tokens} {far.base:.4f} {far.tuned:.4f}" in text
    assert "look at each example's change" in text


@pytest.mark.parametrize(
    ("gain", "around", "said"),
    [
        (-0.01, 0.02, "higher by 0.01 ± 0.02 (95 % interval), which may be chance."),
        (0.01, 0.02, "lower by 0.01 ± 0.02 (95 % interval), which may be chance."),
        (-0.3, 0.02, "higher by 0.3 ± 0.02 (95 % interval). "),
        (-0.3, None, "higher by 0.3, on too few examples to say how sure that is."),
    ],
)
def test_how_sure_it_is_that_nothing_was_better_is_said(gain, around, said):
    report = gsm8k(rises=0.02)
    tried = report.tried.model_copy(update={"gain": gain, "gain_plus_minus": around})

    assert said in page_of(report.model_copy(update={"tried": tried})).text()


def test_an_earlier_version_s_report_of_a_kept_base_points_at_nothing_that_is_not_there():
    text = page_of(gsm8k(rises=0.02, tried=None)).text()

    assert "At step" not in text
    assert "look at the training examples (`preview`)" in text


def test_what_to_do_next_stands_there_or_that_nothing_was_seen(full):
    assert "of the targets were cut at 256: 512 cuts 0.5% and costs 7% more tokens" in full.text()
    quiet = small(
        data=DATA.model_copy(update={"bad_lines": 0, "first_bad_lines": ()}),
        evaluations=(evaluation(0, 2.0), evaluation(50, 1.0), evaluation(100, 0.999)),
        sweet_spot=LEARNED["sweet_spot"].model_copy(update={"overfitting_from_step": None}),
    )
    assert "Nothing in the figures of this run asks for another one." in page_of(quiet).text()


def test_each_evaluation_has_its_interval_and_the_chosen_one_is_marked(full):
    report = gsm8k()
    for each, around in zip(report.evaluations, report.held_out.plus_minus, strict=True):
        assert f"{each.loss:.4f} ± {around:.2g} {each.perplexity:.4g}" in full.text()
    assert f"{report.sweet_spot.step} (chosen)" in full.text()
    assert len([a for a in full.named("tr") if a.get("class") == "marked"]) == 2  # and the chosen max_length


def test_a_source_has_its_losses_with_their_intervals_and_the_change():
    assert "older notes 60 1.0000 ± 0.12 1.4000 ± 0.12 +0.4000" in page_of(with_sources()).text()
    assert "older notes 60 1.0000 1.4000 +0.4000" in page_of(with_sources(plus_minus=None)).text()


def test_answers_stand_side_by_side_the_wrong_ones_first_by_what_became_of_their_loss(full):
    states = [attributes["data-state"] for attributes in full.named("article")]

    assert states == sorted(states, reverse=True) == ["wrong"] * 13 + ["right"] * 37
    text = full.text()
    assert text.index("test.jsonl:49, loss 1.2500 → 0.8800") < text.index("test.jsonl:45, loss 1.2500 → 0.8400")
    assert "expected #### 72 base I do not know. tuned #### 71" in text


def test_examples_far_from_the_others_are_listed_with_file_and_line(full):
    far = gsm8k().held_out.outliers[0]

    assert f"{far.where} {far.tokens} {far.base:.4f} {far.tuned:.4f} {far.tuned - far.base:+.4f}" in full.text()


def test_the_data_s_page_has_counts_skipped_lines_candidates_and_what_is_learned(full):
    text = full.text()

    assert 'train.jsonl:17 "answer" is missing' in text
    assert "512 54 0.48%" in text
    assert " #### 72" in [data for tag, data in full.texts if tag == "mark"]


def test_cost_has_time_over_all_attempts_and_why_each_ended():
    end = KILLED.model_copy(update={"ended": "2025-01-31T04:00:34+00:00", "exit_code": 75, "reason": "asked to stop"})
    text = page_of(gsm8k(attempts=(end, FINISHED))).text()

    assert "280 s in 2 attempts" in text
    assert "6% in training steps (goodput)" in text
    assert "75 asked to stop" in text
    assert "GPU hours 0.0778" in text


def test_what_a_killed_attempt_took_is_known_within_bounds_and_so_is_goodput():
    """Nobody wrote down when it ended: it had renewed the lock for 20 s, and was gone when the next began, after 60."""
    seen = KILLED.model_copy(update={"lasted_at_least": 20, "ranks": 1})
    text = page_of(gsm8k(attempts=(seen, FINISHED.model_copy(update={"ranks": 1})))).text()

    assert "at least 266 s in 2 attempts, of which 1 left no word of their end" in text
    assert "GPU hours at least 0.0739" in text
    assert "5% to 6% in training steps (goodput); one that left no word ended when the next began" in text
    assert "1 2025-01-31 04:00:00 at least 20.0 s node-1" in text
    unseen = page_of_kind("twenty attempts").text()
    assert "at least 246 s in 20 attempts, of which 19 left no word of their end" in unseen
    assert "5% to 7% in training steps (goodput)" in unseen


def test_clocks_that_differ_make_no_time_less_than_none():
    late = KILLED.model_copy(update={"started": "2025-01-31T05:00:00+00:00", "lasted_at_least": 4})

    assert "at least 250 s in 2 attempts" in page_of(gsm8k(attempts=(late, FINISHED))).text()
    assert "6% in training steps (goodput)" in page_of(gsm8k(attempts=(late, FINISHED))).text()


def test_of_an_attempt_whose_record_is_lost_nobody_knows_the_longest_it_can_have_taken():
    lost = KILLED.model_copy(update={"started": ""})

    assert "at most 7% in training steps (goodput)" in page_of(gsm8k(attempts=(lost, FINISHED))).text()


def test_gpu_hours_count_each_attempt_s_own_gpus():
    end = {"started": "2025-01-31T02:00:00+00:00", "ended": "2025-01-31T03:00:00+00:00", "exit_code": 75}
    four = KILLED.model_copy(update={**end, "ranks": 4})
    eight = FINISHED.model_copy(update={"started": "2025-01-31T03:05:06+00:00", "ranks": 8})

    speed = THROUGHPUT.model_copy(update={"ranks": 8})

    def hours(*attempts):
        return page_of(gsm8k(attempts=attempts, throughput=speed)).text()

    assert "GPU hours 12.00 " in hours(four, eight)
    unknown = hours(four.model_copy(update={"ranks": None}), eight.model_copy(update={"ranks": None}))
    assert "GPU hours 16.00; the number of GPUs of 1 of them is not recorded, and taken to be 8" in unknown
    assert "GPU hours" not in page_of(small(device="CPU, 2 threads")).text()


def test_cost_has_the_share_of_the_ceiling_where_it_is_known(full):
    known = {"ceiling_share": 0.338, "ceiling_tflops": 685.0, "ceiling_from": "measured"}
    text = page_of(several_gpus(**known)).text()

    assert "share of the ceiling 0.34 of what each GPU's large products sustain (685 TFLOP/s, measured" in text
    assert "ceiling" not in full.text()


def test_cost_has_the_share_of_the_ceiling_where_it_is_known(full):
    known = {"ceiling_share": 0.338, "ceiling_tflops": 685.0, "ceiling_from": "measured"}
    text = page_of(several_gpus(**known)).text()

    assert "share of the ceiling 0.34 of what each GPU's large products sustain (685 TFLOP/s, measured" in text
    assert "ceiling" not in full.text()


def test_the_cost_of_several_gpus_has_the_speed_of_each_the_wait_and_what_was_sent(full):
    text = page_of_kind("several GPUs").text()

    assert "8 processes on 2 nodes, each with the whole base" in text
    assert "2,500 real tokens a second" in text
    assert "3.2 s of this attempt's steps" in text
    assert "640.0 MB a step by each" in text
    shared = page_of(several_gpus(placement="sharded", nodes=1)).text()
    assert "8 processes, the base sharded over them" in shared
    assert "waited for others" not in full.text()


def test_times_phases_and_figures_are_written_for_people(full):
    text = full.text()

    assert "Finished 2025-01-31 04:05 UTC" in text
    assert "load model" in text
    assert "load_model" not in text
    assert "1.670" in text
    assert "7.5e-5" in text


def test_versions_and_the_machine_can_be_looked_up(full):
    machine = MachineReport(system="Ubuntu 24.04, Linux 6.8.0 x86_64", processor="Xeon 8468", driver="570.86")
    text = page_of(gsm8k(versions={"qlora-job": "0.9", "torch": "2.13.0"}, machine=machine)).text()

    for name, fact in (
        ("qlora-job", "0.9"),
        ("driver", "570.86"),
        ("processor", "Xeon 8468"),
        ("device", "NVIDIA H200"),
    ):
        assert f"{name} {fact}" in text
    assert "system Ubuntu 24.04, Linux 6.8.0 x86_64" in text
    assert "processor" not in full.text()  # by an earlier version


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"qlora-job": "0.0.1"}, f"finished by qlora-job 0.0.1; this page was written by qlora-job {__version__}."),
        ({"qlora-job": __version__}, f"Written by qlora-job {__version__}."),
        ({}, f"Written by qlora-job {__version__}."),
    ],
)
def test_the_page_names_who_made_the_run_where_another_version_made_the_page(versions, said):
    text = page_of(small(versions=versions)).text()

    assert said in text
    assert ("was finished by" in text) == ("0.0.1" in said)


def test_examples_that_are_right_and_yet_not_learned_are_named_with_file_and_line():
    lines = tuple(BadLine(where=f"train.jsonl:{n}", reason="too long: 900 tokens") for n in (3, 8))
    train = DATA.train.model_copy(update={"dropped": 40, "without_target": 1})
    text = page_of(small(data=DATA.model_copy(update={"train": train, "first_left_out": lines}))).text()

    assert "Examples that were left out (41 too long, 1 with nothing to learn)" in text  # one on the held-out side
    assert "train.jsonl:3 too long: 900 tokens train.jsonl:8 too long: 900 tokens" in text
    assert "40 more rows are in the data." in text


def test_the_recipe_and_the_commands_can_be_copied(full):
    code = [data for tag, data in full.texts if tag == "code"]

    assert "python entrypoint.py try s3://models/notes/runs/notes-1f2e --prompt '...'" in code
    assert any("learning_rate: 0.0002" in text for text in code)


def test_what_loads_and_merges_it_works_when_it_is_pasted(full):
    code = [data for tag, data in full.texts if tag == "code"]

    assert "aws s3 cp --recursive s3://models/notes/runs/notes-1f2e/adapter adapter" in code
    assert "python entrypoint.py export s3://models/notes/runs/notes-1f2e --to merged" in code
    assert "ask it as model: tuned at /v1/completions" in full.text()
    local = ADAPTER.model_copy(update={"uri": "file:///data/a run/adapter"})
    code = [data for tag, data in page_of(small(adapter=local)).texts if tag == "code"]
    assert not any("aws s3" in text for text in code)
    assert any('PeftModel.from_pretrained(base, "/data/a run/adapter")' in text for text in code)
    assert any("'tuned=/data/a run/adapter'" in text for text in code)


@pytest.mark.parametrize(
    ("base", "found"),
    [
        ("owner/name", "owner/name"),
        ("s3://models/base", "path/to/base"),
        ("/models/a base", "/models/a base"),
        ("file:///models/a%20base", "/models/a base"),
        ("./models/base", "path/to/base"),
        ("../base", "path/to/base"),
    ],
)
def test_pasted_lines_name_a_base_that_is_found_there(base, found):
    """On page and card alike; transformers and vLLM read no bucket, and a relative folder is in one place alone."""
    report = small(model=small().model.model_copy(update={"base": base}))
    page = page_of(report)
    code = [data for tag, data in page.texts if tag == "code"]
    (python,) = [text for text in code if text.startswith("import torch")]
    (served,) = [text for text in code if text.startswith("vllm ")]
    brought = [text for text in code if text.startswith("aws s3 cp") and text.endswith(" path/to/base")]
    card = adapter_card(report)

    assert f'CausalLM.from_pretrained("{found}", dtype' in python
    assert f'AutoTokenizer.from_pretrained("{found}"' in python
    assert shlex.split(served)[2] == found
    assert brought == (["aws s3 cp --recursive s3://models/base path/to/base"] if base.startswith("s3:") else [])
    assert all(line in card for line in brought)
    assert python.replace('(base, "adapter")', '(base, "path/to/adapter")') in card
    renamed = f"path/to/base stands for the folder that was called {base} where the run was started"
    assert (renamed in page.text()) == (renamed in card.replace("`", "")) == (base in {"./models/base", "../base"})


def test_what_some_processors_need_stands_on_the_page_as_on_the_card(full):
    line = "for module in base.modules(): module.support_avx512bf16_for_cpu = False"

    assert line in full.text()
    assert line in adapter_card(gsm8k())
    packed = gsm8k(model=gsm8k().model.model_copy(update={"in_mxfp4": True}))
    assert line not in page_of(packed).text() + adapter_card(packed)


def test_of_one_attempt_nothing_was_resumed(full):
    assert "resumed" not in full.text()
    assert "to the bit as without an interruption" in page_of(small()).text()


def test_a_uri_that_a_shell_would_obey_is_quoted():
    code = [data for tag, data in page_of(small(run_uri="s3://b/$(reboot)/runs/x y")).texts if tag == "code"]

    assert "python entrypoint.py try 's3://b/$(reboot)/runs/x y' --prompt '...'" in code


def test_the_python_that_is_shown_is_python_whatever_the_base_is_called():
    import ast

    base = '"); import os; os.system("reboot") #\n'
    report = small(model=small().model.model_copy(update={"base": base, "revision": "'\"\n"}))
    (shown,) = [data for tag, data in page_of(report).texts if tag == "code" and data.startswith("import torch")]
    calls = [node.func for node in ast.walk(ast.parse(shown)) if isinstance(node, ast.Call)]

    assert {getattr(call, "attr", getattr(call, "id", "")) for call in calls} == {
        "BitsAndBytesConfig",
        "from_pretrained",
    }


def test_it_is_made_from_report_json_alone_and_each_time_the_same():
    report = gsm8k()

    assert report_html(read_report(json.loads(report.model_dump_json()))) == report_html(report)


# --- for everybody ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_closed_and_every_name_is_there_once(kind):
    page = page_of_kind(kind)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]

    assert page.wrong == []
    assert len(ids) == len(set(ids))
    referred = [a["aria-labelledby"] for _, a, _ in page.elements if "aria-labelledby" in a]
    linked = [a["href"][1:] for a in page.named("a")]
    assert {*referred, *linked} <= set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_have_words_tables_have_heads_and_the_page_has_landmarks(kind):
    page = page_of_kind(kind)

    assert page.named("html") == [{"lang": "en"}]
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert len(page.named(landmark)) == 1, landmark
    assert len(page.named("svg")) >= 2
    assert all(attributes.get("role") == "img" for attributes in page.named("svg"))
    assert all(attributes["scope"] in {"col", "row"} for attributes in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table")) > 2
    titles = [data for tag, data in page.texts if tag == "title"]
    assert all(len(title) > 20 for title in titles[1:])
    assert len(titles) == 1 + len(page.named("svg"))


def test_headings_leave_out_no_level(full):
    levels = [int(tag[1]) for tag, _, _ in full.elements if re.fullmatch(r"h\d", tag)]

    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def contrast(one, other):
    """WCAG 2.2, relative luminance."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_words_stand_out_from_what_they_stand_on_in_light_dark_and_print(full):
    (style,) = [data for tag, data in full.texts if tag == "style"]
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{[^}]*\}", style)]

    assert len(schemes) == 3
    for colours in schemes:
        for words in ("text", "quiet", "blue", "orange", "red", "green", "grey"):
            assert contrast(colours[words], colours["ground"]) >= 4.5, (words, colours)
        for words in ("text", "quiet", "orange"):
            assert contrast(colours[words], colours["raised"]) >= 4.5, (words, colours)
        for ground in ("learned", "marked"):
            assert contrast(colours["text"], colours[ground]) >= 7, (ground, colours)
        assert contrast(colours["orange"], colours["learned"]) >= 4.5


# --- it is all text ---------------------------------------------------------------------------------------------------

HOSTILE = {
    "a script": "<script>alert(1)</script>",
    "an attribute": "\"'><img src=x onerror=alert(1)>",
    "ends of ours": "</title></style></script></textarea><!--",
    "a template": "{{ 7 * 7 }}{% for x in y %}",
    "markdown": "[x](javascript:alert(1)) `a` **b** ![y](https://example.org/z.png)",
    "entities": "&lt;b&gt; &amp;amp; &#x3c;",
    "control characters": "a\x00b\x1b[31mc\x7f\x85d\x9b\r\ne\rf",
    "turned round": "a\u202ecba\u2066x\u2069\u200f\ufeff\u2028y",
    "half a character": "a\ud800b\udfffc",
    "a formula": r"$\frac{a}{$b^",
    "CDATA": "]]> <![CDATA[ <?php ?>",
}


def with_everywhere(value, text):
    """JSON with a text at the end of every text that may be any, and of every key that may."""
    if isinstance(value, str):
        return value + text
    if isinstance(value, list):
        return [with_everywhere(each, text) for each in value]
    if isinstance(value, dict):
        free = {"versions", "phase_seconds", "spent", "files", "recipe"}
        fixed = {"schema_version", "shown", "left_out", "engine", "compute_dtype", "loaded_from", "started", "ended"}
        fixed |= {"placement", "document_rows"}
        return {
            key: {f"{inner}{text}": with_everywhere(each, text) for inner, each in part.items()}
            if key in free and isinstance(part, dict)
            else part
            if key in fixed
            else with_everywhere(part, text)
            for key, part in value.items()
        }
    return value


def spoilt(report, text):
    return Report.model_validate(with_everywhere(report.model_dump(mode="json"), text))


@functools.cache
def spoilt_page(kind, name):
    return page_of(spoilt(KINDS[kind](), HOSTILE.get(name, name)))


@pytest.mark.parametrize(
    ("kind", "name"), [*(("small", name) for name in HOSTILE), ("gsm8k", "a script"), ("sources", "an attribute")]
)
def test_whatever_records_prompts_and_names_hold_the_page_has_the_same_elements(kind, name):
    page = spoilt_page(kind, name)

    assert page.wrong == []
    assert page.skeleton() == spoilt_page(kind, "harmless").skeleton()
    assert len(page.named("script")) == 1


@pytest.mark.parametrize("name", ["control characters", "turned round", "half a character"])
def test_what_is_not_seen_is_shown_as_its_escape(name):
    page = spoilt_page("small", name)
    everything = [data for _, data in page.texts] + [v or "" for _, a, _ in page.elements for v in a.values()]
    unseen = {each for text in everything for each in text if unicodedata.category(each) in {"Cc", "Cf", "Cs", "Zl"}}

    assert unseen <= {"\n", "\t"}
    assert "\\" in page.text()


def test_scripts_that_need_joiners_and_wide_spaces_have_them():
    for text in ("می\u200cرود", "क्\u200dष", "👩\u200d💻", "日本\u3000東京", "5\u00a0%"):
        assert seen(text) == text


@settings(max_examples=10, deadline=None)
@given(st.text(alphabet=st.characters(), min_size=1, max_size=40))
def test_any_text_is_shown_as_text(text):
    """Found again in the page, but for what is not seen, which stands there as its escape."""
    report = small(answers=(Answer(prompt="p", expected=None, base="b", tuned=f"<{text}>"),))
    page = page_of(report)
    shown = [data for tag, data in page.texts if tag == "dd"]

    assert page.wrong == []
    assert any(seen(f"<{text}>").replace("\r", "\n") in data for data in shown)


@pytest.mark.parametrize("kind", KINDS)
def test_it_asks_nothing_of_the_network_and_runs_its_own_script_alone(kind):
    page = page_of_kind(kind)
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    scripts = [data for tag, data in page.texts if tag == "script"]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]

    assert policy.startswith("default-src 'none';")
    assert re.findall(r"'sha256-(.*?)'", policy) == digests
    assert len(digests) == (1 if KINDS[kind]().answers else 0), "there is nothing to filter"
    for _, attributes, _ in page.elements:
        for name, value in attributes.items():
            if name.split(":")[-1] in {"src", "href", "srcset", "action", "data", "poster"}:
                assert value.startswith("#"), (name, value)
            if not name.startswith("xmlns"):
                assert not re.search(r"url\((?!['\"]?#)", value or ""), (name, value)
            assert not name.startswith("on"), name
    style = " ".join(data for tag, data in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


# --- it stays small ---------------------------------------------------------------------------------------------------


def huge(characters):
    answer = Answer(prompt="p" * characters, expected="<" * characters, base="&" * characters, tuned="語" * characters)
    lines = tuple(BadLine(where="w" * characters, reason="<" * characters) for _ in range(30))
    preview = tuple(
        each.model_copy(update={"pieces": each.pieces * 200, "where": "&" * characters})
        for each in gsm8k().data.preview
    )
    return gsm8k(
        answers=(answer,) * 30,
        notes=("&" * characters,) * 30,
        data=gsm8k().data.model_copy(update={"first_bad_lines": lines, "preview": preview * 20}),
        recipe={"data": {"prompt": "&" * characters}},
        run_id="r" * characters,
        run_uri="'" * characters,
        versions={str(n) + "v" * 100: "<" * characters for n in range(30)},
    )


@pytest.mark.parametrize(
    "report",
    [
        huge(1_000_000),
        gsm8k(steps=50_000),
        gsm8k(answers=gsm8k().answers * 200),
        small(
            attempts=tuple(KILLED.model_copy(update={"number": n, "reason": "&" * 5000}) for n in range(1, 3000)),
        ),
        small(evaluations=tuple(evaluation(step, 2.5) for step in range(5000)), held_out=None),
        small(
            curve=TrainingCurve(loss=(1e14, 0.0) * 20_000, grad_norm=(1e14,) * 40_000, learning_rate=(0.0,) * 40_000)
        ),
    ],
    ids=["texts of a megabyte", "steps", "answers", "attempts", "evaluations", "figures"],
)
def test_a_page_is_never_larger_than_a_megabyte(report):
    page = report_html(report)

    assert len(page) < MOST_BYTES
    assert Parsed(page).wrong == []


def test_what_is_left_out_is_said():
    text = page_of(huge(100_000)).text()
    assert re.search(r"… \(9\d,\d{3} more characters\)", text)
    assert "140 more answers are in report.json." in page_of(gsm8k(answers=gsm8k().answers * 4)).text()
    many = small(attempts=tuple(KILLED.model_copy(update={"number": n}) for n in range(1, 101)))
    assert "40 more rows are in report.json." in page_of(many).text()


@given(st.integers(1, 200), st.integers(1, 80), st.data())
def test_places_are_spread_from_the_first_to_the_last_and_keep_the_one_that_counts(count, most, data):
    keep = data.draw(st.integers(0, count - 1))
    places = some_places(count, most, keep=keep)

    assert keep in places
    assert len(places) <= max(1, most)
    assert [*places] == sorted({*places})
    assert set(places) <= set(range(count))
    if most > 2:
        assert {0, count - 1} <= set(places)


# --- without a report, and of several ---------------------------------------------------------------------------------


def so_far(**changes):
    content = {
        "run_id": "notes-1f2e",
        "run_uri": "s3://models/notes/runs/notes-1f2e",
        "recipe": {"train": {"steps": 200}},
        "objects": (RecordedObject(uri="s3://notes/train.jsonl", etag="e", version=None, size=1234),),
        "attempts": (FINISHED.model_copy(update={"exit_code": 74, "reason": "no room left"}),),
        "step": 100,
        "curve": LEARNED["curve"],
        "evaluations": LEARNED["evaluations"],
        "plus_minus": (0.1, 0.2, None),
        "notes": ("step-000150-a01 was passed over: damaged",),
    }
    return RunSoFar(**content | changes)


def test_a_run_that_failed_shows_what_is_committed_why_it_ended_and_what_to_do():
    page = Parsed(unfinished_html(so_far()))

    assert page.wrong == []
    assert "The run is not finished: step 100 of 200 is committed." in page.text()
    assert "lowest validation loss so far is 1.2500, at step 50 (2.5000 before training)" in page.text()
    assert "Attempt 2 ended with 74: no room left" in page.text()
    assert "Give the work folder more room" in page.text()
    assert "step-000150-a01 was passed over: damaged" in page.text()
    assert [a["class"] for a in page.named("svg")] == ["on-wide", "on-narrow"]


def test_a_run_that_goes_on_says_so():
    text = Parsed(unfinished_html(so_far(attempts=(KILLED,)))).text()

    assert "Attempt 1 is at work, or was killed" in text
    assert "Wait for its end" in text


def test_a_run_of_which_nothing_is_committed_has_a_page_too():
    empty = TrainingCurve(loss=(), grad_norm=(), learning_rate=())
    page = Parsed(unfinished_html(so_far(step=None, curve=empty, evaluations=(), plus_minus=(), attempts=())))

    assert page.wrong == []
    assert "nothing is committed" in page.text()


@pytest.mark.parametrize("name", HOSTILE)
def test_an_unfinished_run_s_page_is_text_as_well(name):
    def page(text):
        spoilt = KILLED.model_copy(
            update={"reason": text, "host": text, "started": text, "exit_code": 999, "ended": text}
        )
        objects = (RecordedObject.model_construct(uri=f"u{text}", etag="e", version=None, size=1),)
        return Parsed(
            unfinished_html(
                so_far(
                    run_id=text, run_uri=text, recipe={text: [text]}, attempts=(spoilt,), objects=objects, notes=(text,)
                )
            )
        )

    assert page(HOSTILE[name]).wrong == []
    assert page(HOSTILE[name]).skeleton() == page("harmless").skeleton()


def rows(count=2, **changes):
    return [
        RunRow(
            run_id=f"run-{n}",
            recipe={"lora": {"r": n}},
            report=gsm8k(run_id=f"run-{n}"),
            standing="finished",
            **changes,
        )
        for n in range(count)
    ]


def test_several_runs_lie_over_each_other_with_what_differs_and_the_best():
    page = Parsed(several_html([*rows(), RunRow(run_id="c", recipe={}, report=None, standing="step 5 is committed")]))

    assert page.wrong == []
    assert [a["class"] for a in page.named("svg")] == ["on-wide", "on-narrow"]
    drawn = [data for tag, data in page.texts if tag == "text"]
    assert {"run 1", "run 2"} <= set(drawn)
    assert "Best: run-0 (lora.r=0), the lowest tuned loss, 0.4909 beside 0.4909 of run-1: s3://" in page.text()
    assert "lora.r=1" in page.text()
    assert "step 5 is committed" in page.text()
    assert "2 of 3 are finished" in page.text()


def test_many_runs_are_a_table_and_the_first_are_drawn():
    page = several_html(rows(80))

    assert len(page) < MOST_BYTES
    assert "74 more are in the table alone" in Parsed(page).text()
    assert "20 more rows" in Parsed(page).text()


def test_runs_of_which_none_is_finished_have_a_page():
    page = Parsed(several_html([RunRow(run_id="<b>", recipe={}, report=None, standing="not there")]))

    assert page.wrong == []
    assert page.named("b") == []
