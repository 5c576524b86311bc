"""A network's file as a stream: header and length are known before any weight is.

A safetensors file's bytes equal `safetensors.torch.save` of the same tensors and metadata, but for the
order of an int8 file's; what an ONNX model is made of is `onnx.py`'s. Knows shapes and names, not where
the tensors come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from neumeta import onnx
from neumeta.graph import Graph, Sizes
from neumeta.manifold import Manifold
from neumeta.notation import pack
from neumeta.plan import Part, Plan, layout
from neumeta.space import Architecture, Space

FORMAT = 2
"""Of the metadata in a pulled file: the graph travels with the weights since 2."""

KINDS = {
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "int8": (torch.int8, "I8"),
}
"""By dtype, torch's and safetensors' names for it."""
LEVELS = 127
"""The largest int8 number that is used: -128 has no counterpart."""

FORMATS = ("safetensors", "onnx")
"""Of a file: weights that `network.load` runs, or a model that ONNX Runtime does."""


def plan(
    manifold: Manifold, architecture: Architecture, dtype: str, file_format: str = "safetensors"
) -> Plan:
    """The header and length of the file of this architecture; nothing is materialized."""
    space = manifold.space
    graph, sizes = space.graph_of(architecture).folded, space.sizes(architecture)
    write = onnx.plan if file_format == "onnx" else plan_graph
    return write(graph, sizes, about(manifold, architecture), dtype)


def plan_graph(graph: Graph, sizes: Sizes, told: Mapping[str, Any], dtype: str) -> Plan:
    """The safetensors file of a folded graph whose axes have these sizes.

    The one metadata key holds one JSON string, because safetensors writes several keys in an
    unstable order.
    """
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    parts, scales = layout(graph, sizes, dtype)
    header, length = header_of(parts, {"neumeta": text})
    names = tuple(sorted(graph.tensors))
    shapes = tuple(graph.shape(name, sizes) for name in names)
    return Plan(header, names, shapes, dtype, length, scales=scales)


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


def header_of(parts: Sequence[Part], metadata: dict[str, str]) -> tuple[bytes, int]:
    """The header of a file of these parts, and the length of all of it.

    The header is padded so that what follows it starts at a multiple of 8; where int8 comes first,
    which may start anywhere, so that what follows that does.
    """
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = shift = 0
    for part in parts:
        end = offset + part.bytes
        code = KINDS[part.dtype][1]
        entries[part.name] = {
            "dtype": code,
            "shape": list(part.shape),
            "data_offsets": [offset, end],
        }
        offset = end
        if part.dtype == "int8":
            shift = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + shift) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + offset


def encode(name: str, tensor: Tensor, dtype: str) -> bytes:
    """A tensor's bytes on the wire: row-major, little-endian, rounded to nearest even.

    Raises ValueError if it holds a number that is not finite, or becomes so when it is rounded.
    """
    kind = KINDS[dtype][0]
    array = tensor.detach().to("cpu", kind).contiguous().flatten()
    if not bool(torch.isfinite(array).all()):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: sampled weights are not finite")
        largest, most = float(tensor.detach().abs().max()), torch.finfo(kind).max
        raise ValueError(f"{name}: a weight of {largest:.4g} is beyond {dtype}'s {most:.4g}")
    return array.view(torch.uint8).numpy().tobytes()


def quantized(name: str, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """int8 numbers of a tensor's shape, and float32 factors, one for each place of `axis`, by which
    they are the tensor again: nowhere off by more than half a factor.

    The largest number of a channel becomes 127 or -127, the others are rounded, halves to even. A
    channel of nothing but zeros, or of numbers too small for a factor that every processor can hold,
    is zeros times 1. Raises ValueError if a number is not finite.
    """
    exact = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(exact).all()):
        raise ValueError(f"{name}: sampled weights are not finite")
    rest = [place for place in range(exact.ndim) if place != axis]
    factors = exact.abs().amax(rest, keepdim=True) / LEVELS
    factors[factors < torch.finfo(torch.float32).tiny] = 1.0
    return (exact / factors).round().clamp(-LEVELS, LEVELS).to(torch.int8), factors


def stream(plan: Plan, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes]:
    """The header, then each tensor's bytes behind its frame; of int8, those of scales and of tensors
    that stay float32 at the end.

    Raises ValueError if the tensors are not exactly the planned ones, in order, or not finite in the
    plan's dtype.
    """
    yield plan.header
    due = iter(zip(plan.names, plan.shapes, strict=True))
    late: list[bytes] = []
    for name, tensor in tensors:
        planned, dimensions = next(due, (None, ()))
        if name != planned or tuple(tensor.shape) != dimensions:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} where {planned} {dimensions} is planned"
            )
        frame = plan.frames.get(name, b"")
        if scales := plan.scales.get(name):
            numbers, factors = quantized(name, tensor, scales.axis)
            yield frame + numbers.numpy().tobytes()
            late.append(plan.frames.get(scales.name, b"") + encode(name, factors, "float32"))
        elif plan.dtype == "int8":
            late.append(frame + encode(name, tensor, "float32"))
        else:
            yield frame + encode(name, tensor, plan.dtype)
    missing = next(due, None)
    if missing is not None:
        raise ValueError(f"{missing[0]}: planned but never sampled")
    yield from late
