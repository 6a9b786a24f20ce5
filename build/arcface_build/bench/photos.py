"""Photos a second through the server, in turns with the same work in this process, and where the server's time goes.

This process does it in two ways. "One process" runs the files that are served, in the runtimes that they are served in.
"Usual parts" is what people run today: YuNet through OpenCV's own wrapper, and InsightFace on the model as it was
given, in fp32, one face a call, in a session as ONNX Runtime opens it.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.bench.cpu_time import tree_cpu_by_pid
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Sample, Spread, Variant, Work, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.run import Bars
from arcface_build.bench.server import ServerUnderTest, own_server
from arcface_build.repository.detector import photo_models
from arcface_build.repository.versions import served_folder, served_manifest
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.insightface import InsightFaceEngine
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.faces.detect import FaceDetector
from arcface_clients.photos.embedder import PhotoEmbedder

STAGES = ("decode", "detect", "align", "embed")
HERE, USUAL, SERVER = "one process", "usual parts", "server"
LEAF_OF = {"tensorrt": "arcface_trt", "reference": "arcface_reference"}  # by Triton's --model-config-name
METRICS_BEHIND_S = 0.7  # photo_faces tells Triton its sums twice a second
Answer = Callable[[bytes], int]
"""A photo's bytes in, the number of its faces out."""


def measure_photos(
    photos: Sequence[bytes],
    repository: Path,
    *,
    callers: Sequence[int],
    rounds: int,
    sample_s: float,
    config: str = "onnx",
    single_face: bool = False,
    bars: Bars,
) -> dict[str, Any]:
    """Measure both ways at each number of callers; returns the result's JSON.

    Args:
        photos: encoded photos, sent in turn.
        repository: model repository with a detector; the server is our own, on free ports.
        callers: threads that each wait for an answer before they send the next photo.
        rounds: undisturbed rounds; each measures everything once.
        sample_s: approximate length of a sample.
        config: Triton's --model-config-name.
        single_face: only with the photos that show exactly one face.
        bars: shows progress.

    Raises:
        WrongUse: no photos, or none with a single face.
        Missing: no detector is installed, or no weights.
    """
    if not photos:
        raise WrongUse(
            "no photos to measure with: expected JPEG, PNG or other photos. Next: arcface bench-photos FOLDER"
        )
    models, why = photo_models(repository)
    if not models:
        raise Missing(why)
    host, here = describe_host(), one_process(repository)
    photos = [photo for photo in photos if not single_face or here(photo) == 1]
    if not photos:
        raise WrongUse("no photo shows exactly one face. Next: arcface bench-photos FOLDER")
    with ExitStack() as stack:
        server = stack.enter_context(own_server(repository, ["arcface", *models], config))
        client = stack.enter_context(PhotoEmbedder(server.grpc_url))
        ways = {HERE: here, USUAL: usual_parts(repository), SERVER: asks(client)}
        faces = {way: sum(map(answer, photos)) for way, answer in ways.items()}
        variants = []
        for number in callers:
            variants += [callers_of(f"{way} c{number}", ways[way], photos, number) for way in (HERE, USUAL)]
            variants.append(callers_of(f"{SERVER} c{number}", ways[SERVER], photos, number, server))
        advance = stack.enter_context(bars(len(variants) * (rounds + 1)))
        samples = measure_in_turns(variants, rounds, sample_s, advance)
    kept, disturbed = undisturbed_rounds(samples)
    rows = [
        {
            "name": variant.name,
            "photos_per_s": Spread.of([samples[variant.name][r].faces_per_s for r in kept]).to_json(),
            "latency_ms": Spread.of([ms for r in kept for ms in samples[variant.name][r].latencies_ms]).to_json(),
            "cpu_ms_per_photo": cpu_by_part([samples[variant.name][r] for r in kept]),
        }
        for variant in variants
    ]
    ratios = {
        way: [{"callers": n, **ratio(samples, f"{SERVER} c{n}", f"{way} c{n}", kept).to_json()} for n in callers]
        for way in (HERE, USUAL)
    }
    waterfalls = {
        str(n): _median([samples[f"{SERVER} c{n}"][r].details["ms_per_photo"] for r in kept]) for n in callers
    }
    return {
        "host": host,
        "photos": len(photos),
        "faces": faces,
        "runs": what_runs(repository, config),
        "variants": rows,
        "ratios": ratios[HERE],
        "ratios_to_usual_parts": ratios[USUAL],
        "waterfall_ms": waterfalls,
        "rounds": {"measured": len(next(iter(samples.values()))), "kept": kept, "disturbed": disturbed},
    }


