"""Sources: packs from InsightFace's cache or its own downloader, known models by digest; what is absent is said."""

from __future__ import annotations

import gc
import http.server
import io
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import LicenceNotAccepted, SourceRefused
from arcface_build.imports.source import KnownModels, file_digest, known_models, resolve
from arcface_clients.errors import Missing, WrongUse
from tiny_nets import tiny_net

PACK = {"licence": "non-commercial research", "url": "https://example.invalid/buffalo_s.zip"}


def small(sides: int, outputs: int = 1) -> bytes:
    """A one-node graph that looks like one of the other models of a pack."""
    nodes = [helper.make_node("Mul", ["x", "w"], [f"y{i}"]) for i in range(outputs)]
    shape = ["N", 3, sides, sides]
    graph = helper.make_graph(
        nodes,
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, shape) for i in range(outputs)],
        [numpy_helper.from_array(np.float32([1]), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def pack_files() -> dict[str, bytes]:
    return {
        "zzz_last.onnx": small(640, outputs=9),
        "1k3d68.onnx": small(192),
        "genderage.onnx": small(96),
        "called_anything.onnx": tiny_net(batch="None").SerializeToString(),
    }


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "insightface" / "models" / "buffalo_s" / "buffalo_s"  # antelopev2 is nested like this
    folder.mkdir(parents=True)
    for name, data in pack_files().items():
        (folder / name).write_bytes(data)
    return tmp_path / "insightface"


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A real HTTP server in the place of InsightFace's model zoo; the dict says what it holds."""
    held: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = held.get(self.path.lstrip("/"))
            self.send_response(200 if data is not None else 404)
            self.send_header("content-length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr("insightface.utils.storage.MODEL_ZOO_RELEASE_DOWNLOAD_URL", address)
    held["address"] = address.encode()
    yield held
    server.shutdown()
    thread.join()
    server.server_close()
    with warnings.catch_warnings():  # InsightFace's download_file leaves its connection to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_the_recognition_file_of_a_pack_is_found_by_its_graph(cache: Path, tmp_path: Path) -> None:
    source = resolve("buffalo_s", tmp_path, known=KnownModels(packs={"buffalo_s": PACK}), insightface_root=cache)
    assert source.path.name == "called_anything.onnx"
    assert (source.kind, source.name, source.licence) == ("pack", "buffalo_s", "non-commercial research")


def test_a_folder_is_a_pack_too(cache: Path, tmp_path: Path) -> None:
    source = resolve(str(cache / "models"), tmp_path, known=known_models())
    assert (source.path.name, source.kind, source.name) == ("called_anything.onnx", "file", "called_anything")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceRefused, match=r"contains 0 recognition models: expected one \(no ONNX file\)"):
        resolve(str(tmp_path / "empty"), tmp_path, known=known_models())


def test_insightface_home_is_where_packs_are_looked_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", str(cache))
    assert resolve("buffalo_s", tmp_path, known=KnownModels(packs={"buffalo_s": PACK})).kind == "pack"


def test_a_pack_with_two_recognition_models_asks_for_the_file(cache: Path, tmp_path: Path) -> None:
    folder = cache / "models" / "buffalo_s" / "buffalo_s"
    (folder / "second.onnx").write_bytes(tiny_net(seed=1).SerializeToString())
    with pytest.raises(
        SourceRefused, match=r"2 recognition models: expected one \(called_anything.onnx, second.onnx\)"
    ):
        resolve("buffalo_s", tmp_path, known=KnownModels(packs={"buffalo_s": PACK}), insightface_root=cache)


def test_a_download_needs_the_licence_accepted(tmp_path: Path) -> None:
    with pytest.raises(LicenceNotAccepted) as caught:
        resolve("buffalo_s", tmp_path, known=KnownModels(packs={"buffalo_s": PACK}), insightface_root=tmp_path / "no")
    assert str(caught.value) == (
        f"buffalo_s is not in {tmp_path}/no/models/buffalo_s; its weights are licensed for non-commercial research: "
        "expected --accept-license before the download. Next: arcface import buffalo_s --accept-license"
    )
    assert not (tmp_path / "no").exists()


def test_insightface_downloads_the_pack_and_it_appears_whole(
    tmp_path: Path, zoo: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in pack_files().items():
            file.writestr(name, data)
    zoo["buffalo_s.zip"] = archive.getvalue()
    root = tmp_path / "home"
    source = resolve(
        "buffalo_s",
        tmp_path,
        known=KnownModels(packs={"buffalo_s": PACK}),
        insightface_root=root,
        accept_licence=True,
    )
    assert source.path == root / "models" / "buffalo_s" / "called_anything.onnx"
    assert [p.name for p in (root / "models").iterdir()] == ["buffalo_s"]
    assert capsys.readouterr().out == ""  # InsightFace prints; stdout may be our JSON


def test_a_failed_download_says_what_to_put_where_and_leaves_nothing(tmp_path: Path, zoo: dict[str, bytes]) -> None:
    root = tmp_path / "home"
    with pytest.raises(Missing) as caught:
        resolve(
            "buffalo_s",
            tmp_path,
            known=KnownModels(packs={"buffalo_s": PACK}),
            insightface_root=root,
            accept_licence=True,
        )
    address = zoo["address"].decode()
    assert str(caught.value) == (
        f"buffalo_s is not in {root}/models/buffalo_s and cannot be downloaded: Failed downloading url "
        f"{address}buffalo_s.zip. On a machine with a network: fetch https://example.invalid/buffalo_s.zip and "
        f"unzip it to {root}/models/buffalo_s."
    )
    assert list((root / "models").iterdir()) == []


def known_tiny(tmp_path: Path, address: str = "") -> tuple[KnownModels, Path]:
    path = tmp_path / "tiny.onnx"
    onnx.save(tiny_net(), str(path))
    entry = {
        "sha256": file_digest(path),
        "licence": "Apache-2.0",
        "download": address,
        "preprocessing": {"color": "bgr", "mean": [1, 2, 3], "std": [4, 5, 6]},
    }
    return KnownModels(models={"tiny": entry}), path


def test_a_known_model_is_fetched_once_and_checked(tmp_path: Path, zoo: dict[str, bytes]) -> None:
    cache = tmp_path / "cache"
    known, path = known_tiny(tmp_path, zoo["address"].decode() + "tiny.onnx")
    with pytest.raises(LicenceNotAccepted, match=r"tiny \(Apache-2.0\) would be downloaded"):
        resolve("tiny", tmp_path, known=known, cache=cache)
    zoo["tiny.onnx"] = b"another file"
    with pytest.raises(SourceRefused, match=r"returned a different file: expected sha256 [0-9a-f]{12}…, got \w{12}…"):
        resolve("tiny", tmp_path, known=known, cache=cache, accept_licence=True)
    assert list(cache.iterdir()) == []
    zoo["tiny.onnx"] = path.read_bytes()
    assert resolve("tiny", tmp_path, known=known, cache=cache, accept_licence=True).preprocessing.color == "bgr"
    del zoo["tiny.onnx"]
    assert resolve("tiny", tmp_path, known=known, cache=cache).path.read_bytes() == path.read_bytes()


def test_an_unknown_name_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(WrongUse) as caught:
        resolve("bufalo", tmp_path, known=known_models())
    assert str(caught.value) == (
        "no file and no known model 'bufalo': expected an ONNX file or one of demo, demo-mobile, demo-r18, demo-r34, "
        "demo-r50, demo-r100, mobilefacenet, buffalo_l, buffalo_s, antelopev2."
    )


def test_a_broken_models_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump({"models": {"m": {"sha256": "00", "preprocessing": {"color": "rgb"}}}}))
    with pytest.raises(WrongUse, match=r"models\.yaml cannot be used: KeyError\('mean'\)"):
        known_models(path)


def zipped(path: Path, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in pack_files().items():
            archive.writestr(prefix + name, data)
    return path


def test_a_zipped_pack_is_read_whatever_places_it_names(tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    workspace.mkdir()
    found = resolve(str(zipped(tmp_path / "pack.zip", "../../")), workspace, known=KnownModels())
    assert found.path == workspace / "pack" / "called_anything.onnx"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pack.zip", "work"]


def test_a_pack_that_lies_zipped_in_insightfaces_folder_is_read(tmp_path: Path) -> None:
    zipped(tmp_path / "models" / "buffalo_s.zip")
    workspace = tmp_path / "work"
    workspace.mkdir()
    known = KnownModels(packs={"buffalo_s": PACK})
    found = resolve("buffalo_s", workspace, known=known, insightface_root=tmp_path)
    assert (found.kind, found.path.name) == ("pack", "called_anything.onnx")
