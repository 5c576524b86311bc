"""Which tensors of a network a representation makes, and where each lies: graph -> sites.

Knows no coordinates and no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from neumeta.coordinates import ONE, Site, Span
from neumeta.graph import DEPTHS, Dim, Graph, Node, Stage, axes_of
from neumeta.operations import WEIGHTED
from neumeta.space import Architecture, Space

STATISTICS = ("mean", "variance")
"""Roles of tensors that are measured or the source's own, never made."""
POSITIVE = ("relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "exp", "softmax")
"""Operations whose values are never negative."""
POOLING = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "mean")
PASSING = (*POOLING, "reshape", "permute", "expand", "slice")
"""Operations whose values are never negative where those they read are not."""


def span(
    dim: Dim, sizes: Mapping[str, int], full: Mapping[str, int], groups: Mapping[str, int]
) -> Span:
    """A dimension at these sizes; `groups` says by number which group an axis is of."""
    parts = tuple(
        (sizes[axis], full[axis], repeat) if axis else (repeat, repeat, 1) for axis, repeat in dim
    )
    group = groups.get(dim[0][0]) if len(dim) == 1 else None
    return Span(parts, any(axis for axis, _ in dim), group)


def role(graph: Graph, name: str) -> str:
    """The name under which blocks of a stage share a tensor: their number replaced by `n`."""
    for stage in graph.stages:
        child = stage.child(name)
        if child is not None and stage.first <= child < stage.first + stage.blocks:
            return stage.within(name, "n")
    return name


def stage_of(graph: Graph, node: Node) -> Stage | None:
    """A node's stage: the one around it, else the last one before it, else the first."""
    return _stages(graph)[node.name]


@lru_cache(maxsize=DEPTHS)
def _stages(graph: Graph) -> dict[str, Stage | None]:
    found: dict[str, Stage | None] = {}
    now = graph.stages[0] if graph.stages else None
    for node in graph.nodes:
        now = next((s for s in graph.stages if s.child(node.module) is not None), now)
        found[node.name] = now
    return found


@lru_cache(maxsize=DEPTHS)
def branch_ends(graph: Graph) -> frozenset[str]:
    """The tensors of the last layer of every residual branch: what a block adds to its input.

    In an alike block of a stage, an addition one of whose sides is the block's input: all tensors that
    the other side's last weighted layer, and a norm behind it, hold.
    """
    makers = {node.name: node for node in graph.nodes}
    found: set[str] = set()
    for stage in graph.stages:
        for child in range(stage.first, stage.first + stage.blocks):
            nodes = graph.block(stage, child)
            own = {node.name for node in nodes}
            given = {value for node in nodes for value in node.inputs if value not in own}
            for node in nodes:
                if node.op == "add" and given & set(node.inputs):
                    for value in node.inputs:
                        while value in own:
                            found |= set(makers[value].tensors.values())
                            weighted = makers[value].op in ("conv", "conv_transpose", "linear")
                            if weighted or not makers[value].inputs:
                                break
                            value = makers[value].inputs[0]
    return frozenset(found)


@lru_cache(maxsize=DEPTHS)
def positive(graph: Graph) -> frozenset[str]:
    """The weights of convolutions and linear maps that multiply values which are never negative: those
    behind a ReLU, with nothing but pooling and another shape in between.

    Of a transposed convolution each output sees other numbers of the kernel: it is not among them.
    """
    makers = {node.name: node for node in graph.nodes}
    found: dict[str, bool] = {}
    for node in graph.nodes:
        before = makers.get(node.inputs[0]) if node.op in WEIGHTED else None
        while before is not None and before.op in PASSING:
            before = makers.get(before.inputs[0])
        behind = before is not None and before.op in POSITIVE and node.op != "conv_transpose"
        if "weight" in node.tensors:  # which several nodes may share
            found[node.tensors["weight"]] = behind and found.get(node.tensors["weight"], True)
    return frozenset(name for name, behind in found.items() if behind)


@lru_cache(maxsize=DEPTHS)
def made(graph: Graph) -> tuple[str, ...]:
    """The tensors that a representation makes: all of every node that holds one with an axis; or all
    there are, where depth morphs."""
    morphing = {
        tensor
        for node in graph.nodes
        if any(any(axes_of(graph.tensors[name])) for name in node.tensors.values())
        for tensor in node.tensors.values()
    }
    statistics = {tensor for node in graph.nodes for tensor in statistics_names(node)}
    return tuple(
        name
        for name in graph.tensors
        if name not in statistics and (graph.stages or name in morphing)
    )


