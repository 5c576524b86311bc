"""Networks that nobody here wrote are traced whole: torchvision's, with random weights."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neumeta.graph import Graph
from neumeta.program import Program
from tests.support.torchvision import torchvision_models
from training.trace import trace

__all__ = ["torchvision_models"]

SHAPE = (3, 64, 64)
NAMES = (
    "resnet18",
    "mobilenet_v3_small",
    "squeezenet1_1",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
)
GROUPS = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "mobilenet_v3_small": ("features.1", "features.2", "features.4", "features.9", "classifier"),
    "squeezenet1_1": ("features.0", "features.3", "features.6", "features.9"),
    "regnet_y_400mf": ("stem", *(f"trunk_output.block{n}" for n in (1, 2, 3, 4))),
    "shufflenet_v2_x0_5": ("conv1", "stage2", "stage3", "stage4", "conv5"),
}
# (container, children, the first that is alike, how many are)
STAGES = {
    "resnet18": [("layer1", 2, 0, 2)],
    "mobilenet_v3_small": [("features", 13, 5, 2)],
    "squeezenet1_1": [],
    "regnet_y_400mf": [
        ("trunk_output.block2", 3, 1, 2),
        ("trunk_output.block3", 6, 1, 5),
        ("trunk_output.block4", 6, 1, 5),
    ],
    "shufflenet_v2_x0_5": [("stage2", 4, 1, 3), ("stage3", 8, 1, 7), ("stage4", 4, 1, 3)],
}


class Case:
    """One network of torchvision's, with weights that are not at their start, and its graph."""

    def __init__(self, models: ModuleType, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.module = name, getattr(models, name)(weights=None).eval()
        roughen(self.module)
        # In float64, so that rounding stays far below what a mistake would do.
        self.module.double()
        self.images = torch.randn(2, *SHAPE, dtype=torch.float64)
        self.graph, self.notes = trace(self.module, self.images)
        state = self.module.state_dict()
        self.tensors = {tensor: state[tensor] for tensor in self.graph.tensors}
        with torch.no_grad():
            self.expected: Tensor = self.module(self.images)


def roughen(module: nn.Module) -> None:
    """Vectors with values of their own, which are alike at their start, and statistics of noise."""
    for name, tensor in module.named_parameters():
        scale = tensor.ndim == 1 and name.endswith("weight") or name.endswith("layer_scale")
        if scale or tensor.ndim == 1:
            nn.init.uniform_(tensor, *((0.5, 1.5) if scale else (-0.2, 0.2)))
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.momentum = None
    with torch.no_grad():
        module.train()(torch.randn(16, *SHAPE))
    module.eval()


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, torchvision_models: ModuleType) -> Case:
    return Case(torchvision_models, request.param)


@torch.no_grad()
def run(graph: Graph, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    made = Program(graph, graph.full).run(tensors, images)
    assert isinstance(made, Tensor)
    return made


def error(made: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    return float((made - expected).abs().max() / expected.abs().max())


def permuted(tensors: dict[str, Tensor], sides: list[tuple[str, int, int, int]], size: int) -> None:
    """Move the channels of one axis in these sides, in place."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    for tensor, dimension, offset, repeat in sides:
        index = torch.arange(tensors[tensor].shape[dimension])
        moved = order[:, None] * repeat + torch.arange(repeat)
        index[offset : offset + moved.numel()] = offset + moved.flatten()
        tensors[tensor] = tensors[tensor].index_select(dimension, index)


def test_a_traced_network_computes_what_the_module_does(case: Case) -> None:
    assert error(run(case.graph, case.tensors, case.images), case.expected) < 1e-9


def test_permuting_every_axis_changes_nothing_and_one_side_alone_does(case: Case) -> None:
    together, alone = dict(case.tensors), dict(case.tensors)
    for axis, sides in case.graph.cliques().items():
        permuted(together, list(sides), case.graph.full[axis])
    axis, sides = next(iter(case.graph.cliques().items()))
    permuted(alone, [side for side in sides if side[1] == 0][:1], case.graph.full[axis])
    assert error(run(case.graph, together, case.images), case.expected) < 1e-9
    assert error(run(case.graph, alone, case.images), case.expected) > 1e-3


def test_macs_are_those_of_the_flop_counter(case: Case) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.module(case.images[:1])
    assert 2 * case.graph.macs(case.graph.full) == counter.get_total_flops()


def test_groups_are_where_the_resolution_changes(case: Case) -> None:
    assert case.graph.groups == GROUPS[case.name]


def test_stages_are_the_containers_of_alike_children(case: Case) -> None:
    found = [(s.name, s.children, s.first, s.blocks) for s in case.graph.stages]
    assert found == STAGES[case.name]


@pytest.mark.parametrize("case", [name for name in NAMES if STAGES[name]], indirect=True)
def test_repeated_blocks_compute_what_they_do_one_after_the_other(case: Case) -> None:
    """Each stage one block deeper, the new block's tensors those of the one before it."""
    stage = case.graph.stages[-1]
    deeper = case.graph.at((*case.graph.depth[:-1], stage.children + 1))
    last = stage.first + stage.blocks

    def source(name: str) -> str:
        child = stage.child(name)
        return name if child is None or child < last else stage.within(name, str(child - 1))

    tensors = {name: case.tensors[source(name)] for name in deeper.tensors}
    before = dict(case.module.named_modules())[stage.path(last - 1)]
    with torch.no_grad():
        handle = before.register_forward_hook(lambda m, _, made: m.forward(made))
        expected = case.module(case.images)
        handle.remove()
    assert error(run(deeper, tensors, case.images), expected) < 1e-9
    assert error(expected, case.expected) > 1e-4
