"""A graph as compact JSON text, and back, trusting nothing that is read.

What is wrong with a graph in a file is found here, by name and before anything is allocated: by a
device and by the service alike. Knows no weights.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from neumeta.graph import (
    BATCH,
    MOST_NODES,
    MOST_PARTS,
    Axis,
    Dim,
    Graph,
    Node,
    Shape,
    Stage,
    interface,
)
from neumeta.operations import OPERATIONS

MOST_TEXT = 8 << 20
MOST_STAGES = 64
MOST_SIZE = 1 << 20
"""Channels that an axis of a pulled file may have."""
MOST_BLOCKS = 256
"""Children that a stage of a pulled file may have."""
MOST_COUNT = 1 << 24
"""Bound of any single number of indices."""
TEXTS = {
    "mode": ("nearest", "bilinear", "bicubic", "constant", "reflect", "replicate", "circular"),
    "approximate": ("none", "tanh"),
}


class BadGraph(ValueError):
    """A graph that is damaged or tampered with; the message names the node, axis or tensor."""


def dump(graph: Graph) -> dict[str, Any]:
    """The graph as JSON values."""
    return {
        "input": [_out(dim) for dim in graph.input],
        "axes": {name: [axis.size, axis.group] for name, axis in graph.axes.items()},
        "tensors": {name: [_out(dim) for dim in shape] for name, shape in graph.tensors.items()},
        "nodes": [
            [
                node.name,
                node.op,
                list(node.inputs),
                dict(node.tensors),
                {
                    key: _written(OPERATIONS[node.op].attributes[key], value)
                    for key, value in node.attributes.items()
                },
                [_out(dim) for dim in node.shape],
                node.module,
            ]
            for node in graph.nodes
        ],
        "outputs": [list(output) for output in graph.outputs],
        "stages": [
            # A prefix is rare, and left out where there is none.
            [s.name, s.children, s.first, s.blocks, *([s.prefix] if s.prefix else [])]
            for s in graph.stages
        ],
    }


def _out(dim: Dim) -> Any:
    """A dimension: a number if it is constant, the axis' name if it is that axis, else its parts."""
    if len(dim) == 1:
        axis, repeat = dim[0]
        if not axis:
            return repeat
        if repeat == 1:
            return axis
    return [[axis, repeat] for axis, repeat in dim]


def _written(kind: str, value: Any) -> Any:
    if kind == "dim":
        return _out(value)
    if kind == "dims":
        return [_out(dim) for dim in value]
    return list(value) if isinstance(value, tuple) else value


