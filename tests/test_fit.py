"""Algorithm 2's promises: resumable, the same on two processes, exact at the start."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from neumeta.architecture import Architecture
from neumeta.moments import Propagation, kernel, krige, rectified
from safetensors.torch import load_file
from torch import Tensor

from neumeta.manifold import Manifold
from neumeta.sample import sample
from training import data, fit, pipeline, recipe, source, statistics
from training.data import Dataset

TINY = recipe.load("tiny").changed(
    network={"train": {"epochs": 1, "lr": 0.1, "batch": 64}},
    fit={"epochs": 1.5, "batch": 256},
    evaluate={"widths": (1.0, 0.5)},
)
MLP = TINY.changed(
    representation={
        "kind": "mlp",
        "options": {"layers": 3, "hidden": 16, "num_freq": 4},
        "noise": 0.5,
        "samples": 2,
    },
    fit={"regression_steps": 5, "distill": "source", "reconstruction": 1.0, "regularisation": 1e-4},
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


def prepared(
    asked: recipe.Recipe, digits: Dataset, folder: Path
) -> tuple[Manifold, fit.Targets, source.Network]:
    net = pipeline.trained_source(asked, digits, Path("none"), folder)
    return pipeline.prepare(asked, digits, net)


@pytest.mark.parametrize("asked", [TINY, MLP], ids=["grid", "mlp"])
def test_a_killed_run_resumes_to_the_same_result(
    asked: recipe.Recipe, digits: Dataset, run_folder: Path, tmp_path: Path
) -> None:
    whole, targets, smoothed = prepared(asked, digits, run_folder)
    assert fit.fit(whole, targets, smoothed, digits, asked, tmp_path / "a")
    killed, *_ = prepared(asked, digits, run_folder)
    assert not fit.fit(killed, targets, smoothed, digits, asked, tmp_path / "b", max_minutes=1e-9)
    resumed, *_ = prepared(asked, digits, run_folder)
    assert fit.fit(resumed, targets, smoothed, digits, asked, tmp_path / "b", resume=True)
    ours = resumed.representation.state_dict()
    for name, value in whole.representation.state_dict().items():
        assert torch.equal(value, ours[name]), name
    assert any((tmp_path / "a" / "log").glob("events*"))


def test_a_grid_starts_as_the_source_network(digits: Dataset, run_folder: Path) -> None:
    manifold, targets, smoothed = prepared(TINY, digits, run_folder)
    assert fit.initialise(manifold, targets, TINY, lambda *_: None) == 0.0
    made = dict(sample(manifold, manifold.space.full))
    for name, value in smoothed.named_parameters():
        torch.testing.assert_close(made[name], value, atol=0, rtol=0)


def test_regression_lowers_the_error(digits: Dataset, run_folder: Path) -> None:
    errors = []
    for steps in (2, 60):
        asked = MLP.changed(representation={"noise": 0.0}, fit={"regression_steps": steps})
        manifold, targets, _ = prepared(asked, digits, run_folder)
        errors.append(fit.initialise(manifold, targets, asked, lambda *_: None))
    assert errors[1] < 0.9 * errors[0]


def test_architectures_come_from_the_pool(digits: Dataset) -> None:
    generator = torch.Generator().manual_seed(0)
    listed = TINY.changed(fit={"widths": (0.5, 0.75), "sandwich": False})
    drawn = {fit.choose(listed, listed.space(10), generator)[0].channels for _ in range(40)}
    assert drawn == {(16, 32, 32), (24, 48, 48)}
    for _ in range(40):
        largest, smallest, one = fit.choose(TINY, TINY.space(10), generator)
        assert largest.channels == (32, 64, 64) and smallest.channels == (8, 16, 16)
        assert all(
            a <= b <= c
            for a, b, c in zip(smallest.channels, one.channels, largest.channels, strict=True)
        )  # noqa: E501
    deep = recipe.load("mnist-resnet-depth")
    seen = {fit.choose(deep, deep.space(10), generator)[2].depth for _ in range(200)}
    assert seen == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}


def test_a_size_that_is_kept_is_not_trained() -> None:
    kept = recipe.load("cifar10-resnet")
    space, generator = kept.space(10), torch.Generator().manual_seed(0)
    assert kept.representation.options["reach"] and kept.fit.full_weight == 0
    steps = [fit.choose(kept, space, generator) for _ in range(200)]
    for smallest, wide, _, other, shallow in steps:
        assert smallest == space.architecture(0.25)
        assert shallow == space.architecture(1.0, [1, 1, 1])
        assert wide.depth == other.depth == space.depth
    # What is drawn covers widths, each stage's own widths, and every trained depth.
    assert any(len({c / f for c, f in zip(wide.channels, (16, 32, 64), strict=True)}) > 1
               for _, wide, *_ in steps)  # fmt: skip
    assert {deep.depth for _, _, deep, *_ in steps} >= {(n, n, n) for n in range(1, 6)}
    widths = {other.channels[2] for *_, other, _ in steps}
    assert min(widths) < 20 and max(widths) > 60 and len(widths) > 36  # of 49


SCRIPT = """
import sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests.test_fit import TINY, prepared
from training import data, fit
dist.init_process_group("gloo")
digits = data.load("digits")
manifold, targets, smoothed = prepared(TINY, digits, Path(sys.argv[1]))
fit.fit(manifold, targets, smoothed, digits, TINY, Path(sys.argv[2]))
if dist.get_rank() == 0:
    save_file(manifold.representation.state_dict(), sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes_train_the_same_manifold(
    digits: Dataset, run_folder: Path, tmp_path: Path
) -> None:
    alone, targets, smoothed = prepared(TINY, digits, run_folder)
    fit.fit(alone, targets, smoothed, digits, TINY, tmp_path / "one")
    script, out = tmp_path / "two.py", tmp_path / "two.safetensors"
    script.write_text(SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        str(script), str(run_folder), str(tmp_path / "two"), str(out),
    ]  # fmt: skip
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=root, timeout=240)
    together = load_file(out)
    for name, value in alone.representation.state_dict().items():
        # Half batches are summed in another order, and AdamW magnifies rounding near zero
        # gradients to a fraction of its step (1e-2 at most, 7 steps).
        torch.testing.assert_close(together[name], value, atol=5e-3, rtol=1e-2)


