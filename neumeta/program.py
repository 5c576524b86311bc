"""A graph at given sizes, ready to run: the one interpreter of devices, the service and training.

Knows no weights: they are given with each call, so that generated weights run like kept ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neumeta.compute import COMPUTE
from neumeta.graph import Graph, Sizes
from neumeta.operations import OPERATIONS
from neumeta.shapes import numeric

Outputs = Tensor | dict[str, Tensor] | tuple[Tensor, ...]
Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Step:
    """One operation with every size a number, and the values that nothing reads afterwards."""

    name: str
    op: str
    inputs: tuple[str, ...]
    tensors: Mapping[str, str]
    attributes: Mapping[str, Any]
    done: tuple[str, ...]


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
                key: numeric(value, kinds[key], sizes) for key, value in node.attributes.items()
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


def output(given: Outputs) -> Tensor:
    """The tensor that is scored: the only one, a dict's 'out', or the first."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, dict):
        return given["out"] if "out" in given else next(iter(given.values()))
    return given[0]
