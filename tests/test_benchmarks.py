"""What a benchmark compares must be the same thing: its baselines equal what the product does."""

from __future__ import annotations

import pytest
import torch
from neumeta.family import parameters

from benchmarks.published import flops, published
from benchmarks.scale import RESNET18
from benchmarks.step import plain_generated
from neumeta.sample import sample
from tests.conftest import lenet
from training import fit


@pytest.mark.parametrize("width", [1.0, 0.4])
def test_the_published_way_makes_the_same_weights(width: float) -> None:
    """Algorithm 3 from every pair's own six coordinates, without noise, against per-axis sampling."""
    manifold = lenet()
    architecture = manifold.space.architecture(width)
    theirs, ours = (
        published(manifold, architecture, 1),
        dict(sample(manifold, architecture, samples=1)),
    )
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        # float32: sines of angles up to 8 pi, the same sums in another order, values of order one
        torch.testing.assert_close(theirs[name].reshape(value.shape), value, atol=1e-4, rtol=1e-3)


def test_the_means_of_both_ways_are_the_same_mean() -> None:
    """With many samples both come near one another: the noise has the same distribution."""
    manifold = lenet()
    architecture = manifold.space.architecture(0.25)
    torch.manual_seed(0)
    theirs = published(manifold, architecture, 1500)
    ours = dict(sample(manifold, architecture, samples=64))
    once = dict(sample(manifold, architecture, samples=1))
    flat = [torch.cat([each[name].flatten() for name in ours]) for each in (theirs, ours, once)]
    mean, even, exact = flat
    # 1,500 independent samples leave 1/40 of the noise; the noise-free one is further away.
    assert (even - mean).norm() < 0.5 * (exact - mean).norm()


def test_a_training_step_is_the_same_both_ways() -> None:
    manifold = lenet()
    full = manifold.space.full
    plain = plain_generated(manifold, full, 0.5, torch.Generator().manual_seed(3))
    ours = fit.generated(manifold, full, 0.5, torch.Generator().manual_seed(3))
    for name, value in ours.items():
        torch.testing.assert_close(plain[name], value, atol=1e-4, rtol=1e-3)  # as above


def test_the_table_of_the_large_network_is_resnet_18() -> None:
    sizes = {**RESNET18.full_sizes((2, 2, 2, 2), 1000), "image": 3}
    # torchvision's resnet18 has 11,689,512: its batch norm holds twice the biases of folding.
    biases = sum(sizes[layer.output_axis] for layer in RESNET18.layers((2, 2, 2, 2)))
    counted = parameters(RESNET18.tensors((2, 2, 2, 2)), sizes)
    assert counted - biases == 11_689_512 - 2 * (biases - 1000) - 1000


def test_splitting_the_first_layer_saves_work() -> None:
    manifold = lenet()
    full = manifold.space.full
    assert flops(manifold, full, split=True) < flops(manifold, full, split=False)
