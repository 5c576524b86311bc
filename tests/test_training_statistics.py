"""Batch statistics: chosen images stand for many, and what is kept is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neumeta.manifold import Manifold
from neumeta.sample import normalised
from neumeta.statistics import unflatten
from tests.support import runs
from training import data, fit, recipe, statistics


def test_chosen_rows_have_a_mean_nearer_to_all_than_random_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 30, generator=generator)
    features -= features.mean(0)
    found = statistics.chosen(features, 20)
    assert len(set(found.tolist())) == 20
    mine = float(features[found].mean(0).norm())
    others = [
        float(features[torch.randperm(200, generator=generator)[:20]].mean(0).norm())
        for _ in range(50)
    ]
    assert mine < 0.6 * min(others)
    assert len(statistics.chosen(features[:5], 20)) == 5


def test_pixels_are_kept_as_bytes_and_other_numbers_as_they_are() -> None:
    digits = data.load("digits")
    x = data.to_float(digits.test_images[:9], digits)
    assert torch.equal(statistics.pixels(x, digits), digits.test_images[:9])
    assert statistics.pixels(x + 0.123, digits).dtype == torch.float16


def test_numbers_that_float16_would_lose_stay_in_float32() -> None:
    for number, kind in ((3.0, torch.float16), (2e-6, torch.float16), (7e4, torch.float32)):
        kept = torch.tensor([[0.5, number], [1.0, number]])
        found = statistics.compact(kept)
        assert found.dtype == kind
        torch.testing.assert_close(found.float(), kept, atol=1e-6, rtol=1e-3)


@pytest.fixture(scope="module")
def manifold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifold, data.Dataset]:
    """A small ResNet on the digits as colour images, started as its untrained source."""
    digits = data.load("digits")
    colour = replace(
        digits,
        train_images=digits.train_images[:300].expand(-1, 3, -1, -1).contiguous(),
        train_labels=digits.train_labels[:300],
        mean=[0.3] * 3,
        std=[0.4] * 3,
        pad=0,
    )
    asked = recipe.load("cifar10-resnet20").changed(
        network={"weights": "", "train": {"epochs": 0}}, fit={"width": (0.9, 1.0)}
    )
    made, smoothed = runs.prepared(asked, colour, tmp_path_factory.mktemp("source"))
    fit.initialise(made, smoothed, smoothed, asked, lambda *_: None)
    statistics.calibrate(made, colour, calibration=32)
    return made, colour


def test_kept_statistics_are_those_of_all_images_and_carried_ones_are_near(
    manifold: tuple[Manifold, data.Dataset],
) -> None:
    made, colour = manifold
    assert {each.key for each in made.space.scaled()} == set(made.statistics.kept)
    images = made.statistics.images
    assert images is not None and images.dtype == torch.uint8 and len(images) == 32
    x = statistics.training_images(colour, 300, statistics.seed_of(0, "statistics"))
    architecture = made.space.full
    exact = statistics.exact(made, architecture, x)
    kept = made.statistics.kept[architecture.key].float()
    torch.testing.assert_close(kept, exact, atol=1e-3, rtol=2e-3)
    few = statistics.exact(made, architecture, normalised(made, images))
    deviation = exact[1].sqrt()
    worst = float(((few[0] - exact[0]) / deviation).square().mean().sqrt())
    generator = torch.Generator().manual_seed(0)
    random = []
    for _ in range(5):
        some = x[torch.randperm(len(x), generator=generator)[:32]]
        other = statistics.exact(made, architecture, some)
        random.append(float(((other[0] - exact[0]) / deviation).square().mean().sqrt()))
    assert worst < min(random)
    graph, sizes = made.space.graph, made.space.sizes(architecture)
    assert set(unflatten(graph, sizes, kept)) == {
        node.name for node in graph.nodes if node.op == "batch_norm"
    }


@pytest.mark.parametrize("kind", ["noise", "own"])
def test_images_may_be_noise_or_the_users_own(
    manifold: tuple[Manifold, data.Dataset], kind: str, tmp_path: Path
) -> None:
    import numpy as np

    made, colour = manifold
    if kind == "own":
        own = colour.test_images[:8].expand(-1, 3, -1, -1).numpy()
        labels = np.arange(8) % 2
        np.savez(tmp_path / "own.npz", train_images=own, train_labels=labels,
                 test_images=own, test_labels=labels)  # fmt: skip
        found = statistics.own_images(str(tmp_path / "own.npz"), colour, 4)
        assert torch.equal(found, data.to_float(torch.from_numpy(own[:4]), colour))
        return
    found = statistics.noise_images(colour.shape, 6, 0)
    assert found.shape == (6, 3, 8, 8) and float(found.std()) == pytest.approx(1, abs=0.01)
    assert torch.equal(found, statistics.noise_images(colour.shape, 6, 0))
