"""A pulled network as a program for ExecuTorch, run by its own runtime."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from neumeta import checkpoint, network, wire
from neumeta.executorch import main
from neumeta.sample import sample
from tests.conftest import lenet


def pulled(folder: Path, dtype: str, file_format: str = "safetensors") -> Path:
    """A file as the service makes it."""
    manifold = lenet()
    small = manifold.space.architecture(0.25)
    parts = wire.stream(wire.plan(manifold, small, dtype, file_format), sample(manifold, small))
    path = folder / f"net.{file_format}"
    path.write_bytes(b"".join(parts))
    return path


def test_a_pulled_network_is_lowered_and_computes_what_torch_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    # What it looks for attention and upsampling with takes 5 seconds to make, and here are neither.
    graphs = "executorch.backends.xnnpack.partition.graphs"
    monkeypatch.setattr(f"{graphs}.sdpa.get_graphs", list)
    monkeypatch.setattr(f"{graphs}.bilinear_2d.get_graphs_dict", dict)
    path, out = pulled(tmp_path, "float16"), tmp_path / "made" / "net.pte"
    assert main([str(path), str(out), "--batch", "2"]) == 0
    told = capsys.readouterr().out
    made = out.read_bytes()
    assert f"{len(made)} bytes sha256 {hashlib.sha256(made).hexdigest()}; 1" in told
    assert [each.name for each in out.parent.iterdir()] == ["net.pte"]
    program = runtime.Runtime.get().load_program(made)
    (about,) = program.load_method("neumeta").execute([])
    assert json.loads(about) == network.contract(path)
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    (found,) = program.load_method("forward").execute([images])
    expected = network.load(path).float()(images)
    # The same weights, float32 products, added up in another order: rounding alone differs.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_cannot_be_lowered_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = pulled(tmp_path, "float32"), tmp_path / "net.pte"
    out.write_text("precious")
    checkpoint.write(lenet(), tmp_path / "manifold")
    (tmp_path / "text").write_text("no network")
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    for file, target, why in (
        (path, out, "pip install 'neumeta-serve[executorch]'"),
        (path, tmp_path, "is a folder"),
        (tmp_path / "absent", out, "No such file"),
        (tmp_path / "text", out, "cut short or damaged"),
        (tmp_path / "manifold", out, "a manifold, not a network"),
        (pulled(tmp_path, "float32", "onnx"), out, "an ONNX model"),
    ):
        assert main([str(file), str(target)]) == 2
        told = capsys.readouterr()
        assert why in told.err and len(told.err.splitlines()) == 1 and not told.out
    assert out.read_text() == "precious"
    assert not list(tmp_path.glob(".*"))
    for batch in ("0", "two", "5000"):
        with pytest.raises(SystemExit):
            main([str(path), str(out), "--batch", batch])


def test_what_executorch_says_no_to_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*given: object, **more: object) -> None:
        raise RuntimeError("no such thing\nand more of it")

    class Refusing:
        to_edge_transform_and_lower = staticmethod(no)
        XnnpackPartitioner = staticmethod(lambda: None)

    for name in ("executorch.exir", "executorch.backends.xnnpack.partition.xnnpack_partitioner"):
        monkeypatch.setitem(sys.modules, name, Refusing)
    assert main([str(pulled(tmp_path, "float32")), str(tmp_path / "net.pte")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ExecuTorch cannot lower it: no such thing")
    assert not (tmp_path / "net.pte").exists()
