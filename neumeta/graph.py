"""A network as a graph: operations from a closed set, and the axes that each tensor's dimensions span.

Every shape, cost, clique and coordinate follows from this one table. A dimension is a tuple of (axis,
repeat) parts: a concatenation has two of them, a flattened C x H x W is ((c, H*W),), and ("", n) is
n constant indices. Knows no weights, and not how an operation is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from typing import Any

from neumeta.operations import WEIGHTED

BATCH = "batch"
"""The one axis that is no channel: how many images are run at once."""
MOST_NODES = 20_000
MOST_PARTS = 1 << 18
"""Bounds of a graph at any depth: its nodes, and the parts of all its dimensions."""
DEPTHS = 64
"""How many graphs of other depths are held."""

Dim = tuple[tuple[str, int], ...]
"""Parts of one dimension, in order: (axis, repeat), or ("", n) for n constant indices."""
Shape = tuple[Dim, ...]
Sizes = Mapping[str, int]


def constant(size: int) -> Dim:
    """A dimension that no axis resizes."""
    return (("", size),)


def extent(dim: Dim, sizes: Sizes) -> int:
    """How many indices a dimension has where its axes have these sizes."""
    return sum(repeat * (sizes[axis] if axis else 1) for axis, repeat in dim)


@dataclass(frozen=True)
class Axis:
    """One axis: its size in the source network and the group whose width resizes it.

    A size counts units that are permuted and resized as one: channels, or whole channel groups where
    a grouped convolution or a group norm keeps channels together.
    """

    size: int
    group: str


@dataclass(frozen=True)
class Node:
    """One operation: the values it reads, the tensors it holds by role, and what it makes.

    `module` is the path of the user's module that ran it. `shape` spans BATCH in one dimension.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    tensors: Mapping[str, str]
    attributes: Mapping[str, Any]
    shape: Shape
    module: str


@dataclass(frozen=True)
class Stage:
    """A container of `children` consecutive modules, of which `blocks`, from `first` on, are alike.

    Alike blocks may be repeated: a depth is a number of children, `children` in the source. The
    children are called by their number from 0 on, behind `prefix` (`block1-0`, `block1-1`, ...).
    """

    name: str
    children: int
    first: int
    blocks: int
    prefix: str = ""

    @property
    def least(self) -> int:
        """The fewest children: the ones that are not repeated, and at least one."""
        return max(1, self.children - self.blocks)

    @property
    def alike(self) -> range:
        """The children that are alike."""
        return range(self.first, self.first + self.blocks)

    def repeats(self, depth: int) -> int:
        """How many alike blocks a network of this depth has."""
        return depth - self.children + self.blocks

    def child(self, module: str) -> int | None:
        """Which child of the container a module path lies in."""
        start = f"{self.name}.{self.prefix}"
        if not module.startswith(start):
            return None
        index = module[len(start) :].partition(".")[0]
        # No other way to write the number: a path must follow from it.
        plain = index.isascii() and index.isdigit() and str(int(index)) == index
        return int(index) if plain else None

    def path(self, child: int) -> str:
        """The path of one child."""
        return f"{self.name}.{self.prefix}{child}"

    def within(self, path: str, child: str) -> str:
        """A path inside one child, with the child's number replaced by this text."""
        start = f"{self.name}.{self.prefix}"
        rest = path[len(start) :].partition(".")
        return f"{start}{child}{rest[1]}{rest[2]}"


