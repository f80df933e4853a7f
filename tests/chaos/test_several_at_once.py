"""One run started several times, and owners that freeze and wake: one works, and only its word counts."""

import contextlib
import os
import random
import signal
import time

import pytest
from chaos_runs import STEPS, Run, step_of
from chaos_strikes import Durations, reach
from job_process import Job
from warm_image import PATIENCE_SECONDS

from job.core.errors import LockedError

LEASE_SECONDS = "40"
"""Where several live at once: nobody may be taken for dead because the machine is slow."""
LAST_WORDS = ("checkpoint.before_manifest", "checkpoint.before_latest", "adapter.before_file", "report.before")
"""Right before each write by which an attempt says what counts."""

AFTER_REPORT = {"attempts/01-end.json", "lock.json"}
"""What the first attempt still writes when its report stands: how it ended, and that its lock is free."""


@pytest.fixture(params=["folder", "s3"])
def scene(request):
    """A place, a recipe and the undisturbed run there; the store is a folder, or S3."""
    names = {"folder": ("folder_place", "folder_recipe", "undisturbed_in_a_folder")}
    wanted = names.get(request.param, ("s3_place", "s3_recipe", "undisturbed"))
    return tuple(request.getfixturevalue(name) for name in wanted)


@pytest.fixture
def begun_run(tmp_path, scene, warm):
    def make(name):
        place, recipe, _ = scene
        return Run(tmp_path / name, place.below(f"{tmp_path.name}-{name}"), recipe, warm)

    return make


def at_once(job, place, count):
    """Start it so many times; whoever works waits, for its output is read only when the others ended.

    Returns:
        The pid of the one that worked and how it ended, and how the others did.
    """
    job.recipe["output"] = f"{place.uri}/{job.folder.name}"
    environment = {**place.environment, "JOB_LEASE_SECONDS": LEASE_SECONDS}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(job.begun("run", "--workdir", str(job.folder / f"work-{n}"), **environment))
            for n in range(count)
        ]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while sum(running.child.poll() is None for running in started) > 1:
            assert time.monotonic() < deadline, "more than one works"
            time.sleep(0.05)
        (worker,) = [running for running in started if running.child.poll() is None]
        others = [running.end() for running in started if running is not worker]
        return worker.child.pid, worker.end(), others


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.chaos)])
def test_of_several_started_at_once_one_works_and_the_others_end_84(tmp_path, material, scene, warm, count, results):
    place, _, _ = scene
    pid, worked, others = at_once(Job(tmp_path, material.recipe["model"]["base"], warm), place, count)
    assert worked.code == 0, worked.stdout + worked.stderr
    assert [ended.code for ended in others] == [LockedError.code] * (count - 1)
    for ended in others:
        (event,) = ended.named("ended")
        assert f"process {pid} on {os.uname().nodename}" in event["reason"]
        assert "attempt" not in {e["event"] for e in ended.events}
    (run,) = place.below(tmp_path.name).folder.glob("runs/*")
    assert sorted(path.name for path in run.glob("attempts/*") if not path.name.endswith(".meta.json")) == [
        "01-end.json",
        "01.json",
    ]
    results.case("started at once")


def changed(before, after):
    return {key for key in {*before, *after} if before.get(key) != after.get(key)}


def only_orphans(changes, attempt_number):
    """What a frozen owner may still leave behind: a checkpoint of its own that nobody takes for one of the run."""
    return all(key.startswith("checkpoints/") and f"-a{attempt_number:02d}/" in key for key in changes)


def number_of(attempt):
    return attempt.named("attempt")[-1]["number"]


def freeze(run, point):
    """An attempt that stands still at a point, and holds the run's lock."""
    while True:
        frozen = run.begin("--crash-at", f"{point}=freeze")
        assert frozen.until_frozen(), frozen.told()
        if not run.place.is_locked:
            return frozen
        frozen.kill()


