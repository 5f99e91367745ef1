"""Objects in one SQLite file: a store in a hundred lines, and the example of the guide to writing one."""

import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gradsharding.format.dtypes import Buffer
from gradsharding.stores.charges import Charges
from gradsharding.stores.protocol import Peeked, Reach, Stat, changed, check_arrived, check_key, missing, no_upload, taken
from gradsharding.stores.reading import STREAM
from gradsharding.usage import count

TABLES = """
CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, version TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS uploads (id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS parts (
    upload TEXT REFERENCES uploads ON DELETE CASCADE, number INTEGER, data BLOB, PRIMARY KEY (upload, number)
);
"""

LARGEST = 1_000_000_000
"""Bytes of one value in SQLite, by default."""

Parts = Sequence[tuple[int, bytes]]


class SQLiteStore:
    """Objects in one SQLite file, which processes of one machine share; for objects below SQLite's limit of 1 GB each."""

    grain = 8 << 20
    reading = STREAM
    charges = Charges(kind="sqlite")
    reach: Reach = "machine"
    in_memory = False

    def __init__(self, url: str) -> None:
        """Open ``sqlite:///absolute/path``; the file is created if it is missing."""
        self.url = url
        self._path = Path(url.removeprefix("sqlite://"))
        self._threads = threading.local()
        self._db.executescript(TABLES)

    def head(self, key: str) -> Stat:
        count("sqlite", gets=1)
        return self._stat(key)

    def peek(self, key: str, nbytes: int) -> Peeked:
        count("sqlite", gets=1)
        row = self._db.execute(
            "SELECT length(data), version, substr(data, 1, ?) FROM objects WHERE key = ?", (nbytes, check_key(key))
        ).fetchone()
        if not row:
            raise missing(key, self.url)
        size, version, first = row[0], row[1], row[2] or b""
        count("sqlite", bytes_read=len(first))
        return Peeked(Stat(size, version), first)

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        count("sqlite", gets=1)
        query = "SELECT version, substr(data, ?, ?) FROM objects WHERE key = ?"
        row = self._db.execute(query, (start + 1, max(0, min(stop, LARGEST) - start), check_key(key))).fetchone()
        if not row:
            raise missing(key, self.url)
        if version not in (None, row[0]):
            raise changed(key, version, row[0])
        data = row[1] or b""  # SQLite has no empty range: it is NULL
        count("sqlite", bytes_read=len(data))
        yield memoryview(data)

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        joined = b"".join(data)
        count("sqlite", puts=1, bytes_written=len(joined))
        with self._db:
            return self._publish(check_key(key), joined, overwrite=False)

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        count("sqlite", puts=1)
        rows = self._db.execute(
            "SELECT key, length(data), version FROM objects WHERE substr(key, 1, ?) = ? ORDER BY key", (len(prefix), prefix)
        )
        yield from [(key, Stat(size, version)) for key, size, version in rows]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            count("sqlite", deletes=1)
            with self._db:
                self._db.execute("DELETE FROM objects WHERE key = ?", (check_key(key),))

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            yield key, bytes(b"".join(self.get(key, 0, LARGEST)))

    def begin(self, key: str) -> str:
        count("sqlite", puts=1)
        check_key(key)
        upload = uuid.uuid4().hex
        with self._db:
            self._db.execute("INSERT INTO uploads VALUES (?)", (upload,))
        return upload

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        count("sqlite", puts=1, bytes_written=memoryview(data).nbytes)
        try:
            with self._db:
                self._db.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", (upload, number, data))
        except sqlite3.IntegrityError:
            raise no_upload(key, upload) from None

    def parts(self, key: str, upload: str) -> dict[int, int]:
        count("sqlite", puts=1)
        return {number: len(data) for number, data in self._parts(key, upload)}

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        count("sqlite", puts=1)
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")  # one caller at a time, from the look at the parts to the object
            parts = self._parts(key, upload)
            check_arrived(key, sizes, {number: len(data) for number, data in parts})
            stat = self._publish(key, b"".join(data for _, data in parts), overwrite=overwrite)
            self._db.execute("DELETE FROM uploads WHERE id = ?", (upload,))
        return stat

    def abort(self, key: str, upload: str) -> None:
        count("sqlite", deletes=1)
        with self._db:
            self._db.execute("DELETE FROM uploads WHERE id = ?", (upload,))

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """Send only the URL to another process, which opens the file itself."""
        return type(self), (self.url,)

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection of this thread: SQLite's are not shared."""
        found: sqlite3.Connection | None = getattr(self._threads, "db", None)
        if found is None:
            found = self._threads.db = sqlite3.connect(self._path, timeout=60)
            found.execute("PRAGMA foreign_keys = ON")
        return found

    def _stat(self, key: str) -> Stat:
        row = self._db.execute("SELECT length(data), version FROM objects WHERE key = ?", (check_key(key),)).fetchone()
        if not row:
            raise missing(key, self.url)
        return Stat(*row)

    def _parts(self, key: str, upload: str) -> Parts:
        if not self._db.execute("SELECT 1 FROM uploads WHERE id = ?", (upload,)).fetchone():
            raise no_upload(key, upload)
        return self._db.execute("SELECT number, data FROM parts WHERE upload = ? ORDER BY number", (upload,)).fetchall()

    def _publish(self, key: str, data: bytes, *, overwrite: bool) -> Stat:
        version = uuid.uuid4().hex
        try:
            self._db.execute(f"INSERT {'OR REPLACE ' if overwrite else ''}INTO objects VALUES (?, ?, ?)", (key, version, data))  # noqa: S608
        except sqlite3.IntegrityError:
            raise taken(key, self.url) from None
        return Stat(len(data), version)
