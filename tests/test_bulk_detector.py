"""A bulk job goes on only with the detector that it was begun with: the server's, or that of this host."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from arcface_build.cli import cli
from arcface_build.repository.detector import install_detector
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients import PhotoEmbedder
from arcface_clients.bulk.files import Files
from arcface_clients.bulk.job import Job
from arcface_clients.bulk.on_threads import run_local
from arcface_clients.bulk.parts import is_part, look_at_part
from arcface_clients.bulk.spec import METADATA, ON_SERVER, JobSpec
from arcface_clients.errors import ConfigError, DetectorMismatch
from arcface_clients.faces.detect import MODEL_NAME, FaceDetector
from arcface_clients.photos.engine import PhotoEngine
from people import PixelEngine
from serve_process import control

pq = pytest.importorskip("pyarrow.parquet")
CONTRACT = "c" * 64


@pytest.fixture(scope="module")
def yunet(assets: Path) -> Path:
    return assets / "detectors" / MODEL_NAME


@pytest.fixture(scope="module")
def other_yunet(yunet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another detector's file, as far as anyone can see from outside."""
    model = onnx.load(yunet)
    model.doc_string = "trained anew"
    onnx.save(model, other := tmp_path_factory.mktemp("detectors") / "trained_anew.onnx")
    return other


