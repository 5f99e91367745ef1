"""The contract of an ObjectStore, as tests to inherit."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, get_args

import pytest

from gradsharding.errors import ChangedObject, IncompleteUpload, InvalidId, MissingObject, ObjectExists
from gradsharding.stores.protocol import ObjectStore, Reach, Stat
from gradsharding.stores.urls import open_store
from gradsharding.usage import Usage, counting


class StoreContract:
    """What every ObjectStore promises. Supply the fixture ``store``, which is empty, and two hooks."""

    def raw_get(self, store: Any, key: str) -> bytes:
        """Read an object without using the store's methods."""
        raise NotImplementedError

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Write or replace an object without using the store's methods."""
        raise NotImplementedError

    @pytest.fixture
    def store(self) -> ObjectStore:
        """Return an empty store."""
        raise NotImplementedError

    @pytest.mark.parametrize("key", ["a", "a/b/c", "ä ö/100%+1?#&=", "a.b/..c", "%2e%2e/x"])
    def test_put(self, store: ObjectStore, key: str) -> None:
        """Put joins its buffers into one object, whose size and version head and list report, too."""
        stat = store.put(key, [b"ab", bytearray(b"cd"), memoryview(b"ef")])

        assert b"abcdef" == self.raw_get(store, key)
        assert 6 == stat.size
        assert stat == store.head(key)
        assert [(key, stat)] == list(store.list(""))

    def test_put_nothing(self, store: ObjectStore) -> None:
        """An object may be empty."""
        assert 0 == store.put("a", []).size
        assert (b"", b"") == (self.raw_get(store, "a"), read(store, "a"))

    def test_put_creates(self, store: ObjectStore) -> None:
        """A second put to the same key raises ObjectExists and changes nothing."""
        stat = store.put("a", [b"first"])

        with pytest.raises(ObjectExists, match="'a'"):
            store.put("a", [b"second"])
        assert (b"first", stat) == (self.raw_get(store, "a"), store.head("a"))

    def test_put_at_once(self, store: ObjectStore) -> None:
        """When several threads put the same key at once, exactly one succeeds, and its bytes stay."""
        barrier = threading.Barrier(8)

        def put(i: int) -> int | None:
            barrier.wait()
            try:
                store.put("a", [b"%d" % i])
            except ObjectExists:
                return None
            return i

        with ThreadPoolExecutor(8) as pool:
            winners = [i for i in pool.map(put, range(8)) if i is not None]
        assert [int(self.raw_get(store, "a"))] == winners

    @pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 7), (0, 1), (9, 10), (8, 99), (10, 20), (50, 60), (4, 4)])
    def test_get_range(self, store: ObjectStore, start: int, stop: int) -> None:
        """Get returns the bytes from start to stop, and none beyond the end."""
        self.raw_put(store, "a", b"0123456789")

        assert b"0123456789"[start:stop] == read(store, "a", start, stop)

    def test_get_large(self, store: ObjectStore) -> None:
        """A long read may return several buffers; joined, they are the object."""
        data = bytes(range(256)) * 20_001
        self.raw_put(store, "a", data)

        assert data == read(store, "a")
        assert data[1_000_001:5_000_003] == read(store, "a", 1_000_001, 5_000_003)

    @pytest.mark.parametrize(("size", "nbytes"), [(10, 4), (10, 10), (10, 1_000), (0, 4), (3_000_000, 1_000_000)])
    def test_peek(self, store: ObjectStore, size: int, nbytes: int) -> None:
        """Peek returns an object's stat and its first bytes, or all bytes of a smaller object."""
        data = os.urandom(size)
        self.raw_put(store, "a", data)

        assert (store.head("a"), data[:nbytes]) == store.peek("a", nbytes)

    def test_counts(self, store: ObjectStore) -> None:
        """Each verb counts the requests and bytes that it makes."""
        charges, upload = store.charges, store.begin("b")

        assert Usage(puts=1, bytes_written=6) == asked(store, lambda: store.put("a/1", [b"abc", b"def"]))
        assert Usage(gets=1) == asked(store, lambda: store.head("a/1"))
        assert Usage(gets=1, bytes_read=4) == asked(store, lambda: store.peek("a/1", 4))
        assert Usage(gets=1, bytes_read=2) == asked(store, lambda: read(store, "a/1", 1, 3))
        assert Usage(gets=2, bytes_read=12) == asked(store, lambda: list(store.fetch(["a/1", "a/1"])))
        assert charges.list(1) == asked(store, lambda: list(store.list("a/")))
        assert Usage(deletes=1) == asked(store, lambda: store.delete(["a/1"]))
        assert Usage(puts=1) == asked(store, lambda: store.begin("c"))
        assert charges.put_parts([(0, 300)]) == asked(store, lambda: store.put_part("b", upload, 1, 0, bytes(300)))
        assert charges.parts({1: 300}) == asked(store, lambda: store.parts("b", upload))
        assert 1 <= asked(store, lambda: store.abort("b", upload)).deletes

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("sizes", [(300,), (300, 7_000_000), (300, 7_000_000, 6_500_000, 6_500_001), (300, *[1_000_000] * 7)], ids=str)
    def test_charges(self, store: ObjectStore, sizes: tuple[int, ...], overwrite: bool) -> None:  # noqa: FBT001
        """Publishing parts takes the requests and bytes in the store's charges, or one GET less if complete returns the version."""
        upload, parts = store.begin("b"), dict(enumerate(sizes, 1))
        places = [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]

        def write() -> None:
            for number, (offset, size) in enumerate(places, 1):
                store.put_part("b", upload, number, offset, bytes(size))

        assert store.charges.put_parts(places) == asked(store, write)
        projected = store.charges.complete(parts, overwrite=overwrite)
        counted = asked(store, lambda: store.complete("b", upload, parts, overwrite=overwrite))
        assert counted.gets in (projected.gets, projected.gets - 1)
        assert projected == counted.model_copy(update={"gets": projected.gets, "deletes": 0})

    def test_counts_stay_apart(self, store: ObjectStore) -> None:
        """Threads that count at once count separately, and so does a count inside another."""

        def work(count: int) -> int:
            with counting() as ledger:
                for _ in range(count):
                    store.head("a")
                    with counting():
                        store.head("a")
            return ledger.spent[store.charges.kind].gets

        store.put("a", [b"x"])
        with ThreadPoolExecutor(4) as pool:
            assert [3, 1, 4, 15] == [*pool.map(work, [3, 1, 4, 15])]

    def test_versions(self, store: ObjectStore) -> None:
        """A replaced object has a new version; reading the old one raises ChangedObject."""
        self.raw_put(store, "a", b"old")
        old = store.head("a").version
        assert b"old" == read(store, "a", version=old)

        self.raw_put(store, "a", b"new")
        assert old != store.head("a").version
        assert b"new" == read(store, "a", version=store.head("a").version)
        with pytest.raises(ChangedObject, match="'a'"):
            read(store, "a", 0, 3, old)

    def test_replaced_while_read(self, store: ObjectStore) -> None:
        """A read of a pinned version never mixes two versions: it returns the old bytes or raises ChangedObject."""
        self.raw_put(store, "a", b"o" * 3_000_000)
        chunks = store.get("a", 0, 3_000_000, version=store.head("a").version)
        seen = bytes(next(chunks))
        self.raw_put(store, "a", b"n" * 3_000_000)

        try:
            seen += b"".join(bytes(chunk) for chunk in chunks)
        except ChangedObject:
            assert {*b"o"} == {*seen}
        else:
            assert b"o" * 3_000_000 == seen

    def test_list(self, store: ObjectStore) -> None:
        """List returns the keys that begin with a prefix, compared as text, in order; none if no key does."""
        for key in ("b", "a/2", "a0", "a/1/x", "a-1"):
            self.raw_put(store, key, b"")

        for prefix in ("", "a", "a/", "a/1", "b", "c", "c/d"):
            expected = [key for key in ("a-1", "a/1/x", "a/2", "a0", "b") if key.startswith(prefix)]
            assert expected == [key for key, _ in store.list(prefix)]

    def test_delete(self, store: ObjectStore) -> None:
        """Delete removes objects and ignores keys of no object: a missing one, a parent of an object, a child of one."""
        for key in ("a", "b/c", "d", "e/f"):
            self.raw_put(store, key, b"")
        store.delete(["a", "missing", "b/c", "b/missing", "e", "d/g"])

        assert ["d", "e/f"] == [key for key, _ in store.list("")]

    def test_missing(self, store: ObjectStore) -> None:
        """Every verb raises MissingObject for an object or upload that does not exist, except abort, which does nothing."""
        self.raw_put(store, "b/c", b"")
        upload = store.begin("a")
        store.abort("a", upload)
        store.abort("a", upload)

        for ask in (
            lambda: store.head("a"),
            lambda: store.head("b"),
            lambda: store.head("b/c/d"),
            lambda: read(store, "a", 0, 1),
            lambda: store.peek("a", 1),
            lambda: store.peek("b", 1),
            lambda: read(store, "b", 0, 1),
            lambda: read(store, "b/c/d", 0, 1),
            lambda: store.put_part("a", upload, 1, 0, b"x"),
            lambda: store.parts("a", upload),
            lambda: store.complete("a", upload, {1: 1}),
            lambda: list(store.fetch(["b/c", "a"])),
        ):
            with pytest.raises(MissingObject):
                ask()

    @pytest.mark.parametrize("key", ["", "/x", "../x", "a/../b", "a//b", "a/", "./a", ".gradsharding/x", "a\0b", "a\\b"])
    def test_bad_keys(self, store: ObjectStore, key: str) -> None:
        """Every verb raises InvalidId for a key that is not a plain relative path."""
        for ask in (
            lambda: store.head(key),
            lambda: read(store, key),
            lambda: store.put(key, [b"x"]),
            lambda: store.delete([key]),
            lambda: store.begin(key),
        ):
            with pytest.raises(InvalidId, match="is not a key"):
                ask()

    def test_fetch(self, store: ObjectStore) -> None:
        """Fetch reads whole objects in the order of the given keys."""
        objects = {f"{i % 7}/{i}": b"%d" % i * i for i in range(40)}
        for key, data in objects.items():
            self.raw_put(store, key, data)

        assert [*objects.items()][::-1] == list(store.fetch([*objects][::-1]))
        assert [] == list(store.fetch([]))

    def test_parts(self, store: ObjectStore) -> None:
        """Parts may be written in any order, and again; parts reports their sizes, and complete publishes them as one object."""
        upload, other = store.begin("a"), store.begin("a")
        store.put_part("a", upload, 3, 5, memoryview(b"fghi"))
        store.put_part("a", upload, 1, 0, b"xxx")
        store.put_part("a", upload, 2, 3, bytearray(b"de"))
        store.put_part("a", upload, 1, 0, b"abc")
        store.put_part("a", upload, 3, 5, b"fg")
        store.put_part("a", upload, 4, 7, b"")

        assert {1: 3, 2: 2, 3: 2, 4: 0} == store.parts("a", upload)
        assert {} == store.parts("a", other)
        assert [] == list(store.list(""))

        stat = store.complete("a", upload, {1: 3, 2: 2, 3: 2, 4: 0})
        assert (7, stat) == (stat.size, store.head("a"))
        assert b"abcdefg" == self.raw_get(store, "a")
        with pytest.raises(MissingObject):
            store.parts("a", upload)

    @pytest.mark.parametrize(
        ("sizes", "problem", "mend", "expected"),
        [
            ({1: 3, 2: 2, 3: 2}, "part 2 has not arrived, where 2 bytes are due", (2, 3, b"de"), b"abcdefg"),
            ({1: 2, 3: 2}, "part 1 has 3 bytes, where 2 bytes are due", (1, 0, b"ab"), b"abfg"),
            ({1: 3, 3: 4}, "part 3 has 2 bytes, where 4 bytes are due", (3, 3, b"fghi"), b"abcfghi"),
        ],
    )
    def test_incomplete(
        self, store: ObjectStore, sizes: dict[int, int], problem: str, mend: tuple[int, int, bytes], expected: bytes
    ) -> None:
        """Complete raises IncompleteUpload if a part is missing or has another size; it publishes once the part is there."""
        upload = store.begin("a")
        store.put_part("a", upload, 1, 0, b"abc")
        store.put_part("a", upload, 3, sum(size for number, size in sizes.items() if number < 3), b"fg")

        with pytest.raises(IncompleteUpload, match=problem):
            store.complete("a", upload, sizes)
        assert [] == list(store.list(""))

        store.put_part("a", upload, *mend)
        store.complete("a", upload, sizes)
        assert expected == self.raw_get(store, "a")

    def test_part_too_many(self, store: ObjectStore) -> None:
        """Complete raises IncompleteUpload for a part that the object should not have."""
        upload = store.begin("a")
        store.put_part("a", upload, 1, 0, b"abc")
        store.put_part("a", upload, 2, 3, b"de")

        with pytest.raises(IncompleteUpload, match="part 2 has 2 bytes, where none of that number is due"):
            store.complete("a", upload, {1: 3})

    def test_large_parts(self, store: ObjectStore) -> None:
        """Parts of any size, in any sequence of small and large ones, make one object."""
        sizes = [300, 7_000_000, 0, 6_500_000, 6_500_001, 5_400_000, 10]
        data, upload = [os.urandom(size) for size in sizes], store.begin("a")
        for number, part in enumerate(data, 1):
            store.put_part("a", upload, number, sum(sizes[: number - 1]), part)
        assert dict(enumerate(sizes, 1)) == store.parts("a", upload)

        store.complete("a", upload, dict(enumerate(sizes, 1)))
        assert b"".join(data) == self.raw_get(store, "a")

    def test_complete_creates(self, store: ObjectStore) -> None:
        """Complete raises ObjectExists where an object is, and leaves it; with ``overwrite`` it replaces the object."""
        self.raw_put(store, "a", b"old")
        old, upload = store.head("a"), store.begin("a")
        store.put_part("a", upload, 1, 0, b"new")

        with pytest.raises(ObjectExists, match="'a'"):
            store.complete("a", upload, {1: 3})
        assert (b"old", old) == (self.raw_get(store, "a"), store.head("a"))

        assert old != store.complete("a", upload, {1: 3}, overwrite=True)
        assert b"new" == self.raw_get(store, "a")

    def test_late_part(self, store: ObjectStore) -> None:
        """A part written after its object was published is refused; the object keeps its version and bytes."""
        upload = store.begin("a")
        store.put_part("a", upload, 1, 0, b"abc")
        stat = store.complete("a", upload, {1: 3})

        with pytest.raises(MissingObject):
            store.put_part("a", upload, 1, 0, b"abc")
        assert (stat, b"abc") == (store.head("a"), read(store, "a", version=stat.version))

    def test_parts_while_completed(self, store: ObjectStore) -> None:
        """Parts written while complete runs are included or refused: the object keeps the version that complete returned."""
        upload, data = store.begin("a"), bytes(100_000)
        store.put_part("a", upload, 1, 0, data)

        def write() -> None:
            with suppress(MissingObject):
                while True:
                    store.put_part("a", upload, 1, 0, data)

        with ThreadPoolExecutor(3) as pool:
            late = [pool.submit(write) for _ in range(3)]
            try:
                stat = store.complete("a", upload, {1: len(data)})
            except BaseException:
                store.abort("a", upload)
                raise
            assert [None] * 3 == [future.result() for future in late]
        assert (stat, data) == (store.head("a"), read(store, "a", version=stat.version))

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_complete_at_once(self, store: ObjectStore, overwrite: bool) -> None:  # noqa: FBT001
        """When several threads complete one upload at once, one publishes it and the others get an error; its version stays."""
        upload, barrier = store.begin("a"), threading.Barrier(4)
        store.put_part("a", upload, 1, 0, b"abc")

        def complete(_: int) -> Stat | None:
            barrier.wait()
            try:
                return store.complete("a", upload, {1: 3}, overwrite=overwrite)
            except (MissingObject, ObjectExists):
                return None

        with ThreadPoolExecutor(4) as pool:
            published = {stat for stat in pool.map(complete, range(4)) if stat}
        assert {store.head("a")} == published
        assert b"abc" == self.raw_get(store, "a")

    def test_abort_while_written(self, store: ObjectStore) -> None:
        """Parts written while their upload is aborted are refused in the end; nothing is published and nothing is left."""
        upload, started = store.begin("a"), threading.Barrier(4)

        def write(number: int) -> None:
            started.wait()
            with suppress(MissingObject):
                while True:
                    store.put_part("a", upload, number, 0, bytes(100_000))

        with ThreadPoolExecutor(3) as pool:
            late = [pool.submit(write, number) for number in (1, 2, 3)]
            started.wait()
            store.abort("a", upload)
            assert [None] * 3 == [future.result() for future in late]
        with pytest.raises(MissingObject):
            store.parts("a", upload)
        assert [] == list(store.list(""))

    def test_list_while_written(self, store: ObjectStore) -> None:
        """Listing while others create and delete returns every object that exists throughout, and never fails."""
        for key in ("r/0/x", "r/1/y/z", "s"):
            store.put(key, [b""])
        stop = threading.Event()

        def churn(writer: int) -> None:
            while not stop.is_set():
                for i in range(3):
                    store.put(f"r/{writer}-{i}/deep/x", [b"x"])
                    store.delete([f"r/{writer}-{i}/deep/x"])

        with ThreadPoolExecutor(3) as pool:
            writers = [pool.submit(churn, writer) for writer in range(3)]
            try:
                for _ in range(30):
                    for prefix, stay in {"": ["r/0/x", "r/1/y/z", "s"], "r/": ["r/0/x", "r/1/y/z"], "r/1": ["r/1/y/z"]}.items():
                        found = [key for key, _ in store.list(prefix)]
                        assert sorted(found) == found
                        assert stay == [key for key in found if "deep" not in key]
            finally:
                stop.set()
            assert [None] * 3 == [writer.result() for writer in writers]

    def test_read_while_deleted(self, store: ObjectStore) -> None:
        """A read of an object that others create and delete meanwhile returns all of it, or raises MissingObject or ChangedObject."""
        stop, data = threading.Event(), b"x" * 50_000

        def churn() -> None:
            while not stop.is_set():
                store.put("a/b/c", [data])
                store.delete(["a/b/c"])

        def ask(i: int) -> bytes:
            match i % 4:
                case 0:
                    return read(store, "a/b/c", version=store.head("a/b/c").version)
                case 1:
                    return bytes(store.peek("a/b/c", 1 << 20).first)
                case 2:
                    [(_, found)] = store.fetch(["a/b/c"])
                    return found
            return read(store, "a/b/c")

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(churn)
            try:
                for i in range(120):
                    with suppress(MissingObject, ChangedObject):
                        assert data == ask(i)
            finally:
                stop.set()
            assert writer.result() is None

    def test_open(self, store: ObjectStore) -> None:
        """The store opened again by its URL has the same objects and uploads."""
        store.put("a", [b"abc"])
        upload = store.begin("b")
        again = open_store(store.url)
        again.put_part("b", upload, 1, 0, b"def")

        assert (b"abc", {1: 3}) == (read(again, "a"), store.parts("b", upload))
        assert (again.grain, again.reading, again.charges, again.url) == (store.grain, store.reading, store.charges, store.url)

    def test_reach(self, store: ObjectStore) -> None:
        """Another process opens the store by its URL and reads its objects, unless only this process reaches it: then it is refused."""
        store.put("a", [b"abc"])
        program = "import sys; from gradsharding import open_store; print(b''.join(map(bytes, open_store(sys.argv[1]).get('a', 0, 3))))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", program, store.url]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)

        assert store.reach in get_args(Reach)
        if store.reach == "process":
            assert ended.returncode == 1
            assert "gradsharding.errors.UserError: " in ended.stderr
        else:
            assert (0, "b'abc'\n") == (ended.returncode, ended.stdout), ended.stderr


def asked(store: ObjectStore, act: Callable[[], object]) -> Usage:
    """Count the requests and bytes of a call; all must be of this kind of store."""
    with counting() as ledger:
        act()
    assert {store.charges.kind} == {*ledger.spent}
    return ledger.spent[store.charges.kind]


def read(store: ObjectStore, key: str, start: int = 0, stop: int = 1 << 40, version: str | None = None) -> bytes:
    """Read a range of an object, by default all of it."""
    return b"".join(bytes(chunk) for chunk in store.get(key, start, stop, version=version))
