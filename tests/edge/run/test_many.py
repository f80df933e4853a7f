"""What a start and a commit ask of a store grows with what they need, not with what stands beside it. Counted."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from artifacts_contract import at, publish

from job.edge.run.artifacts import Artifacts, finished_runs, runs_of, unfinished_runs
from job.edge.run.run_store import RunStore
from job.edge.store import directory
from job.edge.store.objects import Entry, StoreSettings
from job.edge.store.opening import open_store
from job.stages.data import sources

OBJECTS_OF_A_CHECKPOINT = 7
PAGE = 1000
CONDITIONAL = type("Held", (), {"conditional": True, "fence": 1, "confirm": lambda self: None})


def never():
    return False


class Crowded:
    """A store that counts its requests as S3 does, pages of listings included, and lists more than there is."""

    def __init__(self, store, beside=()) -> None:
        self._store = store
        self._beside = sorted(beside)
        self.requests: Counter[str] = Counter()

    def list(self, prefix="", *, without=None):
        standing = [*self._store.list(prefix, without=without)]
        more = [key for key in self._beside if key.startswith(prefix) and not (without and f"/{without}/" in key)]
        standing += [Entry(key=key, size=1, modified=0.0) for key in more]
        self.requests["list"] += 1 + len(standing) // PAGE
        yield from sorted(standing, key=lambda entry: entry.key)

    def __getattr__(self, name):
        self.requests[name] += 1
        return getattr(self._store, name)

    @property
    def total(self):
        return self.requests.total() - self.requests["uri"]


def crowded(folder, beside=()):
    return Crowded(open_store(f"file://{folder}", StoreSettings()), beside)


def a_run(run_id):
    names = ("run.json", "report.json", "lock.json", "adapter/a", "attempts/01.json", "checkpoints/step-000001-a01/x")
    return [f"runs/{run_id}/{name}" for name in names]


def test_finding_the_unfinished_run_reads_none_of_ten_thousand_finished_ones(tmp_path):
    beside = [key for number in range(10_000) for key in a_run(f"abc-{number:05d}")]
    store = crowded(tmp_path, [*beside, "runs/abc-unfinished/run.json"])
    assert [run.run_id for run in unfinished_runs(store, "abc-")] == ["abc-unfinished"]
    assert store.total == store.requests["list"] == 1 + (5 * 10_000 + 1) // PAGE
    assert len(finished_runs(store)) == 10_000
    assert store.total == store.requests["list"]


def test_looking_for_a_recipes_runs_in_a_folder_looks_into_no_other_run(tmp_path, monkeypatch):
    store = open_store(f"file://{tmp_path}", StoreSettings())
    for run_id in ("abc-1", "abc-2", *(f"other-{number:03d}" for number in range(300))):
        for key in a_run(run_id):
            store.write(key, b"")
    looked_at = []
    scan = directory._scan
    monkeypatch.setattr(directory, "_scan", lambda folder: looked_at.append(folder) or scan(folder))
    assert [run.run_id for run in unfinished_runs(store, "abc-")] == []
    assert {path.relative_to(tmp_path).parts[1] for path in looked_at[1:]} == {"abc-1", "abc-2"}
    assert len(looked_at) == 1 + 2 * 3  # each run, its adapter, its attempts: not its checkpoints
    looked_at.clear()
    assert len([*runs_of(store, "")]) == 302
    assert len(looked_at) == 1


def test_runs_are_named_by_pages_of_runs_and_large_ones_are_skipped(moto_place):
    """On S3, with pages of ten keys."""
    store = open_store(moto_place.root, StoreSettings())
    for run_id in ("a", "b", "c"):
        for key in [f"runs/{run_id}/{name}" for name in ("adapter/x", "report.json", "run.json")]:
            store.write(key, b"{}")
    for number in range(60):
        store.write(f"runs/b/checkpoints/step-{number:06d}-a01/x", b"")
    requests = []

    def pages(params, **_):
        params["MaxKeys"] = 10
        requests.append(params)

    store._bucket.client.meta.events.register("before-parameter-build.s3.ListObjectsV2", pages)
    assert sorted(finished_runs(store)) == ["a", "b", "c"]
    assert len(requests) == 2
    requests.clear()
    assert [run.run_id for run in runs_of(store, "")] == ["a", "b", "c"]
    assert len(requests) == 1


# --- checkpoints


def of_checkpoints(count):
    names = ("MANIFEST.json", *"abcdef")
    return [
        f"runs/r1/checkpoints/step-{step:06d}-a01/{name}"
        for step, name in itertools.product(range(1, count + 1), names)
    ]


def writer(store):
    """A run whose lock is ours."""
    artifacts = Artifacts(store, "r1")
    artifacts._run = artifacts._checkpoints._run = RunStore(store, "r1", lock=CONDITIONAL())
    artifacts._checkpoints.latest._run = artifacts._run
    return artifacts


def commits_beside(folder, count, *, commits=20):
    """What a start and so many commits ask for beside so many checkpoints that stay."""
    store = crowded(folder / "store", of_checkpoints(count))
    artifacts = writer(store)
    artifacts.take_over()
    started = store.total
    for step in range(count + 1, count + commits + 1):
        publish(artifacts, folder, at(step, 2))
        artifacts.retain((), newest=count + commits)
    return started, store.total - started


def test_a_commit_beside_five_thousand_checkpoints_asks_for_no_more_than_beside_fifty(tmp_path):
    few, many = (commits_beside(tmp_path / str(count), count) for count in (50, 5000))
    assert many[0] - few[0] == 5000 * OBJECTS_OF_A_CHECKPOINT // PAGE  # listed once
    assert many[1] <= few[1]


def test_a_start_with_fifty_attempts_reads_the_last_two(tmp_path):
    store = crowded(tmp_path)
    artifacts = Artifacts(store, "r1")
    for _ in range(50):
        artifacts.end_attempt(artifacts.begin_attempt({}), {"exit_code": 75})
    store.requests.clear()
    assert [each["number"] for each in artifacts.attempts(newest=2)] == [49, 50]
    assert store.requests == {"list": 1, "read": 4}


def test_the_size_of_twenty_thousand_data_files_is_added_up_once(tmp_path, monkeypatch):
    class Counted(tuple):
        __slots__ = ()
        passes = 0

        def __iter__(self):
            type(self).passes += 1
            return super().__iter__()

    objects = Counted([Entry(key=str(number), size=1, modified=0.0) for number in range(20_000)])
    worker = type("Worker", (), {"settings": StoreSettings(), "should_stop": staticmethod(never)})

    def fetch_files(objects, *_args, on_progress, **_):
        for done in range(len(objects)):
            on_progress(done)
        return []

    monkeypatch.setattr(sources, "fetch_files", fetch_files)
    sources.fetch_sources(worker, [objects], Path(tmp_path), on_progress=lambda _done, _of: None)
    assert Counted.passes <= 2


# --- a listing that lags behind


class Lagging:
    """A store whose listings show nothing that was written since; what is asked for by name is there."""

    def __init__(self, store) -> None:
        self._store = store
        self._shown = {entry.key for entry in store.list()}

    def list(self, prefix="", *, without=None):
        return (entry for entry in self._store.list(prefix, without=without) if entry.key in self._shown)

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/store", StoreSettings())


def test_what_we_have_committed_is_known_while_no_listing_shows_it(store, tmp_path):
    artifacts = writer(Lagging(store))
    artifacts.take_over()
    number = artifacts.begin_attempt({"started": "now"})
    publish(artifacts, tmp_path, *(at(step, number) for step in (2, 4, 6)))
    artifacts.retain((), newest=2)
    assert artifacts.checkpoints() == [at(4), at(6)]
    assert Artifacts(store, "r1").checkpoints() == [at(4), at(6)]
    assert [each["number"] for each in artifacts.attempts()] == [1]
    assert artifacts.fetch_newest(tmp_path / "back", should_stop=never)[0] == at(6)


def test_what_was_committed_right_before_is_known_though_no_listing_shows_it(store, tmp_path):
    lagging = Lagging(store)
    first = writer(lagging)
    first.take_over()
    publish(first, tmp_path, at(2), at(4))
    second = writer(lagging)
    second.take_over()
    assert second.fetch_newest(tmp_path / "back", should_stop=never) == (at(4), [])
    assert second.checkpoints() == [at(2), at(4)]  # an earlier one may be the one that is chosen in the end


HINTS = {
    "nothing": b'{"checkpoint": "step-009999-a77"}',
    "a list": b'{"checkpoint": ["x"]}',
    "a number beyond all": b'{"checkpoint": "step-%s-a01"}' % (b"9" * 5000),
    "names that are none": b'{"committed": [2, null, "x", "step-000003-a01"]}',
    "no names": b'{"committed": "step-000003-a01"}',
    "no object": b"[]",
    "no text": b"\xff",
}


@pytest.mark.parametrize("hint", HINTS.values(), ids=HINTS)
def test_a_hint_that_names_nothing_is_no_checkpoint(store, tmp_path, hint):
    first = writer(store)
    first.take_over()
    publish(first, tmp_path, at(2))
    store.write("runs/r1/latest.json", hint)
    second = writer(store)
    second.take_over()
    assert second.fetch_newest(tmp_path / "back", should_stop=never) == (at(2), [])


def test_the_newest_deleted_while_it_is_resumed_is_passed_over_and_not_counted(store, tmp_path):
    first = writer(store)
    first.take_over()
    publish(first, tmp_path, at(2), at(4), at(6))
    second = writer(store)
    second.take_over()
    store.delete([entry.key for entry in store.list("runs/r1/checkpoints/step-000006-a01/")])
    newest, passed_over = second.fetch_newest(tmp_path / "back", should_stop=never)
    assert (newest, [each["checkpoint"] for each in passed_over]) == (at(4), [at(6).name])
    assert second.checkpoints() == [at(2), at(4)]
