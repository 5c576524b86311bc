"""What a benchmark compares must be the same thing: its baselines equal what the product does."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    dtypes,
    imagenet,
    passes,
    quantized,
    reach,
    size,
    statistics,
    streamed,
    versions,
)
from benchmarks.life import body
from benchmarks.manifolds import random_manifold, served, space
from benchmarks.published import flops, published
from benchmarks.redis_faults import SIZES, smallest
from benchmarks.step import plain_generated
from neumeta import wire
from neumeta.manifold import Contract, Manifold
from neumeta.sample import sample
from neumeta.space import Space
from neumeta.statistics import Statistics
from training import fit, networks, recipe_file
from training import statistics as measured
from training.data import Dataset, load_from
from training.trace import trace


@pytest.mark.parametrize("width", [1.0, 0.4])
def test_the_published_way_makes_the_same_weights(width: float) -> None:
    """Algorithm 3 from every pair's own six coordinates, without noise, against per-axis sampling."""
    manifold = served()
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
    manifold = served()
    architecture = manifold.space.architecture(0.25)
    torch.manual_seed(0)
    theirs = published(manifold, architecture, 300)
    ours = dict(sample(manifold, architecture, samples=64))
    once = dict(sample(manifold, architecture, samples=1))
    flat = [torch.cat([each[name].flatten() for name in ours]) for each in (theirs, ours, once)]
    mean, even, exact = flat
    # 300 independent samples leave 1/17 of the noise; the noise-free one is further away.
    assert (even - mean).norm() < 0.5 * (exact - mean).norm()


def test_a_training_step_is_the_same_both_ways() -> None:
    manifold = served()
    small = manifold.space.architecture(0.4)
    plain = plain_generated(manifold, small, 0.5, torch.Generator().manual_seed(3))
    ours = fit.generated(manifold, small, 0.5, torch.Generator().manual_seed(3))
    assert plain.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(plain[name], value, atol=1e-4, rtol=1e-3)  # as above


@pytest.mark.parametrize(
    ("build", "count"), [(imagenet.resnet18, 11_689_512), (imagenet.resnet50, 25_557_032)]
)
def test_the_large_networks_have_as_many_parameters_as_torchvisions(
    build: Callable[[], torch.nn.Module], count: int
) -> None:
    assert sum(parameter.numel() for parameter in build().parameters()) == count


def test_splitting_the_first_layer_saves_work() -> None:
    manifold = served()
    full = manifold.space.full
    assert flops(manifold, full, split=True) < flops(manifold, full, split=False)


def test_a_body_that_answers_are_compared_with_is_the_planned_one() -> None:
    manifold = random_manifold("resnet-mnist", deviation=0.1)
    plan = wire.plan(manifold, manifold.space.architecture(0.5), "float32")
    made = body(manifold, 0.5)
    assert made.startswith(plan.header) and len(made) == plan.length
    assert made != body(random_manifold("resnet-mnist", deviation=0.1, seed=1), 0.5)


@pytest.mark.parametrize("name", ["lenet", "resnet-mnist"])
def test_the_widths_asked_for_while_redis_fails_are_different_small_files(name: str) -> None:
    over = space(name)
    asked = [over.architecture([*map(float, text.split(","))]) for text in smallest(over)]
    assert len({each.key for each in asked}) == len(asked) == SIZES
    assert all(each.channels[0] < over.full.channels[0] / 2 for each in asked)


def test_dequantize_linear_computes_what_a_cast_and_a_product_do() -> None:
    """What docs/onnx.md compares with is the same network, of ONNX's own operation for int8."""
    manifold = served(noise=0.0)
    size = manifold.space.architecture(0.5)
    plan = wire.plan(manifold, size, "int8", "onnx")
    raw = b"".join(wire.stream(plan, sample(manifold, size)))
    other = dtypes.dequantizing(raw)
    for model, kinds in ((raw, ("Cast", "Mul")), (other, ("DequantizeLinear",))):
        assert all(kind.encode() in model for kind in kinds)
    assert b"Cast" not in other and other.count(b"DequantizeLinear") >= len(plan.scales)
    images = torch.rand(2, 1, 8, 8).numpy()
    found, wanted = (dtypes.session(each).run(None, {"input": images})[0] for each in (other, raw))
    assert abs(found - wanted).max() <= 1e-5 * abs(wanted).max()


