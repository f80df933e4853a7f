"""Objects of a run that somebody blew up: what is a hint does not matter, and a record is read no further."""

import pytest


@pytest.fixture
def stopped(job):
    """An unfinished run with a checkpoint, and its folder in the store."""
    assert job.call("run", stop_in="train").code == 75
    return job.only_run()


def blow_up(path, size=64 * 2**20):
    with path.open("ab") as file:
        file.write(b"[" * size)


def test_hint_lock_and_manifest_may_be_large_and_the_run_goes_on(job, stopped):
    (newest, *_) = sorted(stopped.glob("checkpoints/*/MANIFEST.json"), reverse=True)
    for path in (stopped / "latest.json", stopped / "lock.json", newest):
        blow_up(path)
    ended = job.attacked(mib=1536)
    assert ended.code == 0, ended.stdout
    (passed_over,) = ended.named("checkpoint_passed_over")
    assert "MANIFEST.json: larger than the 2,097,152 bytes" in passed_over["reason"]
    assert (stopped / "latest.json").stat().st_size < 1000


def test_a_run_record_that_is_large_ends_65_with_its_name(job, stopped):
    blow_up(stopped / "run.json")
    ended = job.attacked(mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert "run.json: larger than the" in ended.outcome["reason"]


def test_a_record_of_an_attempt_that_is_large_is_passed_over_and_said(job, stopped):
    blow_up(stopped / "attempts/01-end.json")
    ended = job.attacked(mib=1536)
    assert ended.code == 0, ended.stdout
    (event,) = {e["reason"] for e in ended.named("attempt_record_passed_over")}
    assert "01-end.json: larger than the" in event