def freeze_now(run, attempt):
    while True:
        attempt.send(signal.SIGSTOP)
        if not attempt.until_frozen() or not run.place.is_locked:
            return
        attempt.send(signal.SIGCONT)


def wake(attempt):
    attempt.send(signal.SIGCONT)
    return attempt.wait()


def woken_when_another_has_ended(run, frozen):
    """Start the run again while an attempt is frozen; wake that one when the other has ended with 0.

    Returns:
        The other attempt, how the woken one ended, and what it changed.
    """
    try:
        other = run.begin()
        assert other.wait() == 0, other.told()
        stood = run.content()
        return other, wake(frozen), changed(stood, run.content())
    finally:
        frozen.kill()


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=() if p == "report.before" else pytest.mark.chaos) for p in LAST_WORDS]
)
def test_a_frozen_owner_that_wakes_after_another_has_finished_changes_nothing(begun_run, scene, point, results):
    run = begun_run(point)
    frozen = freeze(run, point)
    other, code, changes = woken_when_another_has_ended(run, frozen)
    assert code == LockedError.code, frozen.told()
    assert only_orphans(changes, number_of(frozen))
    (taken,) = other.named("lock")
    assert taken["taken_from"].startswith(f"process {frozen.pid} ")
    assert run.read_json("report.json")["fence"] == taken["fence"]
    run.same_result(scene[2][0], other)
    results.case("frozen")


@pytest.mark.chaos
@pytest.mark.parametrize("point", LAST_WORDS)
def test_a_frozen_owner_that_wakes_while_another_works_changes_nothing_that_counts(begun_run, scene, point, results):
    """The other one stands still in its midst while the first wakes: nothing of what it does next is by chance."""
    run = begun_run(point)
    frozen = freeze(run, point)
    later = "prove.before" if point.startswith(("adapter", "report")) else "checkpoint.after_latest:2"
    try:
        other = freeze(run, later)
        stood = run.content()
        code = wake(frozen)
        changes = changed(stood, run.content())
        assert wake(other) == 0, other.told()
    finally:
        frozen.kill()
    assert code == LockedError.code, frozen.told()
    assert only_orphans(changes, number_of(frozen)), changes
    (taken,) = other.named("lock")
    assert run.read_json("latest.json")["fence"] == run.read_json("report.json")["fence"] == taken["fence"]
    run.same_result(scene[2][0], other)
    results.case("frozen")


@pytest.mark.chaos
def test_an_owner_frozen_after_its_report_says_how_it_ended_and_changes_nothing_else(begun_run, scene, results):
    run = begun_run("done")
    frozen = freeze(run, "report.after")
    other, code, changes = woken_when_another_has_ended(run, frozen)
    assert code == 0, frozen.told()
    assert other.named("already_done")
    assert not other.named("lock")
    assert changes == AFTER_REPORT
    run.same_result(scene[2][0], frozen)
    results.case("frozen")


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(6))
def test_an_owner_frozen_at_any_moment_changes_nothing_when_it_wakes(begun_run, scene, seed, number, results):
    run = begun_run(f"random-{number}")
    draw = random.Random(f"{seed}/frozen/{number}")
    durations = Durations(scene[2][1])
    held = durations.phases[durations.phases.index("lock") + 1 :]
    frozen = run.begin()
    phase = draw.choice(held)
    reach(run, frozen, phase, draw, durations.seconds)
    freeze_now(run, frozen)
    other, code, changes = woken_when_another_has_ended(run, frozen)
    if code == 0:  # stopped after its report: then it was done, and there was nothing to take over
        assert other.named("already_done"), frozen.told()
        changes -= AFTER_REPORT
    else:
        assert code == LockedError.code, frozen.told()
    assert only_orphans(changes, number_of(frozen) if frozen.named("attempt") else 0)
    newest = max(step_of(name) for name in run.committed())
    assert newest == STEPS
    run.same_result(scene[2][0], other)
    results.case("frozen")
