"""The little of protobuf's wire format that an ONNX file needs: written, and read without trust.

https://protobuf.dev/programming-guides/encoding: a message is a row of fields, each a key (number and
wire type) and a value. Knows no message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

VARINT, EIGHT, DATA, FOUR = 0, 1, 2, 5
"""Wire types."""


def varint(value: int) -> bytes:
    """A whole number, seven bits a byte, the lowest first; a negative one as int64."""
    if 0 <= value < 128:  # most are
        return bytes((value,))
    value &= (1 << 64) - 1
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
    return bytes(made)


def number(field: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return varint(field << 3 | VARINT) + varint(value)


def single(field: int, value: float) -> bytes:
    """A field that holds a float32."""
    return varint(field << 3 | FOUR) + float32(value)


def before(field: int, length: int) -> bytes:
    """What stands before `length` bytes that are the value of a field."""
    return varint(field << 3 | DATA) + varint(length)


def data(field: int, value: bytes | str) -> bytes:
    """A field that holds bytes, a text or a message."""
    raw = value.encode() if isinstance(value, str) else value
    return before(field, len(raw)) + raw


def float32(value: float) -> bytes:
    """The nearest float32, little-endian; infinite beyond its range."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field, first, last) of each field of the message at [start, end) of a file: where the bytes of
    its value lie, or, of a number, the number twice.

    Raises ValueError for what is no message of exactly these bytes.
    """
    at = start
    while at < end:
        file.seek(at)
        raw = file.read(min(20, end - at))
        key, used = _varint(raw, 0)
        kind = key & 7
        if kind == VARINT:
            value, used = _varint(raw, used)
            at += used
            yield key >> 3, value, value
            continue
        length = {EIGHT: 8, FOUR: 4}.get(kind, -1)
        if kind == DATA:
            length, used = _varint(raw, used)
        first = at + used
        at = first + length
        if length < 0 or at > end:
            raise ValueError(f"no field of a message at byte {first}")
        yield key >> 3, first, at


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at this place and where it ends."""
    value = 0
    for place, byte in enumerate(raw[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("a number that does not end")
