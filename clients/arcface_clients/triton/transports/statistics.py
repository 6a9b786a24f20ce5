"""Asks a server what one of its models has done since it was loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass

from arcface_clients.triton.address import Connection
from arcface_clients.triton.transports import grpc_messages, refusals
from arcface_clients.triton.transports.question import grpc_answer, http_answer


@dataclass(frozen=True)
class ModelStatistics:
    """Requests answered and failed, mean time in the queue, and when the last one ended (seconds since the epoch)."""

    answered: int
    failed: int
    mean_queue_ms: float
    last_s: float


def model_statistics(connection: Connection, model: str, timeout_s: float) -> ModelStatistics:
    """The statistics of a model, all versions together.

    Raises:
        ServerUnreachable, DeadlineExceeded: no answer.
        InvalidAnswer: what answers is no Triton server.
        DependencyMissing: the driver of this protocol is not installed.
    """
    if connection.address.protocol == "http":
        _, body = http_answer(connection, "GET", f"/v2/models/{model}/stats", connection.headers, timeout_s)
        with refusals.damage_is_no_answer(connection.address, model):
            rows = json.loads(body)["model_stats"]
    else:
        _, pb, _ = grpc_messages.drivers()
        request = pb.ModelStatisticsRequest(name=model)
        reply = grpc_answer(connection, "ModelStatistics", request, connection.headers, timeout_s)
        from google.protobuf.json_format import MessageToDict

        rows = MessageToDict(reply, preserving_proto_field_name=True)["model_stats"]
    with refusals.damage_is_no_answer(connection.address, model):
        counts = [row.get("inference_stats", {}) for row in rows]
        answered = sum(int(row.get("success", {}).get("count", 0)) for row in counts)
        queued_ns = sum(int(row.get("queue", {}).get("ns", 0)) for row in counts)
        return ModelStatistics(
            answered=answered,
            failed=sum(int(row.get("fail", {}).get("count", 0)) for row in counts),
            mean_queue_ms=queued_ns / 1e6 / max(answered, 1),
            last_s=max(int(row.get("last_inference", 0)) for row in rows) / 1000,
        )
