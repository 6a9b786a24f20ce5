"""Triton's HTTP bodies (KServe v2, binary extension): faces in, bytes out; a reply in, embeddings out. No I/O."""

from __future__ import annotations

import base64
import gzip
import json
import secrets
import ssl
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from arcface_clients.arrays import Array
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE
from arcface_clients.errors import ArcFaceError
from arcface_clients.triton.address import Connection
from arcface_clients.triton.answer import KINDS, Tensors, tensor_of
from arcface_clients.triton.memory.cuda import CudaSlot
from arcface_clients.triton.memory.system import Slot, memory_of
from arcface_clients.triton.transports import refusals

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_ANSWER_BYTES = 256 * 2**20  # no answer to a request is as long: 100,000 embeddings
T = TypeVar("T")
Read = Callable[[str | None, bytes], T]
"""What makes something of a reply's header `HEADER_LENGTH` and body; raises InvalidAnswer where that cannot be."""
_BUSY = (429, 502, 503, 504)  # also what a proxy says whose server is gone


class Request(NamedTuple):
    """A body, the headers that describe it, and the id that its answer has to carry.

    HTTP answers are told apart by their order alone: behind a proxy that delivers one twice, each later face would get
    the embedding of the one before.
    """

    body: bytes
    headers: dict[str, str]
    id: str


def pack(parts: Sequence[Array], outputs: Sequence[str], compression: str | None) -> Request:
    """JSON, then the faces as they lie in memory; they are copied once."""
    count, request_id = sum(len(part) for part in parts), secrets.token_hex(8)
    face = {"binary_data_size": sum(part.nbytes for part in parts)}
    head = _head(request_id, count, outputs, face, {"binary_data": True})
    body = b"".join([head, *(part.data.cast("B") for part in parts if part.size)])
    return binary_request(body, len(head), request_id, compression)


def binary_request(body: bytes, head_length: int, request_id: str, compression: str | None) -> Request:
    """A body of JSON and binary tensors with its headers, compressed if asked for."""
    headers = {HEADER_LENGTH: str(head_length), "Content-Type": "application/octet-stream"}
    if compression is None:
        return Request(body, headers, request_id)
    squeeze = gzip.compress if compression == "gzip" else zlib.compress
    return Request(squeeze(body), {**headers, "Content-Encoding": compression}, request_id)


def pack_shared(slot: Slot, count: int, outputs: Sequence[str]) -> Request:
    """JSON that points into a registered slot, for the faces and the embeddings."""
    places = []
    for offset, length in (slot.faces_at(count), slot.rows_at(count)):
        places.append(
            {"shared_memory_region": slot.name, "shared_memory_byte_size": length, "shared_memory_offset": offset}
        )
    request_id = secrets.token_hex(8)
    head = _head(request_id, count, outputs, *places)
    return Request(head, {HEADER_LENGTH: str(len(head))}, request_id)


