"""A graph's JSON, mutated: what is read is the graph that was written, or BadGraph and nothing else."""

from __future__ import annotations

import base64
import copy
import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neumeta import notation
from neumeta.graph import Graph
from neumeta.notation import MOST_TEXT, BadGraph, dump, pack, parse, unpack
from neumeta.operations import OPERATIONS
from neumeta.shapes import check
from tests.support.modules import DEEP, MODULES, traced

ALL = [*MODULES, *DEEP]


def same(one: Graph, other: Graph) -> bool:
    fields = ("input", "axes", "tensors", "nodes", "outputs", "stages")
    ordered = all(list(getattr(one, f)) == list(getattr(other, f)) for f in ("axes", "tensors"))
    return ordered and all(getattr(one, field) == getattr(other, field) for field in fields)


@pytest.mark.parametrize("name", ALL)
def test_a_graph_comes_back_as_it_was(name: str) -> None:
    _, graph = traced(name)
    for each in (graph, graph.folded):
        held = json.loads(json.dumps(dump(each)))
        assert same(parse(held), each)
        assert same(unpack(pack(each)), each)
        assert pack(unpack(pack(each))) == pack(each)


def resnet() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(dump(traced("resnet")[1])))
    return made


def node(held: dict[str, Any], name: str) -> list[Any]:
    (found,) = (each for each in held["nodes"] if each[0] == name)
    assert isinstance(found, list)
    return found


def put(*path: Any, to: Any) -> Callable[[dict[str, Any]], object]:
    """A change: the part at this path becomes `to`; a node is found by its name."""

    def change(held: Any) -> None:
        for key in path[:-1]:
            named = isinstance(held, list) and isinstance(key, str)
            held = node({"nodes": held}, key) if named else held[key]
        held[path[-1]] = to

    return change


