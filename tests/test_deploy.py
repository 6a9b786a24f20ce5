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
from arcface_build.serving.guard import RESTRICTED
from arcface_clients import Tls, TritonEmbedder
from arcface_clients.checks.parity import count_drift
from arcface_clients.errors import ModelNotReady, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO
from deadlines import HANG_S

KUBERNETES = REPO / "deploy" / "kubernetes"
COMPONENTS = ("pvc", "servicemonitor", "mutual-tls")


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


def test_pods_run_without_rights_and_can_write_only_where_they_must(objects: dict[str, dict[str, Any]]) -> None:
    whole, container = pod(objects), container_of(objects["Deployment arcface"])
    assert whole["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert whole["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(whole)
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/dev/shm", "/tmp"}


def test_http_is_for_the_pod_itself_and_grpc_is_encrypted(objects: dict[str, dict[str, Any]]) -> None:
    container = container_of(objects["Deployment arcface"])
    line = dict(part.partition("=")[::2] for part in container["args"])
    assert line["--http-address"] == "127.0.0.1"
    assert line["--grpc-use-ssl"] == "$(ARCFACE_GRPC_TLS)"
    (config,) = (each["data"] for name, each in objects.items() if name.startswith("ConfigMap "))
    assert config["ARCFACE_GRPC_TLS"] == "true"
    (secret,) = (volume["secret"] for volume in pod(objects)["volumes"] if volume["name"] == "tls")
    assert secret["secretName"] == "arcface-tls" and "optional" not in secret
    assert [port["name"] for port in container["ports"]] == ["grpc", "metrics"]
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        assert line[option] == f"{RESTRICTED}:admin-key=$(ARCFACE_ADMIN_KEY)"


def test_only_embedding_pods_reach_grpc_and_only_prometheus_reaches_the_metrics(
    objects: dict[str, dict[str, Any]],
) -> None:
    policy = objects["NetworkPolicy arcface"]["spec"]
    labels = objects["Deployment arcface"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    allowed = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
    assert len(policy["ingress"]) == 2 and all(len(rule["ports"]) == 1 for rule in policy["ingress"])
    (embedding,), (watching,) = allowed["grpc"], allowed["metrics"]
    assert embedding == {
        "podSelector": {"matchExpressions": [{"key": "arcface-client", "operator": "In", "values": ["true"]}]}
    }
    assert watching["podSelector"]["matchExpressions"][0]["values"] == ["prometheus"]


def test_pods_ask_for_names_and_their_repository_and_never_for_the_clouds_credentials(
    objects: dict[str, dict[str, Any]], request: Any
) -> None:
    policy = objects["NetworkPolicy arcface"]["spec"]
    if "everything" in request.node.callspec.id:  # the repository is on a volume
        assert "egress" not in policy and "Egress" in policy["policyTypes"]
        return
    names, repository = policy["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert [port["port"] for port in repository["ports"]] == [443]
    assert repository["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]


def test_mutual_tls_and_a_mesh_of_ones_own_are_components(tmp_path: Path, objects: dict[str, dict[str, Any]]) -> None:
    here = Path(os.path.relpath(KUBERNETES, tmp_path.resolve()))
    for name in ("mutual-tls", "plain-grpc"):
        parts = {"resources": [str(here / "overlays" / "cpu")], "components": [str(here / "components" / name)]}
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
        done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
        mutual = {"--grpc-use-ssl-mutual=true", "--grpc-root-cert=/tls/ca.crt"} <= set(
            container_of(made["Deployment"])["args"]
        )
        volumes = {volume["name"]: volume for volume in made["Deployment"]["spec"]["template"]["spec"]["volumes"]}
        plain = made["ConfigMap"]["data"]["ARCFACE_GRPC_TLS"] == "false" and volumes["tls"]["secret"].get("optional")
        assert (mutual, bool(plain)) == ((True, False) if name == "mutual-tls" else (False, True))


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


def flags(container: dict[str, Any], tls: Path | None = None) -> list[str]:
    """The container's flags beside those that the test's own server has already, with its variables and its Secret.

    Its addresses are those of a pod; a test's server stays on this host.
    """
    ours = ("--model-repository", "--model-control-mode", "--load-model", "--model-config-name", "--metrics-address")
    variables = {"ARCFACE_ADMIN_KEY": "k3y", "ARCFACE_GRPC_TLS": "true" if tls else "false"}
    line = [part for part in container["args"][1:] if not part.startswith(ours)]
    line = [re.sub(r"\$\((\w+)\)", lambda found: variables[found.group(1)], part) for part in line]
    return [part.replace("=/tls/", f"={tls}/") if tls else part for part in line]


def test_a_real_server_with_these_flags_embeds_and_unloads_for_the_keys_owner_only(
    container: dict[str, Any], demo_repository: Path, start_triton: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    from certificates import Authority

    authority = Authority(tmp_path / "secret")
    authority.sign("tls", ("arcface", "localhost")).rename(tmp_path / "secret" / "tls.crt")
    server = start_triton(demo_repository, ["arcface"], guarded=False, extra=flags(container, tmp_path / "secret"))
    url, access = f"grpcs://localhost:{server.ports.grpc}", {"tls": Tls(tmp_path / "secret" / "ca.pem")}
    with TritonEmbedder(url, **access) as embedder:
        assert embedder.encode(synthetic_faces(3)).shape == (3, 512)
        assert embedder.shared_memory.kind is None  # guarded by the key as well
    assert not count_drift(url, synthetic_faces(1), access=access), "there is no reference, as in the NGC image"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        *curl, place = container[probe]["exec"]["command"]
        assert curl[0] == "curl" and int(curl[-1]) < container[probe]["timeoutSeconds"]
        assert post(place.replace("127.0.0.1:8000", server.http_url), method="GET") == 200
    unload = f"http://{server.http_url}/v2/repository/models/arcface/unload"
    assert post(unload) == 403
    assert post(unload, {"admin-key": "k3y"}) == 200


def post(url: str, headers: dict[str, str] | None = None, method: str = "POST") -> int:
    request = urllib.request.Request(
        url, data=b"{}" if method == "POST" else None, headers=headers or {}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=HANG_S) as answer:
            return answer.status
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code


def test_sigterm_lets_the_request_in_flight_finish_and_takes_no_new_one(
    container: dict[str, Any], tmp_path: Path, start_triton: Callable[..., Any]
) -> None:
    from odd_models import MARKED, held, write_model

    repository = tmp_path / "repository"
    write_model(repository, "slow")
    extra = flags(container)
    server = start_triton(repository, ["slow"], config_name="", guarded=False, extra=extra)
    answers: list[np.ndarray] = []
    with TritonEmbedder(server.grpc_url, "slow", retry_for_s=0) as embedder:
        embedder.ensure_ready()
        thread = threading.Thread(target=lambda: answers.append(embedder.encode(MARKED)))
        with held(repository) as wait_until_begun:
            thread.start()
            wait_until_begun()
            os.kill(server.pid, 15)
            time.sleep(0.3)
            with (
                pytest.raises((ServerUnreachable, ModelNotReady)),
                TritonEmbedder(server.grpc_url, "slow", retry_for_s=0) as late,
            ):
                late.encode(MARKED)
            assert not answers, "it was still computing"
        thread.join(HANG_S)
    assert len(answers) == 1 and answers[0].shape == (1, 64)
    assert server.wait() == 0


def test_a_client_outlives_the_connections_that_the_server_ends(
    container: dict[str, Any], tmp_path: Path, start_triton: Callable[..., Any]
) -> None:
    from odd_models import write_model

    write_model(tmp_path / "repository", "good")
    lines = flags(container)
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
