"""The rules of shapes against torch itself: what they accept runs, and gives the shape they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neumeta.compute import COMPUTE
from neumeta.graph import BATCH
from neumeta.notation import BadGraph, dump, parse
from neumeta.operations import OPERATIONS
from neumeta.shapes import RULES, _Unfit, check
from tests.support.modules import traced

SIZE = st.integers(1, 6)
SMALL = st.lists(st.integers(-1, 4), min_size=1, max_size=3).map(tuple)


def test_every_operation_has_a_rule_and_a_way_to_compute_it() -> None:
    assert set(RULES) == set(COMPUTE) == set(OPERATIONS)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_a_value_of_fewer_dimensions_is_joined_at_the_last_ones(op: str) -> None:
    for pair in ([(5, 4, 3), (3,)], [(3,), (5, 4, 3)], [(4, 1), (5, 1, 3)]):
        assert RULES[op](pair, {}, {}) == (5, 4, 3)
    with pytest.raises(_Unfit, match=r"\(5, 4, 3\) and \(1, 1, 4\)"):
        RULES[op]([(5, 4, 3), (4,)], {}, {})


def attribute(draw: Any, key: str, kind: str, rank: int) -> Any:
    """A value of an attribute, often one that fits."""
    spatial = max(1, rank - 2)
    if key == "size":
        return tuple(draw(st.lists(SIZE, min_size=spatial, max_size=spatial)))
    if key == "order":
        return tuple(draw(st.permutations(range(rank))))
    if key == "dims":
        return tuple(draw(st.lists(st.integers(0, rank), min_size=0, max_size=2)))
    if key == "pad":
        return tuple(draw(st.lists(st.integers(-2, 3), max_size=2 * rank)))
    if key == "mode":
        modes = ["nearest", "bilinear", "bicubic", "constant", "reflect", "replicate", "circular"]
        return draw(st.sampled_from(modes))
    if key == "value":
        return draw(st.sampled_from([0.0, 1.5]))
    if key == "shape":
        return tuple(draw(st.lists(st.sampled_from([-1, 1, 2, 3, 4, 6, 12]), max_size=4)))
    if kind == "ints":
        least = 0 if "padding" in key else 1
        fitting = st.lists(st.integers(least, 3), min_size=spatial, max_size=spatial).map(tuple)
        return draw(st.one_of(fitting, fitting, SMALL))
    return {
        "int": lambda: draw(st.integers(-1, 4)),
        "dim": lambda: draw(st.integers(0, 5)),
        "flag": lambda: draw(st.booleans()),
        "number": lambda: draw(st.sampled_from([-0.5, 0.1, 2.0])),
        "text": lambda: draw(st.sampled_from(["none", "tanh"])),
        "text?": lambda: None,
    }[kind]()


# Drawn in their favour: shapes that could fit.
def tensor(draw: Any, op: str, role: str, x: tuple[int, ...]) -> tuple[int, ...]:
    channels = x[1] if len(x) > 1 else 1
    if op in ("conv", "conv_transpose") and role == "weight":
        other, side = draw(SIZE), draw(st.integers(1, 3))
        first = (channels, other) if op == "conv_transpose" else (other, channels)
        first = draw(st.sampled_from([first, (other, 1), (channels, 1)]))
        return (*first, *[side] * (len(x) - 2))
    if op == "linear" and role == "weight":
        return (draw(SIZE), x[-1] if x else 1)
    if op == "layer_norm":
        return x[draw(st.integers(1, max(1, len(x)))) :]
    return draw(st.sampled_from([(channels,), (channels,), (1,), (4,), x]))  # type: ignore[no-any-return]


@given(st.data(), st.sampled_from(sorted(OPERATIONS)))
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@torch.no_grad()
def test_what_a_rule_accepts_torch_computes(data: st.DataObject, op: str) -> None:
    draw, operation = data.draw, OPERATIONS[op]
    x = tuple(draw(st.lists(SIZE, min_size=2, max_size=5)))
    count = draw(st.integers(1, 3)) if operation.inputs is None else operation.inputs
    read = [x]
    while len(read) < count:
        read.append(tuple(draw(st.sampled_from([size, size, 1])) for size in x))
    read = read[:count]
    chosen = [role for role in operation.optional if draw(st.booleans())]
    held = {role: tensor(draw, op, role, x) for role in (*operation.tensors, *chosen)}
    if op in ("conv", "conv_transpose") and "bias" in held:
        held["bias"] = (held["weight"][0],)
    attributes = {
        key: attribute(draw, key, kind, len(x))
        for key, kind in operation.attributes.items()
        if kind != "text?"
    }
    try:
        stated = RULES[op](read, held, attributes)
    except _Unfit:
        return
    made = COMPUTE[op](
        tuple(torch.rand(shape) for shape in read),
        {role: torch.rand(shape) for role, shape in held.items()},
        attributes,
    )
    assert tuple(made.shape) == stated


# The reverse, where refusing would lose a network: the ordinary uses of each operation, at their edges.
EDGES: list[tuple[str, tuple[int, ...], dict[str, tuple[int, ...]], dict[str, Any]]] = [
    ("conv", (2, 4, 7, 5), {"weight": (6, 2, 3, 2), "bias": (6,)},
     {"stride": (2, 1), "padding": (1, 0), "dilation": (3, 2), "groups": 2}),
    ("conv", (2, 4, 7), {"weight": (6, 4, 7)},
     {"stride": (3,), "padding": (0,), "dilation": (1,), "groups": 1}),
    ("conv", (2, 4, 3, 4, 5), {"weight": (6, 4, 1, 2, 3)},
     {"stride": (1, 2, 3), "padding": (0, 0, 0), "dilation": (1, 1, 1), "groups": 1}),
    ("conv_transpose", (2, 4, 3, 5), {"weight": (4, 3, 3, 2), "bias": (6,)},
     {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2), "groups": 2,
      "output_padding": (1, 2)}),
    ("max_pool", (2, 3, 7, 6), {},
     {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 1), "dilation": (2, 1),
      "ceil_mode": True}),
    ("avg_pool", (2, 3, 7, 6), {},
     {"kernel": (3, 2), "stride": (3, 4), "padding": (1, 0), "ceil_mode": True,
      "count_include_pad": False}),
    ("avg_pool", (2, 3, 7), {},
     {"kernel": (2,), "stride": (2,), "padding": (1,), "ceil_mode": True,
      "count_include_pad": True}),
    ("pad", (2, 3, 4, 5), {}, {"pad": (4, 4, 3, 0), "mode": "reflect", "value": 0.0}),
    ("pad", (2, 3, 4, 5), {}, {"pad": (9, 0, 0, 7), "mode": "replicate", "value": 0.0}),
    ("pad", (2, 3, 4, 5), {}, {"pad": (5, 5, 4, 4), "mode": "circular", "value": 0.0}),
    ("pad", (2, 3, 4, 5), {}, {"pad": (-2, 1, 0, 0, 0, 2), "mode": "constant", "value": 1.0}),
    ("resize", (2, 3, 4, 5), {}, {"size": (9, 2), "mode": "bicubic", "align_corners": True}),
    ("resize", (2, 3, 4), {}, {"size": (9,), "mode": "nearest", "align_corners": False}),
    ("slice", (2, 9), {}, {"dim": 1, "start": 1, "length": 8, "step": 3}),
    ("expand", (1, 3, 1), {}, {"shape": (5, 4, 3, 7)}),
    ("expand", (2, 1, 3), {}, {"shape": (-1, 4, 3)}),
    ("reshape", (2, 3, 4), {}, {"shape": (-1, 12)}),
    ("mean", (2, 3, 4), {}, {"dims": (2,), "keepdim": True}),
    ("prelu", (2, 3, 4), {"weight": (1,)}, {}),
    ("layer_norm", (2, 3, 4), {"weight": (3, 4)}, {"dimensions": 2, "eps": 1e-5}),
    ("group_norm", (2, 6, 1), {"bias": (6,)}, {"groups": 3, "eps": 1e-5}),
]  # fmt: skip


@pytest.mark.parametrize("case", EDGES, ids=[f"{at}-{case[0]}" for at, case in enumerate(EDGES)])
def test_ordinary_uses_are_accepted(case: Any) -> None:
    op, x, held, attributes = case
    tensors = {role: torch.rand(shape) for role, shape in held.items()}
    made = COMPUTE[op]((torch.rand(x),), tensors, attributes)
    assert RULES[op]([x], held, attributes) == tuple(made.shape)


def test_a_dimension_that_only_equals_the_batch_of_a_trace_is_no_batch() -> None:
    held = dump(traced("grouped")[1])
    for node in held["nodes"]:
        node[5] = [3 if dim == BATCH else dim for dim in node[5]]
    graph = parse(held)
    with pytest.raises(BadGraph, match=r"stem: conv gives \(batch, .*\), not \(3, "):
        check(graph, graph.full)
