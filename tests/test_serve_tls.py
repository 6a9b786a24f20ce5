"""`arcface serve` with TLS and mutual TLS, and every command that asks a server, against it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from arcface_build.bench.perf_analyzer import find_perf_analyzer
from arcface_clients import Tls, TritonEmbedder
from arcface_clients.errors import Missing, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from deadlines import HANG_S
from serve_process import MAIN, Serving

pytest.importorskip("cryptography")
from certificates import HERE, Authority

FACES = synthetic_faces(3)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    authority.sign("server")
    authority.sign("client", names=())
    return authority


@pytest.fixture(scope="module")
def served(
    triton_binary, demo_repository: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """`arcface serve` with mutual TLS for all addresses of this host."""
    ca, certificate, key = (str(authority.folder / name) for name in ("ca.pem", "server.pem", "server.key"))
    repository = Path(shutil.copytree(demo_repository, tmp_path_factory.mktemp("served") / "model_repository"))
    options = ["--host", "0.0.0.0", "--tls-cert", certificate, "--tls-key", key, "--client-ca", ca]
    serving = Serving(repository, *options)
    yield serving
    serving.stop()


@pytest.fixture
def files(authority: Authority) -> dict[str, str]:
    """What a client of it has."""
    names = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.key"}
    return {key: str(authority.folder / name) for key, name in names.items()}


def url(served: Serving, host: str = "localhost", scheme: str = "grpcs") -> str:
    return f"{scheme}://{host}:{served.ports.grpc}"


def arcface(folder: Path, *arguments: str, **triton: object) -> subprocess.CompletedProcess[str]:
    """A command with these settings of the server."""
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump({"triton": triton}))
    command, *rest = arguments
    line = [sys.executable, "-c", MAIN, command, "--config", str(settings), *rest]
    own = {name: text for name, text in os.environ.items() if not name.startswith("ARCFACE_TRITON")}
    return subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, cwd=folder, env=own)


def test_what_serve_says_to_try_works_where_ca_and_client_have_these_names(served, authority):
    said = "".join(served.said)
    assert f"gRPC grpcs://127.0.0.1:{served.ports.grpc} " in said and "passed (fp32: drift" in said
    assert "\n(4, 512) " in tried(served, authority.folder)


def test_with_a_certificate_that_signed_itself_it_works_anywhere_on_this_host(
    triton_binary, demo_repository, authority, tmp_path
):
    own = authority.self_signed("own", ("faces.example.com", "localhost"))
    repository = Path(shutil.copytree(demo_repository, tmp_path / "model_repository"))
    options = ["--tls-cert", str(own), "--tls-key", str(own.with_suffix(".key")), "--no-reference"]
    serving = Serving(repository, *options)
    try:
        assert "\n(4, 512) " in tried(serving, tmp_path)
        with TritonEmbedder(url(serving), tls=Tls(own), retry_for_s=60) as embedder:
            truth = embedder.encode(FACES)
            os.kill(serving.stub(), signal.SIGKILL)
            serving.wait_for("RESTART in ")
            np.testing.assert_allclose(embedder.encode(FACES), truth, atol=1e-5)
        serving.wait_for("Ctrl-C stops it.", 2)
    finally:
        serving.stop()


def test_a_certificate_that_was_renewed_meanwhile_is_taken_when_the_server_is_started_again(
    triton_binary, demo_repository, authority, tmp_path
):
    live = {suffix: tmp_path / f"live{suffix}" for suffix in (".pem", ".key")}
    for suffix, file in live.items():
        file.symlink_to(authority.sign("before").with_suffix(suffix))
    repository = Path(shutil.copytree(demo_repository, tmp_path / "model_repository"))
    options = ["--tls-cert", str(live[".pem"]), "--tls-key", str(live[".key"]), "--no-reference"]
    serving = Serving(repository, *options)
    try:
        renewed = authority.self_signed("renewed")
        for suffix, file in live.items():
            file.unlink()
            file.symlink_to(renewed.with_suffix(suffix))
        os.kill(serving.stub(), signal.SIGKILL)
        serving.wait_for("Ctrl-C stops it.", 2)
        with TritonEmbedder(url(serving), tls=Tls(renewed)) as embedder:
            assert embedder.encode(FACES).shape == (3, 512)
        assert sum("RESTART in " in line for line in serving.said) == 1
    finally:
        serving.stop()


def tried(serving: Serving, folder: Path) -> str:
    """What the lines to paste print, run by a shell in this folder."""
    lines = re.search(r"another shell\n(.*)Ctrl-C", "".join(serving.said), re.DOTALL)[1]
    done = subprocess.run(["bash", "-e"], input=lines, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = {
    "doctor": ["doctor", "--json"],
    "doctor of a url": ["doctor", "{url}", "--json"],
    "parity": ["parity", "--json"],
    "parity that counts": ["parity", "--count", "--json"],
    "embed": ["embed", "crops", "-o", "out.npz", "--json"],
    "compare": ["compare", "{url}", "{url}/arcface_reference", "--json"],
    "consensus": ["consensus", "crops", "-o", "out.json", "--json"],
    "bench": ["bench", "--url", "{url}", "--http-url", "{http}", "--no-bare", "--model", "arcface", "--batch", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reaches_it_by_the_settings(served, files, tmp_path, name):
    cv2 = pytest.importorskip("cv2")
    (tmp_path / "crops" / "one").mkdir(parents=True)
    for number, face in enumerate(FACES):
        cv2.imwrite(str(tmp_path / "crops" / "one" / f"{number}.png"), face)
    places = {"url": url(served), "http": f"127.0.0.1:{served.ports.http}"}
    line = [word.format(**places) for word in COMMANDS[name]]
    if name == "bench":
        try:
            find_perf_analyzer()
        except Missing as exc:
            pytest.skip(str(exc))
        line += ["--json", "--rounds", "1", "--sample-s", "0.2", "--concurrency", "1"]
    done = arcface(tmp_path, *line, url=url(served), tls=files)
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    if name.startswith("doctor"):
        checks = {check["name"]: check for check in told["checks"]}
        assert checks["server"]["status"] == checks["restrictions"]["status"] == "ok", done.stdout
        assert checks["encryption"]["status"] == "ok"
        assert checks["encryption"]["found"].startswith("on: certificate for localhost, 127.0.0.1, valid until 20")
        return
    assert done.returncode == 0, done.stderr
    if name == "embed":
        with np.load(tmp_path / "out.npz") as saved:
            assert saved["embeddings"].shape == (3, 512)


def test_strangers_are_turned_away_and_told_why(served, authority, tmp_path):
    stranger = Authority(tmp_path / "strangers")
    stranger.sign("client", names=())
    theirs = Tls(authority.folder / "ca.pem", stranger.folder / "client.pem", stranger.folder / "client.key")
    for tls, words in {
        Tls(): r"presents a certificate whose signer is not trusted here\. Give the signer's certificate as triton",
        Tls(stranger.folder / "ca.pem"): r"presents a certificate whose signer is not trusted here\. ",
        Tls(authority.folder / "ca.pem"): r"If it wants a certificate of its clients: triton\.tls\.cert_file",
        theirs: r"If it wants a certificate of its clients: triton\.tls\.cert_file",
    }.items():
        refused = pytest.raises(ServerUnreachable, match=words)
        with TritonEmbedder(url(served), tls=tls, retry_for_s=0) as embedder, refused:
            embedder.encode(FACES)
    with (
        TritonEmbedder(url(served, scheme="grpc"), retry_for_s=0, shared_memory=False) as plain,
        pytest.raises(ServerUnreachable, match=r"If it is encrypted: grpcs://localhost:"),
    ):
        plain.encode(FACES)


def test_doctor_tells_a_plain_client_that_the_port_is_encrypted(served, tmp_path):
    done = arcface(tmp_path, "doctor", "--json", url=url(served, scheme="grpc"), tls={})
    (found,) = (check for check in json.loads(done.stdout)["checks"] if check["name"] == "encryption")
    assert (found["status"], found["fix"]) == ("problem", f"set triton.url: {url(served)}")


def test_a_client_of_this_host_has_shared_memory_over_tls_as_well(served, files):
    with TritonEmbedder(url(served), tls=Tls(**files)) as embedder:
        first = embedder.encode(FACES)
        assert embedder.shared_memory.kind == "system", embedder.shared_memory.reason
    with TritonEmbedder(url(served), tls=Tls(**files), shared_memory=False) as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), first, atol=1e-5)


BAD = {
    "expired": (HERE, (-9, -1), "presents a certificate that has expired", "expired on 20"),
    "not valid yet": (HERE, (1, 9), "presents a certificate that is not valid yet", "is not valid before 20"),
    "of another host": (
        ("faces.example.com",),
        (-1, 90),
        "presents a certificate that is not for localhost",
        "not for localhost",
    ),
    "about to expire": (HERE, (-1, 9), "", ": 9 days left"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_certificate_that_became_bad_is_named_by_clients_and_by_doctor(case, tmp_path):
    """Behind a gRPC server without Triton: `arcface serve` itself starts with none of these."""
    from concurrent import futures

    import grpc

    from arcface_clients.checks.tls import check_tls
    from arcface_clients.config.schema import EmbeddingConfig

    names, days, sentence, found = BAD[case]
    authority = Authority(tmp_path)
    authority.sign("server", names, days)
    pair = tuple((tmp_path / f"server.{end}").read_bytes() for end in ("key", "pem"))
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    settings = {"url": f"grpcs://localhost:{port}", "tls": {"ca_file": str(tmp_path / "ca.pem")}}
    check = check_tls(EmbeddingConfig.model_validate({"triton": settings}))
    assert check.status == "problem" and found in check.found and check.fix
    if sentence:
        with (
            TritonEmbedder(settings["url"], tls=Tls(tmp_path / "ca.pem"), retry_for_s=0) as embedder,
            pytest.raises(ServerUnreachable, match=sentence),
        ):
            embedder.encode(FACES)
    server.stop(None)


def test_a_client_that_asks_for_tls_sends_nothing_to_a_plain_server(server):
    with (
        TritonEmbedder(f"grpcs://{server.grpc_url}", retry_for_s=0) as embedder,
        pytest.raises(ServerUnreachable, match="is asked for TLS and answers without; nothing was sent") as refused,
    ):
        embedder.encode(FACES)
    assert str(refused.value).count(". ") == 1
    with (
        TritonEmbedder(f"https://{server.http_url}", retry_for_s=0) as embedder,
        pytest.raises(ServerUnreachable, match="Triton's HTTP has no TLS of its own, use grpcs://"),
    ):
        embedder.encode(FACES)