def normed(carried: int) -> tuple[Manifold, Dataset]:
    """A small manifold with batch norm, and its data: two classes, bright and dark."""
    torch.manual_seed(0)
    net = networks.resnet_cifar((1, 1, 1), 2, (4, 4, 8))
    graph, _ = trace(net, torch.zeros(1, 3, 8, 8))
    covered = Space("small", graph.morphing(["*"], depth=False), (0.25, 1.0))
    manifold = random_manifold(covered, deviation=0.2)
    labels = torch.arange(120) % 2
    images = torch.randint(0, 128, (120, 3, 8, 8)) + 127 * labels[:, None, None, None]
    images = images.to(torch.uint8)
    half = 60
    data = Dataset(
        "small", images[:half], labels[:half], images[half:], labels[half:], ("dark", "bright"),
        [0.5] * 3, [0.25] * 3, False, 0,
    )  # fmt: skip
    contract = Contract((0.5,) * 3, (0.25,) * 3, ("dark", "bright"))
    kept = Statistics(images[:carried])
    return replace(manifold, contract=contract, statistics=kept), data


def test_kept_statistics_score_as_recalibration_on_the_images_they_were_measured_on() -> None:
    manifold, data = normed(4)
    architecture = manifold.space.full
    images = measured.training_images(data, 60, 5)
    kept = {architecture.key: measured.exact(manifold, architecture, images)}
    manifold.statistics = replace(manifold.statistics, kept=kept)
    scores = statistics.Scores(manifold, data, 60, 5)
    again = scores.recalibrated(architecture)
    for name, value in sample(manifold, architecture):
        torch.testing.assert_close(value, again[name])
    row = scores.row("full", architecture)
    assert row["kept"] == row["served"] == row["recalibrated"]
    # The batch of four images is another one, and its statistics are not taken for kept ones.
    batch = dict(sample(scores.without_kept, architecture))
    assert any(not torch.allclose(batch[name], again[name]) for name in again)


def test_differences_are_counted_from_recalibration_and_the_worst_is_a_loss() -> None:
    rows = [{"recalibrated": 70.0, "batch": 69.0}, {"recalibrated": 60.0, "batch": 60.5}]
    better = statistics.against(rows, "batch", 1)
    assert better is not None
    assert (better["mean_difference"], better["worst_difference"]) == (-0.25, -1.0)
    lower = statistics.against(rows, "batch", -1)
    assert lower is not None and lower["worst_difference"] == -0.5
    assert statistics.against(rows, "kept", 1) is None


def test_a_report_of_statistics_has_every_random_and_scalar_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "WIDTHS", (0.1, 0.5))  # the first is not served
    manifold, data = normed(16)
    report = statistics.measure(manifold, data, sizes=1, calibration=30, seed=1)
    assert report["random"]["served"]["sizes"] == report["scalar"]["batch"]["sizes"] == 1
    assert report["random"]["kept"] is None
    (row,) = (row for row in report["rows"] if row["kind"] == "random")
    assert row["size"] == json.dumps(statistics.request(manifold.space, random.Random(1)))


MODULE = '''"""Says
something."""

import os

# a comment
LIMIT: int = 3
_own = 4


class Thing:
    """A thing."""

    size = 1

    def grow(self) -> str:
        """Grow."""
        return """two
lines"""

    def _hidden(self) -> None: ...
'''


def test_lines_are_counted_without_blanks_and_comments_and_code_without_docstrings() -> None:
    assert size.lines(MODULE) == (13, 9)
    counted = size.counted({"neumeta/thing.py": MODULE, "service/a.py": "x = 1\n"})
    # LIMIT, Thing, Thing.size and Thing.grow; x
    assert counted["neumeta"]["public_names"] == 4
    assert counted["all"] == {"files": 2, "lines": 14, "code": 10, "public_names": 5}


def test_only_manifolds_that_both_versions_have_are_compared(tmp_path: Path) -> None:
    folders = {"old": tmp_path / "old", "new": tmp_path / "new"}
    for name, sizes in (("old", {"a": 100, "b": 7}), ("new", {"a": 50, "c": 7})):
        (folders[name] / "models").mkdir(parents=True)
        for stem, count in sizes.items():
            (folders[name] / "models" / f"{stem}.safetensors").write_bytes(bytes(count))
    found = versions.files(folders)
    assert found == {"a.safetensors": {"old_bytes": 100, "new_bytes": 50, "ratio": 0.5}}


