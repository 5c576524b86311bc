"""Any module becomes a graph that computes the same, or is refused by the name of its node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neumeta.graph import Graph
from neumeta.program import Program
from neumeta.shapes import check
from tests.support.modules import (
    DEEP,
    MODULES,
    Grouped,
    Images,
    drawn,
    error,
    flat,
    halved,
    images_of,
    seeded,
    traced,
)
from training import networks
from training.trace import TraceError, trace

ALL = [*MODULES, *DEEP]


def permuted(
    graph: Graph, tensors: dict[str, Tensor], axes: dict[str, Tensor], sides: slice = slice(None)
) -> dict[str, Tensor]:
    """The tensors with each of these axes in this order, on these of its sides."""
    found = dict(tensors)
    cliques = graph.cliques()
    for axis, order in axes.items():
        for tensor, dimension, offset, repeat in cliques[axis][sides]:
            size = found[tensor].shape[dimension]
            index = torch.arange(size)
            moved = offset + order[:, None] * repeat + torch.arange(repeat)
            index[offset : offset + len(order) * repeat] = moved.flatten()
            found[tensor] = found[tensor].index_select(dimension, index)
    return found


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_graph_computes_what_its_module_does(name: str) -> None:
    module, graph = traced(name)
    x = images_of(name)
    made = Program(graph, graph.full).run(module.state_dict(), x)
    wanted = module(x)
    assert type(made) is type(wanted)
    if isinstance(made, dict):
        assert list(made) == list(wanted)
    # The same operations in the same order: nothing but another kernel may differ.
    assert error(made, wanted) <= 1e-6


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_reordering_every_axis_changes_nothing_and_one_side_alone_does(name: str) -> None:
    module, graph = traced(name)
    torch.manual_seed(1)
    orders = {axis: torch.randperm(size) for axis, size in graph.full.items()}
    x = images_of(name)
    wanted = module(x)
    program = Program(graph, graph.full)
    moved = permuted(graph, module.state_dict(), orders)
    # Sums of some hundred terms in another order, through up to 13 layers.
    assert error(program.run(moved, x), wanted) <= 1e-5
    for axis, order in orders.items():
        alone = permuted(graph, module.state_dict(), {axis: order.flip(0)}, slice(1))
        assert error(program.run(alone, x), wanted) > 1e-3, axis


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_half_the_width_runs_with_shapes_from_the_axes_alone(name: str) -> None:
    module, graph = traced(name)
    sizes, x = halved(graph), images_of(name)
    wanted = flat(module(x))
    for each in (graph, graph.folded):
        check(each, sizes)
        made = flat(Program(each, sizes).run(drawn(each, sizes), x))
        assert [value.shape for value in made] == [value.shape for value in wanted]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [1, 2])
def test_macs_are_torchs_own_count(name: str, width: int) -> None:
    _, graph = traced(name)
    sizes = {axis: max(1, size // width) for axis, size in graph.full.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Program(graph, sizes).run(drawn(graph, sizes), images_of(name, 1))
    assert graph.macs(sizes) == counter.get_total_flops() // 2


def test_depthwise_channels_are_one_axis_with_their_groups() -> None:
    _, graph = traced("depthwise")
    sides = graph.cliques()["expand"]
    assert ("depthwise.weight", 0, 0, 1) in sides and ("project.weight", 1, 0, 1) in sides
    assert not any(tensor == "depthwise.weight" and dim == 1 for tensor, dim, _, _ in sides)
    (node,) = (node for node in graph.nodes if node.name == "depthwise")
    assert node.attributes["groups"] == (("expand", 1),)


def test_flattened_and_concatenated_channels_keep_offset_and_repeat() -> None:
    assert ("hidden.weight", 1, 0, 6) in traced("flattened")[1].cliques()["conv"]
    cliques = traced("concatenated")[1].cliques()
    assert ("head.weight", 1, 8, 1) in cliques["conv1"]
    assert ("head.weight", 1, 14, 1) in cliques["conv2"]


def test_channels_of_a_group_are_reordered_as_a_whole() -> None:
    _, graph = traced("grouped")
    assert graph.full == {"stem": 6}
    sides = dict.fromkeys(graph.cliques()["stem"])
    assert ("stem.weight", 0, 0, 2) in sides and ("grouped.weight", 0, 0, 3) in sides
    assert ("head.weight", 1, 0, 3) in sides


def test_what_cannot_morph_keeps_its_size_and_says_why() -> None:
    for name, maker, why in (
        ("chunked", "conv", "is cut"),
        ("padded channels", "stem", "is joined with another kind"),
        ("heads", "mean", "output"),
    ):
        make, images = MODULES[name]
        graph, notes = trace(seeded(make), torch.zeros(1, *images))
        assert why in notes[maker] and maker not in graph.axes


def test_a_trace_leaves_the_module_as_it_was() -> None:
    module = Grouped().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trace(module, torch.zeros(1, 3, 6, 5))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- torch-pruning's dependency groups as the oracle of cliques ------------------------------------


class Called(nn.Module):
    """Stride, shortcut and concatenation, called as modules: torch-pruning hooks those."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.conv2, self.norm2 = nn.Conv2d(9, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.side = nn.Conv2d(3, 5, 1)
        self.last = nn.Conv2d(11, 7, 3, padding=1)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm0(self.stem(x)))
        y = F.relu(y + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(y))))))
        y = F.relu(self.last(torch.cat((y, self.side(x)), 1)))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


