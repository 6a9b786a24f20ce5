"""A running tritonserver: started on a repository, watched until ready, stopped without leaving a process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from arcface_build.allocator import with_jemalloc
from arcface_build.errors import ServerFailed
from arcface_build.host_memory import processes_killed
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.command_line import CONNECTIONS, arguments
from arcface_build.serving.exposure import Exposure, from_here, no_other_ports
from arcface_build.serving.guard import Guard
from arcface_build.serving.launcher import launcher
from arcface_build.serving.listener import pid_listening_on
from arcface_build.serving.plain_paths import PlainPaths
from arcface_build.serving.ports import PortLock, Ports
from arcface_build.serving.reasons import for_want_of_memory, missing_library, reason_in_log, reason_of_end
from arcface_clients.triton.address import Address
from arcface_clients.triton.admin_key import VARIABLE
from arcface_clients.triton.certificate import presented_sha256

EXIT_TIMEOUT_S = 15.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server of this host is behind no proxy
# p50 … p99.9 over the last minute; without it Triton has sums only. Wanted by an alert of deploy/prometheus/rules.yml.
LATENCY_QUANTILES = "--metrics-config=summary_latencies=true"


class TritonProcess:
    """One tritonserver child; a context manager that stops it.

    Args:
        binary: what `find_tritonserver` found.
        repository: a folder, or an s3:// address that Triton itself reads.
        models: what to load; the models that an ensemble is composed of come with it.
        config_name: Triton's --model-config-name: tensorrt, onnx or reference.
        log_path: where the server's output goes.
        extra: further arguments for tritonserver, as they are.
        exit_timeout_s: how long running requests may take to finish when it is stopped.
        folder: where it runs. Its Python models look there for modules, before all other places: a json.py in it would
            be executed. So not where the command was started, but the root, which nobody else may write to.
        guarded: whether model control, shared memory, trace and log settings want a key, which this user's clients
            find by themselves; False only where `extra` says how they are guarded.
    """

    def __init__(
        self,
        binary: TritonBinary,
        repository: Path | str,
        models: Sequence[str],
        *,
        log_path: Path,
        config_name: str = "onnx",
        ports: Ports | None = None,
        exposure: Exposure | None = None,
        extra: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        exit_timeout_s: float = EXIT_TIMEOUT_S,
        folder: Path = Path("/"),
        guarded: bool = True,
    ) -> None:
        self.ports = ports or Ports()
        self.exposure = exposure or Exposure()
        self.models = tuple(models)
        self.log_path = log_path
        self._line_of = partial(
            arguments, models=models, config_name=config_name, ports=self.ports, exposure=self.exposure
        )
        self._binary, self._repository, self._extra = binary, repository, extra
        self._exit_timeout_s, self._folder = exit_timeout_s, folder
        self._paths = PlainPaths()
        self._regions = f"arcface_{uuid.uuid4().hex}_"  # how the names of its shared memory begin
        self._guard = Guard() if guarded else None
        environment = {**os.environ, **binary.environment, **(environment or {})}
        self._environment = {"CUDA_MODULE_LOADING": "LAZY", **with_jemalloc(no_other_ports(environment))}
        self._child: subprocess.Popen[bytes] | None = None
        self._lock: PortLock | None = None
        self._killed_before = 0

    @property
    def grpc_url(self) -> str:
        """Where clients reach gRPC: host:port, and grpcs://host:port where it is encrypted."""
        scheme = "grpcs://" if self.exposure.tls else ""
        return f"{scheme}{self.exposure.client_host()}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """host:port of the HTTP endpoint."""
        return f"{from_here(self.exposure.http_host)}:{self.ports.http}"

    @property
    def own_url(self) -> str:
        """Where whoever started it asks it for faces: gRPC, and HTTP where gRPC is encrypted.

        It is the same server and the same models, and it needs neither a client's certificate nor a name that resolves.
        """
        return f"http://{self.http_url}" if self.exposure.tls else self.grpc_url

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{from_here(self.exposure.metrics_host)}:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int | None:
        """Process id of tritonserver while it runs."""
        return self._child.pid if self._child and self._child.poll() is None else None

    def start(self) -> TritonProcess:
        """Start the server and return at once; `wait_ready` follows.

        Raises:
            ServerFailed: a port is taken, the log cannot be written, or the program cannot be executed.
        """
        self._lock = PortLock(self.ports, self.exposure.hosts())
        try:
            self._launch()
        except BaseException:
            self.kill()  # nobody else removes what it has made so far
            raise
        return self

    def _launch(self) -> None:
        self.ports.check_free(self.exposure.hosts())
        if not os.access(self._binary.path, os.X_OK):
            raise ServerFailed(f"cannot execute {self._binary.path}: it is not there, or not executable.")
        backends = self._binary.backend_directory
        binary = replace(self._binary, backend_directory=backends and Path(self._paths.of(backends, "backends")))
        line = [*self._line_of(binary, self._paths.of(self._repository, "repository")), *CONNECTIONS]
        line += [f"--exit-timeout-secs={math.ceil(self._exit_timeout_s)}", *self._extra]
        for backend in ("python", *(p.name for p in backends.iterdir() if p.is_symlink())) if backends else ("python",):
            line.append(f"--backend-config={backend},shm-region-prefix-name={self._regions}")
        if self._guard:
            line += self._guard.options()
            self._guard.leave_key((self.ports.http, self.ports.grpc))
        self._killed_before = processes_killed()
        with self._new_log() as log:
            try:
                self._child = subprocess.Popen(
                    [*launcher(self._exit_timeout_s, regions=self._regions), *line],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.PIPE,  # nothing is ever written: its end tells that we are gone
                    cwd=self._folder,
                    env={name: text for name, text in self._environment.items() if name != VARIABLE},
                    start_new_session=True,  # Ctrl-C reaches us first; the group is ours to end as a whole
                )
            except OSError as exc:
                raise ServerFailed(f"cannot execute {self._binary.path}: {exc}") from exc

    def _new_log(self) -> BinaryIO:
        """An empty log; what the server before said last stays beside it."""
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self.log_path):
                self.log_path.replace(self.log_path.with_suffix(".previous.log"))
            return self.log_path.open("xb")  # never through a link that somebody put there
        except OSError as exc:
            raise ServerFailed(f"cannot write the server's log {self.log_path}: {exc.strerror}") from exc

    def wait_ready(self, timeout_s: float = 180.0) -> None:
        """Return when the server and all its models are ready.

        Raises:
            ServerFailed: the server ended, or was not ready in time; the message carries Triton's own reason.
        """
        if self._child is None:
            raise ServerFailed("the server was not started: call start() first.")
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._child.poll() is not None:
                raise ServerFailed(self._why_it_ended())
            # The first line of the log comes after Triton has read its options.
            if self._guard and not self._guard.is_hidden and self.log_path.stat().st_size:
                self._guard.hide(self._child.pid)
            if missing_library(self.log_path):  # a stub that cannot start: Triton would wait for it for ever
                self.stop()
                raise ServerFailed(f"tritonserver cannot load its models: {reason_in_log(self.log_path)}")
            try:
                with _OPENER.open(f"http://{self.http_url}/v2/health/ready", timeout=2):
                    answering = pid_listening_on(self.ports.http)
                if answering is None or os.getpgid(answering) == self._child.pid:  # None: /proc does not tell
                    return self._check_encryption()
                time.sleep(0.1)  # another program's server; ours will say that it cannot listen, and end
            except OSError:  # nobody answers yet, or ended meanwhile
                time.sleep(0.1)
        self.stop()
        raise ServerFailed(f"tritonserver was not ready after {timeout_s:g} s. Its log: {self.log_path}")

    def _check_encryption(self) -> None:
        """Shake hands with gRPC as its clients will, to see that it is encrypted, and with which certificate.

        Raises:
            ServerFailed: it is not, or by another.
        """
        tls, place = self.exposure.tls, Address("grpc", True, from_here(self.exposure.host), self.ports.grpc)
        if tls and presented_sha256(place, timeout_s=5.0) != tls.certificate.sha256:
            self.stop()
            raise ServerFailed(f"gRPC does not present {tls.cert_file}. Its log: {self.log_path}")

    def ask(self, path: str, timeout_s: float) -> Any:
        """The JSON of an HTTP path of the server.

        Raises:
            OSError, ValueError: no answer, or none that is JSON.
        """
        with _OPENER.open(f"http://{self.http_url}{path}", timeout=timeout_s) as answer:
            return json.load(answer)

    def serves(self, model: str, timeout_s: float = 2.0) -> bool:
        """Whether it calls the model ready, as it does one whose process died; True also where it does not say."""
        try:
            with _OPENER.open(f"http://{self.http_url}/v2/models/{model}/ready", timeout=timeout_s):
                return True
        except urllib.error.HTTPError:
            return False
        except OSError:
            return True

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Block until the server ends by itself; returns its exit status, None where it still runs after the time."""
        try:
            return self._child.wait(timeout_s) if self._child else 0
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End the server: SIGTERM, which lets running requests finish, then SIGKILL for the whole group.

        Interrupted itself (a second Ctrl-C), it does not wait for those requests.
        """
        child = self._child
        if child is None:
            return
        try:
            if child.poll() is None:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(self._exit_timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the server at once, as a crash would, and remove what only its own end removes."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):  # stubs of the python backend are in its group as well
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if child.stdin:
                child.stdin.close()
            for region in Path("/dev/shm").glob(f"{self._regions}*"):
                region.unlink(missing_ok=True)
        if self._guard:
            self._guard.forget()
        if self._lock is not None:
            self._lock.release()
        self._paths.remove()

    def __enter__(self) -> TritonProcess:
        """Start."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Stop."""
        self.stop()

    def _why_it_ended(self) -> str:
        status = self._child.returncode if self._child else 0
        why = f"tritonserver ended while starting {reason_of_end(status, self.log_path)}"
        return f"{why}; {for_want_of_memory()}" if processes_killed() > self._killed_before else why
