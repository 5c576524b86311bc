"""`neumeta-pull --max-ms` and `--max-bytes` against a real service, with the real runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from neumeta import asking, measure, memory
from neumeta.command import main as neumeta_pull
from neumeta.whole import check_file


def test_what_was_measured_here_is_pulled_and_measured_again_when_something_changed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.02)
    monkeypatch.setattr(measure, "LONGER", 0.04)
    out = tmp_path / "net"
    asked = ["--arch", "lenet", "--url", url, "--out", str(out)]

    def pulled(*more: str, code: int = 0) -> str:
        assert neumeta_pull([*asked, *more]) == code
        return capsys.readouterr().err

    def whole(**parameters: str) -> bytes:
        return httpx.get(f"{url}/weights/lenet", params=parameters).content

    told = pulled("--max-ms", "10000")
    assert "of 10000 allowed (onnx, 1 thread;" in told and len(told.splitlines()) == 1
    assert out.read_bytes() == whole(format="onnx")
    assert pulled("--max-ms", "10000") == ""
    assert "allowed" in pulled("--max-ms", "10000", "--measure")
    record = tmp_path / ".net.choice"
    state = json.loads(record.read_text())
    state["choice"]["etag"] = "another manifold's"
    record.write_text(json.dumps(state))
    assert "allowed" in pulled("--max-ms", "10000")
    half = len(whole()) // 2
    assert "2 threads" in pulled("--max-ms", "10000", "--threads", "2", "--max-bytes", str(half))
    check_file(out, "lenet", "float32", "onnx")
    assert half / 2 < out.stat().st_size <= half
    assert "(torch, 1 thread" in pulled("--max-ms", "10000", "--runtime", "torch")
    assert out.read_bytes() == whole()
    assert pulled("--max-bytes", str(half)) == ""
    check_file(out, "lenet", "float32", "safetensors")
    assert half / 2 < out.stat().st_size <= half
    # So may memory be, which a process of its own tells.
    small = whole(width="0.25", format="onnx")
    asked += ["--max-bytes", str(len(small))]  # there is one such size
    told = pulled("--max-ram", str(10**9))
    assert "bytes of memory of 1000000000 allowed (onnx, 1 thread; 3 runs of 1 sizes" in told
    assert out.read_bytes() == small
    assert pulled("--max-ram", str(10**9)) == ""
    del asked[-2:]
    monkeypatch.setattr(memory, "peak", lambda runtime, path, *rest: 9 * path.stat().st_size)
    most = 9 * half
    assert "ms of 10000 allowed, " in pulled("--max-ram", str(most), "--max-ms", "10000")
    check_file(out, "lenet", "float32", "onnx")
    assert half / 2 < out.stat().st_size <= half
    # What cannot be is said in a line, and the file stays.
    before = out.read_bytes()
    for more, why in (
        (("--max-ms", "0.000001"), "more than the 1e-06 allowed"),
        (("--max-bytes", "9"), "max_bytes"),
        (("--max-ram", "9"), "more than the 9 allowed"),
        (("--max-ram", "9", "--runtime", "torch", "--format", "onnx"), "not onnx"),
        (("--max-ms", "9", "--max-bytes", "9"), "the smallest has"),
        (("--max-ms", "9", "--depth", "3"), "depth"),
    ):
        told = pulled(*more, code=1)
        assert why in told and len(told.splitlines()) == 1
    record.unlink()
    record.mkdir()  # where nothing can be remembered
    assert "choice: is a folder" in pulled("--max-bytes", str(half), code=1)
    record.rmdir()
    for body in ("[]", '{"etag": 7}', "<html>"):
        page = lambda *given, body=body: json.loads(body) if body[0] == "{" else {}  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(asking, "json_of", page)
            told = pulled("--max-ms", "9", code=1)
        assert ("is broken" in told or "no plan" in told) and len(told.splitlines()) == 1
    assert out.read_bytes() == before
    out.unlink()
    assert "allowed" in pulled("--max-ms", "0.000001", code=2)
    asked[1] = "nobody"
    assert "nobody" in pulled("--max-ms", "9", code=2)
