"""What stands in the store is damaged: a run goes on from what still verifies, says so, and ends the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_runs import FILES, Place, Run, in_order

BEFORE_KILL = "checkpoint.after_latest:4"
PASSED_OVER, RESUMED = True, False
PLANTED = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
    "WANDB_API_KEY": "correct horse battery staple",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaDKtokenThatNobodyMaySee",
}


class Stored:
    """The objects of one run in either kind of store, written to behind the job's back."""

    def __init__(self, place: Place, server) -> None:
        self._place = place
        self._bucket, _, self._prefix = place.uri.removeprefix("s3://").partition("/")
        self._client = server.at.client() if place.uri.startswith("s3://") else None
        (self._run,) = [path.name for path in place.folder.glob("runs/*")]

    @property
    def folder(self) -> Path:
        return self._place.folder / "runs" / self._run

    def read(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()

    def write(self, key: str, content: bytes) -> None:
        if self._client is None:
            (self.folder / key).write_bytes(content)
        else:
            self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=content)

    def delete(self, key: str) -> None:
        if self._client is None:
            (self.folder / key).unlink()
        else:
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def copy(self, place: Place) -> None:
        """All of it to another output."""
        if self._client is None:
            shutil.copytree(self._place.folder, place.folder)
            return
        prefix = place.uri.removeprefix(f"s3://{self._bucket}/")
        for found in self._client.list_objects_v2(Bucket=self._bucket, Prefix=f"{self._prefix}/")["Contents"]:
            key = prefix + found["Key"].removeprefix(self._prefix)
            body = self._client.get_object(Bucket=self._bucket, Key=found["Key"])["Body"].read()
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body)

    def _key(self, key: str) -> str:
        return f"{self._prefix}/runs/{self._run}/{key}"


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def flip(name: str) -> Callable[[Stored, str], None]:
    return lambda stored, place: stored.write(place + name, flipped(stored.read(place + name)))


