"""A probe finds out what a store lacks; that it finds nothing on a good one is part of the stores' contract."""

import os
import time

import pytest
from faults import NO_FAULT, Fault
from store_contract import SETTINGS
from store_places import opened

from job.core.errors import DeniedError
from job.edge.store.opening import open_store
from job.edge.store.probing import probe


def test_a_probe_tells_of_conditions_that_are_refused(faulty_place, proxy):
    def rule(request):
        conditional = {"if-none-match", "if-match"} & set(request.headers)
        return Fault(status=501, code="NotImplemented") if request.method == "PUT" and conditional else NO_FAULT

    proxy.rule = rule
    found = probe(opened(faulty_place))
    assert not found.conditional
    assert "NotImplemented" in found.reason


def test_where_deleting_is_denied_a_probe_says_it_once_and_leaves_one_object_however_often_it_tries(
    faulty_place, proxy
):
    proxy.rule = lambda request: Fault(status=403, code="AccessDenied") if request.method == "POST" else NO_FAULT
    for _ in range(3):
        with pytest.raises(DeniedError) as refused:
            probe(opened(faulty_place))
    assert str(refused.value).count("AccessDenied") == str(refused.value).count("allow") == 1
    assert str(refused.value).endswith("without deleting, old checkpoints would stay for ever")
    assert [entry.key for entry in opened(faulty_place).list()] == [".probe"]


def test_a_probe_removes_what_probes_that_were_killed_have_left(tmp_path):
    store = open_store(f"file://{tmp_path}", SETTINGS)
    for name, age_hours in ((".probe-old", 48), (".probe-under-way", 1)):
        store.write(name, b"1")
        written = time.time() - age_hours * 3600
        os.utime(tmp_path / name, (written, written))
    assert probe(store).conditional
    assert [entry.key for entry in store.list()] == [".probe-under-way"]