ORACLE: dict[str, tuple[Callable[[], nn.Module], Images, str]] = {
    "called": (Called, (3, 6, 6), "head"),
    "lenet": (lambda: networks.lenet(10, (4, 6, 5)), (1, 8, 8), "linear"),
    "resnet": (DEEP["resnet"][0], (3, 8, 8), "linear"),
    "plain": (DEEP["plain"][0], (1, 8, 8), "linear"),
    "depthwise": (*MODULES["depthwise"], "head"),
    "squeezed": (*MODULES["squeezed"], "head"),
}


@pytest.mark.parametrize("name", list(ORACLE))
def test_cliques_are_those_of_torch_pruning(name: str) -> None:
    make, images, head = ORACLE[name]
    module = seeded(make)
    graph, _ = trace(module, torch.zeros(1, *images))
    ours = {
        frozenset(
            (tensor, dimension)
            for tensor, dimension, _, _ in sides
            if tensor.rpartition(".")[2] in ("weight", "bias")
        )
        for sides in graph.cliques().values()
    }
    names = {each: path for path, each in module.named_modules()}
    made = (
        torch_pruning.prune_conv_out_channels,
        torch_pruning.prune_linear_out_channels,
        torch_pruning.prune_depthwise_conv_out_channels,
        torch_pruning.prune_batchnorm_out_channels,
        torch_pruning.prune_batchnorm_in_channels,
        torch_pruning.prune_depthwise_conv_in_channels,
    )
    theirs = set()
    dependencies = torch_pruning.DependencyGraph().build_dependency(
        module, example_inputs=torch.zeros(1, *images)
    )
    for group in dependencies.get_all_groups(ignored_layers=[module.get_submodule(head)]):
        sides = set()
        for item in group:
            layer, handler = item.dep.layer, item.dep.pruning_fn
            if layer not in names:
                continue  # its own stand-ins for additions and the like
            weights = dict(layer.named_parameters(recurse=False))
            for key in weights:
                if handler in made:
                    sides.add((f"{names[layer]}.{key}", 0))
                elif key == "weight":
                    sides.add((f"{names[layer]}.weight", 1))
        theirs.add(frozenset(sides))
    assert ours == theirs


# --- refusals --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"mix": nn.Linear(6, 18)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner["mix"](x.flatten(2).transpose(1, 2)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).mean(1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Selecting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nonzero(x.mean((2, 3))).float()


class OverBatch(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.head = how, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.head(x.mean((2, 3))))


class ViewChanged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :4].relu_()
        return y.mean((2, 3))


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Unnormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


