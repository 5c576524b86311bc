"""What a call of an exported program says: its operator, arguments, shape and module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from training.trace.axes import Dim


class TraceError(ValueError):
    """A module that cannot be traced: where, why, and what to do about it."""


def kind(node: fx.Node) -> str:
    """The operator's name."""
    target = node.target
    name = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    return str(name)


def module_of(node: fx.Node) -> str:
    """The path of the innermost user's module that runs this node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1].partition("@")[0] if paths else ""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a call makes. Raises TraceError if it is no tensor or of no fixed shape."""
    value = node.meta["val"]
    if isinstance(value, tuple):  # the largest values, and where they were
        value = value[0]
    if not isinstance(value, Tensor):
        raise TraceError(f"{module_of(node)}: {node.name} makes no tensor")
    if not all(isinstance(size, int) for size in value.shape):
        raise TraceError(f"{module_of(node)}: {node.name} has a shape that depends on the data")
    return tuple(int(size) for size in value.shape)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of the operator's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise TraceError(
            f"{module_of(node)}: {node.name} calls {node.target}, which is no operator"
        )
    found: dict[str, Any] = {}
    for place, argument in enumerate(schema.arguments):
        if place < len(node.args):
            found[argument.name] = node.args[place]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def pair(value: Any, count: int) -> tuple[int, ...]:
    """One number for each of `count` dimensions, of which a lone one stands for all."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def constants(node: fx.Node, start: int) -> list[Dim]:
    """The dimensions of what a call makes from `start` on, none of which morphs."""
    return [((None, size),) for size in shape_of(node)[start:]]
