"""Files are read as the reference implementation reads them: fuzzed ones are accepted by both, as the same tensors, or by neither."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import safetensors

from gradsharding.errors import InvalidUpdate
from gradsharding.format.dtypes import ITEM_SIZE
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.updates import load_raw

Found = dict[str, tuple[str, tuple[int, ...], bytes]]

OTHER_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "F8_E4M3FNUZ")
"""What the library has names for and we do not average; older ones do not have them all."""

STRINGS = [
    '""', '"a"', '"w.0"', '"__metadata__"', '"\\u005f_metadata__"', '"dtype"', '"shape"', '"data_offsets"', '"d\\u0074ype"',
    '"F32"', '"F3\\u0032"',
    '"f32"', '"F64 "', '"é"', '"\\u00e9"', '"層"', '"😀"', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00"', '"\\ud83d"', '"\\ude00"',
    '"\\ude00\\ud83d"',
    '"\\ud83dx"', '"\\ud83d\\u0041"', '"\\ud7ff"', '"\\ue000"', '"\\u0000"', '"\\n"', '"\\/"', '"\\x41"', '"\\u12"', '"\\u12g4"',
    '"\\u+123"', '"\\"',
    '"\\\\"', '"\\\\\\""', '"\x00"', '"\x1f"', '"\n"', '"\x7f"', '"\u202e"', '"\ufeff"', '"\ufffe"', "'a'", '"a', "a",
    '"' + "x" * 300 + '"',
]  # fmt: skip
NUMBERS = [
    "0", "1", "-0", "-1", "+1", "00", "01", "1.", ".5", "1.0", "0.0", "-0.0", "1e0", "1E0", "1e+0", "1e-0", "0e0", "8e", "1e1",
    "1_0", "0x8", "8 8", "NaN",
    "Infinity", "-Infinity", "nan", "true", "false", "null", "True", "None", "9223372036854775807", "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616", "99999999999999999999", "100000000000000000000", "4294967296", "2147483648", "1e308",
    "1.7976931348623157e308",
    "1.7976931348623158e308", "1.8e308", "1e309", "-1e309", "1e400", "0e400", "0.0e999999999999", "1e-400", "1e-99999999999",
    "1e99999999999", "1e2147483647",
    "1e0000000000000000001", "0." + "0" * 400 + "1e400", "9" * 308, "9" * 309, "1" + "0" * 308, "1" + "0" * 309, "9" * 5000,
    "9" * 400 + "e-200", "1" * 20 + ".5e300",
    "18446744073709551615e289", "18446744073709551616e289", "18446744073709551616.0e288", "0." + "9" * 400, "9" * 150 + "e99",
    "9" * 250 + "e99", "-" + "9" * 310,
    "１", "٣", "0\x00",
]  # fmt: skip
SPACES = ["", "", "", "", "", " ", "\n", "\t", "\r", "  \r\n", "\x0b", "\x0c", "\u00a0", "\ufeff", "\x00", "/**/", "//"]
SHAPES = [
    [], [0], [1], [2, 3], [3, 0], [0, 0, 0], [1] * 70, [2**62, 4, 0], [0, 2**62, 4], [2**64 - 1, 0], [0, 2**64 - 1], [0, 2**64],
    [2**32, 2**32, 0], [2**63, 2, 0],
    [0, 2**63, 2], [2**61, 0], [2**61], [2**60, 8], [2**64 - 1], [2**58, 1], [0] * 200, [-1, -2], [-1, 0],
]  # fmt: skip


class Fuzz:
    """Files, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def file(self) -> bytes:
        """Draw a file: from an honest one to bytes at random."""
        tensors = [self.tensor() for _ in range(self.draw.choice([0, 1, 1, 2, 3, 5]))]
        entries, end = list[tuple[str, dict[str, Any]]](), 0
        for name, dtype, shape in tensors:
            size = math.prod(shape) * ITEM_SIZE.get(dtype, 1) if all(0 <= e < 1 << 20 for e in shape) else 0
            entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}))
            end += size
        for mend in self.draw.choices([self.shuffle, self.twice, self.lie, self.nothing], [2, 1, 1, 8], k=2):
            entries = mend(entries)
        self.odd = self.draw.choice([0.0, 0.0, 0.0, 0.02, 0.1])
        text = self.header(entries)
        data = self.draw.randbytes(max(0, end + self.draw.choice([0] * 40 + [-1, 1, 8])))
        header = text.encode("utf-8", "surrogatepass")
        if self.chance(0.5):
            header += b" " * (-len(header) % 8)
        length = len(header) + self.draw.choice([0] * 60 + [-1, 1, 8, 1 << 40, 100_000_000 - len(header), (1 << 64) - 1 - len(header)])
        return self.damaged(max(length, 0).to_bytes(8, "little") + header + data)

    def tensor(self) -> tuple[str, str, list[int]]:
        """Draw a name, which may be drawn again, a dtype and a shape."""
        name = self.draw.choice(
            ["a", "b", "w.0", "層", "x y", "é", "", "layer.1", "__metadata__"] if self.chance(0.15) else [f"t{self.draw.randrange(10**6)}"]
        )
        dtype = self.draw.choice(OTHER_DTYPES) if self.chance(0.03) else self.draw.choice([*ITEM_SIZE])
        return (
            name,
            dtype,
            self.draw.choice(SHAPES) if self.chance(0.08) else [self.draw.randrange(5) for _ in range(self.draw.randrange(4))],
        )

    def header(self, entries: list[tuple[str, dict[str, Any]]]) -> str:
        """Write entries as JSON."""
        pairs = [(self.string(name), self.entry(fields)) for name, fields in entries]
        for _ in range(self.draw.choice([0] * 5 + [1, 1, 2])):
            pairs.insert(self.draw.randrange(len(pairs) + 1), (self.string("__metadata__"), self.metadata()))
        return f"{self.space()}{self.mapped(pairs)}{self.space()}"

    def entry(self, fields: dict[str, Any]) -> str:
        """Write one tensor's fields, mostly as everybody does."""
        values = {
            "dtype": self.string(fields["dtype"]),
            "shape": self.listed([self.number(n) for n in fields["shape"]]),
            "data_offsets": self.listed([self.number(n) for n in fields["data_offsets"]]),
        }
        if self.chance(0.04):
            values["dtype"] = self.mapped([(values["dtype"], self.draw.choice(["null", "null", "{}", "[]", "0", '""']))])
        if self.chance(0.05):
            return self.listed([*values.values(), *([self.anything(3)] if self.chance(0.2) else [])][self.draw.choice([0] * 9 + [1]) :])
        pairs = [(self.string(name), value) for name, value in values.items()]
        if self.chance(0.2):
            self.draw.shuffle(pairs)
        if self.chance(0.1):
            pairs.insert(self.draw.randrange(4), (self.draw.choice(STRINGS), self.anything(self.draw.choice([1, 3, 5]))))
        if self.chance(0.03):
            pairs.insert(self.draw.randrange(4), (self.string("more"), self.deep()))
        if self.chance(0.02):
            pairs.append(self.draw.choice(pairs))
        if self.chance(0.02):
            del pairs[self.draw.randrange(len(pairs))]
        return self.mapped(pairs) if not self.chance(self.odd / 2) else self.anything(2)

    def metadata(self) -> str:
        """Write ``__metadata__``: strings, or what looks like it."""
        if self.chance(0.3):
            return self.draw.choice(
                ["null", "{}", "[]", '""', "0", '{"a":null}', '{"a":{}}', "{,}", '{"a":"b","a":"c"}', '{"format":"pt",}']
            )
        return self.mapped([(self.string(self.draw.choice("abc")), self.string("pt")) for _ in range(self.draw.randrange(3))])

    def anything(self, levels: int) -> str:
        """Write any JSON, or nearly."""
        kind = self.draw.randrange(6 if levels else 4)
        if kind < 2:
            return self.draw.choice(NUMBERS)
        if kind < 4:
            return self.draw.choice(STRINGS)
        values = [self.anything(levels - 1) for _ in range(self.draw.randrange(4))]
        return self.listed(values) if kind == 4 else self.mapped([(self.draw.choice(STRINGS), value) for value in values])

    def deep(self) -> str:
        """Write JSON about as deep as may be."""
        ends = [
            self.draw.choice([("[", "]"), ('{"a":', "}"), ("[1,[],", "]"), ('{"b":{},"a":', "}")])
            for _ in range(self.draw.randrange(118, 130))
        ]
        inner = self.draw.choice(["1", "[]", "{}", "[1,2]", '"x"', "[[]]"])
        return "".join(begin for begin, _ in ends) + inner + "".join(end for _, end in reversed(ends))

    def string(self, text: str) -> str:
        """Write a string, rarely another one."""
        return self.draw.choice(STRINGS) if self.chance(self.odd) else json.dumps(text, ensure_ascii=self.chance(0.3))

    def number(self, number: int) -> str:
        """Write a number, rarely in another form, or another one."""
        return (
            self.draw.choice([*NUMBERS, f"{number}.0", f"-{number}", f"0{number}", f"{number}e0"])
            if self.chance(self.odd / 2)
            else str(number)
        )

    def space(self) -> str:
        """Write nothing, or what may be white space."""
        return self.draw.choice(SPACES) if self.chance(self.odd) else ""

    def listed(self, values: list[str]) -> str:
        """Write a list."""
        return "[" + self.separated(values) + "]"

    def mapped(self, pairs: list[tuple[str, str]]) -> str:
        """Write a map."""
        return "{" + self.separated([f"{name}{self.space()}:{self.space()}{value}" for name, value in pairs]) + "}"

    def separated(self, values: list[str]) -> str:
        """Write values with commas between them, and rarely one more."""
        text = ",".join(f"{self.space()}{value}{self.space()}" for value in values)
        return text + "," * self.chance(self.odd / 5)

    def shuffle(self, entries: list[Any]) -> list[Any]:
        """Entries in another order than their bytes."""
        return self.draw.sample(entries, len(entries))

    def twice(self, entries: list[Any]) -> list[Any]:
        """Name one entry again, with the fields of another one."""
        if not entries:
            return entries
        (name, fields), (_, others) = self.draw.choice(entries), self.draw.choice(entries)
        return self.draw.choice(
            [
                [(name, others), *entries],
                [*entries, (name, fields)],
                [*entries, (name, others)],
                [(name, dict(fields, shape=[2**62, 4])), *entries],
            ]
        )

    def lie(self, entries: list[Any]) -> list[Any]:
        """Change a number, a dtype or a shape."""
        if not entries:
            return entries
        i = self.draw.randrange(len(entries))
        name, fields = entries[i]
        start, stop = (*fields["data_offsets"], 0, 0)[:2]
        change: dict[str, Any] = self.draw.choice([
            {"data_offsets": [start + self.draw.choice([-1, 1, 4]), stop]},
            {"data_offsets": [start, stop + self.draw.choice([-1, 1, 4, 1 << 63, 1 << 64])]},
            {"data_offsets": [stop, start]},
            {"data_offsets": [start, start]},
            {"data_offsets": [start]},
            {"data_offsets": [start, stop, stop]},
            {"data_offsets": [0, (1 << 64) - 1]},
            {"shape": self.draw.choice(SHAPES)},
            {"shape": [*fields["shape"], 1]},
            {"shape": fields["shape"][::-1]},
            {"dtype": self.draw.choice([*ITEM_SIZE, *OTHER_DTYPES, "F33", "", "BF32"])},
        ])  # fmt: skip
        return [*entries[:i], (name, fields | change), *entries[i + 1 :]]

    def nothing(self, entries: list[Any]) -> list[Any]:
        """Leave entries as they are."""
        return entries

    def damaged(self, data: bytes) -> bytes:
        """Change some bytes, rarely."""
        file = bytearray(data)
        while self.chance(0.06):
            at, length = self.draw.randrange(len(file) + 1), self.draw.choice([1, 1, 1, 2, 9])
            match self.draw.randrange(5):
                case 0:
                    file[at : at + length] = self.draw.randbytes(length)
                case 1:
                    del file[at : at + length]
                case 2:
                    file[at:at] = self.draw.choice(
                        [
                            b'"',
                            b"{",
                            b"}",
                            b"[",
                            b"]",
                            b",",
                            b":",
                            b" ",
                            b"0",
                            b"-",
                            b"e",
                            b".",
                            b"\\",
                            b"\xff",
                            b"\xed\xa0\x80",
                            b"\xc0\x80",
                            b"\xf4\x90\x80\x80",
                        ]
                    )
                case 3:
                    del file[at:]
                case 4:
                    other = self.draw.randrange(len(file) + 1)
                    file[at:at] = file[other : other + length]
        return bytes(file)

    def chance(self, of: float) -> bool:
        """Draw whether something happens."""
        return self.draw.random() < of


