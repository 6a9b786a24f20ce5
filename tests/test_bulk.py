"""Bulk embedding: any source to one Parquet file, in bounded memory, through kills, each face once."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.cli import cli
from arcface_clients import TritonEmbedder
from arcface_clients.bulk.job import Job
from arcface_clients.bulk.on_ray import _Worker, seen_here
from arcface_clients.bulk.on_threads import run_local
from arcface_clients.bulk.parts import bad_path, read_embeddings
from arcface_clients.bulk.read import read_unit
from arcface_clients.bulk.spec import JobSpec
from arcface_clients.bulk.units import iter_units, unit_size
from arcface_clients.bulk.work import UnitWorker
from arcface_clients.errors import ConfigError, ContractMismatch, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from damaged_arrays import DAMAGED_ARRAYS, write_damaged
from deadlines import HANG_S
from lying_server import CONFIG, WORDS, LyingServer, http, outputs
from people import CONTRACT, PixelEngine

pq = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402

DIM = 64


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return synthetic_faces(30)


@pytest.fixture(scope="module")
def sources(faces: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of people, an .npz, a compressed .npz, a .npy and two Parquet files: 30 faces each way, some bad."""
    root = tmp_path_factory.mktemp("sources")
    for i, face in enumerate(faces[:10]):
        (root / "crops" / f"p{i % 3}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "crops" / f"p{i % 3}" / f"{i}.png"), face)
    cv2.imwrite(str(root / "crops" / "loose.png"), faces[10])
    (root / "crops" / "p1" / "broken.jpg").write_bytes(b"no image")
    cv2.imwrite(str(root / "crops" / "p2" / "large.png"), np.zeros((200, 200, 3), np.uint8))
    jpeg = cv2.imencode(".jpg", faces[0])[1].tobytes()
    (root / "crops" / "p0" / "cut_off.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    np.savez(root / "stored.npz", faces=faces)
    np.savez_compressed(root / "packed.npz", faces=faces)
    np.save(root / "plain.npy", faces)
    np.save(root / "floats.npy", faces[:3].astype(np.float32))
    np.savez(root / "other.npz", something=np.zeros(3))
    rows = {"path": [f"db/{i}" for i in range(30)], "identity": [f"p{i % 4}" for i in range(30)]}
    encoded: list[bytes | None] = [cv2.imencode(".png", face)[1].tobytes() for face in faces]
    encoded[7], encoded[8] = None, b"no image"
    pq.write_table(pa.table({"image": encoded, **rows}), root / "images.parquet", row_group_size=9)
    pq.write_table(pa.table({"face": [face.tobytes() for face in faces]}), root / "raw.parquet", row_group_size=7)
    pq.write_table(pa.table({"x": [1]}), root / "nothing.parquet")
    return root


def run(
    output: Path, sources: Sequence[str | Path], engine: PixelEngine | None = None, workers: int = 2, unit_rows: int = 4
) -> tuple[int, int]:
    engine = engine or PixelEngine(DIM)
    spec = JobSpec(tuple(map(str, sources)), engine.contract_id, DIM, unit_rows)
    with Job(output, spec) as job:
        run_local(job, [engine] * workers)
        return counts(job)


def counts(job: Job) -> tuple[int, int]:
    done = job.finish()
    return done.rows, done.refused


def rows_of(output: Path) -> dict[str, tuple[str | None, np.ndarray]]:
    found: dict[str, tuple[str | None, np.ndarray]] = {}
    for paths, identities, embeddings in read_embeddings(output):
        for path, identity, row in zip(paths, identities, embeddings, strict=True):
            assert path not in found, "a double row"
            found[path] = (identity, row)
    return found


def bad_of(output: Path) -> dict[str, str]:
    lines = bad_path(output).read_text().splitlines()
    return {line["path"]: line["reason"] for line in map(json.loads, lines)}


def test_a_folder_of_people_becomes_rows_with_identity_digest_and_contract(
    faces: np.ndarray, sources: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.parquet"
    assert run(output, [sources / "crops"]) == (11, 3)
    table = pq.read_table(output)
    assert table.schema.names == ["path", "identity", "embedding", "contract_id", "digest"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), DIM)
    assert set(table.column("contract_id").to_pylist()) == {CONTRACT}
    assert table.schema.metadata[b"contract_id"] == CONTRACT.encode()
    expected = PixelEngine(DIM).encode(faces)
    for path, identity, embedding, digest in zip(
        *(table.column(n).to_pylist() for n in ("path", "identity", "embedding", "digest")), strict=True
    ):
        name = Path(path).stem
        number = 10 if name == "loose" else int(name)
        assert identity == (None if name == "loose" else f"p{number % 3}")
        assert np.allclose(embedding, expected[number], atol=1e-6)
        assert digest == hashlib.sha256(faces[number].tobytes()).digest()
    bad = {Path(path).name: reason for path, reason in bad_of(output).items()}
    assert bad == {
        "broken.jpg": "not an image that OpenCV can decode, or truncated",
        "cut_off.jpg": "truncated JPEG",
        "large.png": "expected an aligned crop of 112×112 pixels, got 200×200",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "out.parquet.bad.jsonl"]


@pytest.mark.parametrize("name", ["stored.npz", "packed.npz", "plain.npy", "raw.parquet"])
@pytest.mark.parametrize("unit_rows", [4, 1000])
def test_arrays_and_parquet_give_every_row_once(
    faces: np.ndarray, sources: Path, tmp_path: Path, name: str, unit_rows: int
) -> None:
    assert run(tmp_path / "out.parquet", [sources / name], unit_rows=unit_rows) == (30, 0)
    rows = rows_of(tmp_path / "out.parquet")
    expected = PixelEngine(DIM).encode(faces)
    assert list(rows) == [f"{sources / name}[{i}]" for i in range(30)]
    assert np.allclose(np.stack([row for _, row in rows.values()]), expected, atol=1e-6)
    assert not bad_path(tmp_path / "out.parquet").exists()


def test_parquet_keeps_its_paths_and_identities_and_names_bad_rows(
    faces: np.ndarray, sources: Path, tmp_path: Path
) -> None:
    assert run(tmp_path / "out.parquet", [sources / "images.parquet"]) == (28, 2)
    rows = rows_of(tmp_path / "out.parquet")
    assert rows["db/29"][0] == "p1"
    assert np.allclose(rows["db/29"][1], PixelEngine(DIM).encode(faces)[29], atol=1e-6)
    bad = bad_of(tmp_path / "out.parquet")
    assert list(bad) == ["db/7", "db/8"]
    assert bad["db/7"] == "no bytes in this row"


def test_a_glob_and_whole_number_floats_are_read_and_files_of_other_kinds_named(sources: Path, tmp_path: Path) -> None:
    rows, bad = run(
        tmp_path / "out.parquet",
        [str(sources / "crops" / "p*" / "[0-9].png"), sources / "floats.npy", sources / "other.npz",
         sources / "nothing.parquet", sources / "nowhere.png"],
    )  # fmt: skip
    assert (rows, bad) == (13, 3)
    reasons = {Path(path).name: reason for path, reason in bad_of(tmp_path / "out.parquet").items()}
    assert reasons["other.npz"] == "expected faces of shape (N, 112, 112, 3) in C order, got float64 (3,)"
    assert "has the columns x: expected one of face, image, bytes" in reasons["nothing.parquet"]
    assert reasons["nowhere.png"] == "No such file or directory"
    assert [identity for identity, _ in list(rows_of(tmp_path / "out.parquet").values())[:2]] == ["p0", "p0"]


def test_a_file_that_breaks_in_the_middle_costs_only_its_rest(faces: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", faces)
    whole = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "broken.npy").write_bytes(whole[: len(whole) - 10 * 37_632 - 5])
    units = list(iter_units([tmp_path / "broken.npy"], 8))
    assert [unit_size(unit) for unit in units] == [8, 8, 8, 6]
    items = [item for unit in units for item in read_unit(unit)]
    assert len(items) == 30
    assert all(item.face is not None for item in items[:16])
    assert items[29].refused == "the file became unreadable here (cut off)"


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
def test_a_damaged_array_costs_its_own_faces_and_not_the_job(faces: np.ndarray, tmp_path: Path, damage: str) -> None:
    (tmp_path / "in").mkdir()
    write_damaged(tmp_path / "in" / "bad.npz", damage)
    np.savez(tmp_path / "in" / "good.npz", faces=faces[:3])
    embedded, refused = run(tmp_path / "out.parquet", [tmp_path / "in"])
    assert embedded == 3
    assert refused >= 1
    assert all("bad.npz" in name for name in bad_of(tmp_path / "out.parquet"))


def test_names_that_are_no_utf8_cost_no_face_and_no_job(faces: np.ndarray, tmp_path: Path) -> None:
    person = os.fsencode(tmp_path / "in") + b"/Ren\xe9"  # as Latin-1 systems wrote them
    Path(os.fsdecode(person)).mkdir(parents=True)
    Path(os.fsdecode(person + b"/caf\xe9.png")).write_bytes(cv2.imencode(".png", faces[0])[1].tobytes())
    Path(os.fsdecode(person + b"/bad\xe9.png")).write_bytes(b"no image")
    assert run(tmp_path / "out.parquet", [tmp_path / "in"]) == (1, 1)
    ((path, (identity, _)),) = rows_of(tmp_path / "out.parquet").items()
    assert list(bad_of(tmp_path / "out.parquet")) == [f"{tmp_path}/in/Ren\\xe9/bad\\xe9.png"]
    assert (path, identity) == (f"{tmp_path}/in/Ren\\xe9/caf\\xe9.png", "Ren\\xe9")


def test_a_sample_whose_json_is_nested_without_end_keeps_its_face(faces: np.ndarray, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as shard:
        for name, data in (("a.png", cv2.imencode(".png", faces[0])[1].tobytes()), ("a.json", b"[" * 100_000)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    assert run(tmp_path / "out.parquet", [tmp_path / "in.tar"]) == (1, 0)


def test_a_job_that_was_killed_is_gone_on_with_and_no_row_is_lost_or_double(tmp_path: Path) -> None:
    np.save(tmp_path / "faces.npy", np.random.default_rng(0).integers(0, 256, (400, 112, 112, 3), dtype=np.uint8))
    output = tmp_path / "out.parquet"
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from people import PixelEngine\n"
        "from arcface_clients.bulk.job import Job\n"
        "from arcface_clients.bulk.spec import JobSpec\n"
        "from arcface_clients.bulk.on_threads import run_local\n"
        "class Slow(PixelEngine):\n"
        "    def encode(self, faces):\n"
        "        time.sleep(0.02)\n"
        "        return super().encode(faces)\n"
        "engine = Slow(64)\n"
        "with Job(sys.argv[3], JobSpec((sys.argv[2],), engine.contract_id, 64, 10)) as job:\n"
        "    run_local(job, [engine])\n"
        "    print(job.finish().rows, engine.faces_seen)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "faces.npy"), str(output)]
    parts = tmp_path / "out.parquet.parts"
    for kill_at, how in ((5, signal.SIGKILL), (12, signal.SIGINT), (25, signal.SIGKILL)):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + HANG_S
            while len(list(parts.glob("part-*.parquet"))) < kill_at and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(process.pid, how)
        assert not output.exists()
        assert len(list(parts.glob("part-*.parquet"))) >= kill_at
    (tmp_path / ".out.parquet.4000000.a1b2c3d4").touch()  # what a kill in the middle of merging leaves
    (tmp_path / ".out.parquet.mine").touch()
    torn = parts / "part-00000003.parquet"
    torn.write_bytes(torn.read_bytes()[:200])  # what a disk that lost its cache may leave
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows, seen = answer.rsplit(" ", 1)
    assert rows == "400"
    assert int(seen) <= 160
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.parquet.mine", "faces.npy", "out.parquet"]
    found = rows_of(output)
    assert list(found) == [f"{tmp_path / 'faces.npy'}[{i}]" for i in range(400)]
    assert np.allclose(
        np.stack([row for _, row in found.values()]),
        PixelEngine(DIM).encode(np.load(tmp_path / "faces.npy")),
        atol=1e-6,
    )


def test_a_server_that_dies_stops_all_workers_and_the_job_is_gone_on_with(sources: Path, tmp_path: Path) -> None:
    class Dying(PixelEngine):
        def encode(self, faces: np.ndarray) -> np.ndarray:
            if len(self.calls) >= 3:
                raise ServerUnreachable("gone")
            return super().encode(faces)

    output = tmp_path / "out.parquet"
    with pytest.raises(ServerUnreachable):
        run(output, [sources / "stored.npz"], Dying(DIM))
    assert not output.exists()
    engine = PixelEngine(DIM)
    assert run(output, [sources / "stored.npz"], engine) == (30, 0)
    assert engine.faces_seen == 30 - 3 * 4
    assert len(rows_of(output)) == 30


def test_another_model_other_sources_or_a_second_process_are_refused(sources: Path, tmp_path: Path) -> None:
    spec = JobSpec((str(sources / "plain.npy"),), CONTRACT, DIM, 4)
    with Job(tmp_path / "out.parquet", spec), pytest.raises(ConfigError, match="another process is writing"):
        Job(tmp_path / "out.parquet", spec)
    with pytest.raises(ContractMismatch, match=r"expected one model for all rows\. Start over: --force"):
        Job(tmp_path / "out.parquet", JobSpec(spec.sources, "d" * 64, DIM, 4))
    with pytest.raises(ConfigError, match="was begun with other sources, unit_rows"):
        Job(tmp_path / "out.parquet", JobSpec((str(sources),), CONTRACT, DIM, 5))
    with Job(tmp_path / "out.parquet", spec) as job, pytest.raises(ContractMismatch, match="behind all URLs"):
        run_local(job, [PixelEngine(DIM), PixelEngine(DIM, contract_id="e" * 64)])
    with Job(tmp_path / "out.parquet", JobSpec((str(sources),), CONTRACT, DIM, 5), start_over=True) as job:
        assert list(job.pending())


def test_relative_sources_are_those_of_the_folder_in_which_the_job_was_begun(
    faces: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, own in (("mine", faces[:8]), ("yours", faces[8:16])):
        (tmp_path / name / "crops").mkdir(parents=True)
        for i, face in enumerate(own):
            cv2.imwrite(str(tmp_path / name / "crops" / f"{i}.png"), face)
    output, engine = f"{tmp_path}/out/", PixelEngine(DIM)
    monkeypatch.chdir(tmp_path / "mine")
    spec = JobSpec(("crops",), CONTRACT, DIM, 4)
    with Job(output, spec) as job:
        number, unit = next(iter(job.pending()))
        job.note(number, UnitWorker(job.folder, spec, [engine], job.files).do(number, unit))
    for elsewhere in (tmp_path / "yours", tmp_path):
        monkeypatch.chdir(elsewhere)
        with pytest.raises(ConfigError, match=f"was begun in {tmp_path}/mine, where its sources are"):
            Job(output, JobSpec(("crops",), CONTRACT, DIM, 4))
        with Job(output, spec) as job:  # one of the library's users who goes elsewhere
            run_local(job, [engine])
            assert counts(job) == (8, 0)
        np.testing.assert_allclose(
            [row for _, row in rows_of(Path(output)).values()], engine.encode(faces[:8]), atol=1e-5
        )
        for name in ("_SUCCESS", "part-00000001.parquet", "_units/000000.done.json"):
            (tmp_path / "out" / name).unlink()
    head = json.loads((tmp_path / "out" / "_metadata.json").read_text())
    del head["spec"]["below"]  # as an earlier version began it
    (tmp_path / "out" / "_metadata.json").write_text(json.dumps(head))
    monkeypatch.chdir(tmp_path / "mine")
    Job(output, JobSpec(("crops",), CONTRACT, DIM, 4)).close()
    assert json.loads((tmp_path / "out" / "_metadata.json").read_text())["spec"]["below"] == f"{tmp_path}/mine"


def test_a_worker_that_does_not_see_the_folders_of_the_job_ends_it_and_refuses_no_face(
    sources: Path, tmp_path: Path
) -> None:
    spec = JobSpec((str(sources / "plain.npy"), str(sources / "crops" / "p*" / "*.png")), CONTRACT, DIM, 4)
    with Job(f"{tmp_path}/out/", spec) as job:
        number, unit = next(iter(job.pending()))
        seen = seen_here(job)
        assert seen == [f"{tmp_path}/out/_metadata.json", str(sources / "plain.npy"), str(sources / "crops")]
        for gone in seen:
            worker = _Worker(0, job.folder.path, spec, job.files, lambda url: PixelEngine(DIM), ["url"], 0, seen)
            (moved := Path(gone)).rename(tmp_path / "moved")
            with pytest.raises(ConfigError, match=f"a Ray worker does not see {gone}: expected a shared folder"):
                worker.do(number, unit)
            (tmp_path / "moved").rename(moved)
        assert worker.do(number, unit).rows == 4


@pytest.mark.parametrize("text", ["", "garbage", "[]", '{"spec": {}}'])
def test_a_damaged_unfinished_run_is_named_and_started_over_with_force(
    sources: Path, tmp_path: Path, text: str
) -> None:
    spec = JobSpec((str(sources / "plain.npy"),), CONTRACT, DIM, 4)
    Job(tmp_path / "out.parquet", spec).close()
    (tmp_path / "out.parquet.parts" / "_metadata.json").write_text(text)
    with pytest.raises(ConfigError, match=r"_metadata\.json is damaged .*Start over: --force"):
        Job(tmp_path / "out.parquet", spec)
    Job(tmp_path / "out.parquet", spec, start_over=True).close()


@pytest.mark.parametrize("name", ["job.json", "plan.json"])
def test_an_unfinished_run_of_an_earlier_version_is_named_and_started_over_with_force(
    sources: Path, tmp_path: Path, name: str
) -> None:
    spec = JobSpec((str(sources / "plain.npy"),), CONTRACT, DIM, 4)
    (tmp_path / "out.parquet.parts").mkdir()
    (tmp_path / "out.parquet.parts" / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"begun by an earlier version.*Start over: --force"):
        Job(tmp_path / "out.parquet", spec)
    with Job(tmp_path / "out.parquet", spec, start_over=True) as job:
        run_local(job, [PixelEngine(DIM)])
        assert counts(job) == (30, 0)


def test_numbers_as_names_and_identities_become_text(faces: np.ndarray, tmp_path: Path) -> None:
    columns = {"face": [face.tobytes() for face in faces[:3]], "path": [0, 7, None], "identity": [0, 12, None]}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    assert run(tmp_path / "out.parquet", [tmp_path / "in.parquet"]) == (3, 0)
    rows = rows_of(tmp_path / "out.parquet")
    assert {name: identity for name, (identity, _) in rows.items()} == {
        "0": "0",
        "7": "12",
        f"{tmp_path / 'in.parquet'}[2]": None,
    }


def test_workers_share_the_units(tmp_path: Path) -> None:
    np.save(
        tmp_path / "faces.npy",
        np.zeros((40, 112, 112, 3), np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None, None],
    )
    met = threading.Barrier(2, timeout=HANG_S)

    class Meeting(PixelEngine):
        def encode(self, faces: np.ndarray) -> np.ndarray:
            if not self.calls:
                met.wait()  # passes only when both work at a time
            self.calls.append(len(faces))
            return np.ones((len(faces), DIM), np.float32) / 8

    engines = [Meeting(DIM), Meeting(DIM)]
    done: list[int] = []
    with Job(tmp_path / "out.parquet", JobSpec((str(tmp_path / "faces.npy"),), CONTRACT, DIM, 5)) as job:
        run_local(job, engines, done.append)
        assert counts(job) == (40, 0)
    assert sum(done) == 40
    assert sum(map(sum, (engine.calls for engine in engines))) == 40


def test_listing_the_units_of_a_large_tree_holds_no_list_of_it(tmp_path: Path) -> None:
    for person in range(20):
        (tmp_path / f"{person:02}").mkdir()
        for i in range(5):
            (tmp_path / f"{person:02}" / f"{i}.jpg").touch()
    units = iter_units([tmp_path], 7)
    first = next(units)
    assert [identity for _, identity, _ in first["items"]] == ["00"] * 5 + ["01"] * 2
    assert sum(map(unit_size, units)) == 93


@pytest.mark.filterwarnings("ignore")  # Ray warns about itself, and leaves sockets and files to its garbage collector
def test_two_ray_workers_write_the_same_file(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
    from arcface_clients.bulk.on_ray import run_on_ray
    from arcface_clients.ray_cluster import Cluster

    monkeypatch.setenv("RAY_ADDRESS", "local")  # one of its own, whatever runs on this host
    # Ray's processes find what they unpickle (engine_of, PixelEngine) by this variable, not by pytest's sys.path.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    engine = PixelEngine(DIM)
    run(tmp_path / "local.parquet", [sources / "crops", sources / "stored.npz"])
    spec = JobSpec((str(sources / "crops"), str(sources / "stored.npz")), engine.contract_id, DIM, 4)
    done: list[int] = []
    try:
        with Job(tmp_path / "ray.parquet", spec) as job:
            run_on_ray(job, partial(engine_of, tmp_path), ["first", "second"], Cluster(2), done.append)
            assert counts(job) == (41, 3)
    finally:
        ray.shutdown()
    assert sum(done) == 44
    assert {path.name for path in tmp_path.glob("used-*")} == {"used-first", "used-second"}
    by_ray, by_one = rows_of(tmp_path / "ray.parquet"), rows_of(tmp_path / "local.parquet")
    assert list(by_ray) == list(by_one)
    assert pq.read_schema(tmp_path / "ray.parquet").equals(pq.read_schema(tmp_path / "local.parquet"))
    for path, (identity, embedding) in by_ray.items():
        assert identity == by_one[path][0]
        np.testing.assert_allclose(embedding, by_one[path][1], atol=1e-5)  # batches differ, and so does their sum
    assert {(tmp_path / name).exists() for name in ("ray.parquet.bad.jsonl", "local.parquet.bad.jsonl")} == {True}


def engine_of(folder: Path, url: str) -> PixelEngine:
    """What an actor makes of a URL; leaves a file by which the test knows that this URL was used."""
    (folder / f"used-{url}").touch()
    return PixelEngine(DIM)


def arcface_embed(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from arcface_build.cli import main; main()", "embed", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=HANG_S)


def test_the_command_writes_parquet_through_a_real_server(server, sources: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    urls = ["--url", server.grpc_url, "--url", server.grpc_url]
    done = arcface_embed(sources / "crops", sources / "stored.npz", "-o", output, *urls, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["faces"], summary["refused"]) == (41, 3)
    assert summary["refused_list"] == str(bad_path(output))
    rows = rows_of(output)
    with TritonEmbedder(server.grpc_url) as embedder:
        expected = embedder.encode(np.load(sources / "stored.npz")["faces"])
        contract = embedder.contract_id
    found = np.stack([row for path, (_, row) in rows.items() if "stored" in path])
    assert np.einsum("nd,nd->n", found, expected).min() > 1 - 1e-5
    assert summary["contract_id"] == contract
    assert set(pq.read_table(output).column("contract_id").to_pylist()) == {contract}


def test_the_command_finds_the_faces_of_photos(server, assets: Path, tmp_path: Path) -> None:
    person = sorted((assets / "faces" / "raw250").iterdir())[3]
    options = ["--detect", "--detector", assets / "detectors" / "face_detection_yunet_2023mar.onnx"]
    for output in (tmp_path / "out.npz", tmp_path / "out.parquet"):
        done = arcface_embed(person, "-o", output, "--url", server.grpc_url, *options)
        assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.parquet")
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["paths"].tolist() == list(rows)
        assert len(rows) >= 8
        assert {path.rsplit("[", 1)[0] for path in rows} == {str(path) for path in person.iterdir()}
        assert np.abs(saved["embeddings"] - np.stack([row for _, row in rows.values()])).max() < 1e-4
        table = pq.read_table(tmp_path / "out.parquet")
        for column, name in (("score", "scores"), ("box", "boxes"), ("landmarks", "landmarks")):
            values = np.array(table[column].to_pylist(), np.float32)
            assert np.array_equal(values, saved[name].reshape(values.shape))
        assert saved["landmarks"].shape == (len(rows), 5, 2)
        corner, size = saved["boxes"][:, None, :2], saved["boxes"][:, None, 2:]
        assert ((saved["landmarks"] > corner - 5) & (saved["landmarks"] < corner + size + 5)).all()
        assert ((saved["scores"] >= 0.7) & (saved["scores"] <= 1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.npz", "--url", "a:1", "--url", "b:1"], "several servers and --engine ray write Parquet"),
        (["-o", "out.csv"], "expected a name ending in .npz or .parquet, such as out.npz"),
        (["-o", "out.npz", "--detector", "x.onnx"], "--detector is for photos: add --detect"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = arcface_embed(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_models_that_state_no_contract_are_told_by_their_answers(faces: np.ndarray, tmp_path: Path) -> None:
    """As on tritonservers that were started without the overlays of an import."""
    np.save(tmp_path / "faces.npy", faces)
    servers = [LyingServer(), LyingServer()]
    try:
        for server, words in zip(servers, (WORDS, WORDS + 1), strict=True):
            server.config = http(json.dumps({**CONFIG, "parameters": {}}).encode())
            server.lie = lambda count, told, words=words: outputs(
                np.eye(count, 64, dtype=np.float32), np.tile(words, (count, 1)), told
            )

        def embed(output: Path, *servers: LyingServer) -> None:
            urls = [option for server in servers for option in ("--url", server.url)]
            arguments = [str(tmp_path / "faces.npy"), "-o", str(output), "--model", "liar", "--unit-rows", "3", *urls]
            CliRunner().invoke(cli, ["embed", *arguments], catch_exceptions=False, standalone_mode=False)

        with pytest.raises(ContractMismatch, match="expected one model"):
            embed(tmp_path / "both.parquet", *servers)
        with pytest.raises(ContractMismatch, match="was begun with contract"):
            embed(tmp_path / "both.parquet", servers[1])
        embed(tmp_path / "one.parquet", servers[0])
        assert len(rows_of(tmp_path / "one.parquet")) == 30
    finally:
        for server in servers:
            server.close()


def test_nothing_to_embed_leaves_nothing_behind(server, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = arcface_embed(tmp_path / "empty", "-o", tmp_path / "out.parquet", "--url", server.grpc_url)
    assert done.returncode == 2
    assert "nothing to embed in" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_nothing_readable_writes_the_reasons_and_no_output(server, tmp_path: Path) -> None:
    done = arcface_embed(tmp_path / "missing", "-o", tmp_path / "out.parquet", "--url", server.grpc_url, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no face could be read from" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet.bad.jsonl"]
    assert "No such file" in bad_of(tmp_path / "out.parquet")[str(tmp_path / "missing")]


@pytest.mark.filterwarnings("ignore")
def test_the_command_runs_on_ray_against_a_real_server(
    server, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
    monkeypatch.setenv("RAY_ADDRESS", "local")  # one of its own, whatever runs on this host
    output = tmp_path / "out.parquet"
    options = ["--engine", "ray", "--actors", 2, "--url", server.grpc_url, "--url", f"http://{server.http_url}"]
    done = arcface_embed(sources / "crops", sources / "stored.npz", "-o", output, *options, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["faces"], summary["refused"]) == (41, 3)
    assert len(rows_of(output)) == 41


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_ray_that_is_not_there_is_one_sentence_with_the_next_command(
    address: str, server, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
    monkeypatch.setenv("RAY_ADDRESS", address)
    options = ["--engine", "ray", "--url", server.grpc_url]
    done = arcface_embed(sources / "stored.npz", "-o", tmp_path / "out.parquet", *options)
    assert done.returncode == 3
    assert f"Ray at {address} cannot be reached: " in done.stderr
    assert "Next: ray start --head, or leave out --engine ray; what is done is kept" in done.stderr
    assert "Traceback" not in done.stderr
