"""Feature distillation: where it is measured, how far apart two networks are, what a step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neumeta.program import Program
from tests.support import runs
from tests.test_steps import tiny
from training import data, distillation, fit, networks, source
from training.trace import trace


def graph(module: nn.Module, morph: tuple[str, ...], side: int = 8) -> Any:
    found, _ = trace(module, torch.zeros(1, 3, side, side))
    return found.morphing(morph, depth=False)


def test_blocks_are_compared_where_their_hidden_widths_alone_morph() -> None:
    net = networks.resnet_cifar()
    assert distillation.places(graph(net, ("layer3.*.conv1",))) == (
        "layer3.1.conv1", "layer3.2.conv1", "mean", "linear",
    )  # fmt: skip
    assert distillation.places(graph(net, ("layer3.2.conv1",))) == ("mean", "linear")
    # The shortcut reads the same value as the convolution beside it, which counts once.
    assert distillation.places(graph(net, ("layer2.2.conv1",))) == (
        "layer3.0.conv1", "layer3.0.conv2", "layer3.1.conv1", "layer3.1.conv2", "layer3.2.conv1",
        "layer3.2.conv2", "mean", "linear",
    )  # fmt: skip
    assert distillation.places(graph(net, ("*",))) == ()


def test_values_before_the_first_tensor_that_morphs_are_not_compared() -> None:
    assert distillation.places(graph(networks.lenet(10, channels=3), ("conv2",))) == (
        "mean",
        "linear",
    )


def test_the_distance_is_a_share_of_what_the_source_makes() -> None:
    wanted = {"a": torch.tensor([3.0, 4.0]), "b": torch.full((2, 2), 2.0)}
    found = {"a": torch.tensor([3.0, 2.0]), "b": torch.zeros(2, 2), "c": torch.ones(1)}
    assert float(distillation.distance(found, wanted)) == pytest.approx((4 / 25 + 1) / 2)
    assert float(distillation.distance(wanted, wanted)) == 0
    nothing = {"a": torch.zeros(3)}  # of a dead ReLU
    assert float(distillation.distance(nothing, nothing)) == 0


@pytest.mark.parametrize("views", [0, 1])
def test_a_step_pulls_what_the_network_makes_inside_towards_the_source(
    views: int, tmp_path: Path
) -> None:
    """Against the loss written out for LeNet, whose last convolution and mean have one shape."""
    asked = tiny(
        morph=("conv2",), epochs=0.01, batch=64, augment=False, clip=0.0, feature_views=views,
        distill="source", distill_weight=0.6, distill_features=0.8,
    ).changed(representation={"noise": 0.0})  # fmt: skip
    digits = data.load("digits")
    manifold, smoothed = runs.prepared(asked, digits, tmp_path)
    space, model = manifold.space, manifold.representation
    small = space.architecture(0.5)
    gradients = runs.gradients(manifold, smoothed, digits, asked, (small,), tmp_path)
    ((x, y),) = digits.batches(source.epoch_plan(asked.seed, "fit", len(digits), 64, 0, 1), False)

    def inside(weights: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps = F.max_pool2d(
            F.relu(F.conv2d(x, weights["conv1.weight"], weights["conv1.bias"], padding=1)), 2
        )
        maps = F.relu(F.conv2d(maps, weights["conv2.weight"], weights["conv2.bias"], padding=1))
        maps = F.max_pool2d(maps, 2)
        maps = F.relu(F.conv2d(maps, weights["conv3.weight"], weights["conv3.bias"], padding=1))
        mean = maps.mean((2, 3))
        return maps, mean, F.linear(mean, weights["linear.weight"], weights["linear.bias"])

    weights = fit.generated(manifold, small, 0.0, torch.Generator(), 0.0)
    wanted, made = inside(smoothed), inside(weights)
    torch.testing.assert_close(
        made[2], Program(space.graph_of(small), space.sizes(small)).run(weights, x)
    )
    teacher, log = wanted[2].softmax(1), made[2].log_softmax(1)
    apart = [((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(made[:2], wanted[:2], strict=True)]
    loss = 0.4 * F.cross_entropy(made[2], y) + 0.6 * (teacher * (teacher.log() - log)).sum(1).mean()
    loss = loss + 0.8 * (apart[0] + apart[1]) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        missed = (gradients[name] - parameter.grad).norm()
        # Views are held in float16, by which a ReLU here and there opens or closes.
        assert float(missed) <= (1e-2 if views else 1e-4) * float(parameter.grad.norm())
