"""What an arm64 host gets: everything but a tritonserver and OpenVINO, and a sentence where it asks for those."""

from __future__ import annotations

import platform

import pytest
from packaging.requirements import Requirement

from arcface_build.serving.binary import find_tritonserver
from arcface_clients.errors import Missing
from conftest import REPO

ONLY_X86_64 = {"nvidia-pytriton", "nvidia-cuda-runtime-cu12", "onnxruntime-openvino"}


def requirements(extra: str, host: dict[str, str]) -> set[str]:
    """Names of the packages that an extra installs on such a host, those of the extras in it included."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    names: set[str] = set()
    for text in [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])]:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate(host):
            continue
        if wanted.name == project["name"]:
            names = names.union(*(requirements(part, host) for part in wanted.extras))
        else:
            names.add(wanted.name)
    return names


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize(
    "extra", ["", "config", "http", "images", "cli", "bulk", "build", "serve", "store", "evidence"]
)
def test_an_extra_asks_for_nothing_that_arm64_does_not_have(extra, system):
    extra = extra.strip("-")  # a client needs none
    machine = "aarch64" if system == "linux" else "arm64"
    host = {"platform_machine": machine, "sys_platform": system, "python_version": "3.11"}
    assert requirements(extra, host) & ONLY_X86_64 == set()
    x86_64 = {"platform_machine": "x86_64", "sys_platform": "linux", "python_version": "3.11"}
    assert ("nvidia-pytriton" in requirements(extra, x86_64)) == (extra == "serve")


def test_openvino_has_no_wheel_for_it_so_that_pip_says_so():
    host = {"platform_machine": "aarch64", "sys_platform": "linux", "python_version": "3.11"}
    assert "onnxruntime-openvino" in requirements("openvino", host)


@pytest.mark.parametrize(("system", "machine"), [("Linux", "aarch64"), ("Darwin", "arm64")])
def test_serve_on_a_host_for_which_no_wheel_holds_a_tritonserver_names_what_does(monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Missing, match=f"a wheel brings is for Linux x86_64; this is {system} {machine}. Use an image"):
        find_tritonserver()
