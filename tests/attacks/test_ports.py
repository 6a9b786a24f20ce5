"""Tried from outside: every port on every address, in plain text, as a stranger, as a web page, as a false server."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from arcface_build.serving.exposure import Exposure, server_tls
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients import AsyncTritonEmbedder, Tls, TritonEmbedder
from arcface_clients.errors import BackendUnavailable
from arcface_clients.faces.synthetic import synthetic_faces
from odd_models import write_model

pytest.importorskip("cryptography")
from certificates import HERE, Authority

FACES = synthetic_faces(2)


def addresses() -> list[str]:
    """Every address of this host, IPv6 too, but those that need an interface named (fe80::)."""
    from ipaddress import IPv6Address

    found = {"127.0.0.1", "127.9.9.9"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks by which address it would
            found.add(probe.getsockname()[0])
        except OSError:
            pass
    found |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None) if "%" not in str(info[4][0])}
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        found.add(str(IPv6Address(bytes.fromhex(line.split()[0]))))
    return sorted(address for address in found if not address.startswith("fe80"))


def listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


def listening_sockets(server: TritonProcess) -> set[tuple[str, int]]:
    """(address, port) of whatever the server's process listens on, from /proc."""
    inodes = set()
    for handle in Path(f"/proc/{server.pid}/fd").iterdir():
        try:
            inodes.add(str(handle.readlink()))
        except OSError:  # closed meanwhile
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].partition(":")
                found.add((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    from ipaddress import ip_address

    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    address = ip_address(raw)
    return str(getattr(address, "ipv4_mapped", None) or address)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    authority.sign("server", (*HERE, *(a for a in addresses() if ":" not in a)))
    authority.sign("client", names=())
    return authority


@pytest.fixture(scope="module")
def outward(triton_binary, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """A server for other hosts, with mutual TLS; started where the environment asks Triton for one more port."""
    folder = tmp_path_factory.mktemp("outward")
    write_model(folder / "repository", "good")
    files = (authority.folder / name for name in ("server.pem", "server.key", "ca.pem"))
    vertex = {"AIP_MODE": "PREDICTION", "AIP_HTTP_PORT": str(free_ports().http)}
    vertex |= {"AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/health"}
    with TritonProcess(
        triton_binary,
        folder / "repository",
        ["good"],
        config_name="",
        log_path=folder / "log",
        ports=free_ports(),
        exposure=Exposure(host="0.0.0.0", tls=server_tls(*files)),
        environment=vertex,
    ) as process:
        process.wait_ready()
        yield process


def test_by_default_nothing_listens_where_another_host_could_reach_it(odd_server):
    assert listening_sockets(odd_server) == {("127.0.0.1", port) for port in odd_server.ports.named().values()}
    for address in addresses():
        for name, port in odd_server.ports.named().items():
            assert listens(address, port) == (address == "127.0.0.1"), f"{name} on {address}"


def test_for_other_hosts_only_grpc_listens_and_no_port_that_nobody_asked_for(outward):
    ports = outward.ports
    everywhere = "::" if "::1" in addresses() else "0.0.0.0"  # gRPC makes all of IPv4 all of IPv6, where there is any
    assert listening_sockets(outward) == {
        (everywhere, ports.grpc),
        ("127.0.0.1", ports.http),
        ("127.0.0.1", ports.metrics),
    }
    for address in addresses():
        assert listens(address, ports.grpc)
        for port in (ports.http, ports.metrics):
            assert listens(address, port) == (address == "127.0.0.1"), f"{port} on {address}"


def test_nobody_puts_a_server_of_his_own_before_ours_on_one_address(outward):
    for address in {"127.0.0.1", "::1"} & set(addresses()):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                thief.bind((address, outward.ports.grpc))
                thief.listen()


@pytest.mark.parametrize("address", addresses())
def test_in_plain_text_no_address_answers_a_word(outward, address):
    for opening in (b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"):
        with socket.create_connection((address, outward.ports.grpc), timeout=10) as plain:
            plain.sendall(opening)
            try:
                answer = plain.recv(4096)
            except ConnectionResetError:
                answer = b""
        assert b"HTTP/1" not in answer and b"triton" not in answer and len(answer) < 32, answer


def call(server: TritonProcess, credentials: grpc.ChannelCredentials, request: Any, *keys: tuple[str, str]) -> Any:
    """Its answer to a request, by the request's own name."""
    with grpc.secure_channel(f"localhost:{server.ports.grpc}", credentials) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return getattr(stub, type(request).__name__.removesuffix("Request"))(request, timeout=10, metadata=keys)


def test_without_a_certificate_of_ours_nobody_learns_even_that_it_lives(outward, authority, tmp_path):
    stranger = Authority(tmp_path)
    stranger.sign("client", names=())
    ca = (authority.folder / "ca.pem").read_bytes()
    pair = {"private_key": (tmp_path / "client.key").read_bytes()}
    pair["certificate_chain"] = (tmp_path / "client.pem").read_bytes()
    for credentials in (grpc.ssl_channel_credentials(ca), grpc.ssl_channel_credentials(ca, **pair)):
        with pytest.raises(grpc.RpcError) as refused:
            call(outward, credentials, pb.ServerLiveRequest())
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_ours_lets_one_embed_and_not_administrate(outward, authority):
    files = ("ca.pem", "client.key", "client.pem")
    credentials = grpc.ssl_channel_credentials(*((authority.folder / name).read_bytes() for name in files))
    assert call(outward, credentials, pb.ServerLiveRequest()).live
    for keys in ((), (("triton-grpc-protocol-admin-key", "x" * 43),)):
        with pytest.raises(grpc.RpcError, match="restricted"):
            call(outward, credentials, pb.RepositoryModelUnloadRequest(model_name="good"), *keys)


def test_old_versions_of_tls_are_refused(outward):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", outward.ports.grpc), timeout=10) as plain,
        pytest.raises(OSError, match=r"(?i)version|protocol|reset|eof"),
    ):
        context.wrap_socket(plain)


def test_a_web_page_gets_no_leave_to_read_an_answer_or_to_send_a_header(odd_server):
    page = {"Origin": "https://page.example", "Content-Type": "text/plain"}
    preflight = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "admin-key"}
    asked = [
        ("GET", "/v2/models/good/config", None, page),
        ("POST", "/v2/models/good/infer", b"{}", page),
        ("POST", "/v2/repository/models/good/unload", b"{}", page),
        ("OPTIONS", "/v2/repository/models/good/unload", None, preflight),
        ("OPTIONS", "/v2/models/good/infer", None, preflight),
    ]
    for method, path, body, headers in asked:
        with closing(http.client.HTTPConnection(odd_server.http_url, timeout=10)) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")], path
            if "unload" in path:
                assert answer.status >= 400, f"{method} {path}"
    with TritonEmbedder(odd_server.grpc_url, "good") as embedder:
        embedder.ensure_ready()


class Eavesdropper:
    """Listens in plain text where a client asks for TLS, answers like a friendly server, and keeps what it is sent."""

    def __init__(self) -> None:
        self.heard = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(2)
                try:
                    self.heard += client.recv(1 << 16)
                    client.sendall(b"\0\0\0\4\0\0\0\0\0HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    self.heard += client.recv(1 << 16)
                except OSError:
                    continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "asyncio"])
def test_who_is_asked_for_tls_and_speaks_plain_text_hears_no_face_and_no_key(scheme, asynchronous, authority):
    import asyncio

    options = {"retry_for_s": 0, "timeout_s": 5, "headers": {"authorization": "s3cret-of-the-client"}}
    options["tls"] = Tls(authority.folder / "ca.pem")
    with closing(Eavesdropper()) as there:
        url = f"{scheme}://localhost:{there.port}"

        async def embed() -> None:
            async with AsyncTritonEmbedder(url, "good", **options) as embedder:
                await embedder.encode(FACES)

        with pytest.raises(BackendUnavailable):
            if asynchronous:
                asyncio.run(embed())
            else:
                with TritonEmbedder(url, "good", **options) as embedder:
                    embedder.encode(FACES)
    assert there.heard.startswith(b"\x16\x03"), "a ClientHello"
    assert b"s3cret" not in there.heard and FACES[0].tobytes()[:64] not in there.heard and b"good" not in there.heard


def test_a_server_for_other_hosts_embeds_for_whom_it_was_made(outward, authority):
    files = Tls(*(authority.folder / name for name in ("ca.pem", "client.pem", "client.key")))
    with TritonEmbedder(f"http://{outward.http_url}", "good") as here:
        truth = here.encode(FACES)
    for address in addresses():
        if ":" in address:
            continue
        with TritonEmbedder(f"grpcs://{address}:{outward.ports.grpc}", "good", tls=files, retry_for_s=0) as embedder:
            np.testing.assert_allclose(embedder.encode(FACES), truth, atol=1e-6)