def given(manifold: Manifold, architecture: Architecture) -> dict[str, tuple[Tensor, Tensor]]:
    """Each batch norm's moments, as sampling would get them."""
    state = statistics.network(manifold, architecture).state_dict()
    propagation, found = Propagation(manifold.space, architecture), {}
    for layer in manifold.space.table.layers(architecture.depth):
        if layer.norm:
            weight = state[f"{layer.name}.weight"]
            found[layer.name] = propagation.measured(layer, weight, manifold.statistics)
            norm = (state[f"{layer.norm}.weight"], state[f"{layer.norm}.bias"])
            propagation.normalised(layer, *norm)
    return found


@pytest.mark.parametrize("blocks", [None, (1, 4)])
def test_statistics_are_what_calibration_on_images_would_give(
    digits: Dataset, tmp_path: Path, blocks: tuple[int, int] | None
) -> None:
    asked = recipe.load("cifar10-resnet").changed(
        network={"weights": "", "train": {"epochs": 0}},
        data={"name": "digits"},
        representation={"options": {"nodes": 0, "depths": True, "stepped": True}},
        fit={"width": (0.8, 1.0), "blocks": blocks, "full_weight": 1.0},
        evaluate={"blocks": None},
    )
    colour = replace(
        digits,
        train_images=digits.train_images[:128].expand(-1, 3, -1, -1).contiguous(),
        train_labels=digits.train_labels[:128],
        mean=[0.3] * 3,
        std=[0.4] * 3,
        pad=0,
        flips=False,
    )
    net = pipeline.trained_source(asked, colour, Path("none"), tmp_path)
    manifold, targets, _ = pipeline.prepare(asked, colour, net)
    fit.initialise(manifold, targets, asked, lambda *_: None)
    statistics.measure_statistics(manifold, colour, asked, mixed=4, images=128)
    images = data.to_float(colour.train_images, colour)

    def errors(architecture: Architecture) -> tuple[float, float]:
        """Of the means, in standard deviations, and of the log variances; root mean square."""
        net = statistics.calibrate(statistics.network(manifold, architecture), images)
        exact, found = statistics.measured(net), given(manifold, architecture)
        assert exact.keys() == found.keys()
        means = [(found[n][0] - exact[n][0]) / exact[n][1].sqrt() for n in exact]
        logs = [found[n][1].log() - exact[n][1].log() for n in exact]
        return tuple(float(torch.cat(e).square().mean().sqrt()) for e in (means, logs))  # type: ignore[return-value]

    # Anchors: what is left is the nugget (1e-3 of the prior variance) and the order of the images.
    depths = [None] if blocks is None else [None, [1, 1, 1], [9, 9, 9]]
    for depth in depths:
        for width in (0.8, 1.0):
            mean, log = errors(manifold.space.architecture(width, depth, extrapolate=True))
            assert mean < 0.01 and log < 0.01, (width, depth)
    # In between, with four mixed anchors: a fraction of a standard deviation.
    depth = [2, 4, 1] if blocks else None
    mean, log = errors(manifold.space.architecture([0.8, 1.0, 0.9], depth))
    assert mean < 0.25 and log < 0.25
    # Without what was measured, the weights alone say less: the anchors are worth having.
    empty = replace(manifold, statistics={n: 0 * t for n, t in manifold.statistics.items()})
    exact = given(manifold, manifold.space.full)
    alone = given(empty, manifold.space.full)
    assert max(float((alone[n][1].log() - exact[n][1].log()).abs().max()) for n in exact) > 0.1


def test_kriging_returns_what_it_was_given_and_leaves_out_what_was_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(30, 7, generator=generator, dtype=torch.float64)
    values = torch.rand(30, 5, generator=generator, dtype=torch.float64)
    values[7:20, 2] = math.nan
    found = krige(anchors, values, nugget=1e-9)
    made = kernel(anchors, anchors) @ found
    held = values.isfinite()
    torch.testing.assert_close(made[held], values[held], atol=1e-6, rtol=0)
    assert (found[~held] == 0).all()


def test_rectified_moments_are_those_of_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.tensor([-1.0, 0.0, 0.5, 3.0]), torch.tensor([1.0, 4.0, 0.25, 1.0])
    drawn = mean + variance.sqrt() * torch.randn(400_000, 4, generator=generator)
    first, second = rectified(mean, variance)
    # Standard errors at 400,000 draws are below 0.005 here.
    torch.testing.assert_close(first, drawn.relu().mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(second, drawn.relu().var(0), atol=0.04, rtol=0)