def what_runs(repository: Path, config: str) -> dict[str, str]:
    """Model, precision and runtime of each way, in words."""
    given = served_manifest(repository, "arcface_reference") or {}
    return {
        HERE: f"{_leaf(repository, 'arcface_onnx')}, all faces of a photo in one call; the detector as it is served",
        USUAL: f"{given.get('name')} as it was given, fp32 in onnxruntime through InsightFace, one face a call; "
        "YuNet in OpenCV",
        SERVER: _leaf(repository, LEAF_OF.get(config, "arcface_onnx")),
    }


def _leaf(repository: Path, leaf: str) -> str:
    """What a leaf model serves, in words."""
    manifest = served_manifest(repository, leaf) or {}
    default = {"arcface_trt": "TensorRT", "arcface_reference": "onnxruntime through InsightFace"}.get(leaf)
    runtime = default or _runtime(manifest)
    return f"{manifest.get('name')} {manifest.get('precision', 'fp32')} in {runtime}"


def _runtime(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("variant", {}).get("runtime", "onnxruntime"))


def one_process(repository: Path) -> Answer:
    """Decode, detect, align and embed in this process, with the files and runtimes that are served; for any threads."""
    detector = FaceDetector(served_folder(repository, "photo_faces") / "detector.onnx")
    runtime = _runtime(served_manifest(repository, "arcface_onnx") or {})
    session = open_session(served_folder(repository, "arcface_onnx") / "model.onnx", runtime)

    def answer(photo: bytes) -> int:
        faces = detector.detect_encoded(photo)
        if faces:
            session.run([EMBEDDING_OUTPUT], {FACE_INPUT: np.stack([face.face for face in faces])})
        return len(faces)

    return answer


def usual_parts(repository: Path) -> Answer:
    """The same with YuNet through OpenCV and InsightFace on the source ONNX, one face a call; for several threads."""
    detector = FaceDetector(served_folder(repository, "photo_faces") / "detector.onnx", opencv=True)
    engine = InsightFaceEngine(served_folder(repository, "arcface_reference") / "source.onnx", settings={})
    engine.ensure_ready()

    def answer(photo: bytes) -> int:
        faces = detector.detect_encoded(photo)
        for face in faces:
            engine.encode(face.face[None])
        return len(faces)

    return answer


