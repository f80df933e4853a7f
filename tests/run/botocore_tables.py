"""Botocore's tables of a service, read once a process instead of once a client: a fifth of a second each."""

import functools


def read_once() -> None:
    from botocore.loaders import JSONFileLoader

    read = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda _self, path: read(path)
