"""The plan that a checkpoint keeps: filled up where it is older, left where it cannot be kept, and that is told."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from job_process import call

from job.edge.host.interrupt import Interrupt
from job.stages import training
from job.stages.training import Training
from job.tune.engines import choice
from job.tune.engines.autograd import Compiling
from job.tune.loop.checkpoint import Progress

OWN = {
    "engine": "generic",
    "micro_batch_tokens": 4096,
    "evaluation_tokens": 16384,
    "checkpointing": False,
    "kept_layers": 0,
    "recomputed_layers": 0,
    "compiled": True,
    "device": "H100",
}


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """(own plan, a checkpoint's plan) -> the progress that training goes on with."""

    def resume(own, stored):
        progress = Progress(plan=own)
        monkeypatch.setattr(
            training.checkpoints, "load", lambda trained, _folder: setattr(trained.progress, "plan", stored)
        )
        newest = SimpleNamespace(name="step-4", step=4)
        (tmp_path / newest.name).mkdir()
        stage = Training.__new__(Training)
        stage._scratch = tmp_path
        stage._attempt = SimpleNamespace(
            recipe=SimpleNamespace(train=SimpleNamespace(seed=0), lora=SimpleNamespace(dropout=0.0)),
            phases=SimpleNamespace(phase=lambda _name: nullcontext()),
            should_stop=lambda: False,
            standing=SimpleNamespace(),
        )
        stage._setting = SimpleNamespace(artifacts=SimpleNamespace(fetch_newest=lambda *_, **__: (newest, [])))
        stage._resume(SimpleNamespace(progress=progress), SimpleNamespace(course=SimpleNamespace(steps=9)))
        return progress

    return resume


def test_a_plan_of_an_older_image_is_filled_up(resumed):
    older = {"micro_batch_tokens": 1024, "checkpointing": True, "device": "H100"}
    progress = resumed(OWN, older)

    assert progress.plan == OWN | older
    assert progress.changes == []


def test_a_plan_is_kept_as_it_was_cut(resumed):
    stored = OWN | {"micro_batch_tokens": 2048}
    progress = resumed(OWN, stored)

    assert (progress.plan, progress.changes) == (stored, [])


def test_what_was_no_longer_compiled_stays_as_it_is_and_to_the_bit(resumed):
    stored = OWN | {"compiled": False}
    progress = resumed(OWN, stored)

    assert (progress.plan, progress.changes) == (stored, [])


@pytest.mark.parametrize(
    ("own", "stored", "told"),
    [
        ({"compiled": False}, {}, "on H100 after H100 with compiled layers"),
        ({"engine": "fast", "compiled": False}, {}, "on H100 on the fast path after H100 with compiled layers"),
        ({}, {"device": "CPU", "compiled": False}, "on H100 with compiled layers after CPU"),
    ],
)
def test_another_way_of_computing_is_told_and_has_a_plan_of_its_own(resumed, own, stored, told):
    progress = resumed(OWN | own, OWN | stored | {"micro_batch_tokens": 2048})

    assert progress.plan == OWN | own
    assert progress.changes == [f"resumed at step 4 {told}: equal within rounding, not to the bit"]


def test_decoded_weights_that_no_longer_fit_when_the_plan_is_adopted_are_told_of():
    """Another process has taken the memory since the plan was made."""
    asked = []

    def adopt(plan):
        asked.append(plan["kept_layers"])
        if plan["kept_layers"]:
            raise torch.OutOfMemoryError

    path = SimpleNamespace(adopt=adopt, refresh=lambda: asked.append("refresh"))
    run = SimpleNamespace(progress=Progress(plan=OWN | {"kept_layers": 32}), out_of_memory=0)
    stage = Training.__new__(Training)
    stage._adopt(path, run)
    assert (asked, run.out_of_memory, run.progress.plan) == ([32, 0, "refresh"], 1, OWN)

    stage._adopt(path, run)
    assert run.out_of_memory == 1


# --- a whole run -----------------------------------------------------------------------------------------------------


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
            "Compiling",
            lambda backend, on_stopped: Compiling(backend=counting, on_stopped=on_stopped),
        )
        return asked

    yield compile_by
    torch._dynamo.reset()


def fails(_graph, _inputs):
    msg = "no compiler here"
    raise RuntimeError(msg)


class StopOnce(Interrupt):
    """Asks to stop as soon as something is there."""

    def __init__(self, seen):
        super().__init__()
        self._seen = seen

    def __call__(self):
        return bool(self._seen)


def stopped_at_the_first_step(job, asked):
    ended = call(*job.command("run")[2:], interrupt=StopOnce(asked), outcome_file=job.outcome_file)
    assert ended.code == 75, ended.stdout
    (state,) = job.only_run().glob("checkpoints/*-000001-*/state.json")
    return json.loads(state.read_text())["progress"]


def test_what_could_not_be_compiled_is_not_compiled_again_and_every_report_says_so(job, compiling):
    asked = compiling(fails)
    progress = stopped_at_the_first_step(job, asked)
    assert progress["plan"]["compiled"] is False
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
    asked = compiling(lambda graph, _inputs: graph.forward)
    progress = stopped_at_the_first_step(job, asked)
    assert progress["plan"]["compiled"] is True
    monkeypatch.undo()
    assert job.call("run").code == 0

    report = job.report()
    assert report["plan"]["compiled"] is False
    assert report["resume_exact"] is False
    (note,) = [note for note in report["notes"] if "resumed at step 1" in note]
    assert " with compiled layers: equal within rounding" in note
