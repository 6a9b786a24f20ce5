"""Triton over gRPC: packed faces in, embeddings out, through the stubs of tritonclient."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from arcface_clients.arrays import Array
from arcface_clients.errors import InferenceFailed
from arcface_clients.triton.address import Connection
from arcface_clients.triton.admin_key import admin_headers
from arcface_clients.triton.answer import Tensors
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.transports import Files, Parameter, refusals
from arcface_clients.triton.transports import grpc_messages as messages
from arcface_clients.triton.transports.files import pack_grpc, unpack_grpc


class GrpcTransport:
    """A gRPC channel; one TCP connection carries all requests in flight."""

    def __init__(self, connection: Connection) -> None:
        """Open a channel lazily: gRPC connects with the first request."""
        grpc, self._pb, stubs = messages.drivers()
        self._connection = connection
        self._metadata = messages.metadata(connection.headers)
        self._closed = threading.Event()
        self._rpc_error = grpc.RpcError
        options, target = messages.channel_options(connection), connection.address.target
        credentials, compression = messages.credentials(connection), messages.compression(connection)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options, compression)
        else:
            self._channel = grpc.secure_channel(target, credentials, options, compression)
        self._stub = stubs.GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_unary(  # without a serializer: the body is packed already
            messages.INFER_METHOD, response_deserializer=self._pb.ModelInferResponse.FromString
        )

    def pack(self, model: str, parts: Sequence[Array], outputs: Sequence[str]) -> bytes:
        """A serialized ModelInferRequest."""
        return messages.pack(model, parts, outputs)

    def infer(self, model: str, body: bytes, timeout_s: float) -> Tensors:
        """The outputs asked for, read-only."""
        with self._errors(model, timeout_s):
            reply = self._infer(body, timeout=timeout_s, metadata=self._metadata)
        return messages.unpack(self._connection, model, reply)

    def infer_files(
        self, model: str, files: Files, outputs: Sequence[str], parameters: Mapping[str, Parameter], timeout_s: float
    ) -> Tensors:
        """The outputs asked for, read-only."""
        body = pack_grpc(model, files, outputs, parameters)
        with self._errors(model, timeout_s):
            reply = self._infer(body, timeout=timeout_s, metadata=self._metadata)
        return unpack_grpc(self._connection, model, reply)

    def infer_shared(self, model: str, slot: Slot, count: int, outputs: Sequence[str], timeout_s: float) -> Tensors:
        """Faces and embeddings stay in the slot."""
        body = messages.pack_shared(model, slot, count, outputs)
        with self._errors(model, timeout_s):
            reply = self._infer(body, timeout=timeout_s, metadata=self._metadata)
        return messages.unpack(self._connection, model, reply, in_slot=(count, slot.embedding_dim))

    def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """Make a slot known to the server."""
        try:
            with self._errors("shared memory", timeout_s):
                self._call_restricted(*messages.register_request(slot), timeout_s)
        except InferenceFailed as exc:
            if "already" not in str(exc):
                raise

    def unregister_shared(self, name: str, timeout_s: float) -> None:
        """Make the server forget a region."""
        with self._errors("shared memory", timeout_s):
            self._call_restricted(*messages.unregister_request(name), timeout_s)

    def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """Names of the regions that the server knows."""
        with self._errors("shared memory", timeout_s):
            reply = self._call_restricted(*messages.regions_request(memory), timeout_s)
        return list(reply.regions)

    def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The served configuration; int64 values are strings, as protobuf's JSON has them."""
        with self._errors(model, timeout_s):
            reply = self._call("ModelConfig", self._pb.ModelConfigRequest(name=model), timeout_s)
        return messages.config_json(self._connection, model, reply)

    def sleep(self, seconds: float) -> None:
        """Wait; returns early when closed."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Close the channel; requests under way fail."""
        self._closed.set()
        self._channel.close()

    def _call_restricted(self, method: str, request: Any, timeout_s: float) -> Any:
        metadata = messages.metadata(admin_headers(self._connection))
        return getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)

    def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)

    @contextmanager
    def _errors(self, model: str, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except self._rpc_error as exc:
            if self._closed.is_set():
                raise refusals.closed() from exc
            raise messages.translated(exc, self._connection, model, timeout_s) from exc
        except ValueError as exc:  # gRPC's answer to a call on a closed channel
            raise refusals.closed() from exc
