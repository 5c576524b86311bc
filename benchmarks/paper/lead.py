"""By how much one row is ahead of another, and whether their seeds can tell."""

from __future__ import annotations

import numpy as np

from benchmarks.paper.table import Row, Rows, by_seed

LEAD = 0.5
"""Points of the mean: a lead of less decides nothing between rows of one seed."""
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""By the number of seeds: how many standard errors around a mean hold 95 % (Student 1908)."""


def ahead(one: Row, other: Row, column: str = "mean") -> tuple[float, float]:
    """By how much the one is ahead, in points, and more than how much that must be to decide anything.

    The same seed begins both alike: differences are taken seed by seed, over those that both have.
    """
    pairs = list(zip(by_seed(one), by_seed(other), strict=False))
    leads = np.array([mine[column] - theirs[column] for mine, theirs in pairs])
    if len(leads) == 1:
        return round(float(leads[0]), 2), LEAD
    error = float(leads.std(ddof=1)) / len(leads) ** 0.5
    return round(float(leads.mean()), 2), STUDENT[len(leads)] * error


def best(rows: Rows, claimed: str, column: str = "mean") -> str:
    """Whether the row that the paper calls best is, and by how much."""
    seeds = min(len(by_seed(row)) for row in rows.values())

    def mean(name: str) -> float:
        return float(np.mean([row[column] for row in by_seed(rows[name])[:seeds]]))

    other = max((name for name in rows if name != claimed), key=mean)
    lead, least = ahead(rows[claimed], rows[other], column)
    if abs(lead) <= least:
        told = f"{abs(lead):.2f} points {'ahead of' if lead > 0 else 'behind'}"
        told = told if lead else "level with"
        can = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"Undecided here: {claimed!r} is {told} {other!r}, less than {can} can tell."
    if lead > 0:
        return f"The claim holds here: {claimed!r} is best, {lead:.2f} points ahead of {other!r}."
    return f"The claim does not hold here: {other!r} is {-lead:.2f} points ahead of {claimed!r}."