def truncated_manifest(stored: Stored, place: str) -> None:
    content = stored.read(place + "MANIFEST.json")
    stored.write(place + "MANIFEST.json", content[: len(content) // 2])


def no_manifest(stored: Stored, place: str) -> None:
    stored.delete(place + "MANIFEST.json")


def no_optimizer(stored: Stored, place: str) -> None:
    stored.delete(place + "optimizer.safetensors")


def short_state(stored: Stored, place: str) -> None:
    stored.write(place + "state.json", stored.read(place + "state.json")[:-1])


def with_key(key: str, **facts: object) -> Callable[[Stored, str], None]:
    """A manifest that names a file by this key."""

    def damage(stored: Stored, place: str) -> None:
        manifest = json.loads(stored.read(place + "MANIFEST.json"))
        entry = manifest["files"].pop("state.json") | facts
        manifest["files"][key] = entry
        stored.write(place + "MANIFEST.json", json.dumps(manifest).encode())

    return damage


def latest(content: bytes | None) -> Callable[[Stored, str], None]:
    def damage(stored: Stored, _place: str) -> None:
        stored.delete("latest.json") if content is None else stored.write("latest.json", content)

    return damage


NOTHING = b'{"checkpoint": "step-009999-a77", "fence": 3, "step": 9999}\n'
NEWEST = {
    **{f"a byte of {name}": flip(name) for name in sorted(FILES)},
    "a byte of MANIFEST.json": flip("MANIFEST.json"),
    "a manifest cut short": truncated_manifest,
    "no manifest": no_manifest,
    "a file is gone": no_optimizer,
    "a file cut short": short_state,
    "a key with ..": with_key("../../../../state.json"),
    "an absolute key": with_key("/etc/state.json"),
    "a key of another store": with_key("s3://elsewhere/state.json"),
    "a size that no disk has": with_key("state.json", size=1 << 60),
    "a size below nothing": with_key("state.json", size=-1),
}
"""What is done to the newest checkpoint; then the one before is gone on from."""
HINTS = {
    "latest.json names nothing": latest(NOTHING),
    "latest.json is garbage": latest(b"\x00\xff{"),
    "latest.json is a list": latest(b"[]\n"),
    "latest.json is gone": latest(None),
}
"""What is done to the hint; then nothing is lost."""
IN_SHORT = {"a byte of optimizer.safetensors", "a manifest cut short", "a key with ..", "latest.json names nothing"}


@pytest.fixture(scope="session")
def killed_in_a_folder(tmp_path_factory, folder_place, folder_recipe, warm, undisturbed_in_a_folder):
    place = folder_place.below("killed")
    return _killed(tmp_path_factory, place, folder_recipe, warm), folder_recipe, undisturbed_in_a_folder[0]


@pytest.fixture(scope="session")
def killed_on_s3(tmp_path_factory, s3_place, s3_recipe, warm, undisturbed):
    return _killed(tmp_path_factory, s3_place.below("killed"), s3_recipe, warm), s3_recipe, undisturbed[0]


def _killed(tmp_path_factory, place, recipe, warm):
    run = Run(tmp_path_factory.mktemp("killed") / "run", place, recipe, warm)
    attempt = run.begin("--crash-at", BEFORE_KILL)
    assert attempt.wait() == -9, attempt.told()
    assert len(run.committed()) >= 2
    return run


CASES = [
    pytest.param(where, name, marks=() if where == "folder" and name in IN_SHORT else pytest.mark.chaos)
    for where in ("folder", "s3")
    for name in (*NEWEST, *HINTS)
]


@pytest.fixture
def victim(request, tmp_path, warm):
    """A killed run, copied, to be damaged and gone on with."""

    def make(where):
        killed, recipe, undisturbed = request.getfixturevalue(
            {"folder": "killed_in_a_folder", "s3": "killed_on_s3"}[where]
        )
        server = request.getfixturevalue("server") if where == "s3" else None
        above = killed.place.folder.parent
        place = Place(
            uri=f"{killed.place.uri.rpartition('/')[0]}/{tmp_path.name}",
            folder=above / tmp_path.name,
            environment=killed.place.environment,
        )
        Stored(killed.place, server).copy(place)
        return Run(tmp_path / "run", place, recipe, warm), Stored(place, server), undisturbed

    return make


@pytest.mark.parametrize(("where", "case"), CASES)
def test_a_run_goes_on_from_what_still_verifies(victim, tmp_path, where, case, results):
    run, stored, undisturbed = victim(where)
    *_, before, newest = in_order(run.committed())
    (NEWEST | HINTS)[case](stored, f"checkpoints/{newest}/")

    attempt = run.begin()
    assert attempt.wait() == 0, attempt.told()

    (resumed,) = attempt.named("resumed")
    passed_over = [event["checkpoint"] for event in attempt.named("checkpoint_passed_over")]
    told = [each["checkpoint"] for each in run.read_json("report.json")["attempts"][-1]["passed_over"]]
    assert told == passed_over
    assert passed_over == ([newest] if case in NEWEST else [])
    assert resumed["checkpoint"] == (before if case in NEWEST else newest)
    run.same_result(undisturbed, attempt)
    assert not [*tmp_path.glob("state.json"), *tmp_path.glob("*/state.json"), *tmp_path.glob("run/*/state.json")]
    results.case("damaged")


@pytest.mark.chaos
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_when_nothing_verifies_it_begins_anew_and_says_so(victim, where):
    run, stored, undisturbed = victim(where)
    committed = in_order(run.committed())
    for name in committed:
        flip("state.json")(stored, f"checkpoints/{name}/")
    attempt = run.begin()
    assert attempt.wait() == 0, attempt.told()
    assert not attempt.named("resumed")
    assert [event["checkpoint"] for event in attempt.named("checkpoint_passed_over")] == committed[::-1]
    run.same_result(undisturbed, attempt)


@pytest.mark.chaos
def test_planted_secrets_are_in_no_log_report_manifest_or_outcome(victim, tmp_path):
    """Through a way to the store that fails and names its proxy, a bug with its traceback, and a run to its end."""
    run, _, undisturbed = victim("s3")
    dead_proxy = "http://operator:a-proxy-password@127.0.0.1:9"
    secrets = [*PLANTED.values(), "a-proxy-password", run.place.environment["AWS_SECRET_ACCESS_KEY"]]
    ended = []
    for how in ({"HTTP_PROXY": dead_proxy, "http_proxy": dead_proxy}, {"JOB_CRASH_AT": "step.middle=error"}, {}):
        attempt = run.begin(**PLANTED, **how)
        ended.append(attempt.wait())
    assert ended == [69, 70, 0], attempt.told()
    run.same_result(undisturbed, attempt)
    looked_at = [path for top in (tmp_path, run.stored) for path in top.rglob("*") if path.is_file()]
    assert {"stdout", "stderr", "outcome.json", "MANIFEST.json", "report.json", "run.json", "02-end.json"} <= {
        path.name for path in looked_at
    }
    found = {(str(path), secret) for path in looked_at for secret in secrets if secret.encode() in path.read_bytes()}
    assert not found
