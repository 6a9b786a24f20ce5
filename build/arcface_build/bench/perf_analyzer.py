"""Runs perf_analyzer, Triton's load generator, on real crops, and computes throughput and latencies itself."""

from __future__ import annotations

import atexit
import base64
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

import numpy as np

from arcface_build.bench.fetch_perf_analyzer import cached_perf_analyzer, fetch_perf_analyzer
from arcface_build.bench.interleaved import Work
from arcface_build.imports.source import CACHE
from arcface_clients.contract import FACE_INPUT
from arcface_clients.errors import ArcFaceError, Missing, WrongUse
from arcface_clients.extras import install_command
from arcface_clients.triton.address import Access, Tls

# Values of --protocol → perf_analyzer's arguments; the first word says which port of the server is used.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "grpc": ("-i", "grpc"),
    "grpc-shm": ("-i", "grpc", "--shared-memory", "system"),
    "grpc-cudashm": ("-i", "grpc", "--shared-memory", "cuda"),
    "http": ("-i", "http"),
    "http-shm": ("-i", "http", "--shared-memory", "system"),
    "http-json": ("-i", "http", "--input-tensor-format", "json", "--output-tensor-format", "json"),
}
# The export contains one face and all embeddings of each request as decimal text, so the file size is bounded.
_MOST_EXPORT_BYTES = 120e6
_TEXT_BYTES_OF_FACE, _TEXT_BYTES_OF_EMBEDDING = 150e3, 10.5e3
_FEWEST_GENERATIONS = 3
# perf_analyzer sometimes hangs on a loaded machine: a sample that takes this much too long is restarted once.
START_S = 30.0
_SLOWEST_FACES_PER_S = 1.0  # assumed until a rate is measured: a large network on one old core
_PATIENCE = 10.0  # times the duration expected from the measured rate


@dataclass(frozen=True)
class Load:
    """One point of a benchmark: `concurrency` callers, each with one request of `batch` faces always in flight."""

    model: str
    protocol: str = "grpc"
    batch: int = 32
    concurrency: int = 2

    def __post_init__(self) -> None:
        """Reject an unknown protocol and counts below one."""
        if self.protocol not in PROTOCOLS:
            raise WrongUse(f"unknown protocol {self.protocol!r}: expected one of {', '.join(PROTOCOLS)}.")
        if self.batch < 1 or self.concurrency < 1:
            raise WrongUse(f"batch {self.batch}, concurrency {self.concurrency}: expected both to be at least 1.")

    @property
    def name(self) -> str:
        """For tables: model, protocol, batch and concurrency."""
        return f"{self.model} {self.protocol} b{self.batch} c{self.concurrency}"

    def most_requests(self) -> int:
        """Maximum number of requests in a sample, which bounds the size of the exported file."""
        return int(_MOST_EXPORT_BYTES / (_TEXT_BYTES_OF_FACE + self.batch * _TEXT_BYTES_OF_EMBEDDING))


