"""ONNX models over real sockets: pulled by the client and by curl, made by two replicas."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from benchmarks.local import SAMPLED, Answer, RedisServer, Service, fetch, replicas
from neumeta import checkpoint, network
from neumeta import pull as client
from neumeta.command import main as neumeta_pull
from neumeta.failure import PullError
from neumeta.whole import check_file
from tests.conftest import lenet
from tests.test_pull import files

WHOLE = "/weights/lenet?width=0.5&dtype=int8&format=onnx"


def outputs(path: Path, images: torch.Tensor) -> torch.Tensor:
    """What ONNX Runtime makes of these images, of a model that the checker has passed."""
    onnx.checker.check_model(str(path), full_check=True)
    here = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(here.run(None, {"input": images.numpy()})[0])


def test_the_command_pulls_a_model_that_computes_what_the_weights_do(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--arch", "lenet", "--width", "0.5", "--url", url]
    weights, model = tmp_path / "net.safetensors", tmp_path / "net.onnx"
    assert neumeta_pull([*asked, "--out", str(weights)]) == 0
    assert neumeta_pull([*asked, "--out", str(model), "--format", "onnx"]) == 0
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    assert capsys.readouterr().out.endswith(f"{model.stat().st_size} bytes sha256 {sha256}\n")
    images = torch.rand(3, 1, 28, 28)
    wanted = network.load(weights)(images)
    # Untrained, it sums numbers of a million: small outputs are what is left of large ones.
    bound = 1e-6 * float(wanted.abs().max())
    assert torch.allclose(outputs(model, images), wanted, rtol=1e-5, atol=bound)
    # Again, it is only asked whether it is current.
    assert neumeta_pull([*asked, "--out", str(model), "--format", "onnx"]) == 0
    assert sha256 in capsys.readouterr().out


def test_a_model_is_kept_as_the_last_good_file_and_a_bad_format_is_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.onnx"
    asked = ["--url", url, "--out", str(out), "--format", "onnx"]
    assert neumeta_pull(["--arch", "lenet", *asked]) == 0
    good = out.read_bytes()
    assert neumeta_pull(["--arch", "vgg", *asked]) == 1
    assert "last good file" in capsys.readouterr().err and out.read_bytes() == good
    with pytest.raises(PullError, match="format: 'torch' is not one of"):
        client.pull(url, "lenet", out, parameters={"format": "torch"})
    assert out.read_bytes() == good
    # Another format of the same network is another file.
    assert neumeta_pull(["--arch", "lenet", *asked[:-2]]) == 0
    assert out.read_bytes() != good and network.load(out).channels == 1
    assert set(files(tmp_path)) == {out.name, f".{out.name}.pull"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_resumes_a_model_where_it_was_cut(url: str, tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    whole = subprocess.run(["curl", "-sSf", url + WHOLE], check=True, capture_output=True).stdout
    for kept in (1, 700, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:kept])
        subprocess.run(["curl", "-sSf", "-C", "-", "-o", str(out), url + WHOLE], check=True)
        assert out.read_bytes() == whole
    check_file(out, "lenet", "int8", "onnx")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[list[Service], RedisServer]]:
    """Two replicas without a memory tier of their own, and the Redis they share."""
    path = tmp_path / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    server = RedisServer(tmp_path)
    flags = ("--redis-url", server.url, "--redis-pause", "0.1", "--cache-bytes", "0")
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        yield stack.enter_context(replicas(2, path, *flags)), server


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_two_replicas_make_a_model_once_and_alone_they_make_the_same_bytes(
    fleet: tuple[list[Service], RedisServer],
) -> None:
    pair, server = fleet

    async def sampled() -> float:
        return sum([await each.metric(SAMPLED) for each in pair])

    async def check() -> None:
        asked = (fetch(pair[number % 2].port, WHOLE) for number in range(20))
        answers = await asyncio.gather(*asked)
        assert all(isinstance(each, Answer) and each.status == 200 for each in answers)
        assert len({each.sha256 for each in answers}) == 1 and await sampled() == 1
        server.kill()
        alone = [await fetch(each.port, WHOLE) for each in pair]
        assert {each.sha256 for each in alone} == {answers[0].sha256} and await sampled() == 3

    asyncio.run(asyncio.wait_for(check(), 60))