def photos_text(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{way}: {runs}" for way, runs in result["runs"].items()]
    lines += ["", f"{'':20} {'photos/s':>9} {'p10–p90':>17} {'ms a photo':>11} {'ms CPU':>7}"]
    for row in result["variants"]:
        speed = row["photos_per_s"]
        span = f"{speed['low']:8.1f}–{speed['high']:<8.1f}"
        cpu_ms = sum(row["cpu_ms_per_photo"].values())
        lines.append(
            f"{row['name']:20} {speed['median']:9.1f} {span} {row['latency_ms']['median']:11.1f} {cpu_ms:7.2f}"
        )
    for way, key in ((HERE, "ratios"), (USUAL, "ratios_to_usual_parts")):
        lines += ["", f"{SERVER} / {way}, within a round: median (p10–p90)"]
        for row in result[key]:
            lines.append(f"  {row['median']:.3f} ({row['low']:.3f}–{row['high']:.3f})  {row['callers']} callers")
    lines += ["", "where a photo's time goes on the server, ms"]
    for callers, steps in result["waterfall_ms"].items():
        lines.append(f"  {callers:>2} callers: " + ", ".join(f"{step} {ms:.2f}" for step, ms in steps.items()))
    found = result["faces"]
    lines.append("faces found: " + ", ".join(f"{number} {way}" for way, number in found.items()))
    if result["rounds"]["disturbed"]:
        lines.append("NOT RELIABLE: other processes used the CPU in nearly every round. Measure on an idle machine.")
    return "\n".join(lines)


def asks(client: PhotoEmbedder) -> Answer:
    """Asks the server."""
    return lambda photo: len(client.faces(photo))


def callers_of(
    name: str, answer: Answer, photos: Sequence[bytes], callers: int, server: ServerUnderTest | None = None
) -> Variant:
    """`callers` threads that answer photos in turn. Its "faces a second" are photos a second."""
    turn = count()

    def sample(seconds: float) -> Work:
        latencies_s: list[float] = []
        lock, before = threading.Lock(), _counters(server)
        started = time.perf_counter()

        def call() -> None:
            while True:
                sent = time.perf_counter()
                answer(photos[next(turn) % len(photos)])
                now = time.perf_counter()
                with lock:
                    latencies_s.append(now - sent)
                if now - started >= seconds:
                    return

        spent = _cpu_s(server)
        with ThreadPoolExecutor(callers) as pool:
            for future in [pool.submit(call) for _ in range(callers)]:
                future.result()
        wall_s = time.perf_counter() - started
        spent = {side: seconds - spent[side] for side, seconds in _cpu_s(server).items()}
        details: dict[str, Any] = {
            "cpu_ms_per_photo": {side: 1000 * seconds / len(latencies_s) for side, seconds in spent.items()}
        }
        if server is not None:
            time.sleep(METRICS_BEHIND_S)
            details["ms_per_photo"] = _split(before, _counters(server), 1000 * float(np.mean(latencies_s)))
        return Work(len(latencies_s), wall_s, [1000 * s for s in latencies_s], details=details)

    return Variant(name, sample, "server" if server else "process", (server.pid,) if server and server.pid else ())


def cpu_by_part(samples: Sequence[Sample]) -> dict[str, float]:
    """Medians of the milliseconds of CPU a photo, by process."""
    return _median([sample.details["cpu_ms_per_photo"] for sample in samples])


def _split(before: dict[str, float], after: dict[str, float], latency_ms: float) -> dict[str, float]:
    """Milliseconds of a photo by step, from Triton's metrics; the rest of the caller's time is receive and answer."""
    grown = {name: after[name] - before.get(name, 0) for name in after}
    photos = grown['arcface_photos{outcome="answered"}'] or 1
    request_us, queue_us = (
        sum(value for name, value in grown.items() if name.startswith(f"nv_inference_{kind}_duration_us"))
        for kind in ("request", "queue")
    )
    steps = {stage: grown[f'arcface_photo_stage_us{{stage="{stage}"}}'] / photos / 1000 for stage in STAGES}
    inside = request_us / photos / 1000
    queue = queue_us / photos / 1000
    return {
        "receive and answer": latency_ms - inside,
        "wait for an instance": queue,
        **steps,
        "between the steps": inside - queue - sum(steps.values()),
    }


def _counters(server: ServerUnderTest | None) -> dict[str, float]:
    """The metrics of `photo_faces` by their full names."""
    if server is None:
        return {}
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "photo" in name}


def _cpu_s(server: ServerUnderTest | None) -> dict[str, float]:
    """CPU seconds since their start: of this process, of tritonserver itself, and of each model's instances."""
    spent = {"this process": time.process_time()}
    if server is None or not server.pid:
        return spent
    for pid, seconds in tree_cpu_by_pid(server.pid).items():
        name = "tritonserver"
        if pid != server.pid:  # an instance of a Python model, whose first argument is the path of its version's file
            name = Path((Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[1].decode()).parent.parent.name
        spent[name] = spent.get(name, 0) + seconds
    return spent


def _median(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([each[name] for each in steps])) for name in steps[0]}