@dataclass(frozen=True, eq=False)
class Graph:
    """A network of the source's size and, by `at`, of every depth.

    `input` is the shape of the images (batch, channels, height, width); `outputs` are (key, value)
    pairs: one with the key "" for a network that returns a tensor.
    """

    input: Shape
    axes: Mapping[str, Axis]
    tensors: Mapping[str, Shape]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, str], ...]
    stages: tuple[Stage, ...] = ()

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """The source network's number of children in each stage."""
        return tuple(stage.children for stage in self.stages)

    @cached_property
    def full(self) -> dict[str, int]:
        """The size of every axis in the source network."""
        return {name: axis.size for name, axis in self.axes.items()}

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups of axes that a width has a factor for, in the order of the forward pass."""
        return tuple(dict.fromkeys(axis.group for axis in self.axes.values()))

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """The nodes that read each value; the network itself, "", reads its outputs."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(node.name)
        for _, value in self.outputs:
            found.setdefault(value, []).append("")
        return {value: tuple(names) for value, names in found.items()}

    @cached_property
    def owners(self) -> dict[str, Node]:
        """The first node that reads each tensor."""
        found: dict[str, Node] = {}
        for node in self.nodes:
            for name in node.tensors.values():
                found.setdefault(name, node)
        return found

    def shape(self, tensor: str, sizes: Sizes) -> tuple[int, ...]:
        """A tensor's shape where the axes have these sizes."""
        return tuple(extent(dim, sizes) for dim in self.tensors[tensor])

    def parameters(self, sizes: Sizes) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(self.shape(name, sizes)) for name in self.tensors)

    def macs(self, sizes: Sizes) -> int:
        """Multiply-accumulates of the convolutions and linear maps for one image."""
        one = {**sizes, BATCH: 1}
        shapes = {"input": self.input} | {node.name: node.shape for node in self.nodes}
        total = 0
        for node in self.nodes:
            if node.op not in WEIGHTED:
                continue
            weight = self.shape(node.tensors["weight"], sizes)
            # Each position of the output (of the input, transposed) meets each weight once.
            shape = shapes[node.inputs[0]] if node.op == "conv_transpose" else node.shape
            channel = len(shape) - 1 if node.op == "linear" else 1
            positions = math.prod(
                extent(dim, one) for place, dim in enumerate(shape) if place != channel
            )
            total += positions * math.prod(weight)
        return total

    def block(self, stage: Stage, child: int) -> tuple[Node, ...]:
        """The nodes of one child of a stage."""
        children = self._children.get((stage.name, stage.prefix))
        if children is None:
            found: dict[int, list[Node]] = {}
            for node in self.nodes:
                place = stage.child(node.module)
                if place is not None:
                    found.setdefault(place, []).append(node)
            children = {place: tuple(nodes) for place, nodes in found.items()}
            self._children[stage.name, stage.prefix] = children
        return children.get(child, ())

    @cached_property
    def _children(self) -> dict[tuple[str, str], dict[int, tuple[Node, ...]]]:
        """The nodes of each child, by stage, filled as stages are asked for."""
        return {}

    @lru_cache(maxsize=DEPTHS)  # noqa: B019 (bounded)
    def at(self, depth: tuple[int, ...]) -> Graph:
        """The graph of another depth: alike blocks of each stage dropped or repeated.

        Raises ValueError if a stage would have fewer children than its `least`, or the graph more than
        MOST_NODES nodes or MOST_PARTS parts of dimensions.
        """
        if depth == self.depth:
            return self
        nodes, parts = len(self.nodes), sum(_parts(self, node) for node in self.nodes)
        for stage, children in zip(self.stages, depth, strict=True):
            if children < stage.least:
                raise ValueError(f"depth: stage {stage.name} has at least {stage.least} blocks")
            block, more = self.block(stage, stage.first), children - stage.children
            nodes += more * len(block)
            parts += more * sum(_parts(self, node) for node in block)
        if nodes > MOST_NODES or parts > MOST_PARTS:
            raise ValueError(f"depth: {list(depth)} makes a graph of {nodes} nodes, {parts} parts")
        graph = self
        for index, (stage, children) in enumerate(zip(self.stages, depth, strict=True)):
            if children != stage.children:
                graph = _repeated(graph, index, stage, stage.repeats(children))
        return graph

    def morphing(self, patterns: Sequence[str], *, depth: bool = True) -> Graph:
        """The graph in which only axes whose names match one of `patterns` morph, and depth or not.

        Raises ValueError for a pattern that matches no axis.
        """
        for pattern in patterns:
            if not any(fnmatch(axis, pattern) for axis in self.axes):
                raise ValueError(f"{pattern!r} matches none of {', '.join(self.axes)}")
        kept = {axis for axis in self.axes if any(fnmatch(axis, each) for each in patterns)}

        def held(value: Any) -> Any:
            if not isinstance(value, tuple):
                return value
            if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
                if value[0] in kept or value[0] in ("", BATCH):
                    return value
                return ("", value[1] * self.full[value[0]])
            return tuple(held(each) for each in value)

        nodes = tuple(
            replace(
                node,
                shape=held(node.shape),
                attributes={key: held(value) for key, value in node.attributes.items()},
            )
            for node in self.nodes
        )
        return Graph(
            self.input,
            {name: axis for name, axis in self.axes.items() if name in kept},
            {name: held(shape) for name, shape in self.tensors.items()},
            nodes,
            self.outputs,
            self.stages if depth else (),
        )

    @cached_property
    def folded(self) -> Graph:
        """Without batch norms: gone where a convolution or linear map precedes, else `affine`."""
        return _folded(self)

    @cached_property
    def folds(self) -> dict[str, Node]:
        """The batch norms that vanish, by the name of the node before them."""
        readers: dict[str, int] = {}
        for node in self.nodes:
            for value in node.inputs:
                readers[value] = readers.get(value, 0) + 1
        for _, value in self.outputs:
            readers[value] = readers.get(value, 0) + 1
        makers = {node.name: node for node in self.nodes}
        users: dict[str, int] = {}
        for node in self.nodes:
            for tensor in node.tensors.values():
                users[tensor] = users.get(tensor, 0) + 1
        found = {}
        for node in self.nodes:
            if node.op != "batch_norm":
                continue
            before = makers.get(node.inputs[0])
            weighted = before is not None and before.op in WEIGHTED
            if before is None or not weighted or readers[before.name] > 1:
                continue
            # A tensor that two layers share cannot take up two batch norms.
            if all(users[tensor] == 1 for tensor in before.tensors.values()):
                found[before.name] = node
        return found

    def cliques(self) -> dict[str, tuple[tuple[str, int, int, int], ...]]:
        """The sides that hold each axis: (tensor, dimension, offset, repeat).

        Channel c of the axis takes the indices offset + c * repeat and the repeat - 1 after it.
        """
        found: dict[str, list[tuple[str, int, int, int]]] = {axis: [] for axis in self.axes}
        for tensor, shape in self.tensors.items():
            for dimension, dim in enumerate(shape):
                offset = 0
                for axis, repeat in dim:
                    if axis:
                        found[axis].append((tensor, dimension, offset, repeat))
                    offset += repeat * (self.full[axis] if axis else 1)
        return {axis: tuple(sides) for axis, sides in found.items()}


