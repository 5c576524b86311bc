"""The gate's rule: nothing is skipped but what needs a CUDA device where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neumeta import wire
from service.engine import Engine
from service.request import WeightsRequest

ROOT = Path(__file__).parent.parent
CASES = """
import pytest

@pytest.mark.cuda
def test_on_a_gpu() -> None:
    pass

@pytest.mark.cuda
def test_on_a_gpu_that_lacks_something_else() -> None:
    pytest.skip("no data")

def test_without_data() -> None:
    pytest.skip("no data")

def test_that_runs() -> None:
    pass
"""


@pytest.mark.parametrize("cuda", [False, True])
def test_only_what_needs_a_gpu_may_be_skipped(tmp_path: Path, cuda: bool) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "conftest.py").write_text(
        "import torch\n"
        f"torch.cuda.is_available = lambda: {cuda}\n"
        "from tests.conftest import pytest_collection_modifyitems, pytest_runtest_makereport\n"
    )
    options = ["-p", "no:cacheprovider", "-rA", "-c", str(ROOT / "pyproject.toml")]
    # Without plugins that take seconds to load and have no say in this.
    options += ["-p", "pytest_timeout", "-o", "addopts=--strict-markers"]
    plain = {
        "NEUMETA_NO_SKIPS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
        timeout=120,
    )
    counts = "2 failed, 2 passed" if cuda else "1 failed, 1 passed, 2 skipped"
    counts = "2 failed, 2 passed" if cuda else counts
    assert counts in ran.stdout, ran.stdout + ran.stderr
    assert "test_without_data" in ran.stdout


@pytest.mark.cuda
def test_a_gpu_samples_what_the_processor_samples(file: Path) -> None:
    """Within rounding, under an ETag of its own."""
    engines = [Engine([file], device=device) for device in ("cpu", "cuda")]
    jobs = [engine.job(WeightsRequest(arch="lenet", width=0.5)) for engine in engines]
    assert jobs[0].etag != jobs[1].etag and jobs[0].plan == jobs[1].plan
    assert jobs[0].plan.dtype in wire.KINDS
    bodies = [b"".join(engine.weights(job)) for engine, job in zip(engines, jobs, strict=True)]
    cpu, cuda = (torch.frombuffer(bytearray(body), dtype=torch.float32) for body in bodies)
    torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)
