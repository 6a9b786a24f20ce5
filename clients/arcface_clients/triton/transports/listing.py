"""Asks a server for its list of models without its key, which a server that is guarded refuses."""

from __future__ import annotations

import http.client
import json

from arcface_clients.errors import DeadlineExceeded
from arcface_clients.triton.address import Connection
from arcface_clients.triton.transports import grpc_messages, http_messages, refusals


def models_without_key(connection: Connection, timeout_s: float) -> list[str] | None:
    """Names of the models in the server's repository; None: it refuses to tell without a key.

    Only TLS files of the connection are used, none of its headers: they may hold the key.

    Raises:
        ServerUnreachable, DeadlineExceeded: no answer.
        DependencyMissing: the driver of this protocol is not installed.
    """
    if connection.address.protocol == "http":
        return _over_http(connection, timeout_s)
    grpc, pb, stubs = grpc_messages.drivers()
    credentials = grpc_messages.credentials(connection)
    target, options = connection.address.target, grpc_messages.channel_options(connection)
    channel = (
        grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target, options)
    )
    with channel:
        try:
            reply = stubs.GRPCInferenceServiceStub(channel).RepositoryIndex(
                pb.RepositoryIndexRequest(), timeout=timeout_s
            )
        except grpc.RpcError as exc:
            if "restricted" in (exc.details() or ""):
                return None
            if exc.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"no answer from {connection.address} within {timeout_s:g} s") from exc
            raise refusals.unreachable(connection.address, exc.details()) from exc
    return [model.name for model in reply.models]


def _over_http(connection: Connection, timeout_s: float) -> list[str] | None:
    address, context = connection.address, http_messages.tls_context(connection)
    opened = (
        http.client.HTTPSConnection(address.host, address.port, timeout=timeout_s, context=context)
        if context
        else http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    )
    try:
        opened.request("POST", f"{address.path}/v2/repository/index", b"{}")
        reply = opened.getresponse()
        body = reply.read()
    except (OSError, http.client.HTTPException) as exc:
        raise refusals.unreachable(address, exc) from exc
    finally:
        opened.close()
    return None if reply.status in (401, 403) else [model["name"] for model in json.loads(body)]
