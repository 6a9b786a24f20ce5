"""Measures what a job of hundreds of millions of faces costs besides the network: driver, listing, a client's CPU.

`listing` runs the driver of a job whose sources are generated names; nothing is read or embedded. `client` is a worker
on faces of each kind of source with an engine that costs a copy, so that what is left is the client. `growth` runs Ray
actors against servers of a trivial model, and `handing_out` units of one face, so that the driver is the limit.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.contract import FACE_SHAPE
from arcface_clients.faces.synthetic import synthetic_faces

_LISTING = "import sys; from arcface_tools.bulk_scale import list_units; list_units(sys.argv[1], int(sys.argv[2]))"


def listing(entries: int, folder: Path | None = None) -> dict[str, Any]:
    """List and tick off a job of `entries` generated names in a separate process: names/s, and its peak memory."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        line = [sys.executable, "-c", _LISTING, scratch, str(entries)]
        answer = subprocess.run(line, check=True, capture_output=True, text=True).stdout
        listed = sum(path.stat().st_size for path in (Path(scratch) / "out" / "_units").iterdir())
        return {**json.loads(answer), "list_mb": listed / 2**20}


def list_units(folder: str, entries: int) -> None:
    """The driver of the separate process; prints JSON."""
    from arcface_clients.bulk.job import Job
    from arcface_clients.bulk.parts import Part
    from arcface_clients.bulk.spec import JobSpec
    from arcface_clients.bulk.units import unit_size

    def names(sources: object, files: object) -> Iterator[tuple[str, str, None]]:
        return ((f"s3://bucket/crops/{i // 50:08}/{i:010}.jpg", f"{i // 50:08}", None) for i in range(entries))

    spec = JobSpec(("s3://bucket/crops/",), "0" * 64, 512)
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    with Job(f"{folder}/out/", spec, walk=names) as job:
        for number, unit in job.pending():
            job.note(number, Part(unit_size(unit), 0, spec.contract_id))
        done = job.finish()
    seconds = time.perf_counter() - begun_s
    status = Path("/proc/self/status").read_text().splitlines()
    peak_mb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    found = {"entries": done.rows, "units": job.units, "seconds": seconds, "entries_per_s": done.rows / seconds}
    print(json.dumps({**found, "cpu_s": time.process_time() - cpu_s, "peak_mb": peak_mb}))


def client(count: int = 4096) -> list[dict[str, Any]]:
    """CPU and bytes of a worker for each face, by kind of source: alone, and with a trivial model behind gRPC."""
    from arcface_clients import TritonEmbedder
    from arcface_tools.bulk import CopyingEngine
    from arcface_tools.quick_server import QUICK, quick_server

    found = []
    with tempfile.TemporaryDirectory() as scratch, quick_server() as server:
        server.start()
        url = f"127.0.0.1:{server.ports.grpc}"
        with TritonEmbedder(url, QUICK, shared_memory=False) as wire:
            sources = _sources(Path(scratch), count)
            _measure(wire, sources["jpeg"], f"{scratch}/warm-up/")
            for through, engine in (("nothing", CopyingEngine(512)), ("grpc", wire)):
                for kind, source in sources.items():
                    measured = _measure(engine, source, f"{scratch}/{kind}-{through}/")
                    found.append({"source": kind, "through": through, **measured})
    return found


def growth(
    count: int = 16_384, actors: Sequence[int] = (1, 2, 4), servers: Sequence[int] = (1, 2)
) -> list[dict[str, Any]]:
    """Faces/s of Ray actors that read a shard of JPEGs, and the cores of this host that were busy meanwhile."""
    from arcface_tools.quick_server import quick_server

    found = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack, _ray(max(actors)):
        source = _sources(Path(scratch), count, folder_of_files=False)["tar"]
        started = [stack.enter_context(quick_server()) for _ in range(max(servers))]
        urls = [f"127.0.0.1:{server.start().ports.grpc}" for server in started]
        for of_servers in servers:
            for of_actors in actors:
                output = f"{scratch}/{of_actors}-{of_servers}/"
                measured = _on_ray(output, source, 256, of_actors, _quick_client, urls[:of_servers])
                found.append({"actors": of_actors, "servers": of_servers, **measured})
    return found


