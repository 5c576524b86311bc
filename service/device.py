"""Where and how exactly torch computes here, and its name in every ETag. Knows no manifold."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from neumeta import __version__


def chosen(device: str, precision: str) -> str:
    """'cpu' or 'cuda' for one of those or 'auto', ready to multiply in this precision.

    Raises ValueError for a device or a precision that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: {device!r} is not 'auto', 'cpu' or 'cuda'")
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision: {precision!r} is not 'float32', 'tf32' or 'bfloat16'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' was asked for, but torch sees no CUDA device")
    if precision == "tf32" and device != "cuda":
        raise ValueError("precision: 'tf32' needs device 'cuda'")
    if precision == "bfloat16" and device == "cpu" and not cpu_has_bfloat16():
        raise ValueError("precision: 'bfloat16' was asked for, but this processor has none")
    if device == "cuda":
        # Of the whole process: torch knows no other scope.
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether the processor has instructions for it (avx512_bf16, amx_bf16, bf16 on ARM)."""
    told = Path("/proc/cpuinfo")
    return told.exists() and "bf16" in told.read_text()


def identity(device: str, threads: int, precision: str) -> str:
    """The engine as far as bytes depend on it: sums round differently between builds of torch,
    processors and thread counts (measured), so equal bytes are promised within one engine only."""
    if device == "cuda":
        unit = torch.cuda.get_device_name()
    else:
        unit = f"{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}/{threads}"
    lower = "" if precision == "float32" else f"/{precision}"
    return f"neumeta-{__version__}/torch-{torch.__version__}/{device}/{unit}{lower}"
