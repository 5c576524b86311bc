"""The supplement, one command a table: ours beside theirs.

    NEUMETA_DATA=... python -m benchmarks.paper table1
    python -m benchmarks.paper all --quick        every table on digits, in tiny budgets
    python -m benchmarks.paper --list

A row that is in docs/paper/NAME.json, with as many seeds as asked for, is not measured again; a row
under way goes on where it stopped.
docs/paper.md is written from those files. Exit codes: 0 done, 3 stopped by --max-minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.local import hardware
from benchmarks.paper import (
    averaging,
    continuous,
    depth,
    four,
    inr,
    pictures,
    published,
    similarity,
    variation,
)
from benchmarks.paper.bench import Bench, Late, Setting
from benchmarks.paper.table import Results, Table, by_seed, markdown
from neumeta import atomic

TABLES: dict[str, variation.Make] = {
    "main-cifar10": four.main_cifar10,
    "table1": inr.table1,
    "table2": inr.table2,
    "table3": inr.table3,
    "table4": inr.table4,
    "table5": inr.table5,
    "noise": averaging.noise,
    "samples": averaging.samples,
    "main-losses": inr.main_losses,
    "section2": variation.section2,
    "figure2": variation.figure2,
    "figure1": depth.figure1,
    "section3": continuous.section3,
    "section7": continuous.section7,
    "section8": pictures.section8,
    "generation": pictures.generation,
    "section9": published.section9,
    "similarity": similarity.similarity,
}
ROOT = Path(__file__).parents[2]
HEAD = """# The paper's tables, ours beside theirs

Written by `python -m benchmarks.paper NAME` (`all`, `--list`) from the rows in `docs/paper/`. The
figure in brackets is the paper's. Hardware: AMD EPYC, one core, torch 2.13 (CPU). Where rows have three
seeds, the first is of an earlier machine and its images. How the residual MLP came to work, with the
figures of each step: [LOG.md](LOG.md).
"""


def page(bench: Bench, out: Path) -> str:
    """The page: every table that has a row."""
    sections = [HEAD]
    for make in TABLES.values():
        table = make(bench)
        rows = bench.setting.results.read(table.name)
        if rows:
            whole = all(name in rows for name in table.rows)
            figure = table.figure(rows, out) if table.figure and whole else None
            sections.append(markdown(table, rows, figure) + "\n")
    return "\n".join(sections)


def fill(table: Table, results: Results, *, seeds: int = 1, only: str | None = None) -> None:
    """Measure the rows that are missing, or that have fewer seeds than are asked for. Raises Late."""
    wanted = seeds if table.repeated else 1
    for name in table.rows:
        row = results.read(table.name).get(name)
        if (row is None or len(by_seed(row)) < wanted) and only in (None, name):
            began = time.monotonic()
            results.keep(table.name, name, table.measure(name))
            told = f"{table.name}: {name}: {results.read(table.name)[name]}"
            print(f"{told} ({time.monotonic() - began:.0f} s)", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Fill the tables that are asked for and write the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="tables, or all")
    parser.add_argument("--list", action="store_true", help="the tables there are")
    parser.add_argument("--quick", action="store_true", help="on digits, in tiny budgets")
    parser.add_argument("--row", help="this row alone")
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, 6),
        help="how many, where a row costs minutes (default 3, or 1 with --quick)",
    )
    parser.add_argument("--data", type=Path, help="folder of data sets (default $NEUMETA_DATA)")
    parser.add_argument(
        "--pixels",
        type=Path,
        default=Path("runs/pixels"),
        help="what `python -m benchmarks.pixels --run` made (default runs/pixels)",
    )
    parser.add_argument(
        "--checkpoints", type=Path, help="public ones (default DATA/../checkpoints)"
    )
    parser.add_argument("--runs", type=Path, help="default runs/paper, or runs/paper-quick")
    parser.add_argument(
        "--out", type=Path, help="of the page and the rows (default docs; RUNS/docs)"
    )
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    asked = parser.parse_args(argv)
    if asked.list:
        print("\n".join(TABLES))
        return 0
    names = list(TABLES) if "all" in asked.names else asked.names
    unknown = [name for name in names if name not in TABLES]
    if unknown or not names:
        parser.error(f"{unknown[0] if unknown else 'NAME'}: one of {', '.join(TABLES)} or all")
    runs = asked.runs or Path("runs/paper-quick" if asked.quick else "runs/paper")
    out = asked.out or (runs / "docs" if asked.quick else ROOT / "docs")
    root = asked.data or (
        Path(os.environ["NEUMETA_DATA"]) if "NEUMETA_DATA" in os.environ else None
    )
    if root is None and not asked.quick:
        parser.error("--data or NEUMETA_DATA: where the data sets are")
    runs.mkdir(parents=True, exist_ok=True)
    seeds = asked.seeds or (1 if asked.quick else 3)
    bench = Bench(
        Setting(
            asked.quick,
            root,
            asked.pixels,
            asked.checkpoints or (root or Path()).parent / "checkpoints",
            ROOT / "models",
            runs,
            Results(out / "paper"),
            seeds,
            time.monotonic() + 60 * asked.max_minutes,
        )
    )
    code = 0
    try:
        for name in names:
            fill(TABLES[name](bench), bench.setting.results, seeds=seeds, only=asked.row)
    except Late:
        code = 3
    atomic.write(out / "paper.md", page(bench, out))
    told = {"hardware": hardware(), "threads": torch.get_num_threads(), "tables": names}
    print(json.dumps({"benchmark": "paper", **told, "page": str(out / "paper.md"), "code": code}))
    return code


if __name__ == "__main__":
    sys.exit(main())
