"""The machine's clock is set by hours while a run works, and between its attempts: nothing else changes."""

import json
import time

import pytest
from clocks import HOUR, SettableClock
from run_material import long_recipe


@pytest.fixture
def clock(tmp_path):
    return SettableClock(tmp_path)


def committed(step):
    return lambda event: event["event"] == "checkpoint" and event["step"] >= step


def test_a_run_whose_clock_is_set_by_hours_ends_to_the_bit_as_one_whose_clock_was_right(job, finished, clock):
    """Killed when its clock is ahead, gone on with by a process whose clock is far behind and then ahead again."""
    long_recipe(job)
    with job.begun("run", cold=True, **clock.environment) as first:
        first.until(committed(4))
        clock.set(hours=5)
        first.until(committed(8))
        first.child.kill()
    clock.set(hours=-9)
    deadline = time.time() - 9 * HOUR + HOUR  # in an hour, by the clock that this process is started with
    with job.begun("run", "--deadline", f"{deadline:.0f}", cold=True, **clock.environment) as second:
        second.until(committed(16))
        clock.set(hours=24 * 30)
        second.until(committed(24))
        clock.set(hours=-9)
        ended = second.end()

    assert (ended.code, ended.outcome["code"]) == (0, 0), ended.stderr
    undisturbed, report = finished[0].report(), job.report()
    assert [attempt["number"] for attempt in report["attempts"]] == [1, 2]
    assert [attempt["from_step"] for attempt in report["attempts"]][1] >= 8
    weights = "adapter_model.safetensors"
    assert report["adapter"]["files"][weights] == undisturbed["adapter"]["files"][weights]
    for part in ("curve", "evaluations", "sweet_spot", "resume_exact"):
        assert report[part] == undisturbed[part], part
    spent = [
        *report["throughput"]["phase_seconds"].values(),
        report["start"]["seconds"],
        report["throughput"]["seconds"],
    ]
    assert all(0 <= seconds < HOUR for seconds in spent)
    assert json.loads((job.only_run() / "latest.json").read_text())["fence"] == 2
