"""What the engine decides before any weight is: canonical URLs, keys, budgets, expected accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from neumeta import checkpoint
from neumeta.architecture import Space
from neumeta.manifold import Manifold, representation
from service import device
from service.engine import Engine, Job, growing
from service.problem import Problem
from service.request import WeightsRequest, from_query
from tests.conftest import lenet

# Widths no stage divides by: the channels of 0.28 are 0.25 of the first stage.
WHOLE = Space("resnet-cifar", "resnet20", 10, ("*",), (0.28, 0.97))
LAST = Space("resnet-cifar", "resnet32", 10, ("layer3.4.inner",), (0.5, 1.0))
DEPTH = Space("resnet-mnist", "resnet-mnist", 10, (), (1.0, 1.0), (1, 3))
BOTH = Space("resnet-cifar", "resnet44", 10, ("*",), (0.5, 1.0), (5, 9))


def grid(space: Space, about: dict[str, Any] | None = None) -> Manifold:
    torch.manual_seed(0)
    model = representation("grid", space, {}, norm=False)
    channels = space.table.input_channels
    normalisation = {"mean": [0.5] * channels, "std": [0.25] * channels}
    manifold = Manifold(
        space, model, "grid", {}, False, 0.0, 1, 64, normalisation, list("0123456789")
    )
    sizes = space.sizes(space.full)
    for tensor in space.table.tensors(space.depth):
        if not space.morphing(tensor.layer):
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes]
            manifold.frozen[tensor.name] = torch.randn(shape)
    manifold.about = about or {}
    return manifold


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models")
    rows = [
        {"channels": [16, 32, 64], "depth": [3, 3, 3], "accuracy": 92.0, "width": 1.0},
        {"channels": [8, 16, 32], "depth": [3, 3, 3], "accuracy": 88.0, "width": 0.5},
        {"accuracy": "of another kind"},
    ]
    files = []
    for number, manifold in enumerate(
        [lenet(), grid(WHOLE, {"evaluation": rows}), grid(LAST), grid(DEPTH), grid(BOTH)]
    ):
        files.append(folder / f"{number}.safetensors")
        checkpoint.write(manifold, files[-1])
    return Engine(files, device="cpu")


def job(engine: Engine, **asked: Any) -> Job:
    return engine.job(WeightsRequest(**asked))


def again(engine: Engine, location: str) -> Job:
    """The job of a Content-Location."""
    split = urlsplit(location)
    return engine.job(from_query(split.path.rpartition("/")[2], QueryParams(split.query)))


ARCHS = {"lenet": 3, "resnet20": 3, "resnet32": 1, "resnet44": 3}


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_canonical_url_is_the_same_file(engine: Engine, data: st.DataObject) -> None:
    arch = data.draw(st.sampled_from(list(ARCHS)))
    low, high = engine.manifolds[arch].space.width
    extrapolate = data.draw(st.booleans())
    factor = st.floats(1e-3, 2.0) if extrapolate else st.floats(low, high)
    width = data.draw(factor | st.lists(factor, min_size=ARCHS[arch], max_size=ARCHS[arch]))
    first = job(engine, arch=arch, width=width, extrapolate=extrapolate)
    second = again(engine, first.location)
    assert second.key == first.key
    assert second.location == first.location
    assert second.architecture == first.architecture


def test_a_depth_has_a_canonical_url_without_a_width(engine: Engine) -> None:
    first = job(engine, arch="resnet-mnist", depth=[1, 3])
    assert "width" not in first.location and "depth=1,3" in first.location
    assert again(engine, first.location).key == first.key
    deeper = job(engine, arch="resnet-mnist", depth=[9, 3], extrapolate=True)
    assert deeper.architecture.extrapolated and again(engine, deeper.location).key == deeper.key


def test_a_name_of_the_family_is_a_depth_of_the_manifold_that_covers_it(engine: Engine) -> None:
    deep = job(engine, arch="resnet56", width=0.75)
    assert deep.key == job(engine, arch="resnet44", width=0.75, depth=[9, 9, 9]).key
    assert deep.architecture.depth == (9, 9, 9) and not deep.architecture.extrapolated
    assert again(engine, deep.location).key == deep.key
    # A file of that name comes first, whatever else could make it.
    assert job(engine, arch="resnet32").manifold.space.arch == "resnet32"
    with pytest.raises(Problem, match="depth"):
        job(engine, arch="resnet56", depth=[9, 9, 9])
    with pytest.raises(Problem, match="resnet57"):
        job(engine, arch="resnet57")


def test_extrapolated_is_a_property_of_the_architecture(engine: Engine) -> None:
    """0.24 of 16, 32 and 64 channels is 4, 8 and 15: no trained width gives it."""
    assert job(engine, arch="resnet20", width=0.24, extrapolate=True).architecture.extrapolated
    # 31.6 of 64 channels round to 32, which is trained.
    assert not job(
        engine, arch="resnet32", width=0.4949, extrapolate=True
    ).architecture.extrapolated


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "float16"}, {"seed": 1}, {"samples": 2}, {"width": 0.75}],
    ids=lambda changed: next(iter(changed)),
)
def test_the_etag_follows_what_the_bytes_follow(engine: Engine, changed: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"arch": "lenet", "width": 0.5}
    assert job(engine, **asked).key == job(engine, **asked).key
    assert job(engine, **asked).key != job(engine, **{**asked, **changed}).key


def test_the_etag_follows_the_checkpoint_and_the_engine(tmp_path: Path) -> None:
    keys = set()
    for seed, threads in ((0, 1), (1, 1), (0, 2)):
        path = tmp_path / f"{seed}.safetensors"
        checkpoint.write(lenet(seed=seed), path)
        keys.add(job(Engine([path], device="cpu", threads=threads), arch="lenet").key)
    assert len(keys) == 3


def test_seed_and_samples_mean_nothing_without_noise(engine: Engine) -> None:
    assert job(engine, arch="resnet20", seed=5, samples=9).key == job(engine, arch="resnet20").key


@pytest.mark.parametrize("arch", ["lenet", "resnet20", "resnet32", "resnet44", "resnet-mnist"])
@pytest.mark.parametrize("bound", ["max_params", "max_bytes", "max_macs"])
def test_a_budget_gets_the_largest_that_fits(engine: Engine, arch: str, bound: str) -> None:
    space = engine.manifolds[arch].space
    column = {"max_params": "parameters", "max_bytes": "bytes", "max_macs": "macs"}[bound]
    sizes = growing(space, None, False)
    needs = []
    for architecture in sizes[:: max(1, len(sizes) // 9)]:
        pairs = zip(architecture.channels, space.full.channels, strict=True)
        width = [min(max(c / f, space.width[0]), space.width[1]) for c, f in pairs] or None
        depth = list(architecture.depth) if space.blocks else None
        needs.append(engine.describe(job(engine, arch=arch, width=width, depth=depth))[column])
    assert needs == sorted(needs) and len(set(needs)) > 3
    for need, following in zip(needs, needs[1:], strict=False):
        exact = engine.describe(job(engine, arch=arch, budget={bound: need}))
        assert exact[column] == need
        between = engine.describe(job(engine, arch=arch, budget={bound: following - 1}))
        assert need <= between[column] < following
    with pytest.raises(Problem) as refused:
        job(engine, arch=arch, budget={bound: needs[0] - 1})
    assert refused.value.status == 422
    assert f"at least {needs[0]}" in refused.value.errors[0]["allowed"]


def test_a_budget_prefers_fewer_blocks_where_they_were_measured_to_be_better(
    tmp_path: Path,
) -> None:
    space = Space("resnet-cifar", "resnet20", 10, ("*",), (0.25, 1.0), (1, 5))
    rows = [
        {"channels": [16, 32, 64], "depth": [3, 3, 3], "accuracy": 88.0},
        {"channels": [4, 8, 16], "depth": [3, 3, 3], "accuracy": 69.0},
        {"channels": [16, 32, 64], "depth": [1, 1, 1], "accuracy": 80.0},
        {"channels": [16, 32, 64], "depth": [6, 6, 6], "accuracy": 90.0, "extrapolated": True},
    ]
    path = tmp_path / "both.safetensors"
    checkpoint.write(grid(space, {"evaluation": rows}), path)
    engine = Engine([path], device="cpu")
    shallow = space.cost(space.architecture(1.0, [1, 1, 1]))["parameters"]
    full = space.cost(space.full)["parameters"]

    def chosen(count: int, **more: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        asked = job(engine, arch="resnet20", budget={"max_params": count}, **more)
        return asked.architecture.depth, asked.architecture.channels

    assert chosen(shallow) == ((1, 1, 1), (16, 32, 64))
    assert chosen(shallow - 1)[0] == (3, 3, 3)
    assert chosen(shallow, depth=[3, 3, 3])[0] == (3, 3, 3)
    # Wide enough, three blocks are expected to be better again.
    assert chosen(full - 1)[0] == (3, 3, 3)
    assert chosen(10 * full) == ((3, 3, 3), (16, 32, 64))
    assert chosen(10 * full, extrapolate=True)[0] == (6, 6, 6)


def test_every_scalar_width_is_a_budget_candidate(engine: Engine) -> None:
    low, high = WHOLE.width
    steps = 20_000
    for space in (WHOLE, LAST):
        low, high = space.width
        found = {space.architecture(low + (high - low) * step / steps) for step in range(steps + 1)}
        assert found <= set(growing(space, None, False))


def test_accuracy_is_measured_or_between_measured_ones(engine: Engine) -> None:
    told = [
        engine.describe(job(engine, arch="resnet20", width=width))
        for width in (0.5, 0.6, 0.7, 0.97)
    ]
    assert (told[0]["accuracy"], told[0]["accuracy_measured"]) == (88.0, True)
    assert 88.0 < told[1]["accuracy"] < told[2]["accuracy"] < told[3]["accuracy"] < 92.0
    assert not any(each["accuracy_measured"] for each in told[1:])
    below = engine.describe(job(engine, arch="resnet20", width=0.3))
    assert below["accuracy"] is None
    assert engine.describe(job(engine, arch="lenet"))["accuracy"] is None


def test_one_name_is_served_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint.write(lenet(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="'lenet' is served by an earlier file"):
        Engine(sorted(tmp_path.iterdir()), device="cpu")
    with pytest.raises(ValueError, match="device: 'tpu'"):
        Engine([], device="tpu")


@pytest.mark.parametrize(
    ("precision", "message"),
    [("float8", "'float8' is not"), ("tf32", "needs device 'cuda'"), ("bfloat16", "has none")],
)
def test_a_precision_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, precision: str, message: str
) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=f"precision: .*{message}"):
        Engine([], device="cpu", precision=precision)


def test_bfloat16_has_bytes_and_etags_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        device, "cpu_has_bfloat16", lambda: True
    )  # torch emulates it where it is not
    path = tmp_path / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    bodies, keys = set(), set()
    for precision in ("float32", "bfloat16", "bfloat16"):
        engine = Engine([path], device="cpu", precision=precision)
        made = job(engine, arch="lenet", width=0.5)
        keys.add(made.key)
        bodies.add(b"".join(engine.weights(made)))
    assert len(keys) == len(bodies) == 2


def test_accuracy_is_never_interpolated_across_depths(tmp_path: Path) -> None:
    rows = [
        {"channels": [16, 32, 64], "depth": [7, 7, 7], "accuracy": 90.0},
        {"channels": [8, 16, 32], "depth": [7, 7, 7], "accuracy": 80.0},
        {"channels": [16, 32, 64], "depth": [5, 5, 5], "accuracy": 20.0},
    ]
    path = tmp_path / "both.safetensors"
    checkpoint.write(grid(BOTH, {"evaluation": rows}), path)
    engine = Engine([path], device="cpu")

    def accuracy(**asked: Any) -> float | None:
        found: float | None = engine.describe(job(engine, arch="resnet44", **asked))["accuracy"]
        return found

    between = accuracy(width=0.75)
    assert between is not None and 80 < between < 90
    assert accuracy(depth=[5, 5, 5]) == 20
    assert accuracy(width=0.75, depth=[5, 5, 5]) is None
    assert accuracy(depth=[5, 6, 7]) is None
