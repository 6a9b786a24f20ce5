"""TLS and mutual TLS: gRPC by Triton itself, HTTPS through a proxy that ends it, with certificates of the test."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arcface_build.serving.exposure import Exposure, server_tls
from arcface_clients import AsyncTritonEmbedder, Tls, TritonEmbedder
from arcface_clients.errors import ConfigError, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from certificates import Authority
from deadlines import HANG_S
from odd_models import write_model

pytest.importorskip("cryptography")
FACES = synthetic_faces(3)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    authority.sign("server")
    authority.sign("client")
    return authority.folder


@pytest.fixture
def https(odd_server, certificates: Path) -> Iterator[str]:
    """URL of a proxy on this host that asks for a client certificate and passes everything on to Triton's HTTP port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = odd_server.http_url.split(":")

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                client = context.wrap_socket(plain, server_side=True)
            except OSError:
                plain.close()
                continue
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection((host, int(port))) as server:
            back = threading.Thread(target=pump, args=(server, client), daemon=True)
            back.start()
            pump(client, server)
            back.join(5)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"https://localhost:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(HANG_S)


def ours(certificates: Path) -> Tls:
    return Tls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")


def test_grpcs_with_a_certificate_of_ours(certificates: Path, tmp_path: Path, start_triton) -> None:
    write_model(tmp_path / "repository", "good")
    tls = server_tls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    server = start_triton(tmp_path / "repository", ["good"], config_name="", exposure=Exposure(tls=tls))
    url = server.grpc_url
    assert url == f"grpcs://127.0.0.1:{server.ports.grpc}"
    with TritonEmbedder(f"http://{server.http_url}", "good") as plain:
        truth = plain.encode(FACES)
    with TritonEmbedder(url, "good", tls=ours(certificates)) as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), truth, atol=1e-6)

    async def work() -> np.ndarray:
        async with AsyncTritonEmbedder(url, "good", tls=ours(certificates)) as embedder:
            return await embedder.encode(FACES)

    np.testing.assert_allclose(asyncio.run(work()), truth, atol=1e-6)
    for tls in (Tls(), Tls(certificates / "ca.pem")):  # not trusting it; not known to it
        with TritonEmbedder(url, "good", tls=tls, retry_for_s=0) as stranger, pytest.raises(ServerUnreachable):
            stranger.encode(FACES)
    with (
        TritonEmbedder(f"127.0.0.1:{server.ports.grpc}", "good", retry_for_s=0) as plain,
        pytest.raises(ServerUnreachable, match=r"If it is encrypted: grpcs://127\.0\.0\.1:"),
    ):
        plain.encode(FACES)


def test_https_with_a_certificate_of_ours(https: str, odd_server, certificates: Path) -> None:
    with TritonEmbedder(odd_server.grpc_url, "good") as plain:
        truth = plain.encode(FACES)
    with TritonEmbedder(https, "good", tls=ours(certificates)) as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), truth, atol=1e-6)

    async def work() -> np.ndarray:
        async with AsyncTritonEmbedder(https, "good", tls=ours(certificates)) as embedder:
            return await embedder.encode(FACES)

    np.testing.assert_allclose(asyncio.run(work()), truth, atol=1e-6)
    with (
        TritonEmbedder(https, "good", retry_for_s=0) as distrustful,
        pytest.raises(ServerUnreachable, match=r"whose signer is not trusted here"),
    ):
        distrustful.encode(FACES)


def test_impossible_tls_is_refused_before_anything_is_opened(certificates: Path) -> None:
    with pytest.raises(ConfigError, match="both cert_file and key_file"):
        Tls(cert_file=certificates / "client.pem")
    with pytest.raises(ConfigError, match=r"TLS ca_file nowhere.pem is not there; expected a PEM file"):
        TritonEmbedder("grpcs://localhost:8001", tls=Tls("nowhere.pem"))
    with pytest.raises(ConfigError, match=r"not encrypted: use grpcs:// or https://"):
        TritonEmbedder("localhost:8001", tls=ours(certificates))
