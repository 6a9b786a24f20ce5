"""Measures fp32 runtimes that could be faster and stay exact: ncnn with Winograd against OpenVINO and ONNX Runtime.

Run: python -m arcface_tools.exact_fp32 docs/measured/exact-fp32-demo-r50.json MODEL_FOLDER NCNN_FILES
MODEL_FOLDER is that of an imported model. NCNN_FILES are NCNN_FILES.param and .bin, made from its source.onnx by
`pnnx source.onnx inputshape=[1,3,112,112] fp16=0`; ncnn and pnnx are packages of PyPI and nothing of ours needs them.
All contestants take the same faces in turns, in one run; ratios are paired within a round.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from arcface_build.bench.contestants import in_process, insightface_sessions
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Variant, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.result import summarise
from arcface_clients.arrays import FaceArray, FloatArray
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, Preprocessing
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import available_cores, open_session
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces

Encoder: TypeAlias = Callable[[FaceArray], FloatArray]
BATCH, ROUNDS, SAMPLE_S = 8, 7, 1.0
BASE, SHARED_OUT = "insightface b1", "ncnn, a process a core"
EXACT = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")  # off: everything in fp32


def main(target: Path, model_dir: Path, files: Path) -> None:
    """Measure one model and write the JSON."""
    manifest, faces = read_import_manifest(model_dir), synthetic_faces(2 * BATCH)
    serving, preprocessing = model_dir / manifest.serving["file"], manifest.wants()
    with ExitStack() as stack:
        processes = stack.enter_context(OneProcessPerCore(files, preprocessing))
        runtimes: dict[str, Encoder] = {
            "onnxruntime": onnx_encoder(serving, "onnxruntime"),
            "openvino-fp32": onnx_encoder(serving, "openvino-fp32"),
            "ncnn": ncnn_encoder(files, preprocessing, available_cores()),
        }
        encoders: dict[str, Encoder] = {**runtimes, SHARED_OUT: processes}
        expected = runtimes["onnxruntime"](faces)
        drift = {name: compare_embeddings(expected, encode(faces)).to_json() for name, encode in encoders.items()}
        variants: list[Variant] = insightface_sessions(model_dir / "source.onnx", faces, (1,))
        variants += [in_process(f"{name} b1", encode, faces, 1) for name, encode in runtimes.items()]
        variants += [in_process(f"{name} b{BATCH}", encode, faces, BATCH) for name, encode in encoders.items()]
        for variant in variants:
            variant.server_pids = processes.pids  # or their work would count as other people's
        samples = measure_in_turns(variants, ROUNDS, SAMPLE_S)
    result = summarise(variants, samples, describe_host())
    kept, _ = undisturbed_rounds(samples)
    names = [variant.name for variant in variants if variant.name != BASE]
    result["ratios"] = [{"variant": v, "base": BASE} | ratio(samples, v, BASE, kept).to_json() for v in names]
    result |= {"kind": "exact-fp32", "model": model_dir.name, "ncnn": metadata.version("ncnn"), "drift": drift}
    target.write_text(json.dumps(result, indent=2) + "\n")


def onnx_encoder(serving: Path, runtime: str) -> Encoder:
    """The serving ONNX in a runtime of ours, with all cores."""
    session = open_session(serving, runtime)
    return lambda faces: session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0]


def ncnn_encoder(files: Path, preprocessing: Preprocessing, threads: int) -> Encoder:
    """The network in ncnn, one face a call; preprocessing and normalisation in numpy."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for option in EXACT:
        setattr(net.opt, option, False)
    net.load_param(f"{files}.param")
    net.load_model(f"{files}.bin")

    def encode(faces: FaceArray) -> FloatArray:
        rows = []
        for pixels in preprocessing.apply(faces):
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(pixels))  # not copied: `pixels` must outlive the call
            rows.append(np.array(extractor.extract("out0")[1]))
        found = np.stack(rows)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return encode


class OneProcessPerCore:
    """ncnn with one thread in each of as many processes as there are cores: its Python binding holds the GIL."""

    def __init__(self, files: Path, preprocessing: Preprocessing) -> None:
        """Start them."""
        context = multiprocessing.get_context("spawn")
        self._ends, self._children = [], []
        for _ in range(available_cores()):
            mine, theirs = context.Pipe()
            child = context.Process(target=_answer, args=(theirs, files, preprocessing), daemon=True)
            child.start()
            self._ends.append(mine)
            self._children.append(child)
        self.pids = tuple(child.pid for child in self._children if child.pid)

    def __call__(self, faces: FaceArray) -> FloatArray:
        """Embeddings of a batch, its faces shared out."""
        for end, part in zip(self._ends, np.array_split(faces, len(self._ends)), strict=True):
            end.send(part)
        return np.concatenate([end.recv() for end in self._ends])

    def __enter__(self) -> OneProcessPerCore:
        """The processes themselves."""
        return self

    def __exit__(self, *_: Any) -> None:
        """End them."""
        for end, child in zip(self._ends, self._children, strict=True):
            end.send(None)
            child.join()


def _answer(end: Connection, files: Path, preprocessing: Preprocessing) -> None:
    encode = ncnn_encoder(files, preprocessing, 1)
    while (faces := end.recv()) is not None:
        end.send(encode(faces))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
