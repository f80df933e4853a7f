"""The lock of a run: one live attempt; whoever fell silent is replaced, and then changes nothing that counts."""

import threading
import time

import pytest
from lock_contract import PATIENCE_SECONDS, LockContract, Owners, PlainLockContract, die, never

from job.core.errors import LockedError, StopRequestedError, UnavailableError, UsageError
from job.edge.store.objects import PreconditionError, StoreSettings
from job.edge.store.opening import open_store


class TestEveryStore(LockContract):
    """The lock knows none of them."""

    @pytest.fixture(params=["directory", "moto", "ministack"])
    def root(self, request, tmp_path):
        if request.param == "directory":
            return f"file://{tmp_path}/store"
        return request.getfixturevalue(f"{request.param}_place").root


class Poor:
    """A store as Swift is one: If-Match is refused, and of many creators at once more than one is let through."""

    def __init__(self, root):
        self._store = open_store(root, StoreSettings())

    def write(self, key, data, *, create_only=False, if_match=None):
        if if_match is not None:
            raise UsageError("501 NotImplemented (Conditional object PUTs are not supported.)")
        if create_only and [*self._store.list(key)]:
            raise PreconditionError("412")
        return self._store.write(key, data)

    def __getattr__(self, name):
        return getattr(self._store, name)


class TestAPoorStore(PlainLockContract):
    @pytest.fixture
    def opened(self, tmp_path):
        return lambda: Poor(f"file://{tmp_path}/store")

    def test_the_probe_finds_it(self, owners):
        assert not owners.conditional


@pytest.fixture
def owners(tmp_path):
    owners = Owners(lambda: open_store(f"file://{tmp_path}/store", StoreSettings()), conditional=True)
    yield owners
    owners.end()


def test_the_lease_that_counts_is_the_owner_s(owners):
    die(owners.held(lease_seconds=2.0))
    began = time.monotonic()
    owners.held(lease_seconds=1.0).release()
    assert time.monotonic() - began >= 2.0


def test_the_fence_grows_beyond_what_is_known_when_somebody_deleted_the_lock(owners):
    owners.held().release()
    owners.opened().delete(["lock.json"])
    lock = owners.lock()
    lock.acquire(above=7, should_stop=never)
    assert lock.fence == 8
    owners.opened().delete(["lock.json"])
    with pytest.raises(LockedError):
        lock.confirm()


@pytest.mark.parametrize("rubbish", [b"", b"not JSON", b"[1]", b'{"fence": "x", "lease_seconds": 1e300, "host": 5}'])
def test_a_lock_that_nobody_can_read_is_watched_like_any_other(owners, rubbish, monkeypatch):
    monkeypatch.setattr("job.edge.run.lock._LONGEST_LEASE_SECONDS", 1.0)
    owners.opened().write("lock.json", rubbish)
    lock = owners.held()
    assert lock.fence == 1
    lock.release()


def test_whoever_waits_hears_a_stop_request(owners):
    die(owners.held(lease_seconds=600))
    began = time.monotonic()
    with pytest.raises(StopRequestedError):
        owners.lock().acquire(above=0, should_stop=lambda: time.monotonic() - began > 0.5)


class Forgetful:
    """A store whose answers get lost: what was written stands there, and the writer hears of a failure."""

    def __init__(self, store):
        self._store = store
        self.loses = False
        self.lost = threading.Event()

    def write(self, *args, **kwargs):
        etag = self._store.write(*args, **kwargs)
        if self.loses:
            self.loses = False
            self.lost.set()
            raise UnavailableError("no answer")
        return etag

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_a_renewal_whose_answer_was_lost_does_not_lose_the_lock(owners):
    store = Forgetful(owners.opened())
    lock = owners.held(store=store)
    store.loses = True
    assert store.lost.wait(PATIENCE_SECONDS)
    renewals = owners.content()["renewals"]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while owners.content()["renewals"] <= renewals:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lock.confirm()
    lock.release()
    assert owners.content()["free"] is True


class Panic(BaseException):
    """What a panic in a library's Rust becomes: no Exception."""


@pytest.mark.parametrize("trouble", [MemoryError(), Panic("index out of bounds")], ids=repr)
def test_the_lock_is_renewed_on_after_whatever_one_renewal_came_to(owners, monkeypatch, trouble):
    lock = owners.held(lease_seconds=0.4)
    renew_once, over = lock._renew_once, threading.Event()
    calls = []

    def fails_once():
        calls.append(trouble)
        if len(calls) == 1:
            raise trouble
        renew_once()
        over.set()

    monkeypatch.setattr(lock, "_renew_once", fails_once)
    assert over.wait(PATIENCE_SECONDS)
    lock.release()
