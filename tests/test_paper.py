"""Every table of `benchmarks.paper` is made, in tiny budgets; no row is measured twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import __main__ as paper
from benchmarks.paper.bench import Bench, Setting
from benchmarks.paper.table import Results, Table, markdown

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.paper", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


def test_every_table_is_made_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    done = run("all", "--quick", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "docs" / "paper.md").read_text()
    setting = Setting(
        True, None, Path(), ROOT / "models", tmp_path, Results(tmp_path / "docs/paper")
    )
    for name, make in paper.TABLES.items():
        table = make(Bench(setting))
        assert f"## {name}: {table.title}" in page
        assert list(setting.results.read(name)) == list(table.rows)
    assert "Not measured yet" not in page and "claim" in page
    assert (tmp_path / "docs" / "figures" / "paper-figure2.svg").stat().st_size > 1000
    # The same training stands for the same rows of several tables.
    rows = [setting.results.read("table1")["mSHP"], setting.results.read("table3")["with residual"]]
    assert rows[0] == rows[1]
    for path in (tmp_path / "docs" / "paper").glob("*.json"):
        path.touch()
    again = run("all", "--quick", "--runs", str(tmp_path))
    assert again.returncode == 0 and len(again.stdout.splitlines()) == 1
    assert (tmp_path / "docs" / "paper.md").read_text() == page


def test_a_time_that_is_up_keeps_what_is_done_and_says_so(tmp_path: Path) -> None:
    done = run("section2", "table3", "--quick", "--runs", str(tmp_path), "--max-minutes", "1e-9")
    assert done.returncode == 3, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["code"] == 3
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert "## section2" in page and "## table3" not in page


def test_the_list_names_what_there_is_and_another_name_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert paper.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(paper.TABLES)
    with pytest.raises(SystemExit):
        paper.main(["table9"])
    assert "table9" in capsys.readouterr().err


def test_a_row_shows_the_papers_figure_beside_ours_and_what_is_missing() -> None:
    table = Table(
        "t", "a title", "A head.", ("x", "y"), ("one", "two"), lambda name: {},
        lambda rows: f"All {len(rows)}.", {"one": {"x": 91.87}},
    )  # fmt: skip
    half = markdown(table, {"one": {"x": 90.5, "y": "text"}}, None)
    assert "| one | 90.50 (91.87) | text |" in half
    assert "| two |  |  |" in half and "Not measured yet: two." in half and "All" not in half
    whole = markdown(table, {"one": {"x": 90.5}, "two": {"y": 1200.0}}, Path("figures/f.svg"))
    assert "| two |  | 1,200.00 |" in whole and "All 2." in whole
    assert "![a title](figures/f.svg)" in whole
