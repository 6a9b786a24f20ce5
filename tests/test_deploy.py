"""deploy/kubernetes: the manifests hang together, and a real tritonserver runs with what they give it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from arcface_build.serving.binary import TritonBinary
from arcface_clients import TritonEmbedder
from arcface_clients.checks.parity import count_drift
from arcface_clients.errors import ModelNotReady, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO

KUBERNETES = REPO / "deploy" / "kubernetes"
COMPONENTS = ("pvc", "servicemonitor")


@pytest.fixture(scope="module", params=["cpu", "gpu", "everything"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What kubectl makes of an overlay, by kind and name; `everything` is gpu with all components."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    folder = KUBERNETES / "overlays" / request.param
    if request.param == "everything":
        folder = tmp_path_factory.mktemp("overlay")
        here = Path(os.path.relpath(KUBERNETES, folder.resolve()))
        parts = {
            "resources": [str(here / "overlays" / "gpu")],
            "components": [str(here / "components" / name) for name in COMPONENTS],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {f"{each['kind']} {each['metadata']['name']}": each for each in yaml.safe_load_all(done.stdout)}


def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return objects["Deployment arcface"]["spec"]["template"]["spec"]


def container_of(deployment: dict[str, Any]) -> dict[str, Any]:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


@pytest.fixture(scope="module")
def container() -> dict[str, Any]:
    """The container as the base has it."""
    return container_of(yaml.safe_load((KUBERNETES / "base" / "deployment.yaml").read_text()))


def test_every_file_is_yaml_and_every_kustomization_names_files_that_exist() -> None:
    files = sorted(KUBERNETES.rglob("*.yaml"))
    assert len(files) > 8
    for file in files:
        for document in yaml.safe_load_all(file.read_text()):
            named = document.get("resources", []) if file.name == "kustomization.yaml" else []
            assert all((file.parent / name).exists() for name in named), file


def test_services_budget_and_autoscaler_find_the_pods(objects: dict[str, dict[str, Any]]) -> None:
    deployment = objects["Deployment arcface"]["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    ports = {port["name"] for port in container_of(objects["Deployment arcface"])["ports"]}
    for name in ("Service arcface", "Service arcface-pods"):
        assert objects[name]["spec"]["selector"].items() <= labels
        assert {port["targetPort"] for port in objects[name]["spec"]["ports"]} <= ports
    assert objects["Service arcface-pods"]["spec"]["clusterIP"] == "None"
    for selector in (deployment["selector"], objects["PodDisruptionBudget arcface"]["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels
    scaler = objects["HorizontalPodAutoscaler arcface"]
    assert scaler["apiVersion"] == "autoscaling/v2"
    assert f"{scaler['spec']['scaleTargetRef']['kind']} {scaler['spec']['scaleTargetRef']['name']}" in objects
    rule = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"][0]
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]


@pytest.mark.parametrize("objects", ["everything"], indirect=True)
def test_the_operators_scrape_job_has_the_name_that_the_rules_select(objects: dict[str, dict[str, Any]]) -> None:
    monitor, service = objects["ServiceMonitor arcface"], objects["Service arcface"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "arcface"
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_volumes_and_variables_of_the_container_are_there(objects: dict[str, dict[str, Any]]) -> None:
    container = container_of(objects["Deployment arcface"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod(objects)["volumes"]
    }
    (config,) = (each["configMapRef"]["name"] for each in container["envFrom"] if "configMapRef" in each)
    given = set(objects[f"ConfigMap {config}"]["data"]) | {"ARCFACE_ADMIN_KEY"}  # the key comes from the Secret
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= given


def test_secrets_are_referred_to_and_never_written(objects: dict[str, dict[str, Any]]) -> None:
    assert not any(name.startswith("Secret ") for name in objects)
    text = yaml.safe_dump_all(objects.values())
    assert "secretRef" in text and not re.search("ACCESS_KEY|ADMIN_KEY[^)]", text)


def test_the_image_is_the_base_that_the_dockerfile_pins(objects: dict[str, dict[str, Any]]) -> None:
    pinned = dict(re.findall(r"^ARG (\w+)=(\S+)$", (REPO / "Dockerfile").read_text(), re.MULTILINE))
    image = pinned["GPU_BASE"].replace("${TRITON_VERSION}", pinned["TRITON_VERSION"])
    assert container_of(objects["Deployment arcface"])["image"] == image


def test_requests_in_flight_have_time_to_finish(objects: dict[str, dict[str, Any]]) -> None:
    container = container_of(objects["Deployment arcface"])
    asleep_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    (drain_s,) = (int(part.split("=")[1]) for part in container["args"] if part.startswith("--exit-timeout-secs"))
    assert pod(objects)["terminationGracePeriodSeconds"] > asleep_s + drain_s
    compose = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]["triton"]
    assert int(compose["stop_grace_period"].rstrip("s")) > drain_s


def test_only_the_gpu_overlay_asks_for_gpu_and_tensorrt(objects: dict[str, dict[str, Any]], request: Any) -> None:
    gpu = "cpu" not in request.node.callspec.id
    container = container_of(objects["Deployment arcface"])
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == gpu
    (config,) = (each["data"] for name, each in objects.items() if name.startswith("ConfigMap "))
    assert config["ARCFACE_SERVE_BACKEND"] == ("tensorrt" if gpu else "onnx")
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_every_flag_is_one_of_tritonservers(container: dict[str, Any], triton_binary: TritonBinary) -> None:
    environment = {**os.environ, **triton_binary.environment}
    told = subprocess.run([triton_binary.path, "--help"], capture_output=True, text=True, env=environment)
    known = set(re.findall(r"^\s+(--[a-z0-9-]+) <", told.stdout + told.stderr, re.MULTILINE))
    program, *arguments = container["args"]
    assert program == "tritonserver"
    assert {argument.split("=")[0] for argument in arguments} <= known


def flags(container: dict[str, Any], **variables: str) -> list[str]:
    """The container's flags beside those that the test's own server has already, $(VARIABLES) filled in."""
    ours = ("--model-repository", "--model-control-mode", "--load-model", "--model-config-name")
    line = [part for part in container["args"][1:] if not part.startswith(ours)]
    return [re.sub(r"\$\((\w+)\)", lambda found: variables[found.group(1)], part) for part in line]


def test_a_real_server_with_these_flags_embeds_and_unloads_for_the_keys_owner_only(
    container: dict[str, Any], demo_repository: Path, start_triton: Callable[..., Any]
) -> None:
    server = start_triton(demo_repository, ["arcface"], guarded=False, extra=flags(container, ARCFACE_ADMIN_KEY="k3y"))
    with TritonEmbedder(server.grpc_url) as embedder:
        assert embedder.encode(synthetic_faces(3)).shape == (3, 512)
        assert embedder.shared_memory.kind is None  # guarded by the key as well
    assert not count_drift(server.grpc_url, synthetic_faces(1)), "there is no reference, as in the NGC image"
    for path in (container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")):
        assert post(f"http://{server.http_url}{path}", method="GET") == 200
    unload = f"http://{server.http_url}/v2/repository/models/arcface/unload"
    assert post(unload) == 403
    assert post(unload, {"admin-key": "k3y"}) == 200


def post(url: str, headers: dict[str, str] | None = None, method: str = "POST") -> int:
    request = urllib.request.Request(
        url, data=b"{}" if method == "POST" else None, headers=headers or {}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code


def test_sigterm_lets_the_request_in_flight_finish_and_takes_no_new_one(
    container: dict[str, Any], tmp_path: Path, start_triton: Callable[..., Any]
) -> None:
    from odd_models import write_model

    write_model(tmp_path / "repository", "slow")
    extra = flags(container, ARCFACE_ADMIN_KEY="k3y")
    server = start_triton(tmp_path / "repository", ["slow"], config_name="", guarded=False, extra=extra)
    slow = np.full((1, 112, 112, 3), 255, np.uint8)  # computes for two seconds
    answers: list[np.ndarray] = []
    with TritonEmbedder(server.grpc_url, "slow", retry_for_s=0) as embedder:
        embedder.ensure_ready()
        thread = threading.Thread(target=lambda: answers.append(embedder.encode(slow)))
        thread.start()
        time.sleep(0.3)
        os.kill(server.pid, 15)
        time.sleep(0.3)
        with (
            pytest.raises((ServerUnreachable, ModelNotReady)),
            TritonEmbedder(server.grpc_url, "slow", retry_for_s=0) as late,
        ):
            late.encode(slow)
        assert not answers, "it was still computing"
        thread.join(10)
    assert len(answers) == 1 and answers[0].shape == (1, 64)
    assert server.wait() == 0


def test_a_client_outlives_the_connections_that_the_server_ends(
    container: dict[str, Any], tmp_path: Path, start_triton: Callable[..., Any]
) -> None:
    from odd_models import write_model

    write_model(tmp_path / "repository", "good")
    lines = flags(container, ARCFACE_ADMIN_KEY="k3y")
    extra = [re.sub(r"(--grpc-max-connection-age)=\d+", r"\1=300", line) for line in lines]
    server = start_triton(tmp_path / "repository", ["good"], config_name="", guarded=False, extra=extra)
    faces = synthetic_faces(2)
    with TritonEmbedder(server.grpc_url, "good", retry_for_s=0, shared_memory=False) as embedder:
        first = embedder.encode(faces)
        until = time.monotonic() + 2.0
        while time.monotonic() < until:  # six connections or so
            np.testing.assert_allclose(embedder.encode(faces), first, atol=1e-6)


def test_rules_become_a_prometheusrule_by_the_documented_line(tmp_path: Path) -> None:
    page = (REPO / "docs" / "operations.md").read_text()
    (line,) = re.findall(r"^ +(\(printf .+\)) \| kubectl apply -f -$", page, re.MULTILINE)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=REPO, check=True)
    rule = yaml.safe_load(done.stdout)
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == yaml.safe_load((REPO / "deploy" / "prometheus" / "rules.yml").read_text())


def test_grafana_finds_what_docker_compose_mounts() -> None:
    mounts = dict(
        volume.split(":")[:2]
        for volume in yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]["grafana"]["volumes"]
    )
    (provider,) = yaml.safe_load((REPO / "deploy/grafana/provisioning/dashboards/arcface.yml").read_text())["providers"]
    (source,) = yaml.safe_load((REPO / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    dashboard = json.loads((REPO / "deploy/grafana/dashboards/arcface.json").read_text())
    variable = dashboard["templating"]["list"][0]
    assert (variable["type"], variable["current"]["value"]) == ("datasource", source["uid"])
    assert {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]} == {
        "${datasource}"
    }
