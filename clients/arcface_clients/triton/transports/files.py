"""Messages to models that take encoded files (BYTES [1]) instead of faces, and their answers, over both protocols."""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np

from arcface_clients.errors import InvalidAnswer
from arcface_clients.triton.address import Connection
from arcface_clients.triton.answer import Tensors
from arcface_clients.triton.transports import Files, Parameter, refusals
from arcface_clients.triton.transports.grpc_messages import drivers
from arcface_clients.triton.transports.http_messages import Request, binary_request

_DTYPES = {"FP32": np.float32, "INT32": np.int32, "UINT8": np.uint8, "BOOL": np.bool_}


def pack_http(
    files: Files, outputs: Iterable[str], parameters: Mapping[str, Parameter], compression: str | None
) -> Request:
    """JSON, then each file behind its length, as BYTES tensors are written."""
    bodies = {name: _element(file) for name, file in files.items()}
    request_id = secrets.token_hex(8)
    head = {
        "id": request_id,
        "parameters": dict(parameters),
        "inputs": [
            {"name": name, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(body)}}
            for name, body in bodies.items()
        ],
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
    }
    packed = json.dumps(head).encode()
    return binary_request(b"".join([packed, *bodies.values()]), len(packed), request_id, compression)


def unpack_http(connection: Connection, model: str, request_id: str, head_length: str | None, body: bytes) -> Tensors:
    """All outputs of a reply, views on its bytes.

    Raises:
        InvalidAnswer: no inference reply, or one to another request.
    """
    try:
        offset = length = len(body) if head_length is None else int(head_length)
        head = json.loads(body[:length])
        if head.get("id") != request_id:
            raise refusals.no_answer(connection.address, model, "the answer to another request")
        tensors: Tensors = {}
        for output in head["outputs"]:
            size = int(output["parameters"]["binary_data_size"])
            raw = memoryview(body)[offset : offset + size]
            tensors[output["name"]] = _tensor(output["datatype"], output["shape"], raw)
            offset += size
    except InvalidAnswer:
        raise
    except refusals.MALFORMED as exc:
        raise _damaged(connection, model, len(body), exc) from exc
    return tensors


def pack_grpc(model: str, files: Files, outputs: Iterable[str], parameters: Mapping[str, Parameter]) -> bytes:
    """A serialized ModelInferRequest. Fractions travel as text, because older servers refuse `double_param`."""
    _, messages, _ = drivers()
    request = messages.ModelInferRequest(model_name=model)
    for key, value in parameters.items():
        if isinstance(value, bool):
            request.parameters[key].bool_param = value
        elif isinstance(value, int):
            request.parameters[key].int64_param = value
        else:
            request.parameters[key].string_param = str(value)
    for name, file in files.items():
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(_element(file))
    for name in outputs:
        request.outputs.add(name=name)
    return bytes(request.SerializeToString())


def unpack_grpc(connection: Connection, model: str, reply: Any) -> Tensors:
    """All outputs of a ModelInferResponse, views on its bytes.

    Raises:
        InvalidAnswer: no ModelInferResponse.
    """
    try:
        pairs = zip(reply.outputs, reply.raw_output_contents, strict=True)
        return {output.name: _tensor(output.datatype, output.shape, raw) for output, raw in pairs}
    except refusals.MALFORMED as exc:
        raise _damaged(connection, model, 0 if reply is None else reply.ByteSize(), exc) from exc


def _element(file: bytes) -> bytes:
    return struct.pack("<I", len(file)) + file


def _tensor(datatype: str, shape: Iterable[int], raw: bytes | memoryview) -> Any:
    dims = tuple(int(d) for d in shape)
    if datatype == "BYTES" and dims == (1,):
        size = int.from_bytes(raw[:4], "little")
        if len(raw) != 4 + size:
            raise ValueError(f"{len(raw)} bytes for a text of {size}")
        return np.array([bytes(raw[4:]).decode()])
    dtype = np.dtype(_DTYPES[datatype])
    if min(dims) < 0 or len(raw) != dtype.itemsize * prod(dims):
        raise ValueError(f"{len(raw)} bytes for {datatype} {list(dims)}")
    return np.frombuffer(raw, dtype).reshape(dims)


def _damaged(connection: Connection, model: str, size: int, exc: Exception) -> InvalidAnswer:
    return refusals.no_answer(connection.address, model, f"{size} bytes that are no inference reply ({exc})")
