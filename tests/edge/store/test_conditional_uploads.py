"""A large file on a condition: right also on stores that keep conditions only on single requests."""

import os

import pytest
from faults import NO_FAULT, Fault
from store_contract import QUICK, SETTINGS, never

from job.edge.store.objects import PreconditionError
from job.edge.store.opening import open_store

MIB = 1024 * 1024


@pytest.fixture
def send(faulty_place, tmp_path):
    store = open_store(faulty_place.root, SETTINGS, patience=QUICK, part_bytes=faulty_place.part_bytes)

    def send(content, **condition):
        (tmp_path / "out").write_bytes(content)
        sent = store.upload(tmp_path / "out", "adapter", should_stop=never, **condition)
        store.download("adapter", tmp_path / "in", sha256=sent.sha256, should_stop=never)
        return store.stat("adapter").etag

    return send


def test_a_store_that_forgets_conditions_of_parts_is_not_asked_for_them(send, proxy):
    first, second = os.urandom(6 * MIB), os.urandom(6 * MIB)
    etag = send(first, create_only=True)

    with pytest.raises(PreconditionError):
        send(second, create_only=True)
    send(second, if_match=etag)
    with pytest.raises(PreconditionError):
        send(first, if_match=etag)
    assert proxy.times("POST") == 0


def test_without_a_condition_it_goes_in_parts(send, proxy):
    send(os.urandom(6 * MIB))
    assert proxy.times("PUT", "partNumber=") == 2


@pytest.mark.parametrize("size", [7, 6 * MIB])
def test_a_store_that_compares_etags_letter_by_letter_still_swaps(send, proxy, size):
    etag = send(os.urandom(size))
    proxy.rule = lambda request: (
        Fault(status=412, code="PreconditionFailed")
        if request.method == "PUT" and request.headers.get("if-match", "").startswith('"')
        else NO_FAULT
    )
    send(os.urandom(size), if_match=etag)
    with pytest.raises(PreconditionError):
        send(os.urandom(size), if_match=etag)


def test_after_a_failure_it_is_sent_again_from_its_start(send, proxy):
    failures = [Fault(status=503, code="SlowDown")]
    proxy.rule = lambda request: failures.pop() if failures and request.method == "PUT" else NO_FAULT
    send(os.urandom(6 * MIB), create_only=True)
    assert proxy.times("PUT") == 2
