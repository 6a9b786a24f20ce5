"""TLS and mutual TLS: gRPC by Triton itself, HTTPS through a proxy that ends it, with certificates of the test."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest

from arcface_clients import AsyncTritonEmbedder, Tls, TritonEmbedder
from arcface_clients.errors import ConfigError, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from odd_models import write_model

pytest.importorskip("cryptography")
FACES = synthetic_faces(3)


def write_certificates(folder: Path) -> None:
    """ca.pem, and server and client certificates with their keys, signed by it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    for who in ("ca", "server", "client"):
        key = ca_key if who == "ca" else ec.generate_private_key(ec.SECP256R1())
        name = ca_name if who == "ca" else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
        names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=who == "ca", path_length=None), critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        (folder / f"{who}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{who}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder)
    return folder


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
    thread.join(5)


def ours(certificates: Path) -> Tls:
    return Tls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")


def test_grpcs_with_a_certificate_of_ours(certificates: Path, tmp_path: Path, start_triton) -> None:
    write_model(tmp_path / "repository", "good")
    options = [
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={certificates / 'server.pem'}",
        f"--grpc-server-key={certificates / 'server.key'}",
        f"--grpc-root-cert={certificates / 'ca.pem'}",
    ]
    server = start_triton(tmp_path / "repository", ["good"], config_name="", extra=options)
    url = f"grpcs://{server.grpc_url}"
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
        TritonEmbedder(server.grpc_url, "good", retry_for_s=0) as plain,
        pytest.raises(ServerUnreachable, match="grpc://"),
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
        pytest.raises(ServerUnreachable, match=r"certificate verify failed"),
    ):
        distrustful.encode(FACES)


def test_impossible_tls_is_refused_before_anything_is_opened(certificates: Path) -> None:
    with pytest.raises(ConfigError, match="both cert_file and key_file"):
        Tls(cert_file=certificates / "client.pem")
    with pytest.raises(ConfigError, match=r"TLS ca_file nowhere.pem is not there; expected a PEM file"):
        TritonEmbedder("grpcs://localhost:8001", tls=Tls("nowhere.pem"))
    with pytest.raises(ConfigError, match=r"not encrypted: use grpcs:// or https://"):
        TritonEmbedder("localhost:8001", tls=ours(certificates))
