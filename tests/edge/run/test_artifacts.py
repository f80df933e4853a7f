"""The commit protocol: files first, manifest last; what is not whole does not exist."""

import json

import pytest
from artifacts_contract import ArtifactsContract, at, never, publish

from job.core.errors import LocalDiskError, StopRequestedError
from job.edge.run.artifacts import Artifacts
from job.edge.store import folder
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store


class TestInAFolder(ArtifactsContract):
    @pytest.fixture
    def root(self, tmp_path):
        return f"file://{tmp_path}/store"


def opened(tmp_path, run_id="r1"):
    return Artifacts(open_store(f"file://{tmp_path}/store", StoreSettings()), run_id)


def test_fetching_stops_when_asked(tmp_path):
    artifacts = opened(tmp_path)
    publish(artifacts, tmp_path, at(5))
    with pytest.raises(StopRequestedError):
        artifacts.fetch_newest(tmp_path / "back", should_stop=lambda: True)


def test_attempts_are_told_in_order_with_how_each_ended(tmp_path):
    artifacts = opened(tmp_path, "a.json.run")  # a run id may hold what looks like an ending
    for number in range(1, 103):
        assert artifacts.begin_attempt({"host": "h"}) == number
    artifacts.end_attempt(2, {"exit_code": 75})
    artifacts.end_attempt(2, {"exit_code": 0})  # the first word holds
    told = artifacts.attempts()
    assert [facts["number"] for facts in told] == list(range(1, 103))
    assert told[0]["end"] is None
    assert told[1]["end"] == {"exit_code": 75}


class Full:
    """A disk that has no room."""

    free = 0


def test_a_disk_without_room_is_at_fault_and_no_checkpoint_is_passed_over(tmp_path, monkeypatch):
    """Else the run would begin anew, or find nothing that it could publish."""
    artifacts = opened(tmp_path)
    publish(artifacts, tmp_path, at(5), at(10))
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _path: Full)
    with pytest.raises(LocalDiskError, match="bytes should be free, 0 are"):
        artifacts.fetch_newest(tmp_path / "back", should_stop=never)


@pytest.mark.parametrize("how", ["another size", "no file"])
def test_a_manifest_that_names_more_than_there_is_is_at_fault_and_not_the_disk(tmp_path, how):
    artifacts = opened(tmp_path)
    publish(artifacts, tmp_path, at(5), at(10))
    place = tmp_path / "store/runs/r1/checkpoints" / at(10).name
    manifest = json.loads((place / "MANIFEST.json").read_text())
    manifest["files"]["state.json"]["size"] = 1 << 60
    (place / "MANIFEST.json").write_text(json.dumps(manifest))
    if how == "no file":
        (place / "state.json").unlink()
    assert artifacts.fetch_newest(tmp_path / "back", should_stop=never)[0] == at(5)
