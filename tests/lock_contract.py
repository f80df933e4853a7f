"""What the lock keeps on every store, and what it guards. The classes ask for a fixture `root`: a fresh store's URI."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from job.core.errors import LockedError
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.run.lock import Lock
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.probing import probe

PATIENCE_SECONDS = 60
LEASE_SECONDS = 1.0
LIVE_LEASE_SECONDS = 4.0
"""Of an owner that must be seen alive: so long may this machine be busy with something else."""
SETTLE_SECONDS = 0.2
"""Instead of the real 2: where only one works at a time nothing has to settle."""
LONG_SETTLE_SECONDS, LONG_LEASE_SECONDS = 3.0, 12.0
"""Where several work at once without conditional writes: longer than any of them can be held up in one write."""


def never():
    return False


def die(lock):
    """End as by `kill -9`: nothing is said, nothing renewed."""
    lock.abandon()


class Owners:
    """Makes attempts at one run, each with a client of its own, as on machines of their own."""

    def __init__(self, opened, *, conditional):
        self.opened = opened
        self.conditional = conditional
        self._locks = []

    def lock(self, host="here", *, lease_seconds=LEASE_SECONDS, lost=None, store=None):
        lock = Lock(
            store or self.opened(),
            "lock.json",
            lease_seconds=lease_seconds,
            owner={"host": host, "pid": 1},
            conditional=self.conditional,
            on_lost=lost.set if lost else lambda: None,
        )
        self._locks.append(lock)
        return lock

    def held(self, host="here", **how):
        lock = self.lock(host, **how)
        lock.acquire(above=0, should_stop=never)
        return lock

    def at_once(self, count, *, lease_seconds=LEASE_SECONDS):
        """The locks of those, of so many that begin in the same moment, that were not turned away."""
        locks = [self.lock(f"node-{number}", lease_seconds=lease_seconds) for number in range(count)]
        start = threading.Barrier(count)

        def attempt(lock):
            start.wait()
            try:
                lock.acquire(above=0, should_stop=never)
            except LockedError:
                return None
            return lock

        with ThreadPoolExecutor(count) as pool:
            return [lock for lock in pool.map(attempt, locks) if lock]

    def content(self):
        return json.loads(self.opened().read("lock.json")[0])

    def run_lock(self, host):
        lock = Artifacts(self.opened(), "r1").make_lock(
            lease_seconds=LEASE_SECONDS,
            owner={"host": host, "pid": 1},
            conditional=self.conditional,
            on_lost=lambda: None,
        )
        self._locks.append(lock)
        lock.acquire(above=0, should_stop=never)
        return lock

    def run_under(self, lock):
        artifacts = Artifacts(self.opened(), "r1").under(lock)
        artifacts.take_over()
        artifacts.begin_attempt({"host": "h"})
        return artifacts

    def read(self, name):
        return self.opened().read(f"runs/r1/{name}")[0]

    def end(self):
        for lock in self._locks:
            lock.abandon()


def checkpoint(folder, artifacts, step, attempt):
    here = folder / f"{step}-{attempt}"
    here.mkdir()
    (here / "state.json").write_text(f"{step} by {attempt}")
    artifacts.publish_checkpoint(here, Checkpoint(step=step, attempt=attempt))


def adapter(folder, text):
    here = folder / text
    here.mkdir(exist_ok=True)
    (here / "adapter_model.safetensors").write_text(text)
    return here


class PlainLockContract:
    """What it keeps also on a store without conditional writes, where it is a lease that is read back."""

    @pytest.fixture
    def opened(self, root):
        return lambda: open_store(root, StoreSettings())

    @pytest.fixture
    def owners(self, opened, monkeypatch):
        monkeypatch.setattr("job.edge.run.lock._SETTLE_SECONDS", SETTLE_SECONDS)
        owners = Owners(opened, conditional=probe(opened()).conditional)
        yield owners
        owners.end()

    def test_a_lock_that_was_given_back_is_taken_at_once_with_the_next_fence(self, owners):
        first = owners.held()
        assert (first.fence, first.taken_from) == (1, None)
        first.release()
        second = owners.held()
        assert (second.fence, second.taken_from) == (2, None)
        second.confirm()
        second.release()

    def test_a_live_owner_keeps_it_and_is_named(self, owners):
        owner = owners.held("node-7", lease_seconds=LIVE_LEASE_SECONDS)
        with pytest.raises(LockedError, match="process 1 on node-7"):
            owners.held("node-8")
        owner.confirm()
        owner.release()

    def test_a_dead_owner_is_replaced_after_its_lease_and_told_of(self, owners):
        owner = owners.held("node-7")
        die(owner)
        began = time.monotonic()
        successor = owners.held("node-8")
        assert time.monotonic() - began >= LEASE_SECONDS
        assert successor.fence == 2
        assert "node-7" in successor.taken_from
        successor.release()

    def test_how_long_a_dead_owner_had_renewed_the_lock_is_known_from_what_it_left(self, owners):
        """By its own clock: what it wrote last says how often, and it does that four times a lease."""
        owner = owners.held("node-7")
        die(owner)
        owner._renewals = 9
        owner._renew_once()
        successor = owners.held("node-8")

        assert successor.held_at_least == (1, int(9 * LEASE_SECONDS / 4))
        successor.release()

    def test_a_frozen_owner_that_wakes_finds_it_lost_and_touches_nothing(self, owners):
        lost = threading.Event()
        owner = owners.held("frozen", lost=lost)
        die(owner)
        successor = owners.held("alive")
        with pytest.raises(LockedError, match="on alive"):
            owner.confirm()
        assert owner.lost
        assert lost.is_set()
        owner.release()
        owner.remove()
        successor.confirm()
        assert owners.content()["free"] is False
        successor.release()

    def test_the_renewing_thread_notices_by_itself_that_the_lock_is_lost(self, owners):
        lost = threading.Event()
        owner = owners.held(lost=lost)
        store = owners.opened()
        taken = json.dumps({**owners.content(), "token": "another's", "fence": 2}).encode()
        store.write("lock.json", taken)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not lost.wait(LEASE_SECONDS):
            # Between its look and its write the owner may have written over it: only conditional writes exclude that.
            assert not owners.conditional
            assert time.monotonic() < deadline
            store.write("lock.json", taken)
        assert owners.content()["token"] == "another's"
        owner.release()

    def test_of_eight_at_once_one_works_and_the_others_are_told_so(self, owners, monkeypatch):
        if not owners.conditional:
            monkeypatch.setattr("job.edge.run.lock._SETTLE_SECONDS", LONG_SETTLE_SECONDS)
        (lock,) = owners.at_once(8, lease_seconds=LIVE_LEASE_SECONDS if owners.conditional else LONG_LEASE_SECONDS)
        lock.confirm()
        lock.release()

    def test_of_several_that_watch_a_dead_owner_one_takes_over(self, owners, monkeypatch):
        die(owners.held())
        if not owners.conditional:
            monkeypatch.setattr("job.edge.run.lock._SETTLE_SECONDS", LONG_SETTLE_SECONDS)
        (lock,) = owners.at_once(4, lease_seconds=LIVE_LEASE_SECONDS if owners.conditional else LONG_LEASE_SECONDS)
        assert lock.fence == 2
        lock.release()

    def test_a_run_that_never_began_leaves_no_lock(self, owners):
        lock = owners.held()
        lock.remove()
        assert [*owners.opened().list("lock")] == []

    # --- what the lock guards -----------------------------------------------------------------------------------------

    def test_an_attempt_that_was_frozen_changes_nothing_that_counts(self, owners, tmp_path):
        old_lock = owners.run_lock("frozen")
        old = owners.run_under(old_lock)
        checkpoint(tmp_path, old, 10, 1)
        die(old_lock)
        new = owners.run_under(owners.run_lock("alive"))
        checkpoint(tmp_path, new, 20, 2)
        new.publish_adapter(adapter(tmp_path, "the new one"))

        with pytest.raises(LockedError):
            old.begin_run({"recipe": "r"})
        with pytest.raises(LockedError):
            old.begin_attempt({"host": "frozen"})
        with pytest.raises(LockedError):
            checkpoint(tmp_path, old, 30, 1)
        with pytest.raises(LockedError):
            old.publish_adapter(adapter(tmp_path, "the old one"))
        with pytest.raises(LockedError):
            old.publish_report(b'{"fence": 1}')
        with pytest.raises(LockedError):
            old.publish("loss.png", b"old")
        with pytest.raises(LockedError):
            old.retain((), newest=1)
        new.publish_report(b'{"fence": 2}')

        assert json.loads(owners.read("latest.json"))["step"] == 20
        assert json.loads(owners.read("report.json")) == {"fence": 2}
        assert owners.read("adapter/adapter_model.safetensors") == b"the new one"
        assert [c.step for c in new.checkpoints()] == [10, 20]
        assert (new.run_record(), new.attempt_numbers()) == (None, [1, 2])

    def test_what_it_still_wrote_in_that_moment_is_replaced_by_its_successor(self, owners, tmp_path, monkeypatch):
        old_lock = owners.run_lock("frozen")
        old = owners.run_under(old_lock)
        die(old_lock)
        new = owners.run_under(owners.run_lock("alive"))
        monkeypatch.setattr(old_lock, "confirm", lambda: None)
        checkpoint(tmp_path, old, 30, 1)  # an orphan
        old.publish_adapter(adapter(tmp_path, "the old one"))
        old.publish_report(b'{"fence": 1}')

        checkpoint(tmp_path, new, 20, 2)
        found, _ = new.fetch_newest(tmp_path / "resumed", should_stop=never)
        assert found == Checkpoint(step=20, attempt=2)
        new.retain((), newest=3)
        new.publish_adapter(adapter(tmp_path, "the new one"))
        new.publish_report(b'{"fence": 2}')

        assert new.checkpoints() == [Checkpoint(step=20, attempt=2)]
        assert json.loads(owners.read("latest.json"))["step"] == 20
        assert json.loads(owners.read("report.json")) == {"fence": 2}
        assert owners.read("adapter/adapter_model.safetensors") == b"the new one"


class LockContract(PlainLockContract):
    """And with conditional writes, also against whoever freezes between its look and its write."""

    def test_the_store_keeps_conditions(self, owners):
        assert owners.conditional

    def test_even_between_the_look_and_the_write_it_can_replace_nothing_of_its_successor(
        self, owners, tmp_path, monkeypatch
    ):
        """It looked and found the lock its own; then it froze, and its successor did the same work meanwhile."""
        old_lock = owners.run_lock("frozen")
        old = owners.run_under(old_lock)
        checkpoint(tmp_path, old, 10, 1)
        die(old_lock)
        new = owners.run_under(owners.run_lock("alive"))
        real, meanwhile = old_lock.confirm, []

        def confirm():
            if meanwhile:
                meanwhile.pop()()
            else:
                real()

        monkeypatch.setattr(old_lock, "confirm", confirm)
        for late, timely in (
            (
                lambda: old._checkpoints.latest.write({"checkpoint": "step-000010-a01", "step": 10}),
                lambda: checkpoint(tmp_path, new, 20, 2),
            ),
            (
                lambda: old.publish_adapter(adapter(tmp_path, "the old one")),
                lambda: new.publish_adapter(adapter(tmp_path, "the new one")),
            ),
            (lambda: old.publish_report(b'{"fence": 1}'), lambda: new.publish_report(b'{"fence": 2}')),
        ):
            meanwhile.append(timely)
            with pytest.raises(LockedError):
                late()

        assert json.loads(owners.read("latest.json"))["step"] == 20
        assert json.loads(owners.read("report.json")) == {"fence": 2}
        assert owners.read("adapter/adapter_model.safetensors") == b"the new one"
