"""What several tests share: small manifolds, and the real data where it is at hand."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from neumeta import checkpoint
from neumeta.graph import Graph
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import build
from neumeta.space import Space
from training import networks
from training.trace import trace

if TYPE_CHECKING:
    from fastapi import FastAPI

NO_CUDA = "cuda: there is no CUDA device"
torch.set_num_threads(1)  # two busy test processes on two cores: more threads only wait


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets, $NEUMETA_DATA; the tests that need it are skipped without it."""
    root = os.environ.get("NEUMETA_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("NEUMETA_DATA does not name a folder of data sets: real-data tests are skipped")
    return Path(root)


@cache
def lenet_graph() -> Graph:
    """LeNet on 28x28 images."""
    graph, _ = trace(networks.lenet(), torch.zeros(1, 1, 28, 28))
    return graph


def lenet(kind: str = "mlp", seed: int = 0, **more: Any) -> Manifold:
    """A manifold of random parameters over LeNet's widths; `more` are options of its kind."""
    torch.manual_seed(seed)
    space = Space("lenet", lenet_graph(), (0.25, 1.0))
    options = {"layers": 3, "hidden": 16, "num_freq": 4} if kind == "mlp" else {}
    options |= more
    model = build(kind, options, roles(space))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    contract = Contract((0.3,), (0.4,), tuple("0123456789"))
    return Manifold(space, model, kind, options, 0.5, 4, 64, contract)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A manifold's file."""
    path = tmp_path / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    return path


@asynccontextmanager
async def served(models: Path, **changes: Any) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    """The application on these manifolds, and a client inside the process."""
    from service.app import create_app
    from service.settings import Settings

    app = create_app(Settings(models=str(models), device="cpu", **changes))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client, app


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` run where there is a CUDA device, and nowhere else."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=NO_CUDA))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With NEUMETA_NO_SKIPS (the gate sets it) a skipped test is a failed one, unless it needs a CUDA
    device and there is none."""
    report = yield
    if report.skipped and NO_CUDA in str(report.longrepr) and item.get_closest_marker("cuda"):
        return report
    if report.skipped and os.environ.get("NEUMETA_NO_SKIPS") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
    return report
