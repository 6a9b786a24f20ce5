"""Bulk jobs on a Ray cluster of node processes, with sources and output in an S3 server process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.process import TritonProcess
from arcface_clients.bulk.files import Files
from arcface_clients.bulk.job import Job
from arcface_clients.bulk.on_threads import run_local
from arcface_clients.bulk.parts import read_embeddings
from arcface_clients.bulk.spec import ON_SERVER, JobSpec
from arcface_clients.faces.synthetic import synthetic_faces
from bulk_driver import DIM
from deadlines import HANG_S
from hurt_job import COUNT, HurtJob, hurt_by_kills, some_faces, two_servers
from people import CONTRACT, PixelEngine
from ray_cluster import RayCluster

pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
boto3 = pytest.importorskip("boto3")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def variables(s3_server: str) -> Iterator[dict[str, str]]:
    """The AWS variables of the S3 server process, with a bucket `bulk`."""
    found = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    found |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bulk")
        yield found


@pytest.fixture(scope="module")
def cluster(variables: dict[str, str]) -> Iterator[RayCluster]:
    """A head and two nodes with a CPU each."""
    python_path = os.pathsep.join(filter(None, [str(HERE), *sys.path]))
    cluster = RayCluster({**variables, "PYTHONPATH": python_path}, nodes=2)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def crops(variables: dict[str, str]) -> np.ndarray:
    """30 crops of three people in s3://bulk/crops/, and a file that is no image."""
    faces, files = synthetic_faces(30), Files()
    for i, face in enumerate(faces):
        files.folder(f"s3://bulk/crops/p{i % 3}").write(f"{i:02}.png", cv2.imencode(".png", face)[1].tobytes())
    files.folder("s3://bulk/crops/p0").write("broken.jpg", b"no image")
    return faces


