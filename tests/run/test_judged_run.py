"""Metrics and slices of a whole run: in report, log, terminal and page, and beside the report, example by example."""

import hashlib
import json

import pytest
from huggingface_hub import ModelCard
from job_process import call, records, write_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.core.errors import DeniedError
from job.core.judging.example_results import read
from job.core.reports.report import read_report
from job.edge.run.artifacts import Artifacts


def with_languages(rows):
    return [row | {"lang": ("de", "en")[n % 3 == 0], "final": row["answer"].split()[-1]} for n, row in enumerate(rows)]


@pytest.fixture
def judged(job):
    """A job whose held-out records have fields beside the text; 30 of them."""
    write_lines(job.data / "train.jsonl", with_languages(records(24)))
    write_lines(job.data / "validation.jsonl", with_languages(records(30, seed=1)))
    job.recipe["evaluate"] |= {
        "answers": 25,
        "metric": "pattern",
        "pattern": "([a-z]+|[0-9]+)$",
        "slices": ["lang"],
    }
    job.recipe["train"] |= {"steps": 20, "batch_size": 8}
    job.recipe["evaluate"]["every_steps"] = 10
    return job


def test_a_run_s_answers_are_judged_and_its_losses_sliced(judged):
    judged.recipe["track"] = {"trackers": ["tensorboard"]}
    ended = judged.start("run")
    assert ended.code == 0, ended.stdout
    report = read_report(judged.report())
    metric = report.metric

    assert (metric.name, metric.pattern, metric.scores.examples) == ("pattern", "([a-z]+|[0-9]+)$", 25)
    assert metric.scores.low <= metric.scores.gain <= metric.scores.high
    asked = [each for each in report.answers if each.expected is not None]
    assert metric.scores.after == pytest.approx(sum(each.tuned_score for each in asked) / 25, abs=1e-6)
    assert {each.reference for each in asked} == {each.expected.split()[-1] for each in asked}
    assert [(each.slice.value, each.scores.examples) for each in metric.slices] == [("de", 16), ("en", 9)]

    for each in report.evaluations:
        de, en = each.slices
        assert (de.examples, en.examples) == (20, 10)
        whole = (de.loss * de.tokens + en.loss * en.tokens) / (de.tokens + en.tokens)
        assert whole == pytest.approx(each.loss)
        assert de.plus_minus > 0
    evaluations = ended.named("evaluation")
    assert [*evaluations[0]["slices"]] == ["lang=de", "lang=en"]
    (logged,) = ended.named("metric")
    assert (logged["tuned"], logged["examples"]) == (metric.scores.after, 25)
    assert not ended.named("change")
    assert report.change is None

    shown = call("report", f"file://{judged.only_run()}").stdout
    assert "pattern            base " in shown
    assert "lang de: loss" in shown
    page = (judged.only_run() / "report.html").read_text()
    assert "Validation loss by lang" in page
    assert "Answers by lang" in page
    card = ModelCard.load(judged.only_run() / "adapter" / "README.md")
    (of_card,) = (each for each in card.data.eval_results if each.metric_type == "pattern")
    assert (of_card.metric_value, of_card.metric_args["examples"]) == (metric.scores.after, 25)
    assert "| `lang` `en` | 9 |" in card.text
    events = EventAccumulator(str(judged.only_run() / "tensorboard"))
    events.Reload()
    assert events.Scalars("final/pattern")[0].value == pytest.approx(metric.scores.after)
    german = [event.value for event in events.Scalars("validation/loss_by_lang/de")]
    assert german == pytest.approx([each.slices[0].loss for each in report.evaluations])


def test_a_run_with_slices_and_a_metric_is_exported(judged):
    judged.recipe["train"]["steps"] = 4
    judged.recipe["evaluate"]["metric_field"] = "final"
    assert judged.start("run").code == 0
    to = judged.folder / "merged"
    ended = call("export", str(judged.only_run()), "--to", str(to), "--workdir", str(judged.workdir))

    assert ended.code == 0, ended.stdout
    assert json.loads((to / "export.json").read_text())["losses"]["examples"] == 30
    measured = ModelCard.load(to / "README.md").data.eval_results
    assert [each.metric_type for each in measured] == ["loss"]


