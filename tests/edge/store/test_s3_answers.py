"""Answers that no S3 store gives, redirects without an end, clocks that differ: errors of ours, with a sentence."""

import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from faults import NO_FAULT, Fault
from store_contract import QUICK, never
from store_places import MIB, first, opened, put_behind

from job.core.errors import SickDeviceError, UnavailableError, UsageError, ending
from job.edge.store.patience import Patience

CALLS = {
    "stat": lambda store: store.stat("k"),
    "read": lambda store: store.read("k"),
    "write": lambda store: store.write("k", b""),
    "list": lambda store: [*store.list()],
    "delete": lambda store: store.delete(["k"]),
}


@pytest.mark.parametrize("status", [301, 302, 307])
@pytest.mark.parametrize("call", CALLS)
def test_a_redirect_that_names_no_region_is_an_unavailable_store(faulty_place, proxy, status, call):
    """botocore asks for the bucket's region, is redirected, asks for the region, and so on."""
    proxy.rule = lambda _: Fault(status=status, code="PermanentRedirect" if status == 301 else "")
    with pytest.raises(UnavailableError, match=f"{status} .*a redirect that names no region; look at the endpoint"):
        CALLS[call](opened(faulty_place))
    assert len(proxy.seen) <= 3 * QUICK.attempts


def test_a_redirect_to_a_region_that_redirects_again_is_told_to_set_the_region(faulty_place, proxy):
    fault = Fault(status=301, code="PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-1"})
    proxy.rule = lambda _: fault
    with pytest.raises(UsageError, match="AWS_REGION"):
        opened(faulty_place).read("k")


@pytest.mark.parametrize("field", ["Size", "ETag", "LastModified", "IsTruncated"])
def test_a_list_without_what_belongs_to_it_is_an_unavailable_store(faulty_place, proxy, field):
    put_behind(faulty_place, "k", b"x")
    without = re.compile(rf"<{field}>.*?</{field}>".encode())
    proxy.rule = lambda _: Fault(rewrite=lambda body: without.sub(b"", body))
    with pytest.raises(UnavailableError, match=f"an answer without {field}, as no S3 store gives it"):
        list(opened(faulty_place).list())


@pytest.mark.parametrize(("field", "value"), [("Size", b"many"), ("LastModified", b"yesterday"), ("Contents", b"")])
def test_a_list_that_cannot_be_read_is_an_unavailable_store(faulty_place, proxy, field, value):
    put_behind(faulty_place, "k", b"x")
    given = re.compile(rf"(?<=<{field}>).*?(?=</{field}>)".encode())
    proxy.rule = lambda _: Fault(rewrite=lambda body: given.sub(value, body))
    with pytest.raises(UnavailableError, match="a list that cannot be read"):
        list(opened(faulty_place).list())


def test_a_list_that_goes_on_and_does_not_say_where_is_not_taken_for_the_whole(faulty_place, proxy):
    put_behind(faulty_place, "k", b"x")
    proxy.rule = lambda _: Fault(rewrite=lambda body: re.sub(rb"(?i)<IsTruncated>false", b"<IsTruncated>true", body))
    with pytest.raises(UnavailableError, match="an answer without NextContinuationToken"):
        list(opened(faulty_place).list())


@pytest.mark.parametrize(("call", "field"), [("stat", "ETag"), ("read", "ETag"), ("write", "ETag")])
def test_an_answer_that_is_none_of_s3_is_an_unavailable_store(faulty_place, proxy, call, field):
    proxy.rule = lambda _: Fault(status=200, body="<html/>")
    with pytest.raises(UnavailableError, match=f"an answer without .*{field}"):
        CALLS[call](opened(faulty_place))


def test_a_part_that_was_taken_without_a_receipt_is_sent_again(faulty_place, proxy, tmp_path):
    (tmp_path / "out").write_bytes(b"x" * 6 * MIB)
    proxy.rule = first([Fault(status=200, body="<x/>")], method="PUT", part="uploadId")
    opened(faulty_place).upload(tmp_path / "out", "k", should_stop=never)
    assert opened(faulty_place).stat("k").size == 6 * MIB


# --- clocks


def skewed(minutes):
    """What a store answers whose clock is ahead of ours by so much."""
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    return Fault(status=403, code="RequestTimeTooSkewed", headers={"Date": date})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("minutes", "where"), [(20, "behind"), (-20, "ahead of")])
def test_a_clock_that_differs_is_a_machine_to_be_looked_at(faulty_place, proxy, call, minutes, where):
    proxy.rule = lambda _: skewed(minutes)
    with pytest.raises(SickDeviceError, match=rf"RequestTimeTooSkewed.* clock is 1,(19|20)\d s {where} the store's"):
        CALLS[call](opened(faulty_place))
    assert "elsewhere" in ending(SickDeviceError.code).again.value


def test_a_clock_that_is_set_meanwhile_costs_nothing(faulty_place, proxy):
    proxy.rule = first([skewed(20)] * 3, method="PUT")
    assert opened(faulty_place).write("k", b"x") == opened(faulty_place).read("k")[1]


# --- a process that was frozen


@pytest.fixture
def frozen_in_a_request(monkeypatch):
    """The clock of the bucket jumps by ten minutes with each request that fails."""
    from job.edge.store.s3 import bucket as s3_bucket

    jumped = [0.0]
    real = s3_bucket.time.monotonic

    class Clock:
        monotonic = staticmethod(lambda: real() + jumped[0])

    monkeypatch.setattr(s3_bucket, "time", Clock)
    return jumped


def test_a_request_in_which_the_process_was_frozen_is_asked_again(faulty_place, proxy, frozen_in_a_request):
    """The connection is dead by then, and the minutes were none of the store's."""

    def rule(request):
        if request.method != "PUT" or frozen_in_a_request[0]:
            return NO_FAULT
        frozen_in_a_request[0] = 600.0
        return Fault(status=500)

    proxy.rule = rule
    opened(faulty_place, patience=Patience(first_pause_seconds=0.01)).write("k", b"x")
    assert proxy.times("PUT") == 2
