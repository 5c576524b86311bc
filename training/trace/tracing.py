"""What has been traced so far, as rules read it and add to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from training.trace import axes as ax
from training.trace.axes import Axes, BatchMixed, Dim
from training.trace.call import TraceError, kind, module_of, shape_of

EXAMPLES = 3
"""Images in the traced batch: a number that few other dimensions have."""


class Spans:
    """An attribute that follows from a dimension, whose axes are not yet final."""

    def __init__(self, dim: Dim) -> None:
        self.dim = dim


class SpansOf:
    """An attribute that is a shape."""

    def __init__(self, dims: Sequence[Dim]) -> None:
        self.dims = tuple(dims)


class Tracing:
    """Values, their dimensions, held tensors and nodes, up to the present operation `node`.

    `containers` are the modules that have children: their operations get names of their own.
    """

    def __init__(self, containers: Collection[str]) -> None:
        self.containers = containers
        self.axes = Axes(EXAMPLES)
        self.positions: dict[str, int] = {}  # who makes an axis -> at how many places of an image
        self.values: dict[str, str] = {}  # fx name -> our name
        self.dims: dict[str, tuple[Dim, ...]] = {}
        self.tensor_dims: dict[str, tuple[Dim, ...]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.parts: dict[str, list[str]] = {}  # values that a chunk or split makes
        self.nodes: list[dict[str, Any]] = []
        self.node: fx.Node
        self.names: set[str] = set()

    def read(self, value: Any) -> str:
        """The name of a value; a parameter that is read as one becomes a node of its own."""
        if not isinstance(value, fx.Node):
            raise self.error(f"reads {value!r} where a tensor is expected")
        name = self.values[value.name]
        if name.startswith("tensor:"):
            tensor = name.removeprefix("tensor:")
            shape = tuple(self.tensors[tensor].shape)
            dims = self.tensor_dims.get(tensor) or tuple(
                self.axes.new(size, f"{tensor}" if not i else f"{tensor}.{i}")
                for i, size in enumerate(shape)
            )
            return self.add("parameter", (), dims, {"value": (tensor, dims)}, {}, keep=False)
        return name

    def new(self, size: int) -> Dim:
        """A new axis, made by the module that the present operation is called in."""
        self.positions[self.where()] = math.prod(shape_of(self.node)) // (EXAMPLES * size)
        return self.axes.new(size, self.where())

    def held(self, value: Any) -> str | None:
        """The name of a parameter or buffer that an operation holds."""
        if value is None:
            return None
        name = self.values[value.name]
        if not name.startswith("tensor:"):
            raise self.error("computes the tensor it holds: use plain parameters")
        return name.removeprefix("tensor:")

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        dims: Sequence[Dim],
        tensors: Mapping[str, tuple[str | None, Sequence[Dim]]],
        attributes: Mapping[str, Any],
        keep: bool = True,
    ) -> str:
        """A node with these held tensors (role -> name and dimensions); returns its value's name."""
        held = {}
        batch: Dim = ((ax.BATCH, 1),)
        if any(batch in self.dims[name] for name in inputs) and batch not in dims:
            raise BatchMixed
        for role, (name, spans) in tensors.items():
            if name is None:
                continue
            if batch in spans:
                raise BatchMixed
            before = self.tensor_dims.get(name)
            if before is None:
                self.tensor_dims[name] = tuple(spans)
            else:
                for one, other in zip(before, spans, strict=True):
                    self.axes.unite(one, other, f"shares {name}")
            held[role] = name
        module = module_of(self.node)
        name = self._fresh(op, module if keep else held.get("value", module))
        self.nodes.append(
            {
                "name": name,
                "op": op,
                "inputs": tuple(inputs),
                "tensors": held,
                "attributes": dict(attributes),
                "module": module,
            }
        )
        self.dims[name] = tuple(dims)
        return name

    def _fresh(self, op: str, module: str) -> str:
        stem = module if module and module not in self.containers else f"{module}.{op}".lstrip(".")
        name, count = stem, 0
        while name in self.names or name == "input":
            count += 1
            name = f"{stem}_{count}"
        self.names.add(name)
        return name

    def where(self) -> str:
        """The module that the present operation is called in."""
        return module_of(self.node) or self.node.name

    def channels(self, name: str, dim: int) -> int:
        """A dimension counted from the front."""
        return dim % len(self.dims[name])

    def error(self, why: str) -> TraceError:
        """What is wrong with the present operation, with its place."""
        module = module_of(self.node) or "the network itself"
        return TraceError(f"{module}: {kind(self.node)} ({self.node.name}) {why}")


Rule = Callable[[Tracing, dict[str, Any]], str]
"""An ATen call, by its arguments' names -> the name of the value that its node makes."""
