"""What a bucket's owner forbids, limits or versions, and what a store answers late or wrong: said, and never dear."""

import re
import signal
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from chaos_runs import Place, Run, in_order
from faults import NO_FAULT, Fault
from test_damaged import Stored

from job.core.errors import LocalDiskError, SickDeviceError

DENIED = Fault(status=403, code="AccessDenied")
LAG_SECONDS = 8.0
_CONTENTS = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_MODIFIED = re.compile(rb"<LastModified>(.*?)</LastModified>")


def skewed(**difference):
    """From a store whose clock is so much ahead of ours."""
    date = format_datetime(datetime.now(UTC) + timedelta(**difference), usegmt=True)
    return Fault(status=403, code="RequestTimeTooSkewed", headers={"Date": date})


def writes(name, fault):
    """A rule: whatever is written under this name meets a fault."""
    return lambda request: fault if request.method == "PUT" and name in request.path else NO_FAULT


class FirstOnes:
    """A rule: so many requests of a kind meet a fault, from the n-th of them on."""

    def __init__(self, faults, *, wanted, after=0):
        self._faults, self._wanted, self._after = [*faults], wanted, after

    def __call__(self, request):
        if not self._wanted(request):
            return NO_FAULT
        self._after -= 1
        return self._faults.pop() if self._after < 0 and self._faults else NO_FAULT


def is_list(request):
    return request.method == "GET" and "list-type=2" in request.path


def is_delete(request):
    return request.method == "POST" and "delete" in request.path


def lagging(request):
    """A listing shows nothing that is younger than eight seconds."""
    if not is_list(request):
        return NO_FAULT
    until = time.time() - LAG_SECONDS

    def shown(found):
        modified = datetime.fromisoformat(_MODIFIED.search(found[0])[1].decode())
        return found[0] if modified.timestamp() <= until else b""

    return Fault(rewrite=lambda body: _CONTENTS.sub(shown, body))


def without(field):
    return Fault(rewrite=lambda body: re.sub(rf"<{field}>.*?</{field}>".encode(), b"", body))


def sometimes(*faults):
    return lambda: FirstOnes(faults, wanted=lambda request: not is_delete(request), after=40)


NOTED = {
    "pictures": (lambda: writes(".png", DENIED), r"not written: loss\.png \(.*AccessDenied"),
    "the page": (lambda: writes("/report.html", DENIED), r"not written: report\.html \(.*AccessDenied"),
    "the examples": (
        lambda: writes("/examples.jsonl", DENIED),
        r"not written: examples\.jsonl \(.*AccessDenied",
    ),
    "the card": (lambda: writes("/README.md", DENIED), r"not written: adapter/README\.md \(.*AccessDenied"),
    "no room for pictures": (lambda: writes(".png", FULL["507"]), r"not written: loss\.png \(.*no room"),
    "deleting, later": (
        lambda: FirstOnes([DENIED] * 99, wanted=is_delete, after=2),
        r"old checkpoints stay in the store: .*AccessDenied",
    ),
}
"""What is denied, and the report's note on it."""
UNNOTED = {
    "the hint": lambda: writes("/latest.json", DENIED),
    "a list that lags behind": lambda: lagging,
    "a clock that is set meanwhile": sometimes(*[skewed(minutes=20)] * 3),
    "a redirect to nowhere that passes": sometimes(*[Fault(status=307, code="TemporaryRedirect")] * 4),
    "a page instead of answers": sometimes(*[Fault(status=200, body="<html/>")] * 3),
    "a list without sizes": lambda: FirstOnes([without("Size")] * 3, wanted=is_list, after=2),
    "a list without ETags": lambda: FirstOnes([without("ETag")] * 3, wanted=is_list, after=2),
}
"""What passes, or costs nothing."""
FULL = {
    "507": Fault(status=507, code="InsufficientStorage"),
    "403 QuotaExceeded": Fault(status=403, code="QuotaExceeded"),
}
IN_SHORT = ("pictures", "a list that lags behind")


def in_short(cases):
    return [pytest.param(case, marks=() if case in IN_SHORT else pytest.mark.chaos) for case in cases]


@pytest.mark.parametrize("case", in_short(NOTED))
def test_what_is_denied_and_not_needed_costs_a_note_and_never_the_report(proxied, undisturbed, case, results):
    run, proxy = proxied
    rule, note = NOTED[case]
    proxy.rule = rule()
    run.carried_on(undisturbed[0])
    noted = [text for text in run.read_json("report.json")["notes"] if re.search(note, text)]
    assert len(noted) == 1, run.read_json("report.json")["notes"]
    results.case("policies")


@pytest.mark.parametrize("case", in_short(UNNOTED))
def test_what_passes_or_lags_changes_nothing(proxied, undisturbed, case, results):
    """Killed in between: what it knew itself is to be found anew by the next attempt."""
    run, proxy = proxied
    proxy.rule = UNNOTED[case]()
    assert run.begin("--crash-at", "checkpoint.after_latest:4").wait() == -signal.SIGKILL
    attempt = run.carried_on(undisturbed[0])
    assert attempt.named("resumed")
    results.case("policies")


