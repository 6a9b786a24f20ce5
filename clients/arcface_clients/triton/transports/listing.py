"""Asks a server for its list of models without its key, which a server that is guarded refuses."""

from __future__ import annotations

import json

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Connection
from arcface_clients.triton.transports import grpc_messages, refusals
from arcface_clients.triton.transports.question import grpc_answer, http_answer


def models_without_key(connection: Connection, timeout_s: float) -> list[str] | None:
    """Names of the models in the server's repository; None: it refuses to tell without a key.

    Only TLS files of the connection are used, none of its headers: they may hold the key.

    Raises:
        ServerUnreachable, DeadlineExceeded: no answer.
        InvalidAnswer: what answers is no Triton server.
        DependencyMissing: the driver of this protocol is not installed.
    """
    if connection.address.protocol == "http":
        status, body = http_answer(connection, "POST", "/v2/repository/index", {}, timeout_s)
        if status in (401, 403):
            return None
        with refusals.damage_is_no_answer(connection.address, "the list of models"):
            return [model["name"] for model in json.loads(body)]
    _, pb, _ = grpc_messages.drivers()
    try:
        reply = grpc_answer(connection, "RepositoryIndex", pb.RepositoryIndexRequest(), {}, timeout_s)
    except ConfigError:
        return None
    return [model.name for model in reply.models]
