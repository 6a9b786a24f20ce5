"""Who may reach a server: a table of addresses and conditions, and the certificate files that it is served with."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from arcface_build.serving.exposure import (
    OURS,
    Exposure,
    ServerTls,
    address_of,
    no_other_ports,
    refuse_overrides,
    server_tls,
)
from arcface_clients.errors import ConfigError, WrongUse
from arcface_clients.triton.certificate import Certificate, check_authorities, read_certificate
from conftest import REPO

NOW = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)
SOON = datetime.now(timezone.utc) + timedelta(days=10, hours=1)


def tls(*names: str, expires: datetime = SOON, client_ca: str | None = None, self_signed: bool = False) -> ServerTls:
    certificate = Certificate(names or ("localhost",), NOW - timedelta(days=1), expires, "00", self_signed)
    return ServerTls(Path("s.pem"), Path(__file__), certificate, Path(client_ca) if client_ca else None)


ALLOWED = {
    "this host alone": {},
    "this host by name": {"host": "localhost"},
    "another loopback address": {"host": "127.0.0.2", "http_host": "127.1.2.3"},
    "TLS on this host": {"tls": tls()},
    "all addresses with TLS": {"host": "0.0.0.0", "tls": tls()},
    "one address with mutual TLS": {"host": "192.0.2.7", "tls": tls(client_ca="ca.pem")},
    "all addresses, trusted": {"host": "0.0.0.0", "insecure": True},
    "HTTP, trusted": {"http_host": "0.0.0.0", "insecure": True},
    "HTTP, trusted, beside TLS": {"host": "0.0.0.0", "http_host": "0.0.0.0", "tls": tls(), "insecure": True},
    "metrics": {"metrics_host": "0.0.0.0"},
}
GRPC = (
    "gRPC on {} would carry faces and embeddings readably through the network. Encrypt it "
    "(--tls-cert FILE --tls-key FILE), or say that this network is trusted: --insecure"
)
HTTP = (
    "HTTP on {} would carry faces and embeddings readably through the network: Triton's HTTP has no TLS. "
    "Use gRPC (--host), or say that this network is trusted: --insecure"
)
REFUSED = {
    "all addresses": ({"host": "0.0.0.0"}, GRPC.format("0.0.0.0")),
    "all addresses of IPv6": ({"host": "::"}, GRPC.format("::")),
    "nothing at all, which is all addresses": ({"host": ""}, GRPC.format("")),
    "zero, which is all addresses": ({"host": "0"}, GRPC.format("0")),
    "one address": ({"host": "192.0.2.7"}, GRPC.format("192.0.2.7")),
    "a name that only looks like this host": ({"host": "localhost.example.com"}, GRPC.format("localhost.example.com")),
    "IPv4 in IPv6": ({"host": "::ffff:192.0.2.7"}, GRPC.format("::ffff:192.0.2.7")),
    "HTTP": ({"http_host": "0.0.0.0"}, HTTP.format("0.0.0.0")),
    "HTTP beside TLS": ({"host": "0.0.0.0", "http_host": "10.0.0.1", "tls": tls()}, HTTP.format("10.0.0.1")),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_stays_here_is_encrypted_or_asked_for_is_served(case):
    exposure = Exposure(**ALLOWED[case])
    options = dict(option.split("=", 1) for option in exposure.options())
    assert options["--grpc-address"] == exposure.host
    assert options["--http-address"] == exposure.http_host
    assert options["--metrics-address"] == exposure.metrics_host  # Triton's default is HTTP's
    assert ("--grpc-use-ssl" in options) == (exposure.tls is not None)
    assert set(options) <= set(OURS)


@pytest.mark.parametrize("case", REFUSED)
def test_what_others_could_read_on_the_way_is_refused_with_both_ways_out(case):
    asked, sentence = REFUSED[case]
    with pytest.raises(WrongUse) as refused:
        Exposure(**asked)
    assert str(refused.value) == sentence


def test_only_a_clients_authority_makes_tls_mutual():
    assert not [option for option in Exposure(tls=tls()).options() if "mutual" in option or "root" in option]
    assert Exposure(tls=tls(client_ca="/ca.pem")).options()[-2:] == [
        "--grpc-use-ssl-mutual=true",
        "--grpc-root-cert=/ca.pem",
    ]


@pytest.mark.parametrize(
    ("exposure", "concerns"),
    [
        (Exposure(), []),
        (Exposure(host="0.0.0.0", insecure=True), ["gRPC on 0.0.0.0 is not encrypted", "whoever reaches 0.0.0.0"]),
        (Exposure(http_host="0.0.0.0", insecure=True), ["HTTP on 0.0.0.0 is not encrypted"]),
        (
            Exposure(host="0.0.0.0", tls=tls()),
            ["whoever reaches 0.0.0.0", "s.pem expires in 10 days", "others of this"],
        ),
        (Exposure(host="0.0.0.0", tls=tls(client_ca="ca.pem")), ["s.pem expires in 10 days", "others of"]),
    ],
)
def test_who_serves_is_told_what_remains_open(exposure, concerns):
    said = exposure.concerns()
    assert len(said) == len(concerns)
    assert all(sentence.startswith(start) for sentence, start in zip(said, concerns, strict=True)), said


@pytest.mark.parametrize(
    ("host", "names", "named"),
    [
        ("127.0.0.1", ("localhost", "127.0.0.1"), "127.0.0.1"),
        ("0.0.0.0", ("localhost", "127.0.0.1"), "127.0.0.1"),
        ("127.0.0.1", ("faces.example.com", "localhost"), "localhost"),
        ("0.0.0.0", ("*.example.com", "faces.example.com", "localhost"), "faces.example.com"),
        ("10.0.0.1", ("*.example.com",), "10.0.0.1"),
        ("10.0.0.1", ("10.0.0.1",), "10.0.0.1"),
    ],
)
def test_clients_are_told_a_name_that_is_in_the_certificate(host, names, named):
    assert Exposure(host=host, tls=tls(*names)).client_host() == named


@pytest.mark.parametrize("option", OURS)
def test_no_option_of_tritons_undoes_it(option):
    for text in (option, f"{option}=0.0.0.0", option[:-1]):
        with pytest.raises(WrongUse, match=f"{text.partition('=')[0]} after -- is refused"):
            refuse_overrides(["--log-verbose=1", text])


def test_other_options_of_tritons_are_taken_as_they_are():
    refuse_overrides(["--log-verbose=1", "--metrics-config", "summary_latencies=true", "--exit-timeout-secs=5", "--"])


def test_no_variable_of_the_environment_opens_a_port():
    assert no_other_ports({"AIP_MODE": "PREDICTION", "HOME": "/"}) == {"HOME": "/"}


@pytest.mark.parametrize(
    ("name", "host", "fits"),
    [
        ("localhost", "LocalHost.", True),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", False),
        ("*.example.com", "example.com", False),
        ("*", "localhost", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("0:0:0:0:0:0:0:1", "::1", True),
        ("10.0.0.1", "10.0.0.10", False),
    ],
)
def test_a_certificate_is_for_its_names_and_no_others(name, host, fits):
    assert Certificate((name,), NOW, SOON, "00").is_for(host) == fits


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    pytest.importorskip("cryptography")
    from certificates import Authority

    return Authority(tmp_path_factory.mktemp("authority"))


def test_files_say_for_whom_and_until_when(authority):
    found = read_certificate(authority.sign("s", ("a.example.com", "::1"), (-1, 20)), authority.folder / "s.key")
    assert found.names == ("a.example.com", "0:0:0:0:0:0:0:1")
    assert 19.9 < found.days_left() < 20 and not found.self_signed and found.fault() is None
    alone = read_certificate(authority.self_signed("alone"), authority.folder / "alone.key")
    assert alone.self_signed and alone.is_for("localhost")


def with_password(key: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"abcd")
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the program openssl is not installed")
def test_the_documented_line_makes_files_that_serve_takes(tmp_path):
    page = (REPO / "docs" / "operations.md").read_text()
    (line,) = re.findall(r"^    (openssl req .*)$", page, re.MULTILINE)
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True, capture_output=True)
    made = server_tls(tmp_path / "server.pem", tmp_path / "server.key")
    assert made.certificate.names == ("faces.example.com", "127.0.0.1") and made.certificate.self_signed
    assert 364 < made.certificate.days_left() < 366
    assert Exposure("0.0.0.0", tls=made).client_host() == "127.0.0.1"
    assert made.key_file.stat().st_mode & 0o077 == 0, "openssl keeps it to its owner"


def test_files_that_no_client_would_accept_are_refused_in_words(authority, tmp_path):
    folder = authority.folder
    good, key = authority.sign("good"), folder / "good.key"
    past, future = authority.sign("past", days=(-9, -2)), authority.sign("future", days=(2, 9))
    gone_by = type(authority)(tmp_path / "old", days=(-9, -2)).folder / "ca.pem"
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n")
    locked = tmp_path / "locked.key"
    locked.write_bytes(with_password(key.read_bytes()))
    for arguments, words in {
        (good, None, None): "TLS needs a certificate and its key: give both --tls-cert FILE and --tls-key FILE.",
        (None, None, good): "TLS needs a certificate and its key: give both --tls-cert FILE and --tls-key FILE.",
        (good, folder / "past.key", None): f"{folder / 'past.key'} is not the key of {good}. ",
        (past, folder / "past.key", None): f"{past} expired on ",
        (future, folder / "future.key", None): f"{future} is not valid before ",
        (folder / "none.pem", key, None): f"cannot read {folder}/none.pem: No such file or directory. Expected a PEM",
        (key, key, None): f"{key} and {key} are no certificate for a server with its key. Expected PEM files, the key ",
        (good, locked, None): f"{good} and {locked} are no certificate for a server with its key. Expected PEM files, ",
        (good, key, key): f"{key} holds no certificate, or a damaged one (",
        (good, key, damaged): f"{damaged} holds no certificate, or a damaged one (",
        (good, key, gone_by): f"{gone_by} expired on ",
        (good, key, folder / "none.pem"): f"cannot read {folder}/none.pem: No such file or directory. ",
    }.items():
        with pytest.raises(WrongUse) as refused:
            server_tls(*arguments)
        assert str(refused.value).startswith(words)
        assert not isinstance(refused.value, ConfigError) or refused.value.key is None
    assert server_tls(None, None) is None


def test_an_authority_is_one_that_lets_somebody_in(authority, tmp_path):
    """Its own certificate, one client's that is pinned, and an old one beside its successor."""
    old = type(authority)(tmp_path / "old", days=(-9, -2)).folder / "ca.pem"
    both = tmp_path / "both.pem"
    both.write_text(old.read_text() + (authority.folder / "ca.pem").read_text())
    for file in (authority.folder / "ca.pem", authority.sign("pinned", names=()), both):
        check_authorities(file)


