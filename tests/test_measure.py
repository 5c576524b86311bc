"""The size a device can afford: decided on times that are given, and once on real ones."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from neumeta import afford, measure, memory, onnx, wire
from neumeta.command import main as neumeta_pull
from neumeta.measure import LONGER, SECONDS, Latency, Size, TooMuch, choose, fitted, latency
from neumeta.whole import check_file
from tests.conftest import lenet
from training.trace import trace


def size(macs: int, score: float | None, blocks: int = 3) -> Size:
    return Size((("width", str(macs)),), (blocks,), (macs,), macs, 4 * macs, score)


SIZES = [size(macs, 50 + macs / 4) for macs in range(10, 101, 10)]


def timed(
    each: Callable[[Size], float], spread: float = 1.1, asked: list[tuple[int, float]] | None = None
) -> Callable[[Size, float], Latency]:
    def run(size: Size, seconds: float) -> Latency:
        if asked is not None:
            asked.append((size.macs, seconds))
        return Latency(each(size), spread * each(size))

    return run


def test_a_latency_is_the_median_and_the_95th_percentile_after_a_warm_up() -> None:
    now, took = 0.0, itertools.chain([5.0], itertools.cycle([0.001] * 18 + [0.004] * 2))

    def run() -> None:
        nonlocal now
        now += next(took)

    found = latency(run, 0.5, clock=lambda: now)
    assert (found.median, found.high) == (pytest.approx(1), pytest.approx(4))
    # A network that takes long is run a few times all the same, and not for ever.
    slow = itertools.cycle([3.0])
    took = itertools.chain(slow)
    began = now
    assert latency(run, 0.5, clock=lambda: now).median == pytest.approx(3000)
    assert now - began < 3.0 * (measure.LEAST + 2)


def test_a_time_is_fitted_over_macs_and_blocks_and_more_never_takes_less() -> None:
    points = [(size(macs, None, blocks), 1 + macs / 10 + blocks / 2)
              for macs, blocks in ((10, 1), (100, 1), (50, 3), (20, 7))]  # fmt: skip
    at = fitted(points)
    assert at(size(80, None, 5)) == pytest.approx(1 + 8 + 2.5)
    noisy = fitted([(size(10, None), 3.0), (size(50, None), 2.0), (size(100, None), 2.5)])
    assert noisy(size(100, None)) >= noisy(size(10, None)) > 0
    assert fitted([(size(10, None), 3.0)])(size(999, None)) == pytest.approx(3)


@pytest.mark.parametrize("limit", [1.0, 2.2, 5.0, 8.81, 100.0])
def test_the_best_size_within_the_limit_at_both_is_chosen_and_was_run_longer(limit: float) -> None:
    asked: list[tuple[int, float]] = []
    chosen, taken = choose(SIZES, limit, timed(lambda size: size.macs / 12.5, 1.1, asked))
    fits = [each for each in SIZES if 1.1 * each.macs / 12.5 <= limit * measure.MARGIN]
    assert chosen == max(fits, key=lambda each: each.macs)
    assert taken.within(limit) and asked[-1] == (chosen.macs, LONGER)
    assert len(asked) <= 5 + measure.TRIES + measure.CONFIRMED


def test_the_score_decides_not_the_size() -> None:
    better_small = [size(10, 70), size(50, 90), size(90, 80), size(100, None)]
    assert choose(better_small, 50, timed(lambda size: size.macs / 10))[0].macs == 50
    assert choose(better_small, 50, timed(lambda size: size.macs / 10), higher=False)[0].macs == 10
    unknown = [size(10, None), size(50, None), size(90, None)]
    assert choose(unknown, 6, timed(lambda size: size.macs / 10))[0].macs == 50


def test_a_size_that_is_slower_than_its_macs_say_or_when_run_longer_is_passed_over() -> None:
    trap = lambda size: 50.0 if size.macs == 70 else size.macs / 10  # noqa: E731
    assert choose(SIZES, 8, timed(trap))[0].macs == 60

    def hot(size: Size, seconds: float) -> Latency:
        slower = 2 if seconds == LONGER and size.macs > 30 else 1
        return Latency(slower * size.macs / 10, slower * size.macs / 10)

    chosen, taken = choose(SIZES, 8, hot)
    assert chosen.macs <= 40 and taken.within(8)


def test_a_device_on_which_everything_slows_down_has_the_fastest_size_or_is_told_how_far_it_is() -> (
    None
):
    def hot(size: Size, seconds: float) -> Latency:
        taken = size.macs / 10 * (7.5 if seconds == LONGER else 1)
        return Latency(taken, taken)

    assert choose(SIZES, 8, hot)[0].macs == 10
    with pytest.raises(TooMuch, match="takes 7.5 ms .* 0.5 ms more than the 7 allowed"):
        choose(SIZES, 7, hot)


def test_depth_costs_time_beside_macs() -> None:
    deep = [size(macs, macs + blocks, blocks) for macs in (10, 40, 80) for blocks in (1, 4, 9)]
    time = lambda size: size.macs / 10 + size.blocks  # noqa: E731
    chosen, _ = choose(deep, 11 / measure.MARGIN, timed(time, 1.0))
    assert chosen == max((each for each in deep if time(each) <= 11), key=lambda each: each.score)


def test_the_fastest_size_is_better_than_none() -> None:
    just = timed(lambda size: size.macs / 10.2, 1.0)
    assert choose(SIZES, 1, just)[0].macs == 10  # between the margin and the limit


def test_a_limit_that_all_sizes_miss_says_by_how_much() -> None:
    with pytest.raises(TooMuch, match="takes 2.2 ms .* 1.2 ms more than the 1 allowed"):
        choose(SIZES, 1, timed(lambda size: size.macs / 5))


def test_without_a_runtime_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure.runtime_of("", "onnx") == "onnx" and measure.runtime_of("torch", "") == "torch"
    asked = ["--arch", "x", "--max-ms", "8", "--url", "http://127.0.0.1:9", "--out"]
    asked.append(str(tmp_path / "net"))
    assert neumeta_pull([*asked, "--runtime", "torch", "--format", "onnx"]) == 2
    assert "torch runs safetensors files, not onnx" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert neumeta_pull(asked) == 2
    error = capsys.readouterr().err
    assert "onnxruntime or torch" in error and len(error.splitlines()) == 1
    for more in (
        ["--max-ms", "0"],
        ["--width", "0.5"],
        ["--threads", "0"],
        ["--max-bytes", "0"],
        ["--max-ram", "0"],
    ):
        with pytest.raises(SystemExit):
            neumeta_pull([*asked, *more])


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_candidate_is_a_whole_file_that_its_runtime_runs(
    tmp_path: Path, runtime: str, dtype: str
) -> None:
    manifold = lenet()
    about = wire.about(manifold, manifold.space.full)
    small = manifold.space.architecture(0.5)
    wanted = Size((), small.depth, small.channels, 1, 1)
    kind = "onnx" if runtime == "onnx" else "safetensors"
    path = tmp_path / "candidate"
    path.write_bytes(measure.candidate(about, wanted, dtype, kind))
    check_file(path, "lenet", dtype, kind)
    if runtime == "torch" and dtype != "float32":
        return
    run = measure.runner(runtime, path, (1, 28, 28), 1)
    assert latency(run, 0.02).median > 0


def test_memory_is_bounded_too_and_what_was_expected_to_fit_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costly: dict[int, tuple[int, int]] = {}  # of a size: more bytes, from which process on
    processes: list[int] = []

    def peak(runtime: str, path: Path, *rest: object) -> int:
        processes.append(count := path.stat().st_size)
        more, since = costly.get(count, (0, 1))
        return 1000 + 3 * count + more * (processes.count(count) >= since)

    def candidate(about: object, size: Size, dtype: str, file_format: str) -> bytes:
        assert (dtype, file_format) == ("float32", "onnx")
        return b"x" * size.bytes

    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(measure, "candidate", candidate)
    monkeypatch.setattr(measure, "runner", lambda runtime, path, *rest: path.stat().st_size)
    monkeypatch.setattr(measure, "latency", lambda run, seconds: Latency(run / 40, run / 40))
    told: list[str] = []

    def chosen(ms: float | None, ram: int | None) -> int:
        processes.clear()
        about = {"input": [1], "higher": True, "metric": "accuracy"}
        more = {"runtime": "onnx", "threads": 1, "dtype": "float32"}
        limits = afford.Limits(ms, ram)
        size = afford.choose(SIZES, about, limits, header=lambda: {}, say=told.append, **more)
        return size.macs

    assert chosen(None, 2000) == 70  # 80 takes 1960, which leaves too little
    assert processes.count(4 * 70) == 3  # the fit begins with 10, 60 and 100
    assert (told[-1].startswith("width=70, accuracy 67.5 expected: 1840 bytes of memory of 2000 all")
            and "owed (onnx, 1 thread; 6 runs of 10 sizes," in told[-1])  # fmt: skip
    assert chosen(5, 2000) == 40 and chosen(8.5, 9999) == 80
    assert "median 8 ms, 95th percentile 8 ms of 8.5 allowed, 1960 bytes of" in told[-1]
    assert chosen(8.5, 2000) == 70  # 80 leaves too little, whichever limit is looked at first
    costly[4 * 70] = (200, 3)  # what one process of three takes counts, and warns of the others
    assert chosen(None, 2000) == 50
    costly[4 * 60] = (9999, 1)
    assert chosen(6.5, 9999) == 50
    with pytest.raises(TooMuch, match="takes 1120 bytes of memory to run, 20 more than the 1100"):
        chosen(9, 1100)
    with pytest.raises(TooMuch, match="takes 1 ms"):
        chosen(0.5, 2000)


def test_memory_is_what_a_process_of_its_own_grows_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pictures(side: int) -> float:
        images = torch.zeros(1, 1, side, side)
        graph, _ = trace(torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU()), images)
        plan = onnx.plan(graph, {}, {"mean": [0.0], "std": [1.0]}, "float32")
        raw = [bytes(4 * math.prod(shape)) for shape in plan.shapes]
        parts = (plan.frames[name] + each for name, each in zip(plan.names, raw, strict=True))
        path.write_bytes(plan.header + b"".join(parts))
        return memory.peak("onnx", path, (1, side, side), 1)

    path = tmp_path / "net"
    made = 4 * 16 * 510**2  # by the convolution alone
    assert made <= pictures(512) - pictures(8) < 8 * made
    path.write_bytes(b"no network")
    with pytest.raises(memory.NotMeasured, match="a network could not be run: .*[^\n]*$"):
        memory.peak("onnx", path, (1, 8, 8), 1)
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert memory.peak("onnx", path, (1, 8, 8), 1) == math.inf
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(memory.NotMeasured, match="no process to measure memory in"):
        memory.peak("onnx", path, (1, 8, 8), 1)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    asked = ["--arch", "x", "--max-ram", "8", "--url", "http://127.0.0.1:9", "--out"]
    assert neumeta_pull([*asked, str(tmp_path / "out")]) == 2


def answered(path: str, asked: Mapping[str, str]) -> dict[str, Any]:
    """A service of one manifold with widths and depths."""
    if path == "/models/net":
        rows = [
            {"width": 1.0, "depth": [9], "score": 60, "extrapolated": True},
            {"width": 0.5, "depth": [3], "score": 70},
            {"width": [1.0, 0.5], "depth": [3], "score": 80},
        ]
        return {"arch": "net", "width": [0.25, 1.0], "blocks": [1, 5], "evaluation": rows}
    widths = [float(each) for each in asked.get("width", "1").split(",")]
    depth = [int(each) for each in asked.get("depth", "3").split(",")]
    macs = round(100 * sum(widths) / len(widths)) * depth[0]
    return {
        "arch": "net", "depth": depth, "channels": [round(64 * each) for each in widths],
        "macs": macs, "bytes": macs, "score": None,
    }  # fmt: skip


def test_what_can_be_chosen_is_every_width_and_what_was_scored() -> None:
    base = {"format": "onnx"}
    found, about = afford.sizes(answered, "net", base, answered("/plan/net", base))
    asked = [dict(each.asked) for each in found]
    assert len({(each.depth, each.channels) for each in found}) == len(found)
    assert {"width": "1.0,0.5", "depth": "3"} in asked and about["arch"] == "net"
    widths = {each["width"] for each in asked if list(each) == ["width"]}
    assert widths >= {f"{0.25 + 0.75 * step / 11:.6g}" for step in range(11)}
    assert not any(each.depth == (9,) for each in found)
    beyond, _ = afford.sizes(answered, "net", {"extrapolate": "true"}, answered("", {}))
    assert any(each.depth == (9,) for each in beyond)
    # A name for a depth, and a depth that was asked for, leave no other.
    named, _ = afford.sizes(answered, "net9", {}, answered("", {"depth": "3"}))
    assert all("depth" not in dict(each.asked) for each in named)
    assert {"width": "1.0,0.5"} in [dict(each.asked) for each in named]


def test_a_choice_is_remembered_for_its_key_alone(tmp_path: Path) -> None:
    record, key = tmp_path / "choice", ["url", 8.0, None]
    assert afford.remembered(record, key) == {}
    afford.remember(record, key, {"etag": "e"})
    assert afford.remembered(record, key) == {"etag": "e"}
    assert afford.remembered(record, ["url", 9.0, None]) == {}
    for broken in (b"", b"[]", b"{", json.dumps({"key": key}).encode()):
        record.write_bytes(broken)
        assert afford.remembered(record, key) == {}
    assert SECONDS < LONGER
