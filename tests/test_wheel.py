"""The wheel: what is in it, what it installs beside, and that it serves and is served without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from arcface_build.repository.hand_written import MEMORY, hand_written
from conftest import REPO
from deadlines import HANG_S

PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10")


def run(line: Sequence[object], timeout_s: float = HANG_S, **kwargs) -> subprocess.CompletedProcess[str]:
    """A program that sees neither this checkout nor this environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    line = [str(word) for word in line]
    return subprocess.run(
        line, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, **kwargs
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as from an unpacked archive: no git, no .gitignore, and weights lying in model_repository/."""
    tree = tmp_path_factory.mktemp("tree")
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO)
    if listed.returncode:
        pytest.skip("not a git checkout")
    parts = ("clients/", "build/", "model_repository/", "backends/", "config/")
    wanted = [name for name in listed.stdout.splitlines() if name.startswith(parts) or "/" not in name]
    for name in wanted:
        if name != ".gitignore" and (REPO / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, tree / name)
    models = tree / "model_repository"
    for weights in (
        "arcface_onnx/1/model.onnx", "arcface_onnx/1/manifest.json", "arcface_onnx/configs/onnx.pbtxt",
        "arcface_onnx/1/model.xml", "arcface_trt/1/sm86.plan", "arcface_reference/12/model.onnx",
        "arcface_reference/2/model.py", "arcface/configs/tuned.pbtxt", f"{MEMORY}",
    ):  # fmt: skip
        (models / weights).parent.mkdir(parents=True, exist_ok=True)
        (models / weights).write_text("weights")
    out = tmp_path_factory.mktemp("dist")
    built = run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, tree])
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_it_brings_the_hand_written_files_and_no_weights(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    data = "arcface_build/data/"
    brought = sorted(name.removeprefix(data) for name in names if name.startswith(data))
    ours = [f"model_repository/{name}" for name in hand_written(REPO / "model_repository")]
    ours += [path.relative_to(REPO).as_posix() for path in (REPO / "backends").glob("*/*.py")]
    assert brought == sorted([*ours, *(f"config/{name}.yaml" for name in ("embedding", "gpus", "models"))])
    assert {name.partition("/")[0] for name in names} == {
        "arcface_build", "arcface_clients", "arcface_triton-0.1.0.dist-info"
    }  # fmt: skip


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel, and with the packages of this one beside it (not this checkout)."""
    folder = tmp_path_factory.mktemp("venv") / "venv"
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python3*/site-packages"))
    python = folder / "bin" / "python"
    line = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    done = run(line)
    assert done.returncode == 0, done.stderr
    # Lines of a .pth are not searched for further ones, such as that of a checkout installed with -e.
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin"


def test_serve_in_an_empty_folder_makes_what_it_needs_and_serves(installed, triton_binary, tmp_path):
    from arcface_build.serving.ports import free_ports

    ports = free_ports()
    line = [installed / "arcface", "serve", "--once", "--json", "--no-reference", "--http-port", ports.http]
    line += ["--grpc-port", ports.grpc, "--metrics-port", ports.metrics]
    done = run(line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "onnx"
    assert f"made {tmp_path / 'model_repository'}" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model_repository", "models", ".cache"}
    assert hand_written(tmp_path / "model_repository") == hand_written(REPO / "model_repository")


def test_commands_find_the_tables_of_the_wheel(installed, tmp_path):
    done = run([installed / "arcface", "plan", "matrix", "--model", "r50", "--cache", tmp_path / "cache"], cwd=tmp_path)
    assert "gpus.yaml" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def report(wheel: Path, *wanted: str, extras: str = "") -> dict[str, str]:
    """Package → version that pip would install; skips, visibly, where no package index can be reached."""
    line = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = run([*line, f"{wheel}{extras}", *wanted])
    if done.returncode:
        probe = run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", os.devnull, "tritonclient"])
        if "No matching distribution" in probe.stderr:
            pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["install"]
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in found}


@pytest.mark.parametrize(
    "beside",
    [("numpy>=2", "protobuf==6.*", "tritonclient==2.73.*"), ("numpy>=2", "protobuf==5.*")],
    ids=["protobuf 6", "protobuf 5"],
)
def test_a_client_is_numpy_and_tritonclient_and_installs_beside_newer_packages(wheel, beside):
    found = report(wheel, *beside)
    assert int(found["numpy"].split(".")[0]) >= 2
    direct = zipfile.ZipFile(wheel).read("arcface_triton-0.1.0.dist-info/METADATA").decode()
    needs = [line for line in direct.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needs == ["Requires-Dist: numpy>=1.26", "Requires-Dist: tritonclient[grpc]>=2.50"]
    assert not {"aiohttp", "click", "rich", "pydantic", "pyyaml", "onnx"}.intersection(found)


CLIENT = """
import sys
import numpy as np
import arcface_clients
assert "tritonclient" not in sys.modules
from arcface_clients import TritonEmbedder
faces = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
with TritonEmbedder(sys.argv[1]) as embedder:
    embeddings = embedder.encode(faces)
    print(embedder.options.model, embeddings.shape)
np.save(sys.argv[2], embeddings)
for attempt in (arcface_clients.get_embedding_backend, lambda: arcface_clients.load_config):
    try:
        attempt()
    except arcface_clients.errors.DependencyMissing as exc:
        print(exc)
import tritonclient, google.protobuf
print(sys.version_info[:2], np.__version__, google.protobuf.__version__)
"""


def test_a_project_that_only_asks_a_server_runs_in_an_environment_of_its_own(wheel, server, tmp_path):
    import numpy as np

    from arcface_clients import TritonEmbedder

    report(wheel, "tritonclient==2.73.*")  # skips without an index
    python = next(p for name in PYTHONS if (p := shutil.which(name)) and run([p, "-c", "import venv"]).returncode == 0)
    assert run([python, "-m", "venv", "--without-pip", tmp_path / "venv"]).returncode == 0
    line = [sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python", "install", "-q"]
    done = run([*line, wheel, "tritonclient==2.73.*", "numpy>=2", "protobuf==6.*"])
    assert done.returncode == 0, done.stderr

    saved = tmp_path / "embeddings.npy"
    done = run([tmp_path / "venv" / "bin" / "python", "-c", CLIENT, server.grpc_url, saved], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(5, 512)" in done.stdout
    for name, module in (("get_embedding_backend", "pydantic"), ("load_config", "yaml")):
        assert f"{name} needs {module}, which is not installed. Next: pip install " in done.stdout
    faces = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    with TritonEmbedder(server.grpc_url) as embedder:
        np.testing.assert_allclose(np.load(saved), embedder.encode(faces), atol=1e-5)

    done = run([tmp_path / "venv" / "bin" / "arcface", "--help"], cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("DependencyMissing: arcface needs click, which is not installed. Next: pip install")


def stub(folder: Path, name: str, version: str, needs: Sequence[str] = ()) -> None:
    """A wheel that has nothing but its requirements; OpenCV's says in cv2/ which one it is."""
    stem = f"{name.replace('-', '_')}-{version}"
    told = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {line}" for line in needs)]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(told) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
        if name.startswith("opencv"):
            archive.writestr("cv2/which.txt", name)


INSIGHTFACE_NEEDS = ["numpy", "onnx", "onnxruntime", "opencv-python", "tqdm", "requests", "scipy", "scikit-image"]
PINNED = {"numpy": "1.99", "nvidia-pytriton": "0.7.0", "pyarrow": "25.0"}


@pytest.mark.parametrize("extras", ["reference", "serve,reference", "build,images,reference,store,evidence,bulk"])
def test_the_opencv_that_needs_no_display_is_laid_over_the_one_that_insightface_asks_for(wheel, extras, tmp_path):
    from packaging.requirements import Requirement

    metadata = zipfile.ZipFile(wheel).read("arcface_triton-0.1.0.dist-info/METADATA").decode()
    lines = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    for name in {Requirement(line).name for line in lines} - {"arcface-triton"} | set(INSIGHTFACE_NEEDS):
        needs = INSIGHTFACE_NEEDS if name == "insightface" else ["numpy"] if name.startswith("opencv") else []
        stub(tmp_path, name, PINNED.get(name, "99.0"), needs)
    venv.create(tmp_path / "venv", with_pip=False)
    line = [sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python", "install", "-q"]
    done = run([*line, "--no-index", "--find-links", tmp_path, f"{wheel}[{extras}]"])
    assert done.returncode == 0, done.stderr
    packages = next((tmp_path / "venv").glob("lib/*/site-packages"))
    assert (packages / "cv2" / "which.txt").read_text() == "opencv-contrib-python-headless"
    assert [path.name for path in packages.glob("onnxruntime*")] == ["onnxruntime-99.0.dist-info"], "one ONNX Runtime"
    assert list(packages.glob("insightface-*"))