class Turned(nn.Module):
    """Reads the images of the batch (three in a trace) as features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)).t()).t()  # type: ignore[no-any-return]


class Indexed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, torch.tensor([2, 0, 1])]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (Attention, r"scaled_dot_product_attention.*is not among the operations"),
    "a branch on values": (Branching, r"torch.export cannot follow Branching"),
    "a shape of the data": (Selecting, r"nonzero"),
    "softmax over the batch": (
        lambda: OverBatch(lambda y: y.softmax(0)),
        r"softmax.*mixes the images of a batch",
    ),
    "a mean over the batch": (
        lambda: OverBatch(lambda y: y - y.mean(0, keepdim=True)),
        r"mean.*mixes the images of a batch",
    ),
    "the batch flattened": (
        lambda: OverBatch(lambda y: y.flatten(0)),
        r"(flatten|view|reshape).*mixes the images of a batch",
    ),
    "the batch cut": (lambda: OverBatch(lambda y: y[1:]), r"slice.*mixes the images of a batch"),
    "the batch turned": (
        lambda: OverBatch(lambda y: y @ y.t()),
        r"matmul.*is not among the operations",
    ),
    "the batch read as features": (Turned, r"head: linear.*mixes the images of a batch"),
    "a view changed in place": (ViewChanged, r"relu_.*changes a view in place"),
    "batch norm without statistics": (Unnormed, r"norm: batch_norm.*track_running_stats=True"),
    "chosen channels": (Indexed, r"index.*is not among the operations"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_served_is_refused_by_its_node(name: str) -> None:
    make, match = REFUSED[name]
    with pytest.raises(TraceError, match=match) as refused:
        trace(make(), torch.ones(1, 6, 4, 4))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("example", "match"),
    [
        (torch.zeros(1, 5, 6, 5), r"cannot follow Grouped on an input of shape \(1, 5, 6, 5\)"),
        (torch.zeros(0, 3, 6, 5), "at least one image"),
        (torch.zeros(3), "at least one image"),
        (torch.zeros(1, 3, 6, 5, dtype=torch.int64), "cannot follow"),
    ],
)
def test_an_example_of_the_wrong_shape_is_refused(example: Tensor, match: str) -> None:
    with pytest.raises(TraceError, match=match):
        trace(Grouped(), example)


def test_a_module_of_two_inputs_is_refused() -> None:
    with pytest.raises(TraceError, match="TwoInputs"):
        trace(TwoInputs(), torch.zeros(1, 3, 4, 4))


# --- axes: names, groups, links --------------------------------------------------------------------


def test_axes_that_meet_are_named_after_their_first_maker() -> None:
    _, graph = traced("resnet")
    found = defaultdict(set)
    for axis, sides in graph.cliques().items():
        for tensor, _, _, _ in sides:
            found[axis].add(tensor.rpartition(".")[0])
    # A stage's blocks add up in one axis; between a block's two convolutions lies one of its own.
    assert "layer2.0.conv2" in found["layer2.0.conv2"] and "layer2.1.conv2" in found["layer2.0.conv2"]
    assert found["layer2.1.conv1"] == {"layer2.1.conv1", "layer2.1.bn1", "layer2.1.conv2"}


def test_groups_follow_patterns_and_a_pattern_without_an_axis_is_refused() -> None:
    make, images = DEEP["resnet"]
    example = torch.zeros(1, *images)
    graph, _ = trace(seeded(make), example, groups=("layer3*", "*"))
    assert graph.groups == ("*", "layer3*")
    assert {a for a, axis in graph.axes.items() if axis.group == "layer3*"} == {
        a for a in graph.axes if a.startswith("layer3")
    }
    with pytest.raises(ValueError, match="'head\\*' matches none of"):
        trace(seeded(make), example, groups=("head*", "*"))
    with pytest.raises(ValueError, match="axis 'layer1.0.conv1' matches none|axis 'conv1' matches"):
        trace(seeded(make), example, groups=("layer2*", "layer3*"))
