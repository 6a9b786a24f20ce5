"""deploy/prometheus and deploy/grafana: what they ask of Triton, on a real Prometheus beside a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients import TritonEmbedder
from arcface_clients.checks.parity import count_drift
from arcface_clients.errors import ConfigError
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO
from deadlines import HANG_S

PROMETHEUS = REPO / "deploy" / "prometheus"
DASHBOARD = REPO / "deploy" / "grafana" / "dashboards" / "arcface.json"
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
GPU_ONLY = "nv_gpu_"  # Triton prints these on a host with a GPU


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install prometheus)")
    return path


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([program("promtool"), *map(str, arguments)], capture_output=True, text=True, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def panel_expressions() -> list[tuple[str, str]]:
    """(panel title, expression) of the dashboard, its variables filled in as for one minute and all servers."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    pairs = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
    return [(title, expr.replace("$__rate_interval", "1m").replace("$instance", ".*")) for title, expr in pairs]


def test_promtool_accepts_configuration_and_rules() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_and_keeps_silent_where_it_should() -> None:
    promtool("test", "rules", "rules_test.yml")
    cases = [
        case
        for test in yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for alert in ALERTS:
        outcomes = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert}
        assert outcomes == {True, False}, f"{alert} needs a case in which it fires and one in which it does not"


def test_an_alert_that_never_fires_is_caught_by_its_case(tmp_path: Path) -> None:
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule):
        rule["expr"] = "vector(0) > 1"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(PROMETHEUS / "rules_test.yml", tmp_path)
    line = [program("promtool"), "test", "rules", str(tmp_path / "rules_test.yml")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert set(re.findall(r"alertname: (\w+), time", done.stdout + done.stderr)) == set(ALERTS)


def test_operations_page_says_of_every_alert_what_to_do() -> None:
    page = (REPO / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^\| `(Arcface\w+)` \|", page, re.MULTILINE)) == set(ALERTS)


class Prometheus:
    """A real Prometheus that scrapes one server every second, with our configuration otherwise."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["scrape_configs"][0]["static_configs"] = [
            {"targets": [target], "labels": {"namespace": "faces", "pod": "arcface-0"}}  # as in Kubernetes
        ]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(PROMETHEUS / "rules.yml", folder)
        self.url = f"http://127.0.0.1:{free_ports().http}"
        line = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        line += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"]
        self._log = (folder / "log").open("wb")
        self._child = subprocess.Popen(line, stdout=self._log, stderr=subprocess.STDOUT)

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=HANG_S) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        return [float(row["value"][1]) for row in self.get("query", query=expression)["result"]]

    def wait_for(self, expression: str, timeout_s: float = HANG_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if self.values(expression):
                    return
            except OSError:  # it does not listen yet
                pass
            time.sleep(0.1)
        raise AssertionError(f"nothing came for {expression} in {timeout_s} s")

    def stop(self) -> None:
        self._child.terminate()
        self._child.wait(HANG_S)
        self._log.close()


@pytest.fixture(scope="module")
def prometheus(server: TritonProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen faces through `arcface`, drift counted, and one request that failed."""
    running = Prometheus(tmp_path_factory.mktemp("prometheus"), server.metrics_url.split("/")[2])
    try:
        running.wait_for('up{job="arcface"} == 1')
        faces = synthetic_faces(8)
        with TritonEmbedder(server.grpc_url) as embedder:
            embedder.encode(faces)
        count(server, "--count")
        broken_reference(server, faces)
        scrapes = sum(running.values("count_over_time(up[5m])"))
        running.wait_for(f"sum(count_over_time(up[5m])) >= {scrapes + 3}")  # the last request is in them
        running.wait_for("arcface:queue_ms:mean5m and on () arcface:drifted_faces:increase1h")  # the rules have run
        yield running
    finally:
        running.stop()


def count(server: TritonProcess, *options: str) -> Any:
    from arcface_build.commands.parity import command

    return CliRunner().invoke(command, ["--url", server.grpc_url, *options], standalone_mode=False)


def broken_reference(server: TritonProcess, faces: np.ndarray) -> None:
    """Hand NaN rows to embedding_drift, as a broken plan would."""
    import tritonclient.grpc as triton

    reference = np.ones((len(faces), 512), np.float32)
    tensors = []
    for name, rows in (("reference", reference), ("onnx", reference * np.nan)):
        tensors.append(triton.InferInput(name, rows.shape, "FP32"))
        tensors[-1].set_data_from_numpy(rows)
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.infer("embedding_drift", tensors)


@pytest.mark.parametrize(("title", "expression"), panel_expressions(), ids=lambda value: value[:40])
def test_every_panel_shows_what_a_real_server_prints(prometheus: Prometheus, title: str, expression: str) -> None:
    values = prometheus.values(expression)
    if GPU_ONLY in expression or title == "Failures":  # no GPU here, and nothing failed
        return
    if "arcface_photo" in expression:  # this server takes none: tests/test_photo_faces.py
        return
    assert values and not np.isnan(values).all(), f"{title}: {values}"


def test_faces_queue_and_batches_are_counted(prometheus: Prometheus) -> None:
    of = dict(panel_expressions())
    assert prometheus.values(of["Faces a second"])[0] > 0
    assert max(prometheus.values(of["Batch size"])) > 1
    assert prometheus.values('arcface:queue_ms:mean5m{model="arcface_onnx"}')[0] >= 0
    assert prometheus.values('nv_inference_request_summary_us{model="arcface", quantile="0.99"}')[0] > 0


def test_rows_that_are_no_numbers_count_as_drift_and_raise_the_alert(prometheus: Prometheus) -> None:
    prometheus.wait_for('ALERTS{alertname="ArcfaceDrift", backend="onnx"}')
    assert prometheus.values('arcface_drift_bucket{backend="onnx", le="+Inf"}') == [40.0]  # 32 exact ones, 8 broken
    assert prometheus.values('arcface_drift_bucket{backend="onnx", le="0.1"}') == [32.0]
    firing = [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
    assert [alert["labels"]["alertname"] for alert in firing] == ["ArcfaceDrift", "ArcfaceDemoWeights"]


def test_drift_is_counted_over_grpc_only_and_says_so() -> None:
    with pytest.raises(ConfigError, match=r"over gRPC only; got http://host:8000\. Give the gRPC port"):
        count_drift("http://host:8000", synthetic_faces(1))


@pytest.mark.parametrize("alert", ALERTS)
def test_the_metrics_of_every_alert_exist(prometheus: Prometheus, alert: str) -> None:
    metrics = set(re.findall(r"\b(?:nv|up|arcface)[a-z_:0-9]*(?=\{|\s)", ALERTS[alert]["expr"])) - {"up"}
    for metric in metrics:
        if not metric.startswith(GPU_ONLY):
            assert prometheus.values(metric), metric


def test_the_autoscalers_metric_is_a_number_for_each_pod(prometheus: Prometheus) -> None:
    rule = yaml.safe_load((REPO / "deploy" / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"][0]
    assert prometheus.get("series", **{"match[]": rule["seriesQuery"]})
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
    query = query.replace("<<.LabelMatchers>>", 'namespace="faces",pod=~"arcface-0|arcface-1"')
    (row,) = prometheus.get("query", query=query)["result"]
    assert row["metric"] == {"pod": "arcface-0"} and float(row["value"][1]) >= 0
    prometheus.wait_for(f"({query.replace('[2m]', '[2s]')}) == 0")  # asked nothing: a zero, not NaN
