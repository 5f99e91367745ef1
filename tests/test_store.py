"""Stores keep the contract; a directory keeps its promises when its writers are killed."""

import errno
import gc
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from gradsharding.errors import ChangedObject, InvalidId, MissingObject, ObjectExists, StoreRefused, UserError
from gradsharding.stores import files
from gradsharding.stores.directory import DirectoryStore, SharedMemory
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.private import private_directory
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.urls import file_reference, locate, open_store
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


def test_swapped_in_place(tmp_path: Path) -> None:
    """A file that is written over has another version, though its size, its name and its restored times are the same."""
    store, path = DirectoryStore(tmp_path), tmp_path / "a"
    stat = store.put("a", [b"o" * 3_000_000])
    times, chunks = path.stat(), store.get("a", 0, 3_000_000, version=stat.version)
    seen = bytes(next(chunks))
    with path.open("rb+") as file:
        file.write(b"n" * 3_000_000)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert (times.st_size, times.st_ino, times.st_mtime_ns) == (path.stat().st_size, path.stat().st_ino, path.stat().st_mtime_ns)
    assert {*b"o"} == {*seen}
    for rest in (chunks, store.get("a", 0, 1, version=stat.version)):
        with pytest.raises(ChangedObject, match=r"it was written again, or its inode was changed \(by chmod, chown or a hard link\)"):
            next(rest)


def test_told_version_is_final(tmp_path: Path) -> None:
    """The version that put and complete tell is that which head tells, with or without an object in its place before."""
    store = DirectoryStore(tmp_path)
    told = {"a": store.put("a", [b"x"])}
    for overwrite in (False, True):
        upload = store.begin("b")
        store.put_part("b", upload, 1, 0, b"xyz")
        told["b"] = store.complete("b", upload, {1: 3}, overwrite=overwrite)
        assert told["b"] == store.head("b")
    assert told == dict(store.list(""))


def test_late_writer_holds_the_file(tmp_path: Path) -> None:
    """A part's writer that has opened an upload's file when another publishes it does not touch what was published."""
    store = DirectoryStore(tmp_path)
    upload = store.begin("a")
    store.put_part("a", upload, 1, 0, b"abcd")
    with ThreadPoolExecutor(1) as pool:
        with store._data("a", upload, exclusive=False) as file:
            completed = pool.submit(store.complete, "a", upload, {1: 4})
            with pytest.raises(TimeoutError):
                completed.result(0.1)
            os.pwrite(file.fileno(), b"abcd", 0)
        assert completed.result() == store.head("a")


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


def test_stale(tmp_path: Path) -> None:
    """Beginning an upload removes what nobody has written to for a week, and no more: not what is newer, nor an object's second name."""
    store = DirectoryStore(tmp_path)
    old, new, linked = (store.begin("a") for _ in range(3))
    os.link(tmp_path / ".gradsharding/uploads" / linked / "data", tmp_path / "linked")
    (tmp_path / ".gradsharding/drafts").mkdir()
    (tmp_path / ".gradsharding/drafts/old").touch()
    for upload in (old, linked):
        for path in (place := tmp_path / ".gradsharding/uploads" / upload, *place.iterdir()):
            os.utime(path, (0, 0))
    os.utime(tmp_path / ".gradsharding/drafts/old", (0, 0))
    latest = store.begin("a")

    assert {new, linked, latest} == {path.name for path in (tmp_path / ".gradsharding/uploads").iterdir()}
    assert [] == [*(tmp_path / ".gradsharding/drafts").iterdir()]


def test_list_gives_keys_only(tmp_path: Path) -> None:
    """Listing gives no unfinished work and no file whose name is no key, and nothing outside the directory, whatever the prefix."""
    store = DirectoryStore(tmp_path / "s")
    (tmp_path / "outside").touch()
    store.put("a/b", [b"x"])
    store.begin("c")
    (tmp_path / "s/back\\slash").touch()

    for prefix, expected in {"": ["a/b"], ".": [], "../": [], "a/../": [], f"{tmp_path}/": [], ".gradsharding/": [], "a/b/c": []}.items():
        assert expected == [key for key, _ in store.list(prefix)]


