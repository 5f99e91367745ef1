"""Stores keep the contract; a directory keeps its promises when its writers are killed."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from gradsharding.errors import ChangedObject, InvalidId, MissingObject, ObjectExists, UserError
from gradsharding.store import DirectoryStore, MemoryStore, ObjectStore, SharedMemory, file_reference, locate, open_store
from gradsharding.testing import CountingStore, FlakyStore, SlowStore, StoreContract, read


class TestMemoryStore(StoreContract):
    """The contract on memory."""

    @pytest.fixture
    def store(self) -> Any:
        """Give an empty store."""
        return MemoryStore()

    def raw_get(self, store: Any, key: str) -> bytes:
        """Read an entry of the dictionary."""
        data: bytes = store._objects[key][0]
        return data

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Write an entry, with a version of its own."""
        store._objects[key] = data, os.urandom(8).hex()


class TestWrappers(TestMemoryStore):
    """The contract on stores around a store."""

    @pytest.fixture(params=[CountingStore, SlowStore, lambda store: FlakyStore(store, {})], ids=["counting", "slow", "flaky"])
    def store(self, request: pytest.FixtureRequest) -> Any:
        """Give an empty store, wrapped."""
        return request.param(MemoryStore())

    def raw_get(self, store: Any, key: str) -> bytes:
        """Read past the wrapper."""
        return super().raw_get(store.store, key)

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Write past the wrapper."""
        super().raw_put(store.store, key, data)


class TestSharedMemory(StoreContract):
    """The contract on files that are memory."""

    @pytest.fixture
    def store(self) -> Iterator[ObjectStore]:
        """Give a store below /dev/shm."""
        with TemporaryDirectory(dir="/dev/shm") as place:
            yield SharedMemory(place)

    def raw_get(self, store: Any, key: str) -> bytes:
        """Read the file."""
        data: bytes = (store.root / key).read_bytes()
        return data

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Write the file."""
        DirectoryStore(store.root).delete([key])
        DirectoryStore(store.root).put(key, [data])


class TestDirectoryStore(StoreContract):
    """The contract on a directory."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        """Give a store whose directory is not there yet, under a name that a URL must quote."""
        return DirectoryStore(tmp_path / "a store?#%20+ü")

    def raw_get(self, store: Any, key: str) -> bytes:
        """Read the file."""
        data: bytes = (store.root / key).read_bytes()
        return data

    def raw_put(self, store: Any, key: str, data: bytes) -> None:
        """Replace the file by another."""
        path, draft = store.root / key, store.root / "draft"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(path)


def test_changed_in_place(tmp_path: Path) -> None:
    """A file that is written over while it is read raises ChangedObject, though its size and name stay."""
    store, path = DirectoryStore(tmp_path), tmp_path / "a"
    path.write_bytes(b"o" * 3_000_000)
    os.utime(path, ns=(0, 0))
    chunks = store.get("a", 0, 3_000_000, version=store.head("a").version)
    next(chunks)
    path.write_bytes(b"n" * 3_000_000)

    with pytest.raises(ChangedObject, match="'a' is at version"):
        list(chunks)


def test_lost_bytes(tmp_path: Path) -> None:
    """A part whose bytes did not reach the disk, though its mark did, has not arrived."""
    store = DirectoryStore(tmp_path)
    upload = store.begin("a")
    store.put_part("a", upload, 1, 0, b"abc")
    store.put_part("a", upload, 2, 3, b"def")
    data = tmp_path / ".gradsharding/uploads" / upload / "data"

    data.write_bytes(b"abc\0\0\0")
    assert {1: 3} == store.parts("a", upload)

    os.truncate(data, 2)
    assert {} == store.parts("a", upload)


def test_no_droppings(tmp_path: Path) -> None:
    """Nothing stays behind in the directory once objects are deleted and uploads completed or aborted."""
    store = DirectoryStore(tmp_path)
    store.put("a/b/put", [b"x"])
    with pytest.raises(ObjectExists):
        store.put("a/b/put", [b"x"])
    for end in (lambda key, upload: store.complete(key, upload, {1: 1}), store.abort):
        upload = store.begin("a/c/parts")
        store.put_part("a/c/parts", upload, 1, 0, b"x")
        end("a/c/parts", upload)
    assert [tmp_path / "a/b/put", tmp_path / "a/c/parts"] == sorted(path for path in tmp_path.rglob("*") if path.is_file())

    store.delete(["a/b/put", "a/c/parts"])
    assert [] == list(tmp_path.iterdir())


def test_writers_side_by_side(tmp_path: Path) -> None:
    """Writers that put, write in parts and delete in one directory at once do not take it from under each other."""

    def write(writer: int) -> int:
        store = DirectoryStore(tmp_path)
        for i in range(40):
            store.put(f"a/b/{writer}-{i}", [b"x"])
            upload = store.begin(f"a/c/{writer}-{i}")
            store.put_part(f"a/c/{writer}-{i}", upload, 1, 0, b"xyz")
            store.complete(f"a/c/{writer}-{i}", upload, {1: 3})
            store.delete([f"a/b/{writer}-{i}", f"a/c/{writer}-{i}"])
        return writer

    with ThreadPoolExecutor(8) as pool:
        assert [*range(8)] == [*pool.map(write, range(8))]
    assert [] == [*tmp_path.iterdir()]


@pytest.mark.parametrize("upload", ["", "..", "../../a", "A" * 32, "a" * 31])
def test_foreign_upload(tmp_path: Path, upload: str) -> None:
    """An upload's id that begin did not give never becomes part of a path."""
    with pytest.raises(InvalidId, match="is not an upload's id"):
        DirectoryStore(tmp_path).parts("a", upload)


