"""Server URLs as people write them."""

from __future__ import annotations

import pytest

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Address


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("localhost:8001", "grpc://localhost:8001"),
        ("localhost", "grpc://localhost:8001"),
        ("grpc://10.0.0.7:9", "grpc://10.0.0.7:9"),
        ("grpcs://host", "grpcs://host:8001"),
        ("http://host", "http://host:8000"),
        ("HTTP://host:81/", "http://host:81"),
        ("https://host/triton/", "https://host:443/triton"),
        ("[::1]:8001", "grpc://[::1]:8001"),
        ("[fe80::1%eth0]:8001", "grpc://[fe80::1%eth0]:8001"),
        ("triton_server:8001", "grpc://triton_server:8001"),
    ],
)
def test_urls_are_understood(url: str, written: str) -> None:
    assert str(Address.parse(url)) == written


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "cannot read the server URL ''"),
        ("ftp://host", "begins with ftp://, which is not served"),
        ("host:port", "cannot read the server URL 'host:port'"),
        ("host:70000", "cannot read the server URL 'host:70000'"),
        ("grpc://host/path", "has a path, which gRPC knows nothing of"),
        ("http://user:secret@host", "cannot read the server URL"),
        ("http://foo bar", "cannot read the server URL 'http://foo bar'"),
        ("foo bar:8001", "cannot read the server URL 'foo bar:8001'"),
        ("http://foo%20bar", "cannot read the server URL"),
        ("http://host/a b", "cannot read the server URL"),
        ("localhost:8001\n", "cannot read the server URL"),
    ],
)
def test_urls_that_cannot_be_are_refused_with_examples(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match="Expected localhost:8001") as caught:
        Address.parse(url)
    assert words in str(caught.value)
