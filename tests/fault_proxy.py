"""A TCP proxy that stands between a client and a real server and breaks connections on request."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass


@dataclass
class Faults:
    """What goes wrong next. Counts go down as faults happen; 0 means healthy.

    cuts: connections reset once `after_bytes` of an answer have passed. flips: one byte of an answer changed there.
    busy: requests answered with 503 SlowDown. stalls: connections on which nothing is ever answered. greeting_s: how
    long each new connection waits for its first byte, as on a busy server. upload_cuts: connections
    closed on both sides once `after_bytes` of what the client sends have passed.
    """

    cuts: int = 0
    flips: int = 0
    busy: int = 0
    stalls: int = 0
    upload_cuts: int = 0
    greeting_s: float = 0.0
    after_bytes: int = 100_000


class FaultProxy:
    """Forwards 127.0.0.1:`port` to `target`; `faults` may be set at any time, `happened` counts what was done."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.faults = Faults()
        self.happened = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.close()

    def _take(self, name: str) -> bool:
        with self._lock:
            left = getattr(self.faults, name)
            if left <= 0:
                return False
            setattr(self.faults, name, left - 1)
            self.happened += 1
            return True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self.target) as server:
            time.sleep(self.faults.greeting_s)
            if self._take("stalls"):
                client.recv(1 << 16)
                threading.Event().wait(30)
                return
            if self._take("busy"):
                client.recv(1 << 16)
                body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                client.sendall(head.encode() + body)
                return
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            passed = 0
            while data := server.recv(1 << 14):
                if passed <= self.faults.after_bytes < passed + len(data):
                    if self._take("cuts"):
                        client.sendall(data[: self.faults.after_bytes - passed])
                        time.sleep(0.05)  # a reset throws away what the client has not read yet
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        client.shutdown(socket.SHUT_RD)  # wakes _forward, whose recv would hold the socket open
                        return
                    if self._take("flips"):
                        data = data[:-1] + bytes([data[-1] ^ 1])
                client.sendall(data)
                passed += len(data)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            passed = 0
            while data := source.recv(1 << 14):
                passed += len(data)
                if passed > self.faults.after_bytes and self._take("upload_cuts"):
                    source.shutdown(socket.SHUT_RDWR)
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
