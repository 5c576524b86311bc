"""schemathesis over the service's own OpenAPI document: valid and invalid cases, bodies among them.

    python -m benchmarks.fuzz [--cases 10000]

No 5xx, no case over a second, resident memory flat. Starts its own service; the last line is one JSON
object. A case is one request that reached the service.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from schemathesis import GenerationMode

from benchmarks.life import CPU, manifold
from benchmarks.local import Service, hardware
from neumeta import checkpoint


def fuzz(cases: int) -> dict[str, Any]:
    """At least this many cases, spread over all operations; what was answered, how fast."""
    statuses: Counter[int] = Counter()
    seconds: list[float] = []
    faults: list[str] = []
    counted = Counter[str]()
    session = requests.Session()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lenet.safetensors"
        checkpoint.write(manifold("lenet"), file)
        service = Service(file, *CPU, "--cache-bytes", "1000000", "--log-level", "critical")
        try:
            schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
            found = [each.ok() for each in schema.get_all_operations()]
            settled = 0
            turn = 0

            def run(operation: Any, mode: GenerationMode, examples: int, seed: int) -> None:
                nonlocal settled

                @hypothesis.seed(seed)
                @hypothesis.settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    phases=[hypothesis.Phase.generate],
                    suppress_health_check=list(hypothesis.HealthCheck),
                )
                @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
                def check(case: Any) -> None:
                    if mode is GenerationMode.POSITIVE:
                        # No schema names what is served; else every case would end as a 404.
                        if isinstance(case.body, dict):
                            case.body["arch"] = "lenet"
                        if "arch" in case.path_parameters:
                            case.path_parameters["arch"] = "lenet"
                    began = time.perf_counter()
                    answer = case.call(session=session, timeout=30)
                    took = time.perf_counter() - began
                    seconds.append(took)
                    statuses[answer.status_code] += 1
                    counted[operation.label] += 1
                    if case.body is not None and isinstance(case.body, dict | list | str | bytes):
                        counted["with a body"] += 1
                    if answer.status_code >= 500 or took > 1:
                        faults.append(f"{answer.status_code} {took:.2f} s {case.as_curl_command()}")

                check()

            # Operations with parameters get most; a path without any has few different cases.
            while len(seconds) < cases:
                turn += 1
                before = len(seconds)
                for operation in found:
                    rich = operation.path.startswith(("/weights", "/plan", "/models/"))
                    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                        examples = min(cases // 40 if rich else 10, 500) or 1
                        try:
                            run(operation, mode, max(examples, 5), turn)
                        except hypothesis.errors.Unsatisfiable:
                            continue  # nothing can be invalid where nothing is asked
                if not settled:
                    settled = service.memory()
                if len(seconds) == before:
                    break
            resident = service.memory()
        finally:
            service.stop()
    ordered = sorted(seconds)
    return {
        "cases": len(seconds),
        "with_a_body": counted.pop("with a body", 0),
        "by_operation": dict(counted),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "server_errors": sum(count for status, count in statuses.items() if status >= 500),
        "median_ms": round(1e3 * ordered[len(ordered) // 2], 2),
        "slowest_ms": round(1e3 * ordered[-1], 1),
        "resident_after_first_round_and_last": [settled, resident],
        "faults": faults[:5],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    given = parser.parse_args()
    told = fuzz(given.cases)
    versions = {"schemathesis": schemathesis.__version__, "hypothesis": hypothesis.__version__}
    print(json.dumps({"hardware": hardware(), **versions, **told}))


if __name__ == "__main__":
    main()