def theirs(file: bytes) -> Found | None:
    """Read a file with the library; None if it refuses."""
    try:
        found = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found}


def ours(file: bytes) -> Found | InvalidUpdate:
    """Read a file ourselves; whatever else may be raised comes out."""
    store = MemoryStore()
    store.put("a", [file])
    try:
        return {name: (raw.dtype, raw.shape, bytes(raw.data)) for name, raw in load_raw("a", store).items()}
    except InvalidUpdate as error:
        return error


def check(seed: int, count: int) -> int:
    """Hold so many files of a seed against the library; give how many were accepted."""
    fuzz, accepted = Fuzz(seed), 0
    for i in range(count):
        file = fuzz.file()
        expected, actual = theirs(file), ours(file)
        if isinstance(actual, InvalidUpdate):
            named = "; supported are F64, F32" in actual.message and any(dtype.encode() in file for dtype in OTHER_DTYPES)
            assert expected is None or named, f"file {i} of seed {seed}: {file!r}: {actual}"
            assert actual.message.isprintable(), f"file {i} of seed {seed}"
            assert len(actual.message) < 2_000, f"file {i} of seed {seed}"
        else:
            assert expected == actual, f"file {i} of seed {seed}: {file!r}"
            accepted += 1
    return accepted


@pytest.mark.parametrize("fresh", [False, True])
def test_fuzzed_files(fresh: bool) -> None:
    """Fuzzed files are read as the library reads them: some that are always the same, and some that are new each time."""
    seed = random.SystemRandom().randrange(1 << 32) if fresh else 1

    assert 500 < check(seed, 2_000) < 1_500, f"seed {seed}"


