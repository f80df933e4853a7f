"""A probe finds out what a store lacks; that it finds nothing on a good one is part of the stores' contract."""

from faults import NO_FAULT, Fault
from store_places import first, opened

from job.edge.store.probing import probe


def test_a_probe_tells_of_conditions_that_are_refused(faulty_place, proxy):
    def rule(request):
        conditional = {"if-none-match", "if-match"} & set(request.headers)
        return Fault(status=501, code="NotImplemented") if request.method == "PUT" and conditional else NO_FAULT

    proxy.rule = rule
    found = probe(opened(faulty_place))
    assert not found.conditional
    assert "NotImplemented" in found.reason
    assert found.deletes


def test_a_probe_tells_that_deleting_is_denied(faulty_place, proxy):
    proxy.rule = first([Fault(status=403, code="AccessDenied")], method="POST", part="delete")
    found = probe(opened(faulty_place))
    assert (found.conditional, found.deletes) == (True, False)
    assert "AccessDenied" in found.reason
