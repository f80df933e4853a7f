"""From URIs with globs and prefixes to the objects that they name."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from job.core.errors import DataError, NotFoundError, StopRequestedError, UsageError
from job.edge.store.globs import has_glob, literal_prefix, matcher, wild_parts
from job.edge.store.lanes import Lanes
from job.edge.store.objects import ObjectStore, StoredObject, StoreSettings, check_key
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
    "/". As in a shell, wildcards and prefixes leave out names that begin with a dot. A file or folder that has the very
    name, `notes [1].jsonl`, is what is meant, and no glob.

    Raises:
        NotFoundError: a URI matches nothing.
        DataError: a name is no text.
    """
    stores: dict[str, ObjectStore] = {}

    def opened(root: str) -> ObjectStore:
        if root not in stores:
            stores[root] = open_store(root, settings, patience=patience)
        return stores[root]

    names: set[str] = set()
    for uri in uris:
        names.update(_names(uri, opened, should_stop))
    _refuse_unwritable(names)

    wanted = [store_and_key(name) for name in sorted(names)]
    for root, _ in wanted:
        opened(root)
    with Lanes("looking at the data's objects", should_stop) as lanes:
        return [*lanes.in_order(partial(stores[root].stat, key, cancelled=lanes.cancelled) for root, key in wanted)]


def _refuse_unwritable(names: Iterable[str]) -> None:
    """A file's name may be any bytes, but records and reports are JSON."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name!a}: the name is not UTF-8; give the file another one") from error


def may_name(uris: Sequence[str]) -> Callable[[str], bool]:
    """Whether a full URI is one that `expand` could find for these: nothing is asked of a store.

    For names that were written down earlier, in a place that others can write to.
    """
    exact, patterns = set(), []
    for full in map(full_uri, uris):
        if has_glob(full) or full.endswith("/"):
            patterns.append(matcher(full, perhaps=True))
        else:
            exact.add(full)

    def may(name: str) -> bool:
        try:
            check_key(store_and_key(name)[1])
            if full_uri(name) != name:  # `..` in it would be followed
                return False
        except UsageError:
            return False
        return name in exact or any(matches(name) for matches in patterns)

    return may


def _names(uri: str, opened: Callable[[str], ObjectStore], should_stop: Callable[[], bool]) -> Iterator[str]:
    """The full URIs of the objects that one URI matches."""
    full = full_uri(uri)
    if not has_glob(full) and not full.endswith("/"):
        yield full
        return
    literal = _existing(full, opened)
    if not full.endswith("/") and literal == set(wild_parts(full)) and "**" not in full.split("/"):
        yield full
        return
    matches = matcher(full, literal=literal)
    start = locate(literal_prefix(full, literal=literal))
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


def _existing(full: str, opened: Callable[[str], ObjectStore]) -> set[int]:
    """The components with wildcards that are the very name of something."""
    parts, literal = full.split("/"), set[int]()
    for number in wild_parts(full):
        if "**" in parts[:number] or any(place not in literal for place in wild_parts("/".join(parts[:number]))):
            break  # below a folder that is not known
        place = locate("/".join(parts[: number + 1]))
        found = opened(place.root).list(place.key)
        if any(entry.key == place.key or entry.key.startswith(f"{place.key}/") for entry in found):
            literal.add(number)
    return literal
