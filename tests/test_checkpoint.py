"""Checkpoints: read without running what stands in them, and built into the network that torch would run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from arcface_build.errors import SourceRefused
from arcface_build.imports.importing import import_model
from arcface_build.imports.iresnet import DEPTHS, iresnet
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.source import known_models, resolve, with_file
from arcface_build.imports.tensors import read_tensors
from arcface_clients.contract import Preprocessing
from arcface_clients.faces.synthetic import synthetic_faces

FACES = synthetic_faces(4)


def state_dict(blocks: tuple[int, ...], seed: int = 0, dim: int = 512) -> dict[str, np.ndarray]:
    """Random tensors with the names and shapes of an IResNet of arcface_torch."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}

    def conv(name: str, out: int, into: int, kernel: int) -> None:
        scale = 1 / np.sqrt(into * kernel * kernel)
        found[f"{name}.weight"] = rng.normal(0, scale, (out, into, kernel, kernel)).astype(np.float32)

    def batch_norm(name: str, size: int) -> None:
        for part, low, high in (("weight", 0.5, 1.5), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2)):
            found[f"{name}.{part}"] = rng.uniform(low, high, size).astype(np.float32)
        found[f"{name}.running_var"] = rng.uniform(0.5, 2, size).astype(np.float32)
        found[f"{name}.num_batches_tracked"] = np.array(7, np.int64)

    conv("conv1", 64, 3, 3)
    batch_norm("bn1", 64)
    found["prelu.weight"] = rng.uniform(0.1, 0.4, 64).astype(np.float32)
    into = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            batch_norm(f"{name}.bn1", into)
            conv(f"{name}.conv1", width, into, 3)
            batch_norm(f"{name}.bn2", width)
            found[f"{name}.prelu.weight"] = rng.uniform(0.1, 0.4, width).astype(np.float32)
            conv(f"{name}.conv2", width, width, 3)
            batch_norm(f"{name}.bn3", width)
            if block == 0:
                conv(f"{name}.downsample.0", width, into, 1)
                batch_norm(f"{name}.downsample.1", width)
            into = width
    batch_norm("bn2", 512)
    found["fc.weight"] = rng.normal(0, 0.006, (dim, 512 * 49)).astype(np.float32)
    found["fc.bias"] = rng.normal(0, 0.1, dim).astype(np.float32)
    batch_norm("features", dim)
    return found


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    header, blobs, at = {}, [], 0
    for name, value in tensors.items():
        blobs.append(value.tobytes())
        kind = {"f": "F", "i": "I"}[value.dtype.kind] + str(value.itemsize * 8)
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))
    return path


@pytest.mark.parametrize("blocks", DEPTHS, ids=DEPTHS.values())
def test_the_architecture_is_known_from_names_and_shapes(blocks: tuple[int, ...]) -> None:
    tensors = {name: np.broadcast_to(np.float32(0.1), value.shape) for name, value in state_dict(blocks).items()}
    model, what = iresnet(tensors, "backbone.pth")
    assert what == f"IResNet {DEPTHS[blocks]}, built from the tensors of backbone.pth"
    assert sum(node.op_type == "Add" for node in model.graph.node) == sum(blocks)


def test_a_safetensors_backbone_is_imported(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "backbone.safetensors", state_dict((2, 2, 2, 2)))
    source = with_file(resolve(str(path), tmp_path, known=known_models()))
    manifest = import_model(source, tmp_path / "models" / "m", ProofFaces(FACES, "synthetic"))
    assert (manifest.source["kind"], manifest.source["file"], manifest.dim) == ("checkpoint", path.name, 512)
    assert manifest.wants() == Preprocessing()


