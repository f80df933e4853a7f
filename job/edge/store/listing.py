"""From URIs with globs and prefixes to the objects that they name."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from job.core.errors import NotFoundError, StopRequestedError
from job.edge.store.globs import has_glob, literal_prefix, matcher
from job.edge.store.lanes import Lanes
from job.edge.store.objects import ObjectStore, StoredObject, StoreSettings
from job.edge.store.opening import full_uri, locate, open_store, store_and_key
from job.edge.store.patience import STORE_PATIENCE, Patience


def expand(
    uris: Sequence[str],
    settings: StoreSettings,
    *,
    should_stop: Callable[[], bool],
    patience: Patience = STORE_PATIENCE,
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
    full = full_uri(uri)
    if not has_glob(full) and not full.endswith("/"):
        yield full
        return
    matches = matcher(full)
    start = locate(literal_prefix(full))
    found = False
    for entry in opened(start.root).list(start.key):
        if should_stop():
            raise StopRequestedError(f"stopped on request while listing {uri}")
        name = start.uri_of(entry.key)
        if matches(name):
            found = True
            yield name
    if not found:
        raise NotFoundError(f"{uri}: matches no object; correct the URI, or put the data there")
