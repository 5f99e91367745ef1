"""CRC-32C has the values of its RFC, with awscrt and without, however the bytes are cut."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsharding.aws.s3.checksum import by_numpy, crc32c, encoded

awscrt = pytest.importorskip("awscrt.checksums", reason="awscrt is not installed: pip install 'boto3[crt]'")

RANDOM = os.urandom(3_000_000)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
    ids=["none", "zeros", "ones", "rising", "falling", "digits"],
)
def test_known_values(data: bytes, expected: int) -> None:
    """The test patterns of RFC 3720, B.4, and the check value of the catalogues."""
    assert (expected, expected) == (crc32c(data), by_numpy(memoryview(data)))


@pytest.mark.parametrize("size", [511, 512, 513, 1023, 65_535, 65_536, (1 << 20) - 1, 1 << 20, (1 << 20) + 3, 1_114_115, 3_000_000])
def test_sizes(size: int) -> None:
    """Numpy and awscrt agree for sizes around every change of method."""
    assert awscrt.crc32c(RANDOM[:size]) == by_numpy(memoryview(RANDOM)[:size])


@given(start=st.integers(0, 70_000), size=st.integers(0, 200_000), cut=st.integers(0, 200_000))
def test_cuts(start: int, size: int, cut: int) -> None:
    """Bytes may be cut anywhere and begin at any address: the second part goes on from the first."""
    view = memoryview(RANDOM)[start : start + size]

    assert awscrt.crc32c(bytes(view)) == by_numpy(view[cut:], by_numpy(view[:cut])) == crc32c(view[cut:], crc32c(view[:cut]))


def test_encoded() -> None:
    """S3 writes a CRC as base64 of four bytes, the highest first."""
    assert "4waSgw==" == encoded(0xE3069283)
