"""What tracing finds in a network, as plain text: to be read before a recipe is written.

Knows the graph and its sizes; trains nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from torch import nn

from neumeta.graph import Graph
from neumeta.space import Space
from training.trace import trace

WIDTHS = (0.25, 0.5, 0.75, 1.0)
COLUMNS = 100
NAMES = 6
"""At most so many axes of one size are named in one line."""


def explain(module: nn.Module, shape: Sequence[int], groups: Sequence[str] = ()) -> str:
    """What can be morphed in this network on images of `shape` (channels, height, width).

    `groups` are patterns over axis names, as in a recipe. The text ends without a line break; its
    tables are aligned and at most 100 columns wide.

    Raises TraceError (a ValueError), which names the operation that cannot be served.
    """
    graph, notes = trace(module, torch.zeros(1, *shape), groups=groups)
    space = Space("network", graph, (min(WIDTHS), 1.0))
    full = space.cost(space.full)
    head = (
        f"{type(module).__name__} on images of {' x '.join(map(str, shape))}:"
        f" {len(graph.nodes)} operations, {_count(full['parameters'])} parameters,"
        f" {_count(full['macs'])} multiply-accumulates"
    )
    parts = [head, _widths(graph), _depths(graph), _fixed(graph, notes), _costs(space)]
    return "\n\n".join(part for part in parts if part)


def _widths(graph: Graph) -> str:
    """Each group with the sizes and names of its axes."""
    if not graph.axes:
        return "Width: no axis can be resized."
    by_extent: dict[tuple[str, int], list[str]] = {}
    for group in graph.groups:
        members = [(axis.size, name) for name, axis in graph.axes.items() if axis.group == group]
        for size, name in sorted(members, key=lambda member: member[0]):
            by_extent.setdefault((group, size), []).append(name)
    rows = [["group", "size", "axes of that size, each called after the module that makes it"]]
    before = ""
    for (group, size), names in by_extent.items():
        more = [f"and {len(names) - NAMES} more"] if len(names) > NAMES else []
        rows.append(
            [group if group != before else "", str(size), ", ".join([*names[:NAMES], *more])]
        )
        before = group
    axes, groups = _of(len(graph.axes), "axis", "axes"), _of(len(graph.groups), "group")
    return f"Width: {axes} in {groups}; a width is one factor for all or one for each group\n" + (
        _table(rows, "<><")
    )


def _depths(graph: Graph) -> str:
    """Each stage with its children and those of them that can be repeated."""
    if not graph.stages:
        return "Depth: no container has consecutive children that are alike: depth is fixed."
    rows = [["stage", "blocks", "alike", "which"]]
    for stage in graph.stages:
        which = f"{stage.path(stage.alike[0])} to {stage.path(stage.alike[-1])}"
        rows.append([stage.name, str(stage.children), str(stage.blocks), which])
    stages = _of(len(graph.stages), "stage")
    return f"Depth: {stages}; alike blocks can be dropped and repeated\n" + _table(rows, "<>><")


def _fixed(graph: Graph, notes: dict[str, str]) -> str:
    """What keeps its size, and why."""
    rows = [
        [name or "the network", why] for name, why in {**{"input": "is the image"}, **notes}.items()
    ]
    return "Keeps its size\n" + _table(rows, "<<")


def _costs(space: Space) -> str:
    """Parameters, bytes and multiply-accumulates over width, batch norm folded as it is served."""
    rows = [["width", "parameters", "float32", "multiply-accumulates"]]
    for width in WIDTHS if space.graph.axes else (1.0,):
        cost = space.cost(space.architecture(width))
        size = f"{cost['parameters'] * 4 / 1e6:.2f} MB"
        rows.append([f"{width:g}", _count(cost["parameters"]), size, _count(cost["macs"])])
    return "Size and cost by width, batch norm folded, one image\n" + _table(rows, ">>>>")


def _count(number: int) -> str:
    """A count in ordinary units."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _of(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _table(rows: list[list[str]], align: str) -> str:
    """Rows with columns as wide as their longest cell; the last cell goes on in lines below."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    indent = 2 + sum(width + 2 for width in widths[:-1])
    room = max(30, COLUMNS - indent)
    lines = []
    for row in rows:
        cells = [
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row[:-1], align, widths, strict=False)
        ]
        last = textwrap.wrap(row[-1], room, break_long_words=False, break_on_hyphens=False) or [""]
        if align[-1] == ">":
            last = [f"{last[0]:>{widths[-1]}}"]
        lines.append("  " + "  ".join([*cells, last[0]]))
        lines += [" " * indent + each for each in last[1:]]
    return "\n".join(line.rstrip() for line in lines)
