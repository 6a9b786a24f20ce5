"""Bulk jobs between URLs: what is read from an object store, what is written there, and what its faults do to it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

from arcface_clients import TritonEmbedder
from arcface_clients.bulk.files import Files
from arcface_clients.bulk.job import Job
from arcface_clients.bulk.on_threads import run_local
from arcface_clients.bulk.parts import look_at_part, read_embeddings
from arcface_clients.bulk.read import read_unit
from arcface_clients.bulk.saved import read_saved
from arcface_clients.bulk.schedule import Schedule
from arcface_clients.bulk.spec import JobSpec
from arcface_clients.bulk.tars import index_samples
from arcface_clients.bulk.unit_list import UnitList
from arcface_clients.bulk.units import CHUNK_UNITS, iter_units, unit_size
from arcface_clients.bulk.work import UnitWorker
from arcface_clients.errors import (
    ConfigError,
    ContractMismatch,
    Overloaded,
    ServerUnreachable,
    StoreUnreachable,
    WrongUse,
)
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.ray_cluster import TRIES
from arcface_clients.s3 import S3Options
from deadlines import HANG_S
from fault_proxy import FaultProxy
from people import CONTRACT, PixelEngine

pytest.importorskip("pyarrow.parquet")
boto3 = pytest.importorskip("boto3")

DIM, COUNT = 64, 24


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return synthetic_faces(COUNT)


@pytest.fixture(scope="module")
def store(s3_server: str) -> Iterator[Files]:
    """The S3 server process, with a bucket `urls`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "x")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="urls")
        yield Files(S3Options(s3_server))


@pytest.fixture
def proxy(s3_server: str, store: Files) -> Iterator[FaultProxy]:
    parts = urlsplit(s3_server)
    proxy = FaultProxy((parts.hostname or "", parts.port or 0))
    yield proxy
    proxy.close()


def png(face: np.ndarray) -> bytes:
    return cv2.imencode(".png", face)[1].tobytes()


