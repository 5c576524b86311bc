"""A real Prometheus scrapes a real service: every query of the dashboard and of the rules has data."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.local import RedisServer, free_port, replicas

ROOT = Path(__file__).parent.parent.parent
RULES = yaml.safe_load((ROOT / "docker/rules.yml").read_text())
DASHBOARD = json.loads((ROOT / "docker/grafana/dashboards/neumeta.json").read_text())
ALL_RULES = [rule for group in RULES["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]

needed = pytest.mark.skipif(
    not all(map(shutil.which, ("prometheus", "promtool", "redis-server"))),
    reason="needs prometheus, promtool and redis-server (Debian: prometheus, redis-server)",
)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus after a scripted load: hits, misses, errors, a reload, two scrapes a second."""
    folder = tmp_path_factory.mktemp("prometheus")
    redis = RedisServer(folder)
    port = free_port()
    flags = ("--redis-url", redis.url)
    try:
        with replicas(1, ROOT / "models", *flags) as (service,):
            given = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())
            given["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
            given["rule_files"] = [str(ROOT / "docker/rules.yml")]
            given["scrape_configs"][0]["static_configs"][0]["targets"] = [
                f"127.0.0.1:{service.port}"
            ]
            config = folder / "prometheus.yml"
            config.write_text(yaml.safe_dump(given))
            command = [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder}/data",
            ]
            process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                    until_scraped(client)
                    load(service.port, service.process.pid)
                    time.sleep(1)
                    yield client
            finally:
                process.terminate()
                process.wait(20)
    finally:
        redis.kill()


def until_scraped(client: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError, ValueError):
            if ask(client, "neumeta_ready"):
                return
        time.sleep(0.1)
    raise AssertionError("Prometheus did not scrape the service within 30 s")


def load(port: int, pid: int) -> None:
    """Five seconds of everything, so that every counter moves between two scrapes."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for step in range(10):
            for path in (
                f"/weights/lenet?width={0.3 + step / 20}",
                "/weights/resnet20?width=0.5",
                "/weights/resnet20?width=nan",
                "/nowhere",
                "/models",
            ):
                client.get(path)
            if step == 5:
                os.kill(pid, signal.SIGHUP)
            time.sleep(0.5)


def ask(client: httpx.Client, query: str) -> list[Any]:
    answer = client.get("/api/v1/query", params={"query": query})
    assert answer.status_code == 200, f"{query}: {answer.json()['error']}"
    found: list[Any] = answer.json()["data"]["result"]
    return found


def panel_queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*")
            assert "$" not in query, query
            yield panel["title"], query


@needed
def test_every_panel_has_data(prometheus: httpx.Client) -> None:
    for title, query in panel_queries():
        assert ask(prometheus, query), f"{title}: no data for {query}"
    # and the figures are those of the load, not merely there
    (hits,) = ask(prometheus, 'neumeta_cache_answers_total{tier="memory"}')
    assert float(hits["value"][1]) == 9  # resnet20, all but the first
    (reloads,) = ask(prometheus, 'neumeta_reloads_total{outcome="ok"}')
    assert float(reloads["value"][1]) == 1
    (ready,) = ask(prometheus, "sum(neumeta_ready)")
    assert float(ready["value"][1]) == 1


@needed
def test_every_rule_is_loaded_and_has_data(prometheus: httpx.Client) -> None:
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    loaded = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(loaded) == {rule.get("alert") or rule["record"] for rule in ALL_RULES}
    for name, rule in loaded.items():
        assert rule["health"] == "ok", f"{name}: {rule.get('lastError')}"
    for rule in ALL_RULES:
        for part in rule["expr"].split(" and "):  # a threshold hides healthy data
            query = re.sub(r"\s[<>]=?\s[\d.]+$", "", part).replace("5m]", "10s]")
            assert ask(prometheus, query), f"{rule.get('alert') or rule['record']}: {query}"


@needed
def test_the_rules_pass_their_own_tests() -> None:
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=ROOT / "docker", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_runbook() -> None:
    headings = re.findall(r"^## (\S+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")


def test_every_metric_is_on_the_dashboard() -> None:
    from service.metrics import Metrics

    text = json.dumps(DASHBOARD)
    for family in Metrics().registry.collect():
        if family.name.startswith("neumeta_"):
            assert family.name in text, family.name
