"""A channel in the store: of several changes at once one wins, no entry is lost, the copy is whole or not there."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from job.core.crash_points import CrashOrder, set_order
from job.core.errors import DataError, NotFoundError
from job.core.nightly.channel import AdapterFileInUse, AdapterInUse, ChannelState, Promoted, open_state
from job.core.nightly.error_budget import spend
from job.core.nightly.exam_results import Exam, results_of
from job.core.nightly.promotion_report import NewData
from job.edge.run import channels as channels_module
from job.edge.run.channel_adapter import ChannelAdapter
from job.edge.run.channels import Channel
from job.edge.store.objects import PreconditionError, StoreSettings
from job.edge.store.opening import open_store

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class KilledError(Exception):
    """Here the process would have died."""


@pytest.fixture(params=["directory", "moto"])
def store(request, tmp_path):
    root = f"file://{tmp_path}/store" if request.param == "directory" else request.getfixturevalue("moto_place").root
    return open_store(root, StoreSettings())


@pytest.fixture
def channel(store):
    return Channel(store, "notes", conditional=True)


def published(store, run_id, *, config=b"{}"):
    """A run's own adapter in the store, and how an entry names it."""
    contents = {WEIGHTS: f"weights of {run_id}".encode(), CONFIG: config}
    for name, content in contents.items():
        store.write(f"runs/{run_id}/adapter/{name}", content)
    files = {
        name: AdapterFileInUse(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    return AdapterInUse(uri=f"{store.uri}/runs/{run_id}/adapter", files=files)


def entry(store, sequence, run_id, *, config=b"{}", kind="promotion"):
    return Promoted(
        channel="notes",
        sequence=sequence,
        kind=kind,
        run_id=run_id,
        run_uri=None if run_id is None else f"{store.uri}/runs/{run_id}",
        adapter=None if run_id is None else published(store, run_id, config=config),
        base="owner/base",
        revision="c" * 40,
        since="2026-11-29T02:17:00+00:00",
        why=f"{run_id} is better.",
        replaced=None,
        by="node",
    )


def copy_of(channel, tmp_path):
    return ChannelAdapter(channel, scratch=Path(tmp_path) / "scratch", should_stop=lambda: False)


def in_copy(store):
    """Name -> content of the channel's copy."""
    prefix = "channels/notes/adapter/"
    return {each.key.removeprefix(prefix): store.read(each.key)[0] for each in store.list(prefix)}


# --- what is in use --------------------------------------------------------------------------------------------------


def test_a_swap_is_made_on_condition_of_what_was_compared(channel, store):
    assert channel.promoted() == (None, None)
    first = entry(store, 1, "r1")
    assert channel.swap(first, etag=None)
    now, etag = channel.promoted()
    assert now == first

    assert not channel.swap(entry(store, 1, "r9"), etag=None), "it was compared with nothing, and there is something"
    assert channel.swap(entry(store, 2, "r2"), etag=etag)
    assert not channel.swap(entry(store, 2, "r3"), etag=etag), "what it was compared with is in use no longer"
    assert channel.promoted()[0].run_id == "r2"
    assert [each.run_id for each in channel.history()] == ["r1", "r2"]


def test_a_swap_that_is_made_again_changes_nothing_also_when_it_was_replaced_since(channel, store):
    first = entry(store, 1, "r1")
    channel.swap(first, etag=None)
    etag = channel.promoted()[1]
    assert channel.swap(first, etag=None)
    assert channel.promoted()[1] == etag

    channel.swap(entry(store, 2, "r2"), etag=etag)
    assert channel.swap(first, etag=None), "it was made, and is told so"
    assert channel.promoted()[0].run_id == "r2"


def test_of_many_swaps_at_once_one_wins(store):
    first = Channel(store, "notes", conditional=True)
    first.swap(entry(store, 1, "r1"), etag=None)
    etag = first.promoted()[1]
    rivals = [entry(store, 2, f"rival-{number}") for number in range(8)]

    def swap(new):
        return Channel(store, "notes", conditional=True).swap(new, etag=etag)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(swap, rivals))
    assert sum(won) == 1
    assert first.promoted()[0] == rivals[won.index(True)]
    assert [each.sequence for each in first.history()] == [1, 2]


def test_an_entry_that_a_killed_process_did_not_write_is_written_before_the_next_swap(channel, store):
    channel.swap(entry(store, 1, "r1"), etag=None)
    killed_at("promoted.after_swap")
    with pytest.raises(KilledError):
        channel.swap(entry(store, 2, "r2"), etag=channel.promoted()[1])
    set_order(None, lambda _order: None)
    assert [each.run_id for each in channel.history()] == ["r1", "r2"], "also while its own entry is missing"
    assert not any("000002" in each.key for each in store.list("channels/notes/history/"))

    channel.swap(entry(store, 3, None, kind="rollback"), etag=channel.promoted()[1])
    names = [each.key.rpartition("/")[2] for each in store.list("channels/notes/history/")]
    assert names == ["000001-r1.json", "000002-r2.json", "000003-base.json"]


def test_what_stands_there_and_is_no_entry_of_ours_is_refused_and_named(channel, store):
    store.write("channels/notes/promoted.json", b'{"version": 1}')
    with pytest.raises(DataError, match=r"promoted\.json: damaged, or not written by this version"):
        channel.promoted()


def test_a_damaged_entry_of_the_history_is_passed_over(channel, store):
    for number in (1, 2, 3):
        channel.swap(entry(store, number, f"r{number}"), etag=channel.promoted()[1])
    store.write("channels/notes/history/000002-r2.json", b"{")
    assert [each.run_id for each in channel.history()] == ["r1", "r3"]


def test_without_conditions_a_swap_looks_before_and_after(store, monkeypatch):
    monkeypatch.setattr(channels_module, "SETTLE_SECONDS", 0.0)
    poor = Channel(store, "notes", conditional=False)
    assert poor.swap(entry(store, 1, "r1"), etag=None)
    etag = poor.promoted()[1]
    assert poor.swap(entry(store, 2, "r2"), etag=etag)
    assert not poor.swap(entry(store, 2, "r3"), etag=etag)

    rival = entry(store, 3, "rival")

    def write_over(_seconds):
        store.write("channels/notes/promoted.json", json.dumps(rival.model_dump(mode="json")).encode())

    monkeypatch.setattr(channels_module.time, "sleep", write_over)
    assert not poor.swap(entry(store, 3, "r4"), etag=poor.promoted()[1]), "a rival's write came last"


# --- the state -------------------------------------------------------------------------------------------------------


def first_state():
    return open_state(740_000, per_year=1.0)


def test_changes_of_the_state_add_up_whoever_makes_them_at_the_same_time(store):
    def add(number):
        def change(state):
            return state.model_copy(update={"again": (*state.again, f"r{number}")})

        return Channel(store, "notes", conditional=True).change_state(change, first=first_state)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    state, _ = Channel(store, "notes", conditional=True).state()
    assert sorted(state.again) == [f"r{number}" for number in range(6)]


def test_without_conditions_a_change_that_a_rival_undoes_is_made_again_on_what_the_rival_wrote(store, monkeypatch):
    """No payment is lost, and none is made twice."""
    before = Channel(store, "notes", conditional=True).change_state(lambda state: state, first=first_state)
    poor = Channel(store, "notes", conditional=False)
    slept = []

    def paid(run_id):
        return lambda state: state.model_copy(update={"budget": spend(state.budget, run_id, 740_000, per_year=1.0)[0]})

    def write_over(seconds):
        """A rival has read the state before we wrote, and writes after us."""
        if not slept:
            poor.write_state(paid("rival")(before), etag=None)
        slept.append(seconds)

    monkeypatch.setattr(channels_module.time, "sleep", write_over)
    after = poor.change_state(paid("r1"), first=first_state)

    assert [test.run_id for test in after.budget.spent] == ["rival", "r1"]
    assert poor.state()[0] == after
    assert slept == [channels_module.SETTLE_SECONDS] * 2
    poor.change_state(paid("r1"), first=first_state)
    assert len(slept) == 2, "what was paid is not paid again"


def test_a_change_that_changes_nothing_writes_nothing(channel):
    before = channel.change_state(lambda state: state.model_copy(update={"again": ("r1",)}), first=first_state)
    etag = channel.state()[1]
    assert channel.change_state(lambda state: state, first=first_state) == before
    assert channel.state()[1] == etag
    with pytest.raises(PreconditionError):
        channel.write_state(ChannelState(budget=before.budget), etag=None)


# --- what is kept to save time ---------------------------------------------------------------------------------------


def test_results_are_found_by_model_exam_and_way_and_only_as_they_were_written(channel, store):
    kept = results_of([1.0, 2.0], model="m" * 32, exam="e" * 32, how="h" * 32)
    named = {"exam": kept.exam, "how": kept.how, "model": kept.model}
    channel.keep_results("r1", kept)

    assert channel.results("r1", **named) == kept
    assert channel.results("r2", **named) is None
    assert channel.results("r1", **named | {"how": "x"}) is None
    (key,) = [each.key for each in store.list("channels/notes/results/")]
    store.write(key, store.read(key)[0].replace(b"2.0", b"1.0"))
    assert channel.results("r1", **named) is None, "changed numbers are judged anew"
    channel.keep_results("r1", kept)
    assert channel.results("r1", **named) == kept


def test_an_exam_is_found_by_its_own_name(channel, store):
    exam = Exam(name="e1", tokens=(1, 2))
    channel.keep_exam(exam)
    assert channel.exam("e1") == exam
    assert channel.exam("e2") is None
    store.write("channels/notes/exams/e2.json", store.read("channels/notes/exams/e1.json")[0])
    assert channel.exam("e2") is None


def test_what_was_new_is_what_the_first_attempt_at_a_run_has_found(channel):
    first, later = NewData(file_count=2, records=7), NewData(file_count=0, records=0)
    assert channel.record_new("r1", first) == first
    assert channel.record_new("r1", later) == first
    assert channel.record_new("r2", later) == later


def test_what_the_last_runs_were_trained_on_stays_and_what_the_one_in_use_was(channel):
    assert channel.trained("run-0", "t") is None
    for number in range(12):
        channel.keep_trained(f"run-{number}", "t", f"{number}".encode(), needed=["run-0", "run-1"])

    found = [number for number in range(12) if channel.trained(f"run-{number}", "t") == f"{number}".encode()]
    assert (found[:2], found[-1], len(found)) == ([0, 1], 11, 11)
    assert channel.trained("run-0", "other templates") is None


class Aged:
    """A store in which one object is older."""

    def __init__(self, store, key, *, seconds):
        self._store, self._key, self._seconds = store, key, seconds

    def __getattr__(self, name):
        return getattr(self._store, name)

    def list(self, prefix):
        """As the store lists them."""
        for entry in self._store.list(prefix):
            yield replace(entry, modified=entry.modified - self._seconds) if entry.key == self._key else entry


def test_of_the_hashes_of_records_those_stay_that_a_state_names_or_another_night_has_just_written(channel, store):
    """A rival writes its own before it names them; an old one that nobody names goes."""
    one, two = (hashlib.sha256(content).hexdigest()[:32] for content in (b"12345678", b"87654321"))
    channel.keep_seen(one, b"12345678")
    channel.keep_seen(two, b"87654321")
    channel.forget_seen(but=[two])
    assert channel.seen(one, size=8) == b"12345678"
    channel.store = Aged(store, f"channels/notes/seen/{one}.bin", seconds=86_000)
    channel.forget_seen(but=[two])
    assert channel.seen(one, size=8) == b"12345678"
    channel.store = Aged(store, f"channels/notes/seen/{one}.bin", seconds=90_000)
    channel.forget_seen(but=[one])
    channel.forget_seen(but=[two])
    assert channel.seen(two, size=8) == b"87654321"
    with pytest.raises(NotFoundError):
        channel.seen(one, size=8)
    for wrong in (b"87654320", b"876543210", b"8765432"):
        store.write(f"channels/notes/seen/{two}.bin", wrong)
        with pytest.raises(DataError):
            channel.seen(two, size=8)


# --- the copy --------------------------------------------------------------------------------------------------------


def killed_at(point, passage=1):
    def die(_order):
        raise KilledError(point)

    set_order(CrashOrder(name=point, passage=passage), die)


@pytest.fixture(autouse=True)
def nobody_dies():
    yield
    set_order(None, lambda _order: None)


def test_the_copy_follows_what_is_in_use_and_goes_with_it(channel, store, tmp_path):
    copy = copy_of(channel, tmp_path)
    copy.follow()
    assert in_copy(store) == {}
    channel.swap(entry(store, 1, "r1"), etag=None)
    assert not copy.is_current()
    copy.follow()
    found = in_copy(store)
    assert found[WEIGHTS] == b"weights of r1"
    manifest = json.loads(found["MANIFEST.json"])
    assert (manifest["run_id"], manifest["sequence"]) == ("r1", 1)
    assert manifest["files"][WEIGHTS]["sha256"] == hashlib.sha256(b"weights of r1").hexdigest()
    assert copy.is_current()

    channel.swap(entry(store, 2, None, kind="rollback"), etag=channel.promoted()[1])
    copy.follow()
    assert in_copy(store) == {}


def looks(store):
    """What a server that loads the folder now would have: weights and configuration, or nothing."""
    found = in_copy(store)
    return None if CONFIG not in found or WEIGHTS not in found else (found[WEIGHTS], found[CONFIG])


@pytest.mark.parametrize("other", [b"{}", b'{"r": 8}'], ids=["same configuration", "another configuration"])
@pytest.mark.parametrize("passage", [1, 2])
@pytest.mark.parametrize("side", ["before_file", "after_file", "after_manifest"])
def test_killed_anywhere_the_copy_is_never_a_mixture_and_the_next_one_makes_it_whole(
    channel, store, tmp_path, other, passage, side
):
    channel.swap(entry(store, 1, "r1"), etag=None)
    copy = copy_of(channel, tmp_path)
    copy.follow()
    channel.swap(entry(store, 2, "r2", config=other), etag=channel.promoted()[1])
    killed_at(f"channel_adapter.{side}", passage)
    try:
        copy.follow()
    except KilledError:
        pass
    else:
        assert passage == 2, "it is passed once at least"
    set_order(None, lambda _order: None)
    assert looks(store) in {None, (b"weights of r1", b"{}"), (b"weights of r2", other)}

    # Also where somebody went back before anybody has made it whole.
    channel.swap(entry(store, 3, "r1", kind="rollback"), etag=channel.promoted()[1])
    copy_of(channel, tmp_path / "later").follow()
    assert looks(store) == (b"weights of r1", b"{}")
    assert json.loads(in_copy(store)["MANIFEST.json"])["sequence"] == 3


def test_while_the_configuration_stays_the_place_is_never_without_an_adapter(channel, store, tmp_path):
    channel.swap(entry(store, 1, "r1"), etag=None)
    copy = copy_of(channel, tmp_path)
    copy.follow()
    channel.swap(entry(store, 2, "r2"), etag=channel.promoted()[1])
    for side in ("before_file", "after_file"):
        seen = []
        set_order(CrashOrder(name=f"channel_adapter.{side}"), lambda _order, seen=seen: seen.append(looks(store)))
        copy.follow()
        assert None not in seen
    assert looks(store) == (b"weights of r2", b"{}")


def test_a_writer_that_was_frozen_finds_its_files_replaced_and_follows_what_is_in_use_now(channel, store, tmp_path):
    channel.swap(entry(store, 1, "r1"), etag=None)
    copy_of(channel, tmp_path / "first").follow()
    channel.swap(entry(store, 2, "r2"), etag=channel.promoted()[1])

    def others(_order):
        set_order(None, lambda _order: None)
        channel.swap(entry(store, 3, "r3"), etag=channel.promoted()[1])
        copy_of(channel, tmp_path / "other").follow()

    set_order(CrashOrder(name="channel_adapter.before_file"), others)
    copy_of(channel, tmp_path / "frozen").follow()
    assert looks(store) == (b"weights of r3", b"{}")
    assert json.loads(in_copy(store)["MANIFEST.json"])["run_id"] == "r3"


def test_a_run_s_adapter_that_is_another_one_by_now_is_not_copied(channel, store, tmp_path):
    channel.swap(entry(store, 1, "r1"), etag=None)
    store.write(f"runs/r1/adapter/{WEIGHTS}", b"weights of xx")
    with pytest.raises(DataError):
        copy_of(channel, tmp_path).follow()