@dataclass
class PerfAnalyzer:
    """A perf_analyzer that is known to start, with the environment that its libraries need."""

    path: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def measure(
        self,
        load: Load,
        url: str,
        input_data: Path,
        requests: int,
        requests_per_s: float = 0.0,
        access: Sequence[str] = (),
    ) -> Work:
        """Send `requests` requests in a closed loop and time them from their own timestamps.

        perf_analyzer's printed throughput counts whole windows, which is off by up to a request in each: too much if a
        request takes two seconds. So the rate is that of all generations (one request of each caller) after the first,
        which starts on an idle server: (n − c) · batch / (end of request n − end of request c).

        Args:
            load: what to send, and to which model.
            url: host:port of the protocol that the load names.
            input_data: file written by `write_input_data`.
            requests: minimum number; rounded up to whole generations, and bounded by `Load.most_requests`.
            requests_per_s: rate of an earlier sample, 0 if there is none; decides when a run counts as hung.
            access: perf_analyzer's own options for headers and TLS (`access_options`).

        Raises:
            ArcFaceError: it or a request failed, or it hung twice; the message includes perf_analyzer's own.
        """
        generations = max(_FEWEST_GENERATIONS, -(-min(requests, load.most_requests()) // load.concurrency)) + 1
        count = generations * load.concurrency
        with tempfile.TemporaryDirectory(prefix="perf_analyzer-") as folder:
            export = Path(folder) / "requests.json"  # must not exist yet
            line = [str(self.path), "-m", load.model, "-u", url, *PROTOCOLS[load.protocol], "-b", str(load.batch)]
            line += ["--concurrency-range", f"{load.concurrency}:{load.concurrency}:1", "--request-count", str(count)]
            line += ["--input-data", str(input_data), "--profile-export-file", str(export), *access]
            answer = self._run_patiently(line, deadline_s(count, load.batch, requests_per_s), export)
            if answer.returncode or not export.is_file():
                raise ArcFaceError(f"perf_analyzer failed on {load.name} at {url}: {_reason(answer)}")
            starts, ends = _timestamps(export)
        if len(ends) < 2 * load.concurrency:
            raise ArcFaceError(
                f"perf_analyzer answered {len(ends)} of {count} requests on {load.name}: {_reason(answer)}"
            )
        return work_from_timestamps(starts, ends, load.batch, load.concurrency)

    def _run_patiently(self, line: Sequence[str], timeout_s: float, export: Path) -> subprocess.CompletedProcess[str]:
        try:
            return self._run(line, timeout_s)
        except subprocess.TimeoutExpired:
            export.unlink(missing_ok=True)
        try:
            return self._run(line, timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise ArcFaceError(
                f"perf_analyzer hung: it did not finish within {timeout_s:.0f} s, twice. "
                "Check the server (curl http://HOST:8000/v2/health/ready), or use a smaller batch."
            ) from exc

    def check(self) -> None:
        """Check that it starts.

        Raises:
            Missing: one of its libraries is not on this host; the message names the package.
        """
        try:
            answer = self._run([str(self.path), "--version"], START_S)
        except subprocess.TimeoutExpired as exc:
            raise Missing(f"{self.path} does not start: no answer to --version within {START_S:.0f} s.") from exc
        said = answer.stdout + answer.stderr
        library = re.search(r"loading shared libraries: (\S+?):|version `(\S+?)' not found", said)
        if library:
            name = library.group(1) or library.group(2)
            package = {
                "libb64.so.0d": "apt-get install libb64-0d",
                "libcudart.so.12": f"{install_command('evidence')} (it includes nvidia-cuda-runtime-cu12)",
            }
            raise Missing(
                f"{self.path} needs {name}, which this host lacks. Next: {package.get(name, f'install {name}')}"
            )
        if answer.returncode:
            raise Missing(f"{self.path} does not start (status {answer.returncode}): {_reason(answer)}")

    def _run(self, line: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace"
        )


def deadline_s(requests: int, batch: int, requests_per_s: float = 0.0) -> float:
    """Seconds after which a run of this many requests counts as hung."""
    expected_s = requests / requests_per_s * _PATIENCE if requests_per_s else requests * batch / _SLOWEST_FACES_PER_S
    return START_S + expected_s


def access_options(access: Access, encrypted: bool) -> list[str]:
    """perf_analyzer's options for a server's headers and TLS files; visible to anyone who can list processes."""
    line = [word for name, value in access.get("headers", {}).items() for word in ("-H", f"{name}:{value}")]
    tls = access.get("tls") or Tls()
    if encrypted:
        line += ["--ssl-grpc-use-ssl"]
    files = {
        "--ssl-grpc-root-certifications-file": tls.ca_file,
        "--ssl-grpc-certificate-chain-file": tls.cert_file,
        "--ssl-grpc-private-key-file": tls.key_file,
        "--ssl-https-ca-certificates-file": tls.ca_file,
        "--ssl-https-client-certificate-file": tls.cert_file,
        "--ssl-https-private-key-file": tls.key_file,
    }
    for option, file in files.items():
        line += [option, str(file)] if file else []
    return line


def work_from_timestamps(starts_ns: np.ndarray, ends_ns: np.ndarray, batch: int, concurrency: int) -> Work:
    """Throughput and latencies of the generations after the first; int64 (n,) nanoseconds of one clock, any order."""
    order = np.argsort(ends_ns, kind="stable")
    starts_ns, ends_ns = starts_ns[order], ends_ns[order]
    whole = len(ends_ns) // concurrency * concurrency
    counted = slice(concurrency, whole)
    return Work(
        faces=(whole - concurrency) * batch,
        wall_s=float(ends_ns[whole - 1] - ends_ns[concurrency - 1]) / 1e9,
        latencies_ms=((ends_ns[counted] - starts_ns[counted]) / 1e6).tolist(),
        faces_in_all=len(ends_ns) * batch,
    )


def write_input_data(faces_bgr_u8: np.ndarray, path: Path) -> Path:
    """Write faces, uint8 (N,112,112,3), as perf_analyzer's JSON: one step per face, from which it fills batches."""
    steps = [{FACE_INPUT: {"b64": base64.b64encode(face.tobytes()).decode()}} for face in faces_bgr_u8]
    path.write_text(json.dumps({"data": steps}))
    return path


def find_perf_analyzer(cache: Path = CACHE, say: Callable[[str], None] = lambda line: None) -> PerfAnalyzer:
    """The perf_analyzer on PATH, of this environment, or of the installed tritonclient wheel; else a fetched one.

    It is fetched once into the folder `cache`; `say` is called with a message.

    Raises:
        Missing: there is none, or one of its libraries is not on this host; the message names the package.
    """
    path = _binary(cache) or fetch_perf_analyzer(cache, say)
    program = PerfAnalyzer(path, _library_environment())
    program.check()
    return program


def _binary(cache: Path) -> Path | None:
    """Search PATH, beside this Python, the wheel's record, and what was fetched earlier, in this order."""
    candidates = [Path(sys.executable).with_name("perf_analyzer")]
    if on_path := shutil.which("perf_analyzer"):
        candidates.insert(0, Path(on_path))
    with suppress(metadata.PackageNotFoundError):
        files = metadata.files("tritonclient") or []
        candidates += [Path(str(file.locate())).resolve() for file in files if file.name == "perf_analyzer"]
    candidates.append(cached_perf_analyzer(cache))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _library_environment() -> dict[str, str]:
    """LD_LIBRARY_PATH for that process only: CUDA's runtime from its wheel, libb64 from Triton's wheel."""
    folders = []
    cuda = util.find_spec("nvidia.cuda_runtime") if util.find_spec("nvidia") else None
    if cuda and cuda.submodule_search_locations:
        folders.append(str(Path(next(iter(cuda.submodule_search_locations))) / "lib"))
    pytriton = util.find_spec("pytriton")
    if pytriton and pytriton.origin:
        bundled = sorted((Path(pytriton.origin).parent.parent / "nvidia_pytriton.libs").glob("libb64-*.so.0d"))
        if bundled:  # auditwheel added a digest to its name
            folder = tempfile.mkdtemp(prefix="libb64-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            (Path(folder) / "libb64.so.0d").symlink_to(bundled[0])
            folders.append(folder)
    folders.append(os.environ.get("LD_LIBRARY_PATH", ""))
    return {"LD_LIBRARY_PATH": ":".join(filter(None, folders))}


def _timestamps(export: Path) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of each request in nanoseconds, without parsing the tensors in the export."""
    pattern = re.compile(rb'"timestamp":\s*(\d+)|"response_timestamps":\s*\[(?:\d+,\s*)*(\d+)\]')
    starts: list[int] = []
    ends: list[int] = []
    with export.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for found in pattern.finditer(text):
            (starts if found.group(1) else ends).append(int(found.group(1) or found.group(2)))
    answered = min(len(starts), len(ends))
    return np.array(starts[:answered], np.int64), np.array(ends[:answered], np.int64)


def _reason(answer: subprocess.CompletedProcess[str]) -> str:
    """The line of its output that says why, without its usage text."""
    lines = [line.strip() for line in (answer.stderr + "\n" + answer.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fail|thread|unable|not found|invalid", line, re.IGNORECASE)]
    return " ".join((telling or lines or ["it printed nothing"])[:3])
