"""Photos a second through the server, in turns with the same work in this process, and where the server's time goes.

This process does it in two ways. "One process" runs the files that are served, in the runtimes that they are served in.
"Usual parts" is what people run today: YuNet through OpenCV's own wrapper, and InsightFace on the model as it was
given, in fp32, one face a call, in a session as ONNX Runtime opens it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Sample, Spread, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.photo_callers import Answer, callers_of, cpu_by_part, median_of
from arcface_build.bench.run import Bars
from arcface_build.bench.server import own_server
from arcface_build.repository.detector import photo_models
from arcface_build.repository.versions import served_folder, served_manifest
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.insightface import InsightFaceEngine
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.faces.detect import FaceDetector
from arcface_clients.photos.embedder import PhotoEmbedder

HERE, USUAL, SERVER = "one process", "usual parts", "server"
LEAF_OF = {"tensorrt": "arcface_trt", "reference": "arcface_reference"}  # by Triton's --model-config-name


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
    return {
        "host": host,
        "photos": len(photos),
        "faces": faces,
        "runs": what_runs(repository, config),
        **_figures(samples, callers),
    }


def _figures(samples: Mapping[str, Sequence[Sample]], callers: Sequence[int]) -> dict[str, Any]:
    """What the result says of the samples, from the undisturbed rounds alone."""
    kept, disturbed = undisturbed_rounds(samples)
    rows = [
        {
            "name": name,
            "photos_per_s": Spread.of([of[r].faces_per_s for r in kept]).to_json(),
            "latency_ms": Spread.of([ms for r in kept for ms in of[r].latencies_ms]).to_json(),
            "cpu_ms_per_photo": cpu_by_part([of[r] for r in kept]),
        }
        for name, of in samples.items()
    ]
    ratios = {
        way: [{"callers": n, **ratio(samples, f"{SERVER} c{n}", f"{way} c{n}", kept).to_json()} for n in callers]
        for way in (HERE, USUAL)
    }
    waterfalls = {
        str(n): median_of([samples[f"{SERVER} c{n}"][r].details["ms_per_photo"] for r in kept]) for n in callers
    }
    return {
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
    form = manifest.get("variant", {}).get("form")
    words = (manifest.get("name"), manifest.get("precision", "fp32"), form and f"by {form}")
    return f"{' '.join(filter(None, words))} in {default or _runtime(manifest)}"


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


def asks(client: PhotoEmbedder) -> Answer:
    """Asks the server."""
    return lambda photo: len(client.faces(photo))


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
