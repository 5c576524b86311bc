"""A graph written out by hand: other depths, costs, sides, folding, and what of it morphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from neumeta import graph as module
from neumeta.graph import BATCH, Axis, Graph, Node, Shape, Stage, constant, extent, interface

WINDOW = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": constant(1)}
IMAGES: Shape = (((BATCH, 1),), constant(3), constant(8), constant(8))


def channels(*parts: tuple[str, int], side: int = 8) -> Shape:
    return (((BATCH, 1),), parts, constant(side), constant(side))


class Drawn:
    """A graph in the making."""

    def __init__(self, images: Shape = IMAGES) -> None:
        self.images = images
        self.axes: dict[str, Axis] = {}
        self.tensors: dict[str, Shape] = {}
        self.nodes: list[Node] = []

    def axis(self, name: str, size: int, group: str = "all") -> None:
        self.axes[name] = Axis(size, group)

    def node(
        self, name: str, op: str, *inputs: str, shape: Shape, held: Any = None, **attributes: Any
    ) -> None:
        tensors = {role: f"{name}.{role}" for role in held or {}}
        self.tensors |= {f"{name}.{role}": dims for role, dims in (held or {}).items()}
        path = name.rpartition(".+")[0] or name  # `path.+op` is an operation of a module's own
        self.nodes.append(Node(name, op, inputs, tensors, attributes, shape, path))

    def conv(self, name: str, value: str, read: str, made: str) -> None:
        weight = (((made, 1),), ((read, 1),) if read else constant(3), constant(3), constant(3))
        self.node(name, "conv", value, shape=channels((made, 1)), held={"weight": weight}, **WINDOW)

    def norm(self, name: str, value: str, axis: str, side: int = 8) -> None:
        held = dict.fromkeys(("weight", "bias", "mean", "variance"), (((axis, 1),),))
        self.node(
            name, "batch_norm", value, shape=channels((axis, 1), side=side), held=held, eps=1e-5
        )

    def graph(self, *outputs: str, stages: tuple[Stage, ...] = ()) -> Graph:
        named = tuple((name, name) for name in outputs) if len(outputs) > 1 else (("", outputs[0]),)
        return Graph(
            self.images, dict(self.axes), dict(self.tensors), tuple(self.nodes), named, stages
        )


def deep(first: int, second: int) -> Graph:
    """Two stages: `body` has a child before its alike ones and one behind them, `tail` has no other."""
    drawn = Drawn()
    drawn.axis("body.0", 4, "body")
    drawn.conv("body.0", "input", "", "body.0")
    value = "body.0"
    for at in range(1, 1 + first):
        drawn.axis(f"body.{at}.a", 6, "body")
        drawn.conv(f"body.{at}.a", value, "body.0", f"body.{at}.a")
        drawn.norm(f"body.{at}.norm", f"body.{at}.a", f"body.{at}.a")
        drawn.conv(f"body.{at}.b", f"body.{at}.norm", f"body.{at}.a", "body.0")
        drawn.node(f"body.{at}.+add", "add", value, f"body.{at}.b", shape=channels(("body.0", 1)))
        value = f"body.{at}.+add"
    behind = value
    last = f"body.{1 + first}"
    drawn.axis(f"{last}.c", 5, "tail")
    drawn.conv(f"{last}.c", value, "body.0", f"{last}.c")
    value = f"{last}.c"
    for at in range(second):
        shape = channels((f"{last}.c", 1))
        drawn.conv(f"tail.{at}", value, f"{last}.c", f"{last}.c")
        flat: Shape = (((BATCH, 1),), ((f"{last}.c", 64),))
        drawn.node(f"tail.{at}.+flat", "reshape", f"tail.{at}", shape=flat, shape_=flat)
        drawn.node(f"tail.{at}.+map", "reshape", f"tail.{at}.+flat", shape=shape, shape_=shape)
        value = f"tail.{at}.+map"
    stages = (Stage("body", 2 + first, 1, first), Stage("tail", second, 0, second))
    return drawn.graph(behind, f"{last}.c", value, stages=stages)


def told(graph: Graph) -> Any:
    """Everything in a graph, in its order, but the outputs' keys."""
    return (
        graph.input,
        list(graph.axes.items()),
        list(graph.tensors.items()),
        [(*vars(node).values(),) for node in graph.nodes],
        [value for _, value in graph.outputs],
        graph.stages,
    )


# --- other depths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "depth", [(1, 1), (1, 3), (2, 2), (3, 1), (4, 2), (12, 3)], ids=lambda depth: str(depth)
)
def test_a_graph_at_another_depth_is_the_one_drawn_at_that_depth(depth: tuple[int, int]) -> None:
    first, second = depth
    found = deep(3, 2).at((2 + first, second))
    assert told(found) == told(deep(first, second))
    assert found.depth == (2 + first, second)
    assert told(found.at((5, 2))) == told(deep(3, 2))  # and back


