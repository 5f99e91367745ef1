"""A request's body reads directly from the memory of its buffers, so that sending a slice makes no copy of it."""

import hashlib
import io
import zlib
from base64 import b64encode
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import cast

from gradsharding.format.dtypes import Buffer


class Body(io.RawIOBase):
    """Buffers as one binary file, for an HTTP client to read; the client seeks to the start before each retry."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = [memoryview(buffer).cast("B") for buffer in buffers]
        self._ends = [*accumulate(len(buffer) for buffer in self.buffers)]
        self._at = 0

    def __len__(self) -> int:
        """Bytes of all buffers."""
        return self._ends[-1] if self._ends else 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, as for any file; return it."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self)}[whence]
        return self._at

    def readinto(self, buffer: object) -> int:
        """Copy the next bytes, up to the end of one buffer; return their number."""
        into = memoryview(cast("bytearray", buffer)).cast("B")
        index = bisect_right(self._ends, self._at)  # the first buffer that ends after this position, past empty ones
        if index == len(self._ends):
            return 0
        source = self.buffers[index]
        start = len(source) - (self._ends[index] - self._at)
        piece = source[start : start + len(into)]
        into[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def part(self, start: int, stop: int) -> "Body":
        """Return bytes ``start`` to ``stop`` as another body over the same memory."""
        first, last = bisect_right(self._ends, start), bisect_left(self._ends, stop) + 1
        places = zip(self.buffers[first:last], self._ends[first:last], strict=True)
        return Body([source[max(0, start - end + len(source)) : max(0, stop - end + len(source))] for source, end in places])

    def crc32(self) -> str:
        """CRC-32 of all bytes, as the header ``x-amz-checksum-crc32`` has it: base64 of four bytes, the highest first."""
        crc = 0
        for buffer in self.buffers:
            crc = zlib.crc32(buffer, crc)
        return b64encode(crc.to_bytes(4, "big")).decode()

    def md5(self) -> str:
        """MD5 of all bytes, as the header ``Content-MD5`` has it (RFC 1864)."""
        digest = hashlib.md5(usedforsecurity=False)
        for buffer in self.buffers:
            digest.update(buffer)
        return b64encode(digest.digest()).decode()
