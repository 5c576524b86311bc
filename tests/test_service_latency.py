"""What lies beside a manifold of what its sizes take: told as it is, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neumeta import checkpoint
from neumeta.checkpoint import BadCheckpoint
from service import latency
from service.engine import Engine
from tests.conftest import lenet

TABLE: dict[str, Any] = {
    "arch": "lenet",
    "hardware": "a board",
    "threads": 1,
    "runtimes": ["ONNX Runtime 1.32", "torch 2.13"],
    "rows": [{"depth": [], "channels": [32, 64, 64], "ms": [0.5, 2]}],
}


def test_a_model_tells_the_times_that_lie_beside_it_and_a_reload_reads_them_again(
    file: Path,
) -> None:
    beside = latency.beside(file)
    assert beside.name == "lenet.latency.json"
    engine = Engine([file], device="cpu")
    assert engine.model("lenet")["latency"] is None
    beside.write_text(json.dumps(TABLE))
    engine.adopt(Engine([file], device="cpu"))
    assert engine.model("lenet")["latency"] == TABLE
    beside.write_text("{}")
    with pytest.raises(BadCheckpoint, match="lenet.latency.json"):
        Engine([file], device="cpu")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arch": "other"}, "arch: 'other' is not 'lenet'"),
        ({"hardware": ""}, "hardware: "),
        ({"threads": "1"}, "threads: "),
        ({"runtimes": []}, "runtimes: "),
        ({"runtimes": ["torch"]}, "2 times in a row, of 1 runtimes"),
        ({"rows": [{"depth": [], "channels": [1], "ms": [0.0, 1.0]}]}, "rows.0.ms.0: "),
        ({"rows": [{"depth": [], "channels": [1]}]}, "rows.0.ms: "),
        ({"more": 1}, "more: "),
    ],
)
def test_a_table_that_is_none_is_refused_in_a_line_that_names_it(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    path = tmp_path / "net.safetensors"
    latency.beside(path).write_text(json.dumps(TABLE | changes))
    with pytest.raises(BadCheckpoint) as caught:
        latency.read(path, "lenet")
    told = str(caught.value)
    assert why in told and told.startswith(f"{latency.beside(path)}: ") and "\n" not in told


ENDLESS = json.dumps(TABLE).replace("0.5", "Infinity").encode()


@pytest.mark.parametrize("raw", [b"", b"[", b"\xff\xfe", b"NaN", b"[]", ENDLESS])
def test_what_is_no_json_is_refused_too(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "net.safetensors"
    latency.beside(path).write_bytes(raw)
    with pytest.raises(BadCheckpoint, match="net.latency.json: no table of latencies"):
        latency.read(path, "lenet")


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    latency.beside(tmp_path / "net.safetensors").mkdir()
    with pytest.raises(BadCheckpoint, match="directory"):
        latency.read(tmp_path / "net.safetensors", "lenet")


def test_the_benchmark_writes_what_the_service_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import latency as benchmark

    manifold = lenet()
    sizes = [manifold.space.architecture(width) for width in (0.25, 1.0)]
    manifold.about["evaluation"] = [
        {"depth": list(size.depth), "channels": list(size.channels), "score": 50.0 + place}
        | {"width": 1.0, "bytes": 1, **manifold.space.cost(size)}
        for place, size in enumerate(sizes)
    ]
    path = tmp_path / "net.safetensors"
    checkpoint.write(manifold, path)
    asked = [
        str(path),
        "--seconds",
        "0.01",
        "--rounds",
        "2",
        "--figure",
        str(tmp_path / "figure.svg"),
    ]
    monkeypatch.setattr("sys.argv", ["latency", *asked])
    benchmark.main()
    table = latency.read(path, "lenet")
    assert table and [row["channels"] for row in table["rows"]] == [list(s.channels) for s in sizes]
    assert [each.split()[-2:][0] for each in table["runtimes"]] == ["Runtime", "torch"]
    assert all(len(row["ms"]) == 2 for row in table["rows"])
    assert "| 51.00 |" in capsys.readouterr().out and (tmp_path / "figure.svg").exists()
