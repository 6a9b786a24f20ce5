"""Triton's gRPC messages: faces in, bytes out; a reply or its error in, embeddings or an error of ours out. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from arcface_clients.arrays import Array
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE
from arcface_clients.errors import ArcFaceError
from arcface_clients.extras import importing
from arcface_clients.triton.address import Connection
from arcface_clients.triton.answer import KINDS, Tensors, tensor_of
from arcface_clients.triton.memory.cuda import CudaSlot
from arcface_clients.triton.memory.system import Slot, memory_of
from arcface_clients.triton.transports import refusals

INFER_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_MESSAGE_LIMIT = 2**31 - 1  # gRPC's own default of 4 MB is less than 128 faces
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.use_local_subchannel_pool", 1),  # one TCP connection for each client, not one for the process
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt to connect may take, whatever its name says: with less than a round trip and a TLS handshake
    # a distant or busy server can never be reached (grpc/grpc, doc/connection-backoff.md: MIN_CONNECT_TIMEOUT).
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 2000),  # gRPC would wait up to two minutes for a restarted server
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.client_idle_timeout_ms", 60_000),  # an idle connection is ended: what stands between may have forgotten it
]
_UNREACHABLE = (
    "failed to connect",
    "connection",
    "socket closed",
    "broken pipe",
    "name resolution",
    "dns resolution",
    "errors resolving",
    "tcp stream",
    "goaway",
    "handshak",
    "endpoint closing",
    "transport clos",
    "ping timeout",
    "recvmsg",
    "sendmsg",
    "rst_stream",
)
_NO_TRITON = ("exception deserializing", "received http2 header", "invalid content-type")


def drivers() -> tuple[Any, Any, Any]:
    """The modules grpc, service_pb2 and service_pb2_grpc.

    Raises:
        DependencyMissing: tritonclient or grpcio is not installed.
    """
    with importing("gRPC"):
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc
    return grpc, service_pb2, service_pb2_grpc


def channel_options(connection: Connection) -> list[tuple[str, int]]:
    """Options of a channel to this server; one on this host is never asked for through http_proxy."""
    return [*_CHANNEL_OPTIONS, *[("grpc.enable_http_proxy", 0)] * connection.address.loopback]


def metadata(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Headers as gRPC wants them."""
    return tuple((key.lower(), value) for key, value in headers.items())


def credentials(connection: Connection) -> Any | None:
    """Channel credentials for `grpcs://`, None for `grpc://`."""
    if not connection.address.tls:
        return None
    grpc, _, _ = drivers()
    tls = connection.tls
    return grpc.ssl_channel_credentials(_read(tls.ca_file), _read(tls.key_file), _read(tls.cert_file))


def compression(connection: Connection) -> Any:
    """grpc.Compression of a connection; none unless asked for, faces hardly shrink."""
    grpc, _, _ = drivers()
    kinds = {None: "NoCompression", "gzip": "Gzip", "deflate": "Deflate"}
    return getattr(grpc.Compression, kinds[connection.compression])


def pack(model: str, parts: Sequence[Array], outputs: Sequence[str]) -> bytes:
    """A serialized ModelInferRequest with the faces in it; they are copied once."""
    count = sum(len(part) for part in parts)
    return b"".join([_head(model, count, tuple(outputs)), *_raw_input_contents(parts)])


def pack_shared(model: str, slot: Slot, count: int, outputs: Sequence[str]) -> bytes:
    """A serialized ModelInferRequest that points into a registered slot, for the faces and the embeddings."""
    _, messages, _ = drivers()
    request = messages.ModelInferRequest(model_name=model)
    face = request.inputs.add(name=FACE_INPUT, datatype="UINT8", shape=[count, *FACE_SHAPE])
    asked = {name: request.outputs.add(name=name) for name in outputs}
    embedding = asked[EMBEDDING_OUTPUT]
    for tensor, (offset, length) in ((face, slot.faces_at(count)), (embedding, slot.rows_at(count))):
        tensor.parameters["shared_memory_region"].string_param = slot.name
        tensor.parameters["shared_memory_byte_size"].int64_param = length
        tensor.parameters["shared_memory_offset"].int64_param = offset
    return bytes(request.SerializeToString())


def register_request(slot: Slot) -> tuple[str, Any]:
    """Method and message that make a slot known."""
    _, messages, _ = drivers()
    if isinstance(slot, CudaSlot):
        request = messages.CudaSharedMemoryRegisterRequest(
            name=slot.name, raw_handle=slot.raw_handle, device_id=slot.device, byte_size=slot.byte_size
        )
        return "CudaSharedMemoryRegister", request
    request = messages.SystemSharedMemoryRegisterRequest(name=slot.name, key=slot.key, byte_size=slot.byte_size)
    return "SystemSharedMemoryRegister", request


