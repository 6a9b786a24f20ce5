"""Triton's HTTP bodies (KServe v2, binary extension): faces in, bytes out; a reply in, embeddings out. No I/O."""

from __future__ import annotations

import base64
import gzip
import json
import ssl
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from arcface_clients.arrays import Array, FloatArray
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE
from arcface_clients.errors import ArcFaceError
from arcface_clients.triton.address import Connection
from arcface_clients.triton.memory.cuda import CudaSlot
from arcface_clients.triton.memory.system import Slot, memory_of
from arcface_clients.triton.transports import refusals

HEADER_LENGTH = "Inference-Header-Content-Length"


class Request(NamedTuple):
    """A body, and the headers that describe it."""

    body: bytes
    headers: dict[str, str]


def pack(parts: Sequence[Array], compression: str | None) -> Request:
    """JSON, then the faces as they lie in memory; they are copied once."""
    count = sum(len(part) for part in parts)
    face = {"binary_data_size": sum(part.nbytes for part in parts)}
    head = _head(count, face, {"binary_data": True})
    return _compressed(b"".join([head, *(part.data.cast("B") for part in parts if part.size)]), len(head), compression)


def pack_shared(slot: Slot, count: int) -> Request:
    """JSON that points into a registered slot, for the input and the output."""
    places = []
    for offset, length in (slot.faces_at(count), slot.rows_at(count)):
        places.append(
            {"shared_memory_region": slot.name, "shared_memory_byte_size": length, "shared_memory_offset": offset}
        )
    head = _head(count, *places)
    return Request(head, {HEADER_LENGTH: str(len(head))})


def unpack(connection: Connection, model: str, head_length: str | None, body: bytes) -> FloatArray:
    """The `embedding` of a reply as float32 (N,D), a view on its bytes; `head_length`: its header `HEADER_LENGTH`.

    Raises:
        InferenceFailed: no such output, or not as many bytes as its shape says.
    """
    try:
        length = len(body) if head_length is None else int(head_length)
        outputs = json.loads(body[:length])["outputs"]
        offset = length
        for output in outputs:
            size = int(output.get("parameters", {}).get("binary_data_size", 0))
            if output["name"] == EMBEDDING_OUTPUT and output["datatype"] == "FP32":
                shape = tuple(output["shape"])
                rows = np.frombuffer(body, np.float32, size // 4, offset)
                if len(shape) == 2 and rows.size == shape[0] * shape[1]:
                    return rows.reshape(shape)
            offset += size
        got = ", ".join(f"{o['name']} {o['datatype']} {o['shape']}" for o in outputs)
    except (ValueError, KeyError, TypeError) as exc:
        raise refusals.wrong_answer(
            connection.address, model, f"{len(body)} bytes that are no inference reply"
        ) from exc
    raise refusals.wrong_answer(connection.address, model, f"{got or 'no output'} in {len(body) - length} bytes")


def translated(connection: Connection, model: str, status: int, body: bytes) -> ArcFaceError:
    """The error of ours for a status that is not 200."""
    try:
        words = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        words = body[:200].decode(errors="replace").strip() or "no reason given"
    return refusals.refused(connection.address, model, f"HTTP {status}", words, busy=status in (429, 502, 503, 504))


def region_path(name: str, verb: str) -> str:
    """Where a region of ours is registered or unregistered."""
    return f"/v2/{memory_of(name)}sharedmemory/region/{name}/{verb}"


def config_json(body: bytes) -> dict[str, Any]:
    """The configuration in a reply."""
    config: dict[str, Any] = json.loads(body)
    return config


def register_body(slot: Slot) -> bytes:
    """What the register call is sent."""
    if isinstance(slot, CudaSlot):
        handle = {"b64": base64.b64encode(slot.raw_handle).decode()}
        return json.dumps({"raw_handle": handle, "device_id": slot.device, "byte_size": slot.byte_size}).encode()
    return json.dumps({"key": slot.key, "offset": 0, "byte_size": slot.byte_size}).encode()


def region_names(body: bytes) -> list[str]:
    """Names in a status reply (a list of regions)."""
    return [region["name"] for region in json.loads(body or b"[]")]


def tls_context(connection: Connection) -> ssl.SSLContext | None:
    """For `https://`: the system's authorities or `ca_file`, and our certificate for mutual TLS."""
    if not connection.address.tls:
        return None
    tls = connection.tls
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


def _head(count: int, face: dict[str, Any], embedding: dict[str, Any]) -> bytes:
    tensor = {"name": FACE_INPUT, "datatype": "UINT8", "shape": [count, *FACE_SHAPE], "parameters": face}
    return json.dumps({"inputs": [tensor], "outputs": [{"name": EMBEDDING_OUTPUT, "parameters": embedding}]}).encode()


def _compressed(body: bytes, head_length: int, compression: str | None) -> Request:
    headers = {HEADER_LENGTH: str(head_length), "Content-Type": "application/octet-stream"}
    if compression is None:
        return Request(body, headers)
    squeeze = gzip.compress if compression == "gzip" else zlib.compress
    return Request(squeeze(body), {**headers, "Content-Encoding": compression})
