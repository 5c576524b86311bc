"""safetensors as a stream: header and length are known before any weight is.

Bytes equal `safetensors.torch.save` of the same tensors and metadata. Knows shapes and names, not
where the tensors come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neumeta.architecture import Architecture, Space
from neumeta.family import shape

DTYPES = {
    "float32": (torch.float32, "F32", 4),
    "float16": (torch.float16, "F16", 2),
    "bfloat16": (torch.bfloat16, "BF16", 2),
}


@dataclass(frozen=True)
class Plan:
    """The file of one architecture before it exists: its header and every tensor's place."""

    header: bytes
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    length: int
    """Total bytes, header included."""


def plan(
    space: Space, architecture: Architecture, dtype: str, normalisation: dict[str, list[float]]
) -> Plan:
    """The header and length of the file of this architecture; nothing is materialized.

    The one metadata key holds one JSON string, because safetensors writes several keys in an
    unstable order.
    """
    sizes = space.sizes(architecture)
    tensors = sorted(space.table.tensors(architecture.depth), key=lambda tensor: tensor.name)
    about = {
        "family": architecture.family,
        "depth": list(architecture.depth),
        "channels": list(architecture.channels),
        "sizes": sizes,
        "normalisation": normalisation,
    }
    shapes = tuple(shape(tensor, sizes) for tensor in tensors)
    names = tuple(tensor.name for tensor in tensors)
    metadata = {"neumeta": json.dumps(about, sort_keys=True, separators=(",", ":"))}
    return plan_tensors(names, shapes, dtype, metadata)


def plan_tensors(
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    metadata: dict[str, str],
) -> Plan:
    """The plan of tensors of one dtype, names already sorted. The header is padded to 8 bytes."""
    _, code, width = DTYPES[dtype]
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, dimensions in zip(names, shapes, strict=True):
        end = offset + math.prod(dimensions) * width
        entries[name] = {"dtype": code, "shape": list(dimensions), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Plan(header, names, shapes, dtype, len(header) + offset)


def encode(tensor: Tensor, dtype: str) -> bytes:
    """A tensor's bytes on the wire: row-major, little-endian, rounded to nearest even."""
    kind = DTYPES[dtype][0]
    array = tensor.detach().to("cpu", kind).contiguous().flatten()
    return array.view(torch.uint8).numpy().tobytes()


def stream(plan: Plan, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes]:
    """The header, then each tensor's bytes.

    Raises ValueError if the tensors are not exactly the planned ones, in order, or not finite.
    """
    yield plan.header
    due = iter(zip(plan.names, plan.shapes, strict=True))
    for name, tensor in tensors:
        planned, dimensions = next(due, (None, ()))
        if name != planned or tuple(tensor.shape) != dimensions:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} where {planned} {dimensions} is planned"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: sampled weights are not finite")
        yield encode(tensor, plan.dtype)
    missing = next(due, None)
    if missing is not None:
        raise ValueError(f"{missing[0]}: planned but never sampled")