@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_address_is_not_taken_for_all_addresses(host):
    """What `--host "$ADDRESS"` says where the variable is not set."""
    with pytest.raises(WrongUse, match=f"cannot listen on '{host}': it is empty. Expected an IPv4 address"):
        address_of(host)


def test_a_renewed_certificate_is_read_again_through_the_link_that_was_given(authority, tmp_path):
    """As certbot and Kubernetes renew: the name is a link, and is set to another file."""
    for suffix in (".pem", ".key"):
        (tmp_path / f"live{suffix}").symlink_to(authority.sign("first").with_suffix(suffix))
    before = Exposure("0.0.0.0", tls=server_tls(tmp_path / "live.pem", tmp_path / "live.key"))
    second = authority.sign("second")
    (tmp_path / "live.pem").unlink()
    (tmp_path / "live.pem").symlink_to(second)
    with pytest.raises(ConfigError, match=r"live\.key is not the key of .*live\.pem"):
        before.renewed()
    (tmp_path / "live.key").unlink()
    (tmp_path / "live.key").symlink_to(second.with_suffix(".key"))
    after = before.renewed()
    assert after.tls.certificate.sha256 == read_certificate(second, second.with_suffix(".key")).sha256
    assert after.tls.certificate.sha256 != before.tls.certificate.sha256
    assert f"--grpc-server-cert={tmp_path / 'live.pem'}" in after.options()
    assert Exposure().renewed() == Exposure()