def start(
    cluster: RayCluster, output: str, engine: str, *sources: str, cwd: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    line = [sys.executable, str(HERE / "bulk_driver.py"), output, engine, *sources]
    environment = {**cluster.environment, **variables}
    return subprocess.Popen(line, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(driver: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        told, errors = driver.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        driver.kill()
        raise AssertionError(driver.communicate()[1][-3000:]) from None
    assert driver.returncode == 0, errors[-3000:]
    return {**json.loads(told.splitlines()[-1]), "told": errors}


def rows_of(output: str) -> dict[str, tuple[str | None, np.ndarray]]:
    found: dict[str, tuple[str | None, np.ndarray]] = {}
    for group in read_embeddings(output):
        for path, identity, row in zip(*group, strict=True):
            assert path not in found, "a double row"
            found[path] = (identity, row)
    return found


def parts_in(output: str) -> int:
    return sum(name.startswith("part-") for name in Files().folder(output).names())


def check_crops(output: str, faces: np.ndarray) -> None:
    rows, expected = rows_of(output), PixelEngine(DIM).encode(faces)
    assert len(rows) == len(faces)
    for i in range(len(faces)):
        who, row = rows[f"s3://bulk/crops/p{i % 3}/{i:02}.png"]
        assert who == f"p{i % 3}"
        np.testing.assert_allclose(row, expected[i], atol=1e-5)


def test_a_job_on_two_nodes_reads_and_writes_urls(cluster: RayCluster, crops: np.ndarray) -> None:
    counts = answer(start(cluster, "s3://bulk/out/", "quick", "s3://bulk/crops/"))
    assert (counts["rows"], counts["refused"], counts["set_aside"], counts["advanced"]) == (30, 1, [], 31)
    check_crops("s3://bulk/out/", crops)
    folder = Files().folder("s3://bulk/out")
    success = json.loads(folder.read("_SUCCESS") or b"")
    assert (success["rows"], success["refused"], success["parts"]) == (30, 1, 8)
    assert success["contract_id"] == json.loads(folder.read("_metadata.json") or b"")["spec"]["contract_id"]
    (listed,) = folder.names("_refused")
    assert b"s3://bulk/crops/p0/broken.jpg" in (folder.read(f"_refused/{listed}") or b"")


def test_relative_paths_are_those_of_the_driver_wherever_the_nodes_were_started(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "crops").mkdir()
    for i, face in enumerate(faces := synthetic_faces(8)):
        cv2.imwrite(str(tmp_path / "crops" / f"{i}.png"), face)
    counts = answer(start(cluster, "out/", "quick", "crops", cwd=tmp_path))
    assert (counts["rows"], counts["refused"]) == (8, 0)
    rows = rows_of(str(tmp_path / "out"))
    assert list(rows) == [f"crops/{i}.png" for i in range(8)]
    np.testing.assert_allclose([row for _, row in rows.values()], PixelEngine(DIM).encode(faces), atol=1e-5)


def wait_for_parts(output: str, count: int, driver: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + HANG_S
    while parts_in(output) < count and time.monotonic() < deadline_s and driver.poll() is None:
        time.sleep(0.05)
    assert driver.poll() is None, f"it ended before it was hurt: {driver.communicate()}"
    if parts_in(output) < count:
        driver.kill()
        raise AssertionError(f"it does not go on: {driver.communicate()[1][-3000:]}")


def test_a_node_and_the_driver_are_killed_and_no_face_is_lost_or_double(
    cluster: RayCluster, variables: dict[str, str], tmp_path: Path
) -> None:
    faces = np.random.default_rng(0).integers(0, 256, (160, 112, 112, 3), dtype=np.uint8)
    np.save(tmp_path / "faces.npy", faces)
    Files().folder("s3://bulk/arrays").write("faces.npy", (tmp_path / "faces.npy").read_bytes())
    output, source = "s3://bulk/hurt/", "s3://bulk/arrays/faces.npy"
    driver = start(cluster, output, "slow", source)
    wait_for_parts(output, 4, driver)
    cluster.kill_node()
    wait_for_parts(output, parts_in(output) + 4, driver)  # the other node goes on
    driver.kill()
    driver.communicate()
    cluster.add_nodes(1)
    counts = answer(start(cluster, output, "quick", source))
    assert (counts["rows"], counts["refused"], counts["set_aside"]) == (160, 0, [])
    assert counts["before"] >= 8 * 4
    assert counts["before"] + counts["advanced"] == 160
    rows = rows_of(output)
    assert list(rows) == [f"{source}[{i}]" for i in range(160)]
    np.testing.assert_allclose(np.stack([row for _, row in rows.values()]), PixelEngine(DIM).encode(faces), atol=1e-5)


def test_tritonservers_that_are_killed_in_turn_and_together_cost_no_face(
    cluster: RayCluster, triton_binary: TritonBinary, tmp_path: Path
) -> None:
    faces = some_faces()
    np.save(tmp_path / "faces.npy", faces)
    Files().folder("s3://bulk/served").write("faces.npy", (tmp_path / "faces.npy").read_bytes())
    with two_servers() as servers:
        job = HurtJob(servers, "", "s3://bulk/served-out/", "s3://bulk/served/faces.npy", tmp_path)
        job.start(cluster.environment)
        hurt_by_kills(job)
        counts = job.counts()
        assert (counts["rows"], counts["refused"], counts["advanced"]) == (COUNT, 0, COUNT)
        job.check_rows(faces)


def test_photos_are_searched_by_the_actors_and_a_killed_node_loses_none(
    cluster: RayCluster, assets: Path, tmp_path: Path
) -> None:
    detector = str(next((assets / "detectors").glob("*yunet*.onnx")))
    people = sorted((assets / "faces" / "raw250").iterdir())[:40]
    folder = Files().folder("s3://bulk/photos")
    for photo in (photo for person in people for photo in sorted(person.iterdir())[:2]):
        folder.write(f"{photo.parent.name}/{photo.name}", photo.read_bytes())
    driver = start(cluster, "s3://bulk/found/", "slow", "s3://bulk/photos/", ARCFACE_DETECTOR=detector)
    wait_for_parts("s3://bulk/found/", 2, driver)
    cluster.kill_node()
    counts = answer(driver)
    cluster.add_nodes(1)
    here = f"{tmp_path}/here/"
    with Job(here, JobSpec(("s3://bulk/photos/",), CONTRACT, DIM, 8, detector)) as job:
        run_local(job, [PixelEngine(DIM)])
        expected = job.finish()
    assert expected.rows >= 80  # a face in each photo, and somebody behind it in some
    assert (counts["rows"], counts["refused"]) == (expected.rows, expected.refused)
    rows, rows_here = rows_of("s3://bulk/found/"), rows_of(here)
    assert {name: who for name, (who, _) in rows.items()} == {name: who for name, (who, _) in rows_here.items()}
    for name, (_, row) in rows.items():
        np.testing.assert_allclose(row, rows_here[name][1], atol=1e-4)


def test_actors_refuse_a_server_and_a_file_with_another_detector(
    cluster: RayCluster, photo_server: TritonProcess, assets: Path
) -> None:
    person = str(min((assets / "faces" / "raw250").iterdir()))
    file = str(next((assets / "detectors").glob("*yunet*.onnx")))
    for engine, detector in ((f"PhotoEngine:{photo_server.grpc_url}", ON_SERVER), ("quick", file)):
        output = f"s3://bulk/{'mixed' if detector == ON_SERVER else 'mixed-here'}/"
        variables = {"ARCFACE_DETECTOR": detector, "DETECTOR_ID": "yunet sha256=0"}
        driver = start(cluster, output, engine, person, **variables)
        _, errors = driver.communicate(timeout=HANG_S)
        assert driver.returncode != 0
        assert "DetectorMismatch" in errors
        assert "yunet sha256=0" in errors
        assert parts_in(output) == 0


def test_a_unit_that_kills_its_worker_three_times_is_set_aside_and_listed(
    cluster: RayCluster, variables: dict[str, str], tmp_path: Path
) -> None:
    faces = np.random.default_rng(0).integers(0, 255, (12, 112, 112, 3), dtype=np.uint8)
    faces[5] = 255
    np.save(tmp_path / "faces.npy", faces)
    Files().folder("s3://bulk/deadly").write("faces.npy", (tmp_path / "faces.npy").read_bytes())
    counts = answer(start(cluster, "s3://bulk/alive/", "deadly", "s3://bulk/deadly/faces.npy"))
    assert (counts["rows"], counts["refused"], counts["set_aside"]) == (8, 4, [1])
    assert "unit 1 was set aside: it killed 3 workers" in counts["told"]
    lines = (Files().folder("s3://bulk/alive").read("_refused/00000001.jsonl") or b"").splitlines()
    assert [json.loads(line)["path"] for line in lines] == [f"s3://bulk/deadly/faces.npy[{i}]" for i in range(4, 8)]
    assert len(rows_of("s3://bulk/alive/")) == 8


def test_a_straggler_does_not_hold_the_end(cluster: RayCluster, crops: np.ndarray, tmp_path: Path) -> None:
    engine = f"StragglingEngine:{tmp_path / 'first'}"
    counts = answer(start(cluster, "s3://bulk/quick/", engine, "s3://bulk/crops/"))
    assert (counts["rows"], counts["refused"]) == (30, 1)
    assert counts["seconds"] < 50  # the straggler alone takes ten minutes
    check_crops("s3://bulk/quick/", crops)


def test_an_overloaded_server_slows_the_job_down_and_does_not_end_it(cluster: RayCluster, crops: np.ndarray) -> None:
    counts = answer(start(cluster, "s3://bulk/busy/", "busy", "s3://bulk/crops/"))
    assert (counts["rows"], counts["refused"]) == (30, 1)
    check_crops("s3://bulk/busy/", crops)
