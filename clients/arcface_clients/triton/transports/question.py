"""One question to a server on a connection of its own, over either protocol: for checks, which have no client."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from arcface_clients.errors import DeadlineExceeded
from arcface_clients.triton.address import Connection
from arcface_clients.triton.transports import grpc_messages, http_messages, refusals
from arcface_clients.triton.transports.http import TimedReply, connect_by


def grpc_answer(connection: Connection, method: str, request: Any, headers: Mapping[str, str], timeout_s: float) -> Any:
    """The reply to one call on a channel of its own.

    Raises:
        ServerUnreachable, DeadlineExceeded: no answer.
        ConfigError: the server restricts this call to whoever has its key.
    """
    grpc, _, stubs = grpc_messages.drivers()
    credentials = grpc_messages.credentials(connection)
    target, options = connection.address.target, grpc_messages.channel_options(connection)
    channel = (
        grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target, options)
    )
    with channel:
        try:
            call = getattr(stubs.GRPCInferenceServiceStub(channel), method)
            return call(request, timeout=timeout_s, metadata=grpc_messages.metadata(headers))
        except grpc.RpcError as exc:
            if "restricted" in (exc.details() or ""):
                raise refusals.refused(connection.address, method, "restricted", exc.details(), busy=False) from exc
            if exc.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"no answer from {connection.address} within {timeout_s:g} s") from exc
            raise refusals.unreachable(connection.address, exc.details()) from exc


def http_answer(
    connection: Connection, verb: str, path: str, headers: Mapping[str, str], timeout_s: float
) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own.

    Raises:
        ServerUnreachable, DeadlineExceeded: no answer, or not all of it in time.
    """
    deadline_s = time.monotonic() + timeout_s
    address, context = connection.address, http_messages.tls_context(connection)
    opened = (
        http.client.HTTPSConnection(address.host, address.port, timeout=timeout_s, context=context)
        if context
        else http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    )
    opened._create_connection = connect_by(deadline_s)  # type: ignore[attr-defined]  # create_connection
    opened.response_class = partial(TimedReply, deadline_s)  # type: ignore[assignment]  # made with a socket
    try:
        opened.request(verb, f"{address.path}{path}", b"{}" if verb == "POST" else None, dict(headers))
        reply = opened.getresponse()
        return reply.status, reply.read(http_messages.MAX_ANSWER_BYTES)
    except TimeoutError as exc:
        raise DeadlineExceeded(f"no answer from {address} within {timeout_s:g} s") from exc
    except (OSError, http.client.HTTPException) as exc:
        raise refusals.unreachable(address, exc) from exc
    finally:
        opened.close()
