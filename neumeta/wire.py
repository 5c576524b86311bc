"""A network's file as a stream: header and length are known before any weight is.

A safetensors file's bytes equal `safetensors.torch.save` of the same tensors and metadata; what an ONNX
model is made of is `onnx.py`'s. Knows shapes and names, not where the tensors come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from neumeta import onnx
from neumeta.manifold import Manifold
from neumeta.notation import pack
from neumeta.plan import Plan
from neumeta.space import Architecture, Space

FORMAT = 2
"""Of the metadata in a pulled file: the graph travels with the weights since 2."""

DTYPES = {
    "float32": (torch.float32, "F32", 4),
    "float16": (torch.float16, "F16", 2),
    "bfloat16": (torch.bfloat16, "BF16", 2),
}


FORMATS = ("safetensors", "onnx")
"""Of a file: weights that `network.load` runs, or a model that ONNX Runtime does."""


def plan(
    manifold: Manifold, architecture: Architecture, dtype: str, file_format: str = "safetensors"
) -> Plan:
    """The header and length of the file of this architecture; nothing is materialized.

    The one metadata key holds one JSON string, because safetensors writes several keys in an
    unstable order.
    """
    space = manifold.space
    graph, sizes = space.graph_of(architecture).folded, space.sizes(architecture)
    if file_format == "onnx":
        return onnx.plan(graph, sizes, about(manifold, architecture), dtype)
    names = tuple(sorted(graph.tensors))
    shapes = tuple(graph.shape(name, sizes) for name in names)
    metadata = {
        "neumeta": json.dumps(about(manifold, architecture), sort_keys=True, separators=(",", ":"))
    }
    return plan_tensors(names, shapes, dtype, metadata)


def about(manifold: Manifold, architecture: Architecture) -> dict[str, Any]:
    """What a device needs to know beside the weights: the graph, its size, and the input's contract."""
    space, contract = manifold.space, manifold.contract
    return {
        "format": FORMAT,
        "arch": space.name,
        "names": sorted(name for name, each in space.named.items() if each == architecture.depth),
        "graph": packed(space),
        "depth": list(architecture.depth),
        "channels": list(architecture.channels),
        "mean": list(contract.mean),
        "std": list(contract.std),
        "task": contract.task,
        "classes": list(contract.classes),
    }


@lru_cache(maxsize=32)
def packed(space: Space) -> str:
    """The folded graph of the source's size, as every pulled file holds it."""
    return pack(space.graph.folded)


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
    return Plan(header, names, shapes, dtype, len(header) + offset, (b"",) * len(names))


def encode(name: str, tensor: Tensor, dtype: str) -> bytes:
    """A tensor's bytes on the wire: row-major, little-endian, rounded to nearest even.

    Raises ValueError if it holds a number that is not finite, or becomes so when it is rounded.
    """
    kind = DTYPES[dtype][0]
    array = tensor.detach().to("cpu", kind).contiguous().flatten()
    if not bool(torch.isfinite(array).all()):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: sampled weights are not finite")
        largest, most = float(tensor.detach().abs().max()), torch.finfo(kind).max
        raise ValueError(f"{name}: a weight of {largest:.4g} is beyond {dtype}'s {most:.4g}")
    return array.view(torch.uint8).numpy().tobytes()


def stream(plan: Plan, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes]:
    """The header, then each tensor's bytes behind its frame.

    Raises ValueError if the tensors are not exactly the planned ones, in order, or not finite in the
    plan's dtype.
    """
    yield plan.header
    due = iter(zip(plan.names, plan.shapes, plan.frames, strict=True))
    for name, tensor in tensors:
        planned, dimensions, frame = next(due, (None, (), b""))
        if name != planned or tuple(tensor.shape) != dimensions:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} where {planned} {dimensions} is planned"
            )
        yield frame + encode(name, tensor, plan.dtype)
    missing = next(due, None)
    if missing is not None:
        raise ValueError(f"{missing[0]}: planned but never sampled")