def pack(graph: Graph) -> str:
    """The graph as a short ASCII text: compressed JSON."""
    # In the graph's own order: groups are listed in that of the forward pass.
    text = json.dumps(dump(graph), separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def unpack(text: Any) -> Graph:
    """The graph that `pack` wrote. Raises BadGraph."""
    if not isinstance(text, str):
        raise BadGraph(f"the graph is a {type(text).__name__}, not a text")
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(base64.b85decode(text), MOST_TEXT)
        if not inflater.eof:
            raise BadGraph(f"the graph is cut short, or longer than {MOST_TEXT} bytes")
        held = json.loads(raw)
    except (ValueError, zlib.error, RecursionError) as error:
        if isinstance(error, BadGraph):
            raise
        raise BadGraph(f"the graph cannot be read: {str(error)[:100]}") from None
    return parse(held)


def parse(held: Any) -> Graph:
    """The graph of these JSON values, every part of them checked. Raises BadGraph.

    Whether operations fit together is `program.check`'s, at the sizes that will be run.
    """
    try:
        graph = _Reader(held).graph()
    except BadGraph:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise BadGraph(
            f"the graph is malformed: {type(error).__name__}: {str(error)[:100]}"
        ) from None
    return graph


def sized(about: Mapping[str, Any]) -> tuple[Graph, dict[str, int]]:
    """The graph of a pulled file at its depth, and the size of every axis of it, from the file's
    `graph`, `depth` and `channels`. Raises BadGraph before anything of that size is made."""
    graph = unpack(about.get("graph"))
    depth, channels = about.get("depth"), about.get("channels")
    if (
        not isinstance(depth, list)
        or len(depth) != len(graph.stages)
        or not all(
            type(count) is int and stage.least <= count <= MOST_BLOCKS
            for count, stage in zip(depth, graph.stages, strict=True)
        )
    ):
        allowed = f"{len(graph.stages)} whole numbers of at most {MOST_BLOCKS}"
        raise BadGraph(f"depth: {str(depth)[:80]} is not {allowed}")
    nodes = len(graph.nodes) + sum(
        len(graph.block(stage, stage.first)) * count
        for count, stage in zip(depth, graph.stages, strict=True)
    )
    if nodes > MOST_NODES:
        raise BadGraph(f"depth: {str(depth)[:80]} gives more than {MOST_NODES} nodes")
    extents = dict.fromkeys((axis.group, axis.size) for axis in graph.axes.values())
    order = sorted(extents, key=lambda extent: graph.groups.index(extent[0]))
    if (
        not isinstance(channels, list)
        or len(channels) != len(order)
        or not all(type(count) is int and 1 <= count <= MOST_SIZE for count in channels)
    ):
        allowed = f"{len(order)} whole numbers from 1 to {MOST_SIZE}"
        raise BadGraph(f"channels: {str(channels)[:80]} is not {allowed}")
    try:
        here = graph.at(tuple(depth))
    except (ValueError, KeyError) as error:
        raise BadGraph(f"depth: {depth} cannot be made: {error}") from None
    by_extent = dict(zip(order, channels, strict=True))
    return here, {name: by_extent[axis.group, axis.size] for name, axis in here.axes.items()}


class _Reader:
    """One pass over the JSON values of a graph."""

    def __init__(self, held: Any) -> None:
        if not isinstance(held, dict) or set(held) != {
            "input",
            "axes",
            "tensors",
            "nodes",
            "outputs",
            "stages",
        }:
            raise BadGraph(
                "the graph is not an object of input, axes, tensors, nodes, outputs, stages"
            )
        self.held = held
        self.axes: dict[str, Axis] = {}
        self.tensors: dict[str, Shape] = {}
        self.values = {"input"}
        self.parts = 0

    def graph(self) -> Graph:
        for name, entry in _object(self.held["axes"], "axes").items():
            size, group = entry
            self.axes[_name(name)] = Axis(_count(size, f"axis {name}"), _name(group))
            if name == BATCH:
                raise BadGraph("axis batch: the name is taken")
        for name, shape in _object(self.held["tensors"], "tensors").items():
            self.tensors[_name(name)] = self.shape(shape, f"tensor {name}")
        nodes = self.held["nodes"]
        if not isinstance(nodes, list) or not 0 < len(nodes) <= MOST_NODES:
            raise BadGraph(f"nodes: not a list of 1 to {MOST_NODES}")
        made = tuple(self.node(entry) for entry in nodes)
        used = {name for node in made for name in node.tensors.values()}
        if unused := sorted(set(self.tensors) - used):
            raise BadGraph(f"tensor {unused[0]}: no node holds it")
        outputs = []
        for key, value in self.held["outputs"]:
            if value not in self.values or not isinstance(key, str):
                raise BadGraph(f"outputs: {str(value)[:60]!r} is no value")
            outputs.append((key, value))
        if not outputs:
            raise BadGraph("outputs: there is none")
        graph = Graph(
            self.shape(self.held["input"], "input", batch=True),
            self.axes,
            self.tensors,
            made,
            tuple(outputs),
        )
        return self.with_stages(graph)

    def with_stages(self, graph: Graph) -> Graph:
        stages: list[Stage] = []
        entries = self.held["stages"]
        if not isinstance(entries, list) or len(entries) > MOST_STAGES:
            raise BadGraph(f"stages: not a list of at most {MOST_STAGES}")
        for name, children, first, blocks, *more in entries:
            stage = Stage(
                _name(name),
                _count(children, f"stage {name}"),
                _whole(first, f"stage {name}"),
                _count(blocks, f"stage {name}"),
                *(_name(prefix) for prefix in more[:1]),
            )
            if len(more) > 1:
                raise BadGraph(f"stage {name}: more than a prefix follows its blocks")
            if stage.first + stage.blocks > stage.children or stage.children > 4096:
                raise BadGraph(f"stage {name}: blocks beyond its children")
            for other in stages:
                if f"{name}.".startswith(f"{other.name}.") or other.name.startswith(f"{name}."):
                    raise BadGraph(f"stage {name}: lies in stage {other.name}, or around it")
            stages.append(stage)
        made = replace(graph, stages=tuple(stages))
        for stage in stages:
            try:
                ends = [
                    interface(made, made.block(stage, child))
                    for child in range(stage.first, stage.first + stage.blocks)
                ]
            except ValueError as error:
                raise BadGraph(f"stage {stage.name}: cannot be repeated: {error}") from None
            for (_, last), (given, _) in pairwise(ends):
                if last != given:
                    raise BadGraph(f"stage {stage.name}: its blocks are no chain")
        return made

    def node(self, entry: Any) -> Node:
        name, op, inputs, tensors, attributes, shape, module = entry
        _name(name)
        if name in self.values:
            raise BadGraph(f"{name}: there are two nodes of this name")
        if not isinstance(op, str) or op not in OPERATIONS:
            raise BadGraph(f"{name}: operation {str(op)[:40]!r} is not one that can be run")
        operation = OPERATIONS[op]
        for value in inputs:
            if value not in self.values:
                raise BadGraph(f"{name}: reads {str(value)[:60]!r}, which no node before it makes")
        if operation.inputs not in (None, len(inputs)) or (operation.inputs is None and not inputs):
            raise BadGraph(f"{name}: {op} reads {len(inputs)} values")
        roles = {*operation.tensors, *operation.optional}
        for role, tensor in _object(tensors, name).items():
            if role not in roles or tensor not in self.tensors:
                raise BadGraph(
                    f"{name}: holds no tensor {str(tensor)[:60]!r} as {str(role)[:40]!r}"
                )
        for role in operation.tensors:
            if role not in tensors:
                raise BadGraph(f"{name}: lacks its {role}")
        kinds = operation.attributes
        found = {}
        for key, value in _object(attributes, name).items():
            if key not in kinds:
                raise BadGraph(f"{name}: {op} has no attribute {str(key)[:40]!r}")
            found[key] = self.attribute(kinds[key], key, value, f"{name}.{key}")
        for key, kind in kinds.items():
            if key not in found and not kind.endswith("?"):
                raise BadGraph(f"{name}: lacks its attribute {key}")
        self.values.add(name)
        return Node(
            name,
            op,
            tuple(inputs),
            dict(tensors),
            found,
            self.shape(shape, name, batch=True),
            _name(module, empty=True),
        )

    def attribute(self, kind: str, key: str, value: Any, where: str) -> Any:
        if kind == "dim":
            return self.dim(value, where)
        if kind == "dims":
            return self.shape(value, where, batch=True)
        if kind == "flag" and isinstance(value, bool):
            return value
        if kind == "number" and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if kind == "int":
            return _whole(value, where, least=-8)
        if kind == "ints" and isinstance(value, list) and len(value) <= 16:
            return tuple(_whole(each, where, least=-MOST_COUNT) for each in value)
        if kind == "text" and value in TEXTS.get(key, ()):
            return value
        if kind == "text?":
            return _name(value, empty=True)
        raise BadGraph(f"{where}: {str(value)[:40]!r} is no {kind}")

    def shape(self, value: Any, where: str, *, batch: bool = False) -> Shape:
        if not isinstance(value, list) or len(value) > 8:
            raise BadGraph(f"{where}: no shape of at most 8 dimensions")
        return tuple(self.dim(dim, where, batch=batch) for dim in value)

    def dim(self, value: Any, where: str, *, batch: bool = False) -> Dim:
        self.parts += len(value) if isinstance(value, list) else 1
        if self.parts > MOST_PARTS:
            raise BadGraph(f"{where}: dimensions of more than {MOST_PARTS} parts")
        if type(value) is int:
            return (("", _whole(value, where)),)
        if isinstance(value, str):
            value = [[value, 1]]
        if not isinstance(value, list) or not 0 < len(value) <= 4096:
            raise BadGraph(f"{where}: no dimension")
        parts = []
        for axis, repeat in value:
            known = axis in self.axes or axis == "" or (batch and axis == BATCH)
            if not isinstance(axis, str) or not known:
                raise BadGraph(f"{where}: there is no axis {str(axis)[:60]!r}")
            size = self.axes[axis].size if axis in self.axes else 1
            if _whole(repeat, where) * size > MOST_COUNT:
                raise BadGraph(f"{where}: more than {MOST_COUNT} indices")
            parts.append((axis, repeat))
        return tuple(parts)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or len(value) > 1 << 16:
        raise BadGraph(f"{where}: no object")
    return value


def _name(value: Any, empty: bool = False) -> str:
    if not isinstance(value, str) or len(value) > 512 or not (value or empty):
        raise BadGraph(f"{str(value)[:60]!r} is no name")
    return value


def _whole(value: Any, where: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MOST_COUNT:
        raise BadGraph(
            f"{where}: {str(value)[:40]!r} is no whole number from {least} to {MOST_COUNT}"
        )
    return value


def _count(value: Any, where: str) -> int:
    return _whole(value, where, least=1)