def swapped(held: dict[str, Any]) -> None:
    held["nodes"].reverse()


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown operation": (put("nodes", "conv1", 1, to="eval"), "conv1: operation 'eval'"),
    "an operation that is a list": (put("nodes", "conv1", 1, to=[]), "conv1: operation"),
    "a cycle": (put("nodes", "bn1", 2, to=["relu"]), "bn1: reads 'relu', which no node before"),
    "nodes in another order": (swapped, "reads .* which no node before it makes"),
    "a value that is itself": (put("nodes", "bn1", 2, to=["bn1"]), "bn1: reads 'bn1'"),
    "a value missing": (put("nodes", "bn1", 2, to=[]), "bn1: batch_norm reads 0 values"),
    "a value too many": (put("nodes", "relu", 2, to=["bn1", "conv1"]), "relu reads 2 values"),
    "two nodes of one name": (put("nodes", "bn1", 0, to="conv1"), "conv1: there are two nodes"),
    "a node called input": (put("nodes", "bn1", 0, to="input"), "input: there are two nodes"),
    "a missing tensor": (lambda h: h["tensors"].pop("conv1.weight"), "conv1: holds no tensor"),
    "a role missing": (put("nodes", "conv1", 3, to={}), "conv1: lacks its weight"),
    "an unknown role": (
        put("nodes", "relu", 3, to={"code": "conv1.weight"}),
        "holds no tensor 'conv1.weight' as 'code'",
    ),
    "a tensor that none holds": (put("tensors", "extra", to=[4]), "tensor extra: no node holds"),
    "a huge repeat": (
        put("tensors", "linear.weight", to=[10, [["layer3.0.conv2", 10**9]]]),
        "tensor linear.weight",
    ),
    "a huge constant": (put("tensors", "linear.bias", to=[10**9]), "tensor linear.bias"),
    "a negative constant": (put("tensors", "linear.bias", to=[-1]), "tensor linear.bias"),
    "a huge axis": (put("axes", "conv1", to=[10**9, "a"]), "axis conv1"),
    "an axis of nothing": (put("axes", "conv1", to=[0, "a"]), "axis conv1"),
    "an axis that is a flag": (put("axes", "conv1", to=[True, "a"]), "axis conv1"),
    "an axis called batch": (put("axes", "batch", to=[4, "a"]), "axis batch"),
    "an unknown axis": (put("tensors", "linear.bias", to=["none"]), "there is no axis 'none'"),
    "a batch in a tensor": (put("tensors", "linear.bias", to=["batch"]), "no axis 'batch'"),
    "nine dimensions": (put("tensors", "linear.bias", to=[1] * 9), "at most 8 dimensions"),
    "text for numbers": (
        put("nodes", "conv1", 4, "stride", to="11"),
        "conv1.stride: '11' is no ints",
    ),
    "a number that is none": (
        put("nodes", "bn1", 4, "eps", to=float("nan")),
        "bn1.eps: 'nan' is no number",
    ),
    "a flag for a number": (put("nodes", "bn1", 4, "eps", to=True), "bn1.eps"),
    "a fraction of a stride": (put("nodes", "conv1", 4, "stride", to=[1.5, 1]), "conv1.stride"),
    "an attribute missing": (
        lambda h: node(h, "bn1")[4].pop("eps"),
        "bn1: lacks its attribute eps",
    ),
    "an unknown attribute": (
        put("nodes", "relu", 4, to={"command": "x"}),
        "relu: relu has no attribute 'command'",
    ),
    "a stage that is none": (put("stages", 0, 0, to="layer9"), "stage layer9: cannot be repeated"),
    "a stage of more blocks than children": (put("stages", 0, 3, to=99), "stage layer1: blocks"),
    "a stage of a million children": (put("stages", 0, 1, to=10**6), "stage layer1: blocks"),
    "a stage twice": (lambda h: h["stages"].append(h["stages"][0]), "lies in stage"),
    "a thousand stages": (lambda h: h.update(stages=h["stages"] * 1000), "stages: not a list"),
    "no outputs": (put("outputs", to=[]), "outputs: there is none"),
    "an output of no node": (put("outputs", to=[["", "none"]]), "outputs: 'none' is no value"),
    "no nodes": (put("nodes", to=[]), "nodes: not a list"),
    "a part missing": (lambda h: h.pop("axes"), "not an object of input, axes"),
    "a part too many": (put("code", to="x"), "not an object of input, axes"),
    "a node of three parts": (put("nodes", 0, to=["a", "relu", []]), "malformed"),
}


@pytest.mark.parametrize("kind", list(TAMPERED))
def test_a_tampered_graph_is_refused_by_name(kind: str) -> None:
    change, match = TAMPERED[kind]
    held = resnet()
    change(held)
    with pytest.raises(BadGraph, match=match) as refused:
        parsed = parse(held)
        check(parsed, parsed.full)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_dimensions_of_too_many_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notation, "MOST_PARTS", 1000)
    held = resnet()
    parse(held)
    held["tensors"]["linear.bias"] = [[["", 1]] * 600]
    with pytest.raises(BadGraph, match="dimensions of more than 1000 parts"):
        parse(held)


# Well-formed, but its operations do not fit together: found by `check`, at the sizes that will be run.
UNFIT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another shape": (put("nodes", "bn1", 5, to=["batch", "conv1", 9, 9]), "bn1: .* gives"),
    "a smaller weight": (put("tensors", "linear.weight", to=[10, 4]), "linear: .* read"),
    "a stride of 0": (put("nodes", "conv1", 4, "stride", to=[0, 1]), "conv1: .* its stride"),
    "one number of two": (put("nodes", "conv1", 4, "stride", to=[1]), "conv1: .* its stride"),
    "negative padding": (put("nodes", "conv1", 4, "padding", to=[-1, 1]), "conv1: .* its padding"),
    "no groups": (put("nodes", "conv1", 4, "groups", to=0), "conv1"),
    "an empty value": (put("nodes", "bn1", 5, to=["batch", 0, 8, 8]), "bn1: .* holds nothing"),
    "a terabyte": (put("input", to=["batch", 3, 1 << 20, 1 << 20]), "input: a value of more"),
    "images without a batch": (put("input", to=[3, 3, 8, 8]), "input: its first dimension"),
    "every dimension averaged": (put("nodes", "mean", 4, "dims", to=[]), "mean: .* dimensions"),
    "a dimension that is not there": (put("nodes", "mean", 4, "dims", to=[7]), "mean: .* dim"),
}


