"""Algorithm 2's promises: resumable, the same on two processes, exact at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neumeta.sample import sample
from tests.support.runs import prepared, space
from training import data, fit, recipe, recipe_file, sizes
from training.data import Dataset
from training.task import TASKS

TASK = TASKS["classification"]

TINY = recipe_file.load("tiny").changed(
    network={"train": {"epochs": 1, "lr": 0.1, "batch": 64}},
    order={"strategy": "none"},
    fit={"epochs": 1.5, "batch": 256},
    evaluate={"widths": (1.0, 0.5)},
)
MLP = TINY.changed(
    representation={
        "kind": "mlp",
        "corrected": None,
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


@pytest.mark.parametrize("asked", [TINY, MLP], ids=["grid", "mlp"])
def test_a_killed_run_resumes_to_the_same_result(
    asked: recipe.Recipe, digits: Dataset, run_folder: Path, tmp_path: Path
) -> None:
    whole, smoothed = prepared(asked, digits, run_folder)
    assert fit.fit(whole, smoothed, digits, TASK, asked, tmp_path / "a")
    killed, *_ = prepared(asked, digits, run_folder)
    assert not fit.fit(killed, smoothed, digits, TASK, asked, tmp_path / "b", max_minutes=1e-9)
    resumed, *_ = prepared(asked, digits, run_folder)
    assert fit.fit(resumed, smoothed, digits, TASK, asked, tmp_path / "b", resume=True)
    ours = resumed.representation.state_dict()
    for name, value in whole.representation.state_dict().items():
        assert torch.equal(value, ours[name]), name
    assert any((tmp_path / "a" / "log").glob("events*"))


def test_a_grid_starts_as_the_source_network(digits: Dataset, run_folder: Path) -> None:
    manifold, smoothed = prepared(TINY, digits, run_folder)
    assert fit.initialise(manifold, smoothed, smoothed, TINY, lambda *_: None) == 0.0
    made = dict(sample(manifold, manifold.space.full))
    for name, value in smoothed.items():
        torch.testing.assert_close(made[name], value, atol=0, rtol=0)


def test_architectures_come_from_the_pool(digits: Dataset) -> None:
    generator, covered = torch.Generator().manual_seed(0), space(TINY, digits)
    listed = TINY.changed(fit={"widths": (0.5, 0.75), "sandwich": False})
    drawn = {sizes.choose(listed, covered, generator)[0].channels for _ in range(40)}
    assert drawn == {(16, 32, 32), (24, 48, 48)}
    for _ in range(40):
        largest, smallest, one = sizes.choose(TINY, covered, generator)
        assert largest.channels == (32, 64, 64) and smallest.channels == (8, 16, 16)
        assert all(
            a <= b <= c
            for a, b, c in zip(smallest.channels, one.channels, largest.channels, strict=True)
        )  # noqa: E501
    deep = recipe_file.load("mnist-resnet-depth")
    covered = space(deep, digits)
    seen = {sizes.choose(deep, covered, generator)[2].depth for _ in range(200)}
    assert seen == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}


def test_single_networks_are_of_the_pool_of_each_groups_own_width_or_of_another_depth(
    digits: Dataset,
) -> None:
    asked = recipe_file.load("cifar10-resnet").changed(
        fit={
            "sandwich": False,
            "widths": (0.5,),
            "smallest": 0.2,
            "per_group": 0.3,
            "per_depth": 0.4,
        }
    )
    colour = replace(digits, train_images=digits.train_images.expand(-1, 3, -1, -1))
    covered, generator = space(asked, colour), torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(1000):
        (one,) = sizes.choose(asked, covered, generator)
        drawn.append(one)
    half, quarter = covered.architecture(0.5).channels, covered.architecture(0.25).channels
    others = [each for each in drawn if each.channels not in (half, quarter)]
    # Each bound is four standard deviations of 1,000 draws away from its share.
    assert abs(sum(each.channels == quarter for each in drawn) - 200) < 51
    assert abs(len(others) - 240) < 54
    assert len({each.channels for each in others}) > 200
    deep = [each.depth for each in drawn if each.depth != covered.depth]
    assert abs(len(deep) - 400 * (1 - 0.1 - 0.5 / 125)) < 62
    assert abs(sum(len(set(depth)) == 1 for depth in deep) - 175) < 50
    assert {n for depth in deep for n in depth} == {1, 2, 3, 4, 5}
    shallow = asked.changed(fit={"shallow": True})
    depths = [sizes.choose(shallow, covered, generator)[0].depth for _ in range(300)]
    assert all(min(depth) == 1 for depth in depths)
    assert {depth.index(1) for depth in depths} == {0, 1, 2} and {5, 3} < {max(d) for d in depths}
    last = asked.changed(fit={"shallow": [2]})
    depths = [sizes.choose(last, covered, generator)[0].depth for _ in range(300)]
    assert {depth[2] for depth in depths} == {1}
    assert {n for depth in depths for n in depth[:2]} == {1, 2, 3, 4, 5}
    others = asked.changed(fit={"shallow": [0, 1]})
    depths = [sizes.choose(others, covered, generator)[0].depth for _ in range(300)]
    assert all(min(depth[:2]) == 1 for depth in depths)
    assert {depth.index(1) for depth in depths} == {0, 1}
    narrow = asked.changed(fit={"widths": (1.0, 0.3), "most": (1.0, 1.0, 0.5)})
    drawn = [sizes.choose(narrow, covered, generator)[0].channels for _ in range(300)]
    assert {(16, 32, 32), covered.architecture(0.3).channels, quarter} < set(drawn)
    assert max(last for *_, last in drawn) == 32
    assert len({first for first, *_ in drawn}) == 13  # 4 to 16


def test_a_size_that_is_kept_is_not_trained(digits: Dataset) -> None:
    kept = recipe_file.load("cifar10-resnet")
    colour = replace(digits, train_images=digits.train_images.expand(-1, 3, -1, -1))
    covered, generator = space(kept, colour), torch.Generator().manual_seed(0)
    assert kept.representation.anchored and kept.fit.full_weight == 0
    steps = [sizes.choose(kept, covered, generator) for _ in range(200)]
    for smallest, wide, _ in steps:
        assert smallest == covered.architecture(0.25)
        assert wide.depth == covered.depth
    # What is drawn covers widths, each stage's own widths, and every trained depth.
    assert any(len({c / f for c, f in zip(wide.channels, (16, 32, 64), strict=True)}) > 1
               for _, wide, _ in steps)  # fmt: skip
    widths = {wide.channels[2] for _, wide, _ in steps}
    assert min(widths) < 20 and max(widths) > 60 and len(widths) > 36  # of 49
    deep = [last for *_, last in steps]
    assert {each.depth for each in deep} >= {(n, n, n) for n in range(1, 6)}
    assert {len(set(each.depth)) for each in deep} >= {1, 2, 3}
    assert {each.channels == covered.full.channels for each in deep} == {True, False}


GROWING = TINY.changed(
    network={"train": {"epochs": 0}},
    fit={"distill": "source", "teacher_views": 2, "resolutions": (0.5, 1.0), "epochs": 1},
)


def test_growing_images_and_a_teachers_views_train_and_resume_to_the_same_result(
    digits: Dataset, tmp_path: Path
) -> None:
    results = []
    for name, minutes in (("a", (float("inf"),)), ("b", (1e-9, float("inf")))):
        for each in minutes:
            made, smoothed = prepared(GROWING, digits, tmp_path / "source")
            done = fit.fit(
                made,
                smoothed,
                digits,
                TASK,
                GROWING,
                tmp_path / name,
                resume=True,
                max_minutes=each,
            )
            assert done == (each > 1)
        results.append(made.representation.state_dict())
    whole, resumed = results
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_sixteen_bits_move_the_weights_as_thirty_two_do(
    digits: Dataset, run_folder: Path, tmp_path: Path
) -> None:
    """bfloat16 has a significand of eight bits: steps are some percent off, and so is their sum."""
    states = []
    for name, changed in {
        "start": {"lr": 1e-12},
        "exact": {},
        "rounded": {"bfloat16": True},
    }.items():
        asked = TINY.changed(
            fit={"optimiser": "sgd", "lr": 0.01, "ema": 0.0, "epochs": 1, **changed}
        )
        made, smoothed = prepared(asked, digits, run_folder)
        fit.fit(made, smoothed, digits, TASK, asked, tmp_path / name)
        held = made.representation.state_dict().values()
        states.append(torch.cat([value.flatten() for value in held]))
    start, exact, rounded = states
    assert not torch.equal(exact, rounded)
    assert float((rounded - exact).norm()) < 0.1 * float((exact - start).norm())


def test_a_fit_ends_with_the_moving_average_of_every_weight(
    digits: Dataset, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = TINY.changed(representation={"anchored": {"reach": 0.1}}, fit={"ema": 0.9, "epochs": 4})
    made, smoothed = prepared(asked, digits, run_folder)
    model, finish = made.representation, fit._finish
    states = []

    def remembered(*given: Any) -> bool:
        if not states:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
        late = finish(*given)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return late

    monkeypatch.setattr(fit, "_finish", remembered)
    assert fit.fit(made, smoothed, digits, TASK, asked, tmp_path)
    average, *after = states
    assert len(after) > 10
    for step, state in enumerate(after):
        decay = min(0.9, (1 + step) / (10 + step))
        average = {n: decay * average[n] + (1 - decay) * value for n, value in state.items()}
    for name, value in model.state_dict().items():
        # A few dozen roundings of each number, in its own type.
        tolerance = 1e-5 if value.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(value, average[name], rtol=tolerance, atol=tolerance / 10)
    assert any(not torch.equal(value, average[name]) for name, value in after[-1].items())


SCRIPT = """
import sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests.test_fit import TASK, TINY, prepared
from training import data, fit
dist.init_process_group("gloo")
digits = data.load("digits")
manifold, smoothed = prepared(TINY, digits, Path(sys.argv[1]))
fit.fit(manifold, smoothed, digits, TASK, TINY, Path(sys.argv[2]))
if dist.get_rank() == 0:
    save_file(manifold.representation.state_dict(), sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes_train_the_same_manifold(
    digits: Dataset, run_folder: Path, tmp_path: Path
) -> None:
    alone, smoothed = prepared(TINY, digits, run_folder)
    fit.fit(alone, smoothed, digits, TASK, TINY, tmp_path / "one")
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
