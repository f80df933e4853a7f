"""Each part of the page under the name that people find it by: pictures, tables, folds and facts."""

import functools
import re

import html5lib
import pytest
from page_reports import gsm8k, small, with_sources
from report_fixtures import ADAPTER, COMMIT, DATA, PLAN, SHA256, THROUGHPUT

from job.render.page.finished import report_html

WHOLE = functools.cache(gsm8k)


class Parts:
    """A page's parts, each found by its name."""

    def __init__(self, report):
        self.root = html5lib.parse(report_html(report), namespaceHTMLElements=False)

    def picture(self, begins):
        """The drawing whose name for who cannot see it begins so, and that name."""
        named = [(svg, words(svg.find("*"))) for svg in self.root.iter("{http://www.w3.org/2000/svg}svg")]
        return next((svg, name) for svg, name in named if name.startswith(begins))

    def rows(self, caption):
        """The table of that caption: a row each, the head first."""
        (table,) = [each for each in self.root.iter("table") if words(each.find("caption")) == caption]
        return [[words(cell) for cell in row] for row in table.iter("tr")]

    def fold(self, summary):
        (found,) = [each for each in self.root.iter("details") if words(each.find("summary")) == summary]
        return found

    def fact(self, name, *, anchor=None):
        within = self.root if anchor is None else self.chapter(anchor)
        (found,) = [words(each.find("dd")) for each in within.iter("div") if words(each.find("dt")) == name]
        return found

    def chapter(self, anchor):
        (found,) = [each for each in self.root.iter("section") if each.get("id") == anchor]
        return found


def words(element):
    return "" if element is None else " ".join("".join(element.itertext()).split())


@functools.cache
def parts_of(make):
    return Parts(make())


@pytest.fixture
def whole():
    return parts_of(WHOLE)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_gradient_s_norm_is_drawn_step_by_step_below_its_name(whole):
    norms = WHOLE().curve.grad_norm
    said = f"from {norms[0]:.4g} at step 1 to {norms[-1]:.4g} at step 500; highest {max(norms):.3g}."
    drawing, name = whole.picture("Gradient norm")

    assert name == f"Gradient norm: {said}"
    assert {"gradient norm", "step"} <= drawn_words(drawing)
    assert len(points(line_in(drawing, "var(--blue)"))) > 100


def test_each_held_out_example_is_a_dot_and_those_far_from_the_others_are_marked(whole):
    found = WHOLE().held_out
    drawing, name = whole.picture("300 held-out examples")

    assert name == (
        f"300 held-out examples: the loss of {found.worse} has risen; {found.outliers_in_all} lie far from the others."
    )
    assert {"loss of the base", "loss at the chosen step", "far from the others"} <= drawn_words(drawing)
    # Each kind has a mark more in the legend.
    assert len(marks(drawing, "var(--blue)")) == 300 + 1
    assert len(marks(drawing, "var(--orange)")) == len(found.outliers) + 1


def test_lengths_are_a_histogram_with_max_length_in_it(whole):
    data = WHOLE().data
    drawing, name = whole.picture(f"From {data.train.histogram.edges[0]}")

    assert name.startswith(f"From {data.train.histogram.edges[0]:,} to {data.train.histogram.edges[-1]:,} tokens; most")
    assert name.endswith("max_length is 256.")
    assert {"tokens of a training example", "examples", "max_length 256"} <= drawn_words(drawing)
    bars = [path for path in paths(drawing) if "fill: var(--blue)" in path.get("style", "")]
    assert len(bars) == len(data.train.histogram.counts) > 5
    first, last = min(points(bars[0]))[0], max(points(bars[-1]))[0]
    edges = data.train.histogram.edges
    at = first + (last - first) * (256 - edges[0]) / (edges[-1] - edges[0])
    red = [points(path) for path in paths(drawing) if "stroke: var(--red)" in path.get("style", "")]
    [upright] = [line for line in red if len({x for x, _ in line}) == 1]
    assert upright[0][0] == pytest.approx(at, abs=0.2)


def test_the_band_of_the_loss_curve_is_as_high_as_the_interval_of_each_evaluation(whole):
    report = WHOLE()
    drawing, _ = whole.picture("Validation loss")
    line = points(line_in(drawing, "var(--blue)"))
    losses = [each.loss for each in report.evaluations]
    highest, lowest = losses.index(max(losses)), losses.index(min(losses))
    a_nat = (line[lowest][1] - line[highest][1]) / (losses[highest] - losses[lowest])
    (band,) = bands(drawing)

    for (x, _), around in zip(line, report.held_out.plus_minus, strict=True):
        heights = [y for at, y in points(band) if at == pytest.approx(x, abs=0.06)]
        assert max(heights) - min(heights) == pytest.approx(2 * around * a_nat, abs=0.3)


def test_without_intervals_there_is_no_band_and_no_word_of_one():
    drawing, _ = parts_of(small).picture("Validation loss")

    assert bands(drawing) == []
    assert "The band" not in words(parts_of(small).chapter("curves"))
    assert "The band is the 95 % interval over the held-out examples." in words(parts_of(WHOLE).chapter("curves"))


def test_a_picture_that_is_wide_is_drawn_for_narrow_screens_too_with_the_same_words(whole):
    named = [(svg.get("class"), words(svg.find("*"))) for svg in whole.root.iter("{http://www.w3.org/2000/svg}svg")]
    on_wide, on_narrow = ([name for screen, name in named if screen == each] for each in ("on-wide", "on-narrow"))

    assert on_wide == on_narrow
    assert len(on_wide) == 1
    assert {"on-all"} == {screen for screen, name in named if name not in on_wide}