def as_user(uid: int, act: Callable[[], object]) -> str:
    """Act in a process of another user, whose umask is 022; give the error's name and sentence."""
    if os.geteuid():
        pytest.skip("acting as another user needs root")
    gets, puts = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        os.umask(0o022)
        try:
            act()
            said = "done"
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is told
            said = f"{type(error).__name__}: {error}"
        os.write(puts, said.encode())
        os._exit(0)
    os.close(puts)
    with open(gets, "rb") as pipe:  # noqa: PTH123
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def shared_place() -> Iterator[Path]:
    """A directory that every user reaches."""
    with TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_second_user(shared_place: Path) -> None:
    """A second user of a store reads what the first wrote; where it may not write, or read, it is told whose directory that is."""
    store = DirectoryStore(shared_place)
    assert "done" == as_user(1001, lambda: (store.put("r/a", [b"abc"]), store.begin("r/b")))
    assert "done" == as_user(1002, lambda: read(store, "r/a"))

    for act, place in (
        (lambda: store.put("r/c", [b"x"]), ".gradsharding/drafts"),
        (lambda: store.begin("r/c"), ".gradsharding/uploads"),
        (lambda: store.delete(["r/a"]), "r"),
    ):
        said = as_user(1002, act)
        assert said.startswith(
            f"StoreRefused: uid 1002 may not use {shared_place / place}, which belongs to uid 1001 and gid 1001 with mode 755"
        )
        assert said.endswith("let the owner run chmod g+rwxs on it for a common group, and all its users set umask 002")

    (shared_place / "r/a").chmod(0o600)
    for look in (lambda: read(store, "r/a"), lambda: store.peek("r/a", 1), lambda: [*store.fetch(["r/a"])]):
        assert as_user(1002, look).startswith(f"StoreRefused: uid 1002 may not use {shared_place}/r/a, which belongs to uid 1001")
    (shared_place / "r").chmod(0o700)
    for seek in (lambda: store.head("r/a"), lambda: [*store.list("r/")]):
        assert as_user(1002, seek).startswith(f"StoreRefused: uid 1002 may not use {shared_place}/r, which belongs to uid 1001")


@contextmanager
def mounted(where: Path, *options: str) -> Iterator[Path]:
    """Mount a tmpfs."""
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", where], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def test_disk_full(tmp_path: Path) -> None:
    """A full disk is StoreRefused with the path and the numbers, whichever verb meets it, and nothing half-written is left."""
    with mounted(tmp_path / "small", "-o", "size=1m") as root:
        store = DirectoryStore(root)
        with pytest.raises(
            StoreRefused, match=r"2000000 bytes were to be written to .*/small/a/b, and .* [0-9]+ bytes free; make room"
        ) as put:
            store.put("a/b", [bytes(2_000_000)])
        assert (2_000_000, str(root / "a/b"), errno.ENOSPC) == tuple(put.value.details[name] for name in ("wanted", "path", "errno"))
        assert [] == [path for path in root.rglob("*") if path.is_file()]

        upload = store.begin("b")
        with pytest.raises(StoreRefused, match=r"2000000 bytes were to be written to .*make room, or use another place"):
            store.put_part("b", upload, 1, 0, bytes(2_000_000))
        assert {} == store.parts("b", upload)
        store.abort("b", upload)
        assert 3 == store.put("c", [b"abc"]).size
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        with pytest.raises(StoreRefused, match="mounted read-only; use another place"):
            store.put("d", [b"abc"])


def test_no_more_files(tmp_path: Path) -> None:
    """A file system that has no room for another file says so, and not that it has bytes free."""
    with mounted(tmp_path / "few", "-o", "size=1m,nr_inodes=8") as root:
        store = DirectoryStore(root)
        with pytest.raises(StoreRefused, match="has its most files already, 8; make room"):
            [store.put(str(i), [b""]) for i in range(8)]


