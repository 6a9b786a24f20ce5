"""Measures what a job of hundreds of millions of faces costs besides the network: driver, listing, a client's CPU.

`listing` runs the driver's side of a job whose sources are generated names; nothing is read or embedded. `client` runs
a worker on faces of each kind of source with an engine that costs a copy, so that what is left is the client.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
    from arcface_clients.bulk.job import Job, JobSpec
    from arcface_clients.bulk.parts import Part
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
    from arcface_tools.clients import QUICK, quick_server

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


def _measure(engine: Any, source: Path, output: str) -> dict[str, float]:
    from arcface_clients.bulk.files import Files
    from arcface_clients.bulk.job import Job, JobSpec
    from arcface_clients.bulk.on_threads import run_local

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


def _sources(folder: Path, count: int) -> dict[str, Path]:
    import cv2

    some = synthetic_faces(64)
    faces = some[np.arange(count) % len(some)]
    np.save(folder / "faces.npy", faces)
    encoded = [cv2.imencode(".jpg", face)[1].tobytes() for face in some]
    (folder / "crops").mkdir()
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for i in range(count):
            data = encoded[i % len(some)]
            (folder / "crops" / f"{i:08}.jpg").write_bytes(data)
            info = tarfile.TarInfo(f"{i:08}.jpg")
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return {"npy": folder / "faces.npy", "jpeg": folder / "crops", "tar": folder / "shard.tar"}
