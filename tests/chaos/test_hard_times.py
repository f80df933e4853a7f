"""A store that is away for too long, a disk that fills, an owner that sleeps: in each phase, and then it goes on."""

import random
import signal
import struct

import pytest
from chaos_strikes import EMPTY_DISK_PHASES, Durations, reach
from faults import NO_FAULT, Fault

from job.core.errors import LocalDiskError, UnavailableError

AWAY = Fault(status=503, code="ServiceUnavailable")
SHORT = ("train",)
"""Phases of the short part."""
WRITING = ("fetch_base", "download", "encode", "resume", "train", "publish", "prove")
"""Phases that write to the disk: where it is full, they cannot end."""
PHASES = (
    *("identify", "try_output", "lock", "load_libraries", "preflight", "fetch_base", "download", "encode"),
    *(
        "fetch_weights",
        "load_model",
        "keep_copy",
        "self_test",
        "resume",
        "ask_base",
        "train",
        "evaluate",
        "upload",
        "publish",
    ),
    *("prove", "ask_tuned", "sum_up", "report"),
)


def in_short(phases):
    return [pytest.param(phase, marks=() if phase in SHORT else pytest.mark.chaos) for phase in phases]


def begun(run, phase):
    """What is committed before the attempt that is struck: something to resume from, where that is what it does."""
    if phase == "resume":
        assert run.begin("--crash-at", "checkpoint.after_latest:2").wait() == -signal.SIGKILL
    return run.committed()


def test_the_phases_are_those_of_a_run(undisturbed):
    seen = {event["name"] for event in undisturbed[1].named("phase")}
    assert seen == {*PHASES}


@pytest.mark.parametrize("phase", in_short(PHASES))
def test_a_store_that_is_away_for_too_long_ends_with_69_in_every_phase(proxied, undisturbed, phase, results):
    run, proxy = proxied
    before = begun(run, phase)
    attempt = run.begin(CHAOS_IMPATIENT="1", CHAOS_FREEZES_IN=phase)
    assert attempt.until_frozen(), attempt.told()
    proxy.rule = lambda _: AWAY
    attempt.send(signal.SIGCONT)
    code = attempt.wait()
    proxy.rule = lambda _: NO_FAULT
    run.look(attempt, before)
    assert code == UnavailableError.code, attempt.told()
    assert attempt.outcome["code"] == code
    assert attempt.outcome["again"] == "yes, counted"
    assert "failed 3 times in " in attempt.outcome["reason"]
    run.carried_on(undisturbed[0])
    results.case("away")


@pytest.mark.parametrize("phase", in_short(PHASES))
def test_a_disk_that_fills_ends_with_74_in_every_phase_that_writes(proxied, undisturbed, phase, results):
    run, _ = proxied
    before = begun(run, phase)
    disk = run.folder / f"work-{2 if before else 1:03d}"
    attempt = run.begin(CHAOS_FILLS_IN=phase, CHAOS_DISK=str(disk))
    code = attempt.wait()
    run.look(attempt, before)
    assert code == LocalDiskError.code or (code == 0 and phase not in WRITING), attempt.told()
    assert attempt.outcome["code"] == code
    run.carried_on(undisturbed[0])
    results.case("disk full")


@pytest.mark.parametrize("phase", in_short(PHASES))
def test_an_owner_that_sleeps_for_ten_minutes_goes_on_when_nobody_took_over(
    tmp_path, proxied, undisturbed, phase, seed, results, server
):
    """Its clock is ten minutes further, its lease is over, and its connections are dead."""
    run, proxy = proxied
    clock = tmp_path / "clock"
    clock.write_bytes(struct.pack("d", 0.0))
    draw = random.Random(f"{seed}/sleeps/{phase}")
    attempt = run.begin(CHAOS_CLOCK=str(clock), fresh=phase in EMPTY_DISK_PHASES)
    seconds = Durations(undisturbed[1]).seconds
    if phase in seconds and reach(run, attempt, phase, draw, seconds):
        attempt.send(signal.SIGSTOP)
        attempt.until_frozen()
        with clock.open("r+b") as file:
            file.write(struct.pack("d", 600.0))
        dead = len(proxy.seen) + 2
        proxy.rule = lambda request: Fault(cut_after_bytes=0, reset=True) if request.number <= dead else NO_FAULT
        attempt.send(signal.SIGCONT)
        results.case("slept")
    code = attempt.wait()
    run.look(attempt, set())
    assert code == 0, attempt.told()
    run.same_result(undisturbed[0], attempt)
