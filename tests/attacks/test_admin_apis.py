"""Who reaches a port gets no models, no shared memory, no traces and no log files without the key of its user."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from arcface_build.errors import ServerFailed
from arcface_build.serving.guard import forget_key, keep_key
from arcface_clients import TritonEmbedder
from arcface_clients.errors import ConfigError
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.address import Address
from arcface_clients.triton.admin_key import find_key, key_folders

FACES = synthetic_faces(3)
RUNS_CODE = {
    "parameters": {
        "config": json.dumps({"backend": "python", "max_batch_size": 0}),
        "file:1/model.py": "aW1wb3J0IG9zCg==",
    }
}
HTTP: dict[str, tuple[str, Any]] = {
    "load a model with code in it": ("/v2/repository/models/evil/load", RUNS_CODE),
    "load a model": ("/v2/repository/models/good/load", {}),
    "unload a model": ("/v2/repository/models/good/unload", {}),
    "list the repository": ("/v2/repository/index", {}),
    "map memory": ("/v2/systemsharedmemory/region/x/register", {"key": "/x", "offset": 0, "byte_size": 8}),
    "unmap all memory": ("/v2/systemsharedmemory/unregister", {}),
    "list memory": ("/v2/systemsharedmemory/status", None),
    "map memory of a GPU": ("/v2/cudasharedmemory/region/x/register", {"device_id": 0, "byte_size": 8}),
    "write a trace": ("/v2/trace/setting", {"trace_file": "/tmp/x"}),
    "write a log": ("/v2/logging", {"log_file": "/tmp/x"}),
}
GRPC: dict[str, Any] = {
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="good"),
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="good"),
    "RepositoryIndex": pb.RepositoryIndexRequest(),
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=8),
    "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}


def status(url: str, body: Any, **headers: str) -> int:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code


@pytest.mark.parametrize("attack", HTTP)
def test_http_refuses_without_the_key(odd_server, attack):
    path, body = HTTP[attack]
    assert status(f"http://{odd_server.http_url}{path}", body) == 403
    wrong = {"admin-key": "x" * 43}
    assert status(f"http://{odd_server.http_url}{path}", body, **wrong) == 403


@pytest.mark.parametrize("attack", GRPC)
def test_grpc_refuses_without_the_key(odd_server, attack):
    with grpc.insecure_channel(odd_server.grpc_url) as channel:
        call = getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), attack)
        for metadata in ((), (("triton-grpc-protocol-admin-key", "x" * 43),)):
            with pytest.raises(grpc.RpcError) as refused:
                call(GRPC[attack], timeout=10, metadata=metadata)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "restricted" in refused.value.details()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_of_the_same_user_has_shared_memory_without_a_word(odd_server, protocol):
    url = f"{protocol}://{getattr(odd_server, f'{protocol}_url')}"
    with TritonEmbedder(url, "good", shared_memory=False) as wire, TritonEmbedder(url, "good") as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), wire.encode(FACES), atol=1e-6)
        assert embedder.shared_memory.kind == "system", embedder.shared_memory.reason


def test_a_client_without_the_key_goes_over_the_wire_and_cannot_touch_anothers_region(odd_server, monkeypatch):
    with TritonEmbedder(odd_server.grpc_url, "good", shared_memory=True) as owner:
        truth = owner.encode(FACES)
        monkeypatch.setenv("ARCFACE_ADMIN_KEY", "not-the-key")
        with TritonEmbedder(odd_server.grpc_url, "good") as stranger:
            np.testing.assert_allclose(stranger.encode(FACES), truth, atol=1e-6)
            assert stranger.shared_memory.kind is None
        monkeypatch.delenv("ARCFACE_ADMIN_KEY")
        np.testing.assert_array_equal(owner.encode(FACES), truth)
        assert owner.shared_memory.kind == "system"


def test_no_process_list_shows_the_key(odd_server):
    key = find_key(Address.parse(odd_server.grpc_url))
    lines = [p for p in Path("/proc").glob("[0-9]*/cmdline") if os.access(p, os.R_OK)]
    shown = []
    for line in lines:
        try:
            shown += [line] * (key.encode() in line.read_bytes())
        except OSError:
            continue
    assert key and shown == []


def test_the_key_lies_where_only_its_user_can_read_it(odd_server):
    port = odd_server.ports.grpc
    (file,) = [folder / str(port) for folder in key_folders() if (folder / str(port)).exists()]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The only folder for keys, not made yet."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return key_folders()[0]


def test_a_folder_that_somebody_else_could_fill_is_neither_written_nor_believed(folder):
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(ServerFailed, match=r"or are open to others. Remove what is there"):
        keep_key((8001,), "a" * 43)
    planted = folder / "8001"
    planted.write_text("b" * 43)
    planted.chmod(0o600)
    assert find_key(Address.parse("localhost:8001")) is None


def test_a_link_is_neither_written_nor_believed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServerFailed):
        keep_key((8001,), "a" * 43)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_key_is_kept_found_and_forgotten_but_not_the_next_servers(folder):
    files = keep_key((8000, 8001), "a" * 43)
    assert find_key(Address.parse("localhost:8001")) == "a" * 43
    assert find_key(Address.parse("http://localhost:8000")) == "a" * 43
    keep_key((8001,), "b" * 43)
    forget_key(files, "a" * 43)
    assert find_key(Address.parse("http://localhost:8000")) is None
    assert find_key(Address.parse("localhost:8001")) == "b" * 43


def test_the_key_is_sent_to_no_other_host(folder, monkeypatch):
    monkeypatch.setenv("ARCFACE_ADMIN_KEY", "a" * 43)
    assert find_key(Address.parse("localhost:8001")) == "a" * 43
    assert find_key(Address.parse("192.0.2.1:8001")) is None


def test_a_variable_that_cannot_be_a_key_is_refused(monkeypatch):
    monkeypatch.setenv("ARCFACE_ADMIN_KEY", "a:b=c")
    with pytest.raises(ConfigError, match=r"expected 8 to 128 letters, digits, - or _"):
        find_key(Address.parse("localhost:8001"))