def test_alike_blocks_may_all_be_left_out() -> None:
    wanted = deep(1, 2)
    gone = {node.name for node in wanted.nodes if node.module.startswith("body.1")}
    found = deep(3, 2).at((2, 2))
    names = [node.name.replace("body.2.c", "body.1.c") for node in wanted.nodes]
    assert [node.name for node in found.nodes] == [name for name in names if name not in gone]
    assert [value for _, value in found.outputs] == ["body.0", "body.1.c", "tail.1.+map"]
    (after,) = [node for node in found.nodes if node.name == "body.1.c"]
    assert after.inputs == ("body.0",)
    assert set(found.axes) == {"body.0", "body.1.c"}


def test_its_own_depth_is_the_graph_itself_and_a_depth_is_built_once() -> None:
    graph = deep(3, 2)
    assert graph.at((5, 2)) is graph
    assert graph.at((6, 2)) is graph.at((6, 2))


def test_a_depth_below_what_is_not_repeated_is_refused_by_its_stage() -> None:
    graph = deep(3, 2)
    for depth, stage, least in (((1, 2), "body", 2), ((5, 0), "tail", 1)):
        with pytest.raises(ValueError, match=f"depth: stage {stage} has at least {least} blocks"):
            graph.at(depth)
        allowed = tuple(max(n, own.least) for n, own in zip(depth, graph.stages, strict=True))
        assert graph.at(allowed).depth == allowed


def parts(graph: Graph) -> int:
    """All (axis, repeat) pairs of what nodes make and hold and of what they are told."""
    found = 0
    for node in graph.nodes:
        shapes = [node.shape, *(graph.tensors[name] for name in node.tensors.values())]
        shapes += [node.attributes["shape_"]] if "shape_" in node.attributes else []
        found += sum(len(dim) for shape in shapes for dim in shape)
        found += len(node.attributes.get("groups", ()))
    return found