def test_file_too_long(tmp_path: Path) -> None:
    """A file that may not be so long (ulimit -f) is StoreRefused, and nothing of it is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(StoreRefused, match=r"2000 bytes were to be written to .*/a, and no file may be so long there \(ulimit -f"):
            DirectoryStore(tmp_path).put("a", [bytes(2_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]


def test_below_an_object(tmp_path: Path) -> None:
    """A key below an object, or above others, is refused where objects are files."""
    store = DirectoryStore(tmp_path)
    store.put("a", [b"x"])
    store.put("b/c", [b"x"])
    for key in ("a/b", "a/b/c", "b"):
        with pytest.raises(StoreRefused, match="a file is in a directory's place, or the reverse; check the path, or use another key"):
            store.put(key, [b"y"])


@pytest.mark.parametrize("ways", ["links", "neither"])
def test_other_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: str) -> None:
    """Where a file system cannot rename without replacing, and where it has no links either, one of many writers wins all the same."""
    monkeypatch.setattr(files, "_rename", lambda *_: False)
    if ways == "neither":
        monkeypatch.setattr(files, "_link", lambda *_: False)
    store, contract = DirectoryStore(tmp_path), TestDirectoryStore()
    contract.test_put_at_once(store)
    store.delete(["a"])
    contract.test_complete_creates(store)
    store.delete(["a"])
    contract.test_complete_at_once(store, False)
    assert store.put("b", [b"x"]) == store.head("b")
    assert [] == [*(tmp_path / ".gradsharding").rglob("*.*")]


@pytest.fixture(scope="module")
def exfat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount a file system."""
    if os.geteuid() or not all(shutil.which(tool) for tool in ("mkfs.exfat", "mount.exfat-fuse", "losetup")):
        pytest.skip("exFAT needs root, and the packages exfatprogs and exfat-fuse")
    directory = tmp_path_factory.mktemp("exfat")
    (place := directory / "mount").mkdir()
    with (image := directory / "image").open("wb") as file:
        file.truncate(300_000_000)
    subprocess.run(["mkfs.exfat", image], check=True, capture_output=True)
    attached = subprocess.run(["losetup", "--find", "--show", image], check=False, capture_output=True, text=True)
    if attached.returncode:
        pytest.skip(f"no loop device can be had here: {attached.stderr.strip()}")
    try:
        mounted = subprocess.run(["mount.exfat-fuse", attached.stdout.strip(), place], check=False, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"FUSE cannot be had here: {mounted.stderr.strip()}")
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        subprocess.run(["losetup", "--detach", attached.stdout.strip()], check=True)


class TestExFat(TestDirectoryStore):
    """The contract on exFAT, which has no hard links, by its FUSE driver, which cannot rename without replacing."""

    @pytest.fixture
    def store(self, exfat: Path) -> ObjectStore:
        """Give a store of its own."""
        return DirectoryStore(exfat / uuid.uuid4().hex)

    @pytest.mark.parametrize("key", ["a", "a/b/c", "ä ö/100%+1#&=", "a.b/..c", "%2e%2e/x"])
    def test_put(self, store: ObjectStore, key: str) -> None:
        """Put joins its buffers, whatever the key that exFAT has letters for: it has no "?"."""
        StoreContract.test_put(self, store, key)


def test_directory_that_cannot_be_synced() -> None:
    """A directory whose file system has no fsync for it (EINVAL, as /proc answers) is passed over."""
    directory = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(directory)
    os.close(directory)
    files.sync_directory(Path("/proc"))


def test_private_directory(tmp_path: Path) -> None:
    """A private directory is made so, and used again; one of another user, one that lets others in, and a link are refused."""
    assert 0o700 == private_directory(tmp_path / "own", "x").stat().st_mode & 0o777
    assert tmp_path / "own" == private_directory(tmp_path / "own", "x")

    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    (tmp_path / "link").symlink_to("own")
    for name, problem in {"open": "has mode 750, which lets other users in; run chmod 700", "link": "is a link or a file"}.items():
        with pytest.raises(StoreRefused, match=f"{problem}.*take another"):
            private_directory(tmp_path / name, "take another")
    if os.geteuid():
        pytest.skip("a directory of another user needs root")
    os.chown(tmp_path / "own", 1001, 1001)
    with pytest.raises(StoreRefused, match=r"belongs to uid 1001, not to uid 0.*take another"):
        private_directory(tmp_path / "own", "take another")


def test_memory_is_freed() -> None:
    """A store in memory ends with its last owner, though references led to it, and another of its name is found after it."""
    store = MemoryStore("name")
    store.put("a", [b"first"])
    assert b"first" == read(*locate("memory://name/a", store))
    watched = weakref.ref(store)
    del store
    gc.collect()
    assert watched() is None

    again = MemoryStore("name")
    again.put("a", [b"again"])
    assert b"again" == read(*locate("memory://name/a", again))


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
from gradsharding.stores.directory import DirectoryStore

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
            if path.suffix != ".gone":
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
from gradsharding.stores.directory import DirectoryStore

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
