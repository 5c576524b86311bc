"""torchvision's models, on a CPU build of torch too.

Its module declares how two operators look to a tracer, which only its CUDA-built library defines: they
are declared here before it is imported. Nothing that is run calls them.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import pytest
import torch

OPERATORS = ("nms", "qnms")


@functools.cache
def models() -> ModuleType:
    """The module torchvision.models."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:  # the operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # its operators go when it does
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision.models")


_kept: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """torchvision.models, with random weights at hand: `torchvision_models.resnet18()`."""
    return models()
