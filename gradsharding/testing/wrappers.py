"""Wrappers that count, fail or delay the requests to a store. Each is itself an ObjectStore."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

from gradsharding.format.dtypes import Buffer
from gradsharding.stores.protocol import ObjectStore, Peeked, Stat

_T = TypeVar("_T")


class _Wrapper:
    """Forwards each request. ``_ask`` sees every request, ``_received`` the number of bytes in each buffer that comes back."""

    def __init__(self, store: ObjectStore) -> None:
        self.store, self.url, self.grain, self.reading, self.charges = store, store.url, store.grain, store.reading, store.charges
        self.reach, self.in_memory = store.reach, store.in_memory
        self._lock = threading.Lock()

    def _ask(self, verb: str, key: str, request: Callable[[], _T], sent: int = 0) -> _T:  # noqa: ARG002
        return request()

    def _received(self, key: str, count: int) -> None:
        """Ignore it; subclasses count or wait."""

    def head(self, key: str) -> Stat:
        return self._ask("head", key, lambda: self.store.head(key))

    def peek(self, key: str, nbytes: int) -> Peeked:
        peeked = self._ask("peek", key, lambda: self.store.peek(key, nbytes))
        self._received(key, len(peeked.first))
        return peeked

    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Iterator[Buffer]:
        for chunk in self._ask("get", key, lambda: self.store.get(key, start, stop, version=version)):
            self._received(key, memoryview(chunk).nbytes)
            yield chunk

    def put(self, key: str, data: Sequence[Buffer]) -> Stat:
        return self._ask("put", key, lambda: self.store.put(key, data), sum(memoryview(d).nbytes for d in data))

    def list(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        return self._ask("list", prefix, lambda: self.store.list(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        gone = [*keys]
        self._ask("delete", gone[0] if gone else "", lambda: self.store.delete(gone))

    def fetch(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            [found] = self._ask("get", key, lambda key=key: [*self.store.fetch([key])])  # type: ignore[misc]
            self._received(key, len(found[1]))
            yield found

    def begin(self, key: str) -> str:
        return self._ask("begin", key, lambda: self.store.begin(key))

    def put_part(self, key: str, upload: str, number: int, offset: int, data: Buffer) -> None:
        self._ask("put_part", key, lambda: self.store.put_part(key, upload, number, offset, data), memoryview(data).nbytes)

    def parts(self, key: str, upload: str) -> dict[int, int]:
        return self._ask("parts", key, lambda: self.store.parts(key, upload))

    def complete(self, key: str, upload: str, sizes: Mapping[int, int], *, overwrite: bool = False) -> Stat:
        return self._ask("complete", key, lambda: self.store.complete(key, upload, sizes, overwrite=overwrite))

    def abort(self, key: str, upload: str) -> None:
        self._ask("abort", key, lambda: self.store.abort(key, upload))


class CountingStore(_Wrapper):
    """Counts the calls, and the bytes, for keys for which ``only`` is true.

    ``gets`` (get, peek), ``heads``, ``lists`` (list, parts), ``deletes`` (delete, abort), ``puts`` (put, begin, put_part, complete).
    """

    _KINDS: ClassVar = {
        "get": "gets",
        "peek": "gets",
        "head": "heads",
        "list": "lists",
        "parts": "lists",
        "delete": "deletes",
        "abort": "deletes",
    }

    def __init__(self, store: ObjectStore, *, only: Callable[[str], bool] = lambda _: True) -> None:
        """Count what passes through this wrapper. Workers that open the store by its URL bypass it."""
        super().__init__(store)
        self.gets = self.heads = self.lists = self.deletes = self.puts = self.bytes_read = self.bytes_written = 0
        self._only = only

    def _ask(self, verb: str, key: str, request: Callable[[], _T], sent: int = 0) -> _T:
        if self._only(key):
            kind = self._KINDS.get(verb, "puts")
            with self._lock:
                setattr(self, kind, getattr(self, kind) + 1)
                self.bytes_written += sent
        return request()

    def _received(self, key: str, count: int) -> None:
        if self._only(key):
            with self._lock:
                self.bytes_read += count


class FlakyStore(_Wrapper):
    """Fails by a script: ``{("before", "put_part", 3): ConnectionError()}`` makes the third put_part fail.

    "before": the request never reaches the store. "after": it is carried out, but its answer is lost. The verb "any" counts all requests.
    """

    def __init__(self, store: ObjectStore, script: Mapping[tuple[str, str, int], Exception]) -> None:
        """Raise the errors of ``script`` in place of the requests that it names; ``calls`` counts requests by verb."""
        super().__init__(store)
        self.calls = Counter[str]()
        self._script = script

    def _ask(self, verb: str, key: str, request: Callable[[], _T], sent: int = 0) -> _T:  # noqa: ARG002
        with self._lock:
            self.calls.update((verb, "any"))
            now = [(name, self.calls[name]) for name in (verb, "any")]
        self._fail("before", now)
        try:
            return request()
        finally:  # an error is an answer, too
            self._fail("after", now)

    def _fail(self, when: str, now: Sequence[tuple[str, int]]) -> None:
        for verb, count in now:
            if error := self._script.get((when, verb, count)):
                raise error


class SlowStore(_Wrapper):
    """Delays each request by ``latency`` seconds and limits it to ``bandwidth`` bytes/s, like a distant store."""

    def __init__(self, store: ObjectStore, *, latency: float = 0.0, bandwidth: float = math.inf) -> None:
        """Delay requests to ``store``; each thread waits for its own."""
        super().__init__(store)
        self._latency, self._bandwidth = latency, bandwidth

    def _ask(self, verb: str, key: str, request: Callable[[], _T], sent: int = 0) -> _T:  # noqa: ARG002
        time.sleep(self._latency + sent / self._bandwidth)
        return request()

    def _received(self, key: str, count: int) -> None:  # noqa: ARG002
        time.sleep(count / self._bandwidth)
