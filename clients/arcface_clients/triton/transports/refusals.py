"""What a server's refusal means: its words in, an error of ours out; Triton gives one status to several causes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import proxy_bypass

from arcface_clients.errors import (
    ArcFaceError,
    ClientUnusable,
    ConfigError,
    DeadlineExceeded,
    InferenceFailed,
    InvalidAnswer,
    ModelNotReady,
    Overloaded,
    ServerUnreachable,
    SharedMemoryLost,
)
from arcface_clients.triton.address import Address
from arcface_clients.triton.transports.distrust import tls_reason

_NOT_READY = (
    "unknown model",
    "is not found",
    "is not ready",
    "version not ready",
    "has no available versions",
    "is not healthy",  # the process behind a Python model died; only a new start of the server brings it back
    "stub process",
)
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What an answer of the wrong shape raises in the hands of someone who expects the right one."""
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order
_OVERLOADED = ("exceeds maximum queue size", "request timeout expired")


def closed() -> ClientUnusable:
    """The client was closed while, or before, this was asked of it."""
    return ClientUnusable("this client is closed; make a new one.")


def too_late(address: Address, model: str, timeout_s: float) -> DeadlineExceeded:
    """No answer in time."""
    return DeadlineExceeded(
        f"no answer from {model!r} at {address} within {timeout_s:g} s. Raise timeout_s, or send fewer faces at once"
    )


def unreachable(address: Address, why: object) -> ServerUnreachable:
    """The connection failed, not the server."""
    if distrust := tls_reason(address, str(why)):
        return ServerUnreachable(f"{address} {distrust}")
    return ServerUnreachable(
        f"no Triton server answers at {address}: {why}.{_port_hint(address, str(why))}{_proxy_hint(address)} "
        "Start one: arcface serve"
    )


def refused(address: Address, model: str, status: str, words: str, *, busy: bool) -> ArcFaceError:
    """The server answered with an error. `busy`: its status says that it cannot answer now, but might later."""
    text = words.lower()
    if any(part in text for part in _NOT_READY):
        return ModelNotReady(f"{address} does not serve {model!r}: {words}. Load it: arcface serve")
    if "restricted" in text and "header" in text:
        return ConfigError(f"{address} guards this with a key: {words}. Pass it as headers={{name: key}}")
    if "shared memory region" in text and ("unable to find" in text or "not found" in text):
        return SharedMemoryLost(f"{address} does not know our shared memory: {words}")
    if any(part in text for part in _OVERLOADED):
        return Overloaded(
            f"{model!r} at {address} has too much to do: {words}. Send fewer requests at once (in_flight), or give the "
            "server more instances"
        )
    if busy:
        return ModelNotReady(f"{model!r} at {address} cannot answer now: {words}")
    return InferenceFailed(f"{model!r} at {address} answered {status}: {words}")


def no_answer(address: Address, model: str, got: str) -> InvalidAnswer:
    """What came back is no answer of a Triton server, or none to this request."""
    return InvalidAnswer(
        f"asked for {model!r}, {address} answered with {got}; expected a Triton server's answer to this request. "
        "Look at what stands at that address, or between: arcface doctor"
    )


@contextmanager
def damage_is_no_answer(address: Address, model: str) -> Iterator[None]:
    """Whoever trips, while reading a configuration, over what no Triton server writes raises InvalidAnswer."""
    try:
        yield
    except ArcFaceError:
        raise
    except MALFORMED as exc:
        raise no_answer(address, model, f"a damaged configuration ({type(exc).__name__}: {exc})") from exc


def wrong_answer(address: Address, model: str, got: str) -> InferenceFailed:
    """The answer is not `embedding` FP32 (N,D)."""
    return InferenceFailed(
        f"{model!r} at {address} answered with {got}; expected `embedding` FP32 (N, D). "
        "Look at the server's log (empty outputs: its Python has numpy 2)"
    )


def _proxy_hint(address: Address) -> str:
    """A sentence where gRPC asks a proxy of the environment for this server; "" otherwise, as on this host."""
    if address.protocol != "grpc" or address.loopback:
        return ""
    named = next((name for name in _PROXIES if os.environ.get(name)), None)
    if named is None or proxy_bypass(address.target):
        return ""
    proxy = os.environ[named].rpartition("@")[2]  # without a password in it
    return f" It was asked for through {named}={proxy}; to go past that: no_proxy={address.host}."


def _port_hint(address: Address, words: str) -> str:
    """A sentence for the commonest slip, one protocol on the other's port; "" otherwise."""
    text = words.lower()
    cut = "socket closed" in text or "reset by peer" in text or "certificate required" in text
    if address.tls and address.protocol == "http" and "unexpected_eof" in text:
        return " If nothing stands before it: Triton's HTTP has no TLS of its own, use grpcs://."
    if address.tls and cut:
        return " If it wants a certificate of its clients: triton.tls.cert_file and key_file."
    if address.protocol == "grpc" and (address.port == 8000 or cut):
        return (
            f" If it is encrypted: grpcs://{address.target}; if port {address.port} is HTTP: http://{address.target}."
        )
    if address.protocol == "http" and (address.port == 8001 or "badstatusline" in text):
        return f" If port {address.port} is the gRPC port: grpc://{address.target}."
    return ""
