"""docker-compose.yml: it parses, and serves this checkout's repository with our models only."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml

from conftest import REPO


@pytest.mark.parametrize(
    "files", [["docker-compose.yml"], ["docker-compose.yml", "deploy/gpu.yml"]], ids=["cpu", "gpu"]
)
def test_docker_compose_accepts_the_file(files):
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    line = [program, *(part for file in files for part in ("-f", file)), "config", "-q"]
    answer = subprocess.run(line, cwd=REPO, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_triton_loads_the_ensemble_alone_and_its_version_stands_in_one_place():
    services = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]
    command = services["triton"]["command"]
    assert {"--model-control-mode=explicit", "--load-model=arcface"} <= set(command)
    assert "./model_repository:/models:ro" in services["triton"]["volumes"]
    for path in (REPO / "deploy").glob("*.yml"):  # laid over docker-compose.yml
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            assert "image" not in service, f"{path.name} pins {name} a second time"