def shard(faces: np.ndarray) -> bytes:
    """A WebDataset shard as img2dataset writes it: image, caption and metadata of each sample."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, face in enumerate(faces):
            record = json.dumps({"key": f"{i:09}", "identity": f"p{i % 3}", "status": "success"}).encode()
            for suffix, data in (("jpg", png(face)), ("json", record), ("txt", b"a face")):
                info = tarfile.TarInfo(f"{i:09}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def run(output: str, source: str, files: Files, rows: int = 5, engine: PixelEngine | None = None) -> Job:
    with Job(output, JobSpec((source,), CONTRACT, DIM, rows), files=files) as job:
        run_local(job, [engine or PixelEngine(DIM)] * 2)
        job.finish()
    return job


def rows_of(output: str, files: Files | None = None) -> dict[str, tuple[str | None, np.ndarray]]:
    found: dict[str, tuple[str | None, np.ndarray]] = {}
    for group in read_embeddings(output, files):
        for path, identity, row in zip(*group, strict=True):
            assert path not in found, "a double row"
            found[path] = (identity, row)
    return found


def check(output: str, faces: np.ndarray, files: Files | None = None) -> list[str]:
    rows = rows_of(output, files)
    found = np.stack([row for _, row in rows.values()])
    np.testing.assert_allclose(found, PixelEngine(DIM).encode(faces), atol=1e-5)
    return list(rows)


def test_a_data_set_in_a_folder_has_final_parts_and_a_mark_that_it_is_finished(
    faces: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "faces.npy", faces)
    output = f"{tmp_path}/out/"
    job = run(output, str(tmp_path / "faces.npy"), Files())
    assert (job.counts.rows, job.units) == (COUNT, 5)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["_SUCCESS", "_lock", "_metadata.json", "_units", *(f"part-{i:08}.parquet" for i in range(5))]
    check(output, faces)
    import pyarrow.dataset as ds

    assert ds.dataset(output, format="parquet").count_rows() == COUNT  # any reader takes the folder
    with pytest.raises(ConfigError, match=r"is finished: _SUCCESS is in it.*--force"):
        Job(output, JobSpec((str(tmp_path / "faces.npy"),), CONTRACT, DIM, 5))


def test_a_data_set_that_is_not_finished_is_not_read(faces: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "faces.npy", faces)
    run(f"{tmp_path}/out/", str(tmp_path / "faces.npy"), Files())
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(WrongUse, match="is not finished: expected _SUCCESS"):
        rows_of(f"{tmp_path}/out/")


def test_a_folder_of_foreign_parts_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00000000.parquet").write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match="expected a folder that `arcface embed` made"):
        Job(f"{tmp_path}/out/", JobSpec(("x",), CONTRACT, DIM))


@pytest.mark.parametrize("name", ["stored.npz", "packed.npz", "plain.npy", "shard.tar", "images.parquet", "crops/"])
def test_every_kind_of_source_is_read_from_a_url(faces: np.ndarray, store: Files, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, data = store.folder("s3://urls/in"), io.BytesIO()
    if name == "crops/":
        for i, face in enumerate(faces):
            store.folder("s3://urls/in/crops/ann").write(f"{i:03}.png", png(face))
    elif name == "shard.tar":
        data.write(shard(faces))
    elif name == "images.parquet":
        pq.write_table(pa.table({"image": [png(face) for face in faces]}), data, row_group_size=7)
    else:
        {"s": np.savez, "p": np.savez_compressed}.get(name[0], np.save)(data, **{"faces": faces}) if name.endswith(
            "z"
        ) else np.save(data, faces)
    if name != "crops/":
        folder.write(name, data.getvalue())
    run(f"s3://urls/out-{name.rstrip('/')}/", f"s3://urls/in/{name}", store)
    names = check(f"s3://urls/out-{name.rstrip('/')}/", faces, store)
    first = {"shard.tar": "/000000000.jpg", "crops/": "ann/000.png"}.get(name, "[0]")
    assert names[0] == f"s3://urls/in/{name}{first}"


def test_a_shard_gives_identities_and_local_ones_are_cut_into_ranges_of_samples(
    faces: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "shard.tar").write_bytes(shard(faces))
    units = list(iter_units([tmp_path / "shard.tar"], 7))
    assert [unit_size(unit) for unit in units] == [7, 7, 7, 3]
    items = [item for unit in reversed(units) for item in read_unit(unit)]
    assert sorted(item.name for item in items) == [f"{tmp_path}/shard.tar/{i:09}.jpg" for i in range(COUNT)]
    assert {item.identity for item in items} == {"p0", "p1", "p2"}


@pytest.mark.parametrize("cut", [1, 700, 20_000])
def test_a_shard_that_is_cut_off_costs_only_its_rest(faces: np.ndarray, tmp_path: Path, cut: int) -> None:
    whole = shard(faces)
    end = whole.rstrip(b"\0")
    (tmp_path / "shard.tar").write_bytes(whole[: len(end) - cut])
    items = [item for unit in iter_units([tmp_path / "shard.tar"], 7) for item in read_unit(unit)]
    good = [item for item in items if item.face is not None]
    assert COUNT - 3 <= len(good) <= COUNT
    assert any(item.face is None and "shard.tar" in item.name for item in items)


def test_an_index_keeps_no_list_of_members(faces: np.ndarray) -> None:
    file = io.BytesIO(shard(faces))
    assert [count for _, count in index_samples(file, 10)] == [10, 10, 4]


@pytest.mark.parametrize("fault", ["busy", "cuts", "upload_cuts", "greeting_s"])
def test_an_object_store_that_stumbles_costs_no_face(
    faces: np.ndarray, store: Files, proxy: FaultProxy, fault: str
) -> None:
    data = io.BytesIO()
    np.save(data, faces)
    store.folder("s3://urls/hurt").write("faces.npy", data.getvalue())
    hurt = Files(S3Options(proxy.url, max_attempts=2), patience_s=60)
    proxy.faults.after_bytes = 3_000
    setattr(proxy.faults, fault, 0.1 if fault == "greeting_s" else 6)
    job = run(f"s3://urls/hurt-{fault}/", "s3://urls/hurt/faces.npy", hurt)
    assert proxy.happened == (0 if fault == "greeting_s" else 6)
    assert (job.counts.rows, job.counts.refused) == (COUNT, 0)
    check(f"s3://urls/hurt-{fault}/", faces, store)


def test_an_object_store_that_is_gone_ends_the_job_and_it_is_gone_on_with(
    faces: np.ndarray, store: Files, proxy: FaultProxy
) -> None:
    data = io.BytesIO()
    np.save(data, faces)
    store.folder("s3://urls/gone").write("faces.npy", data.getvalue())
    hurt = Files(S3Options(proxy.url, max_attempts=1), patience_s=0.5)

    class Cutting(PixelEngine):
        def encode(self, faces: np.ndarray) -> np.ndarray:
            if len(self.calls) == 2:
                proxy.faults.busy = 10_000
            return super().encode(faces)

    with pytest.raises(StoreUnreachable, match="refuses or does not answer"):
        run("s3://urls/gone-out/", "s3://urls/gone/faces.npy", hurt, engine=Cutting(DIM))
    engine = PixelEngine(DIM)
    job = run("s3://urls/gone-out/", "s3://urls/gone/faces.npy", store, engine=engine)
    assert job.before + engine.faces_seen == job.counts.rows == COUNT
    check("s3://urls/gone-out/", faces, store)


def test_a_listing_that_is_behind_costs_work_but_no_double_row(
    faces: np.ndarray, store: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO()
    np.save(data, faces)
    store.folder("s3://urls/behind").write("faces.npy", data.getvalue())
    output, source = "s3://urls/behind-out/", "s3://urls/behind/faces.npy"
    run(output, source, store)
    folder = store.folder(output)
    for name in ("_SUCCESS", "_units/000000.done.json"):
        folder.delete(name)
    with Job(output, JobSpec((source,), CONTRACT, DIM, 5), files=store) as job:
        job._present -= {1, 3}  # written a moment ago, and not listed yet
        engine = PixelEngine(DIM)
        run_local(job, [engine])
        assert (engine.faces_seen, job.finish().rows) == (10, COUNT)
    check(output, faces, store)


def test_a_part_that_lost_a_piece_in_the_middle_is_torn(faces: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "faces.npy", faces)
    run(f"{tmp_path}/out/", str(tmp_path / "faces.npy"), Files())
    data = (tmp_path / "out" / "part-00000001.parquet").read_bytes()
    whole = look_at_part(io.BytesIO(data))
    assert whole is not None
    assert whole.rows == 5
    for torn in (data[:500] + data[700:], data[:-1], data[:100], b"", data + b"x"):
        assert look_at_part(io.BytesIO(torn)) is None


def test_a_job_of_another_model_in_the_same_url_is_refused_and_found_out_under_way(store: Files) -> None:
    data = io.BytesIO()
    np.save(data, np.zeros((8, 112, 112, 3), np.uint8))
    store.folder("s3://urls/two").write("faces.npy", data.getvalue())
    spec = JobSpec(("s3://urls/two/faces.npy",), CONTRACT, DIM, 4)
    with Job("s3://urls/two-out/", spec, files=store) as job:
        with pytest.raises(ContractMismatch, match="expected one model for all rows"):
            Job("s3://urls/two-out/", JobSpec(spec.sources, "d" * 64, DIM, 4), files=store)
        Job("s3://urls/two-out/", JobSpec(spec.sources, "d" * 64, DIM, 4), True, store).close()
        with pytest.raises(ContractMismatch):
            run_local(job, [PixelEngine(DIM)])


def test_a_bucket_that_is_missing_is_named_at_once(store: Files) -> None:
    with pytest.raises(StoreUnreachable, match="s3://none/out"):
        Job("s3://none/out/", JobSpec(("x",), CONTRACT, DIM), files=store)


def test_a_server_that_is_lost_is_left_for_another_one_and_a_busy_one_is_waited_for(
    faces: np.ndarray, tmp_path: Path
) -> None:
    class Away(PixelEngine):
        def encode(self, faces: np.ndarray) -> np.ndarray:
            raise ServerUnreachable("gone")

    class Busy(PixelEngine):
        refusals = 2

        def encode(self, faces: np.ndarray) -> np.ndarray:
            if self.refusals:
                self.refusals -= 1
                raise Overloaded("full")
            return super().encode(faces)

    np.save(tmp_path / "faces.npy", faces)
    (unit,) = iter_units([tmp_path / "faces.npy"], 100)
    folder, spec, told = Files().folder(str(tmp_path)), JobSpec((), CONTRACT, DIM), []
    worker = UnitWorker(folder, spec, [Away(DIM), Busy(DIM)], Files(), patience_s=20)
    assert worker.do(0, unit, told.append).rows == COUNT
    assert sum(told) == COUNT
    with pytest.raises(ServerUnreachable):
        UnitWorker(folder, spec, [Away(DIM)], Files(), patience_s=0.2).do(0, unit)


def test_a_schedule_hands_out_lost_units_again_copies_at_the_end_and_gives_up_after_three_deaths() -> None:
    units = [(number, {"kind": "array", "start": number}) for number in range(3)]
    schedule = Schedule(iter(units))
    assert [schedule.take() for _ in range(3)] == units
    assert schedule.take(is_idle=False) is None
    assert schedule.lost(1, killed=True) is None
    assert schedule.take() == units[1]
    schedule.finished(1)
    assert schedule.take() == units[0]  # a copy of the oldest
    schedule.finished(0)
    assert not schedule.is_wanted(0)
    for death in range(TRIES):
        given_up = schedule.lost(2, killed=True)
        assert (given_up == units[2][1]) == (death == TRIES - 1)
        if not given_up:
            assert schedule.take() == units[2]
    assert schedule.is_done


def entries(sources: object, files: object) -> Iterator[tuple[str, None, None]]:
    return ((f"s3://b/{i:09}.jpg", None, None) for i in range(1000))


def test_a_list_of_units_that_was_stopped_is_gone_on_with_under_the_same_numbers(tmp_path: Path) -> None:
    def stopping(sources: object, files: object) -> Iterator[tuple[str, None, None]]:
        for number, entry in enumerate(entries(sources, files)):
            if number == 500:
                raise OSError("the listing ends here")
            yield entry

    def numbered(walk: object) -> list[tuple[int, list[object]]]:
        with UnitList(Files().folder(str(tmp_path)), (), 3, Files(), walk) as listed:  # type: ignore[arg-type]
            return [(chunk.first, chunk.units) for chunk in listed.chunks()]

    with pytest.raises(OSError, match="the listing ends here"):
        numbered(stopping)
    again = numbered(entries)
    assert [first for first, _ in again] == [CHUNK_UNITS * i for i in range(len(again))]
    paths = [item[0] for _, units in again for unit in units for item in unit["items"]]  # type: ignore[index]
    assert paths == [entry[0] for entry in entries(None, None)]
    with pytest.raises(ConfigError, match=r"the sources changed since this job was begun.*--force"):
        (tmp_path / "_units" / "end.json").unlink()
        numbered(lambda sources, files: (entry for entry in list(entries(None, None))[1:]))


@pytest.mark.parametrize("output", ["{folder}/out/", "s3://urls/by-command/"])
def test_the_command_writes_a_data_set_through_a_real_server(
    server, store: Files, faces: np.ndarray, tmp_path: Path, output: str
) -> None:
    output = output.format(folder=tmp_path)
    store.folder("s3://urls/shards").write("00000.tar", shard(faces))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    line = [sys.executable, "-c", "from arcface_build.cli import main; main()", "embed", "s3://urls/shards/00000.tar"]
    line += [str(tmp_path / "bad.jpg"), "-o", output, "--url", server.grpc_url, "--unit-rows", "10", "--json"]
    environment = {**os.environ, "AWS_ENDPOINT_URL": store.s3.endpoint_url or ""}
    done = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["faces"], summary["refused"], summary["set_aside"]) == (COUNT, 1, [])
    rows = rows_of(output, store)
    with TritonEmbedder(server.grpc_url) as embedder:
        expected, contract = embedder.encode(faces), embedder.contract_id
    assert np.einsum("nd,nd->n", np.stack([row for _, row in rows.values()]), expected).min() > 1 - 1e-5
    assert json.loads(store.folder(output).read("_SUCCESS") or b"")["contract_id"] == contract == summary["contract_id"]
    if output.startswith("/"):
        saved = read_saved(output)
        assert (saved.contract_id, len(saved.paths or ())) == (contract, COUNT)
    again = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert again.returncode == 2
    assert "is finished" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "s3://b/out.parquet"], "is one file, which is written on this host only"),
        (["s3://b/in/", "-o", "out.npz"], "s3://b/in/ is embedded to Parquet. Name the output out.parquet"),
    ],
)
def test_outputs_that_do_not_fit_a_url_are_refused(server, arguments: list[str], message: str, tmp_path: Path) -> None:
    line = [sys.executable, "-c", "from arcface_build.cli import main; main()", "embed", str(tmp_path), *arguments]
    done = subprocess.run(
        [*line, "--url", server.grpc_url], capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_the_driver_of_a_large_job_does_not_grow_with_it() -> None:
    from arcface_tools.bulk_scale import listing

    small, large = listing(300_000), listing(900_000)
    assert (large["entries"], large["units"]) == (900_000, 440)
    assert large["peak_mb"] < small["peak_mb"] + 60 < 500  # a chunk is 131,072 names, in memory once or twice
