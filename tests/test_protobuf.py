"""Protobuf's wire format: bytes as its guide writes them, read back, and refused where they are cut."""

from __future__ import annotations

import struct
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neumeta import protobuf


def read(raw: bytes, start: int = 0) -> list[tuple[int, int, int]]:
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        return list(protobuf.fields(file, start, len(raw)))


def test_bytes_are_those_of_the_guide() -> None:
    """https://protobuf.dev/programming-guides/encoding"""
    assert protobuf.number(1, 150) == b"\x08\x96\x01"
    assert protobuf.data(2, "testing") == b"\x12\x07testing" == protobuf.before(2, 7) + b"testing"
    assert protobuf.number(1, -2) == b"\x08\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    assert (protobuf.varint(0), protobuf.varint(127)) == (b"\x00", b"\x7f")
    assert protobuf.varint(128) == b"\x80\x01"
    assert protobuf.single(4, 0.5) == b"\x25" + struct.pack("<f", 0.5)
    for number, nearest in ((1e300, float("inf")), (-1e300, float("-inf")), (1e38, 1e38)):
        (found,) = struct.unpack("<f", protobuf.float32(number))
        assert found == pytest.approx(nearest)


@given(st.integers(1, 1000), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=300))
def test_fields_are_read_where_they_lie(field: int, value: int, raw: bytes) -> None:
    eight = protobuf.varint(field << 3 | 1) + bytes(8)
    whole = [protobuf.number(field, value), eight, protobuf.data(field + 1, raw)]
    whole += [protobuf.single(field, 2.5), protobuf.number(field, 7)]
    ends = [2 + sum(map(len, whole[: n + 1])) for n in range(len(whole))]
    assert read(b"no" + b"".join(whole), 2) == [
        (field, value % 2**64, value % 2**64),
        (field, ends[1] - 8, ends[1]),
        (field + 1, ends[2] - len(raw), ends[2]),
        (field, ends[3] - 4, ends[3]),
        (field, 7, 7),
    ]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x12\x07testin",  # shorter than it says
        b"\x25\x00\x00\x00",
        b"\x09" + bytes(7),
        b"\x0b\x18\x03",  # a group, which nobody writes any more
        b"\x08" + b"\xff" * 10,  # a number that does not end
        b"\x08",
        b"\x80",
    ],
)
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="no field of a message|does not end"):
        read(protobuf.number(3, 3) + raw)