@pytest.mark.parametrize("bound", ["MOST_NODES", "MOST_PARTS"])
def test_a_depth_of_too_many_nodes_or_parts_is_refused_before_it_is_built(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = deep(6, 4)
    size = len(largest.nodes) if bound == "MOST_NODES" else parts(largest)
    monkeypatch.setattr(module, bound, size)
    assert told(deep(3, 2).at((8, 4))) == told(largest)
    for depth, (first, second) in (((8, 5), (6, 5)), ((9, 4), (7, 4))):
        more = deep(first, second)
        counts = f"a graph of {len(more.nodes)} nodes, {parts(more)} parts"
        with pytest.raises(ValueError, match=f"depth: .{depth[0]}, {depth[1]}. makes {counts}"):
            deep(3, 2).at(depth)


# --- stages ----------------------------------------------------------------------------------------


def test_a_stages_child_is_a_whole_number_in_plain_digits_behind_its_prefix() -> None:
    stage = Stage("body", 5, 1, 3, "block-")
    for path, child in {
        "body.block-0": 0,
        "body.block-12.conv.weight": 12,
        "body.block-": None,
        "body.block-01": None,
        "body.block-\u00b2": None,
        "body.block-\u0663": None,
        "body.block--1": None,
        "body.block-1a": None,
        "body.1": None,
        "other.body.block-1": None,
        "body": None,
    }.items():
        assert stage.child(path) == child, path
    assert stage.path(3) == "body.block-3"
    assert stage.within("body.block-3.conv.weight", "n") == "body.block-n.conv.weight"
    assert stage.within("body.block-3", "7") == "body.block-7"


def test_alike_children_make_room_for_others_around_them() -> None:
    stage = Stage("body", 5, 1, 3)
    assert list(stage.alike) == [1, 2, 3]
    assert (stage.least, stage.repeats(5), stage.repeats(2), stage.repeats(9)) == (2, 3, 0, 7)
    assert Stage("tail", 3, 0, 3).least == 1


def test_a_block_is_the_nodes_of_one_child_in_their_order() -> None:
    graph = deep(2, 2)
    body, tail = graph.stages
    names = ["body.2.a", "body.2.norm", "body.2.b", "body.2.+add"]
    assert [node.name for node in graph.block(body, 2)] == names
    assert [node.name for node in graph.block(tail, 2)] == []
    assert [node.name for node in graph.block(tail, 0)] == ["tail.0", "tail.0.+flat", "tail.0.+map"]
    # Two prefixes in one container are two stages.
    assert graph.block(replace(body, prefix="x"), 2) == ()


def test_a_block_reads_one_value_and_gives_one() -> None:
    graph = deep(2, 2)
    assert interface(graph, graph.block(graph.stages[0], 2)) == ("body.1.+add", "body.2.+add")
    both = graph.block(graph.stages[0], 0) + graph.block(graph.stages[1], 1)
    with pytest.raises(ValueError, match="reads 2 values and gives 2"):
        interface(graph, both)
    drawn = Drawn()
    for name in ("a", "b", "c"):
        drawn.axis(name, 2)
    drawn.conv("a", "input", "", "a")
    drawn.conv("b", "a", "a", "b")
    drawn.conv("c", "a", "a", "c")
    two = drawn.graph("b", "c")
    with pytest.raises(ValueError, match="reads 1 values and gives 2"):
        interface(two, two.nodes)
    with pytest.raises(ValueError, match="reads 0 values and gives 0"):
        interface(two, ())


# --- what it costs ---------------------------------------------------------------------------------


def costly() -> Graph:
    """A strided convolution of 2 groups, a transposed one, batch norm, and a linear map of places."""
    drawn = Drawn((((BATCH, 1),), constant(6), constant(8), constant(8)))
    drawn.axis("conv", 4, "a")
    drawn.axis("up", 5, "b")
    weight: Shape = ((("conv", 1),), constant(3), constant(3), constant(3))
    told_of = WINDOW | {"stride": (2, 2), "groups": constant(2)}
    drawn.node(
        "conv", "conv", "input", shape=channels(("conv", 1), side=4),
        held={"weight": weight, "bias": ((("conv", 1),),)}, **told_of,
    )  # fmt: skip
    drawn.norm("norm", "conv", "conv", side=4)
    weight = ((("conv", 1),), (("up", 1),), constant(2), constant(2))
    drawn.node(
        "up", "conv_transpose", "norm", shape=channels(("up", 1), side=7), held={"weight": weight},
        **WINDOW, output_padding=(0, 0),
    )  # fmt: skip
    rows: Shape = (((BATCH, 1),), (("up", 1),), constant(49))
    drawn.node("rows", "reshape", "up", shape=rows, shape_=rows)
    drawn.node(
        "head", "linear", "rows", shape=(((BATCH, 1),), (("up", 1),), constant(10)),
        held={"weight": (constant(10), constant(49))},
    )  # fmt: skip
    return drawn.graph("head")


def test_each_weight_is_met_once_at_every_place() -> None:
    graph, sizes = costly(), {"conv": 2, "up": 3}
    conv, up, head = 4 * 4 * (2 * 3 * 9), 4 * 4 * (2 * 3 * 4), 3 * (10 * 49)
    assert graph.macs(sizes) == conv + up + head
    assert graph.macs(graph.full) == 4 * 4 * (4 * 27) + 4 * 4 * (4 * 5 * 4) + 5 * 490
    assert graph.macs(sizes | {BATCH: 7}) == conv + up + head  # of one image
    # Batch norm: four numbers per channel. The bias costs none to multiply.
    assert graph.parameters(sizes) == (2 * 27 + 2) + 4 * 2 + 2 * 3 * 4 + 490
    assert graph.shape("up.weight", sizes) == (2, 3, 2, 2)


def test_sizes_groups_readers_and_owners_are_told_in_the_order_of_the_forward_pass() -> None:
    graph = deep(2, 1)
    assert graph.groups == ("body", "tail")
    assert graph.full == {"body.0": 4, "body.1.a": 6, "body.2.a": 6, "body.3.c": 5}
    assert graph.readers["body.0"] == ("body.1.a", "body.1.+add")
    assert graph.readers["body.2.+add"] == ("body.3.c", "")  # the network gives it too
    assert graph.readers["input"] == ("body.0",)
    assert graph.owners["body.1.norm.mean"].name == "body.1.norm"
    shared = graph.nodes + (replace(graph.nodes[0], name="again", inputs=("body.0", "body.0")),)
    twice = replace(graph, nodes=shared)
    assert twice.owners["body.0.weight"].name == "body.0"
    assert twice.readers["body.0"] == ("body.1.a", "body.1.+add", "again")


# --- sides of an axis ------------------------------------------------------------------------------


def joined() -> Graph:
    """A linear map of 2 constant channels, `a`'s and `b`'s, flattened from 4 places each."""
    drawn = Drawn()
    drawn.axis("a", 3)
    drawn.axis("b", 5)
    drawn.conv("a", "input", "", "a")
    drawn.conv("b", "a", "a", "b")
    dim = (("", 8), ("a", 4), ("b", 4))
    drawn.node(
        "head", "linear", "b", shape=(((BATCH, 1),), constant(2)),
        held={"weight": (constant(2), dim), "bias": (constant(2),)},
    )  # fmt: skip
    return drawn.graph("head")


def test_a_side_says_where_an_axis_lies_in_a_dimension_of_the_source() -> None:
    assert joined().cliques() == {
        "a": (("a.weight", 0, 0, 1), ("b.weight", 1, 0, 1), ("head.weight", 1, 8, 4)),
        "b": (("b.weight", 0, 0, 1), ("head.weight", 1, 8 + 12, 4)),
    }
    dim = joined().tensors["head.weight"][1]
    assert extent(dim, {"a": 3, "b": 5}) == 40 and extent(dim, {"a": 1, "b": 2}) == 20


# --- what morphs -----------------------------------------------------------------------------------


def test_axes_that_no_pattern_matches_become_constants_of_the_sources_size() -> None:
    graph = deep(2, 1)
    found = graph.morphing(["body.?.a", "*.2.a"])
    assert list(found.axes.items()) == [
        ("body.1.a", Axis(6, "body")),
        ("body.2.a", Axis(6, "body")),
    ]
    assert found.tensors["body.1.a.weight"][:2] == ((("body.1.a", 1),), (("", 4),))
    assert found.tensors["body.3.c.weight"][:2] == ((("", 5),), (("", 4),))
    (flat,) = [node for node in found.nodes if node.name == "tail.0.+flat"]
    assert flat.shape == flat.attributes["shape_"] == (((BATCH, 1),), (("", 5 * 64),))
    assert found.stages == graph.stages and found.outputs == graph.outputs
    sizes = {"body.1.a": 2, "body.2.a": 3}
    assert found.parameters(sizes) == graph.parameters(graph.full | sizes)
    assert found.macs(sizes) == graph.macs(graph.full | sizes)


def test_depth_morphs_unless_it_is_said_not_to() -> None:
    graph = deep(2, 1)
    assert graph.morphing(["*"], depth=False).stages == ()
    assert told(graph.morphing(["*"])) == told(graph)
    assert graph.morphing([]).axes == {}


def test_a_pattern_that_matches_no_axis_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'c\\*' matches none of a, b$"):
        joined().morphing(["a", "c*"])


# --- without batch norm ----------------------------------------------------------------------------


def test_a_norm_behind_a_weighted_node_is_gone_and_its_bias_is_the_nodes() -> None:
    found = deep(1, 1).folded
    assert [node.op for node in found.nodes].count("batch_norm") == 0
    names = {node.name: node for node in found.nodes}
    assert "body.1.norm" not in names and names["body.1.b"].inputs == ("body.1.a",)
    assert names["body.1.a"].tensors == {"weight": "body.1.a.weight", "bias": "body.1.a.bias"}
    assert names["body.1.a"].attributes["norm"] == "body.1.norm"
    assert found.tensors["body.1.a.bias"] == ((("body.1.a", 1),),)
    assert not any(name.startswith("body.1.norm") for name in found.tensors)
    assert "norm" not in names["body.1.b"].attributes and "bias" not in names["body.1.b"].tensors
    assert found.stages == deep(1, 1).stages


def test_an_output_that_is_a_norm_is_the_node_before_it() -> None:
    drawn = Drawn()
    drawn.axis("a", 2)
    drawn.conv("a", "input", "", "a")
    drawn.norm("norm", "a", "a")
    assert drawn.graph("norm").folded.outputs == (("", "a"),)


def norms(how: str) -> Graph:
    drawn = Drawn()
    drawn.axis("a", 3)
    drawn.conv("a", "input", "", "a")
    if how == "an activation before it":
        drawn.node("relu", "relu", "a", shape=channels(("a", 1)))
    value = {"an activation before it": "relu", "the images before it": "input"}.get(how, "a")
    drawn.norm("norm", value, "a")
    outputs = ["norm"]
    if how == "another reader":
        drawn.node("relu", "relu", "a", shape=channels(("a", 1)))
        outputs = ["norm", "relu"]
    if how == "the network reads it too":
        outputs = ["norm", "a"]
    if how == "a weight run twice":
        drawn.nodes.append(replace(drawn.nodes[0], name="again"))
        outputs = ["norm", "again"]
    return drawn.graph(*outputs)


@pytest.mark.parametrize(
    "how",
    [
        "an activation before it",
        "the images before it",
        "another reader",
        "the network reads it too",
        "a weight run twice",
    ],
)
def test_a_norm_that_nothing_can_take_up_becomes_a_scale_and_shift(how: str) -> None:
    graph = norms(how)
    assert graph.folds == {}
    (node,) = [each for each in graph.folded.nodes if each.name == "norm"]
    assert (node.op, node.attributes) == ("affine", {"norm": "norm"})
    assert node.tensors == {"weight": "norm.weight", "bias": "norm.bias"}
    held = {name: graph.folded.tensors[name] for name in node.tensors.values()}
    assert held == {"norm.weight": ((("a", 1),),), "norm.bias": ((("a", 1),),)}
    assert not {"norm.mean", "norm.variance"} & set(graph.folded.tensors)
    assert "norm" not in graph.folded.nodes[0].attributes
