"""URIs with globs and prefixes name the objects that they would name in a shell, on S3 and in a folder."""

import contextlib
from http.client import HTTPConnection
from urllib.parse import quote, urlsplit

from store_contract import SETTINGS, never
from store_places import opened, put_behind

from job.edge.store.listing import expand
from job.edge.store.opening import open_store


def test_a_bare_path_is_a_store_and_a_data_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_store("data", SETTINGS).write("1.jsonl", b"{}")

    assert [one.uri for one in expand(["data/*.jsonl"], SETTINGS, should_stop=never)] == [
        f"file://{tmp_path}/data/1.jsonl"
    ]


def test_a_listing_goes_on_beyond_a_thousand_keys(moto_place):
    store = opened(moto_place)
    keys = [f"many/{number:04d}.jsonl" for number in range(1005)]
    # Without boto3, which takes longer over these than the server does.
    with contextlib.closing(HTTPConnection(urlsplit(moto_place.server.endpoint).netloc)) as connection:
        for key in keys:
            connection.request("PUT", f"/{moto_place.bucket}/{quote(f'some where/runs/{key}')}")
            with connection.getresponse() as answer:
                answer.read()

    assert [entry.key for entry in store.list("many/")] == keys
    assert len(expand([f"{store.uri}/many/*[0-4].jsonl"], SETTINGS, should_stop=never)) == 505
    store.delete(keys)
    assert list(store.list()) == []


def test_markers_of_empty_folders_are_no_objects(moto_place):
    put_behind(moto_place, "data/", b"")
    put_behind(moto_place, "data/1", b"x")

    assert [entry.key for entry in opened(moto_place).list()] == ["data/1"]