def unregister_request(name: str) -> tuple[str, Any]:
    """Method and message that make a region of ours unknown."""
    method = f"{memory_of(name).capitalize()}SharedMemoryUnregister"
    return method, getattr(drivers()[1], f"{method}Request")(name=name)


def regions_request(memory: str) -> tuple[str, Any]:
    """Method and message that ask for all regions in "system" or "cuda" shared memory."""
    method = f"{memory.capitalize()}SharedMemoryStatus"
    return method, getattr(drivers()[1], f"{method}Request")()


def unpack(connection: Connection, model: str, reply: Any, in_slot: tuple[int, int] | None = None) -> Tensors:
    """The outputs of ours in a ModelInferResponse, views on its bytes.

    Args:
        connection: to whom, for the message.
        model: served model.
        reply: ModelInferResponse; None where its bytes were none.
        in_slot: the shape of the embeddings where they are in shared memory; they are not returned then.

    Raises:
        InvalidAnswer: no ModelInferResponse.
        InferenceFailed: no embeddings, or not as many bytes as a shape says.
    """
    if reply is None:  # grpc.aio's answer to what is no such message
        raise refusals.no_answer(connection.address, model, "bytes that are no ModelInferResponse")
    outputs, raws = list(reply.outputs), list(reply.raw_output_contents)
    tensors: Tensors = {}
    written = False
    for output, raw in zip(outputs, raws, strict=False):
        shape = tuple(output.shape)
        if output.name == EMBEDDING_OUTPUT and in_slot:
            written = output.datatype == "FP32" and shape == in_slot
        elif output.name in KINDS:
            tensor = tensor_of(output.name, output.datatype, shape, raw)
            if tensor is None:
                break
            tensors[output.name] = tensor
    else:
        if len(outputs) == len(raws) and (written or EMBEDDING_OUTPUT in tensors):
            return tensors
    got = ", ".join(f"{o.name} {o.datatype} {list(o.shape)}" for o in outputs) or "no output"
    raise refusals.wrong_answer(connection.address, model, f"{got} in {[len(raw) for raw in raws]} bytes")


def config_json(connection: Connection, model: str, reply: Any) -> dict[str, Any]:
    """The configuration in a ModelConfigResponse; int64 values are strings, as protobuf's JSON has them.

    Raises:
        InvalidAnswer: there is none in it.
    """
    from google.protobuf.json_format import MessageToDict

    if reply is None or not reply.config.name:
        raise refusals.no_answer(connection.address, model, "no model configuration")
    config: dict[str, Any] = MessageToDict(reply.config, preserving_proto_field_name=True)
    return config


def translated(exc: Any, connection: Connection, model: str, timeout_s: float) -> ArcFaceError:
    """The error of ours for a grpc.RpcError."""
    status, words = exc.code().name, exc.details() or ""
    if status == "DEADLINE_EXCEEDED":
        return refusals.too_late(connection.address, model, timeout_s)
    if any(part in words.lower() for part in _NO_TRITON):
        return refusals.no_answer(connection.address, model, f"{status}: {words}")
    lost = status in ("UNAVAILABLE", "UNKNOWN", "INTERNAL") and any(part in words.lower() for part in _UNREACHABLE)
    if lost or status == "CANCELLED":  # we cancel nothing here: a server that shuts down does
        return refusals.unreachable(connection.address, words)
    busy = status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
    return refusals.refused(connection.address, model, status, words, busy=busy)


@lru_cache(maxsize=1024)
def _head(model: str, count: int, outputs: tuple[str, ...]) -> bytes:
    """Everything of a ModelInferRequest but the faces."""
    _, messages, _ = drivers()
    request = messages.ModelInferRequest(model_name=model)
    request.inputs.add(name=FACE_INPUT, datatype="UINT8", shape=[count, *FACE_SHAPE])
    for name in outputs:
        request.outputs.add(name=name)
    return bytes(request.SerializeToString())


def _raw_input_contents(parts: Sequence[Array]) -> list[bytes | memoryview]:
    """Field 7 (bytes) of ModelInferRequest around the faces: tag, length, then the arrays' own memory.

    Fields of a protobuf message may be written one after the other in any order (protobuf.dev, Encoding), so this
    follows the serialized head. The stubs copy the faces three times (tobytes, into the message, out of it), which
    halves the throughput of one client: `scripts/bench clients`.
    """
    length = sum(part.nbytes for part in parts)
    tag = bytearray([7 << 3 | 2])
    while length > 0x7F:
        tag.append(length & 0x7F | 0x80)
        length >>= 7
    tag.append(length)
    return [bytes(tag), *(part.data.cast("B") for part in parts if part.size)]


def _read(path: Any) -> bytes | None:
    from pathlib import Path

    return Path(path).read_bytes() if path else None
