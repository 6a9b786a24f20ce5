"""The container: its cpu target is built here, on a Debian made for the purpose, and serves; skipped without buildah.

debootstrap stands in for the base image that the Dockerfile names, which only an engine with a registry can fetch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arcface_build.repository.hand_written import hand_written
from arcface_build.serving.ports import Ports, free_ports
from arcface_clients import TritonEmbedder
from conftest import REPO

BASE, IMAGE = "localhost/arcface-test-base", "localhost/arcface-test"
AUTHORITIES = "etc/ssl/certs/ca-certificates.crt"  # in Debian


class Buildah:
    """buildah with a storage of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = ["--storage-driver", "vfs", "--root", str(folder / "root"), "--runroot", str(folder / "run")]

    def line(self, command: str, *arguments: object) -> list[str]:
        return ["buildah", command, *self.places, *map(str, arguments)]

    def __call__(self, command: str, *arguments: object, timeout_s: float = 300) -> str:
        done = subprocess.run(
            self.line(command, *arguments), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"buildah {command}: {(done.stdout + done.stderr)[-4000:]}"
        return done.stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Buildah, str]]:
    """The cpu target, and a container of it."""
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"an image is built by root, with {' and '.join(missing) or 'buildah and debootstrap'}")
    folder = tmp_path_factory.mktemp("container")
    rootfs = folder / "rootfs"
    line = ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", rootfs]
    made = subprocess.run(line, capture_output=True, text=True, timeout=900, check=False)
    if made.returncode:
        pytest.skip(f"no Debian to be had: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    if Path("/", AUTHORITIES).is_file():  # those of this host: its network may have one of its own
        shutil.copyfile(Path("/", AUTHORITIES), rootfs / AUTHORITIES)
    (folder / "pip.conf").write_text(f"[global]\ncert = /{AUTHORITIES}\n")
    buildah = Buildah(folder)
    try:
        scratch = buildah("from", "scratch")
        subprocess.run(["tar", "-C", rootfs, "-cf", folder / "rootfs.tar", "."], check=True)
        buildah("add", "-q", scratch, folder / "rootfs.tar", "/")
        buildah("commit", "-q", "--rm", scratch, BASE)
        shutil.rmtree(rootfs)
        (folder / "rootfs.tar").unlink()
        how = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--target", "cpu", "-t", IMAGE]
        how += ["--build-arg", f"CPU_BASE={BASE}", "--secret", f"id=pip.conf,src={folder / 'pip.conf'}"]
        buildah("bud", *how, REPO, timeout_s=2400)
        yield buildah, buildah("from", IMAGE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def inside(image: tuple[Buildah, str], *line: object, data: Path | None = None) -> list[str]:
    """A command line in the container, as the image's user; `data` is its folder."""
    buildah, container = image
    volume = ["--volume", f"{data}:/srv/arcface"] if data else []
    return buildah.line("run", "--isolation", "chroot", "--network", "host", *volume, container, "--", *line)


def test_it_serves_from_an_empty_volume_and_says_when_it_is_ready(image, tmp_path):
    buildah, data, ports = image[0], tmp_path / "data", free_ports()
    data.mkdir()
    shutil.chown(data, 1000, 1000)
    started = subprocess.Popen(
        inside(image, "arcface", "serve", *options(ports), data=data),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    giving_up = threading.Timer(600, started.kill)
    giving_up.start()
    try:
        assert started.stdout is not None
        said = []
        for text in started.stdout:
            said.append(text)
            if text.startswith("Ctrl-C"):
                break
        assert said and said[-1].startswith("Ctrl-C"), "".join(said)
        faces = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
        with TritonEmbedder(f"127.0.0.1:{ports.grpc}") as embedder:
            np.testing.assert_allclose(np.linalg.norm(embedder.encode(faces), axis=1), 1, atol=1e-4)
        assert any(row.startswith("arcface_reference") for row in said), "InsightFace is served beside it"

        test = config_of(buildah)["Healthcheck"]["Test"]
        assert test[0] == "CMD"
        check = [word.replace(":8000/", f":{ports.http}/") for word in test[1:]]
        assert subprocess.run(inside(image, *check), check=False).returncode == 0
    finally:
        giving_up.cancel()
        started.terminate()
        started.communicate(timeout=60)
    assert subprocess.run(inside(image, *check), stderr=subprocess.DEVNULL, check=False).returncode != 0
    assert {path.name for path in data.iterdir()} == {"model_repository", "models", ".cache"}
    assert {path.stat().st_uid for path in data.rglob("*")} == {1000}
    assert not (data / ".cache" / "arcface-triton" / "backends").exists(), "the image has them"


def test_it_has_no_weights_no_rights_and_every_command(image):
    buildah, container = image
    assert config_of(buildah)["User"] == "1000:1000"
    assert config_of(buildah)["Cmd"] == ["arcface", "serve"]
    root = Path(buildah("mount", container))
    assert list((root / "srv" / "arcface").iterdir()) == []
    (carried,) = root.glob("opt/arcface/lib/python3*/site-packages/arcface_build/data/model_repository")
    files = sorted(p.relative_to(carried).as_posix() for p in carried.rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert files == hand_written(REPO / "model_repository")

    done = subprocess.run(inside(image, "touch", "/opt/arcface/x"), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Permission denied" in done.stderr
    modules = "onnx polygraphy insightface sklearn cv2 boto3 pyarrow aiohttp pillow_heif matplotlib cryptography"
    imports = f"import {', '.join(modules.split())}"
    done = subprocess.run(inside(image, "python", "-c", imports), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def options(ports: Ports) -> list[str]:
    named = {"--http-port": ports.http, "--grpc-port": ports.grpc, "--metrics-port": ports.metrics}
    return [str(word) for pair in named.items() for word in pair]


def config_of(buildah: Buildah) -> dict:
    return json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