@pytest.mark.parametrize("name", streamed.RECIPES)
def test_a_shipped_imagenet_recipe_is_made_small_and_stays_what_it_is(
    tmp_path: Path, name: str
) -> None:
    shipped = recipe_file.load(name)
    small = recipe_file.load(str(streamed.small(name, 1000, 20, tmp_path)))
    assert round(small.fit.epochs * (1000 // small.fit.batch)) == 20
    assert small.data.size == (64, 64) and small.data.stream and shipped.data.stream
    assert small.network.arguments == {"num_classes": 8}
    ours = {"arguments", "path", "size", "workers", "batch", "epochs"}
    for section in ("network", "data", "order", "representation", "fit", "evaluate"):
        one, other = (each.as_dict()[section] for each in (shipped, small))
        assert {key for key in one if one[key] != other[key]} <= ours


def test_memory_is_counted_of_a_process_and_of_what_it_started() -> None:
    code = "import subprocess, sys; sys.exit(subprocess.run(['sleep', '30']).returncode)"
    with subprocess.Popen([sys.executable, "-c", code]) as running:
        while len(there := streamed.tree(running.pid)) < 2:
            time.sleep(0.02)
        assert there[0] == running.pid and all(streamed.held(each) > 0 for each in there)
        for process in there[::-1]:
            os.kill(process, signal.SIGKILL)
    end = time.monotonic() + 30  # what a killed process started is still being taken down
    while any(streamed.held(each) for each in there):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_generated_folder_has_its_classes_in_both_halves(tmp_path: Path) -> None:
    streamed.generate(tmp_path / "images", 24)
    loaded = load_from("images", tmp_path, kind="classes", stream=True, size=(64, 64), workers=0)
    assert len(loaded) == 24 and len(loaded.classes) == streamed.CLASSES
    x, y = next(loaded.test_batches(8))
    assert x.shape == (8, 3, 64, 64) and sorted(set(y.tolist())) == [0]


def test_random_sizes_are_held_against_widths_of_their_own_cost() -> None:
    """A width of a hundredfold cost has 20 points more: one of the tenfold has 10, on a log scale."""
    widths = {
        str(macs): {"kinds": ["width"], "macs": macs, "raw": score}
        for macs, score in ((100_000, 90.0), (1_000, 70.0))
    }
    mixed = [
        {"kinds": ["mixed"], "macs": macs, "raw": 60.0 + k}
        for k, macs in enumerate((10_000, 1_000))
    ]
    told = reach.beside_widths(mixed, {"rows": widths})
    assert told == "mean 60.50, worst 60.00; widths alone at the same multiply-accumulates 75.00"


def test_a_training_costs_what_its_steps_train_and_a_start_counts_once() -> None:
    held = space("lenet")
    assert held.blocks is None
    asked = recipe_file.load("tiny").changed(
        fit={"width": (0.5, 0.5001), "sandwich": False, "widths": (), "resolutions": (0.5, 1.0)}
    )
    half = held.cost(held.architecture(0.5))["macs"] / held.cost(held.full)["macs"]
    assert passes.cost(asked, held) == pytest.approx(half * (0.25 + 1) / 2, rel=1e-6)
    found = [each.name for each in passes.begun("cifar10-resnet-charts", set())]
    assert len(found) == len(set(found)) and found.index("cifar10-resnet") < found.index(
        "cifar10-resnet-cycle"
    )
    assert "cifar10-resnet-charts" not in found


def test_what_ships_is_quantized_beside_its_served_files(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row is made; few images stand for many, and scores are left out."""
    monkeypatch.setattr(quantized, "IMAGES", 8)
    monkeypatch.setattr(quantized, "BATCH", 2)
    monkeypatch.setattr(quantized, "score", lambda *_: 0.0)
    monkeypatch.setattr(logging, "disable", lambda _: None)  # which would outlast this test
    asked = ["quantized", "--widths", "0.25", "--rounds", "10", "--data", str(data_root)]
    monkeypatch.setattr(sys, "argv", asked)
    quantized.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    kinds = ["activations int8", "activations uint8", "float32", "int8"]
    assert sorted({row["kind"] for row in rows}) == [*kinds, "the same, weights in 7 bits"]
    sizes = {row["kind"]: row["bytes"] for row in rows}
    assert sizes["int8"] < sizes["activations uint8"] < sizes["float32"]