STORY = """
import itertools, os, signal, sys
from gradsharding.store import DirectoryStore

STEPS = ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "os.truncate")

def tell(store):
    store.put("a/put", [b"ab", b"cd"])
    upload = store.begin("b/parts")
    store.put_part("b/parts", upload, 2, 3, b"def")
    store.put_part("b/parts", upload, 1, 0, b"abc")
    store.complete("b/parts", upload, {1: 3, 2: 3})
    store.delete(["a/put"])

def die_at(step):
    def hook(event, _):
        nonlocal step
        if event in STEPS:
            step -= 1
            if step < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for step in itertools.count():
    child = os.fork()
    if not child:
        die_at(step)
        tell(DirectoryStore(f"{sys.argv[1]}/{step:03d}"))
        os._exit(0)
    if os.WIFEXITED(os.waitpid(child, 0)[1]):
        break
"""


def test_killed_at_every_step(tmp_path: Path) -> None:
    """A writer killed -9 before any of its steps leaves whole objects or none, true parts, and nothing in the way."""
    subprocess.run([sys.executable, "-c", STORY, tmp_path], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = {"a/put": b"abcd", "b/parts": b"abcdef"}
    roots = sorted(tmp_path.iterdir())
    assert 20 < len(roots)

    for root in roots:
        store = DirectoryStore(root)
        visible = {key: read(store, key) for key, _ in store.list("")}
        assert visible.items() <= whole.items()

        for path in root.glob(".gradsharding/uploads/*"):
            resume(store, path.name)
            assert whole["b/parts"] == read(store, "b/parts")
        if "a/put" not in visible:
            store.put("a/put", [whole["a/put"]])
        assert whole["a/put"] == read(store, "a/put")


def resume(store: DirectoryStore, upload: str) -> None:
    """Do what is still to do for an upload, from what the store says."""
    try:
        parts = store.parts("b/parts", upload)
    except MissingObject:
        if "b/parts" in dict(store.list("")):
            return
        upload, parts = store.begin("b/parts"), {}
    for number, offset, data in ((1, 0, b"abc"), (2, 3, b"def")):
        if parts.get(number) != 3:
            store.put_part("b/parts", upload, number, offset, data)
    store.complete("b/parts", upload, {1: 3, 2: 3})


HALF = """
import os, sys, time
from gradsharding.store import DirectoryStore

store, upload = DirectoryStore(sys.argv[1]), sys.argv[2]
write, pwrite = os.write, os.pwrite

def half(call, file, data, *offset):
    call(file, data[:len(data) // 2], *offset)
    print("half", flush=True)
    time.sleep(600)

os.write, os.pwrite = (lambda *args: half(write, *args)), (lambda *args: half(pwrite, *args))
store.put_part("a", upload, 1, 0, b"x" * 1000) if upload else store.put("a", [b"x" * 1000])
"""


@pytest.mark.parametrize("verb", ["put", "put_part"])
def test_killed_in_the_middle(tmp_path: Path, verb: str) -> None:
    """A writer killed -9 in the middle of its bytes leaves nothing that is visible, and no part."""
    store = DirectoryStore(tmp_path)
    upload = store.begin("a") if verb == "put_part" else ""
    with subprocess.Popen([sys.executable, "-c", HALF, tmp_path, upload], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert b"half\n" == process.stdout.readline()
        process.kill()
    assert -signal.SIGKILL == process.returncode

    assert [] == list(store.list(""))
    if upload:
        assert {} == store.parts("a", upload)
    else:
        assert 4 == store.put("a", [b"once"]).size


def test_locate(tmp_path: Path) -> None:
    """A reference is a key of the store at hand, or a URL of a file anywhere, whatever its name."""
    home = MemoryStore()
    assert (home, "rounds/r/x") == locate("rounds/r/x", home)

    path = tmp_path / "a ü#?%2F&" / "model +%20.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    assert b"abc" == read(*locate(file_reference(path), home))
    with pytest.raises(InvalidId, match="is not a key"):
        read(*locate(f"{tmp_path.as_uri()}/%2e%2e%2fsecret", home))


def test_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store opens from a directory's path, absolute or not, or from a URL."""
    monkeypatch.chdir(tmp_path)
    DirectoryStore(tmp_path).put("a", [b"abc"])

    for url in (tmp_path, str(tmp_path), ".", tmp_path.as_uri()):
        assert b"abc" == read(open_store(url), "a")


@pytest.mark.parametrize(
    ("url", "advice"),
    [("memory://gone", "use a file:// store"), ("ftp://host/x", "use file:///directory"), ("ftp://a", "no store is known for 'ftp://a'")],
)
def test_open_what_is_not_there(url: str, advice: str) -> None:
    """A store that cannot be opened raises UserError, which says what to use."""
    with pytest.raises(UserError, match=advice):
        open_store(url)


def test_pickle(tmp_path: Path) -> None:
    """A directory may be sent to another process; memory says that it may not."""
    store = DirectoryStore(tmp_path)
    store.put("a", [b"abc"])

    assert b"abc" == read(pickle.loads(pickle.dumps(store)), "a")  # noqa: S301 - our own bytes
    with pytest.raises(UserError, match="use a file:// store"):
        pickle.dumps(MemoryStore())


def test_counting() -> None:
    """A CountingStore counts requests by class, and bytes, of the keys it is told to watch."""
    store = CountingStore(MemoryStore(), only=lambda key: key.startswith("a"))
    for key in ("a", "b"):
        store.put(key, [b"abc", b"d"])
        upload = store.begin(f"{key}2")
        store.put_part(f"{key}2", upload, 1, 0, b"ef")
        store.parts(f"{key}2", upload)
        store.complete(f"{key}2", upload, {1: 2})
        store.head(key)
        read(store, key, 1, 3)
        store.delete([key])
    list(store.list("a"))

    assert (4, 1, 1, 2, 1) == (store.puts, store.gets, store.heads, store.lists, store.deletes)
    assert (2, 6) == (store.bytes_read, store.bytes_written)


def test_flaky() -> None:
    """A FlakyStore fails where its script says, before the effect or after it, and nowhere else."""
    script = {("before", "put", 1): ConnectionError("lost"), ("after", "put", 2): TimeoutError(), ("before", "any", 4): OSError("any")}
    store = FlakyStore(MemoryStore(), script)

    with pytest.raises(ConnectionError, match="lost"):
        store.put("a", [b"1"])
    with pytest.raises(TimeoutError):
        store.put("a", [b"2"])
    with pytest.raises(ObjectExists):
        store.put("a", [b"3"])
    with pytest.raises(OSError, match="any"):
        store.head("a")
    assert b"2" == read(store, "a")
    assert {"put": 3, "head": 1, "get": 1, "any": 5} == store.calls


def test_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SlowStore waits for each request, and for its bytes in either direction."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    store = SlowStore(MemoryStore(), latency=0.5, bandwidth=100)
    store.put("a", [b"x" * 25])
    read(store, "a", 0, 10)

    assert [0.75, 0.5, 0.1] == waits


def test_what_is_no_file_is_no_object(tmp_path: Path) -> None:
    """A pipe, a loop of links and a directory under a key are no objects; none of them blocks the reader."""
    store = DirectoryStore(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "directory").mkdir()
    for key in ("pipe", "loop", "directory"):
        with pytest.raises(MissingObject):
            store.head(key)
        with pytest.raises(MissingObject):
            next(iter(store.get(key, 0, 8)))


def test_file_urls_name_absolute_paths(tmp_path: Path) -> None:
    """A file:// URL keeps every byte of its path, and a relative one is refused."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/o\xff #1?")
    Path(odd).mkdir()
    assert odd == str(DirectoryStore(odd).root) == str(open_store(DirectoryStore(odd).url).root)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="names no local path; write file:///absolute/path"):
        open_store("file://relative/path")