def _parts(graph: Graph, node: Node) -> int:
    """How many parts the dimensions have that a node and its tensors state."""
    shapes = (node.shape, *(graph.tensors[name] for name in node.tensors.values()))
    return _count(shapes) + sum(map(_count, node.attributes.values()))


def _count(value: Any) -> int:
    if not isinstance(value, tuple) or not value:
        return 0
    return 1 if isinstance(value[0], str) else sum(map(_count, value))


def _in_child(name: str, stage: Stage, change: Callable[[int], int]) -> str:
    """A dotted name with the number of the stage's child in it changed."""
    child = stage.child(name)
    return name if child is None else stage.within(name, str(change(child)))


def renamed(value: Any, rename: Callable[[str], str]) -> Any:
    """A dimension, or a tuple of them, with every axis renamed; anything else as it is."""
    if not isinstance(value, tuple):
        return value
    if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
        return (rename(value[0]) if value[0] else "", value[1])
    return tuple(renamed(each, rename) for each in value)


class _Rewriting:
    """A graph's nodes, collected under other names together with their tensors and axes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.tensors: dict[str, Shape] = {}
        self.axes: dict[str, Axis] = {}

    def add(self, node: Node, names: _Renaming, value: Callable[[str], str]) -> None:
        """`value` says what is read now: an axis may be called as the node that first makes it."""
        for name in node.tensors.values():
            shape = self.graph.tensors[name]
            self.tensors[names[name]] = names.of(shape)
            for axis in axes_of(shape):
                self.axes[names[axis]] = self.graph.axes[axis]
        self.nodes.append(
            Node(
                names[node.name],
                node.op,
                tuple(value(name) for name in node.inputs),
                {key: names[name] for key, name in node.tensors.items()},
                {
                    key: names[held] if key == "norm" else names.of(held)
                    for key, held in node.attributes.items()
                },
                names.of(node.shape),
                names[node.module],
            )
        )


class _Renaming(dict[str, str]):
    """A function of names, each asked for once; `of` renames the axes of dimensions."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        super().__init__()
        self.rename = rename
        self.dims: dict[Any, Any] = {}

    def __missing__(self, name: str) -> str:
        self[name] = made = self.rename(name)
        return made

    def of(self, value: Any) -> Any:
        """A dimension, or a tuple of them, with every axis renamed; anything else as it is."""
        if not isinstance(value, tuple):
            return value
        made = self.dims.get(value)
        if made is None:
            # A network has few different dimensions, and many nodes that span them.
            made = self.dims[value] = renamed(value, self.__getitem__)
        return made


