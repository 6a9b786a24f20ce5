"""Triton over gRPC: packed faces in, embeddings out, through the stubs of tritonclient."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from arcface_clients.address import Address
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE
from arcface_clients.errors import (
    ArcFaceError,
    ClientUnusable,
    DeadlineExceeded,
    DependencyMissing,
    InferenceFailed,
    ModelNotReady,
    ServerUnreachable,
)
from arcface_clients.transports.refusals import not_ready, port_hint, unreachable

_MESSAGE_LIMIT = 2**31 - 1  # gRPC's own default of 4 MB is less than 128 faces
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.use_local_subchannel_pool", 1),  # one TCP connection for each client, not one for the process
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),  # gRPC would wait up to two minutes for a restarted server
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class GrpcTransport:
    """A gRPC channel; one TCP connection carries all requests in flight."""

    def __init__(self, address: Address, headers: dict[str, str] | None = None) -> None:
        """Open a channel lazily: gRPC connects with the first request."""
        try:
            import grpc
            from tritonclient.grpc import service_pb2, service_pb2_grpc
        except ImportError as exc:
            raise DependencyMissing(
                f"gRPC needs the package tritonclient ({exc}): pip install tritonclient[grpc]"
            ) from exc
        self._address = address
        self._metadata = tuple((key.lower(), value) for key, value in (headers or {}).items())
        self._closed = threading.Event()
        self._rpc_error = grpc.RpcError
        self._messages = service_pb2
        self._channel = grpc.insecure_channel(address.target, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_unary(  # without a serializer: the body is packed already
            "/inference.GRPCInferenceService/ModelInfer",
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def pack(self, model: str, parts: Sequence[np.ndarray]) -> bytes:
        """A serialized ModelInferRequest; the faces are copied once, into it."""
        count = sum(len(part) for part in parts)
        request = self._messages.ModelInferRequest(model_name=model)
        request.inputs.add(name=FACE_INPUT, datatype="UINT8", shape=[count, *FACE_SHAPE])
        request.outputs.add(name=EMBEDDING_OUTPUT)
        return b"".join([request.SerializeToString(), *raw_input_contents(parts)])

    def infer(self, model: str, body: bytes, timeout_s: float) -> np.ndarray:
        """Embeddings float32 (N,D), read-only."""
        with self._errors(model, timeout_s):
            reply = self._infer(body, timeout=timeout_s, metadata=self._metadata)
        return embeddings(reply)

    def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The served configuration; int64 values are strings, as protobuf's JSON has them."""
        from google.protobuf.json_format import MessageToDict

        with self._errors(model, timeout_s):
            reply = self._stub.ModelConfig(
                self._messages.ModelConfigRequest(name=model), timeout=timeout_s, metadata=self._metadata
            )
        return MessageToDict(reply.config, preserving_proto_field_name=True)

    def sleep(self, seconds: float) -> None:
        """Wait; returns early when closed."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Close the channel; requests under way fail."""
        self._closed.set()
        self._channel.close()

    @contextmanager
    def _errors(self, model: str, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except self._rpc_error as exc:
            if self._closed.is_set():
                raise ClientUnusable("this client is closed; make a new one.") from exc
            raise translated(exc, self._address, model, timeout_s) from exc
        except ValueError as exc:  # gRPC's answer to a call on a closed channel
            raise ClientUnusable(f"this client is closed; make a new one ({exc}).") from exc


def raw_input_contents(parts: Sequence[np.ndarray]) -> list[bytes | memoryview]:
    """Field 7 (bytes) of ModelInferRequest around the faces: tag, length, then the arrays' own memory.

    Fields of a protobuf message may be written one after the other, so this follows the serialized rest; the stubs
    would copy the faces three times (tobytes, into the message, out of it).
    """
    length = sum(part.nbytes for part in parts)
    head = bytearray([7 << 3 | 2])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return [bytes(head), *(memoryview(part).cast("B") for part in parts if part.size)]


def embeddings(reply: Any) -> np.ndarray:
    """The `embedding` of a ModelInferResponse as float32 (N,D), a view on its bytes.

    Raises:
        InferenceFailed: no such output, or not as many bytes as its shape says.
    """
    for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=False):
        if output.name == EMBEDDING_OUTPUT and output.datatype == "FP32":
            rows = np.frombuffer(raw, np.float32)
            if rows.size == np.prod(output.shape):
                return rows.reshape(output.shape)
    got = ", ".join(f"{o.name} {o.datatype} {list(o.shape)}" for o in reply.outputs) or "no output"
    raise InferenceFailed(
        f"the model {reply.model_name!r} answered with {got} and {[len(r) for r in reply.raw_output_contents]} bytes; "
        "expected `embedding` FP32 (N, D). Look at the server's log (empty outputs: its Python has numpy 2)"
    )


def translated(exc: Any, address: Address, model: str, timeout_s: float) -> ArcFaceError:
    """The error of ours for a grpc.RpcError."""
    code, details = exc.code().name, exc.details() or ""
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(
            f"no answer from {model!r} at {address} within {timeout_s:g} s. "
            "Raise timeout_s, or send fewer faces at once"
        )
    if not_ready(details):
        return ModelNotReady(f"{address} does not serve {model!r}: {details}. Load it: arcface serve")
    if code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN") and unreachable(details):
        return ServerUnreachable(
            f"no Triton server answers at {address}: {details}.{port_hint(address, details)} Start one: arcface serve"
        )
    if code == "UNAVAILABLE":
        return ModelNotReady(f"{model!r} at {address} cannot answer now: {details}")
    return InferenceFailed(f"{model!r} at {address} answered {code}: {details}")
