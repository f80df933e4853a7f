"""Uploads in the background: bounded, in order, and no failure is lost."""

import contextlib
import threading

import pytest

from job.core.errors import DeniedError, JobError, SickDeviceError, UnavailableError
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.run.publisher import Publisher
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store

PATIENCE_SECONDS = 60


class SlowArtifacts(Artifacts):
    """A real run whose uploads wait for leave, or fail."""

    def __init__(self, root) -> None:
        super().__init__(open_store(f"file://{root}", StoreSettings()), "r1")
        self.leave = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.fails_at: int | None = None
        self.away = 0
        """How often the store is still away."""
        self.away_as: type[JobError] = UnavailableError

    def publish_checkpoint(self, folder, checkpoint):
        self.began.release()
        assert self.leave.acquire(timeout=PATIENCE_SECONDS)
        if checkpoint.step == self.fails_at:
            raise DeniedError("not allowed any more")
        if self.away:
            self.away -= 1
            self.leave.release()  # for the next try
            raise self.away_as("the store is away")
        super().publish_checkpoint(folder, checkpoint)


@pytest.fixture
def artifacts(tmp_path):
    return SlowArtifacts(tmp_path / "store")


@pytest.fixture
def committed():
    return []


@pytest.fixture
def asked():
    return threading.Event()


@pytest.fixture
def publisher(artifacts, committed, asked):
    publisher = Publisher(
        artifacts,
        keep=2,
        on_committed=lambda checkpoint, _seconds: committed.append(checkpoint),
        should_stop=asked.is_set,
        pause_seconds=0.01,
    )
    yield publisher
    for _ in range(20):
        artifacts.leave.release()
    with contextlib.suppress(JobError):
        publisher.close()


def folder(tmp_path, step):
    path = tmp_path / "local" / str(step)
    path.mkdir(parents=True)
    (path / "state.json").write_text(str(step))
    return path


def submit(publisher, tmp_path, step, candidates=()):
    publisher.submit(folder(tmp_path, step), Checkpoint(step=step, attempt=1), candidates=candidates)


def test_checkpoints_are_committed_in_order_and_their_folders_go(artifacts, publisher, committed, tmp_path):
    for _ in range(5):
        artifacts.leave.release()
    for step in (1, 2, 3, 4):
        submit(publisher, tmp_path, step, candidates={1})
    publisher.close()
    assert [c.step for c in committed] == [1, 2, 3, 4]
    assert [c.step for c in artifacts.checkpoints()] == [1, 3, 4]  # a candidate, and the newest two
    assert list((tmp_path / "local").iterdir()) == []


def test_submitting_does_not_wait_for_the_upload_but_at_most_one_more_may_wait(artifacts, publisher, tmp_path):
    submit(publisher, tmp_path, 1)
    assert artifacts.began.acquire(timeout=PATIENCE_SECONDS)  # under way, and held
    submit(publisher, tmp_path, 2)  # waits its turn
    third = threading.Thread(target=submit, args=(publisher, tmp_path, 3))
    third.start()
    third.join(timeout=0.3)
    assert third.is_alive()  # the disk does not fill with checkpoints that wait
    for _ in range(3):
        artifacts.leave.release()
    third.join(timeout=PATIENCE_SECONDS)
    assert not third.is_alive()
    publisher.close()
    assert [c.step for c in artifacts.checkpoints()] == [2, 3]


def test_a_failure_comes_out_at_the_next_submit_and_again_at_close(artifacts, publisher, committed, tmp_path):
    artifacts.fails_at = 1
    submit(publisher, tmp_path, 1)
    artifacts.leave.release()
    later = (submit(publisher, tmp_path, step) for step in range(2, 1000))
    with pytest.raises(DeniedError, match="not allowed any more"):
        list(later)  # at the next, or at the one after
    with pytest.raises(DeniedError, match="not allowed any more"):
        publisher.close()
    assert committed == []