def test_words_in_pictures_have_the_page_s_own_letters(whole):
    drawn = [text.get("style", "") for text in whole.root.iter("{http://www.w3.org/2000/svg}text")]

    assert len(drawn) > 50
    assert not [style for style in drawn if "font-family" in style or "font:" in style]


def paths(drawing):
    return [*drawing.iter("{http://www.w3.org/2000/svg}path")]


def drawn_words(drawing):
    return {words(text) for text in drawing.iter("{http://www.w3.org/2000/svg}text")}


def points(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d"))]


def line_in(drawing, colour):
    """The line of most points in that colour."""
    lines = [path for path in paths(drawing) if f"stroke: {colour}" in path.get("style", "")]
    return max(lines, key=lambda path: len(points(path)))


def uses(drawing):
    return [*drawing.iter("{http://www.w3.org/2000/svg}use")]


def link(use):
    return next(value for name, value in use.attrib.items() if name.endswith("href"))


def marks(drawing, colour):
    return [use for use in uses(drawing) if f"stroke: {colour}" in use.get("style", "")]


def bands(drawing):
    """What is filled around the validation loss."""
    filled = [each for each in uses(drawing) if re.search(r"fill: var\(--blue\); fill-opacity", each.get("style", ""))]
    named = {f"#{path.get('id')}": path for path in paths(drawing)}
    return [named[link(each)] for each in filled]


# --- data -------------------------------------------------------------------------------------------------------------


def test_each_side_has_a_row_with_what_became_of_its_examples():
    side = {"rows": 1250, "used": 1000, "duplicates": 31, "truncated": 17, "dropped": 13, "without_target": 11}
    side |= {"empty": 7, "tokens": 40_000, "targets": 10_000}
    found = Parts(small(data=DATA.model_copy(update={"train": DATA.train.model_copy(update=side)})))

    head, training, held_out = found.rows("Examples on each side")
    assert dict(zip(head, training, strict=True)) == {
        "side": "training",
        "used": "1,000",
        "read": "1,250",
        "repeated": "31",
        "cut": "17",
        "too long": "13",
        "nothing to learn": "11",
        "empty answer": "7",
        "tokens": "40,000",
        "learned": "10,000",
    }
    assert held_out[:3] == ["held out", "120", "121"]


def test_each_source_has_a_row_with_its_share_and_its_lengths():
    head, first, second = parts_of(with_sources).rows("Sources")

    assert head == ["source", "examples", "share of a step", "epochs", "drawn", "median tokens", "longest"]
    assert first == ["new notes", "500", "50.0%", "1.6", "800", "40", "48"]
    assert second[0] == "older notes"
    assert not [each for each in parts_of(small).root.iter("caption") if words(each) == "Sources"]


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_names_the_device_and_the_memory_that_was_used_beside_what_was_planned(whole):
    planned = Parts(small(plan=PLAN.model_copy(update={"predicted_peak_bytes": 7 * 2**29})))

    assert whole.fact("device", anchor="cost") == "NVIDIA H200"
    assert whole.fact("peak memory") == "3.00 GiB"
    assert planned.fact("peak memory") == "3.00 GiB, 3.50 GiB planned"


def test_this_attempt_s_time_has_a_row_for_each_phase_the_longest_first():
    spent = {"download": 5.0, "load_model": 30.0, "train": 150.0, "evaluate": 15.0}
    found = Parts(small(throughput=THROUGHPUT.model_copy(update={"phase_seconds": spent})))

    assert found.rows("This attempt's time") == [
        ["phase", "time", "share"],
        ["train", "150 s", "75%"],
        ["load model", "30.0 s", "15%"],
        ["evaluate", "15.0 s", "8%"],
        ["download", "5.0 s", "2%"],
    ]


# --- what is looked up later ------------------------------------------------------------------------------------------


def test_that_the_adapter_was_loaded_again_is_said_with_both_losses():
    adapter = ADAPTER.model_copy(update={"proven_loss": 1.2501, "reported_loss": 1.2499})

    assert Parts(small(adapter=adapter)).fact("proven") == (
        "downloaded again and loaded by PEFT on a fresh 4-bit base it has validation loss 1.2501; training measured "
        "1.2499"
    )


def test_what_a_server_refuses_is_said_and_its_command_is_not_shown():
    reason = "vLLM takes no adapter of an lm_head beyond 258,048 rows; leave lm_head out of lora.targets"
    refused = Parts(small(adapter=ADAPTER.model_copy(update={"refused_by": (reason,)})))

    assert f"{reason}." in words(refused.chapter("use"))
    assert "vllm serve" not in words(refused.chapter("use"))
    assert "vllm serve" in words(parts_of(WHOLE).chapter("use"))


def test_a_fold_has_the_hash_of_every_object_and_of_every_file_of_the_adapter(whole):
    assert words(whole.fold("Hashes").find(".//caption")) == "Data and adapter"
    assert whole.rows("Data and adapter") == [
        ["object", "bytes", "sha256"],
        ["s3://notes/train.jsonl", "1,234", SHA256],
        ["s3://notes/valid.jsonl", "1,234", SHA256],
        ["adapter/adapter_model.safetensors", "4,000", SHA256],
    ]


def test_a_fold_has_the_versions_and_the_base_has_its_revision():
    found = Parts(small(versions={"torch": "2.13.0", "peft": "0.21.2"}))
    fold = found.fold("Versions and machine")
    named = [(words(each.find("dt")), words(each.find("dd"))) for each in fold.iter("div")]

    assert named[:2] == [("torch", "2.13.0"), ("peft", "0.21.2")]
    assert found.fact("revision") == COMMIT