def unpack(
    connection: Connection,
    model: str,
    request_id: str,
    head_length: str | None,
    body: bytes,
    in_slot: tuple[int, int] | None = None,
) -> Tensors:
    """The outputs of ours in a reply, views on its bytes.

    Args:
        connection: to whom, for the message.
        model: served model.
        request_id: that of the request.
        head_length: the reply's header `HEADER_LENGTH`.
        body: the reply's.
        in_slot: the shape of the embeddings where they are in shared memory; they are not returned then.

    Raises:
        InvalidAnswer: no inference reply, or one to another request.
        InferenceFailed: no embeddings, or not as many bytes as a shape says.
    """
    tensors: Tensors = {}
    written = right = False
    try:
        offset = length = len(body) if head_length is None else int(head_length)
        head = json.loads(body[:length])
        outputs = head["outputs"]
        answered_id = head.get("id")
        got = ", ".join(f"{o['name']} {o['datatype']} {list(o['shape'])}" for o in outputs)
        for output in outputs:
            name, shape = output["name"], tuple(int(d) for d in output["shape"])
            size = int(output.get("parameters", {}).get("binary_data_size", 0))
            if size < 0 or not 0 <= offset + size <= len(body):
                raise ValueError(f"{size} bytes at {offset} of {len(body)}")
            if name == EMBEDDING_OUTPUT and in_slot:
                written = output["datatype"] == "FP32" and shape == in_slot
            elif name in KINDS:
                tensor = tensor_of(name, output["datatype"], shape, memoryview(body)[offset : offset + size])
                if tensor is None:
                    break
                tensors[name] = tensor
            offset += size
        else:
            right = offset == len(body) and (written or EMBEDDING_OUTPUT in tensors)
    except refusals.MALFORMED as exc:
        raise refusals.no_answer(
            connection.address, model, f"{len(body)} bytes that are no inference reply ({_began(body)})"
        ) from exc
    if answered_id != request_id:
        raise refusals.no_answer(connection.address, model, "the answer to another request")
    if not right:
        raise refusals.wrong_answer(connection.address, model, f"{got or 'no output'} in {len(body) - length} bytes")
    return tensors


def translated(connection: Connection, model: str, status: int, body: bytes) -> ArcFaceError:
    """The error of ours for a status that is not 200."""
    try:
        words = json.loads(body)["error"]
    except refusals.MALFORMED:
        words = body[:200].decode(errors="replace").strip() or "no reason given"
    told = " ".join(str(words).split())  # one line, also of a page
    return refusals.refused(connection.address, model, f"HTTP {status}", told, busy=status in _BUSY)


def region_path(name: str, verb: str) -> str:
    """Where a region of ours is registered or unregistered."""
    return f"/v2/{memory_of(name)}sharedmemory/region/{name}/{verb}"


def config_json(connection: Connection, model: str, body: bytes) -> dict[str, Any]:
    """The configuration in a reply.

    Raises:
        InvalidAnswer: there is none of this model in it.
    """
    try:
        config = json.loads(body)
        if config["name"] == model and isinstance(config, dict):
            return config
    except refusals.MALFORMED as exc:
        raise refusals.no_answer(connection.address, model, f"no model configuration ({_began(body)})") from exc
    raise refusals.no_answer(connection.address, model, f"the configuration of another model ({_began(body)})")


def register_body(slot: Slot) -> bytes:
    """What the register call is sent."""
    if isinstance(slot, CudaSlot):
        handle = {"b64": base64.b64encode(slot.raw_handle).decode()}
        return json.dumps({"raw_handle": handle, "device_id": slot.device, "byte_size": slot.byte_size}).encode()
    return json.dumps({"key": slot.key, "offset": 0, "byte_size": slot.byte_size}).encode()


def region_names(connection: Connection, body: bytes) -> list[str]:
    """Names in a status reply (a list of regions).

    Raises:
        InvalidAnswer: it is none.
    """
    try:
        return [str(region["name"]) for region in json.loads(body or b"[]")]
    except refusals.MALFORMED as exc:
        got = f"no list of regions ({_began(body)})"
        raise refusals.no_answer(connection.address, "shared memory", got) from exc


def tls_context(connection: Connection) -> ssl.SSLContext | None:
    """For `https://`: the system's authorities or `ca_file`, and our certificate for mutual TLS."""
    if not connection.address.tls:
        return None
    tls = connection.tls
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


def _head(
    request_id: str, count: int, outputs: Sequence[str], face: dict[str, Any], embedding: dict[str, Any]
) -> bytes:
    tensor = {"name": FACE_INPUT, "datatype": "UINT8", "shape": [count, *FACE_SHAPE], "parameters": face}
    small = {"binary_data": True}
    asked = [{"name": name, "parameters": embedding if name == EMBEDDING_OUTPUT else small} for name in outputs]
    return json.dumps({"id": request_id, "inputs": [tensor], "outputs": asked}).encode()


def _began(body: bytes) -> str:
    return f"they begin {body[:40]!r}" if body else "empty"
