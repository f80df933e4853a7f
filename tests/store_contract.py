"""What every store keeps: each kind of store runs the same claims. The class asks for a fixture `place`."""

import hashlib
import os
import threading

import pytest

from job.core.errors import DataError, NotFoundError, StopRequestedError, UsageError
from job.edge.store.listing import expand
from job.edge.store.objects import PreconditionError, StoreSettings
from job.edge.store.opening import open_store, store_and_key
from job.edge.store.patience import Patience
from job.edge.store.probing import probe

SETTINGS = StoreSettings()
QUICK = Patience(attempts=4, first_pause_seconds=0.01, longest_pause_seconds=0.05)
KEYS = ["a.txt", "a/b.txt", "dir with space/ü+ß=1&2%20#.jsonl", "日本/語.bin"]


def never() -> bool:
    return False


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def left_behind(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


class PlainStoreContract:
    """What also a store without conditional writes keeps; `store` stands below a root that does not exist yet."""

    @pytest.fixture
    def store(self, place):
        return open_store(place.root, SETTINGS, patience=QUICK, part_bytes=place.part_bytes)

    @pytest.mark.parametrize("size", [0, 5 * 1024 * 1024, 11 * 1024 * 1024 + 7])
    def test_a_file_comes_back_as_it_was_sent(self, store, tmp_path, size):
        data = os.urandom(size)
        (tmp_path / "out").write_bytes(data)

        sent = store.upload(tmp_path / "out", "x/file.bin", should_stop=never)
        seen = []
        got = store.download(
            "x/file.bin",
            tmp_path / "new/in",
            etag=store.stat("x/file.bin").etag,
            sha256=sent.sha256,
            should_stop=never,
            on_progress=lambda done, total: seen.append((done, total)),
        )

        assert (tmp_path / "new/in").read_bytes() == data
        assert sent.sha256 == got.sha256 == sha(data)
        assert sent.size == got.size == store.stat("x/file.bin").size == size
        assert seen == sorted(seen)
        assert not seen or seen[-1] == (size, size)
        assert left_behind(tmp_path / "new") == ["in"]

    def test_small_objects_are_read_with_the_etag_that_stat_tells(self, store):
        etag = store.write("c/lock.json", b"{}")

        assert store.read("c/lock.json") == (b"{}", etag)
        assert store.stat("c/lock.json").etag == etag
        assert '"' not in etag

    def test_reading_more_than_expected_is_refused(self, store):
        store.write("big", b"x" * 11)

        assert store.read("big", max_bytes=11)[0] == b"x" * 11
        with pytest.raises(DataError, match="larger than the 10 bytes"):
            store.read("big", max_bytes=10)

    def test_a_part_of_an_object_is_read_alone(self, store):
        etag = store.write("large", b"0123456789")

        assert store.read_part("large", start=0, length=10, etag=etag) == b"0123456789"
        assert store.read_part("large", start=3, length=4, etag=etag) == b"3456"
        assert store.read_part("large", start=9, length=1, etag=etag) == b"9"
        with pytest.raises(NotFoundError):
            store.read_part("nothing", start=0, length=1, etag=etag)

    def test_keys_keep_their_spaces_signs_and_letters(self, store):
        for key in KEYS:
            store.write(key, key.encode())

        assert [entry.key for entry in store.list()] == sorted(KEYS)
        for key in KEYS:
            assert store.read(key)[0] == key.encode()
        assert [one.uri for one in expand([f"{store.uri}/"], SETTINGS, should_stop=never)] == [
            f"{store.uri}/{key}" for key in sorted(KEYS)
        ]
        root, name = store_and_key(store.stat(KEYS[2]).uri)
        assert open_store(root, SETTINGS).read(name)[0] == KEYS[2].encode()
        store.delete(KEYS)
        assert list(store.list()) == []

    def test_a_listing_is_by_string_prefix_with_sizes(self, store):
        for key in ("ab/1", "ab/22", "abc", "b"):
            store.write(key, key.encode())

        assert [(entry.key, entry.size) for entry in store.list("ab")] == [("ab/1", 4), ("ab/22", 5), ("abc", 3)]
        assert [entry.key for entry in store.list("ab/2")] == ["ab/22"]
        assert list(store.list("nothing/here")) == []

    def test_a_listing_without_a_folder_and_one_of_folders(self, store):
        for key in ("r/a/big/1", "r/a/big/2", "r/a/x", "r/ab/big/1/y", "r/b/bigger/1", "r/b/z", "r/plain"):
            store.write(key, b"")

        assert [entry.key for entry in store.list("r/", without="big")] == ["r/a/x", "r/b/bigger/1", "r/b/z", "r/plain"]
        assert [entry.key for entry in store.list("r/b", without="big")] == ["r/b/bigger/1", "r/b/z"]
        assert sorted(store.folders("r/")) == ["a", "ab", "b"]
        assert sorted(store.folders("r/a")) == ["a", "ab"]
        assert list(store.folders("nothing/")) == []

    def test_what_is_missing_is_not_found(self, store, place, tmp_path):
        store.write("present", b"")
        with pytest.raises(NotFoundError, match="absent"):
            store.stat("absent")
        with pytest.raises(NotFoundError, match="absent"):
            store.read("absent")
        with pytest.raises(NotFoundError, match="absent"):
            store.download("absent", tmp_path / "in", should_stop=never)
        assert left_behind(tmp_path) == []
        store.delete(["absent", "present"])

    def test_a_create_only_write_never_replaces(self, store):
        store.write("lock", b"first", create_only=True)

        with pytest.raises(PreconditionError):
            store.write("lock", b"second", create_only=True)
        assert store.read("lock")[0] == b"first"

    def test_an_object_with_another_etag_is_refused(self, store, tmp_path):
        etag = store.write("data", b"old")
        store.write("data", b"new")

        with pytest.raises(DataError, match="chang"):
            store.download("data", tmp_path / "in", etag=etag, should_stop=never)
        assert left_behind(tmp_path) == []

    def test_an_object_with_another_sha256_is_refused(self, store, tmp_path):
        store.write("data", b"damaged")

        with pytest.raises(DataError, match=r"data: sha256 is .* expected " + sha(b"whole")):
            store.download("data", tmp_path / "in", sha256=sha(b"whole"), should_stop=never)
        assert left_behind(tmp_path) == []

    def test_a_stop_leaves_neither_file_nor_object(self, store, place, tmp_path):
        (tmp_path / "out").write_bytes(os.urandom(11 * 1024 * 1024))
        store.upload(tmp_path / "out", "whole", should_stop=never)

        with pytest.raises(StopRequestedError):
            store.upload(tmp_path / "out", "part", should_stop=lambda: True)
        with pytest.raises(StopRequestedError):
            store.download("whole", tmp_path / "in", should_stop=lambda: True)

        assert [entry.key for entry in store.list()] == ["whole"]
        assert left_behind(tmp_path) == ["out"] or place.server is None
        if place.server is not None:
            assert not place.server.client().list_multipart_uploads(Bucket=place.bucket).get("Uploads")

    def test_a_key_cannot_leave_the_root(self, store):
        for key in ("", "/etc/passwd", "../up", "a/../../up", "a/./b", "folder/", "nul\0"):
            with pytest.raises(UsageError, match="is no key"):
                store.write(key, b"x")

    def test_globs_and_prefixes_name_what_a_shell_would(self, store):
        for key in ("t/1.jsonl", "t/2.jsonl", "t/sub/3.jsonl", "t/sub/deep/4.jsonl", "t/.hidden/5.jsonl", "t/x.txt"):
            store.write(key, key.encode())

        def names(*patterns):
            found = expand([f"{store.uri}/{pattern}" for pattern in patterns], SETTINGS, should_stop=never)
            return [one.uri.removeprefix(store.uri + "/") for one in found]

        assert names("t/*.jsonl") == ["t/1.jsonl", "t/2.jsonl"]
        assert names("t/**/*.jsonl") == ["t/1.jsonl", "t/2.jsonl", "t/sub/3.jsonl", "t/sub/deep/4.jsonl"]
        assert names("t/[!1x].jsonl", "t/?.txt", "t/2.jsonl") == ["t/2.jsonl", "t/x.txt"]
        assert names("t/sub/") == ["t/sub/3.jsonl", "t/sub/deep/4.jsonl"]
        assert names("t/.hidden/*") == ["t/.hidden/5.jsonl"]
        assert names("t/.*/*") == ["t/.hidden/5.jsonl"]
        for missing in ("t/*.csv", "nothing/", "t/9.jsonl"):
            with pytest.raises(NotFoundError):
                names(missing)
        with pytest.raises(StopRequestedError):
            expand([f"{store.uri}/t/"], SETTINGS, should_stop=lambda: True)


class StoreContract(PlainStoreContract):
    """And what makes a lock and a swap: conditions hold, and of many at once one wins."""

    def test_of_eight_creators_one_wins(self, store):
        won, start = [], threading.Barrier(8)

        def create(number):
            start.wait()
            try:
                store.write("race", b"%d" % number, create_only=True)
            except PreconditionError:
                return
            won.append(number)

        run_all([threading.Thread(target=create, args=(number,)) for number in range(8)])
        assert len(won) == 1
        assert store.read("race")[0] == b"%d" % won[0]

    def test_if_match_swaps_only_what_was_read(self, store):
        first = store.write("channel", b"1")
        second = store.write("channel", b"2", if_match=first)

        assert store.read("channel") == (b"2", second)
        with pytest.raises(PreconditionError):
            store.write("channel", b"3", if_match=first)
        with pytest.raises(PreconditionError):
            store.write("nothing", b"3", if_match=first)
        assert store.read("channel")[0] == b"2"

    def test_of_eight_swappers_one_wins(self, store):
        etag, won, start = store.write("channel", b"old"), [], threading.Barrier(8)

        def swap(number):
            start.wait()
            try:
                store.write("channel", b"%d" % number, if_match=etag)
            except PreconditionError:
                return
            won.append(number)

        run_all([threading.Thread(target=swap, args=(number,)) for number in range(8)])
        assert len(won) == 1
        assert store.read("channel")[0] == b"%d" % won[0]

    @pytest.mark.parametrize("size", [7, 11 * 1024 * 1024], ids=["small", "in parts"])
    def test_an_upload_on_condition_never_replaces_what_was_not_seen(self, store, tmp_path, size):
        versions = [os.urandom(size) for _ in range(4)]

        def upload(number, **condition):
            (tmp_path / "out").write_bytes(versions[number])
            store.upload(tmp_path / "out", "adapter", should_stop=never, **condition)
            return store.stat("adapter").etag

        first = upload(0, create_only=True)
        with pytest.raises(PreconditionError):
            upload(1, create_only=True)
        second = upload(2, if_match=first)
        with pytest.raises(PreconditionError):
            upload(3, if_match=first)

        assert store.stat("adapter").etag == second
        store.download("adapter", tmp_path / "in", sha256=sha(versions[2]), should_stop=never)

    def test_a_probe_tells_what_the_store_can_and_leaves_nothing(self, store):
        found = probe(store)

        assert (found.conditional, found.reason) == (True, "")
        assert list(store.list()) == []


def run_all(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
