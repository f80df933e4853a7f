"""URIs with globs and prefixes name the objects that they would name in a shell, on S3 and in a folder."""

import contextlib
from http.client import HTTPConnection
from urllib.parse import quote, urlsplit

import pytest
from store_contract import SETTINGS, never
from store_places import opened, put_behind

from job.edge.store.listing import expand, may_name
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


FILES = [
    "a [1].jsonl",
    "a 1.jsonl",
    "v/train.jsonl",
    "my data [v] 100%/train.jsonl",
    "my data [v] 100%/more.jsonl",
    "why?/x.jsonl",
    "whys/x.jsonl",
]


@pytest.mark.parametrize(
    ("uri", "names"),
    [
        ("a [1].jsonl", ["a [1].jsonl"]),
        ("a [12].jsonl", ["a 1.jsonl"]),
        ("my data [v] 100%/train.jsonl", ["my data [v] 100%/train.jsonl"]),
        ("my data [v] 100%/*.jsonl", ["my data [v] 100%/more.jsonl", "my data [v] 100%/train.jsonl"]),
        ("my data [v] 100%/", ["my data [v] 100%/more.jsonl", "my data [v] 100%/train.jsonl"]),
        ("my*/train.jsonl", ["my data [v] 100%/train.jsonl"]),
        ("why?/x.jsonl", ["why?/x.jsonl"]),
        ("wh*/x.jsonl", ["why?/x.jsonl", "whys/x.jsonl"]),
        ("[v]/train.jsonl", ["v/train.jsonl"]),
    ],
)
@pytest.mark.parametrize("place", ["folder", "moto"])
def test_what_has_the_very_name_is_meant_and_no_glob(tmp_path, request, place, uri, names):
    store = open_store(str(tmp_path), SETTINGS) if place == "folder" else opened(request.getfixturevalue("moto_place"))
    for name in FILES:
        store.write(name, b"{}")

    found = [one.uri for one in expand([f"{store.uri}/{uri}"], SETTINGS, should_stop=never)]
    assert found == [f"{store.uri}/{name}" for name in names]
    assert all(map(may_name([f"{store.uri}/{uri}"]), found))
    assert not may_name([f"{store.uri}/{uri}"])(f"{store.uri}/other/train.jsonl")
