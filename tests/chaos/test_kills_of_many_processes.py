"""Several processes carry a run: whoever of them is struck, and however, the run ends as the table says and goes on."""

import itertools
import os
import random
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from chaos_results import say
from chaos_runs import ROOT, Run
from chaos_strikes import Durations, reach
from conftest import SURROUNDINGS
from faults import Fault
from test_kills import in_threads

sys.path.append(str(Path(__file__).parents[1] / "launch"))

from many_processes import nothing_is_left, strike, until, workers_of

pytestmark = pytest.mark.chaos
STRIKES = int(os.environ.get("CHAOS_MANY", "60"))
AT_ONCE, IN_ONE_RUN = 2, 4
TWO = ("--gpus", "2", "--force")
"""Without --force a rank that is killed at the same step twice would be final."""
ANEW = {"PYTHONPATH": os.pathsep.join([str(SURROUNDINGS), str(ROOT)])}
PHASES = ("load_model", "train", "evaluate", "save", "upload", "publish", "prove", "report")
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Strike:
    """What is done to whom, and which codes may come of it; 0 where it came too late."""

    name: str
    codes: tuple[int, ...]
    whom: int | str | None = None
    number: int = signal.SIGKILL
    point: str | None = None


STRIKES_OF_ALL_KINDS = (
    *(Strike(f"SIGKILL to rank {rank}", (70, 0), rank) for rank in (0, 1)),
    Strike("SIGKILL to the launcher", (70, 0), "launcher"),
    Strike("SIGKILL to the supervisor", (KILLED, 0), "supervisor"),
    *(Strike(f"SIGTERM to rank {rank}", (75, 0), rank, signal.SIGTERM) for rank in (0, 1)),
    Strike("SIGTERM to the supervisor", (75, 0), "supervisor", signal.SIGTERM),
    *(
        Strike(f"{point}=kill@{rank}", (70, 0), point=f"{point}=kill@{rank}")
        for point in ("model.loaded", "step.middle:3", "step.before_update:2", "step.after_update:2")
        for rank in (0, 1)
    ),
    *(
        Strike(f"{point}={deed}@{rank}", (70, 0), point=f"{point}={deed}@{rank}")
        for point, deed in (("step.middle:2", "error"), ("step.before_update:2", "memory"), ("step.middle", "panic"))
        for rank in (0, 1)
    ),
)


@pytest.fixture(scope="module")
def together(tmp_path_factory, folder_place, folder_recipe, warm):
    """A run by two processes that nothing happens to, and its attempt."""
    run = Run(tmp_path_factory.mktemp("together") / "run", folder_place.below("together"), folder_recipe, warm)
    attempt = run.begin(*TWO, cold=True)
    assert attempt.wait() == 0, attempt.told()
    return run, attempt


def attempted(run, *options, aim=lambda _attempt: True, do=lambda _attempt: None, **environment):
    """One attempt by two processes, struck when it is time; it leaves nothing, and loses nothing."""
    before = run.committed()
    attempt = run.begin(*TWO, *options, cold=True, **environment)
    struck = aim(attempt)
    if struck:
        do(attempt)
    code = attempt.wait()
    assert nothing_is_left(attempt.pid), workers_of(attempt.pid)
    run.look(attempt, before)
    if code != KILLED:
        assert attempt.outcome["code"] == code, attempt.told()
        assert attempt.outcome.get("last_committed_step", -1) <= run.newest()
    return attempt, code


def hit(attempt, whom, number):
    """The process may be gone by then, or not be there yet."""
    if whom != "supervisor":
        until(lambda: attempt.ended or whom in workers_of(attempt.pid))
    try:
        strike(attempt.pid, whom, number)
    except (KeyError, ProcessLookupError):
        assert attempt.wait() == 0, attempt.told()


def strike_once(run, kind, draw, seconds):
    if kind.point is not None:
        attempt, code = attempted(run, "--crash-at", kind.point)
        where = kind.point
    else:
        where = draw.choice(PHASES)
        attempt, code = attempted(
            run,
            aim=lambda attempt: reach(run, attempt, where, draw, seconds),
            do=lambda attempt: hit(attempt, kind.whom, kind.number),
        )
    say(f"{run.folder.name}: {kind.name}, {where}, {code}")
    assert code in kind.codes, attempt.told()
    return code != 0