@pytest.mark.slow
def test_many_fuzzed_files() -> None:
    """The same for 20,000 files."""
    seed = random.SystemRandom().randrange(1 << 32)

    assert 5_000 < check(seed, 20_000) < 15_000, f"seed {seed}"


USUAL = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]%s}'


@pytest.mark.parametrize(
    "write",
    [
        lambda number: '{"w":%s}' % (USUAL % f',"more":{number}'),
        lambda number: '{"w":%s}' % (USUAL % f',"more":[1,{number},"a"]'),
        lambda number: '{"w":%s}' % (USUAL % f',"more":{{"a":{number}}}'),
        lambda number: f'{{"w":{{"dtype":"F32","shape":[{number}],"data_offsets":[0,4]}}}}',
        lambda number: f'{{"w":{{"dtype":"F32","shape":[1],"data_offsets":[0,{number}]}}}}',
    ],
)
def test_numbers(write: Callable[[str], str]) -> None:
    """Every form of a number is taken where the library takes it, close to the end of float64 too."""
    edge = random.Random(2)
    close = [f"{edge.randrange(10**16, 10 ** edge.randrange(17, 25))}e{edge.randrange(285, 293)}" for _ in range(200)]
    close += [f"{edge.randrange(1, 3)}.{edge.randrange(10 ** edge.randrange(1, 30))}e{edge.choice([307, 308])}" for _ in range(200)]
    for number in [*NUMBERS, *close, *map(str, range(10))]:
        header = write(number).encode()
        file = len(header).to_bytes(8, "little") + header + b"1234"
        assert (theirs(file) is None) == isinstance(ours(file), InvalidUpdate), number
