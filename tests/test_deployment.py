"""Compose file, images and manifests agree with the service and each other. Needs no engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import redis
import yaml

from benchmarks.image import Image, ignored, steps
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parent.parent
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cuda"]
KUBERNETES = "1.34"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: each for name, each in SERVICES.items() if "build" in each}
FIELDS = {f"NEUMETA_{name.upper()}" for name in Settings.model_fields}
BYTES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def seconds(text: str) -> float:
    """A compose duration of seconds."""
    assert re.fullmatch(r"\d+s", text), text
    return float(text[:-1])


def size(text: str) -> int:
    """A size as compose, Redis and Kubernetes write it: 512mb, 1g, 768Mi."""
    number, unit = re.fullmatch(r"(\d+)([kmg])(?:b|i)?", text.lower()).groups()  # type: ignore[union-attr]
    return int(number) * BYTES[unit]


def grace(environment: dict[str, str]) -> float:
    """The seconds a process may take from SIGTERM to its end, on this environment."""
    values = {key[len("NEUMETA_") :].lower(): value for key, value in environment.items()}
    settings = Settings(**values)  # type: ignore[arg-type]
    return settings.drain_seconds + settings.grace_seconds


def image(path: str) -> dict[str, str]:
    """The last argument of each instruction of a Dockerfile: what its final stage says."""
    return dict(steps(ROOT / path))


def environment(path: str) -> dict[str, str]:
    """ENV of a Dockerfile."""
    return dict(pair.split("=", 1) for pair in image(path)["ENV"].split())


def manifests() -> list[dict[str, Any]]:
    """Every Kubernetes object that ships."""
    files = sorted((ROOT / "docker/kubernetes").glob("*.yaml"))
    return [each for path in files for each in yaml.safe_load_all(path.read_text())]


def manifest(kind: str) -> Any:
    """The one object of this kind."""
    (found,) = [each for each in manifests() if each["kind"] == kind]
    return found


def pod() -> Any:
    """The pod that the deployment makes."""
    return manifest("Deployment")["spec"]["template"]["spec"]


# Compose


def test_a_bare_up_starts_the_cpu_and_a_profile_the_gpu() -> None:
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()
    assert {name: each.get("profiles") for name, each in SERVICES.items()} == {
        "service": ["cpu"],
        "service-cuda": ["cuda"],
        "redis": None,
        "prometheus": None,
        "grafana": None,
    }
    devices = OURS["service-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["driver"] == "nvidia" and devices[0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined_and_bounded(name: str) -> None:
    each = SERVICES[name]
    assert each["read_only"] is True
    assert each["cap_drop"] == ["ALL"]
    assert each["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:\d+", each["user"]), "root"
    assert size(each["mem_limit"]) <= 4 << 30 and each["pids_limit"] <= 256
    assert {"test", "interval", "timeout", "retries"} <= each["healthcheck"].keys()
    assert seconds(each["healthcheck"]["timeout"]) < seconds(each["healthcheck"]["interval"])
    assert seconds(each["stop_grace_period"]) > 0
    _, _, tag = each["image"].rpartition(":")
    assert re.match(r"v?\d+\.\d+\.\d+", tag), f"{each['image']} is not pinned"


def test_what_a_container_names_exists() -> None:
    for name, each in SERVICES.items():
        for other, how in each.get("depends_on", {}).items():
            assert other in SERVICES
            assert "profiles" not in SERVICES[other], f"{name} would not start without {other}"
            assert how["condition"] in ("service_started", "service_healthy")
        for network in each.get("networks", []):
            assert network == "default" or network in COMPOSE["networks"]
        for volume in each.get("volumes", []):
            source, target, *mode = volume.split(":")
            if not source.startswith("./"):
                assert source in COMPOSE["volumes"]
                continue
            assert mode == ["ro"] and target.startswith("/")
            path = source.removeprefix("./")
            assert (ROOT / path).exists(), f"{name} mounts {source}"
        if "build" in each:
            assert (ROOT / each["build"]["dockerfile"]).is_file()


def test_the_configuration_is_mounted_where_its_reader_looks() -> None:
    mounts = {
        volume.split(":")[1]
        for name in ("prometheus", "grafana")
        for volume in SERVICES[name]["volumes"]
    }
    assert mounts == {
        "/etc/prometheus/prometheus.yml",
        "/etc/prometheus/rules.yml",
        "/etc/grafana/provisioning",
        "/var/lib/grafana/dashboards",
        "/prometheus",
    }
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]


@pytest.mark.parametrize("name", OURS)
def test_the_service_is_given_settings_it_has_and_time_to_drain(name: str) -> None:
    each = OURS[name]
    path = each["build"]["dockerfile"]
    assert each["environment"].keys() <= FIELDS
    settings = environment(path) | {
        key: value for key, value in each["environment"].items() if "$" not in value
    }
    known = {key: value for key, value in settings.items() if key.startswith("NEUMETA_")}
    assert known.keys() <= FIELDS
    assert seconds(each["stop_grace_period"]) > grace(known)
    assert each["user"] == image(path)["USER"]
    assert size(each["mem_limit"]) > 2 * Settings().cache_bytes


@pytest.mark.parametrize("name", OURS)
def test_ports_and_names_agree_from_the_image_to_prometheus(name: str) -> None:
    each = OURS[name]
    exposed = image(each["build"]["dockerfile"])["EXPOSE"]
    assert int(exposed) == Settings.model_fields["port"].default
    assert each["ports"][0].endswith(f":{exposed}")
    assert "127.0.0.1:" in each["ports"][0], "published to the world by default"
    assert f"127.0.0.1:{exposed}/readyz" in each["healthcheck"]["test"][-1]
    config = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        for group in job.get("static_configs", [])
        for target in group["targets"]
    ]
    assert f"service:{exposed}" in targets
    assert "service" in each["networks"]["default"]["aliases"]
    address = each["environment"]["NEUMETA_REDIS_URL"].removeprefix("${NEUMETA_REDIS_URL:-")
    assert address == "redis://redis:6379/0}"
    assert "cache" in each["networks"] and SERVICES["redis"]["networks"] == ["cache"]
    assert COMPOSE["networks"]["cache"]["internal"] is True, "a Redis without a password"


def test_redis_takes_the_flags_and_is_a_bounded_cache(tmp_path: Path) -> None:
    """A real Redis, started as the compose file starts it."""
    command = SERVICES["redis"]["command"]
    program = shutil.which(command[0])
    if not program:
        pytest.skip("redis-server is not installed")
    socket = tmp_path / "redis.sock"
    flags = [program, *command[1:], "--port", "0", "--unixsocket", str(socket)]
    process = subprocess.Popen([*flags, "--logfile", str(tmp_path / "log")], cwd=tmp_path)
    try:
        wait = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
        missing = (redis.ConnectionError, FileNotFoundError)
        client = redis.Redis(unix_socket_path=str(socket), retry=wait, retry_on_error=list(missing))
        client.ping()
        told = dict(client.config_get("*"))
        client.close()
    finally:
        process.terminate()
        process.wait(20)
    assert told["maxmemory-policy"] == "allkeys-lru"
    assert (told["save"], told["appendonly"]) == ("", "no")
    limits = told["client-output-buffer-limit"].split()
    hard, soft, patience = map(int, limits[limits.index("normal") + 1 :][:3])
    assert hard > soft > Settings().max_file_bytes, "the largest value can never be read"
    assert 0 < patience <= 60
    room = int(told["maxmemory"]) + int(told["maxmemory-clients"])
    assert int(told["maxmemory-clients"]) > 0 and room < size(SERVICES["redis"]["mem_limit"])


# Images


@pytest.mark.parametrize("path", DOCKERFILES)
def test_an_image_runs_unprivileged_from_a_pinned_base_and_checks_its_health(path: str) -> None:
    bases = [rest.partition(" ")[0] for word, rest in steps(ROOT / path) if word == "FROM"]
    assert len(bases) == 2 and bases[0] == bases[1], "a venv is bound to its Python"
    assert re.search(r":\d+\.\d+\.\d+-slim", bases[0])
    last = image(path)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last["USER"])
    assert f"127.0.0.1:{last['EXPOSE']}/livez" in last["HEALTHCHECK"]
    assert json.loads(last["ENTRYPOINT"]) == ["/venv/bin/neumeta-serve"]
    assert environment(path)["NEUMETA_HOST"] == "0.0.0.0"
    order = [word for word, _ in steps(ROOT / path)]
    assert "RUN" not in order[order.index("USER") :]
    device = "cuda" if path.endswith("cuda") else "cpu"
    assert environment(path)["NEUMETA_DEVICE"] == device


def test_the_two_images_differ_in_torch_and_the_device_alone() -> None:
    texts = [
        [step for step in steps(ROOT / path) if step[0] not in ("ARG", "ENV")]
        for path in DOCKERFILES
    ]
    assert [step for step in texts[0] if not step[1].startswith("rm -rf")] == texts[1]
    indexes = [image(path)["ARG"] for path in DOCKERFILES]
    assert indexes[0].endswith("/whl/cpu") and not indexes[1].endswith("/cpu")
    cpu, cuda = (environment(path) for path in DOCKERFILES)
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"NEUMETA_DEVICE"}


@pytest.mark.parametrize("path", DOCKERFILES)
def test_the_build_gets_what_it_copies_and_nothing_else(path: str, tmp_path: Path) -> None:
    built = Image(tmp_path, "")
    for word, rest in steps(ROOT / path):
        if word == "FROM" and " AS " not in rest:
            break
        if word in ("FROM", "WORKDIR", "COPY"):
            built.execute(word, rest)
    app = tmp_path / "root/app"
    names = {file.relative_to(app).as_posix() for file in app.rglob("*") if file.is_file()}
    assert {"pyproject.toml", "constraints.txt", "README.md"} <= names
    for package in ("service", "neumeta"):
        code = {file.relative_to(ROOT).as_posix() for file in (ROOT / package).rglob("*.py")}
        assert code <= names
    assert {name for name in names if name.startswith("training/")} == {"training/__init__.py"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


def test_the_ignore_file_keeps_all_else_out_of_the_build() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    for kept in ("pyproject.toml", "service/app.py", "models/lenet-digits.safetensors"):
        assert not ignored(kept, patterns)
    for out in (
        ".git",
        ".env",
        "tests/conftest.py",
        "training/cli.py",
        "neumeta/__pycache__/a.pyc",
    ):
        assert ignored(out, patterns), out


def test_the_service_needs_no_training_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = re.compile(r"^[\w.-]+")
    extras = project["optional-dependencies"]
    wanted = {name.match(each)[0] for each in extras["service"] + project["dependencies"]}  # type: ignore[index]
    training = {name.match(each)[0] for each in extras["training"]}  # type: ignore[index]
    # Of the service's settings, and of recipes; and of the project itself its extra `torch`.
    assert wanted & training <= {"pydantic", "neumeta-serve"}
    assert "neumeta-serve[torch]" in extras["service"] and not training & {"torch"}
    imports = ["sklearn", "PIL", "tqdm", "tensorboard", "matplotlib", "scipy", "training"]
    code = f"import sys\nfor n in {imports}: sys.modules[n] = None\nimport service.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Kubernetes


def test_every_manifest_is_valid_and_names_no_namespace() -> None:
    kinds = []
    for each in manifests():
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        assert "namespace" not in each["metadata"]
        kinds.append(each["kind"])
    expected = ["Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"]
    assert sorted(kinds) == expected


def test_the_validator_refuses_what_it_should() -> None:
    for change in ({"replicas": "two"}, {"replica": 2}):
        bad = manifest("Deployment")
        bad["spec"] |= change
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(bad, KUBERNETES, strict=True)


def test_the_pod_is_confined_probed_and_has_time_to_drain() -> None:
    spec = pod()
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    user = f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
    assert user == image("docker/Dockerfile")["USER"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    plain = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert {each["name"] for each in container["env"]} <= FIELDS
    assert spec["terminationGracePeriodSeconds"] > grace(plain)
    probe = container["readinessProbe"]
    unready = probe["failureThreshold"] * probe["periodSeconds"] + probe["timeoutSeconds"]
    assert unready < float(plain["NEUMETA_DRAIN_SECONDS"]), "the port closes before it is known"
    (port,) = container["ports"]
    assert port["containerPort"] == int(image("docker/Dockerfile")["EXPOSE"])
    for name, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/livez")):
        assert container[f"{name}Probe"]["httpGet"] == {"path": path, "port": port["name"]}
    assert size(container["resources"]["limits"]["memory"]) > 2 * Settings().cache_bytes
    assert container["image"] == SERVICES["service"]["image"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert container["image"].endswith(f":{project['version']}")


def test_no_service_writes_into_the_pods_settings() -> None:
    """Kubernetes links every Service of the namespace into a pod, unless told not to."""
    spec = pod()
    (container,) = spec["containers"]
    assert spec["enableServiceLinks"] is False
    plain = {each["name"]: each.get("value") for each in container["env"]}
    assert plain["NEUMETA_PORT"] == str(container["ports"][0]["containerPort"])


def test_an_installed_wheel_finds_the_manifolds_that_ship(tmp_path: Path) -> None:
    copy, target = tmp_path / "copy", tmp_path / "target"
    shutil.copytree(ROOT / "neumeta", copy / "neumeta")
    for package in ("service", "training", "models"):
        shutil.copytree(ROOT / package, copy / package)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True, timeout=200)
    shutil.rmtree(copy)
    code = "from service.settings import Settings; print(*Settings().files(), sep='\\n')"
    elsewhere = {**os.environ, "PYTHONPATH": str(target)}

    def told() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True, timeout=60
        )

    found = told()
    assert found.returncode == 0, found.stderr
    names = {Path(line).name for line in found.stdout.splitlines()}
    assert names == {path.name for path in (ROOT / "models").glob("*.safetensors")}
    assert all(Path(line).is_relative_to(target) for line in told().stdout.splitlines())
    for path in target.rglob("*.safetensors"):
        path.unlink()
    assert "there are none in this installation" in told().stderr


def test_secrets_come_from_secrets_and_the_tokens_can_rotate() -> None:
    (container,) = pod()["containers"]
    values = {each["name"]: each for each in container["env"]}
    assert "secretKeyRef" in values["NEUMETA_REDIS_URL"]["valueFrom"]
    tokens = Path(values["NEUMETA_TOKENS_FILE"]["value"])
    (mount,) = [
        each for each in container["volumeMounts"] if each["mountPath"] == str(tokens.parent)
    ]
    assert "subPath" not in mount, "a subPath never sees the Secret change"
    (volume,) = [each for each in pod()["volumes"] if each["name"] == mount["name"]]
    assert not volume["secret"].get("optional"), "without tokens the service would be open"
    assert volume["secret"]["defaultMode"] == 0o440 and pod()["securityContext"]["fsGroup"]


def test_the_objects_point_at_each_other_and_the_autoscaler_at_gauges_of_the_service() -> None:
    deployment = manifest("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("Service")["spec"]["selector"] == labels
    (container,) = pod()["containers"]
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(container["ports"][0]["containerPort"])
    assert annotations["prometheus.io/path"] == "/metrics"
    scaler = manifest("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["minReplicas"] > manifest("PodDisruptionBudget")["spec"]["maxUnavailable"]
    assert "replicas" not in deployment["spec"], "every apply would undo the autoscaler"
    gauges = {each.name for each in Metrics().registry.collect() if each.type == "gauge"}
    asked = {each["pods"]["metric"]["name"] for each in scaler["metrics"]}
    assert asked and asked <= gauges
    adapter = (ROOT / "docs/deployment.md").read_text()
    assert all(name in adapter for name in asked)
