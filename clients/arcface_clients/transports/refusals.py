"""What a server's refusal means, told from its text: Triton and gRPC give one status to several causes."""

from __future__ import annotations

from arcface_clients.address import Address

_NOT_READY = ("unknown model", "is not found", "is not ready", "version not ready", "has no available versions")
_UNREACHABLE = (
    "failed to connect",
    "connection",
    "socket closed",
    "broken pipe",
    "dns resolution",
    "name resolution",
    "end of tcp stream",
    "goaway",
    "handshake",
    "endpoint closing",
    "transport closed",
)


def not_ready(text: str) -> bool:
    """Whether the server says that it has no such model, or not loaded."""
    return any(part in text.lower() for part in _NOT_READY)


def unreachable(text: str) -> bool:
    """Whether the connection failed, not the server."""
    return any(part in text.lower() for part in _UNREACHABLE)


def port_hint(address: Address, text: str) -> str:
    """A sentence for the commonest slip, one protocol on the other's port; "" otherwise."""
    if address.protocol == "grpc" and (address.port == 8000 or "socket closed" in text.lower()):
        return f" If port {address.port} is the HTTP port: http://{address.target}."
    if address.protocol == "http" and (address.port == 8001 or "bad status line" in text.lower()):
        return f" If port {address.port} is the gRPC port: grpc://{address.target}."
    return ""