def zipped_pickle(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path


class Harmful:
    """Unpickled, it runs a command."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    "what",
    [
        Harmful(os.system, "touch harmed"),
        Harmful(eval, "open('harmed', 'w')"),
        Harmful(getattr, str, "upper"),
        {"conv1.weight": Harmful(exec, "open('harmed', 'w')")},
        Harmful(__import__, "antigravity"),
    ],
    ids=["os.system", "eval", "getattr", "inside a dict", "__import__"],
)
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    what: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = zipped_pickle(tmp_path / "backbone.pth", pickle.dumps(what))
    with pytest.raises(SourceRefused, match=r"refers to \S+, which would run code: expected only tensors"):
        read_tensors(path)
    assert not (tmp_path / "harmed").exists()


def tensor_pickle(size: int, stride: int, count: int = 4) -> bytes:
    """A pickle of one tensor of `size` numbers, `stride` apart, in a storage of `count`."""
    name = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    storage = name + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK" + bytes([count])
    shape = b"tQK\x00K" + bytes([size]) + b"\x85K" + bytes([stride]) + b"\x85\x89NtR."
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + storage + shape


@pytest.mark.parametrize(("size", "stride", "count"), [(100, 1, 4), (4, 200, 4), (4, 1, 100)])
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(
    size: int, stride: int, count: int, tmp_path: Path
) -> None:
    path = zipped_pickle(tmp_path / "backbone.pth", tensor_pickle(size, stride, count))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(SourceRefused, match=r"lies outside its storage|contains 4 of 100 numbers"):
        read_tensors(path)


def test_files_that_lie_about_their_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    head = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(SourceRefused, match="x lies outside the file"):
        read_tensors(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(SourceRefused, match="its header would be"):
        read_tensors(path)
    old = tmp_path / "old.pth"
    old.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(SourceRefused, match=r"it is not a zip, so torch before 1\.6 wrote it"):
        read_tensors(old)


OTHERS = {
    "a head": ({"weight": np.zeros((100, 512), np.float32)}, "contains the classification head (weight)"),
    "another network": ({"stem.w": np.zeros(3, np.float32)}, "contains another network"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_something_else_is_named(what: str) -> None:
    tensors, message = OTHERS[what]
    with pytest.raises(SourceRefused) as caught:
        iresnet(tensors, "net.pth")
    assert message in str(caught.value) and "Import its backbone" in str(caught.value)


def test_missing_and_additional_tensors_are_named() -> None:
    tensors = state_dict((2, 2, 2, 2))
    with pytest.raises(SourceRefused, match=r"is an IResNet with extra tensors \(layer1\.0\.se\.fc1\.weight\)"):
        iresnet({**tensors, "layer1.0.se.fc1.weight": np.zeros(3, np.float32)}, "net.pth")
    del tensors["layer3.1.bn2.running_var"]
    with pytest.raises(SourceRefused, match=r"expected layer3\.1\.bn2\.running_var of rank 1, got nothing"):
        iresnet(tensors, "net.pth")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wrapped", ["", "state_dict", "state_dict_backbone"])
def test_a_pth_written_by_torch_is_the_network_that_torch_runs(dtype: str, wrapped: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {n: torch.from_numpy(np.array(v)) for n, v in state_dict((2, 2, 2, 2)).items()}
    tensors = {n: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for n, v in tensors.items()}
    head = {"weight": torch.zeros(10, 512)}  # what arcface_torch saves beside the backbone
    inside = {f"module.{n}": v for n, v in tensors.items()}
    saved = {"epoch": 3, wrapped: inside, "state_dict_softmax_fc": head} if wrapped else tensors
    path = tmp_path / "backbone.pth"
    torch.save(saved, path)
    model, _ = iresnet(read_tensors(path), path.name)
    blob = Preprocessing().apply(FACES)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"input.1": blob})[0]
    with torch.no_grad():
        expected = eager(torch, {n: v.float() for n, v in tensors.items()}, torch.from_numpy(blob)).numpy()
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (got, expected)]
    assert (unit[0] * unit[1]).sum(axis=1).min() >= 0.999999
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def eager(torch: object, t: dict, x: object) -> object:
    """arcface_torch's IResNet, written down from its description: torch does the arithmetic."""
    f = torch.nn.functional

    def batch_norm(name: str, x: object) -> object:
        parts = (t[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, *parts, training=False, eps=1e-5)

    x = f.prelu(batch_norm("bn1", f.conv2d(x, t["conv1.weight"], padding=1)), t["prelu.weight"])
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride, short = f"layer{stage}.{block}", 1 if block else 2, x
            x = f.conv2d(batch_norm(f"{name}.bn1", x), t[f"{name}.conv1.weight"], padding=1)
            x = f.prelu(batch_norm(f"{name}.bn2", x), t[f"{name}.prelu.weight"])
            x = batch_norm(f"{name}.bn3", f.conv2d(x, t[f"{name}.conv2.weight"], stride=stride, padding=1))
            if stride == 2:
                short = f.conv2d(short, t[f"{name}.downsample.0.weight"], stride=2)
                short = batch_norm(f"{name}.downsample.1", short)
            x = x + short
    x = f.linear(batch_norm("bn2", x).flatten(1), t["fc.weight"], t["fc.bias"])
    return batch_norm("features", x)
