"""What `pip install neumeta-serve` puts on a device: the built wheel, alone in an empty environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import onnxruntime
import pytest

ROOT = Path(__file__).parent.parent.parent
BESIDE = {"numpy", "safetensors", "httpx", "filelock"}
"""What is asked for; httpx brings the rest."""
WITH_HTTPX = {"anyio", "certifi", "h11", "httpcore", "idna", "sniffio", "typing_extensions"}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("device")
    for package in ("neumeta", "service", "training", "models"):
        shutil.copytree(ROOT / package, folder / "copy" / package)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "copy")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(folder / "copy")], check=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv/bin/python"
    install = [*pip, "--python", str(python), "install", "-q", str(wheel)]
    subprocess.run(install, check=True, timeout=200)
    return python


def run(python: Path, *command: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), "-I", *command],
        cwd=python.parent,
        env=plain,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_small_install_holds_what_is_asked_for_and_no_torch(device: Path) -> None:
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps([each.metadata['Name'].lower() for each in m.distributions()]))"
    )
    found = {name.replace("-", "_") for name in json.loads(run(device, "-c", code).stdout)}
    assert found - WITH_HTTPX == {"neumeta_serve", *BESIDE}
    absent = run(device, "-c", "import torch")
    assert "No module named 'torch'" in absent.stderr


def test_a_small_install_pulls_by_command_and_by_function(
    device: Path, url: str, tmp_path: Path
) -> None:
    out = tmp_path / "net.safetensors"
    asked = ["--arch", "lenet", "--width", "0.5", "--out", str(out), "--url", url]
    ran = run(device, str(device.parent / "neumeta-pull"), *asked)
    assert ran.returncode == 0, ran.stderr
    code = (
        "import sys, neumeta\nfrom pathlib import Path\n"
        "from safetensors.numpy import load_file\n"
        "other = Path(sys.argv[2])\n"
        "sha256 = neumeta.pull(sys.argv[1], 'lenet', sys.argv[2], parameters={'width': '0.5'})\n"
        "print(sha256, len(load_file(other)))"
    )
    told = run(device, "-c", code, url, str(tmp_path / "other.safetensors"))
    assert told.returncode == 0, told.stderr
    sha256, tensors = told.stdout.split()
    assert f"sha256 {sha256}" in ran.stdout and int(tensors) == 8
    assert (tmp_path / "other.safetensors").read_bytes() == out.read_bytes()
    model = tmp_path / "net.onnx"
    asked = ["--arch", "lenet", "--format", "onnx", "--out", str(model), "--url", url]
    ran = run(device, str(device.parent / "neumeta-pull"), *asked)
    assert ran.returncode == 0, ran.stderr
    assert onnxruntime.InferenceSession(model).get_outputs()[0].shape == ["batch", 10]


@pytest.mark.parametrize(
    ("command", "extra"), [("neumeta-serve", "service"), ("neumeta-train", "training")]
)
def test_a_command_says_in_one_line_which_extra_it_lacks(
    device: Path, command: str, extra: str
) -> None:
    ran = run(device, str(device.parent / command), "--help")
    assert ran.returncode == 1 and len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith(command) and f"'neumeta-serve[{extra}]'" in ran.stderr


def test_loading_a_network_without_torch_says_which_extra_it_lacks(device: Path) -> None:
    told = run(device, "-c", "import neumeta.network").stderr.splitlines()[-1]
    assert told.endswith("pip install 'neumeta-serve[torch]'")


def test_what_runs_on_a_device_needs_no_more_than_python_3_10() -> None:
    asked = ["-t=3.10-", "--eval-annotations", "--no-tips", "-q"]
    parts = [
        str(ROOT / "neumeta"),
        *(str(ROOT / f"{p}/__init__.py") for p in ("service", "training")),
    ]
    vermin = [sys.executable, "-c", "from vermin import main; main()"]
    ran = subprocess.run([*vermin, *asked, *parts], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stdout
    newer = subprocess.run(
        [*vermin, *asked, str(ROOT / "service")], capture_output=True, text=True, timeout=100
    )
    assert newer.returncode != 0, "vermin finds nothing: it asks too little"
