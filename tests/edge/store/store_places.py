"""Stores for these tests: opened without patience, prepared from behind, and served with faults."""

from faults import NO_FAULT
from store_contract import QUICK, SETTINGS

from job.edge.store.opening import open_store

MIB = 1024 * 1024


def opened(place, *, settings=SETTINGS, patience=QUICK, part_bytes=5 * MIB):
    return open_store(place.root, settings, patience=patience, part_bytes=part_bytes)


def put_behind(place, key, data):
    place.server.client().put_object(Bucket=place.bucket, Key=f"some where/runs/{key}", Body=data)


def first(faults, *, method, part=""):
    """A rule: the first requests of a method get these faults, one each."""
    waiting = list(faults)

    def rule(request):
        return waiting.pop(0) if waiting and request.method == method and part in request.path else NO_FAULT

    return rule