def test_whoever_is_struck_the_run_goes_on_to_the_same_bits(
    tmp_path, folder_place, folder_recipe, warm, together, seed, results
):
    kinds = itertools.cycle(STRIKES_OF_ALL_KINDS)
    seconds = Durations(together[1]).seconds
    numbers, choosing, done = itertools.count(), threading.Lock(), []

    def work():
        while len(done) < STRIKES:
            with choosing:
                number = next(numbers)
            assert number < STRIKES, "no end of it"
            run = Run(tmp_path / f"{number:03d}", folder_place.below(f"many-{number:03d}"), folder_recipe, warm)
            draw = random.Random(f"{seed}/many/{number}")
            for _ in range(IN_ONE_RUN):
                with choosing:
                    kind = next(kinds)
                if not strike_once(run, kind, draw, seconds):
                    break  # it came too late
                done.append(kind)
                results.case("several processes")
            attempt, code = attempted(run)
            assert code == 0, attempt.told()
            run.same_result(together[0], attempt)

    in_threads([work] * AT_ONCE)
    assert len(done) >= STRIKES


def test_a_run_goes_on_in_any_number_of_processes(tmp_path, folder_place, folder_recipe, warm, together, results):
    train = {**folder_recipe["train"], "steps": 60}
    recipe = {**folder_recipe, "lora": {**folder_recipe["lora"], "dropout": 0.0}, "train": train}
    undisturbed = Run(tmp_path / "undisturbed", folder_place.below("numbers-alone"), recipe, warm)
    assert undisturbed.begin().wait() == 0
    run = Run(tmp_path / "numbers", folder_place.below("numbers"), recipe, warm)
    for count in (2, 1, 3):
        newest = run.newest()
        attempt = run.begin("--gpus", str(count), "--force", cold=True)
        assert attempt.until(lambda: run.newest() > max(0, newest)), attempt.told()  # noqa: B023 - waited for here
        attempt.send(signal.SIGTERM)
        assert attempt.wait() == 75, attempt.told()
        assert nothing_is_left(attempt.pid)
        results.case("several processes")
    attempt = run.begin(*TWO, cold=True)
    assert attempt.wait() == 0, attempt.told()
    report, expected = run.read_json("report.json"), undisturbed.read_json("report.json")
    assert report["curve"]["loss"] == pytest.approx(expected["curve"]["loss"], rel=5e-3)
    assert report["resume_exact"] is False
    assert [note for note in report["notes"] if "in 1 process after 2 processes" in note]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_frozen_is_a_stall_of_all(tmp_path, folder_place, folder_recipe, warm, together, rank, results):
    run = Run(tmp_path / "frozen", folder_place.below(f"frozen-{rank}"), folder_recipe, warm)

    def end_what_cannot_end(attempt):
        """A rank 0 that is frozen is ended by whoever watches the machine; the others do not outlive it."""
        if rank == 0:
            strike(attempt.pid, 0)

    attempt, code = attempted(
        run,
        *("--crash-at", f"step.middle:6=freeze@{rank}", "--stall-seconds", "60"),
        aim=lambda attempt: attempt.until(lambda: _is_frozen(workers_of(attempt.pid).get(rank))),
        do=end_what_cannot_end,
    )
    assert code == (70 if rank == 0 else 83), attempt.told()
    assert run.newest() >= (2 if rank else 0)
    attempt, code = attempted(run)
    assert code == 0
    run.same_result(together[0], attempt)
    results.case("several processes")


def _is_frozen(pid):
    try:
        return pid is not None and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@pytest.mark.parametrize("phase", ["encode", "train"])
def test_a_disk_that_fills_ends_all_with_74(tmp_path, folder_place, folder_recipe, warm, together, phase, results):
    run = Run(tmp_path / "full", folder_place.below(f"full-{phase}"), folder_recipe, warm)
    disk = run.folder / "work-001"
    attempt, code = attempted(run, CHAOS_FILLS_IN=phase, CHAOS_DISK=str(disk), CHAOS_RANK="0", **ANEW)
    assert code == 74, attempt.told()
    attempt, code = attempted(run)
    assert code == 0, attempt.told()
    run.same_result(together[0], attempt)
    results.case("several processes")


@pytest.mark.parametrize("phase", ["fetch_base", "train"])
def test_a_store_that_is_away_ends_all_with_69(proxied, phase, results):
    run, proxy = proxied
    run.place = replace(run.place, environment={**run.place.environment, **ANEW})

    def leave(_attempt):
        proxy.rule = lambda _: Fault(status=503, code="ServiceUnavailable")

    attempt, code = attempted(
        run,
        aim=lambda attempt: attempt.until_event("phase", name=phase),
        do=leave,
        CHAOS_IMPATIENT="1",
    )
    assert code == 69, attempt.told()
    results.case("several processes")


def test_what_is_not_finite_ends_all_with_80(tmp_path, folder_place, folder_recipe, warm, results):
    recipe = {**folder_recipe, "train": {**folder_recipe["train"], "learning_rate": 1e30, "optimizer": "adamw_torch"}}
    run = Run(tmp_path / "diverged", folder_place.below("diverged"), recipe, warm)
    attempt, code = attempted(run)
    assert code == 80, attempt.told()
    results.case("several processes")