def test_a_failure_of_the_last_upload_comes_out_at_close(artifacts, publisher, committed, tmp_path):
    artifacts.fails_at = 2
    for _ in range(3):
        artifacts.leave.release()
    submit(publisher, tmp_path, 1)
    submit(publisher, tmp_path, 2)
    with pytest.raises(DeniedError):
        publisher.close()
    assert [c.step for c in committed] == [1]


def test_after_a_failure_nothing_more_is_committed(artifacts, publisher, committed, tmp_path):
    """A later checkpoint without the earlier one would hide that something went wrong."""
    artifacts.fails_at = 1
    submit(publisher, tmp_path, 1)
    assert artifacts.began.acquire(timeout=PATIENCE_SECONDS)
    submit(publisher, tmp_path, 2)
    artifacts.leave.release()
    with pytest.raises(DeniedError):
        publisher.close()
    assert committed == []
    assert artifacts.checkpoints() == []


def test_closing_twice_is_harmless(publisher):
    publisher.close()
    publisher.close()
    assert not [t for t in threading.enumerate() if t.name == "publisher"]


@pytest.mark.parametrize("trouble", [UnavailableError, SickDeviceError], ids=["a store", "a clock"])
def test_a_store_that_is_away_is_waited_for(artifacts, publisher, committed, tmp_path, trouble):
    artifacts.away, artifacts.away_as = 3, trouble
    artifacts.leave.release()
    submit(publisher, tmp_path, 1)
    for _ in range(4):
        assert artifacts.began.acquire(timeout=PATIENCE_SECONDS)
    artifacts.leave.release()
    submit(publisher, tmp_path, 2)
    publisher.close()
    assert [c.step for c in committed] == [1, 2]


def test_a_store_that_stays_away_ends_it_once_training_waits_as_well(artifacts, publisher, tmp_path, monkeypatch):
    monkeypatch.setattr("job.edge.run.publisher._HELD_UP_SECONDS", 0.05)
    artifacts.away = 10**9
    artifacts.leave.release()
    for step in (1, 2, 3):  # one under way, one in the queue; the third waits for room
        submit(publisher, tmp_path, step)
    with pytest.raises(UnavailableError, match="step 1 is kept in"):
        publisher.close()
    assert [path.name for path in sorted((tmp_path / "local").iterdir())] == ["1", "2", "3"]


def test_once_a_stop_is_asked_for_it_is_not_waited_for_and_the_checkpoint_stays_on_the_disk(
    artifacts, publisher, asked, tmp_path
):
    artifacts.away = 1000
    asked.set()
    artifacts.leave.release()
    submit(publisher, tmp_path, 1)
    place = tmp_path / "local/1"
    with pytest.raises(UnavailableError, match=f"step 1 is kept in {place}"):
        publisher.close()
    assert (place / "state.json").exists()


def test_a_failed_clearing_of_old_checkpoints_is_no_failure_of_the_run(artifacts, publisher, committed, tmp_path):
    def away(*_args, **_kwargs):
        raise UnavailableError("the store is away")

    artifacts.retain = away
    for step in (1, 2):
        artifacts.leave.release()
        submit(publisher, tmp_path, step)
    publisher.close()
    assert [c.step for c in committed] == [1, 2]


def test_deleting_that_is_denied_is_said_once_and_tried_once(artifacts, tmp_path, committed):
    tried, notes = [], []

    def denied(*_args, **_kwargs):
        tried.append(1)
        raise DeniedError("403 AccessDenied to DeleteObjects")

    artifacts.retain = denied
    publisher = Publisher(
        artifacts,
        keep=2,
        on_committed=lambda checkpoint, _: committed.append(checkpoint),
        should_stop=lambda: False,
        on_note=notes.append,
    )
    for step in (1, 2, 3):
        artifacts.leave.release()
        submit(publisher, tmp_path, step)
    publisher.close()
    assert [c.step for c in committed] == [1, 2, 3]
    assert len(tried) == 1
    assert notes == ["old checkpoints stay in the store: 403 AccessDenied to DeleteObjects"]
