"""Algorithm 2's promises: resumable, the same on two processes, exact at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neumeta.manifold import Manifold
from neumeta.sample import sample
from training import cli, data, fit, recipe, source, statistics
from training.data import Dataset

TINY = replace(
    recipe.load("tiny"), source_epochs=1, epochs=1.5, batch=256, evaluate_widths=(1.0, 0.5)
)
MLP = replace(
    TINY,
    representation="mlp",
    options={"layers": 3, "hidden": 16, "num_freq": 4},
    noise=0.5,
    samples=2,
    regression_steps=5,
    distill="source",
    reconstruction=1.0,
    regularisation=1e-4,
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
    net = cli.trained_source(asked, digits, Path("none"), folder)
    return cli.prepare(asked, digits, net)


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
    for name, value in smoothed.state_dict().items():
        torch.testing.assert_close(made[name], value, atol=0, rtol=0)


def test_regression_lowers_the_error(digits: Dataset, run_folder: Path) -> None:
    errors = []
    for steps in (2, 60):
        asked = replace(MLP, regression_steps=steps, noise=0.0)
        manifold, targets, _ = prepared(asked, digits, run_folder)
        errors.append(fit.initialise(manifold, targets, asked, lambda *_: None))
    assert errors[1] < 0.9 * errors[0]


def test_architectures_come_from_the_pool(digits: Dataset) -> None:
    generator = torch.Generator().manual_seed(0)
    listed = replace(TINY, widths=(0.5, 0.75), sandwich=False)
    drawn = {fit.choose(listed, listed.space, generator)[0].channels for _ in range(40)}
    assert drawn == {(16, 32, 32), (24, 48, 48)}
    for _ in range(40):
        largest, smallest, one = fit.choose(TINY, TINY.space, generator)
        assert largest.channels == (32, 64, 64) and smallest.channels == (8, 16, 16)
        assert all(
            a <= b <= c
            for a, b, c in zip(smallest.channels, one.channels, largest.channels, strict=True)
        )  # noqa: E501
    deep = recipe.load("mnist-resnet-depth")
    seen = {fit.choose(deep, deep.space, generator)[2].depth for _ in range(200)}
    assert seen == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}


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


def test_statistics_are_the_calibrated_ones_at_every_scalar_width(
    digits: Dataset, tmp_path: Path
) -> None:
    """Folding from the stored table is what folding from a calibration on images would be."""
    asked = replace(
        recipe.load("cifar10-resnet20"),
        source="train",
        source_epochs=0,
        data="digits",
        width=(0.8, 1.0),
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
    net = cli.trained_source(asked, colour, Path("none"), tmp_path)
    manifold, targets, _ = cli.prepare(asked, colour, net)
    fit.initialise(manifold, targets, asked, lambda *_: None)
    statistics.measure_statistics(manifold, colour, asked, mixed=4, images=128)
    images = data.to_float(colour.train_images, colour)
    for width in (0.8, 0.87, 1.0):
        architecture = manifold.space.architecture(width)
        exact = statistics.measured(
            statistics.calibrate(statistics.network(manifold, architecture), images)
        )
        for layer in manifold.space.table.layers((3, 3, 3)):
            if layer.norm:
                mean, variance = manifold.moments(layer, architecture)
                # The same images in another order: float32 sums.
                torch.testing.assert_close(mean, exact[layer.name][0], atol=1e-4, rtol=1e-3)
                torch.testing.assert_close(variance, exact[layer.name][1], atol=1e-4, rtol=1e-3)
    between = manifold.space.architecture([0.8, 1.0, 0.9])
    for layer in manifold.space.table.layers((3, 3, 3)):
        if layer.norm:
            mean, variance = manifold.moments(layer, between)
            count = manifold.space.sizes(between)[layer.output_axis]
            assert mean.shape == variance.shape == (count,)
            stored = manifold.statistics[f"{layer.name}.mean"][:, :count].nan_to_num()
            assert (mean <= stored.max(0).values + 1e-6).all()
            assert (mean >= stored.min(0).values - 1e-6).all()
            assert (variance > 0).all()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("title='x'\nlearning_rate=3", "learning_rate"),
        ("title='x'", "missing"),
        ("title=", "Invalid"),
        ("title='x'\ndata='digits'\nfamily='vgg'\narch='x'\nwidth=[0.5,1.0]", "family"),
        ("title='x'\ndata='digits'\nfamily='lenet-mnist'\narch='x'\nwidth=[0.5,1.0]", "arch"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        recipe.load(str(path))


def test_missing_data_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["mnist-resnet-depth", "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert "mnist" in told and str(tmp_path) in told and len(told.strip().splitlines()) == 1
