"""Measures our client: throughput against the bare runtime, memory of streams, and server restarts.

The ratios are measured on real models. Memory and restarts concern only the client, so they use a separate server with
a trivial model, and every answer is checked against its face.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.bench.contestants import bare_session
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Variant, Work, measure_in_turns
from arcface_build.bench.result import summarise
from arcface_build.errors import ProofFailed
from arcface_build.serving.ports import Ports
from arcface_clients import TritonEmbedder
from arcface_clients.errors import ContractMismatch, Missing, WrongUse
from arcface_clients.faces.check import Faces, to_gpu
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.memory.choice import SharedMemoryOption
from arcface_tools.quick_server import QUICK, quick_server

TRANSPORTS = ("grpc", "grpc-shm", "http", "http-shm")
# Through regions on the GPU: with faces on the host, and with faces already on the GPU.
GPU_TRANSPORTS = ("grpc-cudashm", "grpc-gpufaces", "http-cudashm", "http-gpufaces")


def run(
    onnx: Path | None,
    grpc_url: str,
    http_url: str,
    *,
    model: str = "arcface_onnx",
    server_pid: int | None = None,
    batch: int = 32,
    in_flight: Sequence[int] = (2, 4),
    transports: Sequence[str] = TRANSPORTS,
    rounds: int = 5,
    sample_s: float = 10.0,
    threads: int = 0,
    on_sample: Callable[[str, int], None] = lambda name, round_: None,
) -> dict[str, Any]:
    """Throughput of the client over each transport, interleaved with the bare session; JSON as from `arcface bench`.

    Args:
        onnx: the serving ONNX that the server runs; None omits the bare session.
        grpc_url: host:port of its gRPC.
        http_url: host:port of its HTTP.
        model: served model.
        server_pid: tritonserver's, if it runs on this host; its CPU time is then reported.
        batch: faces per request.
        in_flight: numbers of requests in flight; each is a separate variant.
        transports: from `TRANSPORTS` and `GPU_TRANSPORTS`.
        rounds: undisturbed rounds.
        sample_s: approximate length of a sample; several batches should fit.
        threads: of the bare session; 0 keeps ONNX Runtime's default.
        on_sample: called with the variant's name and the round.

    Raises:
        Missing: one of `GPU_TRANSPORTS` was requested, but the server does not open regions on a GPU.
        WrongUse: an unknown transport.
    """
    known = (*TRANSPORTS, *GPU_TRANSPORTS)
    if unknown := [transport for transport in transports if transport not in known]:
        raise WrongUse(f"unknown transport {unknown[0]!r}: expected one of {', '.join(known)}.")
    faces = synthetic_faces(4 * batch)
    urls = {"grpc": f"grpc://{grpc_url}", "http": f"http://{http_url}"}
    with contextlib.ExitStack() as stack:
        variants = [bare_session(onnx, faces, batch, threads)] if onnx else []
        for transport, count in itertools.product(transports, in_flight):
            embedder = TritonEmbedder(urls[transport[:4]], model, in_flight=count, shared_memory=_memory(transport))
            stack.enter_context(embedder).ensure_ready()
            if transport in GPU_TRANSPORTS and embedder.shared_memory.kind != "cuda":
                why = embedder.shared_memory.reason
                raise Missing(f"{transport} cannot be measured: {why}. Next: --transport grpc --transport grpc-shm")
            source = to_gpu(faces, embedder.served.gpu or 0) if transport.endswith("gpufaces") else faces
            variants.append(_streaming(f"client {transport} in flight {count}", embedder, source, batch, server_pid))
        samples = measure_in_turns(variants, rounds, sample_s, on_sample)
    return summarise(variants, samples, describe_host())


def run_quick(in_flight: Sequence[int], transports: Sequence[str] = TRANSPORTS, **settings: Any) -> dict[str, Any]:
    """`run` against the quick model, which leaves only the client and the transport to measure."""
    with quick_server() as server:
        process = server.start()
        return run(
            None,
            process.grpc_url,
            process.http_url,
            model=QUICK,
            in_flight=in_flight,
            transports=transports,
            **settings,
        )


def stream_memory(count: int = 1_000_000, transport: str = "grpc-shm") -> dict[str, Any]:
    """RSS of this process while a stream of `count` generated faces goes through the client, in MB of 10⁶ bytes."""
    faces = synthetic_faces(64)
    with quick_server() as server:
        server.start()
        with TritonEmbedder(_url(server.ports, transport), QUICK, shared_memory=transport.endswith("-shm")) as embedder:
            embedder.encode(faces)
            before_mb, answered, started = _rss_mb(), 0, time.perf_counter()
            highest_mb = before_mb
            source = (faces[i % 64] for i in range(count))
            for answered, _ in enumerate(embedder.encode_stream(source), 1):
                if answered % 10_000 == 0:
                    highest_mb = max(highest_mb, _rss_mb())
            seconds = time.perf_counter() - started
    return {
        "transport": transport,
        "faces": answered,
        "faces_per_s": answered / seconds,
        "rss_before_mb": before_mb,
        "rss_highest_mb": highest_mb,
        "peak_rss_of_process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def restarts(requests: int = 10_000, batch: int = 4, rounds: int = 2, transport: str = "grpc-shm") -> dict[str, Any]:
    """At least `requests` requests of `batch` faces, while in each round three things happen to the server.

    It is killed and restarted; the process behind its model is killed, and the model loaded again; the model is
    exchanged for one of another contract, which the client has to notice, and put back.

    Raises:
        ProofFailed: a face was answered wrongly, by another model, twice, out of order or not at all, or an exchange
            was not noticed.
    """
    faces = synthetic_faces(61)  # a prime: a lost or doubled batch shifts every later face
    total, seen, noticed = requests * batch, 0, 0
    done, exchanged, over = threading.Event(), threading.Event(), threading.Event()
    with quick_server() as server:
        server.start()
        url, shared = _url(server.ports, transport), transport.endswith("-shm")
        with TritonEmbedder(url, QUICK, shared_memory=False) as embedder:
            truth = np.concatenate([embedder.encode(face) for face in faces])
        events = [server.restart, server.kill_stub, lambda: server.exchange(exchanged, done)] * rounds
        trouble = threading.Thread(target=_in_turn, args=(events, lambda: seen, total, over, done))
        trouble.start()
        started = time.perf_counter()
        try:
            while seen < total or not over.is_set():
                with TritonEmbedder(url, QUICK, shared_memory=shared) as embedder:
                    numbers = itertools.takewhile(lambda i: i < total or not over.is_set(), itertools.count(seen))
                    source = (faces[i % len(faces)] for i in numbers)
                    try:
                        for row in embedder.encode_stream(source, batch_size=batch, retry_for_s=30):
                            if not np.allclose(row, truth[seen % len(faces)], atol=1e-5):
                                raise ProofFailed(f"face {seen} of the stream has the embedding of another one.")
                            seen += 1
                    except ContractMismatch:
                        noticed += 1
                        exchanged.set()
                        while exchanged.is_set() and trouble.is_alive():  # until the model is the former one again
                            time.sleep(0.01)
                    shared_memory = str(embedder.shared_memory)
        finally:
            done.set()
        seconds = time.perf_counter() - started
        trouble.join()
    if seen < total or noticed != rounds:
        raise ProofFailed(f"{seen} answers to {total} faces, and {noticed} of {rounds} exchanges were noticed.")
    return {
        "shared_memory": shared_memory,
        "requests": -(-seen // batch),
        "faces": seen,
        "kills": server.kills,
        "stub_kills": server.stub_kills,
        "exchanges": noticed,
        "wrong": 0,
        "seconds": seconds,
    }


def _in_turn(
    events: Sequence[Callable[[], None]],
    seen: Callable[[], int],
    total: int,
    over: threading.Event,
    done: threading.Event,
) -> None:
    """Each event when the stream has passed another even part of its way; then `over`."""
    for number, event in enumerate(events, 1):
        while seen() < total * number / (len(events) + 1):
            if done.wait(0.01):
                return
        event()
    over.set()
    done.wait()  # a server that this thread started would end with it (PR_SET_PDEATHSIG)


def _streaming(name: str, embedder: TritonEmbedder, faces: Faces, batch: int, pid: int | None) -> Variant:
    """A variant that streams batches through a client for some seconds; the time includes all answers."""
    batches = [faces[i : i + batch] for i in range(0, len(faces), batch)]

    def sample(seconds: float) -> Work:
        started = time.perf_counter()

        def source() -> Iterator[Faces]:
            for number in itertools.count():
                if number and time.perf_counter() - started > seconds:
                    return
                yield batches[number % len(batches)]

        answered = sum(len(rows) for rows in embedder.encode_stream(source(), batch_size=batch))
        return Work(answered, time.perf_counter() - started)

    about = {
        "batch": batch,
        "model": embedder.options.model,
        "in_flight": embedder.options.in_flight,
        "shared_memory": str(embedder.shared_memory),
    }
    return Variant(name, sample, "server" if pid else "process", (pid,) if pid else (), about)


def _memory(transport: str) -> SharedMemoryOption:
    kinds: dict[str, SharedMemoryOption] = {"": False, "shm": True}
    return kinds.get(transport.partition("-")[2], "cuda")


def _url(ports: Ports, transport: str) -> str:
    return f"http://127.0.0.1:{ports.http}" if transport.startswith("http") else f"grpc://127.0.0.1:{ports.grpc}"


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6