@pytest.fixture(scope="module")
def portraits(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve photos."""
    folder = tmp_path_factory.mktemp("portraits")
    for person in sorted((assets / "faces" / "raw250").iterdir())[:12]:
        shutil.copy(min(person.iterdir()), folder)
    return folder


class Served:
    """A server of photos whose operator imports detectors while it runs."""

    def __init__(self, process: TritonProcess, repository: Path) -> None:
        self.process, self.repository = process, repository

    def finds_with(self, detector: Path) -> None:
        """Import this detector and have the server load it."""
        install_detector(detector, self.repository)
        self.load()

    def load(self) -> None:
        """Serve what is in the repository now."""
        control(self.process, "load", "photo_faces")


@pytest.fixture(scope="module")
def served(
    triton_binary: TritonBinary, demo_repository: Path, yunet: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("detectors")
    repository = Path(shutil.copytree(demo_repository, folder / "model_repository"))
    install_detector(yunet, repository)
    models, log_path = ["arcface", "photo_faces"], folder / "tritonserver.log"
    with TritonProcess(triton_binary, repository, models, log_path=log_path, ports=free_ports()) as process:
        process.wait_ready()
        yield Served(process, repository)


@pytest.fixture
def server(served: Served, yunet: Path) -> Served:
    """As it was begun."""
    served.finds_with(yunet)
    return served


def embed(server: Served, source: Path, output: object, *options: object) -> Result:
    line = ["embed", str(source), "-o", str(output), "--url", server.process.grpc_url, "--unit-rows", "3"]
    return CliRunner().invoke(cli, [*line, *map(str, options)], standalone_mode=False)


def undo(output: Path, part: int) -> None:
    """As if the run had been killed before this part."""
    for name in ("_SUCCESS", f"part-{part:08d}.parquet", "_units/000000.done.json"):
        (output / name).unlink()


def spec_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / METADATA).read_text())["spec"])


def test_the_former_file_under_another_name_is_the_detector_that_the_job_was_begun_with(tmp_path: Path) -> None:
    begun = JobSpec(("photos",), CONTRACT, 64, detector="/cache/yunet.onnx", detector_id="yunet sha256=8f23")
    Job(tmp_path / "out.parquet", begun).close()
    with pytest.raises(DetectorMismatch, match=r"Give the former file: --detector FILE"):
        Job(tmp_path / "out.parquet", replace(begun, detector_id="yunet sha256=0000"))
    Job(tmp_path / "out.parquet", replace(begun, detector="/backup/former.onnx")).close()
    for other in (replace(begun, detector=ON_SERVER), replace(begun, detector=None)):
        with pytest.raises(ConfigError, match="was begun with other detector"):
            Job(tmp_path / "out.parquet", other)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_server_says_which_detector_finds_the_faces_and_how(server: Served, yunet: Path, protocol: str) -> None:
    url = server.process.grpc_url if protocol == "grpc" else f"http://{server.process.http_url}"
    with PhotoEmbedder(url) as photos, PhotoEmbedder(url, min_score=0.8, max_faces=3) as choosy:
        mine = FaceDetector(yunet).detector_id
        assert mine.startswith("yunet sha256=8f2383e4dd3cfbb4553ea8718107fc04")
        assert photos.pin_detector() == mine.replace("max_faces=0", "max_faces=512")
        assert choosy.pin_detector() == FaceDetector(yunet, 0.8).detector_id.replace("max_faces=0", "max_faces=3")


def test_a_job_is_not_gone_on_with_after_the_server_got_another_detector(
    server: Served, portraits: Path, yunet: Path, other_yunet: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert embed(server, portraits, f"{output}/", "--detect=server").exception is None
    begun_with = spec_of(output)["detector_id"]
    assert f"sha256={FaceDetector(yunet).sha256}" in begun_with
    undo(output, 2)
    server.finds_with(other_yunet)
    refused = embed(server, portraits, f"{output}/", "--detect=server")
    assert isinstance(refused.exception, DetectorMismatch)
    assert str(refused.exception) == (
        f"{output} was begun with the faces that {begun_with} finds; now they would be found by "
        f"{begun_with.replace(FaceDetector(yunet).sha256, FaceDetector(other_yunet).sha256)}: expected one detector "
        "for all rows. Serve the former one again (arcface rollback --model photo_faces, and start the server again), "
        "or start over: --force"
    )
    server.finds_with(yunet)
    assert embed(server, portraits, f"{output}/", "--detect=server").exception is None
    assert json.loads((output / "_SUCCESS").read_text())["detector_id"] == begun_with
    assert pq.read_schema(output / "part-00000002.parquet").metadata[b"detector_id"].decode() == begun_with


def test_a_detector_that_changes_under_way_ends_the_job_and_none_of_its_faces_is_kept(
    server: Served, portraits: Path, yunet: Path, other_yunet: Path, tmp_path: Path
) -> None:
    """Also where a server is restarted with it: an answer that comes names who found it."""
    output = f"{tmp_path}/out/"
    with PhotoEngine(server.process.grpc_url, in_flight=1) as engine:
        spec = JobSpec(
            (str(portraits),), engine.contract_id, engine.embedding_dim, 3, ON_SERVER, detector_id=engine.detector_id
        )
        seen: list[int] = []

        def advance(count: int) -> None:
            if not seen:
                server.finds_with(other_yunet)
            seen.append(count)

        with Job(output, spec) as job, pytest.raises(DetectorMismatch, match="answered with the faces that yunet "):
            run_local(job, [engine], advance)
    assert detectors_of_parts(output) <= {spec.detector_id}
    server.finds_with(yunet)
    with PhotoEngine(server.process.grpc_url) as engine, Job(output, spec) as job:
        run_local(job, [engine])
        assert job.finish().rows >= 12
    assert detectors_of_parts(output) == {spec.detector_id}


def detectors_of_parts(output: str) -> set[str | None]:
    folder, found = Files().folder(output), set()
    for name in filter(is_part, folder.names()):
        with Files().open(folder.of(name)) as source:
            part = look_at_part(source)
        assert part is not None
        found.add(part.detector_id)
    return found


def test_an_npz_holds_the_faces_of_one_detector_and_names_it(server: Served, portraits: Path, tmp_path: Path) -> None:
    import numpy as np

    assert embed(server, portraits, tmp_path / "out.npz", "--detect=server").exception is None
    with np.load(tmp_path / "out.npz") as saved, PhotoEmbedder(server.process.grpc_url) as photos:
        assert str(saved["detector_id"]) == photos.pin_detector()


def test_a_server_that_does_not_name_its_detector_is_used_with_a_warning(
    server: Served, portraits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = server.repository / "photo_faces" / "config.pbtxt"
    today = config.read_text()
    lines = [line for line in today.splitlines() if '"detector"' not in line]
    config.write_text("\n".join(lines).replace("[ -1, 112, 112, 3 ] },", "[ -1, 112, 112, 3 ] }"))  # as it was before
    try:
        server.load()
        done = embed(server, portraits, f"{tmp_path}/out/", "--detect=server")
    finally:
        config.write_text(today)
    assert done.exception is None
    assert spec_of(tmp_path / "out")["detector_id"] is None
    assert "does not say which detector finds the faces" in caplog.text


def test_the_detector_of_this_host_is_named_by_its_content_and_another_one_is_refused(
    portraits: Path, yunet: Path, other_yunet: Path, tmp_path: Path
) -> None:
    file, output = Path(shutil.copy(yunet, tmp_path / "yunet.onnx")), f"{tmp_path}/out/"
    spec = JobSpec((str(portraits),), CONTRACT, 64, 3, str(file), detector_id=FaceDetector(file).detector_id)
    shutil.copy(other_yunet, file)
    with Job(output, spec) as job, pytest.raises(DetectorMismatch, match="with which this run was begun"):
        run_local(job, [PixelEngine(64)])  # a worker opens it, on Ray long after the start
    now = replace(spec, detector_id=FaceDetector(file).detector_id)
    with pytest.raises(DetectorMismatch, match=r"Give the former file: --detector FILE, or start over: --force"):
        Job(output, now)
    shutil.copy(yunet, file)
    with Job(output, spec) as job:
        run_local(job, [PixelEngine(64)])
        assert job.finish().rows >= 12


def test_the_command_names_the_detector_of_this_host(
    server: Served, portraits: Path, yunet: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = embed(server, portraits, f"{output}/", "--detect=client", "--detector", yunet)
    assert done.exception is None
    assert spec_of(output)["detector_id"] == FaceDetector(yunet).detector_id


@pytest.mark.parametrize("left_by", ["an earlier version", "a server that did not say"])
def test_a_job_that_does_not_name_its_detector_takes_todays_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left_by: str
) -> None:
    caplog.set_level(logging.WARNING)
    spec = JobSpec(("photos/",), CONTRACT, 64, 3, ON_SERVER)
    Job(f"{tmp_path}/out/", spec).close()
    if left_by == "an earlier version":
        told = json.loads((tmp_path / "out" / METADATA).read_text())
        del told["spec"]["detector_id"]
        (tmp_path / "out" / METADATA).write_text(json.dumps(told))
    Job(f"{tmp_path}/out/", replace(spec, detector_id="yunet sha256=1")).close()
    assert "does not say which detector found the faces that are in it" in caplog.text
    assert "yunet sha256=1" in caplog.text
    with pytest.raises(DetectorMismatch, match="sha256=1 finds; now they would be found by yunet sha256=2"):
        Job(f"{tmp_path}/out/", replace(spec, detector_id="yunet sha256=2"))
    with pytest.raises(DetectorMismatch, match="now they would be found by a detector that the server does not name"):
        Job(f"{tmp_path}/out/", spec)


def test_what_decides_which_faces_are_found_is_in_the_detectors_name(yunet: Path) -> None:
    names = {
        FaceDetector(yunet).detector_id,
        FaceDetector(yunet, min_score=0.6).detector_id,
        FaceDetector(yunet, min_size=20).detector_id,
        FaceDetector(yunet, max_side=640).detector_id,
        FaceDetector(yunet, refine=False).detector_id,
    }
    assert len(names) == 5
    assert FaceDetector(yunet, opencv=True).detector_id == FaceDetector(yunet).detector_id  # they find the same
