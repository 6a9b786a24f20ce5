"""A small HTTP server that answers like Triton until it is told what to answer instead, byte by byte."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress

import numpy as np

from odd_models import LEFT

CONFIG = {
    "name": "liar",
    "backend": "python",
    "max_batch_size": 8,
    "input": [{"name": "face", "data_type": "TYPE_UINT8", "dims": [112, 112, 3]}],
    "output": [
        {"name": "embedding", "data_type": "TYPE_FP32", "dims": [64]},
        {"name": "contract", "data_type": "TYPE_INT32", "dims": [4]},
    ],
    "parameters": {"contract_id": {"string_value": LEFT}},
}
WORDS = np.frombuffer(bytes.fromhex(LEFT)[:16], ">i4").astype(np.int32)


def http(body: bytes, *, status: str = "200 OK", head: str = "", length: int | None = None) -> bytes:
    """A reply; `length`: what it says of its length."""
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{head}\r\n".encode() + body


def outputs(rows: np.ndarray, words: np.ndarray, request_id: str, **changed: object) -> bytes:
    """An inference reply; `changed`: keys of the embedding's description, and `id`."""
    embedding = {
        "name": "embedding",
        "datatype": "FP32",
        "shape": list(rows.shape),
        "parameters": {"binary_data_size": rows.nbytes},
    }
    contract = {
        "name": "contract",
        "datatype": "INT32",
        "shape": list(words.shape),
        "parameters": {"binary_data_size": words.nbytes},
    }
    told = changed.pop("id", request_id)
    head = json.dumps({"id": told, "model_name": "liar", "outputs": [{**embedding, **changed}, contract]}).encode()
    body = head + rows.tobytes() + words.tobytes()
    return http(body, head=f"Inference-Header-Content-Length: {len(head)}\r\n")


def truth(count: int, request_id: str, **changed: object) -> bytes:
    """What an honest server would answer: the first unit vectors."""
    return outputs(np.eye(count, 64, dtype=np.float32), np.tile(WORDS, (count, 1)), request_id, **changed)


class LyingServer:
    """`lie(count, id)` makes the whole reply to an inference request; `config` the one to a configuration request."""

    def __init__(self) -> None:
        self.lie = truth
        self.config = http(json.dumps(CONFIG).encode())
        self.asked = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, ValueError), client, client.makefile("rb") as lines:
            while line := lines.readline():
                length = 0
                while (header := lines.readline().strip().lower()) != b"":
                    if header.startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                body = lines.read(length)
                if b"sharedmemory" in line:
                    client.sendall(http(b'{"error": "not here"}', status="400 Bad Request"))
                    continue
                if b"/infer" not in line:
                    client.sendall(self.config)
                    continue
                self.asked += 1
                head = json.JSONDecoder().raw_decode(body.decode("latin-1"))[0]
                reply = self.lie(head["inputs"][0]["shape"][0], head["id"])
                client.sendall(reply)
                if b"content-length" not in reply.lower() or b"999999" in reply:
                    return