def test_each_example_has_its_line_beside_the_report(judged):
    assert judged.start("run").code == 0
    report = read_report(judged.report())
    content = (judged.only_run() / "examples.jsonl").read_bytes()
    found = read(content, report.per_example)

    assert report.per_example.sha256 == hashlib.sha256(content).hexdigest()
    assert [each.where.rpartition("/")[2] for each in found] == [f"validation.jsonl:{n}" for n in range(1, 31)]
    assert [each.tuned_loss for each in found] == pytest.approx(report.held_out.tuned, abs=1e-6)
    assert [each.base_loss for each in found] == pytest.approx(report.held_out.base, abs=1e-6)
    assert [each.tuned_score is None for each in found] == [False] * 25 + [True] * 5
    assert json.loads(content.splitlines()[0]).keys() == set(type(found[0]).model_fields)


def test_a_later_run_says_what_has_changed_where_it_was_judged_on_the_same_examples(judged):
    assert judged.start("run").code == 0
    first = read_report(judged.report())

    judged.recipe["train"]["learning_rate"] = 1e-3
    ended = judged.start("run")
    (second,) = [
        read_report(json.loads((run / "report.json").read_bytes())) for run in judged.runs() if run.name != first.run_id
    ]
    change = second.change
    assert (change.run_id, change.finished, change.loss.examples) == (first.run_id, first.finished, 30)
    assert (change.loss.before, change.loss.after) == pytest.approx(
        (first.sweet_spot.loss, second.sweet_spot.loss), abs=1e-6
    )
    assert change.loss.low <= change.loss.change <= change.loss.high
    assert (change.scores.before, change.scores.after) == (first.metric.scores.after, second.metric.scores.after)
    assert ended.named("change")[0]["run_before"] == first.run_uri
    page = (judged.store / "runs" / second.run_id / "report.html").read_text()
    assert "Change since the run before" in page
    assert first.run_id in page
    assert f"run before         {first.run_id}" in call("report", f"file://{judged.store}/runs/{second.run_id}").stdout

    # Another metric: the losses are compared, and the answers are not.
    del judged.recipe["evaluate"]["pattern"]
    judged.recipe["evaluate"]["metric"] = "contains"
    (logged,) = judged.start("run").named("change")
    assert logged["run_before"] == second.run_uri
    assert "scores" not in logged

    # Other examples: nothing is compared.
    write_lines(judged.data / "validation.jsonl", with_languages(records(30, seed=2)))
    assert not judged.start("run").named("change")


def test_a_run_before_whose_lines_were_changed_is_passed_over(judged):
    assert judged.start("run").code == 0
    file = judged.only_run() / "examples.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"tokens":', b'"tokens" :', 1))

    judged.recipe["train"]["learning_rate"] = 1e-3
    ended = judged.start("run")
    assert ended.code == 0
    assert not ended.named("change")
    assert "bytes are not those" in ended.named("run_before_passed_over")[0]["reason"]


def test_lines_that_are_denied_cost_a_note_and_never_the_report(job, monkeypatch):
    def publish(artifacts, name, content, published=Artifacts.publish):
        if name == "examples.jsonl":
            raise DeniedError("examples.jsonl: AccessDenied")
        published(artifacts, name, content)

    monkeypatch.setattr(Artifacts, "publish", publish)
    job.recipe["train"]["steps"] = 2

    assert job.call("run").code == 0
    report = read_report(job.report())
    assert "not written: examples.jsonl (examples.jsonl: AccessDenied)" in report.notes
    assert report.per_example is report.change is None
    assert (report.metric.name, report.metric.scores.examples) == ("exact_match", 2)


def test_answers_are_compared_with_a_field_where_one_is_named(judged):
    judged.recipe["evaluate"] |= {"metric": "contains", "metric_field": "final"}
    del judged.recipe["evaluate"]["pattern"]
    rows = with_languages(records(30, seed=1))
    del rows[0]["final"]
    write_lines(judged.data / "validation.jsonl", rows)
    assert judged.start("run").code == 0
    report = read_report(judged.report())

    assert (report.metric.field, report.metric.scores.examples, report.metric.not_judged) == ("final", 24, 1)
    assert 'answers that are not judged, with no word in "final"' in " ".join(report.notes)
    asked = [each for each in report.answers if each.expected is not None]
    assert [each.reference for each in asked] == [None] + [row["final"] for row in rows[1:25]]


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"pattern": "#### (.+)"}, "evaluate.metric: no match of #### (.+) in the learned answer"),
        ({"metric_field": "finale"}, 'evaluate.metric_field: no held-out example has "finale"'),
        ({"slices": ["language"]}, 'evaluate.slices: no held-out example has "language"'),
    ],
)
def test_what_could_judge_nothing_is_refused_before_the_base_is_loaded(judged, evaluate, said):
    judged.recipe["evaluate"] |= evaluate
    ended = judged.call("run")

    assert ended.code == 65
    assert said in ended.named("ended")[0]["reason"]
    assert "load_model" not in ended.phases()
