"""docker-compose.yml: it parses, serves without rights to what it serves, and fetches this GPU's plans before that."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPO
from plan_samples import in_cache, spec
from tiny_model import write_model

KEYS = ("ARCFACE_ADMIN_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize(
    "files", [["docker-compose.yml"], ["docker-compose.yml", "deploy/gpu.yml"]], ids=["cpu", "gpu"]
)
def test_docker_compose_accepts_the_file(files):
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    line = [program, *(part for file in files for part in ("-f", file)), "config", "-q"]
    keys = {name: "k3y-of-the-test" for name in KEYS} | {"ARCFACE_LOCAL__MODEL": "r50"}
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


@pytest.mark.parametrize("name", ["triton", "arcface", "puller", "minio", "prometheus", "grafana"])
def test_every_container_runs_without_rights(name):
    service = services("docker-compose.yml", "deploy/gpu.yml")[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]  # no seccomp=unconfined: Docker's own profile holds
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & set(service)
    users = {"minio": None, "prometheus": "65534:65534", "grafana": "472:0"}  # MinIO's volume belongs to root
    assert service.get("user") == users.get(name, "1000:1000")
    assert all("/var/run" not in volume for volume in service["volumes"])


def test_only_what_has_business_with_each_other_is_on_one_network():
    networks = {name: set(one["networks"]) for name, one in services("docker-compose.yml", "deploy/gpu.yml").items()}
    del networks["arcface"]  # a command by hand: asks the server, and the store
    neighbours = {frozenset((a, b)) for a in networks for b in networks if a < b and networks[a] & networks[b]}
    pairs = [("prometheus", "triton"), ("grafana", "prometheus"), ("minio", "puller")]
    assert neighbours == {frozenset(pair) for pair in pairs}


def test_no_file_of_deploy_holds_a_password():
    text = "".join(path.read_text() for path in [REPO / "docker-compose.yml", *(REPO / "deploy").rglob("*.y*ml")])
    given = re.findall(r"(?i)^\s*-?\s*\w*(?:password|secret_access_key|admin_key)\w*\s*[:=]\s*(.+)$", text, re.M)
    assert given and all(value.startswith(("${", "$(")) and ":-" not in value for value in given), given


def test_triton_has_its_administration_restricted_and_may_not_write_what_it_serves():
    triton = services("docker-compose.yml")["triton"]
    # `arcface serve` restricts it with this key (tests/attacks/test_admin_apis.py); the image has no other command.
    assert triton["environment"]["ARCFACE_ADMIN_KEY"].startswith("${ARCFACE_ADMIN_KEY:?")
    assert "command" not in triton
    assert triton["volumes"] == ["${ARCFACE_DATA:-arcface}:/srv/arcface:ro", "./deploy/tls:/tls:ro"]
    assert triton["environment"]["ARCFACE_SERVE_TLS_CERT"] == "${ARCFACE_TLS_CERT:-}", "gRPC can be encrypted"
    assert (REPO / "deploy" / "tls" / ".gitignore").exists()


def test_the_version_of_triton_stands_in_one_place():
    named = [path for path in ("Dockerfile", "docker-compose.yml", "deploy/gpu.yml") if "tritonserver:" in read(path)]
    assert named == ["Dockerfile"]
    for path in (REPO / "deploy").glob("*.yml"):  # laid over docker-compose.yml
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            assert service.get("image", "arcface-triton:").startswith("arcface-triton:"), f"{path.name} pins {name}"


def test_plans_are_pulled_before_triton_starts():
    merged = services("docker-compose.yml", "deploy/gpu.yml")
    assert merged["triton"]["depends_on"] == {"puller": {"condition": "service_completed_successfully"}}
    assert merged["triton"]["build"]["target"] == merged["puller"]["build"]["target"] == "gpu"
    (data,) = merged["puller"]["volumes"]
    assert merged["triton"]["volumes"][0] == f"{data}:ro", "it writes where Triton reads"


def test_the_puller_installs_what_the_store_has_for_this_gpu_and_again_nothing(tmp_path, fake_host):
    fake_host()  # an A10
    model = write_model(tmp_path / "models" / "tiny")
    facts = {"contract_id": json.loads((model / "manifest.json").read_text())["contract_id"]}
    facts["drift"] = {"max_drift": 1e-4, "faces": 64}
    for sm in ("8.6", "8.9"):
        in_cache(tmp_path / "store", spec(sm=sm), **facts)

    def pulled(store: Path) -> subprocess.CompletedProcess[str]:
        line = [word.replace("$$", "$") for word in services("deploy/gpu.yml")["puller"]["command"]]
        code = "#!/bin/sh\nexec " + shlex.join([sys.executable, "-m", "arcface_build"]) + ' "$@"\n'
        (tmp_path / "arcface").write_text(code)
        (tmp_path / "arcface").chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "ARCFACE_PLAN_STORE": str(store),
            "ARCFACE_PRECISION": "fp16",
            "ARCFACE_LOCAL__MODEL": "tiny",
            "ARCFACE_STORAGE__CACHE": str(tmp_path / "cache"),
        }
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    for _ in range(2):
        done = pulled(tmp_path / "store")
        assert done.returncode == 0, done.stderr
        assert "arcface_trt: version 1 is tiny" in done.stdout
    served = tmp_path / "model_repository" / "arcface_trt"
    assert [path.name for path in sorted(served.glob("*/*.plan"))] == ["sm86.plan"]

    in_cache(tmp_path / "other", spec(sm="8.9"), **facts)
    done = pulled(tmp_path / "other")
    assert done.returncode == 3 and "no fp16 plan for SM 8.6" in done.stderr
    assert [path.name for path in sorted(served.glob("*/*.plan"))] == ["sm86.plan"]


def read(path: str) -> str:
    return (REPO / path).read_text()


def services(*files: str) -> dict[str, dict]:
    """Services by name; a later file's keys replace those of an earlier one."""
    merged: dict[str, dict] = {}
    for file in files:
        for name, service in yaml.safe_load(read(file))["services"].items():
            merged[name] = {**merged.get(name, {}), **service}
    return merged
