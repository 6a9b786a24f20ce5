"""Measures what YuNet costs as a served model of its own, called by `photo_faces`, against the session inside it.

Both run on one server, in turns: `photo_faces` as it is, and a copy of it whose looks go to a model `yunet` of the
onnxruntime backend (BLS), with as many instances on one thread each as `photo_faces` has.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Spread, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.photo_callers import callers_of, cpu_by_part
from arcface_build.bench.photos import asks
from arcface_build.bench.run import Bars
from arcface_build.bench.server import own_server
from arcface_build.errors import ProofFailed
from arcface_build.repository.detector import installed_detector
from arcface_build.repository.integrity import PHOTO_MODEL
from arcface_build.repository.versions import served_folder
from arcface_clients.errors import WrongUse
from arcface_clients.faces.steps.yunet import OUTPUTS, for_any_size
from arcface_clients.photos.embedder import PhotoEmbedder

INSIDE, SERVED = "inside", "served"
_COPY, _DETECTOR = "photo_faces_bls", "yunet"
_CALLS_IT = f'''

import triton_python_backend_utils as pb_utils


class _Served:
    """A session whose runs are requests to the model of the detector."""

    def run(self, names, feeds):
        request = pb_utils.InferenceRequest(
            model_name="{_DETECTOR}",
            requested_output_names=names,
            inputs=[pb_utils.Tensor("input", feeds["input"])],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = request.exec()
        if answer.has_error():
            raise RuntimeError(answer.error().message())
        return [pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in names]


class _ServedYuNet(YuNet):
    def __init__(self):
        self._session = _Served()


def open_yunet(file, threads):
    return _ServedYuNet()
'''
_CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: 0
input [ {{ name: "input" data_type: TYPE_FP32 dims: [ 1, 3, -1, -1 ] }} ]
output [ {outputs} ]
instance_group [ {{ count: 4 kind: KIND_CPU }} ]
parameters {{ key: "intra_op_thread_count" value: {{ string_value: "1" }} }}
"""
_WARM_UP = (
    "        find_faces(self.look, Photo(warm_up).pixels())"  # before its first request a model cannot call another
)


def run(
    photos: Sequence[bytes], repository: Path, *, callers: Sequence[int], rounds: int, sample_s: float, bars: Bars
) -> dict[str, Any]:
    """Photos a second and CPU of both ways; JSON.

    Args:
        photos: encoded photos, sent in turn.
        repository: the model repository, with YuNet and weights.
        callers: threads that each wait for an answer before they send the next photo.
        rounds: undisturbed rounds.
        sample_s: approximate length of a sample.
        bars: shows progress.

    Raises:
        WrongUse: another detector is installed.
        ProofFailed: the ways do not find the same faces.
    """
    if (installed_detector(repository) or {}).get("detector") != "yunet":
        raise WrongUse("YuNet is not installed: expected arcface import-detector face_detection_yunet_2023mar.onnx.")
    with ExitStack() as stack:
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arcface-bench-"))) / "model_repository"
        with_served_detector(repository, copy)
        server = stack.enter_context(own_server(copy, ["arcface", PHOTO_MODEL, _DETECTOR, _COPY], "onnx"))
        clients = {
            way: stack.enter_context(PhotoEmbedder(server.grpc_url, model))
            for way, model in ((INSIDE, PHOTO_MODEL), (SERVED, _COPY))
        }
        for photo in photos[:10]:
            inside, served = (np.array([face.box for face in client.faces(photo)]) for client in clients.values())
            if inside.shape != served.shape or not np.allclose(inside, served, atol=0.01):
                raise ProofFailed("the served detector finds other faces than the session: nothing is compared.")
        variants = [
            callers_of(f"{way} c{number}", asks(client), photos, number, server)
            for number in callers
            for way, client in clients.items()
        ]
        samples = measure_in_turns(variants, rounds, sample_s, stack.enter_context(bars(len(variants) * (rounds + 1))))
    kept, disturbed = undisturbed_rounds(samples)
    rows = [
        {
            "name": name,
            "photos_per_s": Spread.of([turns[r].faces_per_s for r in kept]).to_json(),
            "cpu_ms_per_photo": cpu_by_part([turns[r] for r in kept]),
            "cpu_ms": Spread.of([sum(turns[r].details["cpu_ms_per_photo"].values()) for r in kept]).to_json(),
        }
        for name, turns in samples.items()
    ]
    ratios = [
        {"callers": number, **ratio(samples, f"{SERVED} c{number}", f"{INSIDE} c{number}", kept).to_json()}
        for number in callers
    ]
    return {
        "host": describe_host(),
        "photos": len(photos),
        "variants": rows,
        "ratios": ratios,
        "rounds": {"measured": len(next(iter(samples.values()))), "kept": kept, "disturbed": disturbed},
    }


def text(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{row['name']:12} {row['photos_per_s']['median']:6.1f} photos/s, ms CPU {row['cpu_ms']['median']:.1f}: "
        + ", ".join(f"{part} {ms:.1f}" for part, ms in row["cpu_ms_per_photo"].items() if ms >= 0.05)
        for row in result["variants"]
    ]
    for row in result["ratios"]:
        lines.append(
            f"{SERVED} / {INSIDE}, {row['callers']} callers: {row['median']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
        )
    if result["rounds"]["disturbed"]:
        lines.append("NOT RELIABLE: other processes used the CPU in nearly every round. Measure on an idle machine.")
    return "\n".join(lines)


def with_served_detector(repository: Path, target: Path) -> None:
    """A repository with `arcface`, `photo_faces`, the detector as a model, and the `photo_faces` that calls it."""
    for model in ("arcface", "arcface_onnx", PHOTO_MODEL):
        shutil.copytree(repository / model, target / model, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(target / PHOTO_MODEL, target / _COPY)
    config = target / _COPY / "config.pbtxt"
    config.write_text(config.read_text().replace(f'name: "{PHOTO_MODEL}"', f'name: "{_COPY}"'))
    version = target / _COPY / served_folder(target, PHOTO_MODEL).name
    with (version / "yunet.py").open("a") as steps:
        steps.write(_CALLS_IT)
    code = version / "model.py"
    code.write_text(code.read_text().replace(_WARM_UP, "        Photo(warm_up).pixels()"))
    detector = target / _DETECTOR
    (detector / "1").mkdir(parents=True)
    (detector / "1" / "model.onnx").write_bytes(for_any_size((version / "detector.onnx").read_bytes()))
    widths = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
    shapes = {name: f"1, -1, {widths[name.partition('_')[0]]}" for name in OUTPUTS}
    outputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_FP32 dims: [ {dims} ] }}' for name, dims in shapes.items())
    (detector / "config.pbtxt").write_text(_CONFIG.format(name=_DETECTOR, outputs=outputs))
