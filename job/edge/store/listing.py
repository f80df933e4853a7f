"""TODO job.edge.store.listing."""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from job.core.errors import NotFoundError, StopRequestedError
from job.edge.store.globs import has_glob, literal_prefix, matcher
from job.edge.store.lanes import Lanes
from job.edge.store.objects import (
    ObjectStore,
    StoredObject,
    StoreSettings,
)
from job.edge.store.opening import _DEFAULT_PATIENCE, _bucket_and_path, open_store, store_and_key
from job.edge.store.patience import Patience


def expand(
    uris: Sequence[str],
    settings: StoreSettings,
    *,
    should_stop: Callable[[], bool],
    patience: Patience = _DEFAULT_PATIENCE,
) -> list[StoredObject]:
    """The objects that URIs name, sorted and without duplicates.

    A URI is one object, a glob (`*`, `?`, `[...]`, and `**` for any depth), or everything below a prefix that ends in
    "/". As in a shell, wildcards and prefixes leave out names that begin with a dot.

    Raises:
        NotFoundError: a URI matches nothing.
    """
    stores: dict[str, ObjectStore] = {}

    def opened(root: str) -> ObjectStore:
        if root not in stores:
            stores[root] = open_store(root, settings, patience=patience)
        return stores[root]

    names: set[str] = set()
    for uri in uris:
        names.update(_names(uri, opened, should_stop))

    wanted = [store_and_key(name) for name in sorted(names)]
    for root, _ in wanted:
        opened(root)
    with Lanes("looking at the data's objects", should_stop) as lanes:
        return [*lanes.in_order(partial(stores[root].stat, key, cancelled=lanes.cancelled) for root, key in wanted)]


def _names(uri: str, opened: Callable[[str], ObjectStore], should_stop: Callable[[], bool]) -> Iterator[str]:
    """The full URIs of the objects that one URI matches."""
    bucket, path = _bucket_and_path(uri)
    if not has_glob(path) and path and not path.endswith("/"):
        yield uri if bucket is not None else f"file://{path}"
        return
    matches = matcher(path)
    start = literal_prefix(path)
    root = f"s3://{bucket}" if bucket is not None else f"file://{posixpath.dirname(start)}"
    inside = start if bucket is not None else posixpath.basename(start)
    found = False
    for entry in opened(root).list(inside):
        if should_stop():
            raise StopRequestedError(f"stopped on request while listing {uri}")
        full = entry.key if bucket is not None else posixpath.join(posixpath.dirname(start), entry.key)
        if matches(full):
            found = True
            yield f"s3://{bucket}/{full}" if bucket is not None else f"file://{full}"
    if not found:
        raise NotFoundError(f"{uri}: matches no object; correct the URI, or put the data there")
