"""What others laid into the work folder before we came: refused, whatever it is, and never followed."""

import json
import os

import pytest

from job.core.errors import DeniedError
from job.edge.host.outcome import Outcome
from job.edge.host.planted import refuse_planted

SOMEBODY = 4711
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
PLACES = [
    "models",
    "models/quantised/base-form/MANIFEST.json",
    "cache/encoded/0123/MANIFEST.json",
    "cache/inductor/x.so",
]


def lay(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("{}")
    os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)


@as_root
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["link", "folder", "file"])
def test_what_another_user_made_is_refused(tmp_path, place, kind):
    lay(tmp_path / place, kind)
    with pytest.raises(DeniedError, match=f"{place}: is user {SOMEBODY}'s"):
        refuse_planted(tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_what_every_user_may_change_is_refused(tmp_path, place):
    path = tmp_path / place
    path.mkdir(parents=True)
    path.chmod(0o777)
    with pytest.raises(DeniedError, match=f"{place}: every user may change it") as caught:
        refuse_planted(tmp_path)
    assert "chmod -R o-w" in caught.value.action


def test_our_own_folders_links_and_a_work_folder_for_all_are_used(tmp_path):
    """A volume of Kubernetes is everybody's; and an operator may put models on another disk."""
    (tmp_path / "disk").mkdir()
    work = tmp_path / "work"
    (work / "runs/r1").mkdir(parents=True)
    (work / "models").symlink_to(tmp_path / "disk")
    work.chmod(0o777)
    refuse_planted(work)
    refuse_planted(tmp_path / "not there")


@as_root
@pytest.mark.parametrize("command", ["run", "check", "plan"])
def test_a_planted_copy_in_4_bits_ends_77_before_anything_is_read(job, command):
    lay(job.workdir / "models/quantised/x/MANIFEST.json", "file")
    ended = job.call(command)
    assert ended.code == ended.outcome["code"] == 77, ended.stdout
    assert "MANIFEST.json: is user 4711's" in ended.outcome["reason"]
    assert "take it away" in ended.outcome["action"]
    assert job.runs() == []


def test_a_run_leaves_nothing_that_others_may_change(job):
    job.recipe["train"]["steps"] = 1
    before = os.umask(0)
    try:
        assert job.call("run").code == 0
    finally:
        os.umask(before)
    assert job.call("run", "--set", "train.steps=2").code == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_the_outcome_is_not_written_through_a_link_that_was_laid_in_its_way(tmp_path, in_place):
    target, file = tmp_path / "precious", tmp_path / "news" / "outcome.json"
    target.write_text("precious")
    file.parent.mkdir()
    (file.parent / f".outcome.json.{os.getpid()}.tmp").symlink_to(target)
    outcome = Outcome(file)
    if in_place:
        outcome._in_place = True
        file.symlink_to(target)
    outcome.end(code=0, again="-", reason="done")
    assert target.read_text() == "precious"
    assert in_place or json.loads(file.read_text())["code"] == 0