@pytest.mark.chaos
@pytest.mark.parametrize("case", FULL)
def test_a_store_without_room_ends_with_74_and_goes_on_once_it_has_some(proxied, undisturbed, case, results):
    run, proxy = proxied
    full = writes("/checkpoints/", FULL[case])
    proxy.rule = FirstOnes([FULL[case]] * 999, wanted=lambda request: full(request) is not NO_FAULT, after=9)
    attempt = run.begin()
    assert attempt.wait() == LocalDiskError.code, attempt.told()
    assert "the store has no room" in attempt.outcome["reason"]
    assert attempt.outcome["again"] == "yes, counted"
    assert "quota" in attempt.outcome["action"]
    proxy.rule = lambda _: NO_FAULT
    assert run.carried_on(undisturbed[0]).named("resumed")
    results.case("policies")


@pytest.mark.chaos
def test_a_clock_that_stays_wrong_is_a_machine_to_be_looked_at(proxied, undisturbed, results):
    run, proxy = proxied
    proxy.rule = lambda _: skewed(minutes=20)
    attempt = run.begin(CHAOS_IMPATIENT="1")
    assert attempt.wait() == SickDeviceError.code, attempt.told()
    assert re.search(r"this machine's clock is 1,\d{3} s behind the store's", attempt.outcome["reason"])
    assert attempt.outcome["again"] == "yes, elsewhere, counted"
    proxy.rule = lambda _: NO_FAULT
    run.carried_on(undisturbed[0])
    results.case("policies")


# --- the newest checkpoint, deleted while it is resumed


@pytest.mark.chaos
@pytest.mark.parametrize("where", ["folder", "s3"])
@pytest.mark.parametrize("read", range(1, 6))
def test_the_newest_deleted_while_it_is_resumed_is_passed_over(request, tmp_path, warm, where, read, results):
    place, recipe, reference = (
        request.getfixturevalue(name)
        for name in (
            ("folder_place", "folder_recipe", "undisturbed_in_a_folder")
            if where == "folder"
            else ("s3_place", "s3_recipe", "undisturbed")
        )
    )
    run = Run(tmp_path / "run", place.below(tmp_path.name), recipe, warm)
    assert run.begin("--crash-at", "checkpoint.after_latest:4").wait() == -signal.SIGKILL
    *_, before, newest = in_order(run.committed())
    attempt = run.begin("--crash-at", f"resume.middle:{read}=freeze")
    assert attempt.until_frozen(), attempt.told()
    stored = Stored(run.place, request.getfixturevalue("server") if where == "s3" else None)
    for name in run.begun()[newest]:
        stored.delete(f"checkpoints/{newest}/{name}")
    attempt.send(signal.SIGCONT)
    assert attempt.wait() == 0, attempt.told()
    (resumed,) = attempt.named("resumed")
    (passed_over,) = run.read_json("report.json")["attempts"][-1]["passed_over"]
    assert (resumed["checkpoint"], passed_over["checkpoint"]) == (before, newest)
    run.same_result(reference[0], attempt)
    results.case("deleted while resumed")


# --- a bucket that keeps versions


@pytest.fixture(scope="session")
def versioned_place(server, s3_place):
    """With the data in it, each file of it written twice."""
    client = server.at.client()
    client.create_bucket(Bucket="versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    for found in (
        client.list_objects_v2(Bucket="chaos", Prefix="base/")["Contents"]
        + (client.list_objects_v2(Bucket="chaos", Prefix="data/")["Contents"])
    ):
        for body in (b"older", client.get_object(Bucket="chaos", Key=found["Key"])["Body"].read()):
            client.put_object(Bucket="versioned", Key=found["Key"], Body=body)
    return Place(uri="s3://versioned", folder=server.bucket("versioned"), environment=s3_place.environment)


@pytest.mark.chaos
@pytest.mark.parametrize(
    "point", ["checkpoint.before_manifest:3", "retain.after_manifest:2", "adapter.after_file", "report.before"]
)
def test_in_a_bucket_with_versions_a_run_is_killed_resumed_and_done_as_in_any_other(
    tmp_path, versioned_place, s3_recipe, server, warm, undisturbed, point, results
):
    recipe = {
        **s3_recipe,
        "data": {
            **s3_recipe["data"],
            "train": "s3://versioned/data/train*.jsonl",
            "validation": "s3://versioned/data/validation.jsonl",
        },
    }
    run = Run(tmp_path / "run", versioned_place.below(tmp_path.name), recipe, warm)
    assert run.begin("--crash-at", point).wait() == -signal.SIGKILL
    attempt = run.carried_on(undisturbed[0])
    assert attempt.named("resumed")
    (train,) = run.read_json("run.json")["data"]["train"]
    assert train["version"]
    again = run.begin()
    assert again.wait() == 0
    assert again.named("already_done"), again.told()
    prefix = f"{run.place.uri.removeprefix('s3://versioned/')}/runs/"
    kept = server.at.client().list_object_versions(Bucket="versioned", Prefix=prefix)
    assert kept.get("DeleteMarkers"), "nothing was deleted"
    results.case("policies")
