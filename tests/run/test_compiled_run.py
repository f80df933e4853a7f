"""A run whose layers were compiled, or could not be: what an attempt that resumes it does, and what the report says."""

import json

import pytest
import torch
from job_process import call

from job.edge.host.interrupt import Interrupt
from job.tune.engines import choice
from job.tune.engines.autograd import AutogradEngine
from job.tune.loop.step import Stepper


@pytest.fixture
def compiling(monkeypatch):
    """Has layers compiled on the CPU, by a backend; gives the graphs that it was asked for so far."""
    torch._dynamo.reset()
    asked = []

    def compile_by(wanted):
        def counting(graph, inputs):
            asked.append(graph)
            return wanted(graph, inputs)

        monkeypatch.setattr(choice, "_reason_against_compiling", lambda *_: None)
        monkeypatch.setattr(
            choice,
            "AutogradEngine",
            lambda model, backward, compiler=None: AutogradEngine(model, backward, compiler=compiler and counting),
        )
        return asked

    yield compile_by
    torch._dynamo.reset()


def fails(_graph, _inputs):
    raise RuntimeError("no compiler here")


class StopOnce(Interrupt):
    """Asks to stop as soon as something is there."""

    def __init__(self, seen):
        super().__init__()
        self._seen = seen

    def __call__(self):
        return bool(self._seen)


def stopped_at_the_first_step(job, monkeypatch):
    made, one_step = [], Stepper.step

    def noted(self, number, **options):
        record = one_step(self, number, **options)
        made.append(number)
        return record

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", noted)
        ended = call(*job.command("run")[2:], interrupt=StopOnce(made), outcome_file=job.outcome_file)
    assert ended.code == 75, ended.stdout
    (state,) = job.only_run().glob("checkpoints/*-000001-*/state.json")
    return json.loads(state.read_text())["progress"]


def test_what_could_not_be_compiled_is_not_compiled_again_and_every_report_says_so(job, compiling, monkeypatch):
    asked = compiling(fails)
    progress = stopped_at_the_first_step(job, monkeypatch)
    assert progress["cut"]["compiled"] is False
    asked.clear()
    assert job.call("run").code == 0

    report = job.report()
    assert asked == []
    assert report["plan"]["compiled"] is False
    assert report["resume_exact"] is False
    (note,) = [note for note in report["notes"] if "compiled" in note]
    assert note.startswith("after step 0 layers ran as they are, no longer compiled: ")
    assert "no compiler here" in note


def test_where_nothing_can_be_compiled_a_run_that_was_is_within_rounding(job, compiling, monkeypatch):
    compiling(lambda graph, _inputs: graph.forward)
    progress = stopped_at_the_first_step(job, monkeypatch)
    assert progress["cut"]["compiled"] is True
    monkeypatch.undo()
    assert job.call("run").code == 0

    report = job.report()
    assert report["plan"]["compiled"] is False
    assert report["resume_exact"] is False
    (note,) = [note for note in report["notes"] if "resumed at step 1" in note]
    assert " with compiled layers: equal within rounding" in note
