"""A network as a ready-to-run ONNX model: all of it but the weights is known before any weight is.

The protobuf is written here, in an order that suits a stream: everything about the model first, and
the weights as the last fields of the graph. Knows no manifold, no torch, and needs no onnx package.

Opset 17 (IR 8) is the lowest that has layer normalization, and so the one that most runtimes on
devices know; what later opsets added (GELU, Mish, group norm) is a few nodes of it here.
Weights of half precision or int8 are made float32 when a runtime loads them: fewer bytes, and every
runtime can compute with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from neumeta import __version__
from neumeta.graph import BATCH, Dim, Graph, Sizes, extent
from neumeta.onnx_nodes import FLOAT, WRITERS, Ints, Model, Step
from neumeta.operations import OPERATIONS
from neumeta.plan import Plan, Scales, layout
from neumeta.protobuf import before, data, fields, number
from neumeta.shapes import numeric

OPSET, IR = 17, 8
TYPES = {"float32": FLOAT, "float16": 10, "bfloat16": 16, "int8": 3}
"""TensorProto's data types."""
LONGEST = (1 << 31) - 1
"""Bytes that a protobuf message may have."""
MOST_TEXT = 16 << 20
"""Bytes of a text that is read."""

Tensor = tuple[int, Ints, int]
"""Data type, shape and bytes."""


def _value(name: str, shape: Ints) -> bytes:
    """A ValueInfoProto: a float32 input or output, its batch of any size."""
    dims = [data(2, BATCH) if size == -1 else number(1, size) for size in shape]
    held = number(1, FLOAT) + data(2, b"".join(data(1, dim) for dim in dims))
    return data(1, name) + data(2, data(1, held))


def plan(graph: Graph, sizes: Sizes, about: Mapping[str, Any], dtype: str) -> Plan:
    """The model of a folded graph whose axes have these sizes; its weights are of `dtype`.

    The input is float32 pixels in [0, 1], normalised inside by the `mean` and `std` of `about`, which
    is the model's metadata `neumeta`, as JSON. Outputs are float32: `output`, or as many as the network
    has, by key.
    """
    names = tuple(sorted(graph.tensors))
    shapes = {name: graph.shape(name, sizes) for name in names}
    parts, scales = layout(graph, sizes, dtype)
    model = Model({part.name for part in parts})
    inputs = model.named("input")
    ends = []
    for key, _ in graph.outputs:
        ends.append(model.named(f"output{key}" if not key or key.isdigit() else key))
    interface = _nodes(model, graph, sizes, about, shapes, dtype, scales, inputs, ends)
    texts = json.dumps(about, sort_keys=True, separators=(",", ":"))
    head = b"".join(
        (
            number(1, IR),
            data(2, "neumeta"),
            data(3, __version__),
            data(8, number(2, OPSET)),
            data(14, data(1, "neumeta") + data(2, texts)),
        )
    )
    inner = [data(2, str(about.get("arch", "network"))), *interface]
    inner += [data(1, node) for node in model.nodes]
    inner += [data(5, held + data(8, name)) for held, name in model.constants.items()]
    body = b"".join(inner)
    frames, length = {}, len(body)
    for part in parts:
        dims = b"".join(number(1, size) for size in part.shape)
        held = dims + number(2, TYPES[part.dtype]) + data(8, part.name) + before(9, part.bytes)
        frames[part.name] = before(5, len(held) + part.bytes) + held
        length += len(frames[part.name]) + part.bytes
    header = head + before(7, length) + body
    return Plan(
        header,
        names,
        tuple(shapes.values()),
        dtype,
        len(header) - len(body) + length,
        frames,
        scales,
    )


def contents(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a model says of itself, and every tensor in it, by name.

    Raises ValueError for what is no whole model of ours.
    """
    about: Any = None
    found: dict[str, Tensor] = {}
    for field, first, last in fields(file, 0, size):
        if field == 14:
            pair = {key: _read(file, *at) for key, *at in fields(file, first, last)}
            if pair.get(1) == b"neumeta":
                about = json.loads(pair.get(2, b""))
        elif field == 7:
            for part, start, end in fields(file, first, last):
                if part == 5:
                    name, tensor = _tensor(file, start, end)
                    found[name] = tensor
    if not isinstance(about, dict):
        raise ValueError("its metadata has no 'neumeta'")
    return about, found


def _tensor(file: BinaryIO, start: int, end: int) -> tuple[str, Tensor]:
    name, kind, raw, shape = b"", 0, 0, []
    for field, first, last in fields(file, start, end):
        if field == 1:
            shape.append(first)
        elif field == 2:
            kind = first
        elif field == 8:
            name = _read(file, first, last)
        elif field == 9:
            raw = last - first
    return name.decode(), (kind, tuple(shape), raw)


def _read(file: BinaryIO, first: int, last: int) -> bytes:
    if last - first > MOST_TEXT:
        raise ValueError("a text without end")
    file.seek(first)
    return file.read(last - first)


def _nodes(
    model: Model,
    graph: Graph,
    sizes: Sizes,
    about: Mapping[str, Any],
    tensors: Mapping[str, Ints],
    dtype: str,
    scales: Mapping[str, Scales],
    inputs: str,
    ends: Sequence[str],
) -> list[bytes]:
    """Write every node of the network; its inputs and outputs as the graph states them."""
    values = {"input": inputs}
    shapes = {"input": _shape(graph.input, sizes)}
    interface = [data(11, _value(inputs, shapes["input"]))]
    model.stem = "/input"
    around = (shapes["input"][1], *[1] * (len(shapes["input"]) - 2))
    mean, std = (model.floats(*about[key], shape=around) for key in ("mean", "std"))
    values["input"] = model.op("Div", model.op("Sub", inputs, mean), std)
    whole: dict[str, str] = {}
    for node in graph.nodes:
        model.stem = f"/{node.name}"
        for name in node.tensors.values():
            if name not in whole:
                whole[name] = _whole(model, name, dtype, scales.get(name))
        kinds = OPERATIONS[node.op].attributes
        shapes[node.name] = _shape(node.shape, sizes)
        step = Step(
            tuple(values[value] for value in node.inputs),
            tuple(shapes[value] for value in node.inputs),
            {role: whole[name] for role, name in node.tensors.items()},
            {role: tensors[name] for role, name in node.tensors.items()},
            {key: numeric(value, kinds[key], sizes) for key, value in node.attributes.items()},
            shapes[node.name],
        )
        values[node.name] = WRITERS[node.op](model, step)
    for (_, value), end in zip(graph.outputs, ends, strict=True):
        model.op("Identity", values[value], makes=end)
        interface.append(data(12, _value(end, shapes[value])))
    return interface


def _whole(m: Model, name: str, dtype: str, scales: Scales | None) -> str:
    """A tensor of the file in float32.

    DequantizeLinear would be one node for int8, with the same result, but ONNX Runtime does it in every
    run, and these when it loads the model (docs/onnx.md has figures).
    """
    if scales:
        return m.op("Mul", m.op("Cast", name, to=FLOAT), scales.name)
    return name if dtype in ("float32", "int8") else m.op("Cast", name, to=FLOAT)


def _shape(shape: tuple[Dim, ...], sizes: Sizes) -> Ints:
    return tuple(-1 if dim == ((BATCH, 1),) else extent(dim, sizes) for dim in shape)