def handing_out(units: int = 4096, actors: int = 2) -> dict[str, float]:
    """Units/s that one driver hands to Ray actors and ticks off, each a face that costs a copy."""
    with tempfile.TemporaryDirectory() as scratch, _ray(actors):
        source = Path(scratch) / "faces.npy"
        np.save(source, np.zeros((units, *FACE_SHAPE), np.uint8))
        measured = _on_ray(f"{scratch}/out/", source, 1, actors, _copying, [""] * actors)
    return {
        "units": units,
        "units_per_s": measured["faces_per_s"],
        "driver_cpu_us_per_unit": measured["driver_cpu_s"] / units * 1e6,
        "cores_busy": measured["cores_busy"],
    }


def _on_ray(
    output: str, source: Path, unit_rows: int, actors: int, make_engine: Any, urls: Sequence[str]
) -> dict[str, Any]:
    """A job whose rate is taken from its first unit to its last, so that the start of its actors is left out."""
    from arcface_clients.bulk.job import Job
    from arcface_clients.bulk.on_ray import run_on_ray
    from arcface_clients.bulk.spec import JobSpec
    from arcface_clients.ray_cluster import Cluster

    ticks: list[tuple[float, int, float]] = []

    def ticked(count: int) -> None:
        ticks.append((time.perf_counter(), count, _busy_s()))

    with make_engine(urls[0]) as engine:
        spec = JobSpec((str(source),), engine.contract_id, engine.embedding_dim, unit_rows)
    begun_cpu_s = time.process_time()
    with Job(output, spec) as job:
        run_on_ray(job, make_engine, urls, Cluster(actors, cpus=0.5), ticked)
        faces = job.finish().rows
    driver_cpu_s = time.process_time() - begun_cpu_s
    seconds = ticks[-1][0] - ticks[0][0]
    return {
        "faces": faces,
        "faces_per_s": sum(count for _, count, _ in ticks[1:]) / seconds,
        "cores_busy": (ticks[-1][2] - ticks[0][2]) / seconds,
        "driver_cpu_s": driver_cpu_s,
    }


@contextmanager
def _ray(actors: int) -> Iterator[None]:
    """A Ray of this host for several jobs, with room for so many actors of half a CPU."""
    import ray

    ray.init(
        address="local", num_cpus=actors, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False
    )
    try:
        yield
    finally:
        ray.shutdown()


def _quick_client(url: str) -> Any:
    from arcface_clients import TritonEmbedder

    return TritonEmbedder(url, "quick", shared_memory=False)


def _copying(url: str) -> Any:
    from arcface_tools.bulk import CopyingEngine

    return CopyingEngine(512)


def _busy_s() -> float:
    """Seconds of CPU that this host has spent, over all cores and processes."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _measure(engine: Any, source: Path, output: str) -> dict[str, float]:
    from arcface_clients.bulk.files import Files
    from arcface_clients.bulk.job import Job
    from arcface_clients.bulk.on_threads import run_local
    from arcface_clients.bulk.spec import JobSpec

    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    with Job(output, JobSpec((str(source),), engine.contract_id, engine.embedding_dim)) as job:
        run_local(job, [engine])
        rows = job.finish().rows
    cpu_s, seconds = time.process_time() - begun_cpu_s, time.perf_counter() - begun_s
    read = source.stat().st_size if source.is_file() else sum(p.stat().st_size for p in source.iterdir())
    written = sum(Files().folder(output).names().values())
    return {
        "faces": rows,
        "cpu_us_per_face": cpu_s / rows * 1e6,
        "faces_per_s": rows / seconds,
        "bytes_read_per_face": read / rows,
        "bytes_written_per_face": written / rows,
    }


def _sources(folder: Path, count: int, folder_of_files: bool = True) -> dict[str, Path]:
    """The same faces as an array, a folder of JPEGs and a shard of JPEGs; or the shard alone."""
    import cv2

    some = synthetic_faces(64)
    if folder_of_files:
        np.save(folder / "faces.npy", some[np.arange(count) % len(some)])
    encoded = [cv2.imencode(".jpg", face)[1].tobytes() for face in some]
    (folder / "crops").mkdir()
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for i in range(count):
            data = encoded[i % len(some)]
            if folder_of_files:
                (folder / "crops" / f"{i:08}.jpg").write_bytes(data)
            info = tarfile.TarInfo(f"{i:08}.jpg")
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return {"npy": folder / "faces.npy", "jpeg": folder / "crops", "tar": folder / "shard.tar"}
