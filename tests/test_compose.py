"""docker-compose.yml: it parses, and serves this checkout's repository with our models only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import yaml

from arcface_build.serving.guard import RESTRICTED
from conftest import REPO

KEYS = ("ARCFACE_ADMIN_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize(
    "files", [["docker-compose.yml"], ["docker-compose.yml", "deploy/gpu.yml"]], ids=["cpu", "gpu"]
)
def test_docker_compose_accepts_the_file(files):
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    line = [program, *(part for file in files for part in ("-f", file)), "config", "-q"]
    keys = {name: "k3y-of-the-test" for name in KEYS}
    answer = subprocess.run(line, cwd=REPO, capture_output=True, text=True, env={**os.environ, **keys})
    assert answer.returncode == 0, answer.stderr
    for name in KEYS:
        without = {**os.environ, **keys, name: ""}
        answer = subprocess.run(line, cwd=REPO, capture_output=True, text=True, env=without)
        assert answer.returncode != 0 and name in answer.stderr, f"{name} has a default"


def test_nothing_but_grpc_can_be_reached_from_elsewhere_and_that_only_on_request():
    services = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 7
    assert {port for port in ports if not port.startswith("127.0.0.1:")} == {"${ARCFACE_BIND:-127.0.0.1}:8001:8001"}


@pytest.mark.parametrize("name", ["triton", "minio", "prometheus", "grafana"])
def test_every_container_runs_without_rights(name):
    service = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"][name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]  # no seccomp=unconfined: Docker's own profile holds
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & set(service)
    users = {"triton": "1000:1000", "prometheus": "65534:65534", "grafana": "472:0"}
    assert service.get("user") == users.get(name)  # MinIO's volume belongs to root
    assert all("/var/run" not in volume for volume in service["volumes"])


def test_only_what_has_business_with_each_other_is_on_one_network():
    services = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]
    networks = {name: set(service["networks"]) for name, service in services.items()}
    neighbours = {frozenset((a, b)) for a in networks for b in networks if a < b and networks[a] & networks[b]}
    assert neighbours == {frozenset(("prometheus", "triton")), frozenset(("grafana", "prometheus"))}


def test_no_file_of_deploy_holds_a_password():
    text = "".join(path.read_text() for path in [REPO / "docker-compose.yml", *(REPO / "deploy").rglob("*.y*ml")])
    given = re.findall(r"(?i)^\s*-?\s*\w*(?:password|secret_access_key|admin_key)\w*\s*[:=]\s*(.+)$", text, re.M)
    assert given and all(value.startswith(("${", "$(")) and ":-" not in value for value in given), given


def test_tritons_administration_is_restricted_and_its_grpc_can_be_encrypted():
    triton = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]["triton"]
    assert "--grpc-use-ssl=${ARCFACE_GRPC_TLS:-false}" in triton["command"]
    assert "./deploy/tls:/tls:ro" in triton["volumes"] and (REPO / "deploy" / "tls" / ".gitignore").exists()
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        assert any(
            line.startswith(f"{option}={RESTRICTED}:admin-key=${{ARCFACE_ADMIN_KEY:?") for line in triton["command"]
        )


def test_triton_loads_the_ensemble_alone_and_its_version_stands_in_one_place():
    services = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]
    command = services["triton"]["command"]
    assert {"--model-control-mode=explicit", "--load-model=arcface"} <= set(command)
    assert "./model_repository:/models:ro" in services["triton"]["volumes"]
    for path in (REPO / "deploy").glob("*.yml"):  # laid over docker-compose.yml
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            assert "image" not in service, f"{path.name} pins {name} a second time"
