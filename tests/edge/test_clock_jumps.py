"""A wall clock that is set by hours, and one that was wrong all along: what is decided by time stays as it is."""

import email.utils
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from clocks import HOUR, SettableClock, jump_at_each_look
from lock_contract import Owners, die, never

from job.core.errors import LockedError
from job.edge.base.fetching import BaseModelIdentity
from job.edge.base.hub_answers import retry_after_seconds
from job.edge.base.quantised_copies import QuantisedCopy
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.store.folder import MANIFEST
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store

_TWO_LOOKS = """
import datetime, time
for _ in range(2):
    input()
    print(time.time(), datetime.datetime.now().timestamp(), time.monotonic(), flush=True)
"""


def test_the_clock_of_the_tests_can_be_set_while_a_process_runs(tmp_path):
    clock = SettableClock(tmp_path)
    running = subprocess.Popen(
        [sys.executable, "-c", _TWO_LOOKS],
        env=os.environ | clock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def look():
        running.stdin.write("\n")
        running.stdin.flush()
        return [float(each) for each in running.stdout.readline().split()]

    (wall, now, steady), _ = look(), clock.set(hours=-9)
    wall_after, now_after, steady_after = look()
    running.communicate()

    assert wall_after - wall == pytest.approx(-9 * HOUR, abs=HOUR)
    assert now_after - now == pytest.approx(-9 * HOUR, abs=HOUR)
    assert 0 <= steady_after - steady < HOUR


# --- the lock --------------------------------------------------------------------------------------------------------


@pytest.fixture
def owners(tmp_path):
    owners = Owners(lambda: open_store(f"file://{tmp_path}/store", StoreSettings()), conditional=True)
    yield owners
    owners.end()


def test_a_living_owner_keeps_its_lock_whatever_the_clocks_say(owners, monkeypatch):
    jump_at_each_look(monkeypatch)
    owner = owners.held("first", lease_seconds=4.0)

    with pytest.raises(LockedError):
        owners.held("second", lease_seconds=4.0)
    owner.confirm()


def test_a_dead_owner_is_replaced_after_its_lease_and_not_before(owners, monkeypatch):
    jump_at_each_look(monkeypatch)
    die(owners.held("first", lease_seconds=2.0))
    began = time.monotonic()
    second = owners.held("second", lease_seconds=2.0)

    assert time.monotonic() - began >= 2.0
    assert second.fence == 2


# --- what lies about -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run under the lock of its second attempt, and a checkpoint that the first one left without a manifest."""
    store = open_store(f"file://{tmp_path}/store", StoreSettings())
    left = Checkpoint(step=5, attempt=1)
    store.write(f"runs/r1/checkpoints/{left.name}/state.json", b"{}")
    path = tmp_path / "store/runs/r1/checkpoints" / left.name / "state.json"
    bare = Artifacts(store, "r1")
    lock = bare.make_lock(lease_seconds=60.0, owner={"host": "here", "pid": 1}, conditional=True, on_lost=lambda: None)
    lock.acquire(above=0, should_stop=never)
    yield SimpleNamespace(left=path, artifacts=bare.under(lock))
    lock.release()


@pytest.mark.parametrize("hours", [-48, 0, 48])
def test_what_was_never_committed_is_cleared_when_it_is_a_day_old_by_the_stores_own_clock(run, monkeypatch, hours):
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + hours * HOUR)
    run.artifacts.take_over()
    assert run.left.exists()

    day_ago = true() - 25 * HOUR
    os.utime(run.left, (day_ago, day_ago))
    run.artifacts.take_over()
    assert not run.left.exists()


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_copy_in_4_bits_that_is_used_now_stays_although_the_clock_was_set_back(tmp_path, hours):
    """Copies beside it are from another time: they were dated before the clock was set."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_bytes(b"{}")
    identity = BaseModelIdentity(source="owner/name", revision="0" * 40)

    def kept(form):
        copy = QuantisedCopy(
            identity, {"form": form}, models_folder=tmp_path / "models", store=None, should_stop=lambda: False
        )
        copy.keep([("config.json", lambda: b"{}")], beside=base, needed_bytes=10, on_beat=lambda: None)
        return copy.folder

    others = [kept(form) for form in "abc"]
    for folder in others:
        moment = time.time() - hours * HOUR
        os.utime(folder / MANIFEST, (moment, moment))
    newest = kept("d")

    assert (newest / MANIFEST).exists()
    assert sum((folder / MANIFEST).exists() for folder in others) == 2


# --- numbers, waits and deadlines ------------------------------------------------------------------------------------


def test_attempts_are_numbered_in_their_order(tmp_path, monkeypatch):
    jump_at_each_look(monkeypatch)
    artifacts = Artifacts(open_store(f"file://{tmp_path}/store", StoreSettings()), "r1")

    assert [artifacts.begin_attempt({"host": "h"}) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert [facts["number"] for facts in artifacts.attempts()] == [1, 2, 3, 4, 5]


def busy_until(seconds, *, date=True):
    """The error for an answer that asks to come again at a moment on the hub's clock."""
    now = time.time()
    headers = {"Retry-After": email.utils.formatdate(now + seconds, usegmt=True)}
    headers |= {"Date": email.utils.formatdate(now, usegmt=True)} if date else {}
    error = RuntimeError("busy")
    error.response = SimpleNamespace(headers=headers, status_code=429)
    return error


def test_a_hub_that_names_a_moment_is_waited_for_by_its_own_clock(monkeypatch):
    error = busy_until(30)
    jump_at_each_look(monkeypatch)

    assert [retry_after_seconds(error) for _ in range(10)] == [30.0] * 10


def test_a_moment_without_the_hubs_clock_is_no_answer():
    """Then the pause is our own."""
    assert retry_after_seconds(busy_until(30, date=False)) is None
