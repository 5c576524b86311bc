"""A graph at given sizes, ready to run: the one interpreter of devices, the service and training.

Knows no weights: they are given with each call, so that generated weights run like kept ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neumeta.compute import COMPUTE
from neumeta.graph import BATCH, Graph, Shape, Sizes, extent
from neumeta.notation import BadGraph
from neumeta.operations import OPERATIONS

Outputs = Tensor | dict[str, Tensor] | tuple[Tensor, ...]
Watch = Callable[[str, Tensor], None]

MOST_VALUE = 1 << 30
"""Bound of the numbers that one value holds for one image, in a graph that is not trusted."""


@dataclass(frozen=True)
class Step:
    """One operation with every size a number, and the values that nothing reads afterwards."""

    name: str
    op: str
    inputs: tuple[str, ...]
    tensors: Mapping[str, str]
    attributes: Mapping[str, Any]
    done: tuple[str, ...]


def _number(value: Any, kind: str, sizes: Sizes) -> Any:
    """An attribute's value where the axes have these sizes; -1 stands for the batch."""
    if kind == "dim":
        return extent(value, sizes)
    if kind == "dims":
        return tuple(-1 if dim == ((BATCH, 1),) else extent(dim, sizes) for dim in value)
    return value


class Program:
    """The steps of a graph whose axes have these sizes."""

    def __init__(self, graph: Graph, sizes: Sizes) -> None:
        last: dict[str, str] = {}
        for node in graph.nodes:
            for value in node.inputs:
                last[value] = node.name
        kept = {value for _, value in graph.outputs}
        steps = []
        for node in graph.nodes:
            kinds = OPERATIONS[node.op].attributes
            attributes = {
                key: _number(value, kinds[key], sizes) for key, value in node.attributes.items()
            }
            done = tuple(
                value
                for value in dict.fromkeys(node.inputs)
                if last[value] == node.name and value not in kept
            )
            steps.append(Step(node.name, node.op, node.inputs, node.tensors, attributes, done))
        self.steps = tuple(steps)
        self.outputs = graph.outputs

    def run(
        self,
        tensors: Mapping[str, Tensor],
        values: Tensor | Mapping[str, Tensor],
        *,
        first: int = 0,
        watch: Watch | None = None,
    ) -> Outputs:
        """The network's outputs for `values`: images, or every value that steps from `first` on read.

        `watch` is called with each step's name and the first value it reads, before it runs. A tensor
        alone, a tuple or a dict comes back as the user's module gave it.
        """
        held = {"input": values} if isinstance(values, Tensor) else dict(values)
        for step in self.steps[first:]:
            inputs = tuple(held[value] for value in step.inputs)
            if watch is not None:
                watch(step.name, inputs[0] if inputs else held["input"])
            own = {role: tensors[name] for role, name in step.tensors.items() if name in tensors}
            held[step.name] = COMPUTE[step.op](inputs, own, step.attributes)
            for value in step.done:
                del held[value]
        return self._given(held)

    def leading(
        self, tensors: Mapping[str, Tensor], images: Tensor, first: int
    ) -> dict[str, Tensor]:
        """Every value that steps from `first` on read, for these images: a frozen leading part."""
        held = {"input": images}
        needed = {value for step in self.steps[first:] for value in step.inputs}
        needed |= {value for _, value in self.outputs}
        for step in self.steps[:first]:
            inputs = tuple(held[value] for value in step.inputs)
            own = {role: tensors[name] for role, name in step.tensors.items() if name in tensors}
            held[step.name] = COMPUTE[step.op](inputs, own, step.attributes)
            for value in step.done:
                del held[value]
        return {name: value for name, value in held.items() if name in needed}

    def _given(self, held: Mapping[str, Tensor]) -> Outputs:
        keys = [key for key, _ in self.outputs]
        if keys == [""]:
            return held[self.outputs[0][1]]
        if all(key.isdigit() for key in keys):
            return tuple(held[value] for _, value in self.outputs)
        return {key: held[value] for key, value in self.outputs}


def check(graph: Graph, sizes: Sizes) -> None:
    """Run the graph at these sizes without data: every value must have the shape its node states.

    Raises BadGraph naming the node.
    """
    batch = 2
    wanted = {**sizes, BATCH: batch}
    shapes = {node.name: node.shape for node in graph.nodes}
    for name, shape in {"input": graph.input, **shapes}.items():
        if math.prod(extent(dim, wanted) for dim in shape) > MOST_VALUE * batch:
            raise BadGraph(f"{name}: a value of more than {MOST_VALUE} numbers")

    def meta(shape: Shape) -> Tensor:
        return torch.empty(tuple(extent(dim, wanted) for dim in shape), device="meta")

    for name, shape in graph.tensors.items():
        if math.prod(extent(dim, wanted) for dim in shape) > MOST_VALUE:
            raise BadGraph(f"{name}: a tensor of more than {MOST_VALUE} numbers")
    tensors = {name: meta(shape) for name, shape in graph.tensors.items()}
    program = Program(graph, sizes)
    held = {"input": meta(graph.input)}
    for step in program.steps:
        stated = tuple(extent(dim, wanted) for dim in shapes[step.name])
        own = {role: tensors[name] for role, name in step.tensors.items()}
        try:
            made = COMPUTE[step.op](
                tuple(held[value] for value in step.inputs), own, step.attributes
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            NotImplementedError,
        ) as e:
            why = str(e).partition("\n")[0][:120]
            raise BadGraph(f"{step.name}: {step.op} does not fit what it reads: {why}") from None
        if tuple(made.shape) != stated:
            raise BadGraph(f"{step.name}: {step.op} gives {tuple(made.shape)}, not {stated}")
        held[step.name] = made


def output(given: Outputs) -> Tensor:
    """The tensor that is scored: the only one, a dict's 'out', or the first."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, dict):
        return given["out"] if "out" in given else next(iter(given.values()))
    return given[0]
