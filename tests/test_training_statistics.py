"""Batch statistics: chosen images stand for many, and what is kept is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neumeta.fold import fold
from neumeta.graph import Graph, extent
from neumeta.manifold import Contract, Manifold, roles
from neumeta.program import Program
from neumeta.representation import build
from neumeta.sample import normalised, sample
from neumeta.sites import kept, sites
from neumeta.space import Space
from neumeta.statistics import unflatten
from tests.support.modules import traced
from training import data, fit, source, statistics
from training.trace import trace


def test_chosen_rows_have_a_mean_nearer_to_all_than_random_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 30, generator=generator)
    features -= features.mean(0)
    found = statistics.chosen(statistics.products(features), 20)
    assert len(set(found.tolist())) == 20
    mine = float(features[found].mean(0).norm())
    others = [
        float(features[torch.randperm(200, generator=generator)[:20]].mean(0).norm())
        for _ in range(50)
    ]
    assert mine < 0.6 * min(others)
    assert len(statistics.chosen(statistics.products(features[:5]), 20)) == 5


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


def filled(space: Space, module: torch.nn.Module, loaded: data.Dataset) -> Manifold:
    """A manifold that starts as its source."""
    own, model = source.tensors(module, space.graph.tensors), build("grid", {}, roles(space))
    for name, site in sites(space, space.full).items():
        model.fill(site, own[name])
    contract = Contract(tuple(loaded.mean), tuple(loaded.std), loaded.classes)
    frozen = {name: own[name] for name in kept(space.graph)}
    return Manifold(space, model, "grid", {}, 0.0, 1, 64, contract, frozen)


@pytest.fixture(scope="module")
def manifold() -> tuple[Manifold, data.Dataset]:
    """A small ResNet on the digits as colour images, calibrated."""
    digits = data.load("digits")
    colour = replace(
        digits,
        train_images=digits.train_images[:300].expand(-1, 3, -1, -1).contiguous(),
        train_labels=digits.train_labels[:300],
        mean=[0.3] * 3,
        std=[0.4] * 3,
        pad=0,
    )
    module, graph = traced("resnet")
    made = filled(Space("resnet", graph, (0.7, 1.0)), module, colour)
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
    known = {image.numpy().tobytes() for image in colour.train_images}
    assert {image.numpy().tobytes() for image in images} <= known
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


def test_a_source_that_keeps_its_own_size_keeps_its_own_statistics_there(
    manifold: tuple[Manifold, data.Dataset],
) -> None:
    """They are of more images than are measured here, and its weights were trained with them."""
    made, colour = replace(manifold[0]), manifold[1]
    norms = [node for node in made.space.graph.nodes if node.op == "batch_norm"]
    sizes = {node.name: made.space.graph.shape(node.tensors["mean"], made.space.graph.full)[0]
             for node in norms}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    own = {
        node.tensors[key]: torch.rand(sizes[node.name], generator=generator) + 0.5
        for node in norms
        for key in ("mean", "variance")
    }
    full = made.space.full.key
    statistics.calibrate(made, colour, calibration=8, source=own)
    assert torch.equal(made.statistics.kept[full], manifold[0].statistics.kept[full])
    made.representation = build("grid", {"anchored": {"reach": 0.1}}, roles(made.space))
    statistics.calibrate(made, colour, calibration=8, source=own)
    kept = made.statistics.kept[full].float()
    for row, key in enumerate(("mean", "variance")):
        expected = torch.cat([own[node.tensors[key]] for node in norms])
        torch.testing.assert_close(kept[row], expected, atol=1e-3, rtol=0)  # float16
    assert len(made.statistics.kept) == len(manifold[0].statistics.kept)


def test_images_may_be_noise(manifold: tuple[Manifold, data.Dataset]) -> None:
    made, colour = manifold
    found = statistics.noise_images(colour.shape, 6, 0)
    assert found.shape == (6, 3, 8, 8) and float(found.std()) == pytest.approx(1, abs=0.01)
    assert torch.equal(found, statistics.noise_images(colour.shape, 6, 0))
    # Its power falls with frequency, by as much for rows as for columns.
    power = torch.fft.fft2(statistics.noise_images((1, 8, 8), 2000, 0)).abs().square().mean((0, 1))
    for one, four in ((power[0, 1], power[0, 4]), (power[1, 0], power[4, 0])):
        assert float(one / four) == pytest.approx(16, rel=0.2)
    made = replace(made)
    statistics.calibrate(made, colour, calibration=6, images="noise")
    images = made.statistics.images
    assert images is not None and images.dtype == torch.uint8 and images.shape == (6, 3, 8, 8)
    as_they_are = found * 0.4 + 0.3
    seeded = statistics.noise_images(colour.shape, 6, statistics.seed_of(0, "noise"))
    wanted = ((seeded * 0.4 + 0.3) * 255).clamp(0, 255).round()
    assert as_they_are.min() < 0 and torch.equal(images.float(), wanted)


def test_images_may_be_the_users_own(
    manifold: tuple[Manifold, data.Dataset], tmp_path: Path
) -> None:
    """Of all classes, which lie one after the other; the statistics that are kept are theirs too."""
    made, colour = replace(manifold[0]), manifold[1]
    dark = (colour.test_images[:40].expand(-1, 3, -1, -1) // 4).numpy()
    own, labels = np.concatenate([dark, 255 - dark]), np.arange(80) // 40
    np.savez(tmp_path / "own.npz", train_images=own, train_labels=labels,
             test_images=own, test_labels=labels)  # fmt: skip
    statistics.calibrate(made, colour, calibration=10, images=str(tmp_path / "own.npz"))
    images = made.statistics.images
    assert images is not None and len(images) == 10
    assert 2 <= sum(float(image.float().mean()) > 128 for image in images) <= 8
    theirs = data.to_float(torch.from_numpy(own), colour)
    full = made.space.full
    kept = made.statistics.kept[full.key].float()
    # Seeing 10 of 80 is not seeing all; the training images are far away.
    error = (kept - statistics.exact(made, full, theirs)).abs().mean()
    assert error < 0.2 * (kept - manifold[0].statistics.kept[full.key].float()).abs().mean()
    lone = {"train_images": own[:1], "train_labels": labels[:1]}
    np.savez(tmp_path / "lone.npz", **lone, test_images=own[:1], test_labels=labels[:1])
    with pytest.raises(ValueError, match=r"lone.npz.*(1 images|class)"):
        statistics.calibrate(made, colour, calibration=10, images=str(tmp_path / "lone.npz"))


def test_usual_sizes_are_the_scalar_widths_or_a_ladder_of_them_and_even_depths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, graph = traced("plain")
    space = Space("plain", graph, (0.25, 0.93), (1, 2), 3, {"lopsided": (3, 1)})
    made = filled(space, module, data.load("digits"))
    depths = [[1, 1], [2, 2], [3, 3], [3, 1]]  # up to the deepest there may be, and those of a name
    deep = [space.architecture(0.93, depth, extrapolate=True) for depth in depths]
    found = statistics.usual(made)
    assert found == list(dict.fromkeys([*space.scaled(), *deep]))
    monkeypatch.setattr(statistics, "MOST_KEPT", 3)
    monkeypatch.setattr(statistics, "STEP", 0.25)
    ladder = [space.architecture(width) for width in (0.25, 0.5, 0.75, 0.93)]
    assert len(space.scaled()) > 4 and statistics.usual(made) == [*ladder, *deep]


def part(module: torch.nn.Module, graph: Graph, pattern: str) -> tuple[Manifold, data.Dataset]:
    """A manifold of a part of a network on the digits in as many colours as it reads, calibrated."""
    digits = data.load("digits")
    channels = extent(graph.input[1], {})
    some = replace(
        digits,
        train_images=digits.train_images[:200].expand(-1, channels, -1, -1).contiguous(),
        train_labels=digits.train_labels[:200],
        mean=[0.3] * channels,
        std=[0.4] * channels,
        pad=0,
    )
    made = filled(Space("part", graph.morphing([pattern], depth=False), (0.5, 1.0)), module, some)
    statistics.calibrate(made, some, calibration=16)
    return made, some


def test_batch_norms_in_front_of_all_that_morphs_are_the_sources_at_every_size() -> None:
    module, graph = traced("resnet")
    made, _ = part(module, graph, "layer3.2.conv1")
    own = module.state_dict()
    space = made.space
    half = space.architecture(0.5)
    assert half.key in made.statistics.kept
    front = fold(graph, own)["layer1.0.conv1.bias"]
    kept_size = dict(sample(made, half))["layer1.0.conv1.bias"]
    made.statistics = replace(made.statistics, kept={half.key: made.statistics.kept[half.key]})
    other = dict(sample(made, space.architecture(0.75)))["layer1.0.conv1.bias"]
    assert torch.equal(kept_size, front) and torch.equal(other, front)
    whole = statistics.whole(made, half)
    assert all(torch.equal(whole[name], own[name]) for name in kept(space.graph))
    assert not torch.equal(whole["layer3.2.bn2.running_mean"], own["layer3.2.bn2.running_mean"])
    trained = fit.generated(made, half, 0.0, torch.Generator())
    assert torch.equal(trained["bn1.running_mean"], own["bn1.running_mean"])
    assert "layer3.2.bn2.running_mean" not in trained


def test_a_part_without_a_batch_norm_behind_it_has_nothing_to_measure() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(256, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10),
    )  # fmt: skip
    graph, _ = trace(net, torch.zeros(1, 1, 8, 8))
    made, loaded = part(net, graph, "4")
    assert len(made.statistics.kept) and made.statistics.images is not None
    x = data.to_float(loaded.train_images[:5], loaded)
    size = made.space.full
    program = Program(made.space.graph.folded, made.space.sizes(size))
    made_by = program.run(dict(sample(made, size)), x)
    torch.testing.assert_close(made_by, net.eval()(x), atol=1e-5, rtol=1e-4)
