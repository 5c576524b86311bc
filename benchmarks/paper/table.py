"""A table of the paper, and the file that keeps its rows. Knows no network and no training."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neumeta import atomic

Row = dict[str, Any]
Rows = dict[str, Row]


@dataclass(frozen=True)
class Table:
    """One table: `measure` gives each row's figures by column, `theirs` the paper's where it has any.

    `head` says what is different here from what the paper did; `verdict` whether its claim holds, from
    all rows. `figure` draws a file beside the page. `repeated` says that its rows are made with several
    seeds.
    """

    name: str
    title: str
    head: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    measure: Callable[[str], Row]
    verdict: Callable[[Rows], str]
    theirs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    figure: Callable[[Rows, Path], Path | None] | None = None
    repeated: bool = False


def by_seed(row: Row) -> list[Row]:
    """The rows that this one is the mean of, in the order of their seeds; or itself alone."""
    return list(row.get("seeds", [row]))


def mean_row(rows: list[Row]) -> Row:
    """The mean of rows that differ in their seed, with the standard deviation of every figure but its
    cost as `spread`, and the rows as `seeds`. A single row stays as it is."""
    if len(rows) == 1:
        return rows[0]
    figures = {
        name: np.array([row[name] for row in rows])
        for name, value in rows[0].items()
        if isinstance(value, float)
    }
    return {
        **{name: round(float(values.mean()), 4) for name, values in figures.items()},
        "spread": {
            name: round(float(values.std(ddof=1)), 4)
            for name, values in figures.items()
            if name != "minutes"
        },
        "seeds": rows,
    }


class Results:
    """The measured rows of every table: one JSON file for each table in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, table: str) -> Path:
        """A table's file."""
        return self.folder / f"{table}.json"

    def read(self, table: str) -> Rows:
        """The rows that are there, by name."""
        path = self.path(table)
        return json.loads(path.read_text())["rows"] if path.exists() else {}

    def keep(self, table: str, name: str, row: Row) -> None:
        """Add one row; the file is written whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = {**self.read(table), name: row}
        atomic.write(self.path(table), json.dumps({"rows": rows}, indent=1) + "\n")

    def trained(self, digest: str) -> Row | None:
        """A row of any table that this training made."""
        for path in sorted(self.folder.glob("*.json")):
            for mean in self.read(path.stem).values():
                for row in by_seed(mean):
                    if row.get("training") == digest:
                        return row
        return None


def holds(claim: bool) -> str:
    """What a verdict says of a claim."""
    return "holds" if claim else "does not hold"


def markdown(table: Table, rows: Rows, figure: Path | None) -> str:
    """The table as a section of a page: ours, and the paper's in brackets."""
    lines = [f"## {table.name}: {table.title}", "", _wrapped(table.head), ""]
    lines.append("| | " + " | ".join(table.columns) + " |")
    lines.append("|---|" + "---:|" * len(table.columns))
    for name in table.rows:
        cells = []
        for column in table.columns:
            value = rows.get(name, {}).get(column)
            shown = "" if value is None else value if isinstance(value, str) else f"{value:,.2f}"
            shown = f"{value:,}" if isinstance(value, int) else shown
            spread = rows.get(name, {}).get("spread", {}).get(column, 0.0)
            shown += f" ± {spread:,.2f}" if round(spread, 2) else ""
            theirs = table.theirs.get(name, {}).get(column)
            cells.append(shown if theirs is None else f"{shown} ({theirs:,.2f})".strip())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    missing = [name for name in table.rows if name not in rows]
    said = f"Not measured yet: {', '.join(missing)}." if missing else table.verdict(rows)
    lines += ["", _wrapped(said)]
    if figure is not None:
        lines += ["", f"![{table.title}]({figure})"]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
