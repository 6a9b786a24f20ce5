"""Measures what could make fp32 faster and stay exact: Winograd's method in our graph, in ncnn, in MNN and in OpenCV.

Run: python -m arcface_tools.exact_fp32 docs/measured/exact-fp32-demo-r50.json MODEL_FOLDER NCNN_FILES MNN_FILE
MODEL_FOLDER is that of an imported model. NCNN_FILES are NCNN_FILES.param and .bin, made from its source.onnx by
`pnnx source.onnx inputshape=[1,3,112,112] fp16=0`; MNN_FILE is made from it by MNN's converter, without compression.
ncnn, pnnx and MNN are packages of PyPI that nothing of ours needs: install them elsewhere and add that to PYTHONPATH.
The command `mnnconvert` of MNN's wheel installs packages by itself; its library does not: `import MNN, _tools` and call
`_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", IN, "--MNNModel", OUT, "--bizCode", "x"])`.
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

import cv2
import numpy as np
import onnx

from arcface_build.bench.contestants import in_process, insightface_sessions
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Variant, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.result import summarise
from arcface_build.graph.winograd import winograd
from arcface_clients.arrays import FaceArray, FloatArray
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, Preprocessing
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import available_cores, open_session
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces

Encoder: TypeAlias = Callable[[FaceArray], FloatArray]
BATCH, LARGE, ROUNDS, SAMPLE_S = 8, 32, 5, 0.5
BASE, SHARED_OUT = "insightface b1", "ncnn, a process a core"
IN_LARGE = ("onnxruntime", "openvino-fp32", "winograd openvino-fp32")
EXACT = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")  # off: everything in fp32


def main(target: Path, model_dir: Path, files: Path, mnn_file: Path) -> None:
    """Measure one model and write the JSON."""
    manifest, faces = read_import_manifest(model_dir), synthetic_faces(LARGE)
    serving, preprocessing = model_dir / manifest.serving["file"], manifest.wants()
    with ExitStack() as stack:
        processes = stack.enter_context(OneProcessPerCore(files, preprocessing))
        runtimes: dict[str, Encoder] = {
            "onnxruntime": onnx_encoder(serving, "onnxruntime"),
            "openvino-fp32": onnx_encoder(serving, "openvino-fp32"),
            "winograd onnxruntime": onnx_encoder(winograd_form(serving), "onnxruntime"),
            "winograd openvino-fp32": onnx_encoder(winograd_form(serving), "openvino-fp32"),
            "ncnn": ncnn_encoder(files, preprocessing, available_cores()),
            "mnn": mnn_encoder(mnn_file, preprocessing),
            "opencv": opencv_encoder(model_dir / "source.onnx", preprocessing),
        }
        encoders: dict[str, Encoder] = {**runtimes, SHARED_OUT: processes}
        expected = runtimes["onnxruntime"](faces)
        drift = {name: compare_embeddings(expected, encode(faces)).to_json() for name, encode in encoders.items()}
        variants: list[Variant] = insightface_sessions(model_dir / "source.onnx", faces, (1,))
        variants += [in_process(f"{name} b1", encode, faces, 1) for name, encode in runtimes.items()]
        variants += [in_process(f"{name} b{BATCH}", encode, faces, BATCH) for name, encode in encoders.items()]
        variants += [in_process(f"{name} b{LARGE}", runtimes[name], faces, LARGE) for name in IN_LARGE]
        for variant in variants:
            variant.server_pids = processes.pids  # or their work would count as other people's
        samples = measure_in_turns(variants, ROUNDS, SAMPLE_S)
    result = summarise(variants, samples, describe_host())
    kept, _ = undisturbed_rounds(samples)
    pairs = [(variant.name, BASE) for variant in variants if variant.name != BASE]
    pairs += [(f"winograd openvino-fp32 b{b}", f"openvino-fp32 b{b}") for b in (1, BATCH, LARGE)]
    result["ratios"] = [{"variant": v, "base": b} | ratio(samples, v, b, kept).to_json() for v, b in pairs]
    result |= {"kind": "exact-fp32", "model": model_dir.name, "drift": drift}
    result |= {package: metadata.version(package) for package in ("ncnn", "mnn")} | {"opencv": cv2.__version__}
    target.write_text(json.dumps(result, indent=2) + "\n")


def winograd_form(serving: Path) -> onnx.ModelProto:
    """The serving ONNX with its 3×3 convolutions by Winograd's method."""
    return winograd(onnx.load(serving)).model


def onnx_encoder(serving: Path | onnx.ModelProto, runtime: str) -> Encoder:
    """A serving ONNX in a runtime of ours, with all cores."""
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


def mnn_encoder(file: Path, preprocessing: Preprocessing) -> Encoder:
    """The network in MNN, one session a batch size."""
    import MNN

    network = MNN.Interpreter(str(file))
    sessions: dict[int, Any] = {}

    def encode(faces: FaceArray) -> FloatArray:
        pixels = np.ascontiguousarray(preprocessing.apply(faces))
        if len(faces) not in sessions:
            settings = {"backend": "CPU", "numThread": available_cores(), "precision": "high"}
            session = sessions[len(faces)] = network.createSession(settings)
            network.resizeTensor(network.getSessionInput(session), pixels.shape)
            network.resizeSession(session)
        session = sessions[len(faces)]
        float32, nchw = MNN.Halide_Type_Float, MNN.Tensor_DimensionType_Caffe
        network.getSessionInput(session).copyFrom(MNN.Tensor(pixels.shape, float32, pixels, nchw))
        network.runSession(session)
        found = network.getSessionOutput(session)
        shape = found.getShape()
        host = MNN.Tensor(shape, float32, np.zeros(shape, np.float32), nchw)
        found.copyToHostTensor(host)
        rows = np.array(host.getNumpyData()).reshape(len(faces), -1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return encode


def opencv_encoder(source: Path, preprocessing: Preprocessing) -> Encoder:
    """The source ONNX in OpenCV's dnn module, which has Winograd convolutions for AVX2."""
    network = cv2.dnn.readNetFromONNX(str(source))
    network.enableWinograd(True)

    def encode(faces: FaceArray) -> FloatArray:
        network.setInput(np.ascontiguousarray(preprocessing.apply(faces)))
        rows = network.forward().copy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

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
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