def statistics_names(node: Node) -> tuple[str, ...]:
    """The tensors that hold a batch norm's mean and variance; none of another operation."""
    return tuple(node.tensors[key] for key in STATISTICS) if node.op == "batch_norm" else ()


@lru_cache(maxsize=DEPTHS)
def reached(graph: Graph) -> frozenset[str]:
    """The nodes whose values a tensor that the representation makes has a part in."""
    morphing, found = set(made(graph)), set[str]()
    for node in graph.nodes:
        if morphing & set(node.tensors.values()) or found & set(node.inputs):
            found.add(node.name)
    return frozenset(found)


@lru_cache(maxsize=DEPTHS)
def measured(graph: Graph) -> frozenset[str]:
    """The means and variances that differ by size: those of batch norms that something which morphs
    comes before. What the others read is what they read in the source, so its own hold for them."""
    behind = [node for node in graph.nodes if node.name in reached(graph)]
    return frozenset(name for node in behind for name in statistics_names(node))


@lru_cache(maxsize=DEPTHS)
def kept(graph: Graph) -> tuple[str, ...]:
    """The tensors that are the source's own, whatever the size."""
    others = {*made(graph), *measured(graph)}
    return tuple(name for name in graph.tensors if name not in others)


@lru_cache(maxsize=DEPTHS)
def _normed(graph: Graph) -> bool:
    """Whether batch norms give values their scale: a sum over fewer inputs then needs no larger terms,
    the classifier's behind them neither."""
    return any(node.op == "batch_norm" for node in graph.nodes)


def sites(
    space: Space,
    architecture: Architecture,
    cells: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
) -> dict[str, Site]:
    """Every tensor that the representation makes for this architecture, by name.

    `cells` replaces, by stage and block, the blocks' even shares of their stages, [l/L, (l+1)/L].
    """
    if cells is None:
        return _even(space, architecture)
    return {site.name: site for site in _sites(space, architecture, cells)}


@lru_cache(maxsize=256)
def _even(space: Space, architecture: Architecture) -> dict[str, Site]:
    return {site.name: site for site in _sites(space, architecture, {})}


def _sites(
    space: Space,
    architecture: Architecture,
    cells: Mapping[str, Mapping[int, tuple[float, float]]],
) -> list[Site]:
    graph, source = space.graph_of(architecture), space.graph
    sizes, full = space.sizes(architecture), graph.full
    distance, growth = space.distance(architecture)
    narrowest, widest = space.ends(architecture)
    groups = {name: space.groups.index(axis.group) for name, axis in graph.axes.items()}
    ends, normed, behind = branch_ends(graph), _normed(graph), positive(graph)
    depths = {stage.name: stage for stage in source.stages}
    found = []
    for name in made(graph):
        owner = graph.owners[name]
        shape = graph.tensors[name]
        rows = span(shape[0], sizes, full, groups)
        columns = span(shape[1], sizes, full, groups) if len(shape) > 1 else ONE
        cell, length, step, occurs, place = (0.0, 1.0), 1, 1.0, 0, None
        for index, stage in enumerate(graph.stages):
            child = stage.child(name)
            if child is None or not stage.first <= child < stage.first + stage.blocks:
                continue
            block, length = child - stage.first, stage.blocks
            place, occurs = index, stage.children - stage.blocks + 1
            low, high = block / length, (block + 1) / length
            cell = cells.get(stage.name, {}).get(block, (low, high))
            if name in ends:
                step = depths[stage.name].blocks * (cell[1] - cell[0])
        deeper = 0.0
        stage_here = stage_of(graph, owner)
        if stage_here is not None:
            mine, theirs = stage_here.children, depths[stage_here.name].children
            deeper = 2 * (mine - theirs) / (mine + theirs)
        gain = step
        # The transposed convolution's rows are its inputs.
        inputs = rows if owner.op == "conv_transpose" else columns
        is_weight = owner.tensors.get("weight") == name and len(shape) > 1
        if is_weight and not normed and inputs.count:
            gain *= inputs.full / inputs.count
        found.append(
            Site(
                name,
                role(graph, name),
                graph.shape(name, sizes),
                cell,
                length,
                rows,
                columns,
                tuple(math.prod(r for _, r in dim) for dim in shape[2:]),
                gain,
                deeper,
                distance,
                growth,
                narrowest,
                widest,
                architecture.depth,
                place,
                occurs,
                name in behind,
            )
        )
    return found
