"""Generated tensors through a network: padding channels changes nothing but the time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from neumeta.architecture import Space
from neumeta.manifold import Manifold, representation
from training.fit import frozen_segments, generated
from training.forward import LANES, aligned, logits, parameters_of, skeleton
from training.source import task_loss

NORMALISATION = {"mean": [0.0], "std": [1.0]}
# Channel counts that are no multiple of 8; blocks that repeat; a network without batch norm.
CASES = [
    ("resnet-cifar", "resnet20", True, [0.3, 0.6, 0.45], [2, 1, 3], (3, 32)),
    ("resnet-mnist", "resnet-mnist", False, [0.4, 0.3], [3, 1], (1, 28)),
    ("lenet-mnist", "lenet", False, [0.3, 0.9, 0.5], None, (1, 28)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_padded_channels_compute_the_same(case: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    """Logits and the gradients of every parameter. float64: the same sums in another order. float32:
    up to 20 layers of sums of some hundred terms, relative to the largest of each tensor."""
    family, arch, norm, width, depth, (channels, side) = case
    blocks = (1, 3) if depth else None
    space = Space(family, arch, 10, ("*",), (0.25, 1.0), blocks)
    torch.manual_seed(0)
    model = representation("grid", space, {}, norm=norm)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype)
    labels = list("0123456789")
    manifold = Manifold(space, model, "grid", {}, norm, 0.0, 1, 64, NORMALISATION, labels)
    architecture = space.architecture(width, depth)
    made = generated(manifold, architecture, 0.0, torch.Generator())
    net = skeleton(manifold, architecture)
    weights = parameters_of(manifold, architecture, made)
    x = torch.randn(8, channels, side, side, dtype=dtype)
    y = torch.randint(10, (8,))

    def gradients(predicted: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(task_loss(predicted, y, None, 0.0), list(weights.values()))
        return dict(zip(weights, found, strict=True))

    plain = functional_call(net, weights, (x, 0))
    ours = logits(net, weights, x)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    expected, found = gradients(plain), gradients(ours)
    for a, b in (
        (ours.detach(), plain.detach()),
        *((found[name], expected[name]) for name in weights),
    ):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp(min=1e-3))


def test_a_frozen_part_that_ran_before_goes_on_the_same() -> None:
    space = Space("resnet-cifar", "resnet20", 10, ("layer3.2.inner",), (0.25, 1.0))
    torch.manual_seed(0)
    model = representation("grid", space, {}, norm=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    labels = list("0123456789")
    manifold = Manifold(space, model, "grid", {}, False, 0.0, 1, 64, NORMALISATION, labels)
    sizes = space.sizes(space.full)
    for tensor in space.table.tensors(space.depth):
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes]
        manifold.frozen[tensor.name] = 0.1 * torch.randn(shape)
    architecture = space.architecture(0.35)  # 22 of 64 channels
    net = skeleton(manifold, architecture)
    made = generated(manifold, architecture, 0.0, torch.Generator())
    weights = parameters_of(manifold, architecture, made)
    first = frozen_segments(space, net)
    features = torch.randn(4, 64, 8, 8)
    with torch.no_grad():
        plain = functional_call(net, weights, (features, first))
        torch.testing.assert_close(logits(net, weights, features, first), plain)


def test_every_channel_axis_is_padded_and_nothing_else() -> None:
    space = Space("resnet-cifar", "resnet20", 10, ("*",), (0.25, 1.0))
    model = representation("grid", space, {}, norm=True)
    manifold = Manifold(space, model, "grid", {}, True, 0.0, 1, 64, NORMALISATION, list("abc"))
    architecture = space.architecture(0.35)  # 6, 11, 22 channels
    made = generated(manifold, architecture, 0.0, torch.Generator())
    weights = parameters_of(manifold, architecture, made)
    padded = aligned(skeleton(manifold, architecture), weights)
    assert padded["conv1.weight"].shape == (8, 3, 3, 3)
    assert padded["layer2.0.conv1.weight"].shape == (16, 8, 3, 3)
    assert padded["linear.weight"].shape == (10, 24) and padded["linear.bias"].shape == (10,)
    for name, value in weights.items():
        inside = padded[name][tuple(slice(n) for n in value.shape)]
        assert torch.equal(inside, value)
        assert padded[name].abs().sum() == value.abs().sum()
        assert padded[name].dim() < 4 or len(padded[name]) % LANES == 0