def axes_of(shape: Shape) -> Iterator[str]:
    """Every axis that a tensor's dimensions span."""
    return (axis for dim in shape for axis, _ in dim if axis)


def interface(graph: Graph, nodes: tuple[Node, ...]) -> tuple[str, str]:
    """The one value that these nodes read from outside and the one that others read of them.

    Raises ValueError if there is not exactly one of each.
    """
    own = {node.name for node in nodes}
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v not in own)
    readers = graph.readers
    made = [name for name in own if not own.issuperset(readers.get(name, ()))]
    if len(read) != 1 or len(made) != 1:
        raise ValueError(f"a block reads {len(read)} values and gives {len(made)}, not one each")
    return next(iter(read)), next(iter(made))


def _repeated(graph: Graph, index: int, stage: Stage, repeats: int) -> Graph:
    """The graph with `repeats` alike blocks in one stage, each a copy of its first one."""
    first, end, more = stage.first, stage.first + stage.blocks, repeats - stage.blocks
    template = graph.block(stage, first)
    given, made = interface(graph, template)
    _, last = interface(graph, graph.block(stage, end - 1))
    run = {node.name for child in range(first, end) for node in graph.block(stage, child)}
    after = given
    if repeats:
        after = _in_child(made, stage, lambda _: first + repeats - 1)

    moved = _Renaming(
        lambda name: _in_child(name, stage, lambda at: at + more if at >= end else at)
    )

    def read(value: str) -> str:
        return after if value == last else moved[value]

    def copied_to(child: int) -> tuple[Callable[[str], str], Callable[[str], str]]:
        before = given if child == first else _in_child(made, stage, lambda _: child - 1)

        def rename(name: str) -> str:
            # What lies in a child before the alike ones, an axis named after it say, is one for all.
            return _in_child(name, stage, lambda at: child if at == first else at)

        return rename, lambda value: before if value == given else rename(value)

    new, copied = _Rewriting(graph), False
    for node in graph.nodes:
        if node.name not in run:
            new.add(node, moved, read)
            continue
        for copy in range(0 if copied else repeats):
            rename, value = copied_to(first + copy)
            names = _Renaming(rename)
            for each in template:
                new.add(each, names, value)
        copied = True
    stages = list(graph.stages)
    stages[index] = replace(stage, children=stage.children + more, blocks=repeats)
    outputs = tuple((key, read(value)) for key, value in graph.outputs)
    return Graph(graph.input, new.axes, new.tensors, tuple(new.nodes), outputs, tuple(stages))


def _folded(graph: Graph) -> Graph:
    """The graph without batch norms."""
    folds = graph.folds
    gone = {norm.name: name for name, norm in folds.items()}
    nodes: list[Node] = []
    tensors: dict[str, Shape] = {}
    for node in graph.nodes:
        if node.name in gone:
            continue
        held = {key: (name, graph.tensors[name]) for key, name in node.tensors.items()}
        op, attributes = node.op, node.attributes
        norm = folds.get(node.name)
        if norm is not None:
            stem = node.tensors["weight"].rpartition(".")[0]
            held.setdefault("bias", (f"{stem}.bias", graph.tensors[norm.tensors["mean"]]))
            attributes = {**attributes, "norm": norm.module}
        elif op == "batch_norm":
            op, attributes = "affine", {"norm": node.module}
            mean = node.tensors["mean"]
            stem = mean.rpartition(".")[0]
            held = {kind: (f"{stem}.{kind}", graph.tensors[mean]) for kind in ("weight", "bias")}
        tensors.update(dict(held.values()))
        nodes.append(
            replace(
                node,
                op=op,
                attributes=attributes,
                inputs=tuple(gone.get(value, value) for value in node.inputs),
                tensors={key: name for key, (name, _) in held.items()},
            )
        )
    outputs = tuple((key, gone.get(value, value)) for key, value in graph.outputs)
    return replace(graph, nodes=tuple(nodes), tensors=tensors, outputs=outputs)