@pytest.mark.parametrize("kind", list(UNFIT))
def test_operations_that_do_not_fit_are_refused_by_name(kind: str) -> None:
    change, match = UNFIT[kind]
    held = resnet()
    change(held)
    graph = parse(held)
    with pytest.raises(BadGraph, match=match):
        check(graph, graph.full)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "a NoneType, not a text"),
        ({}, "a dict, not a text"),
        ("", "cut short"),
        ("not base 85 \x00", "cannot be read"),
        (base64.b85encode(b"no zlib").decode(), "cannot be read"),
        (base64.b85encode(zlib.compress(b"{")).decode(), "cannot be read"),
        (base64.b85encode(zlib.compress(b"[" * 100_000)).decode(), "cannot be read"),
        (base64.b85encode(zlib.compress(b"{}")).decode(), "not an object of"),
        (base64.b85encode(zlib.compress(b"{}")[:-3]).decode(), "cut short"),
    ],
)
def test_a_text_that_is_no_graph_is_refused(text: Any, match: str) -> None:
    with pytest.raises(BadGraph, match=match):
        unpack(text)


def test_a_bomb_is_not_unpacked() -> None:
    bomb = base64.b85encode(zlib.compress(b" " * (2 * MOST_TEXT), 1)).decode()
    tracemalloc.start()
    with pytest.raises(BadGraph, match=f"longer than {MOST_TEXT} bytes"):
        unpack(bomb)
    assert tracemalloc.get_traced_memory()[1] < 4 * MOST_TEXT
    tracemalloc.stop()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of a JSON value."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            found += places(value[index], (*path, index))
    return found


SOURCES = {name: dump(traced(name)[1]) for name in ("concatenated", "transposed", "plain")}
PLACES = {name: places(held)[1:] for name, held in SOURCES.items()}
NAMES = st.sampled_from([*OPERATIONS, "input", "batch", "", "conv1", "stem", "stage1.0.conv1"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 70), st.sampled_from([2**24, 2**63, -(2**63), 10**40]),
    st.floats(), NAMES, st.text(max_size=3),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_changed_only_bad_graph_is_raised_and_what_passes_is_safe(
    data: st.DataObject,
) -> None:
    name = data.draw(st.sampled_from(list(SOURCES)))
    held = copy.deepcopy(SOURCES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(PLACES[name]))
        try:
            inside: Any = held
            for key in path:
                inside = inside[key]
            if data.draw(st.booleans()):
                inside[last] = data.draw(VALUES)
            else:
                del inside[last]
        except (KeyError, IndexError, TypeError):
            continue  # what lay there went with an earlier change
    try:
        graph = parse(held)
        check(graph, graph.full)
        for stage in range(len(graph.stages)):
            depth = list(graph.depth)
            depth[stage] += 2
            deeper = graph.at(tuple(depth))
            check(deeper, deeper.full)
            check(deeper.folded, deeper.full)
    except BadGraph:
        return
    except ValueError as error:
        assert "depth:" in str(error) or "a block reads" in str(error)
        return
    # What is believed can be run: by nothing but numbers within bounds.
    assert same(parse(json.loads(json.dumps(dump(graph)))), graph)


def test_a_depth_that_makes_too_large_a_graph_is_refused_before_it_is_made() -> None:
    graph = traced("plain")[1]
    tracemalloc.start()
    with pytest.raises(ValueError, match="depth: .* makes a graph of"):
        graph.at((1, 10_000_000))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
