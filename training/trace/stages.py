"""Stages: containers whose consecutive children are alike and can be repeated. Knows no torch."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from neumeta.graph import Graph, Node, Stage, axes_of, interface, renamed


def find_stages(graph: Graph) -> Graph:
    """The graph with its stages: each container's longest run of alike children, outermost first."""
    containers: dict[tuple[str, str], set[int]] = {}
    for node in graph.nodes:
        names = node.module.split(".")
        for place, name in enumerate(names):
            numbered = re.fullmatch(r"(.*?)(0|[1-9]\d*)", name, re.ASCII)
            if numbered and place:
                key = ".".join(names[:place]), numbered[1]
                containers.setdefault(key, set()).add(int(numbered[2]))
    stages: list[Stage] = []
    for name, prefix in sorted(containers, key=lambda each: each[0].count(".")):
        # A stage inside a stage would change its name with the number of the child around it; and it
        # is called after its container, so that a container has one.
        inside = any(f"{name}.".startswith(f"{stage.name}.") for stage in stages)
        stage = None if inside else _stage(graph, name, prefix, sorted(containers[name, prefix]))
        if stage is not None:
            stages.append(stage)
    order = {node.module: place for place, node in reversed(list(enumerate(graph.nodes)))}
    stages.sort(key=lambda s: min(p for m, p in order.items() if s.child(m) is not None))
    return replace(graph, stages=tuple(stages))


def _stage(graph: Graph, name: str, prefix: str, children: list[int]) -> Stage | None:
    """The container's longest run of at least two alike children, if it has one."""
    if children != list(range(len(children))):
        return None
    whole = Stage(name, len(children), 0, len(children), prefix)
    forms = [_form(graph, whole, child) for child in children]
    best = (0, 0)
    first = 0
    for end in range(1, len(forms) + 1):
        if end == len(forms) or forms[end] is None or forms[end] != forms[first]:
            if forms[first] is not None and end - first > best[1]:
                best = (first, end - first)
            first = end
    if best[1] < 2:
        return None
    stage = Stage(name, len(children), *best, prefix)
    # Each must take what the one before it gives.
    for child in range(stage.first, stage.first + stage.blocks - 1):
        if (
            interface(graph, graph.block(stage, child))[1]
            != interface(graph, graph.block(stage, child + 1))[0]
        ):
            return None
    return stage


def _form(graph: Graph, stage: Stage, child: int) -> Any:
    """What two alike children have in common: their nodes, with names relative to the child."""
    nodes = graph.block(stage, child)
    if not nodes or not any(node.tensors for node in nodes):
        return None
    try:
        given, made = interface(graph, nodes)
    except ValueError:
        return None
    makers = {node.name: node for node in graph.nodes}
    before = makers[given].shape if given in makers else graph.input
    if before != makers[made].shape:
        return None
    own = {node.name for node in nodes}

    def relative(name: str) -> str:
        return stage.within(name, "n") if stage.child(name) == child else name

    def form(node: Node) -> Any:
        shapes = {key: graph.tensors[name] for key, name in node.tensors.items()}
        foreign = [name for name in node.tensors.values() if stage.child(name) != child]
        if foreign or any(v not in own and v != given for v in node.inputs):
            return None
        axes = {
            relative(axis): graph.axes[axis].size
            for shape in shapes.values()
            for axis in axes_of(shape)
        }
        return (
            node.op,
            relative(node.name),
            tuple("given" if value == given else relative(value) for value in node.inputs),
            {key: (relative(node.tensors[key]), renamed(s, relative)) for key, s in shapes.items()},
            {key: renamed(value, relative) for key, value in node.attributes.items()},
            renamed(node.shape, relative),
            axes,
        )

    forms = [form(node) for node in nodes]
    return None if None in forms else forms
