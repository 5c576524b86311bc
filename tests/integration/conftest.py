"""The service that most integration tests talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.local import Service
from neumeta import checkpoint
from tests.conftest import lenet


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real service on a small manifold."""
    path = tmp_path_factory.mktemp("models") / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    with Service(path) as service:
        yield service.url
