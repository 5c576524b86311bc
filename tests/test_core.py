"""The layering of the packages: imports go one way, and the drawing of them has no circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "neumeta": {"neumeta"},
    "service": {"neumeta", "service"},
    "training": {"neumeta", "training"},
}
TORCHLESS = (
    "graph",
    "operations",
    "notation",
    "shapes",
    "space",
    "plan",
    "protobuf",
    "onnx",
    "onnx_nodes",
    "failure",
    "asking",
    "record",
    "transfer",
    "whole",
)


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module that is named in an import of this file, wherever it stands."""
    names: set[str] = set()
    known = set(modules())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                names.add(inside if inside in known else node.module)
    return names


def test_imports_go_one_way() -> None:
    found = modules()
    assert len(found) > 40
    for name, path in found.items():
        package = name.partition(".")[0]
        ours = {each.partition(".")[0] for each in imports(path)} & set(ALLOWED)
        assert ours <= ALLOWED[package], f"{name} imports {ours - ALLOWED[package]}"


def test_the_drawing_of_imports_has_no_circle() -> None:
    found = modules()
    # A package's own file gathers what its modules hold; who imports a module imports that file too.
    drawing = {name: (imports(path) & set(found)) - {name} for name, path in found.items()}
    list(TopologicalSorter(drawing).static_order())  # raises CycleError


def test_graphs_are_read_and_checked_without_torch() -> None:
    found = modules()
    for name in TORCHLESS:
        outside = {each.partition(".")[0] for each in imports(found[f"neumeta.{name}"])}
        assert not outside & {"torch", "safetensors", "numpy", "jaxtyping"}, name
        own = {each for each in imports(found[f"neumeta.{name}"]) if each in found}
        assert own <= {"neumeta", *(f"neumeta.{each}" for each in TORCHLESS)}
